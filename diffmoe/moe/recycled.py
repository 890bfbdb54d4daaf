"""Memory of large tensors on a CPU that come anew with every step."""

from __future__ import annotations

import mmap
import weakref

import numpy as np
import torch
from torch import Tensor

# Bytes from which glibc's malloc asks the system every time: fresh pages cost 0.3 ms/MB, six times what writing to them does.
# Of a mixture's training pass that is a twentieth at 1,024 rows an expert, a fifth at 256.
LARGE = 32 << 20


class Recycled:
    """Hands out large tensors on a CPU in memory that earlier ones have left; others come from torch.

    Made for gradients of stacked experts: few sizes, each as often as it is ever alive at once.  The memory stays with this
    object; its tensors keep it as long as they live, and nothing is handed out twice."""

    def __init__(self) -> None:
        self._left: dict[int, list[mmap.mmap]] = {}

    def empty_like(self, like: Tensor) -> Tensor:
        """Contiguous, with whatever values."""
        if like.device.type != "cpu" or like.nbytes < LARGE or torch.compiler.is_compiling():
            return torch.empty_like(like, memory_format=torch.contiguous_format)
        left = self._left.setdefault(like.nbytes, [])
        memory = left.pop() if left else mmap.mmap(-1, like.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # The tensor's storage holds this view of the memory, and lets it go when it ends, however many tensors shared it.
        view = np.frombuffer(memory, np.uint8)
        weakref.finalize(view, left.append, memory).atexit = False
        return torch.frombuffer(view, dtype=like.dtype).view(like.shape)

    def __reduce__(self) -> tuple:
        return Recycled, ()  # a copy of a model begins with none
