"""Classes in a pool and how long they are away: by the defaults on ImageNet's sizes, and a warning
where it is due.
"""

from __future__ import annotations

import functools
import io
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from diffmoe.commands.inspect_data import main as inspect_main
from diffmoe.config import Config, DataConfig, ModelConfig, RunConfig, TrainConfig, load_config
from diffmoe.data.cache import Cache
from diffmoe.data.feed import open_reader, order_notice
from diffmoe.data.mixing import (
    better_order,
    completed,
    distinct,
    expected_distinct,
    longest_absence,
    measure,
    order_for,
)
from diffmoe.data.order import SampleOrder
from diffmoe.data.reader import ShardReader
from diffmoe.data.shards import Encoding, ShardIndex, ShardMeta, write_index, write_shards
from diffmoe.environment import detect
from programs import Nursery, losses, tiny

ROOT = Path(__file__).resolve().parent.parent
IMAGENET, CLASSES, PER_SHARD = 1_281_167, 1000, 1024


@functools.cache
def imagenet(shuffled: bool) -> list[np.ndarray]:
    """Labels of as many samples as ImageNet has, by shard: 732 to 1,300 of each class, in class
    order or shuffled.
    """
    rng = np.random.default_rng(0)
    counts = np.full(CLASSES, 1300)
    while (over := int(counts.sum()) - IMAGENET) > 0:
        label = rng.integers(CLASSES)
        counts[label] -= min(over, counts[label] - int(rng.integers(732, counts[label] + 1)))
    labels = np.repeat(np.arange(CLASSES), counts)
    assert len(labels) == IMAGENET and counts.min() >= 732 and counts.max() <= 1300
    return np.split(
        rng.permutation(labels) if shuffled else labels, range(PER_SHARD, IMAGENET, PER_SHARD)
    )


@functools.cache
def of_imagenet(shuffled: bool, streams: int, window: int):
    labels = imagenet(shuffled)
    order = SampleOrder(
        [len(part) for part in labels], seed=0, batch=256, streams=streams, window=window
    )
    return measure(order, labels, 64)


@pytest.mark.parametrize(("shuffled", "said"), [(False, False), (True, False), (True, True)])
def test_the_zoo_mixes_imagenet_like_a_permutation(shuffled: bool, said: bool) -> None:
    """In class order, and shuffled whether the index says so or not: a share of 0.97, at most 60
    steps.
    """
    config = load_config(ROOT / "configs/diffmoe_l_e16_flow.yaml")
    assert (config.train.batch, config.moe.pool, config.data.streams, config.data.window) == (
        256,
        64,
        None,
        None,
    )
    found, permuted = of_imagenet(
        shuffled, *order_for(said, len(imagenet(shuffled)), config.train.batch)
    )
    assert 61.5 < permuted.classes < 62.5 and 25 < permuted.absence < 35
    assert found.classes >= 0.97 * permuted.classes and found.absence <= 60 and found.like(permuted)


def test_the_order_before_does_not() -> None:
    found, permuted = of_imagenet(False, 64, 4)
    assert found.classes < 49 and found.absence > 1000 and not found.like(permuted)


@pytest.mark.parametrize(
    ("shards", "size", "classes"), [(10, 256, 40), (100, 64, 100), (300, 64, 100), (300, 64, 1000)]
)
def test_other_sizes_in_class_order(shards: int, size: int, classes: int) -> None:
    labels = np.split(np.arange(shards * size) * classes // (shards * size), shards)
    counts = [size] * shards
    before = SampleOrder(counts, seed=0, batch=256, streams=64, window=4)
    fixed = better_order(before, labels, 64)
    for streams, window in (order_for(False, shards, 256), fixed):
        order = SampleOrder(counts, seed=0, batch=256, streams=streams, window=window)
        found, permuted = measure(order, labels, 64)
        assert found.like(permuted)


def test_the_figures_by_hand() -> None:
    assert distinct(np.array([[1, 1, 1], [1, 2, 1], [3, 2, 1]])).tolist() == [1, 2, 3]
    # Step by step: class 0 is away for steps 1 to 3, then to the end; class 1 until step 1; class 2
    # until step 3.
    assert longest_absence(np.array([[0, 0], [1, 1], [1, 1], [1, 2], [0, 1]])) == 4  # of 4, 2, 4
    assert expected_distinct(np.array([1, 1]), 2) == 2
    assert expected_distinct(np.array([2, 2]), 2) == pytest.approx(1 + 2 / 3)
    assert expected_distinct(np.array([5, 0]), 64) == 1
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(20), rng.integers(1, 30, 20))
    drawn = [len(np.unique(rng.choice(labels, 16, replace=False))) for _ in range(4000)]
    assert expected_distinct(np.bincount(labels), 16) == pytest.approx(np.mean(drawn), abs=0.1)


@pytest.mark.parametrize("shuffled", [False, True])
def test_some_shards_stand_for_all(shuffled: bool) -> None:
    labels = imagenet(shuffled)
    known = [part if i % 80 == 7 else None for i, part in enumerate(labels)]
    some = completed(known, [len(part) for part in labels], CLASSES)
    assert [len(part) for part in some] == [len(part) for part in labels]
    order = SampleOrder([len(part) for part in labels], seed=0, batch=256, streams=64, window=4)
    found, permuted = measure(order, some, 64)
    assert found.like(permuted) == shuffled
    assert found.classes == pytest.approx(of_imagenet(shuffled, 64, 4)[0].classes, abs=3)


# ---- at the start of a run


def written(folder: Path, labels: np.ndarray, per_shard: int = 64, classes: int = 10) -> ShardIndex:
    samples = (
        (f"{i:05d}", np.zeros((1, 8, 8), np.float32), int(label)) for i, label in enumerate(labels)
    )
    return write_shards(
        samples, folder, samples_per_shard=per_shard, meta=ShardMeta("pixels", classes)
    )


def without_tables(index: ShardIndex) -> ShardIndex:
    """The same shards as others write them."""
    from diffmoe.data.inspect import index_tars

    for shard in index.shards:
        path = index.folder / shard.name
        with tarfile.open(path) as tar:
            members = [
                (m.name, tar.extractfile(m).read()) for m in tar if not m.name.startswith("__")
            ]
        with tarfile.open(path, "w") as tar:
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    (index.folder / "index.json").unlink()
    return index_tars(index.folder, index.meta)


IN_ORDER = np.repeat(np.arange(10), 192)


@pytest.mark.parametrize("tables", [True, False])
@pytest.mark.parametrize("mixed", [True, False])
def test_class_order_is_noticed_from_the_labels(tmp_path: Path, tables: bool, mixed: bool) -> None:
    labels = np.random.default_rng(0).permutation(IN_ORDER) if mixed else IN_ORDER
    index = written(tmp_path, labels)
    index = index if tables else without_tables(index)
    text, warning = order_notice(ShardReader(index, seed=0, batch=64, streams=8, window=1), 16)
    assert warning == (not mixed) and "a pool of 16 samples holds" in text
    if warning:
        words = dict(
            word.split("=")
            for word in text.replace(";", " ").split()
            if "data." in word and "=" in word
        )
        changed = {name.removeprefix("data."): int(value) for name, value in words.items()}
        assert changed
        fixed = ShardReader(index, seed=0, batch=64, **({"streams": 8} | changed))
        assert not order_notice(fixed, 16)[1]
    said = replace(index, encoding=Encoding("", 1, 8, 1, "", "", "", 0, 64, shuffled=3))
    assert order_notice(ShardReader(said, seed=0, batch=64, streams=8, window=1), 16) == ("", False)


def test_a_window_mends_it_where_one_can(tmp_path: Path) -> None:
    index = written(tmp_path, np.repeat(np.arange(10), 640), per_shard=16)
    text, warning = order_notice(ShardReader(index, seed=0, batch=64, streams=1, window=8), 16)
    assert warning and "; data.window=" in text and "data.streams=" not in text


def test_a_remote_data_set_is_looked_at_where_copies_are_at_hand(tmp_path: Path) -> None:
    index = written(tmp_path / "data", IN_ORDER)
    remote = replace(index, folder=Path(), place=(tmp_path / "data").as_uri() + "/{name}")
    cache = Cache(tmp_path / "cache", 2**30)
    reader = ShardReader(remote, seed=0, batch=64, streams=8, window=1, cache=cache)
    assert order_notice(reader, 16) == ("", False) and not list(tmp_path.glob("cache/*.tar"))
    (tmp_path / "cache").mkdir()
    for shard in index.shards[::5]:
        (tmp_path / "cache" / f"{shard.sha256}.tar").write_bytes(
            (index.folder / shard.name).read_bytes()
        )
    assert order_notice(reader, 16)[1]


@pytest.mark.parametrize("mixed", [True, False])
def test_inspect_data_prints_it(tmp_path: Path, capsys: pytest.CaptureFixture, mixed: bool) -> None:
    labels = np.random.default_rng(0).permutation(IN_ORDER) if mixed else IN_ORDER
    index = written(tmp_path / "data", labels)
    inspect_main([str(index.folder), "--quick", "--grid", str(tmp_path / "grid.png")], detect({}))
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("order "))
    assert ("warning: " in line) == (not mixed) and ("data.window=" in line) == (not mixed)
    write_index(replace(index, encoding=Encoding("", 1, 8, 1, "", "", "", 0, 64, shuffled=7)))
    inspect_main([str(index.folder), "--quick", "--grid", str(tmp_path / "grid.png")], detect({}))
    assert "order    shuffled when encoded, seed 7\n" in capsys.readouterr().out


# ---- what a run takes


@pytest.mark.full
@pytest.mark.parametrize(
    ("said", "before", "shuffled", "expected"),
    [
        ({}, None, True, (64, 4)),
        ({}, None, False, (1, 256)),
        ({"window": 9}, None, False, (64, 9)),
        ({"streams": 5}, None, False, (5, 4)),
        ({}, (64, 4), False, (64, 4)),
        ({}, (None, None), False, (1, 256)),
        ({"window": 8}, (32, 4), False, (32, 8)),
    ],
)
def test_streams_and_window(
    tmp_path: Path, said: dict, before: tuple | None, shuffled: bool, expected: tuple
) -> None:
    index = written(tmp_path, IN_ORDER)
    if shuffled:
        write_index(replace(index, encoding=Encoding("", 1, 8, 1, "", "", "", 0, 64, shuffled=0)))
    config = Config(
        RunConfig(),
        ModelConfig(input_size=8, channels=1, classes=10),
        data=DataConfig(str(tmp_path), **said),
        train=TrainConfig(batch=32),
    )
    reader = open_reader(config, before and DataConfig(streams=before[0], window=before[1]))
    assert (reader.streams, reader.window) == expected


@pytest.mark.full
def test_a_run_keeps_its_order_and_says_so(tmp_path: Path) -> None:
    """Begun with numbers, as every version before wrote them into its checkpoints; resumed where
    nothing is said.
    """
    data = written(tmp_path / "data", IN_ORDER).folder
    config = yaml.safe_load(Path(tiny(tmp_path)[1]).read_text()) | {"data": {"shards": str(data)}}
    (tmp_path / "now.yaml").write_text(yaml.safe_dump(config))
    common = ["--config", str(tmp_path / "now.yaml"), "train.schedule=constant"]
    older, kept, fresh = (
        ["data.streams=2", "data.window=1"],
        f"run.folder={tmp_path / 'run'}",
        tmp_path / "fresh",
    )
    nursery = Nursery()
    results = [
        nursery.run(2, *common, *more)
        for more in (
            [*older, f"run.folder={tmp_path / 'whole'}"],
            [*older, kept, "train.steps=4"],
            [kept],
            [kept, "data.window=8"],
            [f"run.folder={fresh}"],
        )
    ]
    assert [[end.returncode for end in ends] for ends in results] == [
        [0, 0],
        [0, 0],
        [0, 0],
        [2, 2],
        [0, 0],
    ], results
    whole, _, again, refused, new = (ends[0] for ends in results)
    assert "order  " not in whole.stdout and whole.stdout.count("warning: ") == 1
    assert "order    data.streams 2, data.window 1, as the checkpoint has them" in again.stdout
    assert again.stdout.count("warning: ") == 1 and "resumed from" in again.stdout
    after = losses(tmp_path / "run")
    assert after == losses(tmp_path / "whole")
    saved = yaml.safe_load((tmp_path / "run/config.yaml").read_text())["data"]
    assert (saved["streams"], saved["window"]) == (2, 1)
    assert "data.window: 1 -> 8" in refused.stderr
    assert "order    data.streams 1, data.window 256, chosen for these data" in new.stdout
    assert "warning: " not in new.stdout and losses(fresh) != after
