"""What the parity table compares with: training in one plain PyTorch process, as a reader would
write it.

Every expert and the whole batch live here.  torch's AdamW and clip_grad_norm_, a moving average and
thresholds by hand; no DeepSpeed, no collective, nothing of ``training/``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffmoe.config import Config
from diffmoe.data.stream import Batch
from diffmoe.diffusion.ddpm import ddpm_loss, linear_schedule
from diffmoe.diffusion.randomness import training_draws
from diffmoe.diffusion.rectified_flow import flow_loss
from diffmoe.diffusion.times import uniform_steps
from diffmoe.layout import rows_taken
from diffmoe.models.dit import DiT, ModelOutput
from diffmoe.models.logical import logical_tensors
from diffmoe.moe.gating import gate_scores
from diffmoe.moe.layer import MoELayer
from diffmoe.moe.routing import RoutingRule
from diffmoe.parallel.groups import single_process
from diffmoe.parity.synthetic import build_model, synthetic_batch


@dataclass
class Reference:
    """What one plain process computed: losses and norm per step, tensors per logical name on the
    CPU.

    ``gradient``: step 0's, averaged and clipped.  ``margin``: the smallest relative gap between the
    last score that an expert (token choice: a token) took and the first that it did not.
    ``clipped``: whether every step was.
    """

    seed: int
    margin: float
    clipped: bool
    steps: list[dict[str, float]]
    initial: dict[str, Tensor]
    gradient: dict[str, Tensor]
    weights: dict[str, Tensor]
    ema: dict[str, Tensor]
    thresholds: list[Tensor]


def plain_training(
    config: Config, *, accumulation: int, pool: int, steps: int, device: torch.device
) -> Reference:
    """``steps`` optimizer steps with pools of ``pool`` samples, ``accumulation`` passes each."""
    train, rows = config.train, config.train.batch // accumulation
    model = build_model(config, pool, single_process()).to(device)
    adam = torch.optim.AdamW(
        model.parameters(),
        lr=train.lr,
        betas=train.betas,
        eps=train.eps,
        weight_decay=train.weight_decay,
        foreach=False,
        fused=False,
    )
    margins = [math.inf]
    for _, layer in model.moe_layers():
        layer.register_forward_pre_hook(
            lambda layer, args: margins.append(_margin(layer, *args[:2]))
        )
    initial = _by_name(model, lambda p: p.data)
    gradient: dict[str, Tensor] = {}
    thresholds: list[Tensor] = []
    ema, done = initial, []
    for step in range(steps):
        adam.zero_grad()
        passes, observed = [], []
        for j in range(accumulation):
            first = step * train.batch + j * rows
            batch = synthetic_batch(config, range(first, first + rows))
            total, output, numbers = _loss(model, batch, config, device)
            (total / accumulation).backward()
            logits = [stats.logits_TE for stats in output.moe if stats.logits_TE is not None]
            passes.append(numbers)
            observed.append([_observe(each, config, pool) for each in logits])
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip).item()
        gradient = gradient or _by_name(model, lambda p: p.grad)
        adam.step()
        weights = _by_name(model, lambda p: p.data)
        decay = train.ema_decays[0]
        ema = {name: decay * ema[name] + (1 - decay) * weights[name] for name in weights}
        seen = [sum(layer) / accumulation for layer in zip(*observed)]
        decay = config.moe.threshold_decay
        if step:
            seen = [decay * old + (1 - decay) * new for old, new in zip(thresholds, seen)]
        thresholds = seen
        means = {name: sum(each[name] for each in passes) / accumulation for name in passes[0]}
        done.append({**means, "grad_norm": norm})
    clipped = all(numbers["grad_norm"] > train.clip for numbers in done)
    return Reference(
        config.run.seed, min(margins), clipped, done, initial, gradient, weights, ema, thresholds
    )


def _loss(
    model: DiT, batch: Batch, config: Config, device: torch.device
) -> tuple[Tensor, ModelOutput, dict[str, float]]:
    """The training loss, and its parts under StepReport's names (predictor and balance as means
    over layers).
    """
    draws = training_draws(config.run.seed, batch.positions, tuple(batch.x.shape[1:]))
    y = torch.where(draws.drop < config.train.label_drop, config.model.classes, batch.y)
    rule = RoutingRule("train", config.moe.capacity)
    x, noise, y = (value.to(device) for value in (batch.x, draws.noise, y))
    if config.diffusion.process == "ddpm":
        schedule = linear_schedule()
        t = uniform_steps(draws.t, len(schedule)).to(device)
        denoising, output = ddpm_loss(model, x, noise, t, y, rule, schedule)
    else:
        denoising, output = flow_loss(model, x, noise, draws.t.to(device), y, rule)
    none = torch.zeros((), device=device)
    predictor = sum((s.predictor_loss for s in output.moe if s.predictor_loss is not None), none)
    balance = sum((s.balance_loss for s in output.moe if s.balance_loss is not None), none)
    layers = max(1, len(output.moe))
    numbers = {
        "loss": denoising.item(),
        "predictor_loss": predictor.item() / layers,
        "balance_loss": balance.item() / layers,
    }
    moe = config.moe
    total = denoising + moe.predictor_weight * predictor + moe.balance_weight * balance
    return total, output, numbers


def _by_name(model: DiT, value: Callable[[torch.nn.Parameter], Any]) -> dict[str, Tensor]:
    pieces = [p for t in logical_tensors(model) for p in t.pieces(value(t.parameter))]
    return {name: piece.detach().cpu().clone() for name, piece in pieces}


def _observe(logits_TE: Tensor, config: Config, pool: int) -> Tensor:
    """Mean over pools of the K-th largest sigmoid [E]."""
    pool_tokens, experts = pool * config.model.tokens, config.moe.experts
    K = rows_taken(pool_tokens, experts, config.moe.capacity)
    pools = logits_TE.detach().cpu().view(-1, pool_tokens, experts).sigmoid()
    return pools.sort(dim=1, descending=True).values[:, K - 1].mean(dim=0)


def _margin(layer: MoELayer, x_BND: Tensor, _rule: RoutingRule) -> float:
    scores = gate_scores(x_BND.detach().flatten(0, 1), layer.router.detach())
    K = layer.moe.top_k
    if layer.family != "tc":
        pool_tokens, experts = layer.pool * x_BND.shape[1], layer.moe.experts
        scores = scores.view(-1, pool_tokens, experts).transpose(1, 2)
        K = rows_taken(pool_tokens, experts, layer.moe.capacity)
    if K == scores.shape[-1]:
        return math.inf
    ranked = scores.sort(dim=-1, descending=True).values
    return (1 - ranked[..., K] / ranked[..., K - 1]).min().item()
