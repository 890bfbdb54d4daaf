"""Training from start to end, top to bottom: start, resume, and the loop."""

from __future__ import annotations

import json
import signal
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

import torch
import yaml

from diffmoe.checkpoints.reader import Checkpoint
from diffmoe.config import Config, config_to_tree
from diffmoe.deepspeed_json import merge_deepspeed
from diffmoe.layout import Layout
from diffmoe.data.shards import Batch, BatchStream, ShardReader, load_index
from diffmoe.evaluation.generate import generate_everywhere
from diffmoe.evaluation.plots import image_grid
from diffmoe.models.dit import DiT, initialize
from diffmoe.parallel.collectives import AgreedError, raise_together
from diffmoe.parallel.groups import ParallelGroups
from diffmoe.training.checkpoint import SaveFailed, Saver, newest_usable, restore
from diffmoe.training.ema import Ema
from diffmoe.training.engine import Engine
from diffmoe.training.metrics import Meter, Writer
from diffmoe.training.step import train_step


@dataclass
class Run:
    """Everything that one rank of a training run holds."""

    config: Config
    layout: Layout
    groups: ParallelGroups
    device: torch.device
    engine: Engine
    ema: Ema
    reader: ShardReader
    done: int

    @property
    def folder(self) -> Path:
        return Path(self.config.run.folder)


def train(config: Config, layout: Layout, deepspeed_tree: dict, groups: ParallelGroups, device: torch.device) -> None:
    """Trains to ``train.steps``, from the newest checkpoint in the run folder if there is one.

    Ctrl-C, SIGTERM and SIGUSR1 end the run in order: the ranks agree at a step boundary, save, and return."""
    run = start(config, layout, deepspeed_tree, groups, device)
    writer = _writer(run)
    meter = Meter(config, groups, device)
    stream = BatchStream(run.reader, batch=layout.batch, micro_batch=layout.micro_batch, accumulation=layout.accumulation,
                         rank=groups.rank, world=layout.ranks, start_step=run.done, prefetch=config.data.prefetch)
    saved = run.done
    if run.done >= config.train.steps:
        _say(run, f"nothing left to do: step {run.done} of train.steps ({config.train.steps})")
    saver = Saver(run.folder / "checkpoints", config, layout, groups)
    with stream, saver, _stop_requests() as asked:
        batches, problem = _fetch(stream, run.done < config.train.steps)
        raise_together(problem, groups.world)
        while run.done < config.train.steps:
            # A step ahead: what one rank cannot read must stop all of them, and a step's reduction can still say so.
            upcoming, problem = _fetch(stream, run.done + 1 < config.train.steps)
            stop = bool(asked) or problem is not None
            report = train_step(run.engine, run.ema, batches, config, layout, groups, run.done, stop)
            batches = upcoming
            run.done += 1
            finished = run.done == config.train.steps
            last = report.stop or finished
            meter.add(report)
            if last or run.done % config.train.log_every == 0:
                record, load = meter.collect(run.done)
                record.update(_report_saves(run, saver))
                if writer:
                    writer.record(record)
                    if _due(run.done, 10 * config.train.log_every, last):  # drawing takes a while
                        writer.load_picture(load, run.done)
            if _due(run.done, config.train.save_every, last):
                saver.save(run.done, run.engine, run.ema)
                saved = run.done
            if _due(run.done, config.train.sample_every, finished):  # not at a stop, whose grace is for saving
                _sample(run, writer)
            if last:
                saver.settle()
                _report_saves(run, saver)
            if run.done % config.train.log_every == 0:
                meter.restart_clock()  # saving, sampling and drawing are not training
            if report.stop:
                _say(run, f"stopped in order at step {run.done}; the same command goes on from there")
                break
    assert saved == run.done
    if writer:
        writer.close()
    raise_together(problem, groups.world)


def start(config: Config, layout: Layout, deepspeed_tree: dict, groups: ParallelGroups, device: torch.device) -> Run:
    """Model, engine, EMA and data of a run, resumed from its newest checkpoint.  All ranks raise together."""
    def say(text: str) -> None:
        if groups.rank == 0:
            print(text, flush=True)

    newest = newest_usable(Path(config.run.folder) / "checkpoints", groups, say)
    reader, problem = None, None
    try:
        reader = open_data(config)
        if newest is not None:
            _check_resumable(newest, config, layout)  # before anything of an earlier run is overwritten
        if groups.rank == 0:
            _write_resolved(config, layout, deepspeed_tree)
    except (ValueError, OSError) as error:
        problem = error
    raise_together(problem, groups.world)
    model = DiT(config.model, config.moe, pool=layout.pool, groups=groups, recompute=config.parallel.recompute,
                time_scale=config.diffusion.time_scale)
    initialize(model, config.run.seed)
    engine = Engine(model, config, layout, deepspeed_tree, groups, device)
    ema = Ema(engine, config.train.ema_decays)
    run = Run(config, layout, groups, device, engine, ema, reader, 0)
    if newest is not None:
        run.done = restore(newest, engine, ema, groups, say)
        say(f"resumed from {newest.path} at step {run.done}")
    return run


def _fetch(stream: BatchStream, wanted: bool) -> tuple[list[Batch] | None, Exception | None]:
    """The next step's micro-batches, or why this rank cannot read them."""
    try:
        return (next(stream) if wanted else None), None
    except (ValueError, OSError) as error:
        return None, error


def _due(step: int, every: int, last: bool) -> bool:
    """Every ``every`` steps, and at the end; 0 means only at the end."""
    return last or (every > 0 and step % every == 0)


def open_data(config: Config) -> ShardReader:
    """The shards, checked against the model.  Raises ValueError."""
    model = config.model
    if not config.data.shards:
        raise ValueError("data.shards ('') must name a folder of shards with an index.json")
    index = load_index(config.data.shards)
    wanted = (model.channels, model.input_size, model.input_size)
    if tuple(index.x_shape) != wanted:
        raise ValueError(f"data.shards ({config.data.shards}) holds samples of shape {tuple(index.x_shape)}; model.channels "
                         f"and model.input_size make {wanted}")
    if index.meta.classes != model.classes:
        raise ValueError(f"data.shards ({config.data.shards}) has {index.meta.classes} classes; model.classes is "
                         f"{model.classes}")
    return ShardReader(index, seed=config.run.seed, window=config.data.window, flip=config.data.flip)


def _write_resolved(config: Config, layout: Layout, deepspeed_tree: dict) -> None:
    folder = Path(config.run.folder)
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(config_to_tree(config), sort_keys=False))
        (folder / "deepspeed.json").write_text(json.dumps(merge_deepspeed(deepspeed_tree, config, layout), indent=1) + "\n")
        (folder / "layout.json").write_text(json.dumps(vars(layout), indent=1) + "\n")
    except OSError as error:
        raise ValueError(f"run.folder ({folder}) cannot be written: {error}") from error


# What may not change between a checkpoint and the run that goes on from it: the model, the data order, the noise.
_MEANING = ("model", "moe", "diffusion")


def _check_resumable(saved: Checkpoint, config: Config, layout: Layout) -> None:
    """Raises ValueError when a checkpoint belongs to another run."""
    old, new = config_to_tree(saved.config()), config_to_tree(config)
    pairs = [(f"{s}.{k}", old[s][k], new[s][k]) for s in _MEANING for k in old[s] if (s, k) != ("moe", "pool")]
    pairs += [("run.seed", old["run"]["seed"], new["run"]["seed"]),
              ("train.batch", old["train"]["batch"], new["train"]["batch"]),
              ("data.window", old["data"]["window"], new["data"]["window"])]
    if config.model.family != "dense":
        pairs.append(("moe.pool (samples)", saved.pool, layout.pool))
    changed = [f"{name}: {before} there, {now} here" for name, before, now in pairs if before != now]
    if changed:
        raise ValueError(f"{saved.path} belongs to another run ({'; '.join(changed)}); choose another run.folder")


def _sample(run: Run, writer: Writer | None) -> None:
    """A grid from the EMA weights, classes in turn; every rank makes its share."""
    count = run.config.sample.columns * min(run.config.model.classes, run.config.sample.columns)
    labels = [i % run.config.model.classes for i in range(count)]
    with run.engine.weights(run.ema.shards) as model:
        images = generate_everywhere(model, run.config, labels, run.groups.world, run.device)
    if writer:
        path = run.folder / f"samples_{run.done:08d}.png"
        image_grid(images.numpy(), run.config.sample.columns, path)
        writer.sample_picture(path, run.done)


def _report_saves(run: Run, saver: Saver) -> dict[str, float]:
    """Says what became of saves; the last one's times for the metrics.  A failed one ends the run on every rank."""
    times: dict[str, float] = {}
    for outcome in saver.outcomes():
        if isinstance(outcome, SaveFailed):
            raise AgreedError(outcome.message)
        _say(run, f"saved {outcome.path}: training stood still for {outcome.stall_s:.2f} s, written in {outcome.write_s:.2f} s")
        times = {"save_stall_s": outcome.stall_s, "save_write_s": outcome.write_s}
    return times


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Signals received, in order; the second Ctrl-C interrupts at once."""
    asked: list[int] = []

    def note(number: int, _frame: object) -> None:
        if number == signal.SIGINT and number in asked:
            raise KeyboardInterrupt
        asked.append(number)

    kept = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield asked
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def _writer(run: Run) -> Writer | None:
    if run.groups.rank != 0:
        return None
    return Writer(run.folder, run.config.train.steps, [f"block {i}" for i, _ in run.engine.model.moe_layers()])


def _say(run: Run, text: str) -> None:
    if run.groups.rank == 0:
        print(text, flush=True)
