"""Exponential moving average of the weights, fp32, from the masters, sharded as the optimizer is."""

from __future__ import annotations

import torch
from torch import Tensor

from diffmoe.training.engine import Engine


class Ema:
    """Flat shards congruent with the engine's masters; no rank ever holds a full copy.

    Parameters only: thresholds are already running means and are taken as they are."""

    def __init__(self, engine: Engine, decay: float) -> None:
        self.engine, self.decay = engine, decay
        self.shards: list[Tensor] = [master.detach().clone() for master in engine.masters()]

    @torch.no_grad()
    def update(self) -> None:
        """ema <- decay ema + (1 - decay) weights, once per optimizer step."""
        torch._foreach_lerp_(self.shards, [m.detach() for m in self.engine.masters()], 1.0 - self.decay)
