"""Where a rank runs: on the cores near its GPU, with its share of the node's threads."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from diffmoe.environment import RankEnvironment

_SHOWN = {
    "cpu": re.compile(r"GLOO_\w+|OMP_NUM_THREADS"),
    "cuda": re.compile(
        r"(TORCH_)?NCCL_\w+|GLOO_\w+|PYTORCH_\w*ALLOC_CONF|OMP_NUM_THREADS|CUDA_VISIBLE_DEVICES"
    ),
}


def place(environment: RankEnvironment, device: torch.device) -> None:
    """Moves this process near its GPU (:func:`bind_near`); the first node says why it stays far."""
    note = bind_near(device)
    if note and environment.rank < environment.local_world:
        print(f"note: rank {environment.rank}: {note}", file=sys.stderr, flush=True)


def bind_near(device: torch.device, devices: Path = Path("/sys/bus/pci/devices")) -> str | None:
    """Keeps every thread of this process, and what it starts later, on the cores of its GPU's NUMA
    node, which ranks of neighbouring GPUs share.  A process that somebody has bound stays as it is.
    Returns what keeps it far from its GPU, None if nothing does.

    ``devices``: where the kernel lists PCI devices.  (torch.numa does the like, in functions that
    it calls private.)
    """
    if device.type != "cuda":
        return None
    import torch

    try:
        gpu: Any = torch.cuda.get_device_properties(device)
        address = f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0"
        near = cores_of((devices / address / "local_cpulist").read_text())
    except (AttributeError, OSError) as error:  # in some virtual machines
        return f"nobody says which CPUs are near its GPU ({error})"
    allowed = os.sched_getaffinity(0)
    if not allowed & near:
        return (
            f"it may run on CPUs {ranges(allowed)}, none of which is near GPU {address} (CPUs "
            f"{ranges(near)} are): ask for more CPUs or whole nodes (sbatch --exclusive), "
            "or bind it otherwise"
        )
    if len(allowed) < _cores():
        return None
    for thread in os.listdir("/proc/self/task"):
        try:
            os.sched_setaffinity(int(thread), allowed & near)
        except ProcessLookupError:  # it has just ended
            pass
        except OSError as error:
            return f"it may not be kept on the CPUs near its GPU ({error})"
    return None


def cores_each(local_world: int) -> int:
    """Cores for each of ``local_world`` ranks that share this process's node, at least one."""
    return max(1, min(len(os.sched_getaffinity(0)), _cores() // local_world))


def _cores() -> int:
    """This node's cores, or the Slurm job's on it: who may run on fewer was bound by somebody."""
    return int(os.environ.get("SLURM_CPUS_ON_NODE") or os.cpu_count() or 1)


def describe(device: str, environ: Mapping[str, str] = os.environ) -> str:
    """This process's cores; what is set for gloo and OpenMP, on ``cuda`` NCCL and the allocator."""
    shown = _SHOWN[device]
    said = [f"{name}={value}" for name, value in sorted(environ.items()) if shown.fullmatch(name)]
    cores = f"CPUs {ranges(os.sched_getaffinity(0))} of {os.cpu_count()}"
    return f"{cores}; {' '.join(said) or 'no variable for gloo or OpenMP'}"


def cores_of(text: str) -> set[int]:
    """The kernel's ``0-3,8`` as numbers."""
    ends = [item.partition("-") for item in text.strip().split(",") if item]
    return {core for first, _, last in ends for core in range(int(first), int(last or first) + 1)}


def ranges(cores: set[int]) -> str:
    """Numbers as the kernel's ``0-3,8``."""
    starts = sorted(core for core in cores if core - 1 not in cores)
    ends = sorted(core for core in cores if core + 1 not in cores)
    return ",".join(f"{a}-{z}" if z > a else f"{a}" for a, z in zip(starts, ends))
