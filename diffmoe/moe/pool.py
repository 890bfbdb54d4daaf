"""Exact expert choice over a token pool, inside a rank or across ranks.

Across ranks an expert's owner decides: scores and capacity logits travel to it, it takes the top K
of each pool and sends the choice back as a mask, so ranks cannot disagree.  When a pool spans
several EP groups the owners of one expert first share what they hold; each then decides from the
same bits, with unique keys, hence the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffmoe.layout import rows_taken
from diffmoe.moe.routing import Routing, choose_tokens, equal_routing, mask_of, pool_thresholds
from diffmoe.parallel.collectives import exchange_equal, gather_stack
from diffmoe.parallel.groups import ParallelGroups


def choose(
    scores_TE: Tensor,
    logits_TE: Tensor | None,
    pool_tokens: int,
    capacity: float,
    groups: ParallelGroups,
) -> tuple[Routing, Tensor | None]:
    """Every expert takes its K best tokens of each pool.  All ranks of the pool call it with as
    many tokens each.

    Returns the choice of this rank's tokens, and this rank's share of the sum over all pools of the
    thresholds observed [E] (None without a capacity predictor).
    """
    K = rows_taken(pool_tokens, scores_TE.shape[1], capacity)
    if groups.pool.size > 1:
        return _choose_at_owner(scores_TE, logits_TE, pool_tokens, K, groups)
    tokens_EK = choose_tokens(scores_TE, pool_tokens, K)
    observed = None if logits_TE is None else pool_thresholds(logits_TE, pool_tokens, K).sum(dim=0)
    return equal_routing(tokens_EK, len(scores_TE)), observed


def _choose_at_owner(
    scores_TE: Tensor, logits_TE: Tensor | None, pool_tokens: int, K: int, groups: ParallelGroups
) -> tuple[Routing, Tensor | None]:
    T, E = scores_TE.shape
    ep, local, owners = groups.ep, E // groups.ep.size, groups.pool_owners
    facts = [scores_TE.detach()]
    if logits_TE is not None:
        facts.append(logits_TE.detach().to(scores_TE.dtype))
    # [owner, facts, T, e] -> [source, facts, T, e] -> [EP group of the pool, source, facts, T, e]
    by_owner = torch.stack(facts).view(len(facts), T, ep.size, local).permute(2, 0, 1, 3)
    held = gather_stack(exchange_equal(by_owner, ep), owners)
    # Ranks are consecutive in a pool group, so (EP group, source, T) is the order of the samples.
    scores, *logits = held.permute(2, 0, 1, 3, 4).reshape(len(facts), -1, local)
    chosen_eK = choose_tokens(scores, pool_tokens, K)
    mask = mask_of(chosen_eK, len(scores)).view(owners.size, ep.size, T, local)
    mine = mask[owners.index]
    mask_TE = exchange_equal(mine.to(torch.uint8), ep).permute(1, 0, 2).reshape(T, E).bool()
    observed = None
    if logits:
        observed = scores.new_zeros(ep.size, local)
        if owners.index == 0:  # the other owners observe the same pools
            observed[ep.index] = pool_thresholds(logits[0], pool_tokens, K).sum(dim=0)
        observed = observed.view(E)
    # An expert's tokens come from this EP group alone, so that their number is known where the pool
    # has no other.
    each = chosen_eK.shape[1] if owners.size == 1 else None
    return Routing(mask_TE, received_re=mine.sum(dim=1), each=each), observed
