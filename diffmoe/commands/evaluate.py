"""The verb ``evaluate``."""

from __future__ import annotations

import argparse
from pathlib import Path

from diffmoe.commands.common import (
    Parser, add_fp32_precision, add_latent_options, join, leave, sampling_config, whole_model,
)
from diffmoe.errors import UserError
from launcher.environment import RankEnvironment

_DESCRIPTION = ("FID, sFID, Inception Score, precision and recall of a checkpoint. Interrupted, it goes on where it was when "
                "the same command runs again.")


def main(arguments: list[str], environment: RankEnvironment) -> int:
    """The verb ``evaluate``; returns the exit code.  UserError for bad input."""
    options = _described(Parser(prog="evaluate", description=_DESCRIPTION)).parse_intermixed_args(arguments)
    from diffmoe.checkpoints.reader import Checkpoint
    from diffmoe.evaluation.decoding import checkpoint_data, open_decoder
    from diffmoe.evaluation.evaluate import Subject, evaluate
    from diffmoe.evaluation.features import open_extractor
    from diffmoe.evaluation.generate import threshold_note
    from diffmoe.evaluation.reference_statistics import load_reference, save_reference
    from diffmoe.parallel.collectives import raise_together
    from diffmoe.parallel.groups import build_groups

    checkpoint = Checkpoint(Path(options.checkpoint))
    config = sampling_config(checkpoint.config(), options)
    first = environment.rank == 0
    device = join(environment)
    world = build_groups(1, 1).world  # every rank holds the whole model
    decoder = None
    problem: Exception | None = None
    try:
        model = whole_model(checkpoint, config, options.weights)
        extractor = open_extractor(options.extractor, device)
        if options.vae is not None:
            numbers = (options.latent_scale, options.latent_shift)
            decoder = open_decoder(options.vae, config, checkpoint_data(config, *numbers), *numbers, device)
    except (UserError, OSError) as error:
        problem = error
    raise_together(problem, world)
    reference = load_reference(options.reference, extractor, world, device, progress=first)
    if options.save_reference is not None and first:
        save_reference(reference, options.save_reference)
    if first and (note := threshold_note(model, config.sample)):
        print(note, flush=True)
    subject = Subject(str(checkpoint.path), checkpoint.step, options.weights)
    card = evaluate(model.to(device).eval(), config, subject, options.count, options.labels, reference, extractor,
                    Path(options.out), world, device, decoder=decoder, splits=options.splits,
                    keep_samples=not options.no_samples, progress=first)
    if card is not None:
        print(card.to_markdown() + f"\nwritten to {options.out}", flush=True)
    leave()
    return 0


def _described(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("--checkpoint", required=True, help="checkpoint folder, or run folder (its newest)")
    parser.add_argument("--reference", required=True,
                        help="npz (ADM's, or one saved here), folder of pictures, or folder of pixel shards")
    parser.add_argument("--extractor", required=True, help="TorchScript file (inception-2015-12-05.pt), or 'digits'")
    parser.add_argument("--vae", help="AutoencoderKL that decodes latents: a folder, or the hub's owner/name")
    add_latent_options(parser)
    add_fp32_precision(parser)
    parser.add_argument("--count", type=int, default=50_000, help="images (default: 50,000)")
    parser.add_argument("--classes", dest="labels", choices=("balanced", "random"), default="balanced",
                        help="balanced (default): in turn, which scores a little better; random: as ADM, DiT and the research code")
    parser.add_argument("--weights", default="ema", help="ema (the first of train.ema), ema:0.999 (by its decay) or raw")
    parser.add_argument("--cfg", type=float, help="guidance (default: sample.cfg of the run)")
    parser.add_argument("--seed", type=int, help="seed of noise and random classes (default: run.seed)")
    parser.add_argument("--splits", type=int, help="of the Inception Score (default: one per 5,000 images)")
    parser.add_argument("--save-reference", help="also write the reference's statistics here (npz), to skip measuring it again")
    parser.add_argument("--no-samples", action="store_true", help="do not write samples.npz (10 GB for 50,000 of 256 x 256)")
    parser.add_argument("--out", default="evaluation", help="folder: card.json, card.md, samples.npz (default: evaluation)")
    parser.add_argument("overrides", nargs="*", metavar="sample.field=value")
    return parser
