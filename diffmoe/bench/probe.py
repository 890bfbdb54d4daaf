"""``run.py bench probe WHAT``: what this machine can do, and whether it does it right, before
anything long is asked of it.

- machine: versions; the ceilings of matrix products, copies and attention at the models' shapes,
  and which attention kernel runs; what a launch and a read by the host take
- experts: forward and backward of the experts in every arrangement (bmm, grouped, loop), and of the
  way there and back, against a plain loop in fp64: all with rows, some without, none at all
- nccl: new groups in a world of one, and every kind of collective that training uses, in each (gloo
  on a CPU)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.nn.functional as F
from torch import Tensor
from torch.utils.benchmark import Timer

from diffmoe.bench import measure
from diffmoe.bench.options import bench_parser, count
from diffmoe.device import backend, local_device, synchronize
from diffmoe.gradient_sums import add_product, give_sum
from diffmoe.moe.dispatch import by_expert, by_source, combine, dispatch, make_plan
from diffmoe.moe.experts import Experts, has_grouped_matmul
from diffmoe.moe.routing import Routing
from diffmoe.parallel.collectives import arrived
from diffmoe.parallel.groups import single_process

_WIDTHS = {"S": (384, 6), "L": (1024, 16), "XL": (1152, 16)}  # width, heads
_TOKENS = 256  # of a sample
# Rows of eight experts: all with as many, some without, none at all.
_ROWS = {"all": [24] * 8, "some": [0, 40, 0, 1, 0, 64, 7, 0], "none": [0] * 8}
_BOUNDS = {torch.bfloat16: 3e-2, torch.float32: 1e-5}


def main(arguments: list[str]) -> int:
    """The kind ``probe``; returns 1 where something is wrong.  UserError for bad input."""
    parser = bench_parser(
        "probe", "What this machine can do, and whether it does it right.", of="machine"
    )
    add = parser.add_argument
    add("what", choices=("machine", "experts", "nccl"))
    add("--samples", type=count, default=64, help="of a micro-batch (default 64)")
    add("--seconds", type=float, default=0.2, help="for each timing (default 0.2)")
    options = parser.parse_args(arguments)
    device = local_device(0, 1)
    probe = {"machine": machine, "experts": experts, "nccl": nccl}[options.what]
    facts, text, wrong = probe(device, options)
    text += "".join(f"\n\nwrong: {line}" for line in wrong)
    facts |= {"wrong": wrong, **measure.surroundings(device)}
    measure.report(f"probe_{options.what}", facts, text, {}, "", options)
    return 1 if wrong else 0


def machine(device: torch.device, options: Any) -> tuple[dict[str, Any], str, list[str]]:
    """(record, tables, what is wrong)."""

    def seconds(call: Callable[[], object]) -> float:
        call()  # what a library or an allocator does once
        synchronize(device)
        timer = Timer("call()", globals={"call": call})
        return timer.blocked_autorange(min_run_time=options.seconds).median

    random = lambda *shape: torch.randn(*shape, device=device).to(torch.bfloat16)
    large, tokens = device.type == "cuda", options.samples * _TOKENS
    products, copies, attention = {}, {}, {}

    def product(name: str, multiply: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor):
        products[name] = 2 * a.numel() * b.shape[-1] / seconds(partial(multiply, a, b))

    side = 8192 if large else 256
    product(f"{side} x {side}", torch.mm, random(side, side), random(side, side))
    for name, (width, _) in _WIDTHS.items():
        x, inner = random(tokens, width), 4 * width
        product(f"{name} qkv", torch.mm, x, random(width, 3 * width))
        product(f"{name} fc1", torch.mm, x, random(width, inner))
        product(f"{name} fc2", torch.mm, random(tokens, inner), random(inner, width))
        each = x.view(16, tokens // 16, width)
        product(f"{name} 16 experts' fc1", torch.bmm, each, random(16, width, inner))
    sizes = {f"{name} [T, D]": tokens * width for name, (width, _) in _WIDTHS.items()}
    for name, size in {**sizes, "large": 2**29 if large else 2**23}.items():
        x = random(size)
        copies[name] = 4 * size / seconds(partial(torch.empty_like(x).copy_, x))
        del x
    for name in ("L", "XL"):
        attention[name] = _attention(device, options.samples, *_WIDTHS[name], seconds)
    small = torch.ones(1, device=device)
    launch_us, read_us = 1e6 * seconds(partial(small.add_, 1)), 1e6 * seconds(small.item)
    facts = {
        "matmul_flops": products,
        "copy_bytes_s": copies,
        "attention": attention,
        "launch_us": launch_us,
        "read_us": read_us,
    }
    rows = [
        [n, a["head"], a["flops"] / 1e12, ", ".join(a["kernels"])] for n, a in attention.items()
    ]
    found = [
        (["product, bf16", "TFLOP/s"], [[name, f / 1e12] for name, f in products.items()]),
        (["copy, bf16", "GB/s read and written"], [[n, b / 1e9] for n, b in copies.items()]),
        (["attention, forward + backward", "head dimension", "TFLOP/s", "kernels"], rows),
    ]
    text = "\n\n".join(measure.table(head, rows) for head, rows in found)
    text += f"\n\nA launch takes the host {launch_us:.3g} µs, a read {read_us:.3g} µs."
    return facts, text, []


def _attention(
    device: torch.device, samples: int, width: int, heads: int, seconds: Callable[..., float]
) -> dict[str, Any]:
    """Forward and backward at the model's strides: FLOP/s (backward as 2.5 forward), kernels."""
    head = width // heads
    qkv = torch.randn(samples, _TOKENS, 3, heads, head, device=device).to(torch.bfloat16)
    q, k, v = (part.transpose(1, 2).requires_grad_() for part in qkv.unbind(2))
    dy = torch.randn(samples, heads, _TOKENS, head, device=device).to(torch.bfloat16)

    def run() -> None:
        y = F.scaled_dot_product_attention(q, k, v)
        torch.autograd.grad(y, (q, k, v), dy)

    flops = 3.5 * 4 * samples * _TOKENS**2 * width / seconds(run)
    kernels = [key for key, _, _ in measure.traced(run, device)]
    return {
        "head": head,
        "flops": flops,
        "kernels": [key for key in kernels if measure.kind_of(key) == "attention"][:2],
    }


def experts(device: torch.device, _: Any) -> tuple[dict[str, Any], str, list[str]]:
    """(record, table, what is wrong)."""
    arranged = [(a, how) for a in ("gelu", "swiglu") for how in ("bmm", "grouped", "loop")]
    cases = [
        (activation, how, rows, dtype)
        for dtype in _BOUNDS
        for activation, how in [*arranged, ("there and back", "dispatch")]
        for rows in _ROWS
        if how != "bmm" or rows != "some"
    ]
    cases += [(form, "sums", "all", dtype) for dtype in _BOUNDS for form in ("matrix", "stack")]
    found, wrong, table = [], [], []
    for activation, how, rows, dtype in cases:
        used = how != "grouped" or has_grouped_matmul(device, dtype)
        if not used and device.type == "cuda":
            continue
        error, largest = None, math.nan
        try:
            if how == "dispatch":
                largest = _dispatched(device, rows, dtype)
            elif how == "sums":
                largest = _summed(device, (8,) if activation == "stack" else (), dtype)
            else:
                largest = _arranged(device, activation, how, rows, dtype)
        except Exception as raised:  # of torch's own kernels: the rest goes on
            error = " ".join(str(raised).split())[:200]
        name = f"{activation}, {how}, rows for {rows}, {str(dtype).removeprefix('torch.')}"
        difference = None if error else largest
        found.append({"case": name, "used": used, "difference": difference, "error": error})
        table.append([name, error or f"{largest:.1e}", "" if used else "not used here"])
        if used and not largest <= _BOUNDS[dtype]:  # not <=: NaN too
            bound = f"differs by {largest:.1e}, bound {_BOUNDS[dtype]:.0e}"
            wrong.append(f"{name}: {error or bound}")
    head = ["experts, forward + backward", "largest relative difference", ""]
    return {"cases": found}, measure.table(head, table), wrong


def _arranged(
    device: torch.device, activation: Any, how: str, rows: str, dtype: torch.dtype
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
        found = _passed(lambda x: ours(x, given), x.to(device), dy.to(device), ours.parameters())
    one_by_one = lambda x: _one_by_one(exact, x, counts)
    wanted = _passed(one_by_one, x.double(), dy.double(), exact.parameters())
    return _largest(found, wanted)


def _one_by_one(experts: Experts, x_RD: Tensor, counts: list[int]) -> Tensor:
    """Its definition: every row by itself, through the weights of its expert."""
    numbers, rows = [i for i, count in enumerate(counts) for _ in range(count)], []
    weights = dict(experts.named_parameters())
    for i, x_D in zip(numbers, x_RD):
        w = {name: value[i] for name, value in weights.items()}
        h = x_D @ w["fc1_weight"]
        if experts.activation == "gelu":
            a = F.gelu(h + w["fc1_bias"], approximate="tanh")
            rows.append(a @ w["fc2_weight"] + w["fc2_bias"])
        else:
            rows.append((F.silu(x_D @ w["gate_weight"]) * h) @ w["fc2_weight"])
    return torch.stack(rows) if rows else x_RD + 0 * sum(p.sum() for p in weights.values())


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
    plain = lambda x: x * (exact * mask).sum(1, keepdim=True)
    found = _passed(lambda x: ours(x, s).to(dtype), x.to(device), dy.to(device), [s])
    return _largest(found, _passed(plain, x.double(), dy.double(), [exact]))


def _summed(device: torch.device, stack: tuple[int, ...], dtype: torch.dtype) -> float:
    """Two products of matrices, or of stacks of them, that ``add_product`` adds up."""
    generator, held = torch.Generator().manual_seed(0), torch.empty(*stack, 64, 32, device=device)
    held.fill_(math.nan)
    weight = torch.empty_like(held)  # while it lives, the sum does
    give_sum(weight, held)
    wanted = torch.zeros(held.shape, dtype=torch.float64)
    for _ in range(2):
        a, b = (torch.randn(*stack, 24, n, generator=generator).to(device, dtype) for n in (64, 32))
        add_product(held, a.mT, b)
        wanted += a.cpu().double().mT @ b.cpu().double()
    return _largest([held.cpu().double()], [wanted])


def _passed(
    run: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor, others: Iterable[Tensor]
) -> list[Tensor]:
    """Output, and gradients of input and ``others``, in fp64 on the CPU."""
    x = x.detach().requires_grad_()
    y = run(x)
    y.backward(dy)
    gradients = (torch.zeros_like(p) if p.grad is None else p.grad for p in (x, *others))
    found: list[Any] = [y, *gradients]
    return [t.detach().cpu().double() for t in found]


def _largest(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest relative difference; where nothing is wanted, what is there."""
    pairs = zip(found, wanted, strict=True)
    return max(((a - b).norm() / (b.norm() if b.any() else 1.0)).item() for a, b in pairs)


def nccl(device: torch.device, _: Any) -> tuple[dict[str, Any], str, list[str]]:
    """(record, table, what is wrong)."""
    took: dict[str, float] = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        value = call()
        synchronize(device)
        took[name] = 1e3 * (time.perf_counter() - start)
        return value

    timed("start", lambda: measure.world_of_one(device))
    groups: dict[str, Any] = {"the world": dist.group.WORLD}
    for name in ("new group 1", "new group 2"):
        groups[name] = timed(name, lambda: dist.new_group([0]))
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
