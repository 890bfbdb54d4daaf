"""Means, speed and load of the steps between two records."""

from __future__ import annotations

import time

import numpy as np
import torch

from diffmoe.config import Config
from diffmoe.device import peak_flops, peak_memory_gib
from diffmoe.families import (
    TOKENS_CHOOSE,
    has_predictor,
    has_router_loss,
    has_target_head,
    has_thresholds,
)
from diffmoe.models.count import count
from diffmoe.moe.capacity import trivial_predictor_loss
from diffmoe.parallel.collectives import sum_over
from diffmoe.parallel.groups import ParallelGroups
from diffmoe.training.step import TIME_BINS, StepReport


class Meter:
    """Sums step reports between two log lines; all ranks call it, since load is reduced when it is
    looked at.

    MFU = 3 x 2 x forward MACs per image x images/s / (ranks x peak FLOP/s): backward counts twice
    forward, recompute not at all; MACs of the activated parameters at the step's capacity
    (``models.count``).
    """

    def __init__(self, config: Config, groups: ParallelGroups, device: torch.device) -> None:
        self.config, self.groups, self.device = config, groups, device
        self.peak = peak_flops(device)
        self._reports: list[StepReport] = []
        self._started = time.perf_counter()

    def add(self, report: StepReport) -> None:
        self._reports.append(report)

    def restart_clock(self) -> None:
        """Leaves out what took time since the last record and was not training."""
        self._started = time.perf_counter()

    def leave_out(self, seconds: float) -> None:
        """Takes seconds that were not training off the time since the last record."""
        self._started += seconds

    def discard(self) -> None:
        """Forgets the steps since the last record: the run went back."""
        self._reports = []

    def collect(self, step: int, samples: int) -> tuple[dict, np.ndarray]:
        """(record, load [layers, time bins, experts] as share of the mean) of the steps since the
        last call.

        Losses are means over those steps, norms the last; load is NaN in a time bin that had no
        sample.  When all of those steps were skipped there is no loss (None) and no load.
        """
        reports, self._reports = self._reports, []
        if not reports:
            return {"step": step, "samples": samples, "loss": None}, np.zeros((0, TIME_BINS, 0))
        now = time.perf_counter()
        seconds, self._started = now - self._started, now
        train, model, moe = self.config.train, self.config.model, self.config.moe
        last = reports[-1]
        load, per_expert = self._load(reports)
        images = len(reports) * train.batch / seconds
        capacity = None if model.family in TOKENS_CHOOSE else last.capacity
        macs = count(model, moe, capacity=capacity).forward_macs

        def mean(name: str) -> float:
            return float(np.mean([getattr(report, name) for report in reports]))

        record = {
            "step": step,
            "samples": samples,
            "loss": mean("loss"),
            "grad_norm": last.grad_norm,
            "lr": last.lr,
            "images_per_s": images,
            "mfu": 6 * macs * images / (self.groups.world.size * self.peak),
            "memory_gib": peak_memory_gib(self.device),
        }
        if has_predictor(model, moe):
            record["predictor_loss"] = mean("predictor_loss")
            record["trivial_predictor_loss"] = trivial_predictor_loss(moe.experts, last.capacity)
        if has_thresholds(model):
            record["capacity"] = last.capacity
        if has_target_head(model, moe):
            record["target_loss"] = mean("target_loss")
        for name in ("dispersive", "direction", "repa"):
            if getattr(train, f"{name}_weight"):
                record[f"{name}_loss"] = mean(f"{name}_loss")
        if has_router_loss(model, moe):
            record["balance_loss"] = mean("balance_loss")
        if load.size:
            record["load_max"] = float(per_expert.max())
            record["load_min"] = float(per_expert.min())
        return record, load

    def _load(self, reports: list[StepReport]) -> tuple[np.ndarray, np.ndarray]:
        """Load by [layer, time bin, expert] and, over all times, by [layer, expert]."""
        world = self.groups.world
        load = sum_over(torch.stack([r.load_LbE for r in reports]).sum(0), world)
        samples = sum_over(torch.stack([r.samples_b for r in reports]).sum(0), world)
        layers, _, experts = load.shape
        if layers == 0:
            return np.zeros((0, TIME_BINS, experts)), np.zeros((0, experts))
        # What an expert takes of a bin at capacity 1.
        mean_rows = samples * self.config.model.tokens / experts
        per_expert = load.sum(1) / mean_rows.sum()
        return (load / mean_rows[:, None]).cpu().numpy(), per_expert.cpu().numpy()
