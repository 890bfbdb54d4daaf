"""The subcommand ``sweep``: the scores of a checkpoint at several lengths of its average."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from diffmoe.commands.common import (
    CHECKPOINT_HELP,
    Parser,
    add_sampling_options,
    join,
    leave,
    sampling_config,
)
from diffmoe.commands.evaluate import sampled
from diffmoe.environment import RankEnvironment
from diffmoe.errors import UserError
from diffmoe.remote import any_path

if TYPE_CHECKING:
    from diffmoe.evaluation.card import Card


def main(arguments: list[str], environment: RankEnvironment) -> int:
    """The subcommand ``sweep``; returns the exit code.  UserError for bad input."""
    options = _parser().parse_intermixed_args(arguments)
    if options.weights is not None:
        raise UserError(f"--weights ({options.weights}) goes with sample and evaluate")
    lengths = _numbers("--ema-lengths", options.ema_lengths)
    from diffmoe.checkpoints.reader import Checkpoint
    from diffmoe.evaluation.evaluate import check_evaluation, evaluate
    from diffmoe.evaluation.features import open_extractor
    from diffmoe.evaluation.reference_statistics import load_reference
    from diffmoe.parallel.collectives import agreed
    from diffmoe.parallel.groups import build_groups

    checkpoint = Checkpoint(any_path(options.checkpoint))
    config = sampling_config(checkpoint.config(), options)
    for length in lengths:
        checkpoint.weights(f"length:{length!r}")  # or an error before hours of sampling
    device, first = join(environment, asked=options.device), environment.rank == 0
    world = build_groups(1, 1).world  # every rank holds the whole model
    with agreed(world):
        extractor = open_extractor(options.extractor, device)
    reference, cards, out = None, {}, Path(options.out)
    for length in lengths:
        options.weights, folder = f"length:{length!r}", out / f"length_{length!r}"
        with agreed(world):
            images = sampled(checkpoint, config, options, device, first)
        # Not kept: a sweep has many, and `evaluate` makes those of the best again.
        check_evaluation(images, extractor, folder, world, keep_samples=False)
        measured = options.reference, extractor, world, device
        reference = reference or load_reference(*measured, size=images.size, progress=first)
        run = images, reference, extractor, folder, world, device
        card = evaluate(*run, keep_samples=False, progress=first)
        if card is not None:
            cards[length] = card
    if first:
        print(_report(cards, out), flush=True)
    leave()
    return 0


def _numbers(name: str, text: str) -> list[float]:
    """Ascending, each once.  UserError for anything else than numbers with commas."""
    try:
        return sorted({float(part) for part in text.split(",")})
    except ValueError:
        raise UserError(f"{name} ({text}) must be numbers, such as 0.03,0.05,0.1") from None


def _report(cards: dict[float, Card], out: Path) -> str:
    """Writes ``sweep.md`` and ``sweep.png`` and returns the table: every length's scores, the least
    Fréchet distance marked.
    """
    from diffmoe.evaluation.plots import score_against
    from diffmoe.markdown import table

    what, names = "length of the average", next(iter(cards.values())).score_names
    distances = {length: card.scores.frechet_distance for length, card in cards.items()}
    best = min(distances, key=distances.__getitem__)
    rows = [
        (f"{length:g}{' (best)' * (length == best)}", *(getattr(card.scores, n) for n in names))
        for length, card in cards.items()
    ]
    text = "\n".join(table((what, *names.values()), rows)) + "\n"
    (out / "sweep.md").write_text(text)
    score_against(distances, what, names["frechet_distance"], out / "sweep.png")
    return f"{text}written to {out}"


def _parser() -> Parser:
    parser = Parser(
        prog="sweep",
        description="Scores of a checkpoint at several lengths of its average (train.ema_lengths), "
        "with the same noise: a table, a curve, and a folder each with its card. Interrupted, it "
        "resumes when the same command runs again.",
    )
    add = parser.add_argument
    add("--checkpoint", required=True, help=CHECKPOINT_HELP)
    add("--ema-lengths", required=True, help="such as 0.03,0.05,0.1")
    for name in ("--reference", "--extractor"):
        add(name, required=True, help="as for evaluate")
    add("--count", type=int, help="images of each length (default: 50,000)")
    add("--classes", dest="labels", choices=("balanced", "random"), help="as for evaluate")
    add("--out", default="sweep", help="folder (default: %(default)s)")
    add_sampling_options(parser)
    return parser
