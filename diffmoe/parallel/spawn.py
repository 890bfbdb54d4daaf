"""Ranks as child processes of this one: for the parity table, the tests and small local jobs.

The ranks meet through a file, never a port, compute on one thread each, and live for as many calls
as wanted: importing torch and DeepSpeed costs seconds, a call milliseconds.  A rank that fails or
hangs takes the whole world with it; the next call starts a fresh one.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from diffmoe.errors import UserError
from diffmoe.parallel.collectives import is_lost_peer

# seconds by which the news of a rank that fails may come after those of the ranks that lose it
_MOMENT = 2.0


class RankError(RuntimeError):
    """A rank raised, died or did not answer.  ``rank`` is the first of them, ``kind`` its
    exception's class name (``TimeoutError`` for one that hung), ``reason`` that exception's
    message; ``lost_peer``: it only lost another rank.
    """

    def __init__(
        self, rank: int, kind: str, reason: str, trace: str = "", lost_peer: bool = False
    ) -> None:
        super().__init__(f"rank {rank}: {kind}: {reason}" + (f"\n{trace}" if trace else ""))
        self.rank, self.kind, self.reason, self.lost_peer = rank, kind, reason, lost_peer


class Ranks:
    """``world`` processes joined by torch.distributed; a context manager that leaves none behind.

    ``device``: ``cpu`` (gloo) or ``cuda`` (NCCL, rank i on GPU i)."""

    def __init__(self, world: int, *, timeout: float = 120.0, device: str = "cpu") -> None:
        if world < 1:
            raise UserError(f"world ({world}) must be at least 1 rank")
        self.world, self.timeout, self.device = world, timeout, device
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._connections: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory | None = None

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """``function(*args)`` on every rank, which is importable by name; the ranks' results in
        order.

        Raises RankError when a rank raises, dies, or has not answered after ``timeout`` seconds;
        the others are then ended, since they may be waiting for it.
        """
        if not self._processes:
            self._start()
        payload = pickle.dumps((function, args))
        for rank, connection in enumerate(self._connections):
            try:
                connection.send_bytes(payload)
            except OSError:
                self._end()
                raise RankError(rank, "RuntimeError", "the process is gone") from None
        try:
            return self._collect()
        except BaseException:
            self._end()
            raise

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="diffmoe-ranks-")
        store = str(Path(self._folder.name) / "store")
        context = multiprocessing.get_context("spawn")
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve,
                daemon=True,
                name=f"rank-{rank}",
                args=(rank, self.world, store, self.device, self.timeout, theirs),
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)

    def _collect(self) -> list[Any]:
        results: dict[int, Any] = {}
        deadline = time.monotonic() + self.timeout
        while len(results) < self.world:
            waiting = {c: rank for rank, c in enumerate(self._connections) if rank not in results}
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise RankError(
                    min(waiting.values()),
                    "TimeoutError",
                    f"no answer after {self.timeout:g} s from ranks {sorted(waiting.values())}",
                )
            for rank, connection in sorted((waiting[c], c) for c in ready):
                try:
                    results[rank] = _answer(rank, connection)
                except RankError as error:
                    others = {c: r for c, r in waiting.items() if r != rank and r not in results}
                    raise _cause(error, others) from None
        return [results[rank] for rank in range(self.world)]

    def close(self) -> None:
        """Lets the ranks leave in order; ends those that do not."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(timeout=10.0)
        self._end()

    def _end(self) -> None:
        for process in self._processes:
            if process.is_alive():
                process.kill()
            process.join()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections = [], []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._end()


def _cause(first: RankError, others: dict[Connection, int]) -> RankError:
    """The failure to tell of: that of a rank which only lost another may be the first to arrive, a
    moment before the other's.
    """
    deadline = time.monotonic() + _MOMENT
    while first.lost_peer and others:
        ready = wait(list(others), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for connection in ready:
            try:
                _answer(others.pop(connection), connection)
            except RankError as error:
                if not error.lost_peer:
                    return error
    return first


def _answer(rank: int, connection: Connection) -> Any:
    try:
        good, value = pickle.loads(connection.recv_bytes())
    except (EOFError, ConnectionError):
        raise RankError(rank, "RuntimeError", "the process died without an answer") from None
    if not good:
        raise RankError(rank, *value)
    return value


def _serve(
    rank: int, world: int, store: str, device: str, timeout: float, connection: Connection
) -> None:
    """A rank's life: join, answer calls until the parent hangs up, leave together.  A failure ends
    it, because the other ranks may be inside a collective that this one will never join.
    """
    good = True
    joined = False
    while good:
        try:
            payload = connection.recv_bytes()
        except (EOFError, ConnectionError):
            break
        try:
            if not joined:
                _join(rank, world, store, device, timeout)
                joined = True
            function, args = pickle.loads(payload)
            # Bytes, not Connection.send: that would put tensors into shared memory, which dies with
            # this process.
            answer = pickle.dumps((True, function(*args)))
        except BaseException as error:
            good = False
            answer = pickle.dumps(
                (
                    False,
                    (type(error).__name__, str(error), traceback.format_exc(), is_lost_peer(error)),
                )
            )
        sys.stdout.flush()
        connection.send_bytes(answer)
    if good and joined:
        # Without this a rank now and then aborts after all work is done.
        dist.barrier()
        dist.destroy_process_group()


def _join(rank: int, world: int, store: str, device: str, timeout: float) -> None:
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
