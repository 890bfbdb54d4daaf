"""Router and capacity predictor of one layer as one pass over its tokens.

Both read the same token, so one matmul serves the router and the predictor's first layer; the predictor sees the token
detached, so only the router's part goes back into it.  Kept for backward: the token and the first layer's output; the
activated one is made again.  T tokens, D width, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from diffmoe.moe.capacity import CapacityPredictor

# On a CPU tokens pass in blocks, whose intermediates stay in the cache.
_CPU_BLOCK = 1024

_silu, _silu_backward = torch.ops.aten.silu, torch.ops.aten.silu_backward


def scores_and_capacity(x_TD: Tensor, router_ED: Tensor, predictor: CapacityPredictor) -> tuple[Tensor, Tensor]:
    """(softmax over experts of x W [T, E], the predictor's logits [T, E]), both in fp32 at least.

    The same as ``gate_scores(x, router)`` and ``predictor(x)``.  In bf16 the router's product comes in fp32, so there the two
    matmuls stay apart."""
    first, _, second = predictor
    scores, capacity = _Gating.apply(x_TD, router_ED, first.weight, first.bias, second.weight, second.bias)
    return scores.softmax(dim=-1), capacity


def _blocks(x: Tensor) -> list[slice]:
    size = _CPU_BLOCK if x.device.type == "cpu" and not torch.compiler.is_compiling() else max(1, len(x))
    return [slice(start, start + size) for start in range(0, len(x), size)]


def _buffer(x: Tensor, width: int) -> Tensor:
    """Memory [rows, width] for one block after another."""
    return x.new_empty(min(len(x), _blocks(x)[0].stop) if len(x) else 0, width)


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a b in fp32 at least; on CUDA of narrower matrices as they are, without a wide copy of either."""
    wide = torch.promote_types(a.dtype, torch.float32)
    if a.device.type == "cuda" and a.dtype != wide:
        return torch.mm(a, b, out_dtype=wide)
    return torch.mm(a.to(wide), b.to(wide))


def _in_two(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x [T, E] as the sum of two of ``dtype``, [T, 2 E]: of bf16 they hold 16 bits, twice what its products are rounded to."""
    high = x.to(dtype)
    return torch.cat([high, (x - high).to(dtype)], dim=1)


class _Gating(torch.autograd.Function):
    """(router's logits, predictor's logits)."""

    @staticmethod
    def forward(ctx, x, router, w1, b1, w2, b2):
        wide = torch.promote_types(x.dtype, torch.float32)
        T, D, E = len(x), w1.shape[0], router.shape[0]
        together = wide == x.dtype
        # [hidden, scores] of one matmul, or hidden alone.
        both = torch.cat([w1, router]) if together else w1
        bias = torch.cat([b1, b1.new_zeros(E)]) if together else b1
        first = x.new_empty(T, len(both))
        scores, capacity = (torch.empty(T, E, dtype=wide, device=x.device) for _ in range(2))
        active = _buffer(x, D)
        for rows in _blocks(x):
            z = torch.addmm(bias, x[rows], both.mT, out=first[rows])
            scores[rows] = z[:, D:] if together else _wide_product(x[rows], router.mT)
            capacity[rows] = F.linear(_silu.out(z[:, :D], out=active[:len(z)]), w2, b2)
        ctx.save_for_backward(x, first, router, w1, w2)
        return scores, capacity

    @staticmethod
    def backward(ctx, d_scores, d_capacity):
        x, first, router, w1, w2 = ctx.saved_tensors
        wide, D = d_scores.dtype, len(w1)
        together = first.shape[1] > D
        # Sums over blocks are kept wide, whatever the precision of the products.
        d_both = torch.zeros(D + len(router), x.shape[1], dtype=wide, device=x.device)
        d_b1, d_w2, d_b2 = (torch.zeros(shape, dtype=wide, device=x.device) for shape in (D, w2.shape, len(w2)))
        dx, active, held = torch.empty_like(x), _buffer(x, D), _buffer(x, first.shape[1])
        twice = None if together else torch.cat([router, router])
        for rows in _blocks(x):
            hidden, d_out = first[rows, :D], d_capacity[rows].to(x.dtype)
            a, d_first = active[:len(hidden)], held[:len(hidden)]
            d_hidden = d_first[:, :D]
            d_w2 += d_out.mT @ _silu.out(hidden, out=a)
            d_b2 += d_capacity[rows].sum(0)
            _silu_backward.grad_input(torch.mm(d_out, w2, out=a), hidden, grad_input=d_hidden)
            d_b1 += d_hidden.sum(0, dtype=wide)
            if together:
                d_first[:, D:] = d_scores[rows]
                d_both.addmm_(d_first.mT, x[rows])
                torch.mm(d_scores[rows], router, out=dx[rows])
            else:
                d_both[:D] += d_hidden.mT @ x[rows]
                halves = _in_two(d_scores[rows], x.dtype)
                d_both[D:] += _wide_product(halves.mT, x[rows]).view(2, *router.shape).sum(0)
                torch.mm(halves, twice, out=dx[rows])
        d_w1, d_router = d_both.split([D, len(router)])
        return dx, d_router.to(router.dtype), *(g.to(x.dtype) for g in (d_w1, d_b1, d_w2, d_b2))
