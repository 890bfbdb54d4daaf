"""The verb `encode`: its command line. The work is in `encode_shards`; torch comes in once the command line is good."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

from launcher.environment import RankEnvironment

PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class Request:
    """What the command line asks for. `vae` None means pixels; `scale`, `shift` None mean the VAE's own.

    Raises:
        ValueError: a field out of its range, by name.
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

    def __post_init__(self) -> None:
        for name in ("image_size", "batch", "samples_per_shard", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        if self.channels not in (1, 3):
            raise ValueError(f"channels ({self.channels}) must be 1 or 3")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision ({self.precision!r}) must be one of {', '.join(PRECISIONS)}")
        if not 0 <= self.bad_share < 1:
            raise ValueError(f"bad_share ({self.bad_share}) must lie in [0, 1)")
        for name in ("scale", "shift"):
            value = getattr(self, name)
            if value is not None and self.vae is None:
                raise ValueError(f"{name} ({value}) goes with vae (None): pixels become [-1, 1]")
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{name} ({value}) must be finite")
        source, out = Path(self.source).resolve(), self.out.resolve()
        if source.is_dir() and (out == source or source in out.parents):
            raise ValueError(f"out ({self.out}) must not lie in source ({self.source})")


def main(arguments: list[str], environment: RankEnvironment) -> int:
    """The verb `encode`; returns the exit code. Raises ValueError for bad input."""
    from diffmoe import commands

    parser = commands.Parser(prog="encode", description="Pictures to shards of VAE moments (or of pixels, without --vae). "
                                                         "Interrupted, it goes on when the same command runs again.")
    parser.add_argument("--source", required=True, help="folder of class folders, folder of tars, or tars by pattern")
    parser.add_argument("--out", required=True, type=Path, help="folder of the shards, seen by all ranks")
    parser.add_argument("--image-size", required=True, type=int, help="side of the square that is cut out, pixels")
    parser.add_argument("--channels", type=int, default=3, help="1 (grey) or 3")
    parser.add_argument("--vae", help="AutoencoderKL: a folder, or the hub's owner/name")
    parser.add_argument("--precision", default="fp32", help="fp32 or bf16, of the VAE")
    parser.add_argument("--scale", type=float, help="x = (z - shift) * scale (default: the VAE's scaling_factor)")
    parser.add_argument("--shift", type=float, help="(default: the VAE's shift_factor)")
    parser.add_argument("--batch", type=int, default=32, help="pictures that pass the VAE together")
    parser.add_argument("--samples-per-shard", type=int, default=1024)
    parser.add_argument("--classes", type=int, help="number of classes (default: what the source has)")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1) // environment.local_world),
                        help="threads that read pictures, a rank")
    parser.add_argument("--bad-share", type=float, default=0.01, help="give up when more of the pictures are bad")
    request = Request(**vars(parser.parse_args(arguments)))
    from diffmoe.data.encode_shards import encode
    from diffmoe.parallel.groups import build_groups

    device = commands.join(environment)
    began = time.monotonic()
    say = (lambda line: print(line, flush=True)) if environment.rank == 0 else (lambda line: None)
    index = encode(request, build_groups(1, 1).world, device, say)
    made = index.encoding
    statistics = ", ".join(f"{m:.3f} ± {s:.3f}" for m, s in zip(made.channel_mean, made.channel_std))
    say(f"encode: {index.count} samples of {index.meta.classes} classes, {made.images - index.count} bad, in "
        f"{len(index.shards)} shards at {index.folder} ({time.monotonic() - began:.0f} s); channels {statistics}")
    commands.leave()
    return 0
