"""What Muon adds to a step: the products of Newton-Schulz, and pieces of matrices that shards cut.

A matrix of r x c with a = min(r, c) and b = max(r, c) takes, five times, X Xᵀ and B X of 2 a² b
FLOPs and a square of 2 a³.  Shards are consecutive, so a matrix that lies on k ranks has k - 1 of
their k ranks' boundaries inside: each boundary costs one more orthogonalization of the matrix that
it cuts and, since every rank sends its piece to the k - 1 others, one matrix of bytes.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate

from diffmoe.config import Config
from diffmoe.cost.memory import EngineFacts, shard_numel, shared_parts
from diffmoe.cost.parameters import expert_width, rank_parameters
from diffmoe.layout import Layout
from diffmoe.models.matrices import is_matrix

_STEPS = 5


def matrix_sizes(config: Config, ep: int, experts: bool) -> list[int]:
    """Elements of each of a rank's matrices, in their order: of experts shared out, or the rest."""
    width, found = config.model.width, list[int]()
    for p in rank_parameters(config.model, config.moe, ep):
        if is_matrix(p.name) and (ep > 1 and p.expert) == experts:
            size = p.numel
            if p.expert:
                size = width * expert_width(config.model, config.moe)
            elif ".attn." in p.name:  # q's, k's and v's are three
                size = width * width
            found += [size] * (p.numel // size)
    return found


def cut_matrices(config: Config, ep: int, experts: bool, ranks: int, shard: int) -> list[int]:
    """Elements of the matrix that each boundary between ``ranks`` shards of ``shard`` elements
    cuts.
    """
    sizes = matrix_sizes(config, ep, experts)
    ends, found = list(accumulate(sizes)), []
    for boundary in range(shard, min(ranks * shard, ends[-1]), shard):
        number = bisect_left(ends, boundary)
        if ends[number] != boundary:
            found.append(sizes[number])
    return found


def newton_schulz_flops(config: Config, layout: Layout, engine: EngineFacts) -> float:
    """Of a rank's step, the mean over ranks; 0 without Muon."""
    total = 0.0
    for part in shared_parts(config, layout):
        if part.muon:
            ranks = part.ranks // engine.copies(layout) if engine.stage else 1
            shard = shard_numel(part.numels, ranks, engine)
            sizes = matrix_sizes(config, layout.ep, part.experts)
            sizes += cut_matrices(config, layout.ep, part.experts, ranks, shard)
            total += sum(_flops(size, config.model.width) for size in sizes) / ranks
    return total


def _flops(size: int, width: int) -> int:
    """All of these matrices have the model's width on one side."""
    a, b = sorted((width, size // width))
    return _STEPS * (4 * a * a * b + 2 * a**3)
