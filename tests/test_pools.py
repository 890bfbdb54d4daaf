"""The pool is a property of the model: with the same samples in it, any number of ranks trains the
same model.
"""

from dataclasses import replace

import pytest
import torch

from diffmoe.parallel.spawn import Ranks
from diffmoe.parity.cases import Case
from diffmoe.parity.plain import plain_training
from diffmoe.parity.table import BOUND, MARGIN, start_training

STEPS, POOL, LR = 20, 8, 3e-3
# Pools of 8 samples of 16: inside a rank of 1 and 2, over 2 of 4 ranks, over EP groups and inside
# one.
CASES = [
    Case(world, ep, 1, "none", 1, str(POOL), 16)
    for world, ep in ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4))
]


def gently(config):
    """A learning rate that learns: the table's own is there to move weights far in two steps."""
    return replace(config, train=replace(config.train, lr=LR))


def losses(case, seed):
    """(loss, predictor loss, gradient norm) of every step."""
    training = start_training(case, seed, torch.device("cpu"), STEPS)
    training.config = gently(training.config)
    reports = [training.step(step) for step in range(STEPS)]
    training.engine.engine.destroy()
    return [(report.loss, report.predictor_loss, report.grad_norm) for report in reports]


@pytest.fixture(scope="module")
def plain():
    """(seed, losses) of one plain process, for a seed under which no decision hangs on the last
    bits of a score.
    """
    for seed in range(100):
        reference = plain_training(
            gently(CASES[0].config(seed, STEPS)),
            accumulation=1,
            pool=POOL,
            steps=STEPS,
            device=torch.device("cpu"),
        )
        if reference.margin > MARGIN:
            break
    steps = [[s["loss"], s["predictor_loss"], s["grad_norm"]] for s in reference.steps]
    return seed, torch.tensor(steps, dtype=torch.float64)


@pytest.fixture(scope="module")
def table(plain):
    """The losses of every layout, by case."""
    found, seed = {}, plain[0]
    for world in (1, 2, 4):
        with Ranks(world, timeout=120) as ranks:
            for case in CASES:
                if case.world == world:
                    found[case] = torch.tensor(
                        ranks.run(losses, case, seed)[0], dtype=torch.float64
                    )
    return found


@pytest.mark.full
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.world} ranks, ep {case.ep}")
def test_same_pool_same_losses(plain, table, case):
    difference = ((table[case] - plain[1]).abs() / plain[1]).max().item()
    print(f"{case.label}: largest relative difference in {STEPS} steps {difference:.1e}")
    assert difference < BOUND


def test_the_losses_move(plain):
    """Or the comparison would say nothing."""
    loss = plain[1][:, 0]
    assert loss[-5:].mean() < 0.95 * loss[:5].mean()


def test_another_pool_is_another_model():
    one, other = (
        plain_training(
            gently(CASES[0].config(0, 2)),
            accumulation=1,
            pool=pool,
            steps=2,
            device=torch.device("cpu"),
        )
        for pool in (1, 16)
    )
    assert abs(one.steps[0]["loss"] - other.steps[0]["loss"]) > 1e-4
