"""torch.compile of a DiT's blocks: what is compiled and when is decided here alone.

A region is a block with its recompute inside.  Outside, a kept result would lie in a buffer that compiled code uses again;
inside, the compiler's partition of forward and backward obeys the same policies, and routes once.  Blocks of a kind share one
graph, a graph break is an error.  Hooks of a block stay outside of its region; those of modules in it are not heard.
"""

from __future__ import annotations

from functools import partial
from typing import Callable, Optional

import torch
from torch import Tensor

from diffmoe.errors import UserError
from diffmoe.models.dit import DiT, DiTBlock
from diffmoe.moe.layer import MoELayer, MoEStats
from diffmoe.moe.routing import RoutingRule
from diffmoe.parallel.recompute import recomputed

def check_compiler(device: torch.device) -> None:
    """Raises UserError where torch.compile would find no C++ compiler, which it needs on a CPU."""
    if device.type == "cpu":
        from torch._inductor import cpp_builder, exc

        try:
            cpp_builder.get_cpp_compiler()
        except exc.InvalidCxxCompiler:
            raise UserError("train.compile (true) needs a C++ compiler on a CPU, and there is none: install g++, or name one "
                            "in CXX") from None


def compile_blocks(model: DiT) -> None:
    """From now on training passes run compiled where shapes are static.  The first one takes a minute.

    Dense blocks, and mixtures of static shapes at the capacity that training ends with, are compiled as a whole; of other
    mixtures what comes before the experts.  Evaluation, whose counts are ragged, stays eager."""
    regions = _Regions(model)
    for block, form in zip(model.blocks, model.recompute):
        block.forward = partial(regions.forward, block, form, block.forward)
    model.recompute = ["none"] * len(model.blocks)  # it is in the regions


class _Regions:
    """The compiled functions, which all blocks share, and what they are compiled for."""

    def __init__(self, model: DiT) -> None:
        self.settled = RoutingRule("train", model.moe.capacity)
        self.whole = torch.compile(recomputed, fullgraph=True, dynamic=False)
        self.attend = torch.compile(DiTBlock.attend, fullgraph=True, dynamic=False)

    def forward(self, block: DiTBlock, form: str, eager: Callable, x: Tensor, c: Tensor, rule: RoutingRule
                ) -> tuple[Tensor, Optional[MoEStats]]:
        if not block.training:
            return eager(x, c, rule)
        assert x.is_contiguous() and c.is_contiguous()  # see PatchEmbedding
        if not isinstance(block.mlp, MoELayer):
            return self.whole(eager, form, x, c, self.settled)  # any rule is the same to it
        if block.mlp.has_static_shapes and rule == self.settled:
            return self.whole(eager, form, x, c, rule)
        return recomputed(partial(self._mixture_apart, block), form, x, c, rule)

    def _mixture_apart(self, block: DiTBlock, x: Tensor, c: Tensor, rule: RoutingRule) -> tuple[Tensor, Optional[MoEStats]]:
        return block.feed(*self.attend(block, x, c), rule)
