"""Ranks as child processes of this one: for the parity table, the tests and small local jobs.

The ranks meet through a file, never a port, compute on one thread each, and live for as many calls
as wanted: importing torch and DeepSpeed costs seconds, a call milliseconds.  A rank that fails or
hangs takes the whole world with it; the next call starts a fresh one.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from diffmoe.errors import UserError
from diffmoe.parallel.collectives import is_lost_peer

# Seconds by which the news of a rank that fails may come after those of the ranks that lose it.
_MOMENT = 2.0
_PR_SET_PDEATHSIG = 1  # of Linux's include/uapi/linux/prctl.h


class RankError(RuntimeError):
    """A rank raised, died or did not answer.  ``rank`` is the first of them, ``kind`` its
    exception's class name (``TimeoutError`` for one that hung), ``reason`` that exception's
    message; ``lost_peer``: it only lost another rank.
    """

    def __init__(
        self, rank: int, kind: str, reason: str, trace: str = "", lost_peer: bool = False
    ) -> None:
        super().__init__(rank, kind, reason, trace, lost_peer)
        self.rank, self.kind, self.reason, self.lost_peer = rank, kind, reason, lost_peer
        self.trace = trace

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.kind}: {self.reason}\n{self.trace}".rstrip()


class Ranks:
    """``world`` processes joined by torch.distributed; a context manager that leaves none behind.

    ``device``: ``cpu`` (gloo) or ``cuda`` (NCCL, rank i on GPU i)."""

    def __init__(self, world: int, *, timeout: float = 120.0, device: str = "cpu") -> None:
        if world < 1:
            raise UserError(f"world ({world}) must be at least 1 rank")
        self.world, self.timeout, self.device = world, timeout, device
        self._processes: list[ProcessPoolExecutor] = []  # of one worker each
        self._folder: tempfile.TemporaryDirectory | None = None

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """``function(*args)`` on every rank, which is importable by name; the ranks' results in
        order.

        Raises RankError when a rank raises, dies, or has not answered after ``timeout`` seconds;
        the others are then ended, since they may be waiting for it.
        """
        try:
            calls = self._submit(function, *args)
            done, waiting = wait(calls, self.timeout, FIRST_EXCEPTION)
            if any(call.exception() for call in done):
                raise _cause(calls)
            if waiting:
                ranks = [rank for rank, call in enumerate(calls) if call in waiting]
                text = f"no answer after {self.timeout:g} s from ranks {ranks}"
                raise RankError(ranks[0], "TimeoutError", text)
            return [pickle.loads(call.result()) for call in calls]
        except BaseException:
            self._end()
            raise

    def _submit(self, function: Callable[..., Any], *args: Any) -> list[Future]:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="diffmoe-ranks-")
            store = f"{self._folder.name}/store"
            self._meeting = (self.world, store, self.device, self.timeout)
            context = multiprocessing.get_context("spawn")
            self._processes = [
                ProcessPoolExecutor(1, context, _end_with_parent) for _ in range(self.world)
            ]
        payload, calls = pickle.dumps((function, args)), []
        for rank, process in enumerate(self._processes):
            try:
                calls.append(process.submit(_call, payload, rank, *self._meeting))
            except BrokenProcessPool:
                raise RankError(rank, "RuntimeError", "the process is gone") from None
        return calls

    def close(self) -> None:
        """Lets the ranks leave in order; ends those that do not."""
        if self._processes:
            wait(self._submit(_leave), 10.0)
        self._end()

    def _end(self) -> None:
        for executor in self._processes:
            for process in list((executor._processes or {}).values()):
                process.kill()
        for executor in self._processes:
            executor.shutdown()
        self._processes = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_error: object) -> None:
        if kind is None:
            self.close()
        else:
            self._end()


def _cause(calls: list[Future]) -> RankError:
    """The failure to report: that of a rank which only lost another may be the first to arrive, a
    moment before the other's.
    """
    deadline = time.monotonic() + _MOMENT
    while True:
        errors = []
        for rank, call in enumerate(calls):
            if call.done() and (error := call.exception()):
                if not isinstance(error, RankError):
                    reason = "the process died without an answer"
                    error = RankError(rank, "RuntimeError", reason)
                errors.append(error)
        errors.sort(key=lambda error: error.lost_peer)
        waiting = [call for call in calls if not call.done()]
        left = deadline - time.monotonic()
        if not errors[0].lost_peer or not waiting or left <= 0:
            return errors[0]
        wait(waiting, left, FIRST_COMPLETED)


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _call(payload: bytes, rank: int, *meeting: Any) -> bytes:
    """One call on a rank.  After a failure the rank is ended, because the others may be inside a
    collective that it will never join.
    """
    try:
        _join(rank, *meeting)
        function, args = pickle.loads(payload)
        # Bytes: torch would put tensors into shared memory, which dies with this process.
        return pickle.dumps(function(*args))
    except BaseException as error:
        lost = is_lost_peer(error)
        name, trace = type(error).__name__, traceback.format_exc()
        raise RankError(rank, name, str(error), trace, lost) from None
    finally:
        sys.stdout.flush()


@cache
def _join(rank: int, world: int, store: str, device: str, timeout: float) -> None:
    """Once in a rank's life."""
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world),
        OMP_NUM_THREADS="1",
        DS_ACCELERATOR=device,
    )
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=timeout),
    )


def _leave() -> None:
    """Without this a rank now and then aborts after all work is done."""
    dist.barrier()
    dist.destroy_process_group()
