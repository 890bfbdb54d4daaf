"""Rows of one shard by number: where each one's array lies in the tar, and exact, checked reads of
it.

A shard that this program wrote begins with a member `__rows__` (webdataset passes over such names):
labels, places and CRC-32 of all its arrays. Opening it is one small read, a row is another, and a
row that was altered anywhere is noticed whenever it is read. Tars of others have no such member:
opening scans their headers and compares the whole file's SHA-256. `Members` says which of their
members hold what.
"""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import BinaryIO

import numpy as np

from diffmoe.errors import UserError

ROWS_NAME = "__rows__"
BLOCK = tarfile.BLOCKSIZE
LAYOUTS = ("chw", "hwc")
_PLACE = re.compile(r"[^/:.][^/:]*(:[^:]+)?")


class BadShard(UserError):
    """A shard that cannot be read as its index says; `shard` is its name, the message says what is
    wrong and where.
    """

    def __init__(self, shard: str, problem: str) -> None:
        super().__init__(f"shard {shard}{problem}")
        self.shard, self.problem = shard, problem

    def __reduce__(self) -> tuple:
        return BadShard, (self.shard, self.problem)


@dataclass(frozen=True)
class Members:
    """Which members of a tar make a sample, and how they are read; the defaults are what this
    program writes.

    A place is the ending of a member's name after its first dot (`latent.npy` of `000.latent.npy`).
    For arrays it is an `.npy`, or `npz:NAME` with the name of an array in it; `npz:mean,std` lays
    several end to end along the channels. For labels it is a text, `json` or `json:KEY` (`KEY.KEY`
    for one inside another), or the one number of an array. A leading axis of length 1 (a batch of
    one) is dropped. `layout`: of the arrays, "chw" or "hwc". `first_class`: the label of class 0.
    """

    array: str = "npy"
    flip_array: str = "flip.npy"
    label: str = "cls"
    layout: str = "chw"
    first_class: int = 0

    def __post_init__(self) -> None:
        for name in ("array", "flip_array", "label"):
            place = getattr(self, name)
            if not _PLACE.fullmatch(place):
                raise UserError(
                    f"{name} ({place!r}) must be the ending of a member's name, or ENDING:NAME for what "
                    "lies inside"
                )
            kind, named = _format(place), ":" in place
            if name != "label" and kind not in ("npy", "npz"):
                raise UserError(
                    f"{name} ({place!r}) must end in npy or npz; other formats are not read (.pt and .pth "
                    "are pickles)"
                )
            if (kind == "npz") > named:
                raise UserError(f"{name} ({place!r}) must name an array of the npz: {place}:NAME")
            if named and kind not in ("npz", "json"):
                raise UserError(
                    f"{name} ({place!r}): only an npz or a json has something inside by name"
                )
        if self.layout not in LAYOUTS:
            raise UserError(f"layout ({self.layout!r}) must be one of {', '.join(LAYOUTS)}")

    @property
    def ours(self) -> bool:
        """Whether these are the members that this program writes, of which a shard's table of rows
        speaks.
        """
        return (self.array, self.flip_array, self.label) == (
            Members.array,
            Members.flip_array,
            Members.label,
        )

    def arrays(self, flips: bool) -> tuple[str, ...]:
        """The places of a sample's arrays, in a table's order."""
        return (self.array, self.flip_array) if flips else (self.array,)

    def channels_first(self, array: np.ndarray) -> np.ndarray:
        """A stored array as [C, H, W]; a view."""
        return array.transpose(2, 0, 1) if self.layout == "hwc" else array

    def as_stored(self, array: np.ndarray) -> np.ndarray:
        """What `channels_first` was given."""
        return array.transpose(1, 2, 0) if self.layout == "hwc" else array


def ending_of(place: str) -> str:
    """The ending of the member's name at this place."""
    return place.partition(":")[0]


def _format(place: str) -> str:
    return ending_of(place).rpartition(".")[2]


@dataclass(frozen=True)
class RowTable:
    """Labels from 0, int64 [n]; for each row and kind of array (`npy`, then perhaps `flip.npy`),
    [n, kinds]: byte of the member's header block in the tar, bytes of its payload, CRC-32 of header
    block and payload (None: unknown).
    """

    labels: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    crcs: np.ndarray | None


def pack_table(table: RowTable) -> bytes:
    """The payload of `__rows__`: a structured .npy, then its CRC-32; the same length for as many
    rows and kinds.
    """
    packed = np.zeros(len(table.labels), _packed_dtype(table.offsets.shape[1]))
    packed["label"], packed["offset"], packed["size"] = table.labels, table.offsets, table.sizes
    packed["crc"] = 0 if table.crcs is None else table.crcs
    stream = io.BytesIO()
    np.lib.format.write_array(stream, packed, allow_pickle=False)
    return stream.getvalue() + zlib.crc32(stream.getvalue()).to_bytes(4, "little")


def _packed_dtype(kinds: int) -> np.dtype:
    return np.dtype(
        [
            ("label", "<i8"),
            ("offset", "<u8", (kinds,)),
            ("size", "<u8", (kinds,)),
            ("crc", "<u4", (kinds,)),
        ]
    )


def _packed_rows(array: bytes) -> np.ndarray:
    """The rows of a `pack_table` .npy. Not by numpy's reader: Python 3.11's parser, which that
    calls, fails now and then (SystemError) where several threads are in it, and tables are opened
    by several.
    """
    start = 10 + int.from_bytes(
        array[8:10], "little"
    )  # .npy 1.0: magic, version, length of the header
    kinds = re.search(rb"'offset', '<u8', \(([0-9]+),\)", array[:start])
    if not array.startswith(b"\x93NUMPY\x01\x00") or kinds is None:
        raise UserError("it is not a table of rows")
    return np.frombuffer(array, _packed_dtype(int(kinds[1])), offset=start)


def unpack_table(
    payload: bytes, count: int | None, classes: int, kinds: int, first_class: int = 0
) -> RowTable:
    """The table again. UserError when it is damaged or is not one of `count` rows, `kinds` arrays
    and `classes` classes.
    """
    if len(payload) < 4 or zlib.crc32(payload[:-4]) != int.from_bytes(payload[-4:], "little"):
        raise UserError("its CRC-32 is wrong")
    packed = _packed_rows(payload[:-4])
    if count is not None and len(packed) != count:
        raise UserError(f"{len(packed)} rows, its index says {count}")
    if packed["offset"].shape[1] < kinds:
        raise UserError("it has no flipped arrays")
    labels = packed["label"] - first_class
    bad = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(bad):
        raise UserError(
            f"row {bad[0]}: {_wrong_label(packed['label'][bad[0]], classes, first_class)}"
        )
    # A reader may hold a thousand tables: as small as they can be, and without kinds that nobody
    # asked for.
    offsets, sizes = (packed[name][:, :kinds].astype(np.int64) for name in ("offset", "size"))
    if (
        len(offsets)
        and offsets.min() >= 0
        and sizes.min() >= 0
        and (offsets + BLOCK + sizes).max() < 2**31
    ):
        offsets, sizes = offsets.astype(np.int32), sizes.astype(np.int32)
    if (sizes == sizes[:1]).all():
        sizes = np.broadcast_to(sizes[:1].copy(), sizes.shape)
    return RowTable(labels.astype(np.int32), offsets, sizes, packed["crc"][:, :kinds].copy())


def _wrong_label(label: int, classes: int, first_class: int) -> str:
    hint = ""
    if (first_class, label) == (0, classes):
        hint = "; labels that begin with 1 take --first-class 1 when the index is written"
    span = f"[{first_class}, classes + {first_class})" if first_class else "[0, classes)"
    return f"label ({label}) must lie in {span} with classes {classes}{hint}"


def scan_rows(
    stream: BinaryIO,
    name: str,
    flips: bool,
    count: int | None,
    classes: int,
    members: Members = Members(),
) -> RowTable:
    """The table of a tar from its headers and labels alone, no CRC-32; members of other kinds are
    passed over.

    Args:
        name: of the shard, for messages.
        flips: whether samples have the flipped image's array too.
        count: samples that it must hold (None: any number above 0).

    Raises:
        BadShard: not a whole tar, unsafe names, a sample without label or array, twice, or too many
            of them.
    """
    kinds, label = [ending_of(place) for place in members.arrays(flips)], ending_of(members.label)
    wanted = dict.fromkeys([*kinds, label])
    others: dict[str, None] = {}
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
                    raise BadShard(
                        name,
                        f", member {info.name}: ends at byte {info.offset_data + info.size}, the file at {length}",
                    )
                member = info.name
                key, kind = split_name(info.name)
                if not info.isreg() or info.name == ROWS_NAME or kind not in wanted:
                    if info.isreg() and info.name != ROWS_NAME and len(others) < 8:
                        others[kind] = None
                    continue
                row = found.setdefault(key, {})
                if kind in row or (count is not None and len(found) > count):
                    raise BadShard(
                        name,
                        f", member {info.name}: second member of this name, or one sample more than the "
                        f"index's {count}",
                    )
                row[kind] = info
            labels = [
                _label(name, stream, row[label], classes, members)
                for row in found.values()
                if label in row
            ]
            end = tar.offset
    except (tarfile.TarError, OSError, EOFError) as error:
        raise BadShard(name, f": unreadable at or after member {member}: {error}") from error
    missing = [f"{key}.{kind}" for key, row in found.items() for kind in wanted if kind not in row]
    if missing:
        raise BadShard(
            name, f": missing member {missing[0]} ({len(missing)} missing){_other_endings(others)}"
        )
    if not found and count is None:
        raise BadShard(name, f": no member ends in {', '.join(wanted)}{_other_endings(others)}")
    if not found or (count is not None and len(found) != count):
        raise BadShard(
            name,
            f": ends after {len(found)} samples (last member {member}, byte {end}), its index says {count}",
        )
    infos = [[row[kind] for kind in kinds] for row in found.values()]
    return RowTable(
        np.array(labels),
        np.array([[info.offset_data - BLOCK for info in row] for row in infos]),
        np.array([[info.size for info in row] for row in infos]),
        None,
    )


def _other_endings(others: dict[str, None]) -> str:
    """What a sample has instead, and how it is said which is meant."""
    return (
        (
            f"; its members also end in {', '.join(others)}: --array, --flip-array and --label of inspect-data "
            "--write-index say which are meant"
        )
        if others
        else ""
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


def _label(
    shard: str, stream: BinaryIO, info: tarfile.TarInfo, classes: int, members: Members
) -> int:
    stream.seek(info.offset_data)
    kind = _format(members.label)
    try:
        if kind == "json":
            label = _json_label(stream.read(info.size), members.label.partition(":")[2])
        elif kind in ("npy", "npz"):
            label = _array_label(decode(stream.read(info.size), members.label))
        else:
            label = _text_label(stream.read(min(info.size, 32)))
    except (ValueError, EOFError, TypeError) as error:
        raise BadShard(shard, f", member {info.name}: {error}") from error
    if not 0 <= label - members.first_class < classes:
        raise BadShard(
            shard, f", member {info.name}: {_wrong_label(label, classes, members.first_class)}"
        )
    return label - members.first_class


def _text_label(text: bytes) -> int:
    try:
        return int(text.decode("ascii"))
    except ValueError:
        raise UserError(f"label ({text!r}) must be a whole number") from None


def _json_label(text: bytes, path: str) -> int:
    value = json.loads(text)
    for key in path.split(".") if path else ():
        if not isinstance(value, dict) or key not in value:
            there = ", ".join(list(value)[:8]) if isinstance(value, dict) else f"{value!r:.40}"
            raise UserError(f"no key {key!r} of label json:{path} here, but {there}")
        value = value[key]
    if type(value) is not int:
        raise UserError(f"label json{path and ':'}{path} ({value!r:.80}) must be a whole number")
    return value


def _array_label(array: np.ndarray) -> int:
    if array.size != 1 or array.dtype.kind not in "iu":
        raise UserError(f"label ({array.dtype} {array.shape}) must be one whole number")
    return int(array.reshape(-1)[0])


def decode(payload: bytes, place: str, layout: str = "chw") -> np.ndarray:
    """The array at `place` of a sample, from its member's bytes. ValueError, EOFError or TypeError
    for others.
    """
    if _format(place) == "npy":
        parts = [np.lib.format.read_array(io.BytesIO(payload), allow_pickle=False)]
    else:
        parts = _npz_arrays(payload, place.partition(":")[2].split(","))
    parts = [part[0] if part.ndim == 4 and part.shape[0] == 1 else part for part in parts]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, -1 if layout == "hwc" else 0)


def _npz_arrays(payload: bytes, names: list[str]) -> list[np.ndarray]:
    try:
        with zipfile.ZipFile(io.BytesIO(payload)) as archive:
            there = [name.removesuffix(".npy") for name in archive.namelist()]
            for name in names:
                if name not in there:
                    raise UserError(
                        f"no array {name!r} in the npz; it holds {', '.join(there[:8])}"
                    )
            return [
                np.lib.format.read_array(
                    io.BytesIO(archive.read(f"{name}.npy")), allow_pickle=False
                )
                for name in names
            ]
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, KeyError) as error:
        raise UserError(f"not an npz that can be read: {error}") from error


def has_table(descriptor: int) -> bool:
    """Whether the open tar begins with a table of its rows."""
    return os.pread(descriptor, len(ROWS_NAME) + 1, 0) == ROWS_NAME.encode() + b"\0"


class OpenShard:
    """An open shard file of which rows are read by number; `ShardIndex.opened` gives one of a data
    set.

    Args:
        descriptor: of the open file; closed by `close`.
            name, count, size: the shard's name, rows (None: any number) and bytes as its index says.
            shape, dtype: of an array, as stored ("bfloat16" is stored as uint16).
        flipped: whether the flips' arrays will be asked for.
        members: where arrays and labels are.

    Raises:
        BadShard: the file is shorter or longer, or has no table that fits.
    """

    def __init__(
        self,
        descriptor: int,
        name: str,
        *,
        count: int | None,
        size: int,
        shape: tuple[int, ...],
        dtype: str,
        classes: int,
        flipped: bool,
        members: Members = Members(),
    ) -> None:
        self.name, self._descriptor, self._shape, self._members = name, descriptor, shape, members
        self._dtype = stored_dtype(dtype)
        stream = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            stream,
            {
                "descr": np.lib.format.dtype_to_descr(self._dtype),
                "fortran_order": False,
                "shape": shape,
            },
        )
        self._npy_header = stream.getvalue()
        self._body = BLOCK + len(self._npy_header)
        self._bytes = int(np.prod(shape)) * self._dtype.itemsize
        self._places = members.arrays(flipped)
        length = os.fstat(descriptor).st_size
        self.table, problem = self._read_table(count, classes) if members.ours else (None, "")
        if length != size:
            raise BadShard(
                name, f" has {length} bytes, its index says {size}{self._first_lost(length)}"
            )
        if problem:
            raise BadShard(name, f", member {ROWS_NAME}: {problem}")
        self.scanned = self.table is None
        if self.table is None:
            with open(os.dup(descriptor), "rb") as whole:
                self.table = scan_rows(whole, name, flipped, count, classes, members)

    def _read_table(self, count: int | None, classes: int) -> tuple[RowTable | None, str]:
        """The table (None: no `__rows__` here, or a damaged one) and what is wrong with it."""
        if not has_table(self._descriptor):
            return None, ""
        try:
            size = int(os.pread(self._descriptor, BLOCK, 0)[124:135], 8)
            packed = os.pread(self._descriptor, min(size, 1 << 28), BLOCK)
            return unpack_table(
                packed, count, classes, len(self._places), self._members.first_class
            ), ""
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
        member = member_name(
            os.pread(self._descriptor, BLOCK, int(self.table.offsets[rows[first], kinds[first]]))
        )
        return f"; member {member or f'of row {rows[first]}'} is the first that is not whole"

    def advise(self, row: int, kind: int = 0) -> None:
        """Tells the system that this array will be read: what lies on a disk is then fetched while
        others are worked on.
        """
        os.posix_fadvise(
            self._descriptor,
            int(self.table.offsets[row, kind]),
            BLOCK + int(self.table.sizes[row, kind]),
            os.POSIX_FADV_WILLNEED,
        )

    def array(self, row: int, kind: int = 0) -> np.ndarray:
        """Row's array [C, H, W], read-only; kind 1 is the flip's. BadShard, naming member and
        bytes, when it is not as it was written.
        """
        table = self.table
        offset, size = int(table.offsets[row, kind]), int(table.sizes[row, kind])
        data = os.pread(self._descriptor, BLOCK + size, offset)
        if len(data) != BLOCK + size:
            raise BadShard(
                self.name,
                f", member {member_name(data)}: the file ends at byte {offset + len(data)}",
            )
        if table.crcs is not None:
            if zlib.crc32(data) != table.crcs[row, kind]:
                raise BadShard(
                    self.name,
                    f", member {member_name(data) or f'of row {row}'}: altered, "
                    f"{_altered(data, table.crcs[row, kind], offset)}",
                )
            if data[0] == 47 or b".." in data[:100]:
                check_name(self.name, member_name(data))
        if (
            data[BLOCK : self._body] == self._npy_header
            and size == self._body - BLOCK + self._bytes
        ):
            stored = np.frombuffer(data, self._dtype, offset=self._body).reshape(self._shape)
        else:
            stored = self._decode(data, kind)
        return self._members.channels_first(stored)

    def _decode(self, data: bytes, kind: int) -> np.ndarray:
        try:
            array = decode(data[BLOCK:], self._places[kind], self._members.layout)
            if array.shape != self._shape or array.dtype != self._dtype:
                raise UserError(
                    f"array is {array.dtype} {array.shape}, the index says {self._dtype} {self._shape}"
                )
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
    """Where the one byte is that makes the difference between data's CRC-32 and `crc`, and what it
    was; None where it takes more than one. (A chance of 1 in 1,000 to be wrong about damage to
    several bytes of 16 KiB.)
    """
    # CRC-32 is linear: a changed byte changes the register by a table's entry, and every later byte
    # turns that change over once. Turn it back from the end until it is an entry.
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
