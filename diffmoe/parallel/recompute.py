"""Activation checkpointing of a block: none | block | selective | selective+attention.

Both forms keep the routing decision (the outputs of top-k), so that backward can never route a
token elsewhere than forward did, and what the host read of it, so that backward does not wait for
the device.  ``block`` computes and communicates everything else again; ``selective`` also keeps
what came over the network, so that backward does not communicate again, and the outputs of an MLP's
or expert's second layer, a third of a block's arithmetic in one width a
token: matmuls that contract.  The attention's output saves a tenth for as much memory:
``selective+attention`` is the form of as many blocks of a ``selective`` model as have room for it.

What is kept must not be written into afterwards: recompute would get it with the write in it, and
write again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from diffmoe.config import attention_kept
from diffmoe.parallel.collectives import OPERATORS

_ROUTING = [
    torch.ops.aten.topk.default,
    torch.ops.aten.sort.default,
    torch.ops.aten.sort.stable,
    torch.ops.diffmoe.read_by_host.default,
]
_ATTENTION = [
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
]
_KEPT = {
    "block": frozenset(_ROUTING),
    "selective": frozenset(_ROUTING + OPERATORS),
    "selective+attention": frozenset(_ROUTING + OPERATORS + _ATTENTION),
}
_MATMULS = {  # op -> where its left factor stands
    torch.ops.aten.mm.default: 0,
    torch.ops.aten.addmm.default: 1,
    torch.ops.aten.bmm.default: 0,
    torch.ops.aten.baddbmm.default: 1,
    torch.ops.aten._grouped_mm.default: 0,
}


def forms(recompute: str, depth: int) -> list[str]:
    """The form of each of ``depth`` blocks for ``parallel.recompute``."""
    more = attention_kept(depth) if recompute == "selective" else 0
    return ["selective+attention"] * more + [recompute] * (depth - more)


def _policy(form: str, _context: Any, op: Any, *args: Any, **_kwargs: Any) -> CheckpointPolicy:
    kept = (
        op in _KEPT[form]
        or form != "block"
        and op in _MATMULS
        and _contracts(*args[_MATMULS[op] :][:2])
    )
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _contracts(left: Tensor, right: Tensor) -> bool:
    """Whether the product is at most half as wide as its rows: many operations for each number
    kept.
    """
    return 2 * right.shape[-1] <= left.shape[-1]


# How a part between two exchanges is computed: (function, its arguments, ``ragged``: whether the
# number of rows differs from pass to pass, ``traceable``: whether it can be a graph).
Run = Callable[..., Any]


def at_once(function: Callable, *args: Any, ragged: bool = False, traceable: bool = True) -> Any:
    """``function(*args)`` as Python comes to it."""
    return function(*args)


def recomputed(block: Callable, form: str, *args: Any) -> Any:
    """``block(*args)`` whose activations backward computes again, as ``form`` says."""
    if form == "none" or not torch.is_grad_enabled():
        return block(*args)
    contexts = partial(create_selective_checkpoint_contexts, partial(_policy, form))
    # Nothing random happens inside the model, so there is no generator state to keep.
    return checkpoint(
        block, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
    )
