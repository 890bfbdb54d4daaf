"""Scores against loops, the judge against real and spoiled digits, images against their expected
pixels.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from diffmoe.data.digits import write_digits
from diffmoe.data.reader import ShardReader
from diffmoe.data.shards import ShardMeta, load_index, write_shards
from diffmoe.errors import UserError
from diffmoe.evaluation import scores
from diffmoe.evaluation.judge import JudgeReport, judge, main
from diffmoe.evaluation.plots import GRID_GAP, class_columns, expert_load, image_grid, loss_curve
from diffmoe.evaluation.scores import nearest_distances, precision_recall


def brute_share_inside(query: np.ndarray, centres: np.ndarray, k: int) -> float:
    def distance(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.sqrt(((a - b) ** 2).sum()))

    radii = [
        sorted(distance(c, o) for j, o in enumerate(centres) if j != i)[k - 1]
        for i, c in enumerate(centres)
    ]
    return np.mean([any(distance(q, c) <= r for c, r in zip(centres, radii)) for q in query])


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("chunk", [1 << 22, 100])
def test_precision_recall_against_loops(
    monkeypatch: pytest.MonkeyPatch, k: int, chunk: int
) -> None:
    monkeypatch.setattr(scores, "_CHUNK_ENTRIES", chunk)
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(40, 3)), 0.6 * rng.normal(size=(31, 3)) + 1.0
    precision, recall = precision_recall(real, fake, k=k)
    assert precision == pytest.approx(brute_share_inside(fake, real, k))
    assert recall == pytest.approx(brute_share_inside(real, fake, k))
    assert 0 < recall < precision < 1


def test_precision_recall_of_known_cases() -> None:
    points = np.random.default_rng(1).normal(size=(50, 2))
    assert precision_recall(points, points) == (1.0, 1.0)
    assert precision_recall(points, points + 100) == (0.0, 0.0)
    one_mode = points[0] + 1e-3 * np.random.default_rng(2).normal(size=(50, 2))
    precision, recall = precision_recall(points, one_mode)
    assert precision == 1.0 and recall < 0.1
    with pytest.raises(UserError, match=r"fake has 3 points and needs more than k \(3\)"):
        precision_recall(points, points[:3])
    with pytest.raises(UserError, match="same d"):
        precision_recall(points, points[:, :1])
    with pytest.raises(UserError, match="fake holds 1 values"):
        precision_recall(points, np.where(np.arange(100).reshape(50, 2) == 7, np.nan, points))


def test_nearest_distances_against_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "_CHUNK_ENTRIES", 30)
    rng = np.random.default_rng(3)
    query, reference = rng.normal(size=(17, 4)), rng.normal(size=(9, 4))
    expected = [min(np.linalg.norm(q - r) for r in reference) for q in query]
    np.testing.assert_allclose(nearest_distances(query, reference), expected)
    with pytest.raises(UserError, match="reference .0 points."):
        nearest_distances(query, reference[:0])


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    """500 real digits as the model would return them, and their labels."""
    images, labels = load_digits(return_X_y=True)
    return (images[:500].reshape(-1, 1, 8, 8) / 8 - 1).astype(np.float32), labels[:500]


def test_judge_knows_real_digits_and_calls_them_copies(
    digits: tuple[np.ndarray, np.ndarray],
) -> None:
    images, labels = digits
    report = judge(1.5 * (images + 1) - 1, labels)  # brighter than white: must be clipped
    assert report.accuracy < 1.0
    report = judge(images, labels)
    assert report.accuracy > 0.98 and report.real_accuracy > 0.95
    assert report.precision == 1.0 and report.recall > 0.6
    assert report.median_nn_generated == 0.0 and report.median_nn_real > 5.0
    assert [line.split(" ")[0] for line in report.failures()] == ["median_nn_generated"]
    assert (
        report.format().splitlines()[-1]
        == f"judge: {100 * report.accuracy:.1f} % of 500 digits are what was asked"
    )


def test_judge_sees_wrong_labels_noise_and_one_mode(digits: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = digits
    assert judge(images, np.random.default_rng(0).permutation(labels)).accuracy < 0.25
    noise = judge(np.random.default_rng(0).uniform(-1, 1, images.shape), labels)
    assert noise.precision < 0.05 and noise.accuracy < 0.25
    zeros = np.flatnonzero(labels == 0)
    one_class = judge(images[zeros], labels[zeros])
    assert one_class.accuracy > 0.95 and one_class.recall < 0.2


def test_judge_clips(digits: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = digits
    stretched = np.where(
        np.abs(images) == 1, 5 * images, images
    )  # black and white far out of range
    assert judge(stretched, labels) == judge(images, labels)


def test_judge_refuses_what_it_cannot_judge(digits: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = digits
    with pytest.raises(UserError, match="must be"):
        judge(images, labels[:-1])
    with pytest.raises(UserError, match=r"asked \(1\.\.10\)"):
        judge(images, labels + 1)
    spoiled = images.copy()
    spoiled[3, 0, 0, 0] = np.nan
    with pytest.raises(UserError, match="1 of 500"):
        judge(spoiled, labels)


def test_report_thresholds() -> None:
    good = {
        "accuracy": 0.97,
        "real_accuracy": 0.99,
        "precision": 0.5,
        "recall": 0.6,
        "median_nn_generated": 18.0,
        "median_nn_real": 20.0,
        "count": 500,
    }
    assert JudgeReport(**good).failures() == []
    for name in ("accuracy", "precision", "recall", "median_nn_generated"):
        worse = JudgeReport(**(good | {name: good[name] * 0.99}))
        assert [line.split(" ")[0] for line in worse.failures()] == [name]


def test_judge_command_line(
    tmp_path: Path, digits: tuple[np.ndarray, np.ndarray], capsys: pytest.CaptureFixture[str]
) -> None:
    images, labels = digits
    np.savez(tmp_path / "samples.npz", images=images, labels=labels)
    arguments = [str(tmp_path / "samples.npz"), "--json", str(tmp_path / "out.json")]
    assert main(arguments) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("% of 500 digits are what was asked")
    assert json.loads((tmp_path / "out.json").read_text())["count"] == 500
    assert main([*arguments, "--require"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "median_nn_generated (0.000) is below" in error
    np.savez(tmp_path / "samples.npz", arr_0=images)
    assert main(arguments) == 2
    assert "lacks images and labels" in capsys.readouterr().err


def squares(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Colour images [n, 3, 12, 12] of 0..255 with a bright square in the corner of their class."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, count)
    images = rng.integers(0, 120, (count, 3, 12, 12))
    for image, label in zip(images, labels):
        top, left = 6 * (label // 2), 6 * (label % 2)
        image[:, top : top + 6, left : left + 6] += 130
    return images.astype(np.uint8), labels


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Pixel shards of squares to train with, and of others that are held out."""
    folders = []
    for seed, (name, count) in enumerate((("train", 1500), ("held_out", 500))):
        folder = tmp_path_factory.mktemp("squares") / name
        pairs = zip(*squares(count, seed))
        samples = ((f"{i:05d}", image, int(label)) for i, (image, label) in enumerate(pairs))
        meta = ShardMeta("pixels", 4, scale=1 / 127.5, mean=127.5)
        write_shards(samples, folder, samples_per_shard=500, meta=meta)
        folders.append(folder)
    return folders[0], folders[1]


@pytest.mark.full
def test_judge_by_shards(shards: tuple[Path, Path]) -> None:
    images, labels = squares(200, 7)
    x = images / 127.5 - 1
    before = torch.random.get_rng_state()
    report = judge(x, labels, *shards)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert report.what == "images" and report.count == 200
    assert report.real_accuracy > 0.98 and report.accuracy > 0.98
    assert report.median_nn_generated == pytest.approx(report.median_nn_real, rel=0.05)
    share = f"{100 * report.accuracy:.1f} %"
    assert report.format().endswith(f"judge: {share} of 200 images are what was asked")
    assert "nearest training image " in report.format()
    wrong = judge(x, (labels + 1) % 4, *shards)
    assert wrong.accuracy < 0.02
    assert any(line.startswith("accuracy") and "below 0.850" in line for line in wrong.failures())
    known = ShardReader(load_index(shards[0]), seed=0).read(range(200))
    copies = judge(*known, *shards)
    assert copies.median_nn_generated < 1e-2
    assert [line.split(" ")[0] for line in copies.failures()] == ["median_nn_generated"]


@pytest.mark.full
def test_judge_by_shards_refuses(shards: tuple[Path, Path], digits, tmp_path, capsys) -> None:
    images, labels = squares(20, 7)
    x = images / 127.5 - 1
    with pytest.raises(UserError, match=r"images \(20, 1, 12, 12\) must be \[n, 3, 12, 12\]"):
        judge(x[:, :1], labels, *shards)
    with pytest.raises(UserError, match=r"asked \(4..7\) must lie in 0..3"):
        judge(x, np.arange(20) % 4 + 4, *shards)
    write_digits(tmp_path / "digits")
    with pytest.raises(UserError, match=r"\(\(3, 12, 12\), 4 classes\) and .*\(\(1, 8, 8\), 10 cl"):
        judge(x, labels, shards[0], tmp_path / "digits")
    pairs = zip(*squares(600, 3))
    mixed = ((f"{i:05d}", image, i * 7 % 4) for i, (image, _) in enumerate(pairs))
    meta = ShardMeta("pixels", 4, scale=1 / 127.5, mean=127.5)
    write_shards(mixed, tmp_path / "mixed", samples_per_shard=600, meta=meta)
    with pytest.raises(UserError, match=r"accuracy on real images \(0.*\) must be above 0.9"):
        judge(x, labels, tmp_path / "mixed", tmp_path / "mixed")
    np.savez(tmp_path / "samples.npz", images=x, labels=labels)
    samples = str(tmp_path / "samples.npz")
    assert main([samples, "--train", str(shards[0])]) == 2
    assert f"--train ({shards[0]}) and --held-out (None) go together" in capsys.readouterr().err
    both = ["--train", str(shards[0]), "--held-out", str(shards[1])]
    assert main([samples, *both, "--json", str(tmp_path / "out.json")]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["what"] == "images"


def test_image_grid_keeps_every_value(tmp_path: Path) -> None:
    images = np.linspace(-1.2, 1.2, 5 * 3 * 2 * 4, dtype=np.float32).reshape(5, 3, 2, 4)
    image_grid(images, 2, tmp_path / "rgb.png", upscale=3)
    grid = np.asarray(Image.open(tmp_path / "rgb.png"))
    assert grid.shape == (3 * (6 + GRID_GAP) + GRID_GAP, 2 * (12 + GRID_GAP) + GRID_GAP, 3)
    top, left = 2 * GRID_GAP + 6, 2 * GRID_GAP + 12  # image 3: second row, second column
    cell = grid[top : top + 6, left : left + 12]
    expected = np.rint((images[3].clip(-1, 1) + 1) * 127.5).transpose(1, 2, 0)
    assert np.array_equal(cell, expected.repeat(3, axis=0).repeat(3, axis=1))


@pytest.mark.parametrize(
    ("columns", "classes", "sheet"),
    [(10, 10, 10), (10, 1000, 10), (10, 3, 9), (10, 4, 8), (10, 2, 10), (10, 1, 10), (4, 3, 3)],
)
def test_a_column_is_of_one_class(columns: int, classes: int, sheet: int) -> None:
    assert class_columns(columns, classes) == sheet


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGB"), (768, "RGB")])
def test_image_grid_channels(tmp_path: Path, channels: int, mode: str) -> None:
    image_grid(np.zeros((2, channels, 4, 4)), 2, tmp_path / "grid.png", upscale=1)
    assert Image.open(tmp_path / "grid.png").mode == mode
    with pytest.raises(UserError, match="C 1, 3 or more"):
        image_grid(np.zeros((2, 2, 4, 4)), 2, tmp_path / "grid.png")


def test_loss_curve_takes_gaps_and_missing_values(tmp_path: Path) -> None:
    records: list[dict] = [
        {"step": step, "loss": 1 / (step + 1), "lr": 1e-3} for step in range(0, 200, 2)
    ]
    records[7] |= {"loss": float("nan"), "lr": None}
    records[9:40] = [
        {"step": 18, "predictor_loss": 0.5, "trivial_predictor_loss": 0.6},
        {"note": "no step"},
    ]
    loss_curve(records, tmp_path / "full.png")
    loss_curve([{"step": 1, "loss": 2.0}], tmp_path / "one.png")
    full, one = (Image.open(tmp_path / name) for name in ("full.png", "one.png"))
    assert full.size == (1200, 1200) and one.size == (1200, 540)
    assert len(np.unique(np.asarray(full.convert("L")))) > 20
    with pytest.raises(UserError, match="finite loss"):
        loss_curve([{"step": 1, "loss": float("inf")}], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_expert_load_image(tmp_path: Path) -> None:
    load = np.random.default_rng(0).gamma(4, 0.25, (5, 10, 8))
    load[2, 3] = np.nan
    expert_load(load, tmp_path / "load.png", [f"layer {i}" for i in range(5)])
    assert Image.open(tmp_path / "load.png").size == (
        int((1.6 + 2.5 * 3) * 150),
        int((1.5 + 2.3 * 2) * 150),
    )
    expert_load(load[2:3, 3:4], tmp_path / "empty.png", ["nothing seen"])
    with pytest.raises(UserError, match="4 layer_names"):
        expert_load(load, tmp_path / "load.png", ["a", "b", "c", "d"])


def test_plots_leave_pyplot_alone(tmp_path: Path) -> None:
    before = "matplotlib.pyplot" in sys.modules and sys.modules["matplotlib.pyplot"].get_fignums()
    loss_curve([{"step": 1, "loss": 2.0}], tmp_path / "one.png")
    assert (
        "matplotlib.pyplot" in sys.modules and sys.modules["matplotlib.pyplot"].get_fignums()
    ) == before
