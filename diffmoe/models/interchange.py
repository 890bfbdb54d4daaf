"""Weights in and out under logical names, and the research code's names for the same tensors
(``prototype``: ProMoE's, ali-vilab/ProMoE; MIT).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from diffmoe.config import ModelConfig, MoEConfig
from diffmoe.errors import UserError
from diffmoe.models.layers import sine_positions
from diffmoe.models.logical import fresh_buffers, initialize_tensor, logical_template, some
from diffmoe.models.shapes import differing_settings

_EXPERT_MATRIX = re.compile(r"\.experts\.\d+\.\w+_weight$")
# Constants that the research code stores and this model computes.
_COMPUTED = re.compile(r"(^pos_embed|\.ema_decay)$")
_LABELS = "y_embedder.embedding_table.weight"
_SWIGLU = {"gate": "gate_proj", "fc1": "up_proj", "fc2": "down_proj"}


def from_research(
    state: Mapping[str, Tensor], model: ModelConfig, moe: MoEConfig
) -> dict[str, Tensor]:
    """What a research state dict has of a model's tensors, under logical names.  Expert matrices
    are stored [in, out] here, [out, in] there.
    """
    names = {name: research_name(name, model, moe) for name in logical_template(model, moe)}
    return {
        name: state[theirs].t() if _EXPERT_MATRIX.search(name) else state[theirs]
        for name, theirs in names.items()
        if theirs in state
    }


def research_name(name: str, model: ModelConfig, moe: MoEConfig) -> str:
    """The research code's name for one of our tensors."""
    stem, _, leaf = name.rpartition(".")
    if model.family == "prototype" and ".mlp." in name:
        return _promoe_name(stem, leaf)
    if leaf == "router":
        return f"{stem}.gate.weight" if model.family == "tc" else f"{stem}.gate_weight"
    if ".mlp.experts." in name:
        matrix, _, kind = leaf.rpartition("_")
        return f"{stem}.{_SWIGLU[matrix] if moe.activation == 'swiglu' else matrix}.{kind}"
    if name.endswith(".mlp.thresholds.value"):
        return name.removesuffix("thresholds.value") + "expert_threshold"
    return name.replace(".mlp.shared.", ".mlp.shared_experts.")


def _promoe_name(stem: str, leaf: str) -> str:
    """ProMoE's name for a tensor of an MoE layer, or of a dense block's MLP."""
    if leaf == "router":
        return f"{stem}.cluster_centers"
    if ".experts." in stem:
        matrix, _, kind = leaf.rpartition("_")
        return f"{stem}.{_SWIGLU[matrix]}.{kind}"
    stem = stem.replace(".shared.fc1", ".shared_expert.up_proj")
    return f"{stem.replace('.shared.fc2', '.shared_expert.down_proj')}.{leaf}"


def to_research(
    tensors: Mapping[str, Tensor], model: ModelConfig, moe: MoEConfig
) -> Iterator[tuple[str, Tensor]]:
    """(research name, tensor) of a whole research state dict, one by one, from tensors by logical
    name.

    ``tensors`` holds the thresholds too, where the family has them; fixed positions and the
    thresholds' decay come from the configuration.
    """
    yield "pos_embed", _positions(model)
    for name in logical_template(model, moe):
        value = tensors[name].t() if _EXPERT_MATRIX.search(name) else tensors[name]
        yield research_name(name, model, moe), value.contiguous()
        if name.endswith(".mlp.thresholds.value"):
            decay = torch.tensor([moe.threshold_decay], dtype=torch.float32)
            yield name.removesuffix("thresholds.value") + "ema_decay", decay


def observed_buffers(
    state: Mapping[str, Tensor], model: ModelConfig, moe: MoEConfig
) -> dict[str, Tensor]:
    """Thresholds of a research state dict as a checkpoint keeps them: observed once, since they
    have been trained.
    """
    given, buffers = from_research(state, model, moe), fresh_buffers(model, moe)
    buffers |= {name: given[name].float() for name in buffers if name in given}
    return {
        name: torch.ones_like(value) if name.endswith(".observations") else value
        for name, value in buffers.items()
    }


def fit_research(
    state: Mapping[str, Tensor],
    model: ModelConfig,
    moe: MoEConfig,
    source: str,
    new_labels_from: int | None = None,
) -> tuple[dict[str, Tensor], list[str]]:
    """A research state dict as this configuration needs it, and what was changed for that, in
    words.

    Fixed positions of another grid become those of ``model.input_size``, and constants that the
    file does not store are computed.  With ``new_labels_from``, a seed, the classes' embeddings
    start anew and the null class, the file's last row, is kept.  Raises UserError for all else that
    does not fit.
    """
    fitted, notes = dict(state), []
    there, table = fitted.get("pos_embed"), fitted.get(_LABELS)
    ours = _positions(model)
    if there is not None and there.ndim == 3 and there.shape != ours.shape:
        side = math.isqrt(there.shape[1])
        theirs = sine_positions(model.width, side).unsqueeze(0)
        if there.shape == theirs.shape and _rounds_to(there, theirs):
            fitted["pos_embed"] = ours
            notes.append(
                f"pos_embed is of {side} x {side} tokens, model.input_size {side * model.patch}; "
                "positions are a function of place, so those of model.input_size "
                f"({model.input_size}) are computed"
            )
    if new_labels_from is not None and table is not None and table.shape[1:] == (model.width,):
        fresh = torch.empty(model.classes + 1, model.width)
        initialize_tensor(_LABELS, fresh, new_labels_from)
        fresh[-1] = table[-1]
        fitted[_LABELS] = fresh
        notes.append(
            f"--drop-labels: the embeddings of {len(table) - 1} classes are dropped, those of "
            f"model.classes ({model.classes}) start anew; the null class (the file's last row) is "
            "kept"
        )
    check_research(fitted, model, moe, source)
    notes += filter(None, [not_finite_note(fitted, source)])
    whole = to_research(logical_template(model, moe), model, moe)
    return {name: value for name, value in whole if _COMPUTED.search(name)} | fitted, notes


def _positions(model: ModelConfig) -> Tensor:
    """As the research code stores them."""
    side = model.input_size // model.patch
    return sine_positions(model.width, side, model.position_scale).unsqueeze(0)


def _furthest(value: Tensor, wanted: Tensor) -> float:
    return (value.double() - wanted.double()).abs().max().item()


def _rounds_to(value: Tensor, wanted: Tensor) -> bool:
    """Another machine's sines end in other bits; half precision rounds."""
    return _furthest(value, wanted) <= max(1e-6, torch.finfo(value.dtype).eps)


def check_research(
    state: Mapping[str, Tensor], model: ModelConfig, moe: MoEConfig, source: str
) -> None:
    """Raises UserError unless a research state dict is exactly what this configuration needs.

    Missing, extra and misshaped tensors are listed, with the settings that would fit.  Positions
    must be ours, and the thresholds' decay the configured.
    """
    wanted = dict(to_research(logical_template(model, moe), model, moe))
    missing = [name for name in wanted if name not in state and not _COMPUTED.search(name)]
    extra = [name for name in state if name not in wanted]
    wrong = misshaped(state, wanted)
    if missing or extra or wrong:
        settings, obstacles = differing_settings(state, model, moe)
        advice = f"; no setting fits it: {', and '.join(obstacles)}" if obstacles else ""
        if settings and not obstacles:
            advice = f"; by its shapes it needs {' '.join(settings)}"
            if any(setting.startswith("model.classes=") for setting in settings):
                advice += " (or, for other classes, --drop-labels)"
        lists = (
            some(*pair) for pair in (("missing", missing), ("extra", extra), ("misshaped", wrong))
        )
        raise UserError(
            f"{source} does not fit the configuration (model.family {model.family}): "
            f"{', '.join(lists)}{advice}"
        )
    for name, value in state.items():
        if _COMPUTED.search(name) and not _rounds_to(value, wanted[name]):
            ours = f"moe.threshold_decay ({moe.threshold_decay})"
            if name == "pos_embed":
                ours = "the sine-cosine table"
            furthest = _furthest(value, wanted[name])
            raise UserError(f"{source}: {name} differs from {ours} by up to {furthest:.3g}")


def misshaped(tensors: Mapping[str, Tensor], template: Mapping[str, Tensor]) -> list[str]:
    """Those that are there in other shapes than the template's, in words."""
    return [
        f"{name} {tuple(tensors[name].shape)} instead of {tuple(value.shape)}"
        for name, value in template.items()
        if name in tensors and tensors[name].shape != value.shape
    ]


def not_finite_note(tensors: Mapping[str, Tensor], source: str) -> str | None:
    """A warning where weights hold NaN or infinity, which an import keeps bit for bit."""
    broken = [name for name, value in tensors.items() if not torch.isfinite(value).all()]
    if not broken:
        return None
    return f"warning: {source} holds values that are not finite: {some('tensors', broken)}"


def kept_as_they_were(
    states: Mapping[str, Mapping[str, Tensor]],
    buffers: Mapping[str, Tensor],
    model: ModelConfig,
    moe: MoEConfig,
) -> Iterator[tuple[str, Tensor]]:
    """("model/…" or "ema/…", tensor) of what an export from fp32 weights and one set of thresholds
    would not give back bit for bit: half precision, thresholds that were averaged again in the EMA,
    another machine's position table.
    """
    for which, state in states.items():
        ours = {name: value.float() for name, value in from_research(state, model, moe).items()}
        for name, value in to_research({**ours, **buffers}, model, moe):
            if not same_bits(value, state[name]):
                yield f"{which}/{name}", state[name]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal type, shape and bytes: tells 0 from -0 and any NaN from another."""
    same = a.dtype == b.dtype and a.shape == b.shape
    return same and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
