"""How a run would scale to many ranks: the best layout at every size, its efficiency, and what eats
the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from diffmoe.config import Config
from diffmoe.cost.hardware import Hardware
from diffmoe.cost.layouts import Candidate, Cluster, Pins, candidates, fixed_pool

MODES = ("strong", "weak")
WORDS = {
    "compute": "compute (small micro-batches, the optimizer's share)",
    "host": "launching (a micro-batch too small to keep the device busy)",
    "all_to_all": "all-to-all",
    "reduction": "ZeRO's reduction",
}
# Doubling the ranks must bring this factor of throughput, or scaling has stopped.
GAIN = 1.3


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
    config = fixed_pool(config, sizes[0])
    first: Point | None = None
    points = []
    for ranks in sizes:
        batch = config.train.batch * (ranks // sizes[0] if mode == "weak" else 1)
        nodes, here = -(-ranks // per_node), min(ranks, per_node)
        point = _point(config, deepspeed_tree, Cluster(nodes, here, hardware), batch, pins)
        if point.candidate is not None:
            first = first or point
            point = replace(point, efficiency=_efficiency(point, first), lost=_lost(point, first))
        points.append(point)
    return points


def _point(config: Config, tree: dict, cluster: Cluster, batch: int, pins: Pins) -> Point:
    ranks = cluster.ranks
    if batch < ranks:
        return Point(
            ranks,
            cluster.nodes,
            batch,
            problem=f"train.batch ({batch}) is less than one sample a rank",
        )
    sized = replace(config, train=replace(config.train, batch=batch))
    found = candidates(sized, tree, cluster, pins)
    if not found:
        return Point(
            ranks, cluster.nodes, batch, problem="no layout divides experts, batch and pool"
        )
    if not found[0].fits:
        return Point(
            ranks,
            cluster.nodes,
            batch,
            problem=f"nothing fits: {found[0].memory.peak / 2**30:.1f} GiB at least",
        )
    return Point(ranks, cluster.nodes, batch, found[0])


def _efficiency(point: Point, first: Point) -> float:
    assert point.candidate is not None and first.candidate is not None
    return (point.candidate.images_per_s / point.ranks) / (
        first.candidate.images_per_s / first.ranks
    )


def _lost(point: Point, first: Point) -> dict[str, float]:
    assert point.candidate is not None and first.candidate is not None
    ideal = (point.batch / point.ranks) / (first.batch / first.ranks)
    return {
        phase: getattr(point.candidate.time, phase) - ideal * getattr(first.candidate.time, phase)
        for phase in WORDS
    }


def stops(points: Sequence[Point]) -> tuple[int, str] | None:
    """(ranks, why) of the first size that brings less than GAIN times the throughput of half as
    many; None: it never stops.
    """
    before: Point | None = None
    for point in points:
        if point.candidate is None:
            return (point.ranks, point.problem) if before is not None else None
        if before is not None and before.candidate is not None:
            wanted = GAIN ** (
                (point.ranks / before.ranks - 1) if point.ranks <= 2 * before.ranks else 1
            )
            gain = point.candidate.images_per_s / before.candidate.images_per_s
            if gain < wanted:
                return point.ranks, f"{gain:.2f} times the images/s of {before.ranks}: {why(point)}"
        before = point
    return None


def why(point: Point) -> str:
    """The phase that loses most against ideal scaling, and whether bytes or latency make it."""
    assert point.candidate is not None and point.lost is not None
    time, layout = point.candidate.time, point.candidate.layout
    phase = max(point.lost, key=lambda name: point.lost[name])
    text = f"{WORDS[phase]} takes {100 * getattr(time, phase) / time.total:.0f} % of the step"
    if phase in ("all_to_all", "reduction"):
        across = (
            layout.ranks > point.ranks // point.nodes
            if phase == "reduction"
            else layout.ep > point.ranks // point.nodes
        )
        text += (
            f" ({'latency' if time.latency > 0.5 * (time.all_to_all + time.reduction) else 'bytes'}"
            + (", across nodes)" if across else ", inside nodes)")
        )
    if layout.micro_batch == 1:
        text += "; a rank has one sample, so nothing can be cut further"
    return text
