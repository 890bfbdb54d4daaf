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
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch

from diffmoe.commands.common import Parser
from diffmoe.config import Config, load_config
from diffmoe.errors import UserError
from diffmoe.layout import resolve_layout
from diffmoe.markdown import table
from diffmoe.models.dit import DiT
from diffmoe.models.logical import initialize
from diffmoe.parallel.collectives import raise_together
from diffmoe.parallel.groups import build_groups
from diffmoe.parallel.spawn import Ranks
from diffmoe.training.checkpoint import Saved, Saver
from diffmoe.training.ema import Ema
from diffmoe.training.engine import FIRST_MOMENT, MASTER, SECOND_MOMENT, Engine

WAYS = ("full state dict", "streamed", "beside training")


def main(arguments: list[str]) -> int:
    """The kind ``checkpoint``; returns the exit code.  UserError for bad input."""
    parser = Parser(
        prog="bench checkpoint",
        description="Stall and total time of a save against torch.save of a full state dict.",
    )
    parser.add_argument(
        "--model", choices=["s", "b", "l", "xl"], default="s", help="size (default s)"
    )
    parser.add_argument("--experts", type=int, default=4, help="default 4")
    parser.add_argument(
        "--ranks", type=int, default=2, help="default 2, which share one set of experts"
    )
    parser.add_argument(
        "--zero", type=int, choices=range(4), default=1, help="ZeRO stage (default 1)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds (default 5)")
    parser.add_argument(
        "--folder",
        help="where to write, on the disk that is meant (default: the system's temporary folder)",
    )
    parser.add_argument(
        "--json", action="store_true", help="one line of JSON in place of the table"
    )
    options = parser.parse_args(arguments)
    for name in ("ranks", "repeats"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} ({getattr(options, name)}) must be at least 1")
    config = load_config(
        f"configs/base/{options.model}.yaml",
        [
            f"moe.experts={options.experts}",
            f"parallel.ep={options.ranks}",
            f"train.batch={options.ranks}",
            "moe.pool=1",
        ],
    )
    with (
        tempfile.TemporaryDirectory(prefix="bench-checkpoint-", dir=options.folder) as folder,
        Ranks(options.ranks, timeout=1800.0) as ranks,
    ):
        size, rounds = ranks.run(_measure, folder, config, options.zero, options.repeats)[0]
    medians = {
        way: {
            what: statistics.median(r[way][i] for r in rounds)
            for i, what in enumerate(("stall_s", "total_s"))
        }
        for way in WAYS
    }
    if options.json:
        facts = {
            "model": options.model,
            "experts": options.experts,
            "ranks": options.ranks,
            "zero": options.zero,
            "repeats": options.repeats,
            "bytes": size,
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "medians": medians,
            "rounds": rounds,
        }
        print(json.dumps({"bench": "checkpoint", **facts}), flush=True)
        return 0
    base = medians[WAYS[0]]
    rows = [
        (
            way,
            *(
                text
                for what in ("stall_s", "total_s")
                for text in (f"{found[what]:.3f}", f"{found[what] / base[what]:.2f}")
            ),
            f"{size / found['total_s'] / 1e9:.2f}",
        )
        for way, found in medians.items()
    ]
    print(
        f"{options.model} with {options.experts} experts, {options.ranks} ranks, ZeRO {options.zero}: {size / 1e9:.2f} GB of fp32 "
        f"state (weights, EMA, moments); medians of {options.repeats} rounds\n"
    )
    print(
        "\n".join(table(("way", "stall s", "ratio", "total s", "ratio", "GB/s"), rows)), flush=True
    )
    return 0


def _measure(
    folder: str, config: Config, stage: int, repeats: int
) -> tuple[int, list[dict[str, tuple[float, float]]]]:
    """(bytes of state on all ranks, (stall, total) seconds by way and round); every rank, between
    barriers.
    """
    layout = resolve_layout(config, torch.distributed.get_world_size())
    groups = build_groups(layout.ep, layout.pool_ranks)
    model = DiT(config.model, config.moe, pool=layout.pool, groups=groups)
    initialize(model, config.run.seed)
    engine = Engine(
        model, config, layout, {"zero_optimization": {"stage": stage}}, groups, torch.device("cpu")
    )
    ema = Ema(engine, config.train.ema_decays)
    savers = {
        way: Saver(
            Path(folder) / way.replace(" ", "_"),
            _with(config, way == "beside training"),
            layout,
            groups,
        )
        for way in WAYS[1:]
    }
    size, rounds = 0, []
    for number in range(repeats + 1):  # the first warms up
        found: dict[str, tuple[float, float]] = {}
        for way in WAYS[number % 3 :] + WAYS[: number % 3]:
            raise_together(None, groups.world)
            began = time.perf_counter()
            if way in savers:
                savers[way].save(number, engine, ema)
                savers[way].settle()
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


def _with(config: Config, async_save: bool) -> Config:
    return dataclasses.replace(
        config, train=dataclasses.replace(config.train, async_save=async_save, keep=1)
    )


def _save_full_state(path: Path, engine: Engine, ema: Ema) -> int:
    """What a script without shards does: everything on rank 0, in one file.  Returns its bytes, on
    rank 0.

    Experts of other ranks are sent to rank 0 as well."""
    kinds = {
        **{kind: engine.shards(kind) for kind in (MASTER, FIRST_MOMENT, SECOND_MOMENT)},
        "ema": ema.shards,
    }
    ep = engine.groups.ep
    state: dict[str, torch.Tensor] = {}
    for kind, shards in kinds.items():
        for tensor, value in engine.read(shards):
            parts = [value]
            if tensor.experts is not None and ep.size > 1:
                parts = (
                    [torch.empty_like(value) for _ in ep.ranks] if engine.groups.rank == 0 else None
                )
                torch.distributed.gather(
                    value.contiguous(), parts, dst=ep.ranks[0], group=ep.handle
                )
            if engine.groups.rank == 0:
                state[f"{kind}/{tensor.name}"] = (
                    torch.cat(parts).cpu() if len(parts) > 1 else value.cpu().clone()
                )
    if engine.groups.rank != 0:
        return 0
    with open(path, "wb") as stream:
        torch.save(state, stream)
        stream.flush()
        os.fsync(stream.fileno())
    return sum(value.nbytes for value in state.values())
