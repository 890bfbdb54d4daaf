"""The parameter tensors of one rank, by name and size, without building a model."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from itertools import pairwise

from diffmoe.config import Config, ModelConfig, MoEConfig, expert_hidden, inner_width
from diffmoe.families import (
    has_predictor,
    has_target_head,
    is_moe_block,
    projector_of,
    router_shape,
)
from diffmoe.models.count import FREQUENCIES


@dataclass(frozen=True)
class Parameter:
    """A tensor of ``DiT``; ``numel``: of one rank; ``expert``: shared out by EP."""

    name: str
    numel: int
    expert: bool = False


@functools.lru_cache(maxsize=64)  # the planner asks for every layout
def rank_parameters(model: ModelConfig, moe: MoEConfig, ep: int) -> tuple[Parameter, ...]:
    """Every parameter of ``DiT(model, moe)`` on a rank that holds ``moe.experts / ep`` experts."""
    D = model.width
    found = _linear("x_embedder.proj", model.channels * model.patch**2, D)
    found += _linear("t_embedder.mlp.0", FREQUENCIES, D) + _linear("t_embedder.mlp.2", D, D)
    found.append(Parameter("y_embedder.embedding_table.weight", (model.classes + 1) * D))
    for i in range(model.depth):
        found += _block(f"blocks.{i}", model, moe, ep, is_moe_block(model, moe, i))
    found += _norm("final_layer.norm", model)
    found += _linear("final_layer.linear", D, model.patch**2 * model.out_channels)
    return (*found, *_linear("final_layer.adaLN_modulation.1", D, 2 * D))


def trained_parameters(config: Config, ep: int) -> tuple[Parameter, ...]:
    """``rank_parameters``, and the projector's of ``train.repa_weight``."""
    found = list(rank_parameters(config.model, config.moe, ep))
    projector = projector_of(config)
    for number, sizes in enumerate(pairwise(projector.sizes) if projector else ()):
        found += _linear(f"projector.{2 * number}", *sizes)
    return tuple(found)


def moe_layers(model: ModelConfig, moe: MoEConfig) -> int:
    """How many blocks have an MoE layer."""
    return sum(is_moe_block(model, moe, i) for i in range(model.depth))


def expert_width(model: ModelConfig, moe: MoEConfig) -> int:
    """Inner width of one routed expert."""
    return inner_width(expert_hidden(model, moe), moe.activation)


def shared_width(model: ModelConfig, moe: MoEConfig) -> int:
    """Inner width of the shared experts, which are one MLP."""
    return inner_width(moe.shared_experts * expert_hidden(model, moe), model.activation)


def _linear(name: str, fan_in: int, fan_out: int) -> list[Parameter]:
    return [Parameter(f"{name}.weight", fan_in * fan_out), Parameter(f"{name}.bias", fan_out)]


def _norm(name: str, model: ModelConfig) -> list[Parameter]:
    return [Parameter(f"{name}.weight", model.width)] if model.norm == "rms" else []


def _mlp(name: str, width: int, inner: int, activation: str) -> list[Parameter]:
    found = _linear(f"{name}.fc1", width, inner) + _linear(f"{name}.fc2", inner, width)
    found += _linear(f"{name}.gate", width, inner) if activation != "gelu" else []
    return [p for p in found if activation != "swiglu" or not p.name.endswith("bias")]


def _block(
    name: str, model: ModelConfig, moe: MoEConfig, ep: int, has_moe: bool
) -> list[Parameter]:
    D, head = model.width, model.width // model.heads
    found = _norm(f"{name}.norm1", model) + _norm(f"{name}.norm2", model)
    found += _linear(f"{name}.attn.qkv", D, 3 * D) + _linear(f"{name}.attn.proj", D, D)
    leaves = ("weight",) if model.norm == "rms" else ("weight", "bias")
    for norm in ("q_norm", "k_norm") if model.qk_norm else ():
        found += [Parameter(f"{name}.attn.{norm}.{leaf}", head) for leaf in leaves]
    if has_moe:
        found += _moe_layer(f"{name}.mlp", model, moe, ep)
    else:
        inner = inner_width(model.hidden, model.activation)
        found += _mlp(f"{name}.mlp", D, inner, model.activation)
    return found + _linear(f"{name}.adaLN_modulation.1", D, 6 * D)


def _moe_layer(name: str, model: ModelConfig, moe: MoEConfig, ep: int) -> list[Parameter]:
    D, E, local, inner = model.width, moe.experts, moe.experts // ep, expert_width(model, moe)
    sizes = {"fc1_weight": D * inner, "fc2_weight": D * inner}
    if moe.activation == "gelu":
        sizes |= {"fc1_bias": inner, "fc2_bias": D}
    else:
        sizes["gate_weight"] = D * inner
    found = [Parameter(f"{name}.router", math.prod(router_shape(model, moe)))]
    found += [Parameter(f"{name}.experts.{leaf}", local * n, True) for leaf, n in sizes.items()]
    if moe.shared_experts:
        found += _mlp(f"{name}.shared", D, shared_width(model, moe), model.activation)
    if has_target_head(model, moe):
        found += _linear(f"{name}.router_hidden", D, D)
        found += _linear(f"{name}.target_head", D, model.patch**2 * model.channels)
    if has_predictor(model, moe):
        found += _linear(f"{name}.capacity_predictor.0", D, D)
        found += _linear(f"{name}.capacity_predictor.2", D, E)
    return found
