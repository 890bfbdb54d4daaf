"""The capacity that sampling used, by layer, by time and by class: experts per token, mean over
tokens (a token that no expert took counts 0).  The paper's figures 1c and 1d, as JSON, a Markdown
table and an image.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from diffmoe.config import Config
from diffmoe.diffusion.ddpm import progress
from diffmoe.diffusion.guidance import lower_rule
from diffmoe.errors import UserError
from diffmoe.evaluation.plots import capacity_used
from diffmoe.families import has_thresholds
from diffmoe.markdown import table
from diffmoe.models.dit import DiT, ModelOutput
from diffmoe.moe.layer import MoEStats
from diffmoe.parallel.collectives import sum_over
from diffmoe.parallel.groups import Group

MAX_TIME_BINS = 100
_TABLE_TIMES, _TABLE_CLASSES = 20, 50
_OF_SAMPLE = ("gamma", "routing", "sampler", "steps", "cfg", "guidance", "guide")
CONDITIONAL, NULL = slice(0, -1), slice(-1, None)


@dataclass(frozen=True)
class CapacityUsed:
    """Sums over all images and passes of a sampling: ``taken_LbC``, the experts per token that
    samples got, by layer, time bin (noise to data) and class, and ``samples_bC``, how many samples
    those are.  The last class is the null class of guidance, or the guide of lower capacity.
    float64.
    """

    taken_LbC: np.ndarray
    samples_bC: np.ndarray
    layers: tuple[str, ...]

    def mean(self, classes: slice = slice(None)) -> float:
        """Experts per token over all layers and times; NaN where nothing ran."""
        return float(self._per_layer((0, 1), classes))

    def by_layer(self) -> np.ndarray:
        """[L]"""
        return _ratio(self.taken_LbC.sum((1, 2)), self.samples_bC.sum())

    def by_time(self, classes: slice = slice(None)) -> np.ndarray:
        """[b], mean over layers; NaN where nothing ran."""
        return self._per_layer((1,), classes)

    def by_layer_and_time(self) -> np.ndarray:
        """[L, b]"""
        return _ratio(self.taken_LbC.sum(2), self.samples_bC.sum(1))

    def by_class(self) -> list[tuple[int, float]]:
        """(class, capacity) from the hardest, which used most; without the guide's passes."""
        used = self._per_layer((0,), CONDITIONAL)
        pairs = [(c, float(value)) for c, value in enumerate(used) if np.isfinite(value)]
        return sorted(pairs, key=lambda pair: (-pair[1], pair[0]))

    def _per_layer(self, axes: tuple[int, ...], classes: slice) -> np.ndarray:
        """Mean over layers and over these axes of [time, class]."""
        taken, samples = self.taken_LbC.sum(0)[:, classes], self.samples_bC[:, classes]
        return _ratio(taken.sum(axes), samples.sum(axes) * len(self.layers))


class CapacityMeter:
    """Adds up what the layers report while sampling, on the device and without asking it for
    anything.

    ``images``: those with higher numbers only fill up a rank's batch and are left out.  Raises
    UserError for a model without experts.
    """

    def __init__(self, model: DiT, config: Config, images: int, device: torch.device) -> None:
        self.layers = tuple(f"block {i}" for i, _ in model.moe_layers())
        if not self.layers:
            raise UserError(
                f"model.family ({config.model.family}) has no experts whose capacity could be "
                "reported"
            )
        self.images, self.process = images, config.diffusion.process
        self.lower = lower_rule(config.sample) if config.sample.guided_by_capacity else None
        self.bins = min(config.sample.steps, MAX_TIME_BINS)
        shape = (self.bins, config.model.classes + 1)
        layers = len(self.layers)
        self.taken_LbC = torch.zeros(layers, *shape, dtype=torch.float64, device=device)
        self.samples_bC = torch.zeros(shape, dtype=torch.float64, device=device)

    @contextmanager
    def watching(self, model: DiT, numbers: Sequence[int]) -> Iterator[None]:
        """The model's passes inside, over the images with these numbers, are counted."""
        weights = [float(number < self.images) for number in numbers]
        counted = torch.tensor(weights, device=self.samples_bC.device)

        def count(_: nn.Module, inputs: tuple, output: ModelOutput) -> None:
            _, t, y, rule = inputs
            if rule == self.lower:
                y = torch.full_like(y, self.samples_bC.shape[1] - 1)
            # DDPM's guidance runs both halves as one batch.
            both = counted.repeat(len(y) // len(counted))
            self.add(t, y, both, output.moe, model.model.tokens)

        hook = model.register_forward_hook(count)
        try:
            yield
        finally:
            hook.remove()

    def add(
        self, t: Tensor, y: Tensor, counted: Tensor, reports: tuple[MoEStats, ...], tokens: int
    ) -> None:
        """One pass: times t [B], labels y [B], weights ``counted`` [B], and the layers' reports."""
        time = progress(t) if self.process == "ddpm" else t
        # A step's start, i / steps, may round to just below the bin that it begins.
        bins = (time.double() * self.bins + 1e-3).long().clamp(0, self.bins - 1)
        place, weight = bins * self.samples_bC.shape[1] + y, counted.to(self.samples_bC.dtype)
        self.samples_bC.view(-1).index_add_(0, place, weight)
        taken_LB = torch.stack([stats.tokens_BE.sum(1) for stats in reports]) * (weight / tokens)
        self.taken_LbC.view(len(self.layers), -1).index_add_(1, place, taken_LB)

    def merged(self, world: Group) -> CapacityUsed:
        """What all ranks saw; all of them call it."""
        taken, samples = (
            sum_over(v, world).cpu().numpy() for v in (self.taken_LbC, self.samples_bC)
        )
        return CapacityUsed(taken, samples, self.layers)


def write_report(used: CapacityUsed, config: Config, stem: str) -> list[Path]:
    """Writes STEM.capacity.json, .md and .png; returns their paths."""
    paths = [Path(f"{stem}.capacity.{ending}") for ending in ("json", "md", "png")]
    tree = report_tree(used, config)
    paths[0].write_text(json.dumps(tree, indent=1, allow_nan=False) + "\n")
    paths[1].write_text(_markdown(tree))
    over_time = {"with class": used.by_time(CONDITIONAL)}
    if used.samples_bC[:, NULL].any():
        guide = "guide" if config.sample.guided_by_capacity else "null class"
        over_time[guide] = used.by_time(NULL)
    capacity_used(used, over_time, config.sample.capacity, paths[2])
    return paths


def report_tree(used: CapacityUsed, config: Config) -> dict:
    """The report as plain numbers; null where nothing ran."""
    sample, bins = config.sample, len(used.samples_bC)
    thresholds = None
    if has_thresholds(config.model) and sample.routing != "static":
        constant = "learned" if sample.gamma is None else "gamma"
        thresholds = constant if sample.capacity is None else "dial"
    times = zip(used.by_time(CONDITIONAL), used.by_time(NULL), used.by_layer_and_time().T)
    return {
        "capacity": used.mean(),
        "conditional": used.mean(CONDITIONAL),
        "null": _number(used.mean(NULL)),
        "thresholds": thresholds,
        "dial": sample.capacity,
        **{name: getattr(sample, name) for name in _OF_SAMPLE},
        "passes": int(used.samples_bC.sum()),
        "by_layer": dict(zip(used.layers, map(float, used.by_layer()))),
        "by_time": [
            {
                "t": (i + 0.5) / bins,
                "conditional": _number(conditional),
                "null": _number(null),
                "layers": list(map(_number, layers)),
            }
            for i, (conditional, null, layers) in enumerate(times)
        ],
        "by_class": [{"class": c, "capacity": value} for c, value in used.by_class()],
    }


def _markdown(tree: dict) -> str:
    wanted = f", dialled {tree['dial']:g}" if tree["dial"] is not None else ""
    thresholds = f", {tree['thresholds']} thresholds" if tree["thresholds"] else ""
    times = tree["by_time"][:: -(-len(tree["by_time"]) // _TABLE_TIMES)]
    time_rows = [(f"{row['t']:.3f}", row["conditional"], row["null"]) for row in times]
    ranking = [(str(i), str(r["class"]), r["capacity"]) for i, r in enumerate(tree["by_class"], 1)]
    half, which = _TABLE_CLASSES // 2, "."
    if len(ranking) > _TABLE_CLASSES:
        which = f"; the first and last {half} of {len(ranking)}."
        ranking = ranking[:half] + ranking[-half:]
    lines = [
        f"# Capacity used: {tree['capacity']:.4f} experts per token{wanted}",
        "",
        f"{tree['sampler']}, {tree['steps']} steps, cfg {tree['cfg']:g}{tree['guidance']}, "
        f"{tree['routing']} routing{thresholds}; {tree['passes']} passes of one image.",
        "",
        *table(("layer", "capacity"), tree["by_layer"].items()),
        "",
        "t is 0 at noise and 1 at data.",
        "",
        *table(("t", "conditional", "guide" if tree["guide"] == "capacity" else "null"), time_rows),
        "",
        f"Classes from the hardest (most capacity) to the easiest, conditional passes{which}",
        "",
        *table(("rank", "class", "capacity"), ranking),
    ]
    return "\n".join(lines) + "\n"


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None  # JSON has no NaN


def _ratio(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(sums) / np.asarray(counts)
