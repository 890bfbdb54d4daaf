"""Counts of a training step without a GPU, against what a hand can count, and against what the
planner's times are made of.

    python -m diffmoe.bench.fake_cuda tests/test_roofline.py

runs the cases that need CUDA tensors, and prints what came of them as JSON."""

import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from diffmoe.bench import fake_cuda, roofline
from diffmoe.bench.kernels import Counting, as_on_a_gpu
from diffmoe.config import load_config, override
from diffmoe.cost.hardware import choose, read_table
from diffmoe.cost.memory import engine_facts
from diffmoe.cost.step_time import moved, rates
from diffmoe.deepspeed_json import read_deepspeed
from diffmoe.layout import resolve_layout
from diffmoe.models.count import count

pytestmark = pytest.mark.full  # its fixtures take their time

T, D, H = 4096, 256, 1024  # rows, width, inner width
BF16 = "ds_configs/zero1_bf16.json"


def _tensor(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="cuda")


def two_passes():
    """Two operators over the same rows: eager each reads and writes them, compiled it is one
    kernel.
    """
    x = _tensor(T, D)
    return lambda: F.gelu(x, approximate="tanh") * 2


def pick_and_add():
    """Rows picked, scaled, and added up in fp32."""
    x, where, gate = _tensor(T, D), _tensor(T, dtype=torch.long), _tensor(T, dtype=torch.float32)
    return lambda: _tensor(T, D, dtype=torch.float32).index_add_(
        0, where, x.index_select(0, where) * gate.unsqueeze(1)
    )


def products():
    """A product with a row of biases, and batched ones with a matrix of them."""
    x, w, b = _tensor(4, T, D), _tensor(4, D, H), _tensor(4, 1, H)
    return lambda: (torch.addmm(b[0, 0], x[0], w[0]), torch.baddbmm(b, x, w))


def between_products():
    """Kernels before and after a product cannot become one, those beside each other can."""
    x, w = _tensor(T, D), _tensor(D, D)
    return lambda: (F.gelu(x) @ w, (x.float() * 3).sum(1), F.silu(x @ w) + 1)


CASES = {f.__name__: f for f in (two_passes, pick_and_add, products, between_products)}


def count_case(name, compiled):
    counting = Counting()
    with as_on_a_gpu(), FakeTensorMode():
        run = CASES[name]()
        if compiled:
            run = torch.compile(run, backend=counting.backend, fullgraph=True, dynamic=False)
            run()
            counting.kernels.clear()
            counting.fused.clear()
        with counting:
            run()
    return [
        [[k.kind, k.bytes, k.flops] for k in kernels]
        for kernels in (counting.kernels, counting.fused)
    ]


needs_a_device = pytest.mark.skipif(
    not fake_cuda.has_gpu() and shutil.which("g++") is None, reason="g++ builds the device"
)


@functools.cache
def found():
    run = fake_cuda.run(str(Path(__file__)), [], capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@needs_a_device
def test_eager_kernels_read_their_inputs_and_write_their_outputs():
    rows = T * D * 2
    assert found()["two_passes, eager"][0] == [["memory", 2 * rows, 0]] * 2
    (_, picked, _), (_, scaled, _), (_, added, _) = found()["pick_and_add, eager"][0]
    assert picked == 2 * rows + 8 * T
    assert scaled == rows + 4 * T + 2 * rows
    assert (
        added == 3 * (2 * rows) + 8 * T
    )  # the rows, and those they are added to, read and written


@needs_a_device
def test_products_have_flops_and_copy_what_they_add():
    one, sum_, four = found()["products, eager"][0]
    assert one == ["product", 2 * (T * D + D * H + H + T * H), 2 * T * D * H]
    assert four[0] == "product" and four[2] == 4 * one[2]
    assert sum_ == ["memory", 2 * (4 * H + 4 * T * H), 0]


@needs_a_device
def test_compiled_operators_become_one_kernel():
    kernels, ideal = found()["two_passes, compiled"]
    assert kernels == ideal == [["memory", 2 * T * D * 2, 0]]


@needs_a_device
def test_the_ideal_fusion_stops_at_products():
    kernels, ideal = found()["between_products, compiled"]
    assert sum(k[0] == "product" for k in kernels) == sum(k[0] == "product" for k in ideal) == 2
    before, after = sorted((k[1] for k in ideal if k[0] == "memory"), reverse=True)
    assert (
        before == 2 * T * D * 2 + 4 * T and after == 2 * T * D * 2
    )  # x is read once for both of its readers
    assert sum(k[1] for k in kernels) >= sum(k[1] for k in ideal)


def _small(*changes):
    return load_config(
        "configs/diffmoe_l_e16_flow.yaml",
        ["model.depth=4", "moe.experts=8", "train.micro_batch=16", *changes],
    )


@needs_a_device
@pytest.mark.parametrize("recompute", ["none", "block", "selective"])
def test_reads_by_the_host_and_collectives_of_a_pool_over_ranks(recompute):
    """Two layers, in forward; recompute keeps what was read."""
    config = _small(
        "parallel.ep=8", "moe.pool=group", "train.batch=128", f"parallel.recompute={recompute}"
    )
    engine = fake_cuda.counted([(config, BF16, "engine")], 8)[0]
    assert engine["reads"] == {"forward": 2, "outside": 1}  # one a layer, and one a step
    assert engine["collectives"]["all_to_all_single"] >= 2 * 4, (
        "rows go there and back, and gradients"
    )


@needs_a_device
@pytest.mark.parametrize(
    "router",
    [
        "model.family=tc moe.balance=bias moe.score=sigmoid moe.top_k=2 moe.gates=normalized",
        "model.family=ec moe.pool=1 moe.capacity=2 moe.router_input=time_token",
        "moe.pool=rank moe.threshold_from=1 train.repa_weight=0.5 data.flip=false",
        "model.family=race moe.score=identity moe.target_weight=0.01",
        "model.family=prototype train.dispersive_weight=0.5",
    ],
)
def test_every_router_is_counted(router):
    """Experts of all of them are batched or grouped products, and rows go there and back."""
    words = ["parallel.ep=8", "moe.pool=group", "train.batch=128", *router.split()]
    (found,) = fake_cuda.counted([(_small(*words), BF16, "eager")], 8)
    names = " ".join(kernel[1] for kernel in found["kernels"])
    assert ("bmm" if "ec" in router else "_grouped_mm") in names
    assert found["collectives"]["all_to_all_single"] >= 2 * 4


@needs_a_device
def test_no_layer_reads_where_pools_are_in_a_rank():
    engine = fake_cuda.counted(
        [(_small("parallel.ep=1", "moe.pool=rank", "train.batch=16"), BF16, "engine")], 1
    )[0]
    assert set(engine["reads"]) == {"outside"} and "all_to_all_single" not in engine["collectives"]
    sources = {kernel[4] for kernel in engine["kernels"]}
    assert {"Adam", "EMA", "gradient's norm"} <= sources
    adam = sum(k[2] * k[5] for k in engine["kernels"] if k[4] == "Adam") / engine["parameters"]
    assert adam == pytest.approx(
        28, rel=0.01
    )  # master and moments read and written, the gradient read


@needs_a_device
@pytest.mark.parametrize("change", ["moe.experts=16", "model.family=dense"])
def test_the_planner_moves_what_is_counted(change):
    config = override(
        _small("parallel.ep=1", "moe.pool=rank", "train.batch=16", "train.compile=false"), [change]
    )
    layout, hardware = resolve_layout(config, 1), choose(read_table(None), "h100")
    micro = fake_cuda.counted([(config, BF16, "eager")], 1)[0]
    engine = fake_cuda.counted([(config, BF16, "engine")], 1)[0]
    size = sum(k[2] * k[5] for k in micro["kernels"] if k[0] == "memory")
    weights = (
        sum(k[2] * k[5] for k in engine["kernels"]) * micro["parameters"] / engine["parameters"]
    )
    facts = engine_facts(read_deepspeed(BF16))
    assert moved(config, layout, facts, hardware) == pytest.approx(size + weights, rel=0.05), (
        "count anew: run.py bench roofline --planner"
    )


@needs_a_device
def test_the_ideal_fusion_of_a_compiled_model_moves_less():
    config = _small("parallel.ep=1", "moe.pool=rank", "train.batch=16", "model.depth=2")
    micro = fake_cuda.counted([(config, BF16, "compiled")], 1)[0]
    moved = {
        form: sum(k[2] * k[5] for k in micro[form] if k[0] == "memory")
        for form in ("kernels", "ideal")
    }
    assert 0 < moved["ideal"] < moved["kernels"]


def test_a_step_is_priced_by_hand():
    """Kernels of a made-up count, at the stated rates; the host only shows where it is slower than
    the device.
    """
    config = load_config("configs/dense_l_flow.yaml", ["train.batch=128", "train.micro_batch=64"])
    hardware = choose(read_table(None), "h100")
    tree = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}
    speed = rates(config, hardware, engine_facts(tree))
    micro = {
        "kernels": [
            ["product", "mm", 10, int(speed["product"]), "model", 3],
            ["memory", "add", int(speed["memory"]), 0, "model", 1],
            ["product", "narrow", int(speed["memory"]), 1, "model", 1],
        ],
        "ideal": [],
        "parameters": 1,
        "kept": 1,
        "collectives": {},
    }
    engine = {
        "kernels": [["memory", "adam", 28, 0, "Adam", 1]],
        "parameters": 1,
        "reads": {"outside": 2},
    }
    case = roofline.Counted(config, 1, tree, hardware, micro, engine)
    parts = case.parts()
    assert parts["products"] == pytest.approx(2 * 4) and parts["elementwise"] == pytest.approx(2)
    assert parts["host"] == pytest.approx(2e-6 * hardware.read_us) and case.sources() == {
        "Adam": 28.0
    }
    macs = count(config.model, config.moe).forward_macs
    assert case.mfu(2.0) == pytest.approx(6 * macs * 128 / 2.0 / (hardware.tflops_bf16 * 1e12))


if __name__ == "__main__":
    results = {
        f"{name}, {'compiled' if compiled else 'eager'}": count_case(name, compiled)
        for name in CASES
        for compiled in (False, True)
        if not (compiled and name in ("pick_and_add", "products"))
    }
    print(json.dumps(results))
