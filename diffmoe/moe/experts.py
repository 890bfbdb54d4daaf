"""Experts as stacked MLPs over rows grouped by expert.  e local experts, R rows, D width, F inner
width.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffmoe.config import inner_width
from diffmoe.gradient_sums import summed
from diffmoe.parallel.collectives import read_by_host


class Experts(nn.Module):
    """Experts ``first … first + local`` of ``experts``, as tensors [e, in, out] and [e, out].

    In that order the weights' gradients come out of the batched matmul contiguous; the other way
    round each is copied.
    GELU: fc2(gelu(fc1 x)) with biases, DiT's MLP.  SwiGLU: fc2(silu(gate x) * fc1 x) without
    biases.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        experts: int,
        local: int,
        first: int,
        activation: Literal["gelu", "swiglu"],
    ) -> None:
        super().__init__()
        self.experts, self.first, self.local, self.activation = experts, first, local, activation
        inner = inner_width(hidden, activation)
        self.fc1_weight = nn.Parameter(torch.empty(local, width, inner))
        self.fc2_weight = nn.Parameter(torch.empty(local, inner, width))
        gelu = activation == "gelu"
        self.fc1_bias = nn.Parameter(torch.empty(local, inner)) if gelu else None
        self.fc2_bias = nn.Parameter(torch.empty(local, width)) if gelu else None
        self.gate_weight = None if gelu else nn.Parameter(torch.empty(local, width, inner))

    def forward(self, rows_RD: Tensor, counts: int | Tensor) -> Tensor:
        """Every row through its expert, [R, D] -> [R, D].  ``counts``: rows of each expert [e], or
        of all alike.

        Equal counts are one batched matmul a layer; ragged ones torch's grouped matmul or, where
        that is missing, a loop, for which the host reads them.  An expert without rows gets a
        gradient of zeros, so that it exists on every rank.
        """
        weights = self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias, self.gate_weight
        if isinstance(counts, int):
            rows_eRD = rows_RD.view(self.local, counts, rows_RD.shape[1])
            return _mlp(rows_eRD, _affine, *weights).flatten(0, 1)
        if has_grouped_matmul(rows_RD.device, rows_RD.dtype):
            ends_e = counts.cumsum(0, dtype=torch.int32)
            return _mlp(rows_RD, partial(_grouped_affine, ends_e=ends_e), *weights)
        if rows_RD.device.type == "cuda":  # Python says it once
            warnings.warn(
                "experts with unequal numbers of rows run in a loop: no grouped matmul here for "
                f"{rows_RD.dtype}"
            )
        each = zip(*([None] * self.local if t is None else t.unbind(0) for t in weights))
        parts = rows_RD.split(read_by_host(counts))
        return torch.cat([_mlp(x, _affine, *tensors) for x, tensors in zip(parts, each)])


def has_grouped_matmul(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device has a kernel for torch's grouped matmul that is right: bf16 at compute
    capability 9.0.

    (On 10.x gradients of experts without rows were garbage, pytorch issue 172439.)"""
    right = device.type == "cuda" and dtype == torch.bfloat16
    return right and torch.cuda.get_device_capability(device) == (9, 0)


def _mlp(
    x: Tensor,
    affine: Callable[..., Tensor],
    fc1: Tensor,
    fc1_bias: Tensor | None,
    fc2: Tensor,
    fc2_bias: Tensor | None,
    gate: Tensor | None,
) -> Tensor:
    h = affine(x, fc1, fc1_bias)
    a = F.gelu(h, approximate="tanh") if gate is None else F.silu(affine(x, gate, None)) * h
    return affine(a, fc2, fc2_bias)


def _affine(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """x w + b of one expert, or of all with equally many rows."""
    if b is None:
        return summed(partial(torch.matmul, x), x, w)
    if x.dim() == 2:
        return torch.addmm(b, x, w)
    if torch.compiler.is_compiling():  # becomes part of the activation; eager it would be a pass
        return summed(partial(torch.matmul, x), x, w) + b.unsqueeze(1)
    return summed(partial(torch.baddbmm, b.unsqueeze(1), x), x, w)


def _grouped_affine(x_RI: Tensor, w_eIO: Tensor, b_eO: Tensor | None, ends_e: Tensor) -> Tensor:
    """x w + b of rows that end at ``ends_e`` of each expert."""
    y = F.grouped_mm(x_RI, w_eIO, offs=ends_e)
    if b_eO is None:
        return y
    # The bias as a product with a one, whose gradient adds up in fp32: that of an index rounds to
    # bf16 after every row. 8 columns, for the kernel's alignment.
    ones = x_RI.new_ones(len(x_RI), 8)
    return y + F.grouped_mm(ones, F.pad(b_eO.unsqueeze(1), (0, 0, 0, 7)), offs=ends_e)
