"""Exponential moving averages of the weights, in fp32, sharded as the optimizer is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffmoe.training.engine import Engine


class Ema:
    """Flat shards congruent with the engine's masters, one set for each decay; no rank ever holds a
    full copy.

    Parameters only: thresholds are already running means and are taken as they are. ``growth``: how
    many times the batch is what the decays are stated for, by which averages are called."""

    def __init__(self, engine: Engine, decays: Sequence[float], growth: float = 1.0) -> None:
        self.engine, self.growth = engine, growth
        self.by_decay = {
            decay: [master.detach().clone() for master in engine.masters()] for decay in decays
        }

    @property
    def shards(self) -> list[Tensor]:
        """Those of the first decay, the one that samples."""
        return next(iter(self.by_decay.values()))

    @torch.no_grad()
    def update(self) -> None:
        """ema <- d ema + (1 - d) weights, once per optimizer step, with d = decay^growth: as long a
        half-life in samples.
        """
        masters = [master.detach() for master in self.engine.masters()]
        for decay, shards in self.by_decay.items():
            torch._foreach_lerp_(shards, masters, 1.0 - decay**self.growth)
