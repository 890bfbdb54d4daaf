"""Whether a checkpoint is intact: its files bit for bit, and every tensor that its configuration
needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch

from diffmoe.checkpoints.power_averages import length_kind
from diffmoe.checkpoints.reader import (
    BUFFERS,
    FIRST_MOMENT,
    MASTER,
    SECOND_MOMENT,
    Checkpoint,
    ema_kind,
)
from diffmoe.checkpoints.tensor_file import CHUNK, Corrupt
from diffmoe.config import Config
from diffmoe.models.logical import fresh_buffers, fresh_projector, logical_template
from diffmoe.models.matrices import MUON, is_matrix


def expected_shapes(config: Config, moments: bool) -> dict[str, dict[str, tuple[int, ...]]]:
    """Shapes by kind and logical name of all that training resumes from."""
    fresh = fresh_buffers(config.model, config.moe)
    buffers = {name: tuple(value.shape) for name, value in fresh.items()}
    template = {**logical_template(config.model, config.moe), **fresh_projector(config)}
    weights = {name: tuple(value.shape) for name, value in template.items() if name not in buffers}
    kinds = [MASTER, *map(ema_kind, config.train.ema_decays)]
    if moments:
        kinds += [FIRST_MOMENT, SECOND_MOMENT, *map(length_kind, config.train.ema_lengths)]
    found = {**dict.fromkeys(kinds, weights), BUFFERS: buffers}
    if moments and config.train.optimizer == MUON:
        found[SECOND_MOMENT] = {n: shape for n, shape in weights.items() if not is_matrix(n)}
    return found


def check_tensors(checkpoint: Checkpoint) -> Iterator[str]:
    """One line for each tensor that is missing, has a gap, or has another shape than the
    configuration says.
    """
    # Adam's moments and averages by length need not be there before the first step (see
    # ``writer.save_start``).
    moments = checkpoint.step > 0 or FIRST_MOMENT in checkpoint.kinds()
    for kind, shapes in expected_shapes(checkpoint.config(), moments).items():
        source = f"{kind} of {checkpoint.path}"
        try:
            tensors = checkpoint.tensors(kind)
        except Corrupt as error:
            yield str(error)
            continue
        for name, shape in shapes.items():
            if name not in tensors:
                yield f"{source} lacks {name}"
            elif (found := tensors.shape(name)) != shape:
                yield f"{source} has {name} with shape {list(found)} instead of {list(shape)}"


def check_files(checkpoint: Checkpoint) -> Iterator[str]:
    """One line for each file whose bytes or header are not what was written."""
    for name in checkpoint.manifest.files:
        try:
            checkpoint.check_file(name)
        except Corrupt as error:
            yield str(error)


def check_values(checkpoint: Checkpoint) -> Iterator[str]:
    """One line for each tensor with a NaN or an infinity, or a negative second moment.  Reads a
    chunk at a time.
    """
    for kind in checkpoint.kinds():
        tensors = checkpoint.tensors(kind)
        for name in tensors:
            dtype, total = tensors.dtype(name), prod(tensors.shape(name))
            if not dtype.is_floating_point:
                continue
            infinite = negative = 0
            buffer = torch.empty(min(total, CHUNK // 4), dtype=dtype)
            for start in range(0, total, max(1, buffer.numel())):
                part = buffer[: total - start]
                tensors.read_into(name, start, part)
                infinite += int((~torch.isfinite(part)).sum())
                negative += int((part < 0).sum())
            source = f"{kind} of {checkpoint.path}"
            if infinite:
                yield f"{source} has {infinite} values in {name} that are not finite"
            if negative and kind == SECOND_MOMENT:
                yield f"{source} has {negative} negative values in {name}"
