"""The verb ``evaluate``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from diffmoe.commands.common import (
    Parser,
    add_compile,
    add_device,
    add_fp32_precision,
    add_latent_options,
    join,
    leave,
    sampling_config,
    whole_model,
)
from diffmoe.config import Config
from diffmoe.environment import RankEnvironment
from diffmoe.errors import UserError
from diffmoe.evaluation.protocol import CFG, COUNT, LABELS, SPLITS, WEIGHTS, published_sampling

if TYPE_CHECKING:
    import torch

    from diffmoe.checkpoints.reader import Checkpoint
    from diffmoe.evaluation.evaluate import Images

_DESCRIPTION = (
    "FID, sFID, Inception Score, precision and recall of a checkpoint, or of samples that exist. "
    "Interrupted, it goes on where it was when the same command runs again; with another reference, it "
    "scores the images that are there."
)
_OF_CHECKPOINT = (
    "vae",
    "latent_scale",
    "latent_shift",
    "fp32_precision",
    "compile",
    "labels",
    "weights",
    "cfg",
    "seed",
    "no_samples",
    "published",
)
_NAMES = {"labels": "--classes"}


def main(arguments: list[str], environment: RankEnvironment) -> int:
    """The verb ``evaluate``; returns the exit code.  UserError for bad input."""
    options = _described(Parser(prog="evaluate", description=_DESCRIPTION)).parse_intermixed_args(
        arguments
    )
    _check_options(options)
    from diffmoe.checkpoints.reader import Checkpoint
    from diffmoe.evaluation.evaluate import check_evaluation, evaluate, given_images
    from diffmoe.evaluation.features import open_extractor
    from diffmoe.evaluation.reference_statistics import load_reference, open_images, save_reference
    from diffmoe.parallel.collectives import raise_together
    from diffmoe.parallel.groups import build_groups

    checkpoint = None if options.checkpoint is None else Checkpoint(Path(options.checkpoint))
    config = None if checkpoint is None else evaluation_config(checkpoint.config(), options)
    first = environment.rank == 0
    device = join(environment, asked=options.device)
    world = build_groups(1, 1).world  # every rank holds the whole model
    problem: Exception | None = None
    try:
        if options.save_reference is not None:
            _check_save_reference(Path(options.save_reference))
        extractor = open_extractor(options.extractor, device)
        if checkpoint is None:
            source = open_images(options.samples)
            images = given_images(source, options.count)
        else:
            images = _sampled(checkpoint, config, options, device, first)
    except (UserError, OSError) as error:
        problem = error
    raise_together(problem, world)
    if checkpoint is None:
        source.check(world)
    out, keep = Path(options.out), not options.no_samples
    check_evaluation(images, extractor, out, world, splits=options.splits, keep_samples=keep)
    reference = load_reference(
        options.reference, extractor, world, device, size=images.size, progress=first
    )
    if options.save_reference is not None and first:
        save_reference(reference, options.save_reference)
    card = evaluate(
        images,
        reference,
        extractor,
        out,
        world,
        device,
        splits=options.splits,
        keep_samples=keep,
        progress=first,
    )
    if card is not None:
        print(
            card.to_markdown() + f"\nwritten to {options.out}; protocol: {card.protocol}",
            flush=True,
        )
    leave()
    return 0


def _sampled(
    checkpoint: Checkpoint,
    config: Config,
    options: argparse.Namespace,
    device: torch.device,
    first: bool,
) -> Images:
    from diffmoe.evaluation.decoding import checkpoint_data, open_decoder, vae_note
    from diffmoe.evaluation.evaluate import Subject, sampled_images
    from diffmoe.evaluation.generate import check_dial, threshold_note
    from diffmoe.models.compiled import compile_blocks, compiles

    weights = options.weights or WEIGHTS
    model = whole_model(checkpoint, config, weights)
    check_dial(model, config.sample)
    compiled, note = compiles(config.train, device)
    if compiled:
        compile_blocks(model)
    notes, decoder = [threshold_note(model, config.sample), note], None
    if options.vae is not None:
        numbers = (options.latent_scale, options.latent_shift)
        index = checkpoint_data(config, *numbers)
        decoder = open_decoder(options.vae, config, index, *numbers, device)
        notes.append(vae_note(config, decoder, index))
    for note in filter(None, notes if first else ()):
        print(note, flush=True)
    subject = Subject(str(checkpoint.path), checkpoint.step, weights)
    count = COUNT if options.count is None else options.count
    return sampled_images(
        model.to(device).eval(),
        config,
        subject,
        count,
        options.labels or "balanced",
        device,
        decoder,
    )


def _check_save_reference(path: Path) -> None:
    from diffmoe.files import check_writable

    try:
        check_writable(path)
    except OSError as error:
        raise UserError(f"--save-reference {path} cannot be written: {error.strerror}") from error


def _check_options(options: argparse.Namespace) -> None:
    """One of --checkpoint and --samples, and nothing of a checkpoint's beside the latter."""
    if (options.checkpoint is None) == (options.samples is None):
        raise UserError(
            f"evaluate takes one of --checkpoint ({options.checkpoint}) and --samples ({options.samples})"
        )
    if options.samples is None:
        return
    values = {
        _NAMES.get(name, f"--{name.replace('_', '-')}"): getattr(options, name)
        for name in _OF_CHECKPOINT
    }
    beside = [
        name for name, value in values.items() if value is not None and value is not False
    ]  # 0 is said
    if beside or options.overrides:
        raise UserError(
            f"{' and '.join([*beside, *options.overrides])} cannot stand beside --samples "
            f"({options.samples}): these images are there already, and only --count, --splits, --reference "
            "and --extractor apply"
        )


def evaluation_config(config: Config, options: argparse.Namespace) -> Config:
    """The checkpoint's configuration as the options change it. ``--published`` also fills in those
    options that were not given.

    Raises UserError for an option or override that contradicts ``--published``."""
    if not options.published:
        return sampling_config(config, options)
    fixed = {"count": COUNT, "splits": SPLITS, "labels": LABELS, "weights": WEIGHTS}
    for name, value in fixed.items():
        said = getattr(options, name)
        if said not in (None, value):
            raise UserError(
                f"{_NAMES.get(name, f'--{name}')} {said} contradicts --published, which has {value}"
            )
        setattr(options, name, value)
    wanted = published_sampling(config.model.family, config.diffusion.process)
    first = [
        f"sample.{name}={'null' if value is None else value}"
        for name, value in {**wanted, "cfg": CFG[0]}.items()
    ]
    options.overrides = first + options.overrides
    config = sampling_config(config, options)
    if config.sample.cfg not in CFG:
        raise UserError(
            f"--cfg {config.sample.cfg:g} contradicts --published, which has "
            f"{' or '.join(f'{cfg:g}' for cfg in CFG)}"
        )
    for name, value in wanted.items():
        if getattr(config.sample, name) != value:
            raise UserError(
                f"sample.{name} ({getattr(config.sample, name)}) contradicts --published, which has "
                f"{value}"
            )
    return config


def _described(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("--checkpoint", help="checkpoint folder, or run folder (its newest)")
    parser.add_argument(
        "--samples",
        help="in place of a checkpoint, images that exist: npz (arr_0, as ADM's), .npy, "
        "or a folder",
    )
    parser.add_argument(
        "--published",
        action="store_true",
        help="sample as the published rows: 50,000 images of random classes, cfg 1 (or --cfg 1.5), 250 "
        "steps, and the paper's routing in batches of 125",
    )
    parser.add_argument(
        "--reference",
        required=True,
        help="npz (ADM's, or one saved here), .npy of images, folder of pictures, or folder of pixel "
        "shards",
    )
    parser.add_argument(
        "--extractor", required=True, help="TorchScript file (inception-2015-12-05.pt), or 'digits'"
    )
    parser.add_argument(
        "--vae", help="AutoencoderKL that decodes latents: a folder, or the hub's owner/name"
    )
    add_latent_options(parser)
    add_fp32_precision(parser)
    add_compile(parser)
    add_device(parser)
    parser.add_argument("--count", type=int, help="images (default: 50,000, or all of --samples)")
    parser.add_argument(
        "--classes",
        dest="labels",
        choices=("balanced", "random"),
        help="balanced (default): in turn, which scores a little better; random: as ADM, DiT and the research code",
    )
    parser.add_argument(
        "--weights", help="ema (default; the first of train.ema), ema:0.999 (by its decay) or raw"
    )
    parser.add_argument("--cfg", type=float, help="guidance (default: sample.cfg of the run)")
    parser.add_argument(
        "--seed", type=int, help="seed of noise and random classes (default: run.seed)"
    )
    parser.add_argument(
        "--splits", type=int, help="of the Inception Score (default: one per 5,000 images)"
    )
    parser.add_argument(
        "--save-reference",
        help="also write the reference's statistics here (npz), to skip measuring it again",
    )
    parser.add_argument(
        "--no-samples",
        action="store_true",
        help="do not write samples.npz (10 GB for 50,000 of 256 x "
        "256); another reference then needs them made again",
    )
    parser.add_argument(
        "--out",
        default="evaluation",
        help="folder: card.json, card.md, samples.npz (default: evaluation)",
    )
    parser.add_argument("overrides", nargs="*", metavar="sample.field=value")
    return parser
