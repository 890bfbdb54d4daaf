"""``launcher simulate``: extends measured (or assumed) compute and link figures to thousands of
GPUs.  No torch; matplotlib only for ``--plot``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from diffmoe.config import load_config
from diffmoe.cost.extrapolation import MODES, WORDS, Point, extrapolate, stops
from diffmoe.cost.layouts import GIB, RECOMPUTE, Pins
from diffmoe.deepspeed_json import check_deepspeed, precision, read_deepspeed
from diffmoe.errors import UserError
from launcher.command_line import Parser
from launcher.hardware_options import add_hardware_options, hardware_of

_EXAMPLE = """
python -m launcher simulate --config configs/diffmoe_xl_e16_flow.yaml --deepspeed_config ds_configs/zero1_bf16.json --gpu h100 --ep 8
python -m launcher simulate --config configs/diffmoe_l_e16_flow.yaml --gpu h200 --mode weak --max-gpus 1024 --plot scaling.png
"""


def main(arguments: list[str]) -> int:
    """Returns 0, or 1 when not even the smallest size fits.  UserError for bad input."""
    options = _parse(arguments)
    hardware = hardware_of(options)
    per_node = options.gpus_per_node or hardware.gpus_per_node
    config, tree = (
        load_config(options.config, options.overrides),
        read_deepspeed(options.deepspeed_config),
    )
    check_deepspeed(tree, config)
    sizes = _sizes(options.min_gpus or per_node, options.max_gpus, per_node)
    pins = Pins(options.ep, options.zero, options.recompute, options.micro_batch)
    draw = _plotter() if options.plot else None
    curves = {
        mode: extrapolate(config, tree, hardware, per_node, sizes, mode, pins)
        for mode in (MODES if options.mode == "both" else (options.mode,))
    }
    print(
        f"{precision(tree)}; {hardware.name}; {'assumed shares of data-sheet peaks' if hardware.calibrated is None else hardware.calibrated}"
    )
    for mode, points in curves.items():
        print("\n" + "\n".join(_table(mode, points)))
    if options.json:
        _write(
            options.json,
            json.dumps(
                {mode: [_as_dict(p) for p in points] for mode, points in curves.items()}, indent=1
            )
            + "\n",
        )
    if draw is not None:
        draw(curves, options.plot)
    return 0 if all(points[0].candidate is not None for points in curves.values()) else 1


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(
        "simulate",
        "Throughput and efficiency on 8 ... 4096 GPUs by the planner's model, where scaling stops, and why.",
        _EXAMPLE,
    )
    parser.add_argument("--config", required=True, help="YAML file, see configs/")
    parser.add_argument(
        "--deepspeed_config",
        help="DeepSpeed JSON, see ds_configs/ (default: ZeRO 1, fp32); its stage is tried too",
    )
    parser.add_argument(
        "--mode",
        choices=(*MODES, "both"),
        default="both",
        help="strong: train.batch stays; weak: it grows with the GPUs (default: both)",
    )
    parser.add_argument("--min-gpus", type=int, help="default: one node")
    parser.add_argument("--max-gpus", type=int, default=4096)
    parser.add_argument("--gpus-per-node", type=int, help="default: as the hardware table says")
    add_hardware_options(parser)
    parser.add_argument(
        "--ep", type=int, help="only this expert-parallel size (default: the best at every size)"
    )
    parser.add_argument("--zero", type=int, choices=range(4), help="only this ZeRO stage")
    parser.add_argument("--recompute", choices=RECOMPUTE, help="only this recompute mode")
    parser.add_argument("--micro-batch", type=int, help="only this many samples a GPU and pass")
    parser.add_argument(
        "--json", type=Path, help="also write every point with all its numbers here"
    )
    parser.add_argument(
        "--plot",
        type=Path,
        help="also draw efficiency against the ideal line here (PNG; needs matplotlib)",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    options = parser.parse_intermixed_args(arguments)
    for name in ("min_gpus", "max_gpus", "gpus_per_node", "ep", "micro_batch"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} ({value}) must be above 0")
    return options


def _sizes(least: int, most: int, per_node: int) -> list[int]:
    if most < least:
        raise UserError(f"--max-gpus ({most}) must be at least the smallest size ({least})")
    sizes = [least]
    while 2 * sizes[-1] <= most:
        sizes.append(2 * sizes[-1])
    for size in sizes:
        if size > per_node and size % per_node:
            raise UserError(
                f"--min-gpus ({least}), doubled, gives {size} GPUs, which are not whole nodes of {per_node}"
            )
    return sizes


def _plotter():
    try:
        from launcher.scaling_plots import draw_simulation
    except ModuleNotFoundError as error:
        raise UserError(
            f"--plot needs the package {error.name}, which is not installed here; leave --plot out"
        ) from None
    return draw_simulation


def _table(mode: str, points: list[Point]) -> list[str]:
    lines = [
        f"{mode} scaling: train.batch " + ("stays" if mode == "strong" else "grows with the GPUs"),
        f"{'GPUs':>6} {'nodes':>5} {'batch':>7} {'EP':>3} {'ZeRO':>4} {'recompute':9} {'micro':>5} {'acc':>4} {'GiB':>6} "
        f"{'ms/step':>8} {'images/s':>9} {'efficiency':>10}  "
        + " ".join(f"{name.replace('_', '-'):>10}" for name in WORDS),
    ]
    for p in points:
        if p.candidate is None:
            lines.append(f"{p.ranks:>6} {p.nodes:>5} {p.batch:>7}  {p.problem}")
            continue
        c, time = p.candidate, p.candidate.time
        shares = " ".join(f"{100 * getattr(time, name) / time.total:>8.0f} %" for name in WORDS)
        lines.append(
            f"{p.ranks:>6} {p.nodes:>5} {p.batch:>7} {c.layout.ep:>3} {c.engine.stage:>4} {c.config.parallel.recompute:9} "
            f"{c.layout.micro_batch:>5} {c.layout.accumulation:>4} {c.memory.peak / GIB:>6.1f} {1e3 * time.total:>8.1f} "
            f"{c.images_per_s:>9.0f} {100 * p.efficiency:>8.0f} %  {shares}"
        )
    stopped = stops(points)
    if points[0].candidate is None:
        return lines + [f"does not start: {points[0].problem}"]
    if stopped is None:
        return lines + [f"goes on scaling up to {points[-1].ranks} GPUs"]
    return lines + [f"stops scaling at {stopped[0]} GPUs: {stopped[1]}"]


def _as_dict(point: Point) -> dict:
    bare = dataclasses.asdict(dataclasses.replace(point, candidate=None))
    return {**bare, "candidate": point.candidate and point.candidate.table()}


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise UserError(f"--json ({path}) cannot be written: {error}") from None
