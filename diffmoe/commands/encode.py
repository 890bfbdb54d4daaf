"""The subcommand ``encode``."""

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
    """Runs ``encode``; returns the exit code.  UserError for bad input."""
    parser = Parser(
        prog="encode",
        description="Images to shards of VAE moments (or of pixels, without --vae). "
        "Interrupted, it resumes when the same command runs again.",
    )
    add = parser.add_argument
    add("--source", required=True, help="folder of class folders or tars, or tars by pattern")
    add("--out", required=True, type=Path, help="folder of the shards, seen by all ranks")
    add("--image-size", required=True, type=int, help="side of the square that is cut out, pixels")
    add("--channels", type=int, default=3, help="1 (grey) or 3")
    add("--vae", help="AutoencoderKL: a folder, or the hub's owner/name")
    add("--precision", default="fp32", help="fp32 or bf16, of the VAE")
    add("--fp32-precision", default="ieee", help="ieee (default) or tf32, of an fp32 VAE on a GPU")
    stored = lambda text: STORAGES.get(text, text)
    add("--storage", default="fp16", type=stored, help="fp16 or bf16, of the moments")
    add("--scale", type=float, help="x = (z - shift) * scale (default: the VAE's scaling_factor)")
    add("--shift", type=float, help="(default: the VAE's shift_factor)")
    about = "x = (z - mean) / deviation, of each channel: `channels`, as measured; or a data set's"
    add("--normalize", default="", metavar="channels | DATA", help=about)
    about = "TorchScript network whose features of each image are written, for train.repa_weight"
    add("--features", type=Path, metavar="FILE", help=about)
    add("--batch", type=int, default=32, help="images that pass a network together")
    add("--samples-per-shard", type=int, default=1024, help="images of a shard")
    order = parser.add_mutually_exclusive_group().add_argument
    of = "of the permutation in which images are written (default 0)"
    order("--shuffle-seed", type=int, default=0, help=of)
    as_listed = "write them in the source's order"
    order("--no-shuffle", dest="shuffle_seed", action="store_const", const=None, help=as_listed)
    add("--classes", type=int, help="number of classes (default: what the source has)")
    names = "their names, one a line (default: the class folders')"
    add("--class-names", type=Path, metavar="FILE", help=names)
    add("--first-class", type=int, default=0, help="label of the first class in tars (default 0)")
    empty = "folders without an image are classes, too"
    add("--allow-empty-classes", action="store_true", help=empty)
    cores = cores_each(environment.local_world)
    add("--workers", type=int, default=cores, help="threads that read images, a rank")
    bad = "give up when more of the images are bad, or left out though they look like samples"
    add("--bad-share", type=float, default=0.01, help=bad)
    accept = "take latents whose deviation after --scale is far from 1"
    add("--accept-values", action="store_true", help=accept)
    add_device(parser)
    options = vars(parser.parse_args(arguments))
    device_name = options.pop("device")
    request = Request(**options)
    from diffmoe.data.encode_shards import encode
    from diffmoe.parallel.groups import build_groups

    device = join(environment, _PATIENCE, device_name)
    began = time.monotonic()
    say = (lambda line: print(line, flush=True)) if environment.rank == 0 else (lambda line: None)
    index = encode(request, build_groups(1, 1).world, device, say)
    if made := index.encoding:
        pairs = zip(made.channel_mean, made.channel_std)
        statistics = ", ".join(f"{m:.3f} ± {s:.3f}" for m, s in pairs)
        say(
            f"encode: {index.count} samples of {index.meta.classes} classes, "
            f"{made.images - index.count} bad, in {len(index.shards)} shards at {index.folder} "
            f"({time.monotonic() - began:.0f} s); channels {statistics}"
        )
    leave()
    return 0
