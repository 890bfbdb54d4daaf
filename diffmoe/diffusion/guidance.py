"""Guidance: a field moved away from a weaker one, guide + cfg (model - guide).

The guide is the null class (Ho and Salimans 2022) or a worse model of the same class (Karras et al.
2024, arXiv 2406.02507), and may be asked in an interval of times alone (Kynkäänniemi et al. 2024,
arXiv 2404.07724).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from diffmoe.models.dit import DiT
from diffmoe.moe.routing import RoutingRule

Interval = tuple[float, float]


@dataclass(frozen=True)
class Guide:
    """A worse model, asked in place of the null class: ``model`` under ``rule``, which may be the
    guided model itself under a rule that gives tokens fewer experts.
    """

    model: DiT
    rule: RoutingRule


def is_guided(time: Tensor, cfg: float, interval: Interval | None) -> bool:
    """Whether the guide is asked at ``time`` [B], from 0 (noise) to 1 (data), of one value; asks
    the device where there is an interval.
    """
    if cfg == 1.0 or interval is None:
        return cfg != 1.0
    return bool((time[0] >= interval[0]) & (time[0] <= interval[1]))
