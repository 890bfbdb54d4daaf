"""What decides an encoded data set's bytes, and what a folder already holds of it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from diffmoe.data.encode_request import Request
from diffmoe.data.image_source import Source, describe_changes
from diffmoe.data.shards import INDEX_NAME, Encoding, ShardMeta, from_json, load_index
from diffmoe.data.vae import Vae
from diffmoe.data.values import Numbers, by_channel
from diffmoe.errors import UserError
from diffmoe.files import well_formed, write_text
from diffmoe.random_streams import Use, permutation

STATE_NAME, _PLAN_NAME = ".encode", "plan.json"
MEASURED: tuple[float, ...] = ()  # scale and mean by channel, before they are known


@dataclass(frozen=True)
class ShardRecord:
    """A finished shard: its tar (none if `count` is 0), addresses left out, the channels' sums."""

    number: int
    count: int
    bytes: int
    sha256: str
    skipped: tuple[str, ...]
    total: tuple[float, ...]
    squares: tuple[float, ...]


@dataclass(frozen=True)
class Plan:
    """All that decides the data set's bytes: equal plans, equal data sets."""

    meta: ShardMeta
    encoding: Encoding

    @cached_property
    def _order(self) -> np.ndarray:
        """The listing's numbers in the order in which they are written."""
        images, seed = self.encoding.images, self.encoding.shuffled
        if seed is None:
            return np.arange(images)
        return permutation(Use.ENCODE_ORDER, seed, 0, 0, images)

    def shard(self, number: int) -> list[int]:
        """The listing's numbers of a shard's images, in the shard's order."""
        size = self.encoding.samples_per_shard
        return self._order[number * size : (number + 1) * size].tolist()

    @property
    def shards(self) -> int:
        return -(-self.encoding.images // self.encoding.samples_per_shard)

    def check_same(self, other: Plan, where: Path | str) -> None:
        """UserError naming the first field in which `other`, found in `where`, differs; the VAE
        counts by its weights. What was left out decides no bytes; stamps are `_check_begun`'s.
        """
        pairs = ((self.encoding, other.encoding), (self.meta, other.meta))
        named = [(*pair, field.name) for pair in pairs for field in fields(pair[0])]
        named.sort(key=lambda each: each[2] != "features_sha256")  # which decides what batch means
        for ours, theirs, name in named:
            mine, found = getattr(ours, name), getattr(theirs, name)
            if mine == found or name in ("vae", "left_out", "source_stamps"):
                continue
            if name == "source_sha256":
                raise UserError(
                    f"source holds other images ({self.encoding.images}) than {where} was begun "
                    f"with ({other.encoding.images}): files were added, removed or renamed (or an "
                    "older version listed them otherwise); encode into another folder"
                )
            if name == "shuffled":
                option = "--no-shuffle" if found is None else f"--shuffle-seed {found}"
                raise UserError(
                    f"shuffled ({mine}) is not that of {where} ({found}; None: in the source's "
                    f"order, as older versions wrote): {option} resumes there, another folder "
                    "begins anew"
                )
            if MEASURED in (mine, found) and name == "scale":
                instead = "without" if mine == MEASURED else "with"
                raise UserError(f"{where} was begun {instead} --normalize channels: so resume it")
            raise UserError(
                f"{name} ({str(mine)[:80]}) is not that of {where} ({str(found)[:80]}): "
                "same settings and source to resume there, or another folder"
            )


def make_plan(request: Request, source: Source, vae: Vae | None, features_sha256: str = "") -> Plan:
    """The plan of a request for what its source holds."""
    encoding = Encoding(
        source.sha256,
        len(source.images),
        request.image_size,
        request.channels,
        vae=vae.name if vae else "",
        vae_sha256=vae.sha256 if vae else "",
        precision=request.precision if vae else "",
        batch=request.batch if vae or features_sha256 else 0,
        samples_per_shard=request.samples_per_shard,
        class_names=source.class_names,
        storage=request.storage if vae else "uint8",
        left_out=tuple(map(str, source.left_out)),
        shuffled=request.shuffle_seed,
        fp32_precision=request.fp32_precision,
        features_sha256=features_sha256,
    )
    if vae is None:
        return Plan(ShardMeta("pixels", source.classes, scale=1 / 127.5, mean=127.5), encoding)
    scale: Numbers = vae.scale if request.scale is None else request.scale
    mean: Numbers = vae.shift if request.shift is None else request.shift
    if request.normalize == "channels":
        scale = mean = MEASURED
    elif request.normalize:
        theirs = load_index(request.normalize, check_files=False).meta
        scale, mean = theirs.scale, theirs.mean
        for numbers in (scale, mean):
            by_channel(numbers, vae.latent_channels)  # UserError where they are another VAE's
    accept = request.accept_values
    meta = ShardMeta("moments", source.classes, scale=scale, mean=mean, accept_values=accept)
    return Plan(meta, encoding)


def tar_name(number: int) -> str:
    """The file name of shard ``number``."""
    return f"shard-{number:06d}.tar"


def open_folder(folder: Path, plan: Plan, source: Source) -> dict[int, ShardRecord] | None:
    """The shards finished in the folder under this plan (None: all, index included).

    Writes the plan into a fresh folder, and clears away what a killed run left half-written.
    UserError for a folder of another plan, or of something else.
    """
    state, path = folder / STATE_NAME, folder / STATE_NAME / _PLAN_NAME
    if (folder / INDEX_NAME).exists():
        index = load_index(folder)
        if index.encoding is None:
            raise UserError(f"out ({folder}) holds a finished data set that encode did not make")
        made = replace(index.encoding, channel_mean=(), channel_std=(), skipped=())
        meta = index.meta
        if meta.by_channel and meta.mean == index.encoding.channel_mean:
            meta = replace(meta, scale=MEASURED, mean=MEASURED)
        _check_begun(plan, Plan(meta, made), source, folder)
        return None
    state.mkdir(parents=True, exist_ok=True)
    tars, indexes = folder.glob(".shard-*.tar.*"), folder.glob(f".{INDEX_NAME}.*")
    for leftover in [*tars, *indexes, *state.glob(".*")]:
        leftover.unlink()
    if not path.exists():
        if others := [other.name for other in folder.iterdir() if other.name != STATE_NAME]:
            raise UserError(
                f"out ({folder}) must be empty, or begun by encode; it holds {others[0]}"
            )
        record = {"meta": plan.meta.record(), "encoding": asdict(plan.encoding)}
        write_text(path, json.dumps(record))
        return {}
    with well_formed(state):
        tree = json.loads(path.read_text())
        begun = Plan(ShardMeta.of(tree["meta"]), from_json(Encoding, tree["encoding"]))
        records = [
            from_json(ShardRecord, json.loads(path.read_text()))
            for path in sorted(state.glob("shard-*.json"))
        ]
    _check_begun(plan, begun, source, folder)
    return {record.number: record for record in records if _is_intact(folder, record)}


def _check_begun(plan: Plan, begun: Plan, source: Source, folder: Path) -> None:
    """UserError for another plan, or other sizes or times (old data sets have none) of files."""
    plan.check_same(begun, folder)
    now, before = plan.encoding.source_stamps, begun.encoding.source_stamps
    if before and now != before:
        changed = describe_changes(source, now, before)
        raise UserError(
            f"source changed since {folder} was begun, by size or time of writing: {changed}; "
            "encode into another folder, or bring back what was there (copies keep their times by "
            "cp -p or rsync -t)"
        )


def _is_intact(folder: Path, record: ShardRecord) -> bool:
    tar = folder / tar_name(record.number)
    return record.count == 0 or (tar.is_file() and tar.stat().st_size == record.bytes)
