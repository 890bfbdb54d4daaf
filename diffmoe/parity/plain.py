"""What the parity table compares with: training in one plain PyTorch process, as a reader would
write it.

Every expert and the whole batch live here.  torch's AdamW and clip_grad_norm_, a moving average and
thresholds by hand; no DeepSpeed, no collective, nothing of ``training/``.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
from diffmoe.models.logical import initialize, logical_tensors
from diffmoe.moe.gating import gate_scores
from diffmoe.moe.layer import MoELayer
from diffmoe.moe.routing import RoutingRule
from diffmoe.parallel.groups import ParallelGroups, single_process


def build_model(config: Config, pool: int, groups: ParallelGroups) -> DiT:
    """A model whose tensors are all alive: what starts at zero (adaLN, biases, output) and the
    routers, whose scores would be all but equal, are drawn anew, each (expert) by its logical name.
    """
    model = DiT(
        config.model, config.moe, pool=pool, groups=groups, recompute=config.parallel.recompute
    )
    initialize(model, config.run.seed)
    for tensor in logical_tensors(model):
        for name, value in tensor.pieces(tensor.parameter.data):
            if name.endswith(".router") or not value.any():
                digest = hashlib.sha256(f"verify/{config.run.seed}/{name}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
                value.copy_(
                    torch.randn(value.shape, generator=generator)
                    * (0.3 if name.endswith(".router") else 0.1)
                )
    return model


def synthetic_batch(config: Config, numbers: Sequence[int]) -> Batch:
    """The samples with these global numbers, the same wherever they are asked for."""
    shape = (config.model.channels, config.model.input_size, config.model.input_size)
    x = torch.stack(
        [torch.randn(shape, generator=torch.Generator().manual_seed(1 + 2 * n)) for n in numbers]
    )
    return Batch(
        x, torch.tensor([(3 * n + 1) % config.model.classes for n in numbers]), tuple(numbers)
    )


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
    gradient, ema, thresholds, done = {}, initial, [], []
    for step in range(steps):
        adam.zero_grad()
        passes = []
        for j in range(accumulation):
            first = step * train.batch + j * rows
            total, output, numbers = _loss(
                model, synthetic_batch(config, range(first, first + rows)), config, device
            )
            (total / accumulation).backward()
            observed = [
                _observe(stats.logits_TE, config, pool)
                for stats in output.moe
                if stats.logits_TE is not None
            ]
            passes.append((numbers, observed))
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip).item()
        gradient = gradient or _by_name(model, lambda p: p.grad)
        adam.step()
        weights = _by_name(model, lambda p: p.data)
        decay = train.ema_decays[0]
        ema = {name: decay * ema[name] + (1 - decay) * weights[name] for name in weights}
        seen = [sum(layer) / accumulation for layer in zip(*(observed for _, observed in passes))]
        decay = config.moe.threshold_decay
        thresholds = (
            [decay * old + (1 - decay) * new for old, new in zip(thresholds, seen)]
            if step
            else seen
        )
        means = {
            name: sum(numbers[name] for numbers, _ in passes) / accumulation
            for name in passes[0][0]
        }
        done.append({**means, "grad_norm": norm})
    clipped = all(numbers["grad_norm"] > train.clip for numbers in done)
    return Reference(
        config.run.seed, min(margins), clipped, done, initial, gradient, weights, ema, thresholds
    )


def _loss(
    model: DiT, batch: Batch, config: Config, device: torch.device
) -> tuple[Tensor, ModelOutput, dict]:
    """The training loss, and its parts under StepReport's names (predictor and balance as means
    over layers).
    """
    draws = training_draws(config.run.seed, batch.positions, tuple(batch.x.shape[1:]))
    y = torch.where(draws.drop < config.train.label_drop, config.model.classes, batch.y)
    rule = RoutingRule("train", config.moe.capacity)
    if config.diffusion.process == "ddpm":
        schedule = linear_schedule()
        t = uniform_steps(draws.t, len(schedule))
        denoising, output = ddpm_loss(
            model, *(value.to(device) for value in (batch.x, draws.noise, t, y)), rule, schedule
        )
    else:
        denoising, output = flow_loss(
            model, *(value.to(device) for value in (batch.x, draws.noise, draws.t, y)), rule
        )
    none = torch.zeros((), device=device)
    predictor = sum((s.predictor_loss for s in output.moe if s.predictor_loss is not None), none)
    balance = sum((s.balance_loss for s in output.moe if s.balance_loss is not None), none)
    layers = max(1, len(output.moe))
    numbers = {
        "loss": denoising.item(),
        "predictor_loss": predictor.item() / layers,
        "balance_loss": balance.item() / layers,
    }
    return (
        denoising + config.moe.predictor_weight * predictor + config.moe.balance_weight * balance,
        output,
        numbers,
    )


def _by_name(model: DiT, value: Callable[[torch.nn.Parameter], Tensor]) -> dict[str, Tensor]:
    return {
        name: piece.detach().cpu().clone()
        for tensor in logical_tensors(model)
        for name, piece in tensor.pieces(value(tensor.parameter))
    }


def _observe(logits_TE: Tensor, config: Config, pool: int) -> Tensor:
    """Mean over pools of the K-th largest sigmoid [E]."""
    pool_tokens, experts = pool * config.model.tokens, config.moe.experts
    K = rows_taken(pool_tokens, experts, config.moe.capacity)
    pools = logits_TE.detach().cpu().view(-1, pool_tokens, experts).sigmoid()
    return pools.sort(dim=1, descending=True).values[:, K - 1].mean(dim=0)


def _margin(layer: MoELayer, x_BND: Tensor, _rule: RoutingRule) -> float:
    scores = gate_scores(x_BND.detach().flatten(0, 1), layer.router.detach())
    experts = layer.moe.experts
    if layer.family == "tc":
        ranked, K = scores.sort(dim=1, descending=True).values, layer.moe.top_k
    else:
        pool_tokens = layer.pool * x_BND.shape[1]
        pools = scores.view(-1, pool_tokens, experts).transpose(1, 2)
        ranked, K = (
            pools.sort(dim=2, descending=True).values,
            rows_taken(pool_tokens, experts, layer.moe.capacity),
        )
    if K == ranked.shape[-1]:
        return math.inf
    return (1 - ranked[..., K] / ranked[..., K - 1]).min().item()
