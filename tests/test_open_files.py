"""Open files are counted before training starts, for what each process of a rank reads, and allowed
where the system lets it.
"""

from __future__ import annotations

import re
import resource
from pathlib import Path
from types import SimpleNamespace

import pytest

from diffmoe.data.cache import Cache
from diffmoe.data.reader import ShardReader
from diffmoe.data.shards import ShardMeta
from diffmoe.data.share import Share, allow_open_files
from diffmoe.data.tar import ShardFile
from diffmoe.errors import UserError


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch):
    """Sets this process's limits of open files, as far as the reader sees them; what it sets itself
    is in the list.
    """
    state = [256, 256]

    def set_limits(_what: int, pair: tuple[int, int]) -> None:
        state[:] = pair

    monkeypatch.setattr("diffmoe.data.reader.resource.getrlimit", lambda _what: tuple(state))
    monkeypatch.setattr("diffmoe.data.reader.resource.setrlimit", set_limits)
    return state


def index_of(shards: list[ShardFile], place: str = "", where: str = "here") -> SimpleNamespace:
    """What a reader asks of an index whose files are not there."""
    meta, shape = ShardMeta("pixels", 10), (1, 8, 8)
    return SimpleNamespace(
        shards=shards, meta=meta, x_shape=shape, flips=False, place=place, where=where
    )


def many_shards(count: int, **settings: int) -> ShardReader:
    """A reader of an index of so many shards."""
    shards = [ShardFile(f"shard-{i:06d}.tar", 16, 1, "0" * 64) for i in range(count)]
    return ShardReader(index_of(shards), seed=0, **settings)


@pytest.mark.parametrize(
    ("hard", "world", "workers", "settings", "message"),
    [
        (
            1024,
            1,
            0,
            {"batch": 64, "streams": 64, "window": 32},
            "data.streams (64, 64 of them read by one process) x data.window (32) need 2112 "
            "open files and 256 for the rest; this system allows 1024 (ulimit -Hn): raise that "
            "limit, or set data.window to at most 11",
        ),
        (
            1024,
            2,
            0,
            {"batch": 64, "streams": 64, "window": 32},
            "data.streams (64, 32 of them read by one process) x data.window (32) need 1056 open "
            "files and 256 for the rest; this system allows 1024 (ulimit -Hn): raise that limit, "
            "or set data.window to at most 23",
        ),
        (
            300,
            1,
            0,
            {"batch": 64, "streams": 64, "window": 4},
            "need 320 open files and 256 for the rest; this system allows 300 (ulimit -Hn): raise "
            "that limit, or set data.streams to at most 8",
        ),
        (
            258,
            1,
            0,
            {"batch": 64, "streams": 64, "window": 4},
            "this system allows 258 (ulimit -Hn): raise that limit",
        ),
        (
            300,
            1,
            4,
            {"batch": 64, "streams": 64, "window": 4},
            "data.streams (64, 16 of them read by one process) x data.window (4) need 80 open "
            "files",
        ),
    ],
)
def test_open_files_that_the_system_does_not_allow_are_counted_before_the_start(
    limits, hard, world, workers, settings, message
) -> None:
    limits[:] = [256, hard]
    reader = many_shards(5000, **settings)
    for rank in range(world):
        with pytest.raises(UserError) as error:
            allow_open_files(reader, Share(64, 64 // world, 1, rank, world), workers)
        assert message in str(error.value)
    assert limits == [256, hard], "nothing was changed"
    said = re.search(r"set data\.(\w+) to at most (\d+)$", str(error.value))
    if hard < 262:
        assert said is None, "nothing is small enough"
        return
    fewer = many_shards(5000, **(settings | {said[1]: int(said[2])}))
    for rank in range(world):
        allow_open_files(
            fewer, Share(64, 64 // world, 1, rank, world), workers
        )  # what the line says is true


@pytest.mark.parametrize(
    ("shards", "soft", "hard", "after"),
    [
        (5000, 256, 4096, [2112 + 256, 4096]),
        (100, 256, 4096, [356, 4096]),
        (5000, 4000, 4096, [4000, 4096]),
        (5000, 256, resource.RLIM_INFINITY, [2112 + 256, resource.RLIM_INFINITY]),
        (20, 300, 300, [300, 300]),
    ],
)
def test_as_many_open_files_as_there_are_shards_are_allowed(
    limits, shards, soft, hard, after
) -> None:
    limits[:] = [soft, hard]
    allow_open_files(
        many_shards(shards, batch=64, streams=64, window=32), Share(64, 64, 1, 0, 1), 0
    )
    assert limits == after


@pytest.mark.parametrize(
    ("settings", "world", "gib", "held"),
    [
        (
            {"batch": 256, "streams": 256, "window": 8},
            1,
            64,
            "256 of them read by one process) x data.window (8) keep 1251 shards",
        ),
        (
            {"batch": 256, "streams": 256, "window": 8},
            4,
            64,
            "64 of them read by one process) x data.window (8) keep 512 shards",
        ),
        (
            {"batch": 64, "streams": 1, "window": 600},
            2,
            64,
            "1 of them read by one process) x data.window (600) keep 600 shards",
        ),
        ({"batch": 64, "streams": 64, "window": 4}, 1, 64, ""),
    ],
)
def test_remote_shards_in_use_that_the_cache_cannot_hold_are_counted_before_the_start(
    settings, world, gib, held
) -> None:
    """Shards of 0.2 GiB; not hours later, when the cache is full."""
    shards = [ShardFile(f"shard-{i:06d}.tar", 1024, 2**30 // 5, "0" * 64) for i in range(1251)]
    index = index_of(shards, "s3://b/{name}", "s3://b")
    for limit in (gib * 2**30, 2**40):
        reader = ShardReader(index, seed=0, cache=Cache(Path("nowhere"), limit), **settings)
        for rank in range(world):
            share = Share(settings["batch"], settings["batch"] // world, 1, rank, world)
            if held and limit < 2**40:
                with pytest.raises(
                    UserError,
                    match=re.escape(
                        f"data.cache_gib (64) is too small: data.streams "
                        f"({settings['streams']}, {held}"
                    ),
                ):
                    allow_open_files(reader, share, 0)
            else:
                allow_open_files(reader, share, 0)
