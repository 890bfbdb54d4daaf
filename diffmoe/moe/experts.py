"""The dense MLP and stacked expert MLPs.  e local experts, R rows, D width, F inner width."""

from __future__ import annotations

from typing import Literal, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffmoe.config import swiglu_hidden
from diffmoe.moe.expert_mlp import ExpertWeights, expert_mlp
from diffmoe.moe.recycled import Recycled


class Mlp(nn.Module):
    """DiT's MLP: Linear, tanh-GELU, Linear.  Dense blocks and shared experts are this."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        # As [T, D]: of more dimensions DeepSpeed's linear at ZeRO 3 adds the bias in place, into a product that selective
        # recompute keeps.
        return self.fc2(F.gelu(self.fc1(x.flatten(0, -2)), approximate="tanh")).view_as(x)


class Experts(nn.Module):
    """Experts ``first … first + local`` of ``experts``, as tensors [e, in, out] and [e, out].

    In that order the weights' gradients come out of the batched matmul contiguous; the other way round each is copied.
    GELU: fc2(gelu(fc1 x)) with biases, DiT's MLP.  SwiGLU: fc2(silu(gate x) * fc1 x) without biases."""

    def __init__(self, width: int, hidden: int, experts: int, local: int, first: int,
                 activation: Literal["gelu", "swiglu"], memory: Recycled) -> None:
        super().__init__()
        self.experts, self.first, self.local, self.activation, self.memory = experts, first, local, activation, memory
        inner = hidden if activation == "gelu" else swiglu_hidden(hidden)
        self.fc1_weight = nn.Parameter(torch.empty(local, width, inner))
        self.fc2_weight = nn.Parameter(torch.empty(local, inner, width))
        if activation == "gelu":
            self.fc1_bias = nn.Parameter(torch.empty(local, inner))
            self.fc2_bias = nn.Parameter(torch.empty(local, width))
        else:
            self.gate_weight = nn.Parameter(torch.empty(local, width, inner))

    def forward(self, source_SD: Tensor, place_R: Tensor, counts: int | list[int], gate_R: Optional[Tensor]) -> Tensor:
        """y[place_r] += gate_r * expert(source[place_r]) over rows grouped by expert, ``counts`` each or ``counts[i]`` for
        expert i: [S, D] -> [S, D].  See :mod:`diffmoe.moe.expert_mlp`."""
        return expert_mlp(source_SD, place_R, counts, gate_R, self._weights(), self.memory)

    def _weights(self) -> ExpertWeights:
        if self.activation == "gelu":
            return ExpertWeights(((self.fc1_weight, self.fc1_bias),), self.fc2_weight, self.fc2_bias)
        return ExpertWeights(((self.gate_weight, None), (self.fc1_weight, None)), self.fc2_weight, None)
