"""The start of a run, agreed by all ranks before anything is overwritten."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from diffmoe.checkpoints.reader import Checkpoint
from diffmoe.config import Config, DataConfig, config_to_tree
from diffmoe.cost.extrapolation import spanning
from diffmoe.cost.hardware import Hardware, named_like, read_table
from diffmoe.data.feed import open_reader, order_notice
from diffmoe.data.reader import ShardReader
from diffmoe.data.share import Share, allow_open_files
from diffmoe.deepspeed_json import reduction, zero_stage
from diffmoe.device import set_fp32_precision
from diffmoe.environment import host_name
from diffmoe.evaluation.while_training import Scorer, open_scorer
from diffmoe.files import write_text, writing
from diffmoe.layout import Layout
from diffmoe.models.compiled import compile_blocks, compiles
from diffmoe.models.logical import new_model
from diffmoe.parallel.collectives import agreed, gather_objects
from diffmoe.parallel.groups import ParallelGroups
from diffmoe.parallel.trace import watch_layer
from diffmoe.training.checkpoint import newest_usable, restore
from diffmoe.training.ema import Ema
from diffmoe.training.engine import Engine
from diffmoe.training.guard import Guard
from diffmoe.training.limits import lengthen_timeouts
from diffmoe.training.meter import Meter
from diffmoe.training.metrics import Writer
from diffmoe.training.mirror import Mirror
from diffmoe.training.resume import Recipe, check_resumable, engine_changes, read_left_out
from diffmoe.training.run_lock import RunLock
from diffmoe.training.saver import Saver
from diffmoe.training.stragglers import Stragglers
from diffmoe.training.validation import Validator, open_validator


@dataclass
class Run:
    """Everything that one rank of a training run holds.  ``deepspeed``: the merged JSON;
    ``per_node``: ranks on a node; ``writer`` is rank 0's alone; ``scorer``, ``validator``,
    ``mirror``: None where nobody asked for scores, the validation loss, or copies; ``fresh``: no
    checkpoint was there; ``recipes``: changes of the recipe so far, see ``resume``; ``leaving``:
    all ranks stop after the next step; ``next_record``: what the next record of the metrics has
    besides.
    """

    config: Config
    layout: Layout
    deepspeed: dict
    groups: ParallelGroups
    device: torch.device
    per_node: int
    engine: Engine
    ema: Ema
    reader: ShardReader
    saver: Saver
    mirror: Mirror | None
    guard: Guard
    meter: Meter
    stragglers: Stragglers
    writer: Writer | None
    scorer: Scorer | None
    validator: Validator | None
    fresh: bool
    recipes: list[Recipe]
    lock: RunLock | None = None
    done: int = 0
    failed_saves: int = 0
    leaving: bool = False
    unsaved: int | None = None  # the step of the last save, where it failed
    step_times: list[float] = field(default_factory=list)  # of the first steps of this start
    next_record: dict[str, Any] = field(default_factory=dict)

    @property
    def shift(self) -> int:
        """See ``resume``."""
        return self.recipes[-1].shift if self.recipes else 0

    @property
    def samples(self) -> int:
        """The number of the next step's first sample."""
        return (self.done + self.shift) * self.layout.batch

    @property
    def folder(self) -> Path:
        return Path(self.config.run.folder)

    def say(self, text: str) -> None:
        say(self.groups, text)

    def event(self, kind: str, text: str) -> None:
        if self.writer:
            self.writer.event(self.done, kind, text)


def say(groups: ParallelGroups, text: str) -> None:
    """Prints a line, on rank 0."""
    if groups.rank == 0:
        print(text, flush=True)


def start(
    config: Config,
    layout: Layout,
    deepspeed_tree: dict,
    groups: ParallelGroups,
    device: torch.device,
    per_node: int | None = None,
    new_recipe: bool = False,
    lock: RunLock | None = None,
) -> Run:
    """Model, engine, EMA and data of a run, resumed from its newest usable checkpoint.  All ranks
    raise together.  ``deepspeed_tree``: the merged JSON.  Rank 0 holds ``lock`` before it writes
    into the run folder.
    """
    set_fp32_precision(config.run.fp32_precision)
    tell, folder, skipped = partial(say, groups), Path(config.run.folder), []

    def tell_skipped(text: str) -> None:
        tell(text)
        skipped.append(text)  # an event as well, once there is a writer

    mirror = Mirror(config, groups) if config.train.mirror else None
    if mirror is not None:
        mirror.fetch(lock, new_recipe, tell_skipped)
    newest = newest_usable(folder / "checkpoints", groups, tell_skipped)
    counters = {} if newest is None else newest.counters
    hosts = gather_objects(host_name(), groups.world)
    accepted: list[str] = []
    recipes: list[Recipe] = []
    left_out: list[int] = []
    with agreed(groups.world):
        # A new recipe may choose its order anew; the same recipe keeps it.
        before = None if newest is None or new_recipe else newest.config().data
        reader = open_reader(config, before)
        allow_open_files(reader, share(layout, groups.rank), config.data.workers)
        compiled, note = compiles(config.train, device, zero_stage(deepspeed_tree))
        config, order = _with_order(config, reader, before)
        notes = [order, note]
        if newest is not None:  # before anything of an earlier run is overwritten
            data = reader.index.fingerprint
            accepted, recipes = check_resumable(newest, config, layout, data, new_recipe)
        if groups.rank == 0:
            notes.append(_mixing(reader, layout, newest is not None))
            notes.append(spanning(config, layout, deepspeed_tree, machine_of(device), hosts))
            notes.append(_reduction(deepspeed_tree, layout))
            left_out = read_left_out(folder)
            if newest is not None:
                accepted += engine_changes(folder, deepspeed_tree)
            if lock is not None:
                lock.hold()  # the folder may be new, and another run have begun there since
            _write_resolved(config, layout, deepspeed_tree)
    for text in filter(None, notes):
        tell(text)
    scorer, validator = _measuring(config, reader, groups, device)
    engine = _new_engine(config, layout, deepspeed_tree, groups, device, compiled)
    guard = remembered(config, counters, recipes)
    begins = len(recipes) > len(counters.get("recipes", []))
    guard.left_out = sorted({*guard.left_out, *gather_objects(left_out, groups.world)[0]})
    layers = [f"block {i}" for i, _ in engine.model.moe_layers()]
    writer = Writer(folder, config.train.steps, layers) if groups.rank == 0 else None
    names = reader.index.class_names or (newest.manifest.class_names if newest is not None else ())
    run = Run(
        config,
        layout,
        deepspeed_tree,
        groups,
        device,
        per_node or layout.ranks,
        engine,
        Ema(engine, config.train),
        reader,
        Saver(folder / "checkpoints", config, layout, groups, names),
        mirror,
        guard,
        Meter(config, groups, device),
        Stragglers(config.run, groups, engine, device, hosts),
        writer,
        scorer,
        validator,
        newest is None,
        recipes,
        lock,
    )
    if newest is not None:
        _restore(run, newest, accepted, skipped, begins)
    run.saver.drop_snapshots(run.done)
    return run


def _new_engine(
    config: Config,
    layout: Layout,
    deepspeed_tree: dict,
    groups: ParallelGroups,
    device: torch.device,
    compiled: bool,
) -> Engine:
    """A fresh model's, with its blocks watched."""
    model = new_model(config, layout.pool, groups)
    if compiled:
        compile_blocks(model)
    engine = Engine(model, config, deepspeed_tree, groups, device)
    lengthen_timeouts(config.run.timeout_s)
    for number, block in enumerate(model.blocks):
        watch_layer(block, partial(groups.trace.at, f"block {number}"))
    return engine


def _restore(
    run: Run, newest: Checkpoint, accepted: list[str], skipped: list[str], begins: bool
) -> None:
    """The run as it was at ``newest``.  ``accepted``: what is another setting since; ``skipped``:
    what is said of corrupt checkpoints; ``begins``: a new recipe does.
    """
    tell = partial(say, run.groups)
    if run.writer:
        for text in skipped:
            run.writer.event(newest.step, "passed over", text, printed=False)
    for change in accepted:
        tell(f"changed since {newest.path.name}: {change}")
    run.done = restore(newest, run.engine, run.ema, run.groups, tell)
    tell(f"resumed from {newest.path} at step {run.done}")
    if begins:
        run.event(
            "new recipe",
            f"new recipe from here on ({'; '.join(run.recipes[-1].changes)}); weights, moments, "
            f"averages and thresholds stay, samples are counted on from {run.samples}",
        )


def _measuring(
    config: Config, reader: ShardReader, groups: ParallelGroups, device: torch.device
) -> tuple[Scorer | None, Validator | None]:
    """What scores and validates while training; None where nobody asked for it."""
    scorer, validator = None, None
    if config.train.score_every:
        scorer = open_scorer(config, reader.index, groups.world, device)
    if config.train.validate_every:
        validator = open_validator(config, groups.world, device)
        if validator.reader.index.fingerprint == reader.index.fingerprint:
            say(groups, f"note: data.validation ({config.data.validation}) is what is trained on")
    return scorer, validator


def share(layout: Layout, rank: int, shift: int = 0) -> Share:
    """What of every batch a rank reads."""
    return Share(layout.batch, layout.micro_batch, layout.accumulation, rank, layout.ranks, shift)


def machine_of(device: torch.device) -> Hardware:
    """The hardware table's entry for the device; for a GPU that it does not know an H100's."""
    table = read_table(None)
    name = "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)
    return named_like(table, name) or table["h100"]


def _with_order(
    config: Config, reader: ShardReader, before: DataConfig | None
) -> tuple[Config, str | None]:
    """With the reader's streams and window as numbers, and what is to be said of them."""
    data = replace(config.data, streams=reader.streams, window=reader.window)
    if data == config.data:
        return config, None
    kept = before is not None and before.window is not None
    why = "as the checkpoint has them" if kept else "chosen for these data"
    order = f"order    data.streams {reader.streams}, data.window {reader.window}, {why}"
    return replace(config, data=data), order


def _mixing(reader: ShardReader, layout: Layout, resumes: bool) -> str | None:
    """A warning where samples that lie together end up in one pool or batch."""
    notice, unmixed = order_notice(reader, layout.pool if layout.pool > 1 else layout.batch)
    where = " (in another run.folder)" if resumes else ""
    return f"warning: {notice}{where}" if unmixed else None


def _reduction(deepspeed_tree: dict, layout: Layout) -> str | None:
    precision = reduction(deepspeed_tree).precision
    if layout.ranks == 1 or precision == "fp32":
        return None
    return (
        f"gradients are summed in {precision} across ranks, as the DeepSpeed JSON's "
        "communication_data_type or data_types.grad_accum_dtype says"
    )


def remembered(config: Config, counters: Mapping[str, Any], recipes: list[Recipe]) -> Guard:
    """What a checkpoint's guard knew; of another recipe's losses nothing."""
    guard = Guard.from_counters(config.train, counters)
    if len(recipes) > len(counters.get("recipes", [])):
        guard.losses = []
    return guard


def _write_resolved(config: Config, layout: Layout, deepspeed_tree: dict) -> None:
    folder = Path(config.run.folder)
    with writing(f"run.folder ({folder})"):
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(config_to_tree(config), sort_keys=False))
        for name, tree in (("deepspeed.json", deepspeed_tree), ("layout.json", vars(layout))):
            write_text(folder / name, json.dumps(tree, indent=1) + "\n")
