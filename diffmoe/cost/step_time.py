"""Seconds of one optimizer step, by phase.  docs/planner.md has the formulas with their sources."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from diffmoe.config import Config, attention_kept
from diffmoe.cost.hardware import Hardware, Link
from diffmoe.cost.memory import EngineFacts, rank_memory
from diffmoe.cost.parameters import inner_width, mixtures, rank_parameters
from diffmoe.cost.traffic import Message, step_traffic
from diffmoe.errors import UserError
from diffmoe.layout import Layout
from diffmoe.models.count import count

# What ``run.py bench roofline --planner`` counted and wrote; tests count again.
COUNTED = Path(__file__).with_name("counted.json")


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step.  ``compute``: kernels; ``host``: what launching them takes beyond that;
    ``all_to_all``; ``reduction``: gradients and weights, pool owners' scores; ``latency`` is the
    part of the last two that does not depend on bytes.
    """

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


def step_time(
    config: Config, layout: Layout, engine: EngineFacts, hardware: Hardware, per_node: int
) -> StepTime:
    """Predicted time of one step; nothing overlaps, which is the careful guess."""
    compute = _kernels(config, layout, engine, hardware)
    launching = launches(config, layout, engine, hardware) * hardware.operator_us * 1e-6
    host = max(0.0, launching - compute) if hardware.asynchronous else launching
    messages = step_traffic(config, layout, engine)
    exchange = [m for m in messages if m.collective == "all_to_all"]
    others = [m for m in messages if m.collective != "all_to_all"]
    times = [message_time(m, layout, hardware, per_node) for m in exchange]
    reductions = [message_time(m, layout, hardware, per_node) for m in others]
    return StepTime(
        compute,
        host,
        sum(sum(t) for t in times),
        sum(sum(t) for t in reductions),
        sum(t[0] for t in times + reductions),
    )


def _kernels(config: Config, layout: Layout, engine: EngineFacts, hardware: Hardware) -> float:
    """Matrix products and attention at the reached shares of the peak, everything else at that of
    the memory's bandwidth.
    """
    speed, (products, attention) = rates(config, hardware, engine), _flops(config, layout)
    return (
        products / speed["product"]
        + attention / speed["attention"]
        + moved(config, layout, engine, hardware) / speed["memory"]
    )


def peak_flops(config: Config, hardware: Hardware, engine: EngineFacts) -> float:
    """FLOP/s that the data sheet promises for matrix products in the precision of the run."""
    fp32 = (config.run.fp32_precision == "tf32" and hardware.tflops_tf32) or hardware.tflops_fp32
    return (hardware.tflops_bf16 if engine.bf16 else fp32) * 1e12


def rates(config: Config, hardware: Hardware, engine: EngineFacts) -> dict[str, float]:
    """What is reached: FLOP/s of a ``product`` and of ``attention``, bytes/s of ``memory``."""
    peak = peak_flops(config, hardware, engine)
    return {
        "product": peak * hardware.matmul,
        "attention": peak * (hardware.attention or hardware.matmul),
        "memory": hardware.memory_gb_s * 1e9 * hardware.bandwidth,
    }


def _flops(config: Config, layout: Layout) -> tuple[float, float]:
    """FLOPs of a rank's step in products and in attention, of which backward is 2 and 2.5 times
    forward; recompute repeats forward, ``selective`` without what it keeps.
    """
    model, recompute = config.model, config.parallel.recompute
    attention = 2 * model.depth * model.tokens**2 * model.width
    products = count(model, config.moe).forward_macs - attention
    inside = model.tokens * model.width * sum(_inside(config))
    again = {
        "none": (0, 0),
        "block": (products, attention),
        "selective": (
            products - inside,
            attention * (1 - attention_kept(model.depth) / model.depth),
        ),
    }[recompute]
    samples = layout.micro_batch * layout.accumulation
    return 2 * (3 * products + again[0]) * samples, 2 * (3.5 * attention + again[1]) * samples


def _inside(config: Config) -> tuple[float, float]:
    """Inner widths of a token's MLPs over all blocks: dense ones and shared experts, routed
    experts.
    """
    model, moe = config.model, config.moe
    mixed = mixtures(model, moe)
    experts = moe.top_k if model.family == "tc" else moe.capacity
    return (
        model.depth - mixed + mixed * moe.shared_experts
    ) * model.hidden, mixed * experts * inner_width(model, moe)


@functools.cache
def _counted() -> dict[str, Any]:
    return json.loads(COUNTED.read_text())


def way(config: Config, engine: EngineFacts, hardware: Hardware) -> str:
    """Whether blocks run ``compiled`` or ``eager`` there."""
    return (
        "compiled"
        if config.train.compiles("cuda" if hardware.asynchronous else "cpu", engine.stage)
        else "eager"
    )


def terms(config: Config) -> dict[str, float]:
    """What bytes and kernels of a micro-batch are linear in: elements a token for the first, blocks
    for the second.
    """
    model, mixed = config.model, mixtures(config.model, config.moe)
    return {
        "outside": model.width,
        "block": model.depth * model.width,
        "inside": sum(_inside(config)),
        "mixture": mixed * model.width,
        "scores": mixed * config.moe.experts,
    }


def moved(config: Config, layout: Layout, engine: EngineFacts, hardware: Hardware) -> float:
    """Bytes of a rank's step between chip and memory beside the products: passes over activations,
    and the weights' traffic (:func:`weights_bytes`).
    """
    each = _counted()[way(config, engine, hardware)][config.parallel.recompute]["elements"]
    elements = (
        sum(each[name] * size for name, size in terms(config).items())
        * layout.micro_batch
        * config.model.tokens
    )
    return elements * engine.element * layout.accumulation + weights_bytes(config, layout, engine)


def weights_bytes(config: Config, layout: Layout, engine: EngineFacts) -> float:
    """Bytes of a step's gradients, optimizer, EMA and new weights: some of every parameter of the
    rank, after each micro-batch and once a step, and some of those whose optimizer state the rank
    holds.
    """
    each = _counted()["weights"]["bf16" if engine.bf16 else "fp32"]
    parameters = sum(p.numel for p in rank_parameters(config.model, config.moe, layout.ep))
    shard = rank_memory(config, layout, engine).moments / 8
    return parameters * (each["micro_batch"] * layout.accumulation + each["step"]) + shard * (
        each["shard"] + each["ema"] * len(config.train.ema_decays)
    )


def launches(config: Config, layout: Layout, engine: EngineFacts, hardware: Hardware) -> float:
    """Kernels that the host launches in a step."""
    each = _counted()[way(config, engine, hardware)][config.parallel.recompute]["kernels"]
    weights = _counted()["weights"]["bf16" if engine.bf16 else "fp32"]
    blocks = {
        "outside": 1,
        "block": config.model.depth,
        "mixture": mixtures(config.model, config.moe),
    }
    tensors = len(rank_parameters(config.model, config.moe, layout.ep))
    return sum(
        each[name] * number for name, number in blocks.items()
    ) * layout.accumulation + tensors * (
        weights["kernels_micro_batch"] * layout.accumulation + weights["kernels_step"]
    )


# ------------------------------------------------------------------------------------------------
# the network


def exchange_seconds(
    config: Config, layout: Layout, engine: EngineFacts, hardware: Hardware, per_node: int
) -> float:
    """Of all messages of a step, one after another."""
    return sum(
        sum(message_time(m, layout, hardware, per_node))
        for m in step_traffic(config, layout, engine)
    )


def message_time(
    message: Message, layout: Layout, hardware: Hardware, per_node: int
) -> tuple[float, float]:
    """(seconds of latency, seconds of bytes) of all messages of a kind in a step: Hockney's alpha +
    n / beta, with the steps that Thakur, Rabenseifner & Gropp (2005) count.
    """
    ranks, here = _placement(message.group, layout, per_node)
    spans = here < ranks
    alpha = (hardware.network if spans else hardware.node).latency_us * 1e-6
    if message.collective == "all_to_all":
        # Pairwise: all peers at once over the node's switch; the network carries what leaves the
        # node.
        outside = message.wire * (ranks - here) / max(1, ranks - 1)
        inside = message.wire - outside
        seconds = max(
            inside / _rate(hardware.node.gb_s, hardware),
            outside / _rate(hardware.network.gb_s, hardware),
        )
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


# ----------------------------------------------------------------------------------------------
# calibration


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
    """``hardware`` with ``matmul``, ``attention``, ``bandwidth``, ``link`` and ``operator_us`` such
    that predictions meet the records.

    Sums over the records are compared: the shares of compute are scaled together, so are bandwidth
    and latency of the links, and launching takes what was neither.
    """
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
    launching = (hidden + sum(r.other for r in records)) / sum(
        launches(r.config, r.layout, r.engine, hardware) for r in records
    )
    attention = hardware.attention and hardware.attention * compute
    return replace(
        hardware,
        matmul=hardware.matmul * compute,
        attention=attention,
        bandwidth=hardware.bandwidth * compute,
        link=hardware.link * link,
        node=_faster(hardware.node, link),
        network=_faster(hardware.network, link),
        operator_us=1e6 * launching,
        calibrated=origin,
    )


@dataclass(frozen=True)
class Kernels:
    """One measured step of one rank taken apart by kernel, as ``run.py bench roofline`` does where
    there is a GPU: seconds of the whole, of products, of attention, and of kernels that move
    memory.
    """

    config: Config
    layout: Layout
    engine: EngineFacts
    seconds: float
    products: float
    attention: float
    memory: float


def calibrate_kernels(hardware: Hardware, records: Iterable[Kernels], origin: str) -> Hardware:
    """``hardware`` with ``matmul``, ``attention``, ``bandwidth`` such that each kind's seconds,
    summed over the records, are predicted.

    ``operator_us``: the least that a step leaves each of its launches, since no launch took longer
    where the device never waited.
    """
    planned = {"products": 0.0, "attention": 0.0, "memory": 0.0}
    records = list(records)
    for r in records:
        speed, (products, attention) = (
            rates(r.config, hardware, r.engine),
            _flops(r.config, r.layout),
        )
        planned["products"] += products / speed["product"]
        planned["attention"] += attention / speed["attention"]
        planned["memory"] += moved(r.config, r.layout, r.engine, hardware) / speed["memory"]
    ratio = {
        kind: seconds / (sum(getattr(r, kind) for r in records) or seconds)
        for kind, seconds in planned.items()
    }
    left = [
        (
            r.seconds,
            r.seconds - r.products - r.attention - r.memory,
            launches(r.config, r.layout, r.engine, hardware),
        )
        for r in records
    ]
    launch = min(
        (seconds if hardware.asynchronous else max(idle, 0.0)) / count
        for seconds, idle, count in left
    )
    return replace(
        hardware,
        matmul=hardware.matmul * ratio["products"],
        attention=(hardware.attention or hardware.matmul) * ratio["attention"],
        bandwidth=hardware.bandwidth * ratio["memory"],
        operator_us=1e6 * launch,
        calibrated=origin,
    )


def _faster(link: Link, ratio: float) -> Link:
    return replace(link, latency_us=link.latency_us / ratio)
