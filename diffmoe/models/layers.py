"""The transformer's parts: attention, MLP, embeddings, final layer.  Shapes: B samples, N tokens, D
width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffmoe.config import ModelConfig, inner_width
from diffmoe.gradient_sums import Linear, summed


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN: x [B, N, D], shift and scale [B, D]."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def adaln(width: int, parts: int) -> nn.Sequential:
    """SiLU of the condition [B, D] -> shifts, scales and gates, ``parts`` D wide together.

    The linear layer is number 1, as in DiT's files, where SiLU comes before it: the model computes
    that once.
    """
    return nn.Sequential(nn.Identity(), Linear(width, parts * width))


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """``layer(x)``, x [B, N, D] or [T, D]; compiled in fp32, and to be rounded by the pass that it
    becomes part of.

    Inductor then adds the bias there, and sums its gradient sample by sample where that is made.
    One sum over all tokens would be a pass of its own: 5 % of the elementwise traffic of L-E16
    (counted by Inductor's scheduler, bf16, 64 samples).
    """
    if layer.bias is None or not torch.compiler.is_compiling():
        return layer(x)
    bias = layer.bias.to(torch.promote_types(x.dtype, torch.float32))
    y = summed(lambda weight: F.linear(x, weight), x, layer.weight)
    return y + (bias if x.dim() == 2 else bias.expand(len(x), 1, len(bias)))


def norm(model: ModelConfig, width: int, learned: bool = False) -> nn.Module:
    """``model.norm`` over the last ``width`` channels; LayerNorm has a weight and a bias where they
    are ``learned``, RMSNorm always its weight.
    """
    if model.norm == "rms":
        return nn.RMSNorm(width, eps=1e-6)
    return nn.LayerNorm(width, elementwise_affine=learned, eps=1e-6)


class Attention(nn.Module):
    """Multi-head self-attention over [B, N, D] with torch's fused kernels; ``model.qk_norm``
    normalises each head's q and k, and ``model.positions`` may rotate them.
    """

    turns: Tensor | None

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        width, head = model.width, model.width // model.heads
        self.heads = model.heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)
        self.q_norm = norm(model, head, learned=True) if model.qk_norm else nn.Identity()
        self.k_norm = norm(model, head, learned=True) if model.qk_norm else nn.Identity()
        turns = None
        if model.positions == "rope":
            side = model.input_size // model.patch
            turns = rotary_turns(head, side, model.position_scale).unsqueeze(2)
        self.register_buffer("turns", turns, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        B, N, D = x.shape
        # Taken apart where they lie, so that their gradients are put together in the order of qkv's
        # output, without another copy.
        q, k, v = (
            part.transpose(1, 2)
            for part in self.qkv(x).view(B, N, 3, self.heads, D // self.heads).unbind(2)
        )
        q, k = self.q_norm(q), self.k_norm(k)
        if self.turns is not None:
            # Token by token in memory: as q lies, so does the result, which proj then takes as is.
            q, k = (rotated(part.transpose(1, 2), self.turns).transpose(1, 2) for part in (q, k))
        y = F.scaled_dot_product_attention(q, k, v)
        return linear(self.proj, y.transpose(1, 2).reshape(B, N, D)).to(x.dtype)


class Mlp(nn.Module):
    """DiT's MLP: Linear, tanh-GELU, Linear; or SwiGLU, fc2(silu(gate x) * fc1 x), without biases as
    experts have it, or with.  Dense blocks and shared experts are this.
    """

    def __init__(self, width: int, hidden: int, activation: str = "gelu") -> None:
        super().__init__()
        inner, bias = inner_width(hidden, activation), activation != "swiglu"
        self.fc1 = Linear(width, inner, bias)
        self.fc2 = Linear(inner, width, bias)
        self.gate = None if activation == "gelu" else Linear(width, inner, bias)

    def forward(self, x: Tensor) -> Tensor:
        # As [T, D]: of more dimensions DeepSpeed's linear at ZeRO 3 adds the bias in place, into a
        # product that selective recompute keeps.
        rows = x if torch.compiler.is_compiling() else x.flatten(0, -2)
        if self.gate is not None:
            inner = F.silu(linear(self.gate, rows)) * linear(self.fc1, rows)
        else:
            inner = F.gelu(linear(self.fc1, rows), approximate="tanh")
        return linear(self.fc2, inner.to(x.dtype)).to(x.dtype).view_as(x)


class PatchEmbedding(nn.Module):
    """[B, C, H, W] -> [B, N, D], patches in row order."""

    def __init__(self, channels: int, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        # Contiguous, as then is every sum down the residual stream: norms would copy each of them,
        # and Inductor's kernels on a CPU (torch 2.13) give wrong gradients for transposed ones.
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()


class WideLinear(nn.Linear):
    """A linear layer of few rows, fp32 at least in and out, whatever its parameters and
    ``run.fp32_precision`` are.
    """

    def forward(self, x: Tensor) -> Tensor:
        # fp32 may mean TF32 on CUDA; fp64 does not.
        dtype = torch.float64 if x.device.type == "cuda" else x.dtype
        return F.linear(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype)).to(x.dtype)


class TimestepEmbedding(nn.Module):
    """t [B] -> [B, D], in fp32 at least: 256 sines and cosines (ADM ``timestep_embedding``), then
    Linear, SiLU, Linear.

    bf16 would mix up neighbouring times: with t in [0, 1] a sampler's step moves the result by less
    than its rounding.
    """

    frequencies = 256

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            WideLinear(self.frequencies, width), nn.SiLU(), WideLinear(width, width)
        )

    def forward(self, t: Tensor) -> Tensor:
        half = self.frequencies // 2
        t = t.to(torch.promote_types(t.dtype, torch.float32))
        rates = torch.exp(
            -math.log(10000) * torch.arange(half, dtype=t.dtype, device=t.device) / half
        )
        angles = t[:, None] * rates
        waves = torch.cat([angles.cos(), angles.sin()], dim=1)
        weight = next(self.mlp.parameters())
        return self.mlp(waves.to(torch.promote_types(weight.dtype, t.dtype)))


class LabelEmbedding(nn.Module):
    """y [B] -> [B, D]; row ``classes`` is the null class of classifier-free guidance."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class FinalLayer(nn.Module):
    """adaLN, then D -> patch * patch * out_channels per token."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        width = model.width
        self.norm = norm(model, width)
        self.linear = Linear(width, model.patch**2 * model.out_channels)
        self.adaLN_modulation = adaln(width, 2)

    def forward(self, x: Tensor, silu_BD: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(silu_BD).chunk(2, dim=1)
        return self.linear(modulate(self.norm(x), shift, scale))


def _angles(width: int, side: int, scale: float) -> tuple[Tensor, Tensor]:
    """Of every token's row and of its column, fp64 [side * side, width / 4] each: ``scale`` times
    the place times the rates 10000^(-4 i / width).
    """
    rates = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    places = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    row, column = (scale * place.reshape(-1, 1).double() * rates for place in places)
    return row, column


def sine_positions(width: int, side: int, scale: float = 1.0) -> Tensor:
    """Fixed 2-d sine-cosine positions [side * side, width] (MAE ``get_2d_sincos_pos_embed``): the
    first half of the channels codes the column, the second the row.  Computed in fp64, returned in
    fp32.
    """
    row, column = _angles(width, side, scale)
    return torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=1).float()


def rotary_turns(width: int, side: int, scale: float = 1.0) -> Tensor:
    """Cosines and sines [2, side * side, width / 2] by which a head of ``width`` channels turns its
    pairs: the first half of them by the token's row, the second by its column.  In fp32.
    """
    angles = torch.cat(_angles(width, side, scale), dim=1)
    return torch.stack([angles.cos(), angles.sin()]).float()


def rotated(x: Tensor, turns: Tensor) -> Tensor:
    """Channels 2 i and 2 i + 1 of x [..., d] turned as a pair by ``turns`` [2, ..., d / 2], which
    broadcast (RoFormer, equation 34), in fp32 at least and rounded once.
    """
    (a, b), (cos, sin) = x.unflatten(-1, (-1, 2)).unbind(-1), turns
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)
