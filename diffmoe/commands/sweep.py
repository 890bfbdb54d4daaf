"""The subcommand ``sweep``."""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path

from diffmoe.commands.common import (
    CHECKPOINT_HELP,
    Parser,
    add_sampling_options,
    guide_model,
    join,
    leave,
    sampling_config,
    sampling_model,
)
from diffmoe.commands.evaluate import add_scoring_options
from diffmoe.config import Config
from diffmoe.environment import RankEnvironment
from diffmoe.errors import UserError
from diffmoe.evaluation.protocol import COUNT, WEIGHTS
from diffmoe.remote import any_path


def main(arguments: list[str], environment: RankEnvironment) -> int:
    """The subcommand ``sweep``; returns the exit code.  UserError for bad input.

    Every point is an evaluation in a folder of its own, which resumes, or is there.
    """
    options = _parser().parse_intermixed_args(arguments)
    from diffmoe.checkpoints.reader import Checkpoint
    from diffmoe.evaluation.evaluate import check_evaluation, evaluate
    from diffmoe.evaluation.features import open_extractor
    from diffmoe.evaluation.generate import check_dial
    from diffmoe.evaluation.reference_statistics import load_reference
    from diffmoe.evaluation.scored_images import Subject, sampled_images
    from diffmoe.evaluation.sweep import Point, write_sweep
    from diffmoe.parallel.collectives import agreed
    from diffmoe.parallel.groups import build_groups

    checkpoint = Checkpoint(any_path(options.checkpoint))
    configs = sweep_configs(checkpoint.config(), options)
    first, out = environment.rank == 0, Path(options.out)
    device = join(environment, asked=options.device)
    world = build_groups(1, 1).world  # every rank holds the whole model
    subject = Subject(str(checkpoint.path), checkpoint.step, options.weights or WEIGHTS)
    count = COUNT if options.count is None else options.count
    images = {}
    with agreed(world):
        extractor = open_extractor(options.extractor, device)
        alone = next(iter(configs.values()))
        model, guide, decoder, notes = sampling_model(checkpoint, alone, options, device)
        for note in notes if first else ():
            print(note, flush=True)
        model.to(device).eval()
        guides = {alone.sample.guide_checkpoint: guide}
        for point, config in configs.items():
            name = config.sample.guide_checkpoint
            if name not in guides:
                guides[name] = guide_model(config, device)
            check_dial(model, config.sample)
            labels = options.labels or "balanced"
            images[point] = sampled_images(
                model, config, subject, count, labels, device, decoder, guides[name]
            )
    how = {"splits": options.splits, "keep_samples": False}
    for point, made in images.items():
        check_evaluation(made, extractor, out / _folder(*point), world, **how)
    size = next(iter(images.values())).size
    reference = load_reference(
        options.reference, extractor, world, device, size=size, progress=first
    )
    points = []
    for (named, scale), made in images.items():
        folder = out / _folder(named, scale)
        card = evaluate(made, reference, extractor, folder, world, device, progress=first, **how)
        if card is not None:
            of = options.guidance if scale == 1 else [named]
            points += [Point(each, card) for each in of]
            print(f"guide {named}, cfg {scale:g}: {points[-1].score:.4f}", flush=True)
    if first:
        print(f"{write_sweep(points, out)}\nwritten to {out}/sweep.*", flush=True)
    leave()
    return 0


def sweep_configs(config: Config, options: argparse.Namespace) -> dict[tuple[str, float], Config]:
    """The checkpoint's configuration at every (guide, scale); at scale 1, where nothing guides, of
    the first guide alone.  UserError where one cannot be.
    """
    found = {}
    for guide in options.guidance:
        for scale in options.scales:
            if scale == 1 and guide != options.guidance[0]:
                continue
            asked = argparse.Namespace(**{**vars(options), "cfg": scale, "guide": guide})
            found[guide, scale] = sampling_config(config, asked)
    return found


def _folder(guide: str, scale: float) -> str:
    named = re.sub(r"[^\w.@:-]+", "_", guide)
    return "cfg1" if scale == 1 else f"{named}_cfg{scale:g}"


def _guides(text: str) -> list[str]:
    found = list(dict.fromkeys(text.split(",")))
    if "" in found:
        raise UserError(f"--guidance ({text}) must be guides with commas between them")
    return found


def _scales(text: str) -> list[float]:
    try:
        found = sorted({float(part) for part in text.split(",")})
    except ValueError:
        found = []
    if not found or not all(map(math.isfinite, found)):
        raise UserError(f"--scales ({text}) must be numbers with commas between them")
    return found


def _parser() -> Parser:
    parser = Parser(
        prog="sweep",
        description="The Fréchet distance (FID, by Inception) against guidance's scale, a curve a "
        "guide, the best point marked. Interrupted, it resumes when the same command runs again.",
    )
    add = parser.add_argument
    add("--checkpoint", required=True, help=CHECKPOINT_HELP)
    guides = "null, capacity, checkpoints (see --guide of sample), with commas between them"
    add("--guidance", type=_guides, default="null", help=guides)
    add("--scales", type=_scales, default="1,1.25,1.5,2,3", help="with commas between them")
    add_scoring_options(parser)
    out = "folder: sweep.json, .md, .png, and a folder with a card for each point"
    add("--out", default="sweep", help=out)
    add_sampling_options(parser, guided=False)
    return parser
