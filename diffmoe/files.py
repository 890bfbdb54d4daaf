"""Files: one atomic write, one hash, one retry."""

from __future__ import annotations

import errno
import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeVar

from diffmoe.errors import UserError

TRIES = 5
FIRST_PAUSE = 1.0  # seconds before the second try; doubled each time
T = TypeVar("T")


class Refused(OSError):
    """The source says no for good: trying again will not help."""


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A temporary file that becomes `path`, synced, if the block succeeds, and goes if it fails."""
    # The process id keeps two writers of the same bytes (two ranks of a demo) apart.
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "w+b") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """The whole file, by `replacing`."""
    with replacing(path) as stream:
        stream.write(text.encode())


def sync_folder(folder: Path) -> None:
    """A rename is durable only with its folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Raises UserError for an OSError in the block: ``what`` cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what} cannot be written: {error}") from error


@contextmanager
def well_formed(what: object) -> Iterator[None]:
    """Raises UserError for what a block raises that parses ``what`` and expected something else."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{what} is malformed: {type(error).__name__}: {error}") from error


def check_writable(path: Path, what: str, make: bool = True) -> None:
    """UserError that ``what`` cannot be written, before hours of work, where `replacing` could not
    write `path` after them.  ``make``: first the folder, where there is none.
    """
    try:
        if make:
            path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
        tempfile.TemporaryFile(dir=path.parent).close()
    except FileExistsError as error:
        raise UserError(f"{what} cannot be written: {path.parent} is a file") from error
    except OSError as error:
        raise UserError(f"{what} cannot be written: {error.strerror}") from error


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def is_final(error: OSError) -> bool:
    """Whether trying again will not help: nothing there, no right to it, a link to itself."""
    final = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, Refused)
    return isinstance(error, final) or error.errno in (errno.ELOOP, errno.ENAMETOOLONG)


def retried(action: Callable[[], T], what: str, begins: str = "data") -> T:
    """`action`, tried up to `TRIES` times over an OSError that is not final, with growing pauses,
    each logged to stderr in a line that begins with `begins`.
    """
    for attempt in range(1, TRIES):
        try:
            return action()
        except OSError as error:
            if is_final(error):
                raise
            pause = FIRST_PAUSE * 2 ** (attempt - 1)
            # One write: several threads fetch, and print would let their lines run together.
            sys.stderr.write(
                f"{begins}: {what}: {error}; trying again in {pause:g} s "
                f"({attempt} of {TRIES - 1})\n"
            )
            time.sleep(pause)
    return action()
