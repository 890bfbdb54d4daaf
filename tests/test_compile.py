"""train.compile: the numbers of the plain process, one graph a kind of block, no graph breaks, and what it refuses."""

import functools

import pytest
import torch
from torch._dynamo.utils import counters

from diffmoe.config import ModelConfig, MoEConfig, load_config
from diffmoe.deepspeed_json import merge_deepspeed
from diffmoe.errors import UserError
from diffmoe.layout import resolve_layout
from diffmoe.models.compiled import check_compiler, compile_blocks
from diffmoe.models.dit import DiT, initialize
from diffmoe.moe.routing import RoutingRule, choose_tokens
from diffmoe.parity import table
from diffmoe.parity.cases import compiled_table


def fresh_counters():
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture
def without_kernels(monkeypatch):
    """Graphs are traced and partitioned as ever, and run by torch's own kernels: seconds, and no C++ compiler."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager_decomp_partition"))
    fresh_counters()


def small_model(family="diffmoe", recompute="none"):
    model = ModelConfig(family=family, width=32, depth=4, heads=2, mlp_ratio=2, input_size=8, classes=10)
    dit = DiT(model, MoEConfig(experts=4), pool=2, recompute=recompute)
    initialize(dit, 0)
    for p in dit.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(p.numel()))
    return dit


def training_pass(dit, rule=RoutingRule()):
    """Prediction, masks and gradients."""
    dit.zero_grad(set_to_none=True)
    x, t, y = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.linspace(0, 1, 4), torch.arange(4)
    output = dit(x, t, y, rule)
    losses = [r.predictor_loss if r.balance_loss is None else r.balance_loss for r in output.moe]
    (output.prediction.square().mean() + sum(losses)).backward()
    return [output.prediction.detach(), *(r.mask_TE for r in output.moe), *(p.grad for p in dit.parameters())]


def assert_same(found, wanted):
    for here, there in zip(found, wanted, strict=True):
        if there.dtype == torch.bool:
            assert torch.equal(here, there)
        else:
            assert (here - there).abs().max() <= 1e-5 * there.abs().max()


@pytest.mark.parametrize("family,recompute", [("diffmoe", "selective"), pytest.param("diffmoe", "none", marks=pytest.mark.slow),
                                              pytest.param("tc", "block", marks=pytest.mark.slow)])
def test_blocks_of_a_kind_share_a_graph(family, recompute, without_kernels):
    dit = small_model(family, recompute)
    wanted = training_pass(dit)
    compile_blocks(dit)
    for _ in range(2):
        assert_same(training_pass(dit), wanted)
    assert counters["stats"]["unique_graphs"] == 2  # dense blocks, mixtures (of token choice: what comes before the experts)
    assert not counters["graph_break"]


@pytest.mark.slow
def test_only_training_at_the_settled_capacity_compiles_mixtures(without_kernels):
    dit = small_model()
    compile_blocks(dit)
    dit.eval()
    with torch.no_grad():
        dit(torch.ones(1, 4, 8, 8), torch.ones(1), torch.zeros(1, dtype=torch.long), RoutingRule("token"))
    assert not counters["stats"]
    dit.train()
    for step in range(3):  # capacity falls from step to step
        training_pass(dit, RoutingRule("train", capacity=3.0 - step / 2))
    assert counters["stats"]["unique_graphs"] == 2  # dense, and what comes before the experts
    training_pass(dit)
    assert counters["stats"]["unique_graphs"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("recompute,again", [("none", 0), ("selective", 1), ("block", 2)])
def test_compiled_recompute_routes_once(recompute, again, monkeypatch):
    """No top-k in any backward graph; of the experts' layers the first in it again with ``selective``, both with ``block``."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    graphs = {"forward": [], "backward": []}

    def keep(direction):
        def take(graph, _inputs):
            graphs[direction].append([str(node.target) for node in graph.graph.nodes])
            return make_boxed_func(graph.forward)
        return take

    backend = aot_autograd(fw_compiler=keep("forward"), bw_compiler=keep("backward"),
                           partition_fn=min_cut_rematerialization_partition)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    fresh_counters()
    dit = small_model(recompute=recompute)
    compile_blocks(dit)
    training_pass(dit)
    assert any("aten.topk.default" in ops for ops in graphs["forward"])
    assert not any(op in ops for ops in graphs["backward"] for op in ("aten.topk.default", "aten.sort.default"))
    gradients = 4  # two products for each layer
    assert max(ops.count("aten.bmm.default") for ops in graphs["backward"]) == gradients + again


def test_zero_3_is_refused():
    config = load_config(None, ["train.compile=true", "train.batch=4", "moe.pool=1"])
    with pytest.raises(UserError, match=r"train.compile \(true\) .* zero_optimization.stage \(3\)"):
        merge_deepspeed({"zero_optimization": {"stage": 3}}, config, resolve_layout(config, 1))


def test_a_missing_compiler_is_said_in_a_line():
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        torch._inductor.cpp_builder.cpp_compiler_search.cache_clear()
        with pytest.raises(UserError, match=r"^train.compile \(true\) needs a C\+\+ compiler on a CPU.*CXX$"):
            check_compiler(torch.device("cpu"))
    torch._inductor.cpp_builder.cpp_compiler_search.cache_clear()
    check_compiler(torch.device("cuda"))


# ------------------------------------------------------------------------------------------------ with its kernels


def with_one_graph(training):
    """Every step of a case's training sees that there is one graph and no break."""
    fresh_counters()
    plain_step = training.step

    def step(number):
        report = plain_step(number)
        assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"], counters
        return report

    training.step = step


@pytest.mark.slow
def test_compiled_training_is_the_plain_processs():
    """Losses, gradients, weights, averages and thresholds of real steps, within the parity table's bounds."""
    for row in table.run_cases(compiled_table((1, 2)), timeout=600.0, tamper=with_one_graph):
        print(row.case.label, row.differences)
        assert row.ok, (row.case.label, row.differences, row.error)


@pytest.mark.slow
def test_compiled_choice_is_the_eager_one_bit_for_bit():
    scores = torch.rand(512, 8, generator=torch.Generator().manual_seed(0)).mul(16).round().div(16)  # full of ties
    fresh_counters()
    assert torch.equal(torch.compile(choose_tokens, fullgraph=True)(scores, 128, 24), choose_tokens(scores, 128, 24))
