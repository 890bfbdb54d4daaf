"""Models and data that are made up: the same wherever they are asked for, and no weight zero."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from diffmoe.config import Config
from diffmoe.data.stream import Batch
from diffmoe.deepspeed_json import merge_deepspeed
from diffmoe.diffusion.randomness import Draws
from diffmoe.families import projector_of
from diffmoe.layout import resolve_layout
from diffmoe.models.dit import DiT
from diffmoe.models.logical import logical_tensors, new_model
from diffmoe.parallel.groups import ParallelGroups
from diffmoe.training.ema import Ema
from diffmoe.training.engine import Engine
from diffmoe.training.step import StepReport, train_step


def build_model(config: Config, pool: int, groups: ParallelGroups) -> DiT:
    """A model whose tensors are all alive: what starts at zero (adaLN, biases, output) and the
    routers, whose scores would be all but equal, are drawn anew, each (expert) by its logical name.
    """
    model = new_model(config, pool, groups)
    for tensor in logical_tensors(model):
        for name, value in tensor.pieces(tensor.parameter.data):
            if name.endswith(".router") or not value.any():
                digest = hashlib.sha256(f"verify/{config.run.seed}/{name}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
                scale = 0.3 if name.endswith(".router") else 0.1
                value.copy_(torch.randn(value.shape, generator=generator) * scale)
    return model


def synthetic_batch(config: Config, numbers: Sequence[int]) -> Batch:
    """The samples with these global numbers."""
    model = config.model
    shape = (model.channels, model.input_size, model.input_size)
    x = torch.stack(
        [torch.randn(shape, generator=torch.Generator().manual_seed(1 + 2 * n)) for n in numbers]
    )
    y = torch.tensor([(3 * n + 1) % model.classes for n in numbers])
    if projector_of(config) is None:
        return Batch(x, y, tuple(numbers))
    sizes = (model.tokens, config.train.repa_width)
    features = [torch.randn(sizes, generator=torch.Generator().manual_seed(2 * n)) for n in numbers]
    # Of a common direction: a mean of cosines near 0 would be rounding's alone.
    return Batch(x, y, tuple(numbers), (torch.stack(features) + 1).half())


class Training:
    """One rank's engine and EMA for ``model``, under the DeepSpeed JSON ``tree``, ready for
    :meth:`step`.
    """

    def __init__(
        self, model: DiT, config: Config, tree: dict, groups: ParallelGroups, device: torch.device
    ) -> None:
        self.model, self.config, self.groups = model, config, groups
        self.layout = resolve_layout(config, groups.world.size)
        merged = merge_deepspeed(tree, config, self.layout)
        self.engine = Engine(model, config, merged, groups, device)
        self.ema = Ema(self.engine, config.train)

    def batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step, of made-up samples."""
        layout, found = self.layout, []
        for j in range(layout.accumulation):
            first = step * layout.batch + j * layout.batch // layout.accumulation
            first += self.groups.rank * layout.micro_batch
            found.append(synthetic_batch(self.config, range(first, first + layout.micro_batch)))
        return found

    def step(
        self,
        step: int,
        batches: Sequence[Batch] | None = None,
        draws: Sequence[Draws] | None = None,
    ) -> StepReport:
        """Optimizer step ``step``, on its own batches where none are given."""
        batches = self.batches(step) if batches is None else batches
        run = self.engine, self.ema, batches, self.config, self.layout, self.groups, step
        return train_step(*run, draws=draws)
