"""The arithmetic of expert MLPs: rows are read where they lie, multiplied, gated and added up where they belong.

y[place_r] += gate_r * fc2_i(act(fc1_i(source[place_r])))     for every row r, of expert i

One autograd function with its backward by hand, for three reasons.  Autograd would keep the gathered rows, the activated
hidden layer and the experts' outputs, 6 widths a row; here only the pre-activations are kept (4), and backward gathers and
activates again, which is cheaper than fetching it from memory.  It would write every intermediate as one array over all
rows; here one expert at a time passes through the same few buffers, which stay in the cache.  And the gate's gradient,
dy . fc2(a), is taken as (dy W2^T) . a + dy . b2, whose first factor backward needs anyway, so outputs are not kept.

S source rows, R rows of experts sorted by expert, D width, F inner width, e experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from diffmoe.moe.recycled import Recycled

Arrangement = Literal["each", "batched", "grouped"]

_GELU_SLOPE, _GELU_CUBE = 2 * math.sqrt(2 / math.pi), 0.044715
_CPU_BLOCK = 1 << 18  # numbers of a block whose intermediates stay in the cores' caches


@dataclass(frozen=True)
class ExpertWeights:
    """Stacked weights [e, in, out] and biases [e, out].  ``firsts``: fc1, or for SwiGLU its gate and fc1."""

    firsts: tuple[tuple[Tensor, Optional[Tensor]], ...]
    second: Tensor
    second_bias: Optional[Tensor]

    def flat(self) -> list[Optional[Tensor]]:
        return [t for pair in self.firsts for t in pair] + [self.second, self.second_bias]

    @staticmethod
    def of(flat: Any) -> ExpertWeights:
        *firsts, second, second_bias = flat
        return ExpertWeights(tuple(zip(firsts[::2], firsts[1::2])), second, second_bias)


def arrangement(device: torch.device, dtype: torch.dtype, counts: int | list[int]) -> Arrangement:
    """How the matmuls of all experts are laid out.

    ``each``: one after another.  On a CPU at every shape that was measured (docs/results): an expert's rows and their hidden
    layer fit the cache, and its matmul fills all cores alone.  ``batched``: one batched matmul, where counts are equal: on a
    GPU, where many small launches cost more, and when compiling, which would unroll a loop.  ``grouped``: torch's grouped
    matmul over ragged counts, where the GPU has that kernel (bf16 from compute capability 9.0)."""
    if isinstance(counts, int):
        return "batched" if device.type == "cuda" or torch.compiler.is_compiling() else "each"
    kernel = device.type == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) >= (9, 0)
    return "grouped" if kernel else "each"


def expert_mlp(source_SD: Tensor, place_R: Tensor, counts: int | list[int], gate_R: Optional[Tensor], weights: ExpertWeights,
               memory: Recycled, how: Optional[Arrangement] = None) -> Tensor:
    """[S, D] -> [S, D], a source row that no row names becoming zero.  ``counts``: rows of each expert, or of all alike.

    With a gate rows add up in the gate's precision; without one ``place_R`` must name every row once.  An expert without
    rows gets a gradient of zeros, so that it exists on every rank.  ``memory``: where the weights' gradients come from."""
    how = how or arrangement(source_SD.device, source_SD.dtype, counts)
    if not torch.is_grad_enabled():
        return _forward(source_SD, gate_R, place_R, counts, how, weights, keep=False)[0]
    return _ExpertMlp.apply(source_SD, gate_R, place_R, counts, how, memory, *weights.flat())


@dataclass(frozen=True)
class _Part:
    """Rows ``start … end`` of expert ``index``, or of all experts (``slice(None)``).  ``shape``: leading dimensions of its
    tensors of rows; ``ends``: where each expert ends, for the grouped matmul."""

    index: int | slice
    start: int
    end: int
    shape: tuple[int, ...]
    ends: Optional[Tensor] = None

    def gather(self, source: Tensor, place: Tensor) -> Tensor:
        return source.index_select(0, place[self.start:self.end]).view(*self.shape, source.shape[-1])

    def column(self, value_R: Tensor) -> Tensor:
        return value_R[self.start:self.end].view(*self.shape, 1)

    def times(self, x: Tensor, w: Tensor, out: Optional[Tensor] = None) -> Tensor:
        """Rows times weights, or transposed rows times rows: the weights' gradients."""
        if self.ends is not None:
            return F.grouped_mm(x, w, offs=self.ends)
        return torch.matmul(x, w) if out is None else torch.matmul(x, w, out=out)

    def affine(self, x: Tensor, w: Tensor, b: Optional[Tensor], out: Optional[Tensor] = None) -> Tensor:
        """x w + b of stacked weights."""
        w = w[self.index]
        if b is None:
            return self.times(x, w, out)
        if self.ends is not None:
            return self.times(x, w) + b.index_select(0, self.expert())
        multiply, b = (torch.addmm, b[self.index]) if x.dim() == 2 else (torch.baddbmm, b.unsqueeze(1))
        return multiply(b, x, w) if out is None else multiply(b, x, w, out=out)

    def sums(self, x: Tensor, experts: int) -> Tensor:
        """Sums over each expert's rows, as stacked biases have them."""
        if self.ends is None:
            return x.sum(-2)
        return x.new_zeros(experts, x.shape[-1]).index_add_(0, self.expert(), x)

    def weighted_sums(self, weight: Tensor, x: Tensor, experts: int) -> Tensor:
        """The same, each row times its weight."""
        if self.ends is None:
            return (weight.to(x.dtype).mT @ x).squeeze(-2)
        return self.sums((x * weight).to(x.dtype), experts)

    def dot(self, x: Tensor, b: Tensor) -> Tensor:
        """Each row's product with its expert's vector."""
        if self.ends is None:
            return (x @ b[self.index].unsqueeze(-1)).squeeze(-1)
        return (x * b.index_select(0, self.expert())).sum(-1)

    def expert(self) -> Tensor:
        """Each row's expert, in the grouped form."""
        return torch.searchsorted(self.ends, torch.arange(self.end, device=self.ends.device), right=True)


def _parts(counts: int | list[int], experts: int, how: Arrangement, device: torch.device) -> list[_Part]:
    if how == "batched":
        return [_Part(slice(None), 0, counts * experts, (experts, counts))]
    each = [counts] * experts if isinstance(counts, int) else counts
    if how == "grouped":
        ends = torch.tensor(each).cumsum(0).to(torch.int32)
        return [_Part(slice(None), 0, sum(each), (sum(each),), ends.to(device, non_blocking=True))]
    ends = [sum(each[:i]) for i in range(experts + 1)]
    return [_Part(i, ends[i], ends[i + 1], (each[i],)) for i in range(experts)]


class _Buffers:
    """``number`` buffers [rows, width] that one expert after another passes through; none where all pass at once."""

    def __init__(self, number: int, parts: Sequence[_Part], like: Tensor, width: int) -> None:
        rows = max(part.end - part.start for part in parts)
        self._held = [like.new_empty(rows, width) for _ in range(number)] if isinstance(parts[0].index, int) else []

    def __call__(self, n: int, part: _Part) -> Optional[Tensor]:
        return self._held[n][:part.end - part.start] if self._held else None


def _forward(source: Tensor, gate: Optional[Tensor], place: Tensor, counts: int | list[int], how: Arrangement,
             weights: ExpertWeights, keep: bool) -> tuple[Tensor, list[Tensor]]:
    """The output, and with ``keep`` each part's pre-activations of the first layers: a tensor a part, which the allocator
    can use again sooner than one over all rows."""
    parts = _parts(counts, weights.second.shape[0], how, source.device)
    y = torch.zeros_like(source, dtype=source.dtype if gate is None else gate.dtype)
    kept: list[Tensor] = []
    buffers = _Buffers(1 if keep else 1 + len(weights.firsts), parts, source, weights.second.shape[1])
    for part in parts:
        x = part.gather(source, place)
        hidden = [part.affine(x, w, b, None if keep else buffers(1 + n, part)) for n, (w, b) in enumerate(weights.firsts)]
        if keep:
            kept += hidden
        # A new tensor: selective recompute may keep it.
        rows = part.affine(_activate(hidden, buffers(0, part)), weights.second, weights.second_bias)
        if gate is not None:
            rows = rows * part.column(gate)
        y.index_add_(0, place[part.start:part.end], rows.flatten(0, -2))
    return y.to(source.dtype), kept


class _ExpertMlp(torch.autograd.Function):
    """See the module's docstring."""

    @staticmethod
    def forward(ctx, source, gate, place, counts, how, memory, *flat):
        y, kept = _forward(source, gate, place, counts, how, ExpertWeights.of(flat), keep=True)
        ctx.save_for_backward(source, gate, place, *flat, *kept)
        ctx.counts, ctx.how, ctx.memory, ctx.flat = counts, how, memory, len(flat)
        return y

    @staticmethod
    def backward(ctx, dy):
        source, gate, place, *rest = ctx.saved_tensors
        weights, kept = ExpertWeights.of(rest[:ctx.flat]), rest[ctx.flat:]
        experts, inner, _ = weights.second.shape
        parts = _parts(ctx.counts, experts, ctx.how, source.device)
        buffers = _Buffers(3, parts, source, inner)
        # Several experts add to one token: in the gate's precision, like the output.
        d_source = torch.zeros_like(source, dtype=source.dtype if gate is None else gate.dtype)
        d_gate = None if gate is None else torch.empty_like(gate)
        d_flat, firsts = _Gradients(weights, ctx.memory), len(weights.firsts)
        for n, part in enumerate(parts):
            pre = kept[n * firsts:(n + 1) * firsts]
            dx, dg = _backward_part(part, source, gate, place, pre, weights, dy, buffers, d_flat)
            d_source.index_add_(0, place[part.start:part.end], dx.flatten(0, -2))
            if gate is not None:
                d_gate[part.start:part.end] = dg.flatten()
        return d_source.to(source.dtype), d_gate, None, None, None, None, *d_flat.finished()


class _Gradients:
    """Gradients of stacked weights, filled part by part."""

    def __init__(self, weights: ExpertWeights, memory: Recycled) -> None:
        self._weights, self._memory = weights.flat(), memory
        self._held: list[Optional[Tensor]] = [None] * len(self._weights)

    def take(self, n: int, part: _Part, value: Tensor | tuple[Tensor, Tensor]) -> None:
        """The gradient of tensor ``n``: given, or the product of two matrices, written in its place."""
        if isinstance(part.index, slice):
            self._held[n] = part.times(*value) if isinstance(value, tuple) else value
            return
        if self._held[n] is None:
            self._held[n] = self._memory.empty_like(self._weights[n])
        if isinstance(value, tuple):
            part.times(*value, out=self._held[n][part.index])
        else:
            self._held[n][part.index] = value

    def finished(self) -> list[Optional[Tensor]]:
        return self._held


def _backward_part(part: _Part, source: Tensor, gate: Optional[Tensor], place: Tensor, pre: list[Tensor],
                   weights: ExpertWeights, dy: Tensor, buffers: _Buffers, gradients: _Gradients
                   ) -> tuple[Tensor, Optional[Tensor]]:
    """Gradients of one part's rows and gates; those of its weights go into ``gradients``."""
    i, experts, seconds = part.index, weights.second.shape[0], 2 * len(weights.firsts)
    x, g = part.gather(source, place), part.gather(dy, place)
    a = _activate(pre, buffers(0, part))
    u = part.times(g, weights.second[i].mT, buffers(1, part))
    d_gate = None
    if gate is not None:
        d_gate = torch.mul(u, a, out=buffers(2, part)).sum(-1, dtype=gate.dtype)
        if weights.second_bias is not None:
            d_gate += part.dot(g, weights.second_bias)
        # Rows are scaled where they are D wide, not F: x for fc1's gradient, dy for fc2's, dx at the end.
        scale = part.column(gate)
        x, g = scaled(x, scale), scaled(g, scale)
    gradients.take(seconds, part, (a.mT, g))
    if weights.second_bias is not None:
        gradients.take(seconds + 1, part, part.sums(g, experts))
    dx = None
    for n, du in enumerate(_activation_gradients(u, pre, a)):
        w, b = weights.firsts[n]
        gradients.take(2 * n, part, (x.mT, du))
        if b is not None:
            sums = part.sums(du, experts) if gate is None else part.weighted_sums(scale, du, experts)
            gradients.take(2 * n + 1, part, sums)
        back = part.times(du, w[i].mT)
        dx = back if dx is None else dx.add_(back)
    return (dx if gate is None else dx * part.column(gate)), d_gate


def scaled(x: Tensor, scale: Tensor) -> Tensor:
    """x * scale in x's precision, rounded once, without a copy of x in the scale's."""
    return torch.mul(x, scale, out=torch.empty_like(x))


def _activate(pre: Sequence[Tensor], out: Optional[Tensor]) -> Tensor:
    """gelu(h), or silu(g) * h."""
    if len(pre) == 1:
        return F.gelu(pre[0], approximate="tanh") if out is None else _gelu(pre[0], out)
    return (F.silu(pre[0]) if out is None else torch.ops.aten.silu.out(pre[0], out=out)).mul_(pre[1])


def _gelu(h: Tensor, out: Tensor) -> Tensor:
    """tanh-GELU of the rows [R, F], in ``out``.  On a CPU as h / (1 + exp(-2z)), the same function as h (1 + tanh z) / 2, in
    blocks: in half the time of torch's kernel, whose tanh costs more than everything else.  Not in bf16, where that kernel
    rounds once."""
    if h.device.type != "cpu" or h.dtype.itemsize < 4:
        return torch.ops.aten.gelu.out(h, approximate="tanh", out=out)
    slope = h.new_tensor(_GELU_SLOPE)
    rows = max(1, _CPU_BLOCK // h.shape[1])
    for x, y in zip(h.split(rows), out.split(rows)):
        torch.addcmul(slope, x, x, value=_GELU_SLOPE * _GELU_CUBE, out=y).mul_(x).sigmoid_().mul_(x)
    return out


def _activation_gradients(u: Tensor, pre: Sequence[Tensor], a: Tensor) -> list[Tensor]:
    """Gradients of the pre-activations for the activation's gradient ``u``, which is used up, as is ``a``."""
    aten = torch.ops.aten
    if len(pre) == 1:
        return [aten.gelu_backward.grad_input(u, pre[0], approximate="tanh", grad_input=u)]
    through = F.silu(pre[0]).mul_(u)
    u.mul_(pre[1])
    return [aten.silu_backward.grad_input(u, pre[0], grad_input=u), through]
