"""The subcommand ``evaluate``, and what ``sweep`` does many times."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from diffmoe.commands.common import (
    CHECKPOINT_HELP,
    Parser,
    add_sampling_options,
    join,
    leave,
    sampling_config,
    sampling_model,
    to_device,
)
from diffmoe.config import Config
from diffmoe.environment import RankEnvironment
from diffmoe.errors import UserError
from diffmoe.evaluation.protocol import CFG, COUNT, LABELS, SPLITS, WEIGHTS, published_sampling
from diffmoe.files import check_writable
from diffmoe.remote import any_path

if TYPE_CHECKING:
    import torch

    from diffmoe.checkpoints.reader import Checkpoint
    from diffmoe.evaluation.card import Card
    from diffmoe.evaluation.scored_images import Images

# Options that say nothing of samples that exist.
_OF_CHECKPOINT = (
    "vae latent_scale latent_shift dtype fp32_precision compile labels weights cfg cfg_interval "
    "guide guide_capacity seed no_samples published"
).split()


def main(arguments: list[str], environment: RankEnvironment) -> int:
    """The subcommand ``evaluate``; returns the exit code.  UserError for bad input."""
    options = _parser().parse_intermixed_args(arguments)
    _check_options(options)
    config = None
    if options.checkpoint is not None:
        fix_checkpoint(options)
        config = evaluation_config(checkpoint_of(options).config(), options)
    points = {Path(options.out): (config, options.weights)}
    for out, card in scored(options, environment, points).items():
        print(f"{card.to_markdown()}\nwritten to {out}; protocol: {card.protocol}", flush=True)
    leave()
    return 0


def fix_checkpoint(options: argparse.Namespace) -> None:
    """From now on ``--checkpoint`` is the one that is a run's newest at this moment."""
    options.checkpoint = str(checkpoint_of(options).path)


def checkpoint_of(options: argparse.Namespace) -> Checkpoint:
    """What ``--checkpoint`` names.  UserError where it is none."""
    from diffmoe.checkpoints.reader import Checkpoint

    return Checkpoint(any_path(options.checkpoint))


def scored(
    options: argparse.Namespace,
    environment: RankEnvironment,
    points: dict[Path, tuple[Config | None, str | None]],
) -> dict[Path, Card]:
    """The cards by their folders, on rank 0: of the checkpoint under each configuration and with
    its ``--weights``, or of the given samples.  Joins the other ranks.
    """
    from diffmoe.evaluation.evaluate import check_evaluation, evaluate
    from diffmoe.evaluation.features import open_extractor
    from diffmoe.evaluation.image_sources import open_images
    from diffmoe.evaluation.reference_statistics import load_reference, save_reference
    from diffmoe.evaluation.scored_images import given_images
    from diffmoe.parallel.collectives import agreed, gather_objects
    from diffmoe.parallel.groups import build_groups

    first, source, reference, cards = environment.rank == 0, None, None, {}
    device = join(environment, asked=options.device)
    world = build_groups(1, 1).world  # every rank holds the whole model
    # Ranks may see another one as the newest.
    options.checkpoint = gather_objects(options.checkpoint, world)[0]
    images: Images | None = None
    for out, (config, options.weights) in points.items():
        del images  # and with them the models of the last point
        with agreed(world):
            if reference is None:
                if (saved := options.save_reference) is not None:
                    check_writable(Path(saved), f"--save-reference {saved}", make=False)
                extractor = open_extractor(options.extractor, device)
            if config is not None:
                images = _sampled(config, options, device, first and reference is None)
            else:
                source = open_images(options.samples)
                images = given_images(source, options.count)
        if source is not None:
            source.check(world)
        keep = not options.no_samples
        check_evaluation(images, extractor, out, world, splits=options.splits, keep_samples=keep)
        if reference is None:
            reference = load_reference(
                options.reference, extractor, world, device, size=images.size, progress=first
            )
            if options.save_reference is not None and first:
                save_reference(reference, options.save_reference)
        card = evaluate(
            *(images, reference, extractor, out, world, device),
            splits=options.splits,
            keep_samples=keep,
            progress=first,
        )
        if card is not None:
            cards[out] = card
    return cards


def _sampled(
    config: Config, options: argparse.Namespace, device: torch.device, first: bool
) -> Images:
    from diffmoe.evaluation.scored_images import Subject, sampled_images

    checkpoint = checkpoint_of(options)
    model, others, decoder, notes = sampling_model(checkpoint, config, options, device)
    for note in notes if first else ():
        print(note, flush=True)
    subject = Subject(str(checkpoint.path), checkpoint.step, options.weights or WEIGHTS)
    count = COUNT if options.count is None else options.count
    labels = options.labels or "balanced"
    images = sampled_images(model, config, subject, count, labels, device, decoder, others)
    to_device((model, *others), config, device)  # their digests are the checkpoints'
    return images


def _option(name: str) -> str:
    return "--classes" if name == "labels" else f"--{name.replace('_', '-')}"


def _check_options(options: argparse.Namespace) -> None:
    """One of --checkpoint and --samples, and nothing of a checkpoint's beside the latter."""
    if (options.checkpoint is None) == (options.samples is None):
        raise UserError(
            f"evaluate takes one of --checkpoint ({options.checkpoint}) and --samples "
            f"({options.samples})"
        )
    said = {name: getattr(options, name) for name in _OF_CHECKPOINT}
    beside = [_option(n) for n, value in said.items() if value is not None and value is not False]
    beside += options.overrides
    if options.samples is not None and beside:
        raise UserError(
            f"{' and '.join(beside)} cannot stand beside --samples ({options.samples}): these "
            "images are there already, and only --count, --splits, --reference and --extractor "
            "apply"
        )


def evaluation_config(config: Config, options: argparse.Namespace) -> Config:
    """The checkpoint's configuration as the options change it. ``--published`` also fills in those
    options that were not given. UserError for an option or override that contradicts it.
    """
    if not options.published:
        return sampling_config(config, options)

    def contradicts(what: str, there: object, published: object) -> UserError:
        return UserError(f"{what} {there} contradicts --published, which has {published}")

    fixed = {"count": COUNT, "splits": SPLITS, "labels": LABELS, "weights": WEIGHTS}
    for name, value in fixed.items():
        said = getattr(options, name)
        if said not in (None, value):
            raise contradicts(_option(name), said, value)
        setattr(options, name, value)
    wanted = published_sampling(config.model.family, config.diffusion.process)
    options.overrides = [
        *(f"sample.{n}={'null' if v is None else v}" for n, v in {**wanted, "cfg": CFG[0]}.items()),
        *options.overrides,
    ]
    config = sampling_config(config, options)
    if config.sample.cfg not in CFG:
        raise contradicts("--cfg", f"{config.sample.cfg:g}", " or ".join(f"{c:g}" for c in CFG))
    for name, value in wanted.items():
        there = getattr(config.sample, name)
        if there != value:
            raise contradicts(f"sample.{name}", f"({there})", value)
    return config


def _parser() -> Parser:
    description = (
        "FID, sFID, Inception Score, precision and recall of a checkpoint, or of samples that "
        "exist. Interrupted, it resumes when the same command runs again; with another reference, "
        "it scores the images that are there."
    )
    parser = Parser(prog="evaluate", description=description)
    samples = "instead, images that exist: npz (arr_0, as ADM's), .npy, or a folder"
    parser.add_argument("--checkpoint", help=CHECKPOINT_HELP)
    parser.add_argument("--samples", help=samples)
    add_evaluation_options(parser)
    return parser


def add_evaluation_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``evaluate`` beside what is scored; ``sweep`` has them too."""
    add = parser.add_argument
    published = "sample as the published rows (docs/scores.md)"
    add("--published", action="store_true", help=published)
    reference = "npz (ADM's, or one saved here), .npy of images, folder of images or pixel shards"
    add("--reference", required=True, help=reference)
    extractor = (
        "TorchScript file (inception-2015-12-05.pt), 'efficientnet-lite0' or 'digits'; only "
        "Inception's Fréchet distance is called FID"
    )
    add("--extractor", required=True, help=extractor)
    add("--count", type=int, help="images (default: 50,000, or all of --samples)")
    classes = "balanced (default): in turn; random: as ADM, DiT and the research code"
    add("--classes", dest="labels", choices=("balanced", "random"), help=classes)
    add("--splits", type=int, help="of the Inception Score (default: one per 5,000 images)")
    add("--save-reference", help="also write the reference's statistics here (npz), to use again")
    no_samples = "do not write samples.npz; another reference then needs them made again"
    add("--no-samples", action="store_true", help=no_samples)
    out = "folder: card.json, card.md, samples.npz (default: %(default)s)"
    add("--out", default="evaluation", help=out)
    add_sampling_options(parser)
