"""Layouts of a run on a number of ranks: what each costs, which fit, and in which order one would
take them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from diffmoe.config import Config, override
from diffmoe.cost.hardware import Hardware
from diffmoe.cost.memory import EngineFacts, Memory, engine_facts, rank_memory
from diffmoe.cost.step_time import StepTime, step_time
from diffmoe.cost.traffic import least_traffic, step_traffic
from diffmoe.errors import UserError
from diffmoe.layout import Layout, resolve_layout

RECOMPUTE = ("none", "selective", "block")
GIB = 2**30
# Nobody is offered more than these.
MOST_NODES = 512


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
    """What the user insists on; None: free."""

    ep: int | None = None
    zero: int | None = None
    recompute: str | None = None
    micro_batch: int | None = None


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
    def label(self) -> str:
        return (
            f"EP {self.layout.ep}, ZeRO {self.engine.stage}, recompute {self.config.parallel.recompute}, micro-batch "
            f"{self.layout.micro_batch} x {self.layout.accumulation}"
        )

    def table(self) -> dict:
        """All numbers as plain dicts, for JSON."""
        return {
            "layout": asdict(self.layout),
            "zero": self.engine.stage,
            "recompute": self.config.parallel.recompute,
            "fits": self.fits,
            "memory": self.memory.table(),
            "time": self.time.table(),
            "images_per_s": self.images_per_s,
            "traffic": [asdict(m) for m in step_traffic(self.config, self.layout, self.engine)],
            "least": asdict(least_traffic(self.config, self.layout, self.engine)),
        }

    @property
    def knobs(self) -> tuple[int, int, str, int]:
        return (
            self.layout.ep,
            self.engine.stage,
            self.config.parallel.recompute,
            self.layout.micro_batch,
        )


def evaluate(config: Config, deepspeed_tree: dict, cluster: Cluster) -> Candidate:
    """The cost of exactly this configuration.  Raises UserError when it does not resolve on so many
    ranks.
    """
    layout, engine = resolve_layout(config, cluster.ranks), engine_facts(deepspeed_tree)
    return Candidate(
        config,
        layout,
        engine,
        rank_memory(config, layout, engine),
        step_time(config, layout, engine, cluster.hardware, cluster.per_node),
        cluster.hardware.usable_bytes,
    )


def fixed_pool(config: Config, ranks: int) -> Config:
    """``config`` with its pool as a number of samples: a word would mean another model in every
    layout.
    """
    if isinstance(config.moe.pool, int) or config.model.family == "dense":
        return config
    return override(config, [f"moe.pool={resolve_layout(config, ranks).pool}"])


def candidates(
    config: Config, deepspeed_tree: dict, cluster: Cluster, pins: Pins = Pins()
) -> list[Candidate]:
    """Every layout of the run on the cluster that keeps its meaning (batch, pool), best first:
    those that fit by predicted time, then the others by how little is missing.
    """
    found = {}
    for changed, tree in _variants(config, deepspeed_tree, cluster, pins):
        try:
            candidate = evaluate(changed, tree, cluster)
        except UserError:
            continue  # sizes that do not divide
        found[candidate.knobs] = candidate
    return sorted(
        found.values(),
        key=lambda c: (not c.fits, c.time.total if c.fits else c.memory.peak, c.memory.peak),
    )


def _variants(
    config: Config, tree: dict, cluster: Cluster, pins: Pins
) -> Iterator[tuple[Config, dict]]:
    zero_block = tree.get("zero_optimization") or {}
    bf16 = bool((tree.get("bf16") or {}).get("enabled"))
    per_rank = config.train.batch // cluster.ranks
    for ep in _choices(
        pins.ep, _divisors(config.moe.experts) if config.model.family != "dense" else [1]
    ):
        for zero in _choices(pins.zero, [1, 2, 3] if bf16 else [0, 1, 2, 3]):
            for recompute in _choices(pins.recompute, RECOMPUTE):
                for micro in _choices(pins.micro_batch, _divisors(per_rank)):
                    changed = replace(
                        config,
                        parallel=replace(config.parallel, ep=ep, recompute=recompute),
                        train=replace(config.train, micro_batch=micro, accumulation=None),
                    )
                    yield changed, {**tree, "zero_optimization": {**zero_block, "stage": zero}}


def _choices(pinned, free) -> list:
    return list(free) if pinned is None else [pinned]


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


# -------------------------------------------------------------------------------------------------
# reasons


def reasons(candidate: Candidate, best: Candidate) -> str:
    """Why a layout stands where it stands, in a few words: what it costs more than the best, or
    what fills its memory.
    """
    if not candidate.fits:
        missing = candidate.memory.peak - candidate.usable
        return f"{missing / GIB:.1f} GiB too much; most of it: {largest_parts(candidate.memory)}"
    if candidate is best:
        return f"{_dominant(candidate.time)}; {(candidate.usable - candidate.memory.peak) / GIB:.1f} GiB to spare"
    parts = []
    for name in ("compute", "host", "all_to_all", "reduction"):
        more = getattr(candidate.time, name) - getattr(best.time, name)
        if abs(more) >= 0.005 * best.time.total:
            parts.append((more, f"{name.replace('_', '-')} {1e3 * more:+.1f} ms"))
    return (
        ", ".join(text for _, text in sorted(parts, reverse=True))
        or "as fast, within half a per cent"
    )


def largest_parts(memory: Memory, count: int = 3) -> str:
    """The largest parts of a rank's memory."""
    parts = {
        name: value for name, value in memory.table().items() if name not in ("static", "peak")
    }
    largest = sorted(parts.items(), key=lambda item: -item[1])[:count]
    return ", ".join(f"{name.replace('_', ' ')} {value / GIB:.1f}" for name, value in largest)


def _dominant(time: StepTime) -> str:
    shares = {
        "compute": time.compute,
        "launching": time.host,
        "all-to-all": time.all_to_all,
        "reduction": time.reduction,
    }
    return ", ".join(
        f"{name} {100 * value / time.total:.0f} %"
        for name, value in shares.items()
        if value > 0.01 * time.total
    )


# -------------------------------------------------------------------------------------------
# nothing fits


@dataclass(frozen=True)
class Nearest:
    """A layout that fits and the fewest changes to the question that lead to it, in words."""

    candidate: Candidate
    cluster: Cluster
    changes: tuple[str, ...]


def nearest_fit(
    config: Config, tree: dict, cluster: Cluster, pins: Pins, most_nodes: int = MOST_NODES
) -> Nearest | None:
    """The nearest layout that fits: first on the same ranks with as few of the pins changed as
    possible (the quickest among equals), else on more nodes.  None when even ``most_nodes`` are not
    enough.
    """
    for nodes in node_counts(config, cluster, most_nodes):
        larger = replace(cluster, nodes=nodes)
        more = (f"nodes {cluster.nodes} -> {nodes}",) if nodes > cluster.nodes else ()
        fitting = [c for c in candidates(config, tree, larger) if c.fits]
        if fitting:
            best = min(fitting, key=lambda c: (len(_changes(c, pins)), c.time.total))
            return Nearest(best, larger, more + _changes(best, pins))
    return None


def fewer_nodes(
    config: Config, tree: dict, cluster: Cluster, seconds: float, pins: Pins = Pins()
) -> str | None:
    """A line where a step, which takes ``seconds`` on the cluster, would be faster on fewer of its
    nodes; else None.
    """
    counts = node_counts(config, replace(cluster, nodes=1), cluster.nodes - 1)
    best = [
        (nodes, c)
        for nodes in counts
        for c in candidates(config, tree, replace(cluster, nodes=nodes), pins)[:1]
        if c.fits
    ]
    if not best:
        return None
    nodes, fastest = min(best, key=lambda entry: entry[1].time.total)
    if fastest.time.total >= seconds:
        return None
    return (
        f"fewer nodes would be faster with train.batch {config.train.batch}: {1e3 * fastest.time.total:.1f} ms a "
        f"step on {nodes} ({fastest.label}), {1e3 * seconds:.1f} on {cluster.nodes}"
    )


def node_counts(config: Config, cluster: Cluster, most_nodes: int) -> list[int]:
    """The cluster's nodes and more of them, where the batch divides by their ranks."""
    return [
        nodes
        for nodes in range(cluster.nodes, most_nodes + 1)
        if config.train.batch % (nodes * cluster.per_node) == 0
    ]


def _changes(candidate: Candidate, pins: Pins) -> tuple[str, ...]:
    ep, zero, recompute, micro = candidate.knobs
    pairs = (
        ("EP", pins.ep, ep),
        ("ZeRO", pins.zero, zero),
        ("recompute", pins.recompute, recompute),
        ("micro-batch", pins.micro_batch, micro),
    )
    return tuple(
        f"{name} {asked} -> {found}"
        for name, asked, found in pairs
        if asked is not None and asked != found
    )
