"""Can stored values mean what their index says? Each fault comes with the options that would be
right.

What training would take silently is looked for: a log-variance declared as a standard deviation and
the other way round, latents that are scaled already or not, pixels of another range, [H, W, C] for
[C, H, W], labels from 1. Rules about sizes need some values before they speak, and leave room:
whoever means unusual values says so (`accept_values`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from diffmoe.data.values import by_channel, described
from diffmoe.errors import UserError

if TYPE_CHECKING:
    from diffmoe.data.shards import ShardMeta

# of a model's latents; those of published autoencoders, scaled as published, lie near 1
X_STD = (0.35, 2.5)
LOGVAR_LIMIT = 20.0  # where AutoencoderKL clamps it
_SD_SCALE = 0.18215
_ROUNDING = 0.01  # of pixels' range, which is 2 wide
ENOUGH_ARRAYS, _ENOUGH_VALUES = 8, 1000  # before a statistic says anything
ACCEPT = "or --accept-values where they are meant so"
_NO_MOMENTS = (
    "that is neither a deviation nor a log-variance: --kind latents if these arrays are latents, "
    "without a second half"
)


class _Sums:
    """Range and sums of numbers that come array by array."""

    def __init__(self) -> None:
        self.count, self.total, self.squares = 0, 0.0, 0.0
        self.low, self.high = np.inf, -np.inf

    def add(self, values: np.ndarray) -> None:
        self.count += values.size
        self.total += float(values.sum(dtype=np.float64))
        self.squares += float((values**2).sum(dtype=np.float64))
        self.low, self.high = min(self.low, values.min()), max(self.high, values.max())


class Values:
    """What stored values of a data set are like; arrays come as float32, channels first."""

    def __init__(self, meta: ShardMeta) -> None:
        self._meta, self._arrays = meta, 0
        self._values, self._spread = _Sums(), _Sums()  # all values, or of moments, the two halves
        self._variance = _Sums()  # of moments' noise, if their spread is a log-variance

    def add(self, array: np.ndarray) -> None:
        """One array [C, H, W], or of moments [2C, H, W]; all of its values finite."""
        self._arrays += 1
        meta, spread = self._meta, None
        if meta.kind == "moments":
            array, spread = np.split(array, 2)
        if meta.by_channel:  # where x alone has one deviation
            scale = by_channel(meta.scale, len(array))
            array = (array - by_channel(meta.mean, len(array))) * scale
            if spread is not None and meta.spread == "std":
                spread = spread * np.abs(scale)
            elif spread is not None:
                spread = spread + 2 * np.log(np.abs(scale))
        if spread is not None:
            self._spread.add(spread)
            self._variance.add(np.exp(np.minimum(spread, LOGVAR_LIMIT)))
        self._values.add(array)

    def check(self, where: str) -> None:
        """UserError where there is a `fault`."""
        if fault := self.fault():
            raise UserError(f"{where}: {fault}, {ACCEPT}")

    def fault(self) -> str:
        """What the values cannot mean, with the options that would be right; "" where all is well,
        or accepted.
        """
        if self._meta.accept_values or not self._arrays:
            return ""
        values = self._values
        # Variance of the values, without moments' noise.
        signal = max(0.0, values.squares / values.count - (values.total / values.count) ** 2)
        enough = self._arrays >= ENOUGH_ARRAYS and values.count >= _ENOUGH_VALUES
        if self._meta.kind == "pixels":
            return self._pixels(enough)
        if self._meta.kind == "moments":
            return self._moments(signal, enough)
        fault = _latents(signal, self._meta) if enough else ""
        if fault and values.low >= 0:
            fault += f"; if they are pixels: --kind pixels {self._pixel_options()}"
        return fault

    def _pixels(self, enough: bool) -> str:
        meta, ends = self._meta, (self._values.low, self._values.high)
        assert not isinstance(meta.scale, tuple) and not isinstance(meta.mean, tuple)
        low, high = sorted((float(value) - meta.mean) * meta.scale for value in ends)
        problem = ""
        if low < -1 - _ROUNDING or high > 1 + _ROUNDING:
            problem = "outside [-1, 1]"
        elif enough and abs(low) < _ROUNDING and high > 0.9:
            problem = "the upper half of [-1, 1] alone"
        elif enough and 0 < high - low < 0.2:
            problem = "a small part of [-1, 1]"
        if not problem:
            return ""
        return (
            f"pixels {ends[0]:.6g} to {ends[1]:.6g} make x {low:.3g} to {high:.3g}, {problem}: "
            f"{self._pixel_options()}"
        )

    def _pixel_options(self) -> str:
        """For pixels as they are: of [0, 1], of [0, 255], of [-1, 1], or of their own range."""
        low, high = float(self._values.low), float(self._values.high)
        latents = ""
        if low < -1 - _ROUNDING and high > 1 + _ROUNDING:
            latents = "--kind latents, or if they are pixels: "
        if low >= 0 and high <= 1 + _ROUNDING:
            scale, mean = 2.0, 0.5
        elif low >= 0 and 16 < high <= 255:
            scale, mean = 1 / 127.5, 127.5
        elif low >= -1 - _ROUNDING and high <= 1 + _ROUNDING:
            scale, mean = 1.0, 0.0
        else:
            scale, mean = 2 / (high - low) if high > low else 1.0, (high + low) / 2
        return f"{latents}--scale {scale:.10g} --mean {mean:.10g}"

    def _moments(self, signal: float, enough: bool) -> str:
        low, high, count = self._spread.low, self._spread.high, self._values.count
        of_logvar, of_std = self._variance.total / count, self._spread.squares / count
        if self._meta.spread == "std":
            span = f"moments' standard deviation runs from {low:.4g} to {high:.4g}"
            if low < 0 and high <= LOGVAR_LIMIT and not of_logvar > signal > 0:
                return f"{span}; that is never negative, a log-variance is: --spread logvar"
            if low < 0:
                return f"{span}; {_NO_MOMENTS}"
            return _latents(signal + of_std, self._meta) if enough else ""
        span = f"moments' log-variance runs from {low:.4g} to {high:.4g}"
        if low > 0:
            return f"{span}, always above 0; a standard deviation does: --spread std"
        if high > LOGVAR_LIMIT:
            fix = _NO_MOMENTS
            if low >= 0:
                fix = "a standard deviation is never negative: --spread std"
            return f"{span}, above {LOGVAR_LIMIT:g}; {fix}"
        if enough and of_logvar > signal > 0:
            return (
                f"{span}: noise of deviation {of_logvar**0.5:.3g} on means of {signal**0.5:.3g}; "
                f"{_NO_MOMENTS}"
            )
        return _latents(signal + of_logvar, self._meta) if enough else ""


def _latents(variance: float, meta: ShardMeta) -> str:
    """`scale_fault` with the scale that would be right."""
    std = variance**0.5
    fault = scale_fault(std, meta)
    if not fault or meta.by_channel:
        return fault
    if 0.6 <= std <= 1.6:
        return f"{fault}; they seem scaled already: --scale 1"
    if 0.6 <= std * _SD_SCALE <= 1.6:
        return (
            f"{fault}; they seem a Stable Diffusion autoencoder's, not scaled yet: --scale "
            f"{_SD_SCALE}"
        )
    return f"{fault}: about --scale {1 / std:.3g}"


def scale_fault(std: float, meta: ShardMeta) -> str:
    """Whether `meta.scale` does not bring latents near the size that models take, where their
    values have this standard deviation before it (after it where it is by channel); "" where it
    does. Values that are all the same say nothing.
    """
    x_std = std if meta.by_channel else std * float(np.abs(meta.scale))
    if meta.accept_values or std == 0 or X_STD[0] <= x_std <= X_STD[1]:
        return ""
    return (
        f"latents have deviation {std:.3g}, with scale ({described(meta.scale)}) {x_std:.3g}, "
        f"where models take about 1 ({X_STD[0]} to {X_STD[1]})"
    )


def shape_fault(shape: tuple[int, ...], meta: ShardMeta) -> str:
    """Whether channels seem to be elsewhere than `meta` says: by which two axes are square."""
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
        more = high - first + 1
        return f"labels run to {high}, more than classes ({classes}) allow: --classes {more}"
    return ""
