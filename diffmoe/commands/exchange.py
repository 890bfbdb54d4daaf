"""The verbs import and export: weights from and to the published research code's files and Hugging
Face folders.

torch comes in once the command line and configuration are known to be good.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from diffmoe.commands.common import Parser, one_process
from diffmoe.config import Config, ModelConfig, MoEConfig, load_config
from diffmoe.environment import RankEnvironment
from diffmoe.errors import UserError
from diffmoe.layout import Layout, resolve_layout

if TYPE_CHECKING:
    from torch import Tensor

    from diffmoe.checkpoints.reader import Checkpoint
    from diffmoe.models.research_file import ResearchFile
    from diffmoe.models.upcycling import Receipt

# What a checkpoint holds beside its weights so that an export gives the imported file back bit for
# bit.
RESEARCH = "research"
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def import_main(arguments: list[str], environment: RankEnvironment) -> int:
    """``run.py import``: writes the checkpoint that a run starts from.  UserError for bad input."""
    parser = Parser(
        prog="import",
        description="Weights from elsewhere, as the checkpoint that run.folder starts from "
        "(sample, train and evaluate read it).",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--research",
        metavar="FILE",
        help="research checkpoint (.pt, .safetensors) of the model that --config names",
    )
    source.add_argument(
        "--dense",
        metavar="FILE",
        help="research checkpoint of a dense DiT or SiT: every expert of the mixture "
        "that --config names starts as a copy of the dense MLP",
    )
    source.add_argument("--hf", metavar="FOLDER", help="folder that export --format hf wrote")
    parser.add_argument(
        "--config",
        help="YAML file, see configs/ (with --hf: default: the folder's own configuration)",
    )
    parser.add_argument(
        "--ranks",
        type=int,
        help="ranks that moe.pool is resolved for, where it is a word (default: parallel.ep)",
    )
    parser.add_argument(
        "--weights",
        choices=("ema", "model"),
        help="with --dense: which of the file's two (default: ema)",
    )
    parser.add_argument(
        "--model-key",
        metavar="NAME",
        help="where in the file the weights lie, if several could be meant",
    )
    parser.add_argument("--ema-key", metavar="NAME", help="the same for their average")
    parser.add_argument(
        "--drop-labels",
        action="store_true",
        help="let the classes' embeddings start anew, for other classes",
    )
    parser.add_argument(
        "--scale-experts",
        action="store_true",
        help="with --dense: multiply the experts' second linear so that "
        "a token's gates sum to 1 on average",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    options = parser.parse_intermixed_args(arguments)
    one_process("import", environment)
    if not options.dense and (options.weights or options.scale_experts):
        raise UserError("--weights and --scale-experts go with --dense")
    if options.hf and (options.model_key or options.ema_key or options.drop_labels):
        raise UserError("--model-key, --ema-key and --drop-labels go with --research and --dense")
    if not options.hf and options.config is None:
        raise UserError("import needs --config, the configuration of the model in the file")
    if options.ranks is not None and options.ranks < 1:
        raise UserError(f"--ranks ({options.ranks}) must be at least 1")
    if options.hf:
        from diffmoe.huggingface import folder_config

        config = folder_config(Path(options.hf), options.config, options.overrides)
    else:
        config = load_config(options.config, options.overrides)
    layout = resolve_layout(config, options.ranks or config.parallel.ep)
    path = Path(options.research or options.dense or options.hf)
    keys = {"model": options.model_key, "ema": options.ema_key}
    if not options.hf and not path.is_file():
        raise UserError(f"research checkpoint {path} does not exist")
    if options.hf:
        written = import_hf(path, config, layout)
    elif options.research:
        written = import_research(path, config, layout, keys, options.drop_labels)
    else:
        written = import_dense(
            path, config, layout, options.weights, options.scale_experts, keys, options.drop_labels
        )
    pool = "" if config.model.family == "dense" else f", pool {layout.pool} samples"
    print(
        f"saved {written} (step 0{pool}); training with this configuration and run.folder starts from it",
        flush=True,
    )
    return 0


def import_research(
    path: Path,
    config: Config,
    layout: Layout,
    keys: Mapping[str, str | None] | None = None,
    drop_labels: bool = False,
) -> Path:
    """A research checkpoint of the model in ``config`` becomes ``run.folder``'s checkpoint of step
    0.  Returns its folder. ``keys``: see ``read_research``; ``drop_labels``: the classes'
    embeddings start anew.

    Raises UserError when the file is not whole, holds code, or does not fit the configuration
    tensor by tensor, or when this configuration scales times.
    """
    from diffmoe.checkpoints.reader import MASTER, ema_kind
    from diffmoe.checkpoints.writer import save_start
    from diffmoe.models.interchange import from_research, kept_as_they_were, observed_buffers
    from diffmoe.models.research_file import read_research

    model, moe = config.model, config.moe
    _check_times(config)
    file = read_research(path, keys)
    states = _fitted(path, file, model, moe, config.run.seed if drop_labels else None)
    _say_what_is_there(path, file)
    print(
        f"model.heads ({model.heads}) and diffusion.process ({config.diffusion.process}) are the configuration's: no tensor of the "
        "file can confirm them",
        flush=True,
    )
    states = {which: states.get(which) or next(iter(states.values())) for which in ("model", "ema")}
    # The EMA's, which published samples are drawn with; those of the weights come back with a few
    # steps of training.
    buffers = observed_buffers(states["ema"], model, moe)

    def weights(which: str) -> Iterator[tuple[str, Tensor]]:
        for name, value in from_research(states[which]).items():
            if name not in buffers:
                yield name, value.float()

    averages = {ema_kind(decay): weights("ema") for decay in config.train.ema_decays}
    kinds = {
        MASTER: weights("model"),
        **averages,
        RESEARCH: kept_as_they_were(states, buffers, model, moe),
    }
    return save_start(_checkpoints(config), config, layout, kinds, buffers, _class_names(config))


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


def _say_what_is_there(path: Path, file: ResearchFile) -> None:
    states = file.states
    count = len(next(iter(states.values())))
    print(
        f"read {path}: {' and '.join(states)}, {count} tensors each"
        if len(states) == 2
        else f"read {path}: only {next(iter(states))}, {count} tensors; weights and EMA both start from it",
        flush=True,
    )
    _say_places(file)


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
    from diffmoe.checkpoints.reader import MASTER, ema_kind
    from diffmoe.checkpoints.writer import save_start
    from diffmoe.models.interchange import (
        fresh_buffers,
        logical_template,
        not_finite_note,
        some,
        whole_weights,
    )
    from diffmoe.models.pretrained import folder_class_names, read_folder

    tree, tensors = read_folder(folder)
    class_names = folder_class_names(tree, config) or _class_names(config)
    buffers = {
        name: tensors[name] if name in tensors else value
        for name, value in fresh_buffers(config.model, config.moe).items()
    }
    whole_weights(tensors, {}, config.model, config.moe, str(folder))
    template = logical_template(config.model, config.moe)
    misshaped = [
        f"{name} {tuple(tensors[name].shape)} instead of {tuple(value.shape)}"
        for name, value in template.items()
        if tensors[name].shape != value.shape
    ]
    if misshaped:
        raise UserError(f"{folder} does not fit its config.json: {some('misshaped', misshaped)}")
    if (note := not_finite_note(tensors, str(folder))) is not None:
        print(note, flush=True)
    names = [name for name in template if name not in buffers]
    kinds = {
        kind: ((name, tensors[name]) for name in names)
        for kind in (MASTER, *map(ema_kind, config.train.ema_decays))
    }
    print(
        f"read {folder}: {tree.get('weights')} weights of step {tree.get('step')}; weights and EMA both start from them",
        flush=True,
    )
    return save_start(_checkpoints(config), config, layout, kinds, buffers, class_names)


def import_dense(
    path: Path,
    config: Config,
    layout: Layout,
    weights: str | None,
    scale: bool,
    keys: Mapping[str, str | None] | None = None,
    drop_labels: bool = False,
) -> Path:
    """A dense research checkpoint starts the mixture of ``config``: writes ``run.folder``'s
    checkpoint of step 0 and prints how far the function moved.  ``weights``: ``ema`` or ``model``
    (None: ema where there is one); ``keys`` and ``drop_labels`` as for :func:`import_research`.
    """
    from diffmoe.checkpoints.reader import MASTER, ema_kind
    from diffmoe.checkpoints.writer import save_start
    from diffmoe.models.dit import logical_tensors
    from diffmoe.models.interchange import fresh_buffers
    from diffmoe.models.research_file import read_research
    from diffmoe.models.upcycling import (
        balancing_factor,
        check_upcycling,
        copy_experts,
        load_dense,
        measure,
        upcycle,
    )

    check_upcycling(config)
    file = read_research(path, keys)
    states = file.states
    which = weights or ("ema" if "ema" in states else "model")
    if which not in states:
        raise UserError(f"--weights ({which}) is not in {path}, which has only {', '.join(states)}")
    chosen = dataclasses.replace(file, states={which: states[which]})
    fitted = _fitted(
        path,
        chosen,
        dataclasses.replace(config.model, family="dense"),
        config.moe,
        config.run.seed if drop_labels else None,
    )
    dense = load_dense(fitted[which], config, f"{path} ({which})")
    model = upcycle(dense, config, layout.pool)
    blocks = len(list(model.moe_layers()))
    print(
        f"read {path}: {which} of {', '.join(states)}; weights and EMA both start from it\n"
        f"upcycled {blocks} blocks x {config.moe.experts} experts, each a copy of its block's dense MLP; router"
        f"{' and capacity predictor' * (config.model.family == 'diffmoe')} new from run.seed {config.run.seed}",
        flush=True,
    )
    _say_places(file)
    print(describe_receipt(measure(model, dense, config), scale), flush=True)
    if scale:
        copy_experts(model, dense, balancing_factor(config.moe, config.model.family))

    def pieces() -> Iterator[tuple[str, Tensor]]:
        for tensor in logical_tensors(model):
            yield from tensor.pieces(tensor.parameter.data)

    kinds = {kind: pieces() for kind in (MASTER, *map(ema_kind, config.train.ema_decays))}
    buffers = fresh_buffers(config.model, config.moe)
    return save_start(_checkpoints(config), config, layout, kinds, buffers, _class_names(config))


def describe_receipt(receipt: Receipt, scale: bool) -> str:
    """The receipt as lines; ``scale``: which of the two starts is written."""
    rows = [
        ("plain copies", receipt.copied, "" if scale else "<- written"),
        (
            "plain copies, gates renormalised",
            receipt.renormalised,
            "for comparison: training does not renormalise",
        ),
        (
            f"fc2 x {receipt.factor:g} (--scale-experts)",
            receipt.scaled,
            "<- written" if scale else "",
        ),
    ]
    if receipt.everywhere is not None:
        rows.append(
            (
                "plain copies, every expert takes every token",
                receipt.everywhere,
                "how training starts with moe.capacity_hold above 0",
            )
        )
    head = (
        f"how far the function moved at step 0: relative L2 of the outputs, {receipt.samples} random samples in pools of "
        f"{receipt.pool}, capacity {receipt.capacity:g}, {receipt.untaken:.1%} of tokens in no expert"
    )
    return "\n".join(
        [head, *(f"  {name:<46} {value:.6f}  {note}".rstrip() for name, value, note in rows)]
    )


def export_main(arguments: list[str], environment: RankEnvironment) -> int:
    """``run.py export``: a checkpoint as a research file or a Hugging Face folder.  UserError for
    bad input.
    """
    parser = Parser(prog="export", description="A checkpoint in other people's formats.")
    parser.add_argument(
        "--checkpoint", required=True, help="checkpoint folder, or run folder (its newest)"
    )
    parser.add_argument(
        "--format",
        required=True,
        choices=("research", "hf"),
        help="research: one .pt file with model and ema; hf: a Hugging Face folder",
    )
    parser.add_argument("--out", required=True, help="the file or folder to write; must not exist")
    parser.add_argument(
        "--weights",
        help="with hf: ema (default; the first of train.ema), ema:0.999 (by its decay) or raw",
    )
    parser.add_argument(
        "--shard-size", help="with hf: largest file, such as 5GB or 500MB (default: 5GB)"
    )
    parser.add_argument(
        "--scores",
        nargs="+",
        default=[],
        metavar="CARD",
        help="with hf: card.json files of these weights",
    )
    options = parser.parse_args(arguments)
    one_process("export", environment)
    if options.format == "research" and (options.weights or options.shard_size or options.scores):
        raise UserError("--weights, --shard-size and --scores go with --format hf")
    limit = parse_size(options.shard_size or "5GB")
    out = Path(options.out)
    if out.exists():
        raise UserError(f"--out {out} already exists")
    from diffmoe.checkpoints.reader import Checkpoint

    checkpoint = Checkpoint(Path(options.checkpoint))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if options.format == "research":
            tensors = export_research(checkpoint, out)
            print(
                f"saved {out}: model and ema of step {checkpoint.step}, {tensors} tensors each",
                flush=True,
            )
        else:
            from diffmoe.huggingface import export_folder

            files = export_folder(
                checkpoint,
                out,
                options.weights or "ema",
                limit,
                [Path(card) for card in options.scores],
            )
            print(
                f"saved {out}: {options.weights or 'ema'} weights of step {checkpoint.step} in {files} "
                f"file{'s' * (files > 1)}",
                flush=True,
            )
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error}") from error
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
    from diffmoe.models.interchange import to_research, whole_weights

    config = checkpoint.config()
    _check_times(config)
    kept = checkpoint.tensors(RESEARCH)
    states = {}
    for which, weights in (("model", "raw"), ("ema", "ema")):
        tensors = whole_weights(
            checkpoint.weights(weights),
            checkpoint.tensors(BUFFERS),
            config.model,
            config.moe,
            f"{weights} of {checkpoint.path}",
        )
        states[which] = {
            name: kept[f"{which}/{name}"] if f"{which}/{name}" in kept else value
            for name, value in to_research(tensors, config.model, config.moe)
        }
    with replacing(out) as stream:
        torch.save(states, stream)
    return len(states["model"])


def _check_times(config: Config) -> None:
    """The research code embeds t as it is, and its files have no place to say otherwise."""
    if config.diffusion.time_scale != 1:
        raise UserError(
            f"diffusion.time_scale ({config.diffusion.time_scale:g}) must be 1 for a research checkpoint: that code embeds "
            "t unscaled"
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


def _class_names(config: Config) -> tuple[str, ...]:
    """Those of the data set that the configuration names, where it is here and has them."""
    from diffmoe.data.sources import is_remote
    from diffmoe.evaluation.decoding import checkpoint_data

    data = config.data
    index = (
        None
        if not data.shards or is_remote(data.index or data.shards)
        else checkpoint_data(config, None, None)
    )
    return (
        index.class_names
        if index is not None and index.meta.classes == config.model.classes
        else ()
    )


def _checkpoints(config: Config) -> Path:
    return Path(config.run.folder) / "checkpoints"
