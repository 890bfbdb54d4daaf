"""Where a training step's time, memory and traffic go: some real steps, timed, then traced, then
counted.

Three kinds of steps, because each way of looking slows down what the others look at: plain ones
give the time, traced ones (``torch.profiler``) the split and the memory, counted ones
(``parallel/traffic.py``) the messages.
"""

from __future__ import annotations

import datetime
import gc
import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import is_fake
from torch.profiler import ProfilerActivity, profile, record_function

from diffmoe import gpus
from diffmoe.code_version import ROOT, commit, digest
from diffmoe.device import synchronize
from diffmoe.errors import UserError
from diffmoe.parallel.traffic import CommunicationCount
from diffmoe.training.engine import Engine, import_deepspeed

PHASES = ("compute", "all_to_all", "reduction", "data", "other")
_STEP, _DATA = "diffmoe: step", "diffmoe: data"
T = TypeVar("T")


@dataclass(frozen=True)
class RankProfile:
    """What one rank saw.  ``step_s``: seconds of each plain step, data included.  ``split``: share
    of a traced step's time by phase.  ``static_bytes``: tensors that live between steps;
    ``peak_bytes``: most that lived at once.  ``traffic``: one dict a kind of message of one step
    (``CommunicationCount.table``).
    """

    step_s: list[float]
    traced_step_s: float
    split: dict[str, float]
    static_bytes: int
    peak_bytes: int
    traffic: list[dict]


def profile_rank(
    engine: Engine,
    fetch: Callable[[], T],
    train: Callable[[T], Any],
    warmup: int,
    steps: int,
    traced: int = 2,
) -> RankProfile:
    """``warmup`` steps, ``steps`` timed ones, ``traced`` traced ones, one counted; every rank
    together.  A step is ``train(fetch())``: a batch, and what is done with it.
    """
    device = engine.device

    def step() -> None:
        with record_function(_DATA):
            batch = fetch()
        with record_function(_STEP):
            train(batch)
            synchronize(device)

    for _ in range(warmup):
        step()
    if engine.groups.world.size > 1:
        dist.barrier()
    step_s = []
    for _ in range(steps):
        began = time.perf_counter()
        step()
        step_s.append(time.perf_counter() - began)
    static = live_bytes(device)
    events, traced_s = _trace(step, traced, device)
    peak = _peak(events, static, device)
    count = CommunicationCount(
        (f"block {i}", layer, layer.experts) for i, layer in engine.model.moe_layers()
    )
    # Nothing compiled can run under the count; messages are the same.
    with engine.model.plainly(), count:
        step()
    return RankProfile(step_s, traced_s, split(events), static, peak, count.table())


def _trace(step: Callable[[], None], times: int, device: torch.device) -> tuple[list[Any], float]:
    """torch.profiler's raw events of ``times`` steps, and seconds a step."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with profile(activities=activities, profile_memory=device.type == "cpu") as trace:
        began = time.perf_counter()
        for _ in range(times):
            step()
        seconds = (time.perf_counter() - began) / times
    return list(trace.profiler.kineto_results.events()), seconds


def live_bytes(device: torch.device) -> int:
    """Bytes of all tensors; on the CPU of those that Python can see, each storage once."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        # A compiler's tensors have no memory.
        if not issubclass(type(thing), torch.Tensor) or is_fake(thing):
            continue
        if thing.device.type == "cpu" and thing.layout == torch.strided:
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def _peak(events: Iterable[Any], static: int, device: torch.device) -> int:
    """CUDA: the allocator's figure; CPU: what lived before, and what traced steps added to it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return static + max(accumulate((change for _, change in changes), initial=0))


def split(events: Sequence[Any]) -> dict[str, float]:
    """Shares of the steps' time by phase; they add up to 1.

    ``compute``: some kernel (on the CPU: some operator) runs that is no communication.
    ``all_to_all``, ``reduction``: none does, and such a collective is under way: what is not hidden
    behind compute, waiting for slower ranks included.  ``data``: none of these, and the step waits
    for its batch.  ``other``: Python, launches, waiting for the host.
    """
    on_device = any(_is_cuda(e) for e in events)
    spans: dict[str, list[tuple[int, int]]] = {name: [] for name in (*PHASES, "step")}
    for event in events:
        name = _phase_of(event, on_device)
        if name is not None:
            spans[name].append((event.start_ns(), event.start_ns() + event.duration_ns()))
    edges = np.unique(np.array([edge for each in spans.values() for edge in each], np.int64))
    lengths = np.diff(edges)

    def covered(spans: list[tuple[int, int]]) -> np.ndarray:
        """Of every piece of time between two edges whether some span covers it."""
        depth = np.zeros(len(edges), np.int64)
        for sign, side in ((1, [start for start, _ in spans]), (-1, [end for _, end in spans])):
            np.add.at(depth, np.searchsorted(edges, np.array(side, np.int64)), sign)
        return np.cumsum(depth)[:-1] > 0

    left = covered(spans["step"] + spans["data"])
    total, shares = lengths[left].sum(), {}
    for phase in ("compute", "all_to_all", "reduction", "data"):
        here = left & covered(spans[phase])
        shares[phase], left = float(lengths[here].sum() / total), left & ~here
    return {**shares, "other": float(lengths[left].sum() / total)}


def _phase_of(event: Any, on_device: bool) -> str | None:
    name: str = event.name()
    if name in (_STEP, _DATA):
        return None if _is_cuda(event) else ("step" if name == _STEP else "data")
    if on_device:
        # Not an annotated range of kernels with what is between them.
        if not _is_cuda(event) or event.is_user_annotation():
            return None
        if "nccl" not in name.lower():
            return "compute"
        # NCCL moves all-to-alls by its send-and-receive kernel.
        return "all_to_all" if "sendrecv" in name.lower() else "reduction"
    if name.startswith("gloo:"):
        return "all_to_all" if name == "gloo:all_to_all" else "reduction"
    return "compute" if name.startswith("aten::") else None


def _is_cuda(event: Any) -> bool:
    return event.device_type() == torch.autograd.DeviceType.CUDA


def surroundings(device: torch.device) -> dict[str, Any]:
    """Versions and hardware, for a record that can be compared."""
    found: dict[str, Any] = {
        "when": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "code": digest(ROOT),
        "commit": commit(ROOT),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": import_deepspeed().__version__,
        "device": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "fp32_precision": "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
    }
    if device.type == "cuda":
        try:
            driver = next((gpu.driver for gpu in gpus.query() or []), "unknown")
        except UserError as error:  # nvidia-smi is not what is measured
            driver = f"unknown: {error}"
        found |= {
            "device": torch.cuda.get_device_name(device),
            "cuda": torch.version.cuda,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            "driver": driver,
            "gpu_bytes": torch.cuda.get_device_properties(device).total_memory,
        }
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.is_file() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
