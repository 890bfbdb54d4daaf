"""Layouts of a run on a number of ranks: what each costs, which fit, best first."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, astuple, dataclass, replace
from itertools import product
from typing import Any

from diffmoe.config import Config, override
from diffmoe.cost.hardware import Hardware
from diffmoe.cost.memory import EngineFacts, Memory, engine_facts, rank_memory
from diffmoe.cost.step_time import StepTime, step_time
from diffmoe.cost.traffic import least_traffic, step_traffic
from diffmoe.deepspeed_json import check_deepspeed, check_shards
from diffmoe.deepspeed_keys import MICS
from diffmoe.errors import UserError
from diffmoe.layout import Layout, over_hosts, resolve_layout

RECOMPUTE = ("none", "selective", "block")
GIB = 2**30
# A copy of the optimizer's state for every run of as many nodes as whole EP groups need.
_WHOLE_NODES = 0


@dataclass(frozen=True)
class Cluster:
    """``nodes`` of ``per_node`` ranks each of one kind."""

    nodes: int
    per_node: int
    hardware: Hardware

    @property
    def ranks(self) -> int:
        return self.nodes * self.per_node


@dataclass(frozen=True)
class Pins:
    """What is asked for; None: free.  ``shard``: ranks to a copy of the optimizer's state."""

    ep: int | None = None
    zero: int | None = None
    recompute: str | None = None
    micro_batch: int | None = None
    shard: int | None = None
    overlap: str | None = None


@dataclass(frozen=True)
class Candidate:
    """One layout with its cost.  ``config`` has the layout's own parallel and train sections."""

    config: Config
    layout: Layout
    engine: EngineFacts
    memory: Memory
    time: StepTime
    usable: int

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.usable

    @property
    def images_per_s(self) -> float:
        return self.layout.batch / self.time.total

    @property
    def recompute(self) -> str:
        return self.config.parallel.recompute

    @property
    def pins(self) -> Pins:
        """What would have to be pinned for this layout alone."""
        layout, engine = self.layout, self.engine
        shard = engine.shard or layout.ranks
        kept = layout.ep, engine.stage, self.recompute, layout.micro_batch, shard
        return Pins(*kept, self.config.parallel.overlap)

    def changes(self, pins: Pins) -> tuple[str, ...]:
        """How this layout differs from what is pinned, in words."""
        names = (
            "EP",
            "ZeRO",
            "recompute",
            "micro-batch",
            "ranks that share a copy of the state",
            "overlap",
        )
        return tuple(
            f"{name} {pinned} -> {own}"
            for name, pinned, own in zip(names, astuple(pins), astuple(self.pins))
            if pinned not in (None, own)
        )

    @property
    def forms(self) -> str:
        """What tables have no column for."""
        found = [f"shards of {self.engine.shard}"] * (self.engine.copies(self.layout) > 1)
        found += ["two levels"] * (self.layout.per_host > 0)
        return ", ".join(found + ["halves"] * (self.config.parallel.overlap == "halves"))

    @property
    def label(self) -> str:
        layout = self.layout
        halves = " in halves" * (self.config.parallel.overlap == "halves")
        shard = f" in groups of {self.engine.shard}" if self.engine.copies(layout) > 1 else ""
        return (
            f"EP {layout.ep}{' over two levels' if layout.per_host else ''}, ZeRO "
            f"{self.engine.stage}{shard}, recompute {self.recompute}, micro-batch "
            f"{layout.micro_batch} x {layout.accumulation}{halves}"
        )

    def table(self) -> dict[str, Any]:
        """All numbers as plain dicts, for JSON."""
        return {
            "layout": asdict(self.layout),
            "zero": self.engine.stage,
            "recompute": self.recompute,
            "fits": self.fits,
            "memory": self.memory.table(),
            "time": self.time.table(),
            "images_per_s": self.images_per_s,
            "traffic": [asdict(m) for m in step_traffic(self.config, self.layout, self.engine)],
            "least": asdict(least_traffic(self.config, self.layout, self.engine)),
        }


def evaluate(config: Config, deepspeed_tree: dict, cluster: Cluster) -> Candidate:
    """The cost as configured.  UserError where it does not resolve on so many ranks."""
    layout, engine = resolve_layout(config, cluster.ranks), engine_facts(deepspeed_tree)
    check_shards(deepspeed_tree, config, cluster.ranks)
    layout = over_hosts(layout, config.parallel.exchange, [cluster.per_node])
    return Candidate(
        config,
        layout,
        engine,
        rank_memory(config, layout, engine),
        step_time(config, layout, engine, cluster.hardware, cluster.per_node),
        cluster.hardware.usable_bytes,
    )


def fixed_pool(config: Config, ranks: int) -> Config:
    """With the pool as a number of samples: a word would mean another model in every layout.  As
    configured, or as near to that as so many ranks allow; UserError where nothing is.
    """
    if isinstance(config.moe.pool, int) or config.model.family == "dense":
        return config
    try:
        pool = resolve_layout(config, ranks).pool
    except UserError:
        ep = math.gcd(ranks, config.parallel.ep)
        near = replace(
            config,
            parallel=replace(config.parallel, ep=ep),
            train=replace(config.train, micro_batch=None, accumulation=None),
        )
        pool = resolve_layout(near, ranks).pool
    return override(config, [f"moe.pool={pool}"])


def candidates(
    config: Config, deepspeed_tree: dict, cluster: Cluster, pins: Pins = Pins()
) -> list[Candidate]:
    """Every layout of the run on the cluster that keeps its meaning (batch, pool), best first:
    those that fit by predicted time, then the others by how little is missing.
    """
    zero_block = deepspeed_tree.get("zero_optimization") or {}
    bf16 = bool((deepspeed_tree.get("bf16") or {}).get("enabled"))
    experts = 1 if config.model.family == "dense" else config.moe.experts
    found = {}
    for overlap, shard, ep, zero, recompute, micro in product(
        _choices(pins.overlap, ("none", "halves")),
        _choices(pins.shard or zero_block.get(MICS), (None, _WHOLE_NODES)[: cluster.nodes]),
        _choices(pins.ep, _divisors(experts)),
        _choices(pins.zero, range(1 if bf16 else 0, 4)),
        _choices(pins.recompute, RECOMPUTE),
        _choices(pins.micro_batch, _divisors(config.train.batch // cluster.ranks)),
    ):
        changed = replace(
            config,
            parallel=replace(config.parallel, ep=ep, recompute=recompute, overlap=overlap),
            train=replace(config.train, micro_batch=micro, accumulation=None),
        )
        block = {**zero_block, "stage": zero}
        if shard is not None:
            block[MICS] = math.lcm(ep, cluster.per_node) if shard == _WHOLE_NODES else shard
        tree = {**deepspeed_tree, "zero_optimization": block}
        if experts % ep or (ep == 1 and overlap == "halves"):
            continue  # no such shares; no rows travel
        try:
            check_deepspeed(tree, changed)
            candidate = evaluate(changed, tree, cluster)
        except UserError:
            continue  # sizes that do not divide, or what no run takes at this stage
        if candidate.layout.per_host and config.parallel.exchange == "auto":  # or the other form
            directly = replace(changed, parallel=replace(changed.parallel, exchange="direct"))
            other = evaluate(directly, tree, cluster)
            candidate = min(candidate, other, key=lambda c: (not c.fits, c.time.total))
        found[candidate.pins] = candidate
    return sorted(
        found.values(),
        key=lambda c: (not c.fits, c.time.total if c.fits else c.memory.peak, c.memory.peak),
    )


def _choices(pinned: Any, free: Iterable[Any]) -> list[Any]:
    return list(free) if pinned is None else [pinned]


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def reasons(candidate: Candidate, best: Candidate) -> str:
    """In a few words: what a layout costs more than the best, or what fills its memory."""
    time, left = candidate.time, (candidate.usable - candidate.memory.peak) / GIB
    if not candidate.fits:
        return f"{-left:.1f} GiB too much; most of it: {largest_parts(candidate.memory)}"
    phases = time.phases()
    if candidate is best:
        shares = {name: value / time.total for name, value in phases.items()}
        parts = [f"{name} {100 * share:.0f} %" for name, share in shares.items() if share > 0.01]
        return f"{', '.join(parts)}; {left:.1f} GiB to spare"
    more = {name: value - best.time.phases()[name] for name, value in phases.items()}
    more = {name: value for name, value in more.items() if abs(value) >= 0.005 * best.time.total}
    texts = [f"{name} {1e3 * more[name]:+.1f} ms" for name in sorted(more, key=lambda n: -more[n])]
    return ", ".join(texts) or "as fast, within half a per cent"


def largest_parts(memory: Memory, count: int = 3) -> str:
    """The largest parts of a rank's memory."""
    largest = sorted(memory.parts().items(), key=lambda item: -item[1])[:count]
    return ", ".join(f"{name} {value / GIB:.1f}" for name, value in largest)
