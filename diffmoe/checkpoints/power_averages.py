"""Averages of the weights by power functions of the training time, and the sum of some that comes
closest to another (Karras et al. 2023, arXiv 2312.02696, section 3.1 and appendix C).

An average of exponent g after T updates weighs the weights of update t by
p(t) = (g + 1) t^g / T^(g + 1).  Its length is the standard deviation of that profile as a share of
T, which is the paper's sigma_rel: the profile grows with the run and has no unit of time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# The largest share of a profile (L2) that a sum of others may miss.
WORST_MISS = 0.05
_KIND = "ema_length_"


@dataclass(frozen=True)
class Profile:
    """What an average of ``length`` weighs after ``updates`` optimizer updates."""

    length: float
    updates: int


def exponent(length: float) -> float:
    """g of a length s = (g + 1)^(1/2) / ((g + 2) (g + 3)^(1/2)): the root of
    g^3 + 7 g^2 + (16 - 1/s^2) g + (12 - 1/s^2) that is not negative.
    """
    inverse = length**-2
    return float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())


def step_weight(g: float, update: int) -> float:
    """What the weights of update ``update`` (1-based) get in their average: 1 - (1 - 1/t)^(g + 1).
    All at the first: no average remembers what it started from.
    """
    return 1.0 - (1.0 - 1.0 / update) ** (g + 1)


def closest_sum(averages: Sequence[Profile], wanted: Profile) -> tuple[np.ndarray, float]:
    """The factors of the averages in the sum whose profile is closest to the wanted one (least
    squares), and which share of that (L2) it misses.

    Beside the paper's equations the factors add up to 1, so that what never changed stays as it is
    where few averages are there; with many they do so anyway, to 1e-5.  fp64.
    """
    g = np.array([exponent(each.length) for each in averages])
    T = np.array([float(each.updates) for each in averages])
    goal = np.array([exponent(wanted.length)]), np.array([float(wanted.updates)])
    products, aims = _products(g, T, g, T), _products(g, T, *goal)[:, 0]
    size = float(_products(*goal, *goal)[0, 0])
    norms = np.sqrt(np.diag(products))
    # The normal equations of profiles of norm 1, bordered by the constraint and its multiplier.
    border = np.sqrt(size) / norms
    system = np.block([[products / np.outer(norms, norms), border[:, None]], [border, 0.0]])
    right = np.append(aims / norms, np.sqrt(size))
    factors = np.linalg.lstsq(system, right, rcond=1e-14)[0][:-1] / norms
    missed = size - 2 * factors @ aims + factors @ products @ factors
    return factors, float(np.sqrt(max(0.0, missed) / size))


def _products(g: np.ndarray, T: np.ndarray, h: np.ndarray, U: np.ndarray) -> np.ndarray:
    """Integrals of profiles (g, T) [n] times (h, U) [m] over the time that both have: [n, m]."""
    g, T, h, U = g[:, None], T[:, None], h[None], U[None]
    m = np.minimum(T, U)
    powers = (m / T) ** g * (m / U) ** h * m / (T * U)
    return (g + 1) * (h + 1) / (g + h + 1) * powers


def length_kind(length: float) -> str:
    """The kind of the tensors that an average of this length keeps."""
    return f"{_KIND}{length!r}"


def lengths_of(kinds: Sequence[str]) -> list[float]:
    """Of those kinds that are such averages'."""
    return [float(kind.removeprefix(_KIND)) for kind in kinds if kind.startswith(_KIND)]
