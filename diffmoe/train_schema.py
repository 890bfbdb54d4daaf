"""How a model is trained: the section `train` of a configuration.  No torch here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TrainConfig:
    """The recipe.

    Attributes:
        steps: Optimizer steps in all.
        batch: Global batch of one optimizer step, micro_batch x ranks x accumulation.
        micro_batch: Samples of a rank's pass (null: batch / ranks / accumulation).
        accumulation: Passes of an optimizer step (null: 1, or what micro_batch asks for).
        optimizer: Whose AdamW: torch's fused one, DeepSpeed's or NVIDIA apex's; or Muon (K. Jordan
            2024) for the matrices in blocks, scaled as J. Liu et al. (arXiv 2502.16982) do so that
            `lr` and `weight_decay` are AdamW's, and torch's AdamW for the rest. ZeRO 0 to 2.
        recipe_batch: The batch that `lr`, `warmup` and `ema` are stated for (null: `batch`). With
            k times as large a batch the learning rate is sqrt(k) times as high, and warm-up and the
            averages' half-lives are as long in samples: `warmup` / k steps, decays to the power k.
        lr: Learning rate.
        warmup: Steps of linear warm-up.
        schedule: Of the learning rate after the warm-up, to 0 at the last step unless constant.
        betas: AdamW's.
        eps: AdamW's.
        weight_decay: AdamW's.
        clip: Largest norm of the gradient (0: not clipped).
        dispersive_weight: Of the dispersive loss, log mean exp(-d / 0.5) over all pairs of a
            micro-batch's samples on all ranks, d the mean squared difference of two samples' tokens
            after a quarter of the blocks (Wang & He 2025, where it is 0.5 and takes FID of SiT-B/2
            from 36.49 to 32.35, of SiT-XL/2 from 6.02 to 5.09). 0: off.
        direction_weight: For the flow: of 1 - cosine of predicted and true velocity, over channels
            (FasterDiT, Yao et al. 2024: a part of DiT's FID in a seventh of its steps). 0: off.
        repa_weight: Of representation alignment (REPA, Yu et al. 2024, 3.2): minus the mean over
            patches of the cosine of features that lie in the shards (`encode --features`) and what
            a projector makes of a block's tokens (0.5: SiT-XL/2's FID of 7M steps before step
            400k). 0: off, and no projector.
        repa_block: Blocks before it (null: a third of them, at most 8, as the paper's).
        repa_width: Of the features (768: DINOv2-B's).
        repa_hidden: Inner width of the projector's three linear layers.
        label_drop: Share of samples that train the null class, which guidance needs.
        on_nonfinite: A step whose loss or gradient is not finite changes nothing and is skipped, or
            ends the run.
        nonfinite_limit: The most such steps in a row.
        spike_factor: A loss above so many times the median sends the run back to its last
            checkpoint, and the step is left out from then on (0: off).
        spike_window: Steps of that median.
        spike_limit: The most times back to one checkpoint.
        ema: Decay of the weights' moving average, or several; the first samples, all are scored.
        ema_lengths: Averages of these lengths (EDM2's sigma_rel, docs/training.md) beside them.
        ema_snapshot_every: Steps between two copies of these alone, which stay (0: none).
        log_every: Steps between two lines of progress.
        sample_every: Steps between two sheets of samples (0: only one at the end).
        score_every: Steps between two scores (0: none).
        validate_every: Steps between two measurements of the validation loss (0: none): of the
            first average, on held-out samples at times and noise that are the same in every run,
            under `sample.routing`.
        validate_samples: Held-out samples that are measured (null: all).
        save_every: Steps between two checkpoints (0: only the last).
        keep: Newest checkpoints that stay.
        keep_every: Those whose step divides by this stay, too (0: none).
        async_save: Write checkpoints while training goes on.
        mirror: Where finished checkpoints are copied to beside training, by the same rules of what
            stays: a folder of this run's own at a store (`s3://bucket/runs/mine`, `gs://`,
            `file://`); a run whose folder has none starts from there.
        mirror_mb_s: The most that is sent there, in 10^6 bytes a second (0: unbounded).
        compile: torch.compile for training, sampling and scoring; `auto`: on a GPU, below ZeRO 3.
    """

    steps: int = 700_000
    batch: int = 256
    micro_batch: int | None = None
    accumulation: int | None = None
    optimizer: Literal["torch", "deepspeed", "apex", "muon"] = "torch"
    recipe_batch: int | None = None
    lr: float = 1e-4
    warmup: int = 0
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 0.0
    dispersive_weight: float = 0.0
    direction_weight: float = 0.0
    repa_weight: float = 0.0
    repa_block: int | None = None
    repa_width: int = 768
    repa_hidden: int = 2048
    label_drop: float = 0.1
    on_nonfinite: Literal["skip", "stop"] = "stop"
    nonfinite_limit: int = 10
    spike_factor: float = 0.0
    spike_window: int = 64
    spike_limit: int = 3
    ema: float | tuple[float, ...] = 0.9999
    ema_lengths: tuple[float, ...] = ()
    ema_snapshot_every: int = 0
    log_every: int = 50
    sample_every: int = 0
    score_every: int = 0
    validate_every: int = 0
    validate_samples: int | None = None
    save_every: int = 10_000
    keep: int = 3
    keep_every: int = 0
    async_save: bool = True
    mirror: str = ""
    mirror_mb_s: float = 0.0
    compile: Literal["auto"] | bool = "auto"

    @property
    def ema_decays(self) -> tuple[float, ...]:
        """The decays of ``ema``, also where it is one number: as stated, which is their name."""
        return self.ema if isinstance(self.ema, tuple) else (self.ema,)

    @property
    def growth(self) -> float:
        """How many times the batch is what the recipe is stated for."""
        return self.batch / (self.recipe_batch or self.batch)

    def compiles(self, device: str, stage: int = 0) -> bool:
        """Whether ``compile`` means yes on ``device`` (cpu, cuda) at ZeRO ``stage``.  ``auto``: on
        a GPU, below ZeRO 3, which gathers weights in hooks of modules, where no graph can go.
        """
        return self.compile if isinstance(self.compile, bool) else device == "cuda" and stage < 3

    def lr_at(self, step: int) -> float:
        """Learning rate of step ``step`` (0-based): linear warm-up, then the schedule down to 0."""
        lr, warmup = self.lr * math.sqrt(self.growth), round(self.warmup / self.growth)
        if step < warmup:
            return lr * (step + 1) / warmup
        if self.schedule == "constant":
            return lr
        left = max(0.0, 1.0 - (step - warmup) / max(1, self.steps - warmup))
        return lr * (left if self.schedule == "linear" else 0.5 * (1.0 - math.cos(math.pi * left)))
