"""How fast the loader reads ImageNet-sized latents (moments [8, 32, 32], fp16), on one core, beside
plainer ways.

Every baseline gives what a model takes: latents sampled from moments and scaled, float32, with
labels. The measure is `tar`, plain sequential reading of the same shards, which decodes nothing and
samples nothing.
"""

from __future__ import annotations

import os
import platform
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import torch

from diffmoe.bench.measure import report, table
from diffmoe.bench.options import bench_parser
from diffmoe.data.reader import ShardReader
from diffmoe.data.shards import ShardIndex, ShardMeta, load_index, write_index, write_shards
from diffmoe.data.share import Share
from diffmoe.data.stream import BatchStream
from diffmoe.errors import UserError

_SHAPE, _SCALE, _BATCH, _STREAMS, _WINDOW, _PER_SHARD = (8, 32, 32), 0.18215, 256, 64, 4, 1024
_IMAGENET = 1_281_167
RESUME_LIMIT = 5.0  # seconds
GOAL = 0.95  # of plain tar reading


def main(arguments: list[str]) -> int:
    """``run.py bench data``: prints the table; 0 when both goals are met."""
    parser = bench_parser("data", __doc__ or "", of="machine")
    add = parser.add_argument
    shards = f"measured, in whole shards of {_PER_SHARD} (default 8192)"
    add("--samples", type=int, default=8192, help=shards)
    add("--repeats", type=int, default=5, help="timed rounds of all ways (default 5)")
    cold = "drop the files from the page cache before each timing"
    add("--cold", action="store_true", help=cold)
    add("--folder", type=Path, help="where the data are written (default: a temporary folder)")
    options = parser.parse_args(arguments)
    for name in ("samples", "repeats"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} ({getattr(options, name)}) must be at least 1")
    if options.samples % _PER_SHARD:
        raise UserError(
            f"--samples ({options.samples}) must be divisible by {_PER_SHARD}, the samples of a "
            "shard"
        )
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="diffmoe-bench-", dir=options.folder) as folder:
        record = measure(Path(folder), options.samples, options.repeats, options.cold)
    report("data", record, _table(record), {}, "", options)
    slow = record["ratio_to_tar"]["loader"] < GOAL or record["resume_seconds_max"] > RESUME_LIMIT
    return 1 if slow else 0


def measure(folder: Path, samples: int, repeats: int, cold: bool) -> dict:
    """All figures, as the record that is kept. `folder` is scratch."""
    index = _write(folder / "shards", folder / "npz", samples)
    files = [folder / "shards" / shard.name for shard in index.shards]
    images = sorted((folder / "npz").iterdir())
    ways: dict[str, Callable[[], int]] = {
        "loader": lambda: _loader(index),
        "webdataset": lambda: _webdataset(files),
        "npz": lambda: _npz(images),
        "tar": lambda: _tar(files),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for turn in range(repeats + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if cold:
                _drop([*files, *images])
            began = time.perf_counter()
            count = ways[name]()
            if turn:  # the first round warms up
                rates[name].append(count / (time.perf_counter() - began))
    rate = {name: statistics.median(values) for name, values in rates.items()}
    large = _synthetic(index, folder / "large")
    # Steps of the published recipe: 140 epochs.
    cursors = np.random.default_rng(1).integers(0, 700_000, 5).tolist()
    resumes = {workers: [_resume(large, step, workers) for step in cursors] for workers in (0, 2)}
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "samples": samples,
        "repeats": repeats,
        "cold": cold,
        "samples_per_second": rate,
        "spread": {n: [min(v), max(v)] for n, v in rates.items()},
        "ratio_to_tar": {name: value / rate["tar"] for name, value in rate.items()},
        "ratio_to_webdataset": rate["loader"] / rate["webdataset"],
        "ratio_to_npz": rate["loader"] / rate["npz"],
        "resume_index_samples": large.count,
        "resume_seconds": {str(w): s for w, s in resumes.items()},
        "resume_seconds_max": max(s for times in resumes.values() for s in times),
        "memory_mib": _memory(large),
    }


def _write(shards: Path, npz: Path, samples: int) -> ShardIndex:
    """The same samples as shards and as one npz an image, written out to the disk."""
    npz.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def each() -> Iterable[tuple]:
        for i in range(samples):
            moments = rng.standard_normal(_SHAPE, np.float32).astype(np.float16)
            # Means and deviations as Stable Diffusion's autoencoder gives them.
            moments[: _SHAPE[0] // 2] *= 5
            np.abs(moments[_SHAPE[0] // 2 :], out=moments[_SHAPE[0] // 2 :])
            np.savez(npz / f"{i:07d}.npz", moments=moments, label=i % 1000)
            yield f"{i:07d}", moments, i % 1000

    meta = ShardMeta("moments", 1000, _SCALE)
    index = write_shards(each(), shards, samples_per_shard=_PER_SHARD, meta=meta)
    os.sync()
    return index


def _drop(files: Iterable[Path]) -> None:
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _reader(index: ShardIndex) -> ShardReader:
    return ShardReader(index, seed=0, batch=_BATCH, streams=_STREAMS, window=_WINDOW)


def _loader(index: ShardIndex) -> int:
    """An epoch through the reader as a worker uses it, into one batch's memory."""
    reader = _reader(index)
    x, y = np.empty((_BATCH, *index.x_shape), np.float32), np.empty(_BATCH, np.int64)
    steps = index.count // _BATCH
    for step in range(steps):
        reader.fill(range(step * _BATCH, (step + 1) * _BATCH), x, y)
    reader.close()
    return steps * _BATCH


def _sample(moments: torch.Tensor) -> torch.Tensor:
    mean, std = moments.float().chunk(2, 1)
    return (mean + std * torch.randn_like(mean)) * _SCALE


def _webdataset(files: list[Path]) -> int:
    """The pipeline of webdataset's own introduction: shuffle buffer, decode, batches."""
    import webdataset

    pipeline = (
        webdataset.WebDataset([str(path) for path in files], shardshuffle=100, seed=0)
        .shuffle(1000)
        .decode()
        .to_tuple("npy", "cls")
        .batched(_BATCH, partial=False)
    )
    return sum(len(_sample(torch.as_tensor(np.asarray(moments)))) for moments, _ in pipeline)


def _npz(images: list[Path]) -> int:
    """One file an image, in random order, as the research code reads features."""
    order = np.random.default_rng(0).permutation(len(images))
    count = 0
    for start in range(0, len(images) - _BATCH + 1, _BATCH):
        moments, labels = [], []
        for i in order[start : start + _BATCH]:
            with np.load(images[i], allow_pickle=False) as archive:
                moments.append(archive["moments"])
                labels.append(int(archive["label"]))
        count += len(_sample(torch.from_numpy(np.stack(moments))))
    return count


def _tar(files: list[Path]) -> int:
    count = 0
    for path in files:
        with tarfile.open(path, "r|") as tar:
            for member in tar:
                stream = tar.extractfile(member) if member.name.endswith(".npy") else None
                count += stream is not None and len(stream.read()) > 0
                tar.members = []  # type: ignore[attr-defined]  # else it keeps them all
    return count


def _synthetic(index: ShardIndex, folder: Path) -> ShardIndex:
    """ImageNet's number of samples: the first shard under many names (one file on the disk)."""
    folder.mkdir()
    first = index.shards[0]
    numbers = range(-(-_IMAGENET // first.count))
    shards = tuple(replace(first, name=f"shard-{n:06d}.tar") for n in numbers)
    for shard in shards:
        os.link(index.address(first), folder / shard.name)
    large = replace(index, folder=folder, shards=shards, count=len(shards) * first.count)
    write_index(large)
    return large


def _resume(index: ShardIndex, step: int, workers: int) -> float:
    """Seconds from nothing to the first batch of a step."""
    began = time.perf_counter()
    reader, share = _reader(load_index(index.folder)), Share(_BATCH, _BATCH, 1, 0, 1)
    with BatchStream(reader, share, start_step=step, workers=workers) as stream:
        next(stream)
        return time.perf_counter() - began


def _memory(index: ShardIndex) -> list[float]:
    """Resident MiB of this process and a worker at ten moments of an epoch over 64 shards."""
    epoch = replace(index, shards=index.shards[:64], count=64 * index.shards[0].count)
    steps = epoch.count // _BATCH
    used = []
    reader = _reader(epoch)
    with BatchStream(reader, Share(_BATCH, _BATCH, 1, 0, 1), start_step=0, workers=1) as stream:
        for step in range(steps):
            next(stream)
            if step % max(1, steps // 10) == steps // 20:
                own = psutil.Process()
                used.append(sum(p.memory_info().rss for p in (own, *own.children())) / 2**20)
    return used


def _table(record: dict) -> str:
    rates, ratios = record["samples_per_second"], record["ratio_to_tar"]
    cache = "dropped" if record["cold"] else "warm"
    rows = [
        [name, f"{rate:,.0f}", f"{ratios[name]:.2f}", f"{low:,.0f} to {high:,.0f}"]
        for (name, rate), (low, high) in zip(rates.items(), record["spread"].values())
    ]
    resumes = "; ".join(
        f"{workers} workers " + ", ".join(f"{s:.2f}" for s in times)
        for workers, times in record["resume_seconds"].items()
    )
    memory = ", ".join(f"{m:.0f}" for m in record["memory_mib"])
    lines = [
        f"{record['machine']}, Python {record['python']}, torch {record['torch']}; "
        f"{record['samples']} samples, median of {record['repeats']}, page cache {cache}, one core",
        "",
        table(["way", "samples/s", "of tar", "lowest to highest"], rows),
        "",
        f"The loader is {record['ratio_to_webdataset']:.1f} x webdataset's pipeline, "
        f"{record['ratio_to_npz']:.1f} x one npz an image.",
        f"Resume at random cursors of {record['resume_index_samples']:,} samples, seconds to the "
        f"first batch: {resumes}.",
        f"Resident memory over an epoch of 65,536 samples, loader and one worker, MiB: {memory}.",
    ]
    return "\n".join(lines)
