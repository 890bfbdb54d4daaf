"""The written-out routers themselves: against the published layers that diffusers ships, and on
numbers small enough to check by hand.
"""

import math

import pytest
import torch
from diffusers.models.transformers.transformer_hidream_image import MOEFeedForwardSwiGLU
from diffusers.models.transformers.transformer_nucleusmoe_image import NucleusMoELayer

from reference_routers import (
    Mlp,
    expert_choice,
    expert_threshold,
    moved_bias,
    prototype,
    race,
    similarity,
    time_and_token,
    token_choice,
)

B, N, D, E, F = 3, 10, 8, 4, 6


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)


def swiglu(up, gate, down):
    """From weights as ``nn.Linear`` has them."""
    return Mlp(up.T, down.T, gate=gate.T)


def drawn(layer, draw):
    layer = layer.double()
    for p in layer.parameters():
        p.data.copy_(0.4 * draw(*p.shape))
    return layer


def units(count):
    """``count`` experts that return their number + 1 for any token of width 1."""
    one = torch.ones(1, dtype=torch.float64)
    return [
        Mlp(torch.zeros(1, 1).double(), one.view(1, 1) * 0, one, (i + 1) * one)
        for i in range(count)
    ]


def test_nucleus_expert_choice_is_the_published_layer(draw):
    layer = drawn(NucleusMoELayer(D, F, E, 1.0, use_sigmoid=False, route_scale=2.5), draw)
    x, unmodulated, time = draw(B, N, D), draw(B, N, D), draw(B, D)
    experts = []
    for both, down in zip(layer.experts.gate_up_proj, layer.experts.down_proj):
        gate, up = both.T.chunk(2)
        experts.append(swiglu(up, gate, down.T))
    up, gate = layer.shared_expert.net[0].proj.weight.chunk(2)
    found = expert_choice(
        x,
        layer.gate.weight,
        experts,
        taken=math.ceil(1.0 * N / E),
        seen=time_and_token(time, unmodulated),
        normalised=True,
        scale=2.5,
        shared=swiglu(up, gate, layer.shared_expert.net[2].weight),
    )
    wanted = layer(x, unmodulated, time)  # its scores are fp32
    torch.testing.assert_close(found.output, wanted, rtol=1e-5, atol=1e-5)
    assert not found.mask.any(dim=1).all()  # some tokens are the shared expert's alone


def test_token_choice_with_raw_softmax_gates_is_the_published_layer(draw):
    layer = drawn(MOEFeedForwardSwiGLU(D, 16, E, 2), draw).train()
    x = draw(B, N, D)

    def part(mlp):
        return swiglu(mlp.w3.weight, mlp.w1.weight, mlp.w2.weight)

    found = token_choice(
        x,
        layer.gate.weight,
        [part(mlp) for mlp in layer.experts],
        k=2,
        shared=part(layer.shared_experts),
        samples_balanced=B,
    )
    torch.testing.assert_close(found.output, layer(x), rtol=0, atol=1e-12)
    loss = layer.gate(x)[2] / layer.gate.alpha
    assert found.losses["balance"].item() == pytest.approx(loss.item(), rel=1e-6)
    layer.gate.seq_aux = True  # a mean over samples
    loss = layer.gate(x)[2] / layer.gate.alpha
    one = token_choice(x, layer.gate.weight, [part(m) for m in layer.experts], k=2)
    assert one.losses["balance"].item() == pytest.approx(loss.item(), rel=1e-6)


def test_bias_chooses_and_groups_limit_but_gates_are_scores():
    # One token of value 1: sigmoid(router) are its scores.
    scores = torch.tensor([[0.9], [0.1], [0.6], [0.5]], dtype=torch.float64)
    x, router = torch.ones(1, 1, 1, dtype=torch.float64), scores.logit()
    free = token_choice(x, router, units(4), k=2, score="sigmoid")
    assert free.mask.tolist() == [[True, False, True, False]]
    # Groups (0, 1): 1.0 and (2, 3): 1.1, so that expert 0, the best, is out.
    kept = token_choice(
        x,
        router,
        units(4),
        k=2,
        score="sigmoid",
        groups=2,
        groups_kept=1,
        normalised=True,
        scale=2.5,
    )
    assert kept.mask.tolist() == [[False, False, True, True]]
    torch.testing.assert_close(kept.gates[0, 2:], 2.5 * scores[2:, 0] / 1.1)
    assert kept.output.item() == pytest.approx(2.5 * (3 * 0.6 + 4 * 0.5) / 1.1)
    bias = torch.tensor([-1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    moved = token_choice(x, router, units(4), k=2, score="sigmoid", bias=bias)
    assert moved.mask.tolist() == [[False, True, True, False]]
    torch.testing.assert_close(moved.gates[0, 1:3], scores[1:3, 0])


def test_the_bias_moves_by_the_sign_of_the_load():
    moved = moved_bias(torch.zeros(4, dtype=torch.float64), torch.tensor([7, 4, 4, 1]), 0.25)
    assert moved.tolist() == [-0.25, 0.0, 0.0, 0.25]


def test_race_takes_the_best_pairs_whoever_holds_them():
    z = torch.tensor([[5.0, 4.0, 3.0], [1.0, -1.0, 0.0], [-2.0, 2.0, -3.0]], dtype=torch.float64)
    x = torch.ones(3, 1, 1, dtype=torch.float64)
    found = race(x, z, units(3), k=1, pool=3)  # 3 pairs: all of token 0
    assert found.mask.tolist() == [[True] * 3, [False] * 3, [False] * 3]
    assert found.observed.item() == 3.0
    assert found.output.flatten().tolist() == [5 * 1 + 4 * 2 + 3 * 3, 0, 0]
    each = race(x, z, units(3), k=1, pool=1)
    assert each.mask.tolist() == [[True, False, False], [True, False, False], [False, True, False]]
    # No token has two experts: off the diagonal nothing counts.
    P = z.softmax(dim=1)
    wanted = (2 * P[:, 0] @ P[:, 0] + P[:, 1] @ P[:, 1]) / 3 * 3 / 3
    assert similarity(z, each.mask.double()).item() == pytest.approx(wanted.item())
    wanted = (3 * P[0, 0] ** 2 + 3 * P[1, 0] ** 2 + 3 * P[2, 1] ** 2) / 3  # pools of one token
    assert each.losses["similarity"].item() == pytest.approx(wanted.item())


def test_similarity_is_1_for_equal_probabilities_and_equal_use():
    z = torch.zeros(3, 3, dtype=torch.float64)
    found = race(torch.ones(1, 3, 1, dtype=torch.float64), z, units(3), k=3, pool=1)
    assert found.mask.all() and found.losses["similarity"].item() == pytest.approx(1.0)


def test_threshold_takes_what_lies_above_and_observes_the_kth_largest():
    z = torch.tensor([[1.0, -1.0], [0.5, 3.0], [2.0, 0.0]], dtype=torch.float64)
    found = expert_threshold(
        torch.ones(1, 3, 1, dtype=torch.float64),
        z,
        z.sigmoid(),
        units(2),
        torch.tensor([0.75, 3.0]),
        taken=2,
    )
    assert found.mask.tolist() == [[True, False], [False, False], [True, False]]  # 3 > 3: no
    assert found.observed.tolist() == [1.0, 0.0]
    assert found.output.flatten().tolist() == pytest.approx(
        [1 / (1 + math.exp(-1)), 0.0, 1 / (1 + math.exp(-2))]
    )


def test_prototypes_take_by_cosine_and_null_samples_have_an_expert_of_their_own():
    def two(value):
        zero = torch.zeros(2, 2, dtype=torch.float64)
        return Mlp(zero, zero, zero[0], value * torch.ones(2, dtype=torch.float64))

    prototypes = torch.tensor([[0.5, 0.0], [0.0, 7.0], [-9.0, 0.0]], dtype=torch.float64)
    x = torch.tensor([[[3.0, 4.0], [8.0, 6.0]], [[1.0, 2.0], [9.0, 9.0]]], dtype=torch.float64)
    null = torch.tensor([False, True])
    found = prototype(
        x, null, prototypes, [two(v) for v in (1, 10, 100, 1000)], pool=2, temperature=0.5
    )
    assert found.gates.tolist() == [[0, 0.8, 0, 0], [0.8, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 1]]
    assert found.output[..., 0].tolist() == [[8.0, 0.8], [1000.0, 1000.0]]
    # Expert 2 has no token: prototypes 0 and 1 against the tokens themselves, cosines 0.8 and 0.6.
    wanted = math.log(math.exp(0.8 / 0.5) + math.exp(0.6 / 0.5)) - 0.8 / 0.5
    assert found.losses["contrastive"].item() == pytest.approx(wanted)
    alone = prototype(x[:, :1], null, prototypes, [two(1)] * 4, pool=2)
    assert alone.losses["contrastive"].item() == 0
