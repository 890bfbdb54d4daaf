"""The subcommand ``profile``: time, memory and traffic of real steps, beside the plan."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diffmoe.commands.common import Parser, join, leave, on_our_hosts
from diffmoe.config import Config, config_from_tree, config_to_tree, load_config, override
from diffmoe.cost.memory import EngineFacts, engine_facts, rank_memory
from diffmoe.cost.traffic import least_traffic, step_traffic
from diffmoe.deepspeed_json import merge_deepspeed, read_deepspeed, zero_stage
from diffmoe.deepspeed_keys import MICS
from diffmoe.environment import RankEnvironment
from diffmoe.errors import UserError
from diffmoe.layout import Layout, resolve_layout
from diffmoe.markdown import table

if TYPE_CHECKING:
    import torch

    from diffmoe.data.share import Share
    from diffmoe.data.stream import Batch
    from diffmoe.parallel.groups import ParallelGroups


def main(arguments: list[str], environment: RankEnvironment) -> int:
    """Returns the exit code.  UserError for bad input."""
    options = _parse(arguments)
    # Nothing is saved or drawn, and the dial's histograms are a checkpoint's business.
    config = override(
        load_config(options.config, options.overrides),
        ["train.steps=1000000", "train.save_every=0", "train.sample_every=0"],
    )
    layout = resolve_layout(config, environment.world)
    tree = read_deepspeed(options.deepspeed_config)
    given = {"stage": options.zero, MICS: options.shard}
    zero = {key: value for key, value in given.items() if value is not None}
    section = tree.get("zero_optimization") or {}
    if isinstance(section, dict):  # any other is refused below
        tree["zero_optimization"] = {**section, **zero}
    merge_deepspeed(tree, config, layout)
    device = join(environment, asked=config.run.device)
    layout = on_our_hosts(config, layout)
    found = _measure(config, layout, tree, device, options)
    record = {
        **found,
        "config": config_to_tree(config),
        "deepspeed": tree,
        "layout": dataclasses.asdict(layout),
        "per_node": environment.local_world,
    }
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
        "against the lower bound and the plan.",
    )
    add = parser.add_argument
    add("--config", required=True, help="YAML file, see configs/")
    add("--deepspeed_config", help="DeepSpeed JSON, see ds_configs/ (default: ZeRO 1, fp32)")
    add("--zero", type=int, choices=range(4), help="another ZeRO stage than the JSON's")
    add("--shard", type=int, help=f"another zero_optimization.{MICS} than the JSON's")
    add("--steps", type=int, default=10, help="timed steps (default 10)")
    add("--warmup", type=int, default=3, help="steps before them (default 3)")
    add("--synthetic", action="store_true", help="made-up samples in place of data.shards")
    add("--json", type=Path, help="append the record here, a line")
    add("overrides", nargs="*", metavar="section.field=value")
    options = parser.parse_intermixed_args(arguments)
    steps, warmup = options.steps, options.warmup
    if steps < 1 or warmup < 0:
        raise UserError(f"--steps ({steps}) must be at least 1 and --warmup ({warmup}) at least 0")
    if steps + warmup > 200:
        raise UserError(
            f"--steps ({steps}) + --warmup ({warmup}) must be at most 200: later steps fill "
            "histograms"
        )
    if options.json and not options.json.absolute().parent.is_dir():
        raise UserError(f"--json ({options.json}) must be in a folder that exists")
    return options


def _measure(
    config: Config, layout: Layout, tree: dict, device: torch.device, options: argparse.Namespace
) -> dict:
    """A fresh model's steps: the slowest time, mean split, most memory, all ranks' traffic."""
    import torch.distributed as dist

    from diffmoe.data.share import Share
    from diffmoe.device import set_fp32_precision
    from diffmoe.diffusion.randomness import StepDraws
    from diffmoe.models.compiled import compile_blocks, compiles
    from diffmoe.models.logical import new_model
    from diffmoe.parallel.groups import build_groups
    from diffmoe.parity.synthetic import Training
    from diffmoe.training.profiling import RankProfile, profile_rank, surroundings

    set_fp32_precision(config.run.fp32_precision)
    groups = build_groups(layout.ep, layout.pool_ranks, per_host=layout.per_host)
    share = Share(layout.batch, layout.micro_batch, layout.accumulation, groups.rank, layout.ranks)
    batches = _batches(config, share, groups, options.synthetic)
    model = new_model(config, layout.pool, groups)
    compiled, note = compiles(config.train, device, zero_stage(tree))
    if note is not None and groups.rank == 0:
        print(note, flush=True)
    if compiled:
        compile_blocks(model)
    training, numbers = Training(model, config, tree, groups, device), itertools.count()
    shape = (config.model.channels, config.model.input_size, config.model.input_size)
    positions = (lambda _: share.positions(0)) if options.synthetic else share.positions

    def train(batch: Sequence[Batch]) -> None:
        step = next(numbers)
        training.step(step, batch, draws.of(step))

    with StepDraws(config.run.seed, positions, shape) as draws:
        fetch = lambda: next(batches)
        found = profile_rank(training.engine, fetch, train, options.warmup, options.steps)
    ranks: list[RankProfile] = [found] * layout.ranks
    dist.all_gather_object(ranks, found)
    about = surroundings(device)
    return {
        **about,
        "deepspeed_version": about["deepspeed"],
        "steps": len(found.step_s),
        "step_s": max(statistics.median(rank.step_s) for rank in ranks),
        "all_step_s": [rank.step_s for rank in ranks],
        "traced_step_s": max(rank.traced_step_s for rank in ranks),
        "split": {
            name: statistics.mean(rank.split[name] for rank in ranks) for name in found.split
        },
        "static_bytes": max(rank.static_bytes for rank in ranks),
        "peak_bytes": max(rank.peak_bytes for rank in ranks),
        "traffic": [rank.traffic for rank in ranks],
    }


def _batches(
    config: Config, share: Share, groups: ParallelGroups, synthetic: bool
) -> Iterator[Sequence[Batch]]:
    """A step's micro-batches: of the run's own shards, or the same made-up ones every time."""
    from diffmoe.data.feed import open_reader
    from diffmoe.data.stream import BatchStream
    from diffmoe.parallel.collectives import agreed
    from diffmoe.parity.synthetic import synthetic_batch

    if synthetic:
        positions = share.positions(0).tolist()
        return itertools.repeat([synthetic_batch(config, numbers) for numbers in positions])
    with agreed(groups.world):
        reader = open_reader(config)
    return BatchStream(
        reader, share, start_step=0, workers=config.data.workers, prefetch=config.data.prefetch
    )


def describe(record: dict) -> str:
    """For people: time, memory beside the plan, traffic beside formula and lower bound."""
    config, layout = config_from_tree(record["config"]), Layout(**record["layout"])
    engine = engine_facts(record["deepspeed"])
    plan = rank_memory(config, layout, engine)
    shares = [f"{ph.replace('_', '-')} {100 * s:.1f} %" for ph, s in record["split"].items()]
    ms = 1e3 * record["step_s"]
    peak, static = (record[name] / 2**20 for name in ("peak_bytes", "static_bytes"))
    lines = [
        f"step     {ms:.1f} ms (median of {record['steps']}, slowest of {layout.ranks} ranks), "
        f"{1e3 * layout.batch / ms:.0f} images/s",
        f"time     {', '.join(shares)}",
        f"memory   {peak:.1f} MiB at most (plan {plan.peak / 2**20:.1f}), {static:.1f} between "
        f"steps (plan {plan.static / 2**20:.1f})",
        "",
    ]
    return "\n".join(lines + _traffic(record["traffic"], config, layout, engine))


def _traffic(
    by_rank: list[list[dict]], config: Config, layout: Layout, engine: EngineFacts
) -> list[str]:
    """Counted messages by collective, purpose, phase and level of the exchange, means over ranks,
    layers together, beside the formula; then sums beside the lower bound, over two levels of the
    network's part.  Rows that must travel are those that were counted.
    """
    counted: dict[tuple, list[float]] = {}
    for row in itertools.chain.from_iterable(by_rank):
        phase = row["phase"] if row["layer"] else "step"
        key = row["collective"], row["purpose"], phase, row["level"]
        sums = counted.setdefault(key, [0.0, 0.0, 0.0])
        for i, name in enumerate(("messages", "payload", "wire")):
            sums[i] += row[name] / len(by_rank)
    planned: Counter[tuple] = Counter()
    for message in step_traffic(config, layout, engine):
        planned[message.collective, message.purpose, message.phase, message.level] += message.wire
    head = ["collective", "purpose", "phase", "level", "messages", "bytes put in"]
    rows = [
        [*key, round(messages), f"{payload:.0f}", f"{wire:.0f}", planned.get(key)]
        for key, (messages, payload, wire) in sorted(counted.items())
    ]
    lines = table([*head, "bytes that leave the rank", "by formula"], rows)
    wire = {key: sums[2] for key, sums in counted.items() if key[3] != "ep inside"}
    exchanged = sum(size for (what, *_), size in wire.items() if what == "all_to_all")
    owners = sum(size for key, size in wire.items() if key[:2] == ("all_gather", "owners"))
    least = least_traffic(config, layout, engine)
    once = sum(
        size
        for (what, purpose, phase, _), size in wire.items()
        if what == "all_to_all" and purpose in ("dispatch", "combine") and phase != "recompute"
    )
    if once:
        where = " across hosts" if layout.per_host else ""
        lines.append(
            f"all-to-all{where} {exchanged:.0f} bytes, {exchanged / once:.4f} of the lower bound "
            f"({once:.0f}: each chosen row there and home, forward and backward); with the pool "
            f"owners' scores {(exchanged + owners) / once:.4f}"
        )
    if least.reduction:
        reduced = sum(
            size
            for (what, purpose, *_), size in wire.items()
            if what != "all_to_all" and purpose in ("gradients", "parameters")
        )
        lines.append(
            f"reduction {reduced:.0f} bytes, {reduced / least.reduction:.4f} of the lower bound "
            f"({least.reduction}: gradients to their owners, weights back)"
        )
    return lines
