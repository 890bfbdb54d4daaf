"""Whether a checkpoint is whole: its files bit for bit, and every tensor that its configuration
needs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from diffmoe.checkpoints.reader import (
    BUFFERS,
    FIRST_MOMENT,
    MASTER,
    SECOND_MOMENT,
    Checkpoint,
    ema_kind,
)
from diffmoe.checkpoints.tensor_file import CHUNK, Damaged
from diffmoe.config import Config
from diffmoe.models.logical import fresh_buffers, logical_template


def expected_shapes(checkpoint: Checkpoint) -> dict[str, dict[str, tuple[int, ...]]]:
    """Shapes by kind and logical name of all that training goes on from, by the checkpoint's own
    configuration.

    Adam's moments need not be there before the first step (see ``writer.save_start``)."""
    return expected_shapes_of(
        checkpoint.config(), moments=checkpoint.step > 0 or FIRST_MOMENT in checkpoint.kinds()
    )


def expected_shapes_of(config: Config, moments: bool) -> dict[str, dict[str, tuple[int, ...]]]:
    """The same for a configuration alone."""
    buffers = {
        name: tuple(value.shape) for name, value in fresh_buffers(config.model, config.moe).items()
    }
    template = logical_template(config.model, config.moe)
    weights = {name: tuple(value.shape) for name, value in template.items() if name not in buffers}
    kinds = [
        MASTER,
        *map(ema_kind, config.train.ema_decays),
        *((FIRST_MOMENT, SECOND_MOMENT) if moments else ()),
    ]
    return {**dict.fromkeys(kinds, weights), BUFFERS: buffers}


def check_tensors(checkpoint: Checkpoint) -> Iterator[str]:
    """One line for each tensor that is missing, has a gap, or has another shape than the
    configuration says.
    """
    for kind, shapes in expected_shapes(checkpoint).items():
        try:
            tensors = checkpoint.tensors(kind)
        except Damaged as error:
            yield str(error)
            continue
        for name, shape in shapes.items():
            if name not in tensors:
                yield f"{kind} of {checkpoint.path} lacks {name}"
            elif tensors.shape(name) != shape:
                yield f"{kind} of {checkpoint.path} has {name} with shape {list(tensors.shape(name))} instead of {list(shape)}"


def check_files(checkpoint: Checkpoint) -> Iterator[str]:
    """One line for each file whose bytes or header are not what was written."""
    for name in checkpoint.manifest.files:
        try:
            checkpoint.check_file(name)
        except Damaged as error:
            yield str(error)


def check_values(checkpoint: Checkpoint) -> Iterator[str]:
    """One line for each tensor with a NaN or an infinity, or a negative second moment.  Reads a
    chunk at a time.
    """
    for kind in checkpoint.kinds():
        tensors = checkpoint.tensors(kind)
        for name in tensors:
            if not tensors.dtype(name).is_floating_point:
                continue
            infinite = negative = 0
            total = torch.Size(tensors.shape(name)).numel()
            buffer = torch.empty(min(total, CHUNK // 4), dtype=tensors.dtype(name))
            for start in range(0, total, buffer.numel()):
                part = buffer[: total - start]
                tensors.read_into(name, start, part)
                infinite += int((~torch.isfinite(part)).sum())
                negative += int((part < 0).sum())
            if infinite:
                yield f"{kind} of {checkpoint.path} has {infinite} values in {name} that are not finite"
            if negative and kind == SECOND_MOMENT:
                yield f"{kind} of {checkpoint.path} has {negative} negative values in {name}"
