"""Where the time of a rank's steps goes: its own work, waits inside collectives, waits for data.

In synchronous training every rank's step takes as long as the slowest rank's.  What tells them
apart is how long each waits for the others.  On a CPU the host's clock sees those waits; on a GPU
they are the compute stream's, between two events, which are read a step later, when the one read
of a step has shown that they are there: the host waits for nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Part = Literal["exchange", "data"]
_Mark = float | torch.cuda.Event


class StepClock:
    """Of one rank.  Measures nothing without a ``device``."""

    def __init__(self, device: torch.device | None = None) -> None:
        self._on, self._in_step, self._depth = device is not None, False, 0
        on_gpu = device is not None and device.type == "cuda"
        self._stream = torch.cuda.current_stream(device) if on_gpu else None
        self._waits: list[tuple[Part, _Mark, _Mark]] = []  # of this step
        self._start: _Mark = 0.0
        self._before: tuple[_Mark, _Mark, list[tuple[Part, _Mark, _Mark]]] | None = None
        self._steps: list[tuple[float, float, float]] = []
        self._spare: list[torch.cuda.Event] = []

    def begin_step(self) -> None:
        """One that was begun and not ended is forgotten."""
        if self._on:
            self._in_step, self._depth, self._waits = True, 0, []
            self._start = self._mark()

    def end_step(self) -> None:
        """Reads the step before, whose events came ahead of this step's read by the host."""
        if not self._in_step:
            return
        self._in_step = False
        before, self._before = self._before, (self._start, self._mark(), self._waits)
        if before is not None:
            start, end, waits = before
            total, parts = self._between(start, end), {"exchange": 0.0, "data": 0.0}
            for part, began, ended in waits:
                parts[part] += self._between(began, ended)
            exchange, data = parts["exchange"], parts["data"]
            self._steps.append((total - exchange - data, exchange, data))

    def read(self) -> list[tuple[float, float, float]]:
        """Seconds of own work, in collectives and waiting for data, of every step since the last
        call but the newest.
        """
        steps, self._steps = self._steps, []
        return steps

    @contextmanager
    def waiting(self, part: Part) -> Iterator[None]:
        """Around something in a step that is not this rank's own work."""
        began = self.begin()
        yield
        self.end(part, began)

    def begin(self) -> _Mark | None:
        """As :meth:`waiting`, for :meth:`end`; None where nothing is to be measured: outside a
        step, inside another wait, and on a stream beside the compute stream, which does not wait.
        """
        if not self._in_step:
            return None
        self._depth += 1
        beside = self._stream is not None and torch.cuda.current_stream() != self._stream
        return None if beside or self._depth > 1 else self._mark()

    def end(self, part: Part, began: _Mark | None) -> None:
        if self._in_step:
            self._depth -= 1
            if began is not None:
                self._waits.append((part, began, self._mark()))

    def _mark(self) -> _Mark:
        if self._stream is None:
            return time.perf_counter()
        event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event

    def _between(self, began: _Mark, ended: _Mark) -> float:
        if isinstance(began, float):
            assert isinstance(ended, float)
            return ended - began
        assert isinstance(ended, torch.cuda.Event)
        self._spare += [began, ended]
        return began.elapsed_time(ended) / 1000
