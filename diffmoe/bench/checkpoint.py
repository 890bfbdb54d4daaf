"""``run.py bench checkpoint``: what a save costs, by three ways that take turns in one run on the
same engine.

``full state dict``: every tensor of every kind gathered on rank 0, which writes them with
``torch.save``; ``streamed``: this trainer with ``train.async_save=false``; ``beside training``:
with it.  All of them sync to the disk.  The stall is the time that training stands still, the total
the time until the checkpoint is safe; the bare total of ``beside training`` is without any training
beside it.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch

from diffmoe.bench.measure import report, table
from diffmoe.bench.options import bench_parser
from diffmoe.config import Config, load_config
from diffmoe.deepspeed_json import merge_deepspeed
from diffmoe.errors import UserError
from diffmoe.layout import resolve_layout
from diffmoe.models.logical import new_model
from diffmoe.parallel.collectives import raise_together
from diffmoe.parallel.groups import build_groups
from diffmoe.parallel.spawn import Ranks
from diffmoe.training.ema import Ema
from diffmoe.training.engine import FIRST_MOMENT, MASTER, SECOND_MOMENT, Engine
from diffmoe.training.saver import Saved, Saver

FACTS = ("model", "experts", "ranks", "zero", "repeats")
WAYS = ("full state dict", "streamed", "beside training")


def main(arguments: list[str]) -> int:
    """The kind ``checkpoint``; returns the exit code.  UserError for bad input."""
    description = "Stall and total time of a save against torch.save of a full state dict."
    parser = bench_parser("checkpoint", description, of="machine")
    add = parser.add_argument
    add("--model", choices=["s", "b", "l", "xl"], default="s", help="size (default s)")
    add("--experts", type=int, default=4, help="default 4")
    add("--ranks", type=int, default=2, help="default 2, which share one set of experts")
    add("--zero", type=int, choices=range(4), default=1, help="ZeRO stage (default 1)")
    add("--repeats", type=int, default=5, help="timed rounds (default 5)")
    add("--folder", help="on the disk that is meant (default: the system's temporary folder)")
    options = parser.parse_args(arguments)
    for name in ("ranks", "repeats"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} ({getattr(options, name)}) must be at least 1")
    overrides = [f"moe.experts={options.experts}", "moe.pool=1"]
    overrides += [f"parallel.ep={options.ranks}", f"train.batch={options.ranks}"]
    config = load_config(f"configs/base/{options.model}.yaml", overrides)
    with (
        tempfile.TemporaryDirectory(prefix="bench-checkpoint-", dir=options.folder) as folder,
        Ranks(options.ranks, timeout=1800.0) as ranks,
    ):
        size, rounds = ranks.run(_measure, folder, config, options.zero, options.repeats)[0]
    medians = {}
    for way in WAYS:
        stalls, totals = zip(*(found[way] for found in rounds))
        medians[way] = {"stall_s": statistics.median(stalls), "total_s": statistics.median(totals)}
    facts = {name: getattr(options, name) for name in FACTS} | {
        "bytes": size,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "medians": medians,
        "rounds": rounds,
    }
    rows = []
    for way, found in medians.items():
        cells = [way]
        for what, seconds in found.items():
            cells += [f"{seconds:.3f}", f"{seconds / medians[WAYS[0]][what]:.2f}"]
        rows.append((*cells, f"{size / found['total_s'] / 1e9:.2f}"))
    heads = ("way", "stall s", "ratio", "total s", "ratio", "GB/s")
    text = (
        f"{options.model} with {options.experts} experts, {options.ranks} ranks, ZeRO "
        f"{options.zero}: {size / 1e9:.2f} GB of fp32 state (weights, EMA, moments); medians of "
        f"{options.repeats} rounds\n\n{table(heads, rows)}"
    )
    return report("checkpoint", facts, text, {}, "", options)


def _measure(
    folder: str, config: Config, stage: int, repeats: int
) -> tuple[int, list[dict[str, tuple[float, float]]]]:
    """(bytes of state of all ranks, (stall, total) seconds by way and round)."""
    layout = resolve_layout(config, torch.distributed.get_world_size())
    groups = build_groups(layout.ep, layout.pool_ranks)
    model = new_model(config, layout.pool, groups)
    tree = merge_deepspeed({"zero_optimization": {"stage": stage}}, config, layout)
    engine = Engine(model, config, tree, groups, torch.device("cpu"))
    ema = Ema(engine, config.train)
    savers = {}
    for way in WAYS[1:]:
        train = dataclasses.replace(config.train, async_save=way == "beside training", keep=1)
        where = Path(folder) / way.replace(" ", "_")
        savers[way] = Saver(where, dataclasses.replace(config, train=train), layout, groups)
    size, rounds = 0, []
    for number in range(repeats + 1):  # the first warms up
        found: dict[str, tuple[float, float]] = {}
        for way in WAYS[number % 3 :] + WAYS[: number % 3]:
            raise_together(None, groups.world)
            began = time.perf_counter()
            if way in savers:
                savers[way].save(number, engine, ema)
                savers[way].wait()
                raise_together(None, groups.world)
                (saved,) = savers[way].outcomes()
                if not isinstance(saved, Saved):
                    raise OSError(saved.message)
                found[way] = (saved.stall_s, time.perf_counter() - began)
            else:
                size = _save_full_state(Path(folder) / "full.pt", engine, ema)
                raise_together(None, groups.world)
                found[way] = (time.perf_counter() - began,) * 2
        if number:
            rounds.append(found)
    engine.engine.destroy()
    return size, rounds


def _save_full_state(path: Path, engine: Engine, ema: Ema) -> int:
    """As scripts without shards do: all on rank 0, in one file.  Its bytes, on rank 0."""
    kinds = {kind: engine.shards(kind) for kind in (MASTER, FIRST_MOMENT, SECOND_MOMENT)}
    kinds["ema"] = ema.shards
    ep, first = engine.groups.ep, engine.groups.rank == 0
    state: dict[str, torch.Tensor] = {}
    for kind, shards in kinds.items():
        for tensor, value in engine.read(shards):
            parts = [value]
            if tensor.experts is not None and ep.size > 1:
                parts = [torch.empty_like(value) for _ in ep.ranks] if first else []
                torch.distributed.gather(
                    value.contiguous(), parts or None, dst=ep.ranks[0], group=ep.handle
                )
            if first:
                state[f"{kind}/{tensor.name}"] = torch.cat(parts).cpu().clone()
    if not first:
        return 0
    with open(path, "wb") as stream:
        torch.save(state, stream)
        stream.flush()
        os.fsync(stream.fileno())
    return sum(value.nbytes for value in state.values())
