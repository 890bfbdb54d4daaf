"""Activation checkpointing of a block: none | block | selective.

Both forms keep the routing decision (the outputs of top-k), so that backward can never route a token elsewhere than
forward did.  ``block`` computes and communicates everything else again; ``selective`` also keeps what came over the
network and the attention outputs, so that backward neither re-routes nor re-communicates.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Callable

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

_ROUTING = [torch.ops.aten.topk.default, torch.ops.aten.sort.default, torch.ops.aten.sort.stable]
_EXPENSIVE = [
    torch.ops._c10d_functional.all_to_all_single.default,
    torch.ops._c10d_functional.all_gather_into_tensor.default,
    torch.ops._c10d_functional.all_reduce.default,
    torch.ops._c10d_functional.wait_tensor.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
]
_KEPT = {"block": frozenset(_ROUTING), "selective": frozenset(_ROUTING + _EXPENSIVE)}


def _policy(kept: frozenset, _context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE


def recomputed(block: Callable, mode: str, *args: Any) -> Any:
    """``block(*args)`` whose activations backward computes again, as ``mode`` says."""
    if mode == "none" or not torch.is_grad_enabled():
        return block(*args)
    contexts = partial(create_selective_checkpoint_contexts, partial(_policy, _KEPT[mode]))
    # Nothing random happens inside the model, so there is no generator state to keep.
    return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
