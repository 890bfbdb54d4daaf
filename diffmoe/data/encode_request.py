"""What to encode, and how: checked before anything is opened, without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from diffmoe.errors import UserError

PRECISIONS = ("fp32", "bf16")
FP32_PRECISIONS = ("ieee", "tf32")
STORAGES = {"fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Request:
    """What to encode and how. `vae` None means pixels; `scale`, `shift` None mean the VAE's own;
    `normalize`: "channels" has mean and deviation of each channel measured in their place, a data
    set's place takes its numbers; `shuffle_seed` None leaves the images in the listing's order;
    `first_class` is the label of class 0 in tars; `features`: the file of a `patch_features`
    network, whose features of every image are written, too.

    Raises:
        UserError: a field out of its range, by name.
    """

    source: str
    out: Path
    image_size: int
    channels: int = 3
    vae: str | None = None
    precision: str = "fp32"
    batch: int = 32
    samples_per_shard: int = 1024
    workers: int = 4
    bad_share: float = 0.01
    scale: float | None = None
    shift: float | None = None
    classes: int | None = None
    storage: str = "float16"
    class_names: Path | None = None
    allow_empty_classes: bool = False
    accept_values: bool = False
    shuffle_seed: int | None = 0
    fp32_precision: str = "ieee"
    first_class: int = 0
    features: Path | None = None
    normalize: str = ""

    def __post_init__(self) -> None:
        choices = {"channels": (1, 3), "precision": PRECISIONS, "fp32_precision": FP32_PRECISIONS}
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in allowed:
                raise UserError(f"{name} ({value}) must be {' or '.join(map(str, allowed))}")
        if self.storage not in STORAGES.values():
            raise UserError(f"storage ({self.storage}) must be {' or '.join(STORAGES)}")
        lowest = {"image_size": 1, "batch": 1, "samples_per_shard": 1, "workers": 1}
        for name, least in (lowest | {"first_class": 0}).items():
            if getattr(self, name) < least:
                raise UserError(f"{name} ({getattr(self, name)}) must be at least {least}")
        if not 0 <= self.bad_share < 1:
            raise UserError(f"bad_share ({self.bad_share}) must lie in [0, 1)")
        if self.shuffle_seed is not None and not 0 <= self.shuffle_seed < 2**64:
            raise UserError(f"shuffle_seed ({self.shuffle_seed}) must lie in [0, 2^64)")
        for name in ("normalize", "scale", "shift", "accept_values"):
            value = getattr(self, name)
            if value not in (None, False, "") and self.vae is None:
                raise UserError(f"{name} ({value}) goes with vae (None): pixels become [-1, 1]")
            if self.normalize and name in ("scale", "shift") and value is not None:
                raise UserError(f"{name} ({value}) goes without normalize ({self.normalize})")
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{name} ({value}) must be finite")
        if self.fp32_precision != "ieee" and self.vae is None:
            raise UserError(
                f"fp32_precision ({self.fp32_precision}) goes with vae (None): pixels are copied"
            )
        source, out = Path(self.source).resolve(), self.out.resolve()
        if source.is_dir() and (out == source or source in out.parents):
            raise UserError(f"out ({self.out}) must not lie in source ({self.source})")
