"""Files of the research code and its relatives: which tensors in them are the model's, and which
its average's.

States are found by the names of a DiT's tensors, wherever in the file they lie and whatever stands
before them: dicts in dicts (``state_dict``), wrappers' prefixes (``module.``, ``_orig_mod.``,
``model.``), an average's own (``ema_model.``).
"""

from __future__ import annotations

import argparse
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffmoe.errors import UserError
from diffmoe.models.interchange import same_bits
from diffmoe.models.logical import some

_OURS = re.compile(
    r"(?:(?P<place>.*?)\.)?"
    r"(?P<name>(?:x_embedder|t_embedder|y_embedder|blocks|final_layer)\..+|pos_embed)"
)
# An optimizer that keeps its moments by name has the same names.
_MOMENTS = re.compile(r"(^|\.)(opt\w*|exp_avg|exp_avg_sq)(\.|$)")
_AVERAGE = re.compile(r"(?:^|[._])(ema\w*|shadow|averaged?|avg)(?=[._]|$)")
# What averages count, and what REPA trains beside the model.
_BESIDE = {
    "num_updates",
    "decay",
    "initted",
    "step",
    "n_averaged",
    "optimization_step",
    "projectors",
    "projector",
}

Leaf = tuple[str, ...]


@dataclass(frozen=True)
class ResearchFile:
    """``states``: ``model``, ``ema`` or both, by research names; ``places``: where each lies in the
    file (``''``: at the top); ``unused``: what else the file holds.
    """

    states: dict[str, dict[str, Tensor]]
    places: dict[str, str]
    unused: list[str]


@dataclass
class _State:
    """Tensors that lie in one dict (``container``) under one prefix (``place``, beginning with the
    dict's own path).
    """

    place: str
    container: Leaf
    tensors: dict[str, Tensor]
    leaves: set[Leaf]

    @property
    def is_average(self) -> bool:
        return bool(_AVERAGE.search(self.place.lower())) and "online" not in self.place.lower()


def read_research(path: Path, keys: Mapping[str, str | None] | None = None) -> ResearchFile:
    """The states of a research checkpoint, a torch file or safetensors; ``keys`` says where
    ``model`` or ``ema`` lies if several could be meant.

    Only tensors, plain containers and an ``argparse.Namespace`` (what the research code keeps its
    options in) are read; a pickle that asks for anything else is refused, and nothing in it runs.
    Raises UserError.
    """
    if not path.is_file():
        raise UserError(f"research checkpoint {path} does not exist")
    tree = _safetensors(path) if path.suffix == ".safetensors" else _torch_file(path)
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold a dict, not {type(tree).__name__}")
    leaves = dict(_leaves(tree))
    found, unused = _find(leaves)
    if not found:
        raise UserError(
            f"{path} has neither model nor ema and is not a bare state dict; it has "
            f"{some('entries', tree)}"
        )
    chosen: dict[str, _State] = {}
    for role in ("model", "ema"):
        key = (keys or {}).get(role)
        candidates = [s for s in found if key is not None or s.is_average == (role == "ema")]
        state = _choose(path, role, candidates, key)
        if state is not None:
            chosen[role] = state
    for role, state in chosen.items():
        others = [f"{n} ({v.dtype})" for n, v in state.tensors.items() if not v.is_floating_point()]
        if others:
            raise UserError(
                f"{path}: {role} must hold tensors of floating-point numbers, not "
                f"{some('others', others)}"
            )
    rest = [state for state in found if state not in chosen.values()]
    unused += [state.place or "the tensors at the top" for state in rest]
    return ResearchFile(
        {role: state.tensors for role, state in chosen.items()},
        {role: state.place for role, state in chosen.items()},
        unused,
    )


def _find(leaves: Mapping[Leaf, object]) -> tuple[list[_State], list[str]]:
    """Every state, and the names of what belongs to none."""
    found: dict[tuple[Leaf, str], _State] = {}
    rest: list[Leaf] = []
    for leaf, value in leaves.items():
        match = _OURS.fullmatch(".".join(leaf))
        place = (match["place"] or "") if match else ""
        if match is None or not isinstance(value, Tensor) or _MOMENTS.search(place):
            rest.append(leaf)
            continue
        state = found.setdefault((leaf[:-1], place), _State(place, leaf[:-1], {}, set()))
        state.tensors[match["name"]] = value
        state.leaves.add(leaf)
    most = max((len(state.tensors) for state in found.values()), default=0)
    states = [state for state in found.values() if 2 * len(state.tensors) >= most]
    rest += [leaf for state in found.values() if state not in states for leaf in state.leaves]
    places = [leaf for state in states for leaf in state.leaves]
    used = {leaf[:n] for leaf in places for n in range(len(leaf) + 1)}
    unused: dict[str, None] = {}
    for leaf in rest:
        name = ".".join(leaf)
        near = [s for s in states if s.container == leaf[:-1]]
        near = [s for s in near if not s.place or name.startswith(f"{s.place}.")]
        owner = max(near, key=lambda s: len(s.place), default=None)
        inner = name.removeprefix(f"{owner.place}.") if owner and owner.place else name
        first, dot, _ = inner.partition(".")
        value = leaves[leaf]
        if owner and first not in _BESIDE and isinstance(value, Tensor):
            owner.tensors[inner] = value  # check_research will say that it is too much
        elif owner:
            unused[(f"{owner.place}." if owner.place else "") + first + ".*" * bool(dot)] = None
        else:  # as much of it as no state has a part in
            n = next(n for n in range(1, len(leaf) + 1) if leaf[:n] not in used)
            unused[".".join(leaf[:n])] = None
    return states, list(unused)


def _choose(path: Path, role: str, states: list[_State], key: str | None) -> _State | None:
    if key is not None:
        exact = [s for s in states if s.place == key or s.place.startswith(f"{key}.")]
        states = exact or [state for state in states if state.place.startswith(key)]
        if not states:
            raise UserError(f"--{role}-key ({key}) is not a state of {path}")
    if not states:
        return None
    if all(_same(states[0], other) for other in states[1:]):
        return states[0]
    places = ", ".join(state.place or "''" for state in states)
    raise UserError(
        f"{path} has {len(states)} states that may be the {role}: {places}; say which by "
        f"--{role}-key {states[0].place or repr('')}"
    )


def _same(one: _State, other: _State) -> bool:
    return one.tensors.keys() == other.tensors.keys() and all(
        same_bits(value, other.tensors[name]) for name, value in one.tensors.items()
    )


def _leaves(tree: Mapping, path: Leaf = ()) -> Iterator[tuple[Leaf, object]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*path, str(key)))
        else:
            yield (*path, str(key)), value


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        said = " ".join(str(error).split())[:150]
        raise UserError(f"{path} is refused: not an intact safetensors file: {said}") from None


def _torch_file(path: Path) -> object:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            # Tensors of a zip file stay on disk until they are used.
            return torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except Exception as error:  # a corrupt or hostile file can fail anywhere in the unpickler
        raise UserError(f"{path} is refused: {_why_refused(path, error)}") from None


def _why_refused(path: Path, error: Exception) -> str:
    """One line.  Lists what a pickle asks for when that is why; the scan reads opcodes and runs
    none.
    """
    try:
        asked = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # no zip of torch's: the unpickler's own words remain
        asked = []
    asked = [name for name in asked if name != "argparse.Namespace"]
    if asked:
        return f"it is a pickle with code and not only tensors: {some('names', asked)}"
    named = re.search(r"GLOBAL ([\w.]+)", str(error))
    if named:
        return f"it is a pickle with code and not only tensors: {named[1]}"
    # torch's advice to load it without safety stays out.
    words = " ".join(str(error).split("WeightsUnpickler error:")[-1].split())[:150]
    return f"it is not an intact file of tensors ({type(error).__name__}{words and ': '}{words})"
