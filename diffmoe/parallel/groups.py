"""The rank grid as pure functions, and the process groups made from it.

Expert-parallel (EP) groups are consecutive ranks; an expert-data-parallel (EDP) group holds the
ranks that own the same experts.  A pool group is the smallest set of consecutive ranks that holds
whole pools and whole EP groups; inside it the pool-owner groups are the ranks that own the same
experts.

An EP group over hosts may exchange over two levels: ``across`` hosts, with the rank of the same
place on each, and ``inside`` its own host.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property

import torch.distributed as dist

from diffmoe.parallel.trace import Trace

# Names by which a count tells the two levels of an exchange apart.
ACROSS, INSIDE = "ep across", "ep inside"


@dataclass(frozen=True)
class Group:
    """Some ranks and this rank's place among them.

    ``trace`` is where this rank's collectives leave a note; the groups of a grid share one.
    ``existing``: torch's handle, if it was made by somebody else.  ``name`` is for torch's log;
    ``timeout`` is that of collectives.
    """

    ranks: tuple[int, ...]
    index: int
    existing: dist.ProcessGroup | None = None
    trace: Trace = field(default_factory=Trace, compare=False, repr=False)
    name: str = ""
    timeout: timedelta | None = None
    levels: Levels | None = field(default=None, compare=False, repr=False)

    @property
    def size(self) -> int:
        return len(self.ranks)

    @cached_property
    def handle(self) -> dist.ProcessGroup:
        """torch's handle, created where it is first asked for, at the same place on all ranks of
        the world: only members take part, but where a device is bound NCCL splits the world's
        communicator and waits for everybody.  Every rank is in exactly one group of a grid, so each
        makes one, and they are one split.
        """
        if self.existing is not None:
            return self.existing
        return dist.new_group(
            list(self.ranks),
            timeout=self.timeout,
            use_local_synchronization=True,
            group_desc=self.name,
        )


@dataclass(frozen=True)
class Levels:
    """The two of a group whose ranks are ``across.size`` hosts times ``inside.size`` consecutive
    ranks.
    """

    across: Group
    inside: Group


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


@dataclass(frozen=True)
class ShardGroups:
    """Who shares one copy of the optimizer's state: the ranks of ``dense`` that of what all ranks
    train, the ranks of ``experts``, among them, that of this rank's experts.  ``replicas``: the
    ranks that hold the same shards of both as this one.
    """

    dense: Group
    experts: Group
    replicas: Group


def consecutive_ranks(rank: int, size: int) -> tuple[int, ...]:
    """The run of ``size`` consecutive ranks that ``rank`` is in (EP groups, pool groups)."""
    start = rank - rank % size
    return tuple(range(start, start + size))


def strided_ranks(rank: int, ep: int, span: int) -> tuple[int, ...]:
    """The ranks with ``rank``'s place in their EP group, within its run of ``span`` ranks.

    ``span`` = all ranks gives the EDP groups; ``span`` = ranks of a pool gives the pool owners."""
    start = rank - rank % span
    return tuple(range(start + rank % ep, start + span, ep))


def single_process() -> ParallelGroups:
    """The grid of one rank, without torch.distributed: every collective is a no-op."""
    one = Group((0,), 0)
    return ParallelGroups(one, one, one, one, one)


def build_groups(
    ep: int, pool_ranks: int, timeout: timedelta | None = None, per_host: int = 0
) -> ParallelGroups:
    """This rank's groups, after ``init_process_group``; torch's handles are made when they are
    used.

    ``pool_ranks`` is 1 (pools inside a rank) or a multiple of ``ep`` (see
    ``layout.resolve_layout``).  ``timeout`` is for their collectives; new groups do not take it
    from the world (None: torch's 30 minutes).  ``per_host``: consecutive ranks of an EP group on
    each of its hosts, where it exchanges over two levels; 0: directly.
    """
    world, rank, trace = dist.get_world_size(), dist.get_rank(), Trace()
    everybody = tuple(range(world))
    experts, levels = consecutive_ranks(rank, ep), None

    def new(name: str, ranks: tuple[int, ...], existing: dist.ProcessGroup | None = None) -> Group:
        over = levels if ranks == experts else None
        return Group(ranks, ranks.index(rank), existing, trace, name, timeout, over)

    if per_host:
        levels = Levels(
            across=new(ACROSS, strided_ranks(rank, per_host, ep)),
            inside=new(INSIDE, consecutive_ranks(rank, per_host)),
        )
    known = {everybody: new("world", everybody, dist.group.WORLD)}

    def group(name: str, ranks: tuple[int, ...]) -> Group:
        return known.setdefault(ranks, new(name, ranks))

    return ParallelGroups(
        world=known[everybody],
        ep=group("ep", experts),
        edp=group("edp", strided_ranks(rank, ep, world)),
        pool=group("pool", consecutive_ranks(rank, pool_ranks)),
        pool_owners=group("pool owners", strided_ranks(rank, ep, max(pool_ranks, ep))),
    )


def shard_groups(groups: ParallelGroups, size: int | None) -> ShardGroups:
    """The groups where runs of ``size`` ranks, whole EP groups, share a copy (None: all ranks do).

    They have communicators of their own: gradients travel while EP groups exchange rows."""
    world, rank = groups.world, groups.rank
    if size is None or size == world.size:
        return ShardGroups(world, groups.edp, Group((rank,), 0))

    def group(name: str, ranks: tuple[int, ...]) -> Group:
        return Group(ranks, ranks.index(rank), None, groups.trace, name, world.timeout)

    return ShardGroups(
        dense=group("shard", consecutive_ranks(rank, size)),
        experts=group("expert shard", strided_ranks(rank, groups.ep.size, size)),
        replicas=group("replicas", strided_ranks(rank, size, world.size)),
    )
