"""What the launcher's subcommands share on the command line."""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING

from diffmoe.errors import UserError
from diffmoe.files import writing
from diffmoe.paths import PathParser

if TYPE_CHECKING:  # they need yaml, which doctor does without
    from diffmoe.config import Config
    from diffmoe.cost.hardware import Hardware
    from diffmoe.cost.layouts import Pins


class Parser(PathParser):
    """The parser of a subcommand, whose help ends with an example that works."""

    def __init__(self, name: str, description: str, example: str) -> None:
        prog = f"python -m launcher {name}"
        super().__init__(example, prog=prog, description=description, allow_abbrev=False)


def check_above_0(options: argparse.Namespace, *names: str) -> None:
    """Raises UserError for a number among these options that is not above 0."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name.replace('_', '-')} ({value}) must be above 0")


def add_planner_options(parser: Parser) -> None:
    """The options of plan and simulate: what to run, on which machines, which layouts."""
    add = parser.add_argument
    add("--config", required=True, help="YAML file, see configs/")
    add(
        "--deepspeed_config",
        help="DeepSpeed JSON, see ds_configs/ (default: ZeRO 1, fp32); its stage is tried too",
    )
    add("--gpus-per-node", type=int, help="default: as the hardware table says")
    add("--gpu", default="h100", help="entry of the hardware table (default: h100)")
    add("--memory", type=float, help="GiB of a GPU, in place of the table's")
    add("--hardware", type=Path, help="another table than diffmoe/cost/hardware.yaml")
    add(
        "--calibrate",
        type=Path,
        metavar="RECORDS",
        help="take what is reached of the peaks from records: of run.py profile --json, of "
        "launcher scaling, or the folder or archive of scripts/bench_gpu.sh",
    )
    add("--ep", type=int, help="only this expert-parallel size (default: every one)")
    add("--zero", type=int, choices=range(4), help="only this ZeRO stage")
    add("--recompute", choices=("none", "selective", "block"), help="only this recompute mode")
    add("--micro-batch", type=int, help="only this many samples a GPU and pass")
    shared = "only this many GPUs to a copy of the optimizer's state (default: all; whole nodes)"
    add("--shard", type=int, help=shared)
    add("--overlap", choices=("none", "halves"), help="only this parallel.overlap (default: both)")
    add("--json", type=Path, help="also write every layout with all its numbers here")
    add("overrides", nargs="*", metavar="section.field=value")


_POSITIVE = ("gpus_per_node", "ep", "micro_batch", "shard")


def read_planner_options(options: argparse.Namespace) -> tuple[Config, dict, Hardware, int, Pins]:
    """(configuration, DeepSpeed's JSON, machine, GPUs of a node, what is pinned).  UserError."""
    check_above_0(options, *_POSITIVE)
    from diffmoe.config import load_config
    from diffmoe.cost.calibration import calibrated_by
    from diffmoe.cost.hardware import choose, read_table
    from diffmoe.cost.layouts import Pins
    from diffmoe.deepspeed_json import check_deepspeed, read_deepspeed

    hardware = choose(read_table(options.hardware), options.gpu)
    if options.memory is not None:
        if not hardware.reserve_gib < options.memory < math.inf:
            raise UserError(
                f"--memory ({options.memory:g} GiB) must be a number above the reserve of "
                f"{hardware.reserve_gib:g} GiB"
            )
        hardware = dataclasses.replace(hardware, memory_gib=options.memory)
    if options.calibrate:
        hardware = calibrated_by(options.calibrate, hardware)
    config = load_config(options.config, options.overrides)
    tree = read_deepspeed(options.deepspeed_config)
    check_deepspeed(tree, config)
    names = ("ep", "zero", "recompute", "micro_batch", "shard", "overlap")
    pins = Pins(**{name: getattr(options, name) for name in names})
    return config, tree, hardware, options.gpus_per_node or hardware.gpus_per_node, pins


def write_text(option: str, path: Path, text: str) -> None:
    """Writes a file that ``option`` names.  Raises UserError."""
    with writing(f"{option} ({path})"):
        path.write_text(text)
