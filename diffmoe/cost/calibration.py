"""Measured against planned: the shares of the peaks that records of measured steps show, and the
plan's own error.

Records are JSON lines of ``run.py profile --json`` and ``launcher scaling``, and the folder or
archive of ``scripts/bench_gpu.sh``.
"""

from __future__ import annotations

import json
import math
import statistics
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffmoe.config import Config, config_from_tree
from diffmoe.cost.hardware import Hardware, Link, choose, named_like, read_table
from diffmoe.cost.memory import EngineFacts, engine_facts, rank_memory
from diffmoe.cost.step_time import kernel_seconds, launches, step_time
from diffmoe.errors import UserError
from diffmoe.layout import Layout


@dataclass(frozen=True)
class Measured:
    """One measured step: its layout, and seconds by phase as ``run.py profile`` splits them."""

    config: Config
    layout: Layout
    engine: EngineFacts
    per_node: int
    compute: float
    all_to_all: float
    reduction: float
    other: float


@dataclass(frozen=True)
class Kernels:
    """One measured step of one rank taken apart by kernel, as ``run.py bench roofline`` does where
    there is a GPU: seconds of the whole, of products, of attention, and of kernels that move
    memory.
    """

    config: Config
    layout: Layout
    engine: EngineFacts
    seconds: float
    products: float
    attention: float
    memory: float


def calibrated_by(path: str | Path, hardware: Hardware) -> Hardware:
    """``hardware`` with the shares that records show: of a folder or archive those of its steps'
    kernels, where there are none the ceilings that were probed.  Raises UserError.
    """
    path = Path(path)
    records = _read_records(path)
    probe = next((record for record in records if record.get("bench") == "probe_machine"), None)
    steps = [step for record in records for step in timed_steps(record)]
    probed = _ceilings(probe, hardware, path.name) if probe else None
    if steps:
        devices = ", ".join(sorted({step["device"] for step in steps}))
        origin = f"the kernels of {len(steps)} steps on {devices} in {path.name} (links assumed)"
        if probed:
            hardware = replace(hardware, read_us=probed.read_us)
        return calibrate_kernels(hardware, [_kernels(step) for step in steps], origin)
    if probed:
        return probed
    if path.is_dir() or tarfile.is_tarfile(path):
        records = [record for record in records if "step_s" in record]
    machines = ", ".join(sorted({record.get("device", "?") for record in records}))
    origin = f"{len(records)} records of {machines or 'any machine'} in {path.name}"
    return calibrate(hardware, [_measured(record) for record in records], origin)


def calibrate(hardware: Hardware, records: list[Measured], origin: str) -> Hardware:
    """``hardware`` with ``matmul``, ``attention``, ``bandwidth``, ``link`` and ``operator_us`` such
    that predictions meet the records.

    Sums over the records are compared: the shares of compute are scaled together, so are bandwidth
    and latency of the links, until as much of the messages is not hidden as was measured, and
    launching takes what was neither.
    """
    if not records:
        raise UserError(f"{origin} holds no measured step")
    bare = replace(hardware, operator_us=0.0)
    planned = [step_time(r.config, r.layout, r.engine, bare, r.per_node) for r in records]
    computed = sum(r.compute for r in records)
    compute = sum(p.compute for p in planned) / max(1e-9, computed)
    bare = _scaled(bare, compute, 1.0)
    sent = sum(r.all_to_all + r.reduction for r in records)
    if sent > 0 and any(p.whole_all_to_all + p.whole_reduction for p in planned):
        bare = _link_scaled(bare, records, sent)
    launched = [launches(r.config, r.layout, r.engine, hardware) for r in records]
    if hardware.asynchronous:
        # What the host needs hides behind a device that computes meanwhile: no launch takes longer
        # than the shortest step leaves it.
        each = min((r.compute + r.other) / n for r, n in zip(records, launched))
    else:
        each = sum(r.other for r in records) / sum(launched)
    return replace(bare, operator_us=1e6 * each, calibrated=origin)


def _scaled(hardware: Hardware, compute: float, link: float) -> Hardware:
    """``hardware`` that computes and sends so many times as fast."""
    return replace(
        hardware,
        matmul=hardware.matmul * compute,
        attention=hardware.attention and hardware.attention * compute,
        bandwidth=hardware.bandwidth * compute,
        link=hardware.link * link,
        node=Link(hardware.node.gb_s, hardware.node.latency_us / link),
        network=Link(hardware.network.gb_s, hardware.network.latency_us / link),
    )


def _link_scaled(hardware: Hardware, records: list[Measured], sent: float) -> Hardware:
    """``hardware`` with links as fast as makes the records' steps ``sent`` seconds longer: what is
    hidden shrinks as messages grow, so that they are found by halving.
    """
    slow, fast = 1e-6, 1e6
    for _ in range(60):
        middle = math.sqrt(slow * fast)
        tried = _scaled(hardware, 1.0, middle)
        planned = [step_time(r.config, r.layout, r.engine, tried, r.per_node) for r in records]
        if sum(p.all_to_all + p.reduction for p in planned) > sent:
            slow = middle
        else:
            fast = middle
    return _scaled(hardware, 1.0, fast)


def calibrate_kernels(hardware: Hardware, records: list[Kernels], origin: str) -> Hardware:
    """``hardware`` with ``matmul``, ``attention``, ``bandwidth`` such that each kind's seconds,
    summed over the records, are predicted.

    ``operator_us``: the least that a step leaves each of its launches, since no launch took longer
    where the device never waited.
    """
    planned = [kernel_seconds(r.config, r.layout, r.engine, hardware) for r in records]

    def ratio(kind: str) -> float:
        seconds = sum(p[kind] for p in planned)
        return seconds / (sum(getattr(r, kind) for r in records) or seconds)

    def launch_s(r: Kernels) -> float:
        idle = r.seconds - r.products - r.attention - r.memory
        seconds = r.seconds if hardware.asynchronous else max(idle, 0.0)
        return seconds / launches(r.config, r.layout, r.engine, hardware)

    return replace(
        hardware,
        matmul=hardware.matmul * ratio("products"),
        attention=(hardware.attention or hardware.matmul) * ratio("attention"),
        bandwidth=hardware.bandwidth * ratio("memory"),
        operator_us=1e6 * min(map(launch_s, records)),
        calibrated=origin,
    )


def plan_error(
    config: Config,
    layout: Layout,
    deepspeed_tree: dict,
    device_name: str,
    per_node: int,
    step_s: float,
    peak_bytes: float,
    step: int = 0,
) -> tuple[dict[str, float], str]:
    """(entries for the metrics, a line for people): predicted and measured step time, and memory
    where it was measured (``peak_bytes`` 0: it was not), around ``step`` of a schedule of the
    capacity.  Errors are predicted / measured - 1.

    ``device_name``: torch's name of the GPU, or ``cpu``; one that the hardware table does not know
    has no plan: ({}, why).
    """
    table = read_table(None)
    hardware = choose(table, "cpu") if device_name == "cpu" else named_like(table, device_name)
    if hardware is None:
        return {}, f"plan: diffmoe/cost/hardware.yaml has no entry for {device_name!r}"
    engine = engine_facts(deepspeed_tree)
    then = replace(config, moe=replace(config.moe, capacity=config.moe.capacity_at(step)))
    seconds = step_time(then, layout, engine, hardware, per_node).total
    gib = rank_memory(config, layout, engine).peak / 2**30
    error = seconds / step_s - 1
    entries = {"plan_step_s": seconds, "plan_step_error": error, "plan_memory_gib": gib}
    line = (
        f"plan: {1e3 * seconds:.1f} ms a step, measured {1e3 * step_s:.1f} ({100 * error:+.0f} %)"
    )
    line += f"; {gib:.2f} GiB"
    if peak_bytes > 0:
        measured = peak_bytes / 2**30
        entries["plan_memory_error"] = gib / measured - 1
        line += f", measured {measured:.2f} ({100 * (gib / measured - 1):+.0f} %)"
    else:
        line += " (of a CPU rank it is not measured apart from its process)"
    if not hardware.calibrated:
        line += "; the hardware table's figures are not calibrated here"
    return entries, line


@dataclass(frozen=True)
class Checked:
    """A measured step beside the plan.  ``table``: predicted by the hardware table's entry of the
    device; ``fitted``: by that, calibrated on the records of the fewest ranks (None for those).
    Seconds.
    """

    device: str
    ranks: int
    batch: int
    layout: str
    measured: float
    table: float
    fitted: float | None


def checked(path: Path) -> list[Checked]:
    """The records of ``launcher scaling`` in a file beside the plan, one device's after the
    other's, the median of a point's repeats; those of devices that the hardware table does not
    know are left out.  Raises UserError.
    """
    table, by_device, found = read_table(None), dict[str, list[dict]](), []
    for record in _read_records(path):
        by_device.setdefault(str(record.get("device")), []).append(record)
    for device, records in by_device.items():
        on_cpu = "cuda" not in records[0]
        hardware = choose(table, "cpu") if on_cpu else named_like(table, device)
        if hardware is None:
            continue
        steps = [_measured(record) for record in records]
        least = min(step.layout.ranks for step in steps)
        few = [step for step in steps if step.layout.ranks == least]
        fitted = calibrate(hardware, few, f"{len(few)} steps on {least} ranks")
        repeats = defaultdict(list)
        for step, record in zip(steps, records):
            repeats[step.layout.ranks, _label(step), step.layout.batch].append((step, record))
        for (ranks, label, batch), runs in repeats.items():
            step = runs[0][0]
            what = (step.config, step.layout, step.engine)
            plan, again = (step_time(*what, h, step.per_node).total for h in (hardware, fitted))
            median = statistics.median(record["step_s"] for _, record in runs)
            known = None if ranks == least else again
            found.append(Checked(device, ranks, batch, label, median, plan, known))
    return found


def _label(step: Measured) -> str:
    shard = f" in groups of {step.engine.shard}" if step.engine.copies(step.layout) > 1 else ""
    halves = ", halves" if step.config.parallel.overlap == "halves" else ""
    return f"EP {step.layout.ep}, ZeRO {step.engine.stage}{shard}{halves}"


# ------------------------------------------------------------------------------------------------
# records


def _read_records(path: Path) -> list[dict]:
    """The good ones (no ``error``) of JSON lines, or a folder's or archive's files.  UserError."""
    try:
        found = [record for name, text in _texts(path) for record in _records(text, name)]
    except (OSError, UnicodeDecodeError, tarfile.TarError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    return [record for record in found if "error" not in record]


def _texts(path: Path) -> Iterator[tuple[str, str]]:
    endings = (".json", ".jsonl")
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if file.suffix in endings:
                yield str(file), file.read_text(encoding="utf-8")
    elif path.is_file() and tarfile.is_tarfile(path):
        with tarfile.open(path) as archive:
            for member in archive:
                stream = archive.extractfile(member)
                if stream and member.name.endswith(endings):
                    yield f"{path}: {member.name}", stream.read().decode()
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
            kind = type(record).__name__
            raise UserError(f"{name}, line {number} must hold an object, not {kind}")
        yield record


def timed_steps(record: dict) -> list[dict]:
    """The measured steps of a record of ``run.py bench roofline``; none where there was no GPU."""
    cases = record.get("cases", {}) if str(record.get("bench")).startswith("roofline") else {}
    return [
        way["measured"]
        for case in cases.values()
        for ways in case.values()
        for way in ways.values()
        if isinstance(way, dict) and way.get("measured")
    ]


def _measured(record: dict) -> Measured:
    try:
        return Measured(
            *_what_ran(record),
            record["per_node"],
            *(
                record["split"][phase] * record["step_s"]
                for phase in ("compute", "all_to_all", "reduction", "other")
            ),
        )
    except (KeyError, TypeError) as error:
        raise _lacks("measured step", error, "run.py profile") from None


def _kernels(step: dict) -> Kernels:
    try:
        seconds = [1e-3 * step["kinds"][kind][0] for kind in ("products", "attention", "memory")]
        return Kernels(*_what_ran(step), step["seconds"], *seconds)
    except (KeyError, TypeError) as error:
        raise _lacks("step's kernels", error, "run.py bench roofline") from None


def _what_ran(record: dict) -> tuple[Config, Layout, EngineFacts]:
    return (
        config_from_tree(record["config"]),
        Layout(**record["layout"]),
        engine_facts(record["deepspeed"]),
    )


def _ceilings(probe: dict, hardware: Hardware, origin: str) -> Hardware:
    peak = 1e12 * hardware.tflops_bf16
    try:
        return replace(
            hardware,
            matmul=max(probe["matmul_flops"].values()) / peak,
            bandwidth=probe["copy_bytes_s"]["large"] / (1e9 * hardware.memory_gb_s),
            attention=min(each["flops"] for each in probe["attention"].values()) / peak,
            operator_us=probe["launch_us"],
            read_us=probe["read_us"],
            calibrated=f"the ceilings of {probe['device']} in {origin}, no step (links assumed)",
        )
    except (KeyError, TypeError) as error:
        raise _lacks("machine", error, "run.py bench probe") from None


def _lacks(what: str, error: Any, command: str) -> UserError:
    return UserError(f"a record of a {what} lacks {error}: is it from {command}?")
