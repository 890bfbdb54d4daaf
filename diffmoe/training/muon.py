"""Muon: the momentum of a matrix, orthogonalized, is its update; everything else is AdamW's.

K. Jordan et al., *Muon: An optimizer for hidden layers in neural networks* (2024); the update's
scale of J. Liu et al., *Muon is scalable for LLM training* (arXiv 2502.16982, section 2.2), with
which learning rate and weight decay are AdamW's.  For a gradient G, momentum M and matrix W::

    M <- mu M + (1 - mu) G              an average, as Adam's; the scale does not matter
    U  = mu M + (1 - mu) G              Nesterov's
    W <- (1 - lr decay) W - lr 0.2 sqrt(max(rows, columns)) NewtonSchulz(U)

torch's own Muon takes 2-D tensors that are whole, and DeepSpeed's orthogonalizes before clipping;
both compute in half precision on a CPU too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffmoe.checkpoints.reader import FIRST_MOMENT
from diffmoe.models.matrices import MUON
from diffmoe.parallel.collectives import exchange_parts
from diffmoe.parallel.groups import Group

MOMENTUM, SCALE = 0.95, 0.2
STEPS, COEFFICIENTS, _SMALLEST = 5, (3.4445, -4.7750, 2.0315), 1e-7


def newton_schulz(stack: Tensor) -> Tensor:
    """Every matrix of [n, rows, columns] with its singular values brought to about 1 (0.7 to 1.2
    for all that are not tiny beside the largest).

    On CUDA in bf16, whose rounding is harmless beside that range.  On a CPU as given: the iteration
    multiplies small singular values, and so what rounding differs over ranks, by up to 3.4445^5 =
    485, which bf16's 2^-9 would not survive.
    """
    a, b, c = COEFFICIENTS
    x = stack.to(_working(stack))
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=_SMALLEST)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _working(values: Tensor) -> torch.dtype:
    return torch.bfloat16 if values.is_cuda else values.dtype


@dataclass(frozen=True)
class Held:
    """What this rank holds of a stack of matrices [n, rows, columns]: the flattened elements of
    ``span``, from ``offset`` on in ``flat``, one of the optimizer's parameters.
    """

    shape: tuple[int, int, int]
    span: range
    flat: Tensor
    offset: int

    def part(self, of: Tensor, elements: range) -> Tensor:
        """Some of them, in the flat parameter or what is congruent with it: its own memory."""
        first = self.offset + elements.start - self.span.start
        return of.detach().view(-1)[first : first + len(elements)]


@dataclass(frozen=True)
class _Cut:
    """A matrix of which other ranks hold a part: the elements of each rank, of the stack."""

    held: Held
    elements: range
    parts: list[range]


class Matrices:
    """Stacks of matrices of which the ranks of ``group`` hold a run of elements each, as ZeRO cuts
    them: shards of one size, one after the other.  Every rank of the group calls :meth:`update`.

    A matrix that lies on one rank is its business alone.  Of one that is cut every rank that has a
    part gets the rest from the others and orthogonalizes it too, so that no update travels back: at
    most two matrices a rank where shards are larger than a matrix.
    """

    def __init__(self, held: Sequence[Held], group: Group) -> None:
        self.group, self._cuts = group, list[_Cut]()
        self._whole: list[tuple[Held, range]] = []
        self._empty = held[0].flat.new_empty(0)
        for each in held:
            size, span, shard = each.shape[1] * each.shape[2], each.span, each.flat.numel()
            if not span:
                continue
            first, last = -(-span.start // size), span.stop // size
            if first < last:
                self._whole.append((each, range(first * size, last * size)))
            for number in sorted({span.start // size, (span.stop - 1) // size}):
                if not first <= number < last:
                    elements = range(number * size, (number + 1) * size)
                    begin = group.index * shard + each.offset - span.start  # of the stack
                    shards = (range(k * shard, (k + 1) * shard) for k in range(group.size))
                    parts = [_common(elements, s.start - begin, s.stop - begin) for s in shards]
                    self._cuts.append(_Cut(each, elements, parts))

    def update(self, lr: float) -> None:
        """W -= lr scale NewtonSchulz(U), with U where the gradients were."""
        for held, elements in self._whole:
            if held.flat.grad is not None:
                stack = held.part(held.flat.grad, elements).view(-1, *held.shape[1:])
                weights = held.part(held.flat, elements).view_as(stack)
                weights.add_(newton_schulz(stack), alpha=-lr * _scale(held))
        if self.group.size > 1:
            for cut, whole in zip(self._cuts, self._gathered(), strict=True):
                mine = cut.parts[self.group.index]
                update = newton_schulz(whole.view(1, *cut.held.shape[1:])).reshape(-1)
                update = update[mine.start - cut.elements.start :][: len(mine)]
                cut.held.part(cut.held.flat, mine).add_(update, alpha=-lr * _scale(cut.held))

    def _gathered(self) -> list[Tensor]:
        """The cut matrices, whole, in the precision in which they are orthogonalized."""
        me, working = self.group.index, _working(self._empty)
        own = [cut.held.part(_gradient(cut.held), cut.parts[me]).to(working) for cut in self._cuts]
        sent, sizes = [], []
        for rank in range(self.group.size):
            shared = [i for i, cut in enumerate(self._cuts) if cut.parts[rank] and rank != me]
            sent.append(torch.cat([self._empty.to(working), *(own[i] for i in shared)]))
            sizes.append([len(self._cuts[i].parts[rank]) for i in shared])
        arrived = exchange_parts(sent, [sum(each) for each in sizes], self.group)
        pieces = [iter(part.split(each)) for part, each in zip(arrived, sizes, strict=True)]
        found = []
        for cut, mine in zip(self._cuts, own, strict=True):
            ranks = [rank for rank, part in enumerate(cut.parts) if part]
            found.append(torch.cat([mine if r == me else next(pieces[r]) for r in ranks]))
        return found


def _gradient(held: Held) -> Tensor:
    assert held.flat.grad is not None  # a shard of ZeRO's has one where it steps
    return held.flat.grad


def _scale(held: Held) -> float:
    return SCALE * math.sqrt(max(held.shape[1:]))


def _common(elements: range, start: int, stop: int) -> range:
    return range(max(elements.start, start), min(elements.stop, stop))


def of_muon(optimizer: torch.optim.Optimizer) -> set[int]:
    """The ids of an optimizer's parameters that are Muon's, which have one moment."""
    groups = (group for group in optimizer.param_groups if group[MUON])
    return {id(parameter) for group in groups for parameter in group["params"]}


class Muon(torch.optim.AdamW):
    """Parameter groups that say ``muon`` hold nothing but matrices, whole or as ZeRO's flat shards:
    ``matrices`` says where in them, and until that is known nothing happens to them.
    """

    def __init__(self, groups: list[dict], **adam: Any) -> None:
        super().__init__(groups, **adam)
        self.matrices: list[Matrices] = []

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        groups = self.param_groups
        muons = [group for group in groups if group[MUON]]
        self.param_groups = [group for group in groups if not group[MUON]]
        try:
            super().step()
        finally:
            self.param_groups = groups
        if not self.matrices:
            return
        for group in muons:
            self._to_momentum(group)
        for matrices in self.matrices:
            matrices.update(groups[0]["lr"])

    def _to_momentum(self, group: dict) -> None:
        """Momentum and decay; U takes the gradients' place."""
        weights = [p for p in group["params"] if p.grad is not None]
        if not weights:
            return
        gradients = [p.grad for p in weights]
        if (scale := getattr(self, "grad_scale", None)) is not None:  # as torch's fused Adam has it
            torch._foreach_div_(gradients, scale)
        momenta = [self.state[p][FIRST_MOMENT] for p in weights]
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        torch._foreach_lerp_(gradients, momenta, MOMENTUM)
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
