"""The dense MLP and stacked expert MLPs.  e local experts, R rows, D width, F inner width."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffmoe.config import swiglu_hidden


class Mlp(nn.Module):
    """DiT's MLP: Linear, tanh-GELU, Linear.  Dense blocks and shared experts are this."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Experts(nn.Module):
    """Experts ``first … first + local`` of ``experts``, as tensors [e, in, out] and [e, out].

    In that order the weights' gradients come out of the batched matmul contiguous; the other way round each is copied.
    GELU: fc2(gelu(fc1 x)) with biases, DiT's MLP.  SwiGLU: fc2(silu(gate x) * fc1 x) without biases."""

    def __init__(self, width: int, hidden: int, experts: int, local: int, first: int,
                 activation: Literal["gelu", "swiglu"]) -> None:
        super().__init__()
        self.experts, self.first, self.local, self.activation = experts, first, local, activation
        inner = hidden if activation == "gelu" else swiglu_hidden(hidden)
        self.fc1_weight = nn.Parameter(torch.empty(local, width, inner))
        self.fc2_weight = nn.Parameter(torch.empty(local, inner, width))
        if activation == "gelu":
            self.fc1_bias = nn.Parameter(torch.empty(local, inner))
            self.fc2_bias = nn.Parameter(torch.empty(local, width))
        else:
            self.gate_weight = nn.Parameter(torch.empty(local, width, inner))

    def forward(self, rows_RD: Tensor, counts: int | list[int]) -> Tensor:
        """Rows grouped by expert: ``counts`` each (one batched matmul), or ``counts[i]`` for expert i (one after
        another; an expert without rows still takes part, so that its gradient exists on every rank)."""
        if isinstance(counts, int):
            grouped = rows_RD.view(self.local, counts, rows_RD.shape[1])
            return self._batched(grouped).view(rows_RD.shape)
        parts = rows_RD.split(counts)
        return torch.cat([self._one(i, part) for i, part in enumerate(parts)])

    def _batched(self, x: Tensor) -> Tensor:
        if self.activation == "gelu":
            h = F.gelu(torch.baddbmm(self.fc1_bias.unsqueeze(1), x, self.fc1_weight), approximate="tanh")
            return torch.baddbmm(self.fc2_bias.unsqueeze(1), h, self.fc2_weight)
        h = F.silu(torch.bmm(x, self.gate_weight)) * torch.bmm(x, self.fc1_weight)
        return torch.bmm(h, self.fc2_weight)

    def _one(self, i: int, x: Tensor) -> Tensor:
        if self.activation == "gelu":
            h = F.gelu(torch.addmm(self.fc1_bias[i], x, self.fc1_weight[i]), approximate="tanh")
            return torch.addmm(self.fc2_bias[i], h, self.fc2_weight[i])
        h = F.silu(x @ self.gate_weight[i]) * (x @ self.fc1_weight[i])
        return h @ self.fc2_weight[i]
