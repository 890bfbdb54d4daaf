"""What a step moves for gradients, optimizer and averages, how often the host waits for the device,
and how ranks add up.
"""

import contextlib
import io
import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffmoe.config import load_config
from diffmoe.deepspeed_json import merge_deepspeed
from diffmoe.gradient_sums import Linear
from diffmoe.layout import resolve_layout
from diffmoe.parallel.collectives import AgreedError
from diffmoe.parallel.groups import build_groups
from diffmoe.parallel.spawn import Ranks
from diffmoe.parallel.traffic import CommunicationCount
from diffmoe.parity.plain import build_model, synthetic_batch
from diffmoe.training.ema import Ema
from diffmoe.training.engine import Engine
from diffmoe.training.step import train_step

CPU = torch.device("cpu")
MODEL = (
    "model.input_size=8",
    "model.width=64",
    "model.depth=2",
    "model.heads=2",
    "model.classes=10",
    "moe.experts=4",
    "moe.interleave=false",
    "moe.pool=rank",
    "train.batch=16",
    "train.steps=1000000",
    "train.save_every=0",
)
FP32_SUMS = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}


def start(tree, *overrides):
    """(engine, a function that trains step n)."""
    config = load_config(None, [*MODEL, *overrides])
    layout = resolve_layout(config, dist.get_world_size())
    groups = build_groups(layout.ep, layout.pool_ranks)
    merged = merge_deepspeed(tree, config, layout)
    engine = Engine(build_model(config, layout.pool, groups), config, merged, groups, CPU)
    ema, micro = Ema(engine, config.train), layout.micro_batch
    batches = [
        synthetic_batch(config, range(groups.rank * micro, (groups.rank + 1) * micro))
    ] * layout.accumulation
    return engine, ema, lambda step: train_step(engine, ema, batches, config, layout, groups, step)


@pytest.fixture(scope="module")
def worlds():
    started = {}

    def world(ranks):
        if ranks not in started:
            started[ranks] = Ranks(ranks, timeout=300)
        return started[ranks]

    yield world
    for ranks in started.values():
        ranks.close()


# --------------------------------------------------------------------------------------------------
# bytes


class Bytes(TorchDispatchMode):
    """Memory traffic of every kernel: each input read once, each output written once, in place
    both; views move nothing.
    """

    moved = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        found = function(*args, **kwargs)
        if function.is_view or function.namespace != "aten":
            return found
        packet = function.overloadpacket.__name__
        for argument in function._schema.arguments:
            place = function._schema.arguments.index(argument)
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            size = sum(
                t.numel() * t.element_size()
                for t in tree_leaves(value)
                if isinstance(t, torch.Tensor)
            )
            written = argument.alias_info is not None and argument.alias_info.is_write
            if packet == "_fused_adamw_" and argument.name == "grads":
                written = kwargs.get("grad_scale") is not None  # the kernel keeps what it scales
            self.moved += size * written + size * (
                not written or packet not in ("copy_", "zero_", "fill_")
            )
        self.moved += sum(
            t.numel() * t.element_size()
            for t, returned in zip(tree_leaves(found), function._schema.returns)
            if isinstance(t, torch.Tensor) and returned.alias_info is None
        )
        return found


def counted_bytes(accumulation, clip):
    """Bytes a parameter of one step outside forward and backward's own products."""
    tree = {**FP32_SUMS, "zero_optimization": {"stage": 1}}
    engine, ema, train = start(tree, f"train.accumulation={accumulation}", f"train.clip={clip}")
    train(0)
    count = Bytes()

    def counting(owner, name):
        original = getattr(owner, name)

        def call(*args, **kwargs):
            with count:
                return original(*args, **kwargs)

        setattr(owner, name, call)

    # The hooks' closures look the method up on the optimizer.
    for owner, name in (
        (engine.optimizer, "accumulate_hp_grads_and_remove_lp"),
        (engine.optimizer, "reduce_gradients"),
        (engine, "squared_norm"),
        (engine, "step"),
        (ema, "update"),
    ):
        counting(owner, name)
    report = train(1)
    assert report.applied and report.grad_norm > 1e-3
    layers = [m for m in engine.model.modules() if isinstance(m, Linear)]
    weights = [layer.weight for layer in layers]
    for _, moe in engine.model.moe_layers():
        weights += [moe.experts.fc1_weight, moe.experts.fc2_weight]
    parameters = sum(p.numel() for p in engine.model.parameters())
    return count.moved / parameters, 1 - sum(w.numel() for w in weights) / parameters


@pytest.mark.full
@pytest.mark.parametrize(
    ("accumulation", "clip", "wanted"),
    [(4, 1e-3, 54), (1, 1e-3, 54), (4, 1e6, 50), (1, 1e6, 50), (2, 0, 50)],
)
def test_bytes_a_parameter(worlds, accumulation, clip, wanted):
    """4 for the norm, 28 for Adam and 4 more where it clips, 6 for the bf16 weights, 12 for an
    average; of what no product adds up, biases and embeddings, 6 for a step's first gradient and 10
    for each other.
    """
    ((found, others),) = worlds(1).run(counted_bytes, accumulation, clip)
    assert 0 < others < 0.2  # less in wider models
    wanted += others * (6 + 10 * (accumulation - 1))
    assert wanted <= found <= wanted + 0.1


# --------------------------------------------------------------------------------------------------
# reads


class Reads(TorchFunctionMode):
    """What has the host wait for a tensor's values."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in (
            "tolist",
            "item",
            "__bool__",
            "__float__",
            "__int__",
            "__index__",
            "nonzero",
            "numpy",
            "is_nonzero",
            "equal",
            "cpu",
        ):
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


def counted_reads(tree, overrides):
    _, _, train = start(tree, *overrides)
    for step in range(4):  # ZeRO 3 compares its plan of fetches with other ranks' on the first ones
        train(step)
    with Reads() as reads:
        assert train(4).applied
    return reads.seen


@pytest.mark.full
@pytest.mark.parametrize(
    ("stage", "bf16"), [(0, False), (1, False), (1, True), (2, False), (2, True), (3, True)]
)
@pytest.mark.parametrize(("ranks", "ep", "accumulation"), [(1, 1, 1), (2, 2, 2), (4, 2, 1)])
def test_the_host_waits_once_a_step(worlds, stage, bf16, ranks, ep, accumulation):
    tree = {**(FP32_SUMS if bf16 else {}), "zero_optimization": {"stage": stage}}
    # Equal counts ask for nothing in the layers.
    for seen in worlds(ranks).run(
        counted_reads,
        tree,
        [f"parallel.ep={ep}", f"train.accumulation={accumulation}", "train.clip=1e-3"],
    ):
        # DeepSpeed's ZeRO 3 makes a host tensor of the norm that it is given, and looks at that.
        assert seen == ["tolist", "__bool__"][: 1 + (stage == 3)]


def what_a_start_says(tree):
    with contextlib.redirect_stdout(io.StringIO()) as said:
        start(tree)
    return said.getvalue()


@pytest.mark.full
def test_deepspeed_prints_nothing_at_a_start(worlds):
    """Its bf16 optimizer measures and prints memory on its way, five times."""
    tree = {**FP32_SUMS, "zero_optimization": {"stage": 1}}
    assert worlds(1).run(what_a_start_says, tree) == [""]


# ----------------------------------------------------------------------------------------------
# reductions


def counted_messages(tree, overrides):
    """{(collective, in backward): [messages, payload]} of one step's gradients, and elements of
    this rank's parameters.
    """
    engine, _, train = start(tree, *overrides)
    train(0)
    with CommunicationCount(
        (f"block {i}", layer, layer.experts) for i, layer in engine.model.moe_layers()
    ) as count:
        train(1)
    found = {
        (row["collective"], row["phase"] == "backward"): [row["messages"], row["payload"]]
        for row in count.table()
        if row["purpose"] == "gradients"
    }
    parameters = [t.parameter for t in engine.tensors]
    return found, sum(math.prod(getattr(p, "ds_shape", p.shape)) for p in parameters)


@pytest.mark.full
@pytest.mark.parametrize(
    ("stage", "bf16", "named", "element"),
    [
        (1, True, None, 4),
        (1, True, "bf16", 2),
        (1, True, "fp32", 4),
        (1, False, None, 4),
        (2, True, None, 4),
        (2, True, "bf16", 2),
    ],
)
@pytest.mark.parametrize(("ranks", "ep", "accumulation"), [(1, 1, 2), (2, 1, 1), (4, 2, 2)])
def test_buckets_leave_during_backward_in_the_precision_that_the_json_says(
    worlds, stage, bf16, named, element, ranks, ep, accumulation
):
    tree = {
        **(FP32_SUMS if bf16 else {}),
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 30_000, "overlap_comm": True},
    }
    tree |= {"communication_data_type": named} if named else {}
    for found, numel in worlds(ranks).run(
        counted_messages, tree, [f"parallel.ep={ep}", f"train.accumulation={accumulation}"]
    ):
        if ranks == 1:
            assert found == {}
            continue
        collective, times = (
            ("reduce", 1)
            if bf16 and stage == 1
            else ("all_reduce", accumulation if stage == 2 else 1)
        )
        assert {name for name, _ in found} == {collective}
        assert sum(payload for _, payload in found.values()) == times * numel * element
        messages, payload = found[collective, True]
        assert messages >= 5 * times and payload >= 0.7 * times * numel * element


@pytest.mark.full
@pytest.mark.parametrize("named", ["fp32", "bf16"])
def test_zero_3_reduces_in_the_precision_that_the_json_says(worlds, named):
    tree = {
        **FP32_SUMS,
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": 30_000,
            "stage3_param_persistence_threshold": 0,
        },
    }
    tree |= {"communication_data_type": named} if named != "fp32" else {}
    for found, numel in worlds(2).run(counted_messages, tree, ["parallel.ep=2"]):
        payload = sum(
            payload
            for (collective, _), (_, payload) in found.items()
            if collective == "reduce_scatter"
        )
        # All dense ones; experts live on one rank each, so nobody adds theirs.
        assert 0.3 * numel < payload / (4 if named == "fp32" else 2) < numel


def reduced_by_hand(tree, overrides, missing):
    """Hands every rank other gradients, in an order of its own, on top of rubbish: (largest
    relative difference to their sum over the ranks that hold the parameter, in fp32 and with parts
    rounded to bf16; collectives).
    """
    engine, _, _ = start(tree, *overrides)
    optimizer, rank = engine.optimizer, engine.groups.rank
    draw = torch.Generator().manual_seed(rank)
    places = [
        (i, j, p) for i, group in enumerate(optimizer.bf16_groups) for j, p in enumerate(group)
    ]
    for i, j, _ in places:
        optimizer.fp32_groups_gradients[i][j].fill_(math.nan)
    wanted = [torch.zeros_like(flat) for flat in optimizer.fp32_groups_gradients_flat]
    for last in (False, True):
        optimizer.set_gradient_accumulation_boundary(last)
        for k in torch.randperm(len(places), generator=draw).tolist():
            i, j, p = places[k]
            if missing and (k + rank) % 3 == 0 or missing and k == 4:
                continue
            p.grad = torch.randn(p.shape, generator=draw).bfloat16()
            start_ = sum(q.numel() for q in optimizer.bf16_groups[i][:j])
            wanted[i][start_ : start_ + p.numel()] += p.grad.float().view(-1)
            optimizer.accumulate_hp_grads_and_remove_lp(p, i, j)
            assert p.grad is None
    optimizer.reduce_gradients()
    differences = []
    for flat, group, found in zip(
        wanted, optimizer.real_dp_process_group, optimizer.sums(), strict=True
    ):
        dist.all_reduce(flat, group=group)
        share = flat[dist.get_rank(group) * found.numel() :][: found.numel()]
        differences.append(((share - found).abs().max() / share.abs().max()).item())
    square = engine.squared_norm().reshape(1)
    whole = sum(
        ((flat / engine.groups.world.size).double().square().sum() / dist.get_world_size(group))
        for flat, group in zip(wanted, optimizer.real_dp_process_group, strict=True)
    ).reshape(1)
    dist.all_reduce(square), dist.all_reduce(whole)
    return max(differences), len(optimizer._buckets), (square / whole).item()


@pytest.mark.full
@pytest.mark.parametrize("missing", [False, True], ids=["all", "some missing"])
@pytest.mark.parametrize(
    ("ranks", "ep", "named"),
    [(1, 1, None), (2, 1, None), (2, 2, None), (4, 2, None), (4, 4, "bf16"), (4, 2, "bf16")],
)
def test_sums_do_not_depend_on_the_order_that_gradients_come_in(worlds, ranks, ep, named, missing):
    """Each owner has the sum, whoever had which gradient when; a rank without one counts as zero;
    and the norm is that of the mean.
    """
    tree = {**FP32_SUMS, "zero_optimization": {"stage": 1, "reduce_bucket_size": 9000}}
    tree |= {"communication_data_type": named} if named else {}
    for difference, buckets, norm in worlds(ranks).run(
        reduced_by_hand, tree, [f"parallel.ep={ep}", "train.accumulation=2"], missing
    ):
        assert difference < 1e-6 if named is None else 1e-4 < difference < 1e-2
        assert (buckets == 0) == (ranks == 1) and norm == pytest.approx(
            1, rel=1e-6 if named is None else 1e-2
        )


@pytest.mark.full
@pytest.mark.parametrize(
    ("tree", "wanted"),
    [
        ({}, "fp32"),
        ({"bf16": {"enabled": True}}, "bf16"),
        (FP32_SUMS, "fp32"),
        ({**FP32_SUMS, "communication_data_type": "bf16"}, "bf16"),
        ({**FP32_SUMS, "communication_data_type": "fp16"}, "fp16"),
        ({"communication_data_type": "bf16"}, "bf16"),
        ({"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "torch.float32"}}, "fp32"),
    ],
)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_resolved_json_says_in_which_precision_ranks_add(tree, wanted, stage):
    config = load_config(None, [*MODEL])
    layout = resolve_layout(config, 2)
    resolved = merge_deepspeed({**tree, "zero_optimization": {"stage": stage}}, config, layout)
    assert resolved["communication_data_type"] == wanted
    assert merge_deepspeed(resolved, config, layout) == resolved


@pytest.mark.parametrize(
    "error,published", [(None, 2), (AgreedError("all of them"), 2), (RuntimeError("this one"), 1)]
)
def test_a_rank_that_fails_alone_does_not_wait_for_the_others(error, published):
    engine, times = Engine.__new__(Engine), []
    engine.masters, engine.model, engine.engine = [], "the model", torch.nn.Linear(1, 1)
    engine.publish = lambda: times.append(1)
    with contextlib.suppress(AgreedError, RuntimeError), engine.weights([]) as model:
        assert model == "the model" and not engine.engine.training
        if error is not None:
            raise error
    assert len(times) == published and engine.engine.training


def test_zero_3_gathers_parameters_in_one_order():
    from diffmoe.training.zero_parameters import gather_in_one_order

    seen = []
    parameters = [SimpleNamespace(ds_id=i) for i in range(5)]
    for parameter in parameters:
        parameter.all_gather_coalesced = lambda some, quantize: seen.append(
            ([p.ds_id for p in some], quantize)
        )
    gather_in_one_order(parameters)
    parameters[3].all_gather_coalesced([parameters[i] for i in (3, 1, 4, 0)], quantize=False)
    assert seen == [([0, 1, 3, 4], False)]
