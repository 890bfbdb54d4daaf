"""A comparison's pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import ScalarFormatter

from diffmoe.evaluation.plots import new_figure, save, tidy

_FRECHET = "frechet_distance"
_COLORS = ("#1f5fa8", "#d9731a", "#2e8b57", "#a83279", "#8a8a8a", "#c9a227", "#5b4bb5", "#7a4a2b")


def _color(place: int) -> str:
    return _COLORS[place % len(_COLORS)]


def draw_routers(rows: list[dict], path: Path) -> None:
    """Validation loss over samples, a line a router (mean of seeds, their range shaded); beside it
    the last, each seed a dot, mean and standard deviation; and the Fréchet distance, if there is
    one.  ``rows``: see ``report.collect``.
    """
    scored = [row for row in rows if row["scores"].get(_FRECHET)]
    panels = 3 if scored else 2
    figure = new_figure(4.8 * panels, 4.2)
    curves, last, *others = figure.subplots(1, panels)
    for place, row in enumerate(rows):
        samples, each = row["curve"]["samples"], np.array(row["curve"]["each"])
        style = "-" if place < len(_COLORS) else "--"  # colours come round
        color, name, low, high = _color(place), row["router"], each.min(axis=0), each.max(axis=0)
        curves.plot(samples, each.mean(axis=0), style, color=color, label=name, marker=".")
        curves.fill_between(samples, low, high, color=color, alpha=0.2, linewidth=0)
    curves.set_xlabel("samples")
    curves.set_ylabel("validation loss")
    curves.set_yscale("log")
    for axis in (curves.yaxis.set_major_formatter, curves.yaxis.set_minor_formatter):
        axis(ScalarFormatter())
    crowded = len(rows) > 9
    curves.legend(frameon=False, fontsize=7 if crowded else 9, ncols=1 + crowded, handlelength=3)
    _points(last, rows, [row["validation_loss"] for row in rows], "validation loss at the end")
    if scored:
        name = scored[0]["scores"]["names"][_FRECHET]
        _points(others[0], scored, [row["scores"][_FRECHET] for row in scored], name)
    for ax in (curves, last, *others):
        tidy(ax)
    save(figure, path)


def _points(ax: Axes, rows: list[dict], spreads: list[dict], title: str) -> None:
    """Names along the axis; a dot a seed, the mean with its standard deviation."""
    mean: dict[str, Any] = {"marker": "_", "markersize": 16, "capsize": 5}
    for place, spread in enumerate(spreads):
        each, color = spread["each"], _color(place)
        ax.scatter([place] * len(each), each, color=color, s=14, alpha=0.5)
        ax.errorbar(place, spread["mean"], yerr=spread["spread"] or 0.0, color=color, **mean)
    names = [row["router"] for row in rows]
    ax.set_xticks(range(len(rows)), names, rotation=35, ha="right", fontsize=9)
    ax.set_title(title, fontsize=11)
    ax.margins(x=0.15)


def draw_confounds(axes: dict[str, list[dict]], path: Path) -> None:
    """A panel an axis: the last validation loss at each value, as dots, mean and deviation."""
    drawn = {axis: rows for axis, rows in axes.items() if rows}
    figure = new_figure(4.2 * len(drawn), 4.0)
    panels = figure.subplots(1, len(drawn), squeeze=False)[0]
    for ax, (axis, rows) in zip(panels, drawn.items()):
        named = [{"router": str(row["value"])} for row in rows]
        _points(ax, named, [row["validation_loss"] for row in rows], axis)
        tidy(ax)
    panels[0].set_ylabel("validation loss at the end")
    save(figure, path)
