"""What guided sampling is moved away from, as the section `sample` says it (see
``diffusion.guidance``): the null class, the same weights at a lower capacity, other weights.
"""

from __future__ import annotations

import dataclasses
import re

from diffmoe.config import Config, SampleConfig, validate
from diffmoe.errors import UserError
from diffmoe.models.dit import DiT
from diffmoe.models.pretrained import open_pretrained
from diffmoe.moe.routing import RoutingRule

_WEIGHTS = re.compile(r"(.+)@(raw|ema|ema:.+)")


def lower_rule(sample: SampleConfig) -> RoutingRule:
    """The routing rule under which a token gets ``guide_capacity`` experts: by thresholds from the
    predictors' histograms, or by as many as an expert takes, where it takes a fixed number.
    """
    capacity = sample.guide_capacity
    return RoutingRule(sample.routing, capacity=capacity, dial=capacity)


def open_guide(config: Config) -> DiT | None:
    """The model of ``sample.guide`` with all experts, fp32 on the CPU, where guidance needs other
    weights: a run's or checkpoint's folder, an exported one, a repository of the hub.  UserError
    where there is none such, or it models something else.
    """
    name = config.sample.guide_checkpoint
    if name is None:
        return None
    found = _WEIGHTS.fullmatch(name)
    try:
        opened = open_pretrained(*(found.groups() if found else (name, None)))
        # Its experts follow the same rule, with the thresholds or histograms of its own; the
        # sampler says whether it learned the same process.
        theirs = dataclasses.replace(opened.config, sample=config.sample)
        validate(theirs)
        for field in ("channels", "input_size", "classes"):
            own, its = (vars(c.model)[field] for c in (config, theirs))
            if own != its:
                raise UserError(f"its model.{field} ({its}) is not the model's ({own})")
        return opened.model()
    except UserError as error:
        raise UserError(f"sample.guide ({name}): {error}") from error
