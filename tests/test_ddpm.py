"""DDPM against the published research code's numbers, and against what its formulas must
satisfy.
"""

import math
from dataclasses import replace

import pytest
import torch

from diffmoe.config import load_config
from diffmoe.diffusion.ddpm import (
    ancestral_noise,
    ddpm_loss,
    discretized_gaussian_log_likelihood,
    guided_epsilon,
    linear_schedule,
    p_mean_variance,
    q_sample,
    respace,
    space_timesteps,
    training_losses,
    vb_terms_bpd,
)
from diffmoe.diffusion.guidance import Others
from diffmoe.diffusion.sampling import ancestral, ddim
from diffmoe.errors import UserError
from diffmoe.evaluation import generate
from diffmoe.moe.routing import RoutingRule
from reference_models import FAMILIES, PREDICTOR_WEIGHT, close, reference

SCHEDULE = linear_schedule()


@pytest.fixture(params=FAMILIES)
def case(request):
    return reference(request.param)


def draw(_):
    return torch.randn(6, 4, 8, 8)


def test_losses(case):
    dit, numbers = case
    x, noise, t, y = (numbers[f"in/{name}"] for name in ("x", "noise", "t_ddpm", "y"))
    loss, output = ddpm_loss(dit.train(), x, noise, t, y, RoutingRule(), SCHEDULE)
    terms = training_losses(
        SCHEDULE, output.prediction, x, q_sample(SCHEDULE, x, t, noise), t, noise
    )
    close(terms.mse, numbers["ddpm/mse"], "mse")
    close(terms.vb, numbers["ddpm/vb"], "vb")
    predictor = sum(r.predictor_loss for r in output.moe if r.predictor_loss is not None)
    close(loss + PREDICTOR_WEIGHT * predictor, numbers["ddpm/loss"], "loss")


def test_p_mean_variance(case):
    dit, numbers = case
    x, t = numbers["in/x"], numbers["in/t_ddpm"]
    with torch.no_grad():
        prediction = guided_epsilon(dit.eval(), numbers["in/y"], 1.0, RoutingRule("batch"))(x, t)
    p = p_mean_variance(SCHEDULE, prediction, x, t)
    for name in ("mean", "log_variance", "pred_xstart"):
        close(getattr(p, name), numbers[f"ddpm/p_{name}"], name)


def test_guided_epsilon(case):
    dit, numbers = case
    # Both halves of the reference hold the same three images, all at the first time step, labels
    # then null labels.
    x, y, t = (
        numbers["ddpm/cfg_1.5_x"][:3],
        numbers["ddpm/cfg_1.5_y"][:3],
        numbers["in/t_ddpm"][:1].expand(3),
    )
    theirs = numbers["ddpm/cfg_1.5_out"]
    with torch.no_grad():
        ours = guided_epsilon(dit.eval(), y, 1.5, RoutingRule("batch"))(x, t)
        close(ours, theirs[:3], "three channels guided")
        # The reference's fourth channels of both halves tell what guiding all channels must give.
        fourth = theirs[3:, 3] + 1.5 * (theirs[:3, 3] - theirs[3:, 3])
        everything = guided_epsilon(dit, y, 1.5, RoutingRule("batch"), channels=None)(x, t)
        close(
            everything,
            torch.cat([theirs[:3, :3], fourth[:, None], theirs[:3, 4:]], dim=1),
            "all channels guided",
        )


def test_spaced_timesteps(case):
    assert space_timesteps(1000, 7) == case[1]["ddpm/spaced_timesteps_7"].tolist()


def test_samples(case):
    dit, numbers = case
    model_fn = guided_epsilon(dit.eval(), numbers["in/y"], 1.0, RoutingRule("batch"))
    with torch.no_grad():
        close(ddim(model_fn, numbers["in/noise"], 7), numbers["ddpm/ddim_7_steps"], "ddim")
        torch.manual_seed(numbers["ddpm/ancestral_7_steps_seed"].item())
        close(
            ancestral(model_fn, numbers["in/noise"], 7, draw),
            numbers["ddpm/ancestral_7_steps"],
            "ancestral",
        )


def test_the_bound_trains_the_variance_alone():
    generator = torch.Generator().manual_seed(0)
    x, noise, prediction = (
        torch.randn(3, c, 4, 4, generator=generator, dtype=torch.float64) for c in (2, 2, 4)
    )
    prediction.requires_grad_()
    t = torch.tensor([0, 400, 999])
    losses = training_losses(SCHEDULE, prediction, x, q_sample(SCHEDULE, x, t, noise), t, noise)
    (of_vb,) = torch.autograd.grad(losses.vb.sum(), prediction, retain_graph=True)
    (of_mse,) = torch.autograd.grad(losses.mse.sum(), prediction)
    assert not of_vb[:, :2].any() and of_vb[:, 2:].any()
    assert of_mse[:, :2].any() and not of_mse[:, 2:].any()


def test_the_bound_is_the_divergence_of_normals():
    generator = torch.Generator().manual_seed(1)
    x, noise, prediction = (
        torch.randn(2, c, 4, 4, generator=generator, dtype=torch.float64) for c in (1, 1, 2)
    )
    t = torch.tensor([1, 700])
    x_t = q_sample(SCHEDULE, x, t, noise)
    p = p_mean_variance(SCHEDULE, prediction, x_t, t)
    # Bayes for q(x_{t-1} | x_t, x_0): precisions add.
    before, beta = (
        values[t].view(-1, 1, 1, 1) for values in (SCHEDULE.alphas_cumprod_prev, SCHEDULE.betas)
    )
    precision = 1 / (1 - before) + (1 - beta) / beta
    mean = (before.sqrt() * x / (1 - before) + (1 - beta).sqrt() * x_t / beta) / precision
    q = torch.distributions.Normal(mean, precision.rsqrt().expand_as(mean))
    expected = torch.distributions.kl_divergence(
        q, torch.distributions.Normal(p.mean, p.log_variance.mul(0.5).exp())
    )
    vb = vb_terms_bpd(SCHEDULE, prediction, x, x_t, t)
    torch.testing.assert_close(vb, expected.mean((1, 2, 3)) / math.log(2))


def test_the_bins_of_the_last_step_hold_all_mass():
    pixels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    for mean, log_scale in ((0.1, -1.0), (-0.7, -3.0), (0.95, 0.5)):
        mass = discretized_gaussian_log_likelihood(
            pixels, torch.tensor(mean), torch.tensor(log_scale)
        ).exp()
        assert mass.sum().item() == pytest.approx(1, abs=1e-6)
        exact = torch.distributions.Normal(mean, torch.tensor(log_scale).exp().item()).cdf(
            pixels[:-1] + 1 / 255
        )
        torch.testing.assert_close(mass.cumsum(0)[:-1], exact, atol=3e-4, rtol=0)


def test_respacing_keeps_the_noise_levels():
    assert space_timesteps(1000, 1000) == list(range(1000))
    for steps in (2, 50, 250, 1000):
        fewer = respace(SCHEDULE, steps)
        assert len(fewer) == steps and fewer.timestep_map[-1] == 999
        kept = SCHEDULE.alphas_cumprod[fewer.timestep_map]
        torch.testing.assert_close(fewer.alphas_cumprod, kept, rtol=1e-12, atol=0)
        again = respace(fewer, 2)
        assert again.timestep_map.tolist() == [0, 999]
    for steps in (1, 1001):
        with pytest.raises(UserError, match=rf"sample.steps \({steps}\)"):
            respace(SCHEDULE, steps)


def test_image_i_gets_its_noise_in_any_batch():
    cpu = torch.device("cpu")
    both, one = (ancestral_noise(7, numbers, (2, 3, 3), cpu) for numbers in ([4, 9], [9]))
    assert torch.equal(both(12)[1:], one(12))
    drawn = [both(12)[0], both(12)[1], both(13)[0], ancestral_noise(8, [4], (2, 3, 3), cpu)(12)[0]]
    assert len({tuple(d.flatten().tolist()) for d in drawn}) == 4
    assert torch.equal(both(12), both(12))


def test_the_variance_needs_its_channels():
    with pytest.raises(AssertionError, match="4 output channels for 4 input"):
        p_mean_variance(
            SCHEDULE, torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2), torch.tensor([3])
        )


def test_noise_is_asked_for():
    def field(x, t):
        return torch.zeros(len(x), 2, 2, 2)

    with pytest.raises(UserError, match="needs noise"):
        ddim(field, torch.zeros(1, 1, 2, 2), 3, eta=0.5)


def test_the_configuration_says_which_channels_are_guided() -> None:
    dit, numbers = reference("diffmoe")
    x, y, t = numbers["in/x"], numbers["in/y"], numbers["in/t_ddpm"]
    epsilon = {}
    for cfg, channels in ((1.0, 3), (2.0, 3), (2.0, 4)):
        config = load_config(
            None,
            [
                "diffusion.process=ddpm",
                "sample.sampler=ddim",
                "sample.routing=token",
                f"sample.cfg={cfg}",
                f"sample.cfg_channels={channels}",
            ],
        )
        config = replace(config, model=dit.model, moe=dit.moe)
        with torch.no_grad():
            epsilon[cfg, channels] = generate._field(dit.eval(), config, y, Others())(x, t)[:, :4]
    plain, three, four = epsilon.values()
    torch.testing.assert_close(three[:, 3], plain[:, 3], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(three[:, :3], four[:, :3])
    assert (four[:, 3] - plain[:, 3]).abs().max() > 1e-3
