"""Training passes on CUDA tensors that hold nothing (torch's fake tensors): what the host does is
real, kernels are not run.

    python -m diffmoe.bench.fake_cuda tests/fake_cuda_cases.py

Prints a line of JSON for each case: [name, what came of it].  Tensors without memory
may be large: published sizes take seconds.
"""

import contextlib
import functools
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffmoe.bench import measure
from diffmoe.bench.counted import fake_loss, fake_model
from diffmoe.config import ModelConfig, MoEConfig, load_config
from diffmoe.cost.memory import engine_facts, rank_memory
from diffmoe.deepspeed_json import read_deepspeed
from diffmoe.layout import resolve_layout
from diffmoe.models.compiled import compile_blocks
from diffmoe.moe.experts import Experts, has_grouped_matmul
from diffmoe.parallel.groups import ParallelGroups, build_groups, single_process

REPOSITORY = Path(__file__).resolve().parent.parent
BATCH, EXPERTS, WIDTH, HIDDEN = 8, 8, 64, 256
ROTATED = "diffmoe_s_e16_flow model.positions=rope model.qk_norm=true model.activation=swiglu"


class OnlyOneDevice(TorchDispatchMode):
    """Raises where an operator gets a tensor from the host: a copy for which it would wait."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        host = [
            x
            for x in tree_leaves((args, kwargs))
            if isinstance(x, torch.Tensor) and x.device.type == "cpu" and x.dim() and x.numel()
        ]
        if host:
            raise AssertionError(f"{func} reads {[tuple(x.shape) for x in host]} from the host")
        return func(*args, **(kwargs or {}))


def training_pass(
    family: str,
    recompute: str,
    dtype: torch.dtype,
    groups: ParallelGroups,
    compiled: bool = False,
    ddpm: bool = False,
    **block: Any,
) -> None:
    """Forward, losses and backward, as a micro-batch has them."""
    sizes = {"width": WIDTH, "depth": 4, "heads": 2, "input_size": 16, "classes": 10}
    config = ModelConfig(family=family, learn_sigma=ddpm, **sizes, **block)
    dit = fake_model(config, MoEConfig(experts=EXPERTS), BATCH, recompute, dtype, groups)
    loss = fake_loss(dit, BATCH, ddpm)
    if compiled:
        compile_blocks(dit)
    with (
        contextlib.nullcontext() if compiled else OnlyOneDevice()
    ):  # torch.compile bears no such mode
        loss().backward()
    for p in dit.parameters():
        assert p.grad.device.type == "cuda" and p.grad.dtype == dtype and p.grad.shape == p.shape


def time_embedding(dtype: torch.dtype) -> None:
    """Its products, in backward too, are none that run.fp32_precision could make TF32, nor narrower
    ones.
    """
    dit = fake_model(
        ModelConfig(family="dense", width=WIDTH, depth=1, heads=2, input_size=16, classes=10),
        MoEConfig(),
        1,
        "none",
        dtype,
        single_process(),
    )
    seen = set()

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
                seen.update(x.dtype for x in args if isinstance(x, torch.Tensor))
            return func(*args, **(kwargs or {}))

    with Products():
        c = dit.t_embedder(torch.empty(BATCH, device="cuda"))
        c.sum().backward()
    assert seen == {torch.float64} and c.dtype == torch.float32, (seen, c.dtype)


def memory(name: str, recompute: str, samples: int) -> dict[str, int]:
    """Bytes of activations in bf16 after forward and at the peak, beside what the planner says of
    them.
    """
    overrides = [
        "parallel.ep=1",
        f"parallel.recompute={recompute}",
        f"train.micro_batch={samples}",
        f"train.batch={samples}",
        "moe.pool=rank",
    ]
    name, *changes = name.split()
    config = load_config(REPOSITORY / "configs" / f"{name}.yaml", [*overrides, *changes])
    engine = engine_facts(read_deepspeed(str(REPOSITORY / "ds_configs" / "zero1_bf16.json")))
    plan = rank_memory(config, resolve_layout(config, 1), engine)
    dit = fake_model(config.model, config.moe, samples, recompute, torch.bfloat16, single_process())
    loss = fake_loss(dit, samples)
    with measure.Allocations() as allocations:
        total = loss()
        kept = sum(size for _, size in allocations.events)
        total.backward()
    return {
        "kept": kept,
        "peak": allocations.peak([p.grad for p in dit.parameters()]),
        "planned": plan.activations,
        "planned_peak": plan.activations + plan.working,
        "planned_rank": plan.peak,
    }


@contextlib.contextmanager
def reads(numbers: list[int]) -> Iterator[list[None]]:
    """What the host reads from tensors that hold nothing; an entry for every time that it asks."""
    asked: list[None] = []

    def read(_: Tensor) -> list[int]:
        asked.append(None)
        return numbers

    with (
        mock.patch("diffmoe.moe.experts.read_by_host", read),
        mock.patch("diffmoe.moe.dispatch.read_by_host", read),
    ):
        yield asked


def experts_pass(how: str, activation: str) -> None:
    """Forward and backward of experts that got unequal numbers of rows, one of them none; a loop
    says so.
    """
    counts, dtype = [24, 0, 40, 8, 16, 8, 8, 24], torch.bfloat16
    assert has_grouped_matmul(torch.device("cuda"), dtype) == (how == "grouped")
    experts = Experts(WIDTH, HIDDEN, EXPERTS, EXPERTS, 0, activation)
    for name in [name for name, _ in experts.named_parameters()]:
        shape = getattr(experts, name).shape
        setattr(experts, name, torch.nn.Parameter(torch.empty(shape, dtype=dtype, device="cuda")))
    rows = torch.empty(sum(counts), WIDTH, dtype=dtype, device="cuda", requires_grad=True)
    with warnings.catch_warnings(record=True) as said, reads(counts) as asked:
        y = experts(rows, torch.empty(len(counts), dtype=torch.long, device="cuda"))
    assert len(asked) == len(said) == (how == "loop") and all(
        "in a loop" in str(warning.message) for warning in said
    )
    assert y.dtype == dtype and y.shape == rows.shape
    y.backward(torch.empty_like(y))
    for x in [rows, *experts.parameters()]:
        assert x.grad.shape == x.shape and x.grad.dtype == x.dtype


def attempt(name: str, case: Callable[..., Any], *args: Any) -> None:
    """Runs a case, and prints what came of it."""
    torch._dynamo.reset()
    try:
        with FakeTensorMode():
            found = case(*args) or "done"
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        found = f"the host reads {error.func}"
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
    print(json.dumps([name, found]), flush=True)


def main() -> None:
    """Every case."""
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    for dtype in (torch.float32, torch.bfloat16):
        for family in ("dense", "ec", "diffmoe"):
            for recompute in ("none", "block", "selective"):
                attempt(
                    f"{family}, {recompute}, {dtype}",
                    training_pass,
                    family,
                    recompute,
                    dtype,
                    single_process(),
                )
    for dtype in (torch.float32, torch.bfloat16):
        attempt(f"time embedding, {dtype}", time_embedding, dtype)
    attempt("ddpm", training_pass, "diffmoe", "none", torch.bfloat16, single_process(), False, True)
    attempt("tc", training_pass, "tc", "none", torch.bfloat16, single_process())
    block = {"positions": "rope", "norm": "rms", "qk_norm": True, "activation": "swiglu"}
    modern = functools.partial(training_pass, "diffmoe", "selective", torch.bfloat16, **block)
    attempt("modern", modern, single_process())
    torch.compile = functools.partial(torch.compile, backend="aot_eager_decomp_partition")
    for recompute in ("none", "selective"):
        for family in ("diffmoe", "tc"):
            attempt(
                f"compiled, {family}, {recompute}",
                training_pass,
                family,
                recompute,
                torch.bfloat16,
                single_process(),
                True,
            )
    attempt("compiled, modern", modern, single_process(), True)
    for activation in ("gelu", "swiglu"):
        attempt(f"grouped, {activation}", experts_pass, "grouped", activation)
    for config in (
        "diffmoe_s_e16_flow",
        "diffmoe_l_e16_flow",
        "diffmoe_xl_e8_flow",
        "dense_l_flow",
        ROTATED,
    ):
        for recompute in ("none", "block", "selective"):
            attempt(f"memory of {config}, {recompute}", memory, config, recompute, 64)
    torch.cuda.get_device_capability = lambda *_: (8, 0)
    attempt("loop", experts_pass, "loop", "gelu")
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=8)
    for recompute in ("none", "selective"):
        attempt(
            f"EP 4 of 8 ranks, {recompute}",
            training_pass,
            "diffmoe",
            recompute,
            torch.bfloat16,
            build_groups(4, 1),
        )
        attempt(
            f"compiled, EP 4 of 8 ranks, {recompute}",
            training_pass,
            "diffmoe",
            recompute,
            torch.bfloat16,
            build_groups(4, 1),
            True,
        )
    attempt(
        "EP 4, pool of 4 ranks",
        training_pass,
        "diffmoe",
        "none",
        torch.bfloat16,
        build_groups(4, 4),
    )


if __name__ == "__main__":
    main()
