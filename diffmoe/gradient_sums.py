"""Gradients of weights that are added up over a step's micro-batches by the products that make
them: fp32 += bf16 times bf16, as cuBLAS has it.

Otherwise each product's result would be written in bf16, read again and added, 10 bytes a parameter
and micro-batch, and rounded before it is added.  (Megatron-LM: gradient accumulation fusion.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula


class GradientSum:
    """Of one weight: ``total``, fp32 and of its shape, and how many ``products`` are in it, or
    ordinary gradients that were added in their place; before the first ``total`` is whatever lies
    there.
    """

    def __init__(self, total: Tensor) -> None:
        self.total, self.products = total, 0


# By the address of their total, which is all that an operator in a compiled graph is given.
_SUMS: WeakValueDictionary[int, GradientSum] = WeakValueDictionary()


def give_sum(weight: Tensor, total: Tensor) -> GradientSum:
    """From now on backward adds the weight's gradient to ``total``, wherever :func:`summed` is
    used, also ``torch.autograd.grad`` of something else that passes there.  The gradient that
    autograd then reports, to hooks as well, is memory that nobody has written to.
    """
    held = _SUMS[total.data_ptr()] = GradientSum(total.view_as(weight))
    weight.gradient_sum = held  # type: ignore[attr-defined]
    return held


_adding = True


@contextmanager
def ordinary_gradients() -> Iterator[None]:
    """Inside, sums stay as they are, and autograd reports every gradient."""
    global _adding
    before, _adding = _adding, False
    try:
        yield
    finally:
        _adding = before


def summed(product: Callable[[Tensor], Tensor], x: Tensor, weight: Tensor) -> Tensor:
    """``product(weight)``: of x [..., in] and weight [out, in], or x [e, rows, in] and weight
    [e, in, out].
    """
    held = getattr(weight, "gradient_sum", None)
    if held is None or not _adding or not torch.is_grad_enabled():
        return product(weight)
    return _Summed.apply(product(weight.detach()), x, weight, held.total)


class Linear(nn.Linear):
    """A linear layer whose weight may have a :class:`GradientSum`."""

    def forward(self, x: Tensor) -> Tensor:
        return summed(lambda weight: F.linear(x, weight, self.bias), x, self.weight)


class _Summed(torch.autograd.Function):
    """The product as it is.  Its factor x gets its gradient from the product itself."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, weight: Tensor, total: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.total = total  # which other products write to until then
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        (x,), total = ctx.saved_tensors, ctx.total
        if total.dim() == 3:
            add_product(total, x.mT, d)
        else:
            add_product(total, d.flatten(0, -2).mT, x.flatten(0, -2))
        return d, None, x.new_empty(total.shape), None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, matrices or stacks of them; of a :class:`GradientSum` the first overwrites."""
    held, stack = _SUMS[total.data_ptr()], total.dim() == 3
    held.products += 1
    how: dict[str, Any] = {"out": total}
    if a.device.type == "cuda":
        how["out_dtype"] = total.dtype
    else:  # nothing else has such a product
        a, b = a.to(total.dtype), b.to(total.dtype)
    if held.products == 1:
        (torch.bmm if stack else torch.mm)(a, b, **how)
    else:
        (torch.baddbmm if stack else torch.addmm)(total, a, b, **how)


# Not by torch.library.custom_op, with which a call takes the host 20 us in place of 5.  Products
# take any strides: without the tag a graph would copy operands into those that it traced.
_library = torch.library.Library("diffmoe", "FRAGMENT")
_library.define(
    "add_product(Tensor(a!) total, Tensor a, Tensor b) -> ()",
    tags=[torch.Tag.flexible_layout, torch.Tag.pt2_compliant_tag],
)
_library.impl("add_product", _add_product, "CompositeExplicitAutograd")
torch.library.register_fake("diffmoe::add_product", lambda total, a, b: None, lib=_library)
add_product = torch.ops.diffmoe.add_product


@register_flop_formula(torch.ops.diffmoe.add_product, get_raw=True)
def _flops(total: Tensor, a: Tensor, b: Tensor, **_: Any) -> int:
    return 2 * a.numel() * b.shape[-1]
