"""How far the plan was from what a run then measured."""

from __future__ import annotations

from diffmoe.config import Config
from diffmoe.cost.hardware import choose, named_like, read_table
from diffmoe.cost.memory import engine_facts, rank_memory
from diffmoe.cost.step_time import step_time
from diffmoe.layout import Layout

# Optimizer steps after which a run compares itself with its plan.
AFTER_STEPS = 20


def plan_error(
    config: Config,
    layout: Layout,
    deepspeed_tree: dict,
    device_name: str,
    per_node: int,
    step_s: float,
    peak_bytes: float,
) -> tuple[dict[str, float], str]:
    """(entries for the metrics, a line for people): predicted and measured step time, and memory
    where it was measured (``peak_bytes`` 0: it was not).  Errors are predicted / measured - 1.

    ``device_name``: torch's name of the GPU, or ``cpu``; one that the hardware table does not know
    has no plan: ({}, why).
    """
    table = read_table(None)
    hardware = choose(table, "cpu") if device_name == "cpu" else named_like(table, device_name)
    if hardware is None:
        return (
            {},
            f"plan: no entry in diffmoe/cost/hardware.yaml is part of {device_name!r}, so there is nothing to compare",
        )
    engine = engine_facts(deepspeed_tree)
    seconds, memory = (
        step_time(config, layout, engine, hardware, per_node).total,
        rank_memory(config, layout, engine).peak,
    )
    entries = {
        "plan_step_s": seconds,
        "plan_step_error": seconds / step_s - 1,
        "plan_memory_gib": memory / 2**30,
    }
    line = f"plan: {1e3 * seconds:.1f} ms a step, measured {1e3 * step_s:.1f} ({100 * (seconds / step_s - 1):+.0f} %); "
    if peak_bytes > 0:
        entries["plan_memory_error"] = memory / peak_bytes - 1
        line += f"{memory / 2**30:.2f} GiB, measured {peak_bytes / 2**30:.2f} ({100 * (memory / peak_bytes - 1):+.0f} %)"
    else:
        line += (
            f"{memory / 2**30:.2f} GiB (of a CPU rank it is not measured apart from its process)"
        )
    return entries, line + (
        "" if hardware.calibrated else "; the hardware table's figures are not calibrated here"
    )
