"""A look at a finished data set against its index, shard by shard; and an index for tars that have
none.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from diffmoe.data.cache import Cache
from diffmoe.data.meaning import ACCEPT, Values, label_fault, shape_fault
from diffmoe.data.reader import ShardReader
from diffmoe.data.rows import (
    BLOCK,
    BadShard,
    Members,
    OpenShard,
    check_name,
    decode,
    member_name,
    scan_rows,
    split_name,
)
from diffmoe.data.shards import INDEX_NAME, ShardIndex, ShardMeta, write_index
from diffmoe.data.tar import ShardFile, sha256, write_tar_to
from diffmoe.data.values import channel_sums, mean_and_std, to_float
from diffmoe.errors import UserError
from diffmoe.progress import shown

# rows whose values are looked at before an index is written; of more shards than that, one row each
_SAMPLED = 1024
_ANY_CLASS = 2**62  # labels are judged together
# of statistics, relative to the standard deviation: sums of the same numbers in another order
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Inspection:
    """What was found: samples read, how many of each class, the channels' statistics over them, and
    what is wrong, by shard and in the index's order.
    """

    samples: int
    class_counts: tuple[int, ...]
    channel_mean: tuple[float, ...]
    channel_std: tuple[float, ...]
    problems: tuple[str, ...]


def inspect(
    index: ShardIndex, cache: Cache | None, *, quick: bool, report: Callable[[str], None]
) -> Inspection:
    """Reads a data set as its index describes it.

    Args:
        cache: where remote shards are held.
        quick: sizes, row tables, labels, the first and the last row of each shard; else every byte.
        report: takes each problem as it is found.
    """
    reader = ShardReader(index, seed=0, cache=cache)
    counts = np.zeros(index.meta.classes, np.int64)
    sums = np.zeros((2, index.x_shape[0]))
    arrays = samples = 0
    values = Values(index.meta)
    problems: list[str] = []

    def complain(problem: str) -> None:
        problems.append(problem)
        report(problem)

    for file in shown(index.shards, "inspect-data", True):
        try:
            descriptor = reader.descriptor(file)
            try:
                shard = index.opened(descriptor, file, flipped=index.flips)
                if not quick:
                    _check_bytes(descriptor, file, shard, index)
                rows = sorted({0, file.count - 1}) if quick else range(file.count)
                for row in rows:
                    for kind in range(1 + index.flips):
                        array = _floats(shard, row, kind, index.dtype)
                        values.add(array)
                        sums += channel_sums(array, index.meta.kind, index.meta.spread)
                        arrays += 1
                samples += len(rows)
                counts += np.bincount(shard.table.labels, minlength=len(counts))
            finally:
                os.close(descriptor)
        except BadShard as problem:
            complain(str(problem))
    fault = (
        shape_fault(index.shape, index.meta) or values.fault()
    )  # arrays of mixed-up axes have no values to speak of
    if fault:
        complain(f"{fault} when the index is written again, {ACCEPT}")
    mean, std = mean_and_std(sums, max(1, arrays) * int(np.prod(index.x_shape[1:])))
    if not quick and not problems:
        for problem in _differences(index, mean, std):
            complain(problem)
    return Inspection(samples, tuple(map(int, counts)), mean, std, tuple(problems))


def _floats(shard: OpenShard, row: int, kind: int, dtype: str) -> np.ndarray:
    """A row's array as float32. BadShard where it is not finite."""
    values = to_float(shard.array(row, kind), dtype)
    if not np.isfinite(values).all():
        raise BadShard(shard.name, f", row {row}: values that are not finite")
    return values


def _check_bytes(descriptor: int, file: ShardFile, shard: OpenShard, index: ShardIndex) -> None:
    """BadShard for a byte that is not as it was written, by its place where that can be told."""
    path = Path(f"/proc/self/fd/{descriptor}")
    for row in range(file.count):
        for kind in range(1 + index.flips):
            shard.array(row, kind)
    whole = sha256(path) == file.sha256
    if not whole and not shard.scanned:
        _check_rewritten(path.read_bytes(), shard, index)
    with open(path, "rb") as stream:
        scanned = scan_rows(
            stream, file.name, index.flips, file.count, index.meta.classes, index.meta.members
        )
    if not whole:
        raise BadShard(file.name, f": SHA-256 is not the index's ({file.sha256})")
    if not np.array_equal(scanned.labels, shard.table.labels) or not np.array_equal(
        scanned.offsets, shard.table.offsets
    ):
        raise BadShard(file.name, ": its table of rows is not that of its members")


def _check_rewritten(found: bytes, shard: OpenShard, index: ShardIndex) -> None:
    """All arrays and labels are sound, so the shard can be written again: where does what is there
    differ from that?
    """
    table, samples, members = shard.table, {}, index.meta.members
    for row in range(len(table.labels)):
        name = member_name(found[table.offsets[row, 0] :][:BLOCK])
        check_name(shard.name, name)
        samples[split_name(name)[0]] = {"cls": int(table.labels[row]) + members.first_class} | {
            place: members.as_stored(shard.array(row, number))
            for number, place in enumerate(members.arrays(index.flips))
        }
    stream = io.BytesIO()
    write_tar_to(stream, shard.name, samples)
    expected = stream.getvalue()
    if len(expected) == len(found) and expected != found:
        byte = int(
            np.flatnonzero(np.frombuffer(expected, np.uint8) != np.frombuffer(found, np.uint8))[0]
        )
        raise BadShard(
            shard.name,
            f": altered outside its arrays, byte {byte} is {found[byte]:#04x} and was {expected[byte]:#04x}",
        )


def _differences(index: ShardIndex, mean: tuple[float, ...], std: tuple[float, ...]) -> list[str]:
    made = index.encoding
    if made is None or not made.channel_mean:
        return []
    return [
        f"channel {c}: mean and deviation {m:.6g} ± {s:.6g}, the index says {was_m:.6g} ± {was_s:.6g}"
        for c, (m, s, was_m, was_s) in enumerate(
            zip(mean, std, made.channel_mean, made.channel_std, strict=True)
        )
        if max(abs(m - was_m), abs(s - was_s)) > _TOLERANCE * max(was_s, 1e-12)
    ]


def index_tars(folder: Path, meta: ShardMeta) -> ShardIndex:
    """Writes `index.json` for a folder of tars that have none; `meta.members` says what their
    samples consist of. All labels are looked at, and the values of rows from all over the tars.

    Raises:
        UserError: an index is there already, no tars, tars that do not hold such samples of one
            shape and type, or labels or values that cannot mean what `meta` says. Nothing is
            written then.
    """
    tars = sorted(folder.glob("*.tar"))
    if (folder / INDEX_NAME).exists():
        raise UserError(f"data folder ({folder}) has an {INDEX_NAME} already")
    if not tars:
        raise UserError(f"data folder ({folder}) holds no .tar")
    flips = _has_flips(tars[0], meta)
    shape, dtype = _first_array(tars[0], meta, flips)
    values = Values(meta)
    counts, low, high = [], _ANY_CLASS, 0
    for path in shown(tars, "inspect-data", True):
        with open(path, "rb") as stream:
            shard = OpenShard(
                stream.fileno(),
                path.name,
                count=None,
                size=path.stat().st_size,
                shape=shape,
                dtype=dtype,
                classes=_ANY_CLASS,
                flipped=flips,
                members=replace(meta.members, first_class=0),
            )
            labels = shard.table.labels
            for row in np.unique(
                np.linspace(0, len(labels) - 1, max(1, _SAMPLED // len(tars))).astype(int)
            ):
                for kind in range(1 + flips):
                    values.add(_floats(shard, row, kind, dtype))
        counts.append(len(labels))
        low, high = min(low, int(labels.min())), max(high, int(labels.max()))
    fault = label_fault(low, high, meta)
    if fault:
        raise UserError(f"{folder}: {fault}")
    values.check(str(folder))
    shards = tuple(
        ShardFile(path.name, count, path.stat().st_size, sha256(path))
        for path, count in zip(shown(tars, "checksums", True), counts, strict=True)
    )
    index = ShardIndex(folder, meta, shape, dtype, flips, sum(counts), shards)
    write_index(index)
    return index


def _has_flips(tar: Path, meta: ShardMeta) -> bool:
    """Whether the flipped images' arrays are there: so it is said, or so the first tar looks.
    Pixels need none.
    """
    said = meta.members.flip_array != Members.flip_array
    if meta.kind == "pixels" and said:
        raise UserError(
            f"flip_array ({meta.members.flip_array}) goes with latents and moments; pixels are mirrored "
            "when read"
        )
    if said or meta.kind == "pixels":
        return said
    try:
        with tarfile.open(tar, "r:") as members:
            return any(split_name(member.name)[1] == meta.members.flip_array for member in members)
    except (tarfile.TarError, OSError, EOFError):
        return False  # the scan says what is wrong, and where


def _first_array(tar: Path, meta: ShardMeta, flips: bool) -> tuple[tuple[int, ...], str]:
    """Shape and type of the first sample's array. UserError where it does not fit `meta`."""
    members = replace(meta.members, first_class=0)
    with open(tar, "rb") as stream:
        table = scan_rows(stream, tar.name, flips, None, _ANY_CLASS, members)
        stream.seek(int(table.offsets[0, 0]) + BLOCK)
        try:
            array = decode(stream.read(int(table.sizes[0, 0])), members.array, members.layout)
        except (ValueError, EOFError, TypeError) as error:
            raise UserError(f"shard {tar.name}: its first array cannot be read: {error}") from error
    if array.ndim != 3 or (meta.kind != "pixels" and array.dtype.kind != "f"):
        raise UserError(
            f"shard {tar.name}: arrays {array.dtype} {array.shape} do not fit kind {meta.kind}: "
            "three axes, and of latents and moments floats"
        )
    fault = shape_fault(array.shape, meta)
    if fault:
        raise UserError(f"shard {tar.name}: {fault}, {ACCEPT}")
    if meta.kind == "moments" and members.channels_first(array).shape[0] % 2:
        raise UserError(
            f"shard {tar.name}: arrays {array.shape} do not fit kind moments: as many channels of means as "
            "of --spread"
        )
    return array.shape, array.dtype.name
