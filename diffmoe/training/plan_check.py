"""The planner's own error: what it says of this run's steps, beside what they took."""

from __future__ import annotations

import statistics

import torch

from diffmoe.config import Config
from diffmoe.cost.calibration import plan_error
from diffmoe.cost.hardware import Hardware, named_like, read_table
from diffmoe.device import peak_memory_gib
from diffmoe.layout import Layout

# Optimizer steps after which a run compares itself with its plan.
AFTER_STEPS = 20


def machine_of(device: torch.device) -> Hardware:
    """The hardware table's entry for the device; for a GPU that it does not know an H100's."""
    table = read_table(None)
    return (
        named_like(table, "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device))
        or table["h100"]
    )


class PlanCheck:
    """Times of the first ``AFTER_STEPS`` steps of a start; their median, and the memory so far, are
    then compared with the plan.

    ``entries`` are then numbers for the next record of the metrics, which takes them."""

    def __init__(
        self,
        config: Config,
        layout: Layout,
        deepspeed_tree: dict,
        device: torch.device,
        per_node: int,
    ) -> None:
        self._asked = (config, layout, deepspeed_tree)
        self._device, self._per_node = device, per_node
        self._times: list[float] = []
        self.entries: dict[str, float] = {}

    def add(self, seconds: float) -> str | None:
        """One more step; after the last that it takes to compare, what came of it."""
        if len(self._times) == AFTER_STEPS:
            return None
        self._times.append(seconds)
        if len(self._times) < AFTER_STEPS:
            return None
        # A CPU's figure is the whole process's, Python and libraries included: nothing that a plan
        # speaks of.
        name, peak = "cpu", 0.0
        if self._device.type == "cuda":
            name, peak = (
                torch.cuda.get_device_name(self._device),
                peak_memory_gib(self._device) * 2**30,
            )
        self.entries, line = plan_error(
            *self._asked, name, self._per_node, statistics.median(self._times), peak
        )
        return line
