"""One run at a time in a run folder: two would overwrite each other's checkpoints and records.

Rank 0 keeps ``running.json`` there, with who it is and a count that goes up every few seconds.  Not
a lock of the file system: the lock of a node that died may outlive it, and its job could not go on
elsewhere.  A start that finds the file looks whether the count still moves.  It reads contents and
not times: those it gets fresh on NFS, and needs no common clock.

Taking the folder is one ``link``, which one of any number of starts can do.  The record of a dead
run is succeeded, not deleted: the file ``.running.json.after-<name of that record>`` can be linked
once, too, and whoever has linked it holds the folder and only then puts its record in place of the
dead one.  A start that dies in between is itself a record that can be succeeded.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType

from diffmoe.errors import UserError
from diffmoe.parallel.collectives import raise_together
from diffmoe.parallel.groups import Group

FILE_NAME = "running.json"
BEAT_S = 4.0
_PATIENCE_S = 4 * BEAT_S
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)  # of a file system that has none


class RunLock:
    """Around a run: what rank 0 of ``world`` says in ``folder`` while it runs."""

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
        problem: Exception | None = None
        try:
            if self._world.index == 0 and self._path.parent.is_dir():
                self.hold()
        except UserError as error:
            problem = error
        raise_together(problem, self._world)

    def hold(self) -> None:
        """Rank 0's part, by itself: takes the folder, which is made if it is new, unless it is this
        run's already.  Whoever writes there calls this first.  Raises UserError as ``take``.
        """
        if self._thread is not None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            while not self._try():
                pass
        except OSError as error:
            raise UserError(
                f"run.folder ({self._path.parent}) cannot be written: {error}"
            ) from error
        self._thread = threading.Thread(target=self._beat, name="run-lock", daemon=True)
        self._thread.start()

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        if self._thread is not None:
            self._leaving.set()
            self._thread.join()
            with contextlib.suppress(OSError):
                self._leave()

    # ------------------------------------------------------------------------------------------
    # taking and leaving

    def _try(self) -> bool:
        """One attempt: whether the folder is this run's.  False: others were quicker in changing
        it, look again.
        """
        if self._create(self._path, self._me):
            return True
        *before, last = self._chain()
        if not last or not self._is_dead(last):
            return False
        successor = self._successor(last)
        if not self._create(successor, self._me):
            return False
        if self._chain()[-2:] != [
            last,
            {**self._me, "count": 0},
        ]:  # it was not dead, or another succeeded it and has left again
            successor.unlink(missing_ok=True)
            return False
        self._put(self._me)
        for record in (*before, last):
            self._successor(record).unlink(missing_ok=True)
        return True

    def _leave(self) -> None:
        """Removes the record, unless another run has taken the folder (this process stood still for
        long): whoever wants to succeed it finds the place taken by one that is about to go.
        """
        farewell = self._successor(self._me)
        if self._create(farewell, {**self._me, "id": uuid.uuid4().hex}):
            if self._is_mine(self._read(self._path)):
                self._path.unlink(missing_ok=True)
            farewell.unlink(missing_ok=True)

    def _create(self, path: Path, record: dict) -> bool:
        """Whether this process, and nobody before it, made ``path``, with the record in it from the
        first moment on.
        """
        partial = self._partial(record)
        try:
            try:
                os.link(partial, path)
            except FileExistsError:
                # Over NFS an answer may be lost, and the request repeated: then it was this
                # process's own.
                return partial.stat().st_nlink == 2
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                try:
                    with path.open("x") as file:
                        file.write(_text(record, 0))
                except FileExistsError:
                    return False
            return True
        finally:
            partial.unlink(missing_ok=True)

    def _put(self, record: dict) -> None:
        os.replace(self._partial(record), self._path)

    def _partial(self, record: dict) -> Path:
        partial = self._path.with_name(f".{FILE_NAME}.{uuid.uuid4().hex}.partial")
        partial.write_text(_text(record, 0))
        return partial

    def _successor(self, record: dict) -> Path:
        return self._path.with_name(f".{FILE_NAME}.after-{_name(record)}")

    def _chain(self) -> list[dict]:
        """The record in ``running.json`` and those that succeeded it, the holder's last; an empty
        one where there is none.
        """
        chain = [self._read(self._path)]
        while chain[-1] and (successor := self._read(self._successor(chain[-1]))):
            chain.append(successor)
        return chain

    # ------------------------------------------------------------------------------------------------
    # who is alive

    def _is_dead(self, found: dict) -> bool:
        """Whether nobody speaks for the record any more, which may take a while to see; False where
        it has gone meanwhile. UserError where its count moves, or another start has succeeded it.
        """
        if self._is_gone(found):
            return True
        deadline = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline:
            time.sleep(min(0.2, BEAT_S / 4))
            now = self._chain()[-1]
            if not now:
                return False
            if now != found:
                raise UserError(
                    f"run.folder ({self._path.parent}) is in use by process {now.get('process')} on {now.get('host')}: "
                    "stop that run first, or choose another run.folder"
                )
        return True

    def _is_gone(self, found: dict) -> bool:
        """Whether there is nothing to wait for: a process of this host that has ended, or this very
        job before its requeue.
        """
        if (
            self._me["job"]
            and found.get("job") == self._me["job"]
            and found.get("start") != self._me["start"]
        ):
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
        return _name(found) == _name(self._me)

    def _read(self, path: Path) -> dict:
        """The record in a file; an empty one where there is no file."""
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            return {}
        return _record(text)

    def _beat(self) -> None:
        count = 0
        while not self._leaving.wait(BEAT_S):
            count += 1
            with contextlib.suppress(OSError):  # a full disk has its own words elsewhere
                try:
                    # Into the file that is there, and not in its place: should another run take the
                    # folder at this moment, this count goes into a file that has no name any more.
                    with self._path.open("r+b") as file:
                        if not self._is_mine(_record(file.read())):
                            # this process stood still for so long that another run took the folder
                            return
                        file.seek(0)
                        file.write(_text(self._me, count).encode())
                        file.flush()
                        os.fsync(file.fileno())  # for those who read it over NFS
                except FileNotFoundError:
                    self._create(self._path, self._me)


def _record(text: bytes) -> dict:
    """What a record's file says; its text where that is none that anybody of this project wrote."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    return found if isinstance(found, dict) and found else {"text": repr(text)}


def _text(record: dict, count: int) -> str:
    """One line of the same length for every count."""
    return f'{json.dumps(record)[:-1]}, "count": {count:12d}}}\n'


def _name(record: dict) -> str:
    """Of a record, whatever its count."""
    return hashlib.sha256(
        json.dumps({k: v for k, v in record.items() if k != "count"}, sort_keys=True).encode()
    ).hexdigest()[:32]
