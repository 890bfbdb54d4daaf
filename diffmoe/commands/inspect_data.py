"""The verb ``inspect-data``: is a data set what its index says, and what does it look like."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from diffmoe.commands.common import Parser, one_process
from diffmoe.errors import UserError
from launcher.environment import RankEnvironment

if TYPE_CHECKING:
    from diffmoe.data.cache import Cache
    from diffmoe.data.shards import ShardIndex
    from diffmoe.data.vae import Vae

_COLUMNS = 8
_DECODED = 8  # pictures together: all 64 of a published autoencoder would take tens of gigabytes


def main(arguments: list[str], environment: RankEnvironment) -> int:
    """The verb ``inspect-data``; 0 when all is as it should be, 1 for bad data.  UserError for bad input."""
    parser = Parser(prog="inspect-data", description="Checks counts, checksums, classes and statistics of a data set against its "
                                                      "index, names what is bad by shard and byte, and draws some of it.")
    parser.add_argument("shards", help="what data.shards takes: folder, index.json, tars by pattern, URLs")
    parser.add_argument("--index", default="", help="index.json, where it does not lie beside the shards")
    parser.add_argument("--quick", action="store_true", help="sizes, tables of rows, first and last sample of every shard")
    parser.add_argument("--vae", help="AutoencoderKL that decodes the grid: a folder, or the hub's owner/name")
    parser.add_argument("--grid", type=Path, default=Path("inspect-data.png"), help="where the grid of samples goes")
    parser.add_argument("--cache", default="", help="as data.cache, for remote shards")
    parser.add_argument("--cache-gib", type=float, default=64.0)
    parser.add_argument("--write-index", action="store_true", help="first write index.json for a folder of tars that has none")
    for name, kind, text in (("kind", str, "pixels, or moments (mean, then --spread)"), ("classes", int, "number of classes"),
                             ("scale", float, "x = (value - mean) * scale"), ("mean", float, ""),
                             ("spread", str, "std or logvar")):
        parser.add_argument(f"--{name}", type=kind, help=f"with --write-index: {text}".rstrip(": "))
    options = parser.parse_args(arguments)
    one_process("inspect-data", environment)
    described = {name: getattr(options, name) for name in ("kind", "classes", "scale", "mean", "spread")
                 if getattr(options, name) is not None}
    if described and not options.write_index:
        raise UserError(f"--{next(iter(described))} ({next(iter(described.values()))}) goes with --write-index")
    if options.write_index and not {"kind", "classes"} <= described.keys():
        raise UserError("--write-index needs --kind and --classes: the tars do not say what their arrays mean")
    from diffmoe.config import DataConfig
    from diffmoe.data.feed import cache_of
    from diffmoe.data.inspect import index_tars, inspect
    from diffmoe.data.shards import ShardMeta, load_index

    if options.write_index:
        made = index_tars(Path(options.shards), ShardMeta(**described))
        print(f"wrote {made.folder / 'index.json'}: {made.count} samples in {len(made.shards)} shards")
    index = load_index(options.shards, options.index, check_files=False)
    vae = None if options.vae is None else _open_vae(options.vae, index)  # before a long reading, not after
    cache = cache_of(DataConfig(cache=options.cache, cache_gib=options.cache_gib))
    print(f"{index.where}: {index.count} samples of {index.meta.classes} classes in {len(index.shards)} shards, {index.dtype} "
          f"{list(index.shape)} ({index.meta.kind}{', with flips' * index.flips}), fingerprint {index.fingerprint[:16]}")
    found = inspect(index, cache, quick=options.quick, report=lambda problem: print(f"bad: {problem}", flush=True))
    counts = sorted(found.class_counts)
    print(f"classes  {counts[0]} to {counts[-1]} samples, median {counts[len(counts) // 2]}; {counts.count(0)} without any")
    print("channels " + ", ".join(f"{m:.4f} ± {s:.4f}" for m, s in zip(found.channel_mean, found.channel_std))
          + f", over {found.samples} samples")
    if found.problems:
        print(f"{len(found.problems)} problems; the first: {found.problems[0]}")
        return 1
    _draw(index, cache, vae, options.grid)
    print(f"all is as the index says{' (--quick: arrays were not all read)' * options.quick}; samples in {options.grid}")
    return 0


def _open_vae(path: str, index: ShardIndex) -> Vae:
    """The data set's autoencoder.  UserError for data of another one, or of none."""
    from diffmoe.data.vae import load_vae
    from diffmoe.device import local_device, set_fp32_precision

    if index.meta.kind != "moments":
        raise UserError(f"--vae ({path}) decodes moments; {index.where} holds {index.meta.kind}")
    set_fp32_precision("ieee")
    vae = load_vae(path, device=local_device(0, 1))
    if index.encoding is not None and index.encoding.vae_sha256 not in ("", vae.sha256):
        raise UserError(f"--vae ({path}) has weights {vae.sha256[:12]}; {index.where} was encoded with "
                        f"{index.encoding.vae_sha256[:12]} ({index.encoding.vae})")
    return vae


def _draw(index: ShardIndex, cache: Cache, vae: Vae | None, path: Path) -> None:
    """A grid of samples from all over the data set, in its order."""
    import numpy as np
    import torch

    from diffmoe.data.reader import ShardReader
    from diffmoe.evaluation.plots import image_grid

    count = min(_COLUMNS**2, index.count)
    x, _ = ShardReader(index, seed=0, cache=cache).read([i * index.count // count for i in range(count)])
    if vae is not None:
        from diffmoe.data.vae import decode_latents

        parts = torch.from_numpy(x).split(_DECODED)
        x = torch.cat([decode_latents(vae, part, index.meta.scale, index.meta.mean) for part in parts]).numpy() / 127.5 - 1
    elif index.meta.kind == "moments":
        x = x / np.abs(x).max()
    image_grid(x[:, : 3 if x.shape[1] > 2 else 1], _COLUMNS, path)
