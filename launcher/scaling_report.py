"""Repeats of ``launcher scaling`` together: efficiencies, a table, plots."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from diffmoe.config import config_from_tree
from diffmoe.cost.memory import engine_facts
from diffmoe.cost.traffic import least_traffic
from diffmoe.evaluation.plots import new_figure
from diffmoe.layout import Layout
from diffmoe.markdown import table

_COLOURS = {
    "compute": "#1f5fa8",
    "all_to_all": "#d9731a",
    "reduction": "#2e8b57",
    "data": "#b5a642",
    "other": "#8a8a8a",
}
_MARKS = "osD^vP*X"
_KIND = ("mode", "zero", "shard", "ep", "overlap", "ranks", "nodes", "batch")
_OLDER = {"shard": 0, "overlap": ""}  # what records of an earlier version do not say


@dataclass(frozen=True)
class Group:
    """Repeats of one kind of run, medians over them.  ``efficiency``: images per second and rank,
    relative to the best of the smallest number of ranks in the same mode; ``rows``, ``reduced``:
    counted bytes of all-to-all, and of gradients and weights, over their lower bounds (None
    without).
    """

    mode: str
    zero: int
    shard: int
    ep: int
    overlap: str
    ranks: int
    nodes: int
    batch: int
    runs: int
    step_s: float
    spread: float
    split: dict[str, float]
    peak_bytes: int
    rows: float | None
    reduced: float | None
    efficiency: float = 0.0

    @property
    def images_per_s(self) -> float:
        return self.batch / self.step_s

    @property
    def stage(self) -> str:
        return f"{self.zero} in {self.shard}s" if self.shard else str(self.zero)

    @property
    def layout(self) -> str:
        return f"EP {self.ep}, ZeRO {self.stage}" + f", {self.overlap}" * bool(self.overlap)

    @property
    def exposed(self) -> float:
        """Share of the step in which ranks communicate and do not compute."""
        return self.split["all_to_all"] + self.split["reduction"]


def grouped(records: list[dict]) -> list[Group]:
    """The good records by kind of run, in order of mode, layout and ranks."""
    kinds: dict[tuple, list[dict]] = {}
    for record in records:
        if "error" not in record:
            record = {**_OLDER, **record}
            kinds.setdefault(tuple(record[k] for k in _KIND), []).append(record)
    groups = [_group(kinds[key]) for key in sorted(kinds)]
    smallest = {g.mode: min(o.ranks for o in groups if o.mode == g.mode) for g in groups}
    best: dict[str, float] = {}
    for g in groups:
        if g.ranks == smallest[g.mode]:
            best[g.mode] = max(best.get(g.mode, 0.0), g.images_per_s / g.ranks)
    return [replace(g, efficiency=g.images_per_s / g.ranks / best[g.mode]) for g in groups]


def _group(records: list[dict]) -> Group:
    first, times = records[0], [record["step_s"] for record in records]
    middle = statistics.median(times)
    return Group(
        **{key: first[key] for key in _KIND},
        runs=len(records),
        step_s=middle,
        spread=(max(times) - min(times)) / middle,
        split={p: statistics.mean(r["split"][p] for r in records) for p in first["split"]},
        peak_bytes=max(record["peak_bytes"] for record in records),
        rows=_over_least(first["traffic"]),
        reduced=_reduced_over_least(first),
    )


def _over_least(by_rank: list[list[dict]]) -> float | None:
    """Counted all-to-all bytes over those of the chosen rows, forward and backward."""
    sent = [row for rows in by_rank for row in rows if row["collective"] == "all_to_all"]
    rows = sum(
        row["wire"]
        for row in sent
        if row["purpose"] in ("dispatch", "combine") and row["phase"] != "recompute"
    )
    return sum(row["wire"] for row in sent) / rows if rows else None


def _reduced_over_least(record: dict) -> float | None:
    """Counted bytes of gradients and weights over each one's to its owner and back, once."""
    layout, engine = Layout(**record["layout"]), engine_facts(record["deepspeed"])
    least = least_traffic(config_from_tree(record["config"]), layout, engine).reduction
    sent = sum(
        row["wire"]
        for rows in record["traffic"]
        for row in rows
        if row["purpose"] in ("gradients", "parameters")
    )
    return sent / (least * layout.ranks) if least else None


def write_report(records: list[dict], folder: Path) -> str:
    """Writes ``table.md`` and, with matplotlib, plots into ``folder``; returns what to print."""
    groups = grouped(records)
    if not groups:
        return "no run ended well; nothing to tabulate"
    good = next(record for record in records if "error" not in record)
    lines = _table(groups)
    head = (
        f"{good['device']}, {good['threads']} thread{'s' * (good['threads'] > 1)} a rank, torch "
        f"{good['torch']}, DeepSpeed {good['deepspeed_version']}, commit {good['commit']}, started "
        f"by {good['start']}, {good['when']}.\nTimes are medians of runs, split by phase in traced "
        "steps of the same runs; efficiency is images per second and rank against the fewest "
        "ranks.\n"
    )
    (folder / "table.md").write_text("\n".join([head, *lines]) + "\n")
    try:
        _draw_efficiency(groups, folder / "efficiency.png")
        _draw_split(groups, folder / "split.png")
        last = f"{folder}: runs.jsonl, table.md, efficiency.png, split.png"
    except ModuleNotFoundError as error:
        last = f"{folder / 'table.md'}; no plots, because {error.name} is not installed here"
    return "\n".join([*lines, last])


def _table(groups: list[Group]) -> list[str]:
    phases = list(groups[0].split)
    head = ["mode", "ranks", "nodes", "EP", "ZeRO", "overlap", "batch", "runs", "ms a step"]
    head += ["spread", "images/s", "efficiency", "exposed communication"]
    head += [*(phase.replace("_", "-") for phase in phases), "peak MiB"]
    head += ["all-to-all over lower bound", "gradients and weights over lower bound"]
    rows = [
        [
            *(g.mode, g.ranks, g.nodes, g.ep, g.stage, g.overlap, g.batch, g.runs),
            *(f"{1e3 * g.step_s:.1f}", f"{100 * g.spread:.0f} %", f"{g.images_per_s:.1f}"),
            *(f"{100 * g.efficiency:.0f} %", f"{1e3 * g.step_s * g.exposed:.1f} ms"),
            *(f"{100 * g.split[phase]:.0f} %" for phase in phases),
            *(f"{g.peak_bytes / 2**20:.0f}", g.rows, g.reduced),
        ]
        for g in groups
    ]
    return table(head, rows)


# ------------------------------------------------------------------------------------------------
# plots


def _draw_efficiency(groups: Sequence[Group], path: Path) -> None:
    """Efficiency by ranks, a panel a mode, a line a layout, and the ideal line."""
    modes = sorted({g.mode for g in groups})
    ticks = sorted({g.ranks for g in groups})
    figure = new_figure(5.2 * len(modes), 4.2)
    for axes, mode in zip(figure.subplots(1, len(modes), squeeze=False)[0], modes):
        lines: dict[str, list[Group]] = {}
        for g in groups:
            if g.mode == mode:
                lines.setdefault(g.layout, []).append(g)
        for (label, line), mark in zip(lines.items(), _MARKS * len(lines)):
            heights = [100 * g.efficiency for g in line]
            axes.plot([g.ranks for g in line], heights, marker=mark, label=label)
        axes.axhline(100, color="black", linewidth=1, linestyle="--", label="ideal")
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, list(map(str, ticks)), minor=False)
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set(title=f"{mode} scaling", xlabel="ranks", ylabel="efficiency, %")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def _draw_split(groups: Sequence[Group], path: Path) -> None:
    """Where a step's time goes: a bar a kind of run, milliseconds by phase."""
    figure = new_figure(max(6.0, 0.62 * len(groups) + 2), 4.6)
    axes, places, base = figure.add_subplot(), range(len(groups)), [0.0] * len(groups)
    for phase in groups[0].split:
        heights = [1e3 * g.step_s * g.split[phase] for g in groups]
        label = phase.replace("_", "-")
        axes.bar(places, heights, bottom=base, color=_COLOURS[phase], label=label)
        base = [a + b for a, b in zip(base, heights)]
    names = [
        "\n".join(filter(None, [g.mode, f"{g.ranks} ranks", f"EP {g.ep} Z {g.stage}", g.overlap]))
        for g in groups
    ]
    axes.set_xticks(places, names, fontsize=7)
    axes.margins(y=0.2)  # room for the legend
    axes.legend(fontsize=8, ncols=5, loc="upper center", handlelength=1, columnspacing=1)
    axes.set_ylabel("ms a step")
    figure.savefig(path, dpi=150)
