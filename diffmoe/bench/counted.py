"""Counts of one case of ``bench roofline``, in a process that takes a GPU for granted
(:mod:`diffmoe.bench.fake_cuda`).

    python -m diffmoe.bench.fake_cuda diffmoe.bench.counted REQUESTS

REQUESTS is JSON, the arguments of :func:`count` of each, all of as many ranks; the last line
printed is the answers.  ``micro_batch``: forward and backward of the model on CUDA tensors without
memory, every expert of every rank with equally many rows.  ``engine``: the same layout's whole
optimizer step as it is on one rank, on a CPU with a narrow model of the same tensors: what
DeepSpeed, clipping, Adam and EMA move, and who reads the device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

import diffmoe.moe.dispatch
from diffmoe.bench.kernels import Counting, Kernel, as_on_a_gpu
from diffmoe.bench.measure import Allocations
from diffmoe.config import Config, ModelConfig, MoEConfig, config_from_tree, override
from diffmoe.cost.memory import engine_facts
from diffmoe.cost.traffic import rows_sent
from diffmoe.deepspeed_json import read_deepspeed
from diffmoe.diffusion.ddpm import ddpm_loss, linear_schedule
from diffmoe.diffusion.rectified_flow import flow_loss
from diffmoe.families import TOKENS_CHOOSE, Projector, projector_of
from diffmoe.gradient_sums import GradientSum
from diffmoe.layout import Layout, over_hosts, resolve_layout
from diffmoe.models.compiled import compile_blocks
from diffmoe.models.dit import DiT, patchify
from diffmoe.parallel import collectives
from diffmoe.parallel.groups import ParallelGroups, build_groups
from diffmoe.parallel.traffic import only_counting
from diffmoe.parity.synthetic import Training, build_model
from diffmoe.training.engine import Engine
from diffmoe.training.step import alignment_loss, target_loss, training_rule

# Whose an operator of the engine's step is, by files and functions that called it, the first that
# fits.
_SOURCES = {
    "EMA": r"training/ema|\bema",
    "Muon": r"training/muon\.py:(update|newton_schulz|_whole)",
    "Adam": r"/optim/|fused_adam|adam",
    "gradient's norm": r"norm",
    "reduction, its casts and copies": r"reduce",
    "gradients' clear": r"clear|zero_grad",
    "clipping": r"clip",
    "gradient hook": r"hook|accumulate",
    "weights in bf16": r"update_lp|lp_params|publish|gather",
}
_ENGINES = re.compile(r"/deepspeed/|diffmoe/training/(engine|ema|muon|zero_\w+)|/torch/optim/")
_MODEL = re.compile(r"diffmoe/(models|moe|diffusion|parallel/recompute)")


def fake_model(
    config: ModelConfig,
    moe: MoEConfig,
    pool: int,
    recompute: str,
    dtype: torch.dtype,
    groups: ParallelGroups,
    overlap: str = "none",
    dispersive: bool = False,
    projector: Projector | None = None,
) -> DiT:
    """A model on the device, all parameters in ``dtype``.  Inside of a FakeTensorMode."""
    with torch.device("cuda"):
        dit = DiT(
            config,
            moe,
            pool=pool,
            groups=groups,
            recompute=recompute,
            overlap=overlap,
            dispersive=dispersive,
            projector=projector,
        )
    for module in dit.modules():  # Module.to cannot swap fake parameters
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = torch.nn.Parameter(p.detach().to(dtype))
    return dit


def fake_loss(dit: DiT, samples: int, ddpm: bool = False) -> Callable[[], Tensor]:
    """The losses of a micro-batch.  Called outside of ``torch.device``, which would find the device
    for who forgot it.
    """
    schedule = linear_schedule().to(torch.device("cuda")) if ddpm else None
    side, channels = dit.model.input_size, dit.model.channels
    x, noise = (torch.empty(samples, channels, side, side, device="cuda") for _ in range(2))
    t = torch.empty(samples, dtype=torch.long if ddpm else torch.float32, device="cuda")
    y = torch.empty(samples, dtype=torch.long, device="cuda")

    # The rule of most steps: schedules have ended.
    rule = training_rule(dit.moe, max(dit.moe.capacity_until, dit.moe.threshold_from or 0))

    def loss() -> Tensor:
        inputs = dit, x, noise, t, y, rule
        denoising, output = ddpm_loss(*inputs, schedule) if schedule else flow_loss(*inputs)
        others = [each for r in output.moe for each in (r.predictor_loss, r.balance_loss)]
        heads = [r.target_TP for r in output.moe if r.target_TP is not None]
        others += [target_loss(heads, patchify(x, dit.model.patch))] if heads else []
        others.append(output.dispersive)
        if output.projected is not None:
            others.append(alignment_loss(output.projected, torch.empty_like(output.projected)))
        return denoising + sum(each for each in others if each is not None)

    return loss


def micro_batch(
    config: Config, ranks: int, per_node: int, bf16: bool, sums: bool, compiled: bool
) -> dict[str, Any]:
    """Kernels of a rank's micro-batch, of compiled graphs also with the ideal fusion; bytes of
    activations kept; collectives; parameters.  ``sums``: products add up weights' gradients.
    """
    # As if other ranks' tokens were like this one's.
    if resolve_layout(config, ranks).pool_ranks > 1 and config.model.family not in TOKENS_CHOOSE:
        config = override(config, ["moe.pool=rank"])
    layout, counting = _layout(config, ranks, per_node), Counting()
    groups = build_groups(layout.ep, layout.pool_ranks, per_host=layout.per_host)
    backend = functools.partial(torch.compile, backend=counting.backend)
    rows, halves = rows_sent(config, layout), 1 + (config.parallel.overlap == "halves")

    def evenly(counts: Tensor) -> list[int]:
        """What a host would read of counts that have no memory: rows go alike to every rank."""
        return [rows // layout.ep // halves] * len(counts)

    with (
        as_on_a_gpu(),
        FakeTensorMode(),
        mock.patch.object(torch, "compile", backend),
        mock.patch.object(diffmoe.moe.dispatch, "read_by_host", evenly),
    ):
        dit = fake_model(
            config.model,
            config.moe,
            layout.pool,
            config.parallel.recompute,
            torch.bfloat16 if bf16 else torch.float32,
            groups,
            config.parallel.overlap,
            config.train.dispersive_weight > 0,
            projector_of(config),
        )
        if sums:
            for p in dit.parameters():
                total = torch.empty_like(p, dtype=torch.float32)
                p.gradient_sum = GradientSum(total)  # type: ignore[attr-defined]
        loss = fake_loss(dit, layout.micro_batch, config.diffusion.process == "ddpm")
        if compiled:
            compile_blocks(dit)
            loss().backward()  # compiles
            dit.zero_grad(set_to_none=True)
            counting.kernels.clear()
            counting.fused.clear()
        with Allocations() as allocations, counting:
            total = loss()
            kept = sum(size for _, size in allocations.events)
            total.backward()
        return {
            "kernels": _alike(counting.kernels),
            "ideal": _alike(counting.fused),
            "kept": kept,
            "collectives": counting.collectives,
            "parameters": sum(p.numel() for p in dit.parameters()),
        }


def _layout(config: Config, ranks: int, per_node: int) -> Layout:
    return over_hosts(resolve_layout(config, ranks), config.parallel.exchange, [per_node])


def engine(config: Config, ranks: int, per_node: int, deepspeed: dict) -> dict[str, Any]:
    """A step outside of the model: kernels by source, reads by place, collectives; sizes."""
    model = config.model
    narrow = [
        f"model.width={min(model.width, 4 * model.heads)}",
        f"model.input_size={2 * model.patch}",  # 4 tokens a sample; pools are as many samples
        "model.classes=16",
    ]
    small = override(config, narrow)
    layout = _layout(small, ranks, per_node)
    groups = build_groups(layout.ep, layout.pool_ranks, per_host=layout.per_host)
    # A CPU's DeepSpeed also where there is a GPU: what is counted lies on the CPU.
    os.environ.update(LOCAL_RANK="0", DS_ACCELERATOR="cpu")
    # Other ranks' shards are not there: DeepSpeed gathers this rank's in their place.
    with (
        contextlib.redirect_stdout(io.StringIO()),
        mock.patch.object(Engine, "_assert_weights_survived", lambda *_: None),
        mock.patch.object(collectives, "_begin", functools.partial(_ones_come, collectives._begin)),
    ):
        dit = build_model(small, layout.pool, groups)
        parameters = sum(p.numel() for p in dit.parameters())  # before ZeRO 3 takes them away
        training = Training(dit, small, deepspeed, groups, torch.device("cpu"))
        batches = training.batches(0)[:1] * layout.accumulation
        training.step(0, batches)  # what is made once
        with Counting(_owner) as counting:
            training.step(1, batches)
    return {
        "kernels": _alike(k for k in counting.kernels if k.source != "model"),
        "reads": counting.reads,
        "collectives": counting.collectives,
        "parameters": parameters,
        "tensors": len(list(dit.parameters())),
    }


def _ones_come(begin: Callable[..., Tensor], *args: Any) -> Tensor:
    """What the other ranks send: that every token is chosen, say.  Before torch 2.13 it is whatever
    lay in memory, something else in forward and in recompute.
    """
    rows = begin(*args)
    with only_counting():
        rows.data.fill_(1)
    return rows


def _owner() -> tuple[str, str]:
    """(source: "model" or a part of the weights' traffic; place: forward, backward, outside)."""
    frame: FrameType | None = sys._getframe(1)
    calls: list[str] = []
    place, model = "outside", False
    while frame is not None and frame.f_code.co_name != "train_step":
        function = frame.f_code.co_name
        where = f"{frame.f_code.co_filename}:{function}"
        if function == "_engine_run_backward":
            # What is below was called by a hook, if by Python at all.
            place, calls = "backward", calls + ["hook"] if calls else []
            model = model or not calls
            break
        if not model and _ENGINES.search(where):
            calls.append(where)
        elif not calls and _MODEL.search(where):
            model = True
        frame = frame.f_back
    if frame is None or model or not calls:
        return "model", place if place == "backward" else "forward" if model else "outside"
    chain = " ".join(calls)
    known = (source for source, words in _SOURCES.items() if re.search(words, chain))
    return next(known, calls[0].rpartition(":")[2]), "outside"


def _alike(kernels: Iterable[Kernel]) -> list[list]:
    """[kind, name, bytes, FLOPs, source, how many] of kernels."""
    return [[*dataclasses.astuple(kernel), times] for kernel, times in Counter(kernels).items()]


def count(config: dict, deepspeed: str, ranks: int, per_node: int, part: str) -> dict[str, Any]:
    """``part``: eager, compiled or engine."""
    tree, given = read_deepspeed(deepspeed), config_from_tree(config)
    torch._dynamo.reset()
    if part == "engine":
        return engine(given, ranks, per_node, tree)
    bf16 = bool((tree.get("bf16") or {}).get("enabled"))
    sums = engine_facts(tree).sums_in_products
    return micro_batch(given, ranks, per_node, bf16, sums, part == "compiled")


if __name__ == "__main__":
    _requests = json.loads(sys.argv[1])
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=_requests[0]["ranks"])
    print(json.dumps([count(**request) for request in _requests]), flush=True)
    # The fake device's threads of autograd may not be joined, which now and then ends in an abort.
    os._exit(0)
