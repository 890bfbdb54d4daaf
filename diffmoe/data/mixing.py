"""How well an order mixes classes: what a pool holds, absences; a permutation's beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from diffmoe.data.order import SampleOrder
from diffmoe.random_streams import Use, permutation

CLASSES_SHARE = 0.97  # of a permutation's distinct classes in a pool: less is not mixed
ABSENCE_FACTOR = 2.0  # times a permutation's median longest absence: more is not mixed
SHUFFLED_ORDER = (64, 4)  # streams, window
# shards that are shuffled together, as many as `SHUFFLED_ORDER` holds open in one process
_WHOLE = 256
_POSITIONS = 1 << 20  # that are looked at, at most
_POOLS = 512  # at least


@dataclass(frozen=True)
class Mixing:
    """`classes`: mean number of distinct classes in a pool; `absence`: steps that a class is away
    at the longest, median over the classes.
    """

    classes: float
    absence: float

    def like(self, permuted: Mixing) -> bool:
        """Whether this is about as good as a permutation's."""
        # One step more: where every class is in every step, a permutation's absence is 1.
        return (
            self.classes >= CLASSES_SHARE * permuted.classes
            and self.absence <= ABSENCE_FACTOR * permuted.absence + 1
        )


def order_for(shuffled: bool, shards: int, batch: int) -> tuple[int, int]:
    """(streams, window) for a data set. Shards of one that is not known to be shuffled may hold few
    classes each: all are shuffled together where shards are few, else no two slots of a batch share
    a stream.
    """
    if shuffled:
        return SHUFFLED_ORDER
    return (1, _WHOLE) if shards <= _WHOLE else (batch, 8)


def completed(
    labels: Sequence[np.ndarray | None], counts: Sequence[int], classes: int
) -> list[np.ndarray]:
    """Labels of every shard, from those of some: an unknown shard is taken to be like the known one
    before it (or the first), as much further on in the classes as it is in the data set. So what is
    in class order, or mixed, stays it.

    Args:
        labels: int [n] of each shard, None where unknown; not all of them.
        counts: samples of each shard.
    """
    known = {number: found for number, found in enumerate(labels) if found is not None}
    numbers = list(known)
    every = []
    for number, count in enumerate(counts):
        near = numbers[max(0, int(np.searchsorted(numbers, number, side="right")) - 1)]
        further = (number - near) * classes // len(counts)
        found = known.get(number)
        every.append(
            (np.resize(known[near], count) + further) % classes if found is None else found
        )
    return every


def measure(order: SampleOrder, labels: Sequence[np.ndarray], pool: int) -> tuple[Mixing, Mixing]:
    """Of the order, and of a permutation of the same samples, over its first epoch (or its first
    million positions; of a small data set, more epochs).

    Args:
        labels: int [n] of each shard.
        pool: samples, a divisor of the batch.
    """
    flat = np.concatenate(labels)
    starts = np.concatenate([[0], np.cumsum(order.counts)[:-1]])
    steps = max(1, min(max(len(flat), _POOLS * pool), _POSITIONS) // order.batch)
    places = order.places(np.arange(steps * order.batch))
    seen = flat[starts[places[:, 0]] + places[:, 1]]
    permuted = seen[permutation(Use.SHARD_ORDER, 0, 0, 0, len(seen))]
    classes = float(distinct(seen.reshape(-1, pool)).mean())
    expected = expected_distinct(np.bincount(flat), pool)
    absences = [longest_absence(each.reshape(steps, -1)) for each in (seen, permuted)]
    return Mixing(classes, absences[0]), Mixing(expected, absences[1])


def distinct(labels: np.ndarray) -> np.ndarray:
    """int [n]: how many classes each row of labels [n, P] holds."""
    return 1 + (np.diff(np.sort(labels, axis=1), axis=1) != 0).sum(1)


def expected_distinct(counts: np.ndarray, pool: int) -> float:
    """Expected distinct classes among `pool` samples without replacement; counts [classes]."""
    total = int(counts.sum())
    absent = np.ones(len(counts))
    for drawn in range(min(pool, total)):
        absent *= np.maximum(total - counts - drawn, 0) / (total - drawn)
    return float((1 - absent).sum())


def longest_absence(labels: np.ndarray) -> float:
    """Steps that a class is away at the longest, from one batch that has it to the next (or from
    the start, or to the end); the median over the classes in labels [steps, batch].
    """
    classes = labels.reshape(-1)
    by_class = np.argsort(classes, kind="stable")
    classes, steps = classes[by_class], by_class // labels.shape[1]
    first = np.flatnonzero(np.diff(classes, prepend=classes[0] - 1))
    gaps = np.diff(steps, prepend=-1)
    gaps[first] = steps[first] + 1
    last = np.append(first[1:], len(classes)) - 1
    return float(np.median(np.maximum(np.maximum.reduceat(gaps, first), len(labels) - steps[last])))


def better_order(order: SampleOrder, labels: Sequence[np.ndarray], pool: int) -> tuple[int, int]:
    """The (streams, window) that mixes like a permutation: the smallest window, by doubling, at
    these streams, else at one a slot, else in one stream, which shuffles as much as its window
    holds.
    """
    shards = len(order.counts)
    for streams in dict.fromkeys((order.streams, order.batch, 1)):
        window = order.window
        while True:
            wider = SampleOrder(
                order.counts, seed=0, batch=order.batch, streams=streams, window=window
            )
            found, permuted = measure(wider, labels, pool)
            if found.like(permuted):
                return streams, window
            if window * streams >= shards + streams:
                break  # a stream's whole run is shuffled already
            window *= 2
    return 1, shards
