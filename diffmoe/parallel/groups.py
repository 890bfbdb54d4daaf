"""The rank grid as pure functions, and the process groups made from it.

Expert-parallel (EP) groups are consecutive ranks; an expert-data-parallel (EDP) group holds the ranks that own the same
experts.  A pool group is the smallest set of consecutive ranks that holds whole pools and whole EP groups; inside it the
pool-owner groups are the ranks that own the same experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from typing import Optional

import torch.distributed as dist

from diffmoe.parallel.trace import Trace


@dataclass(frozen=True)
class Group:
    """Some ranks, this rank's place among them, and torch's handle (None when there is no process group at all).

    ``trace`` is where this rank's collectives leave a note; the groups of a grid share one."""

    ranks: tuple[int, ...]
    index: int
    handle: Optional[dist.ProcessGroup] = None
    trace: Trace = field(default_factory=Trace, compare=False, repr=False)

    @property
    def size(self) -> int:
        return len(self.ranks)


@dataclass(frozen=True)
class ParallelGroups:
    """Every group that this rank is in.  Built once, passed down, never global."""

    world: Group
    ep: Group
    edp: Group
    pool: Group
    pool_owners: Group

    @property
    def rank(self) -> int:
        return self.world.index

    @property
    def trace(self) -> Trace:
        return self.world.trace


def consecutive_groups(world: int, size: int) -> list[tuple[int, ...]]:
    """``world / size`` groups of ``size`` consecutive ranks (EP groups, pool groups)."""
    return [tuple(range(start, start + size)) for start in range(0, world, size)]


def strided_groups(world: int, ep: int, span: int) -> list[tuple[int, ...]]:
    """The ranks with equal place in their EP group, within each run of ``span`` ranks.

    ``span = world`` gives the EDP groups; ``span`` = ranks of a pool gives the pool owners."""
    return [tuple(range(start + place, start + span, ep)) for start in range(0, world, span) for place in range(ep)]


def single_process() -> ParallelGroups:
    """The grid of one rank, without torch.distributed: every collective is a no-op."""
    one = Group((0,), 0)
    return ParallelGroups(one, one, one, one, one)


def build_groups(ep: int, pool_ranks: int, timeout: timedelta | None = None) -> ParallelGroups:
    """Creates the groups.  Every rank calls it, in the same order, after ``init_process_group``.

    ``pool_ranks`` is 1 (pools inside a rank) or a multiple of ``ep`` (see ``layout.resolve_layout``).  ``timeout`` is for
    their collectives; new groups do not take it from the world (None: torch's 30 minutes)."""
    world, rank = dist.get_world_size(), dist.get_rank()
    made: dict[tuple[int, ...], dist.ProcessGroup] = {tuple(range(world)): dist.group.WORLD}
    trace = Trace()

    def mine(grid: list[tuple[int, ...]]) -> Group:
        for ranks in grid:
            if ranks not in made:
                made[ranks] = dist.new_group(list(ranks), timeout=timeout)
        ranks = next(ranks for ranks in grid if rank in ranks)
        return Group(ranks, ranks.index(rank), made[ranks], trace)

    span = max(pool_ranks, ep)
    return ParallelGroups(
        world=mine(consecutive_groups(world, world)),
        ep=mine(consecutive_groups(world, ep)),
        edp=mine(strided_groups(world, ep, world)),
        pool=mine(consecutive_groups(world, pool_ranks)),
        pool_owners=mine(strided_groups(world, ep, span)),
    )
