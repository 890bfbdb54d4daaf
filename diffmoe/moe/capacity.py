"""The capacity predictor and its thresholds (paper, equations 10-15)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CapacityPredictor(nn.Sequential):
    """Linear, SiLU, Linear on the detached token: logits of "expert i takes this token", [T, D] -> [T, E]."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, experts))

    def forward(self, x_TD: Tensor) -> Tensor:
        logits = super().forward(x_TD.detach())
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def predictor_loss(logits_TE: Tensor, mask_TE: Tensor) -> Tensor:
    """Binary cross-entropy in nats, mean over tokens and experts (paper, equation 11)."""
    return F.binary_cross_entropy_with_logits(logits_TE, mask_TE.to(logits_TE.dtype))


def trivial_predictor_loss(experts: int, capacity: float) -> float:
    """Cross-entropy in nats of the predictor that always says capacity / experts: the figure to beat."""
    p = torch.tensor(min(1.0, capacity / experts), dtype=torch.float64)
    return float(-(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p)))


class Thresholds(nn.Module):
    """Per-expert thresholds: a running mean of observations, started by the first one.

    Buffers, not parameters: forward only reads them, and :meth:`commit` runs once per optimizer step, so recompute and
    accumulation cannot count an observation twice."""

    def __init__(self, experts: int, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("value", torch.full((experts,), 0.5))
        self.register_buffer("observations", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def commit(self, observed_E: Tensor) -> None:
        """Takes one step's observation [E]: the K-th largest sigmoid, mean over pools."""
        kept = torch.where(self.observations > 0, self.decay, 0.0)
        self.value.mul_(kept).add_(observed_E.to(self.value.dtype) * (1 - kept))
        self.observations += 1
