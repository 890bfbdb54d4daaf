"""The options by which plan and simulate are told what the machines are."""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path

from diffmoe.cost.hardware import Hardware, choose, read_table
from diffmoe.cost.records import calibrated_by
from diffmoe.errors import UserError


def add_hardware_options(parser: argparse.ArgumentParser) -> None:
    """The options that say what the machines are; see :func:`hardware_of`."""
    parser.add_argument(
        "--gpu",
        default="h100",
        help="entry of the hardware table: h100, h200, a100, cpu (default: h100)",
    )
    parser.add_argument("--memory", type=float, help="GiB of a GPU, in place of the table's")
    parser.add_argument(
        "--hardware", type=Path, help="another table than diffmoe/cost/hardware.yaml"
    )
    parser.add_argument(
        "--calibrate",
        type=Path,
        metavar="RECORDS",
        help="take what is reached of the peaks from records: of run.py profile --json, of launcher scaling, "
        "or the folder or archive of scripts/bench_gpu.sh",
    )


def hardware_of(options: argparse.Namespace) -> Hardware:
    """The table's entry as the command line changes it.  Raises UserError."""
    hardware = choose(read_table(options.hardware), options.gpu)
    if options.memory is not None:
        if not hardware.reserve_gib < options.memory < math.inf:
            raise UserError(
                f"--memory ({options.memory:g} GiB) must be a number above the reserve of {hardware.reserve_gib:g} GiB"
            )
        hardware = dataclasses.replace(hardware, memory_gib=options.memory)
    return calibrated_by(options.calibrate, hardware) if options.calibrate else hardware
