"""The verb ``inspect-data``: is a data set what its index says, and what does it look like."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from diffmoe.commands.common import Parser, add_device, one_process
from diffmoe.environment import RankEnvironment
from diffmoe.errors import UserError

if TYPE_CHECKING:
    from diffmoe.data.cache import Cache
    from diffmoe.data.shards import ShardIndex
    from diffmoe.data.vae import Vae

_MEANING = (
    ("kind", str, "pixels, latents, or moments (mean, then --spread)"),
    ("classes", int, "number of classes"),
    ("scale", float, "x = (value - mean) * scale"),
    ("mean", float, ""),
    ("spread", str, "of moments, std or logvar (of its square)"),
)
_MEMBERS = (
    (
        "array",
        str,
        "the member with the array, by its ending: npy (default), latent.npy, npz:moments, "
        "npz:mean,std",
    ),
    ("flip_array", str, "the flipped image's (default flip.npy, where the tars have it)"),
    ("label", str, "the label: cls (default), json:class_id, npz:label"),
    ("layout", str, "of arrays: chw (default) or hwc"),
    ("first_class", int, "the label of the first class (default 0)"),
)
_COLUMNS = 8
_BATCH, _POOL = 256, 64  # of the published recipe, for the look at the order
_DECODED = 8  # pictures together: all 64 of a published autoencoder would take tens of gigabytes


def main(arguments: list[str], environment: RankEnvironment) -> int:
    """The verb ``inspect-data``; 0 when all is as it should be, 1 for bad data.  UserError for bad
    input.
    """
    parser = Parser(
        prog="inspect-data",
        description="Checks counts, checksums, classes and statistics of a data set against its "
        "index, names what is bad by shard and byte, and draws some of it.",
    )
    parser.add_argument(
        "shards", help="what data.shards takes: folder, index.json, tars by pattern, URLs"
    )
    parser.add_argument(
        "--index", default="", help="index.json, where it does not lie beside the shards"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="sizes, tables of rows, first and last sample of every shard",
    )
    parser.add_argument(
        "--vae", help="AutoencoderKL that decodes the grid: a folder, or the hub's owner/name"
    )
    add_device(parser)
    parser.add_argument(
        "--grid", type=Path, default=Path("inspect-data.png"), help="where the grid of samples goes"
    )
    parser.add_argument("--cache", default="", help="as data.cache, for remote shards")
    parser.add_argument("--cache-gib", type=float, default=64.0)
    parser.add_argument(
        "--write-index",
        action="store_true",
        help="first write index.json for a folder of tars that has none",
    )
    parser.add_argument(
        "--accept-values",
        action="store_true",
        help="the values are meant as they are, also where they look like something else; with "
        "--write-index for good",
    )
    for name, kind, text in (*_MEANING, *_MEMBERS):
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            help=f"with --write-index: {text}".rstrip(": "),
        )
    options = parser.parse_args(arguments)
    one_process("inspect-data", environment)
    meaning, members = (
        {name: getattr(options, name) for name, _, _ in names if getattr(options, name) is not None}
        for names in (_MEANING, _MEMBERS)
    )
    for name, value in {} if options.write_index else (meaning | members).items():
        raise UserError(f"--{name.replace('_', '-')} ({value}) goes with --write-index")
    if options.write_index and not {"kind", "classes"} <= meaning.keys():
        raise UserError(
            "--write-index needs --kind and --classes: the tars do not say what their arrays mean"
        )
    if options.write_index and (meaning["kind"] == "moments") != ("spread" in meaning):
        raise UserError(
            f"--spread ({meaning.get('spread', 'not given')}) goes with --kind moments and must be given "
            f"there: std or logvar, not guessed; --kind is {meaning['kind']}"
        )
    from diffmoe.config import DataConfig
    from diffmoe.data.feed import cache_of, is_shuffled, order_notice
    from diffmoe.data.inspect import index_tars, inspect
    from diffmoe.data.mixing import SHUFFLED_ORDER
    from diffmoe.data.reader import ShardReader
    from diffmoe.data.rows import Members
    from diffmoe.data.shards import ShardMeta, load_index

    if options.write_index:
        made = index_tars(
            Path(options.shards),
            ShardMeta(**meaning, members=Members(**members), accept_values=options.accept_values),
        )
        print(
            f"wrote {made.folder / 'index.json'}: {made.count} samples in {len(made.shards)} shards"
        )
    index = load_index(options.shards, options.index, check_files=False)
    if options.accept_values:
        index = replace(index, meta=replace(index.meta, accept_values=True))
    vae = (
        None if options.vae is None else _open_vae(options.vae, index, options.device)
    )  # before a long reading, not after
    cache = cache_of(DataConfig(cache=options.cache, cache_gib=options.cache_gib))
    print(
        f"{index.where}: {index.count} samples of {index.meta.classes} classes in {len(index.shards)} shards, {index.dtype} "
        f"{list(index.shape)} ({index.meta.kind}{', with flips' * index.flips}), fingerprint {index.fingerprint[:16]}"
    )
    found = inspect(
        index,
        cache,
        quick=options.quick,
        report=lambda problem: print(f"bad: {problem}", flush=True),
    )
    counts = sorted(found.class_counts)
    print(
        f"classes  {counts[0]} to {counts[-1]} samples, median {counts[len(counts) // 2]}; {counts.count(0)} without any"
    )
    print(
        "channels "
        + ", ".join(f"{m:.4f} ± {s:.4f}" for m, s in zip(found.channel_mean, found.channel_std))
        + f", over {found.samples} samples"
    )
    if is_shuffled(index):
        print(f"order    shuffled: {index.encoding.shuffled}")
    else:
        streams, window = SHUFFLED_ORDER  # which only data that are mixed can do with
        reader = ShardReader(
            index, seed=0, batch=_BATCH, streams=streams, window=window, cache=cache
        )
        notice, unmixed = order_notice(reader, _POOL)
        print(f"order    {'warning: ' * unmixed}{notice or 'unknown'}")
    if found.problems:
        print(f"{len(found.problems)} problems; the first: {found.problems[0]}")
        return 1
    _draw(index, cache, vae, options.grid)
    print(
        f"all is as the index says{' (--quick: arrays were not all read)' * options.quick}; samples in {options.grid}"
    )
    return 0


def _open_vae(path: str, index: ShardIndex, asked: str) -> Vae:
    """The data set's autoencoder.  UserError for data of another one, or of none."""
    from diffmoe.data.vae import load_vae
    from diffmoe.device import local_device, set_fp32_precision

    if index.meta.kind == "pixels":
        raise UserError(f"--vae ({path}) decodes latents; {index.where} holds pixels")
    set_fp32_precision("ieee")
    vae = load_vae(path, device=local_device(0, 1, asked))
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
    x, _ = ShardReader(index, seed=0, cache=cache).read(
        [i * index.count // count for i in range(count)]
    )
    if vae is not None:
        from diffmoe.data.vae import decode_latents

        parts = torch.from_numpy(x).split(_DECODED)
        x = (
            torch.cat(
                [decode_latents(vae, part, index.meta.scale, index.meta.mean) for part in parts]
            ).numpy()
            / 127.5
            - 1
        )
    elif index.meta.kind != "pixels":
        x = x / (np.abs(x).max() or 1)  # all zeros are shown as such
    image_grid(x[:, : 3 if x.shape[1] > 2 else 1], _COLUMNS, path)
