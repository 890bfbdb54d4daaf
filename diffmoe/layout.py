"""What follows from a configuration and a number of ranks: batch arithmetic, accumulation, the pool
in samples.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Iterable
from dataclasses import dataclass, replace
from itertools import groupby

from diffmoe.config import Config
from diffmoe.errors import UserError


@dataclass(frozen=True)
class Layout:
    """Numbers that depend on the number of ranks, resolved once and printed.

    ``pool`` is in samples; ``pool_ranks`` is the number of consecutive ranks that together hold
    whole pools (1: pools inside a rank; otherwise whole expert-parallel groups).  ``per_host``:
    ranks of an expert-parallel group on each of its hosts, where its exchange has two levels (0: it
    has one); see :func:`over_hosts`.
    """

    ranks: int
    ep: int
    batch: int
    micro_batch: int
    accumulation: int
    pool: int
    pool_ranks: int
    per_host: int = 0

    @property
    def pools(self) -> int:
        """Pools in the forward pass of all ranks together."""
        return self.micro_batch * self.ranks // self.pool


def resolve_layout(config: Config, ranks: int) -> Layout:
    """Batch arithmetic, pool and expert groups for ``ranks`` ranks.  Raises UserError naming both
    numbers.
    """
    train, ep = config.train, config.parallel.ep
    if ranks % ep:
        raise UserError(
            f"world size ({ranks}) must be divisible by parallel.ep ({ep}): start another number "
            "of "
            f"ranks, or say parallel.ep={math.gcd(ranks, ep)}"
        )
    micro, accumulation = train.micro_batch, train.accumulation
    if accumulation is None:
        per_pass = train.batch if micro is None else micro * ranks
        if train.batch % per_pass:
            what = f"train.micro_batch ({micro}) x ranks ({ranks})"
            raise UserError(f"train.batch ({train.batch}) must be divisible by {what}")
        accumulation = train.batch // per_pass
    if micro is None:
        if train.batch % (accumulation * ranks):
            what = f"ranks ({ranks}) x train.accumulation ({accumulation})"
            raise UserError(f"train.batch ({train.batch}) must be divisible by {what}")
        micro = train.batch // (accumulation * ranks)
    if micro * ranks * accumulation != train.batch:
        raise UserError(
            f"train.micro_batch ({micro}) x ranks ({ranks}) x train.accumulation ({accumulation}) "
            f"= {micro * ranks * accumulation} must equal train.batch ({train.batch})"
        )
    if config.parallel.overlap == "halves" and micro % 2:
        raise UserError(f"train.micro_batch ({micro}) must be even with parallel.overlap (halves)")
    pool = config.moe.pool
    if isinstance(pool, str):
        pool = {"rank": micro, "group": micro * ep, "global": micro * ranks}[pool]
    if config.model.family == "dense":
        pool = 1
    if (micro * ranks) % pool:
        raise UserError(
            f"moe.pool ({pool} samples) must divide the forward batch train.micro_batch ({micro}) "
            f"x ranks ({ranks}) = {micro * ranks}"
        )
    if config.model.family in ("ec", "diffmoe", "race"):
        tokens, experts, capacity = (
            pool * config.model.tokens,
            config.moe.experts,
            config.moe.capacity,
        )
        if min(rows_taken(tokens, experts, capacity), pairs_taken(tokens, capacity)) < 1:
            raise UserError(
                f"moe.pool ({pool} samples = {tokens} tokens) gives each of moe.experts "
                f"({experts}) less than one token at moe.capacity ({capacity})"
            )
    pool_ranks = _pool_ranks(pool, micro, ep)
    if config.moe.threshold_from is not None and pool_ranks > 1:
        raise UserError(
            f"moe.pool ({pool} samples) must divide train.micro_batch ({micro}) where thresholds "
            f"route in training (moe.threshold_from {config.moe.threshold_from}): they are "
            "observed inside a rank"
        )
    return Layout(ranks, ep, train.batch, micro, accumulation, pool, pool_ranks)


def over_hosts(layout: Layout, exchange: str, runs: Collection[int]) -> Layout:
    """The layout on hosts, which hold ``runs`` of consecutive ranks, with ``parallel.exchange`` as
    it is there.  Raises UserError for two levels where there are none.
    """
    if exchange == "direct":
        return layout
    per_host = max(runs)
    if min(runs) == per_host >= 2 and layout.ep > per_host and layout.ep % per_host == 0:
        return replace(layout, per_host=per_host)
    if exchange == "two_level":
        held = " or ".join(str(run) for run in sorted(set(runs)))
        raise UserError(
            "parallel.exchange (two_level) needs EP groups over several hosts, with equally many, "
            f"at least 2, consecutive ranks on each: parallel.ep is {layout.ep}, and hosts hold "
            f"{held} consecutive ranks"
        )
    return layout


def runs_of(hosts: Iterable[Hashable]) -> list[int]:
    """How many consecutive ranks share a host, from every rank's host."""
    return [len(list(run)) for _, run in groupby(hosts)]


def _pool_ranks(pool: int, micro: int, ep: int) -> int:
    if micro % pool == 0:
        return 1
    if (micro * ep) % pool == 0:
        return ep
    return math.lcm(pool // math.gcd(pool, micro), ep)


def rows_taken(pool_tokens: int, experts: int, capacity: float) -> int:
    """K = floor(pool tokens / experts x capacity), at most every token of the pool (paper, equation
    5).
    """
    return min(pool_tokens, int(pool_tokens * capacity / experts + 1e-9))


def pairs_taken(pool_tokens: int, capacity: float) -> int:
    """K of Expert Race: (token, expert) pairs of a pool, ``capacity`` a token on average."""
    return int(pool_tokens * capacity + 1e-9)
