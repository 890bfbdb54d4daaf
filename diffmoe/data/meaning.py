"""Can stored values mean what their index says? Each fault comes with the options that would be
right.

What training would take in silence is looked for: a log-variance declared as a standard deviation
and the other way round, latents that are scaled already or not, pixels of another range, [H, W, C]
for [C, H, W], labels from 1. Rules about sizes need some values before they speak, and leave room:
whoever means unusual values says so (`accept_values`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from diffmoe.errors import UserError

if TYPE_CHECKING:
    from diffmoe.data.shards import ShardMeta

X_STD = (
    0.35,
    2.5,
)  # of a model's latents; those of published autoencoders, scaled as published, lie near 1
LOGVAR_LIMIT = 20.0  # where AutoencoderKL clamps it
_SD_SCALE = 0.18215
_ROUNDING = 0.01  # of pixels' range, which is 2 wide
ENOUGH_ARRAYS, _ENOUGH_VALUES = 8, 1000  # before a statistic says anything
ACCEPT = "or --accept-values where they are meant so"


class Values:
    """What stored values of a data set are like, array by array; the arrays as float32, channels
    first.
    """

    def __init__(self, meta: ShardMeta) -> None:
        self._meta = meta
        self._arrays = self._count = 0
        self._total = self._squares = 0.0
        self._low, self._high = math.inf, -math.inf
        self._spread_low, self._spread_high = math.inf, -math.inf
        self._variance = {
            "std": 0.0,
            "logvar": 0.0,
        }  # of moments' noise, summed, read as the one and as the other

    def add(self, array: np.ndarray) -> None:
        """One array [C, H, W], or of moments [2C, H, W]; all of its values finite."""
        values, spread = np.split(array, 2) if self._meta.kind == "moments" else (array, None)
        self._arrays += 1
        self._count += values.size
        self._total += float(values.sum(dtype=np.float64))
        self._squares += float((values**2).sum(dtype=np.float64))
        self._low, self._high = (
            min(self._low, float(values.min())),
            max(self._high, float(values.max())),
        )
        if spread is not None:
            self._spread_low = min(self._spread_low, float(spread.min()))
            self._spread_high = max(self._spread_high, float(spread.max()))
            self._variance["std"] += float((spread**2).sum(dtype=np.float64))
            self._variance["logvar"] += float(
                np.exp(np.minimum(spread, LOGVAR_LIMIT)).sum(dtype=np.float64)
            )

    def check(self, where: str) -> None:
        """UserError where there is a `fault`."""
        fault = self.fault()
        if fault:
            raise UserError(f"{where}: {fault}, {ACCEPT}")

    def fault(self) -> str:
        """What the values cannot mean, with the options that would be right; "" where all is well,
        or accepted.
        """
        if self._meta.accept_values or not self._arrays:
            return ""
        return {"pixels": self._pixels, "latents": self._latents, "moments": self._moments}[
            self._meta.kind
        ]()

    @property
    def _enough(self) -> bool:
        return self._arrays >= ENOUGH_ARRAYS and self._count >= _ENOUGH_VALUES

    @property
    def _signal(self) -> float:
        """Variance of the values, without moments' noise."""
        return max(0.0, self._squares / self._count - (self._total / self._count) ** 2)

    def _noise(self, spread: str) -> float:
        return self._variance[spread] / self._count

    def _pixels(self) -> str:
        low, high = sorted(
            (value - self._meta.mean) * self._meta.scale for value in (self._low, self._high)
        )
        span = f"pixels {self._low:.6g} to {self._high:.6g} make x {low:.3g} to {high:.3g}"
        if low < -1 - _ROUNDING or high > 1 + _ROUNDING:
            return f"{span}, outside [-1, 1]: {self._pixel_options()}"
        if self._enough and abs(low) < _ROUNDING and high > 0.9:
            return f"{span}, the upper half of [-1, 1] alone: {self._pixel_options()}"
        if self._enough and 0 < high - low < 0.2:
            return f"{span}, a small part of [-1, 1]: {self._pixel_options()}"
        return ""

    def _pixel_options(self) -> str:
        """For pixels as they are: of [0, 1], of [0, 255], of [-1, 1], or of their own range."""
        low, high = self._low, self._high
        latents = (
            "--kind latents, or if they are pixels: "
            if low < -1 - _ROUNDING and high > 1 + _ROUNDING
            else ""
        )
        if low >= 0 and high <= 1 + _ROUNDING:
            scale, mean = 2.0, 0.5
        elif low >= 0 and 16 < high <= 255:
            scale, mean = 1 / 127.5, 127.5
        elif low >= -1 - _ROUNDING and high <= 1 + _ROUNDING:
            scale, mean = 1.0, 0.0
        else:
            scale, mean = 2 / (high - low) if high > low else 1.0, (high + low) / 2
        return f"{latents}--scale {scale:.10g} --mean {mean:.10g}"

    def _latents(self) -> str:
        if not self._enough:
            return ""
        fault = self._scale(self._signal)
        pixels = (
            f"; if they are pixels: --kind pixels {self._pixel_options()}" if self._low >= 0 else ""
        )
        return fault and fault + pixels

    def _moments(self) -> str:
        spread, other = self._meta.spread, {"std": "logvar", "logvar": "std"}[self._meta.spread]
        span = f"{self._spread_low:.4g} to {self._spread_high:.4g}"
        if spread == "std" and self._spread_low < 0:
            may_be = self._spread_high <= LOGVAR_LIMIT and not self._noise(other) > self._signal > 0
            return f"moments' standard deviation runs from {span}; " + (
                "that is never negative, a log-variance is: --spread logvar"
                if may_be
                else self._no_moments()
            )
        if spread == "logvar" and self._spread_low > 0:
            return f"moments' log-variance runs from {span}, always above 0; a standard deviation does: --spread std"
        if spread == "logvar" and self._spread_high > LOGVAR_LIMIT:
            may_be = self._spread_low >= 0
            return f"moments' log-variance runs from {span}, above {LOGVAR_LIMIT:g}; " + (
                "a standard deviation is never negative: --spread std"
                if may_be
                else self._no_moments()
            )
        if not self._enough:
            return ""
        if spread == "logvar" and self._noise(spread) > self._signal > 0:
            return (
                f"moments' log-variance runs from {span}: noise of deviation {self._noise(spread) ** 0.5:.3g} on "
                f"means of {self._signal**0.5:.3g}; {self._no_moments()}"
            )
        return self._scale(self._signal + self._noise(spread))

    def _scale(self, variance: float) -> str:
        std = variance**0.5
        fault = scale_fault(std, self._meta)
        if not fault or 0.6 <= std <= 1.6:
            return fault and f"{fault}; they seem scaled already: --scale 1"
        if 0.6 <= std * _SD_SCALE <= 1.6:
            return f"{fault}; they seem a Stable Diffusion autoencoder's, not scaled yet: --scale {_SD_SCALE}"
        return f"{fault}: about --scale {1 / std:.3g}"

    def _no_moments(self) -> str:
        return (
            "that is neither a deviation nor a log-variance: --kind latents if these arrays are latents, without a "
            "second half"
        )


def scale_fault(std: float, meta: ShardMeta) -> str:
    """Whether `meta.scale` does not bring latents near the size that models take, where their
    values have this standard deviation before it; "" where it does. Values that are all the same
    say nothing.
    """
    x_std = std * abs(meta.scale)
    if meta.accept_values or std == 0 or X_STD[0] <= x_std <= X_STD[1]:
        return ""
    return (
        f"latents have deviation {std:.3g}, with scale ({meta.scale:g}) {x_std:.3g}, where models take about 1 "
        f"({X_STD[0]} to {X_STD[1]})"
    )


def shape_fault(shape: tuple[int, ...], meta: ShardMeta) -> str:
    """Whether arrays seem to have their channels elsewhere than `meta` says: square in the two axes
    that go with it.
    """
    first, second, third = shape
    layout = meta.members.layout
    if not meta.accept_values and layout == "chw" and first == second != third:
        return f"arrays {list(shape)} are not [C, H, W], but [H, W, C] it seems: --layout hwc"
    if not meta.accept_values and layout == "hwc" and second == third != first:
        return f"arrays {list(shape)} are not [H, W, C], but [C, H, W] it seems: --layout chw"
    return ""


def label_fault(low: int, high: int, meta: ShardMeta) -> str:
    """What is wrong with stored labels from `low` to `high`."""
    first, classes = meta.members.first_class, meta.classes
    if (first, low, high) == (0, 1, classes):
        return f"labels run from 1 to classes ({classes}): --first-class 1"
    if low < first:
        return f"labels run from {low}, below first_class ({first}): --first-class {low}"
    if high - first >= classes:
        return f"labels run to {high}, more than classes ({classes}) allow: --classes {high - first + 1}"
    return ""
