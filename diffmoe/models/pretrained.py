"""Trained weights by the place where they lie: a checkpoint, a folder that ``export --format hf``
wrote, or the hub.

Nothing in them is ever executed: configuration and index are JSON, weights are safetensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from diffmoe.checkpoints.reader import BUFFERS, Checkpoint, Tensors, open_tensors
from diffmoe.config import Config, config_from_tree, validate
from diffmoe.errors import UserError
from diffmoe.models.dit import DiT
from diffmoe.models.logical import (
    fresh_buffers,
    load_logical,
    logical_template,
    some,
    whole_weights,
)
from diffmoe.paths import check_folder, check_hub_id, expand_path
from diffmoe.remote import AnyPath

PARTS = "model.safetensors.index.json"  # which file holds what, where there are several
_KINDS = {str: "a text", int: "an integer"}
_FILES = ["*.json", "*.safetensors", "vae/*.json", "vae/*.safetensors"]


@dataclass(frozen=True)
class Pretrained:
    """Weights, unread, and what is known of them.

    ``tensors``: weights and thresholds by logical name.  ``weights``: which of the run's they are
    (``raw``, ``ema``, ``ema:0.999``).  ``pool``: in samples, as it was resolved.  ``latents``:
    scale and shift of the training data (``x = (z
    - shift) * scale``), where they are known.  ``source``: the folder."""

    config: Config
    tensors: Mapping[str, Tensor]
    weights: str
    step: int
    pool: int
    class_names: tuple[str, ...]
    latents: tuple[Any, Any] | None
    source: AnyPath

    def model(self) -> DiT:
        """The model with all experts, fp32 on the CPU, in eval mode.  UserError where the weights
        do not fit.
        """
        model = DiT(self.config.model, self.config.moe, time_scale=self.config.diffusion.time_scale)
        load_logical(model, self.tensors)
        return model.eval()


def open_pretrained(
    name: str | Path, weights: str | None = None, revision: str | None = None
) -> Pretrained:
    """What lies at ``name``: an exported folder, a checkpoint's or run's folder (its newest), or a
    repository of the hub (owner/name, at ``revision``).

    ``weights``: ``raw``, ``ema`` or ``ema:0.999`` (default: a checkpoint's first EMA, a folder's
    own).  Raises UserError where there is nothing such.
    """
    name = expand_path(str(name))
    folder = Path(name)
    if not folder.is_dir():
        folder = _downloaded(name, revision)
    elif revision is not None:
        raise UserError(
            f"revision ({revision}) goes with a repository of the hub; {name} is a folder"
        )
    if not (folder / "config.json").is_file():
        return of_checkpoint(Checkpoint(folder), str(weights or "ema"))
    tree, tensors = read_folder(folder)
    config = config_from_tree(tree["config"])
    validate(config)
    theirs = tree.get("weights", "ema")
    if weights not in (None, theirs):
        raise UserError(f"weights ({weights}) are not in {name}, which holds {theirs}")
    whole_weights(tensors, {}, config.model, config.moe, name)
    sizes = (config.model, config.moe)
    if unexpected := sorted(set(tensors) - {*logical_template(*sizes), *fresh_buffers(*sizes)}):
        raise UserError(
            f"{name} holds {some('unexpected tensors', unexpected)} for model.family "
            f"({config.model.family})"
        )
    return Pretrained(
        config=config,
        tensors=tensors,
        weights=theirs,
        step=tree.get("step", 0),
        pool=tree.get("pool", 1),
        class_names=folder_class_names(tree, config),
        latents=tree.get("latents"),
        source=folder,
    )


def of_checkpoint(checkpoint: Checkpoint, weights: str) -> Pretrained:
    """The ``raw``, ``ema`` or ``ema:0.999`` weights of a checkpoint.  UserError where it has none
    such.
    """
    config, source = checkpoint.config(), f"{weights} of {checkpoint.path}"
    own, buffers = checkpoint.weights(weights), checkpoint.tensors(BUFFERS)
    return Pretrained(
        config=config,
        tensors=whole_weights(own, buffers, config.model, config.moe, source),
        weights=weights,
        step=checkpoint.step,
        pool=checkpoint.pool,
        class_names=checkpoint.manifest.class_names,
        latents=None,
        source=checkpoint.path,
    )


def read_folder(folder: Path) -> tuple[dict, Tensors]:
    """config.json and the tensors, unread, of an exported folder.  Raises UserError when files are
    missing.
    """
    tree = read_description(folder)
    try:
        index = json.loads((folder / PARTS).read_bytes()) if (folder / PARTS).exists() else None
        names = {"model.safetensors"} if index is None else set(index["weight_map"].values())
        paths = [folder / Path(name).name for name in sorted(names)]
        absent = [path.name for path in paths if not path.is_file()]
    except (OSError, AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(
            f"{folder / PARTS} does not say which files hold the weights: {str(error)[:100]}"
        ) from None
    if absent:
        raise UserError(f"{folder} lacks {', '.join(absent[:3])} ({len(absent)} missing)")
    return tree, open_tensors(paths)


def read_description(folder: Path) -> dict:
    """config.json of an exported folder: ``config``, ``weights``, ``step``, ``pool``, ``latents``,
    ``id2label``.  UserError where it is not one.
    """
    check_folder(folder, "model")
    path, what = folder / "config.json", f"{folder} is not a folder of a DiffMoE model"
    try:
        tree = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{what}: config.json: {str(error)[:100]}") from None
    if not isinstance(tree, dict) or not isinstance(tree.get("config"), dict):
        raise UserError(f"{what}: config.json has no section config")
    for name, kind in (("weights", str), ("step", int), ("pool", int)):
        if name in tree and type(tree[name]) is not kind:
            raise UserError(f"{path}: {name} ({tree[name]!r}) must be {_KINDS[kind]}")
    if (latents := tree.get("latents")) is not None:
        try:
            both = latents["scale"], latents["shift"]  # each a number, or a list by channel
            tree["latents"] = tuple(
                tuple(map(float, each)) if isinstance(each, list) else float(each) for each in both
            )
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"{path}: latents ({latents!r}) must hold the numbers scale and shift"
            ) from None
    return tree


def folder_class_names(tree: dict, config: Config) -> tuple[str, ...]:
    """The classes' names in a folder's config.json, in order; none where it has none.  UserError
    where they are not those of model.classes.
    """
    names = tree.get("id2label") or {}
    wanted = [str(number) for number in range(config.model.classes)]
    if names and (not isinstance(names, dict) or sorted(names) != sorted(wanted)):
        entries = f"{len(names)} entries" if isinstance(names, (dict, list)) else repr(names)
        raise UserError(
            f"config.json: id2label ({entries}) must name classes 0 to {config.model.classes - 1}: "
            "correct it, or take it out to import without names"
        )
    return tuple(str(names[number]) for number in wanted if names)


def _downloaded(name: str, revision: str | None) -> Path:
    check_hub_id(name, "model")
    from huggingface_hub import snapshot_download  # seconds, and needless for folders

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_FILES))
    except (OSError, ValueError) as error:
        said = str(error).strip().partition("\n")[0][:200]
        raise UserError(
            f"there is no folder {name} here, and no repository of the hub gives it: {said}"
        ) from None
