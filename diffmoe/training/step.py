"""One optimizer step: micro-batches through the engine, then what changes once a step."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffmoe.config import Config, DiffusionConfig, MoEConfig, TrainConfig
from diffmoe.data.stream import Batch
from diffmoe.device import sent, synchronize
from diffmoe.diffusion.ddpm import ddpm_loss, linear_schedule
from diffmoe.diffusion.randomness import Draws, training_draws
from diffmoe.diffusion.rectified_flow import flow_loss, noisy, velocity_of
from diffmoe.diffusion.times import logit_normal, shifted, uniform_steps, within
from diffmoe.layout import Layout
from diffmoe.models.dit import DiT, ModelOutput, patchify
from diffmoe.moe.capacity import HISTOGRAM_BINS, histogram
from diffmoe.moe.layer import running_state
from diffmoe.moe.routing import RoutingRule
from diffmoe.parallel.collectives import sum_over
from diffmoe.parallel.groups import ParallelGroups
from diffmoe.training.ema import Ema
from diffmoe.training.engine import Engine

TIME_BINS = 10
_DDPM = linear_schedule()
_ddpm_on = functools.lru_cache(maxsize=None)(_DDPM.to)
_DIAL_EVERY = 256
# The parts of a loss, by their names in a report.
_PARTS = (
    "loss",
    "predictor_loss",
    "balance_loss",
    "target_loss",
    "dispersive_loss",
    "direction_loss",
    "repa_loss",
)


@dataclass(frozen=True)
class StepReport:
    """Global means of one optimizer step.  ``predictor_loss`` (in nats), ``balance_loss`` (the
    family's loss on routing) and ``target_loss`` (Expert Race's) are means over layers; these,
    ``dispersive_loss``, ``direction_loss`` and ``repa_loss`` are 0 where a run has none;
    ``stop``: some rank was asked to stop; ``save_failed``: some rank's save has failed;
    ``applied`` is false where loss or gradient was not finite and the step changed nothing.  All of
    these are the same on every rank.  ``load``: this rank's tokens by [layer, time bin, expert],
    with the samples that fell in each bin, on the device: reduced only when somebody looks.
    """

    loss: float
    predictor_loss: float
    balance_loss: float
    target_loss: float
    dispersive_loss: float
    direction_loss: float
    repa_loss: float
    grad_norm: float
    lr: float
    capacity: float
    stop: bool
    save_failed: bool
    applied: bool
    load_LbE: Tensor
    samples_b: Tensor


@dataclass(frozen=True)
class MicroLoss:
    """One micro-batch's loss: ``total`` carries the gradient, ``parts`` are by the names of
    :class:`StepReport`: ``loss`` is the flow's mean squared error, or DDPM's with the variational
    bound of its variance; predictor and balance are summed over layers, target is their mean.
    """

    total: Tensor
    parts: dict[str, Tensor]
    output: ModelOutput
    time_bin_B: Tensor


def micro_loss(
    forward: Callable[..., ModelOutput],
    batch: Batch,
    config: Config,
    rule: RoutingRule,
    device: torch.device,
    draws: Draws | None = None,
) -> MicroLoss:
    """The training loss with noise, time and label drop of the samples' global numbers; ``draws``:
    these, if somebody has made them already.
    """
    draws = draws or training_draws(config.run.seed, batch.positions, tuple(batch.x.shape[1:]))
    diffusion, train = config.diffusion, config.train
    y = torch.where(draws.drop < train.label_drop, config.model.classes, batch.y)
    t = _training_time(draws.t, diffusion)
    x, noise, t, y = (sent(value, device) for value in (batch.x, draws.noise, t, y))
    zero = torch.zeros((), device=device)
    direction = zero
    if diffusion.process == "ddpm":
        denoising, output = ddpm_loss(
            forward, x, noise, t, y, rule, _ddpm_on(device), diffusion.loss_weight
        )
        progress = 1 - (t + 0.5) / len(_DDPM)  # like the flow's t: noise at 0, data at 1
        wanted = noise
    else:
        predicts = diffusion.prediction
        denoising, output = flow_loss(forward, x, noise, t, y, rule, predicts)
        progress, wanted = t, x if predicts == "x" else x - noise
        if train.direction_weight:
            velocity = velocity_of(output.prediction, noisy(x, noise, t), t, predicts)
            direction = direction_loss(velocity, x - noise)
    predictor = sum((r.predictor_loss for r in output.moe if r.predictor_loss is not None), zero)
    balance = sum((r.balance_loss for r in output.moe if r.balance_loss is not None), zero)
    heads = [r.target_TP for r in output.moe if r.target_TP is not None]
    target = target_loss(heads, patchify(wanted, config.model.patch)) if heads else zero
    dispersive = zero if output.dispersive is None else output.dispersive
    repa = zero
    if output.projected is not None:
        assert batch.features is not None
        repa = alignment_loss(output.projected, sent(batch.features, device))
    moe = config.moe
    total = denoising + moe.predictor_weight * predictor + moe.balance_weight * balance
    total = total + moe.target_weight * target
    total = total + train.dispersive_weight * dispersive + train.direction_weight * direction
    total = total + train.repa_weight * repa
    parts = (denoising, predictor, balance, target, dispersive, direction, repa)
    named = {name: part.detach() for name, part in zip(_PARTS, parts, strict=True)}
    return MicroLoss(total, named, output, time_bin(progress))


def time_bin(progress_B: Tensor) -> Tensor:
    """Tenths of time from noise (0) to data (1)."""
    return (progress_B * TIME_BINS).long().clamp_(max=TIME_BINS - 1)


def _training_time(u: Tensor, diffusion: DiffusionConfig) -> Tensor:
    """Uniform draws in [0, 1) -> flow times or DDPM steps, [B]."""
    if diffusion.process == "ddpm":
        return uniform_steps(u, len(_DDPM))
    if diffusion.time_sampling == "logit_normal":
        u = logit_normal(u, diffusion.time_mean, diffusion.time_std)
    return within(shifted(u, diffusion.time_shift), diffusion.time_range)


def train_step(
    engine: Engine,
    ema: Ema,
    batches: Sequence[Batch],
    config: Config,
    layout: Layout,
    groups: ParallelGroups,
    step: int,
    stop: bool = False,
    save_failed: bool = False,
    draws: Sequence[Draws] | None = None,
) -> StepReport:
    """Optimizer step ``step`` (0-based) on this rank's ``accumulation`` micro-batches; ``draws``:
    see ``micro_loss``.

    When loss or gradient is not finite on any rank, nothing changes on any: weights, moments, EMA,
    thresholds.
    """
    assert len(batches) == layout.accumulation
    rule = training_rule(config.moe, step)
    lr = config.train.lr_at(step)
    tally = _Tally(engine.model, config, engine.device)
    given: Sequence[Draws | None] = draws or [None] * len(batches)
    for batch, drawn in zip(batches, given, strict=True):
        groups.trace.enter("forward", step)
        loss = micro_loss(engine.forward, batch, config, rule, engine.device, drawn)
        groups.trace.enter("backward")
        engine.backward(_all_or_nothing(loss.total))
        tally.add(loss)
    groups.trace.enter("optimizer step")
    means, observed_LE = tally.reduce(engine.squared_norm(), groups, layout, stop, save_failed)
    applied = engine.step(lr, means["grad_norm"])
    assert applied <= math.isfinite(means["loss"]), means
    if applied:
        commit_observed(engine.model, observed_LE, layout.pools * layout.accumulation)
        ema.update()
        if config.model.family == "diffmoe" and counts_for_dial(config.train, step):
            groups.trace.enter("counting for the dial")
            _count_for_dial(engine, ema, batches, config, groups, step)
    return StepReport(
        **means,
        lr=lr,
        capacity=rule.capacity,
        applied=applied,
        load_LbE=tally.load_LbE,
        samples_b=tally.samples_b,
    )


def _all_or_nothing(loss: Tensor) -> Tensor:
    """``loss``; where it is not finite, neither is any gradient: the gradient's norm alone, which
    all ranks share, then decides about the step, without another reduction or look at the device.
    Bit for bit the loss where it is finite.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)


def training_rule(moe: MoEConfig, step: int) -> RoutingRule:
    """The routing rule of optimizer step ``step``."""
    by_threshold = moe.threshold_from is not None and step >= moe.threshold_from
    return RoutingRule("threshold" if by_threshold else "train", moe.capacity_at(step))


def target_loss(heads: Sequence[Tensor], patches_TP: Tensor) -> Tensor:
    """Expert Race's per-layer regularization: mean squared error of every layer's prediction of the
    target, mean over layers.
    """
    each = [(head.to(patches_TP.dtype) - patches_TP).square().mean() for head in heads]
    return torch.stack(each).mean()


def direction_loss(prediction: Tensor, velocity: Tensor) -> Tensor:
    """FasterDiT's loss on the velocity's direction, 1 - cosine over channels, mean over positions:
    of a prediction [B, C or 2 C, H, W] and the true velocity [B, C, H, W].
    """
    predicted = prediction[:, : velocity.shape[1]].to(velocity.dtype)
    return 1 - F.cosine_similarity(predicted, velocity, dim=1).mean()


def alignment_loss(projected: Tensor, features: Tensor) -> Tensor:
    """REPA's (equation 9): minus the cosine of each projected token and its patch's features, both
    [B, N, d], mean over samples and patches.
    """
    dtype = torch.promote_types(projected.dtype, torch.float32)
    return -F.cosine_similarity(projected.to(dtype), features.to(dtype), dim=2).mean()


def commit_observed(model: DiT, observed_LE: Tensor, pools: int) -> None:
    """Gives every MoE layer what this step's ``pools`` pools observed, summed."""
    if observed_LE.numel():
        for (_, layer), observed in zip(model.moe_layers(), observed_LE, strict=True):
            layer.commit(observed, pools)


def counts_for_dial(train: TrainConfig, step: int) -> bool:
    """Whether the dial's histograms are filled after step ``step``: on the last steps before
    whatever is sure to use them, a checkpoint, samples, scores or the validation loss (a 16th of
    all steps, but no more than 32 at a time), and now and then between, for a checkpoint that
    nobody planned.  A function of the step alone: a run that is stopped and goes on stays the same
    bit for bit.  One costs 0.3 of a step (it is a forward pass): 2 % of the demo, 0.2 % of the
    published recipe.
    """
    periods = (
        train.save_every,
        train.sample_every,
        train.score_every,
        train.validate_every,
        train.steps,
    )
    done = step + 1
    planned = any(p > 0 and -done % p < min(32, max(1, p // 16)) for p in periods)
    return planned or done % _DIAL_EVERY == 0


def _count_for_dial(
    engine: Engine,
    ema: Ema,
    batches: Sequence[Batch],
    config: Config,
    groups: ParallelGroups,
    step: int,
) -> None:
    """Runs the step's samples through the EMA weights, forward only, and commits what their
    predictors say.

    Not the outputs of the training passes: samples are drawn from the EMA, whose predictors may be
    much less sure than those of one step, or surer (digits, constant rate 2e-3, EMA 0.999, step
    800: a dial of 0.7 from those used 0.21).
    """
    rule = training_rule(config.moe, step)
    layers = [layer for _, layer in engine.model.moe_layers()]
    counts = torch.zeros(len(layers), config.moe.experts, HISTOGRAM_BINS, device=engine.device)
    with engine.weights(ema.shards) as model:
        for batch in batches:
            reports = micro_loss(model, batch, config, rule, engine.device).output.moe
            logits = [stats.logits_TE for stats in reports if stats.logits_TE is not None]
            counts += torch.stack([histogram(logits_TE, len(batch.y)) for logits_TE in logits])
    synchronize(engine.device)  # the batches' memory is about to be filled anew
    for layer, layer_counts in zip(layers, sum_over(counts, groups.world), strict=True):
        layer.thresholds.commit_histogram(layer_counts, step)


class _Tally:
    """Sums over a step's micro-batches, on the device; one small reduction for all layers at the
    end.
    """

    def __init__(self, model: DiT, config: Config, device: torch.device) -> None:
        self.layers = len(list(model.moe_layers()))
        experts = config.moe.experts
        self.parts = torch.zeros(len(_PARTS), dtype=torch.float64, device=device)
        observing = self.layers if running_state(config.model, config.moe) else 0
        self.observed_LE = torch.zeros(observing, experts, dtype=torch.float64, device=device)
        self.load_LbE = torch.zeros(self.layers, TIME_BINS, experts, device=device)
        self.samples_b = torch.zeros(TIME_BINS, device=device)

    def add(self, loss: MicroLoss) -> None:
        self.parts += torch.stack(list(loss.parts.values())).double()
        bins = loss.time_bin_B
        self.samples_b.index_add_(0, bins, torch.ones_like(bins, dtype=torch.float32))
        for layer, stats in enumerate(loss.output.moe):
            self.load_LbE[layer].index_add_(0, bins, stats.tokens_BE.float())
            if len(self.observed_LE) and stats.observed_E is not None:
                self.observed_LE[layer] += stats.observed_E

    def reduce(
        self,
        squared_norm: Tensor,
        groups: ParallelGroups,
        layout: Layout,
        stop: bool,
        save_failed: bool,
    ) -> tuple[dict[str, Any], Tensor]:
        """Sums over ranks and gives means, by the names of :class:`StepReport`, and what layers
        observed; the one time in a step that the host waits for the device.
        """
        flags = sent(torch.tensor([stop, save_failed], dtype=torch.float64), self.parts.device)
        mine = torch.cat([squared_norm.view(1), flags, self.parts, self.observed_LE.flatten()])
        scalars, observed = sum_over(mine, groups.world).tensor_split([3 + len(_PARTS)])
        square, stopped, failed, *parts = scalars.tolist()
        passes = layout.ranks * layout.accumulation
        means: dict[str, Any] = {n: part / passes for n, part in zip(_PARTS, parts, strict=True)}
        for name in ("predictor_loss", "balance_loss"):
            means[name] /= max(1, self.layers)
        means |= {"grad_norm": math.sqrt(square), "stop": stopped > 0, "save_failed": failed > 0}
        return means, observed.view_as(self.observed_LE)
