"""The published scores from streams of features: Fréchet distance, Inception Score, precision and
recall. They are called FID, sFID and Inception Score with the published Inception network alone.

Everything is fp64 on the CPU. `Tally` adds up over batches and over ranks, so a score does not
depend on how the samples were cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.special import xlogy

from diffmoe.errors import UserError
from diffmoe.evaluation.features import Features
from diffmoe.evaluation.protocol import INCEPTION_SHA256
from diffmoe.parallel.collectives import sum_over
from diffmoe.parallel.groups import Group

if TYPE_CHECKING:
    from diffmoe.evaluation.reference_statistics import Reference

NEIGHBOURS = 3  # k of precision and recall
SPLIT_SIZE = 5_000  # samples of one split of the Inception Score (ADM: 10 splits of 50,000)
# Distances held at once: 512 MiB of float64.  cdist goes through all columns for every block.
_CHUNK_ENTRIES = 1 << 26
_WIDE = 64  # from this width on distances are matrix products: else 50,000 x 2048 take hours
_ROUNDING = 1e-6  # of the largest eigenvalue: a more negative one is no rounding error
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Scores:
    """What was measured; None: this extractor or reference cannot give it. Lower is better for the
    two squared Fréchet distances, of pool and of spatial features; `score_names` says what they are
    called.
    """

    frechet_distance: float
    spatial_frechet_distance: float | None = None
    inception_score: float | None = None
    inception_score_std: float | None = None
    precision: float | None = None
    recall: float | None = None


def score_names(extractor: str, sha256: str) -> dict[str, str]:
    """What the scores by the feature network of this name and hash are called, by field of
    `Scores`: FID is a quantity of one Inception file, and the distance in other features another
    one, such as FD-EfficientNetLite0.
    """
    names = ("FID", "sFID", "Inception Score")
    if sha256 != INCEPTION_SHA256:
        own = extractor.removesuffix(".pt")
        names = (f"FD-{own}", f"sFD-{own}", f"IS-{own}")
    fields = ("frechet_distance", "spatial_frechet_distance", "inception_score")
    return dict(zip(fields, names)) | {"precision": "precision", "recall": "recall"}


@dataclass(frozen=True)
class Gaussian:
    """Mean [d] and covariance [d, d] of features, fp64."""

    mean: np.ndarray
    covariance: np.ndarray


@dataclass(frozen=True)
class Moments:
    """Of `count` samples: mean [d], `scatter` [d, d] (summed outer products of deviations)."""

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    def gaussian(self) -> Gaussian:
        """With the unbiased covariance, as numpy's `cov`. UserError for fewer than d + 1 samples:
        it would not have full rank, and the distance would be biased.
        """
        width = len(self.mean)
        if self.count < width + 1:
            raise UserError(
                f"samples ({self.count}) must be at least feature width + 1 ({width + 1})"
            )
        return Gaussian(self.mean, self.scatter / (self.count - 1))


def moments_of(features: np.ndarray) -> Moments:
    """Moments of one batch [n, d], n >= 0. UserError for values that are not finite."""
    _check_matrix(features, "features")
    x = np.asarray(features, np.float64)
    mean = x.mean(axis=0) if len(x) else np.zeros(x.shape[1])
    deviations = x - mean
    return Moments(len(x), mean, deviations.T @ deviations)


def merge(first: Moments | None, second: Moments) -> Moments:
    """Moments of both sets together, by Chan, Golub and LeVeque's pairwise update: no difference of
    large sums. UserError for different widths.
    """
    if first is None:
        return second
    if len(first.mean) != len(second.mean):
        raise UserError(
            f"moments of width {len(first.mean)} and {len(second.mean)} cannot be merged"
        )
    count = first.count + second.count
    if count == 0:
        return first
    step = second.mean - first.mean
    scatter = first.scatter + second.scatter
    scatter += np.outer(step, step) * (first.count * second.count / count)
    return Moments(count, first.mean + step * (second.count / count), scatter)


def merge_over(moments: Moments, group: Group, device: torch.device = _CPU) -> Moments:
    """On every rank; a rank may hold no samples.  `device`: where the group's backend works."""
    if group.size == 1:
        return moments
    totals = _sum(np.concatenate([[moments.count], moments.count * moments.mean]), group, device)
    count = int(round(totals[0]))
    mean = totals[1:] / max(1, count)
    # The pairwise update for many parts: each part's own scatter, and its mean's deviation.
    step = moments.mean - mean
    scatter = moments.scatter + moments.count * np.outer(step, step)
    return Moments(count, mean, _sum(scatter, group, device))


def frechet_distance(one: Gaussian, two: Gaussian) -> float:
    """Squared Fréchet distance of two Gaussians (Heusel et al. 2017, equation 6).

    |m1 - m2|² + tr C1 + tr C2 - 2 tr (C1^½ C2 C1^½)^½. The last trace is the sum of the singular
    values of C1^½ C2^½, which loses no digits where a covariance is singular, and has no complex
    part as the square root of C1 C2 has. UserError for what is not a Gaussian's, or other widths.
    """
    here, there = one.mean.shape, two.mean.shape
    if here != there:
        raise UserError(f"mean of {here} does not fit the reference's mean of {there}")
    roots = covariance_root(one, "first") @ covariance_root(two, "second")
    overlap = np.linalg.svd(roots, compute_uv=False).sum()
    spread = np.trace(one.covariance) + np.trace(two.covariance)
    distance = float(np.square(one.mean - two.mean).sum() + spread - 2.0 * overlap)
    assert np.isfinite(distance) and distance > -_ROUNDING * max(1.0, spread), (distance, spread)
    return max(0.0, distance)


def covariance_root(gaussian: Gaussian, name: str) -> np.ndarray:
    """The symmetric square root [d, d] of the covariance of a Gaussian that messages call `name`.
    UserError for other shapes, values that are not finite, a matrix that is not symmetric or not
    positive.
    """
    mean, covariance = gaussian.mean, gaussian.covariance
    if mean.ndim != 1 or not len(mean):
        raise UserError(f"{name} mean {mean.shape} must be [d], one number a feature")
    if covariance.shape != (len(mean), len(mean)):
        raise UserError(f"{name} covariance {covariance.shape} does not fit its mean {mean.shape}")
    for what, value in (("mean", mean), ("covariance", covariance)):
        _check_finite(value, f"{name} {what}")
    skew = np.abs(covariance - covariance.T).max()
    if skew > _ROUNDING * np.abs(covariance).max():
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


def split_totals(probabilities: np.ndarray, split: np.ndarray, splits: int) -> np.ndarray:
    """What the Inception Score needs of a batch, to be added up: class probabilities [n, c] and the
    split [n] in 0..splits - 1 of each sample -> [splits, 2 + c], samples, sum of p log p, sum of p.
    UserError for values that are not finite, and rows that are not a distribution.
    """
    _check_matrix(probabilities, "probabilities")
    p = np.asarray(probabilities, np.float64)
    sums = p.sum(axis=1)
    if p.size and (p.min() < 0 or np.abs(sums - 1).max() > 1e-3):
        worst = sums[np.abs(sums - 1).argmax()]
        raise UserError(
            f"probabilities must be at least 0 (least {p.min():.3g}) and each row sum to 1 "
            f"(worst {worst:.4g})"
        )
    member = (np.arange(splits)[:, None] == np.asarray(split)[None, :]).astype(np.float64)
    return member @ np.column_stack([np.ones(len(p)), xlogy(p, p).sum(axis=1), p])


def inception_score_of(totals: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation over splits of exp(mean KL(p(y|x) || p(y))) (Salimans et al.
    2016), of summed `split_totals`. UserError for a split without samples.
    """
    counts, negentropy, probability = totals[:, 0], totals[:, 1], totals[:, 2:]
    if (counts < 1).any():
        raise UserError(f"splits ({len(counts)}) must not exceed the samples ({int(counts.sum())})")
    marginal = probability / counts[:, None]
    scores = np.exp(negentropy / counts - xlogy(marginal, marginal).sum(axis=1))
    return float(scores.mean()), float(scores.std())


def split_numbers(numbers: range, count: int, splits: int) -> np.ndarray:
    """The split of each of these samples when `count` are cut into `splits` equal runs."""
    return np.asarray(numbers, np.int64) * splits // max(1, count)


def default_splits(count: int) -> int:
    """Of the Inception Score: one per 5,000 images."""
    return max(1, count // SPLIT_SIZE)


class Tally:
    """Sums over some of `count` images, and the scores that follow from them. A rank that counts
    none still adds a batch's features with no numbers: widths must agree.
    """

    def __init__(self, count: int, splits: int) -> None:
        self.count, self.splits = count, splits
        self.pool: Moments | None = None
        self.spatial: Moments | None = None
        self.totals: np.ndarray | None = None

    def add(self, features: Features, numbers: range) -> None:
        """A batch's first len(`numbers`) features.  UserError for values that are not finite."""
        rows = slice(len(numbers))
        self.pool = merge(self.pool, moments_of(features.pool[rows]))
        if features.spatial is not None:
            self.spatial = merge(self.spatial, moments_of(features.spatial[rows]))
        if features.probabilities is not None:
            split = split_numbers(numbers, self.count, self.splits)
            sums = split_totals(features.probabilities[rows], split, self.splits)
            self.totals = sums if self.totals is None else self.totals + sums

    def add_ranks(self, world: Group, device: torch.device) -> None:
        """Becomes the sum over all ranks, the same on each."""
        if self.pool is not None:
            self.pool = merge_over(self.pool, world, device)
        if self.spatial is not None:
            self.spatial = merge_over(self.spatial, world, device)
        if self.totals is not None:
            self.totals = _sum(self.totals, world, device)

    def scores(
        self, reference: Reference, precision: float | None = None, recall: float | None = None
    ) -> Scores:
        """UserError for statistics that are not a Gaussian's, or a split without samples."""
        assert self.pool is not None and self.pool.count == self.count, self.pool
        spatial = None
        if self.spatial is not None and reference.spatial is not None:
            spatial = frechet_distance(self.spatial.gaussian(), reference.spatial)
        score, spread = (None, None) if self.totals is None else inception_score_of(self.totals)
        distance = frechet_distance(self.pool.gaussian(), reference.pool)
        return Scores(distance, spatial, score, spread, precision, recall)


def precision_recall(
    real: np.ndarray, fake: np.ndarray, k: int = NEIGHBOURS
) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019) of `fake` [m, d] against `real` [n,
    d].

    A set's manifold is the union of balls around its points, each reaching to the point's k-th
    nearest other point. Precision is the share of fake points inside the real manifold, recall the
    share of real ones inside the fake's. UserError for different widths, values that are not
    finite, or a set of k points or fewer.
    """
    for name, points in (("real", real), ("fake", fake)):
        if len(points) <= k:
            raise UserError(f"{name} has {len(points)} points and needs more than k ({k})")
    _check_pair(real, fake, "real", "fake")
    return _share_inside(fake, real, k), _share_inside(real, fake, k)


def nearest_distances(query: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Euclidean distance [n] from each row of `query` [n, d] to the nearest row of `reference` [m,
    d]. UserError for different widths, values that are not finite, or an empty reference.
    """
    if len(reference) == 0:
        raise UserError(f"reference (0 points) must not be empty: query has {len(query)} points")
    _check_pair(query, reference, "query", "reference")
    nearest = [block.min(axis=1) for block in _distance_blocks(query, reference)]
    return np.concatenate([np.empty(0), *nearest])


def _share_inside(query: np.ndarray, centres: np.ndarray, k: int) -> float:
    # Column k after the point itself, whose distance of 0 sorts first.
    blocks = _distance_blocks(centres, centres)
    radii = np.concatenate([np.partition(block, k, axis=1)[:, k] for block in blocks])
    inside = [(block <= radii).any(axis=1) for block in _distance_blocks(query, centres)]
    return float(np.concatenate(inside).mean())


def _distance_blocks(rows: np.ndarray, columns: np.ndarray) -> Iterator[np.ndarray]:
    products = (
        "use_mm_for_euclid_dist" if rows.shape[1] >= _WIDE else "donot_use_mm_for_euclid_dist"
    )
    others = torch.from_numpy(np.asarray(columns, np.float64))
    step = max(1, _CHUNK_ENTRIES // len(columns))
    for start in range(0, len(rows), step):
        part = torch.from_numpy(np.asarray(rows[start : start + step], np.float64))
        yield torch.cdist(part, others, compute_mode=products).numpy()


def _sum(value: np.ndarray, group: Group, device: torch.device) -> np.ndarray:
    return sum_over(torch.from_numpy(np.ascontiguousarray(value)).to(device), group).cpu().numpy()


def _check_finite(value: np.ndarray, name: str) -> None:
    if bad := np.count_nonzero(~np.isfinite(value)):
        raise UserError(f"{name} holds {bad} values that are not finite")


def _check_matrix(points: np.ndarray, name: str) -> None:
    if points.ndim != 2:
        raise UserError(f"{name} {points.shape} must be [n, d]")
    _check_finite(points, name)


def _check_pair(first: np.ndarray, second: np.ndarray, first_name: str, second_name: str) -> None:
    _check_matrix(first, first_name)
    _check_matrix(second, second_name)
    if first.shape[1] != second.shape[1]:
        raise UserError(
            f"{first_name} {first.shape} and {second_name} {second.shape} must be [n, d] with the "
            "same d"
        )
