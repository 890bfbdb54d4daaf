"""Noise, times and label drops as functions of (seed, number of the sample).

Sample i of step s has the number s * batch + i whatever rank holds it, so a run draws the same on 1 GPU or 64 and a
resumed run goes on exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence

import numpy as np
import torch
from torch import Tensor

from diffmoe.random_streams import Use, philox


@dataclass(frozen=True)
class Draws:
    """``noise`` [B, C, H, W] fp32 normal, ``t`` [B] uniform in [0, 1), ``drop`` [B] uniform in [0, 1)."""

    noise: Tensor
    t: Tensor
    drop: Tensor


def training_draws(seed: int, numbers: Sequence[int], shape: tuple[int, ...]) -> Draws:
    """What training needs for the samples with these global numbers; ``shape`` is one sample's."""
    noise = torch.empty(len(numbers), *shape)
    uniform = torch.empty(len(numbers), 2, dtype=torch.float64)
    for row, number in enumerate(numbers):
        generator = np.random.Generator(philox(Use.TRAINING, seed, number))
        uniform[row] = torch.from_numpy(generator.random(2))
        noise[row] = torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))
    return Draws(noise, uniform[:, 0].float(), uniform[:, 1].float())


def sampling_noise(seed: int, numbers: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Start of the images with these numbers: image i is the same in any batch, on any rank."""
    return torch.stack([
        torch.from_numpy(
            np.random.Generator(philox(Use.SAMPLING, seed, number)).standard_normal(shape, dtype=np.float32))
        for number in numbers])
