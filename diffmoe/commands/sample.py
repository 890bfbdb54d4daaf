"""The verb ``sample``."""

from __future__ import annotations

from pathlib import Path

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
from diffmoe.environment import RankEnvironment
from diffmoe.errors import UserError
from diffmoe.evaluation.class_names import parse_classes


def main(arguments: list[str], environment: RankEnvironment) -> int:
    """The verb ``sample``; returns the exit code.  UserError for bad input."""
    options = _parser().parse_intermixed_args(arguments)
    import numpy as np
    import torch

    from diffmoe.checkpoints.reader import Checkpoint
    from diffmoe.device import set_fp32_precision
    from diffmoe.evaluation.capacity_report import CapacityMeter, write_report
    from diffmoe.evaluation.decoding import Decoder, checkpoint_data, open_decoder, vae_note
    from diffmoe.evaluation.features import to_uint8
    from diffmoe.evaluation.generate import check_dial, generate_everywhere, threshold_note
    from diffmoe.evaluation.plots import image_grid
    from diffmoe.models.compiled import compile_blocks, compiles
    from diffmoe.parallel.collectives import raise_together
    from diffmoe.parallel.groups import build_groups

    checkpoint = Checkpoint(Path(options.checkpoint))
    config = sampling_config(checkpoint.config(), options)
    classes = parse_classes(options.classes, config.model.classes, checkpoint.manifest.class_names)
    total = options.count if options.count is not None else 10 * len(classes)
    if total < 1:
        raise UserError(f"--count ({total}) must be at least 1")
    labels = [classes[i % len(classes)] for i in range(total)]
    device = join(environment, asked=options.device)
    groups = build_groups(1, 1)  # every rank holds the whole model
    out = Path(options.out.removesuffix(".npz").removesuffix(".png"))
    npz, png = Path(f"{out}.npz"), Path(f"{out}.png")  # with_suffix would cut cfg1.5 to cfg1
    problem: Exception | None = None
    decoder: Decoder | None = None
    meter: CapacityMeter | None = None
    notes: list[str | None] = []
    try:
        model = whole_model(checkpoint, config, options.weights)
        notes.append(threshold_note(model, config.sample))
        check_dial(model, config.sample)
        compiled, note = compiles(config.train, device)
        notes.append(note)
        if compiled:
            compile_blocks(model)
        numbers = (options.latent_scale, options.latent_shift)
        if options.vae is not None:
            index = checkpoint_data(config, *numbers)
            decoder = open_decoder(options.vae, config, index, *numbers, device)
            notes.append(vae_note(config, decoder, index))
        meter = CapacityMeter(model, config, total, device) if options.report else None
        _check_out(npz, png)
    except (UserError, OSError) as error:
        problem = error
    raise_together(problem, groups.world)
    for note in filter(None, notes if environment.rank == 0 else ()):
        print(note, flush=True)
    set_fp32_precision(config.run.fp32_precision)
    model.to(device).eval()
    decode = (
        None if decoder is None else lambda latents: decoder.function(latents).float() / 127.5 - 1
    )
    images = generate_everywhere(
        model,
        config,
        labels,
        groups.world,
        device,
        progress=environment.rank == 0,
        meter=meter,
        decode=decode,
    )
    used = None if meter is None else meter.merged(groups.world)
    if environment.rank == 0:
        arrays = {"images": images.numpy(), "labels": np.array(labels)}
        if (
            images.shape[1] in (1, 3) and torch.isfinite(images).all()
        ):  # pictures, in ADM's form too; latents have none
            arrays |= {
                "arr_0": to_uint8(images).permute(0, 2, 3, 1).numpy(),
                "arr_1": arrays["labels"],
            }
        np.savez(npz, **arrays)
        shown = images[: 10 * config.sample.columns].numpy()
        image_grid(shown, config.sample.columns, png)
        if config.sample.capacity is not None and options.weights != "ema":
            print(
                "note: the dial was set on the EMA weights (the default); these may use another capacity, see --report"
            )
        if decoder is not None:
            print(
                f"decoded by vae {decoder.name} from latents of scale {decoder.scale:g}, shift {decoder.shift:g}"
            )
        print(
            f"step {checkpoint.step}, {options.weights} weights, {config.sample.sampler} {config.sample.steps} steps, "
            f"cfg {config.sample.cfg}, {config.sample.routing} routing: {total} images in {npz}, "
            f"{len(shown)} of them in {png}",
            flush=True,
        )
        if used is not None:
            paths = write_report(used, config, str(out))
            print(
                f"capacity used: {used.mean():.4f} experts per token; {', '.join(map(str, paths))}",
                flush=True,
            )
    leave()
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="sample", description="Images from a checkpoint: a PNG grid, and an npz in ADM's form."
    )
    parser.add_argument(
        "--checkpoint", required=True, help="checkpoint folder, or run folder (its newest)"
    )
    parser.add_argument(
        "--classes",
        default="all",
        help="'all', or numbers, ranges and names: boot,3,7-9; in double "
        "quotes always a name, which may hold commas",
    )
    parser.add_argument(
        "--count", type=int, help="images in all, classes in turn (default: ten of each class)"
    )
    parser.add_argument("--cfg", type=float, help="guidance (default: sample.cfg of the run)")
    parser.add_argument(
        "--capacity",
        type=float,
        help="experts per token on average (default: sample.capacity of the run, or "
        "else the learned thresholds)",
    )
    parser.add_argument("--seed", type=int, help="seed of the noise (default: run.seed)")
    parser.add_argument(
        "--weights",
        default="ema",
        help="ema (the first of train.ema), ema:0.999 (by its decay) or raw",
    )
    parser.add_argument(
        "--vae", help="AutoencoderKL that decodes latents: a folder, or the hub's owner/name"
    )
    add_latent_options(parser)
    add_fp32_precision(parser)
    add_compile(parser)
    add_device(parser)
    parser.add_argument("--out", default="samples", help="writes OUT.png and OUT.npz")
    parser.add_argument(
        "--report",
        action="store_true",
        help="also write the capacity used, by layer, time and class: OUT.capacity.json, .md and .png",
    )
    parser.add_argument("overrides", nargs="*", metavar="sample.field=value")
    return parser


def _check_out(*paths: Path) -> None:
    from diffmoe.files import check_writable

    for path in paths:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            check_writable(path)
        except OSError as error:
            raise UserError(f"--out: {path} cannot be written: {error.strerror}") from error
