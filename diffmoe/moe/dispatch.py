"""Moves chosen rows to their experts and back: one seam, ``dispatch`` and ``combine``, with frozen metadata between.

Rows leave sorted by (expert, token), so those for one EP rank are together; they arrive grouped by source rank and are
regrouped by expert.  With one EP rank nothing moves.  T tokens, R rows sent, S rows received, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from diffmoe.moe.expert_mlp import scaled
from diffmoe.moe.routing import Routing
from diffmoe.parallel.collectives import arrived, exchange_equal, send_rows
from diffmoe.parallel.groups import Group


@dataclass(frozen=True)
class Dispatched:
    """Where experts find their rows, and what ``combine`` needs to undo ``dispatch``.

    ``place_R``: each row's place in the tensor that ``dispatch`` returned, rows being grouped by expert.  ``counts``: rows per
    local expert, one number when all are equal.  ``here``: nothing was moved, so experts gate and add up by themselves."""

    place_R: Tensor
    counts: int | list[int]
    send: Optional[list[int]] = None
    receive: Optional[list[int]] = None
    here: bool = False


def dispatch(x_TD: Tensor, routing: Routing, ep: Group) -> tuple[Tensor, Dispatched]:
    """Tokens [T, D] -> what this rank's experts read: the tokens themselves with one EP rank, else rows [S, D] that are on
    their way until ``arrived``."""
    if ep.size == 1:
        counts = routing.each if routing.each is not None else routing.counts_E.tolist()
        return x_TD, Dispatched(routing.token_R, counts, here=True)
    rows = x_TD.index_select(0, routing.token_R)
    local = routing.counts_E.numel() // ep.size
    if routing.each is not None:
        received = routing.counts_E.new_full((ep.size, local), routing.each)
        coming = send_rows(rows, None, None, ep)
        return coming, Dispatched(_by_expert(received, len(coming)), ep.size * routing.each)
    sent = routing.counts_E.view(ep.size, local)
    received = routing.received if routing.received is not None else exchange_equal(sent, ep)
    # The one host read of a ragged layer: split sizes for the exchange and for the experts.
    numbers = torch.cat([sent.sum(1), received.sum(1), received.sum(0)]).tolist()
    send, receive, counts = numbers[:ep.size], numbers[ep.size:2 * ep.size], numbers[2 * ep.size:]
    coming = send_rows(rows, send, receive, ep)
    equal = len(set(counts)) == 1
    return coming, Dispatched(_by_expert(received, len(coming)), counts[0] if equal else counts, send, receive)


def combine(rows_SD: Tensor, gate_R: Tensor, meta: Dispatched, routing: Routing, tokens: int, ep: Group) -> Tensor:
    """Rows come home, are scaled by their gate and added up per token in the gate's precision: [T, D].

    The gate multiplies here, where its scores live, so that its gradient needs no communication.  Rows that never left
    are added up already."""
    if meta.here:
        return rows_SD
    rows_RD = arrived(send_rows(rows_SD, meta.receive, meta.send, ep), ep)
    return _WeightedSum.apply(rows_RD, gate_R, routing.token_R, tokens)


class _WeightedSum(torch.autograd.Function):
    """y[token_r] += gate_r * rows_r in the gate's precision, without a copy of the rows in it for backward."""

    @staticmethod
    def forward(ctx, rows_RD, gate_R, token_R, tokens):
        ctx.save_for_backward(rows_RD, gate_R, token_R)
        y = torch.zeros(tokens, rows_RD.shape[1], dtype=gate_R.dtype, device=rows_RD.device)
        return y.index_add_(0, token_R, rows_RD * gate_R.unsqueeze(1)).to(rows_RD.dtype)

    @staticmethod
    def backward(ctx, dy_TD):
        rows_RD, gate_R, token_R = ctx.saved_tensors
        g = dy_TD.index_select(0, token_R)
        return scaled(g, gate_R.unsqueeze(1)), (g * rows_RD).sum(1, dtype=gate_R.dtype), None, None


def _by_expert(received: Tensor, total: int) -> Tensor:
    """Rows arrive as [source][expert]; the order that groups them as [expert][source], as S indices."""
    flat = received.reshape(-1)
    starts = (flat.cumsum(0) - flat).view_as(received).t().reshape(-1)
    counts = received.t().reshape(-1)
    ends = counts.cumsum(0)
    offset = (starts - (ends - counts)).repeat_interleave(counts, output_size=total)
    return offset + torch.arange(total, device=offset.device)
