"""Weights in and out under logical names, and the research code's names for the same tensors
(``prototype``: ProMoE's, ali-vilab; newer dense blocks: LightningDiT's, hustvl; both MIT).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from diffmoe.config import ModelConfig, MoEConfig
from diffmoe.errors import UserError
from diffmoe.models.layers import rotary_turns, sine_positions
from diffmoe.models.logical import fresh_buffers, initialize_tensor, logical_template, some
from diffmoe.models.shapes import differing_settings

_EXPERT_MATRIX = re.compile(r"\.experts\.\d+\.\w+_weight$")
# Constants that the research code stores and this model computes.
_COMPUTED = re.compile(r"(^pos_embed|^feat_rope\..*|\.ema_decay)$")
# Averages of these codes run over the table as well: after 10,000 steps in fp32 with 0.9999 it is
# off by up to 1.7e-4, for good (measured; half a unit in the last place / (1 - decay) at most).
_AVERAGED = 5e-4
_LABELS = "y_embedder.embedding_table.weight"
_SWIGLU = {"gate": "gate_proj", "fc1": "up_proj", "fc2": "down_proj"}


def from_research(
    state: Mapping[str, Tensor], model: ModelConfig, moe: MoEConfig
) -> dict[str, Tensor]:
    """What a research state dict has of a model's tensors, under logical names.  Expert matrices
    are stored [in, out] here, [out, in] there; LightningDiT's w12 is gate, then fc1.
    """
    found = {}
    for name in logical_template(model, moe):
        theirs = research_name(name, model, moe)
        if theirs in state:
            value = state[theirs].chunk(2)[".fc1." in name] if ".w12." in theirs else state[theirs]
            found[name] = value.t() if _EXPERT_MATRIX.search(name) else value
    return found


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
    if model.activation == "swiglu_bias":
        name = re.sub(r"\.mlp\.(gate|fc1)\.", ".mlp.w12.", name).replace(".mlp.fc2.", ".mlp.w3.")
    name = name.replace("final_layer.norm.", "final_layer.norm_final.")
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
    yield from _tables(model).items()
    for name in logical_template(model, moe):
        value = tensors[name].t() if _EXPERT_MATRIX.search(name) else tensors[name]
        theirs = research_name(name, model, moe)
        if ".w12." in theirs:
            if ".fc1." in name:
                continue  # with its gate
            value = torch.cat([value, tensors[name.replace(".gate.", ".fc1.")]])
        yield theirs, value.contiguous()
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
    ours = _tables(model)
    if there is not None and there.ndim == 3 and there.shape != ours["pos_embed"].shape:
        side = math.isqrt(there.shape[1])
        grid = dataclasses.replace(model, input_size=side * model.patch, position_scale=1.0)
        theirs = _tables(grid)
        alike = theirs.keys() <= state.keys() and not misshaped(state, theirs)
        if alike and all(_rounds_to(name, state[name], value) for name, value in theirs.items()):
            fitted |= ours
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
    if there is not None and (off := _furthest(fitted["pos_embed"], ours["pos_embed"])) > 1e-6:
        notes.append(f"pos_embed of {source} is up to {off:.2g} off the table that is taken for it")
    whole = to_research(logical_template(model, moe), model, moe)
    return {name: value for name, value in whole if _COMPUTED.search(name)} | fitted, notes


def _tables(model: ModelConfig) -> dict[str, Tensor]:
    """Positions as the research code stores them, and LightningDiT's rotations."""
    side, scale = model.input_size // model.patch, model.position_scale
    tables = {"pos_embed": sine_positions(model.width, side, scale).unsqueeze(0)}
    if model.positions == "rope":
        turns = rotary_turns(model.width // model.heads, side, scale).repeat_interleave(2, dim=2)
        tables |= {"feat_rope.freqs_cos": turns[0], "feat_rope.freqs_sin": turns[1]}
    return tables


def _furthest(value: Tensor, wanted: Tensor) -> float:
    return (value.double() - wanted.double()).abs().max().item()


def _rounds_to(name: str, value: Tensor, wanted: Tensor) -> bool:
    """Another machine's sines end in other bits; half precision rounds, averages do."""
    least = 1e-6 if name.endswith("ema_decay") else _AVERAGED
    return _furthest(value, wanted) <= max(least, torch.finfo(value.dtype).eps)


def check_research(
    state: Mapping[str, Tensor], model: ModelConfig, moe: MoEConfig, source: str
) -> None:
    """Raises UserError unless a research state dict is exactly what this configuration needs.

    Missing, extra and misshaped tensors are listed, with the settings that would fit.  Positions
    must be ours, and the thresholds' decay the configured.
    """
    wanted = dict(to_research(logical_template(model, moe), model, moe))
    # Constants may be missing, but for the rotations: a file without them has no RoPE.
    needed = [n for n in wanted if n.startswith("feat_rope.") or not _COMPUTED.search(n)]
    missing = [name for name in needed if name not in state]
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
        if _COMPUTED.search(name) and not _rounds_to(name, value, wanted[name]):
            ours = "the sine-cosine table"
            if name.endswith("ema_decay"):
                ours = f"moe.threshold_decay ({moe.threshold_decay})"
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
