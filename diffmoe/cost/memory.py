"""Bytes on one rank: what lives all the time, what a step adds, and the most at once.

What DeepSpeed 0.19.8 keeps was read from its sources and compared with the tensors of real engines
(tests/test_cost.py). Activations are counted as torch's autograd keeps them for this code's blocks:
T tokens of a micro-batch, D width, F inner width, R rows that this rank's experts take.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from diffmoe.config import Config, attention_kept
from diffmoe.cost.parameters import inner_width, is_mixture, rank_parameters
from diffmoe.deepspeed_json import reduction
from diffmoe.layout import Layout

_FP32 = 4


@dataclass(frozen=True)
class EngineFacts:
    """What the DeepSpeed JSON says, as the engine will run it (bf16 at ZeRO 0 runs as ZeRO 1).

    ``element``: bytes of a weight; ``reduced``: of a gradient that ranks add up.  ``bucket``:
    elements of a gradient bucket, of which there are ``buckets``. ``persistent``: ZeRO 3 keeps
    tensors up to that many elements whole; ``live``: elements of the others that it may hold.
    """

    stage: int
    element: int
    reduced: int
    bucket: int
    buckets: int
    persistent: int
    live: int

    @property
    def bf16(self) -> bool:
        return self.element == 2


def engine_facts(deepspeed_tree: dict) -> EngineFacts:
    """Facts of a DeepSpeed JSON that ``merge_deepspeed`` accepts."""
    zero = deepspeed_tree.get("zero_optimization") or {}
    bf16 = bool((deepspeed_tree.get("bf16") or {}).get("enabled"))
    stage, how = zero.get("stage", 0), reduction(deepspeed_tree)
    return EngineFacts(
        stage=max(stage, 1) if bf16 else stage,
        element=2 if bf16 else _FP32,
        reduced=_FP32 if how.precision == "fp32" else 2,
        bucket=how.bucket,
        buckets=2 if how.overlap and stage in (1, 2) else 1,
        persistent=_number(zero, "param_persistence_threshold", 1e5),
        live=_number(zero, "max_live_parameters", 1e9),
    )


def _number(zero: dict, name: str, default: float) -> int:
    return int(float(zero.get(f"stage3_{name}", zero.get(name, default))))


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank.

    Live between steps (``static``): ``weights``, fp32 ``masters``, ``moments`` (two), ``ema`` (of
    every decay), ``gradient_sums`` and ZeRO 3's bucket.  During a step: ``gathered`` weights (ZeRO
    3); ``buckets`` in which gradients are collected; ``accumulated`` gradients of earlier
    micro-batches; ``activations`` that forward keeps; ``exchange``: rows that arrived from other
    ranks, kept too; ``working``: a block's temporaries, recomputed activations included;
    ``gradients`` that have gathered when backward ends; ``reduction``: what reducing them and
    handing them to the optimizer takes then.
    """

    weights: int
    masters: int
    moments: int
    ema: int
    gradient_sums: int
    gathered: int
    buckets: int
    accumulated: int
    activations: int
    exchange: int
    working: int
    gradients: int
    reduction: int

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

    def table(self) -> dict[str, int]:
        return {**asdict(self), "static": self.static, "peak": self.peak}


@dataclass(frozen=True)
class _Sizes:
    """Elements: of this rank's weights, of its share of the optimizer's state, of DeepSpeed's flat
    weights.
    """

    whole: int
    shard: int
    padded: int


def shared_parts(
    config: Config, layout: Layout
) -> tuple[tuple[list[int], int], tuple[list[int], int]]:
    """(sizes of a rank's tensors, ranks that hold the same) of what all ranks share, and of experts
    shared out.
    """
    parameters = rank_parameters(config.model, config.moe, layout.ep)
    split = layout.ep > 1
    return (
        ([p.numel for p in parameters if not (split and p.expert)], layout.ranks),
        ([p.numel for p in parameters if split and p.expert], layout.ranks // layout.ep),
    )


def rank_memory(config: Config, layout: Layout, engine: EngineFacts) -> Memory:
    """Memory of one rank of ``layout``."""
    parts = shared_parts(config, layout)
    (dense, _), (experts, _) = parts
    sizes = _Sizes(
        sum(dense) + sum(experts),
        sum(_shard(part, ranks, engine) for part, ranks in parts),
        sum(padded_numel(part, ranks, engine) for part, ranks in parts),
    )
    if engine.stage == 3:
        # Small tensors stay whole beside their shard.
        persistent = sum(n for n in dense + experts if n <= engine.persistent)
        weights = engine.element * (sizes.shard + persistent)
        gathered = engine.element * min(engine.live, sizes.whole - persistent)
    else:
        weights, gathered = engine.element * sizes.padded, 0
    masters = 0 if engine.stage == 0 else _FP32 * sizes.shard
    sums, buckets, accumulated, gradients, reduction = _gradients(
        sizes, engine, layout.accumulation > 1
    )
    activations, exchange, working = _activations(config, layout, engine.element)
    working += engine.element * max(dense + experts)  # a gradient, before it is in its bucket
    averages = len(config.train.ema_decays) * _FP32 * sizes.shard
    return Memory(
        weights,
        masters,
        2 * _FP32 * sizes.shard,
        averages,
        sums,
        gathered,
        buckets,
        accumulated,
        activations,
        exchange,
        working,
        gradients,
        reduction,
    )


def padded_numel(numels: list[int], ranks: int, engine: EngineFacts) -> int:
    """Elements of DeepSpeed's flat buffer: at ZeRO 1 and 2 a multiple of two per rank."""
    total = sum(numels)
    return total if engine.stage in (0, 3) else -(-total // (2 * ranks)) * 2 * ranks


def _shard(numels: list[int], ranks: int, engine: EngineFacts) -> int:
    """Elements of the optimizer's shard: at ZeRO 3 every tensor is cut by itself."""
    if engine.stage == 0:
        return sum(numels)
    if engine.stage == 3:
        return sum(-(-n // ranks) for n in numels)
    return padded_numel(numels, ranks, engine) // ranks


def _gradients(
    sizes: _Sizes, engine: EngineFacts, accumulates: bool
) -> tuple[int, int, int, int, int]:
    """Bytes of (gradient_sums, buckets, accumulated, gradients, reduction), see :class:`Memory`."""
    bucket = min(sizes.whole, engine.bucket)  # of which so much is ever used
    reduced = engine.reduced * bucket + (
        engine.element * bucket if engine.reduced != engine.element else 0
    )  # and a copy to cast
    if engine.stage == 0:
        gradients = engine.element * sizes.whole
        return 0, 0, gradients if accumulates else 0, gradients, engine.element * bucket
    if engine.stage == 3:
        return _FP32 * sizes.shard + engine.reduced * engine.bucket, 0, 0, 0, reduced
    if engine.stage == 1 and engine.bf16:
        # Fp32 sums of all gradients, always; they are reduced in place, or as copies that all wait
        # for the end of backward.
        return (
            _FP32 * sizes.padded,
            0,
            0,
            0,
            engine.reduced * sizes.whole if engine.reduced < _FP32 else 0,
        )
    if engine.stage == 1:
        left = _FP32 * max(
            0, sizes.whole - engine.bucket
        )  # what no longer fits into a bucket stays where it is
        return (
            0,
            _FP32 * engine.bucket * engine.buckets,
            _FP32 * sizes.whole if accumulates else 0,
            left,
            _FP32 * (bucket + sizes.shard),
        )
    return (
        0,
        engine.element * engine.bucket * engine.buckets,
        _FP32 * sizes.shard if accumulates else 0,
        engine.element * sizes.shard,
        reduced + _FP32 * sizes.shard,
    )


# ---------------------------------------------------------------------------------------------
# activations


def _activations(config: Config, layout: Layout, element: int) -> tuple[int, int, int]:
    """(bytes kept for backward, of which rows that travelled are counted apart, temporaries)."""
    model = config.model
    recompute = config.parallel.recompute
    blocks = [_block_bytes(config, layout, element, i) for i in range(model.depth)]
    token = layout.micro_batch * model.tokens * model.width * element
    around = (
        3 * token + layout.micro_batch * model.tokens * model.patch**2 * model.channels * _FP32 * 4
    )
    kept = sum(_kept(block, recompute, token) for block in blocks) + around
    exchange = sum(block.exchange for block in blocks if recompute != "block")
    again = [
        block.full
        - _kept(block, recompute, token)
        + (block.exchange if recompute == "block" else 0)
        for block in blocks
    ]
    working = max(extra + block.working for extra, block in zip(again, blocks))
    return kept, exchange, working


@dataclass(frozen=True)
class _Block:
    """Bytes of one block: kept without recompute; rows that arrived; kept by selective recompute
    beside its input; routing's decisions; temporaries in backward.
    """

    full: int
    exchange: int
    selective: int
    routing: int
    working: int


def _kept(block: _Block, recompute: str, token: int) -> int:
    if recompute == "none":
        return block.full
    return token + block.routing + (block.selective if recompute == "selective" else 0)


def _block_bytes(config: Config, layout: Layout, element: int, number: int) -> _Block:
    """Attention keeps its input, norm, modulated input, q, k, v, output, projection (8 D a token);
    the other half its input, norm, modulated input and result (4 D).
    """
    model, moe = config.model, config.moe
    T, D = layout.micro_batch * model.tokens, model.width
    attention = T * (8 * D * element + model.heads * _FP32) + (
        2 * T * D * element if model.qk_norm else 0
    )
    half = 4 * T * D * element
    attended = (
        T * (D * element + model.heads * _FP32) if number < attention_kept(model.depth) else 0
    )
    if not is_mixture(model, moe, number):
        return _Block(
            attention + half + 2 * T * model.hidden * element,
            0,
            T * D * element + attended,
            0,
            round(2.4 * T * D * element),
        )
    # A schedule of the capacity begins with the most rows.
    rows = round(T * (moe.top_k if model.family == "tc" else max(moe.capacity, moe.capacity_at(0))))
    kept, exchange = _mixture_bytes(config, rows, T, element, layout.ep > 1)
    routing = rows * 8 * 2
    # Outputs of experts, with EP also as they came home, and of the shared expert.
    second = (rows * (2 if layout.ep > 1 else 1) + (T if moe.shared_experts else 0)) * D * element
    return _Block(
        attention + half + kept,
        exchange,
        second + attended,
        routing,
        round((2.2 * element) * T * D),
    )


def _mixture_bytes(config: Config, rows: int, T: int, element: int, moved: bool) -> tuple[int, int]:
    model, moe = config.model, config.moe
    D, E, inner = model.width, moe.experts, inner_width(model, moe)
    # Gathered rows, and what lies between the layers: before and after GELU; SwiGLU's gate before
    # and after SiLU, fc1, their product.
    kept = rows * (D + (2 if moe.activation == "gelu" else 4) * inner) * element
    kept += (
        0 if moved else rows * D * element
    )  # outputs, which wait for their gate's gradient; moved, those that came home
    kept += T * E * (3 * _FP32 + 1)  # scores, logits, mask as numbers and as truth
    if model.family == "diffmoe":
        kept += 2 * T * D * element  # the predictor's first layer, before and after SiLU
    if moe.shared_experts:
        kept += T * (2 * moe.shared_experts * model.hidden + D) * element
    return kept, (rows * D * element if moved else 0)
