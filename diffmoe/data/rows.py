"""Rows of one shard by number: where each one's array lies in the tar, and exact, checked reads of it.

A shard that this program wrote begins with a member `__rows__` (webdataset passes over such names): labels, places and CRC-32
of all its arrays. Opening it is one small read, a row is another, and a row that was altered anywhere is noticed whenever it
is read. Tars of others have no such member: opening scans their headers and compares the whole file's SHA-256.
"""

from __future__ import annotations

import io
import os
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import BinaryIO

import numpy as np

from diffmoe.errors import UserError

ROWS_NAME = "__rows__"
BLOCK = tarfile.BLOCKSIZE


class BadShard(UserError):
    """A shard that cannot be read as its index says; `shard` is its name, the message says what is wrong and where."""

    def __init__(self, shard: str, problem: str) -> None:
        super().__init__(f"shard {shard}{problem}")
        self.shard, self.problem = shard, problem

    def __reduce__(self) -> tuple:
        return BadShard, (self.shard, self.problem)


@dataclass(frozen=True)
class RowTable:
    """Labels int64 [n]; for each row and kind of array (`npy`, then perhaps `flip.npy`), [n, kinds]: byte of the member's
    header block in the tar, bytes of its payload, and CRC-32 of header block and payload (None: unknown)."""

    labels: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    crcs: np.ndarray | None


def kinds_of(flips: bool) -> tuple[str, ...]:
    """The arrays that a sample has, in a table's order."""
    return ("npy", "flip.npy") if flips else ("npy",)


def pack_table(table: RowTable) -> bytes:
    """The payload of `__rows__`: a structured .npy, then its CRC-32; the same length for as many rows and kinds."""
    kinds = table.offsets.shape[1]
    fields = [("label", "<i8"), ("offset", "<u8", (kinds,)), ("size", "<u8", (kinds,)), ("crc", "<u4", (kinds,))]
    packed = np.zeros(len(table.labels), fields)
    packed["label"], packed["offset"], packed["size"] = table.labels, table.offsets, table.sizes
    packed["crc"] = 0 if table.crcs is None else table.crcs
    stream = io.BytesIO()
    np.lib.format.write_array(stream, packed, allow_pickle=False)
    return stream.getvalue() + zlib.crc32(stream.getvalue()).to_bytes(4, "little")


def unpack_table(payload: bytes, count: int, classes: int, kinds: int) -> RowTable:
    """The table again. UserError when it is damaged or is not one of `count` rows, `kinds` arrays and `classes` classes."""
    if len(payload) < 4 or zlib.crc32(payload[:-4]) != int.from_bytes(payload[-4:], "little"):
        raise UserError("its CRC-32 is wrong")
    packed = np.lib.format.read_array(io.BytesIO(payload[:-4]), allow_pickle=False)
    if len(packed) != count:
        raise UserError(f"{len(packed)} rows, its index says {count}")
    if packed["offset"].shape[1] < kinds:
        raise UserError("it has no flipped arrays")
    _check_labels(packed["label"], classes)
    # A reader may hold a thousand tables: as small as they can be, and without kinds that nobody asked for.
    offsets, sizes = (packed[name][:, :kinds].astype(np.int64) for name in ("offset", "size"))
    if len(offsets) and offsets.min() >= 0 and sizes.min() >= 0 and (offsets + BLOCK + sizes).max() < 2**31:
        offsets, sizes = offsets.astype(np.int32), sizes.astype(np.int32)
    if (sizes == sizes[:1]).all():
        sizes = np.broadcast_to(sizes[:1].copy(), sizes.shape)
    return RowTable(packed["label"].astype(np.int32), offsets, sizes, packed["crc"][:, :kinds].copy())


def _check_labels(labels: np.ndarray, classes: int) -> None:
    bad = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(bad):
        raise UserError(f"label ({labels[bad[0]]}) of row {bad[0]} must lie in [0, classes) with classes {classes}")


def scan_rows(stream: BinaryIO, name: str, kinds: Sequence[str], count: int | None, classes: int) -> RowTable:
    """The table of a tar from its headers and labels alone, no CRC-32; members of other kinds are passed over.

    Args:
        name: of the shard, for messages.
        count: samples that it must hold (None: any number above 0).

    Raises:
        BadShard: not a whole tar, unsafe names, a sample without label or array, twice, or too many of them.
    """
    wanted = (*kinds, "cls")
    found: dict[str, dict[str, tarfile.TarInfo]] = {}
    labels: list[int] = []
    member = "(none yet)"
    length = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    try:
        # "r:" takes no compressed tar: there is no reading at an offset in one.
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            for info in tar:
                check_name(name, info.name)
                if info.offset_data + info.size > length:
                    raise BadShard(name, f", member {info.name}: ends at byte {info.offset_data + info.size}, the file at {length}")
                member = info.name
                key, kind = split_name(info.name)
                if not info.isreg() or info.name == ROWS_NAME or kind not in wanted:
                    continue
                row = found.setdefault(key, {})
                if kind in row or (count is not None and len(found) > count):
                    raise BadShard(name, f", member {info.name}: second member of this name, or one sample more than the "
                                         f"index's {count}")
                row[kind] = info
            labels = [_label(name, stream, row["cls"], classes) for row in found.values() if "cls" in row]
            end = tar.offset
    except (tarfile.TarError, OSError, EOFError) as error:
        raise BadShard(name, f": unreadable at or after member {member}: {error}") from error
    missing = [f"{key}.{kind}" for key, row in found.items() for kind in wanted if kind not in row]
    if missing:
        raise BadShard(name, f": missing member {missing[0]} ({len(missing)} missing)")
    if not found or (count is not None and len(found) != count):
        raise BadShard(name, f": ends after {len(found)} samples (last member {member}, byte {end}), its index says {count}")
    infos = [[row[kind] for kind in kinds] for row in found.values()]
    return RowTable(np.array(labels), np.array([[info.offset_data - BLOCK for info in row] for row in infos]),
                    np.array([[info.size for info in row] for row in infos]), None)


def split_name(name: str) -> tuple[str, str]:
    """Key and extension of a member, as webdataset cuts them: at the first dot of the last part."""
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return folder + slash + stem, extension


def check_name(shard: str, member: str) -> None:
    """BadShard for an absolute name or one with '..'."""
    path = PurePosixPath(member)
    if path.is_absolute() or ".." in path.parts:
        raise BadShard(shard, f", member {member}: unsafe name, absolute or with '..'")


def _label(shard: str, stream: BinaryIO, info: tarfile.TarInfo, classes: int) -> int:
    stream.seek(info.offset_data)
    text = stream.read(min(info.size, 32))
    try:
        label = int(text.decode("ascii"))
    except ValueError as error:
        raise BadShard(shard, f", member {info.name}: {error}") from error
    if not 0 <= label < classes:
        raise BadShard(shard, f", member {info.name}: label ({label}) must lie in [0, classes) with classes {classes}")
    return label


def has_table(descriptor: int) -> bool:
    """Whether the open tar begins with a table of its rows."""
    return os.pread(descriptor, len(ROWS_NAME) + 1, 0) == ROWS_NAME.encode() + b"\0"


class OpenShard:
    """An open shard file of which rows are read by number.

    Args:
        descriptor: of the open file; closed by `close`.
        name, count, size: the shard's name, rows and bytes as its index says.
        shape, dtype: of an array, as stored ("bfloat16" is stored as uint16).
        flipped: whether the flips' arrays will be asked for.

    Raises:
        BadShard: the file is shorter or longer, or has no table that fits.
    """

    def __init__(self, descriptor: int, name: str, *, count: int, size: int, shape: tuple[int, ...], dtype: str, classes: int,
                 flipped: bool) -> None:
        self.name, self._descriptor, self._shape = name, descriptor, shape
        self._dtype = stored_dtype(dtype)
        stream = io.BytesIO()
        np.lib.format.write_array_header_1_0(stream, {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False,
                                                      "shape": shape})
        self._npy_header = stream.getvalue()
        self._body = BLOCK + len(self._npy_header)
        self._bytes = int(np.prod(shape)) * self._dtype.itemsize
        kinds = kinds_of(flipped)
        length = os.fstat(descriptor).st_size
        self.table, problem = self._read_table(count, classes, len(kinds))
        if length != size:
            raise BadShard(name, f" has {length} bytes, its index says {size}{self._first_lost(length)}")
        if problem:
            raise BadShard(name, f", member {ROWS_NAME}: {problem}")
        self.scanned = self.table is None
        if self.table is None:
            with open(os.dup(descriptor), "rb") as whole:
                self.table = scan_rows(whole, name, kinds, count, classes)

    def _read_table(self, count: int, classes: int, kinds: int) -> tuple[RowTable | None, str]:
        """The table (None: no `__rows__` here, or a damaged one) and what is wrong with it."""
        if not has_table(self._descriptor):
            return None, ""
        try:
            size = int(os.pread(self._descriptor, BLOCK, 0)[124:135], 8)
            return unpack_table(os.pread(self._descriptor, min(size, 1 << 28), BLOCK), count, classes, kinds), ""
        except (ValueError, KeyError, IndexError, TypeError) as error:
            return None, str(error)

    def _first_lost(self, length: int) -> str:
        """Which row a file that was cut lost first, as far as its table knows."""
        if self.table is None:
            return ""
        rows, kinds = np.nonzero(self.table.offsets + BLOCK + self.table.sizes > length)
        if not len(rows):
            return ""
        first = np.argmin(self.table.offsets[rows, kinds])
        member = member_name(os.pread(self._descriptor, BLOCK, int(self.table.offsets[rows[first], kinds[first]])))
        return f"; member {member or f'of row {rows[first]}'} is the first that is not whole"

    def advise(self, row: int, kind: int = 0) -> None:
        """Tells the system that this array will be read: what lies on a disk is then fetched while others are worked on."""
        os.posix_fadvise(self._descriptor, int(self.table.offsets[row, kind]), BLOCK + int(self.table.sizes[row, kind]),
                         os.POSIX_FADV_WILLNEED)

    def array(self, row: int, kind: int = 0) -> np.ndarray:
        """Row's array, read-only; kind 1 is the flip's. BadShard, naming member and bytes, when it is not as it was written."""
        table = self.table
        offset, size = int(table.offsets[row, kind]), int(table.sizes[row, kind])
        data = os.pread(self._descriptor, BLOCK + size, offset)
        if len(data) != BLOCK + size:
            raise BadShard(self.name, f", member {member_name(data)}: the file ends at byte {offset + len(data)}")
        if table.crcs is not None:
            if zlib.crc32(data) != table.crcs[row, kind]:
                raise BadShard(self.name, f", member {member_name(data) or f'of row {row}'}: altered, "
                                          f"{_altered(data, table.crcs[row, kind], offset)}")
            if data[0] == 47 or b".." in data[:100]:
                check_name(self.name, member_name(data))
        if data[BLOCK : self._body] == self._npy_header and size == self._body - BLOCK + self._bytes:
            return np.frombuffer(data, self._dtype, offset=self._body).reshape(self._shape)
        return self._decode(data)

    def _decode(self, data: bytes) -> np.ndarray:
        try:
            array = np.lib.format.read_array(io.BytesIO(data[BLOCK:]), allow_pickle=False)
            if array.shape != self._shape or array.dtype != self._dtype:
                raise UserError(f"array is {array.dtype} {array.shape}, the index says {self._dtype} {self._shape}")
        except (ValueError, EOFError, TypeError) as error:
            raise BadShard(self.name, f", member {member_name(data)}: {error}") from error
        return array

    def close(self) -> None:
        os.close(self._descriptor)


def stored_dtype(dtype: str) -> np.dtype:
    """numpy's type for an index's; it has no bfloat16, whose 16 bits are stored as an integer's."""
    return np.dtype("<u2" if dtype == "bfloat16" else dtype)


def member_name(block: bytes) -> str:
    """The name in a tar header block, printable."""
    return ascii(block[:100].split(b"\0")[0].decode("utf-8", "replace"))[1:-1]


def _altered(data: bytes, crc: int, offset: int) -> str:
    place = altered_byte(data, crc)
    if place is None:
        return f"in several of the bytes {offset} to {offset + len(data) - 1}"
    position, value = place
    return f"byte {offset + position} is {data[position]:#04x} and was {value:#04x}"


def altered_byte(data: bytes, crc: int) -> tuple[int, int] | None:
    """Where the one byte is that makes the difference between data's CRC-32 and `crc`, and what it was; None where it takes
    more than one. (A chance of 1 in 1,000 to be wrong about damage to several bytes of 16 KiB.)"""
    # CRC-32 is linear: a changed byte changes the register by a table's entry, and every later byte turns that change over
    # once. Turn it back from the end until it is an entry.
    difference = zlib.crc32(data) ^ int(crc)
    for position in range(len(data) - 1, -1, -1):
        if difference in _ENTRIES:
            return position, data[position] ^ _ENTRIES[difference]
        index = _BY_TOP_BYTE[difference >> 24]
        difference = (difference ^ _CRC_TABLE[index]) << 8 & 0xFFFFFFFF | index
    return None


def _crc_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0xEDB88320 if value & 1 else 0)
        table.append(value)
    return table


_CRC_TABLE = _crc_table()
_ENTRIES = {entry: change for change, entry in enumerate(_CRC_TABLE) if change}
_BY_TOP_BYTE = {entry >> 24: index for index, entry in enumerate(_CRC_TABLE)}
