"""Samplers as plain functions of one signature, ``sampler(field, z, steps, noise)``: from noise z
[B, C, H, W] to data.

A flow's field is its velocity v(z, t), t [B] in [0, 1]: ``euler``, ``heun``, ``dopri5``.  A
diffusion's field is [epsilon, v] (x, t), t [B] steps out of 1000: ``ancestral``, ``ddim``.
``noise(i)`` gives the noise of step i; samplers that need none ignore it.  What only some samplers
have (eta, tolerance, shift) is a keyword with a default.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

from diffmoe.diffusion.ddpm import Field, Noise, ancestral, ddim
from diffmoe.errors import UserError


def euler(
    field: Field, z: Tensor, steps: int, noise: Noise | None = None, *, shift: float = 1.0
) -> Tensor:
    """Explicit Euler, first order, ``steps`` evaluations at times that are even before ``shift``
    (``times.shifted``).  z [B, …].
    """
    for start, _, rate in _grid(steps, shift):
        z = z + field(z, z.new_full((len(z),), start)) / rate
    return z


def heun(
    field: Field, z: Tensor, steps: int, noise: Noise | None = None, *, shift: float = 1.0
) -> Tensor:
    """Heun's trapezoid rule, second order, two evaluations a step; ``shift`` as of ``euler``."""
    for start, end, rate in _grid(steps, shift):
        here = field(z, z.new_full((len(z),), start))
        there = field(z + here / rate, z.new_full((len(z),), end))
        z = z + (here + there) / (2 * rate)
    return z


def _grid(steps: int, shift: float) -> Iterator[tuple[float, float, float]]:
    """(start, end, 1 / (end - start)) of each step; the last by a formula that gives ``steps`` to
    the bit where nothing is shifted.
    """
    for a, b in pairwise(i / steps for i in range(steps + 1)):
        here, there = shift - (shift - 1) * a, shift - (shift - 1) * b
        yield a / here, b / there, steps * here * there / shift


# Dormand and Prince 1980: nodes, stages, and the difference of the fifth- and fourth-order weights.
# The last stage is the fifth-order result itself, so its slope is the next step's first.
_NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
_FIRST_STEP = 0.01


def _only_mine(unfinished: bool) -> bool:
    return unfinished


def dopri5(
    field: Field,
    z: Tensor,
    steps: int,
    noise: Noise | None = None,
    *,
    tolerance: float = 1e-4,
    anyone: Callable[[bool], bool] = _only_mine,
) -> Tensor:
    """Dormand-Prince 5(4) with adaptive steps: at most ``steps`` of them, rejected ones included, 6
    evaluations each.

    Every sample has its own time and step size, so no sample's result depends on its batch-mates (a
    library's common step would couple them); a finished sample waits for the slowest.
    ``tolerance`` bounds the error of a step, root mean square over a sample, relative and absolute.
    A bf16 model's rounding reads as error: on a smooth field 1e-3 costs it 37 evaluations, 1e-5 133
    and 1e-6 685 (fp32: 25, 49, 49).  Where the field holds collectives, ``anyone`` must tell every
    rank alike whether some rank is unfinished: ranks must evaluate in step.

    Raises UserError (on all those ranks) when ``steps`` do not suffice."""
    t = z.new_zeros(len(z), dtype=torch.float64)
    h = torch.full_like(t, _FIRST_STEP)
    slope = field(z, t.to(z.dtype))
    for _ in range(steps):
        last = h >= 1 - t
        h = torch.where(last, 1 - t, h)
        candidate, end_slope, error = _attempt(field, z, t, h, slope, tolerance)
        accepted = error <= 1  # false for a field that is not finite
        here = accepted.view(-1, *[1] * (z.dim() - 1))
        z, slope = torch.where(here, candidate, z), torch.where(here, end_slope, slope)
        t = torch.where(accepted, torch.where(last, 1.0, t + h), t)
        h = h * (0.9 * error**-0.2).nan_to_num(nan=0.2).clamp(0.2, 5.0)
        if not anyone(bool((t < 1).any())):
            return z
    raise UserError(
        f"dopri5 did not finish in sample.steps ({steps}) at sample.tolerance ({tolerance}), raise "
        f"one of them: the slowest sample here is at t = {t.min().item():.3g} of 1"
    )


def _attempt(
    field: Field, z: Tensor, t: Tensor, h: Tensor, slope: Tensor, tolerance: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of size h [B] from z at t [B]: the result, the slope there, and the error over the
    tolerance [B].
    """
    width = h.to(z.dtype).view(-1, *[1] * (z.dim() - 1))

    def weighted(weights: tuple[float, ...]) -> Tensor:
        return width * sum(w * k for w, k in zip(weights, slopes, strict=True) if w)

    slopes = [slope]
    for node, weights in zip(_NODES, _STAGES, strict=True):
        stage = z + weighted(weights)
        slopes.append(field(stage, (t + node * h).to(z.dtype)))
    scale = tolerance * (1 + torch.maximum(z.abs(), stage.abs()))
    error = (weighted(_ERROR) / scale).flatten(1).double().square().mean(1).sqrt()
    return stage, slopes[-1], error


SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "euler": euler,
    "heun": heun,
    "dopri5": dopri5,
    "ancestral": ancestral,
    "ddim": ddim,
}
