"""Safetensors files as streams: written header first and read range by range, with a CRC-32 of
every 4 MiB.

The files are ordinary ones, which the stock library reads; it is not used here because it builds a
file in memory to write it and knows no checksums.  CRC-32 because it finds what disks and networks
do to bytes and is the only checksum of Python's own that keeps up with a fast disk (3.9 GiB/s on
one core where SHA-256 made 1.7); it is no defence against somebody who changes a file on purpose,
and need not be: nothing that is read here is ever executed.
"""

from __future__ import annotations

import errno
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffmoe.errors import UserError
from diffmoe.remote import AnyPath, RemotePath
from diffmoe.strict_yaml import without_duplicates

CHUNK = 4 * 2**20
_MAX_HEADER = 100 * 2**20  # the stock library's limit
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Corrupt(UserError):
    """A file is not what its checkpoint says: missing, cut, changed, or not intact."""


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) of the flattened tensor ``name``, whose whole shape is ``shape``."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def whole(self) -> bool:
        return (self.start, self.stop) == (0, prod(self.shape))

    @property
    def key(self) -> str:
        """Its name in a file: the tensor's own if it is all of it."""
        return self.name if self.whole else f"{self.name}[{self.start}:{self.stop}]"

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return self.shape if self.whole else (self.stop - self.start,)


def whole_piece(name: str, value: Tensor) -> Piece:
    """All of a tensor."""
    return Piece(name, tuple(value.shape), 0, value.numel())


@dataclass(frozen=True)
class FileRecord:
    """A file's size, the CRC-32 of its chunks, and the elements [start, stop) of each tensor."""

    bytes: int
    crc32: tuple[int, ...]
    tensors: Mapping[str, tuple[int, int]]


def write_tensors(
    path: Path, pieces: Sequence[tuple[Piece, torch.dtype]], values: Iterable[Tensor]
) -> FileRecord:
    """Writes ``values`` (one flat tensor for each piece, in order, on any device) and syncs the
    file.

    At most two chunks are in memory beside the values, which may be made one by one.  Raises
    OSError.
    """
    header: dict[str, dict] = {}
    end = 0
    for piece, dtype in pieces:
        assert piece.key not in header, piece.key
        begin, end = end, end + (piece.stop - piece.start) * dtype.itemsize
        header[piece.key] = {
            "dtype": _NAMES[dtype],
            "shape": list(piece.stored_shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    checksums = _Checksums()

    def parts() -> Iterable[memoryview]:
        yield memoryview(len(text).to_bytes(8, "little") + text)
        for (piece, dtype), value in zip(pieces, values, strict=True):
            assert value.dtype == dtype and value.shape == (piece.stop - piece.start,), piece
            for part in value.detach().split(CHUNK // dtype.itemsize):
                yield part.cpu().contiguous().view(torch.uint8).numpy().data

    with open(path, "wb") as stream:
        for data in parts():
            stream.write(data)
            checksums.add(data)
        stream.flush()
        os.fsync(stream.fileno())
    assert checksums.bytes == 8 + len(text) + end
    spans = {piece.name: (piece.start, piece.stop) for piece, _ in pieces}
    assert len(spans) == len(pieces), "two pieces of a tensor in one file"
    return FileRecord(checksums.bytes, tuple(checksums.crc32), spans)


class _Checksums:
    """The CRC-32 of each chunk of what was added."""

    def __init__(self) -> None:
        self.crc32: list[int] = []
        self.bytes = 0

    def add(self, data: memoryview) -> None:
        while data.nbytes:
            inside = self.bytes % CHUNK
            part, data = data[: CHUNK - inside], data[CHUNK - inside :]
            if inside == 0:
                self.crc32.append(0)
            self.crc32[-1] = zlib.crc32(part, self.crc32[-1])
            self.bytes += part.nbytes


class Entry(NamedTuple):
    """Where a tensor lies in a file, in bytes from its start."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile:
    """A safetensors file, read range by range; every chunk is checked as it is read, if its
    checksums are known.  Keeps one chunk in memory until :meth:`release`.
    """

    def __init__(self, path: AnyPath, written: FileRecord | None = None) -> None:
        self.path, self._written = path, written
        self._held: tuple[int, memoryview] | None = None

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """What the header says, by key.  Raises Corrupt unless it is one that fits the file."""
        total = self.path.stat().st_size if self.path.exists() else 0
        length = int.from_bytes(self._read(0, 8), "little") if total >= 8 else total
        if length > min(_MAX_HEADER, total - 8):
            raise Corrupt(
                f"{self.path} is not an intact safetensors file: its header would have {length} "
                f"bytes of {total}"
            )
        text = self._read(8, length)
        try:
            tree = json.loads(text.decode(), object_pairs_hook=without_duplicates)
            return {
                key: _parse_entry(record, 8 + length, total)
                for key, record in tree.items()
                if key != "__metadata__"
            }
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise Corrupt(f"{self.path} is not an intact safetensors file: {error}") from None

    def entry(self, key: str) -> Entry:
        """Raises Corrupt where there is none."""
        if key not in self.entries:
            raise Corrupt(f"{self.path} has no tensor {key}")
        return self.entries[key]

    def read_into(self, key: str, first: int, out: Tensor) -> None:
        """An entry's elements from ``first`` on, into the flat tensor ``out`` (any device)."""
        entry = self.entry(key)
        if out.dtype != entry.dtype:
            raise Corrupt(f"{self.path}: {key} is {entry.dtype}, not {out.dtype}")
        size = entry.dtype.itemsize
        begin = entry.begin + first * size
        assert out.dim() == 1 and begin + out.numel() * size <= entry.end, (key, first, out.shape)
        for part in out.split(CHUNK // size):
            host = part if part.is_cpu and part.is_contiguous() else torch.empty_like(part).cpu()
            self._fill(host.view(torch.uint8).numpy().data, begin)
            if host is not part:
                part.copy_(host)
            begin += part.numel() * size

    def check(self) -> None:
        """Reads everything and raises Corrupt for the first chunk that is not what was written."""
        _ = self.entries
        for _ in self.chunks():
            pass

    def chunks(self) -> Iterator[memoryview]:
        """All bytes, in order.  Raises Corrupt for the first chunk that is not what was written."""
        assert self._written is not None
        for number in range(len(self._written.crc32)):
            yield self._chunk(number)
        self.release()

    def release(self) -> None:
        """Lets the chunk in memory go."""
        self._held = None

    def _read(self, begin: int, count: int) -> bytearray:
        content = bytearray(count)
        self._fill(memoryview(content), begin)
        return content

    def _fill(self, target: memoryview, begin: int) -> None:
        at = 0
        while at < target.nbytes:
            number, inside = divmod(begin + at, CHUNK)
            part = self._chunk(number)[inside : inside + target.nbytes - at]
            if not part.nbytes:
                raise Corrupt(f"{self.path} ends too early")
            target[at : at + part.nbytes] = part
            at += part.nbytes

    def _chunk(self, number: int) -> memoryview:
        if self._held is not None and self._held[0] == number:
            return self._held[1]
        self._held, start = None, number * CHUNK
        try:
            if isinstance(self.path, RemotePath):
                data = self.path.read_range(start, CHUNK)
            else:
                with open(self.path, "rb") as stream:
                    stream.seek(start)
                    data = stream.read(CHUNK)
        except FileNotFoundError:
            raise Corrupt(f"{self.path} is missing") from None
        except OSError as error:
            if error.errno != errno.EIO or isinstance(self.path, RemotePath):
                raise
            raise Corrupt(f"{self.path} cannot be read: {error}") from None  # a bad disk
        if self._written and self._written.crc32[number : number + 1] != (zlib.crc32(data),):
            raise Corrupt(
                f"{self.path} is not what was written: its checksum is wrong in bytes {start} to"
                f" {start + len(data)}"
            )
        self._held = number, memoryview(data)
        return self._held[1]


def _parse_entry(record: dict[str, Any], data: int, total: int) -> Entry:
    dtype, shape, (begin, end) = _DTYPES[record["dtype"]], record["shape"], record["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise UserError("shapes and offsets must be whole numbers")
    if end - begin != prod(shape) * dtype.itemsize or data + end > total:
        raise UserError(
            f"shape {shape} and offsets {begin} to {end} do not fit a file of {total} bytes"
        )
    return Entry(dtype, tuple(shape), data + begin, data + end)
