"""A training step of one rank on this machine, timed and taken apart by kernel: ``bench
roofline``'s prediction, measured.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from diffmoe.bench import measure
from diffmoe.bench.step import FixedTraining, Variant
from diffmoe.config import Config
from diffmoe.deepspeed_json import zero_stage
from diffmoe.device import local_device


@dataclass(frozen=True)
class Timed:
    """``seconds`` of a step, median of several; of a traced one [ms, launches] by kind of kernel,
    the most expensive kernels as [name, launches, ms], and on a GPU the most bytes that tensors
    took.
    """

    seconds: float
    kinds: dict[str, list[float]]
    kernels: list[list]
    peak_bytes: int
    device: str


def timed(
    models: Mapping[str, Config], tree: dict, ways: Sequence[str], repeats: int
) -> dict[tuple[str, str], Timed]:
    """(model, eager | compiled) -> its step on one rank, in the family and under the DeepSpeed JSON
    that are priced.  One model after another, so that each has the memory to itself.  Compiled at
    ZeRO 3, which no training is, is left out.
    """
    device = local_device(0, 1)
    measure.world_of_one(device)
    if zero_stage(tree) == 3:
        ways = [way for way in ways if way != "compiled"]
    found: dict[tuple[str, str], Timed] = {}
    for name, config in models.items():
        training, recompute = FixedTraining(config, tree, device), config.parallel.recompute
        steps = {way: Variant(training, recompute, way == "compiled").step for way in ways}
        seconds = measure.interleaved(steps, repeats, device, warm_up=2)
        found |= {(name, way): _traced(step, seconds[way], device) for way, step in steps.items()}
        del training, steps
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return found


def _traced(step: Callable[[], None], seconds: float, device: torch.device) -> Timed:
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    events = measure.traced(step, device)
    peak = torch.cuda.max_memory_allocated(device) if cuda else 0
    kinds = {kind: [0.0, 0] for kind in ("products", "attention", "memory", "messages")}
    for key, ms, calls in events:
        kind = kinds[measure.kind_of(key)]
        kind[0] += ms
        kind[1] += calls
    kernels = [[key[:100], calls, ms] for key, ms, calls in events[:16]]
    return Timed(seconds, kinds, kernels, peak, measure.surroundings(device)["device"])
