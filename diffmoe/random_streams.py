"""Counter-based random streams: every random number is a function of (use, seed, number), so no
generator has a state to lose, and any rank draws what belongs to a sample without the others.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Use(IntEnum):
    """First word of the Philox counter, one per use, so that no two uses share a stream."""

    SHARD_ORDER = 1
    WINDOW_ORDER = 2
    FLIP = 3
    MOMENTS = 4
    TRAINING = 5
    SAMPLING = 6
    ANCESTRAL = 7
    SUBSTITUTE = 8
    ENCODE_ORDER = 9
    VALIDATION = 10


class Words:
    """Raw 64-bit words of one (use, seed) at any number: what `philox` gives, from one bit
    generator that is moved about, which is cheaper than a new one each time. Not for several
    threads at once.
    """

    def __init__(self, use: Use, seed: int) -> None:
        self._generator = philox(use, seed, 0)
        self._state = self._generator.state

    def at(self, first: int, count: int) -> np.ndarray:
        """The first `count` words at (seed, first), uint64."""
        self._state["state"]["key"][1] = first
        self._generator.state = self._state
        return self._generator.random_raw(count)


def philox(use: Use, seed: int, first: int, second: int = 0) -> np.random.Philox:
    """The bit generator of one use at (seed, first, second), all in [0, 2^64)."""
    return np.random.Philox(
        key=np.array([seed, first], np.uint64), counter=np.array([0, 0, second, use], np.uint64)
    )


def permutation(use: Use, seed: int, first: int, second: int, size: int) -> np.ndarray:
    """The numbers below `size` in the random order of one use at (seed, first, second)."""
    # Sorting raw words rather than Generator.permutation: numpy promises Philox's words for good,
    # its shuffle not.
    return np.argsort(philox(use, seed, first, second).random_raw(size), kind="stable")
