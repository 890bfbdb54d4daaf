"""How images are sampled: the section `sample` of a configuration.  No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class SampleConfig:
    """Sampling.

    Attributes:
        sampler: `euler`, `heun` or `dopri5` of the flow; `ancestral` or `ddim` of DDPM.
        steps: Of the sampler; the most that dopri5 may take.
        cfg: Scale of guidance, guide + cfg (model - guide); 1: the model alone.
        cfg_channels: Channels that DDPM's guidance moves (published: the first 3; the flow guides
            all).
        cfg_interval: The times at which there is guidance, ends included, from 0 (noise) to 1
            (data): t of the flow, 1 - (step + 0.5) / 1000 of DDPM; at others the model alone, in
            one pass (null: everywhere).
        guide: What guidance leads away from: the null class (null), the same weights with fewer
            experts a token (`capacity`), or other weights, as FOLDER of a checkpoint or
            FOLDER@ema:0.999; all but the null class with the class asked for.
        pair: The model for the times that `diffusion.time_range` leaves out: FOLDER or
            FOLDER@ema:0.999 of a checkpoint.
        guide_capacity: Experts that a token gets on average in the guide `capacity`.
        eta: DDIM's noise.
        tolerance: dopri5's error of a step.
        routing: `batch`: the paper's rule; `token`: the same without any influence of the batch;
            `static`: the paper's static top-k, every expert takes as many tokens of a rank's batch
            as moe.capacity says.
        gamma: One constant threshold for every expert, in place of the learned ones.
        capacity: Experts that a token gets on average, by thresholds from the predictor's
            histograms.
        dtype: Of the weights in `sample`, `evaluate` and `sweep`: `fp32`, as the published rows, or
            `bf16`, for speed on a GPU. The gate's scores, thresholds and the sampler's own
            arithmetic stay fp32.
        batch: Images at a time, on a rank.
        columns: Of the sheet of samples, at most: fewer classes share them out evenly.
    """

    sampler: Literal["euler", "heun", "dopri5", "ancestral", "ddim"] = "euler"
    steps: int = 50
    cfg: float = 1.5
    cfg_channels: int = 3
    cfg_interval: tuple[float, float] | None = None
    guide: str | None = None
    guide_capacity: float = 0.5
    pair: str | None = None
    eta: float = 0.0
    tolerance: float = 1e-4
    routing: Literal["batch", "token", "static"] = "token"
    gamma: float | None = None
    capacity: float | None = None
    dtype: Literal["fp32", "bf16"] = "fp32"
    batch: int = 64
    columns: int = 10

    @property
    def guide_checkpoint(self) -> str | None:
        """Where the guide's weights are, if guidance needs other weights."""
        return None if self.cfg == 1 or self.guide == "capacity" else self.guide

    @property
    def guided_by_capacity(self) -> bool:
        """Whether guidance has a pass of the same weights at ``guide_capacity``."""
        return self.cfg != 1 and self.guide == "capacity"

    @property
    def guidance(self) -> str:
        """What a scale leaves unsaid, in words; empty for the null class at all times."""
        words = ""
        if self.guided_by_capacity:
            words += f", guide at capacity {self.guide_capacity:g}"
        elif self.guide_checkpoint:
            words += f", guide {self.guide}"
        if self.cfg != 1 and self.cfg_interval:
            words += f", for t in [{self.cfg_interval[0]:g}, {self.cfg_interval[1]:g}]"
        return words
