"""DeepSpeed's view of a model's parameters: experts as experts, and ZeRO 3's gathers as NCCL and
recompute need them.

Imported by ``engine.py`` alone, after :func:`engine.import_deepspeed`.  Leans on DeepSpeed 0.19.8's
private names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.utils import groups as registry
from torch import nn

from diffmoe.models.dit import DiT
from diffmoe.models.logical import LogicalTensor
from diffmoe.models.matrices import MUON, is_matrix, matrices_in
from diffmoe.parallel.groups import Group
from diffmoe.parallel.traffic import only_counting


def parameter_groups(tensors: list[LogicalTensor], ep: Group, optimizer: str) -> list[dict]:
    """A rank's parameters: experts apart where expert parallelism shares them out, and Muon's
    matrices from the rest, since they have no second moment.
    """
    found: dict[tuple[bool, bool], dict] = {}
    # DeepSpeed lays parameters end to end; kernels on a GPU want bf16 ones to begin at 16 bytes.
    for t in sorted(tensors, key=lambda t: t.parameter.numel() % 8 > 0):
        key = ep.size > 1 and t.experts is not None, optimizer == MUON and is_matrix(t.name)
        name = {"name": _ep_name(ep), "moe": True} if key[0] else {"name": "dense"}
        group = found.setdefault(key, {"params": [], **name, MUON: []})
        group["params"].append(t.parameter)
        if key[1]:
            *_, rows, columns = t.parameter.shape
            number = matrices_in(t.name, t.experts.local if t.experts else 1)
            group[MUON].append((number, t.parameter.numel() // number // columns, columns))
    return [found[key] for key in sorted(found)]


def _ep_name(ep: Group) -> str:
    return f"ep_size_{ep.size}"


def declare_experts(model: DiT, tensors: list[LogicalTensor], ep: Group, edp: Group) -> None:
    """Tags, groups and marker: all that makes DeepSpeed reduce, clip and shard experts over their
    EDP group, or its part that shares a copy of their state.
    """
    name = _ep_name(ep)
    registry._EXPERT_PARALLEL_GROUP[name] = ep.handle
    registry._EXPERT_DATA_PARALLEL_GROUP[name] = edp.handle
    registry._EXPERT_PARALLEL_GROUP_RANKS[name] = list(ep.ranks)
    registry._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = list(edp.ranks)
    for tensor in tensors:
        if tensor.experts is not None:
            parameter: Any = tensor.parameter
            parameter.allreduce = False
            parameter.group_name = parameter.ds_zero_partition_group_name = name
            parameter.ds_zero_placement_family = "autoep_expert"
            parameter.ds_zero_partition_process_group = edp.handle
    model.add_module("deepspeed_marker", _ExpertMarker(model.moe.experts, ep, name))


class _ExpertMarker(AutoEPMoELayer):
    """A parameterless module that DeepSpeed takes for one of its expert layers: it switches on
    reduction, clipping and sharding of tagged parameters at every ZeRO stage.  Its forward is never
    called.
    """

    def __init__(self, experts: int, ep: Group, name: str) -> None:
        nn.Module.__init__(self)
        self.num_experts, self.num_local_experts = experts, experts // ep.size
        self.ep_size, self.ep_rank = ep.size, ep.index
        self.ep_group, self.ep_group_name = ep.handle, name
        self.folding_group_handles = self.tp_group = None

    def set_deepspeed_parallelism(self, *_args, **_kwargs) -> None:
        """The groups are registered already."""


def hide_gathers_from_recompute(offload) -> None:
    """ZeRO 3 gathers and frees parameters in module hooks, as they are needed: when recompute runs
    a block again it may gather what the first pass already had (after a restore, say).  Selective
    recompute insists that both passes run the same operators, so these stay out of its sight.
    """
    for name in ("pre_sub_module_forward_function", "post_sub_module_forward_function"):
        setattr(offload, name, only_counting()(getattr(offload, name)))


def gather_in_one_order(parameters: Sequence[Any]) -> None:
    """ZeRO 3 gathers a set of parameters, a message for each communicator, in the set's order: of
    addresses, another one on every rank.  Two NCCL communicators whose collectives begin in
    different orders may wait for each other.
    """

    def ordered(gather: Callable) -> Callable:
        return lambda some, *args, **how: gather(sorted(some, key=lambda p: p.ds_id), *args, **how)

    for parameter in parameters:
        parameter.all_gather_coalesced = ordered(parameter.all_gather_coalesced)
