"""Rectified flow: z_t = t x + (1 - t) noise, target x - noise, t in [0, 1] from noise to data."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffmoe.diffusion.guidance import Guide, Interval, is_guided
from diffmoe.models.dit import DiT, ModelOutput
from diffmoe.moe.routing import RoutingRule

Velocity = Callable[[Tensor, Tensor], Tensor]


def flow_loss(
    model: Callable[..., ModelOutput],
    x: Tensor,
    noise: Tensor,
    t: Tensor,
    y: Tensor,
    rule: RoutingRule,
) -> tuple[Tensor, ModelOutput]:
    """Mean squared error of the velocity, in fp32, and the model's output.  x, noise [B, C, H, W];
    t [B]; y [B].

    A model with learned sigma has 2 C output channels; the flow reads the first C."""
    squares, output = flow_errors(model, x, noise, t, y, rule)
    return squares.mean(), output


def flow_errors(
    model: Callable[..., ModelOutput],
    x: Tensor,
    noise: Tensor,
    t: Tensor,
    y: Tensor,
    rule: RoutingRule,
) -> tuple[Tensor, ModelOutput]:
    """``flow_loss`` before its mean: squared errors [B, C, H, W]."""
    time = t.view(-1, 1, 1, 1)
    output = model(time * x + (1 - time) * noise, t, y, rule)
    velocity = output.prediction[:, : x.shape[1]].to(x.dtype)
    return (velocity - (x - noise)).square(), output


def guided_velocity(
    model: DiT,
    y: Tensor,
    cfg: float,
    rule: RoutingRule,
    *,
    guide: Guide | None = None,
    interval: Interval | None = None,
) -> Velocity:
    """The field v(z, t) with guidance on all channels: guide + cfg (conditional - guide); the guide
    is the null class where there is none.

    The two passes are two pools, as published.  ``cfg = 1``, and times t outside the ``interval``
    (of one value for all samples), run the conditional pass alone."""
    null = torch.full_like(y, model.model.classes)

    def velocity(z: Tensor, t: Tensor) -> Tensor:
        def run(model: DiT, labels: Tensor, rule: RoutingRule) -> Tensor:
            return model(z, t, labels, rule).prediction[:, : z.shape[1]].to(z.dtype)

        conditional = run(model, y, rule)
        if not is_guided(t, cfg, interval):
            return conditional
        weaker = run(model, null, rule) if guide is None else run(guide[0], y, guide[1])
        return weaker + cfg * (conditional - weaker)

    return velocity
