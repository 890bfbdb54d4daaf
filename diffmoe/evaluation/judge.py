"""The demo's judge: are the generated digits what was asked, as varied as real ones, and not copies
of them?

    python -m diffmoe.evaluation.judge samples.npz [--json out.json] [--require]

`samples.npz` holds `images` [n, 1, 8, 8] in [-1, 1] and `labels` [n]. Distances are in digit units,
0..16 a pixel.
"""

from __future__ import annotations

import json
import sys
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC

from diffmoe.errors import UserError
from diffmoe.evaluation.scores import NEIGHBOURS, nearest_distances, precision_recall
from diffmoe.paths import PathParser

MIN_REAL_ACCURACY = 0.95  # below this the classifier itself is not to be trusted
MIN_ACCURACY, MIN_PRECISION, MIN_RECALL = 0.97, 0.5, 0.6
# Generated digits nearer to training digits than this times a fresh real digit are copies.
MIN_DISTANCE_RATIO = 0.9


@dataclass(frozen=True)
class JudgeReport:
    """What the judge measured; shares lie in [0, 1], distances in digit units.

    `accuracy` is of the generated digits, `real_accuracy` of held-out real ones.
    `median_nn_generated` is to the nearest of all real digits, `median_nn_real` from held-out real
    digits to the rest.
    """

    accuracy: float
    real_accuracy: float
    precision: float
    recall: float
    median_nn_generated: float
    median_nn_real: float
    count: int

    def format(self) -> str:
        """Lines for people; the last one is the verdict."""
        return (
            f"judge: classifier is right on {100 * self.real_accuracy:.1f} % of held-out real "
            "digits\n"
            f"judge: precision {self.precision:.3f}, recall {self.recall:.3f} (k = {NEIGHBOURS}, "
            "pixels)\n"
            "judge: median distance to the nearest training digit "
            f"{self.median_nn_generated:.1f}, of held-out real digits {self.median_nn_real:.1f}\n"
            f"judge: {100 * self.accuracy:.1f} % of {self.count} digits are what was asked"
        )

    def failures(self) -> list[str]:
        """The thresholds that were missed, each in words; empty when the digits pass."""
        minima = {
            "accuracy": MIN_ACCURACY,
            "precision": MIN_PRECISION,
            "recall": MIN_RECALL,
            "median_nn_generated": MIN_DISTANCE_RATIO * self.median_nn_real,
        }
        return [
            f"{name} ({getattr(self, name):.3f}) is below {minimum:.3f}"
            for name, minimum in minima.items()
            if getattr(self, name) < minimum
        ]


def judge_digits(images: np.ndarray, asked: np.ndarray) -> JudgeReport:
    """Judge generated `images` [n, 1, 8, 8] (clipped to [-1, 1]) that were asked to be the digits
    `asked` [n].

    Raises:
        UserError: shapes that do not fit, labels outside 0..9, images that are not finite, too few
            of them, or a classifier that fails on real digits.
    """
    images, asked = np.asarray(images), np.asarray(asked)
    if images.ndim != 4 or images.shape[1:] != (1, 8, 8) or asked.shape != images.shape[:1]:
        raise UserError(f"images {images.shape} must be [n, 1, 8, 8] and asked {asked.shape} [n]")
    if len(asked) and not (asked.min() >= 0 and asked.max() <= 9):
        raise UserError(f"asked ({asked.min()}..{asked.max()}) must lie in 0..9")
    if bad := np.count_nonzero(~np.isfinite(images).all(axis=(1, 2, 3))):
        raise UserError(f"images: {bad} of {len(images)} hold values that are not finite")
    generated = (np.clip(images.reshape(len(images), 64).astype(np.float64), -1.0, 1.0) + 1.0) * 8.0
    real, labels = load_digits(return_X_y=True)
    precision, recall = precision_recall(real, generated)
    train, held_out, train_labels, held_out_labels = train_test_split(
        real, labels, test_size=0.25, random_state=0, stratify=labels
    )
    classifier = SVC(gamma=0.001, C=10.0, random_state=0).fit(train, train_labels)
    real_accuracy = float(classifier.score(held_out, held_out_labels))
    if real_accuracy <= MIN_REAL_ACCURACY:
        raise UserError(
            f"the judge's classifier: accuracy on real digits ({real_accuracy:.3f}) must be above "
            f"{MIN_REAL_ACCURACY}"
        )
    return JudgeReport(
        accuracy=float(np.mean(classifier.predict(generated) == asked)),
        real_accuracy=real_accuracy,
        precision=precision,
        recall=recall,
        median_nn_generated=float(np.median(nearest_distances(generated, real))),
        median_nn_real=float(np.median(nearest_distances(held_out, train))),
        count=len(images),
    )


def _read_samples(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:  # of a .npy numpy gives an array, which is no context
        with np.load(path, allow_pickle=False) as samples:
            read = {name: samples[name] for name in ("images", "labels") if name in samples.files}
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if missing := {"images", "labels"} - set(read):
        raise UserError(
            f"{path} lacks {' and '.join(sorted(missing))}: it must be what run.py sample writes"
        )
    return read["images"], read["labels"]


def main(arguments: list[str] | None = None) -> int:
    """Command line of this module; returns the exit status."""
    parser = PathParser(description="Judge generated digits.")
    add = parser.add_argument
    add("samples", type=Path, help="npz with images [n, 1, 8, 8] in [-1, 1] and labels [n]")
    add("--json", type=Path, help="also write the report here")
    add("--require", action="store_true", help="exit 1 where a threshold is missed")
    try:
        options = parser.parse_args(arguments)
        report = judge_digits(*_read_samples(options.samples))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report.format())
    if options.json is not None:
        options.json.write_text(json.dumps(asdict(report), indent=1) + "\n")
    if options.require and report.failures():
        print(f"judge: not good enough: {'; '.join(report.failures())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
