"""The planner's numbers against real tensors, real messages and each other."""

import dataclasses
import gc

import pytest
import torch

from diffmoe.checkpoints.reader import FIRST_MOMENT, MASTER, SECOND_MOMENT
from diffmoe.config import load_config, override
from diffmoe.cost.calibration import Measured, calibrate, plan_error
from diffmoe.cost.extrapolation import nearest_fit
from diffmoe.cost.hardware import choose, read_table
from diffmoe.cost.layouts import Cluster, Pins, candidates, reasons
from diffmoe.cost.memory import engine_facts, rank_memory
from diffmoe.cost.overlap import lengthened
from diffmoe.cost.parameters import rank_parameters
from diffmoe.cost.step_time import message_time, step_time
from diffmoe.cost.traffic import least_traffic, step_traffic
from diffmoe.deepspeed_json import merge_deepspeed
from diffmoe.errors import UserError
from diffmoe.layout import over_hosts, resolve_layout
from diffmoe.models.count import count
from diffmoe.models.dit import DiT
from diffmoe.models.logical import logical_tensors
from diffmoe.moe.routing import RoutingRule
from diffmoe.parallel.groups import Group, ParallelGroups, build_groups
from diffmoe.parallel.spawn import Ranks
from diffmoe.parallel.traffic import CommunicationCount, wire_bytes
from diffmoe.parity.plain import build_model, synthetic_batch
from diffmoe.training.ema import Ema
from diffmoe.training.engine import Engine
from diffmoe.training.profiling import live_bytes, profile_rank, split
from diffmoe.training.step import micro_loss, train_step

CPU = torch.device("cpu")
# Large enough that activations and gradients stand out, with the demo's width and experts.
MODEL = (
    "model.input_size=16",
    "model.width=128",
    "model.depth=4",
    "model.heads=4",
    "model.classes=10",
    "moe.experts=8",
    "train.batch=32",
    "train.steps=1000000",
    "train.save_every=0",
)


@pytest.fixture(scope="module")
def worlds():
    """Processes by number of ranks, started when they are first asked for."""
    started = {}

    def world(ranks):
        if ranks not in started:
            started[ranks] = Ranks(ranks, timeout=300)
        return started[ranks]

    yield world
    for ranks in started.values():
        ranks.close()


# ---------------------------------------------------------------------------------------------
# parameters


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.family=dense"],
        ["model.family=tc"],
        ["model.family=ec", "moe.pool=1"],
        ["model.family=diffmoe"],
        ["moe.threshold_from=10"],
        ["model.family=race", "moe.target_weight=0.1"],
        ["model.family=prototype", "moe.mlp_ratio=2", "moe.shared_experts=2"],
        ["model.family=ec", "moe.pool=1", "moe.router_input=time_token", "moe.activation=swiglu"],
        [
            "moe.activation=swiglu",
            "moe.shared_experts=1",
            "model.qk_norm=true",
            "moe.interleave=false",
        ],
        ["model.norm=rms", "model.activation=swiglu", "moe.shared_experts=2"],
        ["model.family=dense", "model.norm=rms", "model.qk_norm=true", "model.activation=swiglu"],
        ["model.activation=swiglu_bias", "moe.shared_experts=1"],
        [
            "model.input_size=32",
            "model.width=64",
            "model.depth=3",
            "model.heads=2",
            "model.learn_sigma=false",
        ],
        ["model.patch=1", "model.channels=32", "diffusion.prediction=x"],
        ["model.patch=1", "model.channels=768", "model.learn_sigma=false"],
    ],
)
@pytest.mark.parametrize("ep", [1, 4])
def test_every_tensor_of_the_model_is_counted(overrides, ep):
    config = load_config(None, [*MODEL, *overrides])
    ep = 1 if config.model.family == "dense" else ep
    group, one = Group(tuple(range(ep)), 0), Group((0,), 0)
    with torch.device("meta"):
        model = DiT(config.model, config.moe, groups=ParallelGroups(group, group, one, one, one))
    found = {p.name: (p.numel, p.expert) for p in rank_parameters(config.model, config.moe, ep)}
    assert found == {
        t.name: (t.parameter.numel(), t.experts is not None) for t in logical_tensors(model)
    }
    if ep == 1:
        assert sum(numel for numel, _ in found.values()) == count(config.model, config.moe).total


# -------------------------------------------------------------------------------------------------
# memory


def _deepspeed(zero, bf16, bucket, shard=None):
    tree = {
        "zero_optimization": {
            "stage": zero,
            "reduce_bucket_size": bucket,
            "stage3_param_persistence_threshold": 1000,
            "mics_shard_size": shard,
        }
    }
    sums = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    narrow = {"bf16": {"enabled": True}}  # gradients are accumulated in bf16, too
    return {**tree, **{False: {}, True: sums, "narrow": narrow}[bf16]}


def _measured_memory(overrides, tree):
    """Bytes of one rank: by kind, from the engine's own tensors, and what lived at once during
    steps.
    """
    config = load_config(None, overrides)
    layout = resolve_layout(config, torch.distributed.get_world_size())
    groups = build_groups(layout.ep, layout.pool_ranks)
    # What an earlier case left must not be freed while this one is measured.
    held = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    before = live_bytes(CPU)
    merged = merge_deepspeed(tree, config, layout)
    engine = Engine(build_model(config, layout.pool, groups), config, merged, groups, CPU)
    ema = Ema(engine, config.train)
    micro = layout.micro_batch
    batches = [
        synthetic_batch(config, range(groups.rank * micro, (groups.rank + 1) * micro))
    ] * layout.accumulation
    steps = iter(range(100))
    found = profile_rank(
        engine,
        lambda: batches,
        lambda b: train_step(engine, ema, b, config, layout, groups, next(steps)),
        1,
        1,
        1,
    )
    kinds = {
        name: sum(t.numel() * t.element_size() for t in tensors)
        for name, tensors in (
            (MASTER, engine.shards(MASTER)),
            ("moments", engine.shards(FIRST_MOMENT) + engine.shards(SECOND_MOMENT)),
            ("ema", [t for shards in ema.by_decay.values() for t in shards]),
        )
    }
    engine.engine.destroy()
    del held
    return kinds, found.static_bytes - before, found.peak_bytes - before


@pytest.mark.full
@pytest.mark.parametrize(
    ("ranks", "ep", "zero", "recompute", "bf16", "accumulation", "bucket", "shard"),
    [
        (1, 1, 0, "none", False, 1, 200_000, None),
        (1, 1, 1, "block", False, 1, 5_000_000, None),
        pytest.param(1, 1, 1, "none", True, 1, 200_000, None, marks=pytest.mark.slow),
        (2, 2, 1, "none", False, 2, 5_000_000, None),
        (2, 2, 1, "selective", True, 1, 5_000_000, None),
        (2, 2, 1, "none", "narrow", 2, 200_000, None),
        (2, 2, 2, "none", True, 2, 200_000, None),
        pytest.param(2, 1, 2, "block", False, 1, 200_000, None, marks=pytest.mark.slow),
        (2, 2, 3, "selective", False, 1, 200_000, None),
        (2, 2, 2, "none", True, 1, 5_000_000, None),
        (2, 2, 3, "none", True, 1, 5_000_000, None),
        (4, 2, 1, "none", False, 2, 5_000_000, 2),
        (4, 2, 1, "selective", True, 1, 200_000, 2),
        (4, 2, 2, "none", True, 2, 200_000, 2),
        (4, 2, 3, "selective", False, 1, 200_000, 2),
    ],
)
def test_memory_is_what_was_planned(
    worlds, ranks, ep, zero, recompute, bf16, accumulation, bucket, shard
):
    """State exactly, what lives between steps within half a per cent (scalars, batches), the most
    at once within 10.
    """
    overrides = [
        *MODEL,
        f"parallel.ep={ep}",
        f"parallel.recompute={recompute}",
        f"train.accumulation={accumulation}",
        "moe.pool=group",
    ]
    overrides += ["train.ema=[0.9, 0.99]"] if zero == 3 else []
    tree = _deepspeed(zero, bf16, bucket, shard)
    config = load_config(None, overrides)
    plan = rank_memory(config, resolve_layout(config, ranks), engine_facts(tree))
    for kinds, static, peak in worlds(ranks).run(_measured_memory, overrides, tree):
        assert kinds == {
            MASTER: plan.weights if zero == 0 else plan.masters,
            "moments": plan.moments,
            "ema": plan.ema,
        }
        assert plan.static == pytest.approx(static, rel=5e-3)
        assert plan.peak == pytest.approx(peak, rel=0.1)


# ------------------------------------------------------------------------------------------------
# traffic


def _counted(overrides, tree, per_host=0):
    """(table of one counted step, rows [layer][expert] that this rank's tokens went to in it)."""
    config = load_config(None, overrides)
    layout = resolve_layout(config, torch.distributed.get_world_size())
    groups = build_groups(layout.ep, layout.pool_ranks, per_host=per_host)
    engine = Engine(
        build_model(config, layout.pool, groups),
        config,
        merge_deepspeed(tree, config, layout),
        groups,
        CPU,
    )
    batch = synthetic_batch(
        config, range(groups.rank * layout.micro_batch, (groups.rank + 1) * layout.micro_batch)
    )
    count = CommunicationCount(
        (f"block {i}", layer, layer.experts) for i, layer in engine.model.moe_layers()
    )
    with count:
        loss = micro_loss(engine.forward, batch, config, RoutingRule("train"), CPU)
        engine.backward(loss.total)
        engine.step(1e-4, engine.squared_norm().item() ** 0.5)
    rows = [stats.mask_TE.sum(dim=0).tolist() for stats in loss.output.moe]
    engine.engine.destroy()
    return count.table(), rows


RAGGED = {
    "tc": ["model.family=tc", "moe.top_k=2"],
    "race": ["model.family=race", "moe.target_weight=0.1"],
    "prototype": ["model.family=prototype"],
}


@pytest.mark.full
@pytest.mark.parametrize("router", RAGGED)
@pytest.mark.parametrize(("ranks", "ep", "pool"), [(2, 2, "rank"), (4, 2, "global")])
def test_counted_bytes_of_ragged_routers_equal_the_formula(worlds, router, ranks, ep, pool):
    compare_bytes(worlds, ranks, ep, pool, 1, "none", False, RAGGED[router])


@pytest.mark.full
@pytest.mark.parametrize(("bf16", "recompute"), [(False, "block"), (True, "selective")])
def test_counted_bytes_of_the_dispersive_loss_equal_the_formula(worlds, bf16, recompute):
    more = ["train.dispersive_weight=0.5"]
    compare_bytes(worlds, 4, 2, "rank", 1, recompute, bf16, more)


@pytest.mark.full
@pytest.mark.parametrize(
    ("pool", "recompute", "router"),
    [("rank", "none", []), ("global", "block", []), ("rank", "selective", RAGGED["tc"])],
)
def test_halves_send_as_many_bytes_in_twice_as_many_messages(worlds, pool, recompute, router):
    plain, found = (
        compare_bytes(worlds, 4, 2, pool, 1, recompute, False, [*router, *more])
        for more in ([], ["parallel.overlap=halves"])
    )
    for purpose in ("dispatch", "combine", "scores", "mask"):
        one, two = (
            [(row["wire"], row["messages"]) for row in rows if row["purpose"] == purpose]
            for rows in (plain, found)
        )
        times = 2 if purpose in ("dispatch", "combine") else 1
        assert two == [(wire, times * messages) for wire, messages in one]
        assert one or purpose in ("scores", "mask")


@pytest.mark.full
@pytest.mark.parametrize(
    ("ranks", "ep", "pool", "zero", "recompute", "bf16"),
    [
        (2, 2, "rank", 1, "none", False),
        (2, 2, "group", 2, "selective", False),
        (4, 2, "group", 1, "block", False),
        (4, 2, "global", 2, "none", False),
        (4, 4, "global", 1, "selective", False),
        (4, 2, "rank", 1, "none", True),
        (4, 2, "rank", 1, "none", "narrow"),
        (2, 2, "rank", 2, "none", True),
        pytest.param(4, 2, "rank", 0, "none", False, marks=pytest.mark.slow),
        pytest.param(4, 4, "rank", 3, "none", False, marks=pytest.mark.slow),
    ],
)
def test_counted_bytes_equal_the_formula(worlds, ranks, ep, pool, zero, recompute, bf16):
    sent = compare_bytes(worlds, ranks, ep, pool, zero, recompute, bf16)
    least = sum(
        row["wire"]
        for row in sent
        if row["purpose"] in ("dispatch", "combine") and row["phase"] != "recompute"
    )
    if recompute != "block":  # which pays for its memory by sending everything a second time
        assert sum(row["wire"] for row in sent) <= 1.05 * least


@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(("nodes", "ep"), [(2, 8), (2, 1), (16, 8)])
def test_a_node_puts_one_gradient_on_the_network(nodes, ep, bf16, zero):
    """Its ranks share a copy of the state; an all-reduce sends 2 (R - 1) / R of what R put in."""
    config = load_config(
        None, [f"parallel.ep={ep}", "moe.pool=1", "train.batch=256", "train.micro_batch=1"]
    )
    tree = _deepspeed(zero, bf16, 300_000, shard=8)
    layout, engine = resolve_layout(config, 8 * nodes), engine_facts(tree)
    sent = [m for m in step_traffic(config, layout, engine) if m.group == "replicas"]
    inside = {m.group for m in step_traffic(config, layout, engine)} - {"ep", "replicas"}
    assert len(sent) == 1 and inside <= {"shard", "expert shard"}
    gradient = 4 * count(config.model, config.moe).total
    assert 0.999 * gradient < 8 * sent[0].payload < 1.05 * gradient
    assert 8 * sent[0].wire <= 1.05 * gradient * 2 * (nodes - 1) / nodes


@pytest.mark.full
@pytest.mark.parametrize(
    ("ep", "zero", "bf16"),
    [(2, 1, True), (1, 1, True), (2, 1, False), (2, 2, True), (2, 2, False), (1, 3, True)],
)
def test_counted_bytes_of_groups_and_replicas_equal_the_formula(worlds, ep, zero, bf16):
    compare_bytes(worlds, 4, ep, "rank", zero, "none", bf16, shard=2)


@pytest.mark.full
@pytest.mark.parametrize("router", ["diffmoe", *RAGGED])
@pytest.mark.parametrize("pool", ["rank", "global"])
@pytest.mark.parametrize(
    ("ranks", "ep", "per_host"),
    [
        (4, 4, 2),
        pytest.param(8, 4, 2, marks=pytest.mark.slow),
        pytest.param(8, 8, 4, marks=pytest.mark.slow),
    ],
)
def test_counted_messages_over_two_levels_equal_the_formula(
    worlds, ranks, ep, per_host, pool, router
):
    """Messages and bytes of each level; across hosts at most 1.05 of the rows that must go there,
    to one rank a host.
    """
    words = [*RAGGED.get(router, []), *MODEL, "model.input_size=8", "model.depth=2"]
    words += ["moe.interleave=false", f"parallel.ep={ep}", f"moe.pool={pool}"]
    config = load_config(None, [*words, "parallel.recompute=selective"])
    layout = over_hosts(resolve_layout(config, ranks), "two_level", [per_host])
    assert layout.per_host == per_host
    engine = engine_facts(_deepspeed(1, False, 300_000))
    messages = [m for m in step_traffic(config, layout, engine) if m.collective == "all_to_all"]
    planned = {(m.purpose, m.phase, m.level): (m.messages, m.wire) for m in messages}
    assert {m.level for m in messages} == {"ep across", "ep inside"}
    answers = worlds(ranks).run(_counted, words, _deepspeed(1, False, 300_000), per_host)
    rows = [sum(map(torch.tensor, found)) for _, found in answers]
    network = needed = 0
    for rank, (table, _) in enumerate(answers):
        found = {}
        for row in table:
            if row["collective"] == "all_to_all":
                key = row["purpose"], row["phase"], row["level"]
                seen = found.setdefault(key, [0, 0])
                seen[0] += row["messages"]
                seen[1] += row["wire"]
        assert {key: count for key, (count, _) in found.items()} == {
            key: count for key, (count, _) in planned.items()
        }
        exact = _wire_by_level(config, layout, engine.element, rows, rank)
        out = {("dispatch", "forward"), ("combine", "backward")}
        for (purpose, phase, level), (_, wire) in found.items():
            way = "out" if (purpose, phase) in out else "home"
            is_rows = purpose in ("dispatch", "combine")
            known = not is_rows or (router, pool) == ("diffmoe", "rank")
            assert not is_rows or wire == exact[way, level]
            assert not known or wire == planned[purpose, phase, level][1]
            network += wire if level == "ep across" else 0
            needed += wire if level == "ep across" and is_rows else 0
    assert needed <= network <= 1.05 * needed
    if (router, pool) == ("diffmoe", "rank"):
        assert needed == ranks * least_traffic(config, layout, engine).network


def _wire_by_level(config, layout, element, rows_by_rank, rank):
    """Bytes of rows that leave ``rank``: (there | back, level) -> bytes."""
    ep, here, size = layout.ep, layout.per_host, config.model.width * element
    first, local = rank - rank % ep, config.moe.experts // ep

    def sent(source, target):
        expert = (target - first) * local
        return rows_by_rank[source][expert : expert + local].sum().item() * size

    group = range(first, first + ep)
    other_hosts = [r for r in group if r // here != rank // here]
    neighbours = [r for r in group if r // here == rank // here and r != rank]
    own_place = [r for r in group if r % here == rank % here]
    own_host = [*neighbours, rank]
    return {
        ("out", "ep across"): sum(sent(rank, r) for r in other_hosts),
        ("out", "ep inside"): sum(sent(s, r) for s in own_place for r in neighbours),
        ("home", "ep across"): sum(sent(s, r) for s in own_place if s != rank for r in own_host),
        ("home", "ep inside"): sum(sent(s, rank) for s in group if s % here != rank % here),
    }


def compare_bytes(worlds, ranks, ep, pool, zero, recompute, bf16, router=(), shard=None):
    """Counts a step, compares it with the plan, and returns what went all to all."""
    overrides = [
        *MODEL,
        *router,
        "model.input_size=8",
        "model.depth=2",
        "moe.interleave=false",
        f"parallel.ep={ep}",
        f"moe.pool={pool}",
        f"parallel.recompute={recompute}",
    ]
    config = load_config(None, overrides)
    tree = _deepspeed(zero, bf16, 300_000, shard)
    layout, engine = resolve_layout(config, ranks), engine_facts(tree)
    answers = worlds(ranks).run(_counted, overrides, tree)
    planned = {}
    for message in step_traffic(config, layout, engine):
        key = (message.collective, message.purpose, message.phase)
        planned[key] = planned.get(key, 0) + message.wire
    for rank, (table, _) in enumerate(answers):
        found = {}
        for row in table:
            key = (row["collective"], row["purpose"], row["phase"] if row["layer"] else "step")
            found[key] = found.get(key, 0) + row["wire"]
        exact = _wire_of_rows(config, layout, engine.element, [rows for _, rows in answers], rank)
        travelled = {
            key: exact[
                key[1]
                if key[2] != "backward"
                else {"dispatch": "combine", "combine": "dispatch"}[key[1]]
            ]
            for key in found
            if key[1] in ("dispatch", "combine")
        }
        assert {key: found[key] for key in travelled} == travelled
        if pool == "rank" and not router:  # then the plan knows the rows too
            assert travelled == {key: wire for key, wire in planned.items() if key in travelled}
        compared = {key for key in planned if key[1] not in ("dispatch", "combine")}
        if zero == 3:  # beside these it broadcasts norms and what is too small to shard
            compared = {
                key
                for key in compared
                if key[0] not in ("all_gather", "reduce_scatter") or key[1] == "owners"
            }
        assert {key: found[key] for key in compared} == {key: planned[key] for key in compared}
    return [row for table, _ in answers for row in table if row["collective"] == "all_to_all"]


def _wire_of_rows(config, layout, element, rows_by_rank, rank):
    """Bytes that leave ``rank``: rows for other ranks' experts (dispatch), results for other ranks'
    tokens (combine).
    """
    local, group = (
        config.moe.experts // layout.ep,
        range(rank - rank % layout.ep, rank - rank % layout.ep + layout.ep),
    )
    row = config.model.width * element

    def sent(source, target):
        first = (target % layout.ep) * local
        return sum(sum(layer[first : first + local]) for layer in rows_by_rank[source]) * row

    return {
        "dispatch": sum(sent(rank, other) for other in group if other != rank),
        "combine": sum(sent(other, rank) for other in group if other != rank),
    }


@pytest.mark.parametrize(
    "model", ["s_e8", "s_e16", "b_e8", "b_e16", "l_e8", "l_e16", "xl_e8", "xl_e16"]
)
def test_scores_and_masks_cost_little_beside_the_rows(model):
    """At the published sizes, in bf16, on one node and on eight."""
    for ranks in (8, 64):
        config = load_config(
            f"configs/diffmoe_{model}_flow.yaml", ["parallel.ep=8", "parallel.recompute=selective"]
        )
        layout, engine = resolve_layout(config, ranks), engine_facts({"bf16": {"enabled": True}})
        sent = sum(
            m.wire for m in step_traffic(config, layout, engine) if m.collective == "all_to_all"
        )
        assert sent <= 1.05 * least_traffic(config, layout, engine).rows


def test_the_fewest_bytes_of_each_collective():
    assert wire_bytes("all_to_all", 400, 4) == 300
    assert wire_bytes("all_gather", 100, 4) == 300
    assert wire_bytes("reduce_scatter", 400, 4) == 300
    assert wire_bytes("all_reduce", 400, 4) == 600


# --------------------------------------------------------------------------------------------------
# time


@dataclasses.dataclass
class _Event:
    title: str
    start: int
    duration: int

    def name(self):
        return self.title

    def start_ns(self):
        return self.start

    def duration_ns(self):
        return self.duration

    def device_type(self):
        return torch.autograd.DeviceType.CPU


def test_a_step_is_split_by_what_is_hidden_behind_what():
    shares = split(
        [
            _Event("diffmoe: data", 0, 10),
            _Event("diffmoe: step", 10, 90),
            _Event("aten::mm", 10, 40),
            _Event("gloo:all_to_all", 40, 20),
            _Event("gloo:all_reduce", 55, 15),
            _Event("aten::empty", 20, 5),  # inside of another, and outside of the step
            _Event("aten::add", 90, 5),
            _Event("aten::add", 120, 30),
        ]
    )
    assert shares == {
        "compute": 0.45,
        "all_to_all": 0.10,
        "reduction": 0.10,
        "data": 0.10,
        "other": 0.25,
    }


def _priced(words, tree, ranks=16, cost=None):
    hardware = choose(read_table(None), "h100")
    if cost is not None:
        hardware = dataclasses.replace(hardware, overlap_cost=cost)
    config = load_config("configs/diffmoe_l_e16_flow.yaml", words.split())
    return step_time(config, resolve_layout(config, ranks), engine_facts(tree), hardware, 8)


def test_messages_lengthen_a_step_by_what_kernels_do_not_hide():
    assert lengthened(3.0, 5.0, 0.0) == 0 and lengthened(5.0, 3.0, 0.0) == 2
    assert lengthened(5.0, 3.0, 0.25) == 2.75 and lengthened(5.0, 3.0, 1.0) == 5.0


def test_gradients_pass_under_backward_where_they_leave_in_buckets():
    overlapping = {**BF16, "zero_optimization": {"stage": 1, "overlap_comm": True}}
    waiting = {**BF16, "zero_optimization": {"stage": 1, "overlap_comm": False}}
    whole, hidden = _priced("", waiting), _priced("", overlapping)
    assert whole.reduction == whole.whole_reduction == hidden.whole_reduction
    assert whole.hidden == 0 and hidden.hidden == pytest.approx(whole.total - hidden.total)
    # Where they cost kernels as much time as they take, nothing is gained.
    assert _priced("", overlapping, cost=1.0).total == pytest.approx(whole.total)
    # One bucket is ready when backward is over.
    zero = {"stage": 1, "overlap_comm": True, "reduce_bucket_size": 10**10}
    tree = {**BF16, "zero_optimization": zero}
    assert _priced("parallel.ep=1", tree).hidden == pytest.approx(0)
    # On one node backward is long enough for all but the last bucket and the weights.
    free, parts = _priced("", overlapping, 8, cost=1e-9), least_buckets(8)
    gradients, weights = parts
    assert free.reduction == pytest.approx(gradients + weights, rel=1e-6)


def least_buckets(ranks):
    """Seconds of the last bucket of gradients, and of the weights, of L-E16 on one node."""
    config = load_config("configs/diffmoe_l_e16_flow.yaml", [])
    layout, hardware = resolve_layout(config, ranks), choose(read_table(None), "h100")
    engine = engine_facts({**BF16, "zero_optimization": {"stage": 1, "overlap_comm": True}})
    seconds = {
        m.purpose: sum(message_time(m, layout, engine, hardware, 8))
        for m in step_traffic(config, layout, engine)
        if m.group == "world"
    }
    dense = sum(p.numel for p in rank_parameters(config.model, config.moe, 8) if not p.expert)
    return seconds["gradients"] / -(-dense // engine.bucket), seconds["parameters"]


def test_rows_pass_under_shared_experts():
    plain, shared = _priced("", BF16), _priced("moe.shared_experts=2", BF16)
    assert plain.all_to_all == plain.whole_all_to_all == shared.whole_all_to_all
    # At least as much comes home, for which all wait, and kernels are slower meanwhile.
    assert shared.whole_all_to_all / 2 < shared.all_to_all < shared.whole_all_to_all


@pytest.mark.parametrize("kind", ["cpu", "h100"])
def test_a_calibrated_plan_meets_its_record(kind):
    hardware = choose(read_table(None), kind)
    config = load_config("configs/demo.yaml", [])
    layout, engine = resolve_layout(config, 2), engine_facts({"zero_optimization": {"stage": 1}})
    record = Measured(
        config, layout, engine, 2, compute=0.3, all_to_all=0.05, reduction=0.02, other=0.1
    )
    fitted = calibrate(hardware, [record], "a test")
    again = step_time(config, layout, engine, fitted, 2)
    assert again.total == pytest.approx(0.47)
    assert again.compute == pytest.approx(
        0.3
    ) and again.all_to_all + again.reduction == pytest.approx(0.07)
    assert fitted.calibrated == "a test"
    with pytest.raises(UserError, match="holds no measured step"):
        calibrate(hardware, [], "an empty file")


def test_a_launch_on_a_gpu_takes_no_longer_than_the_shortest_step_leaves_it():
    config = load_config("configs/demo.yaml", [])
    layout, engine = resolve_layout(config, 2), engine_facts({"zero_optimization": {"stage": 1}})
    short = Measured(config, layout, engine, 2, compute=0.01, all_to_all=0, reduction=0, other=0)
    long = dataclasses.replace(short, compute=1.0)
    h100 = choose(read_table(None), "h100")
    alone, both = (calibrate(h100, records, "a test") for records in ([short], [long, short]))
    assert alone.operator_us == pytest.approx(both.operator_us)


def test_the_plans_own_error_follows_the_schedule_of_the_capacity():
    words = ["moe.capacity_hold=100", "moe.capacity_until=200"]
    config, tree = load_config("configs/demo.yaml", words), {"zero_optimization": {"stage": 1}}
    layout = resolve_layout(config, 2)
    early, late = (
        plan_error(config, layout, tree, "cpu", 2, 0.5, 0, step=step)[0]["plan_step_s"]
        for step in (10, 200)
    )
    assert early > 1.5 * late


@pytest.mark.parametrize(
    "tree,stage,overlaps",
    [
        ({}, 0, False),
        ({"zero_optimization": {"stage": None, "stage3_max_live_parameters": None}}, 0, False),
        ({"bf16": {"enabled": True}}, 1, True),  # as ZeRO 1
        ({"zero_optimization": {"stage": 2}}, 2, True),
        ({"zero_optimization": {"stage": 3}}, 3, True),
        ({"zero_optimization": {"stage": 3, "overlap_comm": False}}, 3, False),
    ],
)
def test_when_gradients_leave_under_backward(tree, stage, overlaps):
    engine = engine_facts(tree)
    assert (engine.stage, engine.overlaps) == (stage, overlaps)
    assert engine.buckets == (2 if overlaps and stage < 3 else 1)


def test_what_is_offloaded_takes_no_memory_of_the_gpu():
    config = load_config("configs/diffmoe_s_e16_flow.yaml", ["train.optimizer=deepspeed"])
    layout, cpu = resolve_layout(config, 8), {"device": "cpu"}
    zero = {"stage": 3}
    kept, state, all_of_it = (
        rank_memory(config, layout, engine_facts({"zero_optimization": {**zero, **more}}))
        for more in (
            {},
            {"offload_optimizer": cpu},
            {"offload_optimizer": cpu, "offload_param": cpu},
        )
    )
    assert kept.masters and kept.moments and kept.ema
    assert (state.masters, state.moments, state.ema) == (0, 0, 0)
    assert state.weights == kept.weights > all_of_it.weights


def test_zero_3_gathers_twice_where_all_weights_together_are_too_many():
    config = load_config("configs/diffmoe_s_e16_flow.yaml", ["parallel.ep=4"])
    layout = resolve_layout(config, 8)
    parameters = rank_parameters(config.model, config.moe, layout.ep)
    whole = sum(p.numel for p in parameters)
    experts = sum(p.numel for p in parameters if p.expert)
    largest = max(experts, whole - experts)

    def gathered(live):
        tree = {"zero_optimization": {"stage": 3, "stage3_max_live_parameters": live}}
        found = step_traffic(config, layout, engine_facts(tree))
        return sum(m.wire for m in found if m.purpose == "parameters")

    assert gathered(largest + 1000) == 2 * gathered(whole + 1000)


def test_the_plans_own_error():
    config = load_config("configs/demo.yaml", [])
    layout, tree = resolve_layout(config, 2), {"zero_optimization": {"stage": 1}}
    entries, line = plan_error(config, layout, tree, "cpu", 2, 0.5, 0)
    assert (
        entries["plan_step_error"] == pytest.approx(entries["plan_step_s"] / 0.5 - 1)
        and "plan_memory_error" not in entries
    )
    assert "measured 500.0" in line and "of a CPU rank it is not measured" in line
    entries, line = plan_error(config, layout, tree, "NVIDIA H200", 2, 0.5, 2**31)
    assert (
        entries["plan_memory_error"] == pytest.approx(entries["plan_memory_gib"] / 2 - 1)
        and "measured 2.00" in line
    )
    assert plan_error(config, layout, tree, "Radeon", 2, 0.5, 0) == (
        {},
        "plan: diffmoe/cost/hardware.yaml has no entry for 'Radeon'",
    )


# ------------------------------------------------------------------------------------------------
# layouts


BF16 = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}


@pytest.mark.parametrize("nodes", [1, 2, 8])
def test_xl_fits_on_8_16_and_64_gpus(nodes):
    config = load_config("configs/diffmoe_xl_e16_flow.yaml", [])
    for kind in ("h100", "a100"):
        found = candidates(config, BF16, Cluster(nodes, 8, choose(read_table(None), kind)))
        best = found[0]
        assert best.fits and best.layout.batch == 256 and best.layout.pool == 64
        assert [c.fits for c in found] == sorted((c.fits for c in found), reverse=True)
        times = [c.time.total for c in found if c.fits]
        assert times == sorted(times)
        assert all(reasons(c, best) for c in found)


@pytest.mark.full
@pytest.mark.parametrize(
    "router",
    [
        "model.family=tc moe.balance=bias moe.top_k=2 moe.expert_groups=4 moe.top_groups=2",
        "model.family=ec moe.pool=1 moe.router_input=time_token",
        "moe.pool=16 moe.threshold_from=4000",
        "model.family=race moe.target_weight=0.01",
        "model.family=prototype moe.mlp_ratio=2 moe.shared_experts=1",
    ],
)
def test_every_router_is_planned_near_the_published_one(router):
    """Rows are as many, so times differ by messages and by what is around the experts."""
    cluster = Cluster(2, 8, choose(read_table(None), "h100"))
    published = load_config("configs/diffmoe_l_e16_flow.yaml", [])
    best = candidates(published, BF16, cluster)[0].time.total
    found = candidates(override(published, router.split()), BF16, cluster)
    assert found[0].fits and 0.5 * best < found[0].time.total < 2.5 * best


def test_experts_are_shared_out_evenly_or_not_at_all():
    cluster = Cluster(1, 6, choose(read_table(None), "h100"))
    config = load_config("configs/diffmoe_l_e16_flow.yaml", ["train.batch=252", "moe.pool=6"])
    assert candidates(config, BF16, cluster, Pins(ep=2))
    assert candidates(config, BF16, cluster, Pins(ep=3)) == []


def test_less_memory_is_answered_with_recompute_then_with_more_nodes():
    config = load_config("configs/diffmoe_xl_e16_flow.yaml", [])
    hardware = choose(read_table(None), "a100")
    small = Cluster(1, 8, dataclasses.replace(hardware, memory_gib=24.0))
    pins = Pins(ep=1, recompute="none", micro_batch=32)
    assert not any(c.fits for c in candidates(config, {}, small, pins))
    found = nearest_fit(config, {}, small, pins)
    assert (
        found.candidate.fits
        and found.changes == ("recompute none -> selective",)
        and found.cluster.nodes == 1
    )
    tiny = Cluster(1, 8, dataclasses.replace(hardware, memory_gib=9.0))
    found = nearest_fit(config, BF16, tiny, Pins())
    assert (
        found.candidate.fits
        and found.changes[0].startswith("nodes 1 -> ")
        and found.cluster.nodes > 1
    )
    assert (
        nearest_fit(
            config, BF16, Cluster(1, 8, dataclasses.replace(hardware, memory_gib=4.1)), Pins()
        )
        is None
    )
