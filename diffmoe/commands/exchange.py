"""The subcommands import and export: weights from and to the published research code's files and
Hugging Face folders.  torch comes in once command line and configuration are known to be good.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from diffmoe.commands.common import CHECKPOINT_HELP, Parser, one_process
from diffmoe.config import Config, ModelConfig, MoEConfig, load_config
from diffmoe.environment import RankEnvironment
from diffmoe.errors import UserError
from diffmoe.families import has_predictor
from diffmoe.files import writing
from diffmoe.layout import Layout, resolve_layout
from diffmoe.remote import any_path

if TYPE_CHECKING:
    from torch import Tensor

    from diffmoe.checkpoints.reader import Checkpoint
    from diffmoe.models.research_file import ResearchFile
    from diffmoe.models.upcycling import Report

    Pieces = Iterator[tuple[str, Tensor]]

# What a checkpoint holds beside its weights, so that an export gives the file back bit for bit.
RESEARCH = "research"
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def import_main(arguments: list[str], environment: RankEnvironment) -> int:
    """``run.py import``: writes the checkpoint that a run starts from.  UserError for bad input."""
    options = _import_parser().parse_intermixed_args(arguments)
    one_process("import", environment)
    if not options.dense and (options.weights or options.scale_experts):
        raise UserError("--weights and --scale-experts go with --dense")
    if options.hf and (options.model_key or options.ema_key or options.drop_labels):
        raise UserError("--model-key, --ema-key and --drop-labels go with --research and --dense")
    if not options.hf and options.config is None:
        raise UserError("import needs --config, the configuration of the model in the file")
    if options.ranks is not None and options.ranks < 1:
        raise UserError(f"--ranks ({options.ranks}) must be at least 1")
    path = Path(options.research or options.dense or options.hf)
    if options.hf:
        from diffmoe.huggingface import folder_config

        config = folder_config(path, options.config, options.overrides)
    else:
        config = load_config(options.config, options.overrides)
    layout = resolve_layout(config, options.ranks or config.parallel.ep)
    if options.hf:
        written = import_hf(path, config, layout)
    else:
        from diffmoe.models.research_file import read_research

        file = read_research(path, {"model": options.model_key, "ema": options.ema_key})
        given = path, file, config, layout, options.drop_labels
        if options.research:
            written = import_research(*given)
        else:
            written = import_dense(*given, options.weights, options.scale_experts)
    pool = "" if config.model.family == "dense" else f", pool {layout.pool} samples"
    print(
        f"saved {written} (step 0{pool}); training with this configuration and run.folder starts "
        "from it",
        flush=True,
    )
    return 0


def _import_parser() -> Parser:
    parser = Parser(
        prog="import",
        description="Weights from elsewhere, as the checkpoint that run.folder starts from "
        "(sample, train and evaluate read it).",
    )
    source = parser.add_mutually_exclusive_group(required=True).add_argument
    research = "research checkpoint (.pt, .safetensors) of the model that --config names"
    source("--research", metavar="FILE", help=research)
    dense = "research checkpoint of a dense DiT or SiT, whose MLPs every expert copies"
    source("--dense", metavar="FILE", help=dense)
    source("--hf", metavar="FOLDER", help="folder that export --format hf wrote")
    add = parser.add_argument
    add("--config", help="YAML file, see configs/ (with --hf: default: the folder's own)")
    ranks = "ranks that moe.pool is resolved for, where it is a word (default: parallel.ep)"
    add("--ranks", type=int, help=ranks)
    weights = "with --dense: which of the file's two (default: ema)"
    add("--weights", choices=("ema", "model"), help=weights)
    model_key = "where in the file the weights lie, if several could be meant"
    add("--model-key", metavar="NAME", help=model_key)
    add("--ema-key", metavar="NAME", help="the same for their average")
    drop = "let the classes' embeddings start anew, for other classes"
    add("--drop-labels", action="store_true", help=drop)
    scale = "with --dense: scale experts so that a token's gates sum to 1 on average"
    add("--scale-experts", action="store_true", help=scale)
    add("overrides", nargs="*", metavar="section.field=value")
    return parser


def import_research(
    path: Path, file: ResearchFile, config: Config, layout: Layout, drop_labels: bool
) -> Path:
    """A research checkpoint of the model in ``config`` becomes ``run.folder``'s checkpoint of step
    0.  Returns its folder.  ``drop_labels``: the classes' embeddings start anew.

    Raises UserError when the file does not fit the configuration tensor by tensor, or when this
    configuration scales times.
    """
    from diffmoe.models.interchange import from_research, kept_as_they_were, observed_buffers

    model, moe = config.model, config.moe
    _check_form(config)
    found = _fitted(path, file, model, moe, config.run.seed if drop_labels else None)
    which, first = next(iter(found.items()))
    said = f"{' and '.join(found)}, {len(first)} tensors each"
    if len(found) == 1:
        said = f"only {which}, {len(first)} tensors; weights and EMA both start from it"
    print(f"read {path}: {said}", flush=True)
    _say_places(file)
    heads = f"model.heads ({model.heads}), " * (model.positions != "rope" and not model.qk_norm)
    said = f"{heads}diffusion.process ({config.diffusion.process})"
    print(f"the configuration's, which no tensor of the file can confirm: {said}", flush=True)
    states = {which: found.get(which) or first for which in ("model", "ema")}
    # The EMA's, which published samples are drawn with; those of the weights come back with a few
    # steps of training.
    buffers = observed_buffers(states["ema"], model, moe)

    def weights(which: str) -> Pieces:
        for name, value in from_research(states[which], model, moe).items():
            if name not in buffers:
                yield name, value.float()

    kept = kept_as_they_were(states, buffers, model, moe)
    return _save(config, layout, weights, buffers, kept)


def _save(
    config: Config,
    layout: Layout,
    pieces: Callable[[str], Pieces],
    buffers: Mapping[str, Tensor],
    kept: Pieces | None = None,
    class_names: tuple[str, ...] = (),
) -> Path:
    """``run.folder``'s checkpoint of step 0, of the ``pieces`` of "model" and, for every EMA, of
    "ema"; a projector is new.
    """
    from diffmoe.checkpoints.reader import MASTER, ema_kind
    from diffmoe.checkpoints.writer import save_start
    from diffmoe.evaluation.decoding import data_class_names
    from diffmoe.models.logical import fresh_projector

    new = fresh_projector(config).items()
    averages = {ema_kind(d): chain(pieces("ema"), new) for d in config.train.ema_decays}
    kinds: dict[str, Pieces] = {MASTER: chain(pieces("model"), new), **averages}
    if kept is not None:
        kinds[RESEARCH] = kept
    folder = Path(config.run.folder) / "checkpoints"
    names = class_names or data_class_names(config)
    return save_start(folder, config, layout, kinds, buffers, names)


def _fitted(
    path: Path, file: ResearchFile, model: ModelConfig, moe: MoEConfig, new_labels_from: int | None
) -> dict[str, dict[str, Tensor]]:
    """The file's states as the configuration needs them; says what was changed for that."""
    from diffmoe.models.interchange import fit_research

    states, notes = {}, []
    for which, state in file.states.items():
        states[which], said = fit_research(state, model, moe, f"{path} ({which})", new_labels_from)
        notes += said
    for note in dict.fromkeys(notes):
        print(note, flush=True)
    return states


def _say_places(file: ResearchFile) -> None:
    for which, place in file.places.items():
        if place not in ("", which):
            print(f"  {which} is the file's {place}", flush=True)
    if file.unused:
        print(f"  not used: {', '.join(file.unused)}", flush=True)


def import_hf(folder: Path, config: Config, layout: Layout) -> Path:
    """What ``export --format hf`` wrote becomes ``run.folder``'s checkpoint of step 0, weights and
    EMA alike, with its thresholds, histograms and classes' names.  Returns its folder.
    """
    from diffmoe.models.interchange import misshaped, not_finite_note
    from diffmoe.models.logical import fresh_buffers, logical_template, some, whole_weights
    from diffmoe.models.pretrained import folder_class_names, read_folder

    tree, tensors = read_folder(folder)
    class_names = folder_class_names(tree, config)
    fresh = fresh_buffers(config.model, config.moe)
    buffers = {name: tensors[name] if name in tensors else fresh[name] for name in fresh}
    whole_weights(tensors, {}, config.model, config.moe, str(folder))
    template = logical_template(config.model, config.moe)
    if wrong := misshaped(tensors, template):
        raise UserError(f"{folder} does not fit its config.json: {some('misshaped', wrong)}")
    if (note := not_finite_note(tensors, str(folder))) is not None:
        print(note, flush=True)
    print(
        f"read {folder}: {tree.get('weights')} weights of step {tree.get('step')}; weights and EMA "
        "both start from them",
        flush=True,
    )
    if latents := tree.get("latents"):
        scale, shift = (str(each).replace(" ", "").strip("()") for each in latents)
        options = f"--latent-scale={scale} --latent-shift={shift}"
        print(f"note: without the training data, sample and score with {options}", flush=True)
    pieces = lambda _: ((name, tensors[name]) for name in template if name not in buffers)
    return _save(config, layout, pieces, buffers, class_names=class_names)


def import_dense(
    path: Path,
    file: ResearchFile,
    config: Config,
    layout: Layout,
    drop_labels: bool,
    weights: str | None,
    scale: bool,
) -> Path:
    """A dense research checkpoint starts the MoE model of ``config``: writes ``run.folder``'s
    checkpoint of step 0 and prints how far the function moved.  ``weights``: ``ema`` or ``model``
    (None: ema where there is one); ``drop_labels`` as for :func:`import_research`.
    """
    from diffmoe.models import upcycling
    from diffmoe.models.logical import fresh_buffers, logical_pieces

    upcycling.check_upcycling(config)
    _check_blocks(config.model)
    states = file.states
    which = weights or ("ema" if "ema" in states else "model")
    if which not in states:
        raise UserError(f"--weights ({which}) is not in {path}, which has only {', '.join(states)}")
    chosen = dataclasses.replace(file, states={which: states[which]})
    sizes = dataclasses.replace(config.model, family="dense")
    seed = config.run.seed if drop_labels else None
    state = _fitted(path, chosen, sizes, config.moe, seed)[which]
    dense = upcycling.load_dense(state, config, f"{path} ({which})")
    model = upcycling.upcycle(dense, config, layout.pool)
    blocks = len(list(model.moe_layers()))
    new = "router" + " and capacity predictor" * has_predictor(config.model, config.moe)
    print(
        f"read {path}: {which} of {', '.join(states)}; weights and EMA both start from it\n"
        f"upcycled {blocks} blocks x {config.moe.experts} experts, each a copy of its block's "
        f"dense MLP; {new} new from run.seed {config.run.seed}",
        flush=True,
    )
    _say_places(file)
    print(describe_report(upcycling.measure(model, dense, config), scale), flush=True)
    if scale:
        factor = upcycling.balancing_factor(config.moe, config.model.family)
        upcycling.copy_experts(model, dense, factor)
    buffers = fresh_buffers(config.model, config.moe)
    return _save(config, layout, lambda _: logical_pieces(model), buffers)


def describe_report(report: Report, scale: bool) -> str:
    """The report as lines; ``scale``: which of the two starts is written."""
    written = "<- written"
    renormalised = "for comparison: training does not renormalise"
    factor = f"fc2 x {report.factor:g} (--scale-experts)"
    rows = [
        ("plain copies", report.copied, "" if scale else written),
        ("plain copies, gates renormalised", report.renormalised, renormalised),
        (factor, report.scaled, written if scale else ""),
    ]
    if report.everywhere is not None:
        note = "how training starts with moe.capacity_hold above 0"
        rows.append(("plain copies, every expert takes every token", report.everywhere, note))
    head = (
        f"how far the function moved at step 0: relative L2 of the outputs, {report.samples} "
        f"random samples in pools of {report.pool}, capacity {report.capacity:g}, "
        f"{report.untaken:.1%} of tokens in no expert"
    )
    lines = [f"  {name:<46} {value:.6f}  {note}".rstrip() for name, value, note in rows]
    return "\n".join([head, *lines])


def export_main(arguments: list[str], environment: RankEnvironment) -> int:
    """``run.py export``: to a research file or Hugging Face folder.  UserError for bad input."""
    parser = Parser(prog="export", description="A checkpoint in other people's formats.")
    add = parser.add_argument
    add("--checkpoint", required=True, help=CHECKPOINT_HELP)
    formats = "research: one .pt file with model and ema; hf: a Hugging Face folder"
    add("--format", required=True, choices=("research", "hf"), help=formats)
    add("--out", required=True, help="the file or folder to write; must not exist")
    words = "with hf: ema (default; the first), ema:0.999 (by its decay), length:0.07 or raw"
    add("--weights", help=words)
    add("--shard-size", help="with hf: largest file, such as 5GB or 500MB (default: 5GB)")
    scores = "with hf: card.json files of these weights"
    add("--scores", nargs="+", default=[], metavar="CARD", help=scores)
    options = parser.parse_args(arguments)
    one_process("export", environment)
    if options.format == "research" and (options.weights or options.shard_size or options.scores):
        raise UserError("--weights, --shard-size and --scores go with --format hf")
    limit = parse_size(options.shard_size or "5GB")
    out, weights = Path(options.out), options.weights or "ema"
    if out.exists():
        raise UserError(f"--out {out} already exists")
    from diffmoe.checkpoints.reader import Checkpoint

    checkpoint = Checkpoint(any_path(options.checkpoint))
    with writing(f"--out {out}"):
        out.parent.mkdir(parents=True, exist_ok=True)
        if options.format == "research":
            tensors = export_research(checkpoint, out)
            what = f"model and ema of step {checkpoint.step}, {tensors} tensors each"
        else:
            from diffmoe.huggingface import export_folder

            files = export_folder(checkpoint, out, weights, limit, list(map(Path, options.scores)))
            what = f"{weights} weights of step {checkpoint.step} in {files} file{'s' * (files > 1)}"
    print(f"saved {out}: {what}", flush=True)
    return 0


def export_research(checkpoint: Checkpoint, out: Path) -> int:
    """Writes ``{"model": …, "ema": …}`` with the research code's names.  Returns the number of
    tensors of each.

    A checkpoint that :func:`import_research` wrote gives the imported tensors back bit for bit.
    UserError when this model scales times.
    """
    import torch

    from diffmoe.checkpoints.reader import BUFFERS
    from diffmoe.files import replacing
    from diffmoe.models.interchange import to_research
    from diffmoe.models.logical import whole_weights

    config = checkpoint.config()
    _check_form(config)
    kept, buffers = checkpoint.tensors(RESEARCH), checkpoint.tensors(BUFFERS)
    states: dict[str, dict[str, Tensor]] = {}
    for which, weights in (("model", "raw"), ("ema", "ema")):
        source = f"{weights} of {checkpoint.path}"
        own = checkpoint.weights(weights)
        tensors = whole_weights(own, buffers, config.model, config.moe, source)
        states[which] = {
            name: kept[f"{which}/{name}"] if f"{which}/{name}" in kept else value
            for name, value in to_research(tensors, config.model, config.moe)
        }
    with replacing(out) as stream:
        torch.save(states, stream)
    return len(states["model"])


def _check_form(config: Config) -> None:
    """These codes have their own blocks, t as it is, and no place to say otherwise."""
    _check_blocks(config.model)
    if config.diffusion.prediction != "velocity":
        raise UserError(
            f"diffusion.prediction ({config.diffusion.prediction}) must be velocity for a research "
            "checkpoint, whose code has no other; --format hf and --hf carry it"
        )
    if config.diffusion.time_scale != 1:
        raise UserError(
            f"diffusion.time_scale ({config.diffusion.time_scale:g}) must be 1 for a research "
            "checkpoint: that code embeds t unscaled"
        )


def _check_blocks(model: ModelConfig) -> None:
    for name in ("positions", "norm", "activation"):
        value, theirs = getattr(model, name), getattr(ModelConfig, name)
        if model.family == "dense":  # LightningDiT's
            theirs = "gelu or swiglu_bias" if value == "swiglu" else value
        if value != theirs:
            raise UserError(
                f"model.{name} ({value}) must be {theirs} for a research checkpoint of family "
                f"{model.family}, whose code has no other; --format hf and --hf carry it"
            )


def parse_size(text: str) -> int:
    """Bytes in a text such as 5GB, 500MB or 1000000."""
    parts = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([KMG]B)?", text.upper())
    size = int(float(parts[1]) * _UNITS[parts[2] or ""]) if parts else 0
    if size < 1:
        raise UserError(
            f"--shard-size {text!r} must be a size such as 5GB, 500MB or 1000000 (bytes)"
        )
    return size
