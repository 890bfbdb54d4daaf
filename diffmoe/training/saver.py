"""Saving while training goes on.

The collectives here run in the main thread, between steps.  What a background thread does is files
only: process groups demand one order of operations on all ranks, and training owns it.
"""

from __future__ import annotations

import shutil
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffmoe.checkpoints import writer
from diffmoe.checkpoints.reader import BUFFERS, SNAPSHOTS, complete_folders, step_folder, step_of
from diffmoe.config import Config
from diffmoe.layout import Layout
from diffmoe.models.logical import running_buffers
from diffmoe.parallel.collectives import (
    AgreedError,
    agreed,
    first_complaint,
    gather_objects,
    is_lost_peer,
)
from diffmoe.parallel.groups import ParallelGroups
from diffmoe.parallel.trace import Trace
from diffmoe.training.checkpoint import averages_of, kinds_of
from diffmoe.training.ema import Ema
from diffmoe.training.engine import Engine
from diffmoe.training.state import filled, owned

_POLL_S = 0.05
_GRACE_S = 30.0
# What a save without a snapshot, or a load, takes of a rank's memory beside its state: chunks on
# their way.  Tests hold it to that.
STREAMING_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Saved:
    """A save that is done: the folder ``path`` is complete.  Training stood still for ``stall_s``
    on this rank; its thread took ``write_s`` (rank 0's until the commit).
    """

    step: int
    path: Path
    stall_s: float
    write_s: float


@dataclass(frozen=True)
class SaveFailed:
    """A save that came to nothing, the same on every rank.  What it wrote is gone, and earlier
    checkpoints stand.
    """

    step: int
    message: str


class Saver:
    """Writes checkpoints of a run, one at a time.  Every rank writes the state that it owns.

    With ``train.async_save`` the state is first copied to host memory, which costs one copy of what
    this rank owns, kept for the next save; training goes on while a thread writes it.  Otherwise it
    is streamed and takes ``STREAMING_BYTES`` at most.

    As a context it gives a save in flight half a minute on the way out, for the sake of errors
    elsewhere: who ends a run in order calls :meth:`wait`.
    """

    def __init__(
        self,
        folder: Path,
        config: Config,
        layout: Layout,
        groups: ParallelGroups,
        class_names: tuple[str, ...] = (),
    ) -> None:
        self.folder, self.config, self.layout, self.groups = folder, config, layout, groups
        self.snapshots = folder.parent / SNAPSHOTS
        self.class_names = class_names
        self._job: _Job | None = None
        self._outcomes: list[Saved | SaveFailed] = []
        self._host: dict[str, Tensor] = {}

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        # A rank that is gone does not write its part: the watchdog takes over at once.
        if self._job is not None and not (error and is_lost_peer(error)):
            self._job.join(_GRACE_S)
            self._job.stop.set()
            self._job.join(_GRACE_S)

    @property
    def failed(self) -> bool:
        """Whether this rank's part of the save in flight has failed.  When that of any rank has,
        all call :meth:`wait`.
        """
        return self._job is not None and self._job.problem is not None

    def outcomes(self) -> list[Saved | SaveFailed]:
        """What became known since the last call, oldest first; on rank 0 as soon as a folder is
        complete, else when waited for.
        """
        if self._job is not None and self._job.finished and self.groups.rank == 0:
            self._tell(self._job)
        told, self._outcomes = self._outcomes, []
        return told

    def save(
        self,
        step: int,
        engine: Engine,
        ema: Ema,
        counters: Mapping[str, Any] | None = None,
        snapshot: bool = False,
    ) -> None:
        """Starts saving the state after ``step`` optimizer steps; all ranks together.  First waits
        for the save before it.

        ``counters``: what else the loop counts, ready for JSON; rank 0's are kept.  ``snapshot``:
        the averages of ``train.ema_lengths`` alone, where nothing prunes them.  What a disk may do
        is not raised but among the :meth:`outcomes`.
        """
        folder = self.snapshots if snapshot else self.folder
        began = time.perf_counter()
        self.wait()
        try:
            with agreed(self.groups.world):
                if self.groups.rank == 0:
                    writer.prepare(folder, step)
        except AgreedError as error:
            self._outcomes.append(SaveFailed(step, str(error)))
            return
        kinds = averages_of(ema) if snapshot else kinds_of(engine, ema)
        shares = self._shares(engine, kinds)
        if self.groups.rank == 0 and not snapshot:
            buffers = running_buffers(engine.model).items()
            shares[BUFFERS] = writer.whole_tensors(
                {n: v.detach().cpu().clone() for n, v in buffers}
            )
        self._job = _Job(self, folder, step, shares, dict(counters or {}))
        self._job.stall_s = time.perf_counter() - began
        self._job.start()
        if not self.config.train.async_save:
            self.wait()

    def drop_snapshots(self, step: int) -> None:
        """Removes those of steps after ``step``, which the run takes again."""
        later = [path for path in complete_folders(self.snapshots) if step_of(path) > step]
        for path in later if self.groups.rank == 0 else ():
            shutil.rmtree(path, ignore_errors=True)

    def wait(self) -> None:
        """Waits until the save in flight, if any, is complete or given up; all ranks together.

        To ask each other is no progress, and to write is: a disk that answers no more is the
        watchdog's, like any other hang.
        """
        job, world = self._job, self.groups.world
        if job is None:
            return
        asking, trace, before = replace(world, trace=Trace()), world.trace, -1
        while True:
            job.join(_POLL_S)
            states = gather_objects((not job.is_alive(), job.problem, job.begun), asking)
            message = first_complaint([problem for _, problem, _ in states], world)
            if message is not None or all(done for done, _, _ in states):
                break
            if (begun := sum(begun for _, _, begun in states)) != before:
                before = begun
                trace.at("files")
            who = "other ranks still write" if job.waits else "this rank still writes"
            trace.collective, trace.waiting = f"save, in which {who}", job.waits
        trace.waiting = False
        if message is not None:
            job.stop.set()
            job.join()
            gather_objects(None, world)  # nobody writes any more
            if world.index == 0:
                shutil.rmtree(writer.partial_folder(job.folder, job.step), ignore_errors=True)
            gather_objects(None, world)
            self._outcomes.append(SaveFailed(job.step, message))
        else:
            self._tell(job)
        self._job = None

    def _tell(self, job: _Job) -> None:
        if not job.told:
            job.told = True
            stall_s = job.stall_s if self.config.train.async_save else job.stall_s + job.write_s
            path = step_folder(job.folder, job.step)
            self._outcomes.append(Saved(job.step, path, stall_s, job.write_s))

    def _shares(self, engine: Engine, kinds: Mapping[str, list[Tensor]]) -> dict[str, writer.Share]:
        places, shares = owned(engine), {}
        for kind, shards in kinds.items():
            here = filled(places, shards)
            values = [place.of(shards) for place in here]
            if self.config.train.async_save:
                values = self._snapshot(kind, values, engine.device)
            pieces = [(place.piece, torch.float32) for place in here]
            shares[kind] = writer.Share(pieces, values)
        if engine.device.type == "cuda":
            torch.cuda.synchronize(engine.device)  # the snapshots have arrived
        return shares

    def _snapshot(self, kind: str, values: list[Tensor], device: torch.device) -> list[Tensor]:
        """Copies in host memory, taken now; the memory is kept and pinned where a GPU copies into
        it.
        """
        sizes, on_gpu = [value.numel() for value in values], device.type == "cuda"
        if kind not in self._host:
            self._host[kind] = torch.empty(sum(sizes), pin_memory=on_gpu)
        copies = list(self._host[kind].split(sizes))
        for value, target in zip(values, copies, strict=True):
            target.copy_(value, non_blocking=on_gpu)
        return copies


class _Job(threading.Thread):
    """One rank's part of a save; on rank 0 also the commit, when every part is there."""

    def __init__(
        self,
        saver: Saver,
        folder: Path,
        step: int,
        shares: dict[str, writer.Share],
        counters: dict[str, Any],
    ) -> None:
        super().__init__(name=f"save-{step}", daemon=True)
        self.saver, self.folder, self.step, self.counters = saver, folder, step, counters
        self.shares = {
            kind: writer.Share(share.pieces, self._until_stopped(share.values))
            for kind, share in shares.items()
        }
        self.stop = threading.Event()
        self.problem: str | None = None
        self.begun = 0  # pieces that it began to write
        self.waits = False  # for the other ranks
        self.finished = self.told = False
        self.stall_s = self.write_s = 0.0

    def run(self) -> None:
        began = time.perf_counter()
        try:
            self._write()
        except writer.Stopped:  # by wait, or since another rank failed, which says why
            pass
        except Exception as error:  # whatever it is, the other ranks must hear of it
            self.problem = str(error)
            if not isinstance(error, OSError):  # a fault of this program
                self.problem = f"{type(error).__name__}: {error}"
                traceback.print_exc()
        else:
            self.write_s = time.perf_counter() - began
            self.finished = True

    def _write(self) -> None:
        saver, train = self.saver, self.saver.config.train
        partial = writer.partial_folder(self.folder, self.step)
        writer.write_part(partial, saver.groups.rank, self.shares)
        self.waits = True
        if saver.groups.rank == 0:
            found = writer.join_parts(partial, saver.groups.world.size, self.stop.is_set)
            self.waits = False
            final = step_folder(self.folder, self.step)
            facts = (saver.config, saver.layout, self.counters, saver.class_names)
            writer.commit(partial, final, found, *facts)
            if self.folder == saver.folder:  # no snapshot
                writer.prune(saver.folder, self.step, train.keep, train.keep_every)

    def _until_stopped(self, values: Iterable[Tensor]) -> Iterator[Tensor]:
        for value in values:
            if self.stop.is_set():
                raise writer.Stopped("given up")
            self.begun += 1
            yield value
