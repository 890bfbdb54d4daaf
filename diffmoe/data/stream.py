"""The batches of one rank, read ahead by a thread or by processes into one block of memory."""

from __future__ import annotations

import contextlib
import mmap
import os
import pickle
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from diffmoe.data.reader import ShardReader
from diffmoe.data.share import Part, Ring, Share, fill_step
from diffmoe.data.worker import STOP_SIGNALS

HELD = 2  # steps that the consumer may still look at
_FETCH_AHEAD = 16  # steps, of remote shards


@dataclass(frozen=True)
class Batch:
    """Samples by `positions`: x float32 [n, C, H, W], y int64 [n], `features` float16 [n, N, d]."""

    x: torch.Tensor
    y: torch.Tensor
    positions: tuple[int, ...]
    features: torch.Tensor | None = None


class BatchStream(Iterator[list[Batch]]):
    """This rank's micro-batches, step after step without end. Which samples they are does not
    depend on `workers`.

    The memory is one block, reused: a step's batches are valid until the second `next` after
    theirs. On CUDA it is pinned, and workers write where the copy to the device reads.

    Args:
        reader: used by the workers alone from here on.
        share: the rank's positions.
        start_step: the first step returned; nothing before it is read.
        workers: processes that read; 0: a thread of this one.
        prefetch: steps held ready.
        pin: pin the memory, for copies to a CUDA device.
    """

    def __init__(
        self,
        reader: ShardReader,
        share: Share,
        *,
        start_step: int,
        workers: int = 0,
        prefetch: int = 2,
        pin: bool = False,
    ) -> None:
        self._share, self.step = share, start_step  # the step that `next` returns next
        self._ring = Ring(prefetch + HELD, share.count, reader.index.x_shape, reader.features)
        self._memory_file = os.memfd_create("diffmoe-batches")
        os.ftruncate(self._memory_file, self._ring.bytes)
        self._memory = mmap.mmap(self._memory_file, self._ring.bytes)
        arrays = self._ring.arrays(memoryview(self._memory))
        self._tensors = [torch.from_numpy(array) for array in arrays]
        self._pinned = pin and _pin(self._tensors[0], self._ring.bytes)
        self._failure: BaseException | None = None
        self._closed = False
        self._workers: list[_Thread | _Process] = []
        try:
            for number in range(max(1, workers)):
                part = Part(share, number, max(1, workers))
                if workers:
                    self._workers.append(_Process(reader, part, self._ring, self._memory_file))
                else:
                    self._workers.append(_Thread(reader, part, arrays))
            for step in range(start_step, start_step + prefetch):
                self._ask(step)
        except BaseException:
            self.close()
            raise

    def __next__(self) -> list[Batch]:
        """The next step's `accumulation` micro-batches.

        Raises:
            BadShard: a shard that this step needs is bad; the steps before it were returned.
            UserError, OSError: the reader's other errors, and the death of a worker.
                Once raised, always raised.
        """
        if self._closed:
            raise RuntimeError("this batch stream is closed")
        if self._failure is None:
            self._ask(self.step + self._ring.slots - HELD)
            # All of them, also after a failure: which error is raised is then no matter of which
            # worker was faster.
            answers = [worker.wait() for worker in self._workers]
            self._failure = next((answer for answer in answers if answer is not None), None)
        if self._failure is not None:
            raise self._failure
        slot, positions = self.step % self._ring.slots, self._share.positions(self.step)
        self.step += 1
        parts = zip(*(part[slot].split(self._share.micro_batch) for part in self._tensors))
        return [
            Batch(x, y, tuple(row.tolist()), *features)
            for (x, y, *features), row in zip(parts, positions)
        ]

    def _ask(self, step: int) -> None:
        for worker in self._workers:
            worker.ask(step, step % self._ring.slots)

    def close(self, waits: bool = True) -> None:
        """Ends the workers; harmless when repeated. Batches stay readable.  Not ``waits``: not for
        the device, which after an error may itself wait for another rank.
        """
        if self._closed:
            return
        self._closed = True
        for worker in self._workers:
            worker.stop()
        for worker in self._workers:
            worker.join()
        if self._pinned and waits:
            torch.cuda.synchronize()  # copies under way
            torch.cuda.cudart().cudaHostUnregister(self._tensors[0].data_ptr())
        os.close(self._memory_file)

    def __enter__(self) -> BatchStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _pin(x: torch.Tensor, size: int) -> bool:
    code = int(torch.cuda.cudart().cudaHostRegister(x.data_ptr(), size, 0))
    if code:
        print(
            f"data: memory for batches could not be pinned (CUDA error {code}); copies will wait",
            file=sys.stderr,
            flush=True,
        )
        with contextlib.suppress(RuntimeError):
            torch.ones(1, device="cuda")  # takes the error off: else the next kernel would raise it
    return code == 0


class _Thread:
    """The worker of this process: fills its slots of the steps asked for, in that order."""

    def __init__(self, reader: ShardReader, part: Part, arrays: Sequence[np.ndarray]) -> None:
        self._reader, self._part, self._arrays = reader, part, arrays
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batch-stream")
        self._asked: deque[Future[None]] = deque()

    def ask(self, step: int, slot: int) -> None:
        arrays = [array[slot] for array in self._arrays]
        of = self._reader, self._part
        self._asked.append(self._pool.submit(fill_step, *of, step, _FETCH_AHEAD, arrays))

    def wait(self) -> BaseException | None:
        """Until the oldest step asked for is filled: why it could not be, or None."""
        return self._asked.popleft().exception()

    def stop(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def join(self) -> None:
        self._pool.shutdown()
        self._reader.close()


class _Process:
    """A worker like `_Thread` in a process of its own: see `worker.py`."""

    def __init__(self, reader: ShardReader, part: Part, ring: Ring, memory_file: int) -> None:
        self._name = f"data worker {part.number} of rank {part.share.rank}"
        root = str(Path(__file__).resolve().parent.parent.parent)
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        # What stops a run stops this process, which then ends the worker, so the worker ignores
        # these signals; they are blocked until it does.
        kept = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "diffmoe.data.worker", str(memory_file)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=[memory_file],
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, kept)
        assert self._process.stdin and self._process.stdout
        self._commands, self._answers = self._process.stdin, self._process.stdout
        self._send(pickle.dumps((reader, part, ring, _FETCH_AHEAD)))

    def ask(self, step: int, slot: int) -> None:
        self._send(f"{step} {slot}\n".encode())

    def _send(self, data: bytes) -> None:
        with contextlib.suppress(BrokenPipeError):  # it is dead, and `wait` says so
            self._commands.write(data)
            self._commands.flush()

    def wait(self) -> BaseException | None:
        try:
            return pickle.load(self._answers)
        except (EOFError, pickle.UnpicklingError):
            code = self._process.wait()
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit status {code}"
            return ChildProcessError(f"{self._name} {how}")

    def stop(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._commands.close()

    def join(self) -> None:
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:  # in the middle of a download
            self._process.kill()
            self._process.wait()
        self._answers.close()
