"""The gate: router scores of tokens.  T tokens, D width, E experts."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Beside(NamedTuple):
    """What a router may look at beside the tokens that experts get: ``time_BD``, the time's
    embedding; ``plain_BND``, tokens before adaLN's shift and scale; ``null_B``, which samples are
    of the null class.  None where the layer does not ask.
    """

    time_BD: Tensor | None = None
    plain_BND: Tensor | None = None
    null_B: Tensor | None = None


def scored(logits_TE: Tensor, score: str) -> Tensor:
    """The gate function of logits: softmax over experts (paper, equation 2), sigmoid, identity."""
    if score == "identity":
        return logits_TE
    return logits_TE.sigmoid() if score == "sigmoid" else logits_TE.softmax(dim=-1)


def logits(x_TD: Tensor, router_ED: Tensor) -> Tensor:
    """x W [T, E], in fp32 at least: bf16 scores tie by the thousand."""
    if x_TD.dtype.itemsize < 4:
        return _WideLogits.apply(x_TD, router_ED)
    return F.linear(x_TD, router_ED)


def time_token_logits(time_BD: Tensor, plain_BND: Tensor, router_E2D: Tensor) -> Tensor:
    """[time, token] W [T, E]: the embedding of a sample's time before each of its tokens
    (Nucleus-Image), whose product is made once a sample.
    """
    of_time, of_token = router_E2D.chunk(2, dim=1)
    token = logits(plain_BND.flatten(0, 1), of_token.contiguous())
    time = logits(time_BD, of_time.contiguous())
    return (token.view(len(time), -1, token.shape[1]) + time.unsqueeze(1)).view_as(token)


def cosines(x_TD: Tensor, prototypes_ED: Tensor) -> Tensor:
    """Cosine of every token and prototype [T, E], in fp32 at least (ProMoE)."""
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    x_norm = torch.linalg.vector_norm(x_TD, dim=1, keepdim=True, dtype=wide).clamp_min(1e-12)
    towards = torch.linalg.vector_norm(prototypes_ED, dim=1, dtype=wide).clamp_min(1e-12)
    return logits(x_TD, prototypes_ED) / x_norm / towards


class _WideLogits(torch.autograd.Function):
    """x W in fp32 from bf16 tokens.

    Autograd would cast the tokens and keep the copy: 13 % of what a layer of L-E16 keeps (440 MB in
    place of 507), 10 % of its elementwise traffic (counted on CUDA tensors without memory, 64
    samples).
    """

    @staticmethod
    def forward(ctx, x_TD: Tensor, router_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, router_ED)
        return _wide_product(x_TD, router_ED.mT)

    @staticmethod
    def backward(ctx, d_TE: Tensor) -> tuple[Tensor, Tensor]:
        x, router = ctx.saved_tensors
        # As a sum of two bf16 numbers, which hold 16 bits: twice what the products are rounded to.
        high = d_TE.to(x.dtype)
        halves = torch.cat([high, (d_TE - high).to(x.dtype)], dim=1)
        d_router = _wide_product(halves.mT, x).view(2, *router.shape).sum(0)
        return torch.mm(halves, torch.cat([router, router])), d_router.to(router.dtype)


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a b in fp32; on CUDA of bf16 matrices as they are."""
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())
