"""Plots of scaling, measured and simulated.  The only module of the launcher that needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from diffmoe.errors import UserError

if TYPE_CHECKING:
    from diffmoe.cost.extrapolation import Point
    from launcher.scaling_report import Group

_COLOURS = {
    "compute": "#1f5fa8",
    "all_to_all": "#d9731a",
    "reduction": "#2e8b57",
    "data": "#b5a642",
    "host": "#8a8a8a",
    "other": "#8a8a8a",
}
_MARKS = "osD^vP*X"


def draw_efficiency(groups: Sequence[Group], path: Path) -> None:
    """Efficiency by ranks, a panel a mode, a line a layout, and the ideal line."""
    modes = sorted({g.mode for g in groups})
    figure = Figure(figsize=(5.2 * len(modes), 4.2), layout="constrained")
    for axes, mode in zip(_panels(figure, len(modes)), modes):
        lines: dict[str, list[Group]] = {}
        for g in groups:
            if g.mode == mode:
                lines.setdefault(f"EP {g.ep}, ZeRO {g.zero}", []).append(g)
        for (label, line), mark in zip(lines.items(), _MARKS * len(lines)):
            axes.plot(
                [g.ranks for g in line],
                [100 * g.efficiency for g in line],
                marker=mark,
                label=label,
            )
        _efficiency_axes(axes, f"{mode} scaling", [g.ranks for g in groups], "ranks")
    _save(figure, path)


def draw_split(groups: Sequence[Group], path: Path) -> None:
    """Where a step's time goes: a bar a kind of run, milliseconds by phase."""
    figure = Figure(figsize=(max(6.0, 0.62 * len(groups) + 2), 4.6), layout="constrained")
    axes = figure.add_subplot()
    _bars(
        axes,
        [f"{g.mode}\n{g.ranks} ranks\nEP {g.ep} Z {g.zero}" for g in groups],
        {phase: [1e3 * g.step_s * g.split[phase] for g in groups] for phase in groups[0].split},
    )
    axes.set_ylabel("ms a step")
    _save(figure, path)


def draw_simulation(curves: Mapping[str, Sequence[Point]], path: Path) -> None:
    """Efficiency by GPUs with the ideal line, and under it each size's step by phase."""
    figure = Figure(figsize=(5.6 * len(curves), 7.4), layout="constrained")
    above, below = figure.subplots(2, len(curves), squeeze=False)
    for column, (mode, points) in enumerate(curves.items()):
        good = [p for p in points if p.candidate is not None]
        above[column].plot(
            [p.ranks for p in good],
            [100 * p.efficiency for p in good],
            marker="o",
            label="best layout",
        )
        _efficiency_axes(above[column], f"{mode} scaling", [p.ranks for p in points], "GPUs")
        phases = ("compute", "host", "all_to_all", "reduction")
        _bars(
            below[column],
            [f"{p.ranks}" for p in good],
            {phase: [1e3 * getattr(p.candidate.time, phase) for p in good] for phase in phases},
        )
        below[column].set(xlabel="GPUs", ylabel="ms a step")
    try:
        _save(figure, path)
    except (OSError, ValueError) as error:
        raise UserError(f"--plot ({path}) cannot be written: {error}") from None


def _panels(figure: Figure, count: int) -> list[Axes]:
    return list(figure.subplots(1, count, squeeze=False)[0])


def _efficiency_axes(axes: Axes, title: str, ranks: Sequence[int], unit: str) -> None:
    axes.axhline(100, color="black", linewidth=1, linestyle="--", label="ideal")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(set(ranks)), [str(r) for r in sorted(set(ranks))], minor=False)
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set(title=title, xlabel=unit, ylabel="efficiency, %")
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _bars(axes: Axes, names: Sequence[str], heights: Mapping[str, Sequence[float]]) -> None:
    base = [0.0] * len(names)
    for phase, values in heights.items():
        axes.bar(
            range(len(names)),
            values,
            bottom=base,
            color=_COLOURS[phase],
            label=phase.replace("_", "-"),
        )
        base = [a + b for a, b in zip(base, values)]
    axes.set_xticks(range(len(names)), names, fontsize=7)
    axes.margins(y=0.2)  # room for the legend
    axes.legend(fontsize=8, ncols=len(heights), loc="upper center", handlelength=1, columnspacing=1)


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=150)
