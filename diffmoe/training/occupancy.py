"""One run at a time in a run folder: two would overwrite each other's checkpoints and records.

Rank 0 keeps ``running.json`` there, with who it is and a count that goes up every few seconds.  Not a lock of the file system: the
lock of a node that died may outlive it, and its job could not go on elsewhere.  A start that finds the file looks whether the
count still moves.  It reads contents and not times: those it gets fresh on NFS, and needs no common clock.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from pathlib import Path
from types import TracebackType

from diffmoe.errors import UserError
from diffmoe.parallel.collectives import raise_together
from diffmoe.parallel.groups import Group

FILE_NAME = "running.json"
BEAT_S = 4.0
_PATIENCE_S = 4 * BEAT_S


class Occupancy:
    """Around a run: what rank 0 of ``world`` says in ``folder`` while it runs."""

    def __init__(self, folder: Path, world: Group) -> None:
        self._path, self._world = folder / FILE_NAME, world
        self._me = {"host": socket.gethostname(), "process": os.getpid(), "job": os.environ.get("SLURM_JOB_ID", ""),
                    "start": os.environ.get("SLURM_RESTART_COUNT", "0")}
        self._thread: threading.Thread | None = None
        self._leaving = threading.Event()

    def __enter__(self) -> Occupancy:
        return self

    def take(self) -> None:
        """Occupies the folder if it exists and is not this run's yet; all ranks together.  Raises AgreedError where another run
        lives in it; finding that one of another host does not may take some seconds."""
        problem: Exception | None = None
        if self._world.index == 0 and self._thread is None and self._path.parent.is_dir():
            try:
                self._check()
                self._say(0)
                self._thread = threading.Thread(target=self._beat, name="occupancy", daemon=True)
                self._thread.start()
            except OSError as error:
                problem = UserError(f"run.folder ({self._path.parent}) cannot be written: {error}")
            except UserError as error:
                problem = error
        raise_together(problem, self._world)

    def __exit__(self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        if self._thread is not None:
            self._leaving.set()
            self._thread.join()
            if self._is_mine(self._read()):
                self._path.unlink(missing_ok=True)

    def _check(self) -> None:
        found = self._read()
        if not found or self._is_gone(found):
            return
        deadline = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline:
            time.sleep(0.2)
            now = self._read()
            if not now:
                return
            if now != found:
                raise UserError(f"run.folder ({self._path.parent}) is in use by process {now.get('process')} on {now.get('host')}: "
                                "stop that run first, or choose another run.folder")

    def _is_gone(self, found: dict) -> bool:
        """Whether there is nothing to wait for: a process of this host that has ended, or this very job before its requeue."""
        if self._me["job"] and found.get("job") == self._me["job"] and found.get("start") != self._me["start"]:
            return True
        if found.get("host") != self._me["host"] or not isinstance(found.get("process"), int):
            return False
        try:
            os.kill(found["process"], 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        return False

    def _is_mine(self, found: dict) -> bool:
        return all(found.get(name) == value for name, value in self._me.items())

    def _read(self) -> dict:
        """What is in the file; nothing where there is none, or none that anybody of this project wrote."""
        try:
            found = json.loads(self._path.read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _say(self, count: int) -> None:
        partial = self._path.with_name(f".{FILE_NAME}.partial")
        partial.write_text(json.dumps({**self._me, "count": count}) + "\n")
        os.replace(partial, self._path)

    def _beat(self) -> None:
        count = 0
        while not self._leaving.wait(BEAT_S):
            count += 1
            found = self._read()
            if found and not self._is_mine(found):
                return  # this process stood still for so long that another run took the folder
            with contextlib.suppress(OSError):  # a full disk has its own words elsewhere
                self._say(count)
