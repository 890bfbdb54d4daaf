"""The evaluation run: N numbered images, sampled or given, measured against a reference; scores
with their card.

Chunk c is images [c * batch, (c + 1) * batch), made together, by rank c modulo the number of ranks.
So the scores of a checkpoint are the same on any number of ranks, also under the routing rule that
looks at the whole batch. A finished chunk is a file `chunks/000012.npz` (images and features) that
appears whole; to resume, run the same command again, on as many ranks as there are. The folder must
be one that all ranks see, as for checkpoints. At the end the chunks become `samples.npz` in ADM's
format, next to `card.json` and `card.md`.

`settings.json` says what made the images and nothing of what they are compared with: another
reference, extractor or number of splits scores the images that are there.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import shutil
import time
import zipfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffmoe.config import DiffusionConfig
from diffmoe.errors import UserError
from diffmoe.evaluation.card import (
    JSON_NAME,
    Card,
    find_card,
    hardware,
    read_card,
    versions,
    write_card,
)
from diffmoe.evaluation.features import Extractor, Features
from diffmoe.evaluation.image_sources import UNREADABLE, channels_first, open_images
from diffmoe.evaluation.protocol import protocol
from diffmoe.evaluation.reference_statistics import Reference, check_enough
from diffmoe.evaluation.scored_images import Images
from diffmoe.evaluation.scores import NEIGHBOURS, Scores, Tally, default_splits, precision_recall
from diffmoe.files import check_writable, replacing, write_text
from diffmoe.models.logical import digest_note
from diffmoe.parallel.collectives import agreed, gather_objects, raise_together
from diffmoe.parallel.groups import Group
from diffmoe.progress import shown

SETTINGS_NAME, CHUNKS_NAME, SAMPLES_NAME = "settings.json", "chunks", "samples.npz"
_ANOTHER = "choose another folder, or remove it"


def check_plan(count: int, splits: int, size: tuple[int, int], extractor: Extractor) -> None:
    """UserError for too few images, splits outside 1..count, or a `size` of another network."""
    check_enough(f"count ({count})", count, extractor.widths(*size))
    if count <= NEIGHBOURS:
        raise UserError(
            f"count ({count}) must be above {NEIGHBOURS}, or there is no precision and recall"
        )
    if not 1 <= splits <= count:
        raise UserError(f"splits ({splits}) must lie in 1..count ({count})")


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
    than the folder `out`. AgreedError for too few images, wrong splits, `out` with other settings,
    or one that cannot be written.
    """
    with agreed(world):
        splits = default_splits(images.count) if splits is None else splits
        check_plan(images.count, splits, images.size, extractor)
        if world.index == 0:
            _check_folder(out, images, _settings(images, extractor, keep_samples))


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

    An `out` that is half done with the same settings is completed, the card of a finished one is
    returned, and images that are there are scored by another reference, extractor or number of
    `splits` (left out: one per 5,000 images). `keep_samples` also writes `samples.npz`: `arr_0`
    uint8 [N, H, W, 3], `arr_1` labels [N] (never of given images).

    Raises:
        UserError: as `check_evaluation`; images or features that are not finite, a reference of
            another width, or images that should be scored again and were not kept.
    """
    start = time.monotonic()
    check_evaluation(images, extractor, out, world, splits=splits, keep_samples=keep_samples)
    splits = default_splits(images.count) if splits is None else splits
    card: Card | None = None
    with agreed(world):
        reference.check_widths(extractor.widths(*images.size))
        if world.index == 0:
            card = find_card(out, (reference.sha256, extractor.sha256, splits))
            _claim(out, images, _settings(images, extractor, keep_samples), card is not None)
    # Rank 0's word: another node may see a file a little later.
    there = (card is not None, (out / SAMPLES_NAME).is_file())
    finished, made = gather_objects(there, world)[0]
    if not finished:
        keep = keep_samples and images.labels is not None and not made
        if made:
            images = _made_before(out, images)
        mine = range(world.index, images.chunks, world.size)
        what = f"images, batches of {images.batch} on each rank"
        for index in shown(mine, what, progress):
            # Without waiting for the others: an error here ends this rank, and its launcher the
            # rest; chunks stay.
            _make_chunk(images, index, extractor, out, keep)
        raise_together(None, world)  # until every chunk is there
        scores = _scores(out, images, splits, reference, world, device)
        with agreed(world):
            if scores is not None:
                digest = _digest_of_images(out, images)
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
                    seconds=round(time.monotonic() - start, 1),
                    images_sha256=digest,
                )
                card = replace(card, protocol=protocol(card))
                if keep:
                    _write_samples(out, images)
    with agreed(world):
        if card is not None:
            write_card(card, out)
    if card is not None:
        shutil.rmtree(out / CHUNKS_NAME, ignore_errors=True)
    return card


# The folder


def _settings(images: Images, extractor: Extractor, keep_samples: bool) -> dict[str, Any]:
    """What a folder is of.  Chunks without images are features and belong to an extractor."""
    if images.labels is None:
        return images.settings
    settings = {**images.settings, "keep_samples": keep_samples}
    if not keep_samples:
        settings |= {"extractor": extractor.name, "extractor_sha256": extractor.sha256}
    return settings


def _check_folder(out: Path, images: Images, settings: dict[str, Any]) -> None:
    """UserError for a folder of other images, or one that cannot be written."""
    check_writable(out / SETTINGS_NAME, f"out ({out})")
    there = _read_settings(out)
    if there is None:
        for name in (JSON_NAME, SAMPLES_NAME):
            if (out / name).exists():
                raise UserError(
                    f"out ({out}) holds {name} but no {SETTINGS_NAME}: choose another folder"
                )
        return
    if isinstance(there.get("diffusion"), dict):  # an older version had fewer fields
        fields = {**json.loads(json.dumps(asdict(DiffusionConfig()))), **there["diffusion"]}
        there = {**there, "diffusion": fields}
    names = sorted({*settings, *there}, key=lambda name: (name != "weights_sha256", name))
    if (out / JSON_NAME).is_file():  # finished: other images are refused, another extractor not
        names = [name for name in names if name in images.settings]
        if settings.get("keep_samples"):
            _check_kept(out, there)
    for name in names:
        begun, now = there.get(name), settings.get(name)
        if begun != now:
            note = digest_note(begun, now) if name == "weights_sha256" else ""
            raise UserError(
                f"out ({out}) was begun with {name} {begun!r}, this run has {now!r}{note}: "
                f"{_ANOTHER}"
            )


def _check_kept(out: Path, there: dict[str, Any]) -> None:
    if not there.get("keep_samples"):
        raise UserError(
            f"out ({out}) holds scores of images that were not kept (--no-samples): {_ANOTHER}"
        )


def _read_settings(out: Path) -> dict[str, Any] | None:
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


def _claim(out: Path, images: Images, settings: dict[str, Any], finished: bool) -> None:
    """Take a folder that `_check_folder` found fit."""
    there = _read_settings(out)
    if there is None:
        write_text(out / SETTINGS_NAME, json.dumps(settings, indent=1) + "\n")
    elif not finished and (out / JSON_NAME).is_file() and images.labels is not None:
        _check_kept(out, there)
    (out / CHUNKS_NAME).mkdir(exist_ok=True)


def _made_before(out: Path, images: Images) -> Images:
    """The same images, read from the `samples.npz` that they were written to."""
    source = open_images(out / SAMPLES_NAME)
    if (source.count, source.size) != (images.count, images.size):
        raise UserError(
            f"{source.name} holds {source.count} images of {source.size}, not {images.count} of "
            f"{images.size}: {_ANOTHER}"
        )
    return replace(images, make=lambda numbers: source.read(numbers.start, numbers.stop))


def _digest_of_images(out: Path, images: Images) -> str:
    """UserError where they are not those that an earlier card of this folder is of."""
    digest = hashlib.sha256(_column(out, images, "sha256").tobytes()).hexdigest()
    before = read_card(out / JSON_NAME).images_sha256 if (out / JSON_NAME).is_file() else None
    if before is not None and before != digest:
        shutil.rmtree(out / CHUNKS_NAME, ignore_errors=True)  # features of the wrong images
        raise UserError(
            f"out ({out}): its images (SHA-256 {digest[:12]}) are not those of {JSON_NAME} "
            f"({before[:12]}): {_ANOTHER}"
        )
    return digest


# Chunks


def _chunk_path(out: Path, index: int) -> Path:
    return out / CHUNKS_NAME / f"{index:06d}.npz"


def _make_chunk(images: Images, index: int, extractor: Extractor, out: Path, keep: bool) -> None:
    """Unless there: a batch's features, its images' SHA-256s [n, 32], images to be kept."""
    path, numbers = _chunk_path(out, index), images.numbers(index)
    there = _read_chunk(path, "extractor", "images") if path.is_file() else {}
    if str(there.get("extractor")) == extractor.sha256:
        return
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
            allow_pickle=False,
            **features.parts(),
            sha256=np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 32),
            extractor=np.array(extractor.sha256),
            **kept,
        )


def _read_chunk(path: Path, *names: str) -> dict[str, np.ndarray]:
    """Those arrays of these names that a chunk has."""
    try:
        with np.load(path, allow_pickle=False) as chunk:
            return {name: chunk[name] for name in names if name in chunk.files}
    except FileNotFoundError:
        raise UserError(f"chunk {path} is missing: all ranks must see the same folder") from None
    except UNREADABLE as error:
        raise UserError(f"chunk {path} is corrupt ({error}): remove it and run again") from None


def _scores(
    out: Path, images: Images, splits: int, reference: Reference, world: Group, device: torch.device
) -> Scores | None:
    """The scores on rank 0, None elsewhere; every rank sums its share of the chunks."""
    tally = Tally(images.count, splits)
    mine = range(world.index, images.chunks, world.size)
    with agreed(world):
        for index in mine or [0]:  # a rank without any reads the first and counts none of it
            path, numbers = _chunk_path(out, index), images.numbers(index)
            read = _read_chunk(path, "pool", "spatial", "probabilities")
            if "pool" not in read or any(len(value) != len(numbers) for value in read.values()):
                raise UserError(
                    f"chunk {path} is corrupt (not {len(numbers)} rows of features): remove it "
                    "and run again"
                )
            tally.add(Features(**read), numbers if mine else range(0))
    tally.add_ranks(world, device)
    scores = None
    with agreed(world):
        if world.index == 0:
            shares: tuple[float, float] | tuple[None, None] = (None, None)
            if reference.features is not None:
                shares = precision_recall(reference.features, _column(out, images, "pool"))
            scores = tally.scores(reference, *shares)
    return scores


def _column(out: Path, images: Images, name: str) -> np.ndarray:
    """One array of all chunks, in the images' order."""
    chunks = (_read_chunk(_chunk_path(out, index), name) for index in range(images.chunks))
    return np.concatenate([chunk[name] for chunk in chunks])


def _write_samples(out: Path, images: Images) -> None:
    """ADM's npz, chunk by chunk: 50,000 images of 256 x 256 are 10 GB."""
    assert images.labels is not None
    header = {"descr": "|u1", "fortran_order": False, "shape": (images.count, *images.size, 3)}
    with replacing(out / SAMPLES_NAME) as stream, zipfile.ZipFile(stream, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for index in range(images.chunks):
                rows = _read_chunk(_chunk_path(out, index), "images")["images"]
                member.write(rows.tobytes())
        with archive.open("arr_1.npy", "w") as member:
            np.lib.format.write_array(member, np.array(images.labels(), np.int64))
