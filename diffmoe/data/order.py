"""Which sample a training position is.

Everything here is a function of (seed, position) and of the run's own numbers (batch, streams,
window): nothing depends on ranks or workers, and any position is found without replay.

A global batch is cut into `streams` equal runs of slots, and every epoch into as many runs of
samples, one a stream. So a rank, which holds consecutive slots, reads the shards of its own streams
and no others, in any layout; and a batch mixes samples from all over the data set, whatever order
they were written in.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from diffmoe.errors import UserError
from diffmoe.random_streams import Use, permutation


class SampleOrder:
    """Training position → (shard, row); every epoch of sum(counts) positions visits every sample
    exactly once.

    The shards, permuted by (seed, epoch), are laid end to end and cut into one run a stream, as
    long as the stream has slots in the epoch. `window` consecutive shards of a run are shuffled
    together.

    Args:
        counts: samples of each shard.
        batch: positions of one step; slot b of a step is position step * batch + b.
        streams: runs of slots, at most one a slot.
    """

    def __init__(
        self,
        counts: Sequence[int] | np.ndarray,
        *,
        seed: int,
        batch: int,
        streams: int,
        window: int,
    ) -> None:
        if not 0 <= seed < 2**64:
            raise UserError(f"seed ({seed}) must lie in [0, 2^64)")
        for name, value in (("batch", batch), ("streams", streams), ("window", window)):
            if value < 1:
                raise UserError(f"{name} ({value}) must be at least 1")
        self.counts, self.batch, self.window = np.asarray(counts, np.int64), batch, window
        self._seed, self._total = seed, int(self.counts.sum())
        self.streams = min(streams, batch)
        edges = np.arange(self.streams + 1) * batch // self.streams
        self._first_slot, self._slots = edges[:-1], np.diff(edges)
        # Two of each: a batch may straddle two epochs, and every stream two windows.
        self._shard_order = lru_cache(2)(self._draw_shard_order)
        self._stream = lru_cache(2 * self.streams)(self._draw_stream)
        self._window_order = lru_cache(2 * self.streams)(self._draw_window_order)

    def places(self, positions: np.ndarray) -> np.ndarray:
        """Shard number and row in that shard, int64 [n, 2], of positions int64 [n] (>= 0)."""
        found = np.empty((len(positions), 2), np.int64)
        if not len(positions):
            return found
        epochs, slots = positions // self._total, positions % self.batch
        streams = np.searchsorted(self._first_slot, slots, side="right") - 1
        runs = epochs * self.streams + streams
        by_run = np.argsort(runs, kind="stable")
        for mine in np.split(by_run, np.flatnonzero(np.diff(runs[by_run])) + 1):
            epoch, stream = int(epochs[mine[0]]), int(streams[mine[0]])
            before = self._first_slot[stream] + self._shard_order(epoch)[3][stream]
            offsets = positions[mine] // self.batch * self._slots[stream] + slots[mine] - before
            windows, _ = self._stream(epoch, stream)
            numbers = np.searchsorted(windows, offsets, side="right") - 1
            for window in np.unique(numbers).tolist():
                order, pieces, starts = self._window_order(epoch, stream, window)
                here = numbers == window
                samples = order[offsets[here] - windows[window]]
                piece = np.searchsorted(starts, samples, side="right") - 1
                found[mine[here], 0] = pieces[piece, 0]
                found[mine[here], 1] = pieces[piece, 1] + samples - starts[piece]
        return found

    def streams_of(self, positions: Sequence[int]) -> int:
        """How many streams these positions belong to."""
        slots = np.asarray(positions) % self.batch
        return len(np.unique(np.searchsorted(self._first_slot, slots, side="right")))

    def _positions_before(self, position: int) -> np.ndarray:
        """[streams]: how many of the positions below this one each stream has."""
        return position // self.batch * self._slots + np.clip(
            position % self.batch - self._first_slot, 0, self._slots
        )

    def _draw_shard_order(
        self, epoch: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Shards in order; where each begins among the epoch's samples; where each stream's run
        begins there; positions that each stream had before the epoch.
        """
        order = permutation(Use.SHARD_ORDER, self._seed, epoch, 0, len(self.counts))
        before = self._positions_before(epoch * self._total)
        lengths = self._positions_before((epoch + 1) * self._total) - before
        return order, _starts(self.counts[order]), _starts(lengths), before

    def _draw_stream(self, epoch: int, stream: int) -> tuple[np.ndarray, np.ndarray]:
        """Where each window begins in the stream's run, and the run's pieces [n, 3]: shard, its
        first row and the row after its last.
        """
        order, starts, runs, _ = self._shard_order(epoch)
        begin, end = runs[stream], runs[stream + 1]
        first = np.searchsorted(starts, begin, side="right") - 1
        last = np.searchsorted(starts, end, side="left")
        left, right = starts[first:last], starts[first + 1 : last + 1]
        rows = np.maximum(begin, left) - left, np.minimum(end, right) - left
        pieces = np.stack([order[first:last], *rows], axis=1)
        starts = _starts(pieces[:, 2] - pieces[:, 1])
        return starts[:-1][:: self.window], pieces

    def _draw_window_order(
        self, epoch: int, stream: int, window: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The window's samples in order, numbered over its pieces laid end to end (int32, since all
        windows together may be the whole data set); these pieces; and where each begins there."""
        pieces = self._stream(epoch, stream)[1][window * self.window : (window + 1) * self.window]
        starts = _starts(pieces[:, 2] - pieces[:, 1])
        run = stream << 32 | window
        order = permutation(Use.WINDOW_ORDER, self._seed, epoch, run, int(starts[-1]))
        return order.astype(np.int32), pieces, starts[:-1]


def _starts(lengths: np.ndarray) -> np.ndarray:
    """Where each of these lengths begins, laid end to end, and where the last one ends: [n + 1]."""
    return np.concatenate([[0], np.cumsum(lengths)])
