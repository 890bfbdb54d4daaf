"""Weights in and out under logical names, and the research code's names for the same tensors."""

from __future__ import annotations

import argparse
import hashlib
import re
import zipfile
from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from diffmoe.config import ModelConfig, MoEConfig
from diffmoe.errors import UserError
from diffmoe.models.dit import DiT, is_moe_block, logical_tensors
from diffmoe.models.layers import sine_positions
from diffmoe.moe.capacity import Thresholds

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
_HASH_VERSION = "v2"  # the first, without a prefix, saw 4,096 entries of a tensor: other weights could have the same
_HASHED_AT_ONCE = 1 << 22  # entries: 16 MiB as fp32
_SWIGLU = {"gate": "gate_proj", "fc1": "up_proj", "fc2": "down_proj"}


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


def research_name(name: str, model: ModelConfig, moe: MoEConfig) -> str:
    """The research code's name for one of our tensors: the inverse of :func:`logical_name`."""
    stem, _, leaf = name.rpartition(".")
    if leaf == "router":
        return f"{stem}.gate.weight" if model.family == "tc" else f"{stem}.gate_weight"
    if ".mlp.experts." in name:
        matrix, _, kind = leaf.rpartition("_")
        return f"{stem}.{_SWIGLU[matrix] if moe.activation == 'swiglu' else matrix}.{kind}"
    if name.endswith(".mlp.thresholds.value"):
        return name.removesuffix("thresholds.value") + "expert_threshold"
    return name.replace(".mlp.shared.", ".mlp.shared_experts.")


def to_research(tensors: Mapping[str, Tensor], model: ModelConfig, moe: MoEConfig) -> Iterator[tuple[str, Tensor]]:
    """(research name, tensor) of a whole research state dict, one by one, from tensors by logical name.

    ``tensors`` holds the thresholds too, where the family has them; fixed positions and the thresholds' decay come from
    the configuration."""
    yield "pos_embed", sine_positions(model.width, model.input_size // model.patch).unsqueeze(0)
    for name in logical_template(model, moe):
        value = tensors[name]
        yield research_name(name, model, moe), (value.t() if _EXPERT_MATRIX.search(name) else value).contiguous()
        if name.endswith(".mlp.thresholds.value"):
            decay = torch.tensor([moe.threshold_decay], dtype=torch.float32)
            yield name.removesuffix("thresholds.value") + "ema_decay", decay


def logical_template(model: ModelConfig, moe: MoEConfig) -> dict[str, Tensor]:
    """Every weight of a model, and its thresholds' values, by logical name: shapes only, on torch's meta device."""
    with torch.device("meta"), torch.no_grad():
        whole = DiT(model, moe)
        shapes = {name: piece for tensor in logical_tensors(whole) for name, piece in tensor.pieces(tensor.parameter)}
    values = {name: value for name, value in whole.named_buffers() if name.endswith(".thresholds.value")}
    return {**shapes, **values}


def whole_weights(weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor], model: ModelConfig, moe: MoEConfig,
                  source: str) -> Mapping[str, Tensor]:
    """Weights and thresholds in one mapping, unread.  Raises UserError, naming ``source``, where the model needs more."""
    tensors: Mapping[str, Tensor] = ChainMap(weights, buffers)
    missing = [name for name in logical_template(model, moe) if name not in tensors]
    if missing:
        raise UserError(f"{source} lacks {', '.join(missing[:3])} ({len(missing)} missing)")
    return tensors


def fresh_buffers(model: ModelConfig, moe: MoEConfig) -> dict[str, Tensor]:
    """A new model's thresholds as a checkpoint keeps them, by name."""
    blocks = [i for i in range(model.depth) if model.family == "diffmoe" and is_moe_block(model, moe, i)]
    return {f"blocks.{i}.mlp.thresholds.{name}": value
            for i in blocks for name, value in Thresholds(moe.experts, moe.threshold_decay).named_buffers()}


def observed_buffers(state: Mapping[str, Tensor], model: ModelConfig, moe: MoEConfig) -> dict[str, Tensor]:
    """Thresholds of a research state dict as a checkpoint keeps them: observed once, since they have been trained."""
    given = from_research({name: value for name, value in state.items() if name.endswith(".expert_threshold")})
    buffers = {**fresh_buffers(model, moe), **{name: value.float() for name, value in given.items()}}
    return {name: torch.ones_like(value) if name.endswith(".observations") else value for name, value in buffers.items()}


def read_research(path: Path) -> dict[str, dict[str, Tensor]]:
    """The state dicts of a research checkpoint: ``model``, ``ema`` or both; a bare state dict is returned as ``model``.

    Only tensors, plain containers and an ``argparse.Namespace`` (what the research code keeps its options in) are
    read; a pickle that asks for anything else is refused, and nothing in it runs.  Raises UserError."""
    if not path.is_file():
        raise UserError(f"research checkpoint {path} does not exist")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            # Tensors of a zip file stay on disk until they are used.
            tree = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged or hostile file can fail anywhere in the unpickler
        raise UserError(f"{path} is refused: {_why_refused(path, error)}") from None
    if not isinstance(tree, dict) or not tree:
        raise UserError(f"{path} must hold a dict of tensors, not {type(tree).__name__} ({len(tree)} entries)"
                        if isinstance(tree, dict) else f"{path} must hold a dict, not {type(tree).__name__}")
    states = {which: tree[which] for which in ("model", "ema") if which in tree}
    if not states and all(isinstance(value, Tensor) for value in tree.values()):
        states = {"model": tree}
    if not states:
        raise UserError(f"{path} has neither model nor ema and is no bare state dict; it has {_some('entries', tree)}")
    for which, state in states.items():
        strangers = [f"{name!s} ({type(value).__name__})" for name, value in state.items()
                     if not isinstance(name, str) or not isinstance(value, Tensor) or not value.is_floating_point()
                     ] if isinstance(state, dict) else [type(state).__name__]
        if strangers:
            raise UserError(f"{path}: {which} must hold tensors of floating-point numbers by name, not "
                            f"{_some('others', strangers)}")
    return states


def _why_refused(path: Path, error: Exception) -> str:
    """One line.  Lists what a pickle asks for when that is why; the scan reads opcodes and runs none."""
    try:
        asked = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # no zip of torch's: the unpickler's own words remain
        asked = []
    asked = [name for name in asked if name != "argparse.Namespace"]
    if asked:
        return f"it is a pickle with code and not only tensors: {_some('names', asked)}"
    named = re.search(r"GLOBAL ([\w.]+)", str(error))
    if named:
        return f"it is a pickle with code and not only tensors: {named[1]}"
    # torch's advice to load it without safety stays out.
    words = " ".join(str(error).split("WeightsUnpickler error:")[-1].split())[:150]
    return f"it is no whole file of tensors ({type(error).__name__}{words and ': '}{words})"


def check_research(state: Mapping[str, Tensor], model: ModelConfig, moe: MoEConfig, source: str) -> None:
    """Raises UserError unless a research state dict is exactly what this configuration needs.

    Missing, extra and misshaped tensors are listed.  Positions must be ours, and the thresholds' decay the configured."""
    wanted = dict(to_research(logical_template(model, moe), model, moe))
    missing = [name for name in wanted if name not in state]
    extra = [name for name in state if name not in wanted]
    misshaped = [f"{name} {tuple(state[name].shape)} instead of {tuple(value.shape)}"
                 for name, value in wanted.items() if name in state and state[name].shape != value.shape]
    if missing or extra or misshaped:
        raise UserError(f"{source} does not fit the configuration (model.family {model.family}): {_some('missing', missing)}, "
                        f"{_some('extra', extra)}, {_some('misshaped', misshaped)}")
    for name, value in state.items():
        if not _COMPUTED.search(name):
            continue
        furthest = (value.double() - wanted[name].double()).abs().max().item()
        # Another machine's sines end in other bits; half precision rounds.
        if not furthest <= max(1e-6, torch.finfo(value.dtype).eps):
            ours = "the sine-cosine table" if name == "pos_embed" else f"moe.threshold_decay ({moe.threshold_decay})"
            raise UserError(f"{source}: {name} differs from {ours} by up to {furthest:.3g}")


def kept_as_they_were(states: Mapping[str, Mapping[str, Tensor]], buffers: Mapping[str, Tensor], model: ModelConfig,
                      moe: MoEConfig) -> Iterator[tuple[str, Tensor]]:
    """("model/…" or "ema/…", tensor) of what an export from fp32 weights and one set of thresholds would not give back
    bit for bit: half precision, thresholds that were averaged again in the EMA, another machine's position table."""
    for which, state in states.items():
        ours = {name: value.float() for name, value in from_research(state).items()}
        for name, value in to_research({**ours, **buffers}, model, moe):
            if not same_bits(value, state[name]):
                yield f"{which}/{name}", state[name]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal type, shape and bytes: tells 0 from -0 and any NaN from another."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@torch.no_grad()
def load_logical(model: DiT, tensors: Mapping[str, Tensor]) -> None:
    """Copies tensors by logical name into the model's own layout.

    Raises UserError naming tensors that are missing or misshaped.  Experts that live on other ranks are not missed,
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
        raise UserError(f"weights do not fit the model: {_some('missing', missing)}, {_some('misshaped', misshaped)}")
    load_buffers(model, tensors)


@torch.no_grad()
def load_buffers(model: DiT, tensors: Mapping[str, Tensor]) -> None:
    """Copies the thresholds and histograms that are among the tensors; a model without predictors has none."""
    for index, layer in model.moe_layers():
        if layer.family == "diffmoe":
            layer.thresholds.load(tensors, f"blocks.{index}.mlp.thresholds")


def weights_digest(model: nn.Module) -> str:
    """`v2:` and the SHA-256 over names, shapes and all entries (as fp32) of every tensor, whatever its type and device:
    tells any two checkpoints apart. Reads each tensor in pieces: a second or two for a GB."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)}\n".encode())
        for piece in value.detach().flatten().split(_HASHED_AT_ONCE):
            digest.update(piece.float().cpu().numpy())
    return f"{_HASH_VERSION}:{digest.hexdigest()}"


def digest_note(one: str, other: str) -> str:
    """What to add where two digests differ: whether one of them was made before they covered all weights; else
    nothing."""
    older = [digest for digest in (one, other) if not digest.startswith(f"{_HASH_VERSION}:")]
    return (" (the one without v2 is of an earlier version, which hashed only a part of the weights: score them again)"
            if older else "")


def _some(what: str, names: Iterable[str]) -> str:
    names = list(map(str, names))
    shown = f" ({', '.join(names[:3])}{', …' * (len(names) > 3)})" if names else ""
    return f"{len(names)} {what}{shown}"
