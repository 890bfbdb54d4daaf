"""Signals that ask a run to stop.  No torch here: the command line listens from its first lines on."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """The signals received so far, in order: the run stops, saved, at the next step boundary (or
    where its start allows).

    Only the second Ctrl-C interrupts at once.  Schedulers and launchers send SIGTERM several times,
    and a save that is under way must survive that.
    """
    asked: list[int] = []

    def note(number: int, _frame: object) -> None:
        if number == signal.SIGINT and number in asked:
            raise KeyboardInterrupt
        asked.append(number)

    kept = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield asked
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
