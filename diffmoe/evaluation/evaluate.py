"""The evaluation run: generate N images by number, measure them against a reference, write scores with their card.

Image i has label, noise and batch-mates from its number alone: chunk c is images [c * batch, (c + 1) * batch), sampled
together, by rank c modulo the number of ranks. So the scores of a checkpoint are the same on any number of ranks, also under
the routing rule that looks at the whole batch. A finished chunk is a file `chunks/000012.npz` (images and features) that
appears whole; to resume, run the same command again, on as many ranks as there are. The folder must be one that all ranks
see, as for checkpoints. At the end the chunks become `samples.npz` in ADM's format, next to `card.json` and `card.md`.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import shutil
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from diffmoe.config import Config
from diffmoe.data.tar import replacing
from diffmoe.device import set_fp32_precision
from diffmoe.errors import UserError
from diffmoe.evaluation.card import JSON_NAME, Card, Scores, card_from_json, hardware, versions, write_card
from diffmoe.evaluation.decoding import Decoder
from diffmoe.evaluation.features import Extractor, Features, to_uint8
from diffmoe.evaluation.generate import generate
from diffmoe.evaluation.reference_statistics import Gaussian, Reference
from diffmoe.evaluation.scores import precision_recall
from diffmoe.evaluation.tally import SPLIT_SIZE, Tally
from diffmoe.models.dit import DiT
from diffmoe.models.interchange import weights_digest
from diffmoe.parallel.collectives import gather_stack, raise_together
from diffmoe.parallel.groups import Group
from diffmoe.progress import shown
from diffmoe.random_streams import Use, philox

SETTINGS_NAME, CHUNKS_NAME, SAMPLES_NAME = "settings.json", "chunks", "samples.npz"
_LABEL_WORD = 1  # second word of the sampling stream; the noise has 0

Labels = Literal["balanced", "random"]


@dataclass(frozen=True)
class Subject:
    """Whose images: the checkpoint's path and step, and which of its weights (`ema`, `ema:0.999` or `raw`)."""

    checkpoint: str
    step: int
    weights: str


def evaluate(model: DiT, config: Config, subject: Subject, count: int, labels: Labels, reference: Reference,
             extractor: Extractor, out: Path, world: Group, device: torch.device, *, decoder: Decoder | None = None,
             splits: int | None = None, keep_samples: bool = True, progress: bool = False) -> Card | None:
    """Scores of `count` images of a whole model (every rank holds all of it) with their card, on rank 0; None elsewhere.

    Args:
        config: the run's, with `sample` and `run.seed` as wanted; `sample.batch` images are sampled together.
        labels: `balanced`: image i is of class i modulo classes; `random`: a uniform class from (seed, i).
        out: folder of the results; one that is half done with the same settings is completed, a finished one is returned.
        decoder: needed where the model samples latents.
        splits: of the Inception Score; left out, one per 5,000 images.
        keep_samples: also write `samples.npz`: `arr_0` uint8 [N, H, W, 3], `arr_1` labels [N].

    Raises:
        UserError: too few images, `out` with other settings, images or features that are not finite, or a reference of
            another width.
    """
    start = time.monotonic()
    set_fp32_precision(config.run.fp32_precision)
    splits = max(1, count // SPLIT_SIZE) if splits is None else splits
    settings = _settings(model, config, subject, count, labels, reference, extractor, decoder, splits, keep_samples)
    problem: Exception | None = None
    finished = False
    try:
        check_plan(config, count, reference, decoder, splits)
        finished = world.index == 0 and _claim(out, settings)
    except (OSError, UserError) as error:
        problem = error
    raise_together(problem, world)
    # Rank 0's word: another node may see a file a little later.
    finished = bool(gather_stack(torch.tensor([finished], dtype=torch.int64, device=device), world)[0])
    if not finished:
        for index in _mine(settings, world, progress):
            # Without waiting for the others: an error here ends this rank, and its launcher the rest; chunks stay.
            if not _chunk_path(out, index).is_file():
                _make_chunk(model, config, settings, index, reference, extractor, decoder, out, device)
        raise_together(None, world)  # until every chunk is there
        scores = _scores(out, settings, reference, world, device)
        if world.index == 0:
            try:
                if keep_samples:
                    _write_samples(out, settings)
                write_card(_card(config, settings, scores, reference, world, device, time.monotonic() - start), out)
            except (OSError, UserError) as error:
                problem = error
        raise_together(problem, world)
    if world.index != 0:
        return None
    shutil.rmtree(out / CHUNKS_NAME, ignore_errors=True)
    return card_from_json((out / JSON_NAME).read_text())


def class_labels(kind: Labels, numbers: range, classes: int, seed: int) -> list[int]:
    """The classes of the images with these numbers, whatever rank or batch they are in."""
    if kind == "balanced":
        return [number % classes for number in numbers]
    return [int(philox(Use.SAMPLING, seed, number, _LABEL_WORD).random_raw()) % classes for number in numbers]


def _settings(model: DiT, config: Config, subject: Subject, count: int, labels: Labels, reference: Reference,
              extractor: Extractor, decoder: Decoder | None, splits: int, keep_samples: bool) -> dict:
    """Everything that moves the scores, as JSON knows it: a folder holds the results of one such tree."""
    return json.loads(json.dumps({
        **dataclasses.asdict(subject), "weights_sha256": weights_digest(model), "seed": config.run.seed, "count": count,
        "fp32_precision": config.run.fp32_precision,
        "labels": labels, "classes": config.model.classes, "splits": splits, "keep_samples": keep_samples,
        "sample": {name: value for name, value in dataclasses.asdict(config.sample).items() if name != "columns"},
        "diffusion": dataclasses.asdict(config.diffusion), "reference_sha256": reference.sha256,
        "extractor": extractor.name, "extractor_sha256": extractor.sha256,
        "decoder_sha256": decoder and decoder.sha256, "decoder": decoder and decoder.name,
        "latent_scale": decoder and decoder.scale, "latent_shift": decoder and decoder.shift}))


def check_plan(config: Config, count: int, reference: Reference, decoder: Decoder | None, splits: int) -> None:
    """What can be known before hours of sampling."""
    widths = {"pool": reference.pool, "spatial": reference.spatial}
    for name, gaussian in widths.items():
        if gaussian is not None and count < len(gaussian.mean) + 1:
            raise UserError(f"count ({count}) must be at least the {name} features' width + 1 ({len(gaussian.mean) + 1})")
    if not 1 <= splits <= count:
        raise UserError(f"splits ({splits}) must lie in 1..count ({count})")
    if decoder is None and config.model.channels not in (1, 3):
        raise UserError(f"model.channels ({config.model.channels}) are latents: a decoder is needed to score images")


def _claim(out: Path, settings: dict) -> bool:
    """Take a folder for these settings, or find it taken for the same; whether it holds their finished results."""
    path = out / SETTINGS_NAME
    (out / CHUNKS_NAME).mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        if (out / JSON_NAME).exists():
            raise UserError(f"out ({out}) holds {JSON_NAME} but no {SETTINGS_NAME}: choose another folder")
        with replacing(path) as stream:
            stream.write(json.dumps(settings, indent=1).encode() + b"\n")
        return False
    try:
        there = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    there = {"fp32_precision": "ieee", **there}  # older ones do not say
    for name in sorted({*settings, *there}):
        if settings.get(name) != there.get(name):
            raise UserError(f"out ({out}) was begun with {name} {there.get(name)!r}, this run has {settings.get(name)!r}: "
                            "choose another folder, or remove it")
    return (out / JSON_NAME).is_file()


def _chunks(settings: dict) -> int:
    return -(-settings["count"] // settings["sample"]["batch"])


def _numbers(settings: dict, index: int) -> range:
    batch = settings["sample"]["batch"]
    return range(index * batch, min(settings["count"], (index + 1) * batch))


def _chunk_path(out: Path, index: int) -> Path:
    return out / CHUNKS_NAME / f"{index:06d}.npz"


def _mine(settings: dict, world: Group, progress: bool) -> Iterator[int]:
    chunks = range(world.index, _chunks(settings), world.size)
    return shown(chunks, f"images, batches of {settings['sample']['batch']} on each rank", progress)


def _make_chunk(model: DiT, config: Config, settings: dict, index: int, reference: Reference, extractor: Extractor,
                decoder: Decoder | None, out: Path, device: torch.device) -> None:
    numbers = _numbers(settings, index)
    labels = class_labels(settings["labels"], numbers, config.model.classes, config.run.seed)
    try:
        x = generate(model, config, labels, numbers, device)
        if not torch.isfinite(x).all():
            raise UserError(f"{int((~torch.isfinite(x)).flatten(1).any(1).sum())} of {len(x)} samples are not finite")
        images = to_uint8(x) if decoder is None else decoder.function(x)
        features = extractor(images)
    except UserError as error:
        raise UserError(f"images {numbers.start}..{numbers.stop - 1}: {error}") from error
    check_widths(features, reference)
    kept = {"images": images.permute(0, 2, 3, 1).numpy()} if settings["keep_samples"] else {}
    with replacing(_chunk_path(out, index)) as stream:
        np.savez(stream, **features.parts(), **kept)


def check_widths(features: Features, reference: Reference) -> None:
    """Raises UserError where another network measured the reference."""
    _check_width("pool", features.pool, reference.pool)
    if features.spatial is not None and reference.spatial is not None:
        _check_width("spatial", features.spatial, reference.spatial)


def _check_width(name: str, features: np.ndarray, reference: Gaussian) -> None:
    if features.shape[1] != len(reference.mean):
        raise UserError(f"{name} features have width {features.shape[1]}, the reference's {len(reference.mean)}: it was "
                        "measured with another extractor")


def _read_chunk(out: Path, index: int) -> Features:
    path = _chunk_path(out, index)
    try:
        with np.load(path, allow_pickle=False) as chunk:
            return Features(*(chunk[name] if name in chunk.files else None for name in ("pool", "spatial", "probabilities")))
    except FileNotFoundError:
        raise UserError(f"chunk {path} is missing: all ranks must see the same folder") from None
    except (KeyError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"chunk {path} is damaged ({error}): remove it and run again") from None


def _scores(out: Path, settings: dict, reference: Reference, world: Group, device: torch.device) -> Scores | None:
    """The scores on rank 0, None elsewhere: moments and sums of every rank's share of the chunks, added over ranks."""
    problem: Exception | None = None
    tally = scores = None
    try:
        tally = _share(out, settings, world)
    except UserError as error:
        problem = error
    raise_together(problem, world)
    tally.add_ranks(world, device)
    if world.index == 0:
        try:
            precision = (None, None)
            if reference.features is not None:
                chunks = [_read_chunk(out, index).pool for index in range(_chunks(settings))]
                precision = precision_recall(reference.features, np.concatenate(chunks))
            scores = tally.scores(reference, *precision)
        except UserError as error:
            problem = error
    raise_together(problem, world)
    return scores


def _share(out: Path, settings: dict, world: Group) -> Tally:
    """Of this rank's chunks. A rank without any reads the first and counts none of it."""
    tally = Tally(settings["count"], settings["splits"])
    mine = range(world.index, _chunks(settings), world.size)
    for index in mine or [0]:
        numbers = _numbers(settings, index) if mine else range(0)
        features = _read_chunk(out, index)
        for name, value in features.parts().items():
            if len(value) != len(_numbers(settings, index)):
                raise UserError(f"chunk {_chunk_path(out, index)}: {name} {value.shape} must have "
                                f"{len(_numbers(settings, index))} rows")
        tally.add(features, numbers)
    return tally


def _write_samples(out: Path, settings: dict) -> None:
    """ADM's npz, written chunk by chunk: 50,000 images of 256 x 256 are 10 GB and need not fit into memory."""
    with replacing(out / SAMPLES_NAME) as stream, zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            for index in range(_chunks(settings)):
                with np.load(_chunk_path(out, index), allow_pickle=False) as chunk:
                    images = chunk["images"]
                if index == 0:
                    shape = (settings["count"], *images.shape[1:])
                    np.lib.format.write_array_header_1_0(
                        member, {"descr": "|u1", "fortran_order": False, "shape": shape})
                member.write(np.ascontiguousarray(images).tobytes())
        with archive.open("arr_1.npy", "w") as member:
            labels = class_labels(settings["labels"], range(settings["count"]), settings["classes"], settings["seed"])
            np.lib.format.write_array(member, np.array(labels, np.int64))


def _card(config: Config, settings: dict, scores: Scores, reference: Reference, world: Group, device: torch.device,
          seconds: float) -> Card:
    sample = settings["sample"]
    return Card(
        scores=scores, checkpoint=settings["checkpoint"], weights=settings["weights"], step=settings["step"],
        weights_sha256=settings["weights_sha256"], family=config.model.family, process=config.diffusion.process,
        vae=settings["decoder"], vae_sha256=settings["decoder_sha256"], latent_scale=settings["latent_scale"], latent_shift=settings["latent_shift"],
        cfg=sample["cfg"], sampler=sample["sampler"], steps=sample["steps"], sampling=sample,
        routing=sample["routing"],
        capacity=config.moe.capacity if sample["routing"] == "static" else sample.get("capacity"),
        gamma=sample["gamma"], batch=sample["batch"], fp32_precision=config.run.fp32_precision,
        seed=settings["seed"], labels=settings["labels"], count=settings["count"], splits=settings["splits"],
        reference=reference.source, reference_sha256=reference.sha256, reference_count=reference.count,
        extractor=settings["extractor"], extractor_sha256=settings["extractor_sha256"], ranks=world.size,
        hardware=hardware(device), versions=versions(), time=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        seconds=round(seconds, 1))
