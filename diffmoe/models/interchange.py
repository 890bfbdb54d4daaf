"""Weights in and out under logical names, and the research code's names for the same tensors."""

from __future__ import annotations

import re
from typing import Mapping

import torch
from torch import Tensor

from diffmoe.models.dit import DiT, logical_tensors

# Research state-dict name -> ours, for what differs.  Expert numbers stay where they are.
_RENAMES = [
    (r"\.mlp\.gate_weight$", ".mlp.router"),
    (r"\.mlp\.gate\.weight$", ".mlp.router"),
    (r"(\.mlp\.experts\.\d+)\.fc1\.(weight|bias)$", r"\1.fc1_\2"),
    (r"(\.mlp\.experts\.\d+)\.fc2\.(weight|bias)$", r"\1.fc2_\2"),
    (r"(\.mlp\.experts\.\d+)\.gate_proj\.weight$", r"\1.gate_weight"),
    (r"(\.mlp\.experts\.\d+)\.up_proj\.weight$", r"\1.fc1_weight"),
    (r"(\.mlp\.experts\.\d+)\.down_proj\.weight$", r"\1.fc2_weight"),
    (r"\.mlp\.shared_experts\.", ".mlp.shared."),
    (r"\.mlp\.expert_threshold$", ".mlp.thresholds.value"),
]
_EXPERT_MATRIX = re.compile(r"\.experts\.\d+\.\w+_weight$")
# Constants that the research code stores and this model computes.
_COMPUTED = re.compile(r"(^pos_embed|\.ema_decay)$")


def logical_name(research_name: str) -> str | None:
    """Our name for a research tensor; None for a constant that this model computes."""
    if _COMPUTED.search(research_name):
        return None
    for pattern, replacement in _RENAMES:
        research_name, count = re.subn(pattern, replacement, research_name)
        if count:
            break
    return research_name


def from_research(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A research state dict under logical names.  Expert matrices are stored [in, out] here, [out, in] there."""
    renamed = ((logical_name(name), value) for name, value in state.items())
    return {name: value.t() if _EXPERT_MATRIX.search(name) else value for name, value in renamed if name is not None}


@torch.no_grad()
def load_logical(model: DiT, tensors: Mapping[str, Tensor]) -> None:
    """Copies tensors by logical name into the model's own layout.

    Raises ValueError naming tensors that are missing or misshaped.  Experts that live on other ranks are not missed,
    and thresholds may be absent (a model without a predictor) but then keep their start value."""
    missing, misshaped = [], []
    for tensor in logical_tensors(model):
        for name, target in tensor.pieces(tensor.parameter.data):
            value = tensors.get(name)
            if value is None:
                missing.append(name)
            elif value.shape != target.shape:
                misshaped.append(f"{name} {tuple(value.shape)} instead of {tuple(target.shape)}")
            else:
                target.copy_(value)
    if missing or misshaped:
        raise ValueError(f"weights do not fit the model: {_some('missing', missing)}, {_some('misshaped', misshaped)}")
    load_buffers(model, tensors)


@torch.no_grad()
def load_buffers(model: DiT, tensors: Mapping[str, Tensor]) -> None:
    """Copies the thresholds that are among the tensors; a model without predictors has none."""
    for index, layer in model.moe_layers():
        stem = f"blocks.{index}.mlp.thresholds"
        if f"{stem}.value" in tensors:
            layer.thresholds.value.copy_(tensors[f"{stem}.value"])
            # A file without a count comes from elsewhere: its thresholds have been observed.
            layer.thresholds.observations.copy_(tensors.get(f"{stem}.observations", torch.tensor(1)))


def _some(what: str, names: list[str]) -> str:
    shown = f" ({', '.join(names[:3])}{', …' * (len(names) > 3)})" if names else ""
    return f"{len(names)} {what}{shown}"
