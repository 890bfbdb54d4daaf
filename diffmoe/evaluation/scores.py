"""The published scores from streams of features: Fréchet distance, Inception Score, precision and
recall.

Everything is fp64 on the CPU. `Moments` and `SplitTotals` add up over batches and over ranks, so a
score does not depend on how the samples were cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy.spatial.distance import cdist
from scipy.special import xlogy

from diffmoe.errors import UserError
from diffmoe.parallel.collectives import sum_over
from diffmoe.parallel.groups import Group

NEIGHBOURS = 3  # k of precision and recall
_CHUNK_ENTRIES = 1 << 22  # distances held at once: 32 MiB of float64
_WIDE = 64  # from this width on distances are matrix products: cdist takes hours for 50,000 x 2048
_ROUNDING = 1e-6  # of the largest eigenvalue: a more negative one is no rounding error
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Moments:
    """`count` samples of width d: their mean [d] and `scatter` [d, d], the summed outer products of
    deviations.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @property
    def width(self) -> int:
        return len(self.mean)

    def covariance(self) -> np.ndarray:
        """The unbiased covariance [d, d], as numpy's `cov`.

        Raises:
            UserError: fewer than d + 1 samples, which leave a covariance without full rank and a
                biased distance.
        """
        if self.count < self.width + 1:
            raise UserError(
                f"samples ({self.count}) must be at least feature width + 1 ({self.width + 1})"
            )
        return self.scatter / (self.count - 1)


def moments_of(features: np.ndarray) -> Moments:
    """Moments of one batch [n, d], n >= 0, in fp64.

    Raises:
        UserError: not a matrix, or values that are not finite.
    """
    _check_matrix(features, "features")
    x = np.asarray(features, np.float64)
    mean = x.mean(axis=0) if len(x) else np.zeros(x.shape[1])
    deviations = x - mean
    return Moments(len(x), mean, deviations.T @ deviations)


def merge(first: Moments, second: Moments) -> Moments:
    """Moments of both sets together, by Chan, Golub and LeVeque's pairwise update: no difference of
    large sums.

    Raises:
        UserError: different widths.
    """
    if first.width != second.width:
        raise UserError(f"moments of width {first.width} and {second.width} cannot be merged")
    count = first.count + second.count
    if count == 0:
        return first
    step = second.mean - first.mean
    scatter = first.scatter + second.scatter
    scatter += np.outer(step, step) * (first.count * second.count / count)
    return Moments(count, first.mean + step * (second.count / count), scatter)


def merge_over(moments: Moments, group: Group, device: torch.device = _CPU) -> Moments:
    """Moments of all ranks' samples, on every rank; a rank may hold none. `device` is where the
    group's backend works.
    """
    if group.size == 1:
        return moments
    totals = _sum(np.concatenate([[moments.count], moments.count * moments.mean]), group, device)
    count = int(round(totals[0]))
    mean = totals[1:] / max(1, count)
    step = (
        moments.mean - mean
    )  # the same update for many parts: every part's own scatter and its mean's deviation
    return Moments(
        count, mean, _sum(moments.scatter + moments.count * np.outer(step, step), group, device)
    )


def frechet_distance(
    mean_1: np.ndarray, covariance_1: np.ndarray, mean_2: np.ndarray, covariance_2: np.ndarray
) -> float:
    """Squared Fréchet distance of two Gaussians: means [d], covariances [d, d] (Heusel et al. 2017,
    equation 6).

    |m1 - m2|² + tr C1 + tr C2 - 2 tr (C1^½ C2 C1^½)^½. The last trace is the sum of the singular values of C1^½ C2^½, which
    loses no digits where a covariance is singular, and has no complex part as the square root of C1 C2 has.

    Raises:
        UserError: other shapes, values that are not finite, a matrix that is not symmetric or not
            positive.
    """
    mean_1, mean_2 = np.asarray(mean_1, np.float64), np.asarray(mean_2, np.float64)
    if mean_1.shape != mean_2.shape:
        raise UserError(
            f"mean of {mean_1.shape} does not fit the reference's mean of {mean_2.shape}"
        )
    root_1 = covariance_root(mean_1, covariance_1, "first")
    root_2 = covariance_root(mean_2, covariance_2, "second")
    overlap = np.linalg.svd(root_1 @ root_2, compute_uv=False).sum()
    spread = np.trace(covariance_1) + np.trace(covariance_2)
    distance = float(np.square(mean_1 - mean_2).sum() + spread - 2.0 * overlap)
    assert np.isfinite(distance) and distance > -_ROUNDING * max(1.0, spread), (distance, spread)
    return max(0.0, distance)


def covariance_root(mean: np.ndarray, covariance: np.ndarray, name: str) -> np.ndarray:
    """The symmetric square root [d, d] of the covariance of a Gaussian that messages call `name`.

    Raises:
        UserError: other shapes than [d] and [d, d], values that are not finite, a matrix that is
            not symmetric or not positive.
    """
    covariance = np.asarray(covariance, np.float64)
    if mean.ndim != 1 or not len(mean):
        raise UserError(f"{name} mean {mean.shape} must be [d], one number a feature")
    if covariance.shape != (len(mean), len(mean)):
        raise UserError(f"{name} covariance {covariance.shape} does not fit its mean {mean.shape}")
    for what, value in (("mean", mean), ("covariance", covariance)):
        if not np.isfinite(value).all():
            raise UserError(
                f"{name} {what} holds {np.count_nonzero(~np.isfinite(value))} values that are not finite"
            )
    scale = np.abs(covariance).max(initial=0.0)
    skew = np.abs(covariance - covariance.T).max(initial=0.0)
    if skew > _ROUNDING * scale:
        raise UserError(
            f"{name} covariance must be symmetric: it differs from its transpose by {skew:.3g}"
        )
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    if values[0] < -_ROUNDING * values[-1] or values[-1] < 0:
        raise UserError(
            f"{name} covariance must be positive: eigenvalues {values[0]:.3g} to {values[-1]:.3g}"
        )
    # The noise of a zero eigenvalue would come back as its square root, 1e-8 where it was 1e-16.
    values = np.where(values > len(values) * np.finfo(np.float64).eps * values[-1], values, 0.0)
    return (vectors * np.sqrt(values)) @ vectors.T


@dataclass(frozen=True)
class SplitTotals:
    """What the Inception Score needs of class probabilities, per split: samples [S], sum of p log p
    [S], sum of p [S, c].
    """

    counts: np.ndarray
    negentropy: np.ndarray
    probability: np.ndarray

    def __add__(self, other: SplitTotals) -> SplitTotals:
        return SplitTotals(
            self.counts + other.counts,
            self.negentropy + other.negentropy,
            self.probability + other.probability,
        )


def split_totals(probabilities: np.ndarray, split: np.ndarray, splits: int) -> SplitTotals:
    """Totals of a batch: class probabilities [n, c], the split [n] in 0..splits - 1 of each sample.

    Raises:
        UserError: values that are not finite or rows that are no distribution.
    """
    _check_matrix(probabilities, "probabilities")
    p = np.asarray(probabilities, np.float64)
    if p.size and (p.min() < 0 or np.abs(p.sum(axis=1) - 1).max() > 1e-3):
        raise UserError(
            f"probabilities must be at least 0 (least {p.min():.3g}) and each row sum to 1 (worst "
            f"{p.sum(axis=1)[np.abs(p.sum(axis=1) - 1).argmax()]:.4g})"
        )
    counts = np.bincount(split, minlength=splits).astype(np.float64)
    member = (np.arange(splits)[:, None] == np.asarray(split)[None, :]).astype(np.float64)
    return SplitTotals(counts, member @ xlogy(p, p).sum(axis=1), member @ p)


def totals_over(totals: SplitTotals, group: Group, device: torch.device = _CPU) -> SplitTotals:
    """The sum over all ranks, on every rank."""
    return SplitTotals(
        *(
            _sum(part, group, device)
            for part in (totals.counts, totals.negentropy, totals.probability)
        )
    )


def inception_score_of(totals: SplitTotals) -> tuple[float, float]:
    """Mean and standard deviation over splits of exp(mean KL(p(y|x) || p(y))) (Salimans et al.
    2016).

    Raises:
        UserError: a split without samples.
    """
    if (totals.counts < 1).any():
        raise UserError(
            f"splits ({len(totals.counts)}) must not exceed the samples ({int(totals.counts.sum())})"
        )
    marginal = totals.probability / totals.counts[:, None]
    scores = np.exp(totals.negentropy / totals.counts - xlogy(marginal, marginal).sum(axis=1))
    return float(scores.mean()), float(scores.std())


def split_numbers(numbers: range, count: int, splits: int) -> np.ndarray:
    """The split of each of these samples when `count` are cut into `splits` equal runs."""
    return np.asarray(numbers, np.int64) * splits // max(1, count)


def precision_recall(
    real: np.ndarray, fake: np.ndarray, k: int = NEIGHBOURS
) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019) of `fake` [m, d] against `real` [n,
    d].

    A set's manifold is the union of balls around its points, each reaching to the point's k-th
    nearest other point. Precision is the share of fake points inside the real manifold, recall the
    share of real ones inside the fake's.

    Raises:
        UserError: different widths, values that are not finite, or a set of k points or fewer.
    """
    for name, points in (("real", real), ("fake", fake)):
        if len(points) <= k:
            raise UserError(f"{name} has {len(points)} points and needs more than k ({k})")
    _check_pair(real, fake, "real", "fake")
    return _share_inside(fake, real, k), _share_inside(real, fake, k)


def nearest_distances(query: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Euclidean distance [n] from each row of `query` [n, d] to the nearest row of `reference` [m,
    d].

    Raises:
        UserError: different widths, values that are not finite, or an empty reference.
    """
    if len(reference) == 0:
        raise UserError(f"reference (0 points) must not be empty: query has {len(query)} points")
    _check_pair(query, reference, "query", "reference")
    return np.concatenate(
        [np.empty(0), *(block.min(axis=1) for block in _distance_blocks(query, reference))]
    )


def _share_inside(query: np.ndarray, centres: np.ndarray, k: int) -> float:
    # Column k after the point itself, whose distance of 0 sorts first.
    radii = np.concatenate(
        [np.partition(block, k, axis=1)[:, k] for block in _distance_blocks(centres, centres)]
    )
    inside = [(block <= radii).any(axis=1) for block in _distance_blocks(query, centres)]
    return float(np.concatenate(inside).mean())


def _distance_blocks(rows: np.ndarray, columns: np.ndarray) -> Iterator[np.ndarray]:
    step = max(1, _CHUNK_ENTRIES // len(columns))
    if rows.shape[1] < _WIDE:
        return (cdist(rows[start : start + step], columns) for start in range(0, len(rows), step))
    return _wide_blocks(rows, np.asarray(columns, np.float64), step)


def _wide_blocks(rows: np.ndarray, columns: np.ndarray, step: int) -> Iterator[np.ndarray]:
    squares = np.square(columns).sum(axis=1)
    for start in range(0, len(rows), step):
        part = np.asarray(rows[start : start + step], np.float64)
        block = part @ columns.T
        block *= -2.0
        block += np.square(part).sum(axis=1)[:, None]
        block += squares
        yield np.sqrt(np.maximum(block, 0.0, out=block), out=block)


def _sum(value: np.ndarray, group: Group, device: torch.device) -> np.ndarray:
    return sum_over(torch.from_numpy(np.ascontiguousarray(value)).to(device), group).cpu().numpy()


def _check_matrix(points: np.ndarray, name: str) -> None:
    if points.ndim != 2:
        raise UserError(f"{name} {points.shape} must be [n, d]")
    if not np.isfinite(points).all():
        raise UserError(
            f"{name} holds {np.count_nonzero(~np.isfinite(points))} values that are not finite"
        )


def _check_pair(first: np.ndarray, second: np.ndarray, first_name: str, second_name: str) -> None:
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise UserError(
            f"{first_name} {first.shape} and {second_name} {second.shape} must be [n, d] with the same d"
        )
    _check_matrix(first, first_name)
    _check_matrix(second, second_name)
