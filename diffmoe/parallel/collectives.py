"""Collectives over a :class:`Group`; every one is a no-op for a group of one rank.

All are torch's functional collectives, which return new tensors: selective recompute may keep those.  Keeping an in-place
collective keeps its handle and not what it wrote, and gives wrong gradients without a word.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor

from diffmoe.errors import UserError
from diffmoe.parallel.groups import Group

EXIT_LOST = 75  # sysexits' "temporary failure": the same command goes on from the last checkpoint
# gloo has no type of its own: its messages on connections begin with the line of its source, its stores say two words.
_LOST_PEER = re.compile(r"\[\S*gloo/(transport|rendezvous)/\S+:\d+\] |Wait timeout$|Read error: Connection reset by peer"
                        r"|(\[[^]]*Rank \d+\] )?(NCCL communicator was aborted|Watchdog caught collective operation timeout)")
# NCCL's one type is for all that it complains of.
_OWN_FAULT = re.compile(r"ncclInvalidUsage|ncclInvalidArgument|out of memory")


def send_rows(rows: Tensor, send: list[int] | None, receive: list[int] | None, group: Group) -> Tensor:
    """Begins a differentiable all-to-all of the first dimension: ``send[r]`` rows go to rank r of the group,
    ``receive[r]`` come from it, in rank order; None for both: equal shares.  What it returns may be read only through
    ``arrived``.  Every rank of the group must call it, also with no rows, and backward sends the gradients the other way."""
    if group.size == 1:
        return rows
    with group.trace.inside("all-to-all of rows", group.ranks):
        return functional.all_to_all_single_autograd(rows.contiguous(), receive, send, group.handle)


def arrived(rows: Tensor, group: Group) -> Tensor:
    """The rows that ``send_rows`` began to exchange, once they are here."""
    if group.size == 1:
        return rows
    with group.trace.inside("all-to-all of rows", group.ranks):
        return functional.wait_tensor(rows)


def exchange_equal(parts: Tensor, group: Group) -> Tensor:
    """Not differentiable: part ``parts[r]`` goes to rank r; returns [size, …] in rank order."""
    if group.size == 1:
        return parts
    assert parts.shape[0] == group.size
    with group.trace.inside("all-to-all of scores", group.ranks):
        return functional.wait_tensor(functional.all_to_all_single(parts.detach().contiguous(), None, None, group.handle))


def gather_stack(part: Tensor, group: Group) -> Tensor:
    """Not differentiable: every rank's ``part``, stacked in rank order [size, …]."""
    if group.size == 1:
        return part.unsqueeze(0)
    with group.trace.inside("all-gather", group.ranks):
        flat = functional.wait_tensor(functional.all_gather_single(part.detach().reshape(-1), 0, group.handle))
    return flat.view(group.size, *part.shape)


def sum_over(value: Tensor, group: Group) -> Tensor:
    """Not differentiable: the sum over the group, in a new tensor."""
    if group.size == 1:
        return value
    with group.trace.inside("all-reduce", group.ranks):
        return functional.wait_tensor(functional.all_reduce(value.detach().contiguous(), "sum", group.handle))


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
    """Whether an exception is how torch says that another rank has gone, or does not answer: by type where torch has one.  Of
    plain RuntimeErrors only those that begin as gloo's and NCCL's own do, wherever else a message names them."""
    if isinstance(error, dist.DistError):
        return _OWN_FAULT.search(str(error)) is None
    return type(error) is RuntimeError and _LOST_PEER.match(str(error)) is not None


def raise_together(error: Exception | None, group: Group) -> None:
    """Raises AgreedError on every rank when any rank holds an error, with the first such rank's message.

    For set-up steps that can fail on one node only (a missing shard, a full disk): nobody is left waiting."""
    message = first_complaint(gather_objects(None if error is None else str(error), group), group)
    if message is not None:
        raise AgreedError(message) from error


def first_complaint(messages: Sequence[str | None], group: Group) -> str | None:
    """What to say when every rank gave a message or None: the first, and whose it is unless all had one."""
    found = [(rank, text) for rank, text in zip(group.ranks, messages, strict=True) if text is not None]
    if not found:
        return None
    rank, text = found[0]
    return text if len(found) == group.size else f"rank {rank}: {text}"
