"""The subcommand ``verify``: the parity table in print and as JSON."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict
from pathlib import Path

import torch

from diffmoe.commands.common import Parser, one_process
from diffmoe.device import local_device, set_fp32_precision
from diffmoe.environment import RankEnvironment
from diffmoe.errors import UserError
from diffmoe.files import check_writable, write_text
from diffmoe.models.compiled import check_compiler
from diffmoe.parity.cases import (
    WORLDS,
    compiled_table,
    full_table,
    quick_compiled_table,
    quick_table,
)
from diffmoe.parity.table import BF16_BOUNDS, BOUND, COLUMNS, Row, run_cases

_TABLES = {
    (False, False): full_table,
    (True, False): quick_table,
    (False, True): compiled_table,
    (True, True): quick_compiled_table,
}
_HEAD = (
    f"{'':>9} {'world':>5} {'ep':>2} {'zero':>4} {'recompute':9} {'acc':>3} {'pool':>20} "
    f"{'samples':>7} {'model':21} " + " ".join(f"{column:>10}" for column in COLUMNS)
)


def _line(number: int, total: int, row: Row) -> str:
    case = row.case
    start = (
        f"{number:>4}/{total:<4} {case.world:>5} {case.ep:>2} {case.zero:>4} {case.recompute:9} "
        f"{case.accumulation:>3} {case.words or case.pool:>20} {case.layout().pool:>7} "
        f"{case.kind:21} "
    )
    if row.error:
        return start + "error: " + " ".join(row.error.split())
    found = " ".join(f"{row.differences[c]:>10.1e}" for c in COLUMNS)
    return start + found + ("  ok" if row.ok else "  MISS")


def main(arguments: list[str], environment: RankEnvironment) -> int:
    """Prints the table; 0 when every number is within the bound.  UserError for bad input."""
    parser = Parser(prog="verify", description="Training over ranks equals one plain process.")
    add = parser.add_argument
    add("--quick", action="store_true", help="a minute or two: fewer rows, or with --compile one")
    add("--compile", action="store_true", help="other rows: training under torch.compile")
    add("--worlds", help="numbers of ranks, of 1, 2 and 4 (default: all that have a device)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: needs a GPU a rank")
    add("--json", type=Path, help="also write the table here")
    options = parser.parse_args(arguments)
    if options.json:
        check_writable(options.json, f"--json ({options.json})")
    one_process("verify", environment)  # it starts its own ranks
    worlds = _parse_worlds(options.worlds, options.device)
    for rank in range(max(worlds) if options.device == "cuda" else 0):
        local_device(rank, max(worlds), options.device)  # before a rank is started
    if options.compile:
        check_compiler(torch.device(options.device))
    cases = _TABLES[options.quick, options.compile](worlds)
    torch.set_num_threads(1)
    set_fp32_precision("ieee")
    rows, began = [], time.monotonic()
    print(_HEAD)
    for row in run_cases(cases, device=options.device, timeout=600.0 if options.compile else 120.0):
        rows.append(row)
        print(_line(len(rows), len(cases), row), flush=True)
    good, seconds = all(row.ok for row in rows), time.monotonic() - began
    if options.json:
        finite = lambda value: value if math.isfinite(value) else str(value)  # as JSON knows it
        tree = {
            "table": "quick" if options.quick else "whole",
            "bound": BOUND,
            "bf16_bounds": BF16_BOUNDS,
            "device": options.device,
            "ok": good,
            "seconds": round(seconds, 1),
            "torch": torch.__version__,
            "rows": [
                {
                    **asdict(row),
                    "differences": {c: finite(v) for c, v in row.differences.items()},
                    "ok": row.ok,
                }
                for row in rows
            ],
        }
        write_text(options.json, json.dumps(tree, indent=1) + "\n")
    for name in ("fp32", "bf16"):
        some = [row.differences for row in rows if row.case.precision == name]
        worst = ", ".join(f"{c} {max(d.get(c, 0.0) for d in some):.1e}" for c in COLUMNS if some)
        if some:
            print(f"largest in {len(some)} {name} cases: {worst}")
    largest = max((r for r in rows if r.case.precision == "fp32"), key=lambda row: row.largest)
    print(f"{seconds:.0f} s")
    print(
        f"verify: {len(rows)} cases, largest relative difference {largest.largest:.1e} "
        f"(case {largest.case.label}), bound {BOUND:.0e}: {'ok' if good else 'MISS'}"
    )
    return 0 if good else 1


def _parse_worlds(text: str | None, device: str) -> list[int]:
    """The numbers of ranks asked for, or all that the machine has devices for."""
    devices = torch.cuda.device_count() if device == "cuda" else max(WORLDS)
    if not devices:
        local_device(0, 1, device)  # which says why
        raise UserError(f"--device (cuda) needs a GPU; torch sees {devices}")
    if text is None:
        return [world for world in WORLDS if world <= devices]
    worlds = sorted({int(part) if part.strip().isdigit() else 0 for part in text.split(",")})
    if not set(worlds) <= set(WORLDS):
        raise UserError(f"--worlds ({text}) must be of {', '.join(map(str, WORLDS))}")
    if max(worlds) > devices:
        raise UserError(f"--worlds ({text}) needs a GPU a rank; torch sees {devices}")
    return worlds
