"""Going on from a checkpoint: what of the configuration may have changed since, and what was left out on the way."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from diffmoe.config import Config, config_to_tree
from diffmoe.deepspeed_json import precision, zero_stage
from diffmoe.errors import UserError
from diffmoe.layout import Layout

# What may not change: the model, the data and their order, the noise.  Whole sections, then single fields.
_MEANING_SECTIONS = ("model", "moe", "diffusion")
_MEANING_FIELDS = ("run.seed", "train.batch", "data.streams", "data.window", "data.flip")
# Resolved to numbers (moe.pool, micro-batches) or about this place only.
_NO_CHANGE = ("moe.pool", "run.folder")
_LEFT_OUT = "left_out.json"


def changes(before: Config, now: Config) -> tuple[list[str], list[str]]:
    """(what breaks the meaning of the checkpoint, what may change) as ``train.steps: 8 -> 12``."""
    old, new = _flat(config_to_tree(before)), _flat(config_to_tree(now))
    broken, accepted = [], []
    for name in new:
        if old[name] != new[name] and name not in _NO_CHANGE:
            breaks = name in _MEANING_FIELDS or name.partition(".")[0] in _MEANING_SECTIONS
            (broken if breaks else accepted).append(f"{name}: {old[name]} -> {new[name]}")
    return broken, accepted


def check_resumable(checkpoint: Any, config: Config, layout: Layout, data: str) -> list[str]:
    """The changes since ``checkpoint`` (a ``Checkpoint``) that a run may make; UserError when it belongs to another run.

    ``data`` is the data set's fingerprint."""
    broken, accepted = changes(checkpoint.config(), config)
    if config.model.family != "dense" and checkpoint.pool != layout.pool:
        broken.append(f"moe.pool (samples): {checkpoint.pool} -> {layout.pool}")
    there = checkpoint.counters.get("data", data)
    if there != data:
        broken.append(f"data.shards' contents: {there[:12]} -> {data[:12]}")
    if broken:
        raise UserError(f"{checkpoint.path} belongs to another run ({'; '.join(broken)}); choose another run.folder")
    if checkpoint.ranks != layout.ranks:
        accepted.append(f"ranks: {checkpoint.ranks} -> {layout.ranks}")
    return accepted


def engine_changes(folder: Path, now: dict) -> list[str]:
    """How DeepSpeed trains otherwise than at the last start in this run folder.  ``now``: the merged JSON."""
    try:
        before = json.loads((folder / "deepspeed.json").read_text())
        pairs = [(name, of(before), of(now)) for name, of in (("ZeRO stage", zero_stage), ("precision", precision))]
    except (OSError, ValueError, AttributeError):
        return []  # there was none, or nothing that a start wrote
    return [f"{name}: {old} -> {new}" for name, old, new in pairs if old != new]


def read_left_out(folder: Path) -> list[int]:
    """Steps that the run folder says to leave out.  UserError for anything but a JSON list of step numbers."""
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
    """Before the run goes on: a start that finds only older checkpoints leaves the same steps out."""
    partial = folder / f".{_LEFT_OUT}.partial"
    partial.write_text(json.dumps(steps) + "\n")
    os.replace(partial, folder / _LEFT_OUT)


def _flat(tree: dict, stem: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{stem}{key}.") if isinstance(value, dict) else {f"{stem}{key}": value}
    return found
