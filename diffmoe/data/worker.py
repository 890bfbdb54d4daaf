"""A loader process: fills its slots of the steps that its parent names, in memory that both see.

    parent → worker   one pickle (reader, part, ring, ahead), then "step slot" lines
    worker → parent   per line, one pickle: None, or the exception

Started by `stream.py`, for which the signals that stop a run must not reach it: it ends when its
parent closes the pipe, or dies.
"""

from __future__ import annotations

import mmap
import os
import pickle
import signal
import sys

from diffmoe.data.share import fill_step
from diffmoe.errors import UserError

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def main() -> None:
    """Serves until the pipe ends. The memory's descriptor is the only argument."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # blocked until they are ignored
    commands, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints goes where errors go
    reader, part, ring, ahead = pickle.load(commands)
    arrays = ring.arrays(memoryview(mmap.mmap(int(sys.argv[1]), ring.bytes)))
    for line in commands:
        step, slot = map(int, line.split())
        failure: BaseException | None = None
        try:
            fill_step(reader, part, step, ahead, [array[slot] for array in arrays])
        except (UserError, OSError) as error:
            failure = error
        try:
            pickle.dump(failure, answers)
            answers.flush()
        except BrokenPipeError:
            return
    reader.close()


if __name__ == "__main__":
    main()
