"""Bytes on one rank: what lives all the time, what a step adds, and the most at once.

What DeepSpeed 0.19.8 keeps was read from its sources and compared with the tensors of real engines
(tests/test_cost.py). Activations are counted as torch's autograd keeps them for this code's blocks:
T tokens of a micro-batch, D width, F inner width, R rows that this rank's experts take.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import NamedTuple

from diffmoe.config import Config, attention_kept, inner_width
from diffmoe.cost.parameters import expert_width, shared_width, trained_parameters
from diffmoe.deepspeed_json import BF16_NAMES, accumulation, precision, reduction, zero_stage
from diffmoe.deepspeed_keys import MICS
from diffmoe.families import (
    TOKENS_CHOOSE,
    has_predictor,
    has_target_head,
    is_moe_block,
    projector_of,
)
from diffmoe.layout import Layout
from diffmoe.models.matrices import MUON, is_matrix, matrices_in

_FP32 = 4


@dataclass(frozen=True)
class EngineFacts:
    """What the DeepSpeed JSON says, as the engine will run it (bf16 at ZeRO 0 runs as ZeRO 1).

    ``element``: bytes of a weight; ``reduced``: of a gradient that ranks add up.  ``bucket``:
    elements of a gradient bucket, of which there are ``buckets``; ``overlaps``: whether they leave
    while backward still runs. ``persistent``: ZeRO 3 keeps tensors up to that many elements whole;
    ``live``: elements of the others that it may hold.  ``shard``: ranks that share a copy of the
    optimizer's state (None: all of them).  ``sums_in_products``: products add up weights' gradients
    (``gradient_sums``).  ``state_on_host``, ``weights_on_host``: what DeepSpeed offloads.
    """

    stage: int
    element: int
    reduced: int
    bucket: int
    buckets: int
    overlaps: bool
    persistent: int
    live: int
    shard: int | None
    sums_in_products: bool
    state_on_host: bool
    weights_on_host: bool

    def copies(self, layout: Layout) -> int:
        """Of the optimizer's state (at ZeRO 0 every rank has one, which is not meant)."""
        return layout.ranks // (self.shard or layout.ranks)

    @property
    def bf16(self) -> bool:
        return self.element == 2


def engine_facts(deepspeed_tree: dict) -> EngineFacts:
    """Facts of a DeepSpeed JSON that ``merge_deepspeed`` accepts."""
    said = (deepspeed_tree.get("zero_optimization") or {}).items()
    zero = {name: value for name, value in said if value is not None}
    bf16, how = precision(deepspeed_tree) == "bf16", reduction(deepspeed_tree)
    stage = max(zero_stage(deepspeed_tree), int(bf16))
    offloaded = {
        name: (zero.get(f"offload_{name}") or {}).get("device") not in (None, "none")
        for name in ("optimizer", "param")
    }

    def number(name: str, default: float) -> int:
        return int(float(zero.get(f"stage3_{name}", zero.get(name, default))))

    return EngineFacts(
        stage=stage,
        element=2 if bf16 else _FP32,
        reduced=_FP32 if how.precision == "fp32" else 2,
        bucket=how.bucket,
        buckets=2 if how.overlap and stage in (1, 2) else 1,
        overlaps=how.overlap and stage > 0,
        persistent=number("param_persistence_threshold", 1e5),
        live=number("max_live_parameters", 1e9),
        shard=int(zero.get(MICS) or 0) or None,
        # Otherwise DeepSpeed takes another optimizer.
        sums_in_products=bf16
        and stage == 1
        and accumulation(deepspeed_tree) not in BF16_NAMES
        and not offloaded["optimizer"],
        state_on_host=offloaded["optimizer"],
        weights_on_host=offloaded["param"],
    )


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank.

    Live between steps (``static``): ``weights``, fp32 ``masters``, ``moments`` (two; of Muon's
    matrices one), ``ema`` (of every decay), ``gradient_sums`` and ZeRO 3's bucket.  During a step:
    ``gathered`` weights (ZeRO 3); ``buckets`` in which gradients are collected; ``accumulated``
    gradients of earlier micro-batches; ``activations`` that forward keeps; ``exchange``: rows that
    arrived from other ranks, kept too; ``working``: a block's temporaries, recomputed activations
    included; ``gradients`` that have gathered when backward ends; ``reduction``: what reducing them
    and handing them to the optimizer takes then.
    """

    weights: int
    masters: int
    moments: int
    ema: int
    gradient_sums: int = 0
    gathered: int
    buckets: int = 0
    accumulated: int = 0
    activations: int
    exchange: int
    working: int
    gradients: int = 0
    reduction: int = 0

    @property
    def static(self) -> int:
        return self.weights + self.masters + self.moments + self.ema + self.gradient_sums

    @property
    def peak(self) -> int:
        """The most of three moments: backward begins (all activations, no gradient), backward ends
        (all gradients, one block's temporaries), and after it (gradients are reduced).
        """
        begins = self.activations + self.exchange + self.working
        ends = self.gradients + max(self.working, self.reduction)
        return self.static + self.buckets + self.accumulated + max(begins + self.gathered, ends)

    def parts(self) -> dict[str, int]:
        """The fields by name, for people."""
        return {name.replace("_", " "): value for name, value in asdict(self).items()}

    def table(self) -> dict[str, int]:
        return {**asdict(self), "static": self.static, "peak": self.peak}


class Part(NamedTuple):
    """Sizes of a rank's tensors that DeepSpeed shards together, and how many ranks hold the same:
    of what all ranks share, or of experts shared out; apart from these Muon's, matrix by matrix.
    """

    numels: list[int]
    ranks: int
    experts: bool
    muon: bool


def shared_parts(config: Config, layout: Layout) -> list[Part]:
    """All that a rank trains."""
    sizes: dict[tuple[bool, bool], list[int]] = {}
    muon = config.train.optimizer == MUON
    for p in trained_parameters(config, layout.ep):
        key = layout.ep > 1 and p.expert, muon and is_matrix(p.name)
        number = matrices_in(p.name, config.moe.experts // layout.ep if p.expert else 1)
        number = number if key[1] else 1
        sizes.setdefault(key, []).extend([p.numel // number] * number)
    return [
        Part(sizes[key], layout.ranks // (layout.ep if key[0] else 1), *key)
        for key in sorted(sizes)
    ]


def rank_memory(config: Config, layout: Layout, engine: EngineFacts) -> Memory:
    """Memory of one rank of ``layout``."""
    copies = engine.copies(layout)
    parts = [part._replace(ranks=part.ranks // copies) for part in shared_parts(config, layout)]
    numels = [n for part in parts for n in part.numels]
    largest = max(p.numel for p in trained_parameters(config, layout.ep))
    whole = sum(numels)
    shard = sum(shard_numel(part.numels, part.ranks, engine) for part in parts)
    muon = sum(shard_numel(part.numels, part.ranks, engine) for part in parts if part.muon)
    padded = sum(padded_numel(part.numels, part.ranks, engine) for part in parts)
    weights, gathered = engine.element * padded, 0
    if engine.stage == 3:
        # Small tensors stay whole beside their shard.
        persistent = sum(n for n in numels if n <= engine.persistent)
        weights = engine.element * (persistent + (0 if engine.weights_on_host else shard))
        gathered = engine.element * min(engine.live, whole - persistent)
    activations, exchange, working = _activations(config, layout, engine.element)
    averages = len(config.train.ema_decays) + len(config.train.ema_lengths)
    state = 0 if engine.state_on_host else _FP32
    return Memory(
        weights=weights,
        masters=0 if engine.stage == 0 else state * shard,
        moments=state * (2 * shard - muon),
        ema=averages * state * shard,
        gathered=gathered,
        activations=activations,
        exchange=exchange,
        working=working + engine.element * largest,  # a gradient, before it is in its bucket
        **_gradients(whole, shard, padded, engine, layout.accumulation > 1, copies > 1),
    )


def padded_numel(numels: list[int], ranks: int, engine: EngineFacts) -> int:
    """Elements of DeepSpeed's flat buffer: at ZeRO 1 and 2 a multiple of two per rank."""
    total = sum(numels)
    return total if engine.stage in (0, 3) else -(-total // (2 * ranks)) * 2 * ranks


def shard_numel(numels: list[int], ranks: int, engine: EngineFacts) -> int:
    """Elements of the optimizer's shard: at ZeRO 3 every tensor is cut by itself."""
    if engine.stage == 0:
        return sum(numels)
    if engine.stage == 3:
        return sum(-(-n // ranks) for n in numels)
    return padded_numel(numels, ranks, engine) // ranks


def _gradients(
    whole: int, shard: int, padded: int, engine: EngineFacts, accumulates: bool, replicated: bool
) -> dict[str, int]:
    """What gradients take, see :class:`Memory`, from elements: weights, shard, flat weights."""
    element, reduced = engine.element, engine.reduced
    bucket = min(whole, engine.bucket)  # of which so much is ever used
    copied = (reduced + (element if reduced != element else 0)) * bucket  # and a copy to cast
    if engine.stage == 0:
        gradients = element * whole
        accumulated = gradients if accumulates else 0
        return dict(accumulated=accumulated, gradients=gradients, reduction=element * bucket)
    if engine.stage == 3:
        across = reduced * shard if replicated else 0  # what the replicas average, as one message
        return dict(
            gradient_sums=_FP32 * shard + reduced * engine.bucket, reduction=max(copied, across)
        )
    if engine.sums_in_products:
        # Fp32 sums of all gradients, always; they are reduced in place, or as copies that all wait
        # for the end of backward.
        copies = reduced * whole if reduced < _FP32 else 0
        return dict(gradient_sums=_FP32 * padded, reduction=copies)
    if engine.stage == 1:
        return dict(
            buckets=element * engine.bucket * engine.buckets,
            accumulated=element * whole if accumulates else 0,
            gradients=element * max(0, whole - engine.bucket),  # what does not fit into a bucket
            reduction=copied + _FP32 * shard,
        )
    return dict(
        buckets=element * engine.bucket * engine.buckets,
        accumulated=_FP32 * shard if accumulates else 0,
        gradients=element * shard,
        reduction=copied + _FP32 * shard,
    )


# ---------------------------------------------------------------------------------------------
# activations


def _activations(config: Config, layout: Layout, element: int) -> tuple[int, int, int]:
    """Bytes kept for backward, of rows that arrived from other ranks, and of temporaries."""
    model, recompute = config.model, config.parallel.recompute
    T = layout.micro_batch * model.tokens
    kept = 3 * T * model.width * element + T * model.patch**2 * model.channels * _FP32 * 4
    if config.train.dispersive_weight:  # in fp32: every sample, and this rank's once more
        kept += (layout.ranks + 1) * T * model.width * _FP32
    if projector := projector_of(config):  # inner layers before and after SiLU, two fp32 copies
        _, *inner, features = projector.sizes
        kept += T * (2 * sum(inner) * element + 2 * features * _FP32)
    exchange = working = 0
    for number in range(model.depth):
        block = _block_bytes(config, layout, element, number)
        stays = {"none": block.full, "selective": block.selective, "block": block.least}[recompute]
        again = block.full - stays
        kept += stays
        if recompute == "block":
            again += block.exchange
        else:
            exchange += block.exchange
        working = max(working, again + block.working)
    return kept, exchange, working


@dataclass(frozen=True)
class _Block:
    """Bytes of a block: kept by recompute mode; rows that arrived; backward's temporaries."""

    full: int
    selective: int
    least: int
    exchange: int
    working: int


def _block_bytes(config: Config, layout: Layout, element: int, number: int) -> _Block:
    """Attention keeps its input, norm, modulated input, q, k, v, output, projection (8 D a token);
    the other half its input, norm, modulated input and result (4 D).
    """
    model, moe, moved = config.model, config.moe, layout.ep > 1
    T, D = layout.micro_batch * model.tokens, model.width
    token = T * D * element
    full = 12 * token + T * model.heads * _FP32
    if model.qk_norm or model.positions == "rope":
        full += 2 * token  # q and k as attention takes them, beside what qkv gave
    selective = token  # the block's input
    if number < attention_kept(model.depth):
        selective += token + T * model.heads * _FP32
    # Of inner widths: before and after GELU; SwiGLU's gate before and after SiLU, fc1, the product.
    layers = {"gelu": 2, "swiglu": 4, "swiglu_bias": 4}
    if not is_moe_block(model, moe, number):
        inner = inner_width(model.hidden, model.activation)
        full += layers[model.activation] * T * inner * element
        return _Block(full, selective + token, token, 0, round(2.4 * token))
    # A schedule of the capacity begins with the most rows.
    tokens_choose = model.family in TOKENS_CHOOSE
    share = moe.top_k if tokens_choose else max(moe.capacity, moe.capacity_at(0))
    rows = round(T * share)
    routing, outputs = rows * 8 * 2, rows * D * element
    # Outputs of experts, with EP also as they came home, and of the shared expert.
    second = outputs * (2 if moved else 1) + (token if moe.shared_experts else 0)
    # Gathered rows, and what lies between the layers.
    full += rows * (D + layers[moe.activation] * expert_width(model, moe)) * element
    full += 0 if moved else outputs  # which wait for their gate's gradient; moved, those at home do
    full += T * moe.experts * (3 * _FP32 + 1)  # scores, logits, mask as numbers and as booleans
    if has_predictor(model, moe):
        full += 2 * token  # the predictor's first layer, before and after SiLU
    if has_target_head(model, moe):
        full += 2 * token  # the router's hidden layer, before and after GELU
    if moe.router_input == "time_token":
        full += token  # the token before shift and scale, as the router keeps it
    if moe.shared_experts:
        full += layers[model.activation] * T * shared_width(model, moe) * element + token
    # Selective recompute also keeps what passed through here of an exchange over two levels.
    passing = 2 * outputs if layout.per_host else 0
    return _Block(
        full,
        selective + routing + second + passing,
        token + routing,
        outputs if moved else 0,
        round((2.2 * element) * T * D),
    )
