"""Stored arrays as numbers: floats, and the channels' sums behind a data set's statistics."""

from __future__ import annotations

import functools
import math
from statistics import NormalDist
from typing import Any

import numpy as np

from diffmoe.errors import UserError

# A data set's scale or mean: one number, or one of each channel.
Numbers = float | tuple[float, ...]

# numpy converts half floats one by one in software; a table of all 65,536 is faster. None of its
# indices can lie outside: "wrap" spares the look whether one does.
_FLOAT_OF_HALF = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)


def numbers_of(value: Any) -> Numbers:
    """A number, a list of them, or text of either ("0.5", "0.5,0.25"). TypeError, ValueError."""
    if isinstance(value, str) and "," in value:
        value = value.split(",")
    return tuple(map(float, value)) if isinstance(value, (list, tuple)) else float(value)


def by_channel(numbers: Numbers, channels: int) -> np.float32 | np.ndarray:
    """`numbers` in fp32 to go with an array [C, H, W]. UserError for neither one nor C of them."""
    if not isinstance(numbers, tuple):
        return np.float32(numbers)
    if len(numbers) != channels:
        raise UserError(f"{len(numbers)} numbers by channel do not fit {channels} channels")
    return np.array(numbers, np.float32).reshape(-1, 1, 1)


def described(numbers: Numbers) -> str:
    """For messages."""
    if not isinstance(numbers, tuple):
        return f"{numbers:g}"
    return f"{min(numbers):.4g} to {max(numbers):.4g} by channel" if numbers else "by channel"


@functools.cache
def _normal_table() -> np.ndarray:
    """Normal quantiles in the middle of 65,536 equal shares, scaled to variance 1."""
    upper = np.array([NormalDist().inv_cdf(0.5 + (i + 0.5) / 65536) for i in range(32768)])
    upper = (upper / np.sqrt(np.mean(upper**2))).astype(np.float32)
    return np.concatenate([-upper[::-1], upper])


def normals(words: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal numbers of 16 random bits each, four a word, as float32 of this shape.

    For the noise of moments, which are stored with 11 bits themselves: looked up, so a third of the
    time of numpy's, and the same bits on every machine and with every numpy. They end at 4.3
    deviations.
    """
    return (
        _normal_table().take(words.view(np.uint16)[: math.prod(shape)], mode="wrap").reshape(shape)
    )


def to_float(stored: np.ndarray, dtype: str) -> np.ndarray:
    """A stored array, whose index says `dtype`, as float32."""
    if dtype == "float16":
        return _FLOAT_OF_HALF.take(stored.view(np.uint16), mode="wrap")
    if dtype == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)


def std_of(spread: np.ndarray, kind: str) -> np.ndarray:
    """Standard deviation from its stored form: itself ("std") or its square's log ("logvar")."""
    return np.exp(0.5 * spread).astype(spread.dtype) if kind == "logvar" else spread


def channel_sums(values: np.ndarray, kind: str, spread: str = "std") -> np.ndarray:
    """[2, C]: the channels' sums of expected values and of expected squares of one array (float);
    of moments, over the latents' noise too.
    """
    values = values.astype(np.float64)
    mean, std = np.split(values, 2) if kind == "moments" else (values, None)
    variance = 0.0 if std is None else std_of(std, spread) ** 2
    return np.stack([mean.sum((1, 2)), (mean**2 + variance).sum((1, 2))])


def mean_and_std(sums: np.ndarray, values: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The channels' mean and standard deviation from sums [2, C] over `values` values a channel."""
    mean = sums[0] / values
    std = np.sqrt(np.maximum(sums[1] / values - mean**2, 0))
    return tuple(map(float, mean)), tuple(map(float, std))
