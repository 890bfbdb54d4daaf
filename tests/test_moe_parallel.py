"""The MoE layer over ranks, in fp64 and without the engine, against the same layer in one
process.
"""

import contextlib
import zlib
from collections import Counter
from functools import lru_cache, partial

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from diffmoe.config import load_config
from diffmoe.layout import resolve_layout, rows_taken
from diffmoe.models.compiled import CompiledRun
from diffmoe.moe.dispatch import by_expert, by_source, combine, dispatch, make_plan, send_home
from diffmoe.moe.layer import MoELayer
from diffmoe.moe.routing import Routing, RoutingRule, equal_routing
from diffmoe.parallel.collectives import arrived, sum_over
from diffmoe.parallel.groups import build_groups, single_process
from diffmoe.parallel.recompute import recomputed
from diffmoe.parallel.spawn import Ranks

TRAIN, TOKENS, WIDTH, EXPERTS = RoutingRule("train", 1.0), 16, 16, 4
GRIDS = [(2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]
# (samples a rank, pool): pools inside a rank, of a group, of all, and straddling ranks of 3
# samples.
POOLS = [(2, "rank"), (2, "group"), (2, "global"), (3, "2")]

groups_of = lru_cache(build_groups)


@pytest.fixture(scope="module")
def ranks():
    with contextlib.ExitStack() as stack:
        started = {world: stack.enter_context(Ranks(world, timeout=60)) for world in (2, 4)}
        yield {**started, "more": stack}


def settings(world, ep, samples, pool, family="diffmoe"):
    config = load_config(
        None,
        [
            f"model.width={WIDTH}",
            "model.heads=2",
            "model.input_size=8",
            "model.mlp_ratio=2",
            f"model.family={family}",
            f"moe.experts={EXPERTS}",
            "moe.top_k=2",
            f"moe.pool={pool}",
            f"parallel.ep={ep}",
            f"train.batch={samples * world}",
        ],
    )
    return config, resolve_layout(config, world)


def make_layer(config, pool, groups):
    """Every tensor by its name, each expert the same wherever it lives."""
    layer = MoELayer(config.model, config.moe, pool, groups).double()
    for name, p in layer.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        shape = (EXPERTS, *p.shape[1:]) if is_expert(name) else p.shape
        whole = 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)
        p.data.copy_(owned(layer, name, whole))
    return layer


def is_expert(name):
    return name.startswith("experts.")


def owned(layer, name, whole):
    """The part of a tensor over all experts that this layer holds."""
    first = layer.experts.first
    return whole[first : first + layer.experts.local] if is_expert(name) else whole


def make_samples(count):
    return torch.randn(
        count, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )


def run(layer, x, rule, share=1.0, weight=None, mode="none"):
    """(output, input gradient, report) after backward of a weighted sum plus ``share`` of the
    layer's own losses.
    """
    x = x.clone().requires_grad_()
    weight = (
        torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x) if weight is None else weight
    )
    if mode == "parts":  # as a compiled model runs them, each with selective recompute of its own
        with torch.compiler.set_stance("force_eager"):
            y, stats = layer(x, rule, partial(CompiledRun(rule.capacity).part, "selective"))
    else:
        y, stats = recomputed(layer, mode, x, rule)
    extra = [loss for loss in (stats.predictor_loss, stats.balance_loss) if loss is not None]
    ((y * weight).sum() + share * sum(extra)).backward()
    return y.detach(), x.grad, stats


def gradients(layer):
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in layer.named_parameters()
    }


def relative(found, wanted):
    return ((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-9)).item()


# -------------------------------------------------------------------------------------------------
# parity


def differences(ep, samples, pool, family, rule):
    """A rank's largest relative differences from one process that holds everything."""
    world, rank = dist.get_world_size(), dist.get_rank()
    config, layout = settings(world, ep, samples, pool, family)
    groups = groups_of(ep, layout.pool_ranks)
    x = make_samples(samples * world)
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    alone = make_layer(config, layout.pool, single_process())
    # The paper's inference rules look at one rank's batch; every other result is that of the whole
    # batch.
    parts = world if rule.kind in ("batch", "static") else 1
    runs = [
        run(alone, *part, rule, weight=w) for *part, w in zip(x.chunk(parts), weight.chunk(parts))
    ]
    y, x_grad = (torch.cat([part[i] for part in runs]).chunk(world)[rank] for i in (0, 1))

    layer = make_layer(config, layout.pool, groups)
    our_y, our_x_grad, stats = run(
        layer, x.chunk(world)[rank], rule, 1 / world, weight.chunk(world)[rank]
    )
    found = {"output": relative(our_y, y), "input gradient": relative(our_x_grad, x_grad)}
    wanted = gradients(alone)
    for name, gradient in gradients(layer).items():
        total = sum_over(gradient, groups.edp if is_expert(name) else groups.world)
        found[name] = relative(total, owned(layer, name, wanted[name]))
    if stats.observed_E is not None:
        found["thresholds"] = relative(
            sum_over(stats.observed_E, groups.world), runs[0][2].observed_E
        )
    return found


def assert_equal_to_one_process(ranks, world, *args):
    for rank, found in enumerate(ranks[world].run(differences, *args)):
        assert max(found.values()) < 1e-12, f"rank {rank}: {found}"
        assert {"output", "input gradient", "router"} < found.keys()


@pytest.mark.parametrize("samples,pool", POOLS)
@pytest.mark.parametrize("world,ep", GRIDS)
def test_training(ranks, world, ep, samples, pool):
    assert_equal_to_one_process(ranks, world, ep, samples, pool, "diffmoe", TRAIN)


@pytest.mark.parametrize("samples,pool", POOLS)
@pytest.mark.parametrize("world,ep", GRIDS)
def test_token_choice_with_its_balance_loss(ranks, world, ep, samples, pool):
    assert_equal_to_one_process(ranks, world, ep, samples, pool, "tc", TRAIN)


@pytest.mark.parametrize("kind", ["batch", "token", "static"])
@pytest.mark.parametrize("world,ep", GRIDS)
def test_inference_rules(ranks, world, ep, kind):
    assert_equal_to_one_process(ranks, world, ep, 2, "global", "diffmoe", RoutingRule(kind))


@pytest.mark.parametrize("capacity", [0.5, 1.0, 3.0, 4.0])
@pytest.mark.parametrize("samples", [1, 3])
def test_static_routing_takes_each_experts_best_tokens_of_the_batch(samples, capacity):
    config, layout = settings(1, 1, samples, "global")
    layer = make_layer(config, layout.pool, single_process())
    x, K = make_samples(samples), int(samples * TOKENS * capacity / EXPERTS)
    y, _, stats = run(layer, x, RoutingRule("static", capacity))
    scores = (x.flatten(0, 1) @ layer.router.T).softmax(1)
    for expert in range(EXPERTS):
        best = scores[:, expert].argsort(descending=True)[:K]
        assert stats.mask_TE[:, expert].nonzero().flatten().tolist() == sorted(best.tolist())
    # Over a pool that is the batch it is training's own choice.
    torch.testing.assert_close(
        y, run(layer, x, RoutingRule("train", capacity))[0], rtol=0, atol=1e-12
    )


# ----------------------------------------------------------------------------------------------
# recompute


class Watch(TorchDispatchMode):
    """Counts the operations that really run, in forward, backward and recompute.  ``poison``: once
    a collective has finished, what it sent becomes NaN (or -1), as if the allocator had given the
    block away, and whatever is allocated without a value begins so.
    """

    def __init__(self, poison=False, reread=()):
        super().__init__()
        self.poison, self.counts, self.sent, self.poisoned = poison, Counter(), {}, 0
        self.reread = (torch.int64, *reread)  # types that who sends them reads as well

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.name().partition("::")[2]
        self.counts[name] += 1
        if self.poison and name in ("all_to_all_single", "all_gather_into_tensor"):
            self.sent[out.data_ptr()] = args[0]
        if name == "wait_tensor" and args[0].data_ptr() in self.sent:
            sent = self.sent.pop(args[0].data_ptr())
            if sent.dtype not in self.reread:
                sent.fill_(float("nan") if sent.is_floating_point() else 255)
                self.poisoned += 1
        return out


def watched(ep, samples, pool, family, mode, poison, per_host=0):
    """(counts, results) of one training pass of the layer."""
    world, rank = dist.get_world_size(), dist.get_rank()
    config, layout = settings(world, ep, samples, pool, family)
    groups = groups_of(ep, layout.pool_ranks, None, per_host)
    layer = make_layer(config, layout.pool, groups)
    x = make_samples(samples * world).chunk(world)[rank]
    torch.use_deterministic_algorithms(poison)  # which fills what torch.empty returns
    with Watch(poison, [torch.uint8] if per_host else []) as watch:
        y, x_grad, stats = run(layer, x, TRAIN, mode=mode)
    torch.use_deterministic_algorithms(False)
    assert not poison or ep == 1 or watch.poisoned > 0
    found = {"output": y, "input": x_grad, "mask": stats.mask_TE, **gradients(layer)}
    if stats.observed_E is not None:
        found["thresholds"] = stats.observed_E
    return watch.counts, found


def same_bits(left, right):
    assert left.keys() == right.keys()
    return [name for name in left if not torch.equal(left[name], right[name])]


def recompute_and_poison(ep, samples, pool, family):
    """Names that differ from plain training in any bit, and the counts, by (mode, poison)."""
    plain_counts, plain = watched(ep, samples, pool, family, "none", False)
    differing, counts = {}, {("none", False): plain_counts}
    for key in [
        ("none", True),
        ("block", False),
        ("block", True),
        ("selective", False),
        ("selective", True),
        ("parts", False),
        ("parts", True),
    ]:
        counts[key], found = watched(ep, samples, pool, family, *key)
        differing[key] = same_bits(plain, found)
    return differing, counts


@pytest.mark.full
@pytest.mark.parametrize(
    "samples,pool,family",
    [*((*pool, "diffmoe") for pool in POOLS), (2, "global", "tc"), (3, "2", "tc")],
)
@pytest.mark.parametrize("world,ep", GRIDS)
def test_recompute_and_a_poisoned_buffer_change_no_bit(ranks, world, ep, samples, pool, family):
    for differing, counts in ranks[world].run(recompute_and_poison, ep, samples, pool, family):
        assert not any(differing.values()), differing
        plain, block, selective, parts = (
            counts[mode, False] for mode in ("none", "block", "selective", "parts")
        )
        assert plain["topk"] in (
            1,
            2,
        )  # the choice, and a diffmoe pool's threshold where it is observed
        assert block["topk"] == selective["topk"] == parts["topk"] == plain["topk"], (
            "routing was decided twice"
        )
        # One read for the sizes of what is sent; a second one of a loop over experts with unequal
        # counts.
        span = settings(world, ep, samples, pool, family)[1].pool_ranks
        ragged, loop = family == "tc" or span > 1, family == "tc" or span > ep
        assert plain["read_by_host"] == (ragged and not (family == "tc" and ep == 1)) + loop
        assert all(
            each["read_by_host"] == plain["read_by_host"] for each in (block, selective, parts)
        ), "the host reads in backward"
        assert not any(
            each[name]
            for each in counts.values()
            for name in ("nonzero", "_local_scalar_dense", "item")
        )
        for name in ("all_to_all_single", "all_gather_into_tensor", "all_reduce"):
            assert selective[name] == parts[name] == plain[name], (
                f"selective recompute communicates again: {name}"
            )
        if ep > 1:
            assert (
                plain["all_to_all_single"] >= 4
                and block["all_to_all_single"] > plain["all_to_all_single"]
            )


# --------------------------------------------------------------------------------------- two levels


def over_two_levels(ep, per_host, samples, pool, family):
    """Names that differ in any bit from what the direct exchange gives, and the counts of both, by
    (mode, poison).
    """
    counts, differing = {}, {}
    for mode, poison in [("none", True), ("block", False), ("selective", True), ("parts", True)]:
        poison = poison and family != "race"  # whose scores, shared over the pool, are gates too
        directly, plain = watched(ep, samples, pool, family, mode, False)
        two, found = watched(ep, samples, pool, family, mode, poison, per_host)
        differing[mode], counts[mode] = same_bits(plain, found), (directly, two)
    return differing, counts


# Equal counts; counts that owners decide, those of one EP group and of several; token choice, whose
# counts are exchanged; pairs that all ranks decide.
KINDS = [
    (2, "rank", "diffmoe"),
    (2, "group", "diffmoe"),
    (2, "global", "diffmoe"),
    (3, "2", "diffmoe"),
    (2, "global", "tc"),
    (2, "rank", "race"),
    (2, "global", "race"),
]


@pytest.mark.full
@pytest.mark.parametrize("samples,pool,family", KINDS)
@pytest.mark.parametrize(
    "world,ep,per_host", [(4, 4, 2), pytest.param(8, 4, 2, marks=pytest.mark.slow)]
)
def test_two_levels_change_no_bit(ranks, world, ep, per_host, samples, pool, family):
    if world not in ranks:
        ranks[world] = ranks["more"].enter_context(Ranks(world, timeout=120))
    for differing, counts in ranks[world].run(over_two_levels, ep, per_host, samples, pool, family):
        assert not any(differing.values()), differing
        for mode, (directly, two) in counts.items():
            # As many reads of the host; every exchange in two parts, and not once more.
            assert two["read_by_host"] == directly["read_by_host"], mode
            assert two["all_to_all_single"] == 2 * directly["all_to_all_single"] > 0, mode
            assert two["topk"] == directly["topk"], mode
            for name in ("nonzero", "_local_scalar_dense", "item"):
                assert two[name] == 0, (mode, name)


def ragged_rows(per_host, seed, kind):
    """(what arrives at experts, what comes back, the gradient), directly and over two levels."""
    rank, experts, both = dist.get_rank(), 8, []
    generator = torch.Generator().manual_seed(100 * seed + rank)
    mask = torch.rand(12, experts, generator=generator) < 0.4
    if kind == "idle ranks":  # one sends nothing, one receives nothing
        mask &= torch.tensor(rank != 1)
        mask[:, 4:6] = False
    elif kind == "one host":
        mask[:, 4:] = False
    elif kind == "nothing":
        mask[:] = False
    for size in (0, per_host):
        x = torch.randn(12, 5, generator=torch.Generator().manual_seed(rank)).requires_grad_()
        rows, home = there_and_back(x, Routing(mask), groups_of(4, 1, None, size).ep)
        weight = torch.randn(home.shape, generator=torch.Generator().manual_seed(seed))
        (home * weight).sum().backward()
        both.append((rows.detach(), home.detach(), x.grad))
    return both


@pytest.mark.parametrize("kind", ["some", "idle ranks", "one host", "nothing"])
@pytest.mark.parametrize("seed", [0, 1])
def test_ragged_rows_over_two_levels_arrive_in_the_same_order(ranks, seed, kind):
    sizes = []
    for directly, two in ranks[4].run(ragged_rows, 2, seed, kind):
        assert all(torch.equal(a, b) for a, b in zip(directly, two, strict=True))
        sizes.append(len(two[0]))
    assert (max(sizes) == 0) == (kind == "nothing")
    assert (min(sizes) == 0) == (kind != "some")


# ------------------------------------------------------------------------------------ nobody's
# tokens, ties


def nobody(ep, kind, gamma, empty_ranks):
    """Inference with tokens that no expert takes: on all ranks, or on ``empty_ranks``, whose tokens
    are zero.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    config, layout = settings(world, ep, 2, "global")
    layer = make_layer(config, layout.pool, groups_of(ep, layout.pool_ranks))
    torch.nn.init.zeros_(layer.capacity_predictor[0].bias)
    layer.capacity_predictor[2].bias.data.fill_(-1.0)
    x = make_samples(2 * world).chunk(world)[rank]
    x = torch.zeros_like(x) if rank in empty_ranks else x
    y, x_grad, stats = run(layer, x, RoutingRule(kind, gamma=gamma))
    return y, x_grad, stats.mask_TE, gradients(layer)


@pytest.mark.parametrize("kind", ["batch", "token"])
@pytest.mark.parametrize("world,ep", GRIDS)
def test_experts_without_tokens_give_zeros(ranks, world, ep, kind):
    for y, x_grad, mask, grads in ranks[world].run(nobody, ep, kind, 1.0, ()):
        assert not mask.any()
        assert torch.count_nonzero(y) == torch.count_nonzero(x_grad) == 0
        assert all(torch.count_nonzero(g) == 0 for g in grads.values())


@pytest.mark.parametrize("kind", ["batch", "token"])
@pytest.mark.parametrize("world,ep", GRIDS)
def test_a_rank_without_tokens_waits_for_nobody(ranks, world, ep, kind):
    for rank, (y, x_grad, mask, grads) in enumerate(ranks[world].run(nobody, ep, kind, 0.5, (1,))):
        assert mask.any() == (rank != 1)
        assert (torch.count_nonzero(y) > 0) == (rank != 1)
        assert torch.isfinite(x_grad).all() and all(torch.isfinite(g).all() for g in grads.values())


def tied(ep, samples, pool, family):
    """The mask when all scores are equal, and what a person would choose."""
    world, rank = dist.get_world_size(), dist.get_rank()
    config, layout = settings(world, ep, samples, pool, family)
    layer = make_layer(config, layout.pool, groups_of(ep, layout.pool_ranks))
    layer.router.data.zero_()
    _, _, stats = run(layer, make_samples(samples * world).chunk(world)[rank], TRAIN)
    pool_tokens = layout.pool * TOKENS
    number = torch.arange(samples * TOKENS) + rank * samples * TOKENS
    first = (number % pool_tokens) < rows_taken(pool_tokens, EXPERTS, TRAIN.capacity)
    return stats.mask_TE, first


@pytest.mark.parametrize("samples,pool", POOLS)
@pytest.mark.parametrize("world,ep", GRIDS)
def test_ties_go_to_the_lowest_token_on_every_layout(ranks, world, ep, samples, pool):
    for mask, first in ranks[world].run(tied, ep, samples, pool, "diffmoe"):
        assert torch.equal(mask, first.unsqueeze(1).expand_as(mask))


def test_ties_go_to_the_lowest_expert(ranks):
    for mask, _ in ranks[2].run(tied, 2, 2, "rank", "tc"):
        assert mask[:, :2].all() and not mask[:, 2:].any()


# ------------------------------------------------------------------------------------------------
# dispatch


def there_and_back(x, routing, ep):
    """(rows at their experts, what comes back with unit gates)."""
    plan, local = make_plan(routing, ep), routing.mask_TE.shape[1] // ep.size
    rows = by_expert(arrived(dispatch(x, plan, ep)), plan, ep.size, local)
    home = arrived(send_home(by_source(rows, plan, ep.size, local), plan, ep))
    return rows, combine(home, torch.ones(routing.mask_TE.shape, dtype=x.dtype), plan, None)


def send_and_return(ep, masks):
    """Tokens 10 * rank + t of width 1 to one expert per rank and back: (arrived, returned)."""
    rank, groups = dist.get_rank(), groups_of(ep, 1)
    x = 10 * rank + torch.arange(3, dtype=torch.float64).unsqueeze(1)
    rows, y = there_and_back(x, Routing(torch.tensor(masks[rank], dtype=torch.bool)), groups.ep)
    return rows.flatten().tolist(), y.flatten().tolist()


def test_rows_arrive_by_expert_then_rank_then_token(ranks):
    masks = [
        [
            [1, 0],
            [1, 1],
            [0, 0],
        ],  # rank 0: its token 0 to expert 0, token 1 to both, token 2 to nobody
        [[0, 1], [0, 1], [1, 0]],
    ]
    (arrived0, returned0), (arrived1, returned1) = ranks[2].run(send_and_return, 2, masks)
    assert arrived0 == [0, 1, 12] and arrived1 == [1, 10, 11]
    assert returned0 == [0, 2, 0] and returned1 == [10, 11, 12]


def test_an_expert_that_nobody_sends_to(ranks):
    masks = [[[0, 1], [0, 1], [0, 1]], [[0, 0], [0, 0], [0, 0]]]
    (arrived0, returned0), (arrived1, returned1) = ranks[2].run(send_and_return, 2, masks)
    assert (arrived0, arrived1) == ([], [0, 1, 2])
    assert (returned0, returned1) == ([0, 1, 2], [0, 0, 0])


def integers_and_back(ep):
    """Both forms of routing: (returned, expected)."""
    rank, groups = dist.get_rank(), groups_of(ep, 1)
    generator = torch.Generator().manual_seed(rank)
    x = torch.randint(-99, 99, (24, 3), generator=generator).double()
    mask = torch.rand(24, EXPERTS, generator=generator) < 0.2 * (rank + 1)
    chosen = torch.stack(
        [torch.randperm(24, generator=generator)[:7].sort().values for _ in range(EXPERTS)]
    )
    return [
        (there_and_back(x, routing, groups.ep)[1], x * routing.mask_TE.sum(1, keepdim=True))
        for routing in (Routing(mask), equal_routing(chosen, 24))
    ]


@pytest.mark.full
@pytest.mark.parametrize("world,ep", GRIDS)
def test_dispatch_then_combine_counts_the_experts_of_each_token(ranks, world, ep):
    for pairs in ranks[world].run(integers_and_back, ep):
        for returned, expected in pairs:
            assert torch.equal(returned, expected)
