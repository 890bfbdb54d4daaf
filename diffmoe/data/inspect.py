"""A look at a finished data set against its index, shard by shard; and an index for tars that have none."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffmoe.data.cache import Cache
from diffmoe.data.reader import ShardReader
from diffmoe.data.rows import BLOCK, BadShard, OpenShard, check_name, kinds_of, member_name, scan_rows, split_name
from diffmoe.data.shards import INDEX_NAME, ShardIndex, ShardMeta, write_index
from diffmoe.data.tar import ShardFile, sha256, write_tar_to
from diffmoe.data.values import channel_sums, mean_and_std, to_float
from diffmoe.errors import UserError
from diffmoe.progress import shown

_TOLERANCE = 1e-6  # of statistics, relative to the standard deviation: sums of the same numbers in another order


@dataclass(frozen=True)
class Inspection:
    """What was found: samples read, how many of each class, the channels' statistics over them, and what is wrong, by shard
    and in the index's order."""

    samples: int
    class_counts: tuple[int, ...]
    channel_mean: tuple[float, ...]
    channel_std: tuple[float, ...]
    problems: tuple[str, ...]


def inspect(index: ShardIndex, cache: Cache | None, *, quick: bool, report: Callable[[str], None]) -> Inspection:
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
    problems: list[str] = []

    def complain(problem: str) -> None:
        problems.append(problem)
        report(problem)

    for file in shown(index.shards, "inspect-data", True):
        try:
            descriptor = reader.descriptor(file)
            try:
                shard = OpenShard(descriptor, file.name, count=file.count, size=file.bytes, shape=index.shape, dtype=index.dtype,
                                  classes=index.meta.classes, flipped=index.flips)
                if not quick:
                    _check_bytes(descriptor, file, shard, index)
                rows = sorted({0, file.count - 1}) if quick else range(file.count)
                for row in rows:
                    for kind in range(1 + index.flips):
                        sums += _sums_of(shard, row, kind, index)
                        arrays += 1
                samples += len(rows)
                counts += np.bincount(shard.table.labels, minlength=len(counts))
            finally:
                os.close(descriptor)
        except BadShard as problem:
            complain(str(problem))
    mean, std = mean_and_std(sums, max(1, arrays) * int(np.prod(index.x_shape[1:])))
    if not quick and not problems:
        for problem in _differences(index, mean, std):
            complain(problem)
    return Inspection(samples, tuple(map(int, counts)), mean, std, tuple(problems))


def _sums_of(shard: OpenShard, row: int, kind: int, index: ShardIndex) -> np.ndarray:
    values = to_float(shard.array(row, kind), index.dtype)
    if not np.isfinite(values).all():
        raise BadShard(shard.name, f", row {row}: values that are not finite")
    return channel_sums(values, index.meta.kind, index.meta.spread)


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
        scanned = scan_rows(stream, file.name, kinds_of(index.flips), file.count, index.meta.classes)
    if not whole:
        raise BadShard(file.name, f": SHA-256 is not the index's ({file.sha256})")
    if not np.array_equal(scanned.labels, shard.table.labels) or not np.array_equal(scanned.offsets, shard.table.offsets):
        raise BadShard(file.name, ": its table of rows is not that of its members")


def _check_rewritten(found: bytes, shard: OpenShard, index: ShardIndex) -> None:
    """All arrays and labels are sound, so the shard can be written again: where does what is there differ from that?"""
    table, samples = shard.table, {}
    for row in range(len(table.labels)):
        name = member_name(found[table.offsets[row, 0] :][:BLOCK])
        check_name(shard.name, name)
        samples[split_name(name)[0]] = {"cls": int(table.labels[row])} | {
            kind: shard.array(row, number) for number, kind in enumerate(kinds_of(index.flips))}
    stream = io.BytesIO()
    write_tar_to(stream, shard.name, samples)
    expected = stream.getvalue()
    if len(expected) == len(found) and expected != found:
        byte = int(np.flatnonzero(np.frombuffer(expected, np.uint8) != np.frombuffer(found, np.uint8))[0])
        raise BadShard(shard.name, f": altered outside its arrays, byte {byte} is {found[byte]:#04x} and was {expected[byte]:#04x}")


def _differences(index: ShardIndex, mean: tuple[float, ...], std: tuple[float, ...]) -> list[str]:
    made = index.encoding
    if made is None or not made.channel_mean:
        return []
    return [f"channel {c}: mean and deviation {m:.6g} ± {s:.6g}, the index says {was_m:.6g} ± {was_s:.6g}"
            for c, (m, s, was_m, was_s) in enumerate(zip(mean, std, made.channel_mean, made.channel_std, strict=True))
            if max(abs(m - was_m), abs(s - was_s)) > _TOLERANCE * max(was_s, 1e-12)]


def index_tars(folder: Path, meta: ShardMeta) -> ShardIndex:
    """Writes `index.json` for a folder of tars that hold `<key>.npy`, `<key>.cls` and perhaps `<key>.flip.npy`.

    Raises:
        UserError: an index is there already, no tars, or tars that do not hold such samples of one shape and type.
    """
    tars = sorted(folder.glob("*.tar"))
    if (folder / INDEX_NAME).exists():
        raise UserError(f"data folder ({folder}) has an {INDEX_NAME} already")
    if not tars:
        raise UserError(f"data folder ({folder}) holds no .tar")
    with open(tars[0], "rb") as stream:
        try:
            flips, first = True, scan_rows(stream, tars[0].name, kinds_of(True), None, meta.classes)
        except BadShard:
            flips, first = False, scan_rows(stream, tars[0].name, kinds_of(False), None, meta.classes)
        stream.seek(int(first.offsets[0, 0]) + BLOCK)
        try:
            array = np.lib.format.read_array(io.BytesIO(stream.read(int(first.sizes[0, 0]))), allow_pickle=False)
        except (ValueError, EOFError, TypeError) as error:
            raise UserError(f"shard {tars[0].name}: its first array cannot be read: {error}") from error
    if array.ndim != 3 or (meta.kind == "moments" and (array.shape[0] % 2 or array.dtype.kind != "f")):
        raise UserError(f"shard {tars[0].name}: arrays {array.dtype} {array.shape} do not fit kind {meta.kind} ([C,H,W] or "
                        "[2C,H,W])")
    shards = []
    for path in tars:
        with open(path, "rb") as stream:
            count = len(scan_rows(stream, path.name, kinds_of(flips), None, meta.classes).labels)
        shards.append(ShardFile(path.name, count, path.stat().st_size, sha256(path)))
    index = ShardIndex(folder, meta, array.shape, array.dtype.name, flips, sum(s.count for s in shards), tuple(shards))
    write_index(index)
    return index
