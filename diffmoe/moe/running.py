"""Buffers of a layer that training moves once a step, without a gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from diffmoe.errors import UserError


class RunningState(nn.Module):
    """Buffers, not parameters, ``value`` among them: forward only reads them, and they change once
    per optimizer step, so recompute and accumulation cannot count an observation twice.

    ``absent``: what the others are filled with where a file has a value and not them.
    """

    absent: ClassVar[Mapping[str, int]] = {}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], stem: str) -> None:
        """Copies ``<stem>.value`` and what else there is; without a value nothing changes.  Raises
        UserError for tensors of another shape.
        """
        if f"{stem}.value" not in tensors:
            return
        for name, here in self.named_buffers():
            there = tensors.get(f"{stem}.{name}")
            if there is None:
                there = torch.full_like(here, self.absent[name])
            if there.shape != here.shape:
                shapes = f"{tuple(there.shape)} instead of {tuple(here.shape)}"
                raise UserError(f"{stem}.{name} has shape {shapes}")
            here.copy_(there)
