"""Moves chosen rows to their experts and back: a plan, then ``dispatch``, ``by_expert``,
``by_source``, ``combine``.

Rows leave sorted by (expert, token), so those for one EP rank are together; they arrive grouped by
source rank and are regrouped by expert.  With one EP rank they are there at once.  T tokens, R rows
sent, S rows received, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffmoe.moe.routing import Routing
from diffmoe.parallel.collectives import Travelling, exchange_equal, read_by_host, send_rows
from diffmoe.parallel.groups import Group


@dataclass(frozen=True)
class Plan:
    """Where every row comes from and goes to.

    ``token_R``, ``place_R``: each row's token, and its place in flattened [T, E].  ``by_token_R``:
    rows sorted by (token, expert), where those of a token begin at ``first_T``.  ``counts``: rows
    of each local expert, one number where all have equally many, else [e].  ``received_re``: rows
    by source rank and local expert; ``send``, ``receive``: rows by rank, ``passing``: rows between
    others that pass through this one.  None where all are equal or nothing moves.  ``ragged``:
    whether their number differs from pass to pass.
    """

    token_R: Tensor
    place_R: Tensor
    by_token_R: Tensor
    first_T: Tensor
    counts: int | Tensor
    received_re: Tensor | None = None
    send: list[int] | None = None
    receive: list[int] | None = None
    passing: list[int] | None = None
    ragged: bool = False


def make_plan(routing: Routing, ep: Group) -> Plan:
    """The plan of a choice.  The host reads the device once where counts are ragged and not known,
    else never.
    """
    mask_TE, rows = routing.mask_TE, routing.rows
    if routing.tokens_EK is not None:
        return _equal_plan(mask_TE, routing.tokens_EK, ep)
    if ep.size > 1:
        return ragged_plans(routing, ep, parts=1)[0]
    counts_E = mask_TE.sum(dim=0)
    if rows is None:
        rows = read_by_host(counts_E.sum(0, keepdim=True))[0]
    return Plan(*_rows(mask_TE, rows), counts_E, ragged=routing.rows is None)


def half_plans(routing: Routing, ep: Group, whole_pools: bool) -> list[Plan]:
    """The plans of each half of the tokens, for more than one EP rank: every expert takes equally
    many of a half that holds ``whole_pools``, if it does of both together.  One read by the host
    for both.
    """
    if routing.tokens_EK is None or not whole_pools:
        return ragged_plans(routing, ep, parts=2)
    first, second = routing.tokens_EK.chunk(2, dim=1)
    masks = routing.mask_TE.chunk(2)
    each = zip(masks, (first, second - len(masks[0])))
    return [_equal_plan(mask_TE, tokens_EK, ep) for mask_TE, tokens_EK in each]


def _equal_plan(mask_TE: Tensor, tokens_EK: Tensor, ep: Group) -> Plan:
    E, K = tokens_EK.shape
    token = tokens_EK.flatten()
    place = token * E + torch.arange(E, device=mask_TE.device).repeat_interleave(K)
    return Plan(token, place, *_by_token(mask_TE, place), ep.size * K)


def ragged_plans(routing: Routing, ep: Group, parts: int) -> list[Plan]:
    """The plans of equal ``parts`` of the tokens, where counts are known to the device alone."""
    mask_TE, coming, passed = routing.mask_TE, routing.coming_rTe, routing.passing_rTe
    # [rank, part, local expert]
    sent = mask_TE.unflatten(0, (parts, -1)).sum(1).view(parts, ep.size, -1).transpose(0, 1)
    if coming is None:
        received, passing = exchange_equal(sent, ep)
    else:
        received = coming.unflatten(1, (parts, -1)).sum(2)
        passing = None if passed is None else passed.unflatten(1, (parts, -1)).sum(2)
    known = [sent, received] if passing is None else [sent, received, passing]
    numbers = read_by_host(torch.cat([counts.sum(2) for counts in known]).flatten())
    plans = []
    for i, mask in enumerate(mask_TE.chunk(parts)):
        of_part, received_re = numbers[i::parts], received[:, i]
        send, receive, through = (of_part[n * ep.size :][: ep.size] for n in range(3))
        counts = routing.each if parts == 1 and routing.each is not None else received_re.sum(0)
        places = _rows(mask, sum(send))
        plans.append(Plan(*places, counts, received_re, send, receive, through or None, True))
    return plans


def _rows(mask_TE: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    expert, token = torch.nonzero_static(mask_TE.t(), size=rows).t().contiguous()
    place = token * mask_TE.shape[1] + expert
    return token, place, *_by_token(mask_TE, place)


def _by_token(mask_TE: Tensor, place_R: Tensor) -> tuple[Tensor, Tensor]:
    """Rows sorted by place [R], and how many lie before each token's first [T]."""
    upto = mask_TE.flatten().cumsum(0)  # counting needs no sort
    each = torch.arange(len(place_R), device=place_R.device)
    by_token = torch.empty_like(place_R).scatter_(0, upto[place_R] - 1, each)
    return by_token, upto.view(mask_TE.shape)[:, 0] - mask_TE[:, 0].long()


def dispatch(x_TD: Tensor, plan: Plan, ep: Group) -> Travelling:
    """Tokens [T, D] -> the rows [S, D] of this rank's experts, on their way until they have
    ``arrived``.
    """
    rows_RD = _Gather.apply(x_TD, plan.token_R, plan.by_token_R, plan.first_T)
    return send_rows(rows_RD, plan.send, plan.receive, ep, plan.passing)


def send_home(rows_SD: Tensor, plan: Plan, ep: Group) -> Travelling:
    """Experts' outputs, as their inputs arrived, on their way to where the tokens live."""
    return send_rows(rows_SD, plan.receive, plan.send, ep, plan.passing, home=True)


def by_expert(rows_SD: Tensor, plan: Plan, ranks: int, local: int) -> Tensor:
    """Rows grouped by source rank -> by the ``local`` experts, and then by source rank."""
    return rows_SD if ranks == 1 else _turned(rows_SD, ranks, local, plan.received_re)


def by_source(rows_SD: Tensor, plan: Plan, ranks: int, local: int) -> Tensor:
    """Rows grouped by expert -> by source rank, and then by expert."""
    counts_er = None if plan.received_re is None else plan.received_re.t()
    return rows_SD if ranks == 1 else _turned(rows_SD, local, ranks, counts_er)


def combine(rows_RD: Tensor, scores_TE: Tensor, plan: Plan, shared_TD: Tensor | None) -> Tensor:
    """Experts' outputs, come home, are scaled by their gate and added up per token, in fp32 at
    least, to shared experts': [T, D].

    The gate is the raw softmax value of a chosen (token, expert), not renormalised (paper, equation
    6).  It multiplies here, where its scores live, so that its gradient needs no communication.
    """
    gate_R = scores_TE.flatten().gather(0, plan.place_R)
    y_TD = _WeightedSum.apply(rows_RD, gate_R, plan.token_R, plan.by_token_R, plan.first_T)
    return y_TD if shared_TD is None else y_TD + shared_TD


class _Gather(torch.autograd.Function):
    """rows_r = x[token_r].  Autograd adds the gradients up in bf16 and, on CUDA, in any order."""

    @staticmethod
    def forward(ctx, x_TD: Tensor, token_R: Tensor, by_token_R: Tensor, first_T: Tensor) -> Tensor:
        ctx.save_for_backward(by_token_R, first_T)
        return x_TD.index_select(0, token_R)

    @staticmethod
    def backward(ctx, d_RD: Tensor) -> tuple[Tensor, None, None, None]:
        return _sum_by_token(d_RD, *ctx.saved_tensors), None, None, None


class _WeightedSum(torch.autograd.Function):
    """y[token_r] += gate_r * rows_r.

    Autograd would keep the products and go through them in fp32: two fifths of the elementwise
    traffic of a layer of L-E16 (2.51 GB in place of 1.54), 13 % of what it keeps (counted on CUDA
    tensors without memory, bf16, 64 samples).
    """

    @staticmethod
    def forward(
        ctx, rows_RD: Tensor, gate_R: Tensor, token_R: Tensor, by_token_R: Tensor, first_T: Tensor
    ) -> Tensor:
        ctx.save_for_backward(rows_RD, gate_R, token_R)
        return _sum_by_token(rows_RD, by_token_R, first_T, gate_R[by_token_R])

    @staticmethod
    def backward(ctx, dy_TD: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        rows_RD, gate_R, token_R = ctx.saved_tensors
        if torch.compiler.is_compiling():  # one pass over the rows
            g = dy_TD.index_select(0, token_R)
            d_gate = (g * rows_RD).sum(1, dtype=gate_R.dtype)
            return (g * gate_R.unsqueeze(1)).to(g.dtype), d_gate, None, None, None
        each_R = torch.arange(len(token_R), device=token_R.device)
        d_rows = _sum_by_token(dy_TD, token_R, each_R, gate_R)
        # embedding_bag's own: dy of the row's token times the row, added up in fp32.
        d_gate = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            dy_TD, rows_RD, each_R, each_R, token_R, 0
        )
        return d_rows, d_gate.to(gate_R.dtype), None, None, None


def _sum_by_token(
    rows_RD: Tensor, row_S: Tensor, first_T: Tensor, weight_S: Tensor | None = None
) -> Tensor:
    """y_t = sum of the rows ``row_S`` from ``first_T[t]`` on, times their weights [T, D]; zeros for
    a token without rows.

    One pass that reads the rows where they lie, adds up in fp32 at least, always in the same order,
    and rounds once.
    """
    if weight_S is not None and weight_S.dtype != rows_RD.dtype:
        # The kernel wants weights of the rows' type: as a sum of two bf16 numbers, which hold 16
        # bits.
        high = weight_S.to(rows_RD.dtype)
        weight_S = torch.stack([high, (weight_S - high).to(rows_RD.dtype)], dim=1).flatten()
        row_S, first_T = row_S.repeat_interleave(2), 2 * first_T
    return F.embedding_bag(row_S, rows_RD, first_T, mode="sum", per_sample_weights=weight_S)


def _turned(rows_SD: Tensor, a: int, b: int, counts_ab: Tensor | None) -> Tensor:
    """Rows that lie as [a][b] -> as [b][a], ``counts_ab`` of each pair, or equally many."""
    if counts_ab is None:
        each = len(rows_SD) // (a * b)
        return rows_SD.view(a, b, each, rows_SD.shape[1]).transpose(0, 1).flatten(0, 2)
    flat, counts = counts_ab.reshape(-1), counts_ab.t().reshape(-1)
    starts = (flat.cumsum(0) - flat).view_as(counts_ab).t().reshape(-1)
    shift = starts - (counts.cumsum(0) - counts)
    offset = shift.repeat_interleave(counts, output_size=len(rows_SD))
    return rows_SD.index_select(0, offset + torch.arange(len(rows_SD), device=offset.device))
