"""The demos' judge: are the generated images what was asked, as varied as real ones, and not copies
of them?

    python -m diffmoe.evaluation.judge samples.npz [--json out.json] [--require]
        [--train SHARDS --held-out SHARDS]

`samples.npz` holds `images` [n, C, H, W] in [-1, 1] and `labels` [n]. Without shards they are
scikit-learn's digits. Distances are in levels a pixel, 0..16 for digits and 0..255 for others.
"""

from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC
from torch import nn

from diffmoe.data.reader import ShardReader
from diffmoe.data.shards import load_index
from diffmoe.errors import UserError
from diffmoe.evaluation.scores import NEIGHBOURS, nearest_distances, precision_recall
from diffmoe.files import check_writable, write_text
from diffmoe.paths import PathParser

# Of the network that reads images of shards: three passes get 91.7 % on Fashion-MNIST.
_EPOCHS, _BATCH, _RATE, _SEED = 3, 128, 4e-3, 0
_HELD_OUT_NEIGHBOURS = 1000  # held-out images whose nearest training image is looked for

Classifier = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Minima:
    """The least that passes. Below `real_accuracy` the classifier itself is not to be trusted;
    generated images nearer to training images than `distance_ratio` times a fresh real image are
    copies.
    """

    real_accuracy: float
    accuracy: float
    precision: float
    recall: float
    distance_ratio: float


MINIMA = {
    "digits": Minima(0.95, accuracy=0.97, precision=0.5, recall=0.6, distance_ratio=0.9),
    # `make fashion-demo` reaches 0.92, 0.52, 0.59 and 1.07.
    "images": Minima(0.9, accuracy=0.85, precision=0.45, recall=0.45, distance_ratio=0.9),
}


@dataclass(frozen=True)
class JudgeReport:
    """What the judge measured; shares lie in [0, 1], distances in levels.

    `accuracy` is of the generated images, `real_accuracy` of held-out real ones.
    `median_nn_generated` is from generated images to the nearest known real one, `median_nn_real`
    from held-out real images to those that the classifier was fitted to. `what` they are.
    """

    accuracy: float
    real_accuracy: float
    precision: float
    recall: float
    median_nn_generated: float
    median_nn_real: float
    count: int
    what: str = "digits"

    def format(self) -> str:
        """Lines for people; the last one is the verdict."""
        return (
            f"judge: classifier is right on {100 * self.real_accuracy:.1f} % of held-out real "
            f"{self.what}\n"
            f"judge: precision {self.precision:.3f}, recall {self.recall:.3f} (k = {NEIGHBOURS}, "
            "pixels)\n"
            f"judge: median distance to the nearest training {self.what.removesuffix('s')} "
            f"{self.median_nn_generated:.1f}, of held-out real {self.what} "
            f"{self.median_nn_real:.1f}\n"
            f"judge: {100 * self.accuracy:.1f} % of {self.count} {self.what} are what was asked"
        )

    def failures(self) -> list[str]:
        """The thresholds that were missed, each in words; empty when the images pass."""
        least = MINIMA[self.what]
        minima = {
            "accuracy": least.accuracy,
            "precision": least.precision,
            "recall": least.recall,
            "median_nn_generated": least.distance_ratio * self.median_nn_real,
        }
        return [
            f"{name} ({getattr(self, name):.3f}) is below {minimum:.3f}"
            for name, minimum in minima.items()
            if getattr(self, name) < minimum
        ]


@dataclass(frozen=True)
class _Real:
    """The real images [n, d] in levels: `known` to the generator, `like` which its images should
    be (for precision and recall), `train` and `held_out`, with labels, of the classifier that `fit`
    makes of images and labels.
    """

    what: str
    shape: tuple[int, ...]
    levels: float
    classes: int
    known: np.ndarray
    like: np.ndarray
    train: tuple[np.ndarray, np.ndarray]
    held_out: tuple[np.ndarray, np.ndarray]
    fit: Callable[[np.ndarray, np.ndarray], Classifier]


def judge(
    images: np.ndarray, asked: np.ndarray, train: Path | None = None, held_out: Path | None = None
) -> JudgeReport:
    """Judge generated `images` [n, C, H, W] (clipped to [-1, 1]) that were asked to be of the
    classes `asked` [n]: digits [n, 1, 8, 8], or what the pixel shards `train` and `held_out` hold,
    by a small network fitted to the former and tested on the latter: a minute on one core for
    60,000 images of 28 x 28.

    Raises:
        UserError: shapes that do not fit, labels of no class, images that are not finite, too few
            of them, a classifier that fails on real images; shards that are not pixels.
    """
    real = _real_shards(train, held_out) if train and held_out else _real_digits()
    images, asked = np.asarray(images), np.asarray(asked)
    shape = ", ".join(map(str, real.shape))
    if images.ndim != 4 or images.shape[1:] != real.shape or asked.shape != images.shape[:1]:
        raise UserError(f"images {images.shape} must be [n, {shape}] and asked {asked.shape} [n]")
    if len(asked) and not (asked.min() >= 0 and asked.max() < real.classes):
        raise UserError(f"asked ({asked.min()}..{asked.max()}) must lie in 0..{real.classes - 1}")
    if bad := np.count_nonzero(~np.isfinite(images).all(axis=(1, 2, 3))):
        raise UserError(f"images: {bad} of {len(images)} hold values that are not finite")
    flat = images.reshape(len(images), -1).astype(np.float64)
    generated = (np.clip(flat, -1.0, 1.0) + 1.0) * (real.levels / 2)
    precision, recall = precision_recall(real.like, generated)
    classify = real.fit(*real.train)
    real_accuracy = float(np.mean(classify(real.held_out[0]) == real.held_out[1]))
    least = MINIMA[real.what].real_accuracy
    if real_accuracy <= least:
        raise UserError(
            f"the judge's classifier: accuracy on real {real.what} ({real_accuracy:.3f}) must be "
            f"above {least}; more images to train it on may help"
        )
    fresh = real.held_out[0][:_HELD_OUT_NEIGHBOURS]
    return JudgeReport(
        accuracy=float(np.mean(classify(generated) == asked)),
        real_accuracy=real_accuracy,
        precision=precision,
        recall=recall,
        median_nn_generated=float(np.median(nearest_distances(generated, real.known))),
        median_nn_real=float(np.median(nearest_distances(fresh, real.train[0]))),
        count=len(images),
        what=real.what,
    )


def _real_digits() -> _Real:
    pixels, labels = load_digits(return_X_y=True)
    train, held_out, train_labels, held_out_labels = train_test_split(
        pixels, labels, test_size=0.25, random_state=0, stratify=labels
    )

    def fit(images: np.ndarray, classes: np.ndarray) -> Classifier:
        return SVC(gamma=0.001, C=10.0, random_state=0).fit(images, classes).predict

    pairs = (train, train_labels), (held_out, held_out_labels)
    return _Real("digits", (1, 8, 8), 16.0, 10, pixels, pixels, *pairs, fit)


def _real_shards(train: Path, held_out: Path) -> _Real:
    indexes = [load_index(folder) for folder in (train, held_out)]
    for folder, index in zip((train, held_out), indexes):
        if index.meta.kind != "pixels":
            raise UserError(f"shards ({folder}) are {index.meta.kind} and must be pixels")
    first, second = indexes
    here, there = (first.x_shape, first.meta.classes), (second.x_shape, second.meta.classes)
    if here != there:
        raise UserError(
            f"shards {train} ({here[0]}, {here[1]} classes) and {held_out} ({there[0]}, {there[1]} "
            "classes) must be alike"
        )
    pairs = []
    for index in indexes:
        x, labels = ShardReader(index, seed=0).read(range(index.count))
        pairs.append(((x.reshape(len(x), -1) + 1) * 127.5, labels))
    known, like = (pixels for pixels, _ in pairs)
    fit = lambda images, labels: _fit_network(images, labels, *here)
    return _Real("images", here[0], 255.0, here[1], known, like, pairs[0], pairs[1], fit)


def _fit_network(
    images: np.ndarray, labels: np.ndarray, shape: tuple[int, ...], classes: int
) -> Classifier:
    """Fitted with Adam; the same every time on a machine; torch's own generator stays."""

    def network_input(pixels: np.ndarray) -> torch.Tensor:
        x = torch.from_numpy(np.asarray(pixels, np.float32) / 127.5 - 1)
        return x.reshape(-1, *shape)

    channels, height, width = shape
    x, y = network_input(images), torch.from_numpy(np.asarray(labels, np.int64))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        network = nn.Sequential(
            *(nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.BatchNorm2d(16), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.BatchNorm2d(32), nn.Flatten()),
            *(nn.Linear(32 * (height // 4) * (width // 4), 128), nn.ReLU()),
            nn.Linear(128, classes),
        )
        steps = max(2, _EPOCHS * len(x) // _BATCH)
        optimizer = torch.optim.Adam(network.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps)
        for _ in range(steps):
            rows = torch.randint(len(x), (_BATCH,))
            loss = nn.functional.cross_entropy(network(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    network.eval()

    @torch.inference_mode()
    def classify(pixels: np.ndarray) -> np.ndarray:
        parts = network_input(pixels).split(1000)
        return np.concatenate([network(part).argmax(dim=1).numpy() for part in parts])

    return classify


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
    parser = PathParser(description="Judge generated digits, or images beside real ones.")
    add = parser.add_argument
    add("samples", type=Path, help="npz with images [n, C, H, W] in [-1, 1] and labels [n]")
    shards = "pixel shards of the real images that {} (default: scikit-learn's digits)"
    add("--train", type=Path, help=shards.format("the generator and the judge are fitted to"))
    add("--held-out", type=Path, help=shards.format("neither of them has seen"))
    add("--json", type=Path, help="also write the report here")
    add("--require", action="store_true", help="exit 1 where a threshold is missed")
    try:
        options = parser.parse_args(arguments)
        train, held_out = options.train, options.held_out
        if (train is None) != (held_out is None):
            raise UserError(f"--train ({train}) and --held-out ({held_out}) go together")
        if options.json:
            check_writable(options.json, f"--json ({options.json})")
        report = judge(*_read_samples(options.samples), train, held_out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report.format())
    if options.json is not None:
        write_text(options.json, json.dumps(asdict(report), indent=1) + "\n")
    if options.require and report.failures():
        print(f"judge: not good enough: {'; '.join(report.failures())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
