"""Shards, their order and the batch stream: exactly once, the same on every layout and number of
workers, loud when damaged.
"""

from __future__ import annotations

import io
import json
import os
import signal
import tarfile
import time
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from diffmoe.data import order as order_module
from diffmoe.data.digits import write_digits
from diffmoe.data.order import SampleOrder
from diffmoe.data.reader import ShardReader
from diffmoe.data.rows import BadShard, RowTable, pack_table, unpack_table
from diffmoe.data.shards import ShardIndex, ShardMeta, load_index, write_shards
from diffmoe.data.share import Share
from diffmoe.data.stream import Batch, BatchStream
from diffmoe.data.values import normals, to_float
from diffmoe.errors import UserError
from diffmoe.random_streams import Use, Words, philox

PIXELS = ShardMeta(
    kind="pixels", classes=10, scale=0.5, mean=1.0, accept_values=True
)  # they count, and are no images
MOMENTS = ShardMeta(kind="moments", classes=10, scale=0.18215, accept_values=True)
COUNT = 103  # shards of 10: the last is short, and no batch size used below divides it


def write_pixels(folder: Path, count: int = COUNT) -> ShardIndex:
    """Sample i is a [1, 2, 3] array that begins with i, label i % 10."""
    samples = (
        (f"{i:03d}", np.arange(i, i + 6, dtype=np.float32).reshape(1, 2, 3), i % 10)
        for i in range(count)
    )
    return write_shards(samples, folder, samples_per_shard=10, meta=PIXELS)


def write_moments(folder: Path, *, flips: bool, count: int = 40) -> ShardIndex:
    """Sample i has mean i, standard deviation i / 1000; the flipped image's mean is -i."""

    def moments(mean: float, i: int) -> np.ndarray:
        return np.concatenate([np.full((2, 2, 2), mean), np.full((2, 2, 2), i / 1000)]).astype(
            np.float16
        )

    samples = (
        (f"{i:03d}", moments(i, i), i % 10, *([moments(-i, i)] if flips else []))
        for i in range(count)
    )
    return write_shards(samples, folder, samples_per_shard=10, meta=MOMENTS)


def sample_numbers(x: np.ndarray) -> list[int]:
    """The sample numbers of a batch that `write_pixels` wrote."""
    return (x[:, 0, 0, 0] / PIXELS.scale + PIXELS.mean).round().astype(int).tolist()


def reader_of(index: ShardIndex, batch: int, seed: int = 3, **more) -> ShardReader:
    """Five streams, which divide no batch used below, of windows of two shards."""
    return ShardReader(index, seed=seed, batch=batch, streams=5, window=2, **more)


def take(stream: BatchStream, steps: int) -> list[list[Batch]]:
    """Copies: a stream's memory is used again."""
    return [
        [Batch(b.x.clone(), b.y.clone(), b.positions) for b in next(stream)] for _ in range(steps)
    ]


def global_batches(
    index: ShardIndex,
    start: int,
    steps: int,
    *,
    batch: int,
    world: int,
    accumulation: int = 1,
    workers: int = 0,
    **reader,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """x and y of global batches, put together from every rank's micro-batches; every rank takes as
    many.
    """
    ranks = []
    for rank in range(world):
        share = Share(batch, batch // world // accumulation, accumulation, rank, world)
        with BatchStream(
            reader_of(index, batch, **reader), share, start_step=start, workers=workers
        ) as stream:
            ranks.append(take(stream, steps))
    whole = []
    for step in range(steps):
        ordered = [ranks[rank][step][j] for j in range(accumulation) for rank in range(world)]
        wanted = range((start + step) * batch, (start + step + 1) * batch)
        assert [p for part in ordered for p in part.positions] == list(wanted)
        whole.append(
            (torch.cat([part.x for part in ordered]), torch.cat([part.y for part in ordered]))
        )
    return whole


def assert_same(
    one: list[tuple[torch.Tensor, torch.Tensor]], other: list[tuple[torch.Tensor, torch.Tensor]]
) -> None:
    for (x, y), (other_x, other_y) in zip(one, other, strict=True):
        assert torch.equal(x, other_x) and torch.equal(y, other_y)


def rewrite_shard(index: ShardIndex, number: int, members: list[tuple[str, bytes]]) -> None:
    """Replace a shard by other members and give the index its new size, as an attacker or a bad
    copy tool might.
    """
    path = index.folder / index.shards[number].name
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, payload in members:
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    set_size(index, number)


def set_size(index: ShardIndex, number: int) -> None:
    record = json.loads((index.folder / "index.json").read_text())
    record["shards"][number]["bytes"] = (index.folder / index.shards[number].name).stat().st_size
    (index.folder / "index.json").write_text(json.dumps(record))


def shard_members(index: ShardIndex, number: int) -> list[tuple[str, bytes]]:
    with tarfile.open(index.folder / index.shards[number].name) as tar:
        return [(info.name, tar.extractfile(info).read()) for info in tar]


def read_everything(index: ShardIndex) -> None:
    ShardReader(load_index(index.folder), seed=0).read(range(index.count))


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def located(order: SampleOrder, positions: Sequence[int]) -> list[tuple[int, int]]:
    return [tuple(place) for place in order.places(np.array(positions)).tolist()]


@pytest.mark.parametrize(
    "counts", [[10] * 10 + [3], [200] * 8 + [197], [5], [1] * 3, [7, 1, 30, 2]]
)
@pytest.mark.parametrize(
    ("batch", "streams", "window"), [(24, 64, 4), (7, 3, 1), (16, 5, 2), (1, 1, 1), (64, 64, 100)]
)
def test_every_sample_once_per_epoch(
    counts: list[int], batch: int, streams: int, window: int
) -> None:
    order = SampleOrder(counts, seed=3, batch=batch, streams=streams, window=window)
    total = sum(counts)
    everything = [(shard, row) for shard, count in enumerate(counts) for row in range(count)]
    epochs = [located(order, range(epoch * total, (epoch + 1) * total)) for epoch in range(4)]
    for epoch in epochs:
        assert sorted(epoch) == everything
    if total > max(20, batch):
        assert epochs[0] != epochs[1] != epochs[2] != everything


def test_seeds_and_epochs_have_their_own_order(tmp_path: Path) -> None:
    index = write_pixels(tmp_path)
    orders = [
        sample_numbers(reader_of(index, 24, seed=seed).read(range(start, start + COUNT))[0])
        for seed, start in ((0, 0), (0, COUNT), (1, 0))
    ]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2]) == list(range(COUNT))
    assert orders[0] != orders[1] and orders[0] != orders[2]


def test_the_order_is_written_down() -> None:
    """A change of it would change every run and every resumed run."""
    order = SampleOrder([4, 4, 4, 3], seed=5, batch=6, streams=3, window=2)
    found = located(order, range(9))
    assert found == [(1, 0), (1, 2), (0, 3), (3, 1), (2, 3), (2, 1), (0, 1), (0, 0), (3, 2)]


def test_a_rank_reads_the_shards_of_its_streams_only() -> None:
    counts = [1024] * 1250
    order = SampleOrder(counts, seed=0, batch=256, streams=64, window=4)
    of_ranks = [
        {
            shard
            for step in range(40)
            for shard, _ in located(order, Share(256, 32, 1, rank, 8).positions(step).reshape(-1))
        }
        for rank in range(8)
    ]
    together = set().union(*of_ranks)
    assert (
        sum(map(len, of_ranks)) <= len(together) + 8
    )  # a shard at the seam of two streams is read by both
    assert all(len(shards) <= 8 * 5 for shards in of_ranks)


def test_a_batch_mixes_the_whole_data_set() -> None:
    """Shards are written class by class: a batch must not see a few classes only."""
    order = SampleOrder([1024] * 1250, seed=0, batch=256, streams=64, window=4)
    assert len({shard for shard, _ in located(order, range(7 * 256, 8 * 256))}) > 150


@pytest.mark.parametrize("counts", [[10] * 10 + [3], [7, 1, 30, 2], [1] * 3])
@pytest.mark.parametrize(("batch", "streams", "window"), [(24, 64, 4), (7, 3, 1), (16, 1, 256)])
def test_many_places_at_once_are_those_one_by_one(
    counts: list[int], batch: int, streams: int, window: int
) -> None:
    order = SampleOrder(counts, seed=3, batch=batch, streams=streams, window=window)
    positions = np.random.default_rng(0).integers(0, 4 * sum(counts), 500)
    one_by_one = [located(order, [position])[0] for position in positions.tolist()]
    assert located(order, positions) == one_by_one


def test_values_and_labels(tmp_path: Path) -> None:
    index = write_pixels(tmp_path)
    x, y = reader_of(index, 24).read([5, 400])
    numbers = sample_numbers(x)
    expected = np.stack([np.arange(i, i + 6).reshape(1, 2, 3) for i in numbers])
    assert np.array_equal(x, ((expected - 1.0) * 0.5).astype(np.float32))
    assert y.tolist() == [i % 10 for i in numbers]
    assert (x.dtype, y.dtype, index.x_shape) == (np.float32, np.int64, (1, 2, 3))


@pytest.mark.parametrize("flip", [False, True])
def test_global_batches_are_the_same_on_every_layout(tmp_path: Path, flip: bool) -> None:
    """Steps 3 to 11 of 24 samples: over the seams of epochs of 103, with a last shard of 3."""
    index = write_pixels(tmp_path)
    expected = global_batches(index, 3, 9, batch=24, world=1, flip=flip)
    for world, accumulation in ((1, 3), (2, 1), (2, 2), (4, 1), (4, 3), (8, 1)):
        assert_same(
            expected,
            global_batches(
                index, 3, 9, batch=24, world=world, accumulation=accumulation, flip=flip
            ),
        )


@pytest.mark.parametrize(
    ("world", "workers"),
    [
        pytest.param(
            world,
            workers,
            marks=[] if workers == 0 or (world, workers) == (2, 3) else pytest.mark.slow,
        )
        for world in (1, 2, 4)
        for workers in (0, 1, 3)
    ],
)
def test_every_layout_reads_every_sample_once_and_goes_on_anywhere(
    tmp_path: Path, world: int, workers: int
) -> None:
    """Two epochs of 11 shards, the last one short: begun by these ranks and workers, gone on with
    by one rank and a thread in the middle of an epoch, and in the next one as before.
    """
    index = write_moments(tmp_path, flips=True, count=COUNT)
    layout = {"batch": 16, "world": world, "accumulation": 2, "workers": workers, "flip": True}
    read = [
        *global_batches(index, 0, 3, **layout),
        *global_batches(index, 3, 5, batch=16, world=1, flip=True),
        *global_batches(index, 8, 5, **layout),
    ]
    assert_same(global_batches(index, 0, 13, batch=16, world=1, flip=True), read)
    x = torch.cat([x for x, _ in read]).numpy()
    numbers = np.abs(x.mean((1, 2, 3)) / MOMENTS.scale).round().astype(int).tolist()
    assert torch.cat([y for _, y in read]).tolist() == [number % 10 for number in numbers]
    assert sorted(numbers[:COUNT]) == sorted(numbers[COUNT : 2 * COUNT]) == list(range(COUNT))


def test_resuming_at_any_step_continues_exactly(tmp_path: Path) -> None:
    index = write_moments(tmp_path, flips=True)
    share = Share(16, 4, 2, 1, 2)
    with BatchStream(reader_of(index, 16, flip=True), share, start_step=0) as stream:
        straight = take(stream, 7)
    for step in range(7):
        with BatchStream(reader_of(index, 16, flip=True), share, start_step=step) as resumed:
            assert resumed.step == step
            for mine, theirs in zip(next(resumed), straight[step], strict=True):
                assert torch.equal(mine.x, theirs.x) and torch.equal(mine.y, theirs.y)
                assert mine.positions == theirs.positions
            assert resumed.step == step + 1


def test_the_cursor_of_a_large_index_is_found_without_replay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wherever it is, its step costs the order of the epoch's shards and, of every stream, the
    window that it is in (or two).
    """
    drawn = 0

    def permutation(use: Use, seed: int, first: int, second: int, size: int) -> np.ndarray:
        nonlocal drawn
        drawn += size
        return original(use, seed, first, second, size)

    original = order_module.permutation
    monkeypatch.setattr(order_module, "permutation", permutation)
    order = SampleOrder([1024] * 1250, seed=0, batch=256, streams=64, window=4)
    for step in (1, 123_456, 700_000):
        drawn = 0
        assert len(set(located(order, range(step * 256, (step + 1) * 256)))) == 256
        assert 64 <= drawn <= 2 * 1250 + 64 * 2 * 4 * 1024, step


@pytest.mark.parametrize("workers", [0, 2])
def test_two_steps_stay_valid_and_memory_stays_flat(tmp_path: Path, workers: int) -> None:
    index = write_pixels(tmp_path)
    with BatchStream(
        reader_of(index, 24), Share(24, 24, 1, 0, 1), start_step=0, workers=workers, prefetch=1
    ) as stream:
        places = set()
        (current,) = next(stream)
        for _ in range(40):
            before = current.x.clone()
            (upcoming,) = next(stream)
            assert torch.equal(current.x, before)
            places.add(upcoming.x.data_ptr())
            current = upcoming
    assert len(places) == 3  # two that are held, one ahead


def test_host_memory_stays_flat_over_an_epoch(tmp_path: Path) -> None:
    import psutil

    samples = ((f"{i:05d}", np.full((8, 16, 16), i, np.float16), i % 10) for i in range(4096))
    index = write_shards(
        samples, tmp_path, samples_per_shard=128, meta=MOMENTS
    )  # 17 MB in 32 shards
    reader = ShardReader(index, seed=0, batch=64, streams=4, window=1)
    own, used = psutil.Process(), []
    with BatchStream(reader, Share(64, 64, 1, 0, 1), start_step=0) as stream:
        for _ in range(64):
            next(stream)
            used.append(own.memory_info().rss)
    assert max(used[16:]) - used[16] < 2 * 2**20, used
    assert len(reader._open) <= 4 * 2


@pytest.mark.slow
def test_the_benchmark_sets_all_ways_side_by_side(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Its two statements that hold on a busy machine too: a resume takes seconds, and memory does
    not grow.
    """
    from diffmoe.bench.data import RESUME_LIMIT, main

    main(
        [
            "--samples",
            "2048",
            "--repeats",
            "1",
            "--folder",
            str(tmp_path),
            "--out",
            str(tmp_path / "out"),
        ]
    )
    record = json.loads((tmp_path / "out/data.json").read_text())
    assert set(record["samples_per_second"]) == {
        "loader",
        "webdataset",
        "npz",
        "tar",
    }
    assert min(record["samples_per_second"].values()) > 0
    assert (
        record["resume_index_samples"] >= 1_281_167 and record["resume_seconds_max"] < RESUME_LIMIT
    )
    assert max(record["memory_mib"][1:]) - record["memory_mib"][1] < 4, record["memory_mib"]
    kept = (tmp_path / "out/data.md").read_text()
    assert kept.startswith(capsys.readouterr().out) and "run.py bench" in kept
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--samples", "1000"], r"--samples \(1000\) must be divisible by 1024"),
        (["--repeats", "0"], r"--repeats \(0\) must be at least 1"),
        (["--samples", "some"], "invalid int value: 'some'"),
    ],
)
def test_the_benchmark_refuses_bad_numbers(arguments: list[str], message: str) -> None:
    from diffmoe.bench.data import main

    with pytest.raises(UserError, match=message):
        main(arguments)


def test_workers_bring_no_torch(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys, diffmoe.data.worker; "
        "print([m for m in ('torch', 'webdataset', 'PIL') if m in sys.modules])"
    )
    root = Path(__file__).resolve().parent.parent
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60
    )
    assert said.stdout.strip() == "[]", said


def test_two_writings_have_equal_bytes(tmp_path: Path) -> None:
    first, second = (write_moments(tmp_path / name, flips=True) for name in ("a", "b"))
    names = sorted(path.name for path in first.folder.iterdir())
    assert names == ["index.json"] + [f"shard-{i:06d}.tar" for i in range(4)]
    for name in names:
        assert (first.folder / name).read_bytes() == (second.folder / name).read_bytes()
    assert load_index(first.folder) == load_index(str(first.folder / "index.json")) == first


def test_moments_follow_the_formula_with_their_own_noise(tmp_path: Path) -> None:
    index = write_moments(tmp_path, flips=False)
    reader = ShardReader(index, seed=9)
    positions = range(30, 50)  # two epochs
    x, _ = reader.read(positions)
    for row, position in zip(x, positions):
        use = 4  # Use.MOMENTS, written out: a change of stream would change every run
        words = np.random.Philox(
            key=np.array([9, position], np.uint64), counter=np.array([0, 0, 0, use], np.uint64)
        )
        eps = normals(words.random_raw(2), (2, 2, 2))
        number = row.mean() / 0.18215 / (1 + eps.mean() / 1000)
        i = round(float(number))
        np.testing.assert_allclose(
            row, (i + np.float16(i / 1000) * eps) * 0.18215, rtol=1e-5, atol=1e-6
        )
    assert index.x_shape == (2, 2, 2)
    alone = np.stack([ShardReader(index, seed=9).read([p])[0][0] for p in reversed(positions)])[
        ::-1
    ]
    assert np.array_equal(x, alone)
    assert not np.array_equal(x, ShardReader(index, seed=10).read(positions)[0])


def test_noise_is_normal_and_words_are_philoxs() -> None:
    words = Words(Use.MOMENTS, 11)
    for number in (5, 2**63, 5):
        assert np.array_equal(words.at(number, 7), philox(Use.MOMENTS, 11, number).random_raw(7))
    z = np.concatenate([normals(words.at(i, 1000), (4000,)) for i in range(250)]).astype(np.float64)
    assert abs(z.mean()) < 4e-3 and abs(z.var() - 1) < 6e-3 and abs((z**4).mean() - 3) < 0.03
    assert (
        abs(np.corrcoef(z[:-1], z[1:])[0, 1]) < 4e-3 and abs((np.abs(z) < 1).mean() - 0.6827) < 2e-3
    )


def test_log_variances_and_bfloat16(tmp_path: Path) -> None:
    half = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    assert np.array_equal(to_float(half, "float16"), half.astype(np.float32), equal_nan=True)
    exact = torch.randn(1000).bfloat16()
    assert np.array_equal(
        to_float(exact.view(torch.int16).numpy().view(np.uint16), "bfloat16"), exact.float().numpy()
    )
    moments = np.concatenate([np.full((1, 2, 2), 3.0), np.full((1, 2, 2), 0.5)]).astype(np.float32)
    logs = np.concatenate([moments[:1], 2 * np.log(moments[1:])])
    pairs = [
        write_shards(
            [("a", array, 0)],
            tmp_path / spread,
            samples_per_shard=1,
            meta=ShardMeta("moments", 1, spread=spread),
        )
        for array, spread in ((moments, "std"), (logs, "logvar"))
    ]
    one, other = (
        ShardReader(load_index(index.folder), seed=0).read(range(5))[0] for index in pairs
    )
    np.testing.assert_allclose(one, other, rtol=1e-6)
    with pytest.raises(UserError, match="spread"):
        ShardMeta("moments", 1, spread="variance")


def test_flipped_moments_come_from_their_own_member(tmp_path: Path) -> None:
    index = write_moments(tmp_path / "with", flips=True)
    plain, _ = ShardReader(index, seed=1).read(range(400))
    flipped, _ = ShardReader(index, seed=1, flip=True).read(range(400))
    assert (plain.mean((1, 2, 3)) >= 0).all()
    mirrored = flipped.mean((1, 2, 3)) < 0
    assert 150 < int(mirrored.sum()) < 240
    assert np.array_equal(flipped[~mirrored], plain[~mirrored])
    with pytest.raises(UserError, match="flip .True. needs flipped moments"):
        ShardReader(write_moments(tmp_path / "without", flips=False), seed=1, flip=True)


def test_pixels_flip_mirrors_the_last_axis(tmp_path: Path) -> None:
    index = write_pixels(tmp_path)
    plain, flipped = (
        ShardReader(index, seed=1, flip=flip).read(range(206))[0] for flip in (False, True)
    )
    mirrored = (plain != flipped).any((1, 2, 3))
    assert np.array_equal(flipped[mirrored], plain[mirrored][..., ::-1])
    assert 70 < int(mirrored.sum()) < 136
    assert (
        mirrored[:103] != mirrored[103:]
    ).any()  # a coin per position, not per sample or per epoch


def test_missing_things_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere.*does not exist"):
        load_index(tmp_path / "nowhere")
    with pytest.raises(UserError, match="has no index.json"):
        load_index(tmp_path)
    index = write_pixels(tmp_path)
    path = tmp_path / "shard-000003.tar"
    content = path.read_bytes()
    path.write_bytes(content[:-512])
    with pytest.raises(
        UserError, match=f"shard-000003.tar.*{len(content) - 512} bytes.*{len(content)}"
    ):
        load_index(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match="shard shard-000003.tar is missing"):
        load_index(tmp_path)
    with pytest.raises(BadShard, match="shard shard-000003.tar is missing"):
        ShardReader(index, seed=0).read(range(COUNT))  # vanished after the start


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format .2."),
        ({"count": 7}, "count .7."),
        ({"dtype": "no"}, "malformed"),
        (
            {"shards": [{"name": "../x.tar", "count": 103, "bytes": 1, "sha256": ""}]},
            "plain file name",
        ),
    ],
)
def test_malformed_index_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    write_pixels(tmp_path)
    record = json.loads((tmp_path / "index.json").read_text()) | change
    (tmp_path / "index.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=message):
        load_index(tmp_path)


@pytest.mark.parametrize(
    ("member", "payload", "message"),
    [
        (
            "024.npy",
            npy(np.array([{"a": 1}], dtype=object)),
            "member 024.npy: Object arrays cannot be loaded",
        ),
        (
            "024.npy",
            npy(np.zeros((1, 2, 4), np.float32)),
            r"member 024.npy: array is float32 \(1, 2, 4\)",
        ),
        ("024.npy", npy(np.zeros((1, 2, 3), np.float32))[:-4], "member 024.npy: .*EOF"),
        ("024.npy", b"garbage", "member 024.npy: "),
        ("024.cls", b"12", "member 024.cls: label .12."),
        ("024.cls", b"x", "member 024.cls: "),
        ("/etc/024.npy", b"", "member /etc/024.npy: unsafe name"),
        ("../024.npy", b"", "member ../024.npy: unsafe name"),
        (
            "023.npy",
            npy(np.zeros((1, 2, 3), np.float32)),
            "member 023.npy: second member of this name",
        ),
        ("024.txt", b"", "missing member 024.npy|missing member 024.cls"),
    ],
)
def test_bad_members_are_named(tmp_path: Path, member: str, payload: bytes, message: str) -> None:
    index = write_pixels(tmp_path)
    replaced = "024.cls" if member.endswith(".cls") else "024.npy"
    members = [
        (member, payload) if name == replaced else (name, old)
        for name, old in shard_members(index, 2)
        if name != "__rows__"
    ]  # a tar of others
    rewrite_shard(index, 2, members)
    with pytest.raises(UserError, match=message) as caught:
        read_everything(index)
    assert "shard-000002.tar" in str(caught.value)


@pytest.mark.parametrize(
    "name, message",
    [
        ("/etc/024.npy", "unsafe name"),
        ("../024.npy", "unsafe name"),
        ("024.npy", "Object arrays cannot be loaded"),
    ],
)
def test_a_table_that_fits_lets_nothing_bad_through(
    tmp_path: Path, name: str, message: str
) -> None:
    """Whoever makes a shard can make its checksums too."""
    index = write_pixels(tmp_path)
    path = tmp_path / "shard-000002.tar"
    content = bytearray(path.read_bytes())
    reader = ShardReader(index, seed=0)
    table = reader._open_shard(2).table
    header, payload = int(table.offsets[4, 0]), int(table.offsets[4, 0]) + 512
    pickled = (
        npy(np.array([{"a": 1}], dtype=object))
        if "Object" in message
        else content[payload : payload + table.sizes[4, 0]]
    )
    content[header : header + 100] = name.encode().ljust(100, b"\0")
    content[payload : payload + len(pickled)] = pickled
    table = replace(table, sizes=table.sizes.copy())  # one number for all rows until here
    table.sizes[4, 0] = len(pickled)
    table.crcs[4, 0] = zlib.crc32(content[header : payload + len(pickled)])
    packed = pack_table(table)
    content[512 : 512 + len(packed)] = packed
    path.write_bytes(content)
    with pytest.raises(BadShard, match=f"shard shard-000002.tar, member {name}: {message}"):
        reader.read(range(COUNT))


def test_a_shard_that_was_cut_names_the_first_lost_member(tmp_path: Path) -> None:
    index = write_pixels(tmp_path)
    path = tmp_path / "shard-000002.tar"
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        third = tar.getmember("023.npy")
    for size, lost in (
        (third.offset_data + 100, "; member 023.npy is the first that is not intact"),
        (third.offset - 600, "; member of row 3 is the first that is not intact"),
        (0, ""),
    ):
        path.write_bytes(whole[:size])
        with pytest.raises(
            BadShard, match=f"shard-000002.tar has {size} bytes, its index says {len(whole)}{lost}$"
        ):
            ShardReader(index, seed=0).read(range(COUNT))


def test_any_flipped_byte_of_an_array_is_named_by_its_member(tmp_path: Path) -> None:
    index = write_pixels(tmp_path)
    path = tmp_path / "shard-000002.tar"
    intact = path.read_bytes()
    with tarfile.open(path) as tar:
        member = tar.getmember("025.npy")
    for byte in (member.offset_data + 130, member.offset_data + 5, member.offset + 200):
        damaged = bytearray(intact)
        damaged[byte] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(
            BadShard,
            match=f"shard shard-000002.tar, member 025.npy: altered, in bytes {member.offset} to",
        ) as caught:
            ShardReader(index, seed=0).read(range(COUNT))
        assert caught.value.shard == "shard-000002.tar"
    damaged = bytearray(intact)
    damaged[700] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(BadShard, match="member __rows__: its CRC-32 is wrong"):
        ShardReader(index, seed=0).read(range(COUNT))


def test_tars_of_others_are_checked_by_their_whole_checksum(tmp_path: Path) -> None:
    index = write_pixels(tmp_path)
    rewrite_shard(
        index, 2, [(name, data) for name, data in shard_members(index, 2) if name != "__rows__"]
    )
    with pytest.raises(BadShard, match="shard-000002.tar.*SHA-256"):
        read_everything(index)
    path = tmp_path / "shard-000002.tar"
    path.write_bytes(path.read_bytes()[: 4 * 2048])
    set_size(index, 2)
    with pytest.raises(
        BadShard,
        match="000002.tar: ends after 4 samples .last member 023.npy, byte 8192., its index says "
        "10",
    ):
        read_everything(index)


def test_webdataset_reads_what_we_write(tmp_path: Path) -> None:
    import webdataset

    index = write_moments(tmp_path, flips=True)
    urls = [index.address(shard) for shard in index.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == [f"{i:03d}" for i in range(40)]
    assert all(
        sample["cls"] == i % 10
        and sample["npy"][0, 0, 0] == i
        and sample["flip.npy"][0, 0, 0] == -i
        for i, sample in enumerate(samples)
    )


def test_fingerprints_are_of_the_content(tmp_path: Path) -> None:
    first, second = (write_moments(tmp_path / name, flips=True) for name in ("a", "b"))
    other = write_moments(tmp_path / "c", flips=False)
    assert load_index(first.folder).fingerprint == second.fingerprint != other.fingerprint
    subset = load_index(str(tmp_path / "a" / "shard-00000{0,2}.tar"))
    assert [s.name for s in subset.shards] == [
        "shard-000000.tar",
        "shard-000002.tar",
    ] and subset.count == 20
    assert subset.fingerprint != first.fingerprint


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (("b", np.zeros((1, 2, 2), np.float32), 10), "label .10."),
        (("b", np.zeros((1, 2, 3), np.float32), 1), "the first is"),
        (("b", np.full((1, 2, 2), np.nan, np.float32), 1), "not finite"),
        (("a", np.zeros((1, 2, 2), np.float32), 1), "appears twice"),
        (("../b", np.zeros((1, 2, 2), np.float32), 1), "key"),
        (("b.c", np.zeros((1, 2, 2), np.float32), 1), "key"),
        (("b", np.zeros((1, 2, 2), np.float32), 1, np.zeros((1, 2, 2), np.float32)), "has 4 items"),
    ],
)
def test_bad_samples_leave_no_index(tmp_path: Path, sample: tuple, message: str) -> None:
    good = ("a", np.zeros((1, 2, 2), np.float32), 0)
    with pytest.raises(UserError, match=message):
        write_shards([good, sample], tmp_path, samples_per_shard=4, meta=PIXELS)
    assert not (tmp_path / "index.json").exists()


def test_finished_data_sets_are_not_overwritten(tmp_path: Path) -> None:
    write_pixels(tmp_path)
    with pytest.raises(UserError, match="already holds"):
        write_pixels(tmp_path)
    with pytest.raises(UserError, match="must not be empty"):
        write_shards([], tmp_path / "empty", samples_per_shard=4, meta=PIXELS)


@pytest.mark.parametrize("workers", [0, 3])
def test_an_error_ahead_surfaces_after_the_good_batches_and_stays(
    tmp_path: Path, workers: int
) -> None:
    index = write_pixels(tmp_path)
    reader = ShardReader(index, seed=0, batch=2, streams=1, window=1)  # one shard at a time
    shards = [shard for shard, _ in reader.places(range(COUNT))]
    assert shards[0] != shards[40]
    (tmp_path / index.shards[shards[40]].name).unlink()
    with BatchStream(reader, Share(2, 2, 1, 0, 1), start_step=0, workers=workers) as stream:
        for _ in range(shards.index(shards[40]) // 2):
            next(stream)
        for _ in range(2):
            with pytest.raises(BadShard, match="is missing"):
                next(stream)


@pytest.mark.parametrize("workers", [0, 2])
def test_close_ends_the_workers(tmp_path: Path, workers: int) -> None:
    reader = reader_of(write_pixels(tmp_path), 8)
    stream = BatchStream(reader, Share(8, 8, 1, 0, 1), start_step=0, prefetch=1, workers=workers)
    (batch,) = next(stream)
    stream.close()
    stream.close()
    if workers:
        assert [worker._process.returncode for worker in stream._workers] == [0, 0]
    else:
        assert not any(t.is_alive() for t in stream._workers[0]._pool._threads)
    assert torch.isfinite(batch.x).all()
    with pytest.raises(RuntimeError, match="closed"):
        next(stream)
    with pytest.raises(AssertionError):
        Share(8, 3, 1, 0, 1)


def test_a_killed_worker_is_an_error_and_signals_to_stop_are_not_its_own(tmp_path: Path) -> None:
    stream = BatchStream(
        reader_of(write_pixels(tmp_path), 24), Share(24, 24, 1, 0, 1), start_step=0, workers=2
    )
    with stream:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(stream._workers[0]._process.pid, number)
        take(stream, 5)
        os.kill(stream._workers[1]._process.pid, signal.SIGKILL)
        with pytest.raises(OSError, match="data worker 1 of rank 0 was killed by signal 9"):
            take(stream, 10)


@pytest.mark.full
def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    """Also where the parent is killed and closes nothing."""
    import multiprocessing

    index = write_pixels(tmp_path)
    context = multiprocessing.get_context("spawn")
    pids = context.Queue()
    parent = context.Process(target=_hold_a_stream, args=(index, pids))
    parent.start()
    worker = pids.get(timeout=60)
    parent.kill()
    parent.join()
    deadline = time.monotonic() + 30
    while (
        Path(f"/proc/{worker}").exists()
        and "Z" not in Path(f"/proc/{worker}/stat").read_text().split()[2]
    ):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _hold_a_stream(index: ShardIndex, pids) -> None:
    stream = BatchStream(reader_of(index, 24), Share(24, 24, 1, 0, 1), start_step=0, workers=1)
    next(stream)
    pids.put(stream._workers[0]._process.pid)
    time.sleep(60)


def test_what_is_left_out_is_replaced_by_position_and_nothing_else_moves(tmp_path: Path) -> None:
    index = write_pixels(tmp_path)
    plain = reader_of(index, 24).read(range(240))[0]
    without = {index.shards[4].name: 3}
    x, _ = reader_of(index, 24, excluded=without).read(range(240))
    before, after = sample_numbers(plain), sample_numbers(x)
    assert after[:72] == before[:72] and 40 <= min(n for n in before[:72] if 40 <= n < 50)
    for old, new in zip(before[72:], after[72:]):
        assert new == old if not 40 <= old < 50 else not 40 <= new < 50
    assert_same(
        global_batches(index, 2, 4, batch=24, world=4, excluded=without),
        global_batches(index, 2, 4, batch=24, world=1, workers=2, excluded=without),
    )
    with pytest.raises(UserError, match="every shard of .* is bad"):
        reader_of(index, 24, excluded={shard.name: 0 for shard in index.shards})


def test_digits_are_real_in_range_and_written_once(tmp_path: Path) -> None:
    index = write_digits(tmp_path)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert write_digits(tmp_path) == index
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == written
    assert [shard.count for shard in index.shards] == [200] * 8 + [197]
    x, y = ShardReader(index, seed=0).read(range(1797))
    assert (float(x.min()), float(x.max())) == (-1.0, 1.0)
    assert x.shape == (1797, 1, 8, 8)
    assert np.bincount(y).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_digits_refuse_another_data_set(tmp_path: Path) -> None:
    write_pixels(tmp_path)
    with pytest.raises(UserError, match="another data set: 103 samples"):
        write_digits(tmp_path)


@pytest.mark.parametrize("kinds", [1, 2])
def test_a_table_of_rows_is_read_without_pythons_parser(
    monkeypatch: pytest.MonkeyPatch, kinds: int
) -> None:
    places = np.arange(6 * kinds).reshape(6, kinds)
    packed = pack_table(RowTable(np.arange(6) % 3, 512 * places, 7 + places % 2, 1000 + places))

    def parse(*_: object) -> None:
        raise SystemError(
            "AST constructor recursion depth mismatch"
        )  # Python 3.11's, now and then, in several threads

    monkeypatch.setattr("ast.literal_eval", parse)
    table = unpack_table(packed, 6, 3, kinds)
    assert np.array_equal(table.labels, np.arange(6) % 3) and np.array_equal(
        table.offsets, 512 * places
    )
    assert np.array_equal(table.sizes, 7 + places % 2) and np.array_equal(table.crcs, 1000 + places)
    with pytest.raises(UserError, match="not a table of rows"):
        unpack_table(packed[:20] + zlib.crc32(packed[:20]).to_bytes(4, "little"), 6, 3, kinds)
