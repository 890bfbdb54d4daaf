"""What a run tells: JSONL first, TensorBoard beside it, one progress line.  Rank 0 writes; the others hold no files."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffmoe.config import Config
from diffmoe.device import peak_flops, peak_memory_gib
from diffmoe.evaluation.plots import expert_load, loss_curve
from diffmoe.models.count import count
from diffmoe.moe.capacity import trivial_predictor_loss
from diffmoe.parallel.collectives import sum_over
from diffmoe.parallel.groups import ParallelGroups
from diffmoe.training.step import TIME_BINS, StepReport


class Meter:
    """Sums step reports between two log lines; all ranks call it, since load is reduced when it is looked at.

    MFU = 3 x 2 x forward MACs per image x images/s / (ranks x peak FLOP/s): backward counts twice forward, recompute
    not at all; MACs of the activated parameters at the step's capacity (``models.count``)."""

    def __init__(self, config: Config, groups: ParallelGroups, device: torch.device) -> None:
        self.config, self.groups, self.device = config, groups, device
        self.peak, _ = peak_flops(device)
        self._reports: list[StepReport] = []
        self._started = time.perf_counter()

    def add(self, report: StepReport) -> None:
        self._reports.append(report)

    def restart_clock(self) -> None:
        """Leaves out what took time since the last record and was not training."""
        self._started = time.perf_counter()

    def collect(self, step: int) -> tuple[dict, np.ndarray]:
        """(record, load [layers, time bins, experts] as share of the mean) of the steps since the last call.

        Losses are means over those steps, norms the last; load is NaN in a time bin that had no sample."""
        reports, self._reports = self._reports, []
        now = time.perf_counter()
        seconds, self._started = now - self._started, now
        train, model, moe = self.config.train, self.config.model, self.config.moe
        last = reports[-1]
        load, per_expert = self._load(reports)
        images = len(reports) * train.batch / seconds
        macs = count(model, moe, capacity=None if model.family == "tc" else last.capacity).forward_macs
        record = {
            "step": step, "samples": step * train.batch,
            "loss": float(np.mean([r.loss for r in reports])),
            "grad_norm": last.grad_norm, "lr": last.lr,
            "images_per_s": images, "mfu": 6 * macs * images / (self.groups.world.size * self.peak),
            "memory_gib": peak_memory_gib(self.device),
        }
        if model.family == "diffmoe":
            record["predictor_loss"] = float(np.mean([r.predictor_loss for r in reports]))
            record["trivial_predictor_loss"] = trivial_predictor_loss(moe.experts, last.capacity)
            record["capacity"] = last.capacity
        if model.family == "tc":
            record["balance_loss"] = float(np.mean([r.balance_loss for r in reports]))
        if load.size:
            record["load_max"], record["load_min"] = float(per_expert.max()), float(per_expert.min())
        return record, load

    def _load(self, reports: list[StepReport]) -> tuple[np.ndarray, np.ndarray]:
        """Load by [layer, time bin, expert] and, over all times, by [layer, expert]."""
        load: Tensor = sum_over(torch.stack([r.load_LbE for r in reports]).sum(0), self.groups.world)
        samples = sum_over(torch.stack([r.samples_b for r in reports]).sum(0), self.groups.world)
        layers, _, experts = load.shape
        if layers == 0:
            return np.zeros((0, TIME_BINS, experts)), np.zeros((0, experts))
        mean_rows = samples * self.config.model.tokens / experts  # what an expert takes of a bin at capacity 1
        with np.errstate(divide="ignore", invalid="ignore"):
            return (load / mean_rows[:, None]).cpu().numpy(), (load.sum(1) / mean_rows.sum()).cpu().numpy()


@dataclass
class Writer:
    """Rank 0's files in the run folder: ``metrics.jsonl``, TensorBoard scalars and pictures."""

    folder: Path
    total_steps: int
    layer_names: list[str]

    def __post_init__(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(self.folder / "tensorboard"))
        self._lines = (self.folder / "metrics.jsonl").open("a")

    def record(self, record: dict) -> None:
        """One line of JSON, flushed; the same numbers as scalars; one line on the terminal."""
        self._lines.write(json.dumps(record) + "\n")
        self._lines.flush()
        for name, value in record.items():
            if name not in ("step", "samples"):
                self._board.add_scalar(name, value, record["step"])
        print(progress_line(record, self.total_steps), flush=True)

    def load_picture(self, load: np.ndarray, step: int) -> None:
        """``expert_load.png``: which expert works at which flow time, layer by layer."""
        if load.size:
            path = self.folder / "expert_load.png"
            expert_load(load, path, self.layer_names)
            self._picture("expert_load", path, step)

    def sample_picture(self, path: Path, step: int) -> None:
        self._picture("samples", path, step)

    def _picture(self, name: str, path: Path, step: int) -> None:
        from matplotlib.image import imread

        pixels = imread(path)
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels[..., :3]
        self._board.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        """Closes the files and draws ``loss.png`` from the whole of ``metrics.jsonl``, earlier starts included."""
        self._lines.close()
        self._board.close()
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        if lines:
            loss_curve([json.loads(line) for line in lines], self.folder / "loss.png")


def progress_line(record: dict, total: int) -> str:
    """``step 100/1500  loss 0.812  predictor 0.31 (trivial 0.377)  …``"""
    parts = [f"step {record['step']}/{total}", f"loss {record['loss']:.4f}"]
    if "predictor_loss" in record:
        parts.append(f"predictor {record['predictor_loss']:.3f} (trivial {record['trivial_predictor_loss']:.3f})")
    if "balance_loss" in record:
        parts.append(f"balance {record['balance_loss']:.3f}")
    parts += [f"norm {record['grad_norm']:.3f}", f"lr {record['lr']:.2e}", f"{record['images_per_s']:.0f} images/s",
              f"MFU {100 * record['mfu']:.1f} %"]
    if record["memory_gib"]:
        parts.append(f"{record['memory_gib']:.1f} GiB")
    return "  ".join(parts)
