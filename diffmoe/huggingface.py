"""Hugging Face folders: safetensors under this trainer's names, config.json, a model card."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from huggingface_hub import ModelCardData, save_torch_state_dict

import diffmoe
from diffmoe.checkpoints.reader import Checkpoint
from diffmoe.config import Config, config_from_tree, config_to_tree, load_config, override
from diffmoe.data.vae import Vae
from diffmoe.errors import UserError
from diffmoe.evaluation.card import Card, read_card
from diffmoe.evaluation.decoding import data_latents
from diffmoe.families import TOKENS_CHOOSE
from diffmoe.markdown import table
from diffmoe.models.count import count
from diffmoe.models.logical import digest_note, fresh_buffers, logical_template, weights_digest
from diffmoe.models.matrices import MUON
from diffmoe.models.pretrained import Pretrained, of_checkpoint, read_description
from diffmoe.training.resume import changes, is_of_recipe

LARGEST_FILE = 5 * 10**9  # bytes, as other libraries write
# Places of the machine that trained, and what cannot be without them.
_PRIVATE = {
    "run": ("folder",),
    "data": ("shards", "index", "validation", "cache"),
    "train": ("mirror", "mirror_mb_s", "validate_every", "score_every"),
    "score": ("reference", "extractor", "vae"),
}
_USE = """```python
from diffmoe import DiffMoEPipeline

folder = "."  # where this file is; or owner/name, on the hub
pipe = DiffMoEPipeline.from_pretrained(folder)
pipe(num_images=4).images
```"""


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
    digest = weights_digest(model.model()) if cards else ""
    scores = [_read_card(path, model, digest) for path in cards]
    return write_folder(replace(model, latents=data_latents(model.config)), out, limit, scores)


def write_folder(
    model: Pretrained,
    out: Path,
    limit: int = LARGEST_FILE,
    scores: Sequence[Card] = (),
    vae: Vae | None = None,
) -> int:
    """Writes the folder of a model; it appears whole or not at all.  Returns the number of weight
    files.

    ``limit``: bytes of a file (a larger tensor has one of its own).  ``vae`` goes into ``vae/``."""
    config, tensors = model.config, model.tensors
    partial = out.with_name(f".{out.name}.{os.getpid()}-{threading.get_ident()}.partial")
    partial.mkdir(parents=True)
    try:
        sizes = config.model, config.moe
        running = [name for name in fresh_buffers(*sizes) if name in tensors]
        names = dict.fromkeys([*logical_template(*sizes), *running])
        # Copies: experts are views of one tensor, which would be one file's.
        save_torch_state_dict(
            {name: tensors[name].clone() for name in names}, partial, max_shard_size=limit
        )
        files = len(list(partial.glob("*.safetensors")))
        (partial / "config.json").write_text(json.dumps(_description(model), indent=1) + "\n")
        card = model_card(config, model.step, model.weights, model.pool, scores)
        (partial / "README.md").write_text(card)
        if vae is not None:
            vae.model.save_pretrained(partial / "vae")  # type: ignore[attr-defined]  # diffusers
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return files


def folder_config(folder: Path, file: str | None, overrides: list[str]) -> Config:
    """The configuration under which a run starts from such a folder: its own, or the YAML ``file``,
    and overrides.

    Raises UserError where that is another model than the folder's."""
    tree = read_description(folder)
    theirs = config_from_tree(tree["config"])
    if "pool" in tree:  # what a word in moe.pool was
        theirs = override(theirs, [f"moe.pool={tree['pool']}"])
    config = override(theirs, overrides) if file is None else load_config(file, overrides)
    broken, _ = changes(theirs, config)
    # A projector is none of a folder's weights: whichever is asked for is new.
    projector = "train.repa_"
    other = [c for c in broken if not is_of_recipe(c) and not c.startswith(projector)]
    if other:
        raise UserError(
            f"{folder} holds another model ({'; '.join(other)}, folder -> {file or 'overrides'})"
        )
    return config


def _description(model: Pretrained) -> dict:
    config = config_to_tree(model.config)
    for section, keys in _PRIVATE.items():
        for key in keys:
            del config[section][key]
    sample = model.config.sample
    for key in ("guide", "pair"):  # those that are not here are the hub's
        place = getattr(sample, key)
        if place not in (None, "capacity") and Path(place.partition("@")[0]).exists():
            del config["sample"][key]
    tree = {
        "model_type": "diffmoe",
        "architectures": ["DiT"],
        "torch_dtype": "float32",
        "diffmoe_version": diffmoe.__version__,
        "weights": model.weights,
        "step": model.step,
        "pool": model.pool,
        "config": config,
    }
    if model.latents:
        tree["latents"] = dict(zip(("scale", "shift"), model.latents))
    if model.class_names:
        tree["id2label"] = dict(enumerate(model.class_names))
    return tree


def _read_card(path: Path, model: Pretrained, digest: str) -> Card:
    try:
        card = read_card(path)
    except UserError as error:
        raise UserError(f"--scores {error}") from None
    note = digest_note(card.weights_sha256, digest)
    for name, ours in (
        ("family", model.config.model.family),
        ("step", model.step),
        ("weights_sha256", digest),
    ):
        if (theirs := getattr(card, name)) != ours:
            raise UserError(
                f"--scores {path} is of another model: {name} {theirs} there, {ours} in "
                f"{model.source}{note * (name == 'weights_sha256')}"
            )
    return card


def model_card(config: Config, step: int, weights: str, pool: int, scores: Sequence[Card]) -> str:
    """README.md of a folder: the model, its recipe and scores, and how to use it."""
    model, moe = config.model, config.moe
    counts = count(model, moe)
    total, active = (
        f"{(n + counts.positions) / 1e6:.2f} M" for n in (counts.total, counts.activated)
    )
    shape = f"{model.channels} x {model.input_size} x {model.input_size}"
    tags = ["diffusion-transformer", "class-conditional-image-generation"]
    rows: list[tuple[str, object]] = [
        ("family", model.family),
        ("depth x width, heads", f"{model.depth} x {model.width}, {model.heads}"),
        ("parameters (activated)", f"{total} ({active})"),
        ("input", f"{shape}, patch {model.patch}, {model.classes} classes"),
    ]
    if model.family != "dense":
        tags.append("mixture-of-experts")
        where = f"every {'second ' * moe.interleave}block"
        met = str(moe.top_k)
        if model.family not in TOKENS_CHOOSE:
            met = f"{moe.capacity:g} on average (capacity)"
        rows += [
            ("experts", f"{moe.experts} {moe.activation}, {moe.shared_experts} shared, {where}"),
            ("pool", f"{pool} samples"),
            ("experts per token", met),
        ]
    lines = [
        "---",
        ModelCardData(library_name="diffmoe", tags=tags).to_yaml(),
        "---",
        "",
        f"# {model.family} {model.depth} x {model.width}, step {step}",
        "",
        "A class-conditional diffusion transformer trained with the DiffMoE trainer (method: arXiv "
        "2503.14487).",
    ]
    sections = {
        "Model": table(("", ""), rows),
        "Recipe": table(("", ""), _recipe(config, step, weights)),
        "Scores": _score_tables(scores),
        "Use": _USE.splitlines(),
    }
    for title, text in sections.items():
        lines += ["", f"## {title}", "", *text]
    return "\n".join(lines) + "\n"


def _recipe(config: Config, step: int, weights: str) -> list[tuple[str, object]]:
    train, flow = config.train, config.diffusion
    process: str = flow.process
    if process == "flow":
        process += ", predicts x" if flow.prediction == "x" else ""
        process += f", {flow.time_sampling.replace('_', '-')} times"
        if flow.time_shift != 1:
            process += f" shifted by {flow.time_shift:g}"
        if flow.time_range != (0, 1):
            process += f" in {list(flow.time_range)}"
        if flow.time_scale != 1:
            process += f", t multiplied by {flow.time_scale:g} before its embedding"
    losses = {"dispersive": train.dispersive_weight, "direction": train.direction_weight}
    losses["REPA"] = train.repa_weight
    added = [f"{name} loss times {weight:g}" for name, weight in losses.items() if weight]
    added += ["min-SNR weights"] if flow.loss_weight == "min_snr" else []
    decays = ", ".join(f"{decay:g}" for decay in train.ema_decays)
    decays += "".join(f", length {length:g}" for length in train.ema_lengths)
    return [
        ("process", ", ".join([process, *added])),
        (
            "steps",
            f"{step} of {train.steps}"
            if step
            else "not recorded: imported, under this configuration",
        ),
        (
            "batch",
            f"{train.batch}; rate, warm-up and EMA are stated for {train.recipe_batch} and follow "
            "it (train.recipe_batch)"
            if train.recipe_batch
            else train.batch,
        ),
        (
            "optimizer",
            f"{'Muon and ' * (train.optimizer == MUON)}AdamW, lr {train.lr:g} {train.schedule}, "
            f"warm-up {train.warmup}, "
            f"betas {train.betas}, weight decay {train.weight_decay:g}, clipping "
            + (f"{train.clip:g}" if train.clip else "off"),
        ),
        ("EMA", f"{decays}; these are the {weights.replace('ema', 'EMA')} weights"),
        ("label drop", f"{train.label_drop:g}"),
        ("flip", "yes" if config.data.flip else "no"),
        ("seed", config.run.seed),
    ]


def _score_tables(scores: Sequence[Card]) -> list[str]:
    """A table for each feature network: scores by different ones have different names."""
    if not scores:
        return ["None were given at export."]
    by_names: dict[tuple[str, ...], list[Card]] = {}
    for card in scores:
        by_names.setdefault(tuple(card.score_names.values()), []).append(card)
    lines = [line for cards in by_names.values() for line in ("", *_score_table(cards))]
    return lines[1:]


def _score_table(scores: Sequence[Card]) -> list[str]:
    names = scores[0].score_names
    head = [name.replace("Inception Score", "IS") for name in names.values()]
    head += ["images", "cfg", "sampler, steps", "routing", "reference", "features"]
    rows = []
    for card in scores:
        routing = str(card.routing)
        for name in ("gamma", "capacity"):
            if (value := getattr(card, name)) is not None:
                routing += f", {name} {value:g}"
        rows.append(
            (
                *(getattr(card.scores, name) for name in names),
                card.count,
                f"{card.cfg:g}{card.guidance}",
                f"{card.sampler}, {card.steps}",
                routing,
                f"{card.reference} ({card.reference_sha256[:12]})",
                f"{card.extractor} ({card.extractor_sha256[:12]})",
            )
        )
    return table(head, rows)
