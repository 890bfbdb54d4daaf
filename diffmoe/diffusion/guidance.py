"""Other models beside the one that samples.

Guidance: a field moved away from a weaker one, guide + cfg (model - guide).

The guide is the null class (Ho and Salimans 2022) or a worse model of the same class (Karras et al.
2024, arXiv 2406.02507), perhaps in an interval of times alone (Kynkäänniemi et al. 2024, arXiv
2404.07724).  The pair: the model of the times that this one has not learned.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from diffmoe.config import Config, SampleConfig, validate
from diffmoe.errors import UserError
from diffmoe.models.dit import DiT
from diffmoe.models.pretrained import open_pretrained
from diffmoe.moe.routing import RoutingRule

Interval = tuple[float, float]
Guide = tuple[DiT, RoutingRule]  # perhaps the guided model, under a rule of fewer experts a token


class Others(NamedTuple):
    """The whole models beside the one that samples, where it needs them."""

    guide: DiT | None = None
    pair: DiT | None = None

    def each(self, place: Callable[[DiT], DiT]) -> Others:
        """Both after ``place``."""
        return Others(*(model and place(model) for model in self))


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


def open_others(config: Config) -> Others:
    """The models of ``sample.guide`` and ``sample.pair``, fp32 on the CPU, where other weights are
    needed.  UserError where there are none such, or they model something else.
    """
    return Others(
        _open("guide", config.sample.guide_checkpoint, config),
        _open("pair", config.sample.pair, config),
    )


def _open(role: str, name: str | None, config: Config) -> DiT | None:
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
        own, its = (c.diffusion.prediction for c in (config, theirs))
        if own != its:
            raise UserError(f"its diffusion.prediction ({its}) is not the model's ({own})")
        own, its = (c.diffusion.time_range for c in (config, theirs))
        first, last = sorted((own, its)) if role == "pair" else (its, its)
        if first[0] > 0 or last[1] < 1 or first[1] < last[0]:
            raise UserError(
                f"its diffusion.time_range {list(its)} leaves times out that it is asked for"
                + f", beside the model's {list(own)}" * (role == "pair")
            )
        return opened.model()
    except UserError as error:
        raise UserError(f"sample.{role} ({name}): {error}") from error
