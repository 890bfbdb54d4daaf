"""How things are measured: medians of interleaved repeats, bytes kept, real peaks."""

from __future__ import annotations

import gc
import json
import re
import statistics
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffmoe import markdown
from diffmoe.device import backend, synchronize
from diffmoe.evaluation import plots
from diffmoe.files import write_text
from diffmoe.training.profiling import surroundings as surroundings

Passes = Mapping[Any, Callable[[], object]]


def world_of_one(device: torch.device) -> None:
    """Joins a world of one rank, if nobody has."""
    if not dist.is_initialized():
        store = Path(tempfile.mkdtemp(prefix="diffmoe-bench-")) / "store"
        dist.init_process_group(
            backend(device), init_method=f"file://{store}", rank=0, world_size=1
        )


def interleaved(
    passes: Passes, repeats: int, device: torch.device, warm_up: int = 1
) -> dict[str, float]:
    """Median seconds of each pass.  Every round runs all of them, starting with another one
    each time, so that a machine that slows down slows all alike.
    """
    names = list(passes)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-warm_up, repeats):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            gc.collect()
            synchronize(device)
            start = time.perf_counter()
            passes[name]()
            synchronize(device)
            if turn >= 0:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def kept_for_backward(forward: Callable[[], object], modules: Iterable[nn.Module]) -> int:
    """Bytes that autograd holds after ``forward``, each storage once, without weights."""
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    weights = {t.untyped_storage().data_ptr() for t in tensors}
    held: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()  # alive until counted, so that no address is used twice
    total = sum(held.values())
    del result
    return total


class Allocations(TorchDispatchMode):
    """Every storage that operations return while it lives; not what a kernel needs inside."""

    supports_higher_order_operators = True  # compiled graphs have some

    def __init__(self) -> None:
        super().__init__()
        # (number of the storage, bytes: less than 0 when it dies)
        self.events: list[tuple[int, int]] = []
        self.alive: dict[int, int] = {}  # storage's address -> number
        self._count = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """torch.compile works on while this is active."""
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and not {_storage(tensor)} & (given | self.alive.keys()):
                self._born(tensor.untyped_storage())
        return out

    def _born(self, storage: torch.UntypedStorage) -> None:
        number, address, size = self._count, storage._cdata, storage.nbytes()
        self._count += 1
        self.alive[address] = number
        self.events.append((number, size))

        def dies() -> None:
            self.alive.pop(address, None)
            self.events.append((number, -size))

        weakref.finalize(storage, dies).atexit = False

    def peak(self, without: Iterable[Tensor]) -> int:
        """The most bytes alive at once, the storages of ``without`` left out."""
        left_out = {self.alive.get(_storage(t)) for t in without}
        sizes = (0 if number in left_out else size for number, size in self.events)
        return max(accumulate(sizes, initial=0))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def peak_bytes(
    pass_: Callable[[], object], modules: Iterable[nn.Module], device: torch.device
) -> int:
    """The most bytes of activations that ``pass_`` holds at once, beyond what was there and what it
    leaves in weights' gradients.  On a CPU: the tensors that operations return; on a GPU: what the
    allocator says, gradients taken off at the peak as if all of them were there.
    """
    gc.collect()
    gradients = lambda: [p.grad for m in modules for p in m.parameters() if p.grad is not None]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        pass_()
        return torch.cuda.max_memory_allocated(device) - before - sum(g.nbytes for g in gradients())
    with Allocations() as allocations:
        pass_()
    return allocations.peak(gradients())


# Kinds of kernels and operators by their names, the first that fits; all others move memory.
_KINDS = {
    "attention": r"attention|flash|fmha|sdpa",
    "messages": r"nccl|gloo",
    "products": r"gemm|gemv|nvjet|cutlass|cublas|xmma|splitk|triton_tem|[fdw]prop|[dw]grad"
    r"|::(b?add)?b?mm$|grouped_mm|convolution|mkldnn",
}


def kind_of(kernel: str) -> str:
    """attention, messages, products or memory, by a GPU kernel's or CPU operator's name."""
    found = (kind for kind, words in _KINDS.items() if re.search(words, kernel.lower()))
    return next(found, "memory")


def traced(pass_: Callable[[], object], device: torch.device) -> list[tuple[str, float, int]]:
    """(kernel or, on a CPU, operator; ms in it alone; calls) of one pass, longest first."""
    cuda = device.type == "cuda"
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    synchronize(device)
    with profile(activities=[activity], acc_events=True) as trace:
        pass_()
        synchronize(device)
    found = []
    for e in trace.key_averages():
        # On a GPU ranges that somebody annotated stand among the kernels.
        if e.device_type == (DeviceType.CUDA if cuda else DeviceType.CPU):
            if not e.is_user_annotation:
                us = e.self_device_time_total if cuda else e.self_cpu_time_total
                found.append((e.key, us / 1e3, e.count))
    return sorted(found, key=lambda each: -each[1])


def profiles(
    passes: Passes, device: torch.device, top: int = 16
) -> tuple[dict[str, list[tuple[str, float, int]]], str]:
    """The most expensive of each pass, as :func:`traced` has them, and tables of them."""
    found, text = {}, ""
    head = ["kernel" if device.type == "cuda" else "operator", "ms", "%", "calls"]
    for name, pass_ in passes.items():
        events = traced(pass_, device)
        total = sum(ms for _, ms, _ in events)
        found[name] = [(key[:80], ms, calls) for key, ms, calls in events[:top]]
        rows = [[key, ms, 100 * ms / total, calls] for key, ms, calls in found[name]]
        text += f"\n\n{name}: {total:.4g} ms\n\n" + table(head, rows)
    return found, text


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table, aligned; floats with three digits."""
    return "\n".join(markdown.table(header, rows, ".3g", aligned=True))


def report(
    name: str, facts: dict, text: str, bars: dict[str, float], unit: str, options: Any
) -> int:
    """Prints one JSON line (``--json``) or the table, and with ``--out`` keeps both and a plot of
    ``bars`` there; returns 0.  The record comes last and complete: where it is, so is the rest.
    """
    line = json.dumps({"bench": name, **facts})
    print(line if options.json else text, flush=True)
    if options.out:
        folder = Path(options.out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.md").write_text(f"{text}\n\n`run.py bench {' '.join(sys.argv[2:])}`\n")
        if bars:
            plots.bars(bars, unit, name.replace("_", " "), folder / f"{name}.png")
        write_text(folder / f"{name}.json", line + "\n")
    return 0
