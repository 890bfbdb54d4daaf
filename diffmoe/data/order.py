"""Which sample a training position is.

Everything here is a function of (seed, position): nothing depends on ranks, and any position is found without replay.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from diffmoe.random_streams import Use, philox


def _permutation(use: Use, seed: int, first: int, second: int, size: int) -> np.ndarray:
    # Sorting raw words rather than Generator.permutation: numpy promises Philox's words for good, its shuffle not.
    return np.argsort(philox(use, seed, first, second).random_raw(size), kind="stable")


class SampleOrder:
    """Training position → (shard, row), from (seed, epoch) alone; every epoch visits every sample exactly once.

    Shards are permuted by (seed, epoch), joined into windows of `window` shards, and samples permuted inside a window.
    """

    def __init__(self, counts: Sequence[int], *, seed: int, window: int) -> None:
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed ({seed}) must lie in [0, 2^64)")
        if window < 1:
            raise ValueError(f"window ({window}) must be at least 1 shard")
        self._counts, self._seed, self._window = np.asarray(counts, np.int64), seed, window
        self._total = int(self._counts.sum())
        # Two of each: a batch may straddle two windows, or two epochs.
        self._shard_order = lru_cache(2)(self._draw_shard_order)
        self._window_order = lru_cache(2)(self._draw_window_order)

    def locate(self, position: int) -> tuple[int, int]:
        """Shard number and row in that shard of training position `position` (>= 0)."""
        assert position >= 0, position
        epoch, offset = divmod(position, self._total)
        _, starts = self._shard_order(epoch)
        window = int(np.searchsorted(starts, offset, side="right")) - 1
        shard, row = self._window_order(epoch, window)[offset - starts[window]]
        return int(shard), int(row)

    def _draw_shard_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        order = _permutation(Use.SHARD_ORDER, self._seed, epoch, 0, len(self._counts))
        before = np.concatenate([[0], np.cumsum(self._counts[order])])
        return order, before[: -1 : self._window]

    def _draw_window_order(self, epoch: int, window: int) -> np.ndarray:
        shards = self._shard_order(epoch)[0][window * self._window : (window + 1) * self._window]
        counts = self._counts[shards]
        rows = np.concatenate([np.arange(count) for count in counts])
        pairs = np.stack([np.repeat(shards, counts), rows], axis=1)
        return pairs[_permutation(Use.WINDOW_ORDER, self._seed, epoch, window, len(pairs))]
