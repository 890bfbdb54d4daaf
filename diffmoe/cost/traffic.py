"""What goes over the network in one optimizer step, as formulas: the counterpart of what
``parallel/traffic.py`` counts.

The lower bound: each chosen row leaves its rank once for its expert and once for home, in forward
and, as a gradient, in backward, if the expert lives elsewhere; every gradient is reduced to where
its optimizer state is, and every new weight travels from there.  T tokens of a rank's micro-batch,
R rows it sends, D width, E experts, e = E / EP.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from diffmoe.config import Config
from diffmoe.cost.memory import EngineFacts, padded_numel, shard_numel, shared_parts
from diffmoe.cost.muon import cut_matrices
from diffmoe.cost.parameters import moe_layers
from diffmoe.families import TOKENS_CHOOSE, has_router_loss
from diffmoe.layout import Layout, pairs_taken, rows_taken

_FP32, _INT64 = 4, 8
_MOMENTA = 2  # bf16, as a GPU orthogonalizes (a CPU: fp32)
ROWS = ("dispatch", "combine")


@dataclass(frozen=True)
class Message:
    """A kind of message of one rank in one step.  ``group``: ranks that take part: ep (over two
    levels: ep across, ep inside), pool, owners, edp, world; shard, expert shard, replicas where
    groups of ranks have a copy of the optimizer's state each.  ``messages``, ``payload`` (bytes put
    in, the own part included), ``wire`` (bytes that leave the rank) are sums over the step.
    """

    collective: str
    purpose: str
    phase: str
    group: str
    messages: int
    payload: int
    wire: int

    @property
    def level(self) -> str:
        """Of the two of an exchange that has two, as ``parallel.traffic.Kind`` has it."""
        return self.group if self.group in ("ep across", "ep inside") else ""


def step_traffic(config: Config, layout: Layout, engine: EngineFacts) -> list[Message]:
    """Every kind of message of one rank, without scalars (norms, the step's statistics)."""
    found = exchange_traffic(config, layout, engine) + reduction_traffic(config, layout, engine)
    if config.train.dispersive_weight and layout.ranks > 1:
        # Its arithmetic, 4 FLOPs a number for every sample of the micro-batch on all ranks, is
        # below a thousandth of a step's.
        times, numbers = layout.accumulation, config.model.tokens * config.model.width
        payload = times * layout.micro_batch * numbers * engine.element
        wire = _wire("all_gather", payload, layout.ranks)
        found.append(Message("all_gather", "features", "step", "world", times, payload, wire))
    return found


def _wire(collective: str, payload: int, ranks: int) -> int:
    """Bytes that leave a rank."""
    if collective == "all_gather":
        return payload * (ranks - 1)
    return (2 if collective == "all_reduce" else 1) * payload * (ranks - 1) // ranks


def exchange_traffic(config: Config, layout: Layout, engine: EngineFacts) -> list[Message]:
    """All-to-all and what else the MoE layers say to each other.

    Exact where every rank sends equally many rows to every expert (pools inside a rank).  Otherwise
    scores and masks are exact and rows are what an even choice gives: R = T x capacity on average
    over ranks, 1 - 1/EP of them to other ranks.
    """
    model, moe, ep = config.model, config.moe, layout.ep
    layers = moe_layers(model, moe) * layout.accumulation
    if layers == 0 or ep == 1 and layout.pool_ranks == 1:
        return []
    T, E = layout.micro_batch * model.tokens, moe.experts
    scores = (2 if model.family == "diffmoe" else 1) * T * E * _FP32  # and what is watched
    owners = max(1, layout.pool_ranks // ep)
    rows = rows_sent(config, layout) * model.width * engine.element
    halves = 2 if config.parallel.overlap == "halves" else 1
    found: list[Message] = []

    def add(purpose: str, phase: str, payload: int, ranks: int = ep, group: str = "ep") -> None:
        collective = {"owners": "all_gather", "balance": "all_reduce"}.get(purpose, "all_to_all")
        parts = [(group, ranks)]
        if group == "ep" and layout.per_host:  # everything travels on both levels
            parts = [("ep across", ep // layout.per_host), ("ep inside", layout.per_host)]
        times = halves * layers if purpose in ROWS else layers
        for group, ranks in parts:
            if ranks > 1:
                wire = layers * _wire(collective, payload, ranks)
                total = layers * payload
                found.append(Message(collective, purpose, phase, group, times, total, wire))

    phases = ("forward", "recompute") if config.parallel.recompute == "block" else ("forward",)
    for phase in phases:
        if model.family in TOKENS_CHOOSE or moe.threshold_from is not None:
            add("counts", phase, halves * E * _INT64)
        elif model.family == "race":
            if layout.pool_ranks > 1:
                add("owners", phase, T * E * _FP32, layout.pool_ranks, "pool")
            else:
                add("counts", phase, halves * E * _INT64)
        elif layout.pool_ranks > 1:
            add("scores", phase, scores)
            add("owners", phase, scores, owners, "owners")
            add("mask", phase, T * E)
        elif layout.micro_batch // halves % layout.pool:  # of a half's not all take equally many
            add("counts", phase, halves * E * _INT64)
        if has_router_loss(model, moe):
            pools = layout.micro_batch * layout.pool_ranks // layout.pool
            sums = {"tc": 2 * E, "race": 2 * E * E, "prototype": (E - 1) * (model.width + 1)}
            payload = pools * sums[model.family] * _FP32
            add("balance", phase, payload, layout.pool_ranks, "pool")
    for purpose in ROWS:
        for phase in (*phases, "backward"):
            add(purpose, phase, rows)
    return found


def has_equal_rows(config: Config, layout: Layout) -> bool:
    """Whether every expert of a rank computes equally many rows in training."""
    if config.model.family not in ("diffmoe", "ec") or config.moe.threshold_from is not None:
        return False
    if config.parallel.overlap == "halves":
        return layout.pool_ranks == 1 and layout.micro_batch // 2 % layout.pool == 0
    return layout.pool_ranks <= layout.ep


def rows_sent(config: Config, layout: Layout) -> int:
    """R: rows of one rank in one MoE layer and micro-batch, the mean over ranks."""
    T = layout.micro_batch * config.model.tokens
    if config.model.family in TOKENS_CHOOSE:
        return T * config.moe.top_k
    pool = layout.pool * config.model.tokens
    if config.model.family == "race":
        return T * pairs_taken(pool, config.moe.capacity) // pool
    return (
        T * config.moe.experts * rows_taken(pool, config.moe.experts, config.moe.capacity) // pool
    )


def reduction_traffic(config: Config, layout: Layout, engine: EngineFacts) -> list[Message]:
    """Gradients and weights.  ZeRO 1 in bf16, with sums in products, reduces them to their owner;
    DeepSpeed 0.19.8 all-reduces whole buckets at ZeRO 0 to 2, of which ZeRO 1 and 2 then keep a
    part; ZeRO 2 and 3 do it after every micro-batch.  Where groups of ranks have a copy of the
    optimizer's state each, all that stays inside a group, and once a step a rank's shard is
    all-reduced over the copies.  Of Muon's momenta the mean over ranks.
    """
    found, copies = [], engine.copies(layout)
    sums, parts = engine.sums_in_products, shared_parts(config, layout)
    shards = shard_messages = 0
    groups = ("world", "edp") if copies == 1 else ("shard", "expert shard")
    stay = sum(sum(p.numels) for p in parts if p.ranks > copies) <= engine.live
    for part in parts:
        numels, ranks, group = part.numels, part.ranks // copies, groups[part.experts]
        whole = sum(numels)
        buckets = -(-whole // engine.bucket)
        shards += whole // ranks if sums else shard_numel(numels, ranks, engine)
        shard_messages += -(-(buckets + ranks - 1) // ranks)
        if ranks == 1:
            continue
        times = layout.accumulation if engine.stage in (2, 3) else 1
        collective, messages, elements = "all_reduce", times * buckets, whole
        gathers, gathered = 1, padded_numel(numels, ranks, engine)
        if engine.stage == 3:
            elements = sum(-(-n // ranks) * ranks for n in numels)
            collective = "reduce_scatter"
            # Weights stay from forward to backward if they may; else backward gathers again.
            again = times if stay else 2 * times
            gathers, gathered = again * len(numels), again * elements
        elif sums:  # in parts of one owner each
            collective, messages = "reduce", buckets + ranks - 1
        payload = times * elements * engine.reduced
        wire = _wire(collective, payload, ranks)
        found.append(Message(collective, "gradients", "step", group, messages, payload, wire))
        if engine.stage:
            payload = gathered // ranks * engine.element
            wire = _wire("all_gather", payload, ranks)
            found.append(Message("all_gather", "parameters", "step", group, gathers, payload, wire))
        if engine.stage and part.muon:
            wire = sum(cut_matrices(part, ranks, engine)) * _MOMENTA // ranks
            found.append(Message("all_to_all", "momenta", "step", group, 1, wire, wire))
    if copies > 1:
        payload, messages = shards * engine.reduced, shard_messages if sums else 1
        wire = _wire("all_reduce", payload, copies)
        found.append(
            Message("all_reduce", "gradients", "step", "replicas", messages, payload, wire)
        )
    return found


@dataclass(frozen=True)
class Least:
    """The fewest bytes that must leave a rank in one step: chosen rows to other ranks, of them
    ``network`` to other hosts (0 unless the exchange has two levels); gradients to their owners and
    new weights from there, once a step, in the weights' precision.
    """

    rows: int
    network: int
    reduction: int


def least_traffic(config: Config, layout: Layout, engine: EngineFacts) -> Least:
    """See :class:`Least`; rows as :func:`exchange_traffic` has them."""
    rows = sum(
        m.wire
        for m in exchange_traffic(config, replace(layout, per_host=0), engine)
        if m.purpose in ROWS and m.phase != "recompute"
    )
    outside = layout.ep - layout.per_host if layout.per_host else 0  # of ep - 1 other ranks
    reduction = sum(
        2 * sum(part.numels) * engine.element * (part.ranks - 1) // part.ranks
        for part in shared_parts(config, layout)
    )
    return Least(rows, rows * outside // max(1, layout.ep - 1), reduction)
