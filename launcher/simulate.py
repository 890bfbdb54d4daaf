"""``launcher simulate``: measured (or assumed) figures extended to thousands of GPUs.  No torch."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from diffmoe.cost.calibration import Checked, checked
from diffmoe.cost.extrapolation import MODES, WORDS, Point, extrapolate, stops
from diffmoe.cost.layouts import GIB
from diffmoe.deepspeed_json import precision
from diffmoe.errors import UserError
from diffmoe.markdown import table
from launcher.command_line import (
    Parser,
    add_planner_options,
    check_above_0,
    read_planner_options,
    write_text,
)

_RESULTS = Path(__file__).resolve().parent.parent / "docs/results"
_MEASURED = "scaling_*/runs.jsonl"
_EXAMPLE = """
python -m launcher simulate --config configs/diffmoe_xl_e16_flow.yaml --gpu h100 --ep 8
python -m launcher simulate --config configs/demo.yaml --mode weak --max-gpus 64
"""


def main(arguments: list[str]) -> int:
    """Returns 0, or 1 when not even the smallest size fits.  UserError for bad input."""
    options = _parse(arguments)
    config, tree, hardware, per_node, pins = read_planner_options(options)
    sizes = _sizes(options.min_gpus or per_node, options.max_gpus, per_node)
    curves = {
        mode: extrapolate(config, tree, hardware, per_node, sizes, mode, pins)
        for mode in (MODES if options.mode == "both" else (options.mode,))
    }
    figures = hardware.calibrated or "assumed shares of data-sheet peaks"
    print(f"{precision(tree)}; {hardware.name}; {figures}")
    print(f"assumed: {hardware.assumptions}")
    for mode, points in curves.items():
        print("\n" + "\n".join(_table(mode, points)))
    measured = [options.measured] if options.measured else sorted(_RESULTS.glob(_MEASURED))
    for path in measured:
        print("\n" + "\n".join(_errors(path)))
    if not measured:
        print("\nno measured point to hold this to: launcher scaling makes records (--measured)")
    if options.json:
        answer = {mode: [_as_dict(p) for p in points] for mode, points in curves.items()}
        write_text("--json", options.json, json.dumps(answer, indent=1) + "\n")
    return 0 if all(points[0].candidate for points in curves.values()) else 1


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(
        "simulate",
        "Throughput and efficiency on 8 ... 4096 GPUs by the planner's model, where scaling stops, "
        "and why.",
        _EXAMPLE,
    )
    add = parser.add_argument
    add(
        "--mode",
        choices=(*MODES, "both"),
        default="both",
        help="strong: train.batch stays; weak: it grows with the GPUs (default: both)",
    )
    add("--min-gpus", type=int, help="default: one node")
    add("--max-gpus", type=int, default=4096, help="the last column")
    measured = (
        f"records of launcher scaling to hold the model to (default: docs/results/{_MEASURED})"
    )
    add("--measured", type=Path, metavar="RECORDS", help=measured)
    add_planner_options(parser)
    options = parser.parse_intermixed_args(arguments)
    check_above_0(options, "min_gpus", "max_gpus")
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
                f"--min-gpus ({least}), doubled, gives {size} GPUs, which are not whole nodes of "
                f"{per_node}"
            )
    return sizes


def _table(mode: str, points: list[Point]) -> list[str]:
    lines = [
        f"{mode} scaling: train.batch " + ("stays" if mode == "strong" else "grows with the GPUs"),
        f"{'GPUs':>6} {'nodes':>5} {'batch':>7} {'EP':>3} {'ZeRO':>4} {'recompute':9} {'micro':>5} "
        f"{'acc':>4} {'GiB':>6} {'ms/step':>8} {'images/s':>9} {'efficiency':>10}  "
        + " ".join(f"{name.replace('_', '-'):>10}" for name in WORDS),
    ]
    for p in points:
        size, c = f"{p.ranks:>6} {p.nodes:>5} {p.batch:>7}", p.candidate
        if c is None:
            lines.append(f"{size}  {p.problem}")
            continue
        shares = [100 * getattr(c.time, name) / c.time.total for name in WORDS]
        lines.append(
            f"{size} {c.layout.ep:>3} {c.engine.stage:>4} {c.recompute:9} "
            f"{c.layout.micro_batch:>5} {c.layout.accumulation:>4} {c.memory.peak / GIB:>6.1f} "
            f"{1e3 * c.time.total:>8.1f} {c.images_per_s:>9.0f} {100 * p.efficiency:>8.0f} %  "
            + " ".join(f"{share:>8.0f} %" for share in shares)
            + (f"  {c.forms}" if c.forms else "")
        )
    if points[0].candidate is None:
        return [*lines, f"does not start: {points[0].problem}"]
    stopped = stops(points)
    if stopped is None:
        return [*lines, f"goes on scaling up to {points[-1].ranks} GPUs"]
    return [*lines, f"stops scaling at {stopped[0]} GPUs: {stopped[1]}"]


def _errors(path: Path) -> list[str]:
    """Every measured point beside what the model says of it."""
    head = ["measured on", "ranks", "layout", "batch", "ms a step"]
    head += ["by the table", "calibrated on the fewest ranks"]

    def beside(point: Checked, seconds: float | None) -> str:
        if seconds is None:
            return "–"
        return f"{1e3 * seconds:.1f} ({100 * (seconds / point.measured - 1):+.0f} %)"

    rows = [
        [
            *(p.device, p.ranks, p.layout, p.batch, f"{1e3 * p.measured:.1f}"),
            *(beside(p, p.table), beside(p, p.fitted)),
        ]
        for p in checked(path)
    ]
    return [f"the model's error on what was measured ({path}):", *table(head, rows)]


def _as_dict(point: Point) -> dict:
    bare = dataclasses.asdict(dataclasses.replace(point, candidate=None))
    return {**bare, "candidate": point.candidate and point.candidate.table()}
