"""By how much a step is longer for its messages: which of them pass under which kernels.

Gradients leave in buckets under backward, rows under shared experts and, in halves of a
micro-batch, under the other half's.  Everything else is waited for.  docs/planner.md has the
formulas.
"""

from __future__ import annotations

from dataclasses import dataclass

from diffmoe.config import Config
from diffmoe.cost.memory import EngineFacts, shared_parts
from diffmoe.cost.parameters import moe_layers
from diffmoe.cost.traffic import ROWS, Message
from diffmoe.layout import Layout

Timed = list[tuple[Message, float]]  # with seconds


@dataclass(frozen=True)
class Windows:
    """Seconds of a micro-batch's kernels under which messages may pass: all of ``backward``; in
    forward, of one MoE layer, ``shared`` experts, ``experts`` and the next block's ``attention``.
    """

    backward: float
    shared: float
    experts: float
    attention: float


def halves(config: Config) -> bool:
    """Whether a micro-batch goes through blocks as two halves of its samples."""
    return config.parallel.overlap == "halves"


def lengthened(messages: float, window: float, cost: float) -> float:
    """Seconds by which a step is longer where ``messages`` seconds pass under ``window`` seconds of
    kernels, which lose the share ``cost`` of their speed meanwhile.
    """
    return max(0.0, messages - window) + cost * min(messages, window)


def exposed_exchange(
    config: Config, layout: Layout, windows: Windows, cost: float, timed: Timed
) -> float:
    """Of all-to-all ``timed`` messages.  Rows travel to their experts while shared experts compute,
    in backward, where kernels take twice as long, as well.  In halves the second half's come while
    the first half's experts compute, go home, the first half's, while the second half's do, and,
    the second half's, while the next block attends to the first, unless all of a block is
    recomputed.  Of two levels those inside the host are waited for.
    """
    passes, total = moe_layers(config.model, config.moe) * layout.accumulation, 0.0
    under: dict[str, tuple[float, ...]] = {ROWS[0]: (windows.shared,), ROWS[1]: (0.0,)}
    if halves(config):
        last = 0.0 if config.parallel.recompute == "block" else windows.attention / 2
        under = {
            ROWS[0]: (windows.shared, windows.experts / 2),
            ROWS[1]: (windows.experts / 2, last),
        }
    for message, seconds in timed:
        if message.purpose in ROWS and message.group != "ep inside":
            each = seconds / passes / len(under[message.purpose])
            longer = 2 if message.phase == "backward" else 1
            for window in under[message.purpose]:
                total += passes * lengthened(each, longer * window, cost)
        else:
            total += seconds
    return total


def exposed_reduction(
    config: Config, layout: Layout, engine: EngineFacts, windows: Windows, cost: float, timed: Timed
) -> float:
    """Of ``timed`` gradients and weights.  n buckets become ready one after the other through
    backward (of each micro-batch at ZeRO 2 and 3) and leave one after the other: all but the first
    n-th of backward can hide them, and the last one is always waited for.  Where copies of the
    state add up theirs, a bucket goes there when the next one has left.  What copies add up in one
    message, after backward, is waited for, as weights are.
    """
    in_buckets = engine.sums_in_products
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
    sizes = [sum(part.numels) for part in shared_parts(config, layout) if part.ranks > 1]
    buckets = sum(-(-size // engine.bucket) for size in sizes)
    last = min(1.0, (2 if copies > 1 and in_buckets else 1) / buckets)
    times = layout.accumulation if engine.stage in (2, 3) else 1
    each = under / times
    exposed = max(last * each, each - (1 - last) * windows.backward)
    return waited + times * (exposed + cost * (each - exposed))
