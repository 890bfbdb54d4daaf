"""What the parity table compares with: training in one plain PyTorch process, as a reader would
write it.

Every expert and the whole batch live here.  torch's AdamW and clip_grad_norm_, Muon, a moving
average and thresholds by hand; no DeepSpeed, no collective, nothing of ``training/``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffmoe.config import Config
from diffmoe.data.stream import Batch
from diffmoe.diffusion.ddpm import ddpm_loss, linear_schedule
from diffmoe.diffusion.randomness import training_draws
from diffmoe.diffusion.rectified_flow import flow_loss
from diffmoe.diffusion.times import uniform_steps
from diffmoe.families import TOKENS_CHOOSE, has_load_bias, has_thresholds
from diffmoe.layout import pairs_taken, rows_taken
from diffmoe.models.dit import DiT, ModelOutput
from diffmoe.models.logical import LogicalTensor, logical_tensors
from diffmoe.models.matrices import MUON, is_matrix
from diffmoe.moe.gating import Beside, scored
from diffmoe.moe.layer import MoELayer, MoEStats
from diffmoe.moe.routing import RoutingRule
from diffmoe.parallel.groups import single_process
from diffmoe.parity.synthetic import build_model, synthetic_batch

RUNNING = {"diffmoe": "thresholds.value", "race": "thresholds.value", "tc": "load_bias.value"}


@dataclass
class Reference:
    """What one plain process computed: losses and norm per step, tensors per logical name on the
    CPU.

    ``gradient``: step 0's, averaged and clipped.  ``margin``: the smallest relative gap between the
    last score that an expert (token choice: a token) took and the first that it did not.
    ``clipped``: whether every step was.  ``running``: every layer's thresholds or load biases.
    ``powers``: the averages of ``train.ema_lengths``.
    """

    seed: int
    margin: float
    clipped: bool
    steps: list[dict[str, float]]
    initial: dict[str, Tensor]
    gradient: dict[str, Tensor]
    weights: dict[str, Tensor]
    ema: dict[str, Tensor]
    running: list[Tensor]
    powers: list[dict[str, Tensor]]


def plain_training(
    config: Config, *, accumulation: int, pool: int, steps: int, device: torch.device
) -> Reference:
    """``steps`` optimizer steps with pools of ``pool`` samples, ``accumulation`` passes each."""
    train, rows = config.train, config.train.batch // accumulation
    model = build_model(config, pool, single_process()).to(device)
    matrices = [t for t in logical_tensors(model) if train.optimizer == MUON and is_matrix(t.name)]
    momenta: dict[str, Tensor] = {}
    muons = {id(t.parameter) for t in matrices}
    adam = torch.optim.AdamW(
        [p for p in model.parameters() if id(p) not in muons],
        lr=train.lr_at(0),  # the rows' rate is constant
        betas=train.betas,
        eps=train.eps,
        weight_decay=train.weight_decay,
        foreach=False,
        fused=False,
    )
    margins = [math.inf]
    for _, layer in model.moe_layers():
        layer.register_forward_pre_hook(
            lambda layer, args: margins.append(_margin(layer, args[0], args[1], args[3]))
        )
    initial = _by_name(model, lambda p: p.data)
    gradient: dict[str, Tensor] = {}
    running: list[Tensor] = []
    ema, done, history = initial, [], []
    for step in range(steps):
        model.zero_grad()
        passes, observed = [], []
        for j in range(accumulation):
            first = step * train.batch + j * rows
            batch = synthetic_batch(config, range(first, first + rows))
            total, output, numbers = _loss(model, batch, config, step, device)
            (total / accumulation).backward()
            passes.append(numbers)
            observed.append([_observe(stats, config, pool) for stats in output.moe])
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip).item()
        gradient = gradient or _by_name(model, lambda p: p.grad)
        adam.step()
        _step_of_muon(matrices, momenta, train.lr_at(0), train.weight_decay)
        weights = _by_name(model, lambda p: p.data)
        decay = train.ema_decays[0] ** train.growth
        ema = {name: decay * ema[name] + (1 - decay) * weights[name] for name in weights}
        history.append(weights)
        running = _moved(running, [torch.stack(layer) for layer in zip(*observed)], config)
        for (_, layer), value in zip(model.moe_layers(), running):
            layer.get_buffer(RUNNING[config.model.family]).copy_(value)
        means = {name: sum(each[name] for each in passes) / accumulation for name in passes[0]}
        done.append({**means, "grad_norm": norm})
    clipped = all(numbers["grad_norm"] > train.clip for numbers in done)
    powers = [_power_average(history, length) for length in train.ema_lengths]
    facts = config.run.seed, min(margins), clipped, done
    return Reference(*facts, initial, gradient, weights, ema, running, powers)


def _power_average(history: list[dict[str, Tensor]], length: float) -> dict[str, Tensor]:
    """The weights after each step, averaged: the t-th of T counts (t/T)^(g+1) - ((t-1)/T)^(g+1),
    the integral of (g + 1) t^g / T^(g + 1) over its step, with g so that the profile's deviation is
    ``length`` T (found by halving an interval).
    """
    low, high = 0.0, 1 / length**2
    for _ in range(200):
        g = (low + high) / 2
        wide = (g + 1) / ((g + 2) ** 2 * (g + 3)) > length**2
        low, high = (g, high) if wide else (low, g)
    ends = [(t / len(history)) ** (g + 1) for t in range(len(history) + 1)]
    parts = [(after - before, weights) for before, after, weights in zip(ends, ends[1:], history)]
    return {name: sum(share * weights[name] for share, weights in parts) for name in history[0]}


@torch.no_grad()
def _step_of_muon(
    matrices: list[LogicalTensor], momenta: dict[str, Tensor], lr: float, decay: float
) -> None:
    """Muon as published, momentum a sum and one matrix after another.  Newton-Schulz's polynomial
    leaves singular vectors alone, so here it is applied to the singular values, in fp64.
    """
    for tensor in matrices:
        gradient = tensor.parameter.grad
        assert gradient is not None
        pieces = zip(tensor.pieces(tensor.parameter.data), tensor.pieces(gradient), strict=True)
        for (name, weights), (_, slope) in pieces:
            parts = 3 if name.endswith("attn.qkv.weight") else 1
            momentum = momenta.setdefault(name, torch.zeros_like(slope))
            momentum.mul_(0.95).add_(slope)
            update = slope + 0.95 * momentum
            for weight, part in zip(weights.chunk(parts), update.chunk(parts), strict=True):
                left, sigma, right = torch.linalg.svd(part.double(), full_matrices=False)
                sigma = sigma / sigma.square().sum().sqrt().clamp(min=1e-30)  # 0 of no tokens
                for _ in range(5):
                    sigma = 3.4445 * sigma - 4.7750 * sigma**3 + 2.0315 * sigma**5
                scale = 0.2 * math.sqrt(max(weight.shape))
                weight.mul_(1 - lr * decay).sub_(lr * scale * (left * sigma) @ right)


def _loss(
    model: DiT, batch: Batch, config: Config, step: int, device: torch.device
) -> tuple[Tensor, ModelOutput, dict[str, float]]:
    """The training loss, and its parts under StepReport's names (predictor and balance as means
    over layers).
    """
    draws = training_draws(config.run.seed, batch.positions, tuple(batch.x.shape[1:]))
    y = torch.where(draws.drop < config.train.label_drop, config.model.classes, batch.y)
    first = config.moe.threshold_from
    by_threshold = first is not None and step >= first
    rule = RoutingRule("threshold" if by_threshold else "train", config.moe.capacity)
    x, noise, y = (value.to(device) for value in (batch.x, draws.noise, y))
    seen: list[Tensor] = []  # tokens after each block
    handles = [
        block.register_forward_hook(lambda block, args, given: seen.append(given[0]))
        for block in model.blocks
    ]
    if config.diffusion.process == "ddpm":
        schedule = linear_schedule()
        t = uniform_steps(draws.t, len(schedule)).to(device)
        denoising, output = ddpm_loss(
            model, x, noise, t, y, rule, schedule, config.diffusion.loss_weight
        )
    else:
        s = config.diffusion.time_shift  # SD3's t is 1 at noise, ours at data
        t = draws.t
        if config.diffusion.time_sampling == "logit_normal":
            normal = math.sqrt(2) * torch.erfinv(2 * t.double() - 1)
            mean, std = config.diffusion.time_mean, config.diffusion.time_std
            t = (1 / (1 + (-(mean + std * normal)).exp())).to(t.dtype)
        t = 1 - s * (1 - t) / (1 + (s - 1) * (1 - t)) if s != 1 else t
        low, high = config.diffusion.time_range
        t = torch.lerp(torch.full_like(t, low), torch.full_like(t, high), t)
        t = t.to(device)
        if config.diffusion.prediction == "x":
            time, wanted = t.view(-1, 1, 1, 1), x
            z, left = time * x + (1 - time) * noise, torch.clamp(1 - time, min=0.05)
            output = model(z, t, y, rule)
            v = (output.prediction[:, : config.model.channels] - z) / left
            denoising = (v - (x - z) / left).square().mean()
        else:
            denoising, output = flow_loss(model, x, noise, t, y, rule)
            v, wanted = output.prediction[:, : config.model.channels], x - noise
        tokens = F.unfold(wanted, config.model.patch, stride=config.model.patch).mT
    for handle in handles:
        handle.remove()
    none = torch.zeros((), device=device)
    predictor = sum((s.predictor_loss for s in output.moe if s.predictor_loss is not None), none)
    balance = sum((s.balance_loss for s in output.moe if s.balance_loss is not None), none)
    target, layers = none, max(1, len(output.moe))
    if config.moe.target_weight:  # unfold has the channel before the place in a patch
        parts = tokens.unflatten(2, (config.model.channels, -1)).mT.flatten(2).flatten(0, 1)
        each = [F.mse_loss(s.target_TP, parts) for s in output.moe if s.target_TP is not None]
        target = sum(each, none) / layers
    dispersive = direction = none
    if config.train.dispersive_weight:
        z = seen[math.ceil(config.model.depth / 4) - 1].flatten(1)
        apart = (z.unsqueeze(0) - z.unsqueeze(1)).square().mean(dim=2)
        dispersive = (-apart / 0.5).exp().mean().log()
    if config.train.direction_weight:
        true = x - noise
        cosines = (v * true).sum(dim=1) / (v.norm(dim=1) * true.norm(dim=1))
        direction = (1 - cosines).mean()
    repa = none
    if batch.features is not None:
        given, z = dict(model.projector.named_parameters()), seen[model.projected - 1]
        for number in (0, 2, 4):
            z = z @ given[f"{number}.weight"].T + given[f"{number}.bias"]
            z = z / (1 + (-z).exp()) if number < 4 else z
        wanted = batch.features.to(device).float()
        repa = -((z * wanted).sum(dim=2) / z.norm(dim=2) / wanted.norm(dim=2)).mean()
    numbers = {
        "loss": denoising.item(),
        "predictor_loss": predictor.item() / layers,
        "balance_loss": balance.item() / layers,
        "target_loss": target.item(),
        "dispersive_loss": dispersive.item(),
        "direction_loss": direction.item(),
        "repa_loss": repa.item(),
    }
    moe, train = config.moe, config.train
    total = denoising + moe.predictor_weight * predictor + moe.balance_weight * balance
    total = total + moe.target_weight * target
    total = total + train.dispersive_weight * dispersive + train.direction_weight * direction
    total = total + train.repa_weight * repa
    return total, output, numbers


def _by_name(model: DiT, value: Callable[[torch.nn.Parameter], Any]) -> dict[str, Tensor]:
    pieces = [p for t in logical_tensors(model) for p in t.pieces(value(t.parameter))]
    return {name: piece.detach().cpu().clone() for name, piece in pieces}


def _observe(stats: MoEStats, config: Config, pool: int) -> Tensor:
    """What a layer's running state is told by one pass [E]: the mean over pools of the K-th largest
    sigmoid (Expert Race: of the K-th largest score of all), or every expert's tokens.
    """
    pool_tokens, moe = pool * config.model.tokens, config.moe
    if config.model.family in TOKENS_CHOOSE:
        return stats.mask_TE.sum(dim=0).cpu().double()
    if stats.logits_TE is None:
        return torch.zeros(moe.experts)
    logits = stats.logits_TE.detach().cpu()
    if config.model.family == "race":
        pools = scored(logits, moe.score).view(-1, pool_tokens * moe.experts, 1)
        K = pairs_taken(pool_tokens, moe.capacity)
    else:
        pools = logits.view(-1, pool_tokens, moe.experts).sigmoid()
        K = rows_taken(pool_tokens, moe.experts, moe.capacity)
    kth = pools.sort(dim=1, descending=True).values[:, K - 1].mean(dim=0)
    return kth.expand(moe.experts)


def _moved(old: list[Tensor], seen: list[Tensor], config: Config) -> list[Tensor]:
    """Thresholds or load biases, by layer, after a step that observed ``seen`` [passes, E]."""
    model, moe = config.model, config.moe
    if has_thresholds(model):
        means, decay = [layer.mean(dim=0) for layer in seen], moe.threshold_decay
        return [decay * o + (1 - decay) * n for o, n in zip(old, means)] if old else means
    if has_load_bias(model, moe):
        counts = [layer.sum(dim=0) for layer in seen]
        moves = [moe.bias_rate * torch.sign(count.mean() - count) for count in counts]
        return [o + n for o, n in zip(old, moves)] if old else moves
    return []


@torch.no_grad()
def _margin(layer: MoELayer, x_BND: Tensor, rule: RoutingRule, beside: Beside) -> float:
    """The smallest relative gap of this pass's decisions: see :class:`Reference`."""
    moe, pool_tokens = layer.moe, layer.pool * x_BND.shape[1]
    scores, logits, _ = layer.look(x_BND.detach().flatten(0, 1), beside)
    if rule.kind == "threshold":
        threshold = layer.thresholds.get_buffer("value")
        return ((scores - threshold).abs() / torch.maximum(scores.abs(), threshold)).min().item()
    if layer.family == "race":
        return _gap(
            scores.view(-1, pool_tokens * moe.experts), pairs_taken(pool_tokens, moe.capacity)
        )
    if layer.family == "prototype":
        assert beside.null_B is not None
        taught = ~beside.null_B.repeat_interleave(x_BND.shape[1])
        return _gap(scores[taught, :-1], moe.top_k)
    if layer.family == "tc":
        if has_load_bias(layer.model, moe):
            scores = scores + layer.load_bias.get_buffer("value")
        if moe.top_groups == moe.expert_groups:
            return _gap(scores, moe.top_k)
        grouped = scores.unflatten(1, (moe.expert_groups, -1))
        worth = grouped.sort(dim=2, descending=True).values[..., :2].sum(dim=2)
        line = worth.sort(dim=1, descending=True).values[:, moe.top_groups - 1, None]
        left = grouped.masked_fill((worth < line).unsqueeze(2), -1.0).flatten(1)
        return min(_gap(worth, moe.top_groups), _gap(left, moe.top_k))
    pools = scores.view(-1, pool_tokens, moe.experts).transpose(1, 2)
    return _gap(pools, rows_taken(pool_tokens, moe.experts, moe.capacity))


def _gap(scores: Tensor, K: int) -> float:
    """The smallest relative gap between the K-th largest of the last dimension and the next."""
    if K == scores.shape[-1] or not len(scores):
        return math.inf
    ranked = scores.sort(dim=-1, descending=True).values
    last, next_ = ranked[..., K - 1], ranked[..., K]
    return ((last - next_) / torch.maximum(last.abs(), next_.abs())).min().item()
