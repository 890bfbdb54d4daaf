"""Shards of samples on disk, and the one order in which training reads them.

A data set is a folder of webdataset tars plus `index.json`, written last: a folder without it is unfinished.
Training position p (samples seen so far, over the whole run) decides everything about a sample: which one it is, its
flip, its VAE noise. So the same run reads the same samples on any number of ranks, and resumes anywhere without replay.
"""

from __future__ import annotations

import json
import queue
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from diffmoe.data.order import SampleOrder
from diffmoe.data.tar import ShardArrays, ShardFile, read_tar, replacing, sha256, write_tar
from diffmoe.random_streams import Use, philox

FORMAT_VERSION = 1
INDEX_NAME = "index.json"
KINDS = ("pixels", "moments")
T = TypeVar("T")
_KEY = re.compile(r"(?!__)[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*")  # webdataset splits names at the first dot, skips __x__


@dataclass(frozen=True)
class ShardMeta:
    """What the stored arrays mean.

    `kind` "pixels": arrays [C, H, W], x = (array - mean) * scale.
    `kind` "moments": arrays [2C, H, W] (VAE mean, then VAE standard deviation), x = (mu + std * eps - mean) * scale.
    """

    kind: str
    classes: int
    scale: float = 1.0
    mean: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind ({self.kind!r}) must be one of {', '.join(KINDS)}")
        if self.classes < 1:
            raise ValueError(f"classes ({self.classes}) must be at least 1")
        if not (np.isfinite(self.scale) and np.isfinite(self.mean) and self.scale != 0):
            raise ValueError(f"scale ({self.scale}) and mean ({self.mean}) must be finite, scale not 0")


@dataclass(frozen=True)
class Encoding:
    """How `run.py encode` made a data set: all that decides its bytes, then what came of it.

    `vae` "" means pixels (`precision` "", `batch` 0). `images` counts the unusable ones in `skipped` (by address) as well.
    `channel_mean`, `channel_std`: of latents sampled from the moments (both mirror images), before shift and scale; of
    pixels as stored.
    """

    source_sha256: str
    images: int
    image_size: int
    image_channels: int
    vae: str
    vae_sha256: str
    precision: str
    batch: int
    samples_per_shard: int
    class_names: tuple[str, ...] = ()
    channel_mean: tuple[float, ...] = ()
    channel_std: tuple[float, ...] = ()
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class ShardIndex:
    """A finished data set. `shape` is the stored array's; `x_shape` is the model input's."""

    folder: Path
    meta: ShardMeta
    shape: tuple[int, ...]
    dtype: str
    flips: bool
    count: int
    shards: tuple[ShardFile, ...]
    encoding: Encoding | None = None

    @property
    def x_shape(self) -> tuple[int, int, int]:
        """Shape [C, H, W] of one training sample."""
        channels, height, width = self.shape
        return (channels // 2 if self.meta.kind == "moments" else channels, height, width)


@dataclass(frozen=True)
class Batch:
    """Samples in the order of `positions`: x float32 [n, C, H, W], y int64 [n]."""

    x: torch.Tensor
    y: torch.Tensor
    positions: tuple[int, ...]


def write_shards(
    samples: Iterable[tuple],
    folder: str | Path,
    *,
    samples_per_shard: int,
    meta: ShardMeta,
) -> ShardIndex:
    """Write samples as shards and, last of all, the index; equal samples give equal bytes.

    Args:
        samples: (key, array [C, H, W] or [2C, H, W], label), or with a fourth item: the flipped image's moments.
        folder: created where missing; must not hold a finished data set.
        samples_per_shard: samples in every shard but perhaps the last.
        meta: what the arrays mean.

    Raises:
        ValueError: an existing index, no samples, or a sample that does not fit the first one or `meta`.
    """
    folder = Path(folder)
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard ({samples_per_shard}) must be at least 1")
    if (folder / INDEX_NAME).exists():
        raise ValueError(f"folder ({folder}) already holds a finished data set; write to another or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[ShardFile] = []
    first: tuple | None = None
    pending: dict[str, dict[str, object]] = {}

    def flush() -> None:
        path = folder / f"shard-{len(shards):06d}.tar"
        write_tar(path, pending)
        shards.append(ShardFile(path.name, len(pending), path.stat().st_size, sha256(path)))
        pending.clear()

    for sample in samples:
        first = first or sample
        members = _checked_members(sample, first, meta)
        if sample[0] in pending:
            raise ValueError(f"key ({sample[0]}) appears twice in shard {len(shards)}")
        pending[sample[0]] = members
        if len(pending) == samples_per_shard:
            flush()
    if first is None:
        raise ValueError(f"samples (none) must not be empty: nothing written to {folder}")
    if pending:
        flush()
    index = ShardIndex(folder, meta, first[1].shape, first[1].dtype.name, len(first) == 4,
                       sum(shard.count for shard in shards), tuple(shards))
    write_index(index)
    return index


def write_index(index: ShardIndex) -> None:
    """Write `index.json`, which makes the data set in `index.folder` a finished one; atomic, equal indexes equal bytes."""
    record = {"format": FORMAT_VERSION, **asdict(index)}
    del record["folder"]
    if index.encoding is None:
        del record["encoding"]
    with replacing(index.folder / INDEX_NAME) as stream:
        stream.write(json.dumps(record, indent=1, sort_keys=True).encode() + b"\n")


def _checked_members(sample: tuple, first: tuple, meta: ShardMeta) -> dict[str, object]:
    key, array, label, *flip = sample
    if not _KEY.fullmatch(key):
        raise ValueError(f"key ({key!r}) must be letters, digits, '-', '_' and inner '/', and not start with '__'")
    if len(sample) != len(first):
        raise ValueError(f"sample {key} has {len(sample)} items, the first sample has {len(first)}")
    if flip and meta.kind != "moments":
        raise ValueError(f"sample {key}: kind ({meta.kind}) takes no flipped array; pixels are mirrored when read")
    for value in (array, *flip):
        if value.shape != first[1].shape or value.dtype != first[1].dtype:
            raise ValueError(f"sample {key} is {value.dtype} {value.shape}, the first is "
                             f"{first[1].dtype} {first[1].shape}")
        if value.ndim != 3 or (meta.kind == "moments" and value.shape[0] % 2):
            raise ValueError(f"sample {key}: shape {value.shape} does not fit kind {meta.kind} ([C,H,W] or [2C,H,W])")
        if value.dtype.kind != "f" and not (meta.kind == "pixels" and value.dtype == np.uint8):
            raise ValueError(f"sample {key}: dtype ({value.dtype}) must be a float, or uint8 for pixels")
        if not np.isfinite(value).all():
            raise ValueError(f"sample {key} holds values that are not finite")
    if not 0 <= int(label) < meta.classes:
        raise ValueError(f"sample {key}: label ({label}) must lie in [0, classes) with classes {meta.classes}")
    members = {"npy": np.ascontiguousarray(array), "cls": int(label)}
    return members | ({"flip.npy": np.ascontiguousarray(flip[0])} if flip else {})


def load_index(path: str | Path) -> ShardIndex:
    """Load the index of a data set from its folder (or from its index.json) and check every shard's size.

    Raises:
        ValueError: no such folder, no or malformed index.json, a missing shard, or a shard of another size.
    """
    path = Path(path)
    folder = path.parent if path.name == INDEX_NAME else path
    if not folder.is_dir():
        raise ValueError(f"data folder ({folder}) does not exist")
    if not (folder / INDEX_NAME).is_file():
        raise ValueError(f"data folder ({folder}) has no {INDEX_NAME}: no data set, or unfinished")
    try:
        record = json.loads((folder / INDEX_NAME).read_text())
        if record["format"] != FORMAT_VERSION:
            raise ValueError(f"format ({record['format']}) is not the one this program reads ({FORMAT_VERSION})")
        shards = tuple(ShardFile(**shard) for shard in record["shards"])
        index = ShardIndex(folder, ShardMeta(**record["meta"]), tuple(record["shape"]), record["dtype"],
                           record["flips"], record["count"], shards,
                           from_json(Encoding, record["encoding"]) if "encoding" in record else None)
        np.dtype(index.dtype)
        if len(index.shape) != 3:
            raise ValueError(f"shape ({index.shape}) must have three numbers, channels first")
        if index.count != sum(shard.count for shard in shards) or index.count < 1:
            raise ValueError(f"count ({index.count}) must be positive and the sum over its shards "
                             f"({sum(shard.count for shard in shards)})")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / INDEX_NAME} is malformed: {type(error).__name__}: {error}") from error
    for shard in shards:
        _check_shard_file(folder, shard)
    return index


def from_json(kind: type[T], record: dict) -> T:
    """A dataclass of numbers, texts and tuples from its JSON form. TypeError where fields are missing or unknown."""
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in record.items()})


def _check_shard_file(folder: Path, shard: ShardFile) -> None:
    if Path(shard.name).name != shard.name:
        raise ValueError(f"{folder / INDEX_NAME}: shard name ({shard.name!r}) must be a plain file name")
    if not (folder / shard.name).is_file():
        raise ValueError(f"shard {shard.name} is missing from {folder}")
    size = (folder / shard.name).stat().st_size
    if size != shard.bytes:
        raise ValueError(f"shard {shard.name} in {folder} has {size} bytes, its index says {shard.bytes}")


class ShardReader:
    """Reads samples by training position. Not for use by several threads at once.

    Args:
        index: the data set.
        seed: fixes order, flips and VAE noise.
        window: shards mixed together; memory is bounded by 2 * window shards.
        flip: mirror about half of the samples, each by its position's own coin.

    Raises:
        ValueError: `flip` asked of moments that were written without flipped ones; later, from `read`, a damaged shard.
    """

    def __init__(self, index: ShardIndex, *, seed: int, window: int = 8, flip: bool = False) -> None:
        if flip and index.meta.kind == "moments" and not index.flips:
            raise ValueError(f"flip (True) needs flipped moments; the data set {index.folder} has none (flips False)")
        self.index, self.seed, self.window, self.flip = index, seed, window, flip
        self._order = SampleOrder([shard.count for shard in index.shards], seed=seed, window=window)
        self._cache: OrderedDict[int, ShardArrays] = OrderedDict()
        self._verified: set[int] = set()

    def read(self, positions: Sequence[int]) -> Batch:
        """Samples at `positions` (any integers >= 0, over any epochs): x [n, C, H, W] float32, y [n] int64.

        Raises:
            ValueError: a shard or member that is missing, damaged or unsafe, by name.
        """
        arrays = np.empty((len(positions), *self.index.shape), np.float32)
        labels = np.empty(len(positions), np.int64)
        for i, position in enumerate(positions):
            number, row = self._order.locate(position)
            shard = self._shard(number)
            mirrored = self.flip and int(philox(Use.FLIP, self.seed, position).random_raw()) >> 63 == 1
            if mirrored and shard.flipped is not None:
                arrays[i] = shard.flipped[row]
            else:
                arrays[i] = shard.arrays[row][..., ::-1] if mirrored else shard.arrays[row]
            labels[i] = shard.labels[row]
        if self.index.meta.kind == "moments":
            arrays = self._sample_moments(arrays, positions)
        x = (arrays - np.float32(self.index.meta.mean)) * np.float32(self.index.meta.scale)
        return Batch(torch.from_numpy(x), torch.from_numpy(labels), tuple(positions))

    def _sample_moments(self, moments: np.ndarray, positions: Sequence[int]) -> np.ndarray:
        mean, std = np.split(moments, 2, axis=1)
        eps = np.empty_like(mean)
        for i, position in enumerate(positions):
            generator = np.random.Generator(philox(Use.MOMENTS, self.seed, position))
            eps[i] = generator.standard_normal(eps.shape[1:], dtype=np.float32)
        return mean + std * eps

    def _shard(self, number: int) -> ShardArrays:
        if number in self._cache:
            self._cache.move_to_end(number)
            return self._cache[number]
        file = self.index.shards[number]
        _check_shard_file(self.index.folder, file)
        while len(self._cache) >= 2 * self.window:
            self._cache.popitem(last=False)
        shard = read_tar(
            self.index.folder / file.name,
            count=file.count,
            shape=self.index.shape,
            dtype=self.index.dtype,
            classes=self.index.meta.classes,
            flipped=self.flip and self.index.flips,
        )
        # After reading, so that an error that can name a member does; once a run, since it costs a pass over the file.
        if number not in self._verified and sha256(self.index.folder / file.name) != file.sha256:
            raise ValueError(f"shard {file.name} in {self.index.folder}: SHA-256 is not the index's ({file.sha256})")
        self._verified.add(number)
        self._cache[number] = shard
        return shard


class BatchStream(Iterator[list[Batch]]):
    """This rank's micro-batches, step after step without end, read ahead by one background thread.

    Step s is positions [s * batch, (s + 1) * batch); micro-step j of rank r holds `micro_batch` positions from
    s * batch + j * batch / accumulation + r * micro_batch. An error while reading ahead is raised by `next`.

    Args:
        reader: used by the background thread alone from here on.
        start_step: the first step returned; nothing before it is read.
        prefetch: steps held ready.
    """

    def __init__(
        self,
        reader: ShardReader,
        *,
        batch: int,
        micro_batch: int,
        accumulation: int,
        rank: int,
        world: int,
        start_step: int,
        prefetch: int = 2,
    ) -> None:
        assert micro_batch * world * accumulation == batch, (micro_batch, world, accumulation, batch)
        assert 0 <= rank < world and start_step >= 0 and prefetch >= 1, (rank, world, start_step, prefetch)
        self._reader, self._batch, self._micro_batch = reader, batch, micro_batch
        self._accumulation, self._rank = accumulation, rank
        self.step = start_step  # of the micro-batches that `next` returns next
        self._failure: BaseException | None = None
        self._stopped = threading.Event()
        self._ready: queue.Queue[list[Batch] | BaseException] = queue.Queue(prefetch)
        self._thread = threading.Thread(target=self._work, args=(start_step,), name="batch-stream", daemon=True)
        self._thread.start()

    def __next__(self) -> list[Batch]:
        """The next step's `accumulation` micro-batches; raises what the reader raised."""
        if self._stopped.is_set():
            raise RuntimeError("this batch stream is closed")
        item = self._failure or self._ready.get()
        if isinstance(item, BaseException):
            self._failure = item
            raise item
        self.step += 1
        return item

    def close(self) -> None:
        """Stop the thread; harmless when repeated."""
        self._stopped.set()
        self._thread.join()

    def __enter__(self) -> BatchStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _positions(self, step: int, micro_step: int) -> range:
        start = step * self._batch + micro_step * (self._batch // self._accumulation) + self._rank * self._micro_batch
        return range(start, start + self._micro_batch)

    def _work(self, step: int) -> None:
        while not self._stopped.is_set():
            try:
                item = [self._reader.read(self._positions(step, j)) for j in range(self._accumulation)]
            except BaseException as error:  # every error belongs to the caller: a thread that dies silently is a hang
                item = error
            self._offer(item)
            if isinstance(item, BaseException):
                return
            step += 1

    def _offer(self, item: list[Batch] | BaseException) -> None:
        while not self._stopped.is_set():
            try:
                return self._ready.put(item, timeout=0.1)
            except queue.Full:
                continue
