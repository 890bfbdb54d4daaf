"""Steps that go wrong: not finite, or spikes.  All ranks decide by the same numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffmoe.config import Config, TrainConfig
from diffmoe.data.stream import Batch
from diffmoe.gradient_sums import ordinary_gradients
from diffmoe.moe.routing import RoutingRule
from diffmoe.parallel.collectives import AgreedError, gather_objects
from diffmoe.parallel.groups import ParallelGroups
from diffmoe.training.engine import Engine
from diffmoe.training.step import StepReport, micro_loss, training_rule

Verdict = Literal["good", "not finite", "spike", "left out"]
_REMEMBERED = ("nonfinite", "left_out", "losses", "in_a_row", "rollbacks")


@dataclass
class Guard:
    """What the run remembers about bad steps; part of every checkpoint, so that a resumed run
    decides alike.

    ``nonfinite``: steps that changed nothing.  ``left_out``: steps whose batch is not to be tried
    again, after a spike. ``losses``: of the last ``spike_window`` good steps.  ``returns``: how
    often the run went back to ``returned_to``.
    """

    train: TrainConfig
    nonfinite: list[int] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    in_a_row: int = 0
    rollbacks: int = 0
    returns: int = 0
    returned_to: int = -1

    def judge(self, report: StepReport, step: int) -> Verdict:
        """What to do with step ``step``, whose report is the same on all ranks; remembers it."""
        if not report.applied:
            self.nonfinite.append(step)
            self.in_a_row += 1
            return "not finite"
        self.in_a_row = 0
        if self.train.spike_factor > 0:
            full = len(self.losses) == self.train.spike_window
            if full and report.loss > self.train.spike_factor * statistics.median(self.losses):
                return "spike"
            self.losses = [*self.losses, report.loss][-self.train.spike_window :]
        return "good"

    def go_back(self, step: int, to: int, before: Guard) -> None:
        """Back to the checkpoint of step ``to``, whose memory is ``before``, never to try ``step``
        again.  AgreedError when ``spike_limit`` returns there did not help.
        """
        self.returns = self.returns + 1 if to == self.returned_to else 1
        if self.returns > self.train.spike_limit:
            raise AgreedError(
                f"the loss spiked at step {step}, after train.spike_limit "
                f"({self.train.spike_limit}) returns to the checkpoint of step {to}, each without "
                "the step that had spiked: the batches are not what is wrong"
            )
        self.returned_to, self.rollbacks = to, self.rollbacks + 1
        self.left_out = sorted({*self.left_out, step})
        self.nonfinite, self.losses = list(before.nonfinite), list(before.losses)
        self.in_a_row = before.in_a_row

    def skipped(self, done: int) -> int:
        """Steps below ``done`` that changed nothing."""
        return len(self.nonfinite) + sum(step < done for step in self.left_out)

    def as_counters(self) -> dict[str, Any]:
        """For the checkpoint's manifest."""
        return {name: getattr(self, name) for name in _REMEMBERED}

    @staticmethod
    def from_counters(train: TrainConfig, counters: Mapping[str, Any]) -> Guard:
        """The inverse; a checkpoint without them remembers nothing."""
        guard = Guard(train, **{name: counters[name] for name in _REMEMBERED if name in counters})
        guard.losses = guard.losses[-train.spike_window :]
        return guard


def find_nonfinite(
    engine: Engine, batches: Sequence[Batch], config: Config, groups: ParallelGroups, step: int
) -> str:
    """Where the first value that is not finite appears, and on which ranks: ``output of
    blocks.1.mlp on rank 2``.

    Runs the step's samples again, forward and backward, beside the engine: nothing accumulates and
    nothing is updated. Outputs of modules come first, in the order of execution; then gradients of
    those outputs, from the loss downwards; then, below ZeRO 3, gradients of parameters.  All ranks
    together.
    """
    groups.trace.enter("looking for what is not finite", step)
    rule = training_rule(config.moe, step)
    finds: list[tuple[int, int, str]] = []
    # Compiled code calls no hooks of the modules in it.
    with engine.model.plainly(), ordinary_gradients():
        for batch in batches:
            finds += _run_watched(engine, batch, config, rule)
    everywhere = gather_objects(min(finds, default=None), groups.world)
    found = [(find, rank) for rank, find in enumerate(everywhere) if find is not None]
    if not found:
        return "a second pass over the same samples is finite"
    first = min(find for find, _ in found)
    ranks = [str(rank) for find, rank in found if find == first]
    return f"first in the {first[2]} on rank{'s' * (len(ranks) > 1)} {', '.join(ranks)}"


def _run_watched(
    engine: Engine, batch: Batch, config: Config, rule: RoutingRule
) -> list[tuple[int, int, str]]:
    """(stage, order, name) of everything that is not finite on this rank in one micro-batch."""
    finds: list[tuple[int, int, str]] = []
    outputs: list[Tensor] = []

    def on_gradient(name: str, order: int, gradient: Tensor) -> None:
        if not gradient.isfinite().all():
            finds.append((1, -order, f"gradient of the output of {name}"))

    def on_output(name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        value = output[0] if isinstance(output, tuple) else output
        if isinstance(value, Tensor) and value.is_floating_point():
            order = len(outputs)
            outputs.append(value)
            if not value.detach().isfinite().all():
                finds.append((0, order, f"output of {name}"))
            if value.requires_grad:
                value.register_hook(partial(on_gradient, name, order))

    handles = [
        module.register_forward_hook(partial(on_output, name))
        for name, module in engine.model.named_modules()
        if name and not name.startswith("deepspeed_marker")
    ]
    try:
        loss = micro_loss(engine.model, batch, config, rule, engine.device).total
    finally:
        for handle in handles:
            handle.remove()
    if not math.isfinite(float(loss.detach())):
        finds.append((0, len(outputs), "loss"))
    if engine.stage < 3:
        tensors = [t for t in engine.tensors if t.parameter.requires_grad]
        gradients = torch.autograd.grad(loss, [t.parameter for t in tensors], allow_unused=True)
        finds += [
            (2, -order, f"gradient of {t.name}")
            for order, (t, g) in enumerate(zip(tensors, gradients, strict=True))
            if g is not None and not g.isfinite().all()
        ]
    else:
        # ZeRO 3 gathers parameters as backward comes to them; only what lies between modules can be
        # asked for.
        leaves = [value for value in outputs if value.requires_grad]
        torch.autograd.grad(loss, leaves[:1])
    return finds
