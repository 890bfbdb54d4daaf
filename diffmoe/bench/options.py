"""Options that several kinds share."""

from __future__ import annotations

import argparse

import torch

from diffmoe.commands.common import Parser, add_device
from diffmoe.config import Config, load_config
from diffmoe.device import local_device, set_fp32_precision
from diffmoe.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def bench_parser(kind: str, description: str, profile: bool = False) -> argparse.ArgumentParser:
    """--model, --experts, --dtype, --repeats, --json, --out, overrides, and with ``profile``
    --profile.
    """
    parser = Parser(prog=f"bench {kind}", description=description)
    parser.add_argument(
        "--model", choices=["s", "b", "l", "xl"], default="s", help="size (default s)"
    )
    parser.add_argument("--experts", type=int, default=16, help="default 16")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32", help="default fp32")
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds (default 7)")
    if profile:
        parser.add_argument(
            "--profile", action="store_true", help="also where the time goes, by operator or kernel"
        )
    add_device(parser)
    parser.add_argument(
        "--json", action="store_true", help="one line of JSON in place of the table"
    )
    parser.add_argument("--out", help="folder that keeps table, JSON and plot")
    parser.add_argument(
        "--set",
        nargs="*",
        default=[],
        metavar="section.field=value",
        help="changes to the configuration",
    )
    return parser


def sized_config(options: argparse.Namespace) -> tuple[Config, torch.device, torch.dtype]:
    """The published model of that size, this machine's device, and the precision.  UserError for
    bad numbers.
    """
    if options.repeats < 1:
        raise UserError(f"--repeats ({options.repeats}) must be at least 1")
    config = load_config(
        f"configs/base/{options.model}.yaml", [f"moe.experts={options.experts}", *options.set]
    )
    set_fp32_precision(config.run.fp32_precision)
    asked = config.run.device if options.device == "auto" else options.device
    return config, local_device(0, 1, asked), DTYPES[options.dtype]
