"""A training step of one rank on this machine, timed and taken apart by kernel: ``bench
roofline``'s prediction, measured.
"""

from __future__ import annotations

import dataclasses
import gc
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from diffmoe.bench import measure
from diffmoe.bench.step import Contender, Training
from diffmoe.config import Config
from diffmoe.cost.memory import engine_facts
from diffmoe.device import backend, local_device

_TOP = 16


@dataclass(frozen=True)
class Timed:
    """``seconds`` of a step, median of several; of a traced one [ms, launches] by kind of kernel,
    the most expensive kernels as [name, launches, ms], and on a GPU the most bytes that tensors
    took.
    """

    seconds: float
    kinds: dict[str, list[float]]
    kernels: list[list[Any]]
    peak_bytes: int
    device: str

    def record(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def timed(
    models: Mapping[str, Config], tree: dict, ways: Sequence[str], repeats: int
) -> dict[tuple[str, str], Timed]:
    """(model, eager | compiled) -> its step on one rank, in the family and under the DeepSpeed JSON
    that are priced.  One model after another, so that each has the memory to itself.  Compiled at
    ZeRO 3, which no training is, is left out.
    """
    device = local_device(0, 1)
    if not dist.is_initialized():
        store = Path(tempfile.mkdtemp(prefix="diffmoe-bench-")) / "store"
        dist.init_process_group(
            backend(device), init_method=f"file://{store}", rank=0, world_size=1
        )
    if engine_facts(tree).stage == 3:
        ways = [way for way in ways if way != "compiled"]
    found = {}
    for name, config in models.items():
        training = Training(config, tree, device)
        steps = {
            way: Contender(training, config.parallel.recompute, way == "compiled").step
            for way in ways
        }
        seconds = measure.interleaved(steps, repeats, device, warm_up=2)
        found |= {(name, way): _traced(step, seconds[way], device) for way, step in steps.items()}
        del training, steps
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return found


def _traced(step: Any, seconds: float, device: torch.device) -> Timed:
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    events = measure.traced(step, device)
    kinds = {kind: [0.0, 0] for kind in ("products", "attention", "memory", "messages")}
    for key, ms, calls in events:
        kind = kinds[measure.kind_of(key)]
        kind[0] += ms
        kind[1] += calls
    return Timed(
        seconds,
        kinds,
        [[key[:100], calls, ms] for key, ms, calls in events[:_TOP]],
        torch.cuda.max_memory_allocated(device) if cuda else 0,
        measure.surroundings(device)["device"],
    )
