"""Rows of one shard by number: where each one's array lies in the tar, and exact, checked reads of
it.

A shard that this program wrote begins with a member `__rows__` (webdataset skips such names):
labels, places and CRC-32 of all its arrays. Opening it is one small read, a row is another, and a
row that was altered anywhere is noticed whenever it is read. Tars of others have no such member:
opening scans their headers and compares the whole file's SHA-256.
"""

from __future__ import annotations

import functools
import io
import os
import re
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from diffmoe.data.members import Members, decode, ending_of, wrong_label
from diffmoe.errors import UserError

if TYPE_CHECKING:
    from diffmoe.data.shards import ShardIndex
    from diffmoe.data.tar import ShardFile

ROWS_NAME = "__rows__"
BLOCK = tarfile.BLOCKSIZE


class BadShard(UserError):
    """The shard of this name cannot be read as its index says; the message says what and where."""

    def __init__(self, shard: str, problem: str) -> None:
        super().__init__(f"shard {shard}{problem}")
        self.shard, self.problem = shard, problem

    def __reduce__(self) -> tuple:
        return BadShard, (self.shard, self.problem)


@dataclass(frozen=True)
class RowTable:
    """Labels from 0, int64 [n]; for each row and kind of array (`npy`, then perhaps `flip.npy`
    and `features.npy`), [n, kinds]: byte of the member's header block in the tar, bytes of its
    payload, CRC-32 of header block and payload (None: unknown).
    """

    labels: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    crcs: np.ndarray | None


def pack_table(table: RowTable) -> bytes:
    """The payload of `__rows__`: an .npy, then its CRC-32; as long for as many rows and kinds."""
    packed = np.zeros(len(table.labels), _packed_dtype(table.offsets.shape[1]))
    packed["label"], packed["offset"], packed["size"] = table.labels, table.offsets, table.sizes
    packed["crc"] = 0 if table.crcs is None else table.crcs
    stream = io.BytesIO()
    np.lib.format.write_array(stream, packed, allow_pickle=False)
    return stream.getvalue() + zlib.crc32(stream.getvalue()).to_bytes(4, "little")


def _packed_dtype(kinds: int) -> np.dtype:
    sub = (kinds,)
    return np.dtype(
        [("label", "<i8"), ("offset", "<u8", sub), ("size", "<u8", sub), ("crc", "<u4", sub)]
    )


def unpack_table(
    payload: bytes, count: int | None, classes: int, kinds: int, first_class: int = 0
) -> RowTable:
    """The table. UserError if corrupt, or not of `count` rows, `kinds` arrays and `classes`."""
    array = payload[:-4]
    if len(payload) < 4 or zlib.crc32(array) != int.from_bytes(payload[-4:], "little"):
        raise UserError("its CRC-32 is wrong")
    # Not by numpy's reader: Python 3.11's parser, which that calls, fails now and then
    # (SystemError) where several threads are in it, and tables are opened by several.
    start = 10 + int.from_bytes(array[8:10], "little")  # .npy 1.0: magic, version, header's length
    found = re.search(rb"'offset', '<u8', \(([0-9]+),\)", array[:start])
    if not array.startswith(b"\x93NUMPY\x01\x00") or found is None:
        raise UserError("it is not a table of rows")
    packed = np.frombuffer(array, _packed_dtype(int(found[1])), offset=start)
    if count is not None and len(packed) != count:
        raise UserError(f"{len(packed)} rows, its index says {count}")
    if packed["offset"].shape[1] < kinds:
        raise UserError("it has no flipped arrays, or no features")
    labels = packed["label"] - first_class
    bad = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(bad):
        label = packed["label"][bad[0]]
        raise UserError(f"row {bad[0]}: {wrong_label(label, classes, first_class)}")
    # A reader may hold a thousand tables: as small as they can be, and without kinds that nobody
    # asked for.
    offsets, sizes = (packed[name][:, :kinds].astype(np.int64) for name in ("offset", "size"))
    smallest = min(offsets.min(initial=0), sizes.min(initial=0))
    if smallest >= 0 and (offsets + BLOCK + sizes).max(initial=0) < 2**31:
        offsets, sizes = offsets.astype(np.int32), sizes.astype(np.int32)
    if (sizes == sizes[:1]).all():
        sizes = np.broadcast_to(sizes[:1].copy(), sizes.shape)
    return RowTable(labels.astype(np.int32), offsets, sizes, packed["crc"][:, :kinds].copy())


def scan_rows(
    stream: BinaryIO,
    name: str,
    flips: bool,
    count: int | None,
    classes: int,
    members: Members = Members(),
    features: bool = False,
) -> RowTable:
    """The table of a tar from its headers and labels alone, no CRC-32; members of other kinds are
    skipped.

    Args:
        name: of the shard, for messages.
        flips, features: whether samples have the flipped image's array, and features, too.
        count: samples that it must hold (None: any number above 0).

    Raises:
        BadShard: not an intact tar, unsafe names, a sample without label or array, twice, or too
            many of them.
    """
    kinds = [ending_of(place) for place in members.arrays(flips, features)]
    label = ending_of(members.label)
    wanted = dict.fromkeys([*kinds, label])
    others: dict[str, None] = {}
    found: dict[str, dict[str, tarfile.TarInfo]] = {}
    member = "(none yet)"
    length = stream.seek(0, os.SEEK_END)
    stream.seek(0)

    def bad(problem: str, info: tarfile.TarInfo) -> BadShard:
        return BadShard(name, f", member {info.name}: {problem}")

    try:
        # "r:" takes no compressed tar: there is no reading at an offset in one.
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            for info in tar:
                check_name(name, info.name)
                member, end = info.name, info.offset_data + info.size
                if end > length:
                    raise bad(f"ends at byte {end}, the file at {length}", info)
                key, kind = split_name(info.name)
                if not info.isreg() or info.name == ROWS_NAME:
                    continue
                if kind not in wanted:
                    if len(others) < 8:
                        others[kind] = None
                    continue
                row = found.setdefault(key, {})
                if kind in row:
                    raise bad("second member of this name", info)
                if count is not None and len(found) > count:
                    raise bad(f"one sample more than the index's {count}", info)
                row[kind] = info
            end = tar.offset
    except (tarfile.TarError, OSError, EOFError) as error:
        raise BadShard(name, f": unreadable at or after member {member}: {error}") from error
    instead = ""
    if others:
        instead = (
            f"; its members also end in {', '.join(others)}: --array, --flip-array and --label of "
            "inspect-data --write-index say which are meant"
        )
    missing = [f"{key}.{kind}" for key, row in found.items() for kind in wanted if kind not in row]
    if missing:
        raise BadShard(name, f": missing member {missing[0]} ({len(missing)} missing){instead}")
    if not found and count is None:
        raise BadShard(name, f": no member ends in {', '.join(wanted)}{instead}")
    if count is not None and len(found) != count:
        raise BadShard(
            name,
            f": ends after {len(found)} samples (last member {member}, byte {end}), its index says "
            f"{count}",
        )
    labels = []
    for row in found.values():
        stream.seek(row[label].offset_data)
        try:
            labels.append(members.class_of(stream.read(row[label].size), classes))
        except (ValueError, EOFError, TypeError) as error:
            raise bad(str(error), row[label]) from error
    infos = [[row[kind] for kind in kinds] for row in found.values()]
    return RowTable(
        np.array(labels),
        np.array([[info.offset_data - BLOCK for info in row] for row in infos]),
        np.array([[info.size for info in row] for row in infos]),
        None,
    )


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


def has_table(descriptor: int) -> bool:
    """Whether the open tar begins with a table of its rows."""
    return os.pread(descriptor, len(ROWS_NAME) + 1, 0) == ROWS_NAME.encode() + b"\0"


class OpenShard:
    """An open shard `file` of a data set, of which rows are read by number.

    Args:
        descriptor: of the open file; closed by `close`.
        flipped: whether the flips' arrays will be asked for.
        features: whether features will be, which come last.
        counted: whether it is known how many rows the file has.

    Raises:
        BadShard: the file is shorter or longer, or has no table that fits.
    """

    def __init__(
        self,
        descriptor: int,
        file: ShardFile,
        index: ShardIndex,
        *,
        flipped: bool,
        features: bool = False,
        counted: bool = True,
    ) -> None:
        name, members, classes = file.name, index.meta.members, index.meta.classes
        count = file.count if counted else None
        flipped = index.flips if features else flipped  # which come before features
        self.name, self._descriptor, self._members = name, descriptor, members
        self._shape, self._dtype = index.shape, stored_dtype(index.dtype)
        self._npy_header, self._bytes = _npy_form(self._shape, self._dtype)
        self._body = BLOCK + len(self._npy_header)
        self._features = index.features
        self._places = members.arrays(flipped, features)
        table, problem = None, ""
        if members.ours and has_table(descriptor):
            try:
                packed = int(os.pread(descriptor, BLOCK, 0)[124:135], 8)
                payload = os.pread(descriptor, min(packed, 1 << 28), BLOCK)
                table = unpack_table(
                    payload, count, classes, len(self._places), members.first_class
                )
            except (ValueError, KeyError, IndexError, TypeError) as error:
                problem = str(error)
        length = os.fstat(descriptor).st_size
        if length != file.bytes:
            lost = self._first_lost(table, length) if table else ""
            raise BadShard(name, f" has {length} bytes, its index says {file.bytes}{lost}")
        if problem:
            raise BadShard(name, f", member {ROWS_NAME}: {problem}")
        self.scanned = table is None
        if table is None:
            with open(os.dup(descriptor), "rb") as whole:
                table = scan_rows(whole, name, flipped, count, classes, members, features)
        self.table = table

    def _first_lost(self, table: RowTable, length: int) -> str:
        """Which row a file that was cut lost first."""
        rows, kinds = np.nonzero(table.offsets + BLOCK + table.sizes > length)
        if not len(rows):
            return ""
        first = np.argmin(table.offsets[rows, kinds])
        header = os.pread(self._descriptor, BLOCK, int(table.offsets[rows[first], kinds[first]]))
        lost = member_name(header) or f"of row {rows[first]}"
        return f"; member {lost} is the first that is not intact"

    def advise(self, row: int, kind: int = 0) -> None:
        """Tells the system to fetch this array from the disk while others are worked on."""
        offset, size = int(self.table.offsets[row, kind]), int(self.table.sizes[row, kind])
        os.posix_fadvise(self._descriptor, offset, BLOCK + size, os.POSIX_FADV_WILLNEED)

    def features(self, row: int) -> np.ndarray:
        """Row's features [N, d], float16, read-only. BadShard as `array`."""
        data = self._read(row, len(self._places) - 1)
        header, size = _npy_form(self._features, np.dtype("<f2"))
        body = BLOCK + len(header)
        if data[BLOCK:body] != header or len(data) != body + size:
            wanted = f"float16 {self._features}"
            raise self._bad(data, row, f"features are not the index's, {wanted}")
        return np.frombuffer(data, np.float16, offset=body).reshape(self._features)

    def _read(self, row: int, kind: int) -> bytes:
        """Header block and payload of a row's array. BadShard where they were altered."""
        table = self.table
        offset, size = int(table.offsets[row, kind]), int(table.sizes[row, kind])
        data = os.pread(self._descriptor, BLOCK + size, offset)
        if len(data) != BLOCK + size:
            raise self._bad(data, row, f"the file ends at byte {offset + len(data)}")
        if table.crcs is not None:
            if zlib.crc32(data) != table.crcs[row, kind]:
                raise self._bad(
                    data, row, f"altered, in bytes {offset} to {offset + len(data) - 1}"
                )
            if data[0] == 47 or b".." in data[:100]:
                check_name(self.name, member_name(data))
        return data

    def array(self, row: int, kind: int = 0) -> np.ndarray:
        """Row's [C, H, W], read-only; kind 1: the flip's. BadShard, by member, if altered."""
        data = self._read(row, kind)
        if data[BLOCK : self._body] == self._npy_header and len(data) == self._body + self._bytes:
            stored = np.frombuffer(data, self._dtype, offset=self._body).reshape(self._shape)
            return self._members.channels_first(stored)
        try:
            stored = decode(data[BLOCK:], self._places[kind], self._members.layout)
        except (ValueError, EOFError, TypeError) as error:
            raise self._bad(data, row, str(error)) from error
        if stored.shape != self._shape or stored.dtype != self._dtype:
            raise self._bad(
                data,
                row,
                f"array is {stored.dtype} {stored.shape}, the index says {self._dtype} "
                f"{self._shape}",
            )
        return self._members.channels_first(stored)

    def _bad(self, data: bytes, row: int, problem: str) -> BadShard:
        return BadShard(self.name, f", member {member_name(data) or f'of row {row}'}: {problem}")

    def close(self) -> None:
        os.close(self._descriptor)


@functools.cache
def _npy_form(shape: tuple[int, ...], dtype: np.dtype) -> tuple[bytes, int]:
    """The .npy header of such an array, and its values' bytes."""
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.empty(shape, dtype))
    size = int(np.prod(shape)) * dtype.itemsize
    return stream.getvalue()[: stream.tell() - size], size


def stored_dtype(dtype: str) -> np.dtype:
    """numpy's type for an index's; it has no bfloat16, whose 16 bits are stored as an integer's."""
    return np.dtype("<u2" if dtype == "bfloat16" else dtype)


def member_name(block: bytes) -> str:
    """The name in a tar header block, printable."""
    return ascii(block[:100].split(b"\0")[0].decode("utf-8", "replace"))[1:-1]
