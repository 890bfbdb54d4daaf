"""Expert-parallel groups that span hosts, and what that costs by the plan."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import replace

from diffmoe.config import Config
from diffmoe.cost.hardware import Hardware
from diffmoe.cost.memory import engine_facts
from diffmoe.cost.step_time import step_time
from diffmoe.errors import UserError
from diffmoe.layout import Layout, resolve_layout


def spanned(hosts: Sequence[Hashable], ep: int) -> tuple[int, int]:
    """(most hosts that one EP group of ``ep`` consecutive ranks is spread over, fewest ranks of one
    that share a host). ``hosts``: every rank's.
    """
    groups = [Counter(hosts[start : start + ep]) for start in range(0, len(hosts), ep)]
    return max(map(len, groups)), min(min(group.values()) for group in groups)


def hosts_of(ranks: int, per_node: int) -> list[int]:
    """Every rank's host where ranks fill one after the other."""
    return [rank // per_node for rank in range(ranks)]


def spanning(
    config: Config,
    layout: Layout,
    deepspeed_tree: dict,
    hardware: Hardware,
    hosts: Sequence[Hashable],
) -> str | None:
    """A line about EP groups that span hosts, with the price on ``hardware``; None where none does."""
    touched, together = spanned(hosts, layout.ep)
    if touched == 1:
        return None
    per_node, engine = max(Counter(hosts).values()), engine_facts(deepspeed_tree)
    time, apart, inside = (
        step_time(config, layout, engine, hardware, here)
        for here in (per_node, together, layout.ranks)
    )
    step = time.total - time.all_to_all + apart.all_to_all
    text = (
        f"EP groups of {layout.ep} ranks span {touched} hosts: by the plan ({hardware.name}) all-to-all takes "
        f"{1e3 * apart.all_to_all:.1f} of {1e3 * step:.1f} ms a step, {1e3 * inside.all_to_all:.1f} inside a host"
    )
    smaller = math.gcd(layout.ep, per_node)
    if spanned(hosts, smaller)[0] > 1:
        return text + "; ranks of a host are not consecutive (srun --distribution=block)"
    try:
        other = replace(config, parallel=replace(config.parallel, ep=smaller))
        seconds = step_time(
            other, resolve_layout(other, layout.ranks), engine, hardware, per_node
        ).total
    except UserError:
        return text
    return f"{text}; with parallel.ep={smaller}, inside hosts, a step takes {1e3 * seconds:.1f} ms"
