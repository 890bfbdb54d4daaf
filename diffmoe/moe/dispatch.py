"""Moves chosen rows to their experts and back: one seam, ``dispatch`` and ``combine``, with frozen metadata between.

Rows leave sorted by (expert, token), so those for one EP rank are together; they arrive grouped by source rank and are
regrouped by expert.  With one EP rank nothing moves.  T tokens, R rows sent, S rows received, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from diffmoe.moe.routing import Routing
from diffmoe.parallel.collectives import exchange_equal, exchange_rows
from diffmoe.parallel.groups import Group


@dataclass(frozen=True)
class Dispatched:
    """What ``combine`` needs to undo ``dispatch``.

    ``counts``: rows per local expert, one number when all are equal.  ``by_expert_S``: place of each row, grouped by
    expert, in the order of arrival; None when nothing was moved."""

    counts: int | list[int]
    send: Optional[list[int]]
    receive: Optional[list[int]]
    by_expert_S: Optional[Tensor]


def dispatch(x_TD: Tensor, routing: Routing, ep: Group) -> tuple[Tensor, Dispatched]:
    """Tokens [T, D] -> rows [S, D] grouped by this rank's experts."""
    rows = x_TD.index_select(0, routing.token_R)
    if ep.size == 1:
        counts = routing.each if routing.each is not None else routing.counts_E.tolist()
        return rows, Dispatched(counts, None, None, None)
    local = routing.counts_E.numel() // ep.size
    if routing.each is not None:
        received = routing.counts_E.new_full((ep.size, local), routing.each)
        arrived = exchange_rows(rows, None, None, ep)
        meta = Dispatched(ep.size * routing.each, None, None, _by_expert(received, len(arrived)))
    else:
        sent = routing.counts_E.view(ep.size, local)
        received = routing.received if routing.received is not None else exchange_equal(sent, ep)
        # The one host read of a ragged layer: split sizes for the exchange and for the experts.
        numbers = torch.cat([sent.sum(1), received.sum(1), received.sum(0)]).tolist()
        send, receive, counts = numbers[:ep.size], numbers[ep.size:2 * ep.size], numbers[2 * ep.size:]
        arrived = exchange_rows(rows, send, receive, ep)
        equal = len(set(counts)) == 1
        meta = Dispatched(counts[0] if equal else counts, send, receive, _by_expert(received, len(arrived)))
    return arrived.index_select(0, meta.by_expert_S), meta


def combine(rows_SD: Tensor, gate_R: Tensor, meta: Dispatched, routing: Routing, tokens: int, ep: Group) -> Tensor:
    """Rows come home, are scaled by their gate and added up per token in the gate's precision: [T, D].

    The gate multiplies here, where its scores live, so that its gradient needs no communication."""
    if meta.by_expert_S is not None:
        arrival = torch.empty_like(meta.by_expert_S)
        arrival[meta.by_expert_S] = torch.arange(len(arrival), device=arrival.device)
        rows_SD = exchange_rows(rows_SD.index_select(0, arrival), meta.receive, meta.send, ep)
    scaled = rows_SD.to(gate_R.dtype) * gate_R.unsqueeze(1)
    return scaled.new_zeros(tokens, rows_SD.shape[1]).index_add(0, routing.token_R, scaled)


def _by_expert(received: Tensor, total: int) -> Tensor:
    """Rows arrive as [source][expert]; the order that groups them as [expert][source], as S indices."""
    flat = received.reshape(-1)
    starts = (flat.cumsum(0) - flat).view_as(received).t().reshape(-1)
    counts = received.t().reshape(-1)
    ends = counts.cumsum(0)
    offset = (starts - (ends - counts)).repeat_interleave(counts, output_size=total)
    return offset + torch.arange(total, device=offset.device)
