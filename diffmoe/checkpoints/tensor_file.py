"""Safetensors files as streams: written header first and read range by range, with a CRC-32 of
every 4 MiB.

The files are ordinary ones, which the stock library reads; it is not used here because it builds a
file in memory to write it and knows no checksums.  CRC-32 because it finds what disks and networks
do to bytes and is the only checksum of Python's own that keeps up with a fast disk (3.9 GiB/s on
one core where SHA-256 made 1.7); it is no defence against somebody who changes a file on purpose,
and need not be: nothing that is read here is ever executed.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from diffmoe.errors import UserError

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


class Damaged(UserError):
    """A file is not what its checkpoint says: missing, cut, changed, or not whole."""


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) of the flattened tensor ``name``, whose whole shape is ``shape``."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def key(self) -> str:
        """Its name in a file: the tensor's own if it is all of it."""
        return self.name if self.whole else f"{self.name}[{self.start}:{self.stop}]"

    @property
    def whole(self) -> bool:
        return (self.start, self.stop) == (0, prod(self.shape))


def whole_piece(name: str, value: Tensor) -> Piece:
    """All of a tensor."""
    return Piece(name, tuple(value.shape), 0, value.numel())


@dataclass(frozen=True)
class Written:
    """What was written: the size of the file and the CRC-32 of each of its chunks, in order."""

    bytes: int
    crc32: tuple[int, ...]


def write_tensors(
    path: Path, pieces: Sequence[tuple[Piece, torch.dtype]], values: Iterable[Tensor]
) -> Written:
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
            "shape": list(piece.shape if piece.whole else (piece.stop - piece.start,)),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb", buffering=0) as stream:
        out = _Checksummed(stream)
        out.write(struct.pack("<Q", len(text)) + text)
        for (piece, dtype), value in zip(pieces, values, strict=True):
            assert value.dtype == dtype and value.shape == (piece.stop - piece.start,), piece
            for part in value.detach().split(CHUNK // dtype.itemsize):
                out.write(memoryview(part.cpu().contiguous().view(torch.uint8).numpy()))
        written = out.finish()
        os.fsync(stream.fileno())
    assert written.bytes == 8 + len(text) + end
    return written


class _Checksummed:
    """Writes a stream and keeps the CRC-32 of each of its chunks."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._crc32, self._filled, self._running, self._bytes = stream, [], 0, 0, 0

    def write(self, data: bytes | memoryview) -> None:
        rest = memoryview(data)
        while rest.nbytes:
            part, rest = rest[: CHUNK - self._filled], rest[CHUNK - self._filled :]
            left = part
            while left.nbytes:  # an unbuffered write may take less than it is given
                left = left[self._stream.write(left) :]
            self._running = zlib.crc32(part, self._running)
            self._filled += part.nbytes
            self._bytes += part.nbytes
            if self._filled == CHUNK:
                self._close_chunk()

    def _close_chunk(self) -> None:
        self._crc32.append(self._running)
        self._filled = self._running = 0

    def finish(self) -> Written:
        if self._filled:
            self._close_chunk()
        return Written(self._bytes, tuple(self._crc32))


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # bytes from the start of the file
    end: int


class TensorFile:
    """A safetensors file, read range by range; every chunk is checked as it is read, if its
    checksums are known.

    Keeps one chunk in memory until :meth:`release`."""

    def __init__(self, path: Path, written: Written | None = None) -> None:
        self.path, self._written = path, written
        self._entries: dict[str, Entry] | None = None
        self._stream: BinaryIO | None = None
        self._held: tuple[int, memoryview] | None = None

    def entries(self) -> dict[str, Entry]:
        """What the header says, by key.  Raises Damaged unless it is a safetensors header that fits
        the file.
        """
        if self._entries is None:
            self._entries = self._read_header()
        return self._entries

    def dtype(self, key: str) -> torch.dtype:
        """An entry's type, from the header."""
        return self._entry(key).dtype

    def read_into(self, key: str, first: int, out: Tensor) -> None:
        """Copies the elements of an entry from ``first`` on into the flat tensor ``out`` (any
        device).
        """
        entry = self._entry(key)
        size = entry.dtype.itemsize
        begin = entry.begin + first * size
        if out.dtype != entry.dtype:
            raise Damaged(f"{self.path}: {key} is {entry.dtype}, not {out.dtype}")
        assert out.dim() == 1 and begin + out.numel() * size <= entry.end, (key, first, out.shape)
        step = CHUNK // size
        for at in range(0, out.numel(), step):
            part = out[at : at + step]
            host = (
                torch.empty(part.shape, dtype=part.dtype)
                if part.device.type != "cpu" or not part.is_contiguous()
                else part
            )
            self._fill(memoryview(host.view(torch.uint8).numpy()), begin + at * size)
            if host is not part:
                part.copy_(host)

    def check(self) -> None:
        """Reads everything and raises Damaged for the first chunk that is not what was written."""
        assert self._written is not None
        self.entries()
        for number in range(len(self._written.crc32)):
            self._chunk(number)
        self.release()

    def release(self) -> None:
        """Closes the file and lets the chunk in memory go; the next read opens it again."""
        if self._stream is not None:
            self._stream.close()
        self._stream = self._held = None

    def _entry(self, key: str) -> Entry:
        entry = self.entries().get(key)
        if entry is None:
            raise Damaged(f"{self.path} has no tensor {key}")
        return entry

    def _fill(self, target: memoryview, begin: int) -> None:
        at = 0
        while at < target.nbytes:
            number, inside = divmod(begin + at, CHUNK)
            part = self._chunk(number)[inside : inside + target.nbytes - at]
            if not part.nbytes:
                raise Damaged(f"{self.path} ends too early")
            target[at : at + part.nbytes] = part
            at += part.nbytes

    def _chunk(self, number: int) -> memoryview:
        if self._held is not None and self._held[0] == number:
            return self._held[1]
        if self._stream is None:
            try:
                self._stream = open(self.path, "rb", buffering=0)
            except FileNotFoundError:
                raise Damaged(f"{self.path} is missing") from None
        buffer = self._held[1].obj if self._held is not None else bytearray(CHUNK)
        self._held = None
        self._stream.seek(number * CHUNK)
        filled = 0
        while filled < CHUNK and (count := self._stream.readinto(memoryview(buffer)[filled:])):
            filled += count
        data = memoryview(buffer)[:filled]
        if self._written is not None:
            expected = self._written.crc32[number] if number < len(self._written.crc32) else None
            if zlib.crc32(data) != expected:
                raise Damaged(
                    f"{self.path} is not what was written: its checksum is wrong in bytes {number * CHUNK} to "
                    f"{number * CHUNK + filled}"
                )
        self._held = (number, data)
        return data

    def _read_header(self) -> dict[str, Entry]:
        try:
            total = self.path.stat().st_size
        except FileNotFoundError:
            raise Damaged(f"{self.path} is missing") from None
        if total < 8:
            raise Damaged(f"{self.path} is not a whole safetensors file: it has {total} bytes")
        prefix = bytearray(8)
        self._fill(memoryview(prefix), 0)
        (length,) = struct.unpack("<Q", prefix)
        if length > min(_MAX_HEADER, total - 8):
            raise Damaged(
                f"{self.path} is not a whole safetensors file: its header would have {length} bytes of {total}"
            )
        text = bytearray(length)
        self._fill(memoryview(text), 8)
        try:
            tree = json.loads(text.decode(), object_pairs_hook=_once)
            return {
                key: _parse_entry(record, 8 + length, total)
                for key, record in tree.items()
                if key != "__metadata__"
            }
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise Damaged(f"{self.path} is not a whole safetensors file: {error}") from None


def whole_entry_pieces(file: TensorFile) -> list[Piece]:
    """The entries of a file whose keys are tensors' own names."""
    return [Piece(key, entry.shape, 0, prod(entry.shape)) for key, entry in file.entries().items()]


def _once(pairs: list[tuple[str, object]]) -> dict:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        raise UserError("a name stands twice in its header")
    return tree


def _parse_entry(record: dict, data: int, total: int) -> Entry:
    dtype, shape, (begin, end) = _DTYPES[record["dtype"]], record["shape"], record["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise UserError("shapes and offsets must be whole numbers")
    if end - begin != prod(shape) * dtype.itemsize or data + end > total:
        raise UserError(
            f"shape {shape} and offsets {begin} to {end} do not fit a file of {total} bytes"
        )
    return Entry(dtype, tuple(shape), data + begin, data + end)
