"""Noise, times and label drops as functions of (seed, number of the sample).

Sample i of step s has the number s * batch + i (`data/share.py`) whatever rank holds it, so a run
draws the same on 1 GPU or 64 and a resumed run goes on exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffmoe.random_streams import Use, philox

_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Draws:
    """``noise`` [B, C, H, W] fp32 normal, ``t`` [B] uniform in [0, 1), ``drop`` [B] uniform in [0,
    1).
    """

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


class StepDraws:
    """The draws of a run's steps, a list over micro-batches each.  A thread makes the next step's
    while the device is busy with this one's: a step ends with a look at the device, which would
    stand idle after it (4 ms for 64 latents of 4 x 32 x 32).

    ``positions``: step -> [micro-batches, samples], global numbers."""

    def __init__(
        self, seed: int, positions: Callable[[int], np.ndarray], shape: tuple[int, ...]
    ) -> None:
        self._seed, self._positions, self._shape = seed, positions, shape
        self._thread = ThreadPoolExecutor(1, "draws")
        self._coming: tuple[int, Future[list[Draws]] | None] = (-1, None)

    def of(self, step: int) -> list[Draws]:
        number, drawn = self._coming
        if drawn is None or number != step:
            drawn = self._thread.submit(self._draw, step)
        self._coming = step + 1, self._thread.submit(self._draw, step + 1)
        return drawn.result()

    def _draw(self, step: int) -> list[Draws]:
        return [
            training_draws(self._seed, numbers, self._shape)
            for numbers in self._positions(step).tolist()
        ]

    def __enter__(self) -> StepDraws:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)


def sampling_noise(seed: int, numbers: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Start of the images with these numbers: image i is the same in any batch, on any rank."""
    return torch.stack(
        [
            torch.from_numpy(
                np.random.Generator(philox(Use.SAMPLING, seed, number)).standard_normal(
                    shape, dtype=np.float32
                )
            )
            for number in numbers
        ]
    )


def validation_draws(numbers: Sequence[int], shape: tuple[int, ...]) -> Draws:
    """What the validation loss is measured at for held-out samples with these numbers: the same in
    every run, whatever its seed.  No label is dropped.

    Times are the golden ratio's multiples modulo 1: those of any run of numbers lie evenly in
    [0, 1), so that every batch, and every number of samples, sees all times alike.
    """
    noise = torch.empty(len(numbers), *shape)
    for row, number in enumerate(numbers):
        generator = np.random.Generator(philox(Use.VALIDATION, 0, number))
        noise[row] = torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))
    t = torch.tensor(numbers, dtype=torch.float64).add(0.5).mul(_GOLDEN).frac().float()
    return Draws(noise, t, torch.ones(len(numbers)))
