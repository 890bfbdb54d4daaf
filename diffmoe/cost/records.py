"""Records of measured steps (``run.py profile --json``, ``launcher scaling``): JSON lines, read without torch."""

from __future__ import annotations

import json
from pathlib import Path

from diffmoe.config import config_from_tree
from diffmoe.cost.hardware import Hardware
from diffmoe.cost.memory import engine_facts
from diffmoe.cost.step_time import Measured, calibrate
from diffmoe.errors import UserError
from diffmoe.layout import Layout


def read_records(path: str | Path) -> list[dict]:
    """The good records of a file of JSON lines (a run that failed has ``error``).  Raises UserError."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line) if line.strip() else {"error": ""}
        except ValueError as error:
            raise UserError(f"{path}, line {number} is not JSON: {error}") from None
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {number} must hold an object, not {type(record).__name__}")
        if "error" not in record:
            records.append(record)
    return records


def measured(record: dict) -> Measured:
    """A record's layout, and its step time split by phase.  Raises UserError naming what is missing."""
    try:
        seconds = {phase: share * record["step_s"] for phase, share in record["split"].items()}
        return Measured(config_from_tree(record["config"]), Layout(**record["layout"]), engine_facts(record["deepspeed"]),
                        record["per_node"], seconds["compute"], seconds["all_to_all"], seconds["reduction"], seconds["other"])
    except (KeyError, TypeError) as error:
        raise UserError(f"a record of a measured step lacks {error}: is it from run.py profile?") from None


def calibrated_by(path: str | Path, hardware: Hardware) -> Hardware:
    """``hardware`` with the shares that a file of records shows.  Raises UserError."""
    records = read_records(path)
    machines = sorted({record.get("device", "?") for record in records})
    steps = [measured(record) for record in records]
    return calibrate(hardware, steps, f"{len(steps)} records of {', '.join(machines)} in {Path(path).name}")
