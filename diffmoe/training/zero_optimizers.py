"""ZeRO's optimizers as :class:`Engine` drives them: the norm is known before they step, so they ask
the device nothing; and ZeRO 1 for bf16 weights moves fewer bytes.  AdamW, which they shard.

Imported by ``engine.py`` alone, after :func:`engine.import_deepspeed`.  Leans on DeepSpeed 0.19.8's
private names.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import deepspeed.runtime.bf16_optimizer as bf16_optimizer
import deepspeed.runtime.engine
import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero import utils as supported
from deepspeed.utils import groups as registry
from torch import Tensor, nn

from diffmoe.config import TrainConfig
from diffmoe.errors import UserError
from diffmoe.gradient_sums import give_sum
from diffmoe.models.matrices import MUON
from diffmoe.parallel.groups import Group, ShardGroups
from diffmoe.training.muon import Muon

_ROW = 4096


@dataclass
class Decision:
    """What the host knows about a step before it is taken, the same on all ranks: the ``norm`` of
    the averaged gradient, and the ``factor`` of at most 1 that clips it.  A norm that is not finite
    changes nothing.
    """

    norm: float = 0.0
    factor: float = 1.0

    @property
    def applies(self) -> bool:
        return math.isfinite(self.norm)


@dataclass
class _Bucket:
    """Gradients that are reduced together, a run of a flat buffer: (global rank that owns it, its
    gradients), and how many parameters' gradients are still to come in this backward.
    """

    group: dist.ProcessGroup
    parts: list[tuple[int, Tensor]]
    parameters: int
    missing: int


@dataclass
class _Reduced:
    """A run of gradients on its way: ``sent`` is what is added up, ``part`` where it belongs."""

    work: dist.Work | None
    part: Tensor
    sent: Tensor
    own: bool


class Bf16Optimizer(BF16_Optimizer):
    """ZeRO 1 with bf16 weights and fp32 sums of gradients, as DeepSpeed's, but

    - a step's first gradient overwrites the sum and nothing is cleared; products of bf16 matrices
      add the gradients that they make (``gradient_sums``), what else there is is added as it is:
      6 and 10 bytes a parameter instead of 18;
    - gradients are reduced to their owner only, in buckets, while the last micro-batch's backward
      still runs; not at all in a group of one; where groups of ranks have a copy of the state each,
      the owners of the same shard add theirs up;
    - averaging and clipping are one factor, which torch's fused Adam applies on its way."""

    decision: Decision

    def reduce_in_buckets(
        self,
        order: list[nn.Parameter],
        most: int,
        dtype: torch.dtype,
        overlap: bool,
        replicas: Group,
    ) -> None:
        """To be called once, before training.  ``order``: all parameters as forward uses them;
        backward gives their gradients roughly from the last to the first, and buckets of up to
        ``most`` elements (or one parameter) leave in that order. ``dtype``: in which ranks add.
        Without ``overlap`` they wait for the end of backward.  ``replicas``: the ranks that own the
        same shards.
        """
        self._dtype, self._overlap, self._launched = dtype, overlap, 0
        groups = zip(self.bf16_groups, self.fp32_groups_gradients, strict=True)
        self._sums = [[give_sum(*pair) for pair in zip(*group, strict=True)] for group in groups]
        self.clear_hp_grads()
        self._replicas = replicas.handle if replicas.size > 1 else None
        self.ranks = dist.get_world_size(self.dp_process_group) * replicas.size
        self._reduced: list[_Reduced] = []
        self._across: list[_Reduced] = []
        self._bucket_of: dict[tuple[int, int], _Bucket] = {}
        place = {id(parameter): i for i, parameter in enumerate(order)}
        found: list[tuple[int, _Bucket]] = []
        for i, parameters in enumerate(self.bf16_groups):
            group = self.real_dp_process_group[i]
            if dist.get_world_size(group) == replicas.size == 1:
                continue
            starts = [0, *accumulate(parameter.numel() for parameter in parameters)]
            last = len(parameters)
            while last > 0:
                first = last - 1
                while first > 0 and starts[last] - starts[first - 1] <= most:
                    first -= 1
                count = last - first
                bucket = _Bucket(group, self._parts(i, starts[first], starts[last]), count, count)
                self._bucket_of |= {(i, j): bucket for j in range(first, last)}
                found.append((min(place[id(p)] for p in parameters[first:last]), bucket))
                last = first
        # One order for all ranks, whatever order gradients come in: collectives that ranks begin in
        # different orders hang.
        self._buckets = [bucket for _, bucket in sorted(found, key=lambda pair: -pair[0])]

    def _parts(self, i: int, start: int, stop: int) -> list[tuple[int, Tensor]]:
        """The run [start, stop) of flat buffer ``i``, cut where the owner changes."""
        ranks = dist.get_process_group_ranks(self.real_dp_process_group[i])
        flat = self.fp32_groups_gradients_flat[i]
        size = flat.numel() // len(ranks)
        return [
            (rank, flat[max(start, k * size) : min(stop, (k + 1) * size)])
            for k, rank in enumerate(ranks)
            if start < (k + 1) * size and k * size < stop
        ]

    @torch.no_grad()
    def accumulate_hp_grads_and_remove_lp(
        self, lp_param: nn.Parameter, group_idx: int, param_idx: int
    ) -> None:
        """Called in backward, when a parameter's gradient is complete."""
        gradient: Any = lp_param.grad
        lp_param.grad = None
        held = self._sums[group_idx][param_idx]
        before = self._products[group_idx][param_idx]
        if held.products == before:  # no product has added it
            held.total.copy_(gradient) if before == 0 else held.total.add_(gradient)
            held.products += 1
        self._products[group_idx][param_idx] = held.products
        self.fp32_groups_has_gradients[group_idx][param_idx] = True
        bucket = self._bucket_of.get((group_idx, param_idx))
        if bucket is not None and self._overlap and self.is_gradient_accumulation_boundary():
            bucket.missing -= 1
            while self._launched < len(self._buckets):
                if self._buckets[self._launched].missing:
                    break
                self._launch()

    def _launch(self) -> None:
        bucket = self._buckets[self._launched]
        self._launched += 1
        before, self._reduced = self._reduced, []
        for owner, part in bucket.parts:
            own, sent, work = owner == dist.get_rank(), part.to(self._dtype), None
            if dist.get_world_size(bucket.group) > 1:
                work = dist.reduce(sent, owner, group=bucket.group, async_op=True)
            self._reduced.append(_Reduced(work, part, sent, own))
        self._send_across(before)

    def _send_across(self, reduced: list[_Reduced]) -> None:
        """What is reduced goes on to this shard's other owners: of one bucket when the next one has
        left, so that nothing waits for it.
        """
        for run in reduced:
            if run.own and self._replicas is not None:
                if run.work is not None:
                    run.work.wait()
                run.work = dist.all_reduce(run.sent, group=self._replicas, async_op=True)
        self._across += reduced

    @torch.no_grad()
    def reduce_gradients(self, pipeline_parallel: bool = False) -> None:
        """DeepSpeed's engine calls this after the last micro-batch's backward."""
        groups = zip(self.fp32_groups_gradients, self.fp32_groups_has_gradients, strict=True)
        for sums, there in groups:
            for summed, has_gradient in zip(sums, there, strict=True):
                if not has_gradient:
                    summed.zero_()
        while self._launched < len(self._buckets):
            self._launch()
        self._send_across(self._reduced)
        for run in self._across:
            if run.work is not None:
                run.work.wait()
            if run.own and run.sent is not run.part:
                run.part.copy_(run.sent)
        self._reduced, self._across, self._launched = [], [], 0
        for bucket in self._buckets:
            bucket.missing = bucket.parameters

    def sums(self) -> list[Tensor]:
        """What this rank owns of the gradients, summed over the ranks that have them; their average
        over all ranks, the experts' too, is a ``ranks``-th.
        """
        return self.fp32_groups_gradient_flat_partition

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        self._global_grad_norm, self.overflow = self.decision.norm, not self.decision.applies
        if self.overflow:
            return  # what was summed is overwritten by the next step's
        for partition, gradient in zip(self.fp32_groups_flat_partition, self.sums(), strict=True):
            partition.grad = gradient
        factor = self.decision.factor / self.ranks
        fused = isinstance(self.optimizer, torch.optim.AdamW)
        if fused:  # its kernel divides on its way
            scale = torch.full((), 1 / factor, device=self.sums()[0].device)
            self.optimizer.grad_scale = None if factor == 1 else scale
        elif factor != 1:
            torch._foreach_mul_(self.sums(), factor)
        self.optimizer.step()
        self._lazy_init_hp_params_optimizer_state()
        self.update_lp_params()

    def clear_hp_grads(self) -> None:
        """Nothing is cleared: the first gradient of the next step overwrites what is there."""
        self.fp32_groups_has_gradients = [[False] * len(s) for s in self.fp32_groups_gradients]
        # What each sum's ``products`` were after its last hook.
        self._products = [[0] * len(s) for s in self.fp32_groups_gradients]
        for held in chain.from_iterable(self._sums):
            held.products = 0


@contextmanager
def in_place_of_deepspeeds(sharding: ShardGroups) -> Iterator[None]:
    """While ``deepspeed.initialize`` runs inside, what it makes for bf16 at ZeRO 1 is a
    :class:`Bf16Optimizer`, and the ranks over which ZeRO shards and averages are those that share a
    copy of the state.
    """
    module, whole = deepspeed.runtime.engine, registry._get_sequence_data_parallel_group
    module.BF16_Optimizer = Bf16Optimizer
    bf16_optimizer.see_memory_usage = lambda *_, **__: None  # five prints of three lines at a start
    if sharding.replicas.size > 1:
        registry._get_sequence_data_parallel_group = lambda: sharding.dense.handle
    try:
        yield
    finally:
        module.BF16_Optimizer = BF16_Optimizer
        registry._get_sequence_data_parallel_group = whole


def decide_by(decision: Decision, optimizer, stage: int) -> None:
    """Lets DeepSpeed's optimizer of a ZeRO stage take ``decision`` instead of asking the device
    about overflow, norm and clipping, and the ranks about each of them.
    """
    assert type(optimizer) is not BF16_Optimizer, "DeepSpeed made another optimizer than ours"
    optimizer.decision = decision
    if isinstance(optimizer, Bf16Optimizer):
        return

    def clip(gradients: list[Tensor]) -> None:
        if decision.factor < 1:
            torch._foreach_mul_(gradients, decision.factor)

    if stage == 3:
        optimizer._get_norm_groups = lambda: [decision.norm]
        optimizer.unscale_and_clip_grads = lambda i, norm: clip(
            [optimizer.fp32_partitioned_groups_flat[i].grad]
        )
    else:
        optimizer.check_overflow = lambda partition_gradients=True: None  # the norm says it too
        optimizer.scaled_global_norm = lambda norm_type=2: decision.norm
        optimizer.unscale_and_clip_grads = lambda gradients, norm: clip(gradients)


def masters(optimizer, stage: int) -> list[Tensor]:
    """The flat fp32 shards of the weights in an optimizer of ZeRO 1 to 3."""
    if isinstance(optimizer, Bf16Optimizer):
        return list(optimizer.fp32_groups_flat_partition)
    if stage == 3:
        return list(optimizer.fp32_partitioned_groups_flat)
    return list(optimizer.single_partition_of_fp32_groups)


def square(values: Tensor) -> Tensor:
    """The sum of squares in fp64, read once.  Row by row: in one long sum fp32 loses digits (on a
    CPU 1e-5 at 250,000 values).
    """
    whole = values.numel() // _ROW * _ROW
    rows = torch.linalg.vector_norm(values[:whole].view(-1, _ROW), dim=1, dtype=torch.float32)
    rest = torch.linalg.vector_norm(values[whole:], dtype=torch.float32)
    return torch.cat([rows, rest.view(1)]).double().square().sum()


def build_adam(groups: list[dict], train: TrainConfig, device: torch.device, offload: bool):
    """AdamW: torch's fused one, DeepSpeed's, or NVIDIA's Apex, built from its source; or Muon."""
    common: dict[str, Any] = dict(
        lr=train.lr, betas=train.betas, eps=train.eps, weight_decay=train.weight_decay
    )
    if train.optimizer == "deepspeed":
        from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

        try:  # the first start on a machine compiles it, which takes minutes
            if offload or device.type == "cpu":
                return DeepSpeedCPUAdam(groups, adamw_mode=True, **common)
            return FusedAdam(groups, adam_w_mode=True, **common)
        except RuntimeError as problem:
            reason = " ".join(str(problem).split())[:200]
            text = f"train.optimizer (deepspeed) cannot be compiled here: {reason}"
            raise UserError(text) from None
    if train.optimizer == "apex":
        try:
            from apex.optimizers import FusedAdam as ApexAdam
        except ImportError:
            raise UserError(
                "train.optimizer (apex) needs NVIDIA's apex, built from its source; "
                "PyPI's apex is another package"
            ) from None
        return ApexAdam(groups, adam_w_mode=True, **common)
    if train.optimizer == MUON:
        supported.ZERO_SUPPORTED_OPTIMIZERS.append(Muon)  # by type
        return Muon(groups, fused=True, **common)
    return torch.optim.AdamW(groups, fused=True, **common)
