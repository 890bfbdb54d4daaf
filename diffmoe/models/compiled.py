"""torch.compile of a DiT's blocks: what is compiled and when is decided here alone.

A graph is a block, or a part of it between two exchanges, with its recompute inside: there the
compiler's partition of forward and backward obeys the same policies, and routes once.  Blocks of a
kind share graphs, a graph break is an error. Hooks of a block stay outside; those of modules in a
graph are not heard.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from diffmoe.config import TrainConfig
from diffmoe.errors import UserError
from diffmoe.models.dit import (
    BlockOutput,
    Condition,
    DiT,
    DiTBlock,
    Halves,
    recomputed_block,
    run_plainly,
)
from diffmoe.moe.dispatch import Plan
from diffmoe.moe.layer import MoELayer
from diffmoe.moe.routing import RoutingRule
from diffmoe.parallel.recompute import recomputed

# A graph is of one batch size, for which kernels are chosen: the micro-batch's; those of a sheet of
# samples and of scores, twice where guidance doubles them at some times; a smaller last one's.
_MOST_SIZES = 6
# Graphs of one function, kinds of blocks, forms of recompute and routing rules for each size; torch
# raises beyond that.
_MOST_GRAPHS = 16 * _MOST_SIZES


def compiles(train: TrainConfig, device: torch.device, stage: int = 0) -> tuple[bool, str | None]:
    """Whether ``train.compile`` means yes here, and what to say where ``auto`` means no on a GPU.
    ``stage``: ZeRO's.

    Raises UserError for ``true`` where torch.compile lacks something."""
    if train.compile is True:
        check_compiler(device)
    if isinstance(train.compile, bool) or device.type == "cpu":
        return train.compiles(device.type, stage), None
    if not train.compiles(device.type, stage):
        why = "ZeRO 3 gathers weights where no graph can go"
    elif lacking := _lacking(device):
        why = f"it needs {lacking}"
    else:
        return True, None
    return False, f"note: train.compile (auto) is off: {why}"


def check_compiler(device: torch.device) -> None:
    """Raises UserError where torch.compile lacks something that is not torch's own."""
    lacking = _lacking(device)
    if lacking is not None:
        raise UserError(f"train.compile (true) needs {lacking}")


def _lacking(device: torch.device) -> str | None:
    if device.type == "cpu":
        from torch._inductor import cpp_builder, exc

        try:
            cpp_builder.get_cpp_compiler()
        except exc.InvalidCxxCompiler:
            return "a C++ compiler on a CPU, and there is none: install g++, or name one in CXX"
        return None
    if importlib.util.find_spec("triton") is None:
        return "the package triton on a GPU, and there is none: install this torch's"
    if not any(map(shutil.which, (os.environ.get("CC", "gcc"), "clang"))):
        return "a C compiler on a GPU, and there is none: install gcc, or name one in CC"
    if not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        return "Python's headers on a GPU, and there are none: install python3-dev"
    return None


def compile_blocks(model: DiT) -> None:
    """From now on the model's blocks run compiled, see :class:`CompiledRun`.  The first pass takes
    a minute.
    """
    model.run = CompiledRun(model.moe.capacity)


class CompiledRun:
    """How a DiT's blocks are run compiled: as a whole where all shapes are known (dense blocks;
    MoE layers that neither ask another rank nor the host), else in parts between exchanges, with
    choosing and the host's reads outside.  Parts are the units of ``selective`` recompute: what
    crosses their edges, as rows from the network do, is kept by itself.

    ``capacity``: at which training ends.  While it changes, what moves rows would be another graph
    in every step.
    """

    def __init__(self, capacity: float) -> None:
        self.settled = RoutingRule("train", capacity)
        self.sizes: set[int] = set()
        self.compiled: dict[Any, Callable] = {}
        self._limit = torch._dynamo.config.patch(
            recompile_limit=_MOST_GRAPHS
        )  # torch.compile has it from 2.12 on

    def __call__(
        self, block: DiTBlock, form: str, x: Tensor | Halves, c: Condition, rule: RoutingRule
    ) -> BlockOutput:
        whole = not isinstance(x, Tensor) or x.is_contiguous()
        assert whole and c.silu_BD.is_contiguous()  # see PatchEmbedding
        if not self._takes(len(c.silu_BD)):
            return run_plainly(block, form, x, c, rule)
        if not isinstance(block.mlp, MoELayer):
            return self._whole(form, block, x, c, self.settled)  # any rule is the same to it
        settled = rule.kind != "train" or rule == self.settled
        if settled and block.mlp.has_static_shapes(rule):
            return self._whole(form, block, x, c, rule)
        part = self.part if settled else self._part_unsettled
        if form == "block":  # exchanges are repeated, too
            return recomputed_block(block, form, x, c, rule, partial(part, "none"))
        return recomputed_block(block, "none", x, c, rule, partial(part, form))

    def _whole(
        self, form: str, block: DiTBlock, x: Any, c: Condition, rule: RoutingRule
    ) -> BlockOutput:
        """A block as one graph."""
        if form != "none" or not torch.is_grad_enabled():
            return self.part(form, block.compute, x, c, rule)
        # What a graph returns is in memory, and backward reads it there.  It would compute the
        # middle again, in fp32, from three tensors: 6 % of the elementwise traffic of L-E16.
        return self.part(form, block.compute_and_show, x, c, rule)[:2]

    def _part_unsettled(self, form: str, function: Callable, *args: Any, **how: bool) -> Any:
        """Without graphs of what moves rows, whose number changes from step to step."""
        if any(isinstance(argument, Plan) for argument in args):
            return recomputed(function, form, *args)
        return self.part(form, function, *args, **how)

    def part(
        self,
        form: str,
        function: Callable,
        *args: Any,
        ragged: bool = False,
        traceable: bool = True,
    ) -> Any:
        """See ``parallel.recompute.Run``; with ``ragged`` rows come first, or are named ``…_R`` in
        a plan.
        """
        if not traceable:
            return recomputed(function, form, *args)
        if ragged:
            # What the host knows of rows on their way is no part's business; torch 2.11 would guard
            # it, and compile anew.
            args = tuple(
                replace(each, send=None, receive=None, passing=None)
                if isinstance(each, Plan)
                else each
                for each in args
            )
            plans = (argument for argument in args if isinstance(argument, Plan))
            rows = [
                value for plan in plans for name, value in vars(plan).items() if name.endswith("_R")
            ]
            for tensor in [args[0], *rows]:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        kind = (
            type(function)
            if isinstance(function, nn.Module)
            else getattr(function, "__func__", function)
        )
        if kind not in self.compiled:
            self.compiled[kind] = torch.compile(
                _recomputed_as(kind.__name__), fullgraph=True, dynamic=False
            )
        with self._limit:
            return self.compiled[kind](function, form, *args)

    def _takes(self, size: int) -> bool:
        if size not in self.sizes and len(self.sizes) == _MOST_SIZES:
            warnings.warn(
                f"a batch of {size} samples runs eager: there are graphs for {_MOST_SIZES} others"
            )
            return False
        self.sizes.add(size)
        return True


def _recomputed_as(name: str) -> Callable:
    """``recomputed`` for one kind of function: torch keeps graphs by code object, and would look
    through those of the other kinds (``isolate_recompiles`` is newer than 2.12).
    """
    code = recomputed.__code__.replace(co_name=f"{recomputed.__name__}_{name}")
    return FunctionType(code, recomputed.__globals__, code.co_name)
