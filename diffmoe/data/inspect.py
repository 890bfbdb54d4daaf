"""A look at a finished data set against its index; and an index for tars that have none."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from diffmoe.data.cache import Cache
from diffmoe.data.meaning import ACCEPT, Values, label_fault, shape_fault
from diffmoe.data.members import Members, decode
from diffmoe.data.reader import ShardReader
from diffmoe.data.rows import BLOCK, BadShard, OpenShard, scan_rows, split_name
from diffmoe.data.shards import INDEX_NAME, ShardIndex, ShardMeta, write_index
from diffmoe.data.tar import ShardFile
from diffmoe.data.values import channel_sums, mean_and_std, to_float
from diffmoe.errors import UserError
from diffmoe.files import sha256
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
            with reader.opened(file) as descriptor:
                shard = OpenShard(descriptor, file, index, flipped=index.flips)
                if not quick:
                    _check_bytes(descriptor, file, shard, index)
                rows = sorted({0, file.count - 1}) if quick else range(file.count)
                for row, kind in ((row, kind) for row in rows for kind in range(1 + index.flips)):
                    array = _floats(shard, row, kind, index.dtype)
                    values.add(array)
                    sums += channel_sums(array, index.meta.kind, index.meta.spread)
                    arrays += 1
                samples += len(rows)
                counts += np.bincount(shard.table.labels, minlength=len(counts))
        except BadShard as problem:
            complain(str(problem))
    # Arrays of mixed-up axes have no values to speak of.
    if fault := shape_fault(index.shape, index.meta) or values.fault():
        complain(f"{fault} when the index is written again, {ACCEPT}")
    mean, std = mean_and_std(sums, max(1, arrays) * int(np.prod(index.x_shape[1:])))
    made = index.encoding
    if not quick and not problems and made and made.channel_mean:
        both = zip(mean, std, made.channel_mean, made.channel_std, strict=True)
        for c, (m, s, was_m, was_s) in enumerate(both):
            if max(abs(m - was_m), abs(s - was_s)) > _TOLERANCE * max(was_s, 1e-12):
                complain(
                    f"channel {c}: mean and deviation {m:.6g} ± {s:.6g}, the index says "
                    f"{was_m:.6g} ± {was_s:.6g}"
                )
    return Inspection(samples, tuple(map(int, counts)), mean, std, tuple(problems))


def _floats(shard: OpenShard, row: int, kind: int, dtype: str) -> np.ndarray:
    """A row's array as float32. BadShard where it is not finite."""
    values = to_float(shard.array(row, kind), dtype)
    if not np.isfinite(values).all():
        raise BadShard(shard.name, f", row {row}: values that are not finite")
    return values


def _check_bytes(descriptor: int, file: ShardFile, shard: OpenShard, index: ShardIndex) -> None:
    """BadShard for a byte that is not as it was written, by member where that can be told."""
    for row, kind in np.ndindex(shard.table.offsets.shape):
        shard.array(row, kind)
    path = Path(f"/proc/self/fd/{descriptor}")
    meta = index.meta
    with open(path, "rb") as stream:
        found = scan_rows(stream, file.name, index.flips, file.count, meta.classes, meta.members)
    if sha256(path) != file.sha256:
        raise BadShard(file.name, f": SHA-256 is not the index's ({file.sha256})")
    same = np.array_equal(found.labels, shard.table.labels)
    if not same or not np.array_equal(found.offsets, shard.table.offsets):
        raise BadShard(file.name, ": its table of rows is not that of its members")


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
    members = replace(meta.members, first_class=0)
    any_class = replace(meta, classes=_ANY_CLASS, members=members)
    unknown = ShardIndex(folder, any_class, shape, dtype, flips, 0, ())
    values = Values(meta)
    counts, low, high = [], _ANY_CLASS, 0
    for path in shown(tars, "inspect-data", True):
        with open(path, "rb") as stream:
            file = ShardFile(path.name, 0, path.stat().st_size, "")
            shard = OpenShard(stream.fileno(), file, unknown, flipped=flips, counted=False)
            labels = shard.table.labels
            some = np.linspace(0, len(labels) - 1, max(1, _SAMPLED // len(tars))).astype(int)
            for row in np.unique(some):
                for kind in range(1 + flips):
                    values.add(_floats(shard, row, kind, dtype))
        counts.append(len(labels))
        low, high = min(low, int(labels.min())), max(high, int(labels.max()))
    if fault := label_fault(low, high, meta):
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
    """Whether there are flipped arrays: as is said, or as the first tar looks. Pixels need none."""
    flip_array = meta.members.flip_array
    said = flip_array != Members.flip_array
    if meta.kind == "pixels" and said:
        raise UserError(
            f"flip_array ({flip_array}) goes with latents and moments; pixels are mirrored when "
            "read"
        )
    if said or meta.kind == "pixels":
        return said
    try:
        with tarfile.open(tar, "r:") as members:
            return any(split_name(member.name)[1] == flip_array for member in members)
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
    fault = ""
    misfit = f"arrays {array.dtype} {array.shape} do not fit kind {meta.kind}: "
    if array.ndim != 3 or (meta.kind != "pixels" and array.dtype.kind != "f"):
        fault = misfit + "three axes, and of latents and moments floats"
    elif fault := shape_fault(array.shape, meta):
        fault += f", {ACCEPT}"
    elif meta.kind == "moments" and members.channels_first(array).shape[0] % 2:
        fault = misfit + "as many channels of means as of --spread"
    if fault:
        raise UserError(f"shard {tar.name}: {fault}")
    return array.shape, array.dtype.name
