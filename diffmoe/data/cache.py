"""A folder of bounded size that holds remote shards, shared by all processes of a node.

A file is named by its SHA-256 and counts once it is complete: it is fetched under another name,
checked and renamed. Locks are the kernel's (flock), so that they die with their holder: a reader
holds a shared lock on what it has open, and no file with a lock is ever removed; who fetches holds
one on the unfinished file, which takes its full size at once, so that it is counted.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from diffmoe.data.rows import BadShard
from diffmoe.data.sources import chunks
from diffmoe.data.tar import ShardFile
from diffmoe.errors import UserError
from diffmoe.files import check_writable, retried, writing

_PART = ".part"


@dataclass(frozen=True)
class Cache:
    """The folder and the bytes that it may hold."""

    folder: Path
    limit: int

    def open(self, file: ShardFile, address: str) -> int:
        """A descriptor of the shard's local copy, with a shared lock for as long as it is open;
        fetched where it is missing.

        Raises:
            BadShard: it cannot be had, or is not what its index says.
            UserError: the cache is too small for what is in use, or cannot be written.
        """
        path = self.folder / f"{file.sha256}.tar"
        while True:
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except (FileNotFoundError, NotADirectoryError):
                self._fetch(file, address, path)
                continue
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if os.fstat(descriptor).st_nlink and os.fstat(descriptor).st_size == file.bytes:
                os.utime(path)  # what was used last goes last
                return descriptor
            corrupt = os.fstat(descriptor).st_nlink > 0
            os.close(descriptor)  # or somebody removed it between our opening and our lock
            if corrupt:
                path.unlink(missing_ok=True)

    def has(self, file: ShardFile) -> bool:
        """Whether the shard's copy is here."""
        return (self.folder / f"{file.sha256}.tar").exists()

    def _fetch(self, file: ShardFile, address: str, path: Path) -> None:
        check_writable(path, f"data.cache ({self.folder})")
        # One process of the node fetches, the others wait here.
        with _locked(self.folder / f"{file.sha256}.lock"):
            if path.exists():
                return
            part = path.with_suffix(_PART)
            with self._reserve(part, file) as descriptor:
                try:
                    retried(lambda: _download(descriptor, file, address), address)
                except OSError as error:
                    problem = f" cannot be fetched from {address}: {error}"
                    raise BadShard(file.name, problem) from error
                os.fsync(descriptor)  # or a node that loses power has a whole file of zeros
                os.rename(part, path)

    @contextmanager
    def _reserve(self, part: Path, file: ShardFile) -> Iterator[int]:
        """The unfinished file, of full size and locked, once there is room for it."""
        with _locked(self.folder / ".lock"):
            part.unlink(missing_ok=True)  # of a process that was killed: the shard's lock is ours
            self._make_room(file)
            stream = open(part, "x+b")
            fcntl.flock(stream, fcntl.LOCK_EX)
            stream.truncate(file.bytes)
        with stream:
            try:
                yield stream.fileno()
            except BaseException:
                part.unlink(missing_ok=True)
                raise

    def _make_room(self, file: ShardFile) -> None:
        held = []
        for entry in os.scandir(self.folder):
            if entry.name.endswith((".tar", _PART)):
                try:
                    held.append((entry.stat().st_mtime, entry.stat().st_size, entry.path))
                except FileNotFoundError:  # renamed by who fetched it: counted next time
                    continue
        total = sum(size for _, size, _ in held) + file.bytes
        for _, size, path in sorted(held):
            if total <= self.limit:
                return
            if _remove_unused(path):
                total -= size
        if total > self.limit:
            raise UserError(
                f"data.cache_gib ({self.limit / 2**30:.3g}) is too small: {self.folder} would hold "
                f"{total / 2**30:.3g} GiB of shards in use with shard {file.name}; raise it, or "
                "lower data.window or data.streams"
            )


def _remove_unused(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    return True


def _download(descriptor: int, file: ShardFile, address: str) -> None:
    digest, got = hashlib.sha256(), 0
    with closing(chunks(address)) as stream:
        for chunk in stream:
            if got + len(chunk) > file.bytes:
                raise OSError(f"more than the {file.bytes} bytes of its index")
            digest.update(chunk)
            with writing(f"data.cache (shard {file.name})"):  # a full disk is no bad shard
                if os.pwrite(descriptor, chunk, got) != len(chunk):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            got += len(chunk)
    if got != file.bytes:
        raise OSError(f"ended after {got} of {file.bytes} bytes")
    if digest.hexdigest() != file.sha256:
        raise OSError(f"SHA-256 is not the index's ({file.sha256})")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
