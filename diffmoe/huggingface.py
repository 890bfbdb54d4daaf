"""Hugging Face folders: safetensors (sharded when large) under this trainer's names, config.json,
and a model card.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

import diffmoe
from diffmoe.checkpoints.reader import Checkpoint
from diffmoe.checkpoints.writer import save_parts
from diffmoe.config import Config, config_from_tree, config_to_tree, load_config, override
from diffmoe.data.sources import runs_a_program
from diffmoe.errors import UserError
from diffmoe.evaluation.card import Card, card_from_json
from diffmoe.evaluation.decoding import checkpoint_data
from diffmoe.markdown import table
from diffmoe.models.count import count
from diffmoe.models.logical import digest_note, logical_template, weights_digest
from diffmoe.models.pretrained import PARTS, Pretrained, of_checkpoint, read_description
from diffmoe.training.resume import changes, is_of_recipe

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

LARGEST_FILE = 5 * 10**9  # bytes, as other libraries write
_PRIVATE = (
    ("run", "folder"),
    ("data", "shards"),
    ("data", "index"),
)  # paths of the machine that trained
_SCORES = ("fid", "sfid", "inception_score", "precision", "recall")


def export_folder(
    checkpoint: Checkpoint,
    out: Path,
    weights: str,
    limit: int = LARGEST_FILE,
    cards: Sequence[Path] = (),
) -> int:
    """Writes the ``raw``, ``ema`` or ``ema:0.999`` weights of a checkpoint.  Returns the number of
    weight files.

    ``limit``: see :func:`write_folder`.  ``cards``: score cards; one of other weights is a
    UserError.
    """
    model = of_checkpoint(checkpoint, weights)
    return write_folder(
        replace(model, latents=_latents(model.config)), out, limit, _read_cards(cards, model)
    )


def write_folder(
    model: Pretrained,
    out: Path,
    limit: int = LARGEST_FILE,
    scores: Sequence[Card] = (),
    vae: AutoencoderKL | None = None,
) -> int:
    """Writes the folder of a model; it appears whole or not at all.  Returns the number of weight
    files.

    ``limit``: bytes of a file (a larger tensor has one of its own).  ``vae`` goes into ``vae/``."""
    config, tensors = model.config, model.tensors
    partial = out.with_name(f".{out.name}.{os.getpid()}-{threading.get_ident()}.partial")
    partial.mkdir(parents=True)
    try:
        total = 0

        def pieces() -> Iterator[tuple[str, Tensor]]:
            nonlocal total
            thresholds = [name for name in tensors if ".thresholds." in name]
            for name in dict.fromkeys([*logical_template(config.model, config.moe), *thresholds]):
                value = tensors[name]
                total += value.nbytes
                yield name, value

        where = save_parts(partial, "model", pieces(), limit)
        files = _name_parts(partial, where, total)
        (partial / "config.json").write_text(json.dumps(_description(model), indent=1) + "\n")
        (partial / "README.md").write_text(
            model_card(config, model.step, model.weights, model.pool, scores)
        )
        if vae is not None:
            vae.save_pretrained(partial / "vae")
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return files


def _latents(config: Config) -> tuple[float, float] | None:
    """Scale and shift of the training data, where they are latents and their index is here."""
    if config.model.channels in (1, 3) or runs_a_program(config.data.index or config.data.shards):
        return None
    index = checkpoint_data(config, None, None)
    return None if index is None else (index.meta.scale, index.meta.mean)


def folder_config(folder: Path, file: str | None, overrides: list[str]) -> Config:
    """The configuration under which a run starts from such a folder: its own, or the YAML ``file``,
    and overrides.

    Raises UserError where that is another model than the folder's."""
    tree = read_description(folder)
    theirs = config_from_tree(tree["config"])
    if type(tree.get("pool")) is int:  # what a word in moe.pool was
        theirs = override(theirs, [f"moe.pool={tree['pool']}"])
    config = override(theirs, overrides) if file is None else load_config(file, overrides)
    broken, _ = changes(theirs, config)
    other = [change for change in broken if not is_of_recipe(change)]
    if other:
        raise UserError(
            f"{folder} holds another model ({'; '.join(other)}, folder -> {file or 'overrides'})"
        )
    return config


def _name_parts(folder: Path, where: dict[str, Path], total: int) -> int:
    """Gives the parts the names that Hugging Face's loaders look for; returns how many there are."""
    parts = sorted(set(where.values()))
    if len(parts) == 1:
        parts[0].rename(folder / "model.safetensors")
        return 1
    final = {
        path: f"model-{i:05d}-of-{len(parts):05d}.safetensors" for i, path in enumerate(parts, 1)
    }
    for path, name in final.items():
        path.rename(folder / name)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: final[path] for name, path in where.items()},
    }
    (folder / PARTS).write_text(json.dumps(index, indent=1) + "\n")
    return len(parts)


def _description(model: Pretrained) -> dict:
    tree = config_to_tree(model.config)
    for section, key in _PRIVATE:
        del tree[section][key]
    return {
        "model_type": "diffmoe",
        "architectures": ["DiT"],
        "torch_dtype": "float32",
        "diffmoe_version": diffmoe.__version__,
        "weights": model.weights,
        "step": model.step,
        "pool": model.pool,
        "config": tree,
        **({"latents": dict(zip(("scale", "shift"), model.latents))} if model.latents else {}),
        **({"id2label": dict(enumerate(model.class_names))} if model.class_names else {}),
    }


def _read_cards(paths: Sequence[Path], model: Pretrained) -> list[Card]:
    if not paths:
        return []
    digest = weights_digest(model.model())
    return [_read_card(path, model, digest) for path in paths]


def _read_card(path: Path, model: Pretrained, digest: str) -> Card:
    try:
        card = card_from_json(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--scores {path}: {error}") from None
    for name, theirs, ours in (
        ("family", card.family, model.config.model.family),
        ("step", card.step, model.step),
        ("weights", card.weights, model.weights),
        ("weights_sha256", card.weights_sha256, digest),
    ):
        if theirs != ours:
            note = digest_note(theirs, ours) if name == "weights_sha256" else ""
            raise UserError(
                f"--scores {path} is of another model: {name} {theirs} there, {ours} in "
                f"{model.source}{note}"
            )
    return card


def model_card(config: Config, step: int, weights: str, pool: int, scores: Sequence[Card]) -> str:
    """README.md of a folder: what the model is, the recipe that trained it, its scores, and how to
    use it.
    """
    model, moe, train, flow = config.model, config.moe, config.train, config.diffusion
    counts = count(model, moe)
    millions = [f"{(n + counts.positions) / 1e6:.2f} M" for n in (counts.total, counts.activated)]
    mixture = model.family != "dense"
    rows = [
        ("family", model.family),
        ("depth x width, heads", f"{model.depth} x {model.width}, {model.heads}"),
        ("parameters (activated)", f"{millions[0]} ({millions[1]})"),
        (
            "input",
            f"{model.channels} x {model.input_size} x {model.input_size}, patch {model.patch}, {model.classes} "
            "classes",
        ),
    ]
    if mixture:
        rows += [
            (
                "experts",
                f"{moe.experts} {moe.activation}, {moe.shared_experts} shared, every "
                f"{'second ' * moe.interleave}block",
            ),
            ("pool", f"{pool} samples"),
            (
                "experts per token",
                f"{moe.top_k}"
                if model.family == "tc"
                else f"{moe.capacity:g} on average (capacity)",
            ),
        ]
    times = (
        f", t x {flow.time_scale:g}, {flow.time_sampling} times" if flow.process == "flow" else ""
    )
    recipe = [
        ("process", flow.process + times),
        (
            "steps",
            f"{step} of {train.steps}"
            if step
            else "not recorded: imported, under this configuration",
        ),
        ("batch", train.batch),
        (
            "optimizer",
            f"AdamW, lr {train.lr:g} {train.schedule}, warm-up {train.warmup}, betas {train.betas}, weight "
            f"decay {train.weight_decay:g}, clipping {f'{train.clip:g}' if train.clip else 'off'}",
        ),
        (
            "EMA",
            f"{', '.join(f'{decay:g}' for decay in train.ema_decays)}; these are the {weights.replace('ema', 'EMA')} weights",
        ),
        ("label drop", f"{train.label_drop:g}"),
        ("flip", "yes" if config.data.flip else "no"),
        ("seed", config.run.seed),
    ]
    return "\n".join(
        [
            "---",
            "library_name: diffmoe",
            "tags:",
            "- diffusion-transformer",
            "- class-conditional-image-generation",
            *(["- mixture-of-experts"] if mixture else []),
            "---",
            "",
            f"# {model.family} {model.depth} x {model.width}, step {step}",
            "",
            "A class-conditional diffusion transformer trained with the DiffMoE trainer (method: arXiv 2503.14487).",
            "",
            "## Model",
            "",
            *table(("", ""), rows),
            "",
            "## Recipe",
            "",
            *table(("", ""), recipe),
            "",
            "## Scores",
            "",
            *_score_table(scores),
            "",
            "## Use",
            "",
            "```python",
            "from diffmoe import DiffMoEPipeline",
            "",
            'pipe = DiffMoEPipeline.from_pretrained("this folder, or owner/name")',
            "pipe(num_images=4).images",
            "```",
            "",
        ]
    )


def _score_table(scores: Sequence[Card]) -> list[str]:
    if not scores:
        return ["None were given at export."]
    rows = []
    for card in scores:
        values = [getattr(card.scores, name) for name in _SCORES]
        routing = card.routing if card.gamma is None else f"{card.routing}, gamma {card.gamma:g}"
        if card.capacity is not None:
            routing += f", capacity {card.capacity:g}"
        rows.append(
            (
                *values,
                card.count,
                f"{card.cfg:g}",
                f"{card.sampler}, {card.steps}",
                routing,
                f"{card.reference} ({card.reference_sha256[:12]})",
                f"{card.extractor} ({card.extractor_sha256[:12]})",
            )
        )
    return table(
        (
            "FID ↓",
            "sFID ↓",
            "IS ↑",
            "precision ↑",
            "recall ↑",
            "images",
            "cfg",
            "sampler, steps",
            "routing",
            "reference",
            "features",
        ),
        rows,
    )
