"""Training: the loop over steps, and those that go wrong."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from diffmoe.config import Config
from diffmoe.data.feed import Feed
from diffmoe.data.stream import Batch
from diffmoe.diffusion.randomness import StepDraws
from diffmoe.layout import Layout
from diffmoe.parallel.collectives import AgreedError, anyone
from diffmoe.parallel.groups import Group, ParallelGroups
from diffmoe.training import between_steps
from diffmoe.training.checkpoint import newest_usable, restore
from diffmoe.training.guard import Verdict, find_nonfinite
from diffmoe.training.resume import check_resumable, write_left_out
from diffmoe.training.run_lock import RunLock
from diffmoe.training.start import Run, remembered, say, share, start
from diffmoe.training.step import StepReport, train_step
from diffmoe.training.watchdog import Watchdog


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
    watchdog, together = Watchdog(groups, config.run.timeout_s, folder), _ending(groups.world)
    with watchdog, together, RunLock(folder, groups.world) as lock:
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
        between_steps.validate_where_missed(run)
        between_steps.copy(run)  # what an earlier start left
        with run.saver, contextlib.closing(run.mirror) if run.mirror else contextlib.nullcontext():
            if config.train.spike_factor > 0 and run.fresh:
                between_steps.save(run)  # so that there is always something to go back to
            spiked = _train_steps(run, stop_requested)
            while spiked is not None:
                _go_back(run, spiked)
                spiked = _train_steps(run, stop_requested)
            between_steps.finish_copying(run, stop_requested)


@contextlib.contextmanager
def _ending(world: Group) -> Iterator[None]:
    """Who is done waits for rank 0's last files here, where the watchdog still hears from all."""
    yield
    anyone(False, world)


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
            between_steps.compare_with_plan(run, time.perf_counter() - began)
            last = stop or finished
            if last or run.done % train.log_every == 0:
                between_steps.record(run, last)
            if train.ema_snapshot_every and run.done % train.ema_snapshot_every == 0:
                between_steps.save(run, snapshot=True)
            if between_steps.due(run.done, train.save_every, last):
                between_steps.save(run)
            # Not at a stop, whose grace is for saving.
            if between_steps.due(run.done, train.sample_every, finished):
                between_steps.sample(run)
            if between_steps.due(run.done, train.score_every, finished):
                between_steps.score(run)
            if between_steps.due(run.done, train.validate_every, finished):
                between_steps.validate(run)
            if last:
                between_steps.finish_saving(run)
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
        between_steps.wait_for_save(run)
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
    between_steps.wait_for_save(run)
    raise AgreedError(f"{text}; the last checkpoint is untouched")


def _go_back(run: Run, spiked: int) -> None:
    """Back to the newest checkpoint, without step ``spiked`` from there.  All ranks together."""
    run.groups.trace.enter("going back")
    between_steps.wait_for_save(run)
    folder = run.saver.folder
    newest = newest_usable(folder, run.groups, lambda text: run.event("passed over", text))
    if newest is None:
        raise AgreedError(
            f"the loss spiked at step {spiked}, and {folder} has no checkpoint to go back to"
        )
    data = run.reader.index.fingerprint
    _, run.recipes = check_resumable(newest, run.config, run.layout, data, new_recipe=True)
    run.guard.go_back(spiked, newest.step, remembered(run.config, newest.counters, run.recipes))
    run.done = restore(newest, run.engine, run.ema, run.groups, run.say)
    run.saver.drop_snapshots(run.done)
    run.meter.discard()
    run.event(
        "went back", f"went back to {newest.path.name}; step {spiked} is left out from now on"
    )
    if run.writer:
        with run.writer.unless_refused("left_out.json"):
            write_left_out(run.folder, run.guard.left_out)
