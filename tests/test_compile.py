"""train.compile: the numbers of the plain process, one graph a kind of block, no graph breaks, and
what it refuses.
"""

import functools
import re
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters

from diffmoe.commands.common import Parser, add_sampling_options, sampling_config
from diffmoe.commands.train import describe_engine
from diffmoe.config import (
    Config,
    ModelConfig,
    MoEConfig,
    SampleConfig,
    config_from_tree,
    load_config,
)
from diffmoe.deepspeed_json import merge_deepspeed
from diffmoe.errors import UserError
from diffmoe.evaluation.generate import generate
from diffmoe.layout import resolve_layout
from diffmoe.models import compiled
from diffmoe.models.compiled import compile_blocks
from diffmoe.models.dit import DiT
from diffmoe.models.logical import initialize, logical_tensors
from diffmoe.moe.routing import RoutingRule, choose_tokens
from diffmoe.parallel.groups import single_process
from diffmoe.parity import table
from diffmoe.parity.cases import Case, compiled_table
from diffmoe.parity.plain import build_model, synthetic_batch
from diffmoe.training.guard import find_nonfinite


def fresh_counters():
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture
def without_kernels(monkeypatch):
    """Graphs are traced and partitioned as ever, and run by torch's own kernels: seconds, and no
    C++ compiler.
    """
    monkeypatch.setattr(
        torch, "compile", functools.partial(torch.compile, backend="aot_eager_decomp_partition")
    )
    fresh_counters()


def small_model(family="diffmoe", recompute="none"):
    model = ModelConfig(
        family=family, width=32, depth=4, heads=2, mlp_ratio=2, input_size=8, classes=10
    )
    dit = DiT(model, MoEConfig(experts=4), pool=1 if family == "ec" else 2, recompute=recompute)
    initialize(dit, 0)
    for p in dit.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(p.numel()))
    return dit


def training_pass(dit, rule=RoutingRule()):
    """Prediction, masks and gradients."""
    dit.zero_grad(set_to_none=True)
    x, t, y = (
        torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
        torch.linspace(0, 1, 4),
        torch.arange(4),
    )
    output = dit(x, t, y, rule)
    losses = [r.predictor_loss if r.balance_loss is None else r.balance_loss for r in output.moe]
    (output.prediction.square().mean() + sum(losses)).backward()
    return [
        output.prediction.detach(),
        *(r.mask_TE for r in output.moe),
        *(p.grad for p in dit.parameters()),
    ]


def assert_same(found, wanted):
    for here, there in zip(found, wanted, strict=True):
        if there.dtype == torch.bool:
            assert torch.equal(here, there)
        else:
            assert (here - there).abs().max() <= 1e-5 * there.abs().max()


@pytest.mark.parametrize(
    "family,recompute,graphs",
    [
        ("diffmoe", "selective", 2),  # a dense block, a mixture
        ("tc", "block", 5),  # a dense block; four parts of a mixture
        pytest.param("diffmoe", "none", 2, marks=pytest.mark.slow),
        pytest.param("ec", "block", 2, marks=pytest.mark.slow),
        pytest.param("tc", "none", 5, marks=pytest.mark.slow),
        pytest.param("tc", "selective", 5, marks=pytest.mark.slow),
    ],
)
def test_blocks_of_a_kind_share_a_graph(family, recompute, graphs, without_kernels):
    dit = small_model(family, recompute)
    wanted = training_pass(dit)
    compile_blocks(dit)
    for _ in range(2):
        assert_same(training_pass(dit), wanted)
    assert counters["stats"]["unique_graphs"] == graphs and not counters["graph_break"]


@pytest.mark.slow
def test_a_changing_capacity_compiles_no_graph_for_every_step(without_kernels):
    dit = small_model()
    compile_blocks(dit)
    for step in range(3):
        training_pass(dit, RoutingRule("train", capacity=3.0 - step / 2))
    parts = counters["stats"]["unique_graphs"]
    training_pass(dit, RoutingRule("train", capacity=1.25))
    assert counters["stats"]["unique_graphs"] == parts
    training_pass(dit)
    assert counters["stats"]["unique_graphs"] == parts + 1  # the mixture as a whole


def doubled(x):
    return 2 * x


def halved(x):
    return x / 2


def test_kinds_have_graphs_of_their_own_and_more_than_torchs_eight(without_kernels):
    run = compiled.CompiledRun(1.0)
    for size in range(2, 14):
        for function in (doubled, halved):
            assert torch.equal(
                run.part("none", function, torch.ones(size)), function(torch.ones(size))
            )
    assert counters["stats"]["unique_graphs"] == 24 and torch._dynamo.config.recompile_limit == 8


def images(dit, count, **sample):
    """Of a sampling in batches of 3."""
    config = Config(model=dit.model, moe=dit.moe, sample=SampleConfig(steps=2, batch=3, **sample))
    return generate(
        dit.eval(), config, [i % 10 for i in range(count)], range(count), torch.device("cpu")
    )


@pytest.mark.parametrize(
    "family,routing,graphs",
    [
        ("dense", "token", 2),
        ("diffmoe", "static", 4),
        ("diffmoe", "token", None),
        pytest.param("ec", "token", 4, marks=pytest.mark.slow),
        pytest.param("diffmoe", "batch", None, marks=pytest.mark.slow),
        pytest.param("tc", "token", None, marks=pytest.mark.slow),
    ],
)
def test_sampling_is_compiled_and_a_short_last_batch_adds_one_size(
    family, routing, graphs, without_kernels
):
    dit = small_model(family)
    wanted = images(dit, 5, routing=routing)
    compile_blocks(dit)
    assert_same([images(dit, 5, routing=routing)], [wanted])
    compiled = counters["stats"]["unique_graphs"]
    assert (
        compiled == graphs or graphs is None and compiled >= 6
    )  # whole blocks of two sizes; parts
    assert_same([images(dit, 5, routing=routing)], [wanted])
    assert counters["stats"]["unique_graphs"] == compiled and not counters["graph_break"]


def test_sizes_beyond_the_sixth_stay_eager_and_are_said(without_kernels):
    dit = small_model("dense").eval()
    compile_blocks(dit)
    sizes = [1, 2, 3, 4, 5, 6]
    for size in sizes:
        sampling_pass(dit, size)
    assert counters["stats"]["unique_graphs"] == 6
    with pytest.warns(UserWarning, match="a batch of 7 samples runs eager"):
        sampling_pass(dit, 7)
    for size in sizes:
        sampling_pass(dit, size)
    assert counters["stats"]["unique_graphs"] == 6


@torch.no_grad()
def sampling_pass(dit, size):
    return dit(
        torch.ones(size, 4, 8, 8),
        torch.ones(size),
        torch.zeros(size, dtype=torch.long),
        RoutingRule("token"),
    ).prediction


@pytest.mark.parametrize("family", ["tc", "diffmoe"])
def test_the_search_for_what_is_not_finite_sees_into_compiled_blocks(family, without_kernels):
    """In parts (tc) and whole; with a backward that computes blocks again."""
    config = load_config(
        None,
        [
            f"model.family={family}",
            "model.width=32",
            "model.depth=2",
            "model.heads=2",
            "model.mlp_ratio=2",
            "model.input_size=8",
            "model.classes=10",
            "moe.experts=4",
            "moe.interleave=false",
            "moe.pool=rank",
            "train.batch=4",
            "parallel.recompute=block",
        ],
    )
    dit = build_model(config, 4, single_process())
    compile_blocks(dit)
    compiled_run = dit.run
    dit.blocks[1].attn.proj.bias.data[0] = torch.nan
    engine = SimpleNamespace(
        model=dit, stage=0, device=torch.device("cpu"), tensors=logical_tensors(dit)
    )
    found = find_nonfinite(engine, [synthetic_batch(config, range(4))], config, single_process(), 0)
    assert "output of blocks.1.attn.proj" in found and dit.run is compiled_run


def test_blocks_are_modules_as_ever(without_kernels):
    """No method is replaced, and hooks of a block are called once in a pass, compiled or not."""
    dit, seen = small_model("dense", "selective"), []
    for number, block in enumerate(dit.blocks):
        block.register_forward_hook(lambda *_, number=number: seen.append(number))
    sampling_pass(dit.train(), 2)
    compile_blocks(dit)
    assert dit.recompute == ["selective+attention"] * 4 and not any(
        "forward" in vars(module) for module in dit.modules()
    )
    dit(
        torch.ones(2, 4, 8, 8), torch.ones(2), torch.zeros(2, dtype=torch.long), RoutingRule()
    ).prediction.sum().backward()
    assert seen == [0, 1, 2, 3] * 2
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("recompute,again", [("none", 0), ("selective", 1), ("block", 2)])
def test_compiled_recompute_routes_once(recompute, again, monkeypatch):
    """No top-k in any backward graph; of the experts' layers the first in it again with
    ``selective``, both with ``block``.
    """
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    graphs = {"forward": [], "backward": []}

    def keep(direction):
        def take(graph, _inputs):
            graphs[direction].append([str(node.target) for node in graph.graph.nodes])
            return make_boxed_func(graph.forward)

        return take

    backend = aot_autograd(
        fw_compiler=keep("forward"),
        bw_compiler=keep("backward"),
        partition_fn=min_cut_rematerialization_partition,
    )
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    fresh_counters()
    dit = small_model(recompute=recompute)
    compile_blocks(dit)
    training_pass(dit)
    assert any("aten.topk.default" in ops for ops in graphs["forward"])
    assert not any(
        op in ops for ops in graphs["backward"] for op in ("aten.topk.default", "aten.sort.default")
    )
    gradients = 4  # two products for each layer
    assert max(ops.count("aten.bmm.default") for ops in graphs["backward"]) == gradients + again


@pytest.mark.parametrize(
    "said,device,stage,wanted",
    [
        ("auto", "cuda", 0, True),
        ("auto", "cuda", 2, True),
        ("auto", "cuda", 3, False),
        ("auto", "cpu", 1, False),
        ("true", "cuda", 1, True),
        ("true", "cpu", 1, True),
        ("false", "cuda", 1, False),
        ("false", "cpu", 3, False),
    ],
)
def test_auto_means_a_gpu_below_zero_3(said, device, stage, wanted, monkeypatch):
    monkeypatch.setattr(compiled, "_lacking", lambda device: None)
    train = load_config(None, [f"train.compile={said}"]).train
    assert train.compiles(device, stage) == wanted
    on, note = compiled.compiles(train, torch.device(device), stage)
    assert on == wanted and (note is None) == (stage < 3 or said != "auto")


def test_auto_is_the_default_and_bools_of_old_files_stay():
    assert load_config(None).train.compile == "auto"
    for value in (True, False):
        assert config_from_tree({"train": {"compile": value}}).train.compile is value
    for value in ("yes please", 1, None):
        with pytest.raises(
            UserError, match=r"train.compile = .* must be one of auto or true or false"
        ):
            config_from_tree({"train": {"compile": value}})


@pytest.mark.parametrize(
    "said,stage,device,shown",
    [
        ("auto", 1, None, "none, compiled on a GPU"),
        ("auto", 1, "cpu", "none, not compiled (CPU)"),
        ("auto", 1, "cuda", "none, compiled"),
        ("auto", 3, "cuda", "none"),
        ("true", 2, "cpu", "none, compiled"),
        ("false", 0, "cpu", "none"),
    ],
)
def test_a_start_says_where_it_is_compiled(said, stage, device, shown):
    config = load_config(None, [f"train.compile={said}"])
    text = describe_engine(config, {"zero_optimization": {"stage": stage}}, device)
    assert text.endswith(f"recompute {shown}")


@pytest.mark.parametrize(
    "given,wanted", [([], True), (["--compile", "auto"], "auto"), (["--compile", "false"], False)]
)
def test_sampling_takes_the_runs_or_its_own(given, wanted):
    parser = Parser("sample")
    add_sampling_options(parser)
    assert (
        sampling_config(
            load_config(None, ["train.compile=true"]), parser.parse_args(given)
        ).train.compile
        == wanted
    )


def test_zero_3_is_refused():
    config = load_config(None, ["train.compile=true", "train.batch=4", "moe.pool=1"])
    with pytest.raises(UserError, match=r"train.compile \(true\) .* zero_optimization.stage \(3\)"):
        merge_deepspeed({"zero_optimization": {"stage": 3}}, config, resolve_layout(config, 1))


def test_zero_3_is_no_reason_to_refuse_auto():
    config = load_config(None, ["train.batch=4", "moe.pool=1"])
    tree = merge_deepspeed({"zero_optimization": {"stage": 3}}, config, resolve_layout(config, 1))
    assert tree["zero_optimization"]["stage"] == 3 and not config.train.compiles("cuda", 3)


@pytest.mark.parametrize(
    "device,missing,said",
    [
        ("cpu", "c++", r"a C\+\+ compiler on a CPU.*CXX"),
        ("cuda", "triton", "the package triton on a GPU"),
        ("cuda", "cc", "a C compiler on a GPU.*CC"),
        ("cuda", "headers", "Python's headers on a GPU.*python3-dev"),
    ],
)
def test_a_missing_compiler_is_said_in_a_line(device, missing, said, monkeypatch, tmp_path):
    """With true it is an error, with auto, on a GPU, a note; where all is there, there is nothing
    to say.
    """
    found = {"triton": object(), "gcc": "/gcc", "headers": tmp_path}
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: found.get(name))
    monkeypatch.setattr(compiled.shutil, "which", lambda name: found.get(name))
    monkeypatch.setattr(compiled.sysconfig, "get_paths", lambda: {"include": str(found["headers"])})
    monkeypatch.delenv("CC", raising=False)
    device, search = torch.device(device), torch._inductor.cpp_builder.cpp_compiler_search
    asked, auto = (load_config(None, [f"train.compile={word}"]).train for word in ("true", "auto"))
    assert compiled.compiles(asked, device) == (True, None)
    found |= {
        "triton": {"triton": None},
        "cc": {"gcc": None},
        "headers": {"headers": tmp_path / "none"},
    }.get(missing, {})
    with torch._inductor.config.patch(
        {"cpp.cxx": ("no-such-compiler",)} if missing == "c++" else {}
    ):
        search.cache_clear()
        with pytest.raises(UserError, match=rf"^train.compile \(true\) needs {said}"):
            compiled.compiles(asked, device)
        on, note = compiled.compiles(auto, device)
    search.cache_clear()
    assert not on
    assert (
        note is None
        if device.type == "cpu"
        else re.match(rf"note: train.compile \(auto\) is off: it needs {said}", note)
    )


# ------------------------------------------------------------------------------------------------
# with its kernels


def with_few_graphs(training):
    """Every step of a case's training sees as many graphs as the first one, and no break."""
    fresh_counters()
    plain_step, graphs = training.step, []

    def step(number):
        report = plain_step(number)
        graphs.append(counters["stats"]["unique_graphs"])
        assert 0 < graphs[-1] == graphs[0] and not counters["graph_break"], counters
        return report

    training.step = step


def with_few_graphs_without_kernels(training):
    torch.compile = functools.partial(
        torch.compile, backend="aot_eager_decomp_partition"
    )  # in this rank's process
    with_few_graphs(training)


@pytest.mark.full
@pytest.mark.parametrize(
    "case",
    [
        Case(2, 2, 1, "selective", 1, "global", 8, compiled=True, routing="static"),
        pytest.param(Case(4, 2, 1, "block", 1, "group", 8, compiled=True), marks=pytest.mark.slow),
    ],
    ids=lambda case: case.label,
)
def test_parts_of_blocks_over_ranks_are_the_plain_processs(case):
    (row,) = table.run_cases([case], timeout=300.0, tamper=with_few_graphs_without_kernels)
    assert row.ok and row.differences["images"] > 0, (row.differences, row.error)


@pytest.mark.slow
def test_compiled_training_and_sampling_are_the_plain_processs():
    """Losses, gradients, weights, averages, thresholds and images of real steps, within the parity
    table's bounds.
    """
    for row in table.run_cases(compiled_table(), timeout=900.0, tamper=with_few_graphs):
        print(row.case.label, row.differences)
        assert row.ok, (row.case.label, row.differences, row.error)


@pytest.mark.slow
def test_compiled_choice_is_the_eager_one_bit_for_bit():
    scores = (
        torch.rand(512, 8, generator=torch.Generator().manual_seed(0)).mul(16).round().div(16)
    )  # full of ties
    fresh_counters()
    assert torch.equal(
        torch.compile(choose_tokens, fullgraph=True)(scores, 128, 24),
        choose_tokens(scores, 128, 24),
    )
