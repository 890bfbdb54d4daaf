"""Images from a trained model: by number, so that image i is the same in any batch and on any
number of ranks.

(In the per-token routing mode; the paper's rules look at the whole batch, see ``moe.routing``.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffmoe.config import Config, MoEConfig, SampleConfig
from diffmoe.diffusion.ddpm import ancestral_noise, guided_epsilon
from diffmoe.diffusion.guidance import Others, lower_rule
from diffmoe.diffusion.randomness import sampling_noise
from diffmoe.diffusion.rectified_flow import guided_velocity
from diffmoe.diffusion.sampling import SAMPLERS
from diffmoe.errors import UserError
from diffmoe.evaluation.capacity_report import CapacityMeter
from diffmoe.families import has_thresholds
from diffmoe.models.dit import DiT
from diffmoe.moe.routing import RoutingRule
from diffmoe.parallel.collectives import gather_stack, sum_over
from diffmoe.parallel.groups import Group
from diffmoe.progress import shown


def inference_rule(moe: MoEConfig, sample: SampleConfig) -> RoutingRule:
    """The routing rule that a sampling configuration asks for."""
    return RoutingRule(
        sample.routing, capacity=moe.capacity, gamma=sample.gamma, dial=sample.capacity
    )


def check_dial(model: DiT, sample: SampleConfig) -> None:
    """UserError where model or guide need the capacity dial and a layer has no histogram."""
    if sample.capacity is not None:
        asked, otherwise = f"sample.capacity ({sample.capacity})", "set sample.gamma"
    elif sample.guided_by_capacity and sample.routing != "static":
        asked = f"sample.guide (capacity {sample.guide_capacity})"
        otherwise = "set another sample.guide"
    else:
        return
    layers = [layer for _, layer in model.moe_layers() if has_thresholds(layer.model)]
    if not all(layer.thresholds.has_histogram for layer in layers):
        raise UserError(
            f"{asked} needs histograms of the predictors' outputs, "
            "which training writes into its checkpoints; this one has none (an older or an "
            f"imported one): train on from it, or {otherwise}"
        )


def threshold_note(model: DiT, sample: SampleConfig) -> str | None:
    """A note where thresholds decide that no training step has observed; else None."""
    if sample.gamma is not None or sample.capacity is not None or sample.routing == "static":
        return None
    predicting = [x.thresholds for _, x in model.moe_layers() if has_thresholds(x.model)]
    fresh = [thresholds for thresholds in predicting if not thresholds.observations]
    if not fresh:
        return None
    return (
        f"note: training has not observed the thresholds of {len(fresh)} layers yet: their experts "
        f"take tokens above the start value {float(fresh[0].value[0]):g}, whatever the capacity; "
        "sample.gamma sets another"
    )


@torch.no_grad()
def generate(
    model: DiT,
    config: Config,
    labels: Sequence[int],
    numbers: Sequence[int],
    device: torch.device,
    progress: bool = False,
    meter: CapacityMeter | None = None,
    together: Group | None = None,
    others: Others = Others(),
) -> Tensor:
    """Images [n, C, H, W], fp32 on the CPU, of classes ``labels`` from the noise of images
    ``numbers``.

    ``together``: ranks whose passes must keep step, since the model communicates in them.
    ``meter`` counts the capacity used.  ``others``: whole, where sampling needs them.
    Raises UserError where :func:`check_dial` does.
    """
    check_dial(model, config.sample)
    for other in filter(None, others):
        check_dial(other, config.sample)
    sizes, sample = config.model, config.sample
    shape = (sizes.channels, sizes.input_size, sizes.input_size)
    images = []
    starts = range(0, len(numbers), sample.batch)
    for start in shown(starts, f"sampling, batches of {sample.batch}", progress):
        part = slice(start, start + sample.batch)
        noise = sampling_noise(config.run.seed, numbers[part], shape).to(device)
        y = torch.tensor(labels[part], device=device)
        field = _field(model, config, y, others)
        counting = (
            contextlib.nullcontext() if meter is None else meter.watching(model, numbers[part])
        )
        step_noise = ancestral_noise(config.run.seed, numbers[part], shape, device)
        sampler, options = SAMPLERS[sample.sampler], _options(config, together, device)
        with counting:
            images.append(sampler(field, noise, sample.steps, step_noise, **options).cpu())
    return torch.cat(images)


def _field(
    model: DiT, config: Config, y: Tensor, others: Others
) -> Callable[[Tensor, Tensor], Tensor]:
    """What the sampler integrates; at times that the model has not learned, its pair's field."""
    field = _field_of(model, config, y, others.guide)
    if others.pair is None:
        return field
    rest, (low, high) = _field_of(others.pair, config, y, others.guide), config.diffusion.time_range

    def by_time(z: Tensor, t: Tensor) -> Tensor:
        learned = t[0] < high if low == 0 else t[0] >= low
        return (field if learned else rest)(z, t)

    return by_time


def _field_of(
    model: DiT, config: Config, y: Tensor, other: DiT | None
) -> Callable[[Tensor, Tensor], Tensor]:
    """With guidance, by ``other`` where that needs other weights.  The flow is guided on all
    channels, as published.
    """
    sample, guide = config.sample, None
    rule = inference_rule(model.moe, sample)
    if sample.guided_by_capacity:
        guide = (model, lower_rule(sample))
    elif sample.guide_checkpoint:
        assert other is not None
        guide = (other, inference_rule(other.moe, sample))
    how: dict[str, Any] = {"guide": guide, "interval": sample.cfg_interval}
    if config.diffusion.process == "ddpm":
        channels = min(sample.cfg_channels, config.model.channels)
        return guided_epsilon(model, y, sample.cfg, rule, channels, **how)
    return guided_velocity(model, y, sample.cfg, rule, **how, predicts=config.diffusion.prediction)


def _options(config: Config, together: Group | None, device: torch.device) -> dict:
    """What some samplers take.  dopri5's ranks end together: passes may hold collectives."""
    sample = config.sample
    if sample.sampler == "ddim":
        return {"eta": sample.eta}
    if sample.sampler in ("euler", "heun"):
        return {"shift": config.diffusion.time_shift}
    if sample.sampler != "dopri5":
        return {}
    if together is None or together.size == 1:
        return {"tolerance": sample.tolerance}

    def anyone(mine: bool) -> bool:
        return bool(sum_over(torch.tensor([float(mine)], device=device), together) > 0)

    return {"tolerance": sample.tolerance, "anyone": anyone}


def generate_everywhere(
    model: DiT,
    config: Config,
    labels: Sequence[int],
    world: Group,
    device: torch.device,
    progress: bool = False,
    meter: CapacityMeter | None = None,
    decode: Callable[[Tensor], Tensor] | None = None,
    others: Others = Others(),
) -> Tensor:
    """Images 0 … len(labels) - 1, an equal share on every rank (surplus numbers fill the last), all
    of them on rank 0, on others none.  Ranks make the same number of passes, so the experts may be
    spread over them.  ``decode`` turns a batch of samples into the images, each rank's share on
    that rank.
    """
    each = -(-len(labels) // world.size)
    numbers = range(world.index * each, (world.index + 1) * each)
    my_labels = [labels[i % len(labels)] for i in numbers]
    mine = generate(model, config, my_labels, numbers, device, progress, meter, world, others)
    gathered = []
    for part in mine.split(config.sample.batch):  # on the device no more at once
        images = part if decode is None else decode(part)
        if world.size == 1:
            gathered.append(images.unsqueeze(0))
            continue
        everyones = gather_stack(images.to(device), world)
        if world.index == 0:
            gathered.append(everyones.cpu())
    if not gathered:
        return mine[:0]
    return torch.cat(gathered, dim=1).flatten(0, 1)[: len(labels)]
