"""Grids of samples, loss curves, expert load, as plain figures without pyplot's state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from diffmoe.errors import UserError

# matplotlib and scipy.ndimage take a second, which every rank of a start would pay: they come with
# the first figure.
if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

    from diffmoe.evaluation.capacity_report import CapacityUsed

GRID_GAP = 4  # pixels between the images of a grid
_SMOOTHING_SHARE = 0.005  # of the records: standard deviation of the curves' smoothing
_BLUE, _ORANGE, _GREEN, _GREY = "#1f5fa8", "#d9731a", "#2e8b57", "#8a8a8a"


def image_grid(
    images: np.ndarray, columns: int, path: str | Path, upscale: int | None = None
) -> None:
    """Write images [n, C, H, W] in [-1, 1] (values beyond are clipped) as one PNG, row by row.

    C is 1 (grey), 3 (RGB) or more (latents: the first three channels). Every value becomes
    `upscale` x `upscale` pixels; left out, small images grow to about 56 pixels. UserError for
    another shape, values that are not finite, or columns or upscale below 1.
    """
    images = np.asarray(images, np.float32)
    if images.ndim != 4 or len(images) == 0 or images.shape[1] in (0, 2):
        raise UserError(f"images {images.shape} must be [n, C, H, W] with n > 0 and C 1, 3 or more")
    upscale = max(1, 56 // images.shape[2]) if upscale is None else upscale
    if columns < 1 or upscale < 1:
        raise UserError(f"columns ({columns}) and upscale ({upscale}) must be at least 1")
    if bad := np.count_nonzero(~np.isfinite(images)):
        raise UserError(f"images {images.shape} hold {bad} values not finite")
    pixels = np.rint((np.clip(images, -1, 1) + 1) * 127.5).astype(np.uint8)[:, :3]
    pixels = pixels.transpose(0, 2, 3, 1).repeat(upscale, axis=1).repeat(upscale, axis=2)
    count, height, width, channels = pixels.shape
    rows = math.ceil(count / columns)
    size = (rows * (height + GRID_GAP) + GRID_GAP, columns * (width + GRID_GAP) + GRID_GAP)
    grid = np.full((*size, channels), 64, np.uint8)
    for i, image in enumerate(pixels):
        top = GRID_GAP + i // columns * (height + GRID_GAP)
        left = GRID_GAP + i % columns * (width + GRID_GAP)
        grid[top : top + height, left : left + width] = image
    Image.fromarray(grid[..., 0] if channels == 1 else grid).save(path, format="PNG")


def class_columns(columns: int, classes: int) -> int:
    """``columns`` at most; classes in turn have columns of their own, if there are enough."""
    return columns - columns % classes if classes < columns else columns


def loss_curve(records: Sequence[Mapping[str, object]], path: str | Path) -> None:
    """Draw metric records (keys step, loss, predictor_loss, trivial_predictor_loss, lr; all but
    step may be missing).

    A step that appears twice (a run that resumed) counts once, as written last. Values that are
    missing or not finite are left out. UserError where no record has a step and a finite loss.
    """
    by_step = {record["step"]: record for record in records if "step" in record}
    panels = (  # (what the axis shows, its curves, share of the height)
        ("loss", {"loss": ("loss", _BLUE)}, 2.0),
        (
            "predictor loss",
            {
                "predictor_loss": ("capacity predictor", _ORANGE),
                "trivial_predictor_loss": ("trivial predictor", _GREY),
            },
            1.4,
        ),
        ("learning rate", {"lr": ("", _GREEN)}, 1.0),
    )
    drawn = []
    for title, names, share in panels:
        curves = [(*_series(by_step, name), *style) for name, style in names.items()]
        curves = [curve for curve in curves if len(curve[0])]
        if curves:
            drawn.append((title, curves, share))
    if not drawn or drawn[0][0] != "loss":
        raise UserError(
            f"records ({len(records)} of them) must hold at least one step with a finite loss"
        )
    figure = new_figure(8, 1.4 + 2.2 * len(drawn))
    shares = [share for _, _, share in drawn]
    axes = figure.subplots(len(drawn), 1, squeeze=False, sharex=True, height_ratios=shares)[:, 0]
    for ax, (title, curves, _) in zip(axes, drawn):
        for steps, values, label, color in curves:
            _smooth_and_raw(ax, steps, values, color, label)
        if title != "learning rate":
            ax.legend(
                loc="lower right", bbox_to_anchor=(1.0, 0.97), ncols=2, frameon=False, fontsize=9
            )
        _tidy(ax, title)
    figure.suptitle("Training", fontsize=13)
    axes[-1].set_xlabel("step")
    save(figure, path)


def expert_load(load: np.ndarray, path: str | Path, layer_names: Sequence[str]) -> None:
    """Draw `load` [layers, time_bins, experts], each expert's share of tokens (1 = average), one
    heat map a layer. Rows are bins of flow time from 0 to 1, upwards; bins that saw no sample are
    NaN and drawn grey. UserError for another rank, or not one name a layer.
    """
    load = np.asarray(load, np.float64)
    if load.ndim != 3 or 0 in load.shape or len(layer_names) != len(load):
        raise UserError(
            f"load {load.shape} must be [layers, time_bins, experts] with {len(layer_names)} "
            "layer_names"
        )
    layers, bins, experts = load.shape
    rows = math.ceil(layers / 4)
    columns = math.ceil(layers / rows)
    figure = new_figure(1.6 + 2.5 * columns, 1.5 + 2.3 * rows)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    from matplotlib.colors import TwoSlopeNorm

    norm = TwoSlopeNorm(1.0, 0.0, max(2.0, float(np.nanmax(load, initial=0.0))))
    extent = (-0.5, experts - 0.5, 0.0, 1.0)
    for ax in axes.flat[layers:]:
        ax.set_visible(False)
    for i, ax in enumerate(axes.flat[:layers]):
        mesh = _heat(ax, load[i], extent, cmap="RdBu_r", norm=norm, origin="lower")
        ax.set_title(layer_names[i], fontsize=10)
        ax.set_xticks(range(0, experts, max(1, math.ceil(experts / 8))))
        ax.set_yticks([0.0, 0.5, 1.0])
        # A panel with nothing drawn under it carries the tick labels.
        ax.tick_params(labelsize=8, length=2, labelbottom=i + columns >= layers)
    figure.suptitle(
        f"Expert load over flow time ({experts} experts, {bins} time bins)", fontsize=13
    )
    figure.supxlabel("expert", fontsize=11)
    figure.supylabel("flow time t", fontsize=11)
    bar = figure.colorbar(mesh, ax=axes, shrink=0.9, pad=0.02)
    bar.set_label("load (1.0 = average expert)", fontsize=10)
    bar.ax.tick_params(labelsize=8)
    save(figure, path)


def capacity_used(
    used: CapacityUsed, over_time: Mapping[str, np.ndarray], target: float | None, path: str | Path
) -> None:
    """Draw the capacity that sampling used (experts per token): over time, which is one or two
    curves [time_bins] by name, with a line at the capacity that was asked for; by layer and time;
    and by class.
    """
    layer_time = used.by_layer_and_time()
    layers, bins = layer_time.shape
    figure = new_figure(11, 7.5)
    grid = figure.add_gridspec(2, 2, height_ratios=[1.2, 1])
    ax, heat = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])
    centers = (np.arange(bins) + 0.5) / bins
    marker = "o" if bins <= 30 else ""
    for color, (label, values) in zip((_BLUE, _ORANGE), over_time.items()):
        ax.plot(centers, values, color=color, marker=marker, markersize=3.5, label=label)
    if target is not None:
        ax.axhline(target, color=_GREY, linestyle="--", label=f"dialled {target:g}")
    ax.legend(frameon=False, fontsize=9)
    ax.set_xlabel("time t (0 noise, 1 data)")
    ax.set_title("Over time, mean of layers", fontsize=11)
    _tidy(ax, "experts per token")
    mesh = _heat(heat, layer_time, (0.0, 1.0, layers - 0.5, -0.5), cmap="viridis")
    every = max(1, math.ceil(layers / 16))
    heat.set_yticks(range(0, layers, every), used.layers[::every], fontsize=9)
    heat.set_xlabel("time t (0 noise, 1 data)")
    heat.set_title("By layer and time, all passes", fontsize=11)
    figure.colorbar(mesh, ax=heat, shrink=0.95, pad=0.02).set_label("experts per token")
    _class_ranking(figure.add_subplot(grid[1, :]), used.by_class())
    figure.suptitle("Capacity used in sampling", fontsize=13)
    save(figure, path)


def _class_ranking(ax: Axes, ranking: Sequence[tuple[int, float]]) -> None:
    """Bars with class numbers if they can be read, else a curve with three at either end."""
    values = np.array([value for _, value in ranking])
    places = np.arange(1, len(values) + 1)
    if len(values) <= 40:
        ax.bar(places, values, color=_BLUE, width=0.75)
        ax.set_xticks(places, [str(c) for c, _ in ranking], fontsize=9)
        ax.set_xlabel("class, from the hardest to the easiest")
    else:
        ax.plot(places, values, color=_BLUE, linewidth=1.8)
        hardest, easiest = (
            ", ".join(str(c) for c, _ in part) for part in (ranking[:3], ranking[-3:])
        )
        ax.set_xlabel(
            f"place of the class, from the hardest ({hardest}, …) to the easiest (…, {easiest})"
        )
    spread = float(np.ptp(values)) or 0.1 * float(values.max())
    ax.set_ylim(max(0.0, float(values.min()) - spread), float(values.max()) + 0.25 * spread)
    mean = float(values.mean())
    ax.axhline(mean, color=_GREY, linestyle="--", linewidth=1.2, label=f"mean {mean:.3f}")
    ax.legend(frameon=False, fontsize=9, loc="upper right")
    ax.set_title("By class, passes with class (the axis does not start at 0)", fontsize=11)
    _tidy(ax, "experts per token")


def score_curves(
    curves: Mapping[str, Mapping[float, float]], axis: str, score: str, path: str | Path
) -> None:
    """Draw a score, of which less is better, by the setting ``axis``; a star is a curve's best."""
    figure = new_figure(7, 4.6)
    ax = figure.subplots()
    for name, curve in curves.items():
        best = min(curve, key=lambda x: (curve[x], x))
        label = f"{name}: {curve[best]:.4g} at {best:g}"
        (line,) = ax.plot(*zip(*sorted(curve.items())), marker="o", markersize=4, label=label)
        ax.plot([best], [curve[best]], "*", markersize=14, color=line.get_color())
    ax.legend(frameon=False, fontsize=9)
    ax.set_xlabel(axis)
    _tidy(ax, score)
    save(figure, path)


def bars(values: Mapping[str, float], unit: str, title: str, path: str | Path) -> None:
    """Draw one horizontal bar for each name, with its figure, top down in the given order."""
    figure = new_figure(8, 1.2 + 0.36 * len(values))
    ax = figure.subplots()
    drawn = ax.barh(list(values), list(values.values()), color=_BLUE)
    ax.bar_label(drawn, fmt=" {:.3g}", fontsize=9)
    ax.invert_yaxis()
    ax.margins(x=0.12)
    ax.set_xlabel(unit)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(title, fontsize=12)
    save(figure, path)


def _series(
    by_step: Mapping[object, Mapping[str, object]], name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Steps, ascending, and the finite values that were recorded there."""
    pairs = [(step, r[name]) for step, r in by_step.items() if r.get(name) is not None]
    both = np.array(sorted(pairs), np.float64).reshape(-1, 2)
    both = both[np.isfinite(both[:, 1])]
    return both[:, 0], both[:, 1]


def _smooth_and_raw(
    ax: Axes, steps: np.ndarray, values: np.ndarray, color: str, label: str
) -> None:
    marker = "." if len(steps) == 1 else ""  # a line through one point shows nothing
    from scipy.ndimage import gaussian_filter1d

    smooth = gaussian_filter1d(values, max(1.0, _SMOOTHING_SHARE * len(values)), mode="nearest")
    ax.plot(steps, values, color=color, alpha=0.25, linewidth=0.8, marker=marker)
    ax.plot(steps, smooth, color=color, linewidth=1.8, label=label, marker=marker)


def _heat(
    ax: Axes, values: np.ndarray, extent: tuple[float, float, float, float], **how: Any
) -> AxesImage:
    """A heat map, grey where nothing was measured."""
    ax.set_facecolor("#c8c8c8")
    return ax.imshow(np.ma.masked_invalid(values), aspect="auto", extent=extent, **how)


def new_figure(width: float, height: float) -> Figure:
    """An empty one, in inches, which needs no window."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _tidy(ax: Axes, ylabel: str) -> None:
    ax.set_ylabel(ylabel)
    tidy(ax)
    ax.margins(x=0.01)


def tidy(ax: Axes) -> None:
    """A light grid, and no frame above and on the right."""
    ax.grid(True, color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, path: str | Path) -> None:
    """As PNG."""
    figure.savefig(path, format="png", dpi=150)
