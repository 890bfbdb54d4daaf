"""Pictures to shards, of VAE moments or of pixels: on any number of ranks, and after a kill at any
moment, the same bytes.

The listing is written in a seeded permutation (or as it is). Position i of that order belongs to
shard i // samples_per_shard, whether its picture can be decoded or not, and goes through the VAE in
a batch of one fixed shape. So a shard's bytes depend on its own pictures alone: not on the ranks,
nor on what happened before. A shard counts once its record `.encode/shard-000012.json` is there,
written after the tar, both atomically; the index comes last and `.encode` goes. To resume, run the
same command again, on as many ranks as there are.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffmoe.data.encode_request import Request
from diffmoe.data.images import BadImage, read_picture
from diffmoe.data.listing import (
    Source,
    describe_changes,
    file_stamps,
    list_source,
    read_class_names,
)
from diffmoe.data.meaning import ACCEPT, ENOUGH_ARRAYS, scale_fault
from diffmoe.data.shards import (
    INDEX_NAME,
    Encoding,
    ShardIndex,
    ShardMeta,
    from_json,
    load_index,
    write_index,
)
from diffmoe.data.tar import ShardFile, replacing, sha256, write_tar
from diffmoe.data.vae import Vae, encode_moments, load_vae
from diffmoe.data.values import channel_sums, mean_and_std, to_float
from diffmoe.device import set_fp32_precision
from diffmoe.errors import UserError
from diffmoe.parallel.collectives import AgreedError, gather_objects, raise_together
from diffmoe.parallel.groups import Group
from diffmoe.random_streams import Use, permutation

STATE_NAME, PLAN_NAME = ".encode", "plan.json"
_REPORT_SECONDS = 10.0


@dataclass(frozen=True)
class ShardRecord:
    """A finished shard: its tar (none if `count` is 0), the addresses left out, and the channels'
    sums over its values.
    """

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
        return (
            np.arange(images) if seed is None else permutation(Use.ENCODE_ORDER, seed, 0, 0, images)
        )

    def shard(self, number: int) -> list[int]:
        """The listing's numbers of a shard's pictures, in the shard's order."""
        size = self.encoding.samples_per_shard
        return self._order[number * size : (number + 1) * size].tolist()

    @property
    def shards(self) -> int:
        return -(-self.encoding.images // self.encoding.samples_per_shard)

    def check_same(self, other: Plan, folder: Path) -> None:
        """UserError naming the first field in which `other`, found in `folder`, differs; the VAE
        counts by its weights. What was left out decides no bytes; stamps are `_check_stamps`'s.
        """
        for ours, theirs in ((self.encoding, other.encoding), (self.meta, other.meta)):
            for name in (
                f.name for f in fields(ours) if f.name not in ("vae", "left_out", "source_stamps")
            ):
                mine, found = getattr(ours, name), getattr(theirs, name)
                if mine != found and name == "source_sha256":
                    older = (
                        ""
                        if theirs.source_stamps
                        else (
                            ", or an older version listed them otherwise (folders "
                            "named by numbers, .bmp, .tif, .gif, keys with dots)"
                        )
                    )
                    raise UserError(
                        f"source holds other images ({ours.images}) than {folder} was begun with "
                        f"({theirs.images}): files were added, removed or renamed{older}; encode into "
                        "another folder"
                    )
                if mine != found and name == "shuffled":
                    option = "--no-shuffle" if found is None else f"--shuffle-seed {found}"
                    raise UserError(
                        f"shuffled ({mine}) is not that of {folder} ({found}; None: in the source's "
                        f"order, as older versions wrote): {option} goes on there, another folder begins "
                        "anew"
                    )
                if mine != found:
                    raise UserError(
                        f"{name} ({str(mine)[:80]}) is not that of {folder} ({str(found)[:80]}): "
                        "same settings and source to go on there, or another folder"
                    )


@dataclass
class Progress:
    """Says how far all ranks are, at most every few seconds; `done` counts pictures up to the last
    finished round.
    """

    report: Callable[[str], None]
    total: int
    done: int
    ranks: int
    began: float = field(default_factory=time.monotonic)
    said: float = field(default_factory=time.monotonic)
    fresh: int = 0
    bad: int = 0

    def tick(self, own: int, force: bool = False) -> None:
        """`own`: pictures of this rank in the round under way; the others are taken to be as far."""
        now = time.monotonic()
        if not force and now - self.said < _REPORT_SECONDS:
            return
        self.said = now
        done = min(self.total, self.done + own * self.ranks)
        rate = (self.fresh + done - self.done) / max(now - self.began, 1e-9)
        left = (
            "0 s"
            if done == self.total
            else f"{(self.total - done) / rate:.0f} s"
            if rate
            else "unknown"
        )
        self.report(
            f"encode: {done} of {self.total} images ({done / self.total:.1%}), {rate:.1f} images/s, {left} left, "
            f"{self.bad} bad"
        )

    def finish(self, images: int) -> None:
        """A round's end: `images` more are done, on all ranks."""
        self.done += images
        self.fresh += images
        self.tick(0)


def encode(
    request: Request, group: Group, device: torch.device, report: Callable[[str], None]
) -> ShardIndex:
    """Encode the source into `request.out`, or what is missing there; collective. Returns the
    index, on every rank.

    Args:
        group: the ranks; pending shards go to them in turn, and they agree after each one.
        report: takes the lines of progress, on rank 0.

    Raises:
        UserError: on every rank alike: a bad source, VAE or setting; a folder begun with others;
            too many bad pictures.
    """
    problem: Exception | None = None
    opening: tuple[Any, ...] | None = None
    records: dict[int, ShardRecord] | None = {}
    try:
        names = () if request.class_names is None else read_class_names(request.class_names)
        source = list_source(
            request.source,
            request.classes,
            class_names=names,
            allow_empty=request.allow_empty_classes,
            first_class=request.first_class,
        )
        vae = _load_vae(request, device)
        plan = _plan(request, source, vae)
        if group.index == 0:
            plan = replace(
                plan,
                encoding=replace(plan.encoding, source_stamps=file_stamps(source, request.workers)),
            )
            records = _open_folder(request.out, plan, source)
        opening = (plan, records)
    except (UserError, OSError) as error:
        problem = error
    raise_together(problem, group)
    openings = gather_objects(opening, group)
    for rank, (other, _) in enumerate(openings):
        plan.check_same(other, Path(f"rank {rank}"))
    plan, records = openings[0]
    report(f"encode: classes {source.describe_classes()}")
    for left in source.left_out:
        report(f"encode: left out, {left}")
    if records is None:
        report(f"encode: {request.out} is finished already")
        index = load_index(request.out)
    else:
        _encode_pending(request, plan, source, vae, records, group, report)
        index = _index(request, plan, vae, records)
    try:
        problem = None
        if group.index == 0:
            _finish(request.out, index, write=not (request.out / INDEX_NAME).exists())
    except (UserError, OSError) as error:
        problem = error
    raise_together(problem, group)
    return index


def _load_vae(request: Request, device: torch.device) -> Vae | None:
    if request.vae is None:
        return None
    set_fp32_precision(request.fp32_precision)
    torch.backends.cudnn.deterministic = True  # the same picture gives the same bits every time
    if device.type == "cpu":
        torch.set_num_threads(1)  # sums depend on the number of threads: more cores, more ranks
    vae = load_vae(
        request.vae,
        device=device,
        dtype=torch.bfloat16 if request.precision == "bf16" else torch.float32,
    )
    if request.image_size % vae.factor:
        raise UserError(
            f"image_size ({request.image_size}) must divide by {vae.factor}, the pixels a latent of {vae.name}"
        )
    if request.channels != vae.channels:
        raise UserError(
            f"channels ({request.channels}) must be those of {vae.name} ({vae.channels})"
        )
    return vae


def _plan(request: Request, source: Source, vae: Vae | None) -> Plan:
    if vae is None:
        meta = ShardMeta("pixels", source.classes, scale=1 / 127.5, mean=127.5)
    else:
        meta = ShardMeta(
            "moments",
            source.classes,
            scale=vae.scale if request.scale is None else request.scale,
            mean=vae.shift if request.shift is None else request.shift,
            accept_values=request.accept_values,
        )
    made_by = (
        ("", "", "", 0) if vae is None else (vae.name, vae.sha256, request.precision, request.batch)
    )
    return Plan(
        meta,
        Encoding(
            source.sha256,
            len(source.pictures),
            request.image_size,
            request.channels,
            *made_by,
            request.samples_per_shard,
            source.class_names,
            storage="uint8" if vae is None else request.storage,
            left_out=tuple(map(str, source.left_out)),
            shuffled=request.shuffle_seed,
            fp32_precision=request.fp32_precision,
        ),
    )


def _open_folder(folder: Path, plan: Plan, source: Source) -> dict[int, ShardRecord] | None:
    """Rank 0's look at the folder: the shards finished there under this plan (None: all, index
    included).

    Writes the plan into a fresh folder, and clears away what a killed run left half-written."""
    state = folder / STATE_NAME
    if (folder / INDEX_NAME).exists():
        index = load_index(folder)
        if index.encoding is None:
            raise UserError(f"out ({folder}) holds a finished data set that encode did not make")
        plan.check_same(
            Plan(index.meta, replace(index.encoding, channel_mean=(), channel_std=(), skipped=())),
            folder,
        )
        _check_stamps(source, plan.encoding, index.encoding, folder)
        return None
    state.mkdir(parents=True, exist_ok=True)
    for leftover in [
        *folder.glob(".shard-*.tar.*"),
        *folder.glob(f".{INDEX_NAME}.*"),
        *state.glob(".*"),
    ]:
        leftover.unlink()
    if not (state / PLAN_NAME).exists():
        strangers = [path.name for path in folder.iterdir() if path.name != STATE_NAME]
        if strangers:
            raise UserError(
                f"out ({folder}) must be empty, or begun by encode; it holds {strangers[0]}"
            )
        with replacing(state / PLAN_NAME) as stream:
            stream.write(
                json.dumps({"meta": plan.meta.record(), "encoding": asdict(plan.encoding)}).encode()
            )
        return {}
    try:
        tree = json.loads((state / PLAN_NAME).read_text())
        begun = Plan(ShardMeta.of(tree["meta"]), from_json(Encoding, tree["encoding"]))
        records = [
            from_json(ShardRecord, json.loads(path.read_text()))
            for path in sorted(state.glob("shard-*.json"))
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{state} is malformed: {type(error).__name__}: {error}") from error
    plan.check_same(begun, folder)
    _check_stamps(source, plan.encoding, begun.encoding, folder)
    return {record.number: record for record in records if _is_whole(folder, record)}


def _check_stamps(source: Source, now: Encoding, before: Encoding, folder: Path) -> None:
    """UserError for files of another size or time than when `folder` was begun; older data sets do
    not know.
    """
    if before.source_stamps and now.source_stamps != before.source_stamps:
        changed = describe_changes(source, now.source_stamps, before.source_stamps)
        raise UserError(
            f"source changed since {folder} was begun, by size or time of writing: {changed}; encode into "
            "another folder, or bring back what was there (copies keep their times by cp -p or rsync -t)"
        )


def _is_whole(folder: Path, record: ShardRecord) -> bool:
    tar = folder / _name(record.number)
    return record.count == 0 or (tar.is_file() and tar.stat().st_size == record.bytes)


def _name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def _encode_pending(
    request: Request,
    plan: Plan,
    source: Source,
    vae: Vae | None,
    records: dict[int, ShardRecord],
    group: Group,
    report: Callable[[str], None],
) -> None:
    """Encodes the shards that `records` lacks, in rounds of one shard a rank, and adds them there."""
    pending = [number for number in range(plan.shards) if number not in records]
    if records:
        report(f"encode: {len(records)} of {plan.shards} shards are there already")
    mine = pending[group.index :: group.size]
    progress = Progress(
        report,
        plan.encoding.images,
        sum(len(plan.shard(n)) for n in records),
        group.size,
        bad=sum(len(r.skipped) for r in records.values()),
    )
    _check_bad_share(
        request, plan, source, records
    )  # what is left out is known, and the share may be a new one
    ahead = 4 * max(request.batch, request.workers)
    wanted = itertools.chain.from_iterable(plan.shard(number) for number in mine)
    with contextlib.closing(_read_ahead(source, wanted, request, ahead)) as pictures:
        for turn in range(-(-len(pending) // group.size)):
            problem: Exception | None = None
            record = None
            try:
                if turn < len(mine):
                    record = _encode_shard(
                        request, plan, source, vae, mine[turn], pictures, progress
                    )
            except (UserError, OSError) as error:
                problem = error
            # Agreed on every round: a rank that fails stops all at once, and none waits for the
            # slowest at the very end.
            raise_together(problem, group)
            fresh = [r for r in gather_objects(record, group) if r is not None]
            records.update((r.number, r) for r in fresh)
            progress.bad = sum(len(r.skipped) for r in records.values())
            progress.finish(sum(len(plan.shard(r.number)) for r in fresh))
            _check_bad_share(request, plan, source, records)
            _check_scale(plan, vae, records)
    progress.tick(0, force=True)
    _check_scale(plan, vae, records)  # where all shards were there


def _check_bad_share(
    request: Request, plan: Plan, source: Source, records: dict[int, ShardRecord]
) -> None:
    skipped = [address for _, record in sorted(records.items()) for address in record.skipped]
    bad, images = len(skipped) + source.lost, plan.encoding.images + source.lost
    if bad > request.bad_share * images:
        some = [", ".join(skipped[:3]) + (", …" if len(skipped) > 3 else "")] if skipped else []
        some += [f"left out, {left}" for left in source.left_out if left.bad]
        raise AgreedError(
            f"{bad} of {images} images are bad, more than bad_share ({request.bad_share}) allows: "
            f"{'; '.join(some)}; mend them and encode into another folder, or allow more"
        )


def _check_scale(plan: Plan, vae: Vae | None, records: dict[int, ShardRecord]) -> None:
    """After the first shards, not after days: latents that `scale` does not bring near the size
    that models take.
    """
    if vae is None or sum(record.count for record in records.values()) < ENOUGH_ARRAYS:
        return
    mean, std = _statistics(plan, vae, records)
    whole = float(np.sqrt(np.mean(np.square(std)) + np.var(mean)))
    fault = scale_fault(whole, plan.meta)
    if fault:
        raise AgreedError(
            f"{fault}; encode into another folder with about --scale {1 / whole:.3g}, {ACCEPT}"
        )


def _read_ahead(
    source: Source, numbers: Iterable[int], request: Request, ahead: int
) -> Iterator[np.ndarray | BadImage]:
    """The pictures of these numbers in order, read by threads: uint8 [C, S, S] each, or why there
    is none.
    """

    def read(number: int) -> np.ndarray | BadImage:
        try:
            return read_picture(
                source, source.pictures[number], request.image_size, request.channels
            )
        except BadImage as error:
            return error

    waiting: deque[Future[np.ndarray | BadImage]] = deque()
    pool = ThreadPoolExecutor(request.workers, thread_name_prefix="pictures")
    try:
        for number in numbers:
            waiting.append(pool.submit(read, number))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _encode_shard(
    request: Request,
    plan: Plan,
    source: Source,
    vae: Vae | None,
    number: int,
    pictures: Iterator[np.ndarray | BadImage],
    progress: Progress,
) -> ShardRecord:
    """Writes a shard's tar, then its record. `pictures` gives this shard's next."""
    samples: dict[str, dict[str, object]] = {}
    skipped: list[str] = []
    sums = np.zeros((2, _channels(plan, vae)))
    shard = plan.shard(number)
    for start in range(0, len(shard), request.batch):
        window = shard[start : start + request.batch]
        read = list(itertools.islice(pictures, len(window)))
        for i, result in zip(window, read, strict=True):
            if isinstance(result, BadImage):
                skipped.append(source.pictures[i].address)
                print(f"bad image: {skipped[-1]}: {result}", file=sys.stderr, flush=True)
        for i, arrays in zip(window, _to_arrays(request, vae, read), strict=True):
            if arrays is not None:
                if vae and not all(
                    np.isfinite(to_float(array, request.storage)).all() for array in arrays.values()
                ):
                    raise UserError(
                        f"image {source.pictures[i].address} has moments that are not finite in {request.storage}"
                    )
                samples[f"{i:08d}"] = {
                    "npy": arrays["npy"],
                    "cls": source.pictures[i].label,
                    **arrays,
                }
                sums = sums + sum(
                    channel_sums(to_float(array, plan.encoding.storage), plan.meta.kind)
                    for array in arrays.values()
                )
        progress.tick(start + len(window))
    tar = request.out / _name(number)
    if samples:
        write_tar(tar, samples)
    record = ShardRecord(
        number,
        len(samples),
        tar.stat().st_size if samples else 0,
        sha256(tar) if samples else "",
        tuple(skipped),
        *(tuple(map(float, row)) for row in sums),
    )
    with replacing(request.out / STATE_NAME / f"shard-{number:06d}.json") as stream:
        stream.write(json.dumps(asdict(record)).encode())
    return record


def _to_arrays(
    request: Request, vae: Vae | None, read: list[np.ndarray | BadImage]
) -> list[dict[str, np.ndarray] | None]:
    """Each picture's arrays by extension (None: a bad one): uint8 [C, S, S], or moments [2L, s, s]
    and the flip's.
    """
    if vae is None:
        return [None if isinstance(result, BadImage) else {"npy": result} for result in read]
    # Always the full batch, zeros where no picture is: kernels are chosen by shape, and so
    # neighbours cannot matter.
    pixels = np.zeros(
        (request.batch, request.channels, request.image_size, request.image_size), np.uint8
    )
    for slot, result in enumerate(read):
        if not isinstance(result, BadImage):
            pixels[slot] = result
    x = torch.from_numpy(pixels).to(vae.model.device)
    moments, flipped = (
        _to_storage(encode_moments(vae, part), request.storage) for part in (x, x.flip(-1))
    )
    return [
        None if isinstance(result, BadImage) else {"npy": moments[slot], "flip.npy": flipped[slot]}
        for slot, result in enumerate(read)
    ]


def _to_storage(moments: torch.Tensor, storage: str) -> np.ndarray:
    if storage == "float16":
        return moments.half().cpu().numpy()
    return (
        moments.bfloat16().cpu().view(torch.int16).numpy().view(np.uint16)
    )  # numpy has no bfloat16


def _channels(plan: Plan, vae: Vae | None) -> int:
    return plan.encoding.image_channels if vae is None else vae.latent_channels


def _side(plan: Plan, vae: Vae | None) -> int:
    return plan.encoding.image_size // (1 if vae is None else vae.factor)


def _statistics(
    plan: Plan, vae: Vae | None, records: dict[int, ShardRecord]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The channels' mean and standard deviation over the values of these shards."""
    ordered = [records[number] for number in sorted(records)]
    values = (
        sum(record.count for record in ordered) * _side(plan, vae) ** 2 * (1 if vae is None else 2)
    )
    sums = np.array(
        [
            np.sum([getattr(record, name) for record in ordered], axis=0)
            for name in ("total", "squares")
        ]
    )
    return mean_and_std(sums, values)


def _index(
    request: Request, plan: Plan, vae: Vae | None, records: dict[int, ShardRecord]
) -> ShardIndex:
    ordered = [records[number] for number in range(plan.shards)]
    count = sum(record.count for record in ordered)
    mean, std = _statistics(plan, vae, records)
    encoding = replace(
        plan.encoding,
        channel_mean=mean,
        channel_std=std,
        skipped=tuple(address for record in ordered for address in record.skipped),
    )
    files = tuple(
        ShardFile(_name(r.number), r.count, r.bytes, r.sha256) for r in ordered if r.count
    )
    side = _side(plan, vae)
    shape = (_channels(plan, vae) * (1 if vae is None else 2), side, side)
    return ShardIndex(
        request.out,
        plan.meta,
        shape,
        plan.encoding.storage,
        vae is not None,
        count,
        files,
        encoding,
    )


def _finish(folder: Path, index: ShardIndex, write: bool) -> None:
    for shard in index.shards if write else ():
        path = folder / shard.name
        if not path.is_file() or path.stat().st_size != shard.bytes:
            raise UserError(
                f"shard {shard.name} is not in {folder} as it was written; do all ranks see the same folder?"
            )
    if write:
        write_index(index)
    if (folder / STATE_NAME).exists():
        shutil.rmtree(folder / STATE_NAME)
