"""By how much a step is longer for its messages: which of them pass under which kernels.

Gradients leave in buckets under backward, rows under shared experts.  Everything else is waited
for.  docs/planner.md has the formulas.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from diffmoe.config import Config
from diffmoe.cost.memory import EngineFacts, shared_parts
from diffmoe.cost.parameters import moe_layers
from diffmoe.cost.traffic import ROWS, Message
from diffmoe.layout import Layout

Timed = Iterable[tuple[Message, float]]


@dataclass(frozen=True)
class Windows:
    """Seconds of a micro-batch's kernels under which messages may pass: all of ``backward``; in
    forward, of one MoE layer, ``shared`` experts.
    """

    backward: float
    shared: float


def lengthened(messages: float, window: float, cost: float) -> float:
    """Seconds by which a step is longer where ``messages`` seconds pass under ``window`` seconds of
    kernels, which lose the share ``cost`` of their speed meanwhile.
    """
    return max(0.0, messages - window) + cost * min(messages, window)


def exposed_exchange(
    config: Config, layout: Layout, windows: Windows, cost: float, timed: Timed
) -> float:
    """Of all-to-all ``timed`` messages.  Rows travel to their experts while shared experts compute,
    in backward, where kernels take twice as long, as well; nothing passes under their way home.
    """
    passes, total = moe_layers(config.model, config.moe) * layout.accumulation, 0.0
    for message, seconds in timed:
        if message.purpose == ROWS[0]:
            window = windows.shared * (2 if message.phase == "backward" else 1)
            total += passes * lengthened(seconds / passes, window, cost)
        else:
            total += seconds
    return total


def exposed_reduction(
    config: Config,
    layout: Layout,
    engine: EngineFacts,
    windows: Windows,
    cost: float,
    timed: Timed,
) -> float:
    """Of ``timed`` gradients and weights.  n buckets become ready one after the other through
    backward (of each micro-batch at ZeRO 2 and 3) and leave one after the other: all but the first
    n-th of backward can hide them, and the last one is always waited for.  Where copies of the
    state add up theirs, a bucket goes there when the next one has left.  What copies add up in one
    message, after backward, is waited for, as weights are.
    """
    in_buckets = engine.stage == 1 and engine.bf16
    under = waited = 0.0
    for message, seconds in timed:
        late = message.group == "replicas" and not in_buckets
        if engine.overlaps and message.purpose == "gradients" and not late:
            under += seconds
        else:
            waited += seconds
    if under == 0:
        return waited
    copies = engine.copies(layout)
    sizes = [sum(part) for part, ranks in shared_parts(config, layout) if ranks > 1]
    buckets = sum(-(-size // engine.bucket) for size in sizes)
    last = min(1.0, (2 if copies > 1 and in_buckets else 1) / buckets)
    times = layout.accumulation if engine.stage in (2, 3) else 1
    each = under / times
    exposed = max(last * each, each - (1 - last) * windows.backward)
    return waited + times * (exposed + cost * (each - exposed))
