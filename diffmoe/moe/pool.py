"""Exact choice over a token pool, and sums over it, inside a rank or across ranks.

Across ranks an expert's owner decides: scores and capacity logits travel to it, it takes the top K
of each pool and sends the choice back as a mask, so ranks cannot disagree.  When a pool spans
several EP groups the owners of one expert first share what they hold; each then decides from the
same bits, with unique keys, hence the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffmoe.layout import pairs_taken, rows_taken
from diffmoe.moe.routing import (
    Routing,
    choose_pairs,
    choose_tokens,
    equal_routing,
    mask_of,
    pool_thresholds,
)
from diffmoe.parallel.collectives import exchange_equal, gather_stack, sum_over
from diffmoe.parallel.groups import Group, ParallelGroups


def choose(
    scores_TE: Tensor,
    watched_TE: Tensor | None,
    pool_tokens: int,
    capacity: float,
    groups: ParallelGroups,
) -> tuple[Routing, Tensor | None]:
    """Every expert takes its K best tokens of each pool.  All ranks of the pool call it with as
    many tokens each.

    Returns the choice of this rank's tokens, and this rank's share of the sum over all pools of the
    thresholds [E] that would let K of the values ``watched_TE`` pass (None: nothing is watched).
    """
    K = rows_taken(pool_tokens, scores_TE.shape[1], capacity)
    if groups.pool.size > 1:
        return _choose_at_owner(scores_TE, watched_TE, pool_tokens, K, groups)
    tokens_EK = choose_tokens(scores_TE, pool_tokens, K)
    observed = (
        None if watched_TE is None else pool_thresholds(watched_TE, pool_tokens, K).sum(dim=0)
    )
    return equal_routing(tokens_EK, len(scores_TE)), observed


def _choose_at_owner(
    scores_TE: Tensor, watched_TE: Tensor | None, pool_tokens: int, K: int, groups: ParallelGroups
) -> tuple[Routing, Tensor | None]:
    T, E = scores_TE.shape
    ep, local, owners = groups.ep, E // groups.ep.size, groups.pool_owners
    facts = [scores_TE.detach()]
    if watched_TE is not None:
        facts.append(watched_TE.detach().to(scores_TE.dtype))
    # [owner, facts, T, e] -> [source, facts, T, e] -> [EP group of the pool, source, facts, T, e]
    by_owner = torch.stack(facts).view(len(facts), T, ep.size, local).permute(2, 0, 1, 3)
    held = gather_stack(exchange_equal(by_owner, ep)[0], owners)
    # Ranks are consecutive in a pool group, so (EP group, source, T) is the order of the samples.
    scores, *watched = held.permute(2, 0, 1, 3, 4).reshape(len(facts), -1, local)
    chosen_eK = choose_tokens(scores, pool_tokens, K)
    mask = mask_of(chosen_eK, len(scores)).view(owners.size, ep.size, T, local)
    mine = mask[owners.index]
    by_owner, passed = exchange_equal(mine.to(torch.uint8), ep, home=True)
    mask_TE = by_owner.permute(1, 0, 2).reshape(T, E).bool()
    observed = None
    if watched:
        observed = scores.new_zeros(ep.size, local)
        if owners.index == 0:  # the other owners observe the same pools
            observed[ep.index] = pool_thresholds(watched[0], pool_tokens, K).sum(dim=0)
        observed = observed.view(E)
    # An expert's tokens come from this EP group alone, so that their number is known where the pool
    # has no other.
    each = chosen_eK.shape[1] if owners.size == 1 else None
    return Routing(mask_TE, coming_rTe=mine, passing_rTe=passed, each=each), observed


def race(
    scores_TE: Tensor, pool_tokens: int, capacity: float, groups: ParallelGroups
) -> tuple[Routing, Tensor]:
    """Expert Race: the best (token, expert) pairs of each pool, ``capacity`` a token on average.
    All ranks of the pool call it with as many tokens each.

    Ranks of a pool share their scores; each then decides from the same bits, with unique keys,
    hence the same.  Returns the choice of this rank's tokens, and this rank's share of the sum over
    all pools of the lowest score taken [E], the same for every expert.
    """
    T, E = scores_TE.shape
    pool, ep = groups.pool, groups.ep
    held = gather_stack(scores_TE, pool).flatten(0, 1)
    K = pairs_taken(pool_tokens, capacity)
    mask, lowest = choose_pairs(held, pool_tokens, K)
    # The other ranks observe the same pools.
    observed = lowest.sum().expand(E) if pool.index == 0 else lowest.new_zeros(E)
    if pool.size == 1:
        return Routing(mask, rows=K * (T // pool_tokens)), observed
    by_rank = mask.view(pool.size, T, E)
    mine = by_rank[pool.index]
    first = pool.index - ep.index  # EP groups are consecutive ranks of the pool's
    pairs = by_rank[first : first + ep.size].unflatten(2, (ep.size, -1))
    passing = None
    if ep.levels is not None:
        inside = ep.levels.inside
        here = ep.index - inside.index
        passed = pairs[inside.index :: inside.size, :, here : here + inside.size]
        passing = passed.transpose(1, 2).flatten(0, 1)
    return Routing(mine, coming_rTe=pairs[:, :, ep.index], passing_rTe=passing), observed


def sum_by_pool(per_run: Tensor, run: int, pool: int, samples: int, group: Group) -> Tensor:
    """Sums over whole pools [pools of the group, …], the same on each of its ranks, of what has
    been summed over this rank's runs of ``run`` consecutive samples [runs, …], each in one pool.

    What ranks derive from it they all derive, and their gradients are averaged: so the gradient
    towards this rank's part counts as often as the group has ranks.
    """
    first = group.index * samples
    pool_of_run = (first + torch.arange(0, samples, run, device=per_run.device)) // pool
    pools = max(1, samples * group.size // pool)
    mine = per_run.new_zeros(pools, *per_run.shape[1:]).index_add(0, pool_of_run, per_run)
    if group.size == 1:
        return mine
    return sum_over(mine, group) + group.size * (mine - mine.detach())
