"""Folders of object stores and other file systems that fsspec opens (``s3://``, ``gs://``,
``file://``), with what the checkpoints ask of ``pathlib.Path``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from diffmoe.errors import UserError
from diffmoe.files import Refused, retried


class RemotePath:
    """A file or folder of a store.  Listings are asked for anew each time; a path that came out of
    one knows its kind and size from there.

    Reading is retried and raises UserError, writing raises OSError; both FileNotFoundError.
    """

    def __init__(self, system: Any, path: str, facts: dict | None = None) -> None:
        self._system, self._path, self._facts = system, path.rstrip("/"), facts
        self.name = self._path.rpartition("/")[2]

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(self._system, f"{self._path}/{name}")

    @property
    def parent(self) -> RemotePath:
        return RemotePath(self._system, self._path.rpartition("/")[0])

    def __str__(self) -> str:
        return self._system.unstrip_protocol(self._path)

    def exists(self) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return bool(self._known())
        return False

    def is_file(self) -> bool:
        return self.exists() and self._known()["type"] == "file"

    def is_dir(self) -> bool:
        return self.exists() and self._known()["type"] == "directory"

    def stat(self) -> SimpleNamespace:
        return SimpleNamespace(st_size=self._known()["size"])

    def iterdir(self) -> Iterator[RemotePath]:
        """What is in the folder; nothing where there is none."""
        with contextlib.suppress(FileNotFoundError):
            for facts in self._read(lambda: self._system.ls(self._path, detail=True)):
                # Some stores keep an empty object for the folder itself.
                if (path := facts["name"].rstrip("/")) != self._path:
                    yield RemotePath(self._system, path, facts)

    def read_bytes(self) -> bytes:
        return self._read(lambda: self._system.cat_file(self._path))

    def read_text(self) -> str:
        return self.read_bytes().decode()

    def read_range(self, start: int, count: int) -> bytes:
        """Bytes from ``start`` on, ``count`` of them where the file has as many."""
        stop = min(start + count, self.stat().st_size)
        if start >= stop:
            return b""
        return self._read(lambda: self._system.cat_file(self._path, start=start, end=stop))

    def write_bytes(self, data: bytes) -> None:
        with translated():
            self._system.pipe_file(self._path, data)

    def write_chunks(self, chunks: Iterable[bytes | memoryview]) -> None:
        """A file of what may be larger than memory.  Where it fails there may be a shorter one."""
        with translated():
            file = self._system.open(self._path, "wb")
            try:
                for chunk in chunks:
                    file.write(chunk)
                file.close()
            except BaseException:
                with contextlib.suppress(Exception):
                    file.discard()  # an object store keeps parts of what was never finished
                with contextlib.suppress(Exception):
                    file.closed = True
                raise

    def remove(self) -> None:
        """The file, or the folder with all that is in it; nothing where there is none."""
        with contextlib.suppress(FileNotFoundError), translated():
            self._system.rm(self._path, recursive=True)

    def _known(self) -> dict:
        if self._facts is None:
            self._facts = self._read(lambda: self._system.info(self._path))
        return self._facts

    def _read(self, action: Any) -> Any:
        def once() -> Any:
            with translated():
                return action()

        try:
            return retried(once, str(self), "store")
        except FileNotFoundError:
            raise
        except OSError as error:
            raise UserError(f"{self} cannot be read: {error}") from error


AnyPath = Path | RemotePath


def any_path(text: str) -> AnyPath:
    """A local path, or with ``://`` a store's.  UserError for a store that nothing here opens."""
    return remote_path(text) if "://" in text else Path(text)


def remote_path(url: str, what: str = "address") -> RemotePath:
    """The place of a store; nothing is asked of it yet.  UserError, which calls the address
    ``what``, where fsspec does not know its kind, or lacks the package for it.
    """
    from fsspec.core import url_to_fs
    from fsspec.implementations.local import LocalFileSystem

    try:
        system, path = url_to_fs(url, use_listings_cache=False, skip_instance_cache=True)
    except (ImportError, ValueError) as error:
        raise UserError(f"{what} ({url}) cannot be used: {error}") from None
    if isinstance(system, LocalFileSystem):
        system.auto_mkdir = True  # the others have no folders to make
    return RemotePath(system, path)


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """OSErrors of whatever a store's client raises."""
    try:
        yield
    except (OSError, UserError):
        raise
    except (ImportError, ValueError) as error:
        raise Refused(str(error)) from error
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
