"""Pictures: grids of samples, loss curves, expert load. Figures are plain objects; pyplot's state is not used."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from PIL import Image

GRID_GAP = 4  # pixels between the images of a grid
_DPI = 150
_SMOOTHING_SHARE = 0.01  # of the run's steps: the distance at which a neighbour's weight has fallen to 1/e
_GAP_FACTOR = 5  # a curve breaks where steps are this many times further apart than usual
_BLUE, _ORANGE, _GREEN, _GREY = "#1f5fa8", "#d9731a", "#2e8b57", "#8a8a8a"


def image_grid(images: np.ndarray, columns: int, path: str | Path, upscale: int | None = None) -> None:
    """Write images [n, C, H, W] in [-1, 1] (values beyond are clipped) as one PNG, row by row.

    C is 1 (grey), 3 (RGB) or 4 (latents: the first three channels). Every value becomes `upscale` x `upscale` pixels; left out,
    small images grow to about 56 pixels.

    Raises:
        ValueError: another shape, values that are not finite, or columns or upscale below 1.
    """
    images = np.asarray(images, np.float32)
    if images.ndim != 4 or len(images) == 0 or images.shape[1] not in (1, 3, 4):
        raise ValueError(f"images {images.shape} must be [n, C, H, W] with n > 0 and C 1, 3 or 4")
    upscale = max(1, 56 // images.shape[2]) if upscale is None else upscale
    if columns < 1 or upscale < 1:
        raise ValueError(f"columns ({columns}) and upscale ({upscale}) must be at least 1")
    if not np.isfinite(images).all():
        raise ValueError(f"images {images.shape} hold {np.count_nonzero(~np.isfinite(images))} values not finite")
    pixels = np.rint((np.clip(images, -1, 1) + 1) * 127.5).astype(np.uint8)[:, :3].transpose(0, 2, 3, 1)
    pixels = pixels.repeat(upscale, axis=1).repeat(upscale, axis=2)
    count, height, width, channels = pixels.shape
    rows = math.ceil(count / columns)
    size = (rows * (height + GRID_GAP) + GRID_GAP, columns * (width + GRID_GAP) + GRID_GAP)
    grid = np.full((*size, channels), 64, np.uint8)
    for i, image in enumerate(pixels):
        top = GRID_GAP + i // columns * (height + GRID_GAP)
        left = GRID_GAP + i % columns * (width + GRID_GAP)
        grid[top : top + height, left : left + width] = image
    Image.fromarray(grid[..., 0] if channels == 1 else grid).save(path, format="PNG")


def loss_curve(records: Sequence[Mapping[str, object]], path: str | Path) -> None:
    """Draw metric records (keys step, loss, predictor_loss, trivial_predictor_loss, lr; all but step may be missing).

    A step that appears twice (a run that resumed) counts once, as written last. Values that are missing or not finite
    are left out, and lines break over long gaps.

    Raises:
        ValueError: no record has a step and a finite loss.
    """
    by_step = {int(record["step"]): record for record in records if "step" in record}
    series = {name: _series(by_step, name) for name in ("loss", "predictor_loss", "trivial_predictor_loss", "lr")}
    if len(series["loss"][0]) == 0:
        raise ValueError(f"records ({len(records)} of them) must hold at least one step with a finite loss")
    names = ["loss"] + [name for name in ("predictor_loss", "lr") if len(series[name][0])]
    figure = Figure(figsize=(8, 1.4 + 2.2 * len(names)), layout="constrained")
    axes = np.atleast_1d(figure.subplots(len(names), 1, sharex=True, height_ratios=[2, 1.4, 1][: len(names)]))
    for ax, name in zip(axes, names):
        if name == "loss":
            _smooth_and_raw(ax, *series["loss"], _BLUE, "loss")
        elif name == "predictor_loss":
            _smooth_and_raw(ax, *series["predictor_loss"], _ORANGE, "capacity predictor")
            if len(series["trivial_predictor_loss"][0]):
                _smooth_and_raw(ax, *series["trivial_predictor_loss"], _GREY, "trivial predictor")
        else:
            ax.plot(*_broken(*series["lr"]), color=_GREEN, linewidth=1.5)
            ax.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
        _tidy(ax, {"loss": "loss", "predictor_loss": "predictor loss", "lr": "learning rate"}[name])
    figure.suptitle("Training", fontsize=13)
    axes[-1].set_xlabel("step")
    _save(figure, path)


def expert_load(load: np.ndarray, path: str | Path, layer_names: Sequence[str]) -> None:
    """Draw `load` [layers, time_bins, experts], each expert's share of tokens (1 = average), one heat map a layer.

    Rows are bins of flow time from 0 to 1, upwards; bins that saw no sample are NaN and drawn grey.

    Raises:
        ValueError: another rank, or not one name a layer.
    """
    load = np.asarray(load, np.float64)
    if load.ndim != 3 or 0 in load.shape or len(layer_names) != len(load):
        raise ValueError(f"load {load.shape} must be [layers, time_bins, experts] with {len(layer_names)} layer_names")
    layers, bins, experts = load.shape
    rows = math.ceil(layers / 4)
    columns = math.ceil(layers / rows)
    figure = Figure(figsize=(1.6 + 2.5 * columns, 1.5 + 2.3 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    top = max(2.0, float(np.nanmax(load, initial=0.0)))
    for ax in axes.flat[layers:]:
        ax.set_visible(False)
    for i, ax in enumerate(axes.flat[:layers]):
        ax.set_facecolor("#c8c8c8")
        mesh = ax.imshow(
            np.ma.masked_invalid(load[i]),
            cmap="RdBu_r",
            norm=TwoSlopeNorm(1.0, 0.0, top),
            origin="lower",
            aspect="auto",
            interpolation="nearest",
            extent=(-0.5, experts - 0.5, 0.0, 1.0),
        )
        ax.set_title(layer_names[i], fontsize=10)
        ax.set_xticks(range(0, experts, max(1, math.ceil(experts / 8))))
        ax.set_yticks([0.0, 0.5, 1.0])
        below = i + columns >= layers  # nothing is drawn under this panel, so it carries the tick labels
        ax.tick_params(labelsize=8, length=2, labelbottom=below)
    figure.suptitle(f"Expert load over flow time ({experts} experts, {bins} time bins)", fontsize=13)
    figure.supxlabel("expert", fontsize=11)
    figure.supylabel("flow time t", fontsize=11)
    bar = figure.colorbar(mesh, ax=axes, shrink=0.9, pad=0.02)
    bar.set_label("load (1.0 = average expert)", fontsize=10)
    bar.ax.tick_params(labelsize=8)
    _save(figure, path)


def _series(by_step: Mapping[int, Mapping[str, object]], name: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(step, float(record[name])) for step, record in sorted(by_step.items()) if record.get(name) is not None]
    pairs = [pair for pair in pairs if math.isfinite(pair[1])]
    return np.array([step for step, _ in pairs], np.float64), np.array([value for _, value in pairs], np.float64)


def _smooth_and_raw(ax: Axes, steps: np.ndarray, values: np.ndarray, color: str, label: str) -> None:
    raw = {"marker": "."} if len(steps) == 1 else {}  # a line through one point shows nothing
    ax.plot(*_broken(steps, values), color=color, alpha=0.25, linewidth=0.8, **raw)
    ax.plot(*_broken(steps, _smoothed(steps, values)), color=color, linewidth=1.8, label=label, **raw)
    ax.legend(loc="lower right", bbox_to_anchor=(1.0, 0.97), ncols=2, frameon=False, fontsize=9)


def _smoothed(steps: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Average weighted by exp(-distance in steps), looking both ways so that the curve does not lag."""
    length = max(1.0, _SMOOTHING_SHARE * (steps[-1] - steps[0]))
    past_sum, past_weight = _decayed_sums(steps, values, length)
    next_sum, next_weight = (sums[::-1] for sums in _decayed_sums(-steps[::-1], values[::-1], length))
    return (past_sum + next_sum - values) / (past_weight + next_weight - 1.0)


def _decayed_sums(steps: np.ndarray, values: np.ndarray, length: float) -> tuple[np.ndarray, np.ndarray]:
    sums, weights = values.copy(), np.ones_like(values)
    for i in range(1, len(values)):
        decay = math.exp((steps[i - 1] - steps[i]) / length)
        sums[i] += decay * sums[i - 1]
        weights[i] += decay * weights[i - 1]
    return sums, weights


def _broken(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same curve with a NaN in every long gap, where the line then breaks."""
    if len(steps) < 3:
        return steps, values
    distance = np.diff(steps)
    after = np.flatnonzero(distance > _GAP_FACTOR * np.median(distance)) + 1
    return np.insert(steps, after, steps[after - 1]), np.insert(values, after, np.nan)


def _tidy(ax: Axes, ylabel: str) -> None:
    ax.set_ylabel(ylabel)
    ax.grid(True, color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.margins(x=0.01)


def _save(figure: Figure, path: str | Path) -> None:
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png", dpi=_DPI)
