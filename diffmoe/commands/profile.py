"""The verb ``profile``: where the time, memory and traffic of real training steps go, beside the
plan and the lower bound.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import itertools
import json
import platform
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diffmoe.commands.common import Parser, join, leave
from diffmoe.config import Config, config_from_tree, config_to_tree, load_config, override
from diffmoe.cost.memory import EngineFacts, engine_facts, rank_memory
from diffmoe.cost.traffic import least_traffic, step_traffic
from diffmoe.deepspeed_json import merge_deepspeed, read_deepspeed, zero_stage
from diffmoe.environment import RankEnvironment
from diffmoe.errors import UserError
from diffmoe.layout import Layout, resolve_layout
from diffmoe.markdown import table

if TYPE_CHECKING:
    import torch

    from diffmoe.data.share import Share
    from diffmoe.data.stream import Batch
    from diffmoe.parallel.groups import ParallelGroups
    from diffmoe.training.profiling import RankProfile


def main(arguments: list[str], environment: RankEnvironment) -> int:
    """The verb ``profile``; returns the exit code.  UserError for bad input."""
    options = _parse(arguments)
    # Nothing is saved or drawn, and the dial's histograms are a checkpoint's business.
    config = override(
        load_config(options.config, options.overrides),
        ["train.steps=1000000", "train.save_every=0", "train.sample_every=0"],
    )
    layout = resolve_layout(config, environment.world)
    tree = read_deepspeed(options.deepspeed_config)
    if options.zero is not None:
        tree = {
            **tree,
            "zero_optimization": {**(tree.get("zero_optimization") or {}), "stage": options.zero},
        }
    merge_deepspeed(tree, config, layout)
    device = join(environment, asked=config.run.device)
    record = _measure(config, layout, tree, environment, device, options)
    if environment.rank == 0:
        print(describe(record), flush=True)
        if options.json:
            with options.json.open("a") as lines:
                lines.write(json.dumps(record) + "\n")
    leave()
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="profile",
        description="Some real training steps: their time by phase, memory, and every message "
        "against the lower bound and the plan. Example: torchrun --standalone --nproc-per-node 2 run.py profile "
        "--config configs/demo.yaml --synthetic --json steps.jsonl",
    )
    parser.add_argument("--config", required=True, help="YAML file, see configs/")
    parser.add_argument(
        "--deepspeed_config", help="DeepSpeed JSON, see ds_configs/ (default: ZeRO 1, fp32)"
    )
    parser.add_argument(
        "--zero", type=int, choices=range(4), help="another ZeRO stage than the JSON's"
    )
    parser.add_argument("--steps", type=int, default=10, help="timed steps (default 10)")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them (default 3)")
    parser.add_argument(
        "--synthetic", action="store_true", help="made-up samples in place of data.shards"
    )
    parser.add_argument("--json", type=Path, help="append the record here, a line")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    options = parser.parse_intermixed_args(arguments)
    if options.steps < 1 or options.warmup < 0:
        raise UserError(
            f"--steps ({options.steps}) must be at least 1 and --warmup ({options.warmup}) at least 0"
        )
    if options.steps + options.warmup > 200:
        raise UserError(
            f"--steps ({options.steps}) + --warmup ({options.warmup}) must be at most 200: later steps fill histograms"
        )
    if options.json and not options.json.absolute().parent.is_dir():
        raise UserError(f"--json ({options.json}) must be in a folder that exists")
    return options


def _measure(
    config: Config,
    layout: Layout,
    tree: dict,
    environment: RankEnvironment,
    device: torch.device,
    options: argparse.Namespace,
) -> dict:
    """A fresh model's steps, of which nothing is left."""
    from diffmoe.data.share import Share
    from diffmoe.device import set_fp32_precision
    from diffmoe.diffusion.randomness import StepDraws
    from diffmoe.models.compiled import compile_blocks, compiles
    from diffmoe.models.dit import DiT
    from diffmoe.models.logical import initialize
    from diffmoe.parallel.groups import build_groups
    from diffmoe.training.ema import Ema
    from diffmoe.training.engine import Engine
    from diffmoe.training.profiling import profile_rank
    from diffmoe.training.step import train_step

    set_fp32_precision(config.run.fp32_precision)
    groups = build_groups(layout.ep, layout.pool_ranks)
    share = Share(layout.batch, layout.micro_batch, layout.accumulation, groups.rank, layout.ranks)
    batches = _batches(config, share, groups, options.synthetic)
    model = DiT(
        config.model,
        config.moe,
        pool=layout.pool,
        groups=groups,
        recompute=config.parallel.recompute,
        time_scale=config.diffusion.time_scale,
    )
    initialize(model, config.run.seed)
    compiled, note = compiles(config.train, device, zero_stage(tree))
    if note is not None and groups.rank == 0:
        print(note, flush=True)
    if compiled:
        compile_blocks(model)
    engine = Engine(model, config, layout, tree, groups, device)
    ema, numbers = Ema(engine, config.train.ema_decays), itertools.count()
    shape = (config.model.channels, config.model.input_size, config.model.input_size)

    def train(batch: Sequence[Batch]) -> None:
        step = next(numbers)
        train_step(engine, ema, batch, config, layout, groups, step, draws=draws.of(step))

    with StepDraws(
        config.run.seed,
        (lambda _: share.positions(0)) if options.synthetic else share.positions,
        shape,
    ) as draws:
        found = profile_rank(engine, lambda: next(batches), train, options.warmup, options.steps)
    return _record(config, layout, tree, environment, device, found)


def _batches(
    config: Config, share: Share, groups: ParallelGroups, synthetic: bool
) -> Iterator[Sequence[Batch]]:
    """Micro-batches a step at a time: of the run's own shards, or the same made-up ones again and
    again.
    """
    from diffmoe.data.feed import open_reader
    from diffmoe.data.stream import BatchStream
    from diffmoe.parallel.collectives import raise_together
    from diffmoe.parity.plain import synthetic_batch

    if synthetic:
        return itertools.repeat(
            [synthetic_batch(config, numbers) for numbers in share.positions(0).tolist()]
        )
    reader, problem = None, None
    try:
        reader = open_reader(config)
    except (UserError, OSError) as error:
        problem = error
    raise_together(problem, groups.world)
    return BatchStream(
        reader, share, start_step=0, workers=config.data.workers, prefetch=config.data.prefetch
    )


def _record(
    config: Config,
    layout: Layout,
    tree: dict,
    environment: RankEnvironment,
    device: torch.device,
    found: RankProfile,
) -> dict:
    """What all ranks saw, as one plain dict: the slowest rank's step time, the mean split, the most
    memory, all traffic.
    """
    import torch
    import torch.distributed as dist

    everyone: list = [None] * environment.world
    dist.all_gather_object(everyone, found)
    cuda = device.type == "cuda"
    return {
        "config": config_to_tree(config),
        "deepspeed": tree,
        "layout": dataclasses.asdict(layout),
        "per_node": environment.local_world,
        "steps": len(found.step_s),
        "step_s": max(statistics.median(p.step_s) for p in everyone),
        "all_step_s": [p.step_s for p in everyone],
        "traced_step_s": max(p.traced_step_s for p in everyone),
        "split": {
            phase: statistics.mean(p.split[phase] for p in everyone) for phase in found.split
        },
        "static_bytes": max(p.static_bytes for p in everyone),
        "peak_bytes": max(p.peak_bytes for p in everyone),
        "traffic": [p.traffic for p in everyone],
        "device": torch.cuda.get_device_name(device)
        if cuda
        else f"{platform.processor() or platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed_version": importlib.metadata.version("deepspeed"),
        "when": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


# -----------------------------------------------------------------------------------------------------
# text


def describe(record: dict) -> str:
    """A record for people: time, memory beside the plan, and traffic beside the formula and the
    lower bound.
    """
    config, layout, engine = (
        config_from_tree(record["config"]),
        Layout(**record["layout"]),
        engine_facts(record["deepspeed"]),
    )
    memory = rank_memory(config, layout, engine)
    split = ", ".join(
        f"{phase.replace('_', '-')} {100 * share:.1f} %" for phase, share in record["split"].items()
    )
    lines = [
        f"step     {1e3 * record['step_s']:.1f} ms (median of {record['steps']}, slowest of {layout.ranks} ranks), "
        f"{layout.batch / record['step_s']:.0f} images/s",
        f"time     {split}",
        f"memory   {record['peak_bytes'] / 2**20:.1f} MiB at most (plan {memory.peak / 2**20:.1f}), "
        f"{record['static_bytes'] / 2**20:.1f} between steps (plan {memory.static / 2**20:.1f})",
    ]
    return "\n".join(
        [*lines, "", *traffic_table(record["traffic"], config, layout, record["deepspeed"])]
    )


def traffic_table(
    by_rank: list[list[dict]], config: Config, layout: Layout, tree: dict
) -> list[str]:
    """Counted messages by collective, purpose and phase, means over ranks, layers together, beside
    the formula; then sums beside the lower bound.  Rows that must travel are those that were
    counted.
    """
    engine = engine_facts(tree)
    ranks = len(by_rank)
    counted: dict[tuple, list[float]] = {}
    for row in itertools.chain.from_iterable(by_rank):
        phase = row["phase"] if row["layer"] else "step"
        sums = counted.setdefault((row["collective"], row["purpose"], phase), [0.0, 0.0, 0.0])
        for i, name in enumerate(("messages", "payload", "wire")):
            sums[i] += row[name] / ranks
    planned: dict[tuple, int] = {}
    for message in step_traffic(config, layout, engine):
        key = (message.collective, message.purpose, message.phase)
        planned[key] = planned.get(key, 0) + message.wire
    rows = [
        [*key, round(messages), f"{payload:.0f}", f"{wire:.0f}", planned.get(key)]
        for key, (messages, payload, wire) in sorted(counted.items())
    ]
    lines = table(
        [
            "collective",
            "purpose",
            "phase",
            "messages",
            "bytes put in",
            "bytes that leave the rank",
            "by formula",
        ],
        rows,
    )
    return lines + _sums(counted, config, layout, engine)


def _sums(
    counted: dict[tuple, list[float]], config: Config, layout: Layout, engine: EngineFacts
) -> list[str]:
    def wire(
        collectives: tuple[str, ...], purposes: tuple[str, ...] | None = None, again: bool = True
    ) -> float:
        return sum(
            sums[2]
            for (collective, purpose, phase), sums in counted.items()
            if collective in collectives
            and (purposes is None or purpose in purposes)
            and (again or phase != "recompute")
        )

    least = least_traffic(config, layout, engine)
    rows = wire(("all_to_all",), ("dispatch", "combine"), again=False)
    lines = []
    if rows:
        exchanged = wire(("all_to_all",))
        owners = wire(("all_gather",), ("owners",))
        lines.append(
            f"all-to-all {exchanged:.0f} bytes, {exchanged / rows:.4f} of the lower bound ({rows:.0f}: each chosen row "
            f"there and home, forward and backward); with the pool owners' scores {(exchanged + owners) / rows:.4f}"
        )
    if least.reduction:
        reduced = wire(
            ("all_reduce", "reduce_scatter", "all_gather", "broadcast", "reduce"),
            ("gradients", "parameters"),
        )
        lines.append(
            f"reduction {reduced:.0f} bytes, {reduced / least.reduction:.4f} of the lower bound ({least.reduction}: gradients "
            "to their owners, weights back)"
        )
    return lines
