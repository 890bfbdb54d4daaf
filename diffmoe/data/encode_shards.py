"""Images to shards, of VAE moments or of pixels: on any number of ranks, and after a kill at any
moment, the same bytes.

The listing is written in a seeded permutation (or as it is). Position i of that order belongs to
shard i // samples_per_shard, whether its image can be decoded or not, and goes through the VAE in a
batch of one fixed shape. So a shard's bytes depend on its own images alone: not on the ranks, nor
on what happened before. A shard counts once its record `.encode/shard-000012.json` is there,
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
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from diffmoe.data.encode_plan import (
    MEASURED,
    STATE_NAME,
    Plan,
    ShardRecord,
    make_plan,
    open_folder,
    tar_name,
)
from diffmoe.data.encode_request import Request
from diffmoe.data.image_source import Source, file_stamps
from diffmoe.data.images import BadImage, read_image
from diffmoe.data.listing import list_source, read_class_names
from diffmoe.data.meaning import ACCEPT, ENOUGH_ARRAYS, scale_fault
from diffmoe.data.members import FEATURES
from diffmoe.data.patch_features import PatchNetwork, load_patch_network
from diffmoe.data.shards import INDEX_NAME, ShardIndex, load_index, write_index
from diffmoe.data.tar import ShardFile, write_tar
from diffmoe.data.vae import Vae, encode_moments, load_vae
from diffmoe.data.values import channel_sums, mean_and_std, to_float
from diffmoe.device import set_fp32_precision
from diffmoe.errors import UserError
from diffmoe.files import sha256, write_text
from diffmoe.parallel.collectives import AgreedError, agreed, gather_objects
from diffmoe.parallel.groups import Group

_REPORT_SECONDS = 10.0
Images = Generator[np.ndarray | BadImage, None, None]


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
            too many bad images.
    """

    with agreed(group):
        source = list_source(
            request.source,
            request.classes,
            class_names=read_class_names(request.class_names) if request.class_names else (),
            allow_empty=request.allow_empty_classes,
            first_class=request.first_class,
        )
        vae = _load_vae(request, device)
        features = None
        if request.features is not None:
            sizes = request.channels, request.image_size
            features = load_patch_network(request.features, *sizes, device)
        plan = make_plan(request, source, vae, features.sha256 if features else "")
        records: dict[int, ShardRecord] | None = {}
        if group.index == 0:
            stamps = file_stamps(source, request.workers)
            plan = replace(plan, encoding=replace(plan.encoding, source_stamps=stamps))
            records = open_folder(request.out, plan, source)
    openings = gather_objects((plan, records), group)
    for rank, (other, _) in enumerate(openings):
        plan.check_same(other, f"rank {rank}")
    plan, records = openings[0]
    report(f"encode: classes {source.describe_classes()}")
    for left in source.left_out:
        report(f"encode: left out, {left}")
    if records is None:
        report(f"encode: {request.out} is finished already")
        index = load_index(request.out)
    else:
        encoder = _Encoder(request, plan, source, vae, features, records, group, report)
        encoder.encode_pending()
        index = encoder.index()
    with agreed(group):
        if group.index == 0:
            _finish(request.out, index)
    return index


def _load_vae(request: Request, device: torch.device) -> Vae | None:
    if request.vae is None:
        return None
    set_fp32_precision(request.fp32_precision)
    torch.backends.cudnn.deterministic = True  # the same image gives the same bits every time
    if device.type == "cpu":
        torch.set_num_threads(1)  # sums depend on the number of threads: more cores, more ranks
    dtype = torch.bfloat16 if request.precision == "bf16" else torch.float32
    vae = load_vae(request.vae, device=device, dtype=dtype)
    if vae.factor == 0:
        raise UserError(
            f"vae ({vae.name}) is a decoder alone; for latents made elsewhere: inspect-data "
            "--write-index"
        )
    if request.image_size % vae.factor:
        raise UserError(
            f"image_size ({request.image_size}) must be divisible by {vae.factor}, the pixels a "
            f"latent of {vae.name}"
        )
    if request.channels != vae.channels:
        raise UserError(
            f"channels ({request.channels}) must be those of {vae.name} ({vae.channels})"
        )
    return vae


def _finish(folder: Path, index: ShardIndex) -> None:
    """Writes the index where it is missing, and clears the state away."""
    if not (folder / INDEX_NAME).exists():
        for shard in index.shards:
            path = folder / shard.name
            if not path.is_file() or path.stat().st_size != shard.bytes:
                raise UserError(
                    f"shard {shard.name} is not in {folder} as it was written; do all ranks see "
                    "the same folder?"
                )
        write_index(index)
    if (folder / STATE_NAME).exists():
        shutil.rmtree(folder / STATE_NAME)


@dataclass
class _Encoder:
    """Encodes the shards that `records` lacks, in rounds of one a rank, and adds them there."""

    request: Request
    plan: Plan
    source: Source
    vae: Vae | None
    features: PatchNetwork | None
    records: dict[int, ShardRecord]
    group: Group
    report: Callable[[str], None]

    def __post_init__(self) -> None:
        vae = self.vae
        self.channels = self.request.channels if vae is None else vae.latent_channels
        self.side = self.request.image_size // (1 if vae is None else vae.factor)
        self.done = self.resumed = sum(len(self.plan.shard(number)) for number in self.records)
        self.began = self.said = time.monotonic()

    def encode_pending(self) -> None:
        """Collective."""
        plan, group, records = self.plan, self.group, self.records
        pending = [number for number in range(plan.shards) if number not in records]
        if records:
            self.report(f"encode: {len(records)} of {plan.shards} shards are there already")
        mine = pending[group.index :: group.size]
        self._check_bad_share()  # what is left out is known, and the share may be a new one
        wanted = itertools.chain.from_iterable(plan.shard(number) for number in mine)
        with contextlib.closing(_read_ahead(self.source, wanted, self.request)) as images:
            for turn in range(-(-len(pending) // group.size)):
                # Agreed on every round: a rank that fails stops all at once, and none waits for
                # the slowest at the very end.
                with agreed(group):
                    record = self._shard(mine[turn], images) if turn < len(mine) else None
                fresh = [r for r in gather_objects(record, group) if r is not None]
                records.update((r.number, r) for r in fresh)
                self.done += sum(len(plan.shard(r.number)) for r in fresh)
                self._tick(0)
                self._check_bad_share()
                self._check_scale()
        self.said = 0.0
        self._tick(0)
        self._check_scale()  # where all shards were there

    def _tick(self, own: int) -> None:
        """Reports how far all ranks are, at most every few seconds. `own`: images of this rank in
        the round under way; the others are taken to be as far.
        """
        now, total = time.monotonic(), self.plan.encoding.images
        if now - self.said < _REPORT_SECONDS:
            return
        self.said = now
        done = min(total, self.done + own * self.group.size)
        rate = (done - self.resumed) / max(now - self.began, 1e-9)
        known = rate or done == total
        left = f"{(total - done) / (rate or 1):.0f} s" if known else "unknown"
        self.report(
            f"encode: {done} of {total} images ({done / total:.1%}), {rate:.1f} images/s, "
            f"{left} left, {len(self._skipped())} bad"
        )

    def _skipped(self) -> list[str]:
        """Addresses of the bad images, in the shards' order."""
        return [address for _, r in sorted(self.records.items()) for address in r.skipped]

    def _check_bad_share(self) -> None:
        skipped, lost = self._skipped(), self.source.lost
        bad, images = len(skipped) + lost, self.plan.encoding.images + lost
        if bad > self.request.bad_share * images:
            some = [", ".join(skipped[:3]) + ", …" * (len(skipped) > 3)] if skipped else []
            some += [f"left out, {left}" for left in self.source.left_out if left.bad]
            raise AgreedError(
                f"{bad} of {images} images are bad, more than bad_share "
                f"({self.request.bad_share}) allows: {'; '.join(some)}; fix them and encode into "
                "another folder, or allow more"
            )

    def _check_scale(self) -> None:
        """Soon, not after days: latents that `scale` does not bring near models' usual size."""
        if self.vae is None or self.plan.meta.by_channel:
            return
        if sum(r.count for r in self.records.values()) < ENOUGH_ARRAYS:
            return
        mean, std = self._statistics()
        std_of_all = float(np.sqrt(np.mean(np.square(std)) + np.var(mean)))
        if fault := scale_fault(std_of_all, self.plan.meta):
            raise AgreedError(
                f"{fault}; encode into another folder with about --scale {1 / std_of_all:.3g}, "
                f"{ACCEPT}"
            )

    def _shard(self, number: int, images: Iterator[np.ndarray | BadImage]) -> ShardRecord:
        """Writes a shard's tar, then its record. `images` gives this shard's next."""
        samples: dict[str, dict[str, object]] = {}
        skipped: list[str] = []
        sums = np.zeros((2, self.channels))
        shard, batch, kind = self.plan.shard(number), self.request.batch, self.plan.meta.kind
        for start in range(0, len(shard), batch):
            window = shard[start : start + batch]
            read = list(itertools.islice(images, len(window)))
            for i, image, arrays in zip(window, read, self._arrays(read), strict=True):
                address, label = self.source.images[i].address, self.source.images[i].label
                if isinstance(image, BadImage):
                    skipped.append(address)
                    print(f"bad image: {address}: {image}", file=sys.stderr, flush=True)
                    continue
                storage = self.plan.encoding.storage
                kinds = [name for name in arrays if name != FEATURES]
                values = [to_float(arrays[name], storage) for name in kinds]
                if not all(np.isfinite(value).all() for value in values):
                    raise UserError(f"image {address} has moments that are not finite in {storage}")
                if not np.isfinite(arrays.get(FEATURES, 0)).all():
                    raise UserError(f"image {address} has features not finite in float16")
                samples[f"{i:08d}"] = {"npy": arrays["npy"], "cls": label, **arrays}
                sums = sums + sum(channel_sums(value, kind) for value in values)
            self._tick(start + len(window))
        tar, size, digest = self.request.out / tar_name(number), 0, ""
        if samples:
            write_tar(tar, samples)
            size, digest = tar.stat().st_size, sha256(tar)
        total, squares = (tuple(map(float, row)) for row in sums)
        record = ShardRecord(number, len(samples), size, digest, tuple(skipped), total, squares)
        path = self.request.out / STATE_NAME / f"shard-{number:06d}.json"
        write_text(path, json.dumps(asdict(record)))
        return record

    def _arrays(self, read: list[np.ndarray | BadImage]) -> list[dict[str, np.ndarray]]:
        """Each image's arrays by extension (of no meaning for a bad one): uint8 [C, S, S], or
        moments [2L, s, s] and the flip's; and its features.
        """
        request, vae = self.request, self.vae
        # Always the full batch, zeros where no image is: kernels are chosen by shape, and so
        # neighbours cannot matter.
        size = request.image_size
        pixels = np.zeros((request.batch, request.channels, size, size), np.uint8)
        for slot, image in enumerate(read):
            if not isinstance(image, BadImage):
                pixels[slot] = image
        features: list[dict[str, np.ndarray]] = [{}] * len(read)
        if self.features is not None:
            features = [{FEATURES: each} for each in self.features(torch.from_numpy(pixels))]
        if vae is None:
            return [{"npy": array, **more} for array, more in zip(pixels[: len(read)], features)]
        x = torch.from_numpy(pixels).to(vae.device)
        moments, flipped = (
            _to_storage(encode_moments(vae, part), request.storage) for part in (x, x.flip(-1))
        )
        return [
            {"npy": moments[slot], "flip.npy": flipped[slot], **features[slot]}
            for slot in range(len(read))
        ]

    def _statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The channels' mean and standard deviation over the values of the shards so far."""
        ordered = [self.records[number] for number in sorted(self.records)]
        arrays = sum(record.count for record in ordered) * (1 if self.vae is None else 2)
        totals = np.sum([record.total for record in ordered], axis=0)
        squares = np.sum([record.squares for record in ordered], axis=0)
        return mean_and_std(np.array([totals, squares]), arrays * self.side**2)

    def index(self) -> ShardIndex:
        """The index of all shards."""
        ordered = [self.records[number] for number in range(self.plan.shards)]
        mean, std = self._statistics()
        meta = self.plan.meta
        if meta.scale == MEASURED:  # what does not vary stays at 0
            least = 1e-6 * max(std)
            scale = tuple(1 / deviation if deviation > least else 1.0 for deviation in std)
            meta = replace(meta, scale=scale, mean=mean)
        encoding = replace(
            self.plan.encoding, channel_mean=mean, channel_std=std, skipped=tuple(self._skipped())
        )
        files = [ShardFile(tar_name(r.number), r.count, r.bytes, r.sha256) for r in ordered]
        return ShardIndex(
            self.request.out,
            meta,
            (self.channels * (1 if self.vae is None else 2), self.side, self.side),
            encoding.storage,
            self.vae is not None,
            sum(file.count for file in files),
            tuple(file for file in files if file.count),
            encoding,
            features=self.features.shape if self.features else (),
        )


def _read_ahead(source: Source, numbers: Iterable[int], request: Request) -> Images:
    """Images of these numbers in order, read by threads: uint8 [C, S, S], or why there is none."""

    def read(number: int) -> np.ndarray | BadImage:
        image = source.images[number]
        try:
            return read_image(source, image, request.image_size, request.channels)
        except BadImage as error:
            return error

    waiting: deque[Future[np.ndarray | BadImage]] = deque()
    pool = ThreadPoolExecutor(request.workers, thread_name_prefix="images")
    try:
        for number in numbers:
            waiting.append(pool.submit(read, number))
            if len(waiting) > 4 * max(request.batch, request.workers):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _to_storage(moments: torch.Tensor, storage: str) -> np.ndarray:
    if storage == "float16":
        return moments.half().cpu().numpy()
    # numpy has no bfloat16.
    return moments.bfloat16().cpu().view(torch.int16).numpy().view(np.uint16)
