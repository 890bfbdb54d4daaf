"""The device of this rank: one place that knows about CPU and CUDA."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import resource
import socket
import time
from typing import Iterator, Optional

import torch
from torch.distributed import Store

from diffmoe.errors import UserError
from launcher import gpus

# Dense bf16 matmul peaks in FLOP/s, from the vendors' data sheets (without sparsity).
_PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12, "V100": 125e12}


def local_device(local_rank: int, local_world: int) -> torch.device:
    """This rank's device; selects the GPU (``DS_ACCELERATOR=cpu`` asks for the CPU, as of DeepSpeed).

    Of several visible GPUs each rank of a node takes its own by local rank; where a process sees one (``srun
    --gpus-per-task=1``), it is that one, and :func:`check_own_gpu` tells whether others see the same.  Fewer visible GPUs
    than ranks otherwise is a UserError, on every rank of the node; so are GPUs that torch cannot use, where the CPU would be taken
    silently."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return torch.device("cpu")
    if not _usable():
        _check_no_gpu_is_meant()
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    if 1 < visible < local_world:
        raise UserError(f"ranks on this node ({local_world}) must not exceed its GPUs ({visible})")
    device = torch.device("cuda", local_rank if visible > 1 else 0)
    torch.cuda.set_device(device)
    os.environ["LOCAL_RANK"] = str(device.index)  # DeepSpeed takes it for the number of this process's GPU
    return device


def _usable() -> bool:
    try:
        return torch.cuda.is_available()
    except RuntimeError:  # _cuda_says has its words
        return False


def _check_no_gpu_is_meant() -> None:
    """Raises UserError where this process has GPUs and torch cannot use them."""
    found, asked = gpus.present(), os.environ.get("DS_ACCELERATOR", "")
    if not found and not asked:
        return
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not found:
        reason, fix = f"DS_ACCELERATOR ({asked}) asks for a GPU, and this machine shows none", "unset DS_ACCELERATOR"
    elif torch.version.cuda is None and torch.version.hip is None:
        reason = f"this machine has {found}, and torch ({torch.__version__}) is built for CPUs only"
        fix = f"install the build of torch {torch.__version__.partition('+')[0]} for CUDA"
    elif shown is not None and not re.match(r"\d|GPU-|MIG-", shown.strip()):  # CUDA stops at the first that is no device
        reason, fix = f"CUDA_VISIBLE_DEVICES ({shown!r}) hides this machine's {found}", "unset CUDA_VISIBLE_DEVICES"
    else:
        reason = (f"this machine has {found}, and torch ({torch.__version__}, for CUDA {torch.version.cuda}) cannot use it"
                  + f" with CUDA_VISIBLE_DEVICES ({shown})" * (shown is not None) + f": {_cuda_says()}")
        fix = "see python -m launcher doctor"
    raise UserError(f"{reason}: {fix}, or set DS_ACCELERATOR=cpu to compute on the CPU")


def _cuda_says() -> str:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return " ".join(str(error).split())[:200]
    return "it finds no device"


def set_fp32_precision(precision: str) -> None:
    """What this process's GPU does from now on with fp32 matmuls and convolutions: ``ieee`` or ``tf32``."""
    # Not the newer torch.backends.*.fp32_precision = …, which sets the same state: after it torch (2.13) refuses
    # whoever reads allow_tf32 or get_float32_matmul_precision, as Inductor, Dynamo and torch.backends.cudnn.flags do.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"


@contextlib.contextmanager
def ieee_fp32() -> Iterator[None]:
    """For as long as this lasts, fp32 is ``ieee``."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    set_fp32_precision("ieee")
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def check_own_gpu(device: torch.device, local_rank: int, local_world: int, store: Store) -> None:
    """Raises UserError, on all ranks of a node, where two of them have the same GPU.  The ranks of a node wait for each
    other; ``store`` is that of all ranks."""
    if device.type == "cpu" or local_world == 1:
        return
    node = socket.gethostname()
    store.set(f"gpu/{node}/{local_rank}", str(torch.cuda.get_device_properties(device).uuid))
    taken = {store.get(f"gpu/{node}/{rank}") for rank in range(local_world)}
    if len(taken) < local_world:
        raise UserError(f"ranks on this node ({local_world}) must not exceed its GPUs ({len(taken)})")


def backend(device: torch.device) -> str:
    """torch.distributed's backend for the device."""
    return "nccl" if device.type == "cuda" else "gloo"


def bound(device: torch.device, world: int) -> Optional[torch.device]:
    """``device_id`` of torch.distributed's start: NCCL connects there and then, and groups are split from the world's
    communicator.  None for one rank, which has no peer to reach, and whose new groups would fail (DeepSpeed #8248)."""
    return device if device.type == "cuda" and world > 1 else None


def peak_memory_gib(device: torch.device) -> float:
    """Most memory so far, GiB: on a GPU what torch has allocated there, on a CPU what this process has held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB


@functools.lru_cache(maxsize=None)
def peak_flops(device: torch.device) -> tuple[float, str]:
    """(FLOP/s, where the figure comes from): the data sheet's bf16 peak of a known GPU, else :func:`measured_flops` in the
    precision that training uses there, bf16 on a GPU and fp32 on a CPU."""
    if device.type == "cpu":
        return measured_flops(device, torch.float32, 512, 100), "measured fp32 matmul"
    name = torch.cuda.get_device_name(device)
    for known, flops in _PEAKS.items():
        if known in name:
            return flops, f"{name} data sheet"
    return measured_flops(device, torch.bfloat16, 8192, 20), f"{name}, measured bf16 matmul"


def measured_flops(device: torch.device, dtype: torch.dtype, size: int, tries: int) -> float:
    """FLOP/s of the fastest of ``tries`` square matmuls after a fifth as many that do not count: what a program can reach,
    below what a data sheet promises.  On a GPU take a size that fills it (8192: 1.1e12 FLOP, half a GB in bf16) and several
    tries, since clocks rise under load; on a shared CPU many, to find a quiet moment."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for i in range(-(-tries // 5) + tries):
        synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b)
        synchronize(device)
        if i >= -(-tries // 5):
            best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def sent(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``value`` on the device, for which the host does not wait: it would for ordinary memory, until the device has done all
    else that it was given.  Whoever reuses memory that is pinned already waits for the device first."""
    if device.type == "cuda" and not value.is_pinned():
        value = value.pin_memory()  # torch keeps it until the copy is done
    return value.to(device, non_blocking=True)
