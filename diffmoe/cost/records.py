"""Records of measured steps, read without torch: JSON lines of ``run.py profile --json`` and
``launcher scaling``, and the folder or archive of ``scripts/bench_gpu.sh``.
"""

from __future__ import annotations

import dataclasses
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

from diffmoe.config import config_from_tree
from diffmoe.cost.hardware import Hardware
from diffmoe.cost.memory import engine_facts
from diffmoe.cost.step_time import Kernels, Measured, calibrate, calibrate_kernels
from diffmoe.errors import UserError
from diffmoe.layout import Layout


def read_records(path: str | Path) -> list[dict]:
    """The good records of a file of JSON lines, or of every JSON file in a folder or tar archive (a
    run that failed has ``error``). Raises UserError.
    """
    try:
        texts = list(_texts(Path(path)))
    except (OSError, UnicodeDecodeError, tarfile.TarError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    found = [record for name, text in texts for record in _records(text, name)]
    return [record for record in found if "error" not in record]


def _texts(path: Path) -> Iterator[tuple[str, str]]:
    if path.is_dir():
        yield from (
            (str(file), file.read_text(encoding="utf-8"))
            for ending in ("json", "jsonl")
            for file in sorted(path.rglob(f"*.{ending}"))
        )
    elif path.is_file() and tarfile.is_tarfile(path):
        with tarfile.open(path) as archive:
            for member in archive:
                if member.isfile() and member.name.endswith((".json", ".jsonl")):
                    yield f"{path}: {member.name}", archive.extractfile(member).read().decode()
    else:
        yield str(path), path.read_text(encoding="utf-8")


def _records(text: str, name: str) -> Iterator[dict]:
    if name.endswith(".json") and text.startswith("{\n"):  # one object over several lines
        text = " ".join(text.splitlines())
    for number, line in enumerate(text.splitlines(), 1):
        try:
            record = json.loads(line) if line.strip() else {"error": ""}
        except ValueError as error:
            raise UserError(f"{name}, line {number} is not JSON: {error}") from None
        if not isinstance(record, dict):
            raise UserError(
                f"{name}, line {number} must hold an object, not {type(record).__name__}"
            )
        yield record


def measured(record: dict) -> Measured:
    """A record's layout, and its step time split by phase.  Raises UserError naming what is
    missing.
    """
    try:
        seconds = {phase: share * record["step_s"] for phase, share in record["split"].items()}
        return Measured(
            config_from_tree(record["config"]),
            Layout(**record["layout"]),
            engine_facts(record["deepspeed"]),
            record["per_node"],
            seconds["compute"],
            seconds["all_to_all"],
            seconds["reduction"],
            seconds["other"],
        )
    except (KeyError, TypeError) as error:
        raise UserError(
            f"a record of a measured step lacks {error}: is it from run.py profile?"
        ) from None


def timed_steps(record: dict) -> list[dict]:
    """The measured steps of a record of ``run.py bench roofline``, none where no GPU was at hand."""
    cases = record.get("cases", {}) if str(record.get("bench")).startswith("roofline") else {}
    return [
        way["measured"]
        for case in cases.values()
        for ways in case.values()
        for way in ways.values()
        if isinstance(way, dict) and way.get("measured")
    ]


def _kernels(step: dict) -> Kernels:
    try:
        kinds = {kind: 1e-3 * ms for kind, (ms, _) in step["kinds"].items()}
        return Kernels(
            config_from_tree(step["config"]),
            Layout(**step["layout"]),
            engine_facts(step["deepspeed"]),
            step["seconds"],
            kinds["products"],
            kinds["attention"],
            kinds["memory"],
        )
    except (KeyError, TypeError) as error:
        raise UserError(
            f"a record of a step's kernels lacks {error}: is it from run.py bench roofline?"
        ) from None


def _ceilings(probe: dict, hardware: Hardware, origin: str) -> Hardware:
    peak = 1e12 * hardware.tflops_bf16
    try:
        return dataclasses.replace(
            hardware,
            matmul=max(probe["matmul_flops"].values()) / peak,
            bandwidth=probe["copy_bytes_s"]["large"] / (1e9 * hardware.memory_gb_s),
            attention=min(each["flops"] for each in probe["attention"].values()) / peak,
            operator_us=probe["launch_us"],
            read_us=probe["read_us"],
            calibrated=f"the ceilings of {probe['device']} in {origin}, no step (links assumed)",
        )
    except (KeyError, TypeError) as error:
        raise UserError(
            f"a record of a machine lacks {error}: is it from run.py bench probe?"
        ) from None


def calibrated_by(path: str | Path, hardware: Hardware) -> Hardware:
    """``hardware`` with the shares that records show: of a folder or archive those of its steps'
    kernels, where there are none the ceilings that were probed.  Raises UserError.
    """
    records, name = read_records(path), Path(path).name
    probe = next((record for record in records if record.get("bench") == "probe_machine"), None)
    steps = [step for record in records for step in timed_steps(record)]
    probed = _ceilings(probe, hardware, name) if probe else None
    if steps:
        devices = sorted({step["device"] for step in steps})
        read_us = probed.read_us if probed else hardware.read_us
        return calibrate_kernels(
            dataclasses.replace(hardware, read_us=read_us),
            map(_kernels, steps),
            f"the kernels of {len(steps)} steps on {', '.join(devices)} in {name} (links assumed)",
        )
    if probed:
        return probed
    if Path(path).is_dir() or tarfile.is_tarfile(path):
        records = [record for record in records if "step_s" in record]
    machines = sorted({record.get("device", "?") for record in records})
    return calibrate(
        hardware,
        map(measured, records),
        f"{len(records)} records of {', '.join(machines) or 'any machine'} in {name}",
    )
