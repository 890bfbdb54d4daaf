"""A rank's share of every step, and what each of its workers fills of it. No torch here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from diffmoe.data.reader import ShardReader


@dataclass(frozen=True)
class Share:
    """Step s is positions [n * batch, (n + 1) * batch) with n = s + shift; micro-step j of rank r
    holds `micro_batch` of them from n * batch + j * batch / accumulation + r * micro_batch. `shift`
    is 0 but after a change of the recipe (`training/resume.py`).
    """

    batch: int
    micro_batch: int
    accumulation: int
    rank: int
    world: int
    shift: int = 0

    def __post_init__(self) -> None:
        assert self.micro_batch * self.world * self.accumulation == self.batch, self
        assert 0 <= self.rank < self.world, self

    @property
    def count(self) -> int:
        """Samples of this rank in a step."""
        return self.micro_batch * self.accumulation

    def positions(self, step: int) -> np.ndarray:
        """[accumulation, micro_batch]."""
        micro_steps = np.arange(self.accumulation)[:, None] * (self.batch // self.accumulation)
        first = (step + self.shift) * self.batch + self.rank * self.micro_batch
        return first + micro_steps + np.arange(self.micro_batch)


@dataclass(frozen=True)
class Part:
    """Worker `number` of `workers`: a run of the rank's slots, and so of its streams."""

    share: Share
    number: int
    workers: int

    @property
    def slots(self) -> slice:
        count = self.share.count
        return slice(self.number * count // self.workers, (self.number + 1) * count // self.workers)

    def positions(self, step: int) -> list[int]:
        """This worker's positions of a step."""
        return self.share.positions(step).reshape(-1)[self.slots].tolist()


@dataclass(frozen=True)
class Ring:
    """Room for the samples of some steps in one block of memory: all x (float32), then all y
    (int64), then all features (float16) where there are some.
    """

    slots: int
    count: int
    shape: tuple[int, ...]
    features: tuple[int, ...] = ()

    @property
    def bytes(self) -> int:
        numbers = int(np.prod(self.features)) if self.features else 0
        return self.slots * self.count * (4 * int(np.prod(self.shape)) + 8 + 2 * numbers) + 64

    def arrays(self, memory: memoryview) -> tuple[np.ndarray, ...]:
        """Views of the block: x [slots, count, *shape], y [slots, count], and perhaps features
        [slots, count, *features].
        """
        values = self.slots * self.count * int(np.prod(self.shape))
        y_at = -(-4 * values // 64) * 64
        x = np.frombuffer(memory, np.float32, values)
        y = np.frombuffer(memory, np.int64, self.slots * self.count, y_at)
        each = (self.slots, self.count)
        found = x.reshape(*each, *self.shape), y.reshape(each)
        if not self.features:
            return found
        numbers = self.slots * self.count * int(np.prod(self.features))
        z = np.frombuffer(memory, np.float16, numbers, y_at + y.nbytes)
        return (*found, z.reshape(*each, *self.features))


def allow_open_files(reader: ShardReader, share: Share, workers: int) -> None:
    """Raises UserError where one of a rank's ``workers`` (0: a thread) would not get as many open
    files as it needs, or the cache could not hold the remote ones.
    """
    for number in range(max(1, workers)):
        positions = Part(share, number, max(1, workers)).positions(0)
        reader.check_cache(positions)
        reader.allow_open_files(positions)


def fill_step(
    reader: ShardReader, part: Part, step: int, ahead: int, arrays: Iterable[np.ndarray]
) -> None:
    """Reads the worker's samples of a step into its slots of that step's [count, …] arrays (x, y,
    perhaps features); brings nearer what step + ahead needs.
    """
    reader.fetch_ahead(part.positions(step + ahead))
    reader.fill(part.positions(step), *(array[part.slots] for array in arrays))
