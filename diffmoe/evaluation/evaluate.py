"""The evaluation run: N numbered images, sampled or given, measured against a reference; scores
with their card.

Image i has label, noise and batch-mates from its number alone: chunk c is images [c * batch, (c +
1) * batch), made together, by rank c modulo the number of ranks. So the scores of a checkpoint are
the same on any number of ranks, also under the routing rule that looks at the whole batch. A
finished chunk is a file `chunks/000012.npz` (images and features) that appears whole; to resume,
run the same command again, on as many ranks as there are. The folder must be one that all ranks
see, as for checkpoints. At the end the chunks become `samples.npz` in ADM's format, next to
`card.json` and `card.md`.

`settings.json` says what made the images and nothing of what they are compared with: another
reference, extractor or number of splits scores the images that are there.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import shutil
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from diffmoe.config import Config
from diffmoe.device import set_fp32_precision
from diffmoe.errors import UserError
from diffmoe.evaluation.card import (
    JSON_NAME,
    Card,
    Scores,
    find_card,
    hardware,
    read_card,
    versions,
    write_card,
)
from diffmoe.evaluation.decoding import Decoder
from diffmoe.evaluation.features import Extractor, Features, to_uint8
from diffmoe.evaluation.generate import generate
from diffmoe.evaluation.protocol import protocol
from diffmoe.evaluation.reference_statistics import (
    ImageSource,
    Reference,
    channels_first,
    open_images,
)
from diffmoe.evaluation.scores import NEIGHBOURS, precision_recall
from diffmoe.evaluation.tally import SPLIT_SIZE, Tally
from diffmoe.files import check_writable, replacing
from diffmoe.models.dit import DiT
from diffmoe.models.interchange import digest_note, weights_digest
from diffmoe.parallel.collectives import gather_stack, raise_together
from diffmoe.parallel.groups import Group
from diffmoe.progress import shown
from diffmoe.random_streams import Use, philox

SETTINGS_NAME, CHUNKS_NAME, SAMPLES_NAME = "settings.json", "chunks", "samples.npz"
_GIVEN_BATCH = 64  # of given images that pass the extractor together
_LABEL_WORD = 1  # second word of the sampling stream; the noise has 0
_OF_CHECKPOINT = (
    "checkpoint",
    "weights",
    "step",
    "weights_sha256",
    "family",
    "process",
    "vae",
    "vae_sha256",
    "latent_scale",
    "latent_shift",
    "cfg",
    "sampler",
    "steps",
    "sampling",
    "routing",
    "capacity",
    "gamma",
    "batch",
    "seed",
    "labels",
)

Labels = Literal["balanced", "random"]


@dataclass(frozen=True)
class Subject:
    """Whose images: the checkpoint's path and step, and which of its weights (`ema`, `ema:0.999` or
    `raw`).
    """

    checkpoint: str
    step: int
    weights: str


@dataclass(frozen=True)
class Images:
    """The numbered images that are scored: `count` of them, `batch` made together, of `size`
    (height, width).

    `make(numbers)` gives those of one batch, uint8 [n, 3, H, W]. `settings`: everything that makes
    them, as JSON knows it; a folder holds the images of one such tree. `card`: what a card says of
    them. `labels`: their classes, where they are sampled here; None where they were given, and can
    be read again.
    """

    count: int
    batch: int
    size: tuple[int, int]
    make: Callable[[range], Tensor]
    settings: dict
    card: dict
    labels: Callable[[], list[int]] | None = None

    @property
    def chunks(self) -> int:
        """How many batches."""
        return -(-self.count // self.batch)

    def numbers(self, chunk: int) -> range:
        """Those of the images in a batch."""
        return range(chunk * self.batch, min(self.count, (chunk + 1) * self.batch))


def sampled_images(
    model: DiT,
    config: Config,
    subject: Subject,
    count: int,
    labels: Labels,
    device: torch.device,
    decoder: Decoder | None = None,
) -> Images:
    """Images of a whole model: every rank holds all of it.

    Args:
        config: the run's, with `sample` and `run.seed` as wanted; `sample.batch` images are sampled
            together.
        labels: `balanced`: image i is of class i modulo classes; `random`: a uniform class from
            (seed, i).
        decoder: needed where the model samples latents.

    Raises:
        UserError: fewer than one image, latents without a decoder, or a decoder that does not fit
            them.
    """
    if count < 1:
        raise UserError(f"count ({count}) must be at least 1")
    set_fp32_precision(config.run.fp32_precision)
    classes, seed, precision = config.model.classes, config.run.seed, config.run.fp32_precision
    sample = {
        name: value
        for name, value in dataclasses.asdict(config.sample).items()
        if name != "columns"
    }
    made_by = {
        **dataclasses.asdict(subject),
        "weights_sha256": weights_digest(model),
        "seed": seed,
        "labels": labels,
        "fp32_precision": precision,
    }
    scaled_by = {
        "latent_scale": decoder and decoder.scale,
        "latent_shift": decoder and decoder.shift,
    }
    settings = {
        **made_by,
        **scaled_by,
        "count": count,
        "classes": classes,
        "sample": sample,
        "diffusion": dataclasses.asdict(config.diffusion),
        "decoder_sha256": decoder and decoder.sha256,
        "decoder": decoder and decoder.name,
    }
    card = {
        **made_by,
        **scaled_by,
        "family": config.model.family,
        "process": config.diffusion.process,
        "sampling": sample,
        "vae": decoder and decoder.name,
        "vae_sha256": decoder and decoder.sha256,
        **{
            name: sample[name]
            for name in ("cfg", "sampler", "steps", "routing", "capacity", "gamma", "batch")
        },
    }
    if config.sample.routing == "static":
        card["capacity"] = config.moe.capacity

    def make(numbers: range) -> Tensor:
        x = generate(model, config, class_labels(labels, numbers, classes, seed), numbers, device)
        if not torch.isfinite(x).all():
            raise UserError(
                f"{int((~torch.isfinite(x)).flatten(1).any(1).sum())} of {len(x)} samples are not finite"
            )
        return to_uint8(x) if decoder is None else decoder.function(x)

    return Images(
        count,
        config.sample.batch,
        image_size(config, decoder),
        make,
        json.loads(json.dumps(settings)),
        card,
        lambda: class_labels(labels, range(count), classes, seed),
    )


def given_images(source: ImageSource, count: int | None) -> Images:
    """The first `count` images of a source (None: all). UserError where it has fewer."""
    count = source.count if count is None else count
    if not 1 <= count <= source.count:
        raise UserError(
            f"count ({count}) must lie in 1..{source.count}, the images of {source.name}"
        )
    state = (
        hashlib.sha256()
    )  # other images under the same name are not those that a folder's scores are of
    for path in source.files:
        found = path.stat()
        state.update(f"{path} {found.st_size} {found.st_mtime_ns}\n".encode())
    settings = {"samples": source.name, "samples_state": state.hexdigest(), "count": count}
    return Images(
        count,
        _GIVEN_BATCH,
        source.size,
        lambda numbers: source.read(numbers.start, numbers.stop),
        settings,
        {**dict.fromkeys(_OF_CHECKPOINT), "samples": source.name},
    )


def image_size(config: Config, decoder: Decoder | None) -> tuple[int, int]:
    """(height, width) of the images that a model makes. UserError for latents without a decoder, or
    one that does not fit them.
    """
    channels, side = config.model.channels, config.model.input_size
    if decoder is not None:
        return tuple(decoder.function(torch.zeros(1, channels, side, side)).shape[2:])
    if channels not in (1, 3):
        raise UserError(
            f"model.channels ({channels}) are latents: a decoder is needed to score images"
        )
    return side, side


def check_plan(count: int, splits: int, size: tuple[int, int], extractor: Extractor) -> None:
    """UserError for what is known before an image is made: too few of them, splits outside
    1..count, or images of a `size` that is not for this extractor.
    """
    widths = extractor.widths(*size)
    for name in ("pool", "spatial"):
        if count < widths.get(name, 0) + 1:
            raise UserError(
                f"count ({count}) must be at least the {name} features' width + 1 ({widths[name] + 1})"
            )
    if count <= NEIGHBOURS:
        raise UserError(
            f"count ({count}) must be above {NEIGHBOURS}, or there is no precision and recall"
        )
    if not 1 <= splits <= count:
        raise UserError(f"splits ({splits}) must lie in 1..count ({count})")


def default_splits(count: int) -> int:
    """Of the Inception Score: one per 5,000 images."""
    return max(1, count // SPLIT_SIZE)


def check_evaluation(
    images: Images,
    extractor: Extractor,
    out: Path,
    world: Group,
    *,
    splits: int | None = None,
    keep_samples: bool = True,
) -> None:
    """All that `evaluate` can refuse before a reference is measured or an image made; makes no more
    than the folder `out`.

    Raises:
        AgreedError: too few images, wrong splits, `out` with other settings, or one that cannot be
            written.
    """
    problem: Exception | None = None
    try:
        check_plan(
            images.count,
            default_splits(images.count) if splits is None else splits,
            images.size,
            extractor,
        )
        if world.index == 0:
            _check_folder(out, images, extractor, keep_samples)
    except (OSError, UserError) as error:
        problem = error
    raise_together(problem, world)


def evaluate(
    images: Images,
    reference: Reference,
    extractor: Extractor,
    out: Path,
    world: Group,
    device: torch.device,
    *,
    splits: int | None = None,
    keep_samples: bool = True,
    progress: bool = False,
) -> Card | None:
    """Scores of images with their card, on rank 0; None elsewhere.

    Args:
        out: folder of the results; one that is half done with the same settings is completed, the
            card of a finished one is returned, and images that are there are scored by another
            reference, extractor or number of splits.
        splits: of the Inception Score; left out, one per 5,000 images.
        keep_samples: also write `samples.npz`: `arr_0` uint8 [N, H, W, 3], `arr_1` labels [N]
            (never of given images).

    Raises:
        UserError: as `check_evaluation`; images or features that are not finite, a reference of
            another width, or images that should be scored again and were not kept.
    """
    start = time.monotonic()
    check_evaluation(images, extractor, out, world, splits=splits, keep_samples=keep_samples)
    splits = default_splits(images.count) if splits is None else splits
    problem: Exception | None = None
    card: Card | None = None
    made = False
    try:
        check_widths(extractor.widths(*images.size), reference)
        if world.index == 0:
            card = find_card(out, (reference.sha256, extractor.sha256, splits))
            _claim(out, images, _settings(images, extractor, keep_samples), card is not None)
            made = (out / SAMPLES_NAME).is_file()
    except (OSError, UserError) as error:
        problem = error
    raise_together(problem, world)
    # Rank 0's word: another node may see a file a little later.
    found = torch.tensor([card is not None, made], dtype=torch.int64, device=device)
    finished, made = gather_stack(found, world)[0].tolist()
    if not finished:
        keep = keep_samples and images.labels is not None and not made
        images = _made_before(out, images) if made else images
        for index in _mine(images, world, progress):
            # Without waiting for the others: an error here ends this rank, and its launcher the
            # rest; chunks stay.
            _make_chunk(images, index, extractor, out, keep)
        raise_together(None, world)  # until every chunk is there
        scores = _scores(out, images, splits, reference, world, device)
        if world.index == 0:
            try:
                card = _card(
                    images,
                    splits,
                    scores,
                    reference,
                    extractor,
                    out,
                    world,
                    device,
                    time.monotonic() - start,
                )
                if keep:
                    _write_samples(out, images)
            except (OSError, UserError) as error:
                problem = error
        raise_together(problem, world)
    if world.index == 0:
        try:
            write_card(card, out)
        except (OSError, UserError) as error:
            problem = error
    raise_together(problem, world)
    if world.index != 0:
        return None
    shutil.rmtree(out / CHUNKS_NAME, ignore_errors=True)
    return card


def class_labels(kind: Labels, numbers: range, classes: int, seed: int) -> list[int]:
    """The classes of the images with these numbers, whatever rank or batch they are in."""
    if kind == "balanced":
        return [number % classes for number in numbers]
    return [
        int(philox(Use.SAMPLING, seed, number, _LABEL_WORD).random_raw()) % classes
        for number in numbers
    ]


def _settings(images: Images, extractor: Extractor, keep_samples: bool) -> dict:
    """What a folder that is not finished is of. Where images are not kept its chunks are features,
    and belong to their extractor.
    """
    if images.labels is None:
        return images.settings
    of_features = (
        {} if keep_samples else {"extractor": extractor.name, "extractor_sha256": extractor.sha256}
    )
    return {**images.settings, "keep_samples": keep_samples, **of_features}


def _check_folder(out: Path, images: Images, extractor: Extractor, keep_samples: bool) -> None:
    """UserError for a folder of other images, or one that cannot be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        check_writable(out / SETTINGS_NAME)
    except OSError as error:
        raise UserError(f"out ({out}) cannot be written: {error.strerror}") from error
    there, settings = _read_settings(out), _settings(images, extractor, keep_samples)
    if there is None:
        foreign = [name for name in (JSON_NAME, SAMPLES_NAME) if (out / name).exists()]
        if foreign:
            raise UserError(
                f"out ({out}) holds {foreign[0]} but no {SETTINGS_NAME}: choose another folder"
            )
        return
    names: list[str] = sorted(
        {*settings, *there}, key=lambda name: (name != "weights_sha256", name)
    )
    if (out / JSON_NAME).is_file():
        names = [name for name in names if name in images.settings]
        if settings.get("keep_samples") and not there.get("keep_samples"):
            raise UserError(
                f"out ({out}) holds scores of images that were not kept (--no-samples): choose another "
                "folder, or remove it"
            )
    for name in names:
        if settings.get(name) != there.get(name):
            both = name == "weights_sha256" and name in settings and name in there
            note = digest_note(str(there[name]), settings[name]) if both else ""
            raise UserError(
                f"out ({out}) was begun with {name} {there.get(name)!r}, this run has "
                f"{settings.get(name)!r}{note}: choose another folder, or remove it"
            )


def _read_settings(out: Path) -> dict | None:
    """What the folder is of; None where it is of nothing yet."""
    path = out / SETTINGS_NAME
    if not path.is_file():
        return None
    try:
        there = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(there, dict):
        raise UserError(f"{path} must hold an object, not {type(there).__name__}")
    return there


def _claim(out: Path, images: Images, settings: dict, finished: bool) -> None:
    """Take a folder that `_check_folder` found fit, to make images or score those that are there."""
    there = _read_settings(out)
    if there is None:
        with replacing(out / SETTINGS_NAME) as stream:
            stream.write(json.dumps(settings, indent=1).encode() + b"\n")
    elif (
        not finished
        and (out / JSON_NAME).is_file()
        and images.labels is not None
        and not there.get("keep_samples")
    ):
        raise UserError(
            f"out ({out}) holds scores by another reference, extractor or number of splits, of images that "
            "were not kept (--no-samples): choose another folder, or remove it"
        )
    (out / CHUNKS_NAME).mkdir(exist_ok=True)


def _made_before(out: Path, images: Images) -> Images:
    """The same images, read from the `samples.npz` that they were written to."""
    source = open_images(out / SAMPLES_NAME)
    if (source.count, source.size) != (images.count, images.size):
        raise UserError(
            f"{source.name} holds {source.count} images of {source.size}, not {images.count} of "
            f"{images.size}: choose another folder, or remove it"
        )
    return replace(images, make=lambda numbers: source.read(numbers.start, numbers.stop))


def _chunk_path(out: Path, index: int) -> Path:
    return out / CHUNKS_NAME / f"{index:06d}.npz"


def _mine(images: Images, world: Group, progress: bool) -> Iterator[int]:
    chunks = range(world.index, images.chunks, world.size)
    return shown(chunks, f"images, batches of {images.batch} on each rank", progress)


def _make_chunk(images: Images, index: int, extractor: Extractor, out: Path, keep: bool) -> None:
    """Unless it is there: a batch's features and its images' SHA-256s [n, 32], with the images
    where they are to be kept.
    """
    path, numbers = _chunk_path(out, index), images.numbers(index)
    if path.is_file() and str(_read_chunk(path, "extractor").get("extractor")) == extractor.sha256:
        return
    there = _read_chunk(path, "images") if path.is_file() else {}
    try:
        made = channels_first(there["images"]) if "images" in there else images.make(numbers)
        features = extractor(made)
    except UserError as error:
        raise UserError(f"images {numbers.start}..{numbers.stop - 1}: {error}") from error
    kept = {"images": made.permute(0, 2, 3, 1).numpy()} if keep else {}
    hashes = [hashlib.sha256(image.numpy()).digest() for image in made.contiguous()]
    with replacing(path) as stream:
        np.savez(
            stream,
            **features.parts(),
            sha256=np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 32),
            extractor=np.array(extractor.sha256),
            **kept,
        )


def check_widths(widths: dict[str, int], reference: Reference) -> None:
    """Raises UserError where another network measured the reference."""
    for name, gaussian in (("pool", reference.pool), ("spatial", reference.spatial)):
        if gaussian is not None and len(gaussian.mean) != widths.get(name, len(gaussian.mean)):
            raise UserError(
                f"{name} features have width {widths[name]}, the reference's {len(gaussian.mean)}: it was "
                "measured with another extractor"
            )


def _read_chunk(path: Path, *names: str) -> dict[str, np.ndarray]:
    """Those arrays of these names that a chunk has."""
    try:
        with np.load(path, allow_pickle=False) as chunk:
            return {name: chunk[name] for name in names if name in chunk.files}
    except FileNotFoundError:
        raise UserError(f"chunk {path} is missing: all ranks must see the same folder") from None
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"chunk {path} is damaged ({error}): remove it and run again") from None


def _scores(
    out: Path, images: Images, splits: int, reference: Reference, world: Group, device: torch.device
) -> Scores | None:
    """The scores on rank 0, None elsewhere: moments and sums of every rank's share of the chunks,
    added over ranks.
    """
    problem: Exception | None = None
    tally = scores = None
    try:
        tally = _share(out, images, splits, world)
    except UserError as error:
        problem = error
    raise_together(problem, world)
    tally.add_ranks(world, device)
    if world.index == 0:
        try:
            precision = (None, None)
            if reference.features is not None:
                precision = precision_recall(reference.features, _column(out, images, "pool"))
            scores = tally.scores(reference, *precision)
        except UserError as error:
            problem = error
    raise_together(problem, world)
    return scores


def _share(out: Path, images: Images, splits: int, world: Group) -> Tally:
    """Of this rank's chunks. A rank without any reads the first and counts none of it."""
    tally = Tally(images.count, splits)
    mine = range(world.index, images.chunks, world.size)
    for index in mine or [0]:
        path, numbers = _chunk_path(out, index), images.numbers(index)
        read = _read_chunk(path, "pool", "spatial", "probabilities")
        if "pool" not in read:
            raise UserError(f"chunk {path} is damaged (no pool features): remove it and run again")
        for name, value in read.items():
            if len(value) != len(numbers):
                raise UserError(f"chunk {path}: {name} {value.shape} must have {len(numbers)} rows")
        tally.add(Features(**read), numbers if mine else range(0))
    return tally


def _column(out: Path, images: Images, name: str) -> np.ndarray:
    """One array of all chunks, in the images' order."""
    return np.concatenate(
        [_read_chunk(_chunk_path(out, index), name)[name] for index in range(images.chunks)]
    )


def _write_samples(out: Path, images: Images) -> None:
    """ADM's npz, written chunk by chunk: 50,000 images of 256 x 256 are 10 GB and need not fit into
    memory.
    """
    with (
        replacing(out / SAMPLES_NAME) as stream,
        zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive,
    ):
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(
                member,
                {"descr": "|u1", "fortran_order": False, "shape": (images.count, *images.size, 3)},
            )
            for index in range(images.chunks):
                member.write(
                    np.ascontiguousarray(_read_chunk(_chunk_path(out, index), "images")["images"])
                )
        with archive.open("arr_1.npy", "w") as member:
            np.lib.format.write_array(member, np.array(images.labels(), np.int64))


def _card(
    images: Images,
    splits: int,
    scores: Scores,
    reference: Reference,
    extractor: Extractor,
    out: Path,
    world: Group,
    device: torch.device,
    seconds: float,
) -> Card:
    """UserError where the images are not those that an earlier card of this folder is of."""
    digest = hashlib.sha256(_column(out, images, "sha256").tobytes()).hexdigest()
    if (out / JSON_NAME).is_file():
        before = read_card(out / JSON_NAME).images_sha256
        if before not in (None, digest):
            shutil.rmtree(out / CHUNKS_NAME, ignore_errors=True)  # features of the wrong images
            raise UserError(
                f"out ({out}): its images (SHA-256 {digest[:12]}) are not those of {JSON_NAME} "
                f"({before[:12]}): choose another folder, or remove it"
            )
    card = Card(
        scores=scores,
        **images.card,
        count=images.count,
        splits=splits,
        reference=reference.source,
        reference_sha256=reference.sha256,
        reference_count=reference.count,
        extractor=extractor.name,
        extractor_sha256=extractor.sha256,
        ranks=world.size,
        hardware=hardware(device),
        versions=versions(),
        time=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        seconds=round(seconds, 1),
        images_sha256=digest,
    )
    return replace(card, protocol=protocol(card))
