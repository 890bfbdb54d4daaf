"""Seconds of one optimizer step, by phase.  docs/planner.md has the formulas with their sources."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Iterable

from diffmoe.config import Config, attention_kept
from diffmoe.cost.hardware import Hardware, Link
from diffmoe.cost.memory import EngineFacts, Memory, rank_memory
from diffmoe.cost.parameters import inner_width, mixtures
from diffmoe.cost.traffic import Message, step_traffic
from diffmoe.errors import UserError
from diffmoe.layout import Layout
from diffmoe.models.count import count

# Operators that the host launches in a forward pass (torch.profiler, this model); backward launches about twice as many.
_OPERATORS_DENSE, _OPERATORS_MIXTURE, _OPERATORS_AROUND = 45, 130, 120


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step.  ``compute``: kernels; ``host``: what launching them takes beyond that; ``all_to_all``;
    ``reduction``: gradients and weights, pool owners' scores; ``latency`` is the part of the last two that does not depend
    on bytes."""

    compute: float
    host: float
    all_to_all: float
    reduction: float
    latency: float

    @property
    def total(self) -> float:
        return self.compute + self.host + self.all_to_all + self.reduction

    def table(self) -> dict[str, float]:
        return {**asdict(self), "total": self.total}


def step_time(config: Config, layout: Layout, engine: EngineFacts, hardware: Hardware, per_node: int) -> StepTime:
    """Predicted time of one step; nothing overlaps, which is the careful guess."""
    memory = rank_memory(config, layout, engine)
    compute = _kernels(config, layout, engine, hardware, memory)
    launching = _launches(config, layout) * hardware.operator_us * 1e-6
    host = max(0.0, launching - compute) if hardware.asynchronous else launching
    messages = step_traffic(config, layout, engine)
    exchange = [m for m in messages if m.collective == "all_to_all"]
    others = [m for m in messages if m.collective != "all_to_all"]
    times = [message_time(m, layout, hardware, per_node) for m in exchange]
    reductions = [message_time(m, layout, hardware, per_node) for m in others]
    return StepTime(compute, host, sum(sum(t) for t in times), sum(sum(t) for t in reductions),
                    sum(t[0] for t in times + reductions))


def _kernels(config: Config, layout: Layout, engine: EngineFacts, hardware: Hardware, memory: Memory) -> float:
    """Matrix products at the reached share of the peak, everything else at the reached share of the memory's bandwidth."""
    return (_products(config, layout) / _flops(config, hardware, engine)
            + _moved(config, layout, engine, memory) / (hardware.memory_gb_s * 1e9 * hardware.bandwidth))


def _flops(config: Config, hardware: Hardware, engine: EngineFacts) -> float:
    fp32 = (config.run.fp32_precision == "tf32" and hardware.tflops_tf32) or hardware.tflops_fp32
    return (hardware.tflops_bf16 if engine.bf16 else fp32) * 1e12 * hardware.matmul


def _products(config: Config, layout: Layout) -> float:
    """FLOPs of a rank's step: backward is twice forward; recompute repeats forward, ``selective`` without what it keeps."""
    macs = count(config.model, config.moe).forward_macs
    again = {"none": 0, "block": macs, "selective": macs - _kept_by_selective(config)}[config.parallel.recompute]
    return 2 * (3 * macs + again) * layout.micro_batch * layout.accumulation


def _kept_by_selective(config: Config) -> int:
    """MACs of a sample in the second layers of MLPs and experts, which are at least twice as wide inside, and in the attention
    of the blocks that keep its output."""
    model, moe = config.model, config.moe
    mixed = mixtures(model, moe)
    experts = moe.top_k if model.family == "tc" else moe.capacity
    inside = (model.depth - mixed + mixed * moe.shared_experts) * model.hidden + mixed * experts * inner_width(model, moe)
    return round(model.tokens * model.width * (inside + attention_kept(model.depth) * 2 * model.tokens))


def _moved(config: Config, layout: Layout, engine: EngineFacts, memory: Memory) -> float:
    """Bytes between chip and memory beside the products: every kept activation is written once, read in backward, and its
    gradient written and read; recompute writes it again.  The optimizer reads and writes masters, moments and EMA, reads
    gradients and writes weights, once a step."""
    plain = rank_memory(_without_recompute(config), layout, engine)
    activations = plain.activations + plain.exchange
    passes = 4 if config.parallel.recompute == "none" else 5
    state = memory.moments * 3 / 2 + memory.ema  # with masters, which at ZeRO 0 are the weights
    gradients_and_weights = memory.moments / 8 * (4 + engine.element)
    return passes * activations * layout.accumulation + 2 * state + gradients_and_weights


def _without_recompute(config: Config) -> Config:
    return replace(config, parallel=replace(config.parallel, recompute="none"))


def _launches(config: Config, layout: Layout) -> float:
    mixed = mixtures(config.model, config.moe)
    forward = _OPERATORS_AROUND + _OPERATORS_DENSE * config.model.depth + (_OPERATORS_MIXTURE - _OPERATORS_DENSE) * mixed
    again = 0 if config.parallel.recompute == "none" else 1
    return forward * (3 + again) * layout.accumulation


# ------------------------------------------------------------------------------------------------ the network


def message_time(message: Message, layout: Layout, hardware: Hardware, per_node: int) -> tuple[float, float]:
    """(seconds of latency, seconds of bytes) of all messages of a kind in a step: Hockney's alpha + n / beta, with the
    steps that Thakur, Rabenseifner & Gropp (2005) count."""
    ranks, here = _placement(message.group, layout, per_node)
    spans = here < ranks
    alpha = (hardware.network if spans else hardware.node).latency_us * 1e-6
    if message.collective == "all_to_all":
        # Pairwise: all peers at once over the node's switch; the network carries what leaves the node.
        outside = message.wire * (ranks - here) / max(1, ranks - 1)
        inside = message.wire - outside
        seconds = max(inside / _rate(hardware.node.gb_s, hardware), outside / _rate(hardware.network.gb_s, hardware))
        return message.messages * alpha * max(1.0, math.log2(ranks)), seconds
    # Rings through the node use every network card of the group's ranks there.
    reached = min(hardware.node.gb_s, here * hardware.network.gb_s) if spans else hardware.node.gb_s
    rounds = (2 if message.collective == "all_reduce" else 1) * math.ceil(math.log2(ranks))
    return message.messages * alpha * rounds, message.wire / _rate(reached, hardware)


def _rate(gb_s: float, hardware: Hardware) -> float:
    return gb_s * 1e9 * hardware.link


def _placement(group: str, layout: Layout, per_node: int) -> tuple[int, int]:
    """(ranks of the group, how many of them share a node)."""
    if group == "world":
        return layout.ranks, min(layout.ranks, per_node)
    if group == "ep":
        return layout.ep, min(layout.ep, per_node)
    ranks = layout.ranks // layout.ep if group == "edp" else max(1, layout.pool_ranks // layout.ep)
    return ranks, min(ranks, max(1, per_node // layout.ep))


# ---------------------------------------------------------------------------------------------- calibration


@dataclass(frozen=True)
class Measured:
    """One measured step: its layout, and seconds by phase as ``run.py profile`` splits them."""

    config: Config
    layout: Layout
    engine: EngineFacts
    per_node: int
    compute: float
    all_to_all: float
    reduction: float
    other: float


def calibrate(hardware: Hardware, records: Iterable[Measured], origin: str) -> Hardware:
    """``hardware`` with ``matmul``, ``bandwidth``, ``link`` and ``operator_us`` such that predictions meet the records.

    Sums over the records are compared: both shares of compute are scaled together, so are bandwidth and latency of the
    links, and launching takes what was neither."""
    records = list(records)
    if not records:
        raise UserError(f"{origin} holds no measured step")
    bare = replace(hardware, operator_us=0.0)
    predicted = [step_time(r.config, r.layout, r.engine, bare, r.per_node) for r in records]
    compute = sum(p.compute for p in predicted) / max(1e-9, sum(r.compute for r in records))
    sent = sum(r.all_to_all + r.reduction for r in records)
    expected = sum(p.all_to_all + p.reduction for p in predicted)
    link = expected / sent if sent > 0 and expected > 0 else 1.0
    # What the host needs hides behind a device that computes meanwhile.
    hidden = sum(r.compute for r in records) if hardware.asynchronous else 0.0
    launching = (hidden + sum(r.other for r in records)) / sum(_launches(r.config, r.layout) for r in records)
    return replace(hardware, matmul=hardware.matmul * compute, bandwidth=hardware.bandwidth * compute, link=hardware.link * link,
                   node=_faster(hardware.node, link), network=_faster(hardware.network, link), operator_us=1e6 * launching,
                   calibrated=origin)


def _faster(link: Link, ratio: float) -> Link:
    return replace(link, latency_us=link.latency_us / ratio)
