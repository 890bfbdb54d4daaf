"""Features of numbered images, added up batch by batch and rank by rank, and the scores that follow
from the sums.
"""

from __future__ import annotations

import torch

from diffmoe.evaluation.card import Scores
from diffmoe.evaluation.features import Features
from diffmoe.evaluation.reference_statistics import Gaussian, Reference
from diffmoe.evaluation.scores import (
    Moments,
    SplitTotals,
    frechet_distance,
    inception_score_of,
    merge,
    merge_over,
    moments_of,
    split_numbers,
    split_totals,
    totals_over,
)
from diffmoe.parallel.groups import Group

SPLIT_SIZE = (
    5_000  # samples of one split of the Inception Score, as in ADM's evaluator: 10 splits of 50,000
)


class Tally:
    """Sums over some of `count` images.  A rank that counts none still adds a batch's features with
    no numbers: widths must agree.
    """

    def __init__(self, count: int, splits: int) -> None:
        self.count, self.splits = count, splits
        self.pool: Moments | None = None
        self.spatial: Moments | None = None
        self.totals: SplitTotals | None = None

    def add(self, features: Features, numbers: range) -> None:
        """The first features of a batch, as many as there are `numbers`.  UserError for values that
        are not finite.
        """
        self.pool = _merged(self.pool, moments_of(features.pool[: len(numbers)]))
        if features.spatial is not None:
            self.spatial = _merged(self.spatial, moments_of(features.spatial[: len(numbers)]))
        if features.probabilities is not None:
            split = split_numbers(numbers, self.count, self.splits)
            sums = split_totals(features.probabilities[: len(numbers)], split, self.splits)
            self.totals = sums if self.totals is None else self.totals + sums

    def add_ranks(self, world: Group, device: torch.device) -> None:
        """Becomes the sum over all ranks, the same on each."""
        self.pool = merge_over(self.pool, world, device)
        self.spatial = None if self.spatial is None else merge_over(self.spatial, world, device)
        self.totals = None if self.totals is None else totals_over(self.totals, world, device)

    def scores(
        self, reference: Reference, precision: float | None = None, recall: float | None = None
    ) -> Scores:
        """Raises UserError for statistics that are no Gaussian's, or a split without samples."""
        assert self.pool.count == self.count, (self.pool.count, self.count)
        sfid = (
            None
            if self.spatial is None or reference.spatial is None
            else _distance(self.spatial, reference.spatial)
        )
        inception = (None, None) if self.totals is None else inception_score_of(self.totals)
        return Scores(_distance(self.pool, reference.pool), sfid, *inception, precision, recall)


def _merged(before: Moments | None, more: Moments) -> Moments:
    return more if before is None else merge(before, more)


def _distance(moments: Moments, reference: Gaussian) -> float:
    return frechet_distance(
        moments.mean, moments.covariance(), reference.mean, reference.covariance
    )
