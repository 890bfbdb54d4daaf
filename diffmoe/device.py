"""The device of this rank: one place that knows about CPU and CUDA."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import resource
import socket
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed import Store

from diffmoe import gpus
from diffmoe.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # of weights, by their names here
_LEAVING_S = 20.0  # in which a process that was ended gives back a GPU's memory

# Dense bf16 matmul peaks in FLOP/s, from the vendors' data sheets (without sparsity).
_PEAKS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "V100": 125e12,
}


def local_device(local_rank: int, local_world: int, asked: str = "auto") -> torch.device:
    """This rank's device; selects the GPU.  ``asked``: ``run.device`` or ``--device``, ``cpu``,
    ``cuda`` (a GPU, or an error) or ``auto``: what ``DS_ACCELERATOR`` says, as of DeepSpeed, or
    else a GPU if this process has one.

    Of several visible GPUs each rank of a node takes its own by local rank; where a process sees
    one (``srun --gpus-per-task=1``), it is that one, and :func:`check_own_gpu` tells whether others
    see the same.

    Raises:
        UserError: fewer visible GPUs than ranks, GPUs that torch cannot use (the CPU would be taken
            silently), or one that another process holds.
    """
    said = os.environ.get("DS_ACCELERATOR", "")
    if said and asked not in ("auto", said):
        raise UserError(
            f"run.device or --device ({asked}) must be auto or DS_ACCELERATOR ({said}): unset "
            "DS_ACCELERATOR"
        )
    if "cpu" in (asked, said):
        os.environ["DS_ACCELERATOR"] = "cpu"  # for DeepSpeed and the processes started from here
        return torch.device("cpu")
    if not _usable():
        _check_no_gpu_is_meant(asked)
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    if 1 < visible < local_world:
        raise UserError(f"ranks on this node ({local_world}) must not exceed its GPUs ({visible})")
    device = torch.device("cuda", local_rank if visible > 1 else 0)
    torch.cuda.set_device(device)
    os.environ["LOCAL_RANK"] = str(device.index)  # by which DeepSpeed finds this process's GPU
    if visible > 1 or local_world == 1:  # else it may be held by this node's other ranks
        check_free(device)
    return device


def _usable() -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # _cuda_says has its words
        try:
            return torch.cuda.is_available()
        except RuntimeError:
            return False


def _check_no_gpu_is_meant(asked: str) -> None:
    """Raises UserError where this process has GPUs that torch cannot use, or one is asked for."""
    found, said = gpus.present(), os.environ.get("DS_ACCELERATOR", "")
    nothing = "asks for a GPU, and this machine shows none"
    if found:
        reason, fix = gpus.unusable(
            found,
            torch.__version__,
            torch.version.cuda or torch.version.hip,
            os.environ.get("CUDA_VISIBLE_DEVICES"),
            _cuda_says(),
        )
    elif said:
        reason, fix = f"DS_ACCELERATOR ({said}) {nothing}", "unset DS_ACCELERATOR"
    elif asked == "cuda":
        reason, fix = f"run.device or --device (cuda) {nothing}", "see nvidia-smi"
    else:
        return
    raise UserError(f"{reason}: {fix}, or say {gpus.CPU} to compute on the CPU")


def _cuda_says() -> str:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return _one_line(error)
    return "it finds no device"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def check_free(device: torch.device) -> None:
    """Raises UserError where another process holds a GPU, of which this one has nothing yet.  One
    that has just ended is given a moment to be gone.  ``DIFFMOE_SHARED_GPU`` says that sharing is
    meant.
    """
    if os.environ.get(gpus.SHARED):
        return
    deadline = time.monotonic() + _LEAVING_S
    while reason := gpus.taken(device.index, _opened(device)):
        if time.monotonic() >= deadline:
            raise UserError(f"{reason}: {gpus.FREE_ONE}")
        time.sleep(1.0)


def _opened(device: torch.device) -> tuple[str, str, int, int] | str:
    """A GPU's name, UUID, free and all bytes; CUDA's error where another process has all of it."""
    try:
        name = torch.cuda.get_device_name(device)
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        return (name, uuid, *torch.cuda.mem_get_info(device))
    except RuntimeError as error:
        return _one_line(error)


def torch_facts() -> dict[str, Any]:
    """What ``launcher doctor`` asks of torch, as JSON can hold it."""
    distributed, count = torch.distributed, torch.cuda.device_count() if _usable() else 0
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "gpus": count,
        "nccl": distributed.is_available() and distributed.is_nccl_available(),
        "gloo": distributed.is_available() and distributed.is_gloo_available(),
        "says": "" if count else _cuda_says(),
        "memory": [_opened(torch.device("cuda", i)) for i in range(count)],
    }


def share(value: Any, name: str, store: Store, rank: int, world: int) -> list[Any]:
    """Every rank's small value, which JSON can hold, by rank; before there are process groups."""
    store.set(f"{name}/{rank}", json.dumps(value))
    if rank == 0:
        everybody = [json.loads(store.get(f"{name}/{other}")) for other in range(world)]
        store.set(name, json.dumps(everybody))
    return json.loads(store.get(name))


def set_fp32_precision(precision: str) -> None:
    """How this process's GPU does fp32 matmuls and convolutions from now on: ``ieee``, ``tf32``."""
    # Not the newer torch.backends.*.fp32_precision = …, which sets the same state: after it torch
    # (2.13) refuses whoever reads allow_tf32 or get_float32_matmul_precision, as Inductor, Dynamo
    # and torch.backends.cudnn.flags do.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"


@contextlib.contextmanager
def fp32_precision(precision: str = "ieee") -> Iterator[None]:
    """:func:`set_fp32_precision` for as long as this lasts."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    set_fp32_precision(precision)
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def check_own_gpu(device: torch.device, local_rank: int, local_world: int, store: Store) -> None:
    """Raises UserError, on all ranks of a node, where two of them have the same GPU, and where
    another process holds this rank's.  The ranks of a node wait for each other; ``store`` is that
    of all ranks.
    """
    if device.type == "cpu" or local_world == 1:
        return
    node = socket.gethostname()
    store.set(f"gpu/{node}/{local_rank}", str(torch.cuda.get_device_properties(device).uuid))
    taken = {store.get(f"gpu/{node}/{rank}") for rank in range(local_world)}
    if len(taken) < local_world:
        raise UserError(
            f"ranks on this node ({local_world}) must not exceed its GPUs ({len(taken)})"
        )
    check_free(device)


def backend(device: torch.device) -> str:
    """torch.distributed's backend for the device."""
    return "nccl" if device.type == "cuda" else "gloo"


def bound(device: torch.device, world: int) -> torch.device | None:
    """``device_id`` of torch.distributed's start: NCCL connects there and then, and groups are
    split from the world's communicator.  None for one rank, which has no peer to reach, and whose
    new groups would fail (DeepSpeed #8248).
    """
    return device if device.type == "cuda" and world > 1 else None


def peak_memory_gib(device: torch.device) -> float:
    """Most memory so far, GiB: allocated by torch on a GPU, or held by this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB


@functools.cache
def peak_flops(device: torch.device) -> float:
    """FLOP/s: the data sheet's bf16 peak of a known GPU, else :func:`measured_flops` in the
    precision that training uses there, bf16 on a GPU and fp32 on a CPU.
    """
    if device.type == "cpu":
        return measured_flops(device, torch.float32, 512, 100)
    name = torch.cuda.get_device_name(device)
    for known, flops in _PEAKS.items():
        if known in name:
            return flops
    return measured_flops(device, torch.bfloat16, 8192, 20)


def measured_flops(device: torch.device, dtype: torch.dtype, size: int, tries: int) -> float:
    """FLOP/s of the fastest of ``tries`` square matmuls after a fifth as many that do not count:
    what a program can reach, below what a data sheet promises.  On a GPU take a size that fills it
    (8192: 1.1e12 FLOP, half a GB in bf16) and several tries, since clocks rise under load; on a
    shared CPU many, to find a quiet moment.
    """
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
    """``value`` on the device, for which the host does not wait: it would for ordinary memory,
    until the device has done all else that it was given.  Whoever reuses memory that is pinned
    already waits for the device first.
    """
    if device.type == "cuda" and not value.is_pinned():
        value = value.pin_memory()  # torch keeps it until the copy is done
    return value.to(device, non_blocking=True)
