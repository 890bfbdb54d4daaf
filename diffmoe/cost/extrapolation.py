"""EP groups that span hosts, fewer and more nodes, and scaling to thousands of ranks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

from diffmoe.config import Config, override
from diffmoe.cost.hardware import Hardware
from diffmoe.cost.layouts import GIB, Candidate, Cluster, Pins, candidates, fixed_pool
from diffmoe.cost.memory import engine_facts
from diffmoe.cost.step_time import step_time
from diffmoe.errors import UserError
from diffmoe.layout import Layout, over_hosts, resolve_layout, runs_of

MODES = ("strong", "weak")
WORDS = {
    "compute": "compute (small micro-batches, the optimizer's share)",
    "host": "launch overhead (a micro-batch too small to keep the device busy)",
    "all_to_all": "all-to-all",
    "reduction": "ZeRO's reduction",
}
# Doubling the ranks must bring this factor of throughput, or scaling has stopped.
GAIN = 1.3
# Nobody is offered more than these.
MOST_NODES = 512
MOST_RANKS = 4096


def spanned(hosts: Sequence[Hashable], ep: int) -> tuple[int, int]:
    """(most hosts that one EP group of ``ep`` consecutive ranks is spread over, fewest ranks of one
    that share a host).  ``hosts``: every rank's.
    """
    groups = [Counter(hosts[start : start + ep]) for start in range(0, len(hosts), ep)]
    return max(map(len, groups)), min(min(group.values()) for group in groups)


def hosts_of(ranks: int, per_node: int) -> list[int]:
    """Every rank's host where ranks fill one after the other."""
    return [rank // per_node for rank in range(ranks)]


def spanning(
    config: Config,
    layout: Layout,
    deepspeed_tree: dict,
    hardware: Hardware,
    hosts: Sequence[Hashable],
) -> str | None:
    """A line about EP groups that span hosts, with their price on ``hardware``; else None.
    UserError where ``parallel.exchange`` cannot be there.
    """
    layout = over_hosts(layout, config.parallel.exchange, runs_of(hosts))
    touched, together = spanned(hosts, layout.ep)
    if touched == 1:
        return None
    per_node, engine = max(Counter(hosts).values()), engine_facts(deepspeed_tree)
    directly = replace(layout, per_host=0)
    time, apart, plain, inside = (
        step_time(config, each, engine, hardware, here)
        for each, here in (
            (layout, per_node),
            (layout, together),
            (directly, together),
            (directly, layout.ranks),
        )
    )
    step = time.total - time.all_to_all + apart.all_to_all
    text = (
        f"EP groups of {layout.ep} ranks span {touched} hosts: by the plan ({hardware.name}) "
        f"all-to-all takes {1e3 * apart.all_to_all:.1f} of {1e3 * step:.1f} ms a step, "
        f"{1e3 * inside.all_to_all:.1f} inside a host"
    )
    if layout.per_host:
        text += f"; it goes over two levels, directly it would take {1e3 * plain.all_to_all:.1f} ms"
    smaller = math.gcd(layout.ep, *Counter(hosts).values())
    if spanned(hosts, smaller)[0] > 1:
        return f"{text}; ranks of a host are not consecutive (srun --distribution=block)"
    try:
        other = replace(config, parallel=replace(config.parallel, ep=smaller))
        layout = resolve_layout(other, layout.ranks)
    except UserError:
        return text
    ms = 1e3 * step_time(other, layout, engine, hardware, per_node).total
    return f"{text}; with parallel.ep={smaller}, inside hosts, a step takes {ms:.1f} ms"


def node_counts(config: Config, cluster: Cluster, most_nodes: int = MOST_NODES) -> list[int]:
    """The cluster's nodes and more of them, where the batch divides by their ranks."""
    numbers = range(cluster.nodes, most_nodes + 1)
    return [n for n in numbers if config.train.batch % (n * cluster.per_node) == 0]


@dataclass(frozen=True)
class Nearest:
    """A layout that fits and the fewest changes to the question that lead to it, in words."""

    candidate: Candidate
    cluster: Cluster
    changes: tuple[str, ...]


def nearest_fit(config: Config, tree: dict, cluster: Cluster, pins: Pins) -> Nearest | None:
    """The nearest layout that fits: first on the same ranks with as few of the pins changed as
    possible (the quickest among equals), else on more nodes.  None when even MOST_NODES are not
    enough.
    """
    for nodes in node_counts(config, cluster):
        larger = replace(cluster, nodes=nodes)
        more = (f"nodes {cluster.nodes} -> {nodes}",) if nodes > cluster.nodes else ()
        fitting = [c for c in candidates(config, tree, larger) if c.fits]
        if fitting:
            best = min(fitting, key=lambda c: (len(c.changes(pins)), c.time.total))
            return Nearest(best, larger, more + best.changes(pins))
    return None


def fewer_nodes(
    config: Config, tree: dict, cluster: Cluster, seconds: float, pins: Pins = Pins()
) -> str | None:
    """A line where a step, here of ``seconds``, would be faster on fewer nodes; else None."""
    best = None
    for nodes in node_counts(config, replace(cluster, nodes=1), cluster.nodes - 1):
        for c in candidates(config, tree, replace(cluster, nodes=nodes), pins)[:1]:
            if c.fits and c.time.total < seconds and (not best or c.time.total < best[0]):
                best = c.time.total, nodes, c.label
    if not best:
        return None
    return (
        f"fewer nodes would be faster with train.batch {config.train.batch}: {1e3 * best[0]:.1f} ms"
        f" a step on {best[1]} ({best[2]}), {1e3 * seconds:.1f} on {cluster.nodes}"
    )


def larger_batches(
    config: Config, tree: dict, hardware: Hardware, per_node: int, pins: Pins
) -> list[str]:
    """Lines: how far the recipe's batch scales, and 4 and 16 times as large a one."""
    lines, stated = [], config.train.recipe_batch or config.train.batch
    for batch in (stated, 4 * stated, 16 * stated):
        sized = override(config, [f"train.batch={batch}", f"train.recipe_batch={stated}"])
        sizes = [per_node * 2**i for i in range(20) if per_node * 2**i <= min(batch, MOST_RANKS)]
        points = extrapolate(sized, tree, hardware, per_node, sizes, "strong", pins)
        stopped = stops(points)
        ends = stopped[0] if stopped else MOST_RANKS + 1
        good = [p for p in points if p.ranks < ends and p.candidate]
        if not good or good[-1].candidate is None:
            lines.append(f"batch {batch}: does not start on {per_node} GPUs")
            continue
        last, best = good[-1], good[-1].candidate
        lines.append(
            f"batch {batch}: up to {last.ranks} GPUs, {best.images_per_s:.0f} images/s, "
            f"{1e3 * best.time.total:.1f} ms a step, {100 * last.efficiency:.0f} % of "
            f"{good[0].ranks} GPUs' efficiency ({best.label})"
        )
    return lines


@dataclass(frozen=True)
class Point:
    """One size of cluster.  ``efficiency``: images per second and rank, relative to the first
    point.  ``lost``: seconds of a step beyond ideal scaling from the first point, by phase.
    ``problem``: why there is no layout (then nothing else holds).
    """

    ranks: int
    nodes: int
    batch: int
    candidate: Candidate | None = None
    efficiency: float = 0.0
    lost: dict[str, float] | None = None
    problem: str = ""


def extrapolate(
    config: Config,
    deepspeed_tree: dict,
    hardware: Hardware,
    per_node: int,
    sizes: Sequence[int],
    mode: str,
    pins: Pins = Pins(),
) -> list[Point]:
    """A point for every number of ranks in ``sizes``, ascending.

    strong: train.batch stays.  weak: train.batch grows with the ranks from the first size on, so
    that a rank's share stays.
    """
    config = fixed_pool(config, sizes[0]) if sizes else config
    first: Candidate | None = None
    points = []
    for ranks in sizes:
        batch = config.train.batch * (ranks // sizes[0] if mode == "weak" else 1)
        cluster = Cluster(-(-ranks // per_node), min(ranks, per_node), hardware)
        point = Point(ranks, cluster.nodes, batch)
        sized = replace(config, train=replace(config.train, batch=batch))
        found = candidates(sized, deepspeed_tree, cluster, pins) if batch >= ranks else []
        if batch < ranks:
            problem = f"train.batch ({batch}) is less than one sample a rank"
            point = replace(point, problem=problem)
        elif not found:
            point = replace(point, problem="no layout divides experts, batch and pool")
        elif not found[0].fits:
            problem = f"nothing fits: {found[0].memory.peak / GIB:.1f} GiB at least"
            point = replace(point, problem=problem)
        else:
            best = found[0]
            first = first or best
            of, to = first.layout, best.layout  # samples a rank
            ideal = to.batch * of.ranks / (to.ranks * of.batch)
            lost = {p: getattr(best.time, p) - ideal * getattr(first.time, p) for p in WORDS}
            efficiency = ideal * first.time.total / best.time.total
            point = replace(point, candidate=best, efficiency=efficiency, lost=lost)
        points.append(point)
    return points


def stops(points: Sequence[Point]) -> tuple[int, str] | None:
    """(ranks, why) of the first size that brings less than GAIN for twice the ranks, or None."""
    for before, point in zip(points, points[1:]):
        if before.candidate is None:
            continue
        if point.candidate is None:
            return point.ranks, point.problem
        wanted = GAIN ** min(1, point.ranks / before.ranks - 1)
        gain = point.candidate.images_per_s / before.candidate.images_per_s
        if gain < wanted:
            reason = _why(point, point.candidate)
            return point.ranks, f"{gain:.2f} times the images/s of {before.ranks}: {reason}"
    return None


def _why(point: Point, best: Candidate) -> str:
    """The phase that loses most against ideal scaling, and whether bytes or latency make it."""
    time, lost = best.time, point.lost or {}
    phase = max(lost, key=lambda name: lost[name])
    text = f"{WORDS[phase]} takes {100 * getattr(time, phase) / time.total:.0f} % of the step"
    if phase in ("all_to_all", "reduction"):
        slow = time.latency > 0.5 * (time.whole_all_to_all + time.whole_reduction)
        group = best.layout.ep if phase == "all_to_all" else best.layout.ranks
        across = "across nodes" if group > point.ranks // point.nodes else "inside nodes"
        text += f" ({'latency' if slow else 'bytes'}, {across})"
    if best.layout.micro_batch == 1:
        text += "; a rank has one sample, so nothing can be cut further"
    return text
