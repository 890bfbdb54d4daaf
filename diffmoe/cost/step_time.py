"""Seconds of one optimizer step, by phase.  docs/planner.md has the formulas with their sources."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from diffmoe.config import Config, attention_kept, expert_hidden, inner_width
from diffmoe.cost.hardware import Hardware
from diffmoe.cost.memory import EngineFacts, rank_memory
from diffmoe.cost.muon import newton_schulz_flops
from diffmoe.cost.overlap import Timed, Windows, exposed_exchange, exposed_reduction, halves
from diffmoe.cost.parameters import expert_width, moe_layers, shared_width, trained_parameters
from diffmoe.cost.traffic import Message, has_equal_rows, step_traffic
from diffmoe.families import experts_per_token, projector_of
from diffmoe.layout import Layout
from diffmoe.models.count import count

# What ``run.py bench roofline --planner`` counted and wrote; tests count again.
COUNTED = Path(__file__).with_name("counted.json")


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step.  ``compute``: kernels; ``host``: what launching them takes beyond that;
    ``all_to_all``; ``reduction``: gradients and weights, what pools say to each other beside
    all-to-all.  Of the last two what a step is longer by; all that they take, hidden or not, is
    ``whole_all_to_all`` and ``whole_reduction``, and ``latency`` the part of that which does not
    depend on bytes.
    """

    compute: float
    host: float
    all_to_all: float
    reduction: float
    latency: float
    whole_all_to_all: float
    whole_reduction: float

    @property
    def hidden(self) -> float:
        """Seconds of messages that cost none."""
        return self.whole_all_to_all + self.whole_reduction - self.all_to_all - self.reduction

    @property
    def total(self) -> float:
        return self.compute + self.host + self.all_to_all + self.reduction

    def phases(self) -> dict[str, float]:
        """The parts of ``total`` by name, for people."""
        return {
            "compute": self.compute,
            "launch overhead": self.host,
            "all-to-all": self.all_to_all,
            "reduction": self.reduction,
        }

    def table(self) -> dict[str, float]:
        return {**asdict(self), "total": self.total}


def step_time(
    config: Config, layout: Layout, engine: EngineFacts, hardware: Hardware, per_node: int
) -> StepTime:
    """Messages overlap with kernels (:mod:`diffmoe.cost.overlap`), and not with each other."""
    compute = sum(kernel_seconds(config, layout, engine, hardware).values())
    launching = launches(config, layout, engine, hardware) * hardware.operator_us * 1e-6
    host = max(0.0, launching - compute) if hardware.asynchronous else launching
    rows: Timed = []
    others: Timed = []
    latency = 0.0
    for message in step_traffic(config, layout, engine):
        alpha, beta = message_time(message, layout, engine, hardware, per_node)
        latency += alpha
        exchanged = message.collective == "all_to_all" and message.purpose != "momenta"
        kind = rows if exchanged else others
        kind.append((message, alpha + beta))
    windows = message_windows(config, layout, engine, hardware)
    cost = hardware.overlap_cost
    return StepTime(
        compute=compute,
        host=host,
        all_to_all=exposed_exchange(config, layout, windows, cost, rows),
        reduction=exposed_reduction(config, layout, engine, windows, cost, others),
        latency=latency,
        whole_all_to_all=sum(seconds for _, seconds in rows),
        whole_reduction=sum(seconds for _, seconds in others),
    )


def message_windows(
    config: Config, layout: Layout, engine: EngineFacts, hardware: Hardware
) -> Windows:
    """See :class:`Windows`.  Backward is two of three passes over products and, at least, over
    memory, and 2.5 of 3.5 over attention, and what is recomputed.
    """
    speed, forward = rates(config, hardware, engine), forward_macs(config)
    samples, model, moe = layout.micro_batch, config.model, config.moe
    memory = activation_bytes(config, layout, engine, hardware) / layout.accumulation
    products = 2 * forward.products + forward.products_again
    attention = 2.5 * forward.attention + forward.attention_again
    # Two products a token and inner width; q, k, v and the projection; scores and their sum.
    width = 2 * samples * 2 * model.tokens * model.width / speed["product"]
    expert = width * expert_hidden(model, moe)  # as much with SwiGLU, which is narrower
    return Windows(
        backward=2 * samples * products / speed["product"]
        + 2 * samples * attention / speed["attention"]
        + 2 / 3 * memory / speed["memory"],
        shared=expert * moe.shared_experts,
        experts=expert * experts_per_token(model, moe),
        attention=width * 2 * model.width
        + 2 * samples * forward.attention / model.depth / speed["attention"],
    )


def kernel_seconds(
    config: Config, layout: Layout, engine: EngineFacts, hardware: Hardware
) -> dict[str, float]:
    """Products and attention at reached shares of the peak, the rest at the memory's."""
    speed, (products, attention) = rates(config, hardware, engine), step_flops(config, layout)
    more = muon_seconds(config, layout, engine, hardware) + sum_seconds(
        config, layout, engine, speed
    )
    return {
        "products": products / speed["product"] + more,
        "attention": attention / speed["attention"],
        "memory": moved(config, layout, engine, hardware) / speed["memory"],
    }


def sum_seconds(
    config: Config, layout: Layout, engine: EngineFacts, speed: dict[str, float]
) -> float:
    """What products that add up weights' gradients take beyond their FLOPs: 8 bytes of every
    parameter are read and written, few rows an expert or sample are less work than that.
    """
    if not engine.sums_in_products:
        return 0.0
    products = 1 + halves(config)  # of a weight in a micro-batch
    tokens, longer = layout.micro_batch * config.model.tokens, 0.0
    routed = tokens * experts_per_token(config.model, config.moe) * layout.ep / config.moe.experts
    for p in trained_parameters(config, layout.ep):
        if p.name.endswith("weight") and (not p.expert or has_equal_rows(config, layout)):
            rows = routed if p.expert else layout.micro_batch if "adaLN" in p.name else tokens
            work = 2 * rows / products / speed["product"]
            longer += products * p.numel * max(0.0, 8 / speed["memory"] - work)
    return longer * layout.accumulation


def muon_seconds(config: Config, layout: Layout, engine: EngineFacts, hardware: Hardware) -> float:
    """Of Newton-Schulz's products."""
    flops = newton_schulz_flops(config, layout, engine)
    return flops / rates(config, hardware, engine)["product"]


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


@dataclass(frozen=True)
class Macs:
    """Multiply-adds of a sample: of forward, and of what backward computes again."""

    products: float
    attention: float
    products_again: float = 0.0
    attention_again: float = 0.0


def forward_macs(config: Config) -> Macs:
    """See :class:`Macs`; recompute repeats forward, ``selective`` without what it keeps."""
    model, recompute = config.model, config.parallel.recompute
    attention = 2 * model.depth * model.tokens**2 * model.width
    products = count(model, config.moe).forward_macs - attention
    again = products  # not the projector, which is outside of blocks
    if projector := projector_of(config):
        products += model.tokens * sum(a * b for a, b in pairwise(projector.sizes))
    if recompute == "block":
        return Macs(products, attention, again, attention)
    if recompute == "selective":
        inside = model.tokens * model.width * sum(_inside(config))
        kept = attention_kept(model.depth) / model.depth
        return Macs(products, attention, again - inside, attention * (1 - kept))
    return Macs(products, attention)


def step_flops(config: Config, layout: Layout) -> tuple[float, float]:
    """FLOPs (products, attention) of a rank's step; backward is 2 and 2.5 times forward."""
    macs, samples = forward_macs(config), layout.micro_batch * layout.accumulation
    products = 3 * macs.products + macs.products_again
    return 2 * products * samples, 2 * (3.5 * macs.attention + macs.attention_again) * samples


def _inside(config: Config) -> tuple[float, float]:
    """Inner widths of a token's MLPs over all blocks: dense and shared ones; routed experts."""
    model, moe = config.model, config.moe
    layers = moe_layers(model, moe)
    always = (model.depth - layers) * inner_width(model.hidden, model.activation)
    always += layers * shared_width(model, moe)
    return always, layers * experts_per_token(model, moe) * expert_width(model, moe)


@functools.cache
def _counted() -> dict[str, Any]:
    return json.loads(COUNTED.read_text())


def _per_block(config: Config, engine: EngineFacts, hardware: Hardware) -> dict[str, Any]:
    """What was counted of blocks as they run there, compiled or eager."""
    device = "cuda" if hardware.asynchronous else "cpu"
    way = "compiled" if config.train.compiles(device, engine.stage) else "eager"
    return _counted()[way][config.parallel.recompute]


def _per_weight(engine: EngineFacts) -> dict[str, float]:
    way = "fp32" if not engine.bf16 else "bf16" if engine.sums_in_products else "bf16_zero2"
    return _counted()["weights"][way]


def terms(config: Config) -> dict[str, float]:
    """What bytes of a micro-batch are linear in: elements a token."""
    model, layers = config.model, moe_layers(config.model, config.moe)
    return {
        "outside": model.width,
        "block": model.depth * model.width,
        "inside": sum(_inside(config)),
        "mixture": layers * model.width,
        "scores": layers * config.moe.experts,
    }


def moved(config: Config, layout: Layout, engine: EngineFacts, hardware: Hardware) -> float:
    """Bytes of a rank's step between chip and memory beside the products: passes over activations,
    sums of both halves' gradients, and the traffic of gradients, optimizer, EMA and new weights:
    some of every parameter of the rank, after each micro-batch and once a step, and some of those
    whose optimizer state the rank holds.
    """
    weight, all_of_them = _per_weight(engine), trained_parameters(config, layout.ep)
    parameters = sum(p.numel for p in all_of_them)
    gradients = halves(config) * 3 * engine.element * parameters * layout.accumulation
    if engine.sums_in_products and not has_equal_rows(config, layout):
        # As the optimizer adds up what no product does: the first overwrites.
        gradients += (10 * layout.accumulation - 4) * sum(p.numel for p in all_of_them if p.expert)
    averages = len(config.train.ema_decays) + len(config.train.ema_lengths)
    shard = rank_memory(config, layout, engine).ema / averages / 4
    return (
        activation_bytes(config, layout, engine, hardware)
        + gradients
        + parameters * (weight["micro_batch"] * layout.accumulation + weight["step"])
        + shard * (weight["shard"] + weight["ema"] * averages)
    )


def activation_bytes(
    config: Config, layout: Layout, engine: EngineFacts, hardware: Hardware
) -> float:
    """Of :func:`moved` the passes over activations."""
    each = _per_block(config, engine, hardware)["elements"]
    elements = sum(each[name] * size for name, size in terms(config).items())
    elements *= layout.micro_batch * config.model.tokens
    return elements * engine.element * layout.accumulation


def launches(config: Config, layout: Layout, engine: EngineFacts, hardware: Hardware) -> float:
    """Kernels that the host launches in a step."""
    model, moe = config.model, config.moe
    each, weight = _per_block(config, engine, hardware)["kernels"], _per_weight(engine)
    blocks = each["block"] * model.depth + each["mixture"] * moe_layers(model, moe)
    micro_batch = each["outside"] + blocks * (2 if halves(config) else 1)
    tensors = len(trained_parameters(config, layout.ep))
    micro_batch += tensors * weight["kernels_micro_batch"]
    return micro_batch * layout.accumulation + tensors * weight["kernels_step"]


# ------------------------------------------------------------------------------------------------
# the network


def message_time(
    message: Message, layout: Layout, engine: EngineFacts, hardware: Hardware, per_node: int
) -> tuple[float, float]:
    """(seconds of latency, seconds of bytes) of all messages of a kind in a step: Hockney's alpha +
    n / beta, with the steps that Thakur, Rabenseifner & Gropp (2005) count.
    """
    ranks, here = _placement(message.group, layout, engine, per_node)
    spans = here < ranks
    alpha = (hardware.network if spans else hardware.node).latency_us * 1e-6
    node = hardware.node.gb_s * 1e9 * hardware.link
    network = hardware.network.gb_s * 1e9 * hardware.link
    if message.collective == "all_to_all":
        # Pairwise: all peers at once over the node's switch; the network carries what leaves the
        # node, a message to each rank there.
        outside = message.wire * (ranks - here) / max(1, ranks - 1)
        seconds = max((message.wire - outside) / node, outside / network)
        rounds = ranks - here if spans else max(1.0, math.log2(ranks))
        return message.messages * alpha * rounds, seconds
    # Rings through the node use every network card of the group's ranks there.
    reached = min(node, here * network) if spans else node
    rounds = (2 if message.collective == "all_reduce" else 1) * math.ceil(math.log2(ranks))
    return message.messages * alpha * rounds, message.wire / reached


def _placement(group: str, layout: Layout, engine: EngineFacts, per_node: int) -> tuple[int, int]:
    """(ranks of the group, how many of them share a node)."""
    if group == "world":
        return layout.ranks, min(layout.ranks, per_node)
    if group == "ep":  # where nodes fill one after the other, the group with the fewest on one
        here = layout.ep if layout.ranks <= per_node else math.gcd(layout.ep, per_node)
        return layout.ep, here
    if group == "ep across":
        return layout.ep // layout.per_host, 1
    if group == "ep inside":
        return layout.per_host, layout.per_host
    if group == "pool":
        return layout.pool_ranks, min(layout.pool_ranks, per_node)
    if group in ("shard", "expert shard", "replicas"):
        size = engine.shard or layout.ranks
        stride = {"shard": 1, "expert shard": layout.ep, "replicas": size}[group]
        ranks = (layout.ranks if group == "replicas" else size) // stride
        return ranks, min(ranks, max(1, per_node // stride))
    ranks = layout.ranks // layout.ep if group == "edp" else max(1, layout.pool_ranks // layout.ep)
    return ranks, min(ranks, max(1, per_node // layout.ep))
