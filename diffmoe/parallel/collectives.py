"""Collectives over a :class:`Group`; every one is a no-op for a group of one rank.

All are torch's functional collectives, which return new tensors: selective recompute may keep
those.  Keeping an in-place collective keeps its handle and not what it wrote, and gives wrong
gradients silently.  They are called as
operators: those have the same names from torch 2.11 to 2.13, the functions around them have not.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives  # what the operators do without memory
from torch import Tensor

from diffmoe.errors import UserError
from diffmoe.parallel.groups import Group, Levels

_functional = torch.ops._c10d_functional
# The operators of all that follows, but for objects; recompute can keep what they bring.
OPERATORS = [
    op.default
    for op in (
        _functional.all_to_all_single,
        _functional.all_gather_into_tensor,
        _functional.all_reduce,
        _functional.wait_tensor,
    )
]
EXIT_LOST = 75  # sysexits' "temporary failure": the same command resumes from the last checkpoint
# gloo has no type of its own: its messages on connections begin with the line of its source, its
# stores say a few words.
_LOST_PEER = re.compile(
    r"\[\S*gloo/(transport|rendezvous)/\S+:\d+\] |Wait timeout$|Timeout waiting for key: "
    r"|Read error: Connection reset by peer|(\[[^]]*Rank \d+\] )?(NCCL communicator was aborted"
    r"|Watchdog caught collective operation timeout)"
)
# NCCL's one type is for all that it complains of.
_OWN_FAULT = re.compile(
    r"ncclInvalidUsage|ncclInvalidArgument|ncclInternalError|ncclUnhandledCudaError|out of memory"
)


@dataclass
class _Exchange:
    """An all-to-all of rows: ``send[r]`` of them go to rank r of the group, ``receive[r]`` come
    from it.

    Over two levels rows cross the network first, to the rank of this place on their host, and go
    from there to their expert's; ``home`` they come by the same ranks.  So what is in flight while
    others compute is the network's part, in both directions, and its messages are as large as the
    senders have tokens, however many of them go to one expert.
    """

    send: list[int] | None
    receive: list[int] | None
    group: Group
    passing: list[int] | None = None
    home: bool = False
    gradient: Tensor | None = None  # on its way back

    def back(self) -> _Exchange:
        return _Exchange(self.receive, self.send, self.group, self.passing, not self.home)

    def begin(self, rows: Tensor) -> Tensor:
        """Rows in a new tensor, not waited for."""
        levels, send, receive = self.group.levels, self.send, self.receive
        if levels is None:
            return _begin(rows, send, receive, self.group)
        if self.home:
            rows, send = _inside(rows, send, self.passing, levels), self.passing
        else:
            receive = self.passing
        ranks = levels.inside.size
        return _begin(rows, _by_host(send, ranks), _by_host(receive, ranks), levels.across)

    def end(self, coming: Tensor) -> Tensor:
        """The rows once they are here, in rank order."""
        rows, levels = _functional.wait_tensor(coming), self.group.levels
        if levels is None or self.home:
            return rows
        return _inside(rows, self.passing, self.receive, levels)


def _by_host(counts: list[int] | None, ranks: int) -> list[int] | None:
    if counts is None:
        return None
    return [sum(counts[first : first + ranks]) for first in range(0, len(counts), ranks)]


def _inside(
    rows: Tensor, send: list[int] | None, receive: list[int] | None, levels: Levels
) -> Tensor:
    """All-to-all inside a host of rows that lie as [host][rank of a host], and lie so again."""
    hosts, ranks = levels.across.size, levels.inside.size
    each = [len(rows) // (hosts * ranks)] * (hosts * ranks)
    to, come = (
        [counts[r::ranks] for r in range(ranks)] for counts in (send or each, receive or each)
    )
    rows = _turned(rows, send or each, ranks)
    rows = _functional.wait_tensor(
        _begin(rows, list(map(sum, to)), list(map(sum, come)), levels.inside)
    )
    return _turned(rows, sum(come, []), hosts)


def _turned(rows: Tensor, counts: list[int], b: int) -> Tensor:
    """Rows that lie as [a][b], ``counts`` of each pair -> as [b][a]; the host knows where."""
    parts = rows.split(counts)
    return torch.cat([part for place in range(b) for part in parts[place::b]])


class Travelling(NamedTuple):
    """Rows that ``send_rows`` sent: to be read through ``arrived``."""

    rows: Tensor
    exchange: _Exchange


def send_rows(
    rows: Tensor,
    send: list[int] | None,
    receive: list[int] | None,
    group: Group,
    passing: list[int] | None = None,
    home: bool = False,
) -> Travelling:
    """Begins a differentiable all-to-all of the first dimension: ``send[r]`` rows go to rank r of
    the group, ``receive[r]`` come from it, in rank order; None for both: equal shares.  Every rank
    of the group must call it, also with no rows, and backward sends the gradients the other way.

    Where the group has two levels: ``home``: these are rows on their way back, and ``passing`` are
    the rows between others that pass through this rank, either way: of the tokens' rank on each
    host with its place, to each rank of its host [hosts x ranks of a host].
    """
    exchange = _Exchange(send, receive, group, passing, home)
    if group.size == 1:
        return Travelling(rows, exchange)
    with group.trace.inside("all-to-all of rows", group.ranks):
        return Travelling(_Send.apply(rows, exchange), exchange)


def arrived(coming: Travelling) -> Tensor:
    """The rows once they are here, in rank order.  Whatever lies between sending and this computes
    while they travel; in backward too, where this sends the gradients off and ``send_rows`` waits
    for them.
    """
    group = coming.exchange.group
    if group.size == 1:
        return coming.rows
    with group.trace.inside("all-to-all of rows", group.ranks):
        return _Arrive.apply(coming.rows, coming.exchange)


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.begin(rows)

    @staticmethod
    def backward(ctx, _placeholder: Tensor) -> tuple[Tensor, None]:
        gradient, ctx.exchange.gradient = ctx.exchange.gradient, None
        exchange = ctx.exchange
        with exchange.group.trace.inside("all-to-all of gradients", exchange.group.ranks):
            return exchange.back().end(gradient), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, coming: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange, ctx.shape = exchange, coming.shape
        return exchange.end(coming)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        exchange = ctx.exchange
        with exchange.group.trace.inside("all-to-all of gradients", exchange.group.ranks):
            exchange.gradient = exchange.back().begin(gradient)
        if gradient.shape != ctx.shape:
            gradient = gradient.new_empty(1).expand(ctx.shape)
        return gradient, None  # in the shape that autograd wants; nobody reads it


def _begin(rows: Tensor, send: list[int] | None, receive: list[int] | None, group: Group) -> Tensor:
    """All-to-all in a new tensor, not waited for."""
    each = [len(rows) // group.size] * group.size
    return _functional.all_to_all_single(
        rows.contiguous(), receive or each, send or each, group.handle.group_name
    )


@torch.library.custom_op("diffmoe::read_by_host", mutates_args=())
def _copied_to_host(numbers: Tensor) -> Tensor:
    return numbers.to("cpu", copy=True)


@_copied_to_host.register_fake
def _(numbers: Tensor) -> Tensor:
    return torch.empty_like(numbers, device="cpu")


def read_by_host(numbers: Tensor) -> list[int]:
    """The values of a small integer tensor: the host waits for the device.  An operator of its own,
    so that recompute can keep what was read, and a count can see it.
    """
    return _copied_to_host(numbers).tolist()


def exchange_equal(parts: Tensor, group: Group, home: bool = False) -> tuple[Tensor, Tensor | None]:
    """Not differentiable: part ``parts[r]`` goes to rank r; returns [size, …] in rank order.  Over
    two levels also what passed through here, by the pairs of ``send_rows``'s ``passing``, else
    None.
    """
    if group.size == 1:
        return parts, None
    assert parts.shape[0] == group.size
    with group.trace.inside("all-to-all of scores", group.ranks):
        levels, parts = group.levels, parts.detach()
        if levels is None:
            return _functional.wait_tensor(_begin(parts, None, None, group)), None
        if home:
            passed = _inside(parts, None, None, levels)
            return _functional.wait_tensor(_begin(passed, None, None, levels.across)), passed
        passed = _functional.wait_tensor(_begin(parts, None, None, levels.across))
        return _inside(passed, None, None, levels), passed


def exchange_parts(parts: list[Tensor], receive: list[int], group: Group) -> list[Tensor]:
    """Not differentiable: flat ``parts[r]`` goes to rank r, of which ``receive[r]`` elements come;
    what came, in rank order.  Every rank of the group must call it, also with nothing to send.
    """
    with group.trace.inside("all-to-all of momenta", group.ranks):
        coming = _begin(torch.cat(parts), [part.numel() for part in parts], receive, group)
        return list(_functional.wait_tensor(coming).split(receive))


def gather_stack(part: Tensor, group: Group) -> Tensor:
    """Not differentiable: every rank's ``part``, stacked in rank order [size, …]."""
    if group.size == 1:
        return part.unsqueeze(0)
    with group.trace.inside("all-gather", group.ranks):
        gathered = _functional.all_gather_into_tensor(
            part.detach().reshape(-1), group.size, group.handle.group_name
        )
        flat = _functional.wait_tensor(gathered)
    return flat.view(group.size, *part.shape)


def sum_over(value: Tensor, group: Group) -> Tensor:
    """Not differentiable: the sum over the group, in a new tensor."""
    if group.size == 1:
        return value
    with group.trace.inside("all-reduce", group.ranks):
        total = _functional.all_reduce(value.detach().contiguous(), "sum", group.handle.group_name)
        return _functional.wait_tensor(total)


def anyone(mine: bool, group: Group) -> bool:
    """Whether any rank says yes; the same answer on all."""
    return any(gather_objects(mine, group))


def gather_objects(value: Any, group: Group) -> list[Any]:
    """Every rank's small picklable value, in rank order."""
    values: list[Any] = [value] * group.size
    if group.size > 1:
        with group.trace.inside("all-gather of objects", group.ranks):
            dist.all_gather_object(values, value, group=group.handle)
    return values


class AgreedError(UserError):
    """The same error on every rank at the same place: one of them may speak for all."""


def is_lost_peer(error: BaseException) -> bool:
    """Whether an exception is how torch says that another rank has gone, or does not answer: by
    type where torch has one.  Of plain RuntimeErrors only those that begin as gloo's and NCCL's own
    do, wherever else a message names them.
    """
    if isinstance(error, dist.DistError):
        return _OWN_FAULT.search(str(error)) is None
    return type(error) is RuntimeError and _LOST_PEER.match(str(error)) is not None


def raise_together(error: Exception | None, group: Group) -> None:
    """Raises AgreedError on every rank when any rank holds an error, with the first such rank's
    message.
    """
    message = first_complaint(gather_objects(None if error is None else str(error), group), group)
    if message is not None:
        raise AgreedError(message) from error


@contextlib.contextmanager
def agreed(group: Group) -> Iterator[None]:
    """A block, without collectives, whose UserError or OSError on any rank becomes an AgreedError
    on all.
    """
    problem: Exception | None = None
    try:
        yield
    except (OSError, UserError) as error:
        problem = error
    raise_together(problem, group)


def first_complaint(messages: Sequence[str | None], group: Group) -> str | None:
    """What to say when every rank gave a message or None: the first, and whose it is unless all had
    one.
    """
    everybody = zip(group.ranks, messages, strict=True)
    found = [(rank, text) for rank, text in everybody if text is not None]
    if not found:
        return None
    rank, text = found[0]
    return text if len(found) == group.size else f"rank {rank}: {text}"
