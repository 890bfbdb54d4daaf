"""Moving averages of the weights, exponential and by power functions, in fp32, sharded as the
optimizer is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffmoe.checkpoints.power_averages import exponent, step_weight
from diffmoe.config import TrainConfig
from diffmoe.training.engine import Engine


class Ema:
    """Flat shards congruent with the engine's masters, one set for each decay and each length (see
    ``power_averages``); no rank ever holds a full copy.

    Parameters only: thresholds are already running means and are taken as they are. ``growth``: how
    many times the batch is what the decays are stated for, by which averages are called; lengths
    have no unit of time and stay."""

    def __init__(self, engine: Engine, train: TrainConfig) -> None:
        self.engine, self.growth = engine, train.growth
        self.by_decay = {decay: self._weights() for decay in train.ema_decays}
        self.by_length = {length: self._weights() for length in train.ema_lengths}

    def _weights(self) -> list[Tensor]:
        return [master.detach().clone() for master in self.engine.masters]

    @property
    def shards(self) -> list[Tensor]:
        """Those of the first decay, the one that samples."""
        return next(iter(self.by_decay.values()))

    @torch.no_grad()
    def update(self) -> None:
        """ema <- d ema + (1 - d) weights, once per optimizer step, with d = decay^growth: as long a
        half-life in samples; for a length d as its power function has it at the engine's update.
        """
        masters = [master.detach() for master in self.engine.masters]
        for decay, shards in self.by_decay.items():
            torch._foreach_lerp_(shards, masters, 1.0 - decay**self.growth)
        for length, shards in self.by_length.items():
            weight = step_weight(exponent(length), self.engine.updates)
            torch._foreach_lerp_(shards, masters, weight)
