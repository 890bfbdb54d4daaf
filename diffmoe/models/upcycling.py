"""Upcycling: a dense model starts an MoE model, every expert a copy of its block's MLP.

A copy does not keep the function.  The gate is the raw softmax value, about 1/E before training,
and expert choice leaves some tokens to no expert and takes others several times.  The report says
how far the function moved; it does not move while every expert takes every token, for then a
token's gates sum to 1 (``moe.capacity_hold``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffmoe.config import Config, MoEConfig, expert_hidden
from diffmoe.errors import UserError
from diffmoe.layout import rows_taken
from diffmoe.models.dit import DiT
from diffmoe.models.interchange import check_research, from_research
from diffmoe.models.logical import initialize, load_logical
from diffmoe.moe.layer import MoELayer
from diffmoe.moe.routing import RoutingRule

_SAMPLES = 4  # of the report's batch: 1024 tokens at 256 pixels, seconds for an L model


@dataclass(frozen=True)
class Report:
    """How far the function moved: ||upcycled - dense|| / ||dense|| of the outputs on a fixed random
    batch, under the training rule of step 0.

    ``renormalised``: plain copies with each token's gates divided by their sum.  ``scaled``: fc2
    times ``factor``. ``everywhere``: plain copies, every expert takes every token (None for token
    choice, which has no capacity). ``untaken``: the share of (token, MoE layer) pairs that no
    expert took.
    """

    samples: int
    pool: int
    capacity: float
    factor: float
    copied: float
    renormalised: float
    scaled: float
    everywhere: float | None
    untaken: float


def check_upcycling(config: Config) -> None:
    """Raises UserError for a configuration that a dense model cannot start."""
    moe, family = config.moe, config.model.family
    if family not in ("tc", "ec", "diffmoe"):
        raise UserError(
            f"model.family ({family}) must be one of tc, ec, diffmoe to be started from a dense "
            "model"
        )
    if expert_hidden(config.model, moe) != config.model.hidden:
        raise UserError(
            f"moe.mlp_ratio ({moe.mlp_ratio}) must be model.mlp_ratio ({config.model.mlp_ratio}), "
            "as in the dense MLP that experts copy"
        )
    if moe.gates != "raw" or moe.gate_scale != 1 or moe.score != "softmax":
        raise UserError(
            f"moe.gates ({moe.gates}), moe.gate_scale ({moe.gate_scale}) and moe.score "
            f"({moe.score}) must be raw, 1 and softmax to be started from a dense model"
        )
    if moe.activation != "gelu":
        raise UserError(
            f"moe.activation ({moe.activation}) must be gelu, as in the dense MLP that experts copy"
        )
    if moe.shared_experts:
        raise UserError(
            f"moe.shared_experts ({moe.shared_experts}) must be 0: beside whole copies of the "
            "dense MLP it would be counted twice"
        )


def load_dense(state: Mapping[str, Tensor], config: Config, source: str) -> DiT:
    """The dense model of a research state dict, with the sizes of ``config``.  Raises UserError
    when it does not fit.
    """
    model = dataclasses.replace(config.model, family="dense")
    check_research(state, model, config.moe, source)
    dense = DiT(model, config.moe, time_scale=config.diffusion.time_scale)
    load_logical(dense, from_research(state, model, config.moe))
    return dense.eval()


@torch.no_grad()
def upcycle(dense: DiT, config: Config, pool: int) -> DiT:
    """The MoE model of ``config`` that starts from a dense model; router and predictor as a new run
    initialises them.

    Experts are views of one copy: they take no memory, and must not be trained in place."""
    model = DiT(config.model, config.moe, pool=pool, time_scale=config.diffusion.time_scale)
    experts = {index: layer.experts for index, layer in model.moe_layers()}
    for _, layer in model.moe_layers():
        del layer.experts  # initialize would fill what is about to be replaced
    initialize(model, config.run.seed)
    given = dict(dense.named_parameters())
    for name, parameter in model.named_parameters():
        if name in given:
            parameter.copy_(given[name])
    for index, layer in model.moe_layers():
        layer.experts = experts[index]
    copy_experts(model, dense, 1.0)
    return model.eval()


@torch.no_grad()
def copy_experts(model: DiT, dense: DiT, factor: float) -> None:
    """Makes every expert the dense MLP of its block, with the second linear times ``factor``."""
    given = dict(dense.named_parameters())
    for index, layer in model.moe_layers():
        mlp = f"blocks.{index}.mlp"
        values = {
            "fc1_weight": given[f"{mlp}.fc1.weight"].t(),
            "fc1_bias": given[f"{mlp}.fc1.bias"],
            "fc2_weight": given[f"{mlp}.fc2.weight"].t() * factor,
            "fc2_bias": given[f"{mlp}.fc2.bias"] * factor,
        }
        for name, value in values.items():
            many = value.detach().unsqueeze(0).expand(layer.experts.experts, *value.shape)
            setattr(layer.experts, name, nn.Parameter(many, requires_grad=False))


def balancing_factor(moe: MoEConfig, family: str) -> float:
    """What a token's gates must be multiplied by to sum to 1 on average before training, when each
    is 1/E.
    """
    return moe.experts / (moe.top_k if family == "tc" else moe.capacity_at(0))


@torch.no_grad()
def measure(model: DiT, dense: DiT, config: Config) -> Report:
    """The report of :func:`upcycle`'s model, which is left with plain copies.  Raises UserError
    when the dense model's output is zero, as that of an untrained one is: nothing can be measured
    against it.
    """
    moe, sizes = config.moe, config.model
    pool = _report_pool(config, next(layer.pool for _, layer in model.moe_layers()))
    samples = -(-_SAMPLES // pool) * pool
    generator, side = torch.Generator().manual_seed(0), sizes.input_size
    x = torch.randn(samples, sizes.channels, side, side, generator=generator)
    t = torch.rand(samples, generator=generator)
    if config.diffusion.process == "ddpm":
        t = (t * 1000).floor()
    y = torch.randint(sizes.classes, (samples,), generator=generator)
    rule = RoutingRule(capacity=moe.capacity_at(0))
    wanted = dense(x, t, y, rule).prediction.double()
    if wanted.norm() == 0:
        raise UserError("the dense model's output is zero: it has not been trained")

    def moved(rule: RoutingRule) -> tuple[float, float]:
        out = model(x, t, y, rule)
        untaken = torch.stack([~report.mask_TE.any(dim=1) for report in out.moe]).double().mean()
        return ((out.prediction.double() - wanted).norm() / wanted.norm()).item(), untaken.item()

    factor = balancing_factor(moe, sizes.family)
    with _pools_of(model, pool):
        copied, untaken = moved(rule)
        with _renormalised_gates(model):
            renormalised, _ = moved(rule)
        everywhere = None
        if sizes.family != "tc":
            everywhere, _ = moved(RoutingRule(capacity=float(moe.experts)))
        copy_experts(model, dense, factor)
        scaled, _ = moved(rule)
        copy_experts(model, dense, 1.0)
    return Report(
        samples, pool, rule.capacity, factor, copied, renormalised, scaled, everywhere, untaken
    )


def _report_pool(config: Config, pool: int) -> int:
    """The run's pool, or a smaller one that still gives every expert a token: the whole pool of an
    L model takes minutes.
    """
    small, moe = min(pool, _SAMPLES), config.moe
    rows = rows_taken(small * config.model.tokens, moe.experts, moe.capacity_at(0))
    return small if rows >= 1 or config.model.family == "tc" else pool


@contextmanager
def _pools_of(model: DiT, pool: int) -> Iterator[None]:
    layers = [layer for _, layer in model.moe_layers()]
    kept = [layer.pool for layer in layers]
    for layer in layers:
        layer.pool = pool
    try:
        yield
    finally:
        for layer, before in zip(layers, kept):
            layer.pool = before


@contextmanager
def _renormalised_gates(model: DiT) -> Iterator[None]:
    """Divides what the MoE layers return by the sum of the token's gates.  That is the same as
    other gates, since all experts are one function.
    """

    def divide(layer: MoELayer, inputs: tuple, output: tuple) -> tuple:
        y_BND, stats = output
        scores, *_ = layer.look(inputs[0].flatten(0, 1), inputs[3])
        gates_T = (scores * stats.mask_TE).sum(dim=1)
        return y_BND / torch.where(gates_T > 0, gates_T, 1.0).view(*y_BND.shape[:2], 1), stats

    hooks = [layer.register_forward_hook(divide) for _, layer in model.moe_layers()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
