"""Muon: a matrix's update is its momentum, orthogonalized; everything else is AdamW's.

K. Jordan et al., *Muon: An optimizer for hidden layers in neural networks* (2024), with the scale
of J. Liu et al. (arXiv 2502.16982, section 2.2), by which learning rate and weight decay are
AdamW's.  For a gradient G, a momentum M and a matrix W::

    M <- mu M + (1 - mu) G              an average, as Adam's: its scale drops out
    U  = mu M + (1 - mu) G              Nesterov's
    W <- (1 - lr decay) W - lr 0.2 sqrt(max(rows, columns)) NewtonSchulz(U)

torch's Muon takes 2-D tensors only and DeepSpeed's orthogonalizes before gradients are clipped, and
both in half precision on a CPU too.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from diffmoe.checkpoints.reader import FIRST_MOMENT
from diffmoe.models.matrices import MUON
from diffmoe.parallel.collectives import exchange_parts
from diffmoe.parallel.groups import Group, ShardGroups

MOMENTUM, _SCALE = 0.95, 0.2
_STEPS, _COEFFICIENTS, _SMALLEST = 5, (3.4445, -4.7750, 2.0315), 1e-7

Stack = tuple[int, int, int]  # so many matrices of rows, columns


def newton_schulz(stack: Tensor) -> Tensor:
    """Each matrix of [n, rows, columns] with its singular values brought to between 0.68 and 1.21,
    but for those below 1/500 of its norm.

    Training in bf16 on a GPU does it in bf16, any other in fp32: small singular values are
    multiplied by up to 3.4445^5 = 485, and with them what rounding makes differ over ranks.
    """
    a, b, c = _COEFFICIENTS
    tall = stack.shape[1] > stack.shape[2]
    x = stack.mT if tall else stack
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=_SMALLEST)
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Matrices:
    """Stacks of matrices that lie one after the other in a flat buffer, of which each rank of
    ``group`` holds a shard, as ZeRO cuts it: all of one size, the last ones padded.

    Of the matrices that a shard's ends cut, the rest comes from the ranks beside it, and each of
    them orthogonalizes such a matrix: two a rank at most where a shard is longer than a matrix.
    """

    def __init__(
        self, stacks: list[Stack], shard: Tensor, group: Group, dtype: torch.dtype | None = None
    ) -> None:
        self.shard, self.group, size = shard, group, shard.numel()
        self._dtype = dtype or shard.dtype
        begins = accumulate((math.prod(stack) for stack in stacks), initial=0)
        self._stacks = list(zip(begins, stacks))
        bounds = [begin + i * r * c for begin, (n, r, c) in self._stacks for i in range(n)]
        bounds.append(total := sum(math.prod(stack) for stack in stacks))
        ends = [min(k * size, total) for k in range(group.size + 1)]
        self._shards = [range(*pair) for pair in pairwise(ends)]
        self._needed = [
            range(bounds[bisect_right(bounds, s.start) - 1], bounds[bisect_left(bounds, s.stop)])
            for s in self._shards
        ]

    def update(self, lr: float) -> None:
        """W -= lr scale NewtonSchulz(U), of U where the gradient was.  All ranks of the group."""
        if self.shard.grad is None:
            return
        mine, needed = (each[self.group.index] for each in (self._shards, self._needed))
        values, weights = self._whole(self.shard.grad.flatten()), self.shard.detach().view(-1)
        for begin, (n, rows, columns) in self._stacks:
            if found := _common(needed, range(begin, begin + n * rows * columns)):
                stack = _part(values, needed.start, found).view(-1, rows, columns)
                update, here = newton_schulz(stack).flatten(), _common(mine, found)
                step = -lr * _SCALE * math.sqrt(max(rows, columns))
                _part(weights, mine.start, here).add_(_part(update, found.start, here), alpha=step)

    def _whole(self, shard: Tensor) -> Tensor:
        """This rank's shard with what its cut matrices lack, in the precision of Newton-Schulz."""
        shard, me = shard.to(self._dtype), self.group.index
        if self.group.size == 1:
            return _part(shard, 0, self._shards[me])
        start = self._shards[me].start
        parts = [_part(shard, start, _common(self._shards[me], theirs)) for theirs in self._needed]
        sizes = [len(_common(theirs, self._needed[me])) for theirs in self._shards]
        own, parts[me], sizes[me] = parts[me], shard[:0], 0
        arrived = exchange_parts(parts, sizes, self.group)
        arrived[me] = own
        return torch.cat(arrived)


def _common(one: range, other: range) -> range:
    start = max(one.start, other.start)
    return range(start, max(start, min(one.stop, other.stop)))


def _part(values: Tensor, start: int, elements: range) -> Tensor:
    """Elements of the flat buffer, of values that begin with element ``start``."""
    return values[elements.start - start : elements.stop - start]


class Muon(torch.optim.AdamW):
    """AdamW, but for parameter groups that say under ``muon`` which :data:`Stack` s they are made
    of.  Nothing happens to these before :meth:`share`.
    """

    def __init__(self, groups: list[dict], **adam: Any) -> None:
        super().__init__(groups, **adam)
        self._matrices: list[Matrices] = []

    def share(self, sharding: ShardGroups | None, dtype: torch.dtype | None = None) -> None:
        """Who has shards of the groups' flat buffers; None: parameters are as they were given.
        ``dtype``: that of Newton-Schulz (default: of the shards).
        """
        for group in (each for each in self.param_groups if each[MUON]):
            if sharding is None:
                pairs = zip(group[MUON], group["params"], strict=True)
                self._matrices += [
                    Matrices([stack], p, Group((0,), 0), dtype) for stack, p in pairs
                ]
            else:
                ranks = sharding.experts if "moe" in group else sharding.dense
                self._matrices.append(Matrices(group[MUON], group["params"][0], ranks, dtype))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group[MUON]]
        try:
            super().step()
        finally:
            self.param_groups = groups
        rate, decay = groups[0]["lr"], groups[0]["weight_decay"]
        # DeepSpeed steps a group at a time at ZeRO 1 and 2: only that has gradients.
        weights = [each.shard for each in self._matrices if each.shard.grad is not None]
        if not weights:
            return
        gradients = [p.grad for p in weights if p.grad is not None]
        if (scale := getattr(self, "grad_scale", None)) is not None:  # as torch's fused Adam has it
            torch._foreach_div_(gradients, scale)
        momenta = [self.state[p][FIRST_MOMENT] for p in weights]
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        torch._foreach_lerp_(gradients, momenta, MOMENTUM)
        torch._foreach_mul_(weights, 1 - rate * decay)
        for matrices in self._matrices:
            matrices.update(rate)
