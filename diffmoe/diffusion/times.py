"""Training times as pure maps of a uniform draw, so that a sample's time stays a function of its
number.
"""

from __future__ import annotations

import torch
from torch import Tensor


def logit_normal(u: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """t [B] in [0, 1] with logit(t) ~ N(mean, std^2), from u [B] uniform in [0, 1) (Esser et al.
    2024, section 3.1).

    t = 1 is data here, so a positive ``mean`` prefers clean samples; ``std`` must be above 0.
    Computed in fp64.
    """
    return torch.special.ndtri(u.double()).mul(std).add(mean).sigmoid().to(u.dtype)


def shifted(t: Tensor, shift: float) -> Tensor:
    """t [B] in [0, 1] moved towards noise, t = 0, as SD3 does for larger images (Esser et al. 2024,
    equation 23, where t = 1 is noise): of noise 1 - t becomes s (1 - t) / (1 + (s - 1) (1 - t)).
    """
    return t if shift == 1 else t / (shift - (shift - 1) * t)


def within(t: Tensor, interval: tuple[float, float]) -> Tensor:
    """t [B] in [0, 1], squeezed into the interval."""
    low, high = interval
    return t if interval == (0.0, 1.0) else low + (high - low) * t


def uniform_steps(u: Tensor, num_timesteps: int) -> Tensor:
    """int64 steps [B], uniform in [0, num_timesteps), from u [B] uniform in [0, 1)."""
    # A fp64 draw just below 1 becomes 1 in fp32.
    return (u.double() * num_timesteps).long().clamp_(max=num_timesteps - 1)
