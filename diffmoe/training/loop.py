"""Training from start to end, top to bottom: start, resume, and the loop."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import yaml

from diffmoe.config import Config, DataConfig, check_guidance, config_to_tree
from diffmoe.cost.extrapolation import spanning
from diffmoe.data.feed import Feed, open_reader, order_notice
from diffmoe.data.reader import ShardReader
from diffmoe.data.share import Share, allow_open_files
from diffmoe.data.stream import Batch
from diffmoe.deepspeed_json import merge_deepspeed, reduction, zero_stage
from diffmoe.device import set_fp32_precision
from diffmoe.diffusion.randomness import StepDraws
from diffmoe.environment import host_name
from diffmoe.errors import UserError
from diffmoe.evaluation.generate import generate_everywhere
from diffmoe.evaluation.while_training import Scorer, open_scorer, score
from diffmoe.layout import Layout
from diffmoe.models.compiled import compile_blocks, compiles
from diffmoe.models.dit import DiT
from diffmoe.models.logical import initialize
from diffmoe.parallel.collectives import AgreedError, anyone, gather_objects, raise_together
from diffmoe.parallel.groups import ParallelGroups
from diffmoe.training.checkpoint import SaveFailed, Saver, newest_usable, restore
from diffmoe.training.ema import Ema
from diffmoe.training.engine import Engine
from diffmoe.training.guard import Guard, Verdict, find_nonfinite
from diffmoe.training.limits import lengthen_timeouts
from diffmoe.training.metrics import Meter, Writer
from diffmoe.training.plan_check import PlanCheck, machine_of
from diffmoe.training.resume import (
    Recipe,
    check_resumable,
    engine_changes,
    read_left_out,
    recipes_as_counters,
    write_left_out,
)
from diffmoe.training.run_lock import RunLock
from diffmoe.training.step import StepReport, train_step
from diffmoe.training.watchdog import Watchdog, watch_layers


@dataclass
class Run:
    """Everything that one rank of a training run holds.  ``writer`` is rank 0's alone; ``scorer``:
    None where nobody asked for scores; ``fresh``: no checkpoint was there; ``recipes``: changes of
    the recipe so far, see ``resume``.
    """

    config: Config
    layout: Layout
    groups: ParallelGroups
    device: torch.device
    engine: Engine
    ema: Ema
    reader: ShardReader
    saver: Saver
    guard: Guard
    meter: Meter
    plan: PlanCheck
    writer: Writer | None
    scorer: Scorer | None
    fresh: bool
    recipes: list[Recipe]
    done: int = 0
    failed_saves: int = 0
    unsaved: int | None = None  # the step of the last save, where it failed
    save_times: dict[str, float] = field(default_factory=dict)

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

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"


def train(
    config: Config,
    layout: Layout,
    deepspeed_tree: dict,
    groups: ParallelGroups,
    device: torch.device,
    asked: Sequence[int] = (),
    per_node: int | None = None,
    new_recipe: bool = False,
) -> None:
    """Trains to ``train.steps``, from the newest usable checkpoint in the run folder if there is
    one.  ``per_node``: ranks on a node (default: all).  ``new_recipe``: that checkpoint may be one
    of another recipe.

    Any rank whose ``asked`` fills (see ``training.stop``) ends the run in order: the ranks agree at
    a step boundary, save, and return.  Raises AgreedError when the run cannot go on, or its last
    state cannot be saved; a rank that dies or hangs ends the process with ``EXIT_LOST``.
    """
    folder = Path(config.run.folder)
    with (
        Watchdog(groups, config.run.timeout_s, folder) as watchdog,
        RunLock(folder, groups.world) as lock,
    ):
        if anyone(bool(asked), groups.world):
            return _say(groups, "stopped in order before the start; the same command begins again")
        lock.take()
        run = start(config, layout, deepspeed_tree, groups, device, per_node, new_recipe, lock)
        if run.done >= config.train.steps:
            _say(
                groups, f"nothing left to do: step {run.done} of train.steps ({config.train.steps})"
            )
        elif anyone(bool(asked), groups.world):
            return _say(
                groups,
                f"stopped in order at step {run.done}, before the first step of this start; the same command "
                "goes on from there",
            )
        with run.saver, watchdog.hears_first():
            if config.train.spike_factor > 0 and run.fresh:
                _save(run)  # so that there is always something to go back to
            spiked = _train_steps(run, asked)
            while spiked is not None:
                _go_back(run, spiked)
                spiked = _train_steps(run, asked)


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
    raise together.  Rank 0 holds ``lock`` before it writes into the run folder.
    """

    def say(text: str) -> None:
        _say(groups, text)

    set_fp32_precision(config.run.fp32_precision)
    passed_over: list[str] = []

    def say_passed_over(text: str) -> None:
        say(text)
        passed_over.append(text)  # an event as well, once there is who writes it

    folder = Path(config.run.folder)
    newest = newest_usable(folder / "checkpoints", groups, say_passed_over)
    hosts = gather_objects(host_name(), groups.world)
    reader, problem, accepted, recipes, left_out, notes, compiled = (
        None,
        None,
        [],
        [],
        [],
        [],
        False,
    )
    try:
        # A new recipe may choose its order anew; the same recipe keeps it.
        before = None if newest is None or new_recipe else newest.config().data
        reader = open_reader(config, before)
        allow_open_files(reader, _share(layout, groups.rank), config.data.workers)
        compiled, note = compiles(config.train, device, zero_stage(deepspeed_tree))
        config, notes = _with_order(config, reader, before)
        notes += filter(None, [note])
        if newest is not None:  # before anything of an earlier run is overwritten
            accepted, recipes = check_resumable(
                newest, config, layout, reader.index.fingerprint, new_recipe
            )
        if groups.rank == 0:
            notice, unmixed = order_notice(reader, layout.pool if layout.pool > 1 else layout.batch)
            if unmixed:
                notes.append(
                    f"warning: {notice}" + " (in another run.folder)" * (newest is not None)
                )
            merged = merge_deepspeed(deepspeed_tree, config, layout)
            notes += filter(None, [spanning(config, layout, merged, machine_of(device), hosts)])
            left_out = read_left_out(folder)
            accepted += engine_changes(folder, merged) if newest is not None else []
            if layout.ranks > 1 and reduction(deepspeed_tree).precision != "fp32":
                notes.append(
                    f"gradients are summed in {reduction(deepspeed_tree).precision} across ranks, as the DeepSpeed JSON's "
                    "communication_data_type or data_types.grad_accum_dtype says"
                )
            if lock is not None:
                lock.hold()  # the folder may be new, and another run have begun there since
            _write_resolved(config, layout, deepspeed_tree)
    except (UserError, OSError) as error:
        problem = error
    raise_together(problem, groups.world)
    for note in notes:
        say(note)
    scorer = (
        open_scorer(config, reader.index, groups.world, device)
        if config.train.score_every
        else None
    )
    model = DiT(
        config.model,
        config.moe,
        pool=layout.pool,
        groups=groups,
        recompute=config.parallel.recompute,
        time_scale=config.diffusion.time_scale,
    )
    initialize(model, config.run.seed)
    if compiled:
        compile_blocks(model)
    engine = Engine(model, config, layout, deepspeed_tree, groups, device)
    lengthen_timeouts(config.run.timeout_s)
    watch_layers(model.blocks, groups.trace)
    ema = Ema(engine, config.train.ema_decays)
    guard = Guard.from_counters(config.train, {} if newest is None else newest.counters)
    begins = newest is not None and len(recipes) > len(newest.counters.get("recipes", []))
    if begins:
        guard.losses = []  # of another recipe
    guard.left_out = sorted({*guard.left_out, *gather_objects(left_out, groups.world)[0]})
    writer = (
        Writer(folder, config.train.steps, [f"block {i}" for i, _ in model.moe_layers()])
        if groups.rank == 0
        else None
    )
    names = reader.index.class_names or (newest.manifest.class_names if newest is not None else ())
    saver = Saver(folder / "checkpoints", config, layout, groups, names)
    run = Run(
        config,
        layout,
        groups,
        device,
        engine,
        ema,
        reader,
        saver,
        guard,
        Meter(config, groups, device),
        PlanCheck(config, layout, deepspeed_tree, device, per_node or layout.ranks),
        writer,
        scorer,
        newest is None,
        recipes,
    )
    for text in passed_over if writer else ():
        writer.event(newest.step, "passed over", text, aloud=False)
    if newest is not None:
        for change in accepted:
            say(f"changed since {newest.path.name}: {change}")
        run.done = restore(newest, engine, ema, groups, say)
        engine.set_adam_step(newest.counters.get("updates", newest.step))
        say(f"resumed from {newest.path} at step {run.done}")
        if begins:
            _event(
                run,
                "new recipe",
                f"new recipe from here on ({'; '.join(recipes[-1].changes)}); weights, moments, "
                f"averages and thresholds stay, samples are counted on from {run.samples}",
            )
    return run


def _train_steps(run: Run, asked: Sequence[int]) -> int | None:
    """Trains to the end or to a stop (None), or to a step whose loss spiked, which is returned."""
    config, layout, groups, meter = run.config, run.layout, run.groups, run.meter
    share = _share(layout, groups.rank, run.shift)
    feed = Feed(
        run.reader,
        share,
        groups.world,
        run.folder,
        range(run.done, config.train.steps),
        config.data,
        pin=run.device.type == "cuda",
        say=lambda text: _say(groups, text),
    )
    with feed, StepDraws(config.run.seed, share.positions, run.reader.index.x_shape) as draws:
        groups.trace.enter("reading data", run.done)
        batches = feed.first()
        meter.restart_clock()
        while run.done < config.train.steps:
            # A step ahead: what one rank cannot read concerns all of them, and a step's reduction
            # can still say so.
            groups.trace.enter("reading data", run.done)
            began = time.perf_counter()
            stop, verdict = _step(run, batches, draws, feed.read_ahead() or bool(asked))
            if verdict == "spike":
                return run.done
            run.done += 1
            groups.trace.warm = True
            finished = run.done == config.train.steps
            stop = stop and feed.settle(bool(asked))
            batches = feed.take()
            if (compared := run.plan.add(time.perf_counter() - began)) is not None:
                _say(groups, compared)
            last = stop or finished
            if last or run.done % config.train.log_every == 0:
                _record(run, last)
            if _due(run.done, config.train.save_every, last):
                _save(run)
            if _due(
                run.done, config.train.sample_every, finished
            ):  # not at a stop, whose grace is for saving
                _sample(run)
            if run.scorer is not None and _due(run.done, config.train.score_every, finished):
                _score(run)
            if last:
                _finish_saving(run)
            if run.done % config.train.log_every == 0:
                meter.restart_clock()  # saving, sampling and drawing are not training
            if stop:
                _say(
                    groups,
                    f"stopped in order at step {run.done}; the same command resumes from there",
                )
                break
    if run.writer:
        run.writer.close()
    if feed.failure:
        raise feed.failure
    return None


def _share(layout: Layout, rank: int, shift: int = 0) -> Share:
    return Share(layout.batch, layout.micro_batch, layout.accumulation, rank, layout.ranks, shift)


def _with_order(
    config: Config, reader: ShardReader, before: DataConfig | None
) -> tuple[Config, list[str]]:
    """The configuration with the reader's streams and window as numbers, and what is to be said of
    them.
    """
    resolved = replace(
        config, data=replace(config.data, streams=reader.streams, window=reader.window)
    )
    if resolved == config:
        return config, []
    kept = before is not None and before.window is not None
    return resolved, [
        f"order    data.streams {reader.streams}, data.window {reader.window}, "
        + ("as the checkpoint has them" if kept else "chosen for these data")
    ]


def _step(run: Run, batches: list[Batch], draws: StepDraws, stop: bool) -> tuple[bool, Verdict]:
    """Step ``run.done``: whether all ranks stop after it, and what became of it."""
    if run.done in run.guard.left_out:
        _event(run, "left out", "left out, as its loss spiked before")
        return anyone(stop, run.groups.world), "left out"
    report = train_step(
        run.engine,
        run.ema,
        batches,
        run.config,
        run.layout,
        run.groups,
        run.done,
        stop,
        run.saver.trouble,
        draws.of(run.done),
    )
    if report.trouble:
        run.saver.settle()
        _hear_of_saves(run)
    verdict = run.guard.judge(report, run.done)
    if verdict == "good":
        run.meter.add(report)
    elif verdict == "not finite":
        _not_finite(run, report, batches)
    else:
        _event(
            run,
            "spike",
            f"loss {report.loss:.6g} is above train.spike_factor ({run.config.train.spike_factor:g}) times the "
            f"median of the last {run.config.train.spike_window} steps",
        )
    return report.stop, verdict


def _not_finite(run: Run, report: StepReport, batches: list[Batch]) -> None:
    """The step has changed nothing anywhere; says where it went wrong, and raises AgreedError
    unless the run may go on.
    """
    train = run.config.train
    text = (
        f"loss is {report.loss} and gradient norm {report.grad_norm} at step {run.done}, "
        f"{find_nonfinite(run.engine, batches, run.config, run.groups, run.done)}"
    )
    if train.on_nonfinite == "skip" and run.guard.in_a_row <= train.nonfinite_limit:
        _event(
            run,
            "skipped",
            f"{text}; skipped, {run.guard.in_a_row} in a row of at most {train.nonfinite_limit}",
        )
        return
    run.saver.settle()
    _hear_of_saves(run)
    limit = f" (train.nonfinite_limit ({train.nonfinite_limit}) steps in a row were skipped before)"
    raise AgreedError(
        f"{text}{limit if train.on_nonfinite == 'skip' else ''}; the last checkpoint is untouched"
    )


def _go_back(run: Run, spiked: int) -> None:
    """Restores the newest checkpoint, from which the run goes on without step ``spiked``.  All
    ranks together.
    """
    run.groups.trace.enter("going back")
    run.saver.settle()
    _hear_of_saves(run)
    newest = newest_usable(
        run.checkpoints, run.groups, lambda text: _event(run, "passed over", text)
    )
    if newest is None:
        raise AgreedError(
            f"the loss spiked at step {spiked}, and {run.checkpoints} has no checkpoint to go back to"
        )
    _, run.recipes = check_resumable(
        newest, run.config, run.layout, run.reader.index.fingerprint, new_recipe=True
    )
    run.guard.go_back(spiked, newest.step, Guard.from_counters(run.config.train, newest.counters))
    run.done = restore(newest, run.engine, run.ema, run.groups, lambda text: _say(run.groups, text))
    run.engine.set_adam_step(newest.counters.get("updates", newest.step))
    run.meter.discard()
    _event(
        run, "went back", f"went back to {newest.path.name}; step {spiked} is left out from now on"
    )
    if run.writer:
        with run.writer.unless_refused("left_out.json"):
            write_left_out(run.folder, run.guard.left_out)


def _record(run: Run, last: bool) -> None:
    """Numbers since the last record; every rank takes part, rank 0 writes."""
    run.groups.trace.enter("recording")
    record, load = run.meter.collect(run.done, run.samples)
    _hear_of_saves(run)
    record |= {
        "skipped_steps": run.guard.skipped(run.done),
        "rollbacks": run.guard.rollbacks,
        "failed_saves": run.failed_saves,
        **run.save_times,
        **run.plan.entries,
    }
    run.save_times, run.plan.entries = {}, {}
    if run.writer:
        run.writer.record(record)
        if _due(run.done, 10 * run.config.train.log_every, last):  # drawing takes a while
            run.writer.load_picture(load, run.done)


def _save(run: Run) -> None:
    """Begins a save of the present state; what became of earlier ones is heard here.  A failed one
    is tried again when due.
    """
    run.groups.trace.enter("saving")
    run.saver.save(
        run.done,
        run.engine,
        run.ema,
        {
            **run.guard.as_counters(),
            **recipes_as_counters(run.recipes),
            "updates": run.engine.updates,
            "data": run.reader.index.fingerprint,
        },
    )
    _hear_of_saves(run)


def _finish_saving(run: Run) -> None:
    """Waits for the last save.  Raises AgreedError when it failed: this state would be lost."""
    run.groups.trace.enter("waiting for the last save")
    run.saver.settle()
    _hear_of_saves(run)
    if run.done == run.unsaved:
        raise AgreedError(
            f"the state of step {run.done} could not be saved; what the run has is the checkpoint before"
        )


def _hear_of_saves(run: Run) -> None:
    for outcome in run.saver.outcomes():
        if isinstance(outcome, SaveFailed):
            run.failed_saves, run.unsaved = run.failed_saves + 1, outcome.step
            _event(
                run,
                "save failed",
                f"error: step {outcome.step} was NOT saved: {outcome.message}; training goes on, the "
                "checkpoint before stays, the next save is tried as planned",
            )
        else:
            run.unsaved = None
            run.save_times = {"save_stall_s": outcome.stall_s, "save_write_s": outcome.write_s}
            _say(
                run.groups,
                f"saved {outcome.path}: training stood still for {outcome.stall_s:.2f} s, written in "
                f"{outcome.write_s:.2f} s",
            )


def _due(step: int, every: int, last: bool) -> bool:
    """Every ``every`` steps, and at the end; 0 means only at the end."""
    return last or (every > 0 and step % every == 0)


def _write_resolved(config: Config, layout: Layout, deepspeed_tree: dict) -> None:
    folder = Path(config.run.folder)
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(config_to_tree(config), sort_keys=False))
        (folder / "deepspeed.json").write_text(
            json.dumps(merge_deepspeed(deepspeed_tree, config, layout), indent=1) + "\n"
        )
        (folder / "layout.json").write_text(json.dumps(vars(layout), indent=1) + "\n")
    except OSError as error:
        raise UserError(f"run.folder ({folder}) cannot be written: {error}") from error


def _sample(run: Run) -> None:
    """A grid from the EMA weights, classes in turn; every rank makes its share.  The last one comes
    unasked: guidance that training does not allow is an event there and no error.
    """
    try:
        check_guidance(run.config)
    except UserError as error:
        return _event(run, "not sampled", f"no pictures: {error}")
    run.groups.trace.enter("sampling")
    columns, classes = run.config.sample.columns, run.config.model.classes
    labels = [i % classes for i in range(columns * min(classes, columns))]
    with run.engine.weights(run.ema.shards) as model:
        images = generate_everywhere(model, run.config, labels, run.groups.world, run.device)
    if run.writer:
        run.writer.sample_picture(images.numpy(), columns, run.done)


def _score(run: Run) -> None:
    """Scores of every average, a line of ``scores.jsonl`` each.  What cannot be scored is said, and
    the run goes on.
    """
    run.groups.trace.enter("scoring")
    for decay, shards in run.ema.by_decay.items():
        weights = f"ema:{decay!r}"
        try:
            with run.engine.weights(shards) as model:
                scores = score(model, run.config, run.scorer, run.groups.world, run.device)
        except AgreedError as error:
            _event(run, "not scored", f"no scores of {weights}: {error}")
            continue
        if run.writer:
            run.writer.scores(run.done, weights, run.scorer.count, scores)


def _event(run: Run, kind: str, text: str) -> None:
    if run.writer:
        run.writer.event(run.done, kind, text)


def _say(groups: ParallelGroups, text: str) -> None:
    if groups.rank == 0:
        print(text, flush=True)
