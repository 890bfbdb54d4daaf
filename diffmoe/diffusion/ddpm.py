"""Denoising diffusion with ADM's names: 1000 linear betas, epsilon prediction, a learned range of
variances.

q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I) with abar_t the product of (1 - beta_s) up to s =
t.  Time runs the other way than in the flow: step 0 is (almost) data, step 999 noise.  The network
says [epsilon, v], 2 C channels; v in [-1, 1] places log sigma^2 between the two bounds of the
reverse step's variance (Nichol & Dhariwal 2021, equation 15).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from diffmoe.diffusion.guidance import Guide, Interval, is_guided
from diffmoe.errors import UserError
from diffmoe.models.dit import DiT, ModelOutput
from diffmoe.moe.routing import RoutingRule
from diffmoe.random_streams import Use, philox

Field = Callable[[Tensor, Tensor], Tensor]
Noise = Callable[[int], Tensor]
_MIN_SNR = 5.0  # the paper's gamma


# schedule


@dataclass(frozen=True, eq=False)
class Schedule:
    """Noise schedule of T steps, fp64, made on the CPU.  ``betas`` [T]; ``timestep_map`` [T] int64:
    the step that the network was trained to see at each of these.  The rest follows, under the
    names of ADM's ``GaussianDiffusion``.
    """

    betas: Tensor
    timestep_map: Tensor

    def __len__(self) -> int:
        return len(self.betas)

    def to(self, device: torch.device) -> Schedule:
        """The same with all tables on a device, in the bits that the CPU computed; else every use
        would copy one there, for which the host waits.
        """
        there = Schedule(self.betas.to(device), self.timestep_map.to(device))
        for name, table in vars(Schedule).items():
            if isinstance(table, cached_property):
                vars(there)[name] = getattr(self, name).to(device)
        return there

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        return (1 - self.betas).cumprod(0)

    @cached_property
    def alphas_cumprod_prev(self) -> Tensor:
        return torch.cat([torch.ones_like(self.betas[:1]), self.alphas_cumprod[:-1]])

    @cached_property
    def posterior_variance(self) -> Tensor:
        """Variance of q(x_{t-1} | x_t, x_0): the lower bound of the reverse step's, and 0 at step
        0.
        """
        return self.betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)

    @cached_property
    def posterior_log_variance_clipped(self) -> Tensor:
        """Step 0 borrows step 1's value: its own logarithm is minus infinity."""
        return torch.cat([self.posterior_variance[1:2], self.posterior_variance[1:]]).log()

    @cached_property
    def posterior_mean_coef1(self) -> Tensor:
        """Factor of x_0 in the mean of q(x_{t-1} | x_t, x_0)."""
        return self.betas * self.alphas_cumprod_prev.sqrt() / (1 - self.alphas_cumprod)

    @cached_property
    def posterior_mean_coef2(self) -> Tensor:
        """Factor of x_t in the mean of q(x_{t-1} | x_t, x_0)."""
        return (1 - self.alphas_cumprod_prev) * (1 - self.betas).sqrt() / (1 - self.alphas_cumprod)

    @cached_property
    def min_snr_weight(self) -> Tensor:
        """Of epsilon's squared error, min(SNR, 5) / SNR with SNR = abar / (1 - abar): early steps,
        whose noise is easily told, count less (Hang et al. 2023).
        """
        return (_MIN_SNR * (1 - self.alphas_cumprod) / self.alphas_cumprod).clamp(max=1)


def linear_schedule(num_timesteps: int = 1000) -> Schedule:
    """Betas from 1e-4 to 0.02 (Ho et al. 2020), scaled by 1000 / ``num_timesteps`` as in ADM."""
    scale = 1000 / num_timesteps
    betas = torch.linspace(scale * 1e-4, scale * 0.02, num_timesteps, dtype=torch.float64)
    return Schedule(betas, torch.arange(num_timesteps))


def space_timesteps(num_timesteps: int, steps: int) -> list[int]:
    """``steps`` of the original steps, evenly spaced with both ends (ADM ``space_timesteps`` with
    one section).

    Raises UserError outside [2, num_timesteps]."""
    if not 2 <= steps <= num_timesteps:
        raise UserError(
            f"sample.steps ({steps}) must be in [2, {num_timesteps}], the steps of the diffusion"
        )
    # Halves fall on the even side, as in ADM.  ADM adds up the stride in floats and so falls one
    # short of a half at 283 of the 999 possible counts (21: 499 for 500), none of them 50, 100,
    # 125, 200, 250 or 500.
    return [round(i * (num_timesteps - 1) / (steps - 1)) for i in range(steps)]


def respace(schedule: Schedule, steps: int) -> Schedule:
    """The schedule of ``steps`` steps with the same abar_t at the steps kept (ADM
    ``SpacedDiffusion``).

    Raises UserError as ``space_timesteps`` does."""
    kept = torch.tensor(space_timesteps(len(schedule), steps))
    abar = schedule.alphas_cumprod[kept]
    before = torch.cat([torch.ones_like(abar[:1]), abar[:-1]])
    return Schedule(1 - abar / before, schedule.timestep_map[kept])


def _at(values: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """values[t] in the dtype of ``like``, shaped to broadcast over [B, C, H, W]."""
    return values.to(like.device)[t].to(like.dtype).view(-1, 1, 1, 1)


# distributions


@dataclass(frozen=True)
class PMeanVariance:
    """p(x_{t-1} | x_t) as the network sees it, and its estimate of x_0: all [B, C, H, W]."""

    mean: Tensor
    log_variance: Tensor
    pred_xstart: Tensor


def q_sample(schedule: Schedule, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise.  x_start, noise [B, C, H, W]; t [B] steps of
    the schedule.
    """
    abar = schedule.alphas_cumprod
    return _at(abar.sqrt(), t, x_start) * x_start + _at((1 - abar).sqrt(), t, x_start) * noise


def q_posterior_mean(schedule: Schedule, x_start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """Mean of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, equation 7)."""
    return (
        _at(schedule.posterior_mean_coef1, t, x_t) * x_start
        + _at(schedule.posterior_mean_coef2, t, x_t) * x_t
    )


def p_mean_variance(schedule: Schedule, prediction: Tensor, x: Tensor, t: Tensor) -> PMeanVariance:
    """The reverse step that ``prediction`` [B, 2 C, H, W] describes at x [B, C, H, W], t [B] steps
    of the schedule (ADM ``p_mean_variance`` without clipping, which is never done to latents).
    """
    channels = x.shape[1]
    assert prediction.shape[1] == 2 * channels, (
        f"{prediction.shape[1]} output channels for {channels} input channels"
    )
    epsilon, v = prediction.to(x.dtype).chunk(2, dim=1)
    share = (v + 1) / 2
    log_variance = share * _at(schedule.betas.log(), t, x) + (1 - share) * _at(
        schedule.posterior_log_variance_clipped, t, x
    )
    abar = schedule.alphas_cumprod
    pred_xstart = _at(abar.rsqrt(), t, x) * x - _at((1 / abar - 1).sqrt(), t, x) * epsilon
    mean = q_posterior_mean(schedule, pred_xstart, x, t)
    return PMeanVariance(mean, log_variance, pred_xstart)


# training


@dataclass(frozen=True)
class Losses:
    """Per sample [B]: ``mse`` of epsilon, ``vb`` in bits per dimension; ``loss`` is their sum, as
    ADM trains on it.
    """

    loss: Tensor
    mse: Tensor
    vb: Tensor


def training_losses(
    schedule: Schedule, prediction: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor, noise: Tensor
) -> Losses:
    """Loss of ``prediction`` [B, 2 C, H, W] for x_t = q_sample(x_start, t, noise); t [B] steps of
    the schedule.

    ADM's ``LossType.MSE`` with a learned variance: the bound trains the variance alone, epsilon is
    detached in it, and it is added with weight 1 (ADM's RESCALED_MSE would scale by T / 1000, which
    is 1 here).
    """
    prediction = prediction.to(x_start.dtype)
    epsilon, v = prediction.chunk(2, dim=1)
    vb = vb_terms_bpd(schedule, torch.cat([epsilon.detach(), v], dim=1), x_start, x_t, t)
    mse = (noise - epsilon).square().flatten(1).mean(1)
    return Losses(mse + vb, mse, vb)


def vb_terms_bpd(
    schedule: Schedule, prediction: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor
) -> Tensor:
    """One term of the variational bound per sample [B], in bits per dimension (ADM
    ``_vb_terms_bpd``).

    KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)); at step 0 the likelihood of x_0 in bins of 2 /
    255, which is what ADM does with pixels and DiT, without comment, with latents.
    """
    p = p_mean_variance(schedule, prediction, x_t, t)
    true_mean = q_posterior_mean(schedule, x_start, x_t, t)
    true_log_variance = _at(schedule.posterior_log_variance_clipped, t, x_t)
    gap = true_log_variance - p.log_variance
    kl = 0.5 * (gap.exp() - gap - 1 + (true_mean - p.mean).square() * (-p.log_variance).exp())
    nll = -discretized_gaussian_log_likelihood(x_start, p.mean, 0.5 * p.log_variance)
    nats = torch.where(t.view(-1, 1, 1, 1) == 0, nll, kl)
    return nats.flatten(1).mean(1) / math.log(2)


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log of N(mean, scale^2)'s mass in the bin x +- 1/255, in nats; the bins at the ends are open
    (beyond +-0.999).
    """
    upper = _normal_cdf((x - mean + 1 / 255) * (-log_scale).exp())
    lower = _normal_cdf((x - mean - 1 / 255) * (-log_scale).exp())
    mass = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return mass.clamp_min(1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """ADM's approximation (Page 1977), kept so that losses are comparable: off by at most 2e-4."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def ddpm_loss(
    model: Callable[..., ModelOutput],
    x: Tensor,
    noise: Tensor,
    t: Tensor,
    y: Tensor,
    rule: RoutingRule,
    schedule: Schedule,
    loss_weight: str = "none",
) -> tuple[Tensor, ModelOutput]:
    """Mean of ``training_losses`` over the batch, in fp32, and the model's output: the counterpart
    of ``flow_loss``.

    x, noise [B, C, H, W]; t [B] int64 steps of ``schedule``; y [B]; ``loss_weight`` as
    ``DiffusionConfig`` has it, of the squared error and not of the bound."""
    losses, output = ddpm_losses(model, x, noise, t, y, rule, schedule)
    if loss_weight == "min_snr":
        weight = schedule.min_snr_weight.to(t.device)[t].to(x.dtype)
        return (weight * losses.mse + losses.vb).mean(), output
    return losses.loss.mean(), output


def ddpm_losses(
    model: Callable[..., ModelOutput],
    x: Tensor,
    noise: Tensor,
    t: Tensor,
    y: Tensor,
    rule: RoutingRule,
    schedule: Schedule,
) -> tuple[Losses, ModelOutput]:
    """``ddpm_loss`` before weights and mean: losses a sample [B]."""
    x_t = q_sample(schedule, x, t, noise)
    output = model(x_t, schedule.timestep_map.to(t.device)[t], y, rule)
    return training_losses(schedule, output.prediction, x, x_t, t, noise), output


# sampling


def progress(t: Tensor) -> Tensor:
    """Steps t of the 1000 as times from 0 (noise) to 1 (data), each step's middle."""
    return 1 - (t + 0.5) / 1000


def guided_epsilon(
    model: DiT,
    y: Tensor,
    cfg: float,
    rule: RoutingRule,
    channels: int | None = 3,
    *,
    guide: Guide | None = None,
    interval: Interval | None = None,
) -> Field:
    """The field (x [B, C, H, W], t [B]) -> [epsilon, v] with guidance: guide + cfg (conditional -
    guide); the guide is the null class where there is none.

    With the null class both halves run as one batch of 2 B, hence as one pool, and only the first
    ``channels`` of epsilon are guided (None: all C), as published (DiT ``forward_with_cfg``, which
    samples 2 B images and drops half); the rest and v come from the conditional half.  Another
    guide's pass is one by itself.  ``cfg = 1``, and steps t (of one value for all samples) outside
    the ``interval`` of :func:`progress`, run the conditional pass alone.
    """
    labels = torch.cat([y, torch.full_like(y, model.model.classes)])

    def model_fn(x: Tensor, t: Tensor) -> Tensor:
        if not is_guided(progress(t), cfg, interval):
            return model(x, t, y, rule).prediction.to(x.dtype)
        if guide is None:
            both = model(torch.cat([x, x]), torch.cat([t, t]), labels, rule).prediction.to(x.dtype)
            conditional, weaker = both.chunk(2)
        else:
            conditional = model(x, t, y, rule).prediction.to(x.dtype)
            weaker = guide[0](x, t, y, guide[1]).prediction.to(x.dtype)
        guided = x.shape[1] if channels is None else channels
        front = weaker[:, :guided] + cfg * (conditional[:, :guided] - weaker[:, :guided])
        return torch.cat([front, conditional[:, guided:]], dim=1)

    return model_fn


def ancestral_noise(
    seed: int, numbers: Sequence[int], shape: tuple[int, ...], device: torch.device
) -> Noise:
    """noise(step) [B, *shape], fp32, of the images with these numbers: image i gets the same in any
    batch.  Steps go down: a thread draws the next one's meanwhile (4 ms for 64 latents of 4 x 32 x
    32).
    """
    thread = ThreadPoolExecutor(1, "noise")
    coming: dict[int, Future[Tensor]] = {}

    def draw(step: int) -> Tensor:
        rows = [
            np.random.Generator(philox(Use.ANCESTRAL, seed, number, step)).standard_normal(
                shape, dtype=np.float32
            )
            for number in numbers
        ]
        return torch.from_numpy(np.stack(rows))

    def noise(step: int) -> Tensor:
        drawn = coming.pop(step, None) or thread.submit(draw, step)
        if step > 1:
            coming[step - 1] = thread.submit(draw, step - 1)
        return drawn.result().to(device)

    return noise


def ancestral(field: Field, z: Tensor, steps: int, noise: Noise) -> Tensor:
    """ADM's ``p_sample_loop`` over ``steps`` of the 1000, one evaluation each, from z [B, C, H, W];
    ``noise(i)`` is asked from the last step down to 1 (not at 0).
    """
    schedule = respace(linear_schedule(), steps).to(z.device)
    for i in reversed(range(len(schedule))):
        t = torch.full((len(z),), i, device=z.device)
        p = p_mean_variance(schedule, field(z, schedule.timestep_map[t]), z, t)
        z = p.mean + (0.5 * p.log_variance).exp() * noise(i) if i else p.mean
    return z


def ddim(
    field: Field, z: Tensor, steps: int, noise: Noise | None = None, *, eta: float = 0.0
) -> Tensor:
    """ADM's ``ddim_sample_loop`` over ``steps`` of the 1000, one evaluation each (Song et al. 2021,
    equations 12 and 16): deterministic at ``eta`` 0, the small-variance ancestral one at 1.

    The learned variance is not used.  Raises UserError for ``eta`` above 0 without ``noise``."""
    if eta > 0 and noise is None:
        raise UserError(f"DDIM with eta ({eta}) above 0 needs noise")
    schedule = respace(linear_schedule(), steps).to(z.device)
    abar, before = schedule.alphas_cumprod, schedule.alphas_cumprod_prev
    sigma = eta * schedule.posterior_variance.sqrt()
    for i in reversed(range(len(schedule))):
        t = torch.full((len(z),), i, device=z.device)
        x0 = p_mean_variance(schedule, field(z, schedule.timestep_map[t]), z, t).pred_xstart
        epsilon = (_at(abar.rsqrt(), t, z) * z - x0) / _at((1 / abar - 1).sqrt(), t, z)
        z = _at(before.sqrt(), t, z) * x0 + _at((1 - before - sigma**2).sqrt(), t, z) * epsilon
        if noise is not None and eta > 0 and i:
            z = z + _at(sigma, t, z) * noise(i)
    return z
