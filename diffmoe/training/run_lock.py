"""One run at a time in a run folder: two would overwrite each other's checkpoints and records.

Rank 0 keeps ``running.json`` there, with who it is and a count that goes up every few seconds.  A
start that finds the file looks whether the count still moves.  It reads contents and not times:
those it gets fresh on NFS, and needs no common clock.

The run holds no lock of the file system: that of a node that died may outlive it, and its job could
not resume elsewhere.  Only the moments of reading and writing the file are under one, so that of
any number of starts at the same moment one takes the folder.  Some file systems know no locks, or
none between nodes (Lustre's ``localflock``): a start therefore looks once more whether it is its
own record that stayed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from diffmoe.errors import UserError
from diffmoe.files import writing
from diffmoe.parallel.collectives import agreed
from diffmoe.parallel.groups import Group

FILE_NAME = "running.json"
HEARTBEAT_S = 4.0
_PATIENCE_S = 4 * HEARTBEAT_S
_SECOND_LOOK_S = 0.5


class RunLock:
    """Around a run: rank 0 of ``world`` keeps its record in ``folder`` while it runs."""

    def __init__(self, folder: Path, world: Group) -> None:
        self._path, self._world = folder / FILE_NAME, world
        self._me = {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "job": os.environ.get("SLURM_JOB_ID", ""),
            "start": os.environ.get("SLURM_RESTART_COUNT", "0"),
            "id": uuid.uuid4().hex,
        }
        self._thread: threading.Thread | None = None
        self._leaving = threading.Event()

    def __enter__(self) -> RunLock:
        return self

    def take(self) -> None:
        """Takes the folder if it exists; all ranks together.  Raises AgreedError where another run
        lives in it; finding that one does not may take some seconds.
        """
        with agreed(self._world):
            if self._world.index == 0 and self._path.parent.is_dir():
                self.hold()

    def hold(self) -> None:
        """Rank 0's part, by itself: takes the folder, which is made if it is new, unless it is this
        run's already.  Whoever writes there calls this first.  Raises UserError as ``take``.
        """
        if self._thread is not None:
            return
        with writing(f"run.folder ({self._path.parent})"):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            while not self._try():
                pass
        self._thread = threading.Thread(target=self._keep, name="run-lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Before anything is saved, all ranks together.  Raises AgreedError where another run has
        taken the folder: this one stood still for too long, or its job was started again elsewhere.
        """
        with agreed(self._world):
            if self._thread is None:
                return
            found: dict = {}
            with contextlib.suppress(OSError), self._locked() as file:
                found = _record(file.read())
            if found and not self._is_mine(found):
                raise UserError(
                    f"run.folder ({self._path.parent}) was taken by process {found.get('process')} "
                    f"on {found.get('host')} meanwhile: nothing is saved here any more"
                )

    def __exit__(self, *_error: object) -> None:
        if self._thread is not None:
            self._leaving.set()
            self._thread.join()
            with contextlib.suppress(OSError), self._locked() as file:
                if self._is_mine(_record(file.read())):  # else another run took the folder
                    self._path.unlink(missing_ok=True)

    def _try(self) -> bool:
        """One attempt to take the folder.  False: its record has changed, look again."""
        found = self._read()
        if found and not self._is_dead(found):
            return False
        with self._locked() as file:
            if _record(file.read()) != found:
                return False
            self._write(file, 0)
        time.sleep(_SECOND_LOOK_S)
        return self._is_mine(self._read())

    def _keep(self) -> None:
        count = 0
        while not self._leaving.wait(HEARTBEAT_S):
            count += 1
            # A full disk is reported where something is lost by it.
            with contextlib.suppress(OSError), self._locked() as file:
                found = _record(file.read())
                if found and not self._is_mine(found):
                    return  # this process stood still for so long that another run took the folder
                self._write(file, count)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[BinaryIO]:
        """The file, which is made if there is none, while nobody else is in here."""
        while True:
            with os.fdopen(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
                # A file system without locks holds one run, too, but for starts at the same moment.
                with contextlib.suppress(OSError):
                    fcntl.flock(file, fcntl.LOCK_EX)
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(file.fileno()), self._path.stat()):
                        yield file
                        return
                # It was removed meanwhile: the next one that is made counts.

    def _write(self, file: BinaryIO, count: int) -> None:
        file.seek(0)
        file.write(json.dumps({**self._me, "count": count}).encode() + b"\n")
        file.truncate()
        file.flush()
        os.fsync(file.fileno())  # for those who read it over NFS

    def _read(self) -> dict:
        try:
            return _record(self._path.read_bytes())
        except FileNotFoundError:
            return {}

    def _is_dead(self, found: dict) -> bool:
        """Whether nobody keeps the record any more, which may take a while to see; False where it
        has gone meanwhile.  UserError where it changes.
        """
        if self._has_ended(found):
            return True
        deadline = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline:
            time.sleep(min(0.2, HEARTBEAT_S / 4))
            now = self._read()
            if not now:
                return False
            if now != found:
                raise UserError(
                    f"run.folder ({self._path.parent}) is in use by process {now.get('process')} on"
                    f" {now.get('host')}: stop that run first, or choose another run.folder"
                )
        return True

    def _has_ended(self, found: dict) -> bool:
        """Whether there is nothing to wait for: a process of this host that has ended, or this very
        job before its requeue.
        """
        if self._me["job"] and found.get("job") == self._me["job"]:
            if found.get("start") != self._me["start"]:
                return True
        if found.get("host") != self._me["host"] or not isinstance(found.get("process"), int):
            return False
        try:
            os.kill(found["process"], 0)
        except OSError as error:
            return isinstance(error, ProcessLookupError)
        return False

    def _is_mine(self, found: dict) -> bool:
        return found.get("id") == self._me["id"]


def _record(text: bytes) -> dict:
    """What the file says, empty where it is; its text where nobody of this project wrote that."""
    try:
        found = json.loads(text or b"{}")
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {"text": repr(text)}
