"""Every fast path against the plain definition it replaces; what it keeps for backward."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from diffmoe.bench import measure
from diffmoe.bench.contenders import TextbookLoop
from diffmoe.config import ModelConfig, MoEConfig
from diffmoe.diffusion import randomness
from diffmoe.models.dit import DiT, initialize
from diffmoe.moe.capacity import CapacityPredictor
from diffmoe.moe.dispatch import _WeightedSum
from diffmoe.moe.expert_mlp import ExpertWeights, arrangement, expert_mlp
from diffmoe.moe import expert_mlp as expert_mlp_module
from diffmoe.moe.experts import Mlp
from diffmoe.moe import gating
from diffmoe.moe.gating import scores_and_capacity
from diffmoe.moe.layer import MoELayer
from diffmoe.moe import recycled
from diffmoe.moe.recycled import Recycled
from diffmoe.moe.routing import RoutingRule, gate_scores
from diffmoe.parallel.groups import single_process
from diffmoe.parallel.recompute import forms

S, D, HIDDEN, EXPERTS = 24, 16, 32, 4
COUNTS = {"equal": 6, "ragged": [3, 0, 9, 4], "nobody": [0, 0, 0, 0]}


def experts(kind, dtype=torch.float64):
    """Weights of four experts, biases for GELU only, as leaves."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape):
        return (0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()

    firsts = [(leaf(EXPERTS, D, HIDDEN), leaf(EXPERTS, HIDDEN) if kind == "gelu" else None)
              for _ in range(1 if kind == "gelu" else 2)]
    return ExpertWeights(tuple(firsts), leaf(EXPERTS, HIDDEN, D), leaf(EXPERTS, D) if kind == "gelu" else None)


def inputs(counts, gated, dtype=torch.float64):
    """Source rows, places (each expert's distinct; all distinct without a gate), gates."""
    generator = torch.Generator().manual_seed(1)
    each = [counts] * EXPERTS if isinstance(counts, int) else counts
    source = torch.randn(S, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    if gated:
        place = torch.cat([torch.randperm(S, generator=generator)[:n].sort().values for n in each])
    else:
        place = torch.randperm(S, generator=generator)[:sum(each)]
    gate = torch.rand(len(place), generator=generator, dtype=torch.float64).to(torch.promote_types(dtype, torch.float32))
    return source, place, gate.requires_grad_() if gated else None, each


def plain(source, place, gate, each, weights):
    """The definition, row by row through autograd."""
    y, start = torch.zeros_like(source), 0
    for i, count in enumerate(each):
        rows = place[start:start + count]
        pre = [source[rows] @ w[i] + (0 if b is None else b[i]) for w, b in weights.firsts]
        a = F.gelu(pre[0], approximate="tanh") if len(pre) == 1 else F.silu(pre[0]) * pre[1]
        out = a @ weights.second[i] + (0 if weights.second_bias is None else weights.second_bias[i])
        y = y.index_add(0, rows, out if gate is None else out * gate[start:start + count, None])
        start += count
    return y


def gradients(y, *leaves):
    # Random: weights that hardly differ from expert to expert would cancel in the softmax's gradient, down to rounding.
    weight = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return torch.autograd.grad((y * weight).sum(), [leaf for leaf in leaves if leaf is not None], allow_unused=True)


def assert_close(found, wanted, bound):
    assert found.shape == wanted.shape
    if not wanted.numel():
        return
    scale = wanted.abs().max().clamp_min(1e-9)
    assert ((found - wanted).abs().max() / scale).item() <= bound


WAYS = [(how, name) for name in COUNTS for how in ("each", "batched", "grouped") if how != "batched" or name == "equal"]


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
@pytest.mark.parametrize("how,name", WAYS)
def test_expert_mlp_is_its_definition(how, name, kind, gated):
    # torch's grouped matmul takes no fp64.
    dtype, bound = (torch.float32, 2e-6) if how == "grouped" else (torch.float64, 1e-12)
    weights = experts(kind, dtype)
    source, place, gate, each = inputs(COUNTS[name], gated, dtype)
    leaves = [source, gate, *weights.flat()]
    y, wanted = expert_mlp(source, place, COUNTS[name], gate, weights, Recycled(), how), plain(source, place, gate, each, weights)
    assert_close(y.detach(), wanted.detach(), bound)
    for found, expected in zip(gradients(y, *leaves), gradients(wanted, *leaves), strict=True):
        assert_close(found, torch.zeros_like(found) if expected is None else expected, bound)
    with torch.no_grad():
        assert torch.equal(expert_mlp(source, place, COUNTS[name], gate, weights, Recycled(), how), y)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
def test_some_experts_at_once_and_rows_by_blocks_are_the_same(monkeypatch, kind, gated):
    monkeypatch.setattr(expert_mlp_module, "_at_once", lambda *_: 3)  # of four, so one is left
    monkeypatch.setattr(expert_mlp_module, "_CPU_BLOCK", 5 * HIDDEN)
    test_expert_mlp_is_its_definition("each", "equal", kind, gated)


def test_few_rows_share_a_product_as_threads_and_caches_allow(monkeypatch):
    cpu = torch.device("cpu")
    for threads, wanted in ((1, [2, 1, 1, 1, 1]), (2, [4, 2, 1, 1, 1])):
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        shapes = [(16, 128, 1536), (16, 256, 1536), (16, 1024, 1536), (16, 128, 4096), (16, 0, 1536)]
        assert [expert_mlp_module._at_once(*shape, cpu) for shape in shapes] == wanted
        assert expert_mlp_module._at_once(16, 128, 1536, torch.device("meta")) == 1


@pytest.mark.parametrize("h", [0.0, 1e-30, -1e-4, 0.5, -0.75, 3.0, -5.0, 8.0, -30.0, 1e4, -1e4])
def test_gelu_and_its_gradient_are_torchs(h):
    """Also where the sigmoid is 0 or 1 to the last bit."""
    pre = torch.full((2, 3), h, dtype=torch.float64, requires_grad=True)
    wanted = F.gelu(pre, approximate="tanh")
    slope, = torch.autograd.grad(wanted.sum(), pre)
    u, out, spare = torch.full((2, 3), 2.0, dtype=torch.float64), *(torch.empty(2, 3, dtype=torch.float64) for _ in range(2))
    found, (du,) = expert_mlp_module._gelu_back(pre.detach(), u, out, spare)
    assert_close(found, wanted.detach(), 1e-9)  # torch's 1 + tanh cancels on the left
    assert torch.allclose(du, 2 * slope, rtol=1e-9, atol=1e-15)
    assert torch.equal(found, expert_mlp_module._gelu(pre.detach(), torch.empty_like(found)))


def test_recycled_memory_is_taken_again_but_never_from_a_living_tensor(monkeypatch):
    monkeypatch.setattr(recycled, "LARGE", 0)
    memory, like = Recycled(), torch.empty(3, 5, dtype=torch.bfloat16)
    first = memory.empty_like(like)
    assert first.shape == like.shape and first.dtype == like.dtype and first.is_contiguous()
    held, place = first[1].fill_(7), first.data_ptr()
    del first  # but a part of it lives
    second = memory.empty_like(like).fill_(1)
    assert second.data_ptr() != place and held.eq(7).all()
    del held
    assert memory.empty_like(like).data_ptr() == place
    assert copy.deepcopy(memory).empty_like(like).data_ptr() != place


def test_gradients_in_recycled_memory_are_the_same_and_stay_what_they_were(monkeypatch):
    weights = experts("gelu", torch.float64)
    source, place, gate, _ = inputs(24, True, torch.float64)

    def gradients_of(memory, factor):
        return gradients(factor * expert_mlp(source, place, 24, gate, weights, memory), *weights.flat())

    wanted = [gradients_of(Recycled(), factor) for factor in (1.0, 2.0, 3.0)]
    monkeypatch.setattr(recycled, "LARGE", 0)
    memory = Recycled()
    kept = [gradients_of(memory, factor) for factor in (1.0, 2.0)]
    places = {g.data_ptr() for step in kept for g in step}
    assert len(places) == 2 * len(weights.flat())
    assert all(map(torch.equal, wanted[0] + wanted[1], kept[0] + kept[1]))
    kept.clear()
    again = gradients_of(memory, 3.0)
    assert all(map(torch.equal, wanted[2], again)) and {g.data_ptr() for g in again} < places


def test_bf16_adds_up_in_fp32():
    weights, (source, place, gate, each) = experts("gelu", torch.bfloat16), inputs(24, True, torch.bfloat16)
    wide = ExpertWeights(tuple((w.detach().double(), b.detach().double()) for w, b in weights.firsts),
                         weights.second.detach().double(), weights.second_bias.detach().double())
    y, wanted = expert_mlp(source, place, 24, gate, weights, Recycled()), plain(source.double(), place, gate.double(), each, wide)
    assert y.dtype == torch.bfloat16 and gradients(y, gate)[0].dtype == torch.float32
    assert_close(y.double(), wanted, 2e-2)


def test_weighted_sum_is_its_definition():
    rows, gate = torch.randn(10, D, dtype=torch.float64, requires_grad=True), torch.rand(10, dtype=torch.float64, requires_grad=True)
    token = torch.tensor([0, 3, 3, 4, 7, 7, 7, 1, 2, 0])
    y, wanted = _WeightedSum.apply(rows, gate, token, 8), torch.zeros(8, D, dtype=torch.float64).index_add(0, token, rows * gate[:, None])
    assert_close(y.detach(), wanted.detach(), 1e-15)
    for found, expected in zip(gradients(y, rows, gate), gradients(wanted, rows, gate)):
        assert_close(found, expected, 1e-15)


@pytest.mark.parametrize("dtype,bound", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_gating_is_router_and_predictor(dtype, bound):
    torch.manual_seed(0)
    predictor = CapacityPredictor(D, EXPERTS).to(dtype)
    router = torch.randn(EXPERTS, D).to(dtype).requires_grad_()
    x = torch.randn(5000, D).to(dtype).requires_grad_()  # three blocks, the last one short
    leaves = [x, router, *predictor.parameters()]
    (scores, logits), wanted = scores_and_capacity(x, router, predictor), (gate_scores(x, router), predictor(x))
    assert scores.dtype == logits.dtype == torch.promote_types(dtype, torch.float32)
    assert_close(scores.detach(), wanted[0].detach(), min(bound, 1e-5))
    assert_close(logits.detach(), wanted[1].detach(), bound)
    ours, theirs = gradients(torch.cat([scores, logits]), *leaves), gradients(torch.cat(wanted), *leaves)
    for found, expected in zip(ours, theirs, strict=True):
        assert_close(found.double(), expected.double(), bound)


def test_two_bf16_numbers_carry_16_bits():
    x = torch.randn(64, EXPERTS, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 64)[:, None]
    halves = gating._in_two(x, torch.bfloat16)
    assert halves.dtype == torch.bfloat16
    assert (halves.float().view(64, 2, EXPERTS).sum(1) - x).abs().le(2.0 ** -16 * x.abs()).all()


def layer_and_loop():
    """The layer and the textbook loop with its weights, fp64, and their tokens."""
    model, moe = ModelConfig(width=D, heads=2, mlp_ratio=2), MoEConfig(experts=EXPERTS)
    layer, loop = MoELayer(model, moe, 4, single_process()).double(), TextbookLoop(model, EXPERTS).double()
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
    assert_close(stats.threshold_sum_E, observed, 1e-6)
    assert_close(gradients(y.flatten(0, 1), x)[0], gradients(wanted, x)[0], 1e-12)


# ------------------------------------------------------------------------------------------------- memory


def test_memory_of_the_layer_beside_dense_and_loop():
    model, moe = ModelConfig(width=64, heads=2), MoEConfig(experts=16)
    modules = {"ours": MoELayer(model, moe, 4, single_process()), "dense": Mlp(64, 256), "loop": TextbookLoop(model, 16)}
    x = torch.randn(4, 256, 64, requires_grad=True)
    forwards = {"ours": lambda m: m(x, RoutingRule())[0], "dense": lambda m: m(x), "loop": lambda m: m(x.flatten(0, 1), 1.0)[0]}
    kept, peak = {}, {}
    for name, module in modules.items():
        for p in module.parameters():
            torch.nn.init.normal_(p, std=0.02)
        kept[name] = measure.kept_for_backward(lambda: forwards[name](module), [module])
        peak[name] = measure.peak_bytes(lambda: forwards[name](module).sum().backward(), [module], torch.device("cpu"))
    assert kept["ours"] <= kept["dense"]
    assert peak["ours"] <= 1.3 * peak["dense"]
    assert peak["ours"] <= peak["loop"] / 3


def test_measured_bytes_are_those_of_a_known_case():
    linear, x = torch.nn.Linear(8, 8, bias=False), torch.randn(4, 8, requires_grad=True)
    assert measure.kept_for_backward(lambda: linear(x), [linear]) == 4 * 8 * 4
    # y, its gradient, x's gradient and sum's scalar; the weight's gradient is not an activation.
    assert measure.peak_bytes(lambda: linear(x).sum().backward(), [linear], torch.device("cpu")) <= 3 * 4 * 8 * 4 + 64


def training_peak(mode):
    """(peak bytes of forward and backward, gradients, matmuls) of a small model."""
    model = ModelConfig(width=64, depth=8, heads=2, input_size=16, classes=10)
    dit = DiT(model, MoEConfig(experts=4), pool=4, recompute=mode)
    initialize(dit, 0)
    for p in dit.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(p.numel()))
    x, t, y = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.linspace(0, 1, 4), torch.arange(4)

    def step():
        output = dit(x, t, y, RoutingRule())
        (output.prediction.square().mean() + sum(r.predictor_loss for r in output.moe)).backward()

    peak = measure.peak_bytes(step, [dit], torch.device("cpu"))
    with FlopCounterMode(display=False) as flops:
        step()
    return peak, {name: p.grad for name, p in dit.named_parameters()}, flops.get_total_flops()


def test_selective_recompute_saves_work_for_little_memory():
    (_, wanted, least), (block, by_block, most), (selective, by_selective, some) = (
        training_peak(mode) for mode in ("none", "block", "selective"))
    for name, gradient in wanted.items():
        assert torch.equal(gradient, by_block[name]) and torch.equal(gradient, by_selective[name]), name
    assert selective <= 1.5 * block
    assert least < some <= most  # the counter does not count attention and the experts' second layers


def test_selective_recompute_runs_second_layers_and_attention_once():
    again = {mode: operators_called(mode) for mode in ("none", "block", "selective")}
    for name, times in again["none"].items():
        assert times > 0 and again["block"][name] == 2 * times, name
    assert again["selective"] == again["none"], "depth 8 has room for all attention outputs"


def operators_called(mode):
    calls = {"diffmoe.second_layer.default": 0, "aten._scaled_dot_product_flash_attention_for_cpu.default": 0}

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if str(func) in calls:
                calls[str(func)] += 1
            return func(*args, **(kwargs or {}))

    with Calls():
        training_peak(mode)
    return calls


@pytest.mark.parametrize(("depth", "kept"), [(1, 1), (8, 8), (12, 6), (24, 0), (28, 0)])
def test_attention_is_kept_where_there_is_room(depth, kept):
    assert forms("selective", depth) == ["selective+attention"] * kept + ["selective"] * (depth - kept)
    assert forms("block", depth) == ["block"] * depth


def test_the_arrangement_follows_device_and_shape():
    cpu = torch.device("cpu")
    assert arrangement(cpu, torch.float32, 6) == arrangement(cpu, torch.bfloat16, [1, 2]) == "each"


def test_draws_made_ahead_are_those_of_the_step(monkeypatch):
    made, plain = [], randomness.training_draws
    monkeypatch.setattr(randomness, "training_draws", lambda seed, numbers, shape: made.append(numbers) or plain(seed, numbers, shape))
    positions = lambda step: np.arange(8 * step, 8 * (step + 1)).reshape(2, 4)
    with randomness.StepDraws(3, positions, (1, 4, 4)) as draws:
        for step in (0, 1, 2, 7, 8, 3):  # steps are left out, and a run goes back
            for found, numbers in zip(draws.of(step), positions(step).tolist(), strict=True):
                wanted = plain(3, numbers, (1, 4, 4))
                assert torch.equal(found.noise, wanted.noise) and torch.equal(found.t, wanted.t) and torch.equal(found.drop, wanted.drop)
        draws._thread.submit(lambda: None).result()
        assert made[-2:] == positions(4).tolist()  # which nobody has asked for
        assert len(made) == 2 * 9  # of 3, 9 and 4 beside them, each once
