"""Losses and times beside the processes' own, against their equations; over ranks they are rows of
the parity table.
"""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch

from diffmoe.config import load_config
from diffmoe.diffusion.ddpm import ddpm_loss, linear_schedule
from diffmoe.diffusion.rectified_flow import flow_loss, guided_velocity
from diffmoe.diffusion.sampling import euler, heun
from diffmoe.diffusion.times import shifted
from diffmoe.models.dit import ModelOutput, dispersive_loss
from diffmoe.models.logical import new_model
from diffmoe.moe.routing import RoutingRule
from diffmoe.parallel.groups import single_process
from diffmoe.parity import table
from diffmoe.parity.cases import Case
from diffmoe.training import step as training_step
from diffmoe.training.step import direction_loss
from programs import losses, run_program, tiny

WORLD = single_process().world
SCHEDULE = linear_schedule()


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --------------------------------------------------------------------------------------------------
# the dispersive loss


def test_the_dispersive_loss_is_its_equation():
    z = draw(4, 3, 5)
    total = 0.0
    for one in z.tolist():
        for two in z.tolist():
            numbers = [(a - b) ** 2 for p, q in zip(one, two) for a, b in zip(p, q)]
            total += math.exp(-sum(numbers) / 15 / 0.5)
    assert dispersive_loss(z, WORLD).item() == pytest.approx(math.log(total / 16), rel=1e-12)
    assert dispersive_loss(z[:1].expand(4, 3, 5), WORLD).item() == pytest.approx(0, abs=1e-12)


def test_gradients():
    z, prediction = draw(4, 3, 5).requires_grad_(), draw(2, 6, 2, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: dispersive_loss(z, WORLD), z)
    assert torch.autograd.gradcheck(
        lambda p: direction_loss(p, draw(2, 3, 2, 2, seed=1)), prediction
    )


def test_only_training_passes_report_it_and_after_a_quarter_of_the_blocks():
    words = "model.input_size=4 model.width=16 model.heads=2 model.depth=5 moe.experts=2".split()
    with_loss = load_config(None, [*words, "train.dispersive_weight=0.5"])
    model = new_model(with_loss, 1, single_process())
    given = torch.randn(3, 4, 4, 4), torch.rand(3), torch.arange(3), RoutingRule("train")
    seen = []
    model.blocks[1].register_forward_hook(lambda block, args, out: seen.append(out[0]))
    assert model(*given).dispersive == dispersive_loss(seen[0], WORLD)
    assert model.eval()(*given).dispersive is None
    assert new_model(load_config(None, words), 1, single_process())(*given).dispersive is None


def pairs_of_a_rank_alone(training):
    training.model.world = WORLD


@pytest.mark.full
def test_pairs_are_those_of_all_ranks():
    """Which the parity table shows, and shows where they are not."""
    case = Case(2, 2, 1, "none", 1, "rank", 16, "losses")
    good, spoiled = (
        next(table.run_cases([case], tamper=tamper)) for tamper in (None, pairs_of_a_rank_alone)
    )
    assert good.ok and not spoiled.ok and spoiled.differences["gradient"] > 1e-3


# --------------------------------------------------------------------------------------------------
# weights and direction


def test_min_snr_weighs_the_squared_error_alone():
    x, noise, t = draw(4, 2, 3, 3), draw(4, 2, 3, 3, seed=1), torch.tensor([0, 50, 300, 999])
    prediction = draw(4, 4, 3, 3, seed=2).requires_grad_()

    def model(*_):
        return ModelOutput(prediction, ())

    plain, weighted = (
        ddpm_loss(model, x, noise, t, t, RoutingRule(), SCHEDULE, name)[0]
        for name in ("none", "min_snr")
    )
    one, other = (torch.autograd.grad(loss, prediction)[0] for loss in (plain, weighted))
    # Ho et al.'s betas, multiplied up here once more.
    betas = [1e-4 + (0.02 - 1e-4) * i / 999 for i in range(1000)]
    abars = [math.prod(1 - beta for beta in betas[: step + 1]) for step in t.tolist()]
    snr = [abar / (1 - abar) for abar in abars]
    weights = torch.tensor([min(ratio, 5) / ratio for ratio in snr], dtype=torch.float64)
    assert weights[0] < 1e-3 and weights[1] < 0.2 and weights[2:].tolist() == [1, 1]
    torch.testing.assert_close(other[:, :2], one[:, :2] * weights.view(-1, 1, 1, 1))
    torch.testing.assert_close(other[:, 2:], one[:, 2:])


def test_direction_is_the_cosine_over_channels():
    prediction, velocity = draw(2, 6, 2, 2), draw(2, 3, 2, 2, seed=1)
    cosines = []
    for b, i, j in torch.cartesian_prod(*[torch.arange(2)] * 3).tolist():
        p, v = prediction[b, :3, i, j].tolist(), velocity[b, :, i, j].tolist()
        inner = sum(a * c for a, c in zip(p, v))
        cosines.append(inner / math.hypot(*p) / math.hypot(*v))
    expected = 1 - sum(cosines) / len(cosines)
    assert direction_loss(prediction, velocity).item() == pytest.approx(expected, rel=1e-12)
    assert direction_loss(3 * velocity, velocity).item() == pytest.approx(0, abs=1e-12)


# --------------------------------------------------------------------------------------------------
# prediction of x


class Constant(SimpleNamespace):
    """Predicts ``x`` [B, 2 C, H, W] of any class, and three times it of the null class, 7."""

    model = SimpleNamespace(classes=7)

    def __call__(self, z, t, y, rule):
        return ModelOutput(self.x * torch.where(y == 7, 3, 1).view(-1, 1, 1, 1), ())


def test_the_loss_of_a_predicted_x_is_the_velocitys():
    """At the last two times the clip holds in both velocities, so the right x still costs 0."""
    x, noise, t = draw(4, 2, 3, 3), draw(4, 2, 3, 3, seed=1), torch.tensor([0, 0.5, 0.97, 1])
    prediction = draw(4, 4, 3, 3, seed=2).requires_grad_()
    given = x, noise, t.double(), torch.zeros(4)
    loss, _ = flow_loss(Constant(x=prediction), *given, RoutingRule(), "x")
    (gradient,) = torch.autograd.grad(loss, prediction)
    total = 0.0
    for i, time in enumerate(t.tolist()):
        for p, clean, e in zip(*(v[i, :2].flatten().tolist() for v in (prediction, x, noise))):
            z = time * clean + (1 - time) * e
            left = 1 - time if time < 0.95 else 0.05
            total += ((p - z) / left - (clean - z) / left) ** 2
            if time < 0.95:
                assert (clean - z) / left == pytest.approx(clean - e)
    assert loss.item() == pytest.approx(total / 72, rel=1e-6)
    left = torch.tensor([1, 0.5, 0.05, 0.05], dtype=torch.float64).view(-1, 1, 1, 1)
    torch.testing.assert_close(gradient[:, :2], 2 * (prediction[:, :2] - x) / left**2 / 72)
    assert gradient[:, 2:].abs().max() == 0
    assert flow_loss(Constant(x=x), *given, RoutingRule(), "x")[0] == 0


def test_samplers_go_to_the_predicted_x():
    """dz/dt = (x - z) / (1 - t): the distance falls in proportion to 1 - t, which one step of the
    clip's length ends, and two halve twice.
    """
    z, x = draw(3, 2, 2, 2), draw(3, 4, 2, 2, seed=1)
    y, rule = torch.tensor([0, 1, 2]), RoutingRule()
    for cfg, steps, sampler, left in (
        (1, 20, euler, 0),
        (2.5, 20, euler, 0),
        (1, 40, euler, 0.05 / 4),
        (1, 20, heun, 0.05 / 2),
    ):
        field = guided_velocity(Constant(x=x), y, cfg, rule, predicts="x")
        goal = x[:, :2] * (3 + cfg * (1 - 3))
        torch.testing.assert_close(sampler(field, z, steps), goal + left * (z - goal))


# --------------------------------------------------------------------------------------------------
# times


def test_times_are_shifted_as_sd3_does_towards_noise():
    t, s = torch.linspace(0, 1, 11, dtype=torch.float64), 3.0
    noise = 1 - t  # SD3's t
    torch.testing.assert_close(1 - shifted(t, s), s * noise / (1 + (s - 1) * noise))
    assert (shifted(t, s)[1:-1] < t[1:-1]).all()
    assert shifted(t, 1.0) is t


def test_training_draws_times_of_its_range():
    u = torch.linspace(0, 1, 5)
    words = ["diffusion.time_range=[0.25, 1]", "diffusion.time_shift=2"]
    trained = training_step._training_time(u, load_config(None, words).diffusion)
    torch.testing.assert_close(trained, 0.25 + 0.75 * shifted(u, 2))


def test_training_and_samplers_have_the_same_shift():
    u, times = torch.tensor([0.0, 0.25, 0.5, 0.75]), []
    words = ["diffusion.time_shift=2", "model.family=dense"]
    trained = training_step._training_time(u, load_config(None, words).diffusion)

    def field(z, t):
        times.append(t[0].item())
        return torch.ones_like(z)

    assert euler(field, torch.zeros(1), 4, shift=2).item() == pytest.approx(1)
    assert times == pytest.approx(trained.tolist())
    assert heun(field, torch.zeros(1), 4, shift=2).item() == pytest.approx(1)


@pytest.mark.parametrize("sampler, order", [(euler, 1), (heun, 2)])
def test_order_on_a_shifted_grid(sampler, order):
    """dz/dt = z cos 2t: z(1) = z(0) exp(sin(2) / 2)."""
    z, answer = torch.ones(1, dtype=torch.float64), math.exp(math.sin(2) / 2)
    errors = [
        abs(sampler(lambda z, t: z * torch.cos(2 * t), z, n, shift=3).item() - answer)
        for n in (640, 1280)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)


def test_without_a_shift_samplers_are_what_they_were_to_the_bit():
    z, steps = draw(5).float(), 7
    expected = z
    for i in range(steps):
        t = torch.full((5,), i / steps)
        expected = expected + expected * torch.cos(2 * t) / steps
    assert torch.equal(euler(lambda z, t: z * torch.cos(2 * t), z, steps), expected)


# --------------------------------------------------------------------------------------------------
# runs


@pytest.mark.full
def test_a_run_records_them_and_resumes(tmp_path):
    more = ["train.dispersive_weight=0.5", "diffusion.time_shift=2", "train.schedule=constant"]
    more += ["train.save_every=2", "train.steps=3"]
    whole = run_program(2, *tiny(tmp_path / "a", *more))
    assert [result.returncode for result in whole] == [0, 0] and "dispersive -" in whole[0].stdout
    lines = (tmp_path / "a/metrics.jsonl").read_text().splitlines()
    found = [json.loads(line)["dispersive_loss"] for line in lines]
    assert len(found) == 3 and all(-math.log(16) < loss < 0 for loss in found)
    kept = "checkpoints/step_00000002"
    shutil.copytree(tmp_path / "a" / kept, tmp_path / "b" / kept)
    run_program(2, *tiny(tmp_path / "b", *more))
    assert losses(tmp_path / "b")[3] == losses(tmp_path / "a")[3]
