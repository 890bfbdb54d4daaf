"""uint8 images [N, H, W, 3] in a `.npy` or as `arr_0` in an `.npz` (ADM's form), read in slices.

50,000 images of 256 x 256 are 10 GB: nothing here holds more than the slice that was asked for, on
any rank.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from diffmoe.errors import UserError

MEMBER = "arr_0.npy"
_LOCAL_HEADER = struct.Struct(
    "<26x2H"
)  # of a zip's member: the lengths of its name and of its extra field end it
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
_DISCARD = 1 << 20
_FOREIGN = (
    OSError,
    ValueError,
    EOFError,
    KeyError,
    NotImplementedError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
)


def names_in(path: Path) -> list[str] | None:
    """The arrays of an npz by name; None for a `.npy`. UserError for any other file."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                return [name.removesuffix(".npy") for name in archive.namelist()]
        with open(path, "rb") as stream:
            np.lib.format.read_magic(stream)
        return None
    except _FOREIGN as error:
        raise UserError(f"{path} is neither a whole .npz nor a .npy: {error}") from None


def open_array(path: Path) -> tuple[tuple[int, int, int, int], Callable[[int, int], np.ndarray]]:
    """The shape [N, H, W, 3] of a file's images, and `read(start, stop)` for some of them.

    A compressed member is unpacked as it is read: forward reads cost what they give, a step back
    starts again.

    Raises:
        UserError: no such array, of another type or shape, or cut short; from `read` what is
            damaged inside.
    """
    names = names_in(path)
    if names is not None and "arr_0" not in names:
        raise UserError(f"{path} {_no_images(names)}")
    try:
        with _Stream(path, packed=names is not None) as stream:
            version = np.lib.format.read_magic(stream)
            shape, column_major, dtype = _HEADERS[version](stream)
            header, size = stream.tell(), stream.size
    except _FOREIGN as error:
        raise UserError(f"{path}: its array's header cannot be read: {error}") from None
    what = "arr_0" if names is not None else "its array"
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or min(shape) < 1 or column_major:
        raise UserError(
            f"{path}: {what} ({dtype} {shape}) must be uint8 [N, H, W, 3] in C order to be images; "
            "statistics are an npz with mu and sigma"
        )
    each = int(np.prod(shape[1:]))
    if size != header + shape[0] * each:
        raise UserError(
            f"{path}: {what} of {shape} needs {header + shape[0] * each} bytes and has {size}: the file is "
            "cut short"
        )
    opened: list[_Stream] = []

    def read(start: int, stop: int) -> np.ndarray:
        try:
            if not opened:
                opened.append(_Stream(path, packed=names is not None))
            payload = opened[0].read_at(header + start * each, (stop - start) * each)
        except _FOREIGN as error:
            raise UserError(f"{path}: images {start}..{stop - 1} cannot be read: {error}") from None
        return np.frombuffer(payload, np.uint8).reshape(stop - start, *shape[1:])

    return shape, read


def _no_images(names: list[str]) -> str:
    """What a file is that has no arr_0."""
    if {"mu", "sigma"} <= set(names):
        return "holds statistics (mu, sigma) and no images (arr_0)"
    of_sample = (
        "; those of `run.py sample` have it where they are pictures: sample again, latents with --vae"
        if {"images", "labels"} <= set(names)
        else ""
    )
    return f"holds {names}, not arr_0 and not mu and sigma{of_sample}"


class _Stream:
    """The bytes of an array's file: a `.npy`, or a member of a zip, stored ones straight from the
    disk.
    """

    def __init__(self, path: Path, packed: bool) -> None:
        self._file: BinaryIO = open(path, "rb")
        self._archive: zipfile.ZipFile | None = None
        self._start = 0
        if not packed:
            self.size = path.stat().st_size
            return
        archive = zipfile.ZipFile(self._file)
        info = archive.getinfo(MEMBER)
        self.size = info.file_size
        if info.compress_type == zipfile.ZIP_STORED:
            # zipfile reads everything before the place it seeks.
            self._file.seek(info.header_offset)
            lengths = _LOCAL_HEADER.unpack(self._file.read(_LOCAL_HEADER.size))
            self._start = info.header_offset + _LOCAL_HEADER.size + sum(lengths)
            self._file.seek(self._start)
            if self._start + self.size > path.stat().st_size:
                raise EOFError("it is cut short")
        else:
            self._archive, self._file = archive, archive.open(info)

    def read_at(self, place: int, size: int) -> bytes:
        if self._archive is None:
            self._file.seek(self._start + place)
        else:
            if place < self._file.tell():
                self._file = self._archive.open(MEMBER)
            while self._file.tell() < place:
                if not self._file.read(min(_DISCARD, place - self._file.tell())):
                    break
        payload = self._file.read(size)
        if len(payload) != size:
            raise EOFError(f"{len(payload)} of {size} bytes")
        return payload

    def read(self, size: int) -> bytes:
        return self._file.read(size)

    def tell(self) -> int:
        return self._file.tell() - self._start

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
