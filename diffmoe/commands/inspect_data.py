"""The subcommand ``inspect-data``: is a data set what its index says, and how does it look."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffmoe.commands.common import Parser, add_device, one_process
from diffmoe.data.values import numbers_of
from diffmoe.environment import RankEnvironment
from diffmoe.errors import UserError
from diffmoe.files import check_writable

if TYPE_CHECKING:
    from diffmoe.data.cache import Cache
    from diffmoe.data.inspect import Inspection
    from diffmoe.data.shards import ShardIndex
    from diffmoe.data.vae import Vae

# Options that go with --write-index: type and help.
_MEANING: dict[str, tuple[Any, str]] = {
    "kind": (str, "pixels, latents, or moments (mean, then --spread)"),
    "classes": (int, "number of classes"),
    "scale": (numbers_of, "x = (value - mean) * scale; by channel: 0.5,0.25,…"),
    "mean": (numbers_of, "(default 0)"),
    "spread": (str, "of moments, std or logvar (of its square)"),
}
_MEMBERS: dict[str, tuple[Any, str]] = {
    "array": (str, "the array's member, by its ending: npy (default), latent.npy, npz:mean,std"),
    "flip_array": (str, "the flipped image's (default flip.npy, where the tars have it)"),
    "label": (str, "the label: cls (default), json:class_id, npz:label"),
    "layout": (str, "of arrays: chw (default) or hwc"),
    "first_class": (int, "the label of the first class (default 0)"),
}
_COLUMNS = 8
_BATCH, _POOL = 256, 64  # of the published recipe, for the look at the order
_DECODED = 8  # images together: all 64 of a published autoencoder would take tens of gigabytes


def main(arguments: list[str], environment: RankEnvironment) -> int:
    """Returns 0 when all is as it should be, 1 for bad data.  UserError for bad input."""
    parser = Parser(
        prog="inspect-data",
        description="Checks counts, checksums, classes and statistics of a data set against its "
        "index, names what is bad by shard and member, and draws some of it.",
    )
    add = parser.add_argument
    add("shards", help="what data.shards takes: folder, index.json, tars by pattern, URLs")
    add("--index", default="", help="index.json, where it does not lie beside the shards")
    quick = "sizes, tables of rows, first and last sample of every shard"
    add("--quick", action="store_true", help=quick)
    add("--vae", help="AutoencoderKL that decodes the grid: a folder, or the hub's owner/name")
    add_device(parser)
    grid = Path("inspect-data.png")
    add("--grid", type=Path, default=grid, help="where the grid of samples goes")
    add("--cache", default="", help="as data.cache, for remote shards")
    add("--cache-gib", type=float, default=64.0, help="what --cache may hold")
    write = "first write index.json for a folder of tars that has none"
    add("--write-index", action="store_true", help=write)
    accept = "the values are meant so, whatever they look like; with --write-index for good"
    add("--accept-values", action="store_true", help=accept)
    for name, (kind, text) in (_MEANING | _MEMBERS).items():
        add(f"--{name.replace('_', '-')}", type=kind, help=f"with --write-index: {text}")
    options = parser.parse_args(arguments)
    one_process("inspect-data", environment)
    check_writable(options.grid, f"--grid ({options.grid})")
    meaning, members = _claims(options)
    from diffmoe.config import DataConfig
    from diffmoe.data.feed import cache_of
    from diffmoe.data.inspect import index_tars, inspect
    from diffmoe.data.members import Members
    from diffmoe.data.shards import ShardMeta, load_index

    if options.write_index:
        accepted = options.accept_values
        meta = ShardMeta(**meaning, members=Members(**members), accept_values=accepted)
        made = index_tars(Path(options.shards), meta)
        where = made.folder / "index.json"
        print(f"wrote {where}: {made.count} samples in {len(made.shards)} shards")
    index = load_index(options.shards, options.index, check_files=False)
    if options.accept_values:
        index = replace(index, meta=replace(index.meta, accept_values=True))
    vae = None
    if options.vae is not None:  # before a long reading, not after
        vae = _open_vae(options.vae, index, options.device)
    cache = cache_of(DataConfig(cache=options.cache, cache_gib=options.cache_gib))
    print(
        f"{index.where}: {index.count} samples of {index.meta.classes} classes in "
        f"{len(index.shards)} shards, {index.dtype} {list(index.shape)} ({index.meta.kind}"
        f"{', with flips' * index.flips}"
        f"{f', features {list(index.features)}' if index.features else ''}), "
        f"fingerprint {index.fingerprint[:16]}"
    )

    def report(problem: str) -> None:
        print(f"bad: {problem}", flush=True)

    found = inspect(index, cache, quick=options.quick, report=report)
    _print_found(index, found, cache)
    if found.problems:
        print(f"{len(found.problems)} problems; the first: {found.problems[0]}")
        return 1
    _draw(index, cache, vae, options.grid)
    unread = " (--quick: arrays were not all read)" if options.quick else ""
    print(f"all is as the index says{unread}; samples in {options.grid}")
    return 0


def _claims(options: argparse.Namespace) -> tuple[dict, dict]:
    """What the command line says of the arrays and of the tars' members, for --write-index.
    UserError where that is not enough, or there is no --write-index.
    """
    given = {name: value for name, value in vars(options).items() if value is not None}
    meaning = {name: given[name] for name in _MEANING if name in given}
    members = {name: given[name] for name in _MEMBERS if name in given}
    for name, value in {} if options.write_index else (meaning | members).items():
        raise UserError(f"--{name.replace('_', '-')} ({value}) goes with --write-index")
    if options.write_index and not {"kind", "classes"} <= meaning.keys():
        raise UserError(
            "--write-index needs --kind and --classes: the tars do not say what their arrays mean"
        )
    if options.write_index and (meaning["kind"] == "moments") != ("spread" in meaning):
        raise UserError(
            f"--spread ({meaning.get('spread', 'not given')}) goes with --kind moments and must be "
            f"given there: std or logvar, not guessed; --kind is {meaning['kind']}"
        )
    return meaning, members


def _print_found(index: ShardIndex, found: Inspection, cache: Cache) -> None:
    """Classes, channels and order."""
    from diffmoe.data.feed import is_shuffled, order_notice
    from diffmoe.data.mixing import SHUFFLED_ORDER
    from diffmoe.data.reader import ShardReader

    counts = sorted(found.class_counts)
    median = counts[len(counts) // 2]
    print(
        f"classes  {counts[0]} to {counts[-1]} samples, median {median}; {counts.count(0)} without "
        "any"
    )
    pairs = zip(found.channel_mean, found.channel_std)
    channels = ", ".join(f"{m:.4f} ± {s:.4f}" for m, s in pairs)
    print(f"channels {channels}, over {found.samples} samples")
    if index.meta.kind != "pixels":
        scales = [1 / std if std else 1.0 for std in found.channel_std]
        scale, mean = (",".join(f"{n:.6g}" for n in x) for x in (scales, found.channel_mean))
        print(f"by channel --scale {scale} --mean={mean}")
    if index.encoding and is_shuffled(index):
        print(f"order    shuffled when encoded, seed {index.encoding.shuffled}")
    else:
        streams, window = SHUFFLED_ORDER  # which only data that are mixed can do with
        reader = ShardReader(
            index, seed=0, batch=_BATCH, streams=streams, window=window, cache=cache
        )
        notice, unmixed = order_notice(reader, _POOL)
        print(f"order    {'warning: ' * unmixed}{notice or 'unknown'}")


def _open_vae(path: str, index: ShardIndex, device: str) -> Vae:
    """The data set's autoencoder.  UserError for data of another one, or of none."""
    from diffmoe.data.vae import load_vae
    from diffmoe.device import local_device, set_fp32_precision

    if index.meta.kind == "pixels":
        raise UserError(f"--vae ({path}) decodes latents; {index.where} holds pixels")
    set_fp32_precision("ieee")
    vae = load_vae(path, device=local_device(0, 1, device))
    if index.encoding is not None and index.encoding.vae_sha256 not in ("", vae.sha256):
        raise UserError(
            f"--vae ({path}) has weights {vae.sha256[:12]}; {index.where} was encoded with "
            f"{index.encoding.vae_sha256[:12]} ({index.encoding.vae})"
        )
    return vae


def _draw(index: ShardIndex, cache: Cache, vae: Vae | None, path: Path) -> None:
    """A grid of samples from all over the data set, in its order."""
    import numpy as np
    import torch

    from diffmoe.data.reader import ShardReader
    from diffmoe.evaluation.plots import image_grid

    count = min(_COLUMNS**2, index.count)
    places = [i * index.count // count for i in range(count)]
    x, _ = ShardReader(index, seed=0, cache=cache).read(places)
    if vae is not None:
        from diffmoe.data.vae import decode_latents

        meta, parts = index.meta, torch.from_numpy(x).split(_DECODED)
        images = [decode_latents(vae, part, meta.scale, meta.mean) for part in parts]
        x = torch.cat(images).numpy() / 127.5 - 1
    elif index.meta.kind != "pixels":
        x = x / (np.abs(x).max() or 1)  # all zeros are shown as such
    image_grid(x[:, : 3 if x.shape[1] > 2 else 1], _COLUMNS, path)
