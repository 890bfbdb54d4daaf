"""The validation loss: of held-out samples, at times and noise that are the same in every run.

Sample i, its noise and its time depend on i alone (``data.feed.open_validation``,
``diffusion.randomness.validation_draws``), not on the run's seed, so runs that differ in anything
else are measured on the same.  The model is the one that would be sampled: the first average, under
``sample.routing``, with the true class.

Samples are measured in batches of ``sample.batch``, which ranks take in turn: a routing rule that
looks at its batch sees the same ones on any number of ranks.  Where experts are spread over ranks,
all must make equally many passes of equally many samples: the last batches are filled up with
samples that do not count.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffmoe.config import Config
from diffmoe.data.feed import open_validation
from diffmoe.data.reader import ShardReader
from diffmoe.data.stream import Batch
from diffmoe.device import sent
from diffmoe.diffusion.ddpm import ddpm_losses, linear_schedule
from diffmoe.diffusion.randomness import validation_draws
from diffmoe.diffusion.rectified_flow import flow_errors
from diffmoe.diffusion.times import uniform_steps, within
from diffmoe.errors import UserError
from diffmoe.evaluation.generate import check_dial, inference_rule
from diffmoe.models.dit import DiT, ModelOutput
from diffmoe.parallel.collectives import (
    AgreedError,
    agreed,
    gather_objects,
    raise_together,
    sum_over,
)
from diffmoe.parallel.groups import Group
from diffmoe.training.metrics import VALIDATION_NAME, read_metrics
from diffmoe.training.step import TIME_BINS, time_bin

# Decimals of the load's shares, which nobody reads further.
_DECIMALS = 6


@dataclass(frozen=True)
class Validation:
    """What one measurement found; the same on every rank.

    Attributes:
        loss: mean over all samples of the training loss without balance and predictor: the flow's
            squared error, or DDPM's loss with the bound of its variance.
        loss_by_time: the same of each tenth of time, noise first; None where no sample fell.
        experts_per_token: as used, mean over MoE layers; None for a dense model.
        load: [layers, tenths of time, experts], the share of the tenth's tokens that the expert
            took; over the experts they add up to experts per token.  NaN in a tenth without sample.
    """

    loss: float
    loss_by_time: list[float | None]
    experts_per_token: float | None
    load: np.ndarray

    def as_record(self) -> dict:
        """For a line of JSON."""
        load = self.load.round(_DECIMALS).tolist() if np.isfinite(self.load).all() else None
        return vars(self) | {"load": load}


class Validator:
    """The held-out samples of a run, opened; see ``open_validator``."""

    def __init__(
        self, config: Config, reader: ShardReader, world: Group, device: torch.device
    ) -> None:
        self.config, self.reader, self.world, self.device = config, reader, world, device
        self.count = config.train.validate_samples or reader.index.count
        self._batch = min(config.sample.batch, self.count)
        self._schedule = linear_schedule().to(device)

    def measure(self, model: DiT) -> Validation:
        """The loss of ``model``, in eval mode; all ranks together.

        Raises:
            AgreedError: a sample that cannot be read, on any rank; all have made their passes.
        """
        with agreed(self.world):
            check_dial(model, self.config.sample)
        world, batches = self.world, -(-self.count // self._batch)
        rounds = -(-batches // world.size)
        layers, experts = len(list(model.moe_layers())), self.config.moe.experts
        losses = torch.zeros(TIME_BINS, dtype=torch.float64, device=self.device)
        samples = torch.zeros_like(losses)
        taken = torch.zeros(layers, TIME_BINS, experts, dtype=torch.float64, device=self.device)
        problem: Exception | None = None
        for index in range(world.index, rounds * world.size, world.size):
            numbers = np.arange(index * self._batch, (index + 1) * self._batch)
            counts = torch.from_numpy(numbers < self.count).double().to(self.device)
            try:
                batch = self._read((numbers % self.count).tolist())
            except (OSError, UserError) as error:
                problem = problem or error
                batch = self._blank()
            losses_B, output, bins = self._pass(model, batch)
            losses.index_add_(0, bins, losses_B.double() * counts)
            samples.index_add_(0, bins, counts)
            for layer, stats in enumerate(output.moe):
                taken[layer].index_add_(0, bins, stats.tokens_BE.double() * counts[:, None])
        raise_together(problem, world)
        sums = sum_over(torch.cat([losses, samples, taken.flatten()]), world).cpu()
        losses, samples, taken = sums.split([TIME_BINS, TIME_BINS, taken.numel()])
        return self._means(losses, samples, taken.view(layers, TIME_BINS, experts))

    def _read(self, numbers: list[int]) -> Batch:
        x, y = self.reader.read(numbers)
        return Batch(torch.from_numpy(x), torch.from_numpy(y), tuple(numbers))

    def _blank(self) -> Batch:
        """What goes through the model where samples could not be read: the other ranks wait for
        this rank's pass.
        """
        x = torch.zeros(self._batch, *self.reader.index.x_shape)
        y = torch.zeros(self._batch, dtype=torch.int64)
        return Batch(x, y, tuple(range(self._batch)))

    @torch.no_grad()
    def _pass(self, model: DiT, batch: Batch) -> tuple[Tensor, ModelOutput, Tensor]:
        """A loss a sample [B], the output, and each sample's tenth of time [B]."""
        draws = validation_draws(batch.positions, tuple(batch.x.shape[1:]))
        flow, t = self.config.diffusion.process == "flow", draws.t
        if flow:
            t = within(t, self.config.diffusion.time_range)
        else:
            t = uniform_steps(t, len(self._schedule))
        x, noise, t, y = (sent(v, self.device) for v in (batch.x, draws.noise, t, batch.y))
        rule = inference_rule(self.config.moe, self.config.sample)
        if flow:
            squares, output = flow_errors(
                model, x, noise, t, y, rule, self.config.diffusion.prediction
            )
            losses_B, progress = squares.flatten(1).mean(1), t
        else:
            losses, output = ddpm_losses(model, x, noise, t, y, rule, self._schedule)
            losses_B = losses.loss
            progress = 1 - (t + 0.5) / len(self._schedule)  # as the flow's: noise at 0, data at 1
        return losses_B, output, time_bin(progress)

    def _means(self, losses_b: Tensor, samples_b: Tensor, taken_LbE: Tensor) -> Validation:
        tokens = self.config.model.tokens
        by_time = [
            float(loss / count) if count else None for loss, count in zip(losses_b, samples_b)
        ]
        used = None
        if len(taken_LbE):
            used = float(taken_LbE.sum() / (self.count * tokens * len(taken_LbE)))
        load = taken_LbE / (samples_b * tokens)[:, None]
        return Validation(float(losses_b.sum() / self.count), by_time, used, load.numpy())


def open_validator(config: Config, world: Group, device: torch.device) -> Validator:
    """All ranks together, before hours of training.  Raises AgreedError: what ``open_validation``
    refuses, and ranks that see different samples.
    """
    with agreed(world):
        reader = open_validation(config)
    first, *others = gather_objects(reader.index.fingerprint, world)
    for rank, other in zip(world.ranks[1:], others):
        if other != first:
            raise AgreedError(
                f"data.validation ({config.data.validation}): rank {rank} sees another data set "
                f"({other[:12]}) than rank {world.ranks[0]} ({first[:12]})"
            )
    return Validator(config, reader, world, device)


def read_validations(folder: Path) -> list[dict]:
    """The records of a run folder's ``validation.jsonl``, one a step, in order: of a step that was
    measured twice (after a kill) the last.  None yet: an empty list.
    """
    path = folder / VALIDATION_NAME
    return read_metrics(path) if path.exists() else []
