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

    ``each``: one after another, or a few at once where they have few rows (``_at_once``).  On a CPU at every shape that was
    measured (docs/results): what they pass through fits the cache.  ``batched``: one batched matmul, where counts are equal:
    on a GPU, where many small launches cost more, and when compiling, which would unroll a loop.  ``grouped``: torch's
    grouped matmul over ragged counts, where the GPU has that kernel and it is right: bf16 at compute capability 9.0.  (On 10.x
    gradients of experts without rows were garbage, pytorch issue 172439.)"""
    if isinstance(counts, int):
        return "batched" if device.type == "cuda" or torch.compiler.is_compiling() else "each"
    kernel = device.type == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) == (9, 0)
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
    """One expert, some or all of them (``index``), and their n rows.  ``place_n``, ``gate_n1``: theirs; ``weights``: of one
    expert without its dimension.  ``shape``: rows' dimensions where they meet weights; ``ends``: where each expert's rows end,
    for the grouped matmul."""

    index: int | slice
    place_n: Tensor
    gate_n1: Optional[Tensor]
    weights: ExpertWeights
    shape: tuple[int, ...]
    ends: Optional[Tensor] = None

    def gather(self, source: Tensor) -> Tensor:
        return source.index_select(0, self.place_n)

    def stacked(self, rows: Tensor) -> Tensor:
        return rows.view(*self.shape, rows.shape[-1]) if len(self.shape) > 1 else rows

    def times(self, x: Tensor, w: Tensor, out: Optional[Tensor] = None) -> Tensor:
        """Rows times weights, or transposed rows times rows: the weights' gradients."""
        return _times(x, w, self.ends, out)

    def first_layer(self, x: Tensor, w: Tensor, b: Optional[Tensor], out: Optional[Tensor]) -> Tensor:
        return _affine(self.stacked(x), w, b, self.ends, out)

    def second_layer(self, pre: list[Tensor], spare: Optional[Tensor], keep: bool) -> Tensor:
        """Activation and second layer [n, D]; with ``keep`` as one operator, whose output selective recompute keeps."""
        as_one = torch.ops.diffmoe.second_layer if keep and not torch.compiler.is_compiling() else _second_layer
        return as_one(pre, self.weights.second, self.weights.second_bias, self.ends, spare).flatten(0, -2)

    def sums(self, x: Tensor) -> Tensor:
        """Sums over each expert's rows, as stacked biases have them."""
        if self.ends is None:
            return x.sum(-2)
        # As a product, which adds up in fp32: index_add_ of bf16 rounds after every row.  8 columns, for the kernel's alignment.
        return self.times(x.new_ones(len(x), 8).mT, x)[:, 0]


def _parts(place: Tensor, gate: Optional[Tensor], counts: int | list[int], weights: ExpertWeights, how: Arrangement
           ) -> list[_Part]:
    experts, inner, _ = weights.second.shape
    gate = None if gate is None else gate.unsqueeze(1)
    if how == "grouped":
        each = [counts] * experts if isinstance(counts, int) else counts
        ends = torch.tensor(each).cumsum(0).to(torch.int32).to(place.device, non_blocking=True)
        return [_Part(slice(None), place, gate, weights, (len(place),), ends)]
    if how == "batched":
        return [_Part(slice(None), place, gate, weights, (experts, counts))]
    many = _at_once(experts, counts, inner, place.device) if isinstance(counts, int) else 1
    if many == 1:
        indices, shapes = range(experts), [(n,) for n in ([counts] * experts if isinstance(counts, int) else counts)]
    else:
        indices = [slice(i, min(i + many, experts)) for i in range(0, experts, many)]
        shapes = [(i.stop - i.start, counts) for i in indices]
    sizes = [math.prod(shape) for shape in shapes]
    split = [[None] * len(sizes) if t is None else t.unbind(0) if many == 1 else t.split(many) for t in weights.flat()]
    gates = [None] * len(sizes) if gate is None else gate.split(sizes)
    return [_Part(i, p, g, ExpertWeights.of(w), shape)
            for i, p, g, w, shape in zip(indices, place.split(sizes), gates, zip(*split), shapes)]


def _at_once(experts: int, count: int, inner: int, device: torch.device) -> int:
    """How many experts of ``count`` rows share one batched matmul.  On a CPU few rows do not occupy several cores: there
    each core takes experts of its own, all together at most a quarter of them, for the sake of memory."""
    if device.type != "cpu" or not count:
        return 1
    threads = torch.get_num_threads()
    return max(1, min((_CPU_SMALL - 1) // (count * inner), experts // (4 * threads)) * threads)


def _experts(x: Tensor, ends: Tensor) -> Tensor:
    """Each row's expert, in the grouped form."""
    return torch.searchsorted(ends, torch.arange(len(x), device=ends.device), right=True)


def _times(x: Tensor, w: Tensor, ends: Optional[Tensor], out: Optional[Tensor] = None) -> Tensor:
    if ends is not None:
        return F.grouped_mm(x, w, offs=ends)
    return torch.matmul(x, w) if out is None else torch.matmul(x, w, out=out)


def _affine(x: Tensor, w: Tensor, b: Optional[Tensor], ends: Optional[Tensor], out: Optional[Tensor] = None) -> Tensor:
    """x w + b of stacked weights."""
    if b is None:
        return _times(x, w, ends, out)
    if ends is not None:
        return _times(x, w, ends) + b.index_select(0, _experts(x, ends))
    if torch.compiler.is_compiling():
        return torch.matmul(x, w) + b.unsqueeze(-2)  # which becomes a part of the activation
    multiply, b = (torch.addmm, b) if x.dim() == 2 else (torch.baddbmm, b.unsqueeze(1))
    return multiply(b, x, w) if out is None else multiply(b, x, w, out=out)


def _second_layer(pre: list[Tensor], w: Tensor, b: Optional[Tensor], ends: Optional[Tensor], spare: Optional[Tensor]
                  ) -> Tensor:
    return _affine(_activate(pre, spare), w, b, ends)


_operators = torch.library.Library("diffmoe", "DEF")
_operators.define("second_layer(Tensor[] pre, Tensor w, Tensor? b, Tensor? ends, Tensor(a!)? spare) -> Tensor")
_operators.impl("second_layer", _second_layer, "CompositeExplicitAutograd")


class _Buffers:
    """``number`` buffers [rows, width] that one part after another passes through; none where all pass at once."""

    def __init__(self, number: int, parts: Sequence[_Part], like: Tensor, width: int) -> None:
        rows, at_once = max(len(part.place_n) for part in parts), parts[0].index == slice(None)
        self._width, self._held = width, [] if at_once else [like.new_empty(rows, width) for _ in range(number)]

    def __call__(self, n: int, part: _Part) -> Optional[Tensor]:
        return part.stacked(self._held[n][:len(part.place_n)]) if self._held else None


def _forward(source: Tensor, gate: Optional[Tensor], place: Tensor, counts: int | list[int], how: Arrangement,
             weights: ExpertWeights, keep: bool) -> tuple[Tensor, list[Tensor]]:
    """The output, and with ``keep`` for each part the pre-activations of the first layers and, with a gate, the experts'
    outputs: tensors of a part, which the allocator can use again sooner than those over all rows."""
    parts = _parts(place, gate, counts, weights, how)
    y = torch.zeros_like(source, dtype=source.dtype if gate is None else gate.dtype)
    kept: list[Tensor] = []
    buffers = _Buffers(1 if keep else 1 + len(weights.firsts), parts, source, weights.second.shape[1])
    for part in parts:
        x = part.gather(source)
        hidden = [part.first_layer(x, w, b, None if keep else buffers(1 + n, part))
                  for n, (w, b) in enumerate(part.weights.firsts)]
        if keep:
            kept += hidden
        rows = part.second_layer(hidden, buffers(0, part), keep)
        if gate is not None:
            kept += [rows] * keep
            rows = rows * part.gate_n1
        y.index_add_(0, part.place_n, rows)
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
        parts = _parts(place, gate, ctx.counts, weights, ctx.how)
        buffers = _Buffers(3, parts, source, weights.second.shape[1])
        # Several experts add to one token: in the gate's precision, like the output.
        d_source = torch.zeros_like(source, dtype=source.dtype if gate is None else gate.dtype)
        d_gates, d_flat, each = [], _Gradients(weights, ctx.memory), len(kept) // len(parts)
        for n, part in enumerate(parts):
            dx, d_gate = _backward_part(part, source, kept[n * each:(n + 1) * each], dy, buffers, d_flat)
            d_source.index_add_(0, part.place_n, dx.to(d_source.dtype))
            d_gates.append(d_gate)
        return (d_source.to(source.dtype), None if gate is None else torch.cat(d_gates), None, None, None, None,
                *d_flat.finished())


class _Gradients:
    """Gradients of stacked weights, filled part by part."""

    def __init__(self, weights: ExpertWeights, memory: Recycled) -> None:
        self._weights, self._memory = weights.flat(), memory
        self._held: list[Optional[Tensor]] = [None] * len(self._weights)

    def take(self, n: int, part: _Part, value: Tensor | tuple[Tensor, Tensor]) -> None:
        """The gradient of tensor ``n``: given, or the product of two matrices, written in its place."""
        if part.index == slice(None):
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


def _backward_part(part: _Part, source: Tensor, kept: list[Tensor], dy: Tensor, buffers: _Buffers, gradients: _Gradients
                   ) -> tuple[Tensor, Optional[Tensor]]:
    """Gradients of one part's rows [n, D] and gates [n]; those of its weights go into ``gradients``."""
    weights, firsts = part.weights, len(part.weights.firsts)
    x, g, d_gate = part.stacked(part.gather(source)), part.gather(dy), None
    if part.gate_n1 is not None:
        d_gate = (g * kept[firsts]).sum(-1, dtype=part.gate_n1.dtype)
        g = scaled(g, part.gate_n1)
    g = part.stacked(g)
    u = part.times(g, weights.second.mT, buffers(0, part))
    a, d_pre = _activate_back(u, kept[:firsts], buffers(1, part), buffers(2, part))
    gradients.take(2 * firsts, part, (a.mT, g))
    if weights.second_bias is not None:
        gradients.take(2 * firsts + 1, part, part.sums(g))
    dx = None
    for n, du in enumerate(d_pre):
        w, b = weights.firsts[n]
        gradients.take(2 * n, part, (x.mT, du))
        if b is not None:
            gradients.take(2 * n + 1, part, part.sums(du))
        back = part.times(du, w.mT)
        dx = back if dx is None else dx.add_(back)
    return dx.flatten(0, -2), d_gate


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
