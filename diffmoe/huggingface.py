"""Hugging Face folders: safetensors (sharded when large) under this trainer's names, config.json, and a model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from diffmoe.errors import UserError
import diffmoe
from diffmoe.checkpoints.reader import BUFFERS, Checkpoint, Tensors, open_tensors
from diffmoe.checkpoints.writer import save_parts
from diffmoe.config import Config, config_from_tree, config_to_tree, load_config, override, validate
from diffmoe.evaluation.card import Card, card_from_json
from diffmoe.markdown import table
from diffmoe.models.count import count
from diffmoe.models.dit import DiT
from diffmoe.models.interchange import digest_note, load_logical, logical_template, weights_digest, whole_weights
from diffmoe.training.resume import changes, is_of_recipe

_INDEX = "model.safetensors.index.json"
_PRIVATE = {"run": "folder", "data": "shards"}  # paths of the machine that trained
_SCORES = ("fid", "sfid", "inception_score", "precision", "recall")


def write_folder(checkpoint: Checkpoint, out: Path, weights: str, limit: int, cards: list[Path]) -> int:
    """Writes the ``raw``, ``ema`` or ``ema:0.999`` weights of a checkpoint.  Returns the number of weight files.

    ``limit``: bytes of a file (a larger tensor has one of its own).  ``cards``: score cards; one of other weights is a
    UserError.  The folder appears whole or not at all."""
    config = checkpoint.config()
    tensors = whole_weights(checkpoint.weights(weights), checkpoint.tensors(BUFFERS), config.model, config.moe,
                            f"{weights} of {checkpoint.path}")
    scores = _read_cards(cards, checkpoint, weights, tensors)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        total = 0

        def pieces() -> Iterator[tuple[str, Tensor]]:
            nonlocal total
            buffers = [name for name in checkpoint.tensors(BUFFERS) if ".thresholds." in name]
            for name in dict.fromkeys([*logical_template(config.model, config.moe), *buffers]):
                value = tensors[name]
                total += value.nbytes
                yield name, value

        where = save_parts(partial, "model", pieces(), limit)
        files = _name_parts(partial, where, total)
        (partial / "config.json").write_text(json.dumps(_description(checkpoint, config, weights), indent=1) + "\n")
        (partial / "README.md").write_text(model_card(config, checkpoint.step, weights, checkpoint.pool, scores))
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return files


def load_folder(folder: Path) -> tuple[DiT, Config]:
    """The model of a folder that :func:`write_folder` wrote, on the CPU, in eval mode, and its configuration.

    Raises UserError when files are missing or do not fit."""
    tree, tensors = read_folder(folder)
    config = config_from_tree(tree["config"])
    validate(config)
    model = DiT(config.model, config.moe, time_scale=config.diffusion.time_scale)
    load_logical(model, tensors)
    return model.eval(), config


def read_folder(folder: Path) -> tuple[dict, Tensors]:
    """config.json and the tensors, unread, of a folder that :func:`write_folder` wrote.  Raises UserError when files are
    missing."""
    tree = _read_description(folder)
    try:
        index = json.loads((folder / _INDEX).read_text()) if (folder / _INDEX).is_file() else None
        names = set(index["weight_map"].values()) if index else {"model.safetensors"}
        paths = [folder / Path(name).name for name in sorted(names)]
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise UserError(f"{folder} is no folder of a DiffMoE model: {error}") from None
    absent = [path.name for path in paths if not path.is_file()]
    if absent:
        raise UserError(f"{folder} lacks {', '.join(absent[:3])} ({len(absent)} missing)")
    return tree, open_tensors(paths)


def folder_config(folder: Path, file: str | None, overrides: list[str]) -> Config:
    """The configuration under which a run starts from such a folder: its own, or the YAML ``file``, and overrides.

    Raises UserError where that is another model than the folder's."""
    tree = _read_description(folder)
    theirs = config_from_tree(tree["config"])
    if type(tree.get("pool")) is int:  # what a word in moe.pool was
        theirs = override(theirs, [f"moe.pool={tree['pool']}"])
    config = override(theirs, overrides) if file is None else load_config(file, overrides)
    broken, _ = changes(theirs, config)
    other = [change for change in broken if not is_of_recipe(change)]
    if other:
        raise UserError(f"{folder} holds another model ({'; '.join(other)}, folder -> {file or 'overrides'})")
    return config


def folder_class_names(tree: dict, config: Config) -> tuple[str, ...]:
    """The classes' names in a folder's config.json, in order; none where it has none.  UserError where they are not those of
    model.classes."""
    names = tree.get("id2label") or {}
    wanted = [str(number) for number in range(config.model.classes)]
    if names and (not isinstance(names, dict) or sorted(names) != sorted(wanted)):
        raise UserError(f"config.json: id2label ({len(names)} entries) must name classes 0 to {config.model.classes - 1}: "
                        "correct it, or take it out to import without names")
    return tuple(str(names[number]) for number in wanted if names)


def _read_description(folder: Path) -> dict:
    try:
        tree = json.loads((folder / "config.json").read_text())
        tree["config"] = dict(tree["config"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder} is no folder of a DiffMoE model: {error}") from None
    return tree


def _name_parts(folder: Path, where: dict[str, Path], total: int) -> int:
    """Gives the parts the names that Hugging Face's loaders look for; returns how many there are."""
    parts = sorted(set(where.values()))
    if len(parts) == 1:
        parts[0].rename(folder / "model.safetensors")
        return 1
    final = {path: f"model-{i:05d}-of-{len(parts):05d}.safetensors" for i, path in enumerate(parts, 1)}
    for path, name in final.items():
        path.rename(folder / name)
    index = {"metadata": {"total_size": total}, "weight_map": {name: final[path] for name, path in where.items()}}
    (folder / _INDEX).write_text(json.dumps(index, indent=1) + "\n")
    return len(parts)


def _description(checkpoint: Checkpoint, config: Config, weights: str) -> dict:
    tree = config_to_tree(config)
    for section, key in _PRIVATE.items():
        del tree[section][key]
    return {"model_type": "diffmoe", "architectures": ["DiT"], "torch_dtype": "float32", "diffmoe_version": diffmoe.__version__,
            "weights": weights, "step": checkpoint.step, "pool": checkpoint.pool, "config": tree,
            **({"id2label": dict(enumerate(names))} if (names := checkpoint.manifest.class_names) else {})}


def _read_cards(paths: list[Path], checkpoint: Checkpoint, weights: str, tensors: Mapping[str, Tensor]) -> list[Card]:
    if not paths:
        return []
    config = checkpoint.config()
    model = DiT(config.model, config.moe)
    load_logical(model, tensors)
    digest = weights_digest(model)
    return [_read_card(path, checkpoint, weights, digest) for path in paths]


def _read_card(path: Path, checkpoint: Checkpoint, weights: str, digest: str) -> Card:
    try:
        card = card_from_json(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--scores {path}: {error}") from None
    family = checkpoint.config().model.family
    for name, theirs, ours in (("family", card.family, family), ("step", card.step, checkpoint.step),
                               ("weights", card.weights, weights), ("weights_sha256", card.weights_sha256, digest)):
        if theirs != ours:
            note = digest_note(theirs, ours) if name == "weights_sha256" else ""
            raise UserError(f"--scores {path} is of another model: {name} {theirs} there, {ours} in "
                            f"{checkpoint.path}{note}")
    return card


def model_card(config: Config, step: int, weights: str, pool: int, scores: list[Card]) -> str:
    """README.md of a folder: what the model is, the recipe that trained it, its scores, and how to use it."""
    model, moe, train, flow = config.model, config.moe, config.train, config.diffusion
    counts = count(model, moe)
    millions = [f"{(n + counts.positions) / 1e6:.2f} M" for n in (counts.total, counts.activated)]
    mixture = model.family != "dense"
    rows = [("family", model.family), ("depth x width, heads", f"{model.depth} x {model.width}, {model.heads}"),
            ("parameters (activated)", f"{millions[0]} ({millions[1]})"),
            ("input", f"{model.channels} x {model.input_size} x {model.input_size}, patch {model.patch}, {model.classes} "
                      "classes")]
    if mixture:
        rows += [("experts", f"{moe.experts} {moe.activation}, {moe.shared_experts} shared, every "
                             f"{'second ' * moe.interleave}block"),
                 ("pool", f"{pool} samples"),
                 ("experts per token", f"{moe.top_k}" if model.family == "tc" else f"{moe.capacity:g} on average (capacity)")]
    times = f", t x {flow.time_scale:g}, {flow.time_sampling} times" if flow.process == "flow" else ""
    recipe = [("process", flow.process + times),
              ("steps", f"{step} of {train.steps}" if step else "not recorded: imported, under this configuration"),
              ("batch", train.batch),
              ("optimizer", f"AdamW, lr {train.lr:g} {train.schedule}, warm-up {train.warmup}, betas {train.betas}, weight "
                            f"decay {train.weight_decay:g}, clipping {f'{train.clip:g}' if train.clip else 'off'}"),
              ("EMA", f"{', '.join(f'{decay:g}' for decay in train.ema_decays)}; these are the {weights.replace('ema', 'EMA')} weights"),
              ("label drop", f"{train.label_drop:g}"), ("flip", "yes" if config.data.flip else "no"), ("seed", config.run.seed)]
    return "\n".join([
        "---", "library_name: diffmoe", "tags:", "- diffusion-transformer", "- class-conditional-image-generation",
        *(["- mixture-of-experts"] if mixture else []), "---", "",
        f"# {model.family} {model.depth} x {model.width}, step {step}", "",
        "A class-conditional diffusion transformer trained with the DiffMoE trainer (method: arXiv 2503.14487).", "",
        "## Model", "", *table(("", ""), rows), "", "## Recipe", "", *table(("", ""), recipe), "",
        "## Scores", "", *_score_table(scores), "", "## Use", "", "```python", "from pathlib import Path",
        "from diffmoe.huggingface import load_folder", "", 'model, config = load_folder(Path("this folder"))', "```", ""])


def _score_table(scores: list[Card]) -> list[str]:
    if not scores:
        return ["None were given at export."]
    rows = []
    for card in scores:
        values = [getattr(card.scores, name) for name in _SCORES]
        routing = card.routing if card.gamma is None else f"{card.routing}, gamma {card.gamma:g}"
        if card.capacity is not None:
            routing += f", capacity {card.capacity:g}"
        rows.append((*values, card.count, f"{card.cfg:g}",
                     f"{card.sampler}, {card.steps}", routing, f"{card.reference} ({card.reference_sha256[:12]})",
                     f"{card.extractor} ({card.extractor_sha256[:12]})"))
    return table(("FID ↓", "sFID ↓", "IS ↑", "precision ↑", "recall ↑", "images", "cfg", "sampler, steps", "routing",
                  "reference", "features"), rows)
