"""The verb ``encode``."""

from __future__ import annotations

import datetime
import time
from pathlib import Path

from diffmoe.commands.common import Parser, add_device, join, leave
from diffmoe.data.encode_request import STORAGES, Request
from diffmoe.environment import RankEnvironment
from diffmoe.placement import cores_each

# Ranks that have no shard left in the last round wait for those that have, which on a CPU takes
# hours.
_PATIENCE = datetime.timedelta(hours=12)


def main(arguments: list[str], environment: RankEnvironment) -> int:
    """The verb ``encode``; returns the exit code.  UserError for bad input."""
    parser = Parser(
        prog="encode",
        description="Pictures to shards of VAE moments (or of pixels, without --vae). "
        "Interrupted, it goes on when the same command runs again.",
    )
    parser.add_argument(
        "--source",
        required=True,
        help="folder of class folders, folder of tars, or tars by pattern",
    )
    parser.add_argument(
        "--out", required=True, type=Path, help="folder of the shards, seen by all ranks"
    )
    parser.add_argument(
        "--image-size", required=True, type=int, help="side of the square that is cut out, pixels"
    )
    parser.add_argument("--channels", type=int, default=3, help="1 (grey) or 3")
    parser.add_argument("--vae", help="AutoencoderKL: a folder, or the hub's owner/name")
    parser.add_argument("--precision", default="fp32", help="fp32 or bf16, of the VAE")
    parser.add_argument(
        "--fp32-precision", default="ieee", help="ieee (default) or tf32, of an fp32 VAE on a GPU"
    )
    parser.add_argument(
        "--storage",
        default="fp16",
        type=lambda text: STORAGES.get(text, text),
        help="fp16 or bf16, of the moments",
    )
    parser.add_argument(
        "--scale", type=float, help="x = (z - shift) * scale (default: the VAE's scaling_factor)"
    )
    parser.add_argument("--shift", type=float, help="(default: the VAE's shift_factor)")
    parser.add_argument("--batch", type=int, default=32, help="pictures that pass the VAE together")
    parser.add_argument("--samples-per-shard", type=int, default=1024)
    order = parser.add_mutually_exclusive_group()
    order.add_argument(
        "--shuffle-seed",
        type=int,
        default=0,
        help="of the permutation in which images are written (default 0)",
    )
    order.add_argument(
        "--no-shuffle",
        dest="shuffle_seed",
        action="store_const",
        const=None,
        help="write them in the source's order",
    )
    parser.add_argument(
        "--classes", type=int, help="number of classes (default: what the source has)"
    )
    parser.add_argument(
        "--class-names",
        type=Path,
        metavar="FILE",
        help="their names, one a line (default: the class folders')",
    )
    parser.add_argument(
        "--first-class",
        type=int,
        default=0,
        help="the label of the first class in tars (default 0)",
    )
    parser.add_argument(
        "--allow-empty-classes",
        action="store_true",
        help="folders without a picture are classes, too",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=cores_each(environment.local_world),
        help="threads that read pictures, a rank",
    )
    parser.add_argument(
        "--bad-share",
        type=float,
        default=0.01,
        help="give up when more of the pictures are bad, or left out though they look like samples",
    )
    parser.add_argument(
        "--accept-values",
        action="store_true",
        help="take latents whose deviation after --scale is far from 1",
    )
    add_device(parser)
    options = vars(parser.parse_args(arguments))
    asked = options.pop("device")
    request = Request(**options)
    from diffmoe.data.encode_shards import encode
    from diffmoe.parallel.groups import build_groups

    device = join(environment, _PATIENCE, asked)
    began = time.monotonic()
    say = (lambda line: print(line, flush=True)) if environment.rank == 0 else (lambda line: None)
    index = encode(request, build_groups(1, 1).world, device, say)
    made = index.encoding
    statistics = ", ".join(
        f"{m:.3f} ± {s:.3f}" for m, s in zip(made.channel_mean, made.channel_std)
    )
    say(
        f"encode: {index.count} samples of {index.meta.classes} classes, {made.images - index.count} bad, in "
        f"{len(index.shards)} shards at {index.folder} ({time.monotonic() - began:.0f} s); channels {statistics}"
    )
    leave()
    return 0
