"""Resuming from a checkpoint: what of the configuration may have changed since, and what was left
out on the way.

A run may go on under another recipe (``train --new-recipe``): weights, moments, averages and
thresholds stay, steps go on being counted, and so do samples, whose numbers decide data, noise,
times and label drops.  A recipe's step s begins with sample (s + shift) * batch, where ``shift`` is
the least that repeats no number of the recipe before.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffmoe.config import Config, config_to_tree
from diffmoe.deepspeed_json import precision, zero_stage
from diffmoe.errors import UserError
from diffmoe.files import replacing
from diffmoe.layout import Layout
from diffmoe.models.matrices import MUON

# What may not change: the model, the data and their order, the noise.  Whole sections, then single
# fields.
_MEANING_SECTIONS = ("model", "moe", "diffusion")
_MEANING_FIELDS = ("run.seed", "train.batch", "data.streams", "data.window", "data.flip")
# Of the projector, which a checkpoint has or has not.
_PROJECTOR = ("train.repa_block", "train.repa_width", "train.repa_hidden")
# Chosen at the first start where they are null (imported weights, which no run has read data for).
_CHOSEN = ("data.streams", "data.window")
# What only a fresh model asks for.
_START_FIELDS = ("moe.router_start",)
_POOL, _CONTENTS = "moe.pool (samples)", "data.shards' contents"
# What of these a new recipe may change: the weights are the same function under it.
_RECIPE_FIELDS = (
    *_MEANING_FIELDS,
    _POOL,
    _CONTENTS,
    "model.input_size",
    "model.position_scale",
    "moe.capacity_hold",
    "moe.capacity_until",
    "moe.balance_weight",
    "moe.bias_rate",
    "moe.contrast_temperature",
    "moe.predictor_weight",
    "moe.threshold_decay",
    "diffusion.time_sampling",
    "diffusion.time_mean",
    "diffusion.time_std",
    "diffusion.time_shift",
    "diffusion.time_range",
    "diffusion.loss_weight",
)
# Resolved to numbers (moe.pool, micro-batches) or about this place only.
_NO_CHANGE = ("moe.pool", "run.folder")
_LEFT_OUT = "left_out.json"


@dataclass(frozen=True)
class Recipe:
    """A change of the recipe: from step ``step`` on, whose first sample has number (step + shift) *
    batch.
    """

    step: int
    shift: int
    changes: list[str]


def changes(before: Config, now: Config) -> tuple[list[str], list[str]]:
    """(what breaks the meaning of the checkpoint, what may change) as ``train.steps: 8 -> 12``."""
    old, new = _flat(config_to_tree(before)), _flat(config_to_tree(now))
    broken: list[str] = []
    accepted: list[str] = []
    for name, value in new.items():
        chosen = name in _CHOSEN and old[name] is None
        if old[name] == value or name in _NO_CHANGE or chosen:
            continue
        meaning = name.partition(".")[0] in _MEANING_SECTIONS and name not in _START_FIELDS
        meaning = meaning or name in (*_MEANING_FIELDS, *_PROJECTOR)
        if name == "train.repa_weight":
            meaning = old[name] == 0  # no projector there; one that is there may rest
        kind = broken if meaning else accepted
        kind.append(f"{name}: {old[name]} -> {value}")
    return broken, accepted


def check_resumable(
    checkpoint: Any, config: Config, layout: Layout, data: str, new_recipe: bool = False
) -> tuple[list[str], list[Recipe]]:
    """The changes since ``checkpoint`` (a ``Checkpoint``) that leave the recipe as it is, and the
    run's changes of it.

    With ``new_recipe`` the last of these is made of what differs now, if anything of the recipe
    does.  UserError when the checkpoint belongs to another run.  ``data`` is the data set's
    fingerprint.
    """
    broken, accepted = changes(checkpoint.config(), config)
    if config.model.family != "dense" and checkpoint.pool != layout.pool:
        broken.append(f"{_POOL}: {checkpoint.pool} -> {layout.pool}")
    there = checkpoint.counters.get("data", data)
    if there != data:
        broken.append(f"{_CONTENTS}: {there[:12]} -> {data[:12]}")
    optimizers = checkpoint.config().train.optimizer, config.train.optimizer
    if checkpoint.step and optimizers[0] != optimizers[1] and MUON in optimizers:
        change = "train.optimizer: {} -> {}".format(*optimizers)
        accepted.remove(change)
        broken.append(f"{change}, which keeps other moments")
    if checkpoint.ranks != layout.ranks:
        accepted.append(f"ranks: {checkpoint.ranks} -> {layout.ranks}")
    recipes = [Recipe(**recipe) for recipe in checkpoint.counters.get("recipes", [])]
    if not broken:
        return accepted, recipes
    other = [change for change in broken if not is_of_recipe(change)]
    if other or not new_recipe:
        text = (
            f"{checkpoint.path} belongs to another run ({'; '.join(other or broken)}); "
            "choose another run.folder"
        )
        if not other:
            text += (
                ", or say --new-recipe to resume under the new recipe with these weights, "
                "moments and averages"
            )
        raise UserError(text)
    shift = -(-checkpoint.samples // layout.batch) - checkpoint.step
    return accepted, [*recipes, Recipe(checkpoint.step, shift, broken)]


def is_of_recipe(change: str) -> bool:
    """Whether a change, ``train.batch: 256 -> 512``, is one that a new recipe may make."""
    return change.partition(": ")[0] in _RECIPE_FIELDS


def recipes_as_counters(recipes: list[Recipe]) -> dict[str, Any]:
    """For the checkpoint's manifest; nothing where the recipe never changed."""
    return {"recipes": [asdict(recipe) for recipe in recipes]} if recipes else {}


def engine_changes(folder: Path, now: dict) -> list[str]:
    """How DeepSpeed trains otherwise than at the last start in this run folder.  ``now``: the
    merged JSON.
    """
    try:
        before = json.loads((folder / "deepspeed.json").read_text())
        old, new = (
            {"ZeRO stage": zero_stage(tree), "precision": precision(tree)} for tree in (before, now)
        )
    except (OSError, ValueError, AttributeError):
        return []  # there was none, or nothing that a start wrote
    return [f"{name}: {old[name]} -> {new[name]}" for name in old if old[name] != new[name]]


def read_left_out(folder: Path) -> list[int]:
    """Steps that the run folder says to leave out.  UserError for anything but a JSON list of step
    numbers.
    """
    path = folder / _LEFT_OUT
    if not path.exists():
        return []
    try:
        steps = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(steps, list) or not all(type(step) is int and step >= 0 for step in steps):
        raise UserError(f"{path} must hold a list of step numbers, not {steps!r}")
    return steps


def write_left_out(folder: Path, steps: list[int]) -> None:
    """So that a start that finds only older checkpoints leaves the same steps out."""
    with replacing(folder / _LEFT_OUT) as file:
        file.write(json.dumps(steps).encode() + b"\n")


def _flat(tree: dict) -> dict[str, Any]:
    """``section.field`` of a configuration: two levels."""
    return {
        f"{section}.{name}": value
        for section, fields in tree.items()
        for name, value in fields.items()
    }
