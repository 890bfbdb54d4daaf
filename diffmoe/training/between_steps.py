"""What is done between steps: records, saves and their copies, samples, scores, validation."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch

from diffmoe.config import check_guidance
from diffmoe.cost.calibration import plan_error
from diffmoe.device import peak_memory_gib
from diffmoe.errors import UserError
from diffmoe.evaluation.generate import generate_everywhere
from diffmoe.evaluation.plots import class_columns
from diffmoe.evaluation.while_training import score as score_model
from diffmoe.parallel.collectives import AgreedError, anyone
from diffmoe.training.mirror import Copied
from diffmoe.training.resume import recipes_as_counters
from diffmoe.training.saver import SaveFailed
from diffmoe.training.start import Run
from diffmoe.training.validation import read_validations

# Optimizer steps after which a run compares itself with its plan.
AFTER_STEPS = 20


def compare_with_plan(run: Run, seconds: float) -> None:
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
        *(run.config, run.layout, run.deepspeed, name, run.per_node, median, peak),
        step=run.done - AFTER_STEPS // 2,
    )
    run.next_record |= entries
    run.say(line)


def record(run: Run, last: bool) -> None:
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
        if due(run.done, 10 * run.config.train.log_every, last):  # drawing takes a while
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


def save(run: Run, snapshot: bool = False) -> None:
    """Begins a save, and hears of earlier ones; a failed one is tried again when due.  Raises
    AgreedError where another run has the folder by now.
    """
    run.groups.trace.enter("saving")
    if run.lock is not None:
        run.lock.check()
    counters = run.guard.as_counters() | recipes_as_counters(run.recipes)
    counters |= {"updates": run.engine.updates, "data": run.reader.index.fingerprint}
    run.saver.save(run.done, run.engine, run.ema, counters, snapshot)
    _hear_of_saves(run)


def finish_saving(run: Run) -> None:
    """Waits for the last save.  Raises AgreedError when it failed: this state would be lost."""
    run.groups.trace.enter("waiting for the last save")
    wait_for_save(run)
    if run.done == run.unsaved:
        raise AgreedError(
            f"the state of step {run.done} could not be saved; "
            "what the run has is the checkpoint before"
        )


def wait_for_save(run: Run) -> None:
    """Until no save is under way, and says how it went.  All ranks together."""
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
            copy(run)
    for sent in run.mirror.outcomes() if run.mirror else ():
        place = run.config.train.mirror
        if isinstance(sent, Copied):
            run.say(f"copied step {sent.step} to {place}: {sent.bytes} bytes, {sent.seconds:.2f} s")
        else:
            run.event(
                "not copied",
                f"error: train.mirror ({place}) is behind: {sent.message}; training goes on, the "
                "next save tries again",
            )


def copy(run: Run) -> None:
    """Begins to copy to ``train.mirror`` what it lacks."""
    if run.mirror and run.groups.rank == 0:
        run.mirror.copy()


def finish_copying(run: Run, stop_requested: Sequence[int]) -> None:
    """Waits for the mirror, after a stop request not for long.  All ranks together."""
    if run.mirror:
        run.groups.trace.enter("copying to train.mirror")
        run.mirror.wait(stop_requested)
        _hear_of_saves(run)


def due(step: int, every: int, last: bool) -> bool:
    """Every ``every`` steps, and at the end; 0 means only at the end."""
    return last or (every > 0 and step % every == 0)


def sample(run: Run) -> None:
    """A grid from the EMA weights, classes in turn; every rank makes its share.  What cannot be
    sampled is an event and no error: guidance that training does not allow, since the last grid
    comes unasked, and a sampler that does not finish.
    """
    try:
        check_guidance(run.config, training=True)
    except UserError as error:
        return run.event("not sampled", f"no images: {error}")
    run.groups.trace.enter("sampling")
    classes = run.config.model.classes
    columns = class_columns(run.config.sample.columns, classes)
    labels = [i % classes for i in range(columns * min(classes, columns))]
    try:
        with run.engine.weights(run.ema.shards) as model:
            images = generate_everywhere(model, run.config, labels, run.groups.world, run.device)
    except UserError as error:  # dopri5's on all ranks, where it does not finish
        return run.event("not sampled", f"no images: {error}")
    if run.writer:
        run.writer.draw_samples(images.numpy(), columns, run.done)


def score(run: Run) -> None:
    """A line of ``scores.jsonl`` for each average.  The run goes on where it cannot be scored."""
    if run.scorer is None:
        return
    run.groups.trace.enter("scoring")
    for decay, shards in run.ema.by_decay.items():
        weights = f"ema:{decay!r}"
        try:
            with run.engine.weights(shards) as model:
                scores = score_model(model, run.config, run.scorer, run.groups.world, run.device)
        except AgreedError as error:
            run.event("not scored", f"no scores of {weights}: {error}")
            continue
        if run.writer:
            run.writer.scores(run.done, weights, run.scorer.count, run.scorer.extractor, scores)


def validate_where_missed(run: Run) -> None:
    """The validation loss of the step that the run resumed at, where it was due and is not there:
    a stop saves and does not measure, and a kill may come between.
    """
    finished = run.done == run.config.train.steps
    if run.validator is None or run.done == 0:
        return
    if not due(run.done, run.config.train.validate_every, finished):
        return
    there = run.writer is not None and any(
        r["step"] == run.done for r in read_validations(run.folder)
    )
    if not anyone(there, run.groups.world):
        validate(run)


def validate(run: Run) -> None:
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
