"""Distances between sets of samples: nearest neighbours, and improved precision and recall."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy.spatial.distance import cdist

_CHUNK_ENTRIES = 1 << 22  # distances held at once: 32 MiB of float64


def precision_recall(real: np.ndarray, fake: np.ndarray, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019) of `fake` [m, d] against `real` [n, d].

    A set's manifold is the union of balls around its points, each reaching to the point's k-th nearest other point.
    Precision is the share of fake points inside the real manifold, recall the share of real ones inside the fake's.

    Raises:
        ValueError: different widths, values that are not finite, or a set of k points or fewer.
    """
    for name, points in (("real", real), ("fake", fake)):
        if len(points) <= k:
            raise ValueError(f"{name} has {len(points)} points and needs more than k ({k})")
    _check_pair(real, fake, "real", "fake")
    return _share_inside(fake, real, k), _share_inside(real, fake, k)


def nearest_distances(query: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Euclidean distance [n] from each row of `query` [n, d] to the nearest row of `reference` [m, d].

    Raises:
        ValueError: different widths, values that are not finite, or an empty reference.
    """
    if len(reference) == 0:
        raise ValueError(f"reference (0 points) must not be empty: query has {len(query)} points")
    _check_pair(query, reference, "query", "reference")
    return np.concatenate([np.empty(0), *(block.min(axis=1) for block in _distance_blocks(query, reference))])


def _share_inside(query: np.ndarray, centres: np.ndarray, k: int) -> float:
    # Column k after the point itself, whose distance of 0 sorts first.
    radii = np.concatenate([np.partition(block, k, axis=1)[:, k] for block in _distance_blocks(centres, centres)])
    inside = [(block <= radii).any(axis=1) for block in _distance_blocks(query, centres)]
    return float(np.concatenate(inside).mean())


def _distance_blocks(rows: np.ndarray, columns: np.ndarray) -> Iterator[np.ndarray]:
    step = max(1, _CHUNK_ENTRIES // len(columns))
    return (cdist(rows[start : start + step], columns) for start in range(0, len(rows), step))


def _check_pair(first: np.ndarray, second: np.ndarray, first_name: str, second_name: str) -> None:
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise ValueError(f"{first_name} {first.shape} and {second_name} {second.shape} must be [n, d] with the same d")
    for name, points in ((first_name, first), (second_name, second)):
        if not np.isfinite(points).all():
            raise ValueError(f"{name} holds {np.count_nonzero(~np.isfinite(points))} values that are not finite")
