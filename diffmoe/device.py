"""The device of this rank: one place that knows about CPU and CUDA."""

from __future__ import annotations

import functools
import os
import time

import torch

# Dense bf16 matmul peaks in FLOP/s, from the vendors' data sheets (without sparsity).
_PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12, "V100": 125e12}


def local_device(local_rank: int, local_world: int) -> torch.device:
    """This rank's device; selects the GPU (``DS_ACCELERATOR=cpu`` asks for the CPU, as of DeepSpeed).  More ranks than GPUs on a node is a ValueError, on every rank of it."""
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_world > torch.cuda.device_count():
        raise ValueError(f"ranks on this node ({local_world}) must not exceed its GPUs ({torch.cuda.device_count()})")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def backend(device: torch.device) -> str:
    """torch.distributed's backend for the device."""
    return "nccl" if device.type == "cuda" else "gloo"


def peak_memory_gib(device: torch.device) -> float:
    """Most device memory that torch has allocated, GiB; 0 on CPU, where torch does not count."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0


@functools.lru_cache(maxsize=None)
def peak_flops(device: torch.device) -> tuple[float, str]:
    """(FLOP/s, where the figure comes from): the data sheet's bf16 peak of a known GPU, else a measured fp32 matmul."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, flops in _PEAKS.items():
            if known in name:
                return flops, f"{name} data sheet"
    a = torch.randn(512, 512, device=device)
    best = float("inf")
    for _ in range(100):  # long enough to find a quiet moment on a shared machine
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * 512**3 / best, "measured fp32 matmul"
