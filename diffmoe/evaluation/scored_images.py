"""The numbered images that are scored: sampled from a checkpoint, or given.

Image i has label and noise from its number alone, and its batch-mates from its number and the
batch, whatever rank makes it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffmoe.config import Config, SampleConfig
from diffmoe.device import set_fp32_precision
from diffmoe.diffusion.guidance import Others
from diffmoe.errors import UserError
from diffmoe.evaluation.decoding import Decoder
from diffmoe.evaluation.features import to_uint8
from diffmoe.evaluation.generate import generate
from diffmoe.evaluation.image_sources import ImageSource
from diffmoe.models.dit import DiT
from diffmoe.models.logical import weights_digest
from diffmoe.random_streams import Use, philox

_GIVEN_BATCH = 64  # of given images that pass the extractor together
_LABEL_WORD = 1  # second word of the sampling stream; the noise has 0


@dataclass(frozen=True)
class Subject:
    """Whose images; `weights`: which of the checkpoint's (`ema`, `ema:0.999`, `raw`)."""

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
    settings: dict[str, Any]
    card: dict[str, Any]
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
    labels: str,
    device: torch.device,
    decoder: Decoder | None = None,
    others: Others = Others(),
) -> Images:
    """Images of a whole model, and of whole ``others`` where sampling needs them: every rank holds
    all of them.

    `config`: the run's, with `sample` and `run.seed` as wanted; `sample.batch` images are sampled
    together. `labels`: `balanced`: image i is of class i modulo classes; `random`: a uniform class
    from (seed, i). UserError for fewer than one image, latents without a decoder, or a decoder that
    does not fit them.
    """
    if count < 1:
        raise UserError(f"count ({count}) must be at least 1")
    set_fp32_precision(config.run.fp32_precision)
    classes, seed = config.model.classes, config.run.seed
    sample = _told(config.sample)
    made_by = {
        **dataclasses.asdict(subject),
        "weights_sha256": weights_digest(model),
        "seed": seed,
        "labels": labels,
        "fp32_precision": config.run.fp32_precision,
        "latent_scale": decoder and decoder.scale,
        "latent_shift": decoder and decoder.shift,
    }
    settings = {
        **made_by,
        "count": count,
        "classes": classes,
        "sample": sample,
        "diffusion": dataclasses.asdict(config.diffusion),
        "decoder_sha256": decoder and decoder.sha256,
        "decoder": decoder and decoder.name,
    }
    for role, other in others._asdict().items():
        if other is not None:
            settings[f"{role}_sha256"] = weights_digest(other)
    more = {"pair_sha256": settings["pair_sha256"]} if others.pair else {}
    if config.diffusion.time_shift != 1:  # moves the sampler's times, too
        more["time_shift"] = config.diffusion.time_shift
    fields = ("cfg", "sampler", "steps", "routing", "capacity", "gamma", "batch")
    card = {
        **made_by,
        **{name: sample[name] for name in fields},
        "guidance": config.sample.guidance,
        "family": config.model.family,
        "process": config.diffusion.process,
        "sampling": {**sample, **more},
        "vae": decoder and decoder.name,
        "vae_sha256": decoder and decoder.sha256,
        "guide_sha256": settings.get("guide_sha256"),
    }
    if config.sample.routing == "static":
        card["capacity"] = config.moe.capacity

    def make(numbers: range) -> Tensor:
        asked = class_labels(labels, numbers, classes, seed)
        x = generate(model, config, asked, numbers, device, others=others)
        if bad := int((~torch.isfinite(x)).flatten(1).any(1).sum()):
            raise UserError(f"{bad} of {len(x)} samples are not finite")
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


def _told(sample: SampleConfig) -> dict[str, Any]:
    """The section as settings and cards have it, without what makes no difference to the images,
    which older ones have none of.
    """
    unused = {
        "columns": True,
        "cfg_interval": sample.cfg == 1 or sample.cfg_interval is None,
        "guide": sample.cfg == 1 or sample.guide is None,
        "guide_capacity": not sample.guided_by_capacity,
        "pair": sample.pair is None,
        "dtype": sample.dtype == "fp32",
    }
    return {k: v for k, v in dataclasses.asdict(sample).items() if not unused.get(k)}


def given_images(source: ImageSource, count: int | None) -> Images:
    """The first `count` images of a source (None: all). UserError where it has fewer."""
    count = source.count if count is None else count
    if not 1 <= count <= source.count:
        raise UserError(
            f"count ({count}) must lie in 1..{source.count}, the images of {source.name}"
        )
    state = hashlib.sha256()  # other images under the same name are not those of a folder's scores
    for path in source.files:
        found = path.stat()
        state.update(f"{path} {found.st_size} {found.st_mtime_ns}\n".encode())
    settings = {"samples": source.name, "samples_state": state.hexdigest(), "count": count}
    make = lambda numbers: source.read(numbers.start, numbers.stop)
    return Images(count, _GIVEN_BATCH, source.size, make, settings, {"samples": source.name})


def image_size(config: Config, decoder: Decoder | None) -> tuple[int, int]:
    """(height, width) of a model's images.  UserError: latents without a decoder that fits."""
    channels, side = config.model.channels, config.model.input_size
    if decoder is not None:
        height, width = decoder.function(torch.zeros(1, channels, side, side)).shape[2:]
        return height, width
    if channels not in (1, 3):
        raise UserError(
            f"model.channels ({channels}) are latents: a decoder is needed to score images"
        )
    return side, side


def class_labels(kind: str, numbers: range, classes: int, seed: int) -> list[int]:
    """The classes of the images with these numbers, whatever rank or batch they are in."""
    if kind == "balanced":
        return [number % classes for number in numbers]
    draws = (philox(Use.SAMPLING, seed, number, _LABEL_WORD).random_raw() for number in numbers)
    return [int(draw) % classes for draw in draws]
