"""Shards, their order and the batch stream: exactly once, the same on every layout, loud when damaged."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from diffmoe.data.digits import write_digits
from diffmoe.data.shards import BatchStream, ShardIndex, ShardMeta, ShardReader, load_index, write_shards

PIXELS = ShardMeta(kind="pixels", classes=10, scale=0.5, mean=1.0)
MOMENTS = ShardMeta(kind="moments", classes=10, scale=0.18215)
COUNT = 103  # shards of 10: the last is short, and no batch size used below divides it


def write_pixels(folder: Path, count: int = COUNT) -> ShardIndex:
    """Sample i is a [1, 2, 3] array that begins with i, label i % 10."""
    samples = ((f"{i:03d}", np.arange(i, i + 6, dtype=np.float32).reshape(1, 2, 3), i % 10) for i in range(count))
    return write_shards(samples, folder, samples_per_shard=10, meta=PIXELS)


def write_moments(folder: Path, *, flips: bool) -> ShardIndex:
    """Sample i has mean i, standard deviation i / 100; the flipped image's mean is -i."""

    def moments(mean: float, i: int) -> np.ndarray:
        return np.concatenate([np.full((2, 2, 2), mean), np.full((2, 2, 2), i / 100)]).astype(np.float16)

    samples = ((f"{i:03d}", moments(i, i), i % 10, *([moments(-i, i)] if flips else [])) for i in range(40))
    return write_shards(samples, folder, samples_per_shard=10, meta=MOMENTS)


def sample_numbers(x: torch.Tensor) -> list[int]:
    """The sample numbers of a batch that `write_pixels` wrote."""
    return (x[:, 0, 0, 0] / PIXELS.scale + PIXELS.mean).round().int().tolist()


def global_step(index: ShardIndex, step: int, *, batch: int, world: int, accumulation: int, **reader) -> tuple:
    """x and y of one global batch, put together from every rank's micro-batches."""
    parts = []
    for rank in range(world):
        stream = BatchStream(ShardReader(index, seed=3, window=4, **reader), batch=batch, accumulation=accumulation,
                             micro_batch=batch // world // accumulation, rank=rank, world=world, start_step=step)
        with stream:
            parts.append(next(stream))
    ordered = [parts[rank][j] for j in range(accumulation) for rank in range(world)]
    assert [p for part in ordered for p in part.positions] == list(range(step * batch, (step + 1) * batch))
    return torch.cat([part.x for part in ordered]), torch.cat([part.y for part in ordered])


def rewrite_shard(index: ShardIndex, number: int, members: list[tuple[str, bytes]]) -> None:
    """Replace a shard by other members and give the index its new size, as an attacker or a bad copy tool might."""
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


def test_every_sample_once_per_epoch_and_epochs_differ(tmp_path: Path) -> None:
    reader = ShardReader(write_pixels(tmp_path), seed=0, window=3)
    epochs = [sample_numbers(reader.read(range(e * COUNT, (e + 1) * COUNT)).x) for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(COUNT))
        assert epoch != list(range(COUNT))
    assert epochs[0] != epochs[1] != epochs[2]
    other = ShardReader(reader.index, seed=1, window=3).read(range(COUNT))
    assert sample_numbers(other.x) != epochs[0]


def test_values_and_labels(tmp_path: Path) -> None:
    index = write_pixels(tmp_path)
    batch = ShardReader(index, seed=0).read([5, 400])
    numbers = sample_numbers(batch.x)
    expected = np.stack([np.arange(i, i + 6).reshape(1, 2, 3) for i in numbers])
    assert torch.equal(batch.x, torch.tensor((expected - 1.0) * 0.5, dtype=torch.float32))
    assert batch.y.tolist() == [i % 10 for i in numbers]
    assert (batch.x.dtype, batch.y.dtype, batch.positions) == (torch.float32, torch.int64, (5, 400))
    assert index.x_shape == (1, 2, 3)


def test_window_mixes_only_its_own_shards_and_bounds_memory(tmp_path: Path) -> None:
    reader = ShardReader(write_pixels(tmp_path, count=120), seed=0, window=3)
    numbers = sample_numbers(reader.read(range(120)).x)
    windows = [{n // 10 for n in numbers[start : start + 30]} for start in range(0, 120, 30)]
    assert [len(window) for window in windows] == [3, 3, 3, 3]
    assert set.union(*windows) == set(range(12))
    reader.read(range(120, 600))
    assert len(reader._cache) <= 6


@pytest.mark.parametrize("step", [0, 4, 9])  # of 24: step 4 straddles epochs 0 and 1 of 103 samples
def test_global_batch_is_the_same_on_every_layout(tmp_path: Path, step: int) -> None:
    index = write_pixels(tmp_path)
    x, y = global_step(index, step, batch=24, world=1, accumulation=1, flip=True)
    for world in (1, 2, 4):
        for accumulation in (1, 2):
            other_x, other_y = global_step(index, step, batch=24, world=world, accumulation=accumulation, flip=True)
            assert torch.equal(x, other_x) and torch.equal(y, other_y), (world, accumulation)


def test_resuming_at_any_step_continues_exactly(tmp_path: Path) -> None:
    index = write_moments(tmp_path, flips=True)
    layout = {"batch": 16, "micro_batch": 4, "accumulation": 2, "rank": 1, "world": 2}
    with BatchStream(ShardReader(index, seed=5, flip=True), start_step=0, **layout) as stream:
        straight = [next(stream) for _ in range(7)]
    for step in range(7):
        with BatchStream(ShardReader(index, seed=5, flip=True), start_step=step, **layout) as resumed:
            assert resumed.step == step
            for mine, theirs in zip(next(resumed), straight[step], strict=True):
                assert torch.equal(mine.x, theirs.x) and torch.equal(mine.y, theirs.y)
                assert mine.positions == theirs.positions
            assert resumed.step == step + 1


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
    x = reader.read(positions).x.numpy()
    for row, position in zip(x, positions):
        use = 4  # Use.MOMENTS, written out: a change of stream would change every run
        words = np.random.Philox(key=np.array([9, position], np.uint64), counter=np.array([0, 0, 0, use], np.uint64))
        eps = np.random.Generator(words).standard_normal((2, 2, 2), dtype=np.float32)
        number = row.mean() / 0.18215 / (1 + eps.mean() / 100)
        i = round(float(number))
        np.testing.assert_allclose(row, (i + np.float16(i / 100) * eps) * 0.18215, rtol=1e-5, atol=1e-6)
    assert index.x_shape == (2, 2, 2)
    alone = np.stack([ShardReader(index, seed=9).read([p]).x.numpy()[0] for p in reversed(positions)])[::-1]
    assert np.array_equal(x, alone)
    assert not np.array_equal(x, ShardReader(index, seed=10).read(positions).x.numpy())


def test_flipped_moments_come_from_their_own_member(tmp_path: Path) -> None:
    index = write_moments(tmp_path / "with", flips=True)
    plain = ShardReader(index, seed=1).read(range(400)).x
    flipped = ShardReader(index, seed=1, flip=True).read(range(400)).x
    assert (plain.mean(dim=(1, 2, 3)) >= 0).all()
    mirrored = flipped.mean(dim=(1, 2, 3)) < 0
    assert 150 < int(mirrored.sum()) < 240
    assert torch.equal(flipped[~mirrored], plain[~mirrored])
    with pytest.raises(ValueError, match="flip .True. needs flipped moments"):
        ShardReader(write_moments(tmp_path / "without", flips=False), seed=1, flip=True)


def test_pixels_flip_mirrors_the_last_axis(tmp_path: Path) -> None:
    index = write_pixels(tmp_path)
    plain, flipped = (ShardReader(index, seed=1, flip=flip).read(range(206)).x for flip in (False, True))
    mirrored = (plain != flipped).flatten(1).any(dim=1)
    assert torch.equal(flipped[mirrored], plain[mirrored].flip(-1))
    assert 70 < int(mirrored.sum()) < 136
    assert (mirrored[:103] != mirrored[103:]).any()  # a coin per position, not per sample or per epoch


def test_missing_things_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere.*does not exist"):
        load_index(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has no index.json"):
        load_index(tmp_path)
    index = write_pixels(tmp_path)
    path = tmp_path / "shard-000003.tar"
    content = path.read_bytes()
    path.write_bytes(content[:-512])
    with pytest.raises(ValueError, match=f"shard-000003.tar.*{len(content) - 512} bytes.*{len(content)}"):
        load_index(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match="shard shard-000003.tar is missing"):
        load_index(tmp_path)
    with pytest.raises(ValueError, match="shard shard-000003.tar is missing"):
        ShardReader(index, seed=0).read(range(COUNT))  # vanished after the start


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format .2."),
        ({"count": 7}, "count .7."),
        ({"dtype": "no"}, "malformed"),
        ({"shards": [{"name": "../x.tar", "count": 103, "bytes": 1, "sha256": ""}]}, "plain file name"),
    ],
)
def test_malformed_index_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    write_pixels(tmp_path)
    record = json.loads((tmp_path / "index.json").read_text()) | change
    (tmp_path / "index.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=message):
        load_index(tmp_path)


@pytest.mark.parametrize(
    ("member", "payload", "message"),
    [
        ("024.npy", npy(np.array([{"a": 1}], dtype=object)), "member 024.npy: Object arrays cannot be loaded"),
        ("024.npy", npy(np.zeros((1, 2, 4), np.float32)), r"member 024.npy: array is float32 \(1, 2, 4\)"),
        ("024.npy", npy(np.zeros((1, 2, 3), np.float32))[:-4], "member 024.npy: .*EOF"),
        ("024.npy", b"garbage", "member 024.npy: "),
        ("024.cls", b"12", "member 024.cls: label .12."),
        ("024.cls", b"x", "member 024.cls: "),
        ("/etc/024.npy", b"", "member /etc/024.npy: unsafe name"),
        ("../024.npy", b"", "member ../024.npy: unsafe name"),
        ("023.npy", npy(np.zeros((1, 2, 3), np.float32)), "member 023.npy: second member of this name"),
        ("024.txt", b"", "missing member 024.npy|missing member 024.cls"),
    ],
)
def test_bad_members_are_named(tmp_path: Path, member: str, payload: bytes, message: str) -> None:
    index = write_pixels(tmp_path)
    replaced = "024.cls" if member.endswith(".cls") else "024.npy"
    members = [(member, payload) if name == replaced else (name, old) for name, old in shard_members(index, 2)]
    rewrite_shard(index, 2, members)
    with pytest.raises(ValueError, match=message) as caught:
        read_everything(index)
    assert "shard-000002.tar" in str(caught.value)


def test_truncated_and_altered_shards_are_named(tmp_path: Path) -> None:
    index = write_pixels(tmp_path)
    path = tmp_path / "shard-000002.tar"
    content = path.read_bytes()
    cut_array = 3 * 2048 + 1024 + 512 + 100  # a member is a header and a block, a sample is .cls and .npy
    for size, message in ((cut_array, "shard-000002.tar: unreadable at or after member 023.npy"),
                          (4 * 2048, "shard-000002.tar: ends after 4 samples .last member 023.npy., its index says 10"),
                          (0, "shard-000002.tar: unreadable at or after member .none yet.")):
        path.write_bytes(content[:size])
        set_size(index, 2)
        with pytest.raises(ValueError, match=message):
            read_everything(index)
    flipped_bit = bytearray(content)
    flipped_bit[1024 + 512 + 128] ^= 1  # first data byte of 020.npy: still a fine array
    path.write_bytes(bytes(flipped_bit))
    set_size(index, 2)
    with pytest.raises(ValueError, match="shard-000002.tar.*SHA-256"):
        read_everything(index)


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
    with pytest.raises(ValueError, match=message):
        write_shards([good, sample], tmp_path, samples_per_shard=4, meta=PIXELS)
    assert not (tmp_path / "index.json").exists()


def test_finished_data_sets_are_not_overwritten(tmp_path: Path) -> None:
    write_pixels(tmp_path)
    with pytest.raises(ValueError, match="already holds"):
        write_pixels(tmp_path)
    with pytest.raises(ValueError, match="must not be empty"):
        write_shards([], tmp_path / "empty", samples_per_shard=4, meta=PIXELS)


def test_prefetch_error_surfaces_after_the_good_batches_and_stays(tmp_path: Path) -> None:
    index = write_pixels(tmp_path)
    reader = ShardReader(index, seed=0, window=1)  # one shard at a time: the damaged one comes later than the first
    order = [reader._order.locate(p)[0] for p in range(COUNT)]
    assert order[0] != order[40]
    (tmp_path / index.shards[order[40]].name).unlink()
    with BatchStream(reader, batch=2, micro_batch=2, accumulation=1, rank=0, world=1, start_step=0) as stream:
        for _ in range(order.index(order[40]) // 2):
            next(stream)
        for _ in range(2):
            with pytest.raises(ValueError, match="is missing"):
                next(stream)
    assert not stream._thread.is_alive()


def test_close_stops_the_thread(tmp_path: Path) -> None:
    reader = ShardReader(write_pixels(tmp_path), seed=0)
    stream = BatchStream(reader, batch=8, micro_batch=8, accumulation=1, rank=0, world=1, start_step=0, prefetch=1)
    next(stream)
    stream.close()
    stream.close()
    assert not stream._thread.is_alive()
    with pytest.raises(RuntimeError, match="closed"):
        next(stream)
    with pytest.raises(AssertionError):
        BatchStream(reader, batch=8, micro_batch=3, accumulation=1, rank=0, world=1, start_step=0)


def test_digits_are_real_in_range_and_written_once(tmp_path: Path) -> None:
    index = write_digits(tmp_path)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert write_digits(tmp_path) == index
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == written
    assert [shard.count for shard in index.shards] == [200] * 8 + [197]
    batch = ShardReader(index, seed=0).read(range(1797))
    assert (float(batch.x.min()), float(batch.x.max())) == (-1.0, 1.0)
    assert batch.x.shape == (1797, 1, 8, 8)
    assert np.bincount(batch.y).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_digits_refuse_another_data_set(tmp_path: Path) -> None:
    write_pixels(tmp_path)
    with pytest.raises(ValueError, match="another data set: 103 samples"):
        write_digits(tmp_path)
