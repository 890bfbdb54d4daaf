"""``run.py bench train``: a thousand steps of real training on made-up latents, by the program that
everybody runs.

Shards are written, ``run.py`` trains from them, is told to stop in the middle by SIGTERM, is
started again by the same command and ends.  Wrong is: a program that fails, a step that is missing
or comes twice, a loss that is not finite or does not fall, memory that grows.  Where this verb
itself is ended, it resumes: the run's folder stays until it is known what came of it.
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
from diffmoe.commands.common import Parser
from diffmoe.data.shards import INDEX_NAME, ShardMeta, write_shards
from diffmoe.device import local_device
from diffmoe.errors import UserError

_ROOT = Path(__file__).resolve().parents[2]
_GROWN = 1.05  # of memory, from a tenth of a program's records on, ...
_SLACK = 0.25  # ... and GiB that the allocator or Python may take all the same


@dataclass(frozen=True)
class Program:
    """One start of run.py: which record was its first, and its memory over time in GiB."""

    first: int
    host_gib: list[float]


def main(arguments: list[str]) -> int:
    """The kind ``train``; returns the exit code, 1 where something is wrong.  UserError for bad
    input.
    """
    parser = Parser(
        prog="bench train",
        description="A training that is stopped in the middle and resumed: loss and memory.",
    )
    parser.add_argument(
        "--config", default=str(_ROOT / "configs/diffmoe_s_e16_flow.yaml"), help="default: S-E16"
    )
    parser.add_argument(
        "--deepspeed_config",
        default=str(_ROOT / "ds_configs/zero1_bf16.json"),
        help="default: bf16",
    )
    parser.add_argument("--steps", type=int, default=1000, help="default 1000")
    parser.add_argument("--samples", type=int, default=2048, help="of the data (default 2048)")
    parser.add_argument(
        "--json", action="store_true", help="one line of JSON in place of the table"
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder of table, JSON and plot, and of the run while it lasts",
    )
    parser.add_argument(
        "--set",
        nargs="*",
        default=[],
        metavar="section.field=value",
        help="changes to the configuration",
    )
    options = parser.parse_args(arguments)
    if options.steps < 20 or options.samples < 1:
        raise UserError(
            f"--steps ({options.steps}) must be at least 20 and --samples ({options.samples}) at least 1"
        )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of what ends the run
    work = options.out / "train_run"
    every = max(1, options.steps // 100)
    command = [
        sys.executable,
        str(_ROOT / "run.py"),
        "--config",
        options.config,
        "--deepspeed_config",
        options.deepspeed_config,
        "parallel.ep=1",
        "train.micro_batch=64",
        "data.flip=false",
        *options.set,
        f"train.steps={options.steps}",
        "train.save_every=0",
        f"train.log_every={every}",
        f"data.shards={work / 'data'}",
        f"run.folder={work / 'run'}",
    ]
    began, programs, wrong = time.monotonic(), [], []
    if not (work / "data" / INDEX_NAME).is_file():
        write_shards(
            _samples(options.samples),
            work / "data",
            samples_per_shard=256,
            meta=ShardMeta("moments", 1000, 0.18215),
        )
    for stop in (options.steps // 2, None):
        done = _records(work)
        if not wrong and (not done or done[-1]["step"] < (stop or options.steps)):
            programs.append(Program(len(done), []))
            wrong += _run(command, work, stop, programs[-1].host_gib)
    records, title = _records(work), Path(options.config).stem
    stopped = records[programs[-1].first - 1]["step"] if programs and programs[-1].first else None
    if stopped is None and not wrong:
        wrong.append("the run ended before it could be stopped")
    wrong += complaints(records, options.steps, every, programs)
    losses = [r["loss"] for r in records if r["loss"] is not None] or [math.nan]
    tenth = max(1, len(losses) // 10)
    memory = [r["memory_gib"] for r in records] or [math.nan]
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
        "seconds": time.monotonic() - began,
        "wrong": wrong,
        **measure.surroundings(local_device(0, 1)),
    }
    text = measure.table(
        ["steps", "stopped at", "loss", "at last", "images/s", "GiB early", "at most", "s"],
        [
            [
                options.steps,
                stopped,
                *facts["loss"],
                facts["images_per_second"],
                *facts["memory_gib"],
                facts["seconds"],
            ]
        ],
    )
    text += "".join(f"\n\nwrong: {line}" for line in wrong)
    bars = {
        f"{100 * i // len(losses)} %": losses[i]
        for i in range(0, len(losses), max(1, len(losses) // 10))
    }
    measure.report(f"train_{title}", facts, text, bars, "loss", options)
    shutil.rmtree(work)
    return 1 if wrong else 0


def _samples(count: int) -> Iterator[tuple[str, np.ndarray, int]]:
    """Moments [8, 32, 32] as an autoencoder's: smooth means of a class, and deviations.  A model
    can learn them.
    """
    rng = np.random.default_rng(0)
    for i in range(count):
        rough = (
            np.random.default_rng(i % 10)
            .standard_normal((4, 4, 4))
            .repeat(8, axis=1)
            .repeat(8, axis=2)
        )
        means = 4 * rough + rng.standard_normal((4, 32, 32))
        yield (
            f"{i:07d}",
            np.concatenate([means, np.full((4, 32, 32), 0.5)]).astype(np.float16),
            i % 10,
        )


def _records(work: Path) -> list[dict]:
    path = work / "run" / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [
        json.loads(line) for line in lines if line.endswith("}")
    ]  # not one that is being written


def _run(command: list[str], work: Path, stop: int | None, host: list[float]) -> list[str]:
    """One program, told to stop once it has recorded step ``stop``; ``host`` gets its memory over
    time in GiB.
    """
    with open(work / "run.log", "a") as log:
        program = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=_ROOT)
    try:
        while program.poll() is None:
            time.sleep(0.1)
            records = _records(work)
            if stop is not None and records and records[-1]["step"] >= stop:
                program.send_signal(signal.SIGTERM)
                stop = None
            if records:
                host += _resident_gib(program.pid)
    finally:
        if program.poll() is None:  # this verb is ended: the run saves, and stops
            program.terminate()
            program.wait()
    if program.returncode:
        said = (work / "run.log").read_text().splitlines()[-20:]
        print("\n".join(said), flush=True)
        return [f"run.py ended with exit code {program.returncode}: {said[-1] if said else ''}"]
    return []


def _resident_gib(pid: int) -> list[float]:
    try:
        return [psutil.Process(pid).memory_info().rss / 2**30]
    except psutil.Error:  # it has just ended
        return []


def complaints(records: list[dict], steps: int, every: int, programs: list[Program]) -> list[str]:
    """What is wrong with the metrics of a run that ``programs`` made, one after another."""
    wrong, seen = [], [r["step"] for r in records]
    if not seen or seen[-1] != steps:
        return [f"the run ended at step {seen[-1] if seen else 0} of {steps}"]
    if seen != sorted(set(seen)) or max(b - a for a, b in zip([0, *seen], seen)) > every:
        wrong.append(f"steps are missing or came twice: {seen}")
    losses = [r["loss"] for r in records]
    if any(loss is None or not math.isfinite(loss) for loss in losses):
        wrong.append("a loss is not finite")
    else:
        part = max(1, len(losses) // 4)
        first, last = statistics.mean(losses[:part]), statistics.mean(losses[-part:])
        if last >= first:
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
