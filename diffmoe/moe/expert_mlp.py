"""The arithmetic of expert MLPs: rows are read where they lie, multiplied, gated and added up where they belong.

y[place_r] += gate_r * fc2_i(act(fc1_i(source[place_r])))     for every row r, of expert i

One autograd function with its backward by hand, for three reasons.  Autograd would keep the gathered rows, the activated
hidden layer, the experts' outputs and the pre-activations, 10 widths a row; here only the last two are kept (5), and backward
gathers and activates again, which is cheaper than fetching it from memory.  It would write every intermediate as one array
over all rows; here a few experts at a time pass through the same few buffers, which stay in the cache.  And activating again
and the activation's gradient are one computation.

S source rows, R rows of experts sorted by expert, D width, F inner width, e experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Iterator, Literal, Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from diffmoe.moe.recycled import Recycled

Arrangement = Literal["each", "batched", "grouped"]

_GELU_SLOPE, _GELU_CUBE = 2 * math.sqrt(2 / math.pi), 0.044715
# On a CPU: numbers of a block whose intermediates stay in the cores' caches, and of hidden layers that one core takes at once.
_CPU_BLOCK, _CPU_SMALL = 1 << 18, 1 << 19


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

    ``each``: one after another, or on a CPU as many at once as it has threads, where they have few rows (``_at_once``).  On a
    CPU at every shape that was measured (docs/results): what they pass through fits the cache.  ``batched``: one batched matmul, where counts are equal: on a
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
    """Rows ``start … end`` of expert ``index``, of some, or of all (``slice(None)``).  ``shape``: leading dimensions of its
    tensors of rows; ``ends``: where each expert ends, for the grouped matmul."""

    index: int | slice
    start: int
    end: int
    shape: tuple[int, ...]
    ends: Optional[Tensor] = None

    @property
    def all(self) -> bool:
        return self.index == slice(None)

    def gather(self, source: Tensor, place: Tensor) -> Tensor:
        return source.index_select(0, place[self.start:self.end]).view(*self.shape, source.shape[-1])

    def column(self, value_R: Tensor) -> Tensor:
        return value_R[self.start:self.end].view(*self.shape, 1)

    def times(self, x: Tensor, w: Tensor, out: Optional[Tensor] = None) -> Tensor:
        """Rows times weights, or transposed rows times rows: the weights' gradients."""
        return _times(x, w, self.ends, out)

    def first_layer(self, x: Tensor, w: Tensor, b: Optional[Tensor], out: Optional[Tensor]) -> Tensor:
        """x w + b of stacked weights."""
        return _affine(x, w[self.index], None if b is None else b[self.index], self.ends, out)

    def second_layer(self, pre: list[Tensor], weights: ExpertWeights, spare: Optional[Tensor], keep: bool) -> Tensor:
        """Activation and second layer; with ``keep`` as one operator, whose output, a new tensor, selective recompute keeps."""
        w, b = weights.second[self.index], weights.second_bias
        as_one = torch.ops.diffmoe.second_layer if keep and not torch.compiler.is_compiling() else _second_layer
        return as_one(pre, w, None if b is None else b[self.index], self.ends, spare)

    def sums(self, x: Tensor, experts: int) -> Tensor:
        """Sums over each expert's rows, as stacked biases have them."""
        if self.ends is None:
            return x.sum(-2)
        return x.new_zeros(experts, x.shape[-1]).index_add_(0, _experts(x, self.ends), x)


def _experts(x: Tensor, ends: Tensor) -> Tensor:
    """Each row's expert, in the grouped form."""
    return torch.searchsorted(ends, torch.arange(len(x), device=ends.device), right=True)


def _times(x: Tensor, w: Tensor, ends: Optional[Tensor], out: Optional[Tensor] = None) -> Tensor:
    if ends is not None:
        return F.grouped_mm(x, w, offs=ends)
    return torch.matmul(x, w) if out is None else torch.matmul(x, w, out=out)


def _affine(x: Tensor, w: Tensor, b: Optional[Tensor], ends: Optional[Tensor], out: Optional[Tensor] = None) -> Tensor:
    if b is None:
        return _times(x, w, ends, out)
    if ends is not None:
        return _times(x, w, ends) + b.index_select(0, _experts(x, ends))
    multiply, b = (torch.addmm, b) if x.dim() == 2 else (torch.baddbmm, b.unsqueeze(1))
    return multiply(b, x, w) if out is None else multiply(b, x, w, out=out)


def _second_layer(pre: list[Tensor], w: Tensor, b: Optional[Tensor], ends: Optional[Tensor], spare: Optional[Tensor]
                  ) -> Tensor:
    return _affine(_activate(pre, spare), w, b, ends)


_operators = torch.library.Library("diffmoe", "DEF")
_operators.define("second_layer(Tensor[] pre, Tensor w, Tensor? b, Tensor? ends, Tensor(a!)? spare) -> Tensor")
_operators.impl("second_layer", _second_layer, "CompositeExplicitAutograd")


def _parts(counts: int | list[int], weights: ExpertWeights, how: Arrangement, device: torch.device) -> list[_Part]:
    experts, inner, _ = weights.second.shape
    if how == "batched":
        return [_Part(slice(None), 0, counts * experts, (experts, counts))]
    if isinstance(counts, int) and (many := _at_once(experts, counts, inner, device)) > 1:
        starts = range(0, experts, many)
        return [_Part(slice(i, i + n), i * counts, (i + n) * counts, (n, counts)) for i in starts for n in [min(many, experts - i)]]
    each = [counts] * experts if isinstance(counts, int) else counts
    if how == "grouped":
        ends = torch.tensor(each).cumsum(0).to(torch.int32)
        return [_Part(slice(None), 0, sum(each), (sum(each),), ends.to(device, non_blocking=True))]
    ends = [sum(each[:i]) for i in range(experts + 1)]
    return [_Part(i, ends[i], ends[i + 1], (each[i],)) for i in range(experts)]


def _at_once(experts: int, count: int, inner: int, device: torch.device) -> int:
    """How many experts of ``count`` rows share one batched matmul.  On a CPU few rows do not occupy several cores: there
    each core takes experts of its own, all together at most a quarter of them, for the sake of memory."""
    if device.type != "cpu" or not count:
        return 1
    threads = torch.get_num_threads()
    return max(1, min((_CPU_SMALL - 1) // (count * inner), experts // (4 * threads)) * threads)


class _Buffers:
    """``number`` buffers [rows, width] that one part after another passes through; none where all pass at once."""

    def __init__(self, number: int, parts: Sequence[_Part], like: Tensor, width: int) -> None:
        rows = max(part.end - part.start for part in parts)
        self._width, self._held = width, [] if parts[0].all else [like.new_empty(rows, width) for _ in range(number)]

    def __call__(self, n: int, part: _Part) -> Optional[Tensor]:
        return self._held[n][:part.end - part.start].view(*part.shape, self._width) if self._held else None


def _forward(source: Tensor, gate: Optional[Tensor], place: Tensor, counts: int | list[int], how: Arrangement,
             weights: ExpertWeights, keep: bool) -> tuple[Tensor, list[Tensor]]:
    """The output, and with ``keep`` for each part the pre-activations of the first layers and, with a gate, the experts'
    outputs: tensors of a part, which the allocator can use again sooner than those over all rows."""
    parts = _parts(counts, weights, how, source.device)
    y = torch.zeros_like(source, dtype=source.dtype if gate is None else gate.dtype)
    kept: list[Tensor] = []
    buffers = _Buffers(1 if keep else 1 + len(weights.firsts), parts, source, weights.second.shape[1])
    for part in parts:
        x = part.gather(source, place)
        hidden = [part.first_layer(x, w, b, None if keep else buffers(1 + n, part)) for n, (w, b) in enumerate(weights.firsts)]
        if keep:
            kept += hidden
        rows = part.second_layer(hidden, weights, buffers(0, part), keep)
        if gate is not None:
            kept += [rows] * keep
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
        parts = _parts(ctx.counts, weights, ctx.how, source.device)
        buffers = _Buffers(3, parts, source, weights.second.shape[1])
        # Several experts add to one token: in the gate's precision, like the output.
        d_source = torch.zeros_like(source, dtype=source.dtype if gate is None else gate.dtype)
        d_gate = None if gate is None else torch.empty_like(gate)
        d_flat, each = _Gradients(weights, ctx.memory), len(kept) // len(parts)
        for n, part in enumerate(parts):
            of_part = kept[n * each:(n + 1) * each]
            dx, dg = _backward_part(part, source, gate, place, of_part, weights, dy, buffers, d_flat)
            d_source.index_add_(0, place[part.start:part.end], dx.flatten(0, -2).to(d_source.dtype))
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
        if part.all:
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


def _backward_part(part: _Part, source: Tensor, gate: Optional[Tensor], place: Tensor, kept: list[Tensor],
                   weights: ExpertWeights, dy: Tensor, buffers: _Buffers, gradients: _Gradients
                   ) -> tuple[Tensor, Optional[Tensor]]:
    """Gradients of one part's rows and gates; those of its weights go into ``gradients``."""
    i, experts, firsts = part.index, weights.second.shape[0], len(weights.firsts)
    x, g, d_gate = part.gather(source, place), part.gather(dy, place), None
    if gate is not None:
        d_gate = (g * kept[firsts]).sum(-1, dtype=gate.dtype)
        g = scaled(g, part.column(gate))
    u = part.times(g, weights.second[i].mT, buffers(0, part))
    a, d_pre = _activate_back(u, kept[:firsts], buffers(1, part), buffers(2, part))
    gradients.take(2 * firsts, part, (a.mT, g))
    if weights.second_bias is not None:
        gradients.take(2 * firsts + 1, part, part.sums(g, experts))
    dx = None
    for n, du in enumerate(d_pre):
        w, b = weights.firsts[n]
        gradients.take(2 * n, part, (x.mT, du))
        if b is not None:
            gradients.take(2 * n + 1, part, part.sums(du, experts))
        back = part.times(du, w[i].mT)
        dx = back if dx is None else dx.add_(back)
    return dx, d_gate


def scaled(x: Tensor, scale: Tensor) -> Tensor:
    """x * scale in x's precision, rounded once, without a copy of x in the scale's."""
    return torch.mul(x, scale, out=torch.empty_like(x))


def _activate(pre: Sequence[Tensor], out: Optional[Tensor]) -> Tensor:
    """gelu(h), or silu(g) * h."""
    if len(pre) == 1:
        return F.gelu(pre[0], approximate="tanh") if out is None else _gelu(pre[0], out)
    return (F.silu(pre[0]) if out is None else torch.ops.aten.silu.out(pre[0], out=out)).mul_(pre[1])


def _activate_back(u: Tensor, pre: Sequence[Tensor], out: Optional[Tensor], spare: Optional[Tensor]
                   ) -> tuple[Tensor, list[Tensor]]:
    """What ``_activate`` gave, and the gradients of the pre-activations for the activation's gradient ``u``, which is used
    up."""
    aten = torch.ops.aten
    if len(pre) == 2:
        a, through = _activate(pre, out), F.silu(pre[0]).mul_(u)
        u.mul_(pre[1])
        return a, [aten.silu_backward.grad_input(u, pre[0], grad_input=u), through]
    if out is not None and _by_blocks(u):
        return _gelu_back(pre[0], u, out, spare)
    return _activate(pre, out), [aten.gelu_backward.grad_input(u, pre[0], approximate="tanh", grad_input=u)]


def _by_blocks(h: Tensor) -> bool:
    """Whether tanh-GELU is taken as h / (1 + exp(-2z)), the same function as h (1 + tanh z) / 2, block by block: on a CPU in
    half the time of torch's kernel, whose tanh costs more than everything else, and its gradient in a quarter.  Not in bf16,
    where that kernel rounds once."""
    return h.device.type == "cpu" and h.dtype.itemsize >= 4


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of each, a block after another, all of about one size."""
    number = -(-tensors[0].numel() // _CPU_BLOCK) or 1
    return zip(*(t.flatten(0, -2).chunk(number) for t in tensors))


def _twice_z(h: Tensor, slope: Tensor, z: Tensor) -> Tensor:
    """2z = sqrt(8 / pi) (h + 0.044715 h^3), in ``z``."""
    return torch.addcmul(slope, h, h, value=_GELU_SLOPE * _GELU_CUBE, out=z).mul_(h)


def _gelu(h: Tensor, out: Tensor) -> Tensor:
    """tanh-GELU of the rows [..., F], in ``out``."""
    if not _by_blocks(h):
        return torch.ops.aten.gelu.out(h, approximate="tanh", out=out)
    slope = h.new_tensor(_GELU_SLOPE)
    for x, y in _blocks(h, out):
        _twice_z(x, slope, y).sigmoid_().mul_(x)
    return out


def _gelu_back(h: Tensor, u: Tensor, out: Tensor, spare: Tensor) -> tuple[Tensor, list[Tensor]]:
    """(tanh-GELU of the rows in ``out``, [its gradient times ``u``, in ``u``]).

    With s = sigmoid(2z): gelu = h s and gelu' = s + s (1 - s) h (2z)', where h (2z)' = 3 (2z) - 2 sqrt(8 / pi) h."""
    slope = h.new_tensor(_GELU_SLOPE)
    for x, v, y, z in _blocks(h, u, out, spare):
        s = torch.sigmoid(_twice_z(x, slope, z), out=y)
        inner = torch.add(x, z, alpha=-1.5 / _GELU_SLOPE, out=z)
        torch.ops.aten.sigmoid_backward.grad_input(inner, s, grad_input=inner)
        v.mul_(torch.add(s, inner, alpha=-2 * _GELU_SLOPE, out=inner))
        s.mul_(x)
    return out, [u]
