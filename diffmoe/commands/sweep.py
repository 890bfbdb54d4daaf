"""The subcommand ``sweep``: evaluations at several scales of guidance or lengths of average."""

from __future__ import annotations

import argparse
import itertools
import re
from pathlib import Path

from diffmoe.commands.common import CHECKPOINT_HELP, Parser, leave
from diffmoe.commands.evaluate import (
    add_evaluation_options,
    checkpoint_of,
    evaluation_config,
    fix_checkpoint,
    scored,
)
from diffmoe.config import Config
from diffmoe.environment import RankEnvironment
from diffmoe.errors import UserError

_SCALES = (1.0, 1.25, 1.5, 2.0, 3.0)
# By (curve, where on it): the folder of the card, the configuration, and --weights.
Points = dict[tuple[str, float], tuple[Path, tuple[Config, str | None]]]


def main(arguments: list[str], environment: RankEnvironment) -> int:
    """The subcommand ``sweep``; returns the exit code.  UserError for bad input."""
    options = _parser().parse_intermixed_args(arguments)
    fix_checkpoint(options)
    points = (_lengths if options.ema_lengths else _scales)(options)
    cards = scored(options, environment, dict(points.values()))
    if cards:
        from diffmoe.evaluation.sweep import write_sweep

        axis = "length of the average" if options.ema_lengths else "cfg"
        by_point = {point: cards[folder] for point, (folder, _) in points.items()}
        out = Path(options.out)
        print(f"{write_sweep(by_point, axis, out)}\nwritten to {out}", flush=True)
    leave()
    return 0


def _scales(options: argparse.Namespace) -> Points:
    from diffmoe.diffusion.guidance import open_others

    if options.cfg or options.guide:
        raise UserError("sweep has --guidance and --scales in place of --guide and --cfg")
    stored, out, points = checkpoint_of(options).config(), Path(options.out), Points()
    scales = options.scales or _SCALES
    for guide, options.cfg in itertools.product((options.guidance or "null").split(","), scales):
        name, options.guide = re.sub(r"[^\w.@:-]+", "_", guide), guide
        # At scale 1, where none guides, they have one card.
        folder = out / ("cfg1" if options.cfg == 1 else f"{name}_cfg{options.cfg:g}")
        config = evaluation_config(stored, options)
        if options.cfg == scales[-1]:
            open_others(config)  # or an error before hours of sampling
        points[guide, options.cfg] = folder, (config, options.weights)
    return points


def _lengths(options: argparse.Namespace) -> Points:
    if options.guidance or options.scales or options.weights:
        raise UserError("--ema-lengths goes without --guidance, --scales and --weights")
    checkpoint, points = checkpoint_of(options), Points()
    config = evaluation_config(checkpoint.config(), options)
    for length in options.ema_lengths:
        weights = f"length:{length!r}"
        checkpoint.weights(weights)  # or an error before hours of sampling
        points["averages", length] = Path(options.out) / f"length_{length!r}", (config, weights)
    return points


def _numbers(text: str) -> list[float]:
    """Ascending, each once."""
    try:
        return sorted({float(part) for part in text.split(",")})
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be numbers such as 1,1.5,2") from None


def _parser() -> Parser:
    description = (
        "The Fréchet distance against guidance's scale, a curve a guide, or against the length of "
        "the average; the best is marked: OUT/sweep.md, .json and .png, and a folder of evaluate "
        "for each point. Interrupted, it resumes when the same command runs again."
    )
    parser = Parser(prog="sweep", description=description)
    add = parser.add_argument
    add("--checkpoint", required=True, help=CHECKPOINT_HELP)
    guides = "null, capacity, checkpoints (see --guide), with commas between (default: null)"
    add("--guidance", help=guides)
    add("--scales", type=_numbers, help="as many of --cfg (default: 1,1.25,1.5,2,3)")
    lengths = "instead: averages of these lengths, such as 0.03,0.05,0.1 (see train.ema_lengths)"
    add("--ema-lengths", type=_numbers, help=lengths)
    add_evaluation_options(parser)
    return parser
