"""The records of a run: JSONL first, TensorBoard beside it, one progress line.  Rank 0 writes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from diffmoe.evaluation.features import Extractor
from diffmoe.evaluation.plots import expert_load, image_grid, loss_curve
from diffmoe.evaluation.scores import Scores, score_names

VALIDATION_NAME = "validation.jsonl"
RECORDS = ("metrics.jsonl", "events.jsonl", "scores.jsonl", VALIDATION_NAME)


class Writer:
    """Rank 0's files in the run folder: ``metrics.jsonl``, ``events.jsonl``, ``scores.jsonl``,
    ``validation.jsonl``, TensorBoard scalars and images.

    What a disk refuses is said once, on stderr, and does not stop the run; lines wait in memory
    until they can be written.
    """

    def __init__(self, folder: Path, total_steps: int, layer_names: list[str]) -> None:
        self.folder, self.total_steps, self.layer_names = folder, total_steps, layer_names
        self._waiting = {name: _start_of_line(folder / name) for name in RECORDS}
        self._board: Any = None
        self._refused: set[str] = set()

    def record(self, record: dict) -> None:
        """A line of JSON, on disk at once, scalars, and a line on the terminal."""
        self._line("metrics.jsonl", record)
        numbers = {name: v for name, v in record.items() if name not in ("step", "samples")}
        self._scalars(numbers, record["step"])
        print(progress_line(record, self.total_steps), flush=True)

    def event(self, step: int, kind: str, text: str, printed: bool = True) -> None:
        """Something that should not pass unseen: a line of ``events.jsonl`` and, with ``printed``,
        of stderr.
        """
        if printed:
            print(f"step {step}: {text}", file=sys.stderr, flush=True)
        self._line("events.jsonl", {"step": step, "event": kind, "text": text})

    def scores(
        self, step: int, weights: str, count: int, extractor: Extractor, scores: Scores
    ) -> None:
        """A line of ``scores.jsonl`` and of the terminal, and scalars such as ``FID/ema:0.999``."""
        found = {name: value for name, value in asdict(scores).items() if value is not None}
        about = {"step": step, "weights": weights, "count": count, "extractor": extractor.name}
        self._line("scores.jsonl", about | found)
        names = score_names(extractor.name, extractor.sha256)
        named = {names.get(n, n.replace("_", " ")): value for n, value in found.items()}
        self._scalars({f"{name}/{weights}": value for name, value in named.items()}, step)
        words = ", ".join(f"{name} {value:.4g}" for name, value in named.items())
        print(f"scores of step {step}, {weights} weights, {count} images: {words}", flush=True)

    def validation(self, step: int, samples: int, count: int, record: dict) -> None:
        """A line of ``validation.jsonl`` and of the terminal, and scalars.  ``record``: as
        ``Validation.as_record`` gives it, of ``count`` held-out samples after ``samples`` of
        training.
        """
        head = {"step": step, "samples": samples, "count": count}
        self._line(VALIDATION_NAME, {**head, **record})
        loss, used, by_time = (record[k] for k in ("loss", "experts_per_token", "loss_by_time"))
        scalars = {f"validation/loss_by_time/{i}": value for i, value in enumerate(by_time)}
        scalars |= {"validation/loss": loss, "validation/experts_per_token": used}
        self._scalars(scalars, step)
        words = "" if used is None else f", {used:.3f} experts a token"
        print(f"validation of step {step}: loss {loss:.5f}, {count} samples{words}", flush=True)

    def draw_load(self, load: np.ndarray, step: int) -> None:
        """``expert_load.png``: which expert works at which flow time, layer by layer."""
        if load.size:
            path = self.folder / "expert_load.png"
            with self.unless_refused(path.name):
                expert_load(load, path, self.layer_names)
                self._image("expert_load", path, step)

    def draw_samples(self, images: np.ndarray, columns: int, step: int) -> None:
        """``samples_<step>.png``."""
        path = self.folder / f"samples_{step:08d}.png"
        with self.unless_refused("samples"):
            image_grid(images, columns, path)
            self._image("samples", path, step)

    def close(self) -> None:
        """Closes the files and draws ``loss.png`` from the whole of ``metrics.jsonl``, earlier
        starts included.
        """
        for name in self._waiting:
            self._line(name, None)
        with self.unless_refused("tensorboard"):
            if self._board is not None:
                self._board.close()
        with self.unless_refused("loss.png"):
            metrics = self.folder / "metrics.jsonl"
            records = read_metrics(metrics) if metrics.exists() else []
            if records := [record for record in records if record["loss"] is not None]:
                loss_curve(records, self.folder / "loss.png")

    def _line(self, name: str, record: dict | None) -> None:
        if record is not None:
            self._waiting[name] += json.dumps(record).encode() + b"\n"
        if self._waiting[name]:
            with self.unless_refused(name), (self.folder / name).open("ab", buffering=0) as file:
                while self._waiting[name]:
                    self._waiting[name] = self._waiting[name][file.write(self._waiting[name]) :]

    def _open_board(self) -> Any:
        if self._board is None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.folder / "tensorboard"))
        return self._board

    def _scalars(self, values: dict, step: int) -> None:
        with self.unless_refused("tensorboard"):
            for name, value in values.items():
                if isinstance(value, str):
                    self._open_board().add_text(name, value, step)
                elif value is not None:
                    self._open_board().add_scalar(name, value, step)

    def _image(self, name: str, path: Path, step: int) -> None:
        from matplotlib.image import imread

        pixels = imread(path)
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels[..., :3]
        with self.unless_refused("tensorboard"):
            self._open_board().add_image(name, pixels, step, dataformats="HWC")

    @contextmanager
    def unless_refused(self, name: str) -> Iterator[None]:
        """Says the first refusal of ``name`` and when it is over.  UserError is an image.s of
        values that are not finite.
        """
        try:
            yield
        except (OSError, ValueError) as error:
            if name == "tensorboard":
                self._board = None  # its thread is dead; the next record opens another file
            if name not in self._refused:
                text = f"{self.folder / name} cannot be written: {error}; training goes on"
                print(f"error: {text}", file=sys.stderr, flush=True)
            self._refused.add(name)
        else:
            if name in self._refused:
                print(f"{self.folder / name} can be written again", file=sys.stderr, flush=True)
                self._refused.remove(name)


def _start_of_line(path: Path) -> bytes:
    """What must come before the next line: a run that was killed, or a full disk, may have left
    half a line.
    """
    try:
        with path.open("rb") as file:
            file.seek(-1, 2)
            return b"" if file.read(1) == b"\n" else b"\n"
    except OSError:  # no such file, or an empty one
        return b""


def read_metrics(path: Path) -> list[dict]:
    """The records of ``metrics.jsonl``, or another of these files, one a step, in order: of a step
    that was trained twice (after a kill) the last.

    Half a line, which a kill may leave, is skipped."""
    records: dict[int, dict] = {}
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        records[record["step"]] = record
    return [records[step] for step in sorted(records)]


def progress_line(record: dict, total: int) -> str:
    """``step 100/1500  loss 0.812  predictor 0.31 (trivial 0.377)  …``"""
    parts = [f"step {record['step']}/{total}"]
    parts += [
        f"{name.replace('_', ' ')} {record[name]}"
        for name in ("skipped_steps", "rollbacks", "failed_saves")
        if record.get(name)
    ]
    if record["loss"] is None:
        return "  ".join([*parts, "no step counted"])
    parts.append(f"loss {record['loss']:.4f}")
    if "validation_loss" in record:
        parts.append(f"validation {record['validation_loss']:.4f}")
    if "predictor_loss" in record:
        trivial = record["trivial_predictor_loss"]
        parts.append(f"predictor {record['predictor_loss']:.3f} (trivial {trivial:.3f})")
    parts += [
        f"{name} {record[f'{name}_loss']:.3f}"
        for name in ("balance", "target", "dispersive", "direction", "repa")
        if f"{name}_loss" in record
    ]
    parts += [
        f"norm {record['grad_norm']:.3f}",
        f"lr {record['lr']:.2e}",
        f"{record['images_per_s']:.0f} images/s",
        f"MFU {100 * record['mfu']:.1f} %",
        f"{record['memory_gib']:.1f} GiB",
    ]
    if "straggler" in record:
        parts.append(f"slow: {record['straggler']}")
    return "  ".join(parts)
