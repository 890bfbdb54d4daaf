"""Rectified flow: z_t = t x + (1 - t) noise, target x - noise, t in [0, 1] from noise to data.

What the network predicts is that velocity, or ``x``, the clean sample, which stands for a velocity
(``velocity_of``): loss, guidance and samplers are of the velocity either way.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffmoe.diffusion.guidance import Guide, Interval, is_guided
from diffmoe.models.dit import DiT, ModelOutput
from diffmoe.moe.routing import RoutingRule

Velocity = Callable[[Tensor, Tensor], Tensor]
# The least that 1 - t counts as where a predicted x becomes a velocity, as in JiT: near the data an
# error of x would count without bound.
LEAST_NOISE = 0.05


def noisy(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """z_t of x, noise [B, C, H, W] and t [B]."""
    time = t.view(-1, 1, 1, 1)
    return time * x + (1 - time) * noise


def velocity_of(prediction: Tensor, z: Tensor, t: Tensor, predicts: str) -> Tensor:
    """The velocity [B, C, H, W] that a network's output [B, C or 2 C, H, W] at z, t [B] stands for:
    itself, or, of a predicted x, (x - z) / max(1 - t, 0.05) (JiT, Li & He 2025, with its clip).
    """
    prediction = prediction[:, : z.shape[1]].to(z.dtype)
    return prediction if predicts == "velocity" else (prediction - z) / _noise_left(t)


def _noise_left(t: Tensor) -> Tensor:
    return (1 - t).clamp(min=LEAST_NOISE).view(-1, 1, 1, 1)


def flow_loss(
    model: Callable[..., ModelOutput],
    x: Tensor,
    noise: Tensor,
    t: Tensor,
    y: Tensor,
    rule: RoutingRule,
    predicts: str = "velocity",
) -> tuple[Tensor, ModelOutput]:
    """Mean squared error of the velocity, in fp32, and the model's output.  x, noise [B, C, H, W];
    t [B]; y [B].  ``predicts``: ``diffusion.prediction``; of x both velocities have the clip.

    A model with learned sigma has 2 C output channels; the flow reads the first C."""
    squares, output = flow_errors(model, x, noise, t, y, rule, predicts)
    return squares.mean(), output


def flow_errors(
    model: Callable[..., ModelOutput],
    x: Tensor,
    noise: Tensor,
    t: Tensor,
    y: Tensor,
    rule: RoutingRule,
    predicts: str = "velocity",
) -> tuple[Tensor, ModelOutput]:
    """``flow_loss`` before its mean: squared errors [B, C, H, W]."""
    output = model(noisy(x, noise, t), t, y, rule)
    prediction = output.prediction[:, : x.shape[1]].to(x.dtype)
    if predicts == "x":  # z is the same in both velocities
        return ((prediction - x) / _noise_left(t)).square(), output
    return (prediction - (x - noise)).square(), output


def guided_velocity(
    model: DiT,
    y: Tensor,
    cfg: float,
    rule: RoutingRule,
    *,
    guide: Guide | None = None,
    interval: Interval | None = None,
    predicts: str = "velocity",
) -> Velocity:
    """The field v(z, t) with guidance on all channels: guide + cfg (conditional - guide); the guide
    is the null class where there is none.

    The two passes are two pools, as published.  ``cfg = 1``, and times t outside the ``interval``
    (of one value for all samples), run the conditional pass alone."""
    null = torch.full_like(y, model.model.classes)

    def velocity(z: Tensor, t: Tensor) -> Tensor:
        def run(model: DiT, labels: Tensor, rule: RoutingRule) -> Tensor:
            return velocity_of(model(z, t, labels, rule).prediction, z, t, predicts)

        conditional = run(model, y, rule)
        if not is_guided(t, cfg, interval):
            return conditional
        weaker = run(model, null, rule) if guide is None else run(guide[0], y, guide[1])
        return weaker + cfg * (conditional - weaker)

    return velocity
