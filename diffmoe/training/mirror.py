"""Finished checkpoints beyond the cluster's file system: ``train.mirror`` holds copies, laid out as
the run folder is, and a run whose own folder has none starts from there.  So are snapshots of
averages (``train.ema_lengths``), which no start needs.

Rank 0 copies, in a thread that touches no process group.  ``checkpoint.json`` goes last, so what
has one is complete; while files are on their way it lies beside them as ``checkpoint.json.partial``
and says of which checkpoint they are: a later start sends only those that are missing, and begins
again where a folder of that name holds another run of the same steps.

What is sent is held to the manifest's CRC-32 as it is read, and the store's sizes are compared with
the manifest's.  Nothing is read back, which would double the traffic and cost egress: clients of S3
and GCS send checksums that the store holds against the bytes.  What is fetched is checked in full.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from diffmoe.checkpoints import writer
from diffmoe.checkpoints.manifest import MANIFEST, read_manifest
from diffmoe.checkpoints.reader import (
    CHECKPOINTS,
    SNAPSHOTS,
    Checkpoint,
    complete_folders,
    misfits,
    step_folder,
    step_of,
)
from diffmoe.checkpoints.tensor_file import Corrupt, TensorFile
from diffmoe.config import Config
from diffmoe.errors import UserError
from diffmoe.files import replacing, retried, writing
from diffmoe.parallel.collectives import agreed, gather_objects
from diffmoe.parallel.groups import ParallelGroups
from diffmoe.parallel.trace import Trace
from diffmoe.remote import RemotePath, remote_path
from diffmoe.training.checkpoint import Say, newest_usable
from diffmoe.training.metrics import RECORDS
from diffmoe.training.resume import changes, is_of_recipe
from diffmoe.training.run_lock import RunLock

_SENDING = f"{MANIFEST}.partial"
# What else a run that goes on elsewhere has of its past.
_BESIDES = (*RECORDS, "deepspeed.json", "left_out.json", "bad_shards.json")
_POLL_S = 0.25
_GRACE_S = 30.0


@dataclass(frozen=True)
class Copied:
    """A checkpoint that is complete at the mirror: ``bytes`` were sent in ``seconds``."""

    step: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class CopyFailed:
    """The newest checkpoint is not at the mirror; the next copy tries all that is missing."""

    message: str


class Mirror:
    """All ranks hold one; rank 0's copies.  AgreedError where the place cannot be written."""

    def __init__(self, config: Config, groups: ParallelGroups) -> None:
        self.config, self.groups = config, groups
        self._run = Path(config.run.folder)
        self._asked = self._done = 0
        self._wake, self._stop = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._outcomes: list[Copied | CopyFailed] = []
        self._there: dict[str, bytes | None] = {}  # complete checkpoints' manifests, once known
        self._corrupt: set[bytes] = set()  # manifests of local ones that are not what they say
        self._sent = 0
        with agreed(groups.world):
            self._place = remote_path(config.train.mirror, "train.mirror")
            if groups.rank == 0:
                self._probe()

    def _probe(self) -> None:
        probe = self._place / ".probe"
        with writing(f"train.mirror ({self.config.train.mirror})"):
            probe.write_bytes(b"probe")
            probe.remove()

    def fetch(self, lock: RunLock | None, new_recipe: bool, say: Say) -> None:
        """Where the run folder has no checkpoint: the newest complete one of the mirror that is
        intact, the files divided among the ranks, and the run's records.  All ranks together.
        Raises AgreedError where none is intact, or they are another run's.
        """
        groups, folder, away = self.groups, self._run / "checkpoints", self._place / "checkpoints"
        begins = False
        with agreed(groups.world):
            if groups.rank == 0 and not complete_folders(folder) and complete_folders(away):
                begins = True
                if lock is not None:
                    lock.hold()
                for left in folder.glob(".step_*.partial"):
                    shutil.rmtree(left)
        if not gather_objects(begins, groups.world)[0]:
            return

        def take(checkpoint: Checkpoint, groups: ParallelGroups) -> None:
            self._check_own(checkpoint, new_recipe)
            partial = writer.partial_folder(folder, checkpoint.step)
            partial.mkdir(parents=True, exist_ok=True)
            for name in list(checkpoint.manifest.files)[groups.rank :: groups.world.size]:
                with open(partial / name, "wb") as file:
                    for chunk in checkpoint.chunks(name):
                        file.write(chunk)
                        groups.trace.at("files")
                    file.flush()
                    os.fsync(file.fileno())

        found = newest_usable(away, groups, say, take)
        if found is None:
            return
        with agreed(groups.world):
            if groups.rank == 0:
                for path in complete_folders(away):
                    if step_of(path) > found.step:  # corrupt: the run writes and copies it anew
                        (path / MANIFEST).remove()
                for name in _BESIDES:
                    with suppress(FileNotFoundError):
                        data = (self._place / name).read_bytes()
                        if not (self._run / name).exists():
                            with replacing(self._run / name) as file:
                                file.write(data)
                partial = writer.partial_folder(folder, found.step)
                with replacing(partial / MANIFEST) as file:
                    file.write((away / found.path.name / MANIFEST).read_bytes())
                final = step_folder(folder, found.step)
                shutil.rmtree(final, ignore_errors=True)  # what is left of one: it is not complete
                partial.rename(final)
        say(f"fetched {found.path} into {folder}")

    def _check_own(self, checkpoint: Checkpoint, new_recipe: bool) -> None:
        """Before anything is fetched, what is known so early."""
        broken, _ = changes(checkpoint.config(), self.config)
        known = [text for text in broken if not text.endswith(" -> None")]  # chosen from the data
        if foreign := [text for text in known if not (new_recipe and is_of_recipe(text))]:
            raise UserError(
                f"train.mirror ({self.config.train.mirror}) holds another run's checkpoints "
                f"({'; '.join(foreign)}); choose another place"
            )

    def copy(self) -> None:
        """Rank 0: begins to copy what the mirror lacks, after what is under way."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
            self._thread.start()
        self._asked += 1
        self._wake.set()

    def outcomes(self) -> list[Copied | CopyFailed]:
        """What became known since the last call, oldest first; on rank 0."""
        return [self._outcomes.pop(0) for _ in range(len(self._outcomes))]

    def wait(self, stop_requested: Sequence[int]) -> None:
        """Until all is copied or given up; after a stop request half a minute at most, and the next
        start goes on with what is missing.  All ranks together.

        To ask each other is no progress, and to send is.
        """
        world, before, deadline = self.groups.world, -1, None
        asking, trace = replace(world, trace=Trace()), world.trace
        while True:
            busy = self._asked != self._done
            states = gather_objects((busy, self._sent, bool(stop_requested)), asking)
            busy, sent, _ = states[0]
            if deadline is None and any(stop for _, _, stop in states):
                deadline = time.monotonic() + _GRACE_S
            late = deadline is not None and time.monotonic() > deadline
            if not busy or gather_objects(late, asking)[0]:
                return
            if sent != before:
                before = sent
                trace.at("files")
            time.sleep(_POLL_S)

    def close(self) -> None:
        """Gives up what is under way, for the next start to finish."""
        self._stop.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(1.0)

    def _work(self) -> None:
        while not self._stop.is_set():
            self._wake.wait()
            self._wake.clear()
            asked = self._asked
            try:
                self._copy_missing()
            except writer.Stopped:
                return
            except (OSError, UserError) as error:
                self._outcomes.append(CopyFailed(str(error)))
            except Exception as error:  # a fault of this program, which must not end training
                traceback.print_exc()
                self._outcomes.append(CopyFailed(f"{type(error).__name__}: {error}"))
            self._done = asked

    def _copy_missing(self) -> None:
        """Newest first, and looks again after each: that is the one to go on from."""
        while (path := self._missing()) is not None:
            there = self._place / _key(path)
            try:
                self._copy(path, there)
            except (Corrupt, FileNotFoundError) as error:
                if not path.exists():  # pruned meanwhile
                    there.remove()
                elif not isinstance(error, Corrupt):
                    raise
                else:
                    self._corrupt.add((path / MANIFEST).read_bytes())
                    self._outcomes.append(CopyFailed(str(error)))
        self._prune(self._place / CHECKPOINTS)

    def _missing(self) -> Path | None:
        folders = (complete_folders(self._run / name) for name in (CHECKPOINTS, SNAPSHOTS))
        for path in (path for folder in folders for path in reversed(folder)):
            if self._stop.is_set():
                raise writer.Stopped
            with suppress(FileNotFoundError):  # pruned meanwhile
                text = (path / MANIFEST).read_bytes()
                if text not in self._corrupt and self._manifest(_key(path)) != text:
                    return path
        return None

    def _manifest(self, key: str) -> bytes | None:
        """The manifest of a checkpoint that is complete at the mirror."""
        if key not in self._there:
            self._there[key] = None
            with suppress(FileNotFoundError):
                self._there[key] = (self._place / key / MANIFEST).read_bytes()
        return self._there[key]

    def _copy(self, path: Path, there: RemotePath) -> None:
        began, before = time.perf_counter(), self._sent
        text, files = (path / MANIFEST).read_bytes(), read_manifest(path / MANIFEST).files
        if self._manifest(_key(path)) is not None:
            (there / MANIFEST).remove()  # of other tensors: complete no more
            self._there[_key(path)] = None
        begun = None
        with suppress(FileNotFoundError):
            begun = (there / _SENDING).read_bytes()
        if begun != text:
            there.remove()
            retried(lambda: (there / _SENDING).write_bytes(text), str(there), "mirror")
        for name in misfits(there, files):
            source, target = TensorFile(path / name, files[name]), there / name
            retried(lambda: target.write_chunks(self._paced(source)), str(target), "mirror")
        for name, size in misfits(there, files).items():
            raise OSError(f"{there / name} must have {files[name].bytes} bytes and has {size}")
        for name in _BESIDES:
            if (self._run / name).exists():
                data = (self._run / name).read_bytes()
                retried(lambda: (self._place / name).write_bytes(data), name, "mirror")
        retried(lambda: (there / MANIFEST).write_bytes(text), str(there), "mirror")
        self._there[_key(path)] = text
        (there / _SENDING).remove()
        sent, seconds = self._sent - before, time.perf_counter() - began
        self._outcomes.append(Copied(step_of(path), sent, seconds))

    def _paced(self, source: TensorFile) -> Iterator[memoryview]:
        """A file's bytes, checked, at ``train.mirror_mb_s`` at most."""
        rate, began, sent = self.config.train.mirror_mb_s * 1e6, time.monotonic(), 0
        for chunk in source.chunks():
            ahead = sent / rate - (time.monotonic() - began) if rate else 0.0
            if self._stop.wait(ahead) if ahead > 0 else self._stop.is_set():
                raise writer.Stopped
            yield chunk
            sent += chunk.nbytes
            self._sent += chunk.nbytes

    def _prune(self, there: RemotePath) -> None:
        """As in the run folder, and halves of what is no longer here.  Snapshots stay."""
        here = complete_folders(self._run / "checkpoints")
        if not here:
            return
        train, names = self.config.train, {path.name for path in here}
        complete = complete_folders(there)
        old = writer.dispensable(complete, step_of(here[-1]), train.keep, train.keep_every)
        for path in old:
            (path / MANIFEST).remove()  # first: complete no more
            self._there[_key(here[-1].with_name(path.name))] = None
        kept = {path.name for path in complete} - {path.name for path in old}
        for path in list(there.iterdir()):
            if path.name not in kept | names:
                path.remove()


def _key(path: Path) -> str:
    """Of a checkpoint or a snapshot: its place in the run folder and at the mirror."""
    return f"{path.parent.name}/{path.name}"
