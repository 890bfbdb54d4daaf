"""Counts what goes over the network: bytes and messages by collective, layer and purpose, on this
rank, during real steps.

A :class:`CommunicationCount` is a context manager around whatever is to be counted.  It sees every
collective where torch dispatches it, ours (functional) and DeepSpeed's (in place) alike, in
forward, backward and recomputation.  It slows a step
down: count and time different steps.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _pop_mode,
    _push_mode,
)

from diffmoe.parallel.groups import ACROSS, INSIDE

_FUNCTIONAL, _IN_PLACE = "_c10d_functional", "c10d"
# Operator -> (collective, argument that holds what this rank puts in).
_COLLECTIVES = {
    "_c10d_functional.all_to_all_single": ("all_to_all", 0),
    "_c10d_functional.all_gather_into_tensor": ("all_gather", 0),
    "_c10d_functional.all_reduce": ("all_reduce", 0),
    "_c10d_functional.reduce_scatter_tensor": ("reduce_scatter", 0),
    "c10d.alltoall_base_": ("all_to_all", 1),
    "c10d.allreduce_": ("all_reduce", 0),
    "c10d.reduce_": ("reduce", 0),
    "c10d.broadcast_": ("broadcast", 0),
    "c10d._allgather_base_": ("all_gather", 1),
    "c10d.allgather_": ("all_gather", 1),
    "c10d.allgather_into_tensor_coalesced_": ("all_gather", 1),
    "c10d._reduce_scatter_base_": ("reduce_scatter", 1),
    "c10d.reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
}
_QUIET = {"wait_tensor", "_wrap_tensor_autograd", "barrier"}  # move nothing by themselves


@dataclass(frozen=True, order=True)
class Kind:
    """What a message was: ``collective``; ``layer``, an MoE layer's name, or "" outside;
    ``purpose``: scores, mask, counts, dispatch, combine, owners, balance (in an MoE layer),
    gradients, parameters, momenta, norm, statistics (outside); ``phase``: forward, backward,
    recompute, step; ``level``: "ep across", "ep inside" where an exchange has two, else "".
    """

    collective: str
    layer: str
    purpose: str
    phase: str
    level: str = ""


@dataclass
class Amount:
    """``messages``: collectives that this rank took part in.  ``payload``: bytes it put in, its own
    part included. ``wire``: bytes that had to leave it, see :func:`wire_bytes`.
    """

    messages: int = 0
    payload: int = 0
    wire: int = 0


def wire_bytes(collective: str, payload: int, ranks: int) -> int:
    """The fewest bytes that leave a rank, on average, for a collective of ``ranks`` whose input
    there is ``payload`` bytes.

    All-to-all of equal parts and reduce-scatter: all but the own part.  All-gather: the own part to
    each other rank. All-reduce: a reduce-scatter and an all-gather of the result (Patarasuk & Yuan
    2009).  Reduce, broadcast: once through everybody but the last.
    """
    others = ranks - 1
    if collective == "all_gather":
        return payload * others
    if collective == "all_reduce":
        return 2 * payload * others // ranks
    return payload * others // ranks


class CommunicationCount(TorchDispatchMode):
    """Counts while it is entered; ``amounts`` holds the result.

    ``layers``: (name, layer, its experts) of every MoE layer, by which messages are told apart."""

    def __init__(self, layers: Iterable[tuple[str, nn.Module, nn.Module]] = ()) -> None:
        super().__init__()
        self.amounts: dict[Kind, Amount] = defaultdict(Amount)
        self._layers = list(layers)
        self._layer, self._rows = "", ""
        # Memory of rows on their way, autograd's number of an arrival -> layer, purpose.
        self._on_their_way: dict[int, tuple[str, str]] = {}
        self._arrived_by_node: dict[int, tuple[str, str]] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> CommunicationCount:
        for name, layer, experts in self._layers:
            self._handles += [
                layer.register_forward_pre_hook(lambda *_, name=name: self._at(name, "dispatch")),
                layer.register_forward_hook(lambda *_: self._at("", ""), always_call=True),
                experts.register_forward_pre_hook(lambda *_, name=name: self._at(name, "combine")),
            ]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _at(self, layer: str, rows: str) -> None:
        self._layer, self._rows = layer, rows

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.namespace in (_FUNCTIONAL, _IN_PLACE):
            self._note(function, args, result)
        return result

    def _note(self, function: Any, args: tuple, result: Any) -> None:
        packet = function.overloadpacket.__name__
        forward = torch._C._current_autograd_node() is None
        if packet == "wait_tensor" and forward:
            where = self._on_their_way.pop(args[0].untyped_storage()._cdata, None)
            if where is not None and where[1] in ("dispatch", "combine"):
                # Where rows arrive their gradients leave in backward: by a node that was made just
                # before this was called.
                self._arrived_by_node[torch.autograd._get_sequence_nr() - 1] = where
        if packet == "all_to_all_single" and self._layer and forward:
            where = self._layer, self._purpose_in_layer("all_to_all", args[0])
            self._on_their_way[result.untyped_storage()._cdata] = where
        if packet in _QUIET:
            return
        collective, place = _COLLECTIVES[f"{function.namespace}.{packet}"]
        group = _group(function.namespace, args)
        if group.size() == 1:
            return
        tensors = _flat(args[place])
        payload = sum(t.numel() * t.element_size() for t in tensors)
        wire = wire_bytes(collective, payload, group.size())
        if collective == "all_to_all":
            sends = args[2] if function.namespace == _FUNCTIONAL else args[4]
            wire = payload - _own_bytes(tensors[0], sends, group)
        kind = self._kind(function.namespace, collective, tensors[0])
        if group.group_desc in (ACROSS, INSIDE):
            kind = replace(kind, level=group.group_desc)
        amount = self.amounts[kind]
        amount.messages += 1
        amount.payload += payload
        amount.wire += wire

    def _kind(self, namespace: str, collective: str, tensor: Tensor) -> Kind:
        node = torch._C._current_autograd_node()
        if self._layer:
            purpose = self._purpose_in_layer(collective, tensor)
            phase = "forward" if node is None else "recompute"
            return Kind(collective, self._layer, purpose, phase)
        if collective == "all_to_all" and node is not None:
            layer, purpose = self._arrived_by_node.get(node._sequence_nr(), ("", "rows"))
            return Kind(collective, layer, purpose, "backward")
        phase = "step" if node is None else "backward"
        if namespace == _FUNCTIONAL and collective == "all_gather":
            return Kind(collective, "", "features", phase)  # the dispersive loss's
        if collective == "all_to_all":
            return Kind(collective, "", "momenta", phase)
        if namespace == _FUNCTIONAL:
            return Kind(collective, "", "norm" if tensor.dim() == 0 else "statistics", phase)
        if collective == "all_gather":
            return Kind(collective, "", "parameters", phase)
        return Kind(collective, "", "norm" if tensor.numel() == 1 else "gradients", phase)

    def _purpose_in_layer(self, collective: str, tensor: Tensor) -> str:
        if collective == "all_gather":
            return "owners"
        if collective == "all_reduce":
            return "balance"
        if tensor.dtype == torch.int64:
            return "counts"
        if not tensor.dtype.is_floating_point:
            return "mask"
        return self._rows if tensor.dim() == 2 else "scores"

    def table(self) -> list[dict]:
        """One plain dict per kind, in order: what a record keeps."""
        return [{**vars(kind), **vars(self.amounts[kind])} for kind in sorted(self.amounts)]


def _flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in value for tensor in _flat(part)]


def _group(namespace: str, args: tuple) -> dist.ProcessGroup:
    """The process group among a collective's arguments: a name, always the last one, or torch's
    boxed handle.
    """
    if namespace == _FUNCTIONAL:
        return _resolve_process_group(args[-1])
    objects = [a for a in args if isinstance(a, torch.ScriptObject)]
    boxed = next(a for a in objects if a._type().name() == "ProcessGroup")  # type: ignore[attr-defined]
    return dist.ProcessGroup.unbox(boxed)


def _own_bytes(tensor: Tensor, sends: Sequence[int], group: dist.ProcessGroup) -> int:
    """Bytes of an all-to-all's input that stay on this rank."""
    payload, rows = tensor.numel() * tensor.element_size(), tensor.shape[0]
    return payload // rows * sends[group.rank()] if rows else 0


@contextmanager
def only_counting() -> Iterator[None]:
    """Without any of torch's dispatch modes but a CommunicationCount: hides what is done inside
    from recompute's.
    """
    with _disable_current_modes() as modes:
        counting = [mode for mode in modes if isinstance(mode, CommunicationCount)]
        for mode in counting:
            _push_mode(mode)
        try:
            yield
        finally:
            for _ in counting:
                _pop_mode()
