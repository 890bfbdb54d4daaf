"""``run.py bench probe WHAT``: what this machine can do, and whether it does it right, before
anything long is asked of it.

machine   versions; the ceilings of matrix products, copies and attention at the models' shapes, and
which attention kernel
          runs; what a launch and a read by the host take
experts   forward and backward of the experts in every arrangement (bmm, grouped, loop), and of the
way there and back,
          against a plain loop in fp64: all with rows, some without, none at all
nccl      new groups in a world of one, and every kind of collective that training uses, in each
(gloo on a CPU)
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer

from diffmoe.bench import measure
from diffmoe.commands.common import Parser
from diffmoe.device import backend, local_device
from diffmoe.moe.dispatch import by_expert, by_source, combine, dispatch, make_plan
from diffmoe.moe.experts import Experts, has_grouped_matmul
from diffmoe.moe.routing import Routing
from diffmoe.parallel.collectives import arrived
from diffmoe.parallel.groups import single_process

_WIDTHS = {"S": (384, 6), "L": (1024, 16), "XL": (1152, 16)}  # width, heads
_TOKENS = 256  # of a sample
_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
# Rows of eight experts: all with as many, some without, none at all.
_ROWS = {"all": [24] * 8, "some": [0, 40, 0, 1, 0, 64, 7, 0], "none": [0] * 8}
_BOUNDS = {torch.bfloat16: 3e-2, torch.float32: 1e-5}


def main(arguments: list[str]) -> int:
    """The kind ``probe``; returns the exit code, 1 where something is wrong.  UserError for bad
    input.
    """
    parser = Parser(
        prog="bench probe", description="What this machine can do, and whether it does it right."
    )
    parser.add_argument("what", choices=("machine", "experts", "nccl"))
    parser.add_argument(
        "--samples",
        type=int,
        default=64,
        help="of a micro-batch, which gives the shapes (default 64)",
    )
    parser.add_argument("--seconds", type=float, default=0.2, help="for each timing (default 0.2)")
    parser.add_argument(
        "--json", action="store_true", help="one line of JSON in place of the table"
    )
    parser.add_argument("--out", help="folder that keeps table and JSON")
    options = parser.parse_args(arguments)
    device = local_device(0, 1)
    facts, text, wrong = {"machine": machine, "experts": experts, "nccl": nccl}[options.what](
        device, options
    )
    text += "".join(f"\n\nwrong: {line}" for line in wrong)
    facts |= {"wrong": wrong, **measure.surroundings(device)}
    measure.report(f"probe_{options.what}", facts, text, {}, "", options)
    return 1 if wrong else 0


# --------------------------------------------------------------------------------------------------
# machine


def machine(device: torch.device, options: Any) -> tuple[dict[str, Any], str, list[str]]:
    """(record, tables, what is wrong)."""
    seconds = partial(_seconds, least=options.seconds)
    products = {
        name: flops / seconds(call) for name, flops, call in _products(device, options.samples)
    }
    copies, tokens = {}, options.samples * _TOKENS
    sizes = {f"{name} [T, D]": tokens * width * 2 for name, (width, _) in _WIDTHS.items()}
    for name, size in {**sizes, "large": 2**30 if device.type == "cuda" else 2**24}.items():
        x = torch.randn(size // 2, device=device).to(torch.bfloat16)
        copies[name] = 2 * size / seconds(partial(torch.empty_like(x).copy_, x))
        del x
    attention = {
        name: _attention(device, options.samples, *_WIDTHS[name], seconds) for name in ("L", "XL")
    }
    small = torch.ones(1, device=device)
    facts = {
        "matmul_flops": products,
        "copy_bytes_s": copies,
        "attention": attention,
        "launch_us": 1e6 * seconds(partial(small.add_, 1)),
        "read_us": 1e6 * seconds(small.item),
    }
    text = measure.table(
        ["product, bf16", "TFLOP/s"], [[name, f / 1e12] for name, f in products.items()]
    )
    text += "\n\n" + measure.table(
        ["copy, bf16", "GB/s read and written"], [[n, b / 1e9] for n, b in copies.items()]
    )
    text += "\n\n" + measure.table(
        ["attention, forward + backward", "head dimension", "TFLOP/s", "kernels", *_BACKENDS],
        [
            [
                name,
                a["head"],
                a["flops"] / 1e12,
                ", ".join(a["kernels"]),
                *(_cell(a["backends"][b]) for b in _BACKENDS),
            ]
            for name, a in attention.items()
        ],
    )
    text += f"\n\nA launch takes the host {facts['launch_us']:.3g} µs, a read {facts['read_us']:.3g} µs."
    return facts, text, []


def _cell(value: float | str) -> str:
    return f"{value / 1e12:.3g} TFLOP/s" if isinstance(value, float) else "not here"


def _seconds(call: Callable[[], object], least: float) -> float:
    """Median seconds of a call that keeps a device busy for ``least`` seconds."""
    return Timer("call()", globals={"call": call}).blocked_autorange(min_run_time=least).median


def _products(device: torch.device, samples: int) -> list[tuple[str, int, Callable[[], Tensor]]]:
    """(name, FLOPs, call) of a large square product and of those of a block, experts' at equal
    counts included.
    """
    tokens, found = samples * _TOKENS, []
    random = lambda *shape: torch.randn(*shape, device=device).to(torch.bfloat16)
    square = 8192 if device.type == "cuda" else 256
    a, b = random(square, square), random(square, square)
    found.append((f"{square} x {square}", 2 * square**3, partial(torch.mm, a, b)))
    for name, (width, _) in _WIDTHS.items():
        x = random(tokens, width)
        for layer, out in (("qkv", 3 * width), ("fc1", 4 * width)):
            found.append(
                (
                    f"{name} {layer}",
                    2 * tokens * width * out,
                    partial(torch.mm, x, random(width, out)),
                )
            )
        found.append(
            (
                f"{name} fc2",
                8 * tokens * width**2,
                partial(torch.mm, random(tokens, 4 * width), random(4 * width, width)),
            )
        )
        found.append(
            (
                f"{name} 16 experts' fc1",
                8 * tokens * width**2,
                partial(torch.bmm, x.view(16, tokens // 16, width), random(16, width, 4 * width)),
            )
        )
    return found


def _attention(
    device: torch.device, samples: int, width: int, heads: int, seconds: Callable[..., float]
) -> dict[str, Any]:
    """Forward and backward at the model's strides: FLOP/s (backward as 2.5 forward), kernels, each
    backend's FLOP/s.
    """
    qkv = (
        torch.randn(samples, _TOKENS, 3, heads, width // heads, device=device)
        .to(torch.bfloat16)
        .requires_grad_()
    )
    dy = torch.randn(samples, heads, _TOKENS, width // heads, device=device).to(torch.bfloat16)

    def run() -> None:
        y = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in qkv.unbind(2)))
        torch.autograd.grad(y, qkv, dy)

    flops = 3.5 * 4 * samples * _TOKENS**2 * width
    found: dict[str, Any] = {"head": width // heads, "flops": flops / seconds(run), "backends": {}}
    found["kernels"] = [
        key for key, _, _ in measure.traced(run, device) if measure.kind_of(key) == "attention"
    ][:2]
    for name, kind in _BACKENDS.items():
        try:
            with sdpa_kernel(kind):
                found["backends"][name] = flops / seconds(run)
        except RuntimeError as error:  # what this device or build lacks
            found["backends"][name] = " ".join(str(error).split())[:120]
    return found


# --------------------------------------------------------------------------------------------------
# experts


def experts(device: torch.device, _: Any) -> tuple[dict[str, Any], str, list[str]]:
    """(record, table, what is wrong)."""
    dtypes = (torch.bfloat16, torch.float32)
    cases = [
        (activation, how, rows, dtype)
        for dtype in dtypes
        for activation in ("gelu", "swiglu")
        for how in ("bmm", "grouped", "loop")
        for rows in _ROWS
        if how != "bmm" or rows != "some"
    ]
    cases += [("there and back", "dispatch", rows, dtype) for dtype in dtypes for rows in _ROWS]
    found, wrong = [], []
    for activation, how, rows, dtype in cases:
        used = how != "grouped" or has_grouped_matmul(device, dtype)
        if not used and device.type == "cuda":
            continue
        error, largest = None, None
        try:
            largest = (
                _dispatched(device, rows, dtype)
                if how == "dispatch"
                else _arranged(device, activation, how, rows, dtype)
            )
        except (
            RuntimeError,
            ValueError,
        ) as raised:  # of torch's own kernels: the rest is still worth asking
            error = " ".join(str(raised).split())[:200]
        name = f"{activation}, {how}, rows for {rows}, {str(dtype).removeprefix('torch.')}"
        found.append({"case": name, "used": used, "difference": largest, "error": error})
        if used and (error or not largest <= _BOUNDS[dtype]):  # not <=: NaN too
            wrong.append(
                f"{name}: {error or f'differs by {largest:.1e}, bound {_BOUNDS[dtype]:.0e}'}"
            )
    text = measure.table(
        ["experts, forward + backward", "largest relative difference", ""],
        [
            [
                f["case"],
                f["error"] or f"{f['difference']:.1e}",
                "" if f["used"] else "not used here",
            ]
            for f in found
        ],
    )
    return {"cases": found}, text, wrong


def _arranged(
    device: torch.device, activation: str, how: str, rows: str, dtype: torch.dtype
) -> float:
    """The largest relative difference of output and gradients from those of a loop in fp64."""
    counts, generator = _ROWS[rows], torch.Generator().manual_seed(0)
    exact = Experts(64, 128, len(counts), len(counts), 0, activation).double()
    for p in exact.parameters():
        torch.nn.init.normal_(p, std=0.1, generator=generator)
    exact.to(dtype).double()  # the same rounded weights
    ours = Experts(64, 128, len(counts), len(counts), 0, activation)
    ours.load_state_dict(exact.state_dict())
    ours.to(device, dtype)
    x, dy = (torch.randn(sum(counts), 64, generator=generator).to(dtype) for _ in range(2))
    given = counts[0] if how == "bmm" else torch.tensor(counts, device=device)
    with mock.patch("diffmoe.moe.experts.has_grouped_matmul", lambda *_: how == "grouped"):
        found = _passed(
            lambda x: ours(x, given), x.to(device), dy.to(device), list(ours.parameters())
        )
    wanted = _passed(
        lambda x: _one_by_one(exact, x, counts), x.double(), dy.double(), list(exact.parameters())
    )
    return _largest(found, wanted)


def _one_by_one(experts: Experts, x_RD: Tensor, counts: list[int]) -> Tensor:
    """Its definition: every row by itself, through the weights of its expert."""
    numbers, rows = [i for i, count in enumerate(counts) for _ in range(count)], []
    for i, x_D in zip(numbers, x_RD):
        h = x_D @ experts.fc1_weight[i]
        if experts.activation == "gelu":
            a = F.gelu(h + experts.fc1_bias[i], approximate="tanh")
            rows.append(a @ experts.fc2_weight[i] + experts.fc2_bias[i])
        else:
            rows.append((F.silu(x_D @ experts.gate_weight[i]) * h) @ experts.fc2_weight[i])
    return torch.stack(rows) if rows else x_RD + 0 * sum(p.sum() for p in experts.parameters())


def _dispatched(device: torch.device, rows: str, dtype: torch.dtype) -> float:
    """Rows to the experts and home to a weighted sum, against the mask as a matrix in fp64."""
    generator, counts = torch.Generator().manual_seed(0), _ROWS[rows]
    mask = torch.stack([torch.randperm(64, generator=generator) < count for count in counts], dim=1)
    x, dy = (torch.randn(64, 64, generator=generator).to(dtype) for _ in range(2))
    scores = torch.rand(64, len(counts), generator=generator)
    ep = single_process().ep

    def ours(x: Tensor, scores: Tensor) -> Tensor:
        plan = make_plan(Routing(mask.to(device)), ep)
        there = by_expert(arrived(dispatch(x, plan, ep)), plan, 1, len(counts))
        return combine(by_source(there, plan, 1, len(counts)), scores, plan, None)

    s, exact = scores.clone().to(device).requires_grad_(), scores.double().requires_grad_()
    found = _passed(lambda x: ours(x, s).to(dtype), x.to(device), dy.to(device), [s])
    return _largest(
        found,
        _passed(
            lambda x: x * (exact * mask).sum(1, keepdim=True), x.double(), dy.double(), [exact]
        ),
    )


def _passed(
    run: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor, others: list[Tensor]
) -> list[Tensor]:
    """Output, and gradients of input and ``others``, in fp64 on the CPU."""
    x = x.detach().requires_grad_()
    y = run(x)
    y.backward(dy)
    return [t.detach().cpu().double() for t in (y, x.grad, *(p.grad for p in others))]


def _largest(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest relative difference; where nothing is wanted, what is there."""
    return max(
        ((a - b).norm() / (b.norm() if b.any() else 1.0)).item()
        for a, b in zip(found, wanted, strict=True)
    )


# -----------------------------------------------------------------------------------------------------
# nccl


def nccl(device: torch.device, _: Any) -> tuple[dict[str, Any], str, list[str]]:
    """(record, table, what is wrong)."""
    took: dict[str, float] = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        value = call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took[name] = 1e3 * (time.perf_counter() - start)
        return value

    store = Path(tempfile.mkdtemp(prefix="diffmoe-bench-")) / "store"
    timed(
        "start",
        lambda: dist.init_process_group(
            backend(device), init_method=f"file://{store}", rank=0, world_size=1
        ),
    )
    groups = {
        name: timed(name, lambda: dist.new_group([0])) for name in ("new group 1", "new group 2")
    }
    groups = {"the world": dist.group.WORLD, **groups}
    x, wrong = torch.arange(4096, device=device, dtype=torch.float32), []
    ops = torch.ops._c10d_functional
    for name, group in groups.items():
        calls = {
            "all-reduce": lambda: functional.all_reduce(x, "sum", group),
            "all-gather": lambda: ops.all_gather_into_tensor(x, 1, group.group_name),
            "all-to-all": lambda: ops.all_to_all_single(x, [len(x)], [len(x)], group.group_name),
        }
        for what, call in calls.items():
            for turn in ("first", "second"):
                y = timed(f"{what}, {name}, {turn}", lambda: functional.wait_tensor(call()))
            if not torch.equal(y, x):
                wrong.append(f"{what} in {name} of one rank changes what it is given")
    dist.destroy_process_group()
    text = measure.table([backend(device), "ms"], [[name, ms] for name, ms in took.items()])
    return {"backend": backend(device), "ms": took}, text, wrong
