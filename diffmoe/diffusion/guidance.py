"""Guidance: a field moved away from a weaker one, guide + cfg (model - guide).

The guide is the null class (Ho and Salimans 2022) or a worse model of the same class (Karras et al.
2024, arXiv 2406.02507), perhaps in an interval of times alone (Kynkäänniemi et al. 2024, arXiv
2404.07724).
"""

from __future__ import annotations

import dataclasses
import re

from torch import Tensor

from diffmoe.config import Config, SampleConfig, validate
from diffmoe.errors import UserError
from diffmoe.models.dit import DiT
from diffmoe.models.pretrained import open_pretrained
from diffmoe.moe.routing import RoutingRule

Interval = tuple[float, float]
Guide = tuple[DiT, RoutingRule]  # perhaps the guided model, under a rule of fewer experts a token


def is_guided(time: Tensor, cfg: float, interval: Interval | None) -> bool:
    """Whether the guide is asked at ``time`` [B], from 0 (noise) to 1 (data), of one value; asks
    the device where there is an interval.
    """
    if cfg == 1.0 or interval is None:
        return cfg != 1.0
    return bool((time[0] >= interval[0]) & (time[0] <= interval[1]))


def lower_rule(sample: SampleConfig) -> RoutingRule:
    """The rule of the guide ``capacity``: by thresholds from the predictors' histograms, or by as
    many tokens as an expert takes, where it takes a fixed number.
    """
    capacity = sample.guide_capacity
    return RoutingRule(sample.routing, capacity=capacity, dial=capacity)


def open_guide(config: Config) -> DiT | None:
    """The model of ``sample.guide``, fp32 on the CPU, where guidance needs other weights.
    UserError where there are none such, or they model something else.
    """
    name = config.sample.guide_checkpoint
    if name is None:
        return None
    found = re.fullmatch(r"(.+)@(raw|ema|(?:ema|length):.+)", name)
    try:
        opened = open_pretrained(*(found.groups() if found else (name, None)))
        # Its experts follow the same rule, with thresholds or histograms of its own; the sampler
        # says whether it learned the same process.
        theirs = dataclasses.replace(opened.config, sample=config.sample)
        validate(theirs)
        for field in ("channels", "input_size", "classes"):
            own, its = (vars(c.model)[field] for c in (config, theirs))
            if own != its:
                raise UserError(f"its model.{field} ({its}) is not the model's ({own})")
        return opened.model()
    except UserError as error:
        raise UserError(f"sample.guide ({name}): {error}") from error
