"""Training: the loop over steps, and what is done between them."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from diffmoe.config import Config, check_guidance
from diffmoe.cost.calibration import plan_error
from diffmoe.data.feed import Feed
from diffmoe.data.stream import Batch
from diffmoe.device import peak_memory_gib
from diffmoe.diffusion.randomness import StepDraws
from diffmoe.errors import UserError
from diffmoe.evaluation.generate import generate_everywhere
from diffmoe.evaluation.plots import class_columns
from diffmoe.evaluation.while_training import score
from diffmoe.layout import Layout
from diffmoe.parallel.collectives import AgreedError, anyone
from diffmoe.parallel.groups import ParallelGroups
from diffmoe.training.checkpoint import newest_usable, restore
from diffmoe.training.guard import Guard, Verdict, find_nonfinite
from diffmoe.training.mirror import Copied
from diffmoe.training.resume import check_resumable, recipes_as_counters, write_left_out
from diffmoe.training.run_lock import RunLock
from diffmoe.training.saver import SaveFailed
from diffmoe.training.start import Run, say, share, start
from diffmoe.training.step import StepReport, train_step
from diffmoe.training.validation import read_validations
from diffmoe.training.watchdog import Watchdog

# Optimizer steps after which a run compares itself with its plan.
AFTER_STEPS = 20


def train(
    config: Config,
    layout: Layout,
    deepspeed_tree: dict,
    groups: ParallelGroups,
    device: torch.device,
    stop_requested: Sequence[int] = (),
    per_node: int | None = None,
    new_recipe: bool = False,
) -> None:
    """Trains to ``train.steps``, from the newest usable checkpoint in the run folder if there is
    one.  ``deepspeed_tree``: the merged JSON.  ``per_node``: ranks on a node (default: all).
    ``new_recipe``: that checkpoint may be one of another recipe.

    Any rank whose ``stop_requested`` fills (with signals) ends the run in order: the ranks agree at
    a step boundary, save, and return.  Raises AgreedError when the run cannot go on, or its last
    state cannot be saved; a rank that dies or hangs ends the process with ``EXIT_LOST``.
    """
    folder = Path(config.run.folder)
    with Watchdog(groups, config.run.timeout_s, folder), RunLock(folder, groups.world) as lock:
        if anyone(bool(stop_requested), groups.world):
            return say(groups, "stopped cleanly before the start; the same command begins again")
        lock.take()
        run = start(config, layout, deepspeed_tree, groups, device, per_node, new_recipe, lock)
        if run.done >= config.train.steps:
            run.say(f"nothing left to do: step {run.done} of train.steps ({config.train.steps})")
        elif anyone(bool(stop_requested), groups.world):
            return run.say(
                f"stopped cleanly at step {run.done}, before the first step of this start; "
                "the same command resumes from there"
            )
        _validate_where_missed(run)
        _copy(run)  # what an earlier start left
        with run.saver, contextlib.closing(run.mirror) if run.mirror else contextlib.nullcontext():
            if config.train.spike_factor > 0 and run.fresh:
                _save(run)  # so that there is always something to go back to
            spiked = _train_steps(run, stop_requested)
            while spiked is not None:
                _go_back(run, spiked)
                spiked = _train_steps(run, stop_requested)
            _finish_copying(run, stop_requested)


def _train_steps(run: Run, stop_requested: Sequence[int]) -> int | None:
    """Trains to the end or to a stop (None), or to a step whose loss spiked, which is returned."""
    train, trace, meter = run.config.train, run.groups.trace, run.meter
    mine = share(run.layout, run.groups.rank, run.shift)
    feed = Feed(
        run.reader,
        mine,
        run.groups.world,
        run.folder,
        range(run.done, train.steps),
        run.config.data,
        pin=run.device.type == "cuda",
        say=run.say,
    )
    with feed, StepDraws(run.config.run.seed, mine.positions, run.reader.index.x_shape) as draws:
        trace.enter("reading data", run.done)
        batches = feed.first()
        meter.restart_clock()
        while run.done < train.steps:
            # A step ahead: what one rank cannot read concerns all of them, and a step's reduction
            # can still say so.
            trace.enter("reading data", run.done)
            began = time.perf_counter()
            trace.clock.begin_step()
            with trace.clock.waiting("data"):
                stop = feed.read_ahead()
            stop = stop or bool(stop_requested) or run.leaving
            assert batches is not None  # there are as many as steps
            stop, verdict = _step(run, batches, draws, stop)
            if verdict == "spike":
                return run.done
            if verdict != "left out":
                trace.clock.end_step()
            run.done += 1
            trace.warm = True
            finished = run.done == train.steps
            stop = stop and feed.decide_together(bool(stop_requested) or run.leaving)
            batches = feed.take()
            _compare_with_plan(run, time.perf_counter() - began)
            last = stop or finished
            if last or run.done % train.log_every == 0:
                _record(run, last)
            if train.ema_snapshot_every and run.done % train.ema_snapshot_every == 0:
                _save(run, snapshot=True)
            if _due(run.done, train.save_every, last):
                _save(run)
            # Not at a stop, whose grace is for saving.
            if _due(run.done, train.sample_every, finished):
                _sample(run)
            if _due(run.done, train.score_every, finished):
                _score(run)
            if _due(run.done, train.validate_every, finished):
                _validate(run)
            if last:
                _finish_saving(run)
            if run.done % train.log_every == 0:
                meter.restart_clock()  # saving, sampling and drawing are not training
            if stop:
                run.say(f"stopped cleanly at step {run.done}; the same command resumes from there")
                break
    if run.writer:
        run.writer.close()
    if feed.failure:
        raise feed.failure
    return None


def _step(run: Run, batches: list[Batch], draws: StepDraws, stop: bool) -> tuple[bool, Verdict]:
    """Step ``run.done``: whether all ranks stop after it, and what became of it."""
    if run.done in run.guard.left_out:
        run.event("left out", "left out, as its loss spiked before")
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
        run.saver.failed,
        draws.of(run.done),
    )
    if report.save_failed:
        _wait_for_save(run)
    verdict = run.guard.judge(report, run.done)
    if verdict == "good":
        run.meter.add(report)
    elif verdict == "not finite":
        _not_finite(run, report, batches)
    else:
        train = run.config.train
        run.event(
            "spike",
            f"loss {report.loss:.6g} is above train.spike_factor ({train.spike_factor:g}) times "
            f"the median of the last {train.spike_window} steps",
        )
    return report.stop, verdict


def _not_finite(run: Run, report: StepReport, batches: list[Batch]) -> None:
    """Says where a step went wrong, which changed nothing; AgreedError if the run must end."""
    train, in_a_row = run.config.train, run.guard.in_a_row
    where = find_nonfinite(run.engine, batches, run.config, run.groups, run.done)
    text = f"loss is {report.loss} and gradient norm {report.grad_norm} at step {run.done}, {where}"
    if train.on_nonfinite == "skip":
        if in_a_row <= train.nonfinite_limit:
            text += f"; skipped, {in_a_row} in a row of at most {train.nonfinite_limit}"
            return run.event("skipped", text)
        limit = train.nonfinite_limit
        text += f" (train.nonfinite_limit ({limit}) steps in a row were skipped before)"
    _wait_for_save(run)
    raise AgreedError(f"{text}; the last checkpoint is untouched")


def _go_back(run: Run, spiked: int) -> None:
    """Back to the newest checkpoint, without step ``spiked`` from there.  All ranks together."""
    run.groups.trace.enter("going back")
    _wait_for_save(run)
    folder = run.saver.folder
    newest = newest_usable(folder, run.groups, lambda text: run.event("passed over", text))
    if newest is None:
        raise AgreedError(
            f"the loss spiked at step {spiked}, and {folder} has no checkpoint to go back to"
        )
    data = run.reader.index.fingerprint
    _, run.recipes = check_resumable(newest, run.config, run.layout, data, new_recipe=True)
    run.guard.go_back(spiked, newest.step, Guard.from_counters(run.config.train, newest.counters))
    run.done = restore(newest, run.engine, run.ema, run.groups, run.say)
    run.saver.drop_snapshots(run.done)
    run.meter.discard()
    run.event(
        "went back", f"went back to {newest.path.name}; step {spiked} is left out from now on"
    )
    if run.writer:
        with run.writer.unless_refused("left_out.json"):
            write_left_out(run.folder, run.guard.left_out)


def _compare_with_plan(run: Run, seconds: float) -> None:
    """After the first steps of a start: what the planner says of them beside what they took."""
    if len(run.step_times) == AFTER_STEPS:
        return
    run.step_times.append(seconds)
    if len(run.step_times) < AFTER_STEPS:
        return
    # A CPU's figure is the whole process's, Python and libraries included: nothing that a plan
    # speaks of.
    name, peak = "cpu", 0.0
    if run.device.type == "cuda":
        name = torch.cuda.get_device_name(run.device)
        peak = peak_memory_gib(run.device) * 2**30
    median = statistics.median(run.step_times)
    entries, line = plan_error(
        run.config, run.layout, run.deepspeed, name, run.per_node, median, peak
    )
    run.next_record |= entries
    run.say(line)


def _record(run: Run, last: bool) -> None:
    """Numbers since the last record; every rank takes part, rank 0 writes."""
    run.groups.trace.enter("recording")
    record, load = run.meter.collect(run.done, run.samples)
    _hear_of_saves(run)
    record |= {
        "skipped_steps": run.guard.skipped(run.done),
        "rollbacks": run.guard.rollbacks,
        "failed_saves": run.failed_saves,
        **_compare_ranks(run),
        **run.next_record,
    }
    run.next_record = {}
    if run.writer:
        run.writer.record(record)
        if _due(run.done, 10 * run.config.train.log_every, last):  # drawing takes a while
            run.writer.draw_load(load, run.done)


def _compare_ranks(run: Run) -> dict:
    """A record of the ranks' times; ``on_straggler: requeue``: a straggler ends this start."""
    if not run.stragglers.on:
        return {}
    record, news = run.stragglers.collect()
    if news is not None:
        run.event(*news)
        rule = run.config.run.on_straggler == "requeue" and not run.leaving
        if rule and run.stragglers.named is not None:
            refusal = run.stragglers.exclude() if run.writer else None
            run.leaving = anyone(run.writer is not None and refusal is None, run.groups.world)
            then = f"its node stays: {refusal}" if refusal else "saves, and asks for other nodes"
            run.event("requeue", f"run.on_straggler (requeue): {then}")
    return record


def _save(run: Run, snapshot: bool = False) -> None:
    """Begins a save, and hears of earlier ones; a failed one is tried again when due."""
    run.groups.trace.enter("saving")
    counters = run.guard.as_counters() | recipes_as_counters(run.recipes)
    counters |= {"updates": run.engine.updates, "data": run.reader.index.fingerprint}
    run.saver.save(run.done, run.engine, run.ema, counters, snapshot)
    _hear_of_saves(run)


def _finish_saving(run: Run) -> None:
    """Waits for the last save.  Raises AgreedError when it failed: this state would be lost."""
    run.groups.trace.enter("waiting for the last save")
    _wait_for_save(run)
    if run.done == run.unsaved:
        raise AgreedError(
            f"the state of step {run.done} could not be saved; "
            "what the run has is the checkpoint before"
        )


def _wait_for_save(run: Run) -> None:
    run.saver.wait()
    _hear_of_saves(run)


def _hear_of_saves(run: Run) -> None:
    for outcome in run.saver.outcomes():
        if isinstance(outcome, SaveFailed):
            run.failed_saves, run.unsaved = run.failed_saves + 1, outcome.step
            run.event(
                "save failed",
                f"error: step {outcome.step} was NOT saved: {outcome.message}; training goes on, "
                "the checkpoint before stays, the next save is tried as planned",
            )
        else:
            run.unsaved = None
            stall_s, write_s = outcome.stall_s, outcome.write_s
            run.next_record |= {"save_stall_s": stall_s, "save_write_s": write_s}
            run.say(
                f"saved {outcome.path}: training stood still for {stall_s:.2f} s, "
                f"written in {write_s:.2f} s"
            )
            _copy(run)
    for copy in run.mirror.outcomes() if run.mirror else ():
        place = run.config.train.mirror
        if isinstance(copy, Copied):
            run.say(f"copied step {copy.step} to {place}: {copy.bytes} bytes, {copy.seconds:.2f} s")
        else:
            run.event(
                "not copied",
                f"error: train.mirror ({place}) is behind: {copy.message}; training goes on, the "
                "next save tries again",
            )


def _copy(run: Run) -> None:
    if run.mirror and run.groups.rank == 0:
        run.mirror.copy()


def _finish_copying(run: Run, stop_requested: Sequence[int]) -> None:
    if run.mirror:
        run.groups.trace.enter("copying to train.mirror")
        run.mirror.wait(stop_requested)
        _hear_of_saves(run)


def _due(step: int, every: int, last: bool) -> bool:
    """Every ``every`` steps, and at the end; 0 means only at the end."""
    return last or (every > 0 and step % every == 0)


def _sample(run: Run) -> None:
    """A grid from the EMA weights, classes in turn; every rank makes its share.  The last one comes
    unasked: guidance that training does not allow is an event there and no error.
    """
    try:
        check_guidance(run.config, training=True)
    except UserError as error:
        return run.event("not sampled", f"no images: {error}")
    run.groups.trace.enter("sampling")
    classes = run.config.model.classes
    columns = class_columns(run.config.sample.columns, classes)
    labels = [i % classes for i in range(columns * min(classes, columns))]
    with run.engine.weights(run.ema.shards) as model:
        images = generate_everywhere(model, run.config, labels, run.groups.world, run.device)
    if run.writer:
        run.writer.draw_samples(images.numpy(), columns, run.done)


def _score(run: Run) -> None:
    """A line of ``scores.jsonl`` for each average.  The run goes on where it cannot be scored."""
    if run.scorer is None:
        return
    run.groups.trace.enter("scoring")
    for decay, shards in run.ema.by_decay.items():
        weights = f"ema:{decay!r}"
        try:
            with run.engine.weights(shards) as model:
                scores = score(model, run.config, run.scorer, run.groups.world, run.device)
        except AgreedError as error:
            run.event("not scored", f"no scores of {weights}: {error}")
            continue
        if run.writer:
            run.writer.scores(run.done, weights, run.scorer.count, run.scorer.extractor, scores)


def _validate_where_missed(run: Run) -> None:
    """The validation loss of the step that the run resumed at, where it was due and is not there:
    a stop saves and does not measure, and a kill may come between.
    """
    finished = run.done == run.config.train.steps
    due = run.done > 0 and _due(run.done, run.config.train.validate_every, finished)
    if run.validator is None or not due:
        return
    there = run.writer is not None and any(
        r["step"] == run.done for r in read_validations(run.folder)
    )
    if not anyone(there, run.groups.world):
        _validate(run)


def _validate(run: Run) -> None:
    """Validation loss of the first average; where it cannot be measured the run goes on."""
    if run.validator is None:
        return
    run.groups.trace.enter("validating")
    began = time.perf_counter()
    try:
        with run.engine.weights(run.ema.shards) as model:
            found = run.validator.measure(model)
    except AgreedError as error:
        return run.event("not validated", f"no validation loss: {error}")
    run.meter.leave_out(time.perf_counter() - began)
    run.next_record |= {"validation_loss": found.loss}
    if run.writer:
        run.writer.validation(run.done, run.samples, run.validator.count, found.as_record())
