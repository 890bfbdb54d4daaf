"""Which pieces of which logical tensors a rank holds, and which of them it saves.  Nothing here is
collective.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffmoe.checkpoints.tensor_file import Piece
from diffmoe.training.engine import Engine


@dataclass(frozen=True)
class Place:
    """Where this rank holds a piece of a logical tensor: from element ``offset`` of its flattened
    shard number ``shard`` on.
    """

    piece: Piece
    shard: int
    offset: int

    def of(self, shards: list[Tensor]) -> Tensor:
        """The piece, flat, in any shards congruent with the masters: their own memory."""
        stop = self.offset + self.piece.stop - self.piece.start
        return shards[self.shard].detach().view(-1)[self.offset : stop]


def held(engine: Engine) -> list[Place]:
    """All fp32 state on this rank, in the order of the logical tensors, expert by expert."""
    return [place for index in range(len(engine.tensors)) for place in _places(engine, index)]


def owned(engine: Engine) -> list[Place]:
    """What of it this rank saves: over all ranks every element once.

    Ranks that hold the same (at ZeRO 0 all ranks, the expert-data-parallel ranks of experts; from 1
    on the replicas of a shard) take even runs of it, so that all write, and about as much.
    """
    places: list[Place] = []
    for experts in (False, True):
        group = engine.holders(experts)
        spans = {
            index: engine.span(index)
            for index, tensor in enumerate(engine.tensors)
            if (engine.expert_parallel and tensor.experts is not None) == experts
        }
        total, before = sum(span.count for span in spans.values()), 0
        first, last = (total * rank // group.size for rank in (group.index, group.index + 1))
        for index, span in spans.items():
            shift = span.start - before
            places += _places(engine, index, first + shift, last + shift)
            before += span.count
    return places


def filled(places: list[Place], shards: list[Tensor]) -> list[Place]:
    """Those that are in these shards: of a kind that not every tensor has, some are empty."""
    return [place for place in places if shards[place.shard].numel()]


def _places(engine: Engine, index: int, first: int = 0, last: int = sys.maxsize) -> Iterator[Place]:
    """What this rank holds of a parameter between two of its elements, cut where one expert ends
    and the next begins.
    """
    tensor, span = engine.tensors[index], engine.span(index)
    parameter: Any = tensor.parameter
    whole = tuple(parameter.ds_shape if engine.stage == 3 else parameter.shape)
    shape = whole if tensor.experts is None else whole[1:]
    each = math.prod(shape)
    for number, name in enumerate(tensor.piece_names()):
        start = max(span.start, number * each, first)
        stop = min(span.start + span.count, (number + 1) * each, last)
        if start < stop:
            piece = Piece(name, shape, start - number * each, stop - number * each)
            yield Place(piece, span.shard, span.offset + start - span.start)
