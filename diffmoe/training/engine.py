"""DeepSpeed's engine as this trainer needs it; with ``zero_optimizers.py`` and
``zero_parameters.py``, which it loads, the only one that imports deepspeed.

Experts that DeepSpeed does not know as experts are overwritten with rank 0's at ``initialize``,
silently.  So expert tensors are tagged, their groups registered, a parameterless marker tells the
engine that there are experts, and after start every tensor is compared with what was given.  Leans
on DeepSpeed 0.19.8's private names; the parity table (``run.py verify``) is the first thing to run
on an upgrade.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from diffmoe.checkpoints.reader import FIRST_MOMENT, MASTER, SECOND_MOMENT
from diffmoe.config import Config
from diffmoe.deepspeed_json import given_to_deepspeed
from diffmoe.deepspeed_keys import MICS
from diffmoe.device import synchronize
from diffmoe.errors import UserError
from diffmoe.models.dit import DiT, ModelOutput
from diffmoe.models.logical import LogicalTensor, logical_tensors
from diffmoe.models.matrices import MUON
from diffmoe.moe.routing import RoutingRule
from diffmoe.parallel.collectives import agreed, anyone
from diffmoe.parallel.groups import Group, ParallelGroups, shard_groups
from diffmoe.training.muon import Muon

_SWAPPED = 2**22  # elements at a time


@dataclass(frozen=True)
class Span:
    """``count`` elements from ``start`` on of a flattened parameter: they lie from ``offset`` on in
    flat shard ``shard``.
    """

    start: int
    shard: int
    offset: int
    count: int


def import_deepspeed():
    """DeepSpeed, quietly, without its JIT-built shared-memory op (30 s of compiling for a CPU
    start).
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed 0.19.8 calls torch 2.13's collectives by their older names.
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"torch\.distributed|deepspeed"
    )
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # On a GPU there is none, and asking would look for a compiler of every op.
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def check_by_deepspeed(tree: dict) -> None:
    """Raises UserError where DeepSpeed's own models of its JSON refuse the merged ``tree``."""
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    try:
        DeepSpeedConfig(copy.deepcopy(given_to_deepspeed(tree)))
    except (AssertionError, ValueError, TypeError, KeyError, DeepSpeedConfigError) as problem:
        text = " ".join(str(problem).split())  # pydantic's have several lines
        raise UserError(f"DeepSpeed refuses the configuration: {text}") from None


class Engine:
    """One rank's share of training: forward, backward, step, and the fp32 state behind the
    parameters.

    Fp32 state is held as flat shards, congruent for masters, both moments and whatever copies them
    (EMA).  :meth:`span` says which elements of a parameter lie where in them, :meth:`read` puts
    whole tensors together.  ``deepspeed_tree``: as ``merge_deepspeed`` returns it.
    """

    def __init__(
        self,
        model: DiT,
        config: Config,
        deepspeed_tree: dict,
        groups: ParallelGroups,
        device: torch.device,
    ) -> None:
        self.deepspeed = import_deepspeed()
        # It imports deepspeed: not before import_deepspeed has.
        from diffmoe.training import zero_optimizers, zero_parameters

        self._zero, self._decision = zero_optimizers, zero_optimizers.Decision()
        self.model, self.groups, self.device, self.clip = model, groups, device, config.train.clip
        self.tensors = logical_tensors(model)
        parameters: list[Any] = [tensor.parameter for tensor in self.tensors]
        self.expert_parallel = groups.ep.size > 1
        with agreed(groups.world):
            zero = deepspeed_tree["zero_optimization"]
            self.stage: int = zero.get("stage", 0)
            self.offload = (zero.get("offload_optimizer") or {}).get("device", "none") == "cpu"
            self.sharding = shard_groups(groups, zero.get(MICS))
            self._adam = zero_optimizers.build_adam(
                zero_parameters.parameter_groups(self.tensors, groups.ep, config.train.optimizer),
                config.train,
                device,
                self.offload,
            )
        if self.sharding.replicas.size > 1 and self.stage == 3:
            for parameter in parameters:  # experts', the next line overwrites
                parameter.ds_zero_partition_process_group = self.sharding.dense.handle
        if self.expert_parallel:
            zero_parameters.declare_experts(model, self.tensors, groups.ep, self.sharding.experts)
        given = [parameter.detach().clone() for parameter in parameters]
        assert dist.is_initialized(), "init_process_group comes first"
        self.deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
        with agreed(groups.world):
            check_by_deepspeed(deepspeed_tree)
        with zero_optimizers.in_place_of_deepspeeds(self.sharding):
            self.engine, self.optimizer, _, _ = self.deepspeed.initialize(
                model=model,
                optimizer=self._adam,
                config=given_to_deepspeed(deepspeed_tree),
                dist_init_required=False,
            )
        self._sums = isinstance(self.optimizer, zero_optimizers.Bf16Optimizer)
        if self._sums:
            self.optimizer.reduce_in_buckets(
                parameters,
                zero["reduce_bucket_size"],
                self.engine.communication_data_type,
                zero["overlap_comm"],
                self.sharding.replicas,
            )
        if self.stage:
            zero_optimizers.decide_by(self._decision, self.optimizer, self.stage)
        if self.stage == 3:
            zero_parameters.hide_gathers_from_recompute(self.optimizer.parameter_offload)
            zero_parameters.gather_in_one_order(parameters)
        # This rank's flat fp32 shards of the weights (the parameters themselves at ZeRO 0).
        whole = [parameter.data for parameter in parameters]
        self.masters = zero_optimizers.masters(self.optimizer, self.stage) if self.stage else whole
        self._state_keys = self.masters if self.stage else parameters
        self._start_adam()
        self._assert_weights_survived(given)
        if isinstance(self._adam, Muon):
            dtype = parameters[0].dtype if self.device.type == "cuda" else None
            self._adam.share(self.sharding if self.stage else None, dtype)

    def _start_adam(self) -> None:
        """Zero moments and step 0, on every rank: some DeepSpeed optimizers take a dummy step at
        start, which would shift the bias correction; others have no state yet, which a checkpoint
        could not fill.
        """
        groups = (group for group in self._adam.param_groups if group[MUON])
        momenta = {id(key) for group in groups for key in group["params"]}
        for key in self._state_keys:
            state = self._adam.state[key]
            for name in (FIRST_MOMENT, SECOND_MOMENT)[: 1 if id(key) in momenta else 2]:
                state[name] = state[name].zero_() if name in state else torch.zeros_like(key.data)
        self.set_adam_step(0)

    def _assert_weights_survived(self, given: list[Tensor]) -> None:
        """DeepSpeed holds what it was given, up to the parameters' precision; then the masters get
        it in full.
        """
        changed = []
        for index, (tensor, before) in enumerate(zip(self.tensors, given, strict=True)):
            now, span = self._full(tensor), self.span(index)
            if not torch.equal(now, before.to(now.device, tensor.parameter.dtype).float()):
                changed.append(tensor.name)
            flat = self.masters[span.shard].detach().view(-1)
            part = before.reshape(-1)[span.start : span.start + span.count]
            flat[span.offset : span.offset + span.count].copy_(part)
        if anyone(bool(changed), self.groups.world):  # all of them, each with its own traceback
            raise AssertionError(
                f"DeepSpeed overwrote {changed[:3] or 'tensors of another rank'} at initialize"
            )

    def forward(self, x: Tensor, t: Tensor, y: Tensor, rule: RoutingRule) -> ModelOutput:
        """The model's forward, through the engine (ZeRO 3 gathers parameters on the way)."""
        return self.engine(x, t, y, rule)

    def backward(self, loss: Tensor) -> None:
        """Backward of one micro-batch's mean loss; the engine divides by accumulation and averages
        over ranks.  After the last one come :meth:`squared_norm` and :meth:`step`.
        """
        last = self.engine.is_gradient_accumulation_boundary()
        if self.stage:  # hooks in backward ask for it
            self.optimizer.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss)
        if not last:
            self.engine.step()  # counts the micro-batch
        elif self.sharding.replicas.size > 1 and not self._sums:
            with self.groups.trace.clock.waiting("exchange"):
                self._average_over_replicas()

    def _gradients(self) -> list[Tensor]:
        """What ZeRO 1 to 3 hold of them on this rank, after the last backward: averages, or a
        ``Bf16Optimizer``'s sums.
        """
        if self._sums:
            return self.optimizer.sums()
        if self.offload:
            synchronize(self.device)  # they are on their way to the host
            masters: list[Any] = self.masters  # which all have one by now
            return [master.grad for master in masters]
        return [
            gradient for group in self.optimizer.averaged_gradients.values() for gradient in group
        ]

    @torch.no_grad()
    def _average_over_replicas(self) -> None:
        """The shards of the gradient, so far averages over this rank's shard group, which may lie
        on the host: as one message from the device.
        """
        shards, replicas = self._gradients(), self.sharding.replicas
        dtype = self.engine.communication_data_type
        flat = torch.cat([shard.reshape(-1).to(self.device, dtype) for shard in shards])
        dist.all_reduce(flat, group=replicas.handle)
        parts = flat.div_(replicas.size).split([shard.numel() for shard in shards])
        for shard, part in zip(shards, parts, strict=True):
            shard.copy_(part.view_as(shard))

    def squared_norm(self) -> Tensor:
        """This rank's share (fp64, on the device) of the squared norm of the step's gradient before
        clipping: summed over all ranks, every dense tensor counts once and every expert once.
        """
        held: dict[int, list[Tensor]] = defaultdict(list)  # by what their squares are divided by
        if self.stage:
            counted = self.groups.world.size**2 if self._sums else 1
            held[self.sharding.replicas.size * counted] = self._gradients()
        else:
            for t in self.tensors:
                if t.parameter.grad is not None:
                    copies = self.holders(self.expert_parallel and t.experts is not None).size
                    held[copies].append(t.parameter.grad)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for divisor, gradients in held.items():
            squares = [self._zero.square(gradient.detach().reshape(-1)) for gradient in gradients]
            total += sum(square.to(self.device) for square in squares) / divisor
        return total

    def step(self, lr: float, norm: float) -> bool:
        """Updates by the step's gradient, clipped to ``train.clip`` where its ``norm``, the same
        number on all ranks, is more.  A norm that is not finite changes neither weights nor moments
        nor ``updates``.  Returns whether it is finite.
        """
        decision = self._decision
        decision.norm = norm
        decision.factor = min(1.0, self.clip / (norm + 1e-6)) if self.clip > 0 else 1.0
        for group in self._adam.param_groups:
            group["lr"] = lr
        if self.stage == 0 and not decision.applies:
            for tensor in self.tensors:
                tensor.parameter.grad = None  # what no optimizer touches
        elif self.stage == 0 and decision.factor < 1:
            grads = [t.parameter.grad for t in self.tensors if t.parameter.grad is not None]
            torch._foreach_mul_(grads, decision.factor)
        self.engine.step()
        if self.stage == 3 and not self.optimizer.persistent_parameters:
            synchronize(self.device)  # gathers are on a stream of their own, and nothing else waits
        if decision.applies:
            self.updates += 1
        elif self.stage == 0:
            self.set_adam_step(self.updates)  # some optimizers count for a group, gradients or none
        assert self.stage == 0 or self.engine.was_step_applied() == decision.applies, norm
        return decision.applies

    def shards(self, kind: str) -> list[Tensor]:
        """The shards of ``master``, ``exp_avg`` or ``exp_avg_sq``, congruent with each other; empty
        ones of what has none (Muon's second moment).
        """
        if kind == MASTER:
            return self.masters
        return [self._adam.state[k].get(kind, k.data.new_empty(0)) for k in self._state_keys]

    def set_adam_step(self, step: int) -> None:
        """Adam's count of updates, on which bias correction depends."""
        self.updates = step
        fused = any(group.get("fused") for group in self._adam.param_groups)
        for key in self._state_keys:
            # Each its own tensor: a shared one would count once per shard.
            device = key.device if fused else torch.device("cpu")
            self._adam.state[key]["step"] = torch.tensor(float(step), device=device)
        for group in self._adam.param_groups:
            if "step" in group or type(self._adam).__module__.startswith("apex"):
                group["step"] = step  # Apex counts here

    def span(self, index: int) -> Span:
        """What this rank holds of parameter number ``index`` of ``tensors``, perhaps nothing.  Not
        collective.
        """
        parameter: Any = self.tensors[index].parameter
        if self.stage == 0:
            return Span(0, index, 0, parameter.numel())
        if self.stage == 3:
            number = self.optimizer.get_param_id(parameter)
            shard, offset, count = self.optimizer.grad_position[number]
            start = count * self.optimizer._get_param_partition_rank(parameter)
            # The last ranks' are padded.
            return Span(start, shard, offset, max(0, min(count, parameter.ds_numel - start)))
        mapping = parameter._hp_mapping
        if mapping is None:
            return Span(0, 0, 0, 0)
        here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
        return Span(here.start, mapping.param_group_index, there.start, there.numel)

    def holders(self, experts: bool) -> Group:
        """The ranks that hold what this one does of its experts' state, or of all the rest."""
        if self.stage > 0:
            return self.sharding.replicas
        return self.groups.edp if experts else self.groups.world

    @contextlib.contextmanager
    def _in_place_of_masters(self, shards: list[Tensor]) -> Iterator[None]:
        _swap(self.masters, shards)
        try:
            yield
        finally:
            _swap(self.masters, shards)

    def read(self, shards: list[Tensor]) -> Iterator[tuple[LogicalTensor, Tensor]]:
        """(logical tensor, full fp32 value of this rank's layout) one by one.  Collective: every
        rank iterates to the end.  Any shards congruent with the masters will do.
        """
        with self._in_place_of_masters(shards):
            for tensor in self.tensors:
                self.groups.trace.at(tensor.name)
                yield tensor, self._full(tensor)

    def _full(self, tensor: LogicalTensor) -> Tensor:
        if self.stage == 0:
            # A copy: the caller may keep it while shards are swapped back.
            return tensor.parameter.data.float().clone()
        return self.deepspeed.utils.safe_get_full_fp32_param(tensor.parameter)

    def publish(self) -> None:
        """Makes the parameters equal the masters, after the masters were written or swapped."""
        if self.stage in (1, 2):
            self.optimizer.update_lp_params()
        elif self.stage == 3:
            # All of them: parameters that the trace of modules wants again soon stay whole after a
            # pass without backward, and the next forward would take them as they are.
            self.optimizer._partition_all_parameters()
            for i in range(len(self.masters)):
                self.optimizer._reassign_or_swap_out_partitioned_parameters(i)
            persistent = self.optimizer.persistent_parameters
            if persistent:
                persistent[0].all_gather(persistent)
            # DeepSpeed gathers on a stream of its own, which does not wait for these copies.
            synchronize(self.device)

    @contextlib.contextmanager
    def weights(self, shards: list[Tensor]) -> Iterator[DiT]:
        """The model with these weights (EMA, say) in eval mode; all ranks together.  They have
        every UserError in it; after another error the others do not come to publish.
        """
        together = True
        try:
            with self._in_place_of_masters(shards), torch.no_grad():
                self.publish()
                self.engine.eval()
                yield self.model
        except BaseException as error:
            together = isinstance(error, UserError)
            raise
        finally:
            self.engine.train()
            if together:
                self.publish()


def _swap(left: list[Tensor], right: list[Tensor]) -> None:
    """Exchanges contents in place: other code holds views of both.  A piece at a time: a shard may
    be all that a rank has.
    """
    if left is right:
        return
    with torch.no_grad():
        for a, b in zip(left, right, strict=True):
            parts = (tensor.data.view(-1).split(_SWAPPED) for tensor in (a, b))
            for here, there in zip(*parts, strict=True):
                kept = here.clone()
                here.copy_(there)
                there.copy_(kept)
