"""A data set: a place with webdataset tars, and `index.json`, without which it is unfinished."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from diffmoe.data.meaning import Values, shape_fault
from diffmoe.data.members import Members
from diffmoe.data.rows import stored_dtype
from diffmoe.data.sources import is_remote, read_all, resolve
from diffmoe.data.tar import ShardFile, write_tar
from diffmoe.data.values import Numbers, to_float
from diffmoe.errors import UserError
from diffmoe.files import sha256, well_formed, write_text

FORMAT_VERSION = 1
INDEX_NAME = "index.json"
KINDS = ("pixels", "latents", "moments")
SPREADS = ("std", "logvar")
T = TypeVar("T")
# webdataset splits names at the first dot, skips __x__
_KEY = re.compile(r"(?!__)[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*")


@dataclass(frozen=True)
class ShardMeta:
    """What the stored arrays mean.

    `kind` "pixels": arrays [C, H, W], x = (array - mean) * scale, in [-1, 1]. `kind` "latents":
    arrays [C, H, W] that were drawn from a VAE's moments, x = (array - mean) * scale, std near 1.
    `kind` "moments": arrays [2C, H, W] (VAE mean, then VAE standard deviation, or, with `spread`
    "logvar", the logarithm of its square), x = (mu + std * eps - mean) * scale. `accept_values`:
    they are meant as they are, also where they look as if they meant something else (`meaning.py`).
    `scale` and `mean` of latents and moments may be lists, a number of each channel.
    """

    kind: str
    classes: int
    scale: Numbers = 1.0
    mean: Numbers = 0.0
    spread: str = "std"
    members: Members = Members()
    accept_values: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"kind ({self.kind!r}) must be one of {', '.join(KINDS)}")
        if self.spread not in SPREADS:
            raise UserError(f"spread ({self.spread!r}) must be one of {', '.join(SPREADS)}")
        if self.classes < 1:
            raise UserError(f"classes ({self.classes}) must be at least 1")
        if self.by_channel and self.kind == "pixels":
            raise UserError("scale and mean by channel go with latents and moments, not pixels")
        if not (np.isfinite(np.append(self.scale, self.mean)).all() and np.all(self.scale)):
            raise UserError(
                f"scale ({self.scale}) and mean ({self.mean}) must be finite, scale not 0"
            )

    @property
    def by_channel(self) -> bool:
        """Whether scale or mean are a number of each channel."""
        return isinstance(self.scale, tuple) or isinstance(self.mean, tuple)

    def record(self) -> dict:
        """The JSON form, without later fields that say nothing new: old fingerprints stay."""
        record = asdict(self)
        if self.members == Members():
            del record["members"]
        if not self.accept_values:
            del record["accept_values"]
        return record

    @staticmethod
    def of(record: dict) -> ShardMeta:
        """What `record` gave. TypeError where fields are missing or unknown."""
        return from_json(ShardMeta, record | {"members": Members(**record.get("members", {}))})


@dataclass(frozen=True)
class Encoding:
    """How `run.py encode` made a data set: all that decides its bytes, then what came of it.

    `vae` "" means pixels (`precision` "", `batch` 0). `images` counts the unusable ones in
    `skipped` (by address) as well. `channel_mean`, `channel_std`: of latents sampled from the
    moments (both mirror images), before shift and scale; of pixels as stored. `left_out` says what
    of the source was not taken, a line a reason; `source_stamps` are those of `listing.file_stamps`
    (none in older data sets). `shuffled`: seed of the permutation of the source in which samples
    were written (None: in its order). `features_sha256`: of the network that made the features.
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
    storage: str = "float16"
    left_out: tuple[str, ...] = ()
    source_stamps: tuple[str, ...] = ()
    shuffled: int | None = None
    fp32_precision: str = "ieee"
    features_sha256: str = ""


@dataclass(frozen=True)
class ShardIndex:
    """A finished data set. `shape` is the stored array's; `x_shape` is the model input's.

    `dtype` is numpy's name, or "bfloat16". `place` is where the tars are when that is not `folder`:
    an address with `{name}`. `features`: shape [N, d] of a sample's, () where it has none.
    """

    folder: Path
    meta: ShardMeta
    shape: tuple[int, ...]
    dtype: str
    flips: bool
    count: int
    shards: tuple[ShardFile, ...]
    encoding: Encoding | None = None
    place: str = ""
    features: tuple[int, ...] = ()

    def address(self, shard: ShardFile) -> str:
        """Path or URL of a shard's tar."""
        if self.place:
            return self.place.replace("{name}", shard.name)
        return str(self.folder / shard.name)

    @property
    def where(self) -> str:
        """The data set's place, for messages."""
        return self.place or str(self.folder)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes' names in order; none where the data set does not know them."""
        return self.encoding.class_names if self.encoding else ()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that training reads: what the arrays mean, and every shard's count
        and bytes in order. It does not depend on where the data set lies nor on what its files are
        called.
        """
        meta = replace(self.meta, accept_values=False).record()
        shards = [(s.count, s.sha256) for s in self.shards]
        content = [meta, list(self.shape), self.dtype, self.flips, shards]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def x_shape(self) -> tuple[int, int, int]:
        """Shape [C, H, W] of one training sample."""
        height, width, channels = self.shape
        if self.meta.members.layout == "chw":
            channels, height, width = self.shape
        return (channels // 2 if self.meta.kind == "moments" else channels, height, width)


def write_shards(
    samples: Iterable[tuple], folder: str | Path, *, samples_per_shard: int, meta: ShardMeta
) -> ShardIndex:
    """Write samples as shards and, last of all, the index; equal samples give equal bytes.

    Args:
        samples: (key, array [C, H, W] or [2C, H, W], label), or with a fourth item: the flipped
            image's latents or moments.
        folder: created where missing; must not hold a finished data set.
        samples_per_shard: samples in every shard but perhaps the last.
        meta: what the arrays mean.

    Raises:
        UserError: an existing index, no samples, a sample that does not fit the first one or
            `meta`, or values that cannot mean what `meta` says.
    """
    folder = Path(folder)
    if samples_per_shard < 1:
        raise UserError(f"samples_per_shard ({samples_per_shard}) must be at least 1")
    if (folder / INDEX_NAME).exists():
        raise UserError(
            f"folder ({folder}) already holds a finished data set; write to another or remove it"
        )
    if meta.members != Members():
        raise UserError(
            f"members ({meta.members}) describe tars of others; what is written here is {Members()}"
        )
    shards: list[ShardFile] = []
    values = Values(meta)
    first: tuple | None = None
    pending: dict[str, dict[str, object]] = {}

    def flush() -> None:
        values.check(str(folder))  # most faults show in the first shard, before anything is written
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"shard-{len(shards):06d}.tar"
        write_tar(path, pending)
        shards.append(ShardFile(path.name, len(pending), path.stat().st_size, sha256(path)))
        pending.clear()

    for sample in samples:
        first = first or sample
        members = _checked_members(sample, first, meta)
        for array in (sample[1], *sample[3:]):
            values.add(to_float(array, array.dtype.name))
        if sample[0] in pending:
            raise UserError(f"key ({sample[0]}) appears twice in shard {len(shards)}")
        pending[sample[0]] = members
        if len(pending) == samples_per_shard:
            flush()
    if first is None:
        raise UserError(f"samples (none) must not be empty: nothing written to {folder}")
    if pending:
        flush()
    array, count = first[1], sum(shard.count for shard in shards)
    flips = len(first) == 4
    index = ShardIndex(folder, meta, array.shape, array.dtype.name, flips, count, tuple(shards))
    write_index(index)
    return index


def write_index(index: ShardIndex) -> None:
    """Write `index.json`, which finishes the data set; atomic, equal indexes equal bytes."""
    record = {"format": FORMAT_VERSION, **asdict(index), "meta": index.meta.record()}
    del record["folder"], record["place"]
    if index.encoding is None:
        del record["encoding"]
    elif not index.encoding.features_sha256:  # later than the format: others stay byte for byte
        del record["encoding"]["features_sha256"]
    if not index.features:
        del record["features"]
    text = json.dumps(record, indent=1, sort_keys=True)
    write_text(index.folder / INDEX_NAME, text + "\n")


def _checked_members(sample: tuple, first: tuple, meta: ShardMeta) -> dict[str, object]:
    key, array, label, *flip = sample
    if not _KEY.fullmatch(key):
        raise UserError(
            f"key ({key!r}) must be letters, digits, '-', '_' and inner '/', and not start with "
            "'__'"
        )
    problem = ""
    if len(sample) != len(first):
        problem = f" has {len(sample)} items, the first sample has {len(first)}"
    elif flip and meta.kind == "pixels":
        problem = ": kind (pixels) takes no flipped array; pixels are mirrored when read"
    elif not 0 <= int(label) < meta.classes:
        problem = f": label ({label}) must lie in [0, classes) with classes {meta.classes}"
    for value in (array, *flip):
        if value.shape != first[1].shape or value.dtype != first[1].dtype:
            of_first = f"{first[1].dtype} {first[1].shape}"
            problem = f" is {value.dtype} {value.shape}, the first is {of_first}"
        elif value.ndim != 3 or (meta.kind == "moments" and value.shape[0] % 2):
            problem = f": shape {value.shape} does not fit kind {meta.kind} ([C,H,W] or [2C,H,W])"
        elif value.dtype.kind != "f" and not (meta.kind == "pixels" and value.dtype == np.uint8):
            problem = f": dtype ({value.dtype}) must be a float, or uint8 for pixels"
        elif not np.isfinite(value).all():
            problem = " holds values that are not finite"
        elif fault := shape_fault(array.shape, meta):
            problem = f": {fault}, which here means array.transpose(2, 0, 1)"
    if problem:
        raise UserError(f"sample {key}{problem}")
    members = {"npy": np.ascontiguousarray(array), "cls": int(label)}
    return members | ({"flip.npy": np.ascontiguousarray(flip[0])} if flip else {})


def load_index(path: str | Path, index_at: str = "", check_files: bool = True) -> ShardIndex:
    """The index of a data set; where that is a local one, every shard's size is checked.

    Args:
        path: its folder, its index.json, or tars of it (path, glob, braces, `pipe:`): then only
            those. URLs alike.
        index_at: path or URL of index.json where it does not lie beside the shards.
        check_files: whether missing shards, or shards of another size, are an error.

    Raises:
        UserError: no such folder, no or malformed index.json, a missing shard, or a shard of
            another size.
    """
    place, names = resolve(str(path))
    remote = is_remote(place)
    folder = Path() if remote else Path(place).parent
    index_at = index_at or place.replace("{name}", INDEX_NAME)
    if not remote and not folder.is_dir():
        raise UserError(f"data folder ({folder}) does not exist")
    if not is_remote(index_at) and not Path(index_at).is_file():
        tars = ""
        if any(folder.glob("*.tar")):
            tars = " (tars of others get one by `run.py inspect-data --write-index`)"
        raise UserError(
            f"data folder ({Path(index_at).parent}) has no {Path(index_at).name}: no data set, or "
            f"unfinished{tars}"
        )
    text = read_all(index_at)
    with well_formed(index_at):
        index = _parse(json.loads(text), folder, place if remote else "")
    if names is not None:
        index = _pick(index, names)
    for shard in index.shards:
        if Path(shard.name).name != shard.name:
            raise UserError(f"{index_at}: shard name ({shard.name!r}) must be a plain file name")
        if not check_files or remote:
            continue
        if not (folder / shard.name).is_file():
            raise UserError(f"shard {shard.name} is missing from {folder}")
        size = (folder / shard.name).stat().st_size
        if size != shard.bytes:
            raise UserError(
                f"shard {shard.name} in {folder} has {size} bytes, its index says {shard.bytes}"
            )
    return index


def _parse(record: dict, folder: Path, place: str) -> ShardIndex:
    if record["format"] != FORMAT_VERSION:
        raise UserError(
            f"format ({record['format']}) is not the one this program reads ({FORMAT_VERSION})"
        )
    shards = tuple(ShardFile(**shard) for shard in record["shards"])
    index = ShardIndex(
        folder,
        ShardMeta.of(record["meta"]),
        tuple(record["shape"]),
        record["dtype"],
        record["flips"],
        record["count"],
        shards,
        from_json(Encoding, record["encoding"]) if "encoding" in record else None,
        place,
        tuple(record.get("features", ())),
    )
    stored_dtype(index.dtype)
    moments, total = index.meta.kind == "moments", sum(shard.count for shard in shards)
    if index.dtype == "bfloat16" and index.meta.kind == "pixels":
        raise UserError("dtype (bfloat16) goes with kind moments or latents, not pixels")
    if len(index.shape) != 3:
        raise UserError(f"shape ({index.shape}) must have three numbers")
    if moments and index.shape[0 if index.meta.members.layout == "chw" else 2] % 2:
        raise UserError(
            f"shape ({index.shape}) must have an even number of channels for kind moments"
        )
    if index.count != total or index.count < 1:
        raise UserError(
            f"count ({index.count}) must be positive and the sum over its shards ({total})"
        )
    return index


def _pick(index: ShardIndex, names: tuple[str, ...]) -> ShardIndex:
    """The data set of these shards alone, in the index's order."""
    if unknown := set(names) - {shard.name for shard in index.shards}:
        raise UserError(f"shard {min(unknown)} is not in the index of {index.where}")
    shards = tuple(shard for shard in index.shards if shard.name in names)
    made = index.encoding
    if made:  # its statistics are of all shards
        made = replace(made, channel_mean=(), channel_std=())
    return replace(index, shards=shards, count=sum(shard.count for shard in shards), encoding=made)


def from_json(kind: type[T], record: dict) -> T:
    """A dataclass of plain values from its JSON. TypeError for missing or unknown fields."""
    lists = {name: tuple(value) for name, value in record.items() if isinstance(value, list)}
    return kind(**(record | lists))
