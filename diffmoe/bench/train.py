"""``run.py bench train``: a thousand steps of real training on made-up latents, by the program that
everybody runs.

Shards are written, ``run.py`` trains from them, is told to stop in the middle by SIGTERM, is
started again by the same command and ends.  Wrong is: a program that fails, a step that is missing
or comes twice, a loss that is not finite or does not fall, memory that grows.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from diffmoe.bench import measure
from diffmoe.bench.options import bench_parser, count
from diffmoe.code_version import ROOT
from diffmoe.data.shards import ShardMeta, write_shards
from diffmoe.device import local_device
from diffmoe.errors import UserError

_GROWN = 1.05  # of memory, from a quarter of a program's records on, ...
_SLACK = 0.25  # ... and GiB that the allocator or Python may take all the same


@dataclass(frozen=True)
class Program:
    """One start of run.py: which record was its first, and its memory over time in GiB."""

    first: int
    host_gib: list[float]


def main(arguments: list[str]) -> int:
    """The kind ``train``; returns 1 where something is wrong.  UserError for bad input."""
    parser = bench_parser(
        "train",
        "A training that is stopped in the middle and resumed: loss and memory.",
        of="config",
    )
    parser.set_defaults(config="configs/diffmoe_s_e16_flow.yaml")
    parser.add_argument("--steps", type=count, default=1000, help="default 1000")
    parser.add_argument("--samples", type=count, default=2048, help="of the data (default 2048)")
    options = parser.parse_args(arguments)
    if options.steps < 20:
        raise UserError(f"--steps ({options.steps}) must be at least 20")
    if not options.out:
        raise UserError("--out (a folder, which also holds the run while it lasts) is missing")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of what ends the run
    work, every = Path(options.out) / "train_run", max(1, options.steps // 100)
    command = [sys.executable, str(ROOT / "run.py"), "--config", options.config]
    command += ["--deepspeed_config", options.deepspeed_config]
    command += ["parallel.ep=1", "train.micro_batch=64", "data.flip=false", *options.set]
    command += [f"train.steps={options.steps}", f"train.log_every={every}", "train.save_every=0"]
    command += [f"data.shards={work / 'data'}", f"run.folder={work / 'run'}"]
    shutil.rmtree(work, ignore_errors=True)
    began = time.monotonic()
    programs: list[Program] = []
    wrong: list[str] = []
    meta = ShardMeta("moments", 1000, 0.18215)
    write_shards(_samples(options.samples), work / "data", samples_per_shard=256, meta=meta)
    for stop in (options.steps // 2, None):
        if not wrong:
            programs.append(Program(len(_records(work)), []))
            wrong += _run(command, work, stop, programs[-1].host_gib)
    records, title, first = _records(work), Path(options.config).stem, programs[-1].first
    stopped = records[first - 1]["step"] if first else None
    if not wrong and stopped in (None, options.steps):
        wrong.append("the run ended before it could be stopped")
    wrong += complaints(records, options.steps, every, programs)
    losses = [r["loss"] for r in records if r["loss"] is not None] or [math.nan]
    tenth = max(1, len(losses) // 10)
    memory = [r["memory_gib"] for r in records] or [math.nan]
    seconds = time.monotonic() - began
    facts = {
        "config": title,
        "engine": Path(options.deepspeed_config).stem,
        "steps": options.steps,
        "stopped_at": stopped,
        "loss": [statistics.mean(losses[:tenth]), statistics.mean(losses[-tenth:])],
        "losses": losses,
        "memory_gib": [memory[min(tenth, len(memory) - 1)], max(memory)],
        "host_gib": [[round(gib, 3) for gib in each.host_gib[::10]] for each in programs],
        "images_per_second": statistics.median([r["images_per_s"] for r in records] or [math.nan]),
        "mfu": statistics.median([r["mfu"] for r in records] or [math.nan]),
        "seconds": seconds,
        "wrong": wrong,
        **measure.surroundings(local_device(0, 1)),
    }
    head = ["steps", "stopped at", "loss", "at last", "images/s", "GiB early", "at most", "s"]
    row = [options.steps, stopped, *facts["loss"], facts["images_per_second"]]
    text = measure.table(head, [[*row, *facts["memory_gib"], seconds]])
    text += "".join(f"\n\nwrong: {line}" for line in wrong)
    bars = {f"{100 * i // len(losses)} %": losses[i] for i in range(0, len(losses), tenth)}
    measure.report(f"train_{title}", facts, text, bars, "loss", options)
    shutil.rmtree(work)
    return 1 if wrong else 0


def _samples(number: int) -> Iterator[tuple[str, np.ndarray, int]]:
    """Moments [8, 32, 32] that can be learned: smooth means of a class, and deviations."""
    rng, deviations = np.random.default_rng(0), np.full((4, 32, 32), 0.5)
    for i in range(number):
        rough = np.random.default_rng(i % 10).standard_normal((4, 4, 4))
        means = 4 * np.kron(rough, np.ones((1, 8, 8))) + rng.standard_normal((4, 32, 32))
        yield f"{i:07d}", np.concatenate([means, deviations]).astype(np.float16), i % 10


def _records(work: Path) -> list[dict]:
    path = work / "run" / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]  # none half written


def _run(command: list[str], work: Path, stop: int | None, host: list[float]) -> list[str]:
    """What is wrong with a program told to stop at step ``stop``; ``host``: its GiB over time."""
    with open(work / "run.log", "a") as log:
        program = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        while program.poll() is None:
            time.sleep(0.1)
            records = _records(work)
            if stop is not None and records and records[-1]["step"] >= stop:
                program.send_signal(signal.SIGTERM)
                stop = None
            try:
                if records:
                    host.append(psutil.Process(program.pid).memory_info().rss / 2**30)
            except psutil.Error:  # it has just ended
                pass
    finally:
        if program.poll() is None:  # this process is ended: the run saves, and stops
            program.terminate()
            program.wait()
    if program.returncode:
        said = (work / "run.log").read_text().splitlines()[-20:]
        print("\n".join(said), flush=True)
        return [f"run.py ended with exit code {program.returncode}: {said[-1] if said else ''}"]
    return []


def complaints(records: list[dict], steps: int, every: int, programs: list[Program]) -> list[str]:
    """What is wrong with the metrics of a run that ``programs`` made, one after another."""
    wrong, seen = [], [r["step"] for r in records]
    if not seen or seen[-1] != steps:
        return [f"the run ended at step {seen[-1] if seen else 0} of {steps}"]
    if seen != sorted(set(seen)) or max(b - a for a, b in zip([0, *seen], seen)) > every:
        wrong.append(f"steps are missing or came twice: {seen}")
    losses = [math.nan if r["loss"] is None else r["loss"] for r in records]
    part = max(1, len(losses) // 4)
    first, last = statistics.mean(losses[:part]), statistics.mean(losses[-part:])
    if not all(map(math.isfinite, losses)):
        wrong.append("a loss is not finite")
    elif last >= first:
        wrong.append(
            f"the loss does not fall: {first:.4g} in the first quarter, {last:.4g} in the last"
        )
    memory = [r["memory_gib"] for r in records]  # the most so far of a program
    bounds = [*(each.first for each in programs), len(records)]
    device = [("device's", memory[a:b]) for a, b in zip(bounds, bounds[1:])]
    for name, series in device + [("host's", each.host_gib) for each in programs]:
        early = series[len(series) // 4 :][:1]
        if early and series[-1] > _GROWN * early[0] + _SLACK:
            wrong.append(
                f"the {name} memory grows: {early[0]:.3f} GiB after a quarter of a program, "
                f"{series[-1]:.3f} at its end"
            )
    return wrong
