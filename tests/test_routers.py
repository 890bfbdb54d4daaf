"""The field's routers: their functions on hand-written scores, and the layer, alone and over ranks,
against tests/reference_routers.py.
"""

import contextlib
import math
import zlib
from dataclasses import dataclass, replace
from functools import lru_cache

import pytest
import torch
import torch.distributed as dist

from diffmoe.config import load_config
from diffmoe.layout import resolve_layout
from diffmoe.models import layers
from diffmoe.moe.balance import LoadBias, balance_loss, contrastive_loss, similarity_loss
from diffmoe.moe.gating import Beside, cosines, time_token_logits
from diffmoe.moe.gating import scored as our_scored
from diffmoe.moe.layer import MoELayer
from diffmoe.moe.pool import sum_by_pool
from diffmoe.moe.routing import (
    RoutingRule,
    choose_experts,
    choose_pairs,
    choose_prototypes,
    choose_tokens,
    gates,
    pool_thresholds,
    predicted_counts,
)
from diffmoe.parallel.collectives import sum_over
from diffmoe.parallel.groups import build_groups, single_process
from diffmoe.parallel.spawn import Ranks
from reference_routers import (
    Mlp,
    expert_choice,
    expert_threshold,
    moved_bias,
    prototype,
    race,
    race_heads,
    scored,
    time_and_token,
    token_choice,
)

TOKENS, WIDTH = 4, 8  # a sample's


def table(*rows):
    return torch.tensor(rows, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------
# functions on hand-written scores


def test_token_choice_sees_bias_and_groups():
    scores = table([0.9, 0.1, 0.6, 0.5])
    assert choose_experts(scores, 2).tolist() == [[True, False, True, False]]
    # Groups (0, 1) and (2, 3) are worth 1.0 and 1.1: the best expert is in the wrong one.
    assert choose_experts(scores, 2, None, 2, 1).tolist() == [[False, False, True, True]]
    assert choose_experts(scores, 1, None, 2, 2).tolist() == [[True, False, False, False]]
    bias = torch.tensor([-1.0, 1.0, 0.0, 0.0])
    assert choose_experts(scores, 2, bias).tolist() == [[False, True, True, False]]
    # A bias that makes all scores of the kept group negative opens no other group.
    bias = torch.tensor([-3.0, -3.0, -2.0, -2.0])
    assert choose_experts(scores, 2, bias, 2, 1).tolist() == [[False, False, True, True]]
    # Groups of one expert are worth that expert's score.
    assert choose_experts(scores, 1, None, 4, 2).tolist() == [[True, False, False, False]]


def test_ties_go_to_the_lower_group_expert_token_and_pair():
    same = torch.zeros(3, 4, dtype=torch.float64)
    assert choose_experts(same, 2, None, 2, 1).tolist() == [[True, True, False, False]] * 3
    assert choose_pairs(same, 3, 5)[0].tolist() == [[True] * 4, [True] + [False] * 3, [False] * 4]
    assert choose_tokens(same, 3, 2).tolist() == [[0, 1]] * 4
    null = torch.tensor([False, True, False])
    own, last = [True, False, False, False], [False, False, False, True]
    assert choose_prototypes(same, null, 1).tolist() == [own, last, own]


def test_negative_scores_are_ranked():
    scores = table([-3.0, 2.0, -0.5], [-1.0, -2.0, -0.25], [-2.0, 1e-30, -1e-30])
    assert choose_tokens(scores, 3, 2).tolist() == [[1, 2], [0, 2], [1, 2]]
    assert choose_experts(scores, 1).int().argmax(1).tolist() == [1, 2, 1]
    passing = torch.tensor([[True, False, False], [True, False, True], [False, False, False]])
    assert predicted_counts(scores, passing).T.tolist() == [
        [False, True, True],  # two pass: the two highest
        [False, False, False],
        [False, False, True],
    ]


def test_race_takes_the_best_pairs_of_each_pool():
    scores = table([5.0, 4.0, 3.0], [1.0, -1.0, 0.0], [-2.0, 2.0, -3.0], [-9.0, -7.0, -8.0])
    mask, lowest = choose_pairs(scores, 4, 4)
    assert mask.tolist() == [[True] * 3, [False] * 3, [False, True, False], [False] * 3]
    assert lowest.tolist() == [2.0]
    mask, lowest = choose_pairs(scores, 2, 2)
    two = [True, True, False]
    assert mask.tolist() == [two, [False] * 3, two, [False] * 3]
    assert lowest.tolist() == [4.0, -2.0]


def test_prototypes_keep_the_null_class_apart():
    scores = table([0.2, 0.9, 5.0], [0.8, 0.1, 0.0], [-0.5, -0.6, 1.0])
    null = torch.tensor([False, True, False])
    one = choose_prototypes(scores, null, 1)
    assert one.tolist() == [[False, True, False], [False, False, True], [True, False, False]]
    assert choose_prototypes(scores, null, 2).tolist() == [
        [True, True, False],
        [False, False, True],  # one expert, however many the others have
        [True, True, False],
    ]


def test_gates_share_what_the_tokens_experts_scored():
    scores = table([0.5, 0.25, 0.25], [0.1, 0.2, 0.3])
    mask = torch.tensor([[True, True, False], [False, False, False]])
    assert torch.equal(gates(scores, mask, False, 1.0), scores)
    assert torch.equal(gates(scores, mask, False, 2.0), 2 * scores)
    found = gates(scores, mask, True, 2.5)
    torch.testing.assert_close(found[0, :2], 2.5 * scores[0, :2] / 0.75)
    assert found.isfinite().all()  # of the token that meets no expert as well


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "identity"])
def test_gate_functions(score):
    logits = table([-1.0, 0.0, 3.0])
    torch.testing.assert_close(our_scored(logits, score), scored(logits, score))


def test_time_stands_before_the_token():
    time, plain = table([1.0, 10.0]), table([2.0, 3.0], [4.0, 5.0]).unsqueeze(0)
    router = table([1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.5])
    assert time_token_logits(time, plain, router).tolist() == [[11.0, 3.5], [11.0, 6.5]]


def test_cosines_do_not_see_lengths():
    prototypes = table([0.5, 0.0], [0.0, 7.0], [-9.0, 0.0])
    assert cosines(table([3.0, 4.0], [0.3, -0.4]), prototypes).tolist() == [
        pytest.approx([0.6, 0.8, -0.6]),
        pytest.approx([0.6, -0.8, -0.6]),
    ]
    zero = table([0.0, 0.0]).requires_grad_()
    cosines(zero, prototypes).sum().backward()
    assert zero.grad.isfinite().all()


def test_thresholds_are_the_kth_largest_of_each_pool():
    values = table([1.0, -5.0], [3.0, -6.0], [2.0, -7.0], [0.0, 4.0])
    assert pool_thresholds(values, 4, 2).tolist() == [[2.0, -5.0]]
    assert pool_thresholds(values, 2, 1).tolist() == [[3.0, -5.0], [2.0, 4.0]]


def test_the_load_bias_moves_by_a_sign():
    bias = LoadBias(4, 0.25)
    bias.commit(torch.tensor([7, 4, 4, 1]))
    assert bias.value.tolist() == [-0.25, 0.0, 0.0, 0.25]
    bias.commit(torch.tensor([2**24 + 1, 2**24, 2**24, 2**24 - 1]))  # more than fp32 can count
    assert bias.value.tolist() == [-0.5, 0.0, 0.0, 0.5]
    bias.commit(torch.zeros(4, dtype=torch.int64))
    assert bias.value.tolist() == [-0.5, 0.0, 0.0, 0.5]


def test_losses_at_balance_are_1():
    sums, counts = torch.full((1, 4), 2.0), torch.full((1, 4), 4)
    assert balance_loss(sums, counts, 8, 2).item() == pytest.approx(1.0)
    P, M = torch.full((8, 3), 1 / 3), torch.ones(8, 3)
    assert similarity_loss((P.T @ P)[None], (M.T @ M)[None], 8).item() == pytest.approx(1.0)


def test_balance_loss_by_hand():
    scores, counts = table([3.0, 1.0], [1.0, 3.0]), table([4.0, 0.0], [4.0, 0.0])
    # Pools of 4 tokens, top 1: f = (2, 0); P = (3/4, 1/4) and (1/4, 3/4).
    assert balance_loss(scores, counts, 4, 1).item() == pytest.approx((2 * 0.75 + 2 * 0.25) / 2)


def test_similarity_loss_by_hand():
    P, M = table([0.75, 0.25], [0.5, 0.5]), table([1.0, 1.0], [1.0, 0.0])
    # M^T M = [[2, 1], [1, 1]]: diagonal weights 4/3 and 2/3, the other two 1 each.
    PP = [[0.75**2 + 0.5**2, 0.75 * 0.25 + 0.25], [0, 0.25**2 + 0.5**2]]
    wanted = (4 / 3 * PP[0][0] + 2 / 3 * PP[1][1] + 2 * PP[0][1]) / 2
    found = similarity_loss((P.T @ P)[None], (M.T @ M)[None], 2)
    assert found.item() == pytest.approx(wanted)
    nobody = similarity_loss((P.T @ P)[None], torch.zeros(1, 2, 2), 2)
    assert nobody.item() == 0
    alone = M * table([1.0, 0.0])  # no token has two experts: the diagonal is left
    found = similarity_loss((P.T @ P)[None], (alone.T @ alone)[None], 2)
    assert found.item() == pytest.approx(2 * PP[0][0] / 2)


def test_contrastive_loss_by_hand_leaves_absent_experts_out():
    prototypes = table([0.5, 0.0], [0.0, 7.0], [-9.0, 0.0]).requires_grad_()
    sums = table([16.0, 12.0], [3.0, 4.0], [0.0, 0.0]).requires_grad_()
    counts = table([2.0, 1.0, 0.0])
    found = contrastive_loss(sums[None], counts, prototypes, 0.5)
    # Own cosines 0.8 and 0.8, the other's 0.6 and 0.6.
    wanted = math.log(math.exp(0.8 / 0.5) + math.exp(0.6 / 0.5)) - 0.8 / 0.5
    assert found.item() == pytest.approx(wanted)
    found.backward()
    assert torch.count_nonzero(prototypes.grad[2]) == torch.count_nonzero(sums.grad[2]) == 0
    assert torch.count_nonzero(prototypes.grad[:2]) and prototypes.grad.isfinite().all()
    for present in ([2.0, 0.0, 0.0], [0.0, 0.0, 0.0]):  # of fewer than two nothing is learned
        prototypes.grad = sums.grad = None
        known = table(present)
        loss = contrastive_loss((sums * known.T)[None], known, prototypes, 0.5)
        loss.backward()
        assert loss.item() == 0
        assert torch.count_nonzero(prototypes.grad) == torch.count_nonzero(sums.grad) == 0


def test_sums_by_pool_alone():
    runs = torch.arange(6.0).view(3, 2)
    alone = single_process().pool
    assert sum_by_pool(runs, 2, 2, 6, alone).tolist() == runs.tolist()
    assert sum_by_pool(runs, 2, 6, 6, alone).tolist() == [[6.0, 9.0]]


# ------------------------------------------------------------------------------------------------
# the layer and the reference


@dataclass(frozen=True)
class Router:
    """A published router as settings, and the rule it is asked by."""

    options: str
    kind: str = "train"
    threshold: float | None = None
    pool: str = "global"

    @property
    def family(self):
        return self.options.split()[0]


DEEPSEEK = (
    "tc moe.score=sigmoid moe.gates=normalized moe.gate_scale=2.5 moe.experts=8 moe.top_k=2 "
    "moe.expert_groups=4 moe.top_groups=2 moe.shared_experts=1 moe.mlp_ratio=1"
)
PROTOTYPES = "prototype moe.contrast_temperature=0.07"
RACE = "race moe.score=identity"
ROUTERS = {
    "DiT-MoE": Router("tc moe.top_k=2 moe.shared_experts=1"),
    "HunyuanImage": Router("tc moe.top_k=2 moe.gates=normalized"),
    "DSMoE": Router(f"{DEEPSEEK} moe.activation=swiglu"),
    "DeepSeek-V3": Router(f"{DEEPSEEK} moe.balance=bias"),
    "expert choice": Router("ec", pool="1"),
    "Nucleus": Router(
        "ec moe.router_input=time_token moe.gates=normalized moe.gate_scale=2.5 "
        "moe.activation=swiglu moe.shared_experts=1",
        pool="1",
    ),
    "threshold, warming up": Router("diffmoe moe.threshold_from=1 moe.score=sigmoid", pool="2"),
    "Expert Threshold": Router(
        "diffmoe moe.threshold_from=1 moe.score=sigmoid moe.shared_experts=1",
        "threshold",
        0.6,
        "2",
    ),
    "thresholds on softmax": Router("diffmoe moe.threshold_from=1", "threshold", 0.3, "2"),
    "Expert Race": Router(RACE),
    "Expert Race, regularized": Router(f"{RACE} moe.target_weight=0.1 moe.shared_experts=1"),
    "Expert Race by softmax": Router("race moe.capacity=1.5", pool="2"),
    "Expert Race at inference": Router(RACE, "token", 0.4),
    "ProMoE": Router(f"{PROTOTYPES} moe.shared_experts=1 moe.mlp_ratio=1"),
    "ProMoE, top 2": Router(f"{PROTOTYPES} moe.top_k=2", pool="2"),
}


def settings(router, world, ep, samples):
    family, *options = router.options.split()
    config = load_config(
        None,
        [
            f"model.family={family}",
            f"model.width={WIDTH}",
            "model.heads=2",
            "model.input_size=4",
            "model.mlp_ratio=2",
            "moe.experts=4",
            f"moe.pool={router.pool}",
            f"parallel.ep={ep}",
            f"train.batch={samples * world}",
            *options,
        ],
    )
    return config, resolve_layout(config, world)


def whole(name, shape, dtype):
    """A parameter over all experts, the same in every process."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return (0.4 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def whole_router(shape, dtype, unwanted, lift):
    """:func:`whole`, where tokens of positive sum score ``unwanted`` experts low and, with
    ``lift``, the others high.
    """
    value = whole("router", shape, dtype) + lift
    for e in set(unwanted) & set(range(shape[0])):
        value[e] = -1.0
    return value


def make_layer(config, layout, groups, router, dtype, unwanted=(), lift=0.0):
    hidden = config.moe.shared_experts * config.model.width * (config.moe.mlp_ratio or 2)
    shared = layers.Mlp(WIDTH, int(hidden)) if hidden else None
    layer = MoELayer(config.model, config.moe, layout.pool, groups, shared).to(dtype)
    first = layer.experts.first
    for name, p in layer.named_parameters():
        expert = name.startswith("experts.")
        shape = (config.moe.experts, *p.shape[1:]) if expert else p.shape
        value = (
            whole_router(shape, dtype, unwanted, lift)
            if name == "router"
            else whole(name, shape, dtype)
        )
        p.data.copy_(value[first : first + len(p)] if expert else value)
    if router.threshold is not None:
        layer.thresholds.value.fill_(router.threshold)
    elif config.moe.balance == "bias":
        layer.load_bias.value.copy_(torch.linspace(-0.2, 0.2, config.moe.experts))
    return layer


@dataclass
class Inputs:
    """What one layer is given for ``samples`` samples, and the weights by which its outputs are
    summed up to one number that gradients are taken of."""

    x: torch.Tensor
    time: torch.Tensor
    plain: torch.Tensor
    null: torch.Tensor
    weight: torch.Tensor
    target_weight: torch.Tensor

    def part(self, rank, world):
        return Inputs(*(tensor.chunk(world)[rank] for tensor in vars(self).values()))

    def leaves(self):
        for tensor in (self.x, self.time, self.plain):
            tensor.requires_grad_()
        return self

    @property
    def gradients(self):
        named = {"x": self.x, "time": self.time, "plain": self.plain}
        return {
            name: torch.zeros_like(t) if t.grad is None else t.grad for name, t in named.items()
        }


def make_inputs(samples, dtype, null=(1,), shift=0.0):
    """``shift``: added to tokens, a number or one a sample."""
    generator = torch.Generator().manual_seed(7)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    moved = torch.as_tensor(shift, dtype=dtype).expand(samples).view(-1, 1, 1)
    return Inputs(
        x=draw(samples, TOKENS, WIDTH) + moved,
        time=draw(samples, WIDTH),
        plain=draw(samples, TOKENS, WIDTH) + moved,
        null=torch.tensor([sample in null for sample in range(samples)]),
        weight=draw(samples, TOKENS, WIDTH),
        target_weight=draw(samples, TOKENS, 16),
    )


def run_layer(layer, given, kind, share):
    """(numbers, parameters' gradients) after backward of the weighted outputs plus ``share`` of the
    layer's own loss.
    """
    given.leaves()
    rule = RoutingRule(kind, layer.moe.capacity)
    y, stats = layer(given.x, rule, beside=Beside(given.time, given.plain, given.null))
    total = (y * given.weight).sum()
    numbers = {"output": y.detach()}
    if stats.balance_loss is not None:
        total = total + share * stats.balance_loss
        numbers["loss"] = stats.balance_loss.detach()
    if stats.target_TP is not None:
        total = total + (stats.target_TP * given.target_weight.flatten(0, 1)).sum()
        numbers["target"] = stats.target_TP.detach()
    total.backward()
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in layer.named_parameters()
    }
    return numbers | given.gradients, gradients, stats


def run_reference(config, layout, router, given, unwanted=(), lift=0.0):
    """What :func:`run_layer` gives for the whole batch, by tests/reference_routers.py alone."""
    moe, dtype, E, D = config.moe, given.x.dtype, config.moe.experts, WIDTH
    hidden = int(D * (moe.mlp_ratio or 2))
    swiglu, inner = moe.activation == "swiglu", hidden
    if swiglu:
        inner = -(-2 * hidden // 3 // 8) * 8
    patch = given.target_weight.shape[-1]
    shapes = {
        "router": (E - (router.family == "prototype"), D * (1 + ("time_token" in router.options))),
        "experts.fc1_weight": (E, D, inner),
        "experts.fc2_weight": (E, inner, D),
    }
    shapes |= (
        {"experts.gate_weight": (E, D, inner)}
        if swiglu
        else {"experts.fc1_bias": (E, inner), "experts.fc2_bias": (E, D)}
    )
    if moe.shared_experts:
        shapes |= {
            "shared.fc1.weight": (hidden, D),
            "shared.fc1.bias": (hidden,),
            "shared.fc2.weight": (D, hidden),
            "shared.fc2.bias": (D,),
        }
    if moe.target_weight:
        shapes |= {
            "router_hidden.weight": (D, D),
            "router_hidden.bias": (D,),
            "target_head.weight": (patch, D),
            "target_head.bias": (patch,),
        }
    p = {name: whole(name, shape, dtype) for name, shape in shapes.items()}
    p["router"] = whole_router(shapes["router"], dtype, unwanted, lift)
    for value in p.values():
        value.requires_grad_()
    given.leaves()
    names = ("fc1_weight", "fc2_weight", "fc1_bias", "fc2_bias", "gate_weight")
    stacked = [p.get(f"experts.{name}") for name in names]
    experts = [Mlp(*(None if w is None else w[e] for w in stacked)) for e in range(E)]
    shared = None
    if moe.shared_experts:
        shared = Mlp(
            p["shared.fc1.weight"].T,
            p["shared.fc2.weight"].T,
            p["shared.fc1.bias"],
            p["shared.fc2.bias"],
        )
    x, pool, target = given.x, layout.pool, None
    pool_tokens = pool * x.shape[1]
    taken = int(pool_tokens * moe.capacity / E + 1e-9)
    scale = {"normalised": moe.gates == "normalized", "scale": moe.gate_scale}
    logits = None
    if router.family in ("race", "diffmoe"):
        logits = x.flatten(0, 1) @ p["router"].T if not moe.target_weight else None
    if router.family == "tc":
        bias = torch.linspace(-0.2, 0.2, E).to(dtype) if moe.balance == "bias" else None
        found = token_choice(
            x,
            p["router"],
            experts,
            k=moe.top_k,
            score=moe.score,
            bias=bias,
            groups=moe.expert_groups,
            groups_kept=moe.top_groups,
            shared=shared,
            samples_balanced=pool,
            **scale,
        )
        found = found._replace(losses={} if bias is not None else found.losses)
        counts = found.mask.sum(dim=0)
        found = found._replace(observed=counts if bias is not None else None)
    elif router.family == "prototype":
        found = prototype(
            x,
            given.null,
            p["router"],
            experts,
            k=moe.top_k,
            pool=pool,
            temperature=moe.contrast_temperature,
            shared=shared,
        )
    elif router.threshold is not None:
        scores = scored(logits, moe.score)
        levels = torch.full((E,), router.threshold, dtype=torch.float32)
        found = expert_threshold(x, scores, scores, experts, levels, taken=taken, shared=shared)
        # Observed are pools, and in training alone.
        pools = scores.detach().split(pool_tokens)
        kth = [part.sort(dim=0, descending=True).values[taken - 1] for part in pools]
        mean = torch.stack(kth).mean(dim=0) if router.kind == "threshold" else None
        found = found._replace(observed=mean)
    elif router.family == "race":
        if moe.target_weight:
            logits, target = race_heads(
                x,
                p["router_hidden.weight"],
                p["router_hidden.bias"],
                p["router"],
                None,
                p["target_head.weight"],
                p["target_head.bias"],
            )
        found = race(x, logits, experts, k=moe.capacity, pool=pool, score=moe.score, shared=shared)
        found = found._replace(observed=found.observed.expand(E))
    else:
        seen = time_and_token(given.time, given.plain) if "time" in router.options else None
        found = expert_choice(
            x,
            p["router"],
            experts,
            taken=taken,
            pool=pool,
            seen=seen,
            score=moe.score,
            shared=shared,
            **scale,
        )
        found = found if router.family == "diffmoe" else found._replace(observed=None)
    total = (found.output * given.weight).sum() + sum(found.losses.values())
    numbers = {"output": found.output.detach()}
    numbers |= {"loss": loss.detach() for loss in found.losses.values()}
    if target is not None:
        total = total + (target * given.target_weight.flatten(0, 1)).sum()
        numbers["target"] = target.detach()
    total.backward()
    gradients = {n: torch.zeros_like(v) if v.grad is None else v.grad for n, v in p.items()}
    return numbers | given.gradients, gradients, found


def relative(found, wanted):
    return ((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-9)).item()


@pytest.mark.parametrize("dtype,bound", [(torch.float64, 1e-11), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", ROUTERS)
def test_the_layer_is_the_reference(name, dtype, bound):
    router, samples = ROUTERS[name], 4
    config, layout = settings(router, 1, 1, samples)
    layer = make_layer(config, layout, single_process(), router, dtype)
    numbers, gradients, stats = run_layer(layer, make_inputs(samples, dtype), router.kind, 1.0)
    wanted, wanted_gradients, reference = run_reference(
        config, layout, router, make_inputs(samples, dtype)
    )
    assert torch.equal(stats.mask_TE, reference.mask)
    tokens_BE = reference.mask.view(samples, TOKENS, -1).sum(dim=1)
    assert torch.equal(stats.tokens_BE, tokens_BE)
    assert numbers.keys() == wanted.keys() and gradients.keys() == wanted_gradients.keys()
    found = {key: relative(numbers[key], wanted[key]) for key in wanted}
    found |= {key: relative(gradients[key], wanted_gradients[key]) for key in gradients}
    assert (stats.observed_E is None) == (reference.observed is None)
    if stats.observed_E is not None:
        pools = 1 if router.family == "tc" else samples // layout.pool
        found["observed"] = relative(stats.observed_E / pools, reference.observed)
    assert max(found.values()) <= bound, found
    assert torch.count_nonzero(gradients["router"])


@pytest.mark.parametrize("name", ["Nucleus", "Expert Threshold", "Expert Race", "expert choice"])
def test_a_token_that_nobody_takes_gets_what_the_shared_expert_says(name):
    router, samples = ROUTERS[name], 4
    config, layout = settings(router, 1, 1, samples)
    layer = make_layer(config, layout, single_process(), router, torch.float64)
    given = make_inputs(samples, torch.float64)
    numbers, _, stats = run_layer(layer, given, router.kind, 1.0)
    nobody, y = ~stats.mask_TE.any(dim=1), numbers["output"].flatten(0, 1)
    assert 0 < nobody.sum() < len(nobody)
    wanted = torch.zeros_like(y) if layer.shared is None else layer.shared(given.x.flatten(0, 1))
    assert torch.equal(y[nobody], wanted[nobody])
    assert given.x.grad.isfinite().all()


def test_running_states_take_a_step_once():
    router, samples = ROUTERS["DeepSeek-V3"], 4
    config, layout = settings(router, 1, 1, samples)
    layer = make_layer(config, layout, single_process(), router, torch.float64)
    before = layer.load_bias.value.clone()
    *_, stats = run_layer(layer, make_inputs(samples, torch.float64), router.kind, 1.0)
    assert torch.equal(layer.load_bias.value, before)  # forward only reads it
    layer.commit(stats.observed_E, 1)
    wanted = moved_bias(before, stats.mask_TE.sum(dim=0), config.moe.bias_rate)
    torch.testing.assert_close(layer.load_bias.value, wanted)
    assert not torch.equal(layer.load_bias.value, before)

    router = ROUTERS["Expert Race"]
    config, layout = settings(router, 1, 1, samples)
    layer = make_layer(config, layout, single_process(), router, torch.float64)
    first, then = torch.full((4,), 6.0), torch.full((4,), -2.0)
    layer.commit(first, 2)  # sums over two pools
    assert layer.thresholds.value.tolist() == [3.0] * 4  # the first observation starts the mean
    layer.commit(then, 2)
    decay = config.moe.threshold_decay
    assert layer.thresholds.value.tolist() == pytest.approx([3 * decay - (1 - decay)] * 4)


# ------------------------------------------------------------------------------------------------
# over ranks

GRIDS = [
    pytest.param(world, ep, marks=() if ep == 2 else pytest.mark.full)
    for world, ep in [(2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]
]
groups_of = lru_cache(build_groups)


@pytest.fixture(scope="module")
def ranks():
    with contextlib.ExitStack() as stack:
        yield {world: stack.enter_context(Ranks(world, timeout=60)) for world in (2, 4)}


def differences(ep, name, samples, pool, starved):
    """(largest relative differences from the reference of the whole batch, this rank's mask, rows
    that reached this rank).

    ``starved``: ``experts`` of the last rank (with EP 1 the last half) get nobody's token,
    ``tokens`` of rank 1 no expert, ``null`` all samples of rank 1 are of the null class, ``all
    null`` everybody's are.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    router = ROUTERS[name] if pool is None else replace(ROUTERS[name], pool=pool)
    config, layout = settings(router, world, ep, samples)
    groups, experts = groups_of(ep, layout.pool_ranks), config.moe.experts
    unwanted, lift, shift = (), 0.0, 0.0
    null = {"null": range(samples, 2 * samples), "all null": range(samples * world)}.get(starved)
    if starved == "experts":
        unwanted, lift, shift = range(experts - experts // max(ep, 2), experts), 0.2, 2.0
        null = ()
    elif starved == "tokens":
        lift = 0.5
        shift = [-3.0 if i // samples == 1 else 0.0 for i in range(samples * world)]

    def given():
        return make_inputs(samples * world, torch.float64, (1,) if null is None else null, shift)

    numbers, gradients, stats = run_layer(
        make_layer(config, layout, groups, router, torch.float64, unwanted, lift),
        given().part(rank, world),
        router.kind,
        1 / world,
    )
    wanted, wanted_gradients, reference = run_reference(
        config, layout, router, given(), unwanted, lift
    )
    assert numbers.keys() == wanted.keys() and gradients.keys() == wanted_gradients.keys()
    found = {}
    for key, value in numbers.items():
        if key == "loss":
            found[key] = relative(sum_over(value, groups.world) / world, wanted[key])
        else:
            found[key] = relative(value, wanted[key].chunk(world)[rank])
    local = experts // ep
    for key, value in gradients.items():
        whole_value, over = wanted_gradients[key], groups.world
        if key.startswith("experts."):
            first = groups.ep.index * local
            whole_value, over = whole_value[first : first + local], groups.edp
        found[key] = relative(sum_over(value, over), whole_value)
    if stats.observed_E is not None:
        total = sum_over(stats.observed_E, groups.world)
        pools = 1 if router.family == "tc" else samples * world // layout.pool
        found["observed"] = relative(total / pools, reference.observed)
    mask = reference.mask.chunk(world)[rank]
    assert torch.equal(stats.mask_TE, mask)
    here = reference.mask.chunk(world // ep)[rank // ep]  # this EP group's tokens
    rows = here[:, groups.ep.index * local :][:, :local].sum().item()
    return found, mask, rows


def assert_right(results):
    for rank, (found, _, _) in enumerate(results):
        assert max(found.values()) < 1e-11, f"rank {rank}: {found}"
        assert {"output", "x", "router", "experts.fc1_weight"} <= found.keys()


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("world,ep", GRIDS)
def test_ranks_together_are_the_reference(ranks, world, ep, name):
    assert_right(ranks[world].run(differences, ep, name, 2, None, None))


@pytest.mark.parametrize("name", ["DiT-MoE", "Expert Race, regularized", "ProMoE"])
@pytest.mark.parametrize("world,ep", GRIDS)
def test_pools_that_begin_on_one_rank_and_end_on_another(ranks, world, ep, name):
    assert_right(ranks[world].run(differences, ep, name, 3, "2", None))


@pytest.mark.parametrize(
    "name", ["DiT-MoE", "DeepSeek-V3", "Expert Threshold", "Expert Race", "ProMoE"]
)
@pytest.mark.parametrize("world,ep", GRIDS)
def test_experts_that_nobody_wants(ranks, world, ep, name):
    results = ranks[world].run(differences, ep, name, 2, None, "experts")
    assert_right(results)
    rows = [rows for *_, rows in results]
    assert sum(rows) > 0 and (ep == 1 or sum(rows[ep - 1 :: ep]) == 0)


@pytest.mark.parametrize("name", ["Expert Threshold", "Expert Race", "Expert Race at inference"])
@pytest.mark.parametrize("world,ep", GRIDS)
def test_tokens_of_a_rank_that_nobody_takes(ranks, world, ep, name):
    results = ranks[world].run(differences, ep, name, 2, None, "tokens")
    assert_right(results)
    assert [bool(mask.any()) for _, mask, _ in results] == [rank != 1 for rank in range(world)]


@pytest.mark.parametrize("starved", ["null", "all null"])
@pytest.mark.parametrize("world,ep", GRIDS)
def test_ranks_with_the_null_class_alone(ranks, world, ep, starved):
    results = ranks[world].run(differences, ep, "ProMoE", 2, None, starved)
    assert_right(results)
    for rank, (found, mask, _) in enumerate(results):
        assert mask[:, -1].all() == (starved == "all null" or rank == 1)
        assert all(math.isfinite(value) for value in found.values())


def test_zeros_of_either_sign_tie():
    assert choose_experts(torch.tensor([[-0.0, 0.0], [0.0, -0.0]]), 1).tolist() == [
        [True, False],
        [True, False],
    ]
