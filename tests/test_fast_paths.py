"""The layer's parts against their definitions; what they keep for backward."""

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from diffmoe.bench import measure
from diffmoe.bench.moe_layer import TextbookLoop
from diffmoe.config import ModelConfig, MoEConfig
from diffmoe.diffusion import randomness
from diffmoe.models.dit import DiT
from diffmoe.models.layers import Mlp
from diffmoe.models.logical import initialize
from diffmoe.moe import experts as experts_module
from diffmoe.moe.dispatch import _Gather, _WeightedSum, make_plan
from diffmoe.moe.experts import Experts, has_grouped_matmul
from diffmoe.moe.gating import logits
from diffmoe.moe.layer import MoELayer
from diffmoe.moe.routing import Routing, RoutingRule
from diffmoe.parallel.groups import single_process
from diffmoe.parallel.recompute import _contracts, forms

D, HIDDEN, EXPERTS = 16, 32, 4
COUNTS = {"equal": 6, "nobody's": 0, "ragged": [3, 0, 9, 4], "nobody's, ragged": [0, 0, 0, 0]}


def make_experts(kind, dtype):
    experts = Experts(D, HIDDEN, EXPERTS, EXPERTS, 0, kind).to(dtype)
    for n, p in enumerate(experts.parameters()):
        torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(n))
    return experts


def make_rows(counts, dtype):
    number = sum(counts) if isinstance(counts, list) else EXPERTS * counts
    return (
        torch.randn(number, D, generator=torch.Generator().manual_seed(1))
        .to(dtype)
        .requires_grad_()
    )


def plain(experts, rows, counts):
    """The definition: every row by itself, through its expert's matrices."""
    each = counts if isinstance(counts, list) else [counts] * EXPERTS
    outputs = []
    for row, i in zip(
        rows.unbind(0), (i for i, count in enumerate(each) for _ in range(count)), strict=True
    ):
        h = row @ experts.fc1_weight[i] + (0 if experts.fc1_bias is None else experts.fc1_bias[i])
        a = (
            F.gelu(h, approximate="tanh")
            if experts.gate_weight is None
            else F.silu(row @ experts.gate_weight[i]) * h
        )
        outputs.append(
            a @ experts.fc2_weight[i] + (0 if experts.fc2_bias is None else experts.fc2_bias[i])
        )
    return torch.stack(outputs) if outputs else rows * 1


def gradients(y, *leaves):
    # Random: weights that hardly differ from expert to expert would cancel in the softmax's
    # gradient, down to rounding.
    weight = torch.randn(
        y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    ).to(y.dtype)
    return torch.autograd.grad(
        (y * weight).sum(), [leaf for leaf in leaves if leaf is not None], allow_unused=True
    )


def assert_close(found, wanted, bound):
    assert found.shape == wanted.shape
    if not wanted.numel():
        return
    scale = wanted.abs().max().clamp_min(1e-9)
    assert ((found - wanted).abs().max() / scale).item() <= bound


WAYS = [
    (how, name)
    for name, counts in COUNTS.items()
    for how in ("batched", "loop", "grouped")
    if (how == "batched") == isinstance(counts, int)
]


@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
@pytest.mark.parametrize("how,name", WAYS)
def test_experts_are_their_definition(how, name, kind, monkeypatch):
    # torch's grouped matmul takes no fp64.
    dtype, bound = (torch.float32, 2e-6) if how == "grouped" else (torch.float64, 1e-12)
    monkeypatch.setattr(experts_module, "has_grouped_matmul", lambda *_: how == "grouped")
    experts, rows = make_experts(kind, dtype), make_rows(COUNTS[name], dtype)
    leaves = [rows, *experts.parameters()]
    counts = COUNTS[name]
    y, wanted = (
        experts(rows, counts if how == "batched" else torch.tensor(counts)),
        plain(experts, rows, counts),
    )
    assert_close(y.detach(), wanted.detach(), bound)
    for found, expected in zip(gradients(y, *leaves), gradients(wanted, *leaves), strict=True):
        assert found is not None, (
            "a gradient exists on every rank, also of an expert that nobody sends to"
        )
        assert_close(found, torch.zeros_like(found) if expected is None else expected, bound)


def test_a_loop_over_experts_is_not_mentioned_on_a_cpu():
    assert not has_grouped_matmul(torch.device("cpu"), torch.bfloat16)
    with warnings.catch_warnings():  # on CUDA it is: tests/test_cuda_paths.py
        warnings.simplefilter("error")
        make_experts("gelu", torch.float32)(
            make_rows([3, 0, 9, 4], torch.float32), torch.tensor([3, 0, 9, 4])
        )


def test_bias_gradients_of_the_grouped_matmul_add_up_in_fp32(monkeypatch):
    """In bf16 a sum of ones stands still at 256."""
    monkeypatch.setattr(experts_module, "has_grouped_matmul", lambda *_: True)
    experts, counts = make_experts("gelu", torch.bfloat16), [1000, 0, 3, 600]
    y = experts(make_rows(counts, torch.bfloat16), torch.tensor(counts))
    (gradient,) = torch.autograd.grad(y, experts.fc2_bias, torch.ones_like(y))
    assert gradient.dtype == torch.bfloat16 and gradient[:, 0].tolist() == [1000, 0, 3, 600]


def a_plan():
    """Of 9 tokens with none to four experts each."""
    mask = torch.tensor(
        [
            [0, 1, 1, 0],
            [0, 0, 0, 0],
            [1, 1, 1, 1],
            [0, 0, 0, 1],
            [1, 0, 0, 0],
            [0, 0, 0, 0],
            [0, 1, 0, 1],
            [1, 0, 1, 1],
            [0, 0, 0, 0],
        ],
        dtype=torch.bool,
    )
    return mask, make_plan(Routing(mask), single_process().ep)


def test_a_plan_finds_the_rows_of_every_token():
    mask, plan = a_plan()
    expert, token = mask.t().nonzero().unbind(1)
    assert torch.equal(plan.token_R, token) and torch.equal(plan.place_R, token * EXPERTS + expert)
    assert torch.equal(plan.counts, mask.sum(0))
    assert torch.equal(plan.by_token_R, plan.place_R.argsort())
    assert torch.equal(plan.first_T, mask.sum(1).cumsum(0) - mask.sum(1))


@pytest.mark.parametrize(
    "dtype,bound", [(torch.float64, 1e-15), (torch.float32, 1e-6), (torch.bfloat16, 2.0**-7)]
)
def test_rows_and_their_weighted_sum_are_their_definitions(dtype, bound):
    (mask, plan), wide = a_plan(), torch.promote_types(dtype, torch.float32)
    sizes = [((len(mask), D), dtype), ((int(mask.sum()), D), dtype), ((int(mask.sum()),), wide)]
    x, rows, gate = (
        torch.randn(size, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
        .to(kind)
        .requires_grad_()
        for n, (size, kind) in enumerate(sizes)
    )
    products = rows.double() * gate.double()[:, None]
    for found, wanted, leaves in (
        (
            _Gather.apply(x, plan.token_R, plan.by_token_R, plan.first_T),
            x.double()[plan.token_R],
            (x,),
        ),
        (
            _WeightedSum.apply(rows, gate, plan.token_R, plan.by_token_R, plan.first_T),
            torch.zeros(len(mask), D, dtype=torch.float64).index_add(0, plan.token_R, products),
            (rows, gate),
        ),
    ):
        assert found.dtype == dtype
        assert_close(found.detach().double(), wanted.detach(), bound)
        for here, there in zip(
            gradients(found, *leaves), gradients(wanted.to(dtype), *leaves), strict=True
        ):
            assert_close(here.double(), there.double(), bound)


def test_weighted_sum_of_bf16_rows_adds_up_in_fp32():
    """With gates of 16 bits: bf16 has 8, and would say 602 or 600."""
    mask = torch.ones(1, 600, dtype=torch.bool)
    plan = make_plan(Routing(mask), single_process().ep)
    rows, gate = (
        torch.ones(600, D, dtype=torch.bfloat16, requires_grad=True),
        torch.full((600,), 1 + 2.0**-9, requires_grad=True),
    )
    y = _WeightedSum.apply(rows, gate, plan.token_R, plan.by_token_R, plan.first_T)
    wanted = torch.tensor(600 * (1 + 2.0**-9)).bfloat16()
    assert y.dtype == torch.bfloat16 and y.eq(wanted).all()
    d_rows, d_gate = torch.autograd.grad(y, (rows, gate), torch.ones_like(y))
    assert d_rows.dtype == torch.bfloat16 and d_gate.dtype == torch.float32 and d_gate.eq(D).all()
    gathered = _Gather.apply(rows[:1], plan.token_R, plan.by_token_R, plan.first_T)
    (d_x,) = torch.autograd.grad(gathered, rows, torch.full((600, D), 1 + 2.0**-7).bfloat16())
    assert d_x[0].eq(torch.tensor(600 * (1 + 2.0**-7)).bfloat16()).all()


@pytest.mark.parametrize(
    "dtype,bound", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_gate_scores_are_a_softmax_of_wide_products(dtype, bound):
    torch.manual_seed(0)
    router, x = (
        torch.randn(EXPERTS, D).to(dtype).requires_grad_(),
        torch.randn(500, D).to(dtype).requires_grad_(),
    )
    wide = torch.promote_types(dtype, torch.float32)
    wanted = (x.to(wide) @ router.to(wide).t()).softmax(dim=1)
    scores = logits(x, router).softmax(dim=1)
    assert scores.dtype == wide
    assert_close(scores.detach(), wanted.detach(), min(bound, 1e-5))
    for found, expected in zip(
        gradients(scores, x, router), gradients(wanted, x, router), strict=True
    ):
        assert found.dtype == dtype
        assert_close(found.double(), expected.double(), bound)


def test_the_router_sees_gradients_that_cancel_to_16_bits():
    """Where experts agree, their scores' gradients, which sum to zero, cancel in the token's;
    rounded to bf16 they do not.
    """
    x = torch.randn(
        64, D, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0)
    ).requires_grad_()
    router = torch.ones(EXPERTS, D, dtype=torch.bfloat16, requires_grad=True)
    (gradient,) = gradients(logits(x, router).softmax(dim=1), x)
    assert gradient.abs().max() <= 2.0**-15


def layer_and_loop():
    """The layer and the textbook loop with its weights, fp64, and their tokens."""
    model, moe = ModelConfig(width=D, heads=2, mlp_ratio=2), MoEConfig(experts=EXPERTS)
    layer, loop = (
        MoELayer(model, moe, 4, single_process()).double(),
        TextbookLoop(model, EXPERTS).double(),
    )
    torch.manual_seed(0)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.3)
    with torch.no_grad():
        loop.router.weight.copy_(layer.router)
        loop.capacity_predictor.load_state_dict(layer.capacity_predictor.state_dict())
        for i, expert in enumerate(loop.experts):
            for fc in ("fc1", "fc2"):
                getattr(expert, fc).weight.copy_(getattr(layer.experts, f"{fc}_weight")[i].t())
                getattr(expert, fc).bias.copy_(getattr(layer.experts, f"{fc}_bias")[i])
    return layer, loop, torch.randn(4, 64, D, dtype=torch.float64, requires_grad=True)


def test_the_layer_is_the_textbook_loop():
    layer, loop, x = layer_and_loop()
    y, stats = layer(x, RoutingRule())
    wanted, loss, observed = loop(x.flatten(0, 1), 1.0)
    assert_close(y.flatten(0, 1).detach(), wanted.detach(), 1e-12)
    assert_close(stats.predictor_loss.detach(), loss.detach().double(), 1e-6)
    assert_close(stats.observed_E, observed, 1e-6)
    assert_close(gradients(y.flatten(0, 1), x)[0], gradients(wanted, x)[0], 1e-12)


# -------------------------------------------------------------------------------------------------
# memory


def test_memory_of_the_layer_beside_dense_and_loop():
    model, moe = ModelConfig(width=64, heads=2), MoEConfig(experts=16)
    modules = {
        "ours": MoELayer(model, moe, 4, single_process()),
        "dense": Mlp(64, 256),
        "loop": TextbookLoop(model, 16),
    }
    x = torch.randn(4, 256, 64, requires_grad=True)
    forwards = {
        "ours": lambda m: m(x, RoutingRule())[0],
        "dense": lambda m: m(x),
        "loop": lambda m: m(x.flatten(0, 1), 1.0)[0],
    }
    kept, peak = {}, {}
    for name, module in modules.items():
        for p in module.parameters():
            torch.nn.init.normal_(p, std=0.02)
        kept[name] = measure.kept_for_backward(lambda: forwards[name](module), [module])
        peak[name] = measure.peak_bytes(
            lambda: forwards[name](module).sum().backward(), [module], torch.device("cpu")
        )
    # Beside what dense keeps: gathered rows, outputs that wait for their gate, the predictor's two;
    # 13 widths for 9.
    assert kept["ours"] <= 1.6 * kept["dense"]
    assert peak["ours"] <= 1.5 * peak["dense"]
    assert peak["ours"] <= peak["loop"] / 2


def test_measured_bytes_are_those_of_a_known_case():
    linear, x = torch.nn.Linear(8, 8, bias=False), torch.randn(4, 8, requires_grad=True)
    assert measure.kept_for_backward(lambda: linear(x), [linear]) == 4 * 8 * 4
    # y, its gradient, x's gradient and sum's scalar; the weight's gradient is not an activation.
    assert (
        measure.peak_bytes(lambda: linear(x).sum().backward(), [linear], torch.device("cpu"))
        <= 3 * 4 * 8 * 4 + 64
    )


def training_peak(mode):
    """(peak bytes of forward and backward, gradients, matmuls) of a small model."""
    model = ModelConfig(width=64, depth=8, heads=2, input_size=16, classes=10)
    dit = DiT(model, MoEConfig(experts=4), pool=4, recompute=mode)
    initialize(dit, 0)
    for p in dit.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(p.numel()))
    x, t, y = (
        torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0)),
        torch.linspace(0, 1, 4),
        torch.arange(4),
    )

    def step():
        output = dit(x, t, y, RoutingRule())
        (output.prediction.square().mean() + sum(r.predictor_loss for r in output.moe)).backward()

    peak = measure.peak_bytes(step, [dit], torch.device("cpu"))
    with FlopCounterMode(display=False) as flops:
        step()
    return peak, {name: p.grad for name, p in dit.named_parameters()}, flops.get_total_flops()


def test_selective_recompute_saves_work_for_little_memory():
    (_, wanted, least), (block, by_block, most), (selective, by_selective, some) = (
        training_peak(mode) for mode in ("none", "block", "selective")
    )
    for name, gradient in wanted.items():
        assert torch.equal(gradient, by_block[name]) and torch.equal(
            gradient, by_selective[name]
        ), name
    assert selective <= 1.5 * block
    assert least < some < most


def test_selective_recompute_runs_second_layers_and_attention_once():
    again = {mode: operators_called(mode) for mode in ("none", "block", "selective")}
    for name, times in again["none"].items():
        assert 0 < times < again["block"][name], name
    assert again["selective"] == again["none"], "depth 8 has room for all attention outputs"


def operators_called(mode):
    calls = dict.fromkeys(
        [
            "aten.addmm.default",
            "aten.baddbmm.default",
            "aten._scaled_dot_product_flash_attention_for_cpu.default",
        ],
        0,
    )

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if str(func) in calls and (
                "mm" not in str(func) or _contracts(*args[1:3])
            ):  # second layers only
                calls[str(func)] += 1
            return func(*args, **(kwargs or {}))

    with Calls():
        training_peak(mode)
    return calls


@pytest.mark.parametrize(("depth", "kept"), [(1, 1), (8, 8), (12, 6), (24, 0), (28, 0)])
def test_attention_is_kept_where_there_is_room(depth, kept):
    assert forms("selective", depth) == ["selective+attention"] * kept + ["selective"] * (
        depth - kept
    )
    assert forms("block", depth) == ["block"] * depth


def test_draws_made_ahead_are_those_of_the_step(monkeypatch):
    made, plain = [], randomness.training_draws
    monkeypatch.setattr(
        randomness,
        "training_draws",
        lambda seed, numbers, shape: made.append(numbers) or plain(seed, numbers, shape),
    )
    positions = lambda step: np.arange(8 * step, 8 * (step + 1)).reshape(2, 4)
    with randomness.StepDraws(3, positions, (1, 4, 4)) as draws:
        for step in (0, 1, 2, 7, 8, 3):  # steps are left out, and a run goes back
            for found, numbers in zip(draws.of(step), positions(step).tolist(), strict=True):
                wanted = plain(3, numbers, (1, 4, 4))
                assert (
                    torch.equal(found.noise, wanted.noise)
                    and torch.equal(found.t, wanted.t)
                    and torch.equal(found.drop, wanted.drop)
                )
        draws._thread.submit(lambda: None).result()
        assert made[-2:] == positions(4).tolist()  # which nobody has asked for
        assert len(made) == 2 * 9  # of 3, 9 and 4 beside them, each once
