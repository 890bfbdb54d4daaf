"""Parameters and arithmetic of a model, counted from its configuration alone.

No torch here: a planner on a login node asks for these numbers before there is a model.
"""

from __future__ import annotations

from dataclasses import dataclass

from diffmoe.config import ModelConfig, MoEConfig, expert_hidden, inner_width
from diffmoe.families import (
    experts_per_token,
    has_predictor,
    has_target_head,
    is_moe_block,
    router_shape,
)

FREQUENCIES = 256  # of the time step, TimestepEmbedding.frequencies


@dataclass(frozen=True)
class Counts:
    """What a model holds, and what one sample uses.

    ``total``: every parameter, router and capacity predictor included.  ``experts``: the part of it
    in routed experts, which expert parallelism shares out.  ``activated``: everything but routed
    experts, plus ``capacity`` experts an MoE layer.  ``positions``: the fixed position table, a
    parameter without gradient in the research code and a computed buffer here; published figures
    are ``total + positions`` and ``activated + positions``.

    ``forward_macs``: multiply-accumulates of one sample's forward pass: every matrix product
    (patches, time step, adaLN, q k v and output, both products of attention, MLPs, experts, router,
    predictor, final layer) and nothing else (no bias, norm, softmax, activation, gating or table
    look-up).  Half of what torch's ``FlopCounterMode`` counts.
    """

    total: int
    experts: int
    activated: int
    positions: int
    forward_macs: int


@dataclass(frozen=True)
class _Part:
    """Parameters, and the weights among them that multiply each row: one row's MACs."""

    parameters: int
    weights: int

    def __add__(self, other: _Part) -> _Part:
        return _Part(self.parameters + other.parameters, self.weights + other.weights)

    def __mul__(self, times: int) -> _Part:
        return _Part(self.parameters * times, self.weights * times)


def _linear(fan_in: int, fan_out: int, bias: bool = True) -> _Part:
    return _Part(fan_in * fan_out + bias * fan_out, fan_in * fan_out)


def _mlp(width: int, hidden: int, activation: str) -> _Part:
    if activation == "gelu":
        return _linear(width, hidden) + _linear(hidden, width)
    bias, inner = activation == "swiglu_bias", inner_width(hidden, activation)
    return _linear(width, inner, bias) * 2 + _linear(inner, width, bias)


def count(model: ModelConfig, moe: MoEConfig, capacity: float | None = None) -> Counts:
    """Counts of ``DiT(model, moe)`` when a token meets ``capacity`` experts on average in each
    MoE layer.

    Without ``capacity``, as trained: ``moe.top_k`` for token choice, ``moe.capacity`` for the
    others.  Rows that rounding leaves out (K is a whole number of tokens of a pool) are not
    considered.
    """
    D, tokens = model.width, model.tokens
    moe_blocks = sum(is_moe_block(model, moe, i) for i in range(model.depth))
    if capacity is None:
        capacity = experts_per_token(model, moe)
    per_token = (
        _linear(model.channels * model.patch**2, D)
        + (_linear(D, 3 * D) + _linear(D, D)) * model.depth
        + _mlp(D, model.hidden, model.activation) * (model.depth - moe_blocks)
        + _around_experts(model, moe) * moe_blocks
        + _linear(D, model.patch**2 * model.out_channels)
    )
    per_sample = (
        _linear(FREQUENCIES, D)
        + _linear(D, D)
        + _linear(D, 6 * D) * model.depth
        + _linear(D, 2 * D)
    )
    unmultiplied = (model.classes + 1) * D
    rms = model.norm == "rms"  # a weight where LayerNorm has none, or a weight and a bias
    if model.qk_norm:
        unmultiplied += model.depth * (2 if rms else 4) * (D // model.heads)
    if rms:
        unmultiplied += (2 * model.depth + 1) * D
    fixed = per_token.parameters + per_sample.parameters + unmultiplied
    expert = _mlp(D, expert_hidden(model, moe), moe.activation) * moe_blocks
    attention = model.depth * 2 * tokens * tokens * D
    return Counts(
        total=fixed + moe.experts * expert.parameters,
        experts=moe.experts * expert.parameters,
        activated=fixed + round(capacity * expert.parameters),
        positions=tokens * D,
        forward_macs=(
            tokens * per_token.weights
            + per_sample.weights
            + attention
            + round(tokens * capacity * expert.weights)
        ),
    )


def _around_experts(model: ModelConfig, moe: MoEConfig) -> _Part:
    """What every token passes in an MoE layer beside its experts."""
    rows, columns = router_shape(model, moe)
    part = _linear(columns, rows, bias=False)
    if has_predictor(model, moe):
        part += _linear(model.width, model.width) + _linear(model.width, moe.experts)
    if has_target_head(model, moe):
        part += _linear(model.width, model.width)
        part += _linear(model.width, model.patch**2 * model.channels)
    if moe.shared_experts:
        hidden = moe.shared_experts * expert_hidden(model, moe)
        part += _mlp(model.width, hidden, model.activation)
    return part
