"""Options that several kinds share, and what their records have in common."""

from __future__ import annotations

import argparse
from typing import Any, Literal

import torch

from diffmoe.bench.measure import surroundings
from diffmoe.commands.common import Parser, add_device
from diffmoe.config import Config, load_config
from diffmoe.device import local_device, set_fp32_precision

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def count(text: str) -> int:
    """A whole number above 0, for argparse."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return int(text)


def bench_parser(
    kind: str,
    description: str,
    profile: bool = False,
    of: Literal["size", "config", "machine"] = "size",
) -> argparse.ArgumentParser:
    """--json and --out; ``of`` a published size also --model, --experts, --dtype, --repeats,
    --device and overrides, of a configuration --config, --deepspeed_config and overrides; with
    ``profile`` --profile.
    """
    parser = Parser(prog=f"bench {kind}", description=description)
    add = parser.add_argument
    if of == "size":
        add("--model", choices=["s", "b", "l", "xl"], default="s", help="size (default s)")
        add("--experts", type=int, default=16, help="default 16")
        add("--dtype", choices=sorted(DTYPES), default="fp32", help="default fp32")
        add("--repeats", type=count, default=7, help="timed rounds (default 7)")
        add_device(parser)
    if of == "config":
        add("--config", default="configs/diffmoe_l_e16_flow.yaml", help="default %(default)s")
        zero1 = "ds_configs/zero1_bf16.json"
        add("--deepspeed_config", default=zero1, help="default %(default)s")
    if of != "machine":
        add(
            "--set",
            nargs="*",
            default=[],
            metavar="section.field=value",
            help="changes to the configuration",
        )
    if profile:
        where = "also where the time goes, by operator or kernel"
        add("--profile", action="store_true", help=where)
    add("--json", action="store_true", help="one line of JSON in place of the table")
    add("--out", help="folder that keeps table, JSON and plot")
    return parser


def sized_config(options: argparse.Namespace) -> tuple[Config, torch.device, torch.dtype]:
    """The published model of that size, this machine's device, and the precision."""
    config = load_config(
        f"configs/base/{options.model}.yaml", [f"moe.experts={options.experts}", *options.set]
    )
    set_fp32_precision(config.run.fp32_precision)
    device = config.run.device if options.device == "auto" else options.device
    return config, local_device(0, 1, device), DTYPES[options.dtype]


def common_facts(
    options: argparse.Namespace, config: Config, device: torch.device
) -> dict[str, Any]:
    """What every record of a published size says."""
    return {
        "model": options.model,
        "experts": config.moe.experts,
        "dtype": options.dtype,
        "repeats": options.repeats,
        **surroundings(device),
    }
