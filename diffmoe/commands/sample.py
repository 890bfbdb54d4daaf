"""The subcommand ``sample``."""

from __future__ import annotations

from pathlib import Path

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
from diffmoe.environment import RankEnvironment
from diffmoe.errors import UserError
from diffmoe.evaluation.class_names import parse_classes
from diffmoe.files import check_writable, replacing
from diffmoe.remote import any_path


def main(arguments: list[str], environment: RankEnvironment) -> int:
    """The subcommand ``sample``; returns the exit code.  UserError for bad input."""
    options = _parser().parse_intermixed_args(arguments)
    import numpy as np
    import torch

    from diffmoe.checkpoints.reader import Checkpoint
    from diffmoe.data.values import described
    from diffmoe.device import set_fp32_precision
    from diffmoe.evaluation.capacity_report import CapacityMeter, write_report
    from diffmoe.evaluation.features import to_uint8
    from diffmoe.evaluation.generate import generate_everywhere
    from diffmoe.evaluation.plots import class_columns, image_grid
    from diffmoe.parallel.collectives import agreed
    from diffmoe.parallel.groups import build_groups

    checkpoint = Checkpoint(any_path(options.checkpoint))
    config = sampling_config(checkpoint.config(), options)
    sample, weights = config.sample, options.weights or "ema"
    classes = parse_classes(options.classes, config.model.classes, checkpoint.manifest.class_names)
    total = options.count if options.count is not None else 10 * len(classes)
    if total < 1:
        raise UserError(f"--count ({total}) must be at least 1")
    labels = [classes[i % len(classes)] for i in range(total)]
    device = join(environment, asked=options.device)
    world = build_groups(1, 1).world  # every rank holds the whole model
    out = Path(options.out.removesuffix(".npz").removesuffix(".png"))
    npz, png = Path(f"{out}.npz"), Path(f"{out}.png")  # with_suffix would cut cfg1.5 to cfg1
    with agreed(world):
        model, others, decoder, notes = sampling_model(checkpoint, config, options, device)
        meter = CapacityMeter(model, config, total, device) if options.report else None
        for path in (npz, png):
            check_writable(path, f"--out: {path}")
    first = environment.rank == 0
    for note in notes if first else ():
        print(note, flush=True)
    set_fp32_precision(config.run.fp32_precision)
    to_device((model, *others), config, device)
    decode = None
    if decoder is not None:
        decode = lambda latents: decoder.function(latents).float() / 127.5 - 1
    images = generate_everywhere(
        *(model, config, labels, world, device),
        progress=first,
        meter=meter,
        decode=decode,
        others=others,
    )
    used = None if meter is None else meter.merged(world)
    if first:
        arrays = {"images": images.numpy(), "labels": np.array(labels)}
        if images.shape[1] in (1, 3) and torch.isfinite(images).all():
            # Images, in ADM's form too; latents have none.
            arrays["arr_0"] = to_uint8(images).permute(0, 2, 3, 1).numpy()
            arrays["arr_1"] = arrays["labels"]
        with replacing(npz) as stream:
            np.savez(stream, allow_pickle=False, **arrays)
        columns = class_columns(sample.columns, len(classes))
        shown = images[: 10 * columns].numpy()
        image_grid(shown, columns, png)
        if sample.capacity is not None and weights != "ema":
            print(
                "note: the dial was set on the EMA weights (the default); these may use another "
                "capacity, see --report"
            )
        if decoder is not None:
            print(
                f"decoded by vae {decoder.name} from latents of scale {described(decoder.scale)}, "
                f"shift {described(decoder.shift)}"
            )
        print(
            f"step {checkpoint.step}, {weights} weights, {sample.sampler} {sample.steps} steps, "
            f"cfg {sample.cfg}{sample.guidance}, {sample.routing} routing: "
            f"{total} images in {npz}, {len(shown)} of them in {png}",
            flush=True,
        )
        if used is not None:
            paths = ", ".join(map(str, write_report(used, config, str(out))))
            print(f"capacity used: {used.mean():.4f} experts per token; {paths}", flush=True)
    leave()
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="sample", description="Images from a checkpoint: a PNG grid, and an npz in ADM's form."
    )
    add = parser.add_argument
    add("--checkpoint", required=True, help=CHECKPOINT_HELP)
    classes = "'all', or numbers, ranges and names: boot,3,7-9; in double quotes always a name"
    add("--classes", default="all", help=classes)
    add("--count", type=int, help="images in all, classes in turn (default: ten of each class)")
    capacity = "experts per token on average (default: sample.capacity, or learned thresholds)"
    add("--capacity", type=float, help=capacity)
    add("--out", default="samples", help="writes OUT.png and OUT.npz")
    report = "also write the capacity used: OUT.capacity.json, .md and .png"
    add("--report", action="store_true", help=report)
    add_sampling_options(parser)
    return parser
