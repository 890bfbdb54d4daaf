"""What ``launcher scaling`` says about its runs: repeats together, efficiencies, a table."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

from diffmoe.markdown import table


@dataclass(frozen=True)
class Group:
    """Repeats of one kind of run, medians over them.  ``efficiency``: images per second and rank,
    relative to the best of the smallest number of ranks in the same mode; ``least``: counted
    all-to-all bytes over the lower bound (None without).
    """

    mode: str
    ranks: int
    nodes: int
    ep: int
    zero: int
    batch: int
    runs: int
    step_s: float
    spread: float
    split: dict[str, float]
    peak_bytes: int
    least: float | None
    efficiency: float = 0.0

    @property
    def images_per_s(self) -> float:
        return self.batch / self.step_s


def grouped(records: list[dict]) -> list[Group]:
    """The good records by kind of run, in order of mode, layout and ranks."""
    kinds: dict[tuple, list[dict]] = {}
    for record in records:
        if "error" not in record:
            kinds.setdefault(
                tuple(record[k] for k in ("mode", "zero", "ep", "ranks", "nodes", "batch")), []
            ).append(record)
    groups = [_group(key, kinds[key]) for key in sorted(kinds)]
    found = []
    for g in groups:
        same = [other for other in groups if other.mode == g.mode]
        smallest = min(other.ranks for other in same)
        best = max(other.images_per_s / other.ranks for other in same if other.ranks == smallest)
        found.append(Group(**{**vars(g), "efficiency": g.images_per_s / g.ranks / best}))
    return found


def _group(key: tuple, records: list[dict]) -> Group:
    mode, zero, ep, ranks, nodes, batch = key
    times = [record["step_s"] for record in records]
    split = {
        phase: statistics.mean(record["split"][phase] for record in records)
        for phase in records[0]["split"]
    }
    return Group(
        mode,
        ranks,
        nodes,
        ep,
        zero,
        batch,
        len(records),
        statistics.median(times),
        (max(times) - min(times)) / statistics.median(times),
        split,
        max(record["peak_bytes"] for record in records),
        _over_least(records[0]["traffic"]),
    )


def _over_least(by_rank: list[list[dict]]) -> float | None:
    """Counted all-to-all bytes over those of the chosen rows, there and home, forward and backward."""
    sent = [row for rows in by_rank for row in rows if row["collective"] == "all_to_all"]
    rows = sum(
        row["wire"]
        for row in sent
        if row["purpose"] in ("dispatch", "combine") and row["phase"] != "recompute"
    )
    return sum(row["wire"] for row in sent) / rows if rows else None


def write_table(groups: list[Group], good: dict, path: Path) -> list[str]:
    """Writes ``table.md``, under a head that says where it comes from (``good``: any good record);
    returns the table's lines.
    """
    lines = _lines(groups)
    head = [
        f"{good['device']}, {good['threads']} thread{'s' * (good['threads'] > 1)} a rank, torch {good['torch']}, DeepSpeed "
        f"{good['deepspeed_version']}, commit {good['commit']}, started by {good['start']}, {good['when']}.",
        "Times are medians of runs, split by phase in traced steps of the same runs; efficiency is images per second and rank "
        "against the fewest ranks.",
        "",
    ]
    path.write_text("\n".join(head + lines) + "\n")
    return lines


def _lines(groups: list[Group]) -> list[str]:
    phases = list(groups[0].split)
    head = [
        "mode",
        "ranks",
        "nodes",
        "EP",
        "ZeRO",
        "batch",
        "runs",
        "ms a step",
        "spread",
        "images/s",
        "efficiency",
        *(phase.replace("_", "-") for phase in phases),
        "peak MiB",
        "all-to-all over least",
    ]
    return table(
        head,
        [
            [
                g.mode,
                g.ranks,
                g.nodes,
                g.ep,
                g.zero,
                g.batch,
                g.runs,
                f"{1e3 * g.step_s:.1f}",
                f"{100 * g.spread:.0f} %",
                f"{g.images_per_s:.1f}",
                f"{100 * g.efficiency:.0f} %",
                *(f"{100 * g.split[phase]:.0f} %" for phase in phases),
                f"{g.peak_bytes / 2**20:.0f}",
                None if g.least is None else g.least,
            ]
            for g in groups
        ],
    )
