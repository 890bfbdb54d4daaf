"""Samplers on fields whose answers are known in closed form."""

import math

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch

from diffmoe.diffusion import sampling
from diffmoe.diffusion.ddpm import linear_schedule, respace
from diffmoe.diffusion.sampling import SAMPLERS, ancestral, ddim, dopri5, euler, heun
from diffmoe.diffusion.times import logit_normal, uniform_steps
from diffmoe.errors import UserError

SCHEDULE = linear_schedule()
MEAN, STD = 0.7, 0.5  # of the Gaussian data


def start(shape=(3, 1, 2, 2), seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def decay(z, t):
    """dz/dt = z cos 2t: z(1) = z(0) exp(sin(2) / 2)."""
    return z * torch.cos(2 * t).view(-1, 1, 1, 1)


class CountedField:
    """A field that counts its ``evaluations`` (of the whole batch): what a sampler costs."""

    def __init__(self, field):
        self.field, self.evaluations = field, 0

    def __call__(self, z, t):
        self.evaluations += 1
        return self.field(z, t)


def flow_of_gaussian(z, t):
    """Velocity E[x - noise | z_t] for data N(MEAN, STD^2); the flow maps noise n to MEAN + STD
    n.
    """
    t = t.view(-1, 1, 1, 1)
    variance = (t * STD) ** 2 + (1 - t) ** 2
    return MEAN + (t * STD**2 - (1 - t)) / variance * (z - t * MEAN)


WITH_ANSWERS = pytest.mark.parametrize(
    "field, answer",
    [
        (decay, lambda z: z * math.exp(math.sin(2) / 2)),
        (flow_of_gaussian, lambda z: MEAN + STD * z),
    ],
)


def slope(errors, steps):
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


@WITH_ANSWERS
@pytest.mark.parametrize("sampler, order", [(euler, 1), (heun, 2)])
def test_order(field, answer, sampler, order):
    z, steps = start(), [20, 40, 80, 160]
    errors = [(sampler(field, z, n) - answer(z)).abs().max().item() for n in steps]
    assert slope(errors, steps) == pytest.approx(order, abs=0.1)


@WITH_ANSWERS
def test_dopri5_keeps_its_tolerance(field, answer):
    z, costs = start(), []
    for tolerance in (1e-3, 1e-6, 1e-9):
        counted = CountedField(field)
        error = (dopri5(counted, z, 200, tolerance=tolerance) - answer(z)).abs().max().item()
        assert error < 10 * tolerance
        costs.append(counted.evaluations)
        assert (counted.evaluations - 1) % 6 == 0
    assert costs == sorted(costs) and costs[0] < 80


def test_dopri5_has_the_published_coefficients():
    theirs = scipy.integrate.RK45
    for ours, row in zip(sampling._STAGES[:5], theirs.A[1:], strict=True):
        np.testing.assert_allclose(ours, row[: len(ours)], rtol=1e-14)
    np.testing.assert_allclose(sampling._STAGES[5], theirs.B, rtol=1e-14)
    np.testing.assert_allclose(sampling._NODES[:5], theirs.C[1:], rtol=1e-14)
    np.testing.assert_allclose(np.abs(sampling._ERROR), np.abs(theirs.E), rtol=1e-12)


def test_dopri5_agrees_with_scipy():
    def field(z, t):
        return torch.sin(5 * z) - z * t.view(-1, 1, 1, 1) ** 2

    z = start((1, 1, 2, 2))
    theirs = scipy.integrate.solve_ivp(
        lambda t, y: field(torch.from_numpy(y).view(1, 1, 2, 2), torch.tensor([t])).numpy().ravel(),
        (0, 1),
        z.numpy().ravel(),
        rtol=1e-10,
        atol=1e-10,
    ).y[:, -1]
    np.testing.assert_allclose(
        dopri5(field, z, 500, tolerance=1e-8).numpy().ravel(), theirs, atol=1e-6
    )


def test_dopri5_knows_no_batch_mates():
    def field(z, t):  # the third sample needs many more steps
        return z * torch.cos(torch.tensor([1.0, 3.0, 60.0])[: len(z)].to(z) * t).view(-1, 1, 1, 1)

    z = start()
    together, pair = CountedField(field), CountedField(field)
    ours = dopri5(together, z, 200, tolerance=1e-6)
    torch.testing.assert_close(
        ours[:2], dopri5(pair, z[:2], 200, tolerance=1e-6), rtol=1e-13, atol=1e-13
    )
    assert together.evaluations > 2 * pair.evaluations


def test_dopri5_evaluates_as_long_as_any_rank_does():
    mine, others = CountedField(decay), CountedField(decay)
    alone = dopri5(mine, start(), 100)
    rounds = iter(range(30))
    waiting = dopri5(
        others, start(), 100, anyone=lambda unfinished: unfinished or next(rounds) < 20
    )
    assert torch.equal(alone, waiting) and others.evaluations > mine.evaluations


@pytest.mark.parametrize("field, steps", [(decay, 2), (lambda z, t: z * math.nan, 30)])
def test_dopri5_gives_up(field, steps):
    with pytest.raises(
        UserError, match=rf"sample.steps \({steps}\) at sample.tolerance \(0.0001\)"
    ):
        dopri5(field, start(), steps)


def test_dopri5_in_single_precision():
    z = start()
    ours = dopri5(flow_of_gaussian, z.float(), 100, tolerance=1e-5)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), MEAN + STD * z, atol=1e-4, rtol=0)


# -------------------------------------------------------------------------------------------------
# diffusion


def exact_model(x, t):
    """[epsilon, 0]: E[noise | x_t] for data N(MEAN, STD^2), t out of the 1000 steps."""
    abar = SCHEDULE.alphas_cumprod[t].view(-1, 1, 1, 1)
    epsilon = (1 - abar).sqrt() * (x - abar.sqrt() * MEAN) / (abar * STD**2 + 1 - abar)
    return torch.cat([epsilon, torch.zeros_like(x)], dim=1)


def probability_flow(x):
    """Where the exact ODE takes x from step 999 to the data."""
    last = SCHEDULE.alphas_cumprod[-1]
    return MEAN + STD * (x - last.sqrt() * MEAN) / (last * STD**2 + 1 - last).sqrt()


def test_ddim_converges_to_the_probability_flow():
    x, steps = start(), [25, 50, 100, 200, 400]
    errors = [(ddim(exact_model, x, n) - probability_flow(x)).abs().max().item() for n in steps]
    assert errors[-1] < 0.01
    assert slope(errors, steps) == pytest.approx(1, abs=0.15)


def test_ddim_is_the_exact_product_of_its_steps():
    x, schedule = start(), respace(SCHEDULE, 11)
    abar, before = schedule.alphas_cumprod, schedule.alphas_cumprod_prev
    # Each step maps the distance to the mean linearly, for a Gaussian.
    factors = ((abar * before).sqrt() * STD**2 + ((1 - abar) * (1 - before)).sqrt()) / (
        abar * STD**2 + 1 - abar
    )
    expected = MEAN + factors.prod() * (x - abar[-1].sqrt() * MEAN)
    torch.testing.assert_close(ddim(exact_model, x, 11), expected, rtol=1e-10, atol=1e-10)


def exact_reverse_model(steps):
    """[epsilon, v] whose reverse step over ``steps`` is the true q(x_{t-1} | x_t) of Gaussian data,
    variance too.
    """
    schedule = respace(SCHEDULE, steps)
    abar = schedule.alphas_cumprod
    of_x0 = STD**2 * (1 - abar) / (abar * STD**2 + 1 - abar)  # Var[x_0 | x_t]
    variance = schedule.posterior_variance + schedule.posterior_mean_coef1**2 * of_x0
    low, high = schedule.posterior_log_variance_clipped, schedule.betas.log()
    v = 2 * (variance.log() - low) / (high - low) - 1
    v[0] = 0.0  # both bounds are nearly one there, and no noise is added
    place = {int(step): i for i, step in enumerate(schedule.timestep_map)}

    def model_fn(x, t):
        return torch.cat(
            [exact_model(x, t)[:, :1], torch.full_like(x, v[place[int(t[0])]].item())], dim=1
        )

    last = abar[0]  # the final step returns E[x_0 | x_1], which is narrower than x_0
    return model_fn, STD**2 * (last * STD**2 / (last * STD**2 + 1 - last))


@pytest.mark.parametrize("steps", [10, 50])
def test_ancestral_sampling_of_a_gaussian(steps):
    generator = torch.Generator().manual_seed(3)
    shape, n = (2000, 1, 4, 4), 32000

    def noise(_):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    model_fn, variance = exact_reverse_model(steps)
    ours = ancestral(model_fn, noise(0), steps, noise)
    assert ours.mean().item() == pytest.approx(MEAN, abs=4 * STD / n**0.5)
    assert ours.var().item() == pytest.approx(variance.item(), rel=4 * (2 / n) ** 0.5)
    assert (
        scipy.stats.kstest(ours.flatten().numpy(), "norm", (MEAN, variance.sqrt().item())).pvalue
        > 1e-3
    )


def ddim_variance(steps):
    """Variance that DDIM at eta 1 reaches from N(0, 1): each step is affine in x, plus its own
    noise.
    """
    schedule = respace(SCHEDULE, steps)
    variance = 1.0
    for i in reversed(range(steps)):
        abar, before = schedule.alphas_cumprod[i], schedule.alphas_cumprod_prev[i]
        added = schedule.posterior_variance[i]
        total = abar * STD**2 + 1 - abar
        factor = (
            (before * abar).sqrt() * STD**2 + ((1 - before - added) * (1 - abar)).sqrt()
        ) / total
        variance = factor**2 * variance + added
    return variance.item()


def test_ddim_with_noise_samples_the_gaussian_too():
    generator = torch.Generator().manual_seed(4)
    shape, n = (1000, 1, 4, 4), 16000

    def noise(_):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    ours = ddim(exact_model, noise(0), 50, noise, eta=1.0)
    assert ours.mean().item() == pytest.approx(MEAN, abs=4 * STD / n**0.5)
    assert ours.var().item() == pytest.approx(ddim_variance(50), rel=4 * (2 / n) ** 0.5)
    # The small variance is exact for data at one point; for others it is too narrow, less so with
    # more steps.
    assert STD**2 > ddim_variance(1000) > ddim_variance(200) > ddim_variance(50)
    assert ddim_variance(1000) == pytest.approx(STD**2, rel=0.03)


def test_samplers_share_a_signature():
    z = start((2, 1, 2, 2))
    flow, diffusion = {"euler", "heun", "dopri5"}, {"ancestral", "ddim"}
    assert set(SAMPLERS) == flow | diffusion
    for name, sampler in SAMPLERS.items():
        field = decay if name in flow else exact_model
        assert sampler(field, z, 40, lambda i: torch.zeros_like(z)).shape == z.shape


# --------------------------------------------------------------------------------------------------
# times


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (-0.6, 1.4)])
def test_logit_normal_times(mean, std):
    u = torch.rand(20000, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    t = logit_normal(u, mean, std)
    logits = scipy.stats.norm.ppf(u.numpy(), mean, std)
    np.testing.assert_allclose(t.numpy(), 1 / (1 + np.exp(-logits)), rtol=1e-9)
    assert scipy.stats.kstest(torch.logit(t).numpy(), "norm", (mean, std)).pvalue > 1e-3
    ends = logit_normal(torch.tensor([0.0, 0.5, 1.0]), mean, std)
    assert ends.dtype == torch.float32 and ends[0] == 0 and ends[2] == 1
    assert ends[1].item() == pytest.approx(1 / (1 + math.exp(-mean)))


def test_uniform_steps():
    u = torch.rand(20000, generator=torch.Generator().manual_seed(6))
    t = uniform_steps(u, 1000)
    assert t.dtype == torch.int64 and t.min() == 0 and t.max() == 999
    assert scipy.stats.chisquare(np.bincount(t.numpy() // 50, minlength=20)).pvalue > 1e-3
    assert uniform_steps(torch.tensor([0.0, 0.9999, 1.0]), 1000).tolist() == [0, 999, 999]
