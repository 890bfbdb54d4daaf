"""What scaling, measured and simulated, looks like: repeats together, efficiencies, a table, plots.
matplotlib is imported only to draw.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from diffmoe.errors import UserError
from diffmoe.markdown import table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from diffmoe.cost.extrapolation import Point

_COLOURS = {
    "compute": "#1f5fa8",
    "all_to_all": "#d9731a",
    "reduction": "#2e8b57",
    "data": "#b5a642",
    "host": "#8a8a8a",
    "other": "#8a8a8a",
}
_MARKS = "osD^vP*X"


@dataclass(frozen=True)
class Group:
    """Repeats of one kind of run, medians over them.  ``efficiency``: images per second and rank,
    relative to the best of the smallest number of ranks in the same mode; ``least``: counted
    all-to-all bytes over the lower bound (None without).
    """

    mode: str
    zero: int
    ep: int
    ranks: int
    nodes: int
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
            key = tuple(record[k] for k in ("mode", "zero", "ep", "ranks", "nodes", "batch"))
            kinds.setdefault(key, []).append(record)
    groups = [_group(key, kinds[key]) for key in sorted(kinds)]
    smallest = {g.mode: min(o.ranks for o in groups if o.mode == g.mode) for g in groups}
    best: dict[str, float] = {}
    for g in groups:
        if g.ranks == smallest[g.mode]:
            best[g.mode] = max(best.get(g.mode, 0.0), g.images_per_s / g.ranks)
    return [replace(g, efficiency=g.images_per_s / g.ranks / best[g.mode]) for g in groups]


def _group(key: tuple, records: list[dict]) -> Group:
    times = [record["step_s"] for record in records]
    middle = statistics.median(times)
    phases = records[0]["split"]
    return Group(
        *key,
        len(records),
        middle,
        (max(times) - min(times)) / middle,
        {p: statistics.mean(record["split"][p] for record in records) for p in phases},
        max(record["peak_bytes"] for record in records),
        _over_least(records[0]["traffic"]),
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


def write_report(records: list[dict], folder: Path) -> str:
    """Writes ``table.md`` and, where matplotlib is installed, the plots into ``folder``; returns
    what to print.
    """
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
    head = ["mode", "ranks", "nodes", "EP", "ZeRO", "batch", "runs", "ms a step", "spread"]
    head += ["images/s", "efficiency", *(phase.replace("_", "-") for phase in phases)]
    rows = [
        [
            *(g.mode, g.ranks, g.nodes, g.ep, g.zero, g.batch, g.runs, f"{1e3 * g.step_s:.1f}"),
            *(f"{100 * g.spread:.0f} %", f"{g.images_per_s:.1f}", f"{100 * g.efficiency:.0f} %"),
            *(f"{100 * g.split[phase]:.0f} %" for phase in phases),
            *(f"{g.peak_bytes / 2**20:.0f}", g.least),
        ]
        for g in groups
    ]
    return table([*head, "peak MiB", "all-to-all over lower bound"], rows)


# ------------------------------------------------------------------------------------------------
# plots


def _draw_efficiency(groups: Sequence[Group], path: Path) -> None:
    """Efficiency by ranks, a panel a mode, a line a layout, and the ideal line."""
    modes = sorted({g.mode for g in groups})
    figure = _figure(5.2 * len(modes), 4.2)
    for axes, mode in zip(figure.subplots(1, len(modes), squeeze=False)[0], modes):
        lines: dict[str, list[Group]] = {}
        for g in groups:
            if g.mode == mode:
                lines.setdefault(f"EP {g.ep}, ZeRO {g.zero}", []).append(g)
        for (label, line), mark in zip(lines.items(), _MARKS * len(lines)):
            heights = [100 * g.efficiency for g in line]
            axes.plot([g.ranks for g in line], heights, marker=mark, label=label)
        _efficiency_axes(axes, f"{mode} scaling", [g.ranks for g in groups], "ranks")
    figure.savefig(path, dpi=150)


def _draw_split(groups: Sequence[Group], path: Path) -> None:
    """Where a step's time goes: a bar a kind of run, milliseconds by phase."""
    figure = _figure(max(6.0, 0.62 * len(groups) + 2), 4.6)
    axes = figure.add_subplot()
    names = [f"{g.mode}\n{g.ranks} ranks\nEP {g.ep} Z {g.zero}" for g in groups]
    phases = groups[0].split
    _bars(axes, names, {p: [1e3 * g.step_s * g.split[p] for g in groups] for p in phases})
    axes.set_ylabel("ms a step")
    figure.savefig(path, dpi=150)


def draw_simulation(curves: Mapping[str, Sequence[Point]], path: Path) -> None:
    """Efficiency by GPUs with the ideal line, and under it each size's step by phase."""
    figure = _figure(5.6 * len(curves), 7.4)
    above, below = figure.subplots(2, len(curves), squeeze=False)
    for upper, lower, (mode, points) in zip(above, below, curves.items()):
        good = {p.ranks: p for p in points if p.candidate}
        times = [p.candidate.time for p in good.values() if p.candidate]
        heights = [100 * p.efficiency for p in good.values()]
        upper.plot(list(good), heights, marker="o", label="best layout")
        _efficiency_axes(upper, f"{mode} scaling", [p.ranks for p in points], "GPUs")
        phases = ("compute", "host", "all_to_all", "reduction")
        _bars(
            lower, list(map(str, good)), {p: [1e3 * getattr(t, p) for t in times] for p in phases}
        )
        lower.set(xlabel="GPUs", ylabel="ms a step")
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"--plot ({path}) cannot be written: {error}") from None


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _efficiency_axes(axes: Axes, title: str, ranks: Sequence[int], unit: str) -> None:
    axes.axhline(100, color="black", linewidth=1, linestyle="--", label="ideal")
    axes.set_xscale("log", base=2)
    ticks = sorted(set(ranks))
    axes.set_xticks(ticks, list(map(str, ticks)), minor=False)
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set(title=title, xlabel=unit, ylabel="efficiency, %")
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _bars(axes: Axes, names: Sequence[str], heights: Mapping[str, Sequence[float]]) -> None:
    base = [0.0] * len(names)
    for phase, values in heights.items():
        label, where = phase.replace("_", "-"), range(len(names))
        axes.bar(where, values, bottom=base, color=_COLOURS[phase], label=label)
        base = [a + b for a, b in zip(base, values)]
    axes.set_xticks(range(len(names)), names, fontsize=7)
    axes.margins(y=0.2)  # room for the legend
    axes.legend(fontsize=8, ncols=len(heights), loc="upper center", handlelength=1, columnspacing=1)
