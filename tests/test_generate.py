"""Sampling with experts spread over ranks: dopri5's ranks stay in step though their samples take
different numbers of steps, and every rank decodes its own share.
"""

from dataclasses import replace

import pytest
import torch

from diffmoe.config import load_config
from diffmoe.evaluation import generate as generating
from diffmoe.evaluation.generate import generate, generate_everywhere
from diffmoe.parallel.groups import build_groups, single_process
from diffmoe.parallel.spawn import Ranks
from diffmoe.parity.plain import build_model

CPU = torch.device("cpu")
COUNT, POOL = 8, 2
CONFIG = load_config(
    None,
    [
        "model.input_size=8",
        "model.channels=1",
        "model.width=32",
        "model.depth=2",
        "model.heads=2",
        "model.classes=10",
        "model.learn_sigma=false",
        "moe.experts=4",
        "moe.interleave=false",
        f"moe.pool={POOL}",
        "run.seed=2",
        "sample.sampler=dopri5",
        "sample.steps=200",
        "sample.tolerance=1e-4",
        "sample.batch=4",
        "sample.cfg=1",
        "sample.gamma=0.5",
        "sample.routing=token",
    ],
)


def counted(model):
    """The model, and a list that grows with each of its passes."""
    passes = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    return model.eval(), passes


def alone(numbers):
    """(images with these numbers, passes) from one process with all experts."""
    model, passes = counted(build_model(CONFIG, POOL, single_process()))
    return generate(model, CONFIG, [n % 10 for n in numbers], numbers, CPU), len(passes)


def sample_over_ranks(ep):
    """(all images, this rank's passes) with the experts spread over ``ep`` ranks."""
    config = replace(CONFIG, parallel=replace(CONFIG.parallel, ep=ep))
    groups = build_groups(ep, 1)
    model, passes = counted(build_model(config, POOL, groups))
    return generate_everywhere(
        model, config, [n % 10 for n in range(COUNT)], groups.world, CPU
    ), len(passes)


def decode_over_ranks():
    """(images, the sizes of what this rank decoded); the sampler is not the matter here."""
    world, seen = build_groups(1, 1).world, []

    def generate_numbers(model, config, labels, numbers, *_):
        return torch.tensor([float(n) for n in numbers]).view(-1, 1, 1, 1)

    def decode(latents):
        seen.append(latents.flatten().tolist())
        return latents.expand(-1, 3, 2, 2) + 0.5

    before, generating.generate = generating.generate, generate_numbers
    try:
        return generate_everywhere(None, CONFIG, list(range(10)), world, CPU, decode=decode), seen
    finally:
        generating.generate = before


@pytest.fixture(scope="module")
def all_alone():
    return alone(range(COUNT))[0]


@pytest.mark.full
@pytest.mark.parametrize(("world", "eps"), [(2, (2,)), (4, (2, 4))])
def test_dopri5_over_ranks_that_share_experts(all_alone, world, eps):
    each = COUNT // world
    passes = [alone(range(r * each, (r + 1) * each))[1] for r in range(world)]
    assert len(set(passes)) > 1, (
        "the ranks' samples need different numbers of steps, or this shows nothing"
    )
    with Ranks(world) as ranks:
        for ep in eps:
            found = ranks.run(sample_over_ranks, ep)
            assert len({count for _, count in found}) == 1, (
                "every rank takes part in every exchange"
            )
            torch.testing.assert_close(found[0][0], all_alone, rtol=0, atol=1e-4)
            assert not any(len(images) for images, _ in found[1:])  # rank 0 alone has them


@pytest.mark.full
def test_every_rank_decodes_its_share_and_no_other():
    with Ranks(2) as ranks:
        found = ranks.run(decode_over_ranks)
    images, _ = found[0]
    assert images.shape == (10, 3, 2, 2)
    assert images[:, 0, 0, 0].tolist() == [n + 0.5 for n in range(10)] and not len(found[1][0])
    assert [seen for _, seen in found] == [[[0, 1, 2, 3], [4]], [[5, 6, 7, 8], [9]]]
