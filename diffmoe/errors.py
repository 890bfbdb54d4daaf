"""The one class of errors that a user can cause and fix, and how a command ends."""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_READER_GONE = 141  # 128 + SIGPIPE, as of a program that the signal ends
_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class UserError(ValueError):
    """Bad input, or a run that cannot go on: one line on stderr and exit code 2, "do not try again"
    to a job script.

    Every other exception, a plain ``ValueError`` too, is a fault of this program or of the machine:
    it keeps its traceback and exits with 1, after which a job script tries again.
    """


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """The signals received so far, in order, for work that ends where it can and is saved.

    Only the second Ctrl-C interrupts at once.  Schedulers and launchers send SIGTERM several times,
    and a save that is under way must survive that.
    """
    received: list[int] = []

    def note(number: int, _frame: object) -> None:
        if number == signal.SIGINT and number in received:
            raise KeyboardInterrupt
        received.append(number)

    kept = {number: signal.signal(number, note) for number in _STOPS}
    try:
        yield received
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def run_command(main: Callable[[list[str]], int]) -> int:
    """The exit code of ``main`` with the command line's arguments; 141 and no traceback where
    whoever read its output has gone (``| head``).
    """
    try:
        try:
            return main(sys.argv[1:])
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        poll = select.poll()
        for descriptor in (1, 2):
            poll.register(descriptor, select.POLLOUT)
        gone = [descriptor for descriptor, event in poll.poll(0) if event & select.POLLERR]
        if not gone:  # another pipe than the output
            raise
        for descriptor in gone:  # Python writes what is left at its exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
        return _READER_GONE
