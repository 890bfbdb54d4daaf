"""Communicators: how many there are in how many ranks, who makes them and when, and what is bound
to a device.
"""

from collections import Counter
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _process_group_color

from diffmoe.commands import common
from diffmoe.device import bound
from diffmoe.environment import RankEnvironment
from diffmoe.parallel import collectives, groups
from diffmoe.parallel.groups import build_groups, shard_groups
from diffmoe.parallel.spawn import Ranks
from diffmoe.parity import table
from diffmoe.parity.cases import Case
from launcher import probe

PATIENCE = timedelta(seconds=7)


def made_by(rank, world, ep, pool_ranks, monkeypatch, per_host=0):
    """(groups of a rank, the calls of new_group that using all of them takes)."""
    calls = []

    def new_group(ranks, **how):
        calls.append((tuple(ranks), how))
        return object()

    monkeypatch.setattr(
        groups,
        "dist",
        SimpleNamespace(
            get_world_size=lambda: world,
            get_rank=lambda: rank,
            group=SimpleNamespace(WORLD="world"),
            new_group=new_group,
        ),
    )
    grid = build_groups(ep, pool_ranks, PATIENCE, per_host)
    assert not calls, "nobody has asked yet"
    levels = grid.ep.levels
    both = (levels.across, levels.inside) if levels else ()
    for group in (grid.world, grid.ep, grid.edp, grid.pool, grid.pool_owners, *both):
        if group.size > 1:
            assert group.handle is group.handle
    return grid, calls


@pytest.mark.parametrize("world,ep,per_host", [(4, 4, 2), (16, 8, 4), (32, 16, 4)])
def test_the_groups_of_an_exchange_over_two_levels(world, ep, per_host, monkeypatch):
    for rank in range(world):
        grid, calls = made_by(rank, world, ep, 1, monkeypatch, per_host)
        across, inside = grid.ep.levels.across, grid.ep.levels.inside
        assert inside.ranks == tuple(r for r in range(world) if r // per_host == rank // per_host)
        assert across.ranks == tuple(r for r in grid.ep.ranks if r % per_host == rank % per_host)
        assert across.ranks[across.index] == inside.ranks[inside.index] == rank
        assert len(calls) <= 4
        assert build_groups(ep, 1, PATIENCE).ep.levels is None


@pytest.mark.parametrize("world", [8, 64, 1024])
@pytest.mark.parametrize(
    "ep,pool_ranks", [(1, 1), (1, 8), (2, 1), (8, 1), (8, 8), (8, "all"), (4, 8), (8, 16)]
)
def test_a_rank_makes_its_own_groups_and_no_more(world, ep, pool_ranks, monkeypatch):
    pool_ranks = world if pool_ranks == "all" else min(pool_ranks, world)
    made = [made_by(rank, world, ep, pool_ranks, monkeypatch)[1] for rank in range(world)]
    grids = list(zip(*made, strict=True))  # every rank makes as many, in one order
    assert len(grids) <= 4
    everywhere = set()
    for grid in grids:
        members = Counter(ranks for ranks, _ in grid)
        # Together they are the world, so that NCCL's one split of it, in which everybody takes
        # part, makes all of them.
        assert all(count == len(ranks) > 1 for ranks, count in members.items())
        assert sorted(rank for ranks in members for rank in ranks) == list(range(world))
        assert len({_process_group_color(list(ranks)) for ranks in members}) == len(members)
        assert all(rank in ranks for rank, (ranks, _) in enumerate(grid))
        assert not everywhere & members.keys(), "coinciding groups are one"
        everywhere |= members.keys()
    assert all(
        how["use_local_synchronization"] and how["timeout"] == PATIENCE
        for calls in made
        for _, how in calls
    )
    # The published layouts, EP 8 with pools in a rank, an EP group or all ranks: 137 groups in
    # 1,024 ranks.
    published = ep == 8 and pool_ranks in (1, ep, world)
    assert 1 + len(everywhere) <= (world // 8 + 9 if published else world)


@pytest.mark.parametrize("ep", [1, 2, 8])
def test_groups_that_share_a_copy_of_the_state(ep, monkeypatch):
    """In 64 ranks, 8 a node: shards inside a node, replicas the ranks of one number."""
    for rank in range(64):
        grid, _ = made_by(rank, 64, ep, 1, monkeypatch)
        found = shard_groups(grid, 8)
        node = tuple(range(rank // 8 * 8, rank // 8 * 8 + 8))
        assert found.dense.ranks == node
        assert found.experts.ranks == tuple(r for r in grid.edp.ranks if r in node)
        assert found.replicas.ranks == tuple(range(rank % 8, 64, 8))
        for group in (found.dense, found.experts, found.replicas):
            assert group.ranks[group.index] == rank and group.timeout == PATIENCE
        for whole in (None, 64):  # one group has no replicas and makes nothing anew
            every = shard_groups(grid, whole)
            assert (every.dense, every.experts) == (grid.world, grid.edp)
            assert every.replicas.size == 1


@pytest.fixture(scope="module")
def ranks():
    """Ranks by their number, started once."""
    with Ranks(1) as one, Ranks(2) as two, Ranks(4) as four:
        yield {1: one, 2: two, 4: four}


def made_in_training(case):
    """What the groups are for that a training step of the case made, and how many DeepSpeed
    made.
    """
    table._groups.cache_clear()  # cases of one grid share theirs
    before = set(dist.distributed_c10d._world.pg_map)
    training = table.start_training(case, 0, torch.device("cpu"))
    training.step(0)
    training.engine.engine.destroy()
    said = Counter(
        group.group_desc for group in dist.distributed_c10d._world.pg_map if group not in before
    )
    return said.pop("undefined", 0), said


@pytest.mark.full
@pytest.mark.parametrize(
    "world,ep,pool,variant,wanted,shard",
    [
        (4, 2, "rank", "diffmoe", ["ep", "shard", "expert shard", "replicas"], 2),
        (4, 1, "rank", "diffmoe", ["shard", "replicas"], 2),
        (1, 1, "global", "diffmoe", [], 0),
        (2, 1, "rank", "diffmoe", [], 0),
        (2, 1, "global", "tc", [], 0),
        (2, 2, "group", "diffmoe", ["edp"], 0),  # of one rank, whose handle DeepSpeed reads
        (4, 1, "8", "diffmoe", ["pool"], 0),  # its owners are the same ranks
        (4, 4, "group", "diffmoe", ["edp"], 0),
        (4, 2, "rank", "diffmoe", ["ep", "edp"], 0),
        (4, 2, "global", "tc", ["ep", "edp"], 0),
    ],
)
def test_training_makes_the_groups_that_it_uses(ranks, world, ep, pool, variant, wanted, shard):
    for deepspeeds, ours in ranks[world].run(
        made_in_training, Case(world, ep, 1, "none", 1, pool, 16, variant, shard=shard)
    ):
        assert ours == Counter(wanted) and deepspeeds <= 1  # DeepSpeed copies the world


def gathered(order):
    """The same collectives in groups that are first asked for in ``order``."""
    grid = build_groups(2, 1)
    return {
        name: collectives.gather_objects(dist.get_rank(), getattr(grid, name)) for name in order
    }


@pytest.mark.full
@pytest.mark.parametrize(
    "order", [["ep", "edp", "pool", "pool_owners"], ["pool_owners", "edp", "world", "ep"]]
)
def test_members_meet_in_whatever_order_groups_are_used(ranks, order):
    for rank, found in enumerate(ranks[4].run(gathered, order)):
        assert found["ep"] == [rank // 2 * 2, rank // 2 * 2 + 1] and found["edp"] == [
            rank % 2,
            rank % 2 + 2,
        ]
        assert found["pool_owners"] == [rank]


@pytest.mark.full
@pytest.mark.parametrize(
    "world,device,wanted",
    [(1, "cuda:0", None), (2, "cuda:1", "cuda:1"), (1, "cpu", None), (2, "cpu", None)],
)
@pytest.mark.parametrize("start", ["a run", "preflight"])
def test_one_rank_binds_no_device(start, world, device, wanted, monkeypatch):
    said = {}
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **how: said.update(how))
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(dist.HashStore(), 0, world)]))
    monkeypatch.setattr("diffmoe.device.local_device", lambda *_: torch.device(device))
    monkeypatch.setattr("diffmoe.commands.common.place", lambda *_: None)
    monkeypatch.setattr("diffmoe.device.check_own_gpu", lambda *_: None)
    monkeypatch.setattr(
        "diffmoe.device.share", lambda mine, name, store, rank, world: [mine] * world
    )
    monkeypatch.setattr(probe, "_store", lambda *_: dist.HashStore())
    monkeypatch.setattr(probe, "_roll_call", lambda *_: None)
    environment = RankEnvironment(0, world, 0, world, "torchrun", init_method="file:///nowhere")
    if start == "a run":
        common.join(environment)
    else:
        probe.meet(environment, torch.device(device), 1.0, "here")
    assert (
        said["device_id"] == (wanted and torch.device(wanted)) == bound(torch.device(device), world)
    )
