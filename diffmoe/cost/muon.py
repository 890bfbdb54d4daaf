"""What Muon adds to a step: the products of Newton-Schulz, and pieces of matrices that shards cut.

Every boundary between two shards that lies inside a matrix has it orthogonalized once more and,
since each rank sends its piece to the matrix's other ranks, is one matrix of bytes.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate

from diffmoe.config import Config
from diffmoe.cost.memory import EngineFacts, Part, shard_numel, shared_parts
from diffmoe.layout import Layout

_STEPS = 5


def cut_matrices(part: Part, ranks: int, engine: EngineFacts) -> list[int]:
    """Elements of the matrix at each boundary between the shards of ``ranks`` that cuts one."""
    if engine.stage == 0:
        return []
    ends, shard = list(accumulate(part.numels)), shard_numel(part.numels, ranks, engine)
    boundaries = range(shard, min(ranks * shard, ends[-1]), shard)
    places = [(bisect_left(ends, boundary), boundary) for boundary in boundaries]
    return [part.numels[i] for i, boundary in places if ends[i] != boundary]


def newton_schulz_flops(config: Config, layout: Layout, engine: EngineFacts) -> float:
    """Of a rank's step, the mean over ranks.  With a = min(rows, columns) and b the other, of which
    one is the model's width, a matrix takes, five times, two products of 2 a² b and one of 2 a³.
    """
    total = 0.0
    for part in shared_parts(config, layout):
        if part.muon:
            ranks = part.ranks // engine.copies(layout) if engine.stage else 1
            for size in [*part.numels, *cut_matrices(part, ranks, engine)]:
                a, b = sorted((config.model.width, size // config.model.width))
                total += _STEPS * (4 * a * a * b + 2 * a**3) / ranks
    return total
