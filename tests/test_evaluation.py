"""Scores against closed forms and loops, feature networks, references, and whole evaluations on 1,
2 and 4 ranks.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn

from diffmoe.checkpoints.reader import ema_kind
from diffmoe.checkpoints.writer import save_start
from diffmoe.code_version import commit
from diffmoe.commands import evaluate as command
from diffmoe.config import Config, load_config
from diffmoe.data.digits import write_digits
from diffmoe.data.shards import ShardMeta, write_shards
from diffmoe.errors import UserError
from diffmoe.evaluation import decoding, scored_images
from diffmoe.evaluation.card import Card, card_from_json, versions
from diffmoe.evaluation.decoding import Decoder
from diffmoe.evaluation.evaluate import SAMPLES_NAME, evaluate
from diffmoe.evaluation.features import (
    Extractor,
    Features,
    digits_extractor,
    load_extractor,
    to_uint8,
)
from diffmoe.evaluation.image_sources import ImageSource, open_images
from diffmoe.evaluation.reference_statistics import (
    Reference,
    load_reference,
    measure_reference,
    save_reference,
)
from diffmoe.evaluation.scored_images import Subject, class_labels, sampled_images
from diffmoe.evaluation.scores import (
    Gaussian,
    Moments,
    Scores,
    frechet_distance,
    inception_score_of,
    merge,
    merge_over,
    moments_of,
    precision_recall,
    split_numbers,
    split_totals,
)
from diffmoe.files import sha256
from diffmoe.layout import Layout
from diffmoe.models.dit import DiT
from diffmoe.models.logical import initialize, logical_tensors, weights_digest
from diffmoe.parallel.collectives import sum_over
from diffmoe.parallel.groups import Group, single_process
from diffmoe.parallel.spawn import Ranks

CPU = torch.device("cpu")
ALONE = single_process().world


# --------------------------------------------------------------------------------------------------
# scores


def random_gaussian(rng: np.random.Generator, width: int) -> tuple[np.ndarray, np.ndarray]:
    factor = rng.normal(size=(width, width))
    return rng.normal(size=width), factor @ factor.T / width


def test_frechet_distance_closed_forms() -> None:
    rng = np.random.default_rng(0)
    mean, covariance = random_gaussian(rng, 12)
    assert frechet_distance(
        Gaussian(mean, covariance), Gaussian(mean, covariance)
    ) == pytest.approx(0, abs=1e-12)
    shift = rng.normal(size=12)
    assert frechet_distance(
        Gaussian(mean + shift, covariance), Gaussian(mean, covariance)
    ) == pytest.approx(shift @ shift)
    # Covariances that commute: the sum of (standard deviation differences)².
    basis, _ = np.linalg.qr(rng.normal(size=(12, 12)))
    first, second = rng.uniform(0, 3, 12), rng.uniform(0, 3, 12)
    second[:5] = 0  # singular
    expected = ((np.sqrt(first) - np.sqrt(second)) ** 2).sum() + shift @ shift
    got = frechet_distance(
        Gaussian(mean, (basis * first) @ basis.T),
        Gaussian(mean + shift, (basis * second) @ basis.T),
    )
    assert got == pytest.approx(expected, rel=1e-9)
    # Two dimensions, any covariances: tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)).
    one, two = random_gaussian(rng, 2)[1], random_gaussian(rng, 2)[1]
    product = one @ two
    trace = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    zero = np.zeros(2)
    assert frechet_distance(Gaussian(zero, one), Gaussian(zero, two)) == pytest.approx(
        np.trace(one) + np.trace(two) - 2 * trace, rel=1e-9
    )
    assert frechet_distance(Gaussian(zero, one), Gaussian(zero, two)) == pytest.approx(
        frechet_distance(Gaussian(zero, two), Gaussian(zero, one))
    )


def test_frechet_distance_of_identical_singular_covariances_is_zero() -> None:
    thin = np.random.default_rng(1).normal(size=(100, 3))
    covariance = thin @ thin.T  # rank 3 of 100: the eigenvalues of C1 C2 alone would leave 1e-5
    assert (
        frechet_distance(Gaussian(np.zeros(100), covariance), Gaussian(np.zeros(100), covariance))
        < 1e-6
    )


def test_frechet_distance_refuses_what_is_no_gaussian() -> None:
    mean, covariance = np.zeros(3), np.eye(3)
    with pytest.raises(UserError, match=r"\(3,\) does not fit the reference's mean of \(4,\)"):
        frechet_distance(Gaussian(mean, covariance), Gaussian(np.zeros(4), np.eye(4)))
    with pytest.raises(UserError, match="second covariance .4, 4. does not fit"):
        frechet_distance(Gaussian(mean, covariance), Gaussian(mean, np.eye(4)))
    with pytest.raises(UserError, match="first covariance must be positive"):
        frechet_distance(Gaussian(mean, np.diag([1.0, 1.0, -0.1])), Gaussian(mean, covariance))
    with pytest.raises(UserError, match="symmetric"):
        frechet_distance(
            Gaussian(mean, np.array([[1, 0.5, 0], [0, 1, 0], [0, 0, 1]])),
            Gaussian(mean, covariance),
        )
    with pytest.raises(UserError, match="second covariance holds 1 values"):
        frechet_distance(Gaussian(mean, covariance), Gaussian(mean, np.diag([1.0, np.nan, 1.0])))


def test_moments_in_any_cut_are_numpys() -> None:
    x = (
        np.random.default_rng(2).normal(size=(203, 7)) + 1e6
    )  # sums of squares would lose the covariance here
    for batch in (1, 64, 203):
        parts = [moments_of(x[start : start + batch]) for start in range(0, len(x), batch)]
        total = moments_of(x[:0])
        for part in reversed(parts):
            total = merge(total, part)
        assert total.count == 203
        np.testing.assert_allclose(total.mean, x.mean(axis=0), rtol=1e-14)
        np.testing.assert_allclose(
            total.gaussian().covariance, np.cov(x, rowvar=False), rtol=1e-8, atol=1e-9
        )
    with pytest.raises(UserError, match=r"samples \(7\) must be at least feature width \+ 1 \(8\)"):
        moments_of(x[:7]).gaussian()
    with pytest.raises(UserError, match="width 7 and 6"):
        merge(total, moments_of(x[:, :6]))
    with pytest.raises(UserError, match="features holds 1 values"):
        moments_of(np.where(np.arange(14).reshape(2, 7) == 3, np.nan, 1.0))


def inception_score(p: np.ndarray, splits: int = 1) -> tuple[float, float]:
    """Of all samples at once."""
    return inception_score_of(split_totals(p, split_numbers(range(len(p)), len(p), splits), splits))


def brute_inception_score(p: np.ndarray, splits: int) -> tuple[float, float]:
    scores = []
    for part in np.array_split(p, splits):
        marginal = part.mean(axis=0)
        divergences = [
            sum(q * np.log(q / m) for q, m in zip(row, marginal) if q > 0) for row in part
        ]
        scores.append(np.exp(np.mean(divergences)))
    return float(np.mean(scores)), float(np.std(scores))


@pytest.mark.parametrize("splits", [1, 4, 10])
def test_inception_score_against_loops_in_any_cut(splits: int) -> None:
    rng = np.random.default_rng(3)
    p = rng.dirichlet(np.full(6, 0.3), size=120)
    p[:9] = np.eye(6)[rng.integers(0, 6, 9)]  # exact zeros
    expected = brute_inception_score(p, splits)
    assert inception_score(p, splits) == pytest.approx(expected)
    totals = split_totals(p[:0], split_numbers(range(0), 120, splits), splits)
    for start in range(0, 120, 37):
        part = range(start, min(120, start + 37))
        totals = totals + split_totals(
            p[part.start : part.stop], split_numbers(part, 120, splits), splits
        )
    assert inception_score_of(totals) == pytest.approx(expected)


def test_inception_score_extremes_and_refusals() -> None:
    assert inception_score(np.full((50, 8), 1 / 8))[0] == pytest.approx(1)
    assert inception_score(np.eye(8))[0] == pytest.approx(8)
    with pytest.raises(UserError, match=r"splits \(4\) must not exceed the samples \(3\)"):
        inception_score(np.eye(3), splits=4)
    with pytest.raises(UserError, match="worst 1.5"):
        inception_score(np.array([[0.5, 0.5], [1.0, 0.5]]))
    with pytest.raises(UserError, match="not finite"):
        inception_score(np.array([[np.nan, 0.5]]))


def test_precision_recall_of_wide_features_against_loops() -> None:
    rng = np.random.default_rng(4)
    real, fake = rng.normal(size=(60, 80)), 0.97 * rng.normal(size=(45, 80)) + 0.1
    for query, centres, got in ((fake, real, 0), (real, fake, 1)):
        radii = [sorted(np.linalg.norm(c - o) for o in centres)[3] for c in centres]
        inside = [any(np.linalg.norm(q - c) <= r for c, r in zip(centres, radii)) for q in query]
        assert precision_recall(real, fake)[got] == pytest.approx(np.mean(inside))
    assert precision_recall(real, real) == (1.0, 1.0)


# -------------------------------------------------------------------------------------------
# feature networks


class ScriptLayer(nn.Module):
    def __init__(self, channels: int, out: int, size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, size, stride=size)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x))


class ScriptMixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = ScriptLayer(8, 9, 1)
        self.other = ScriptLayer(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.conv(x), self.other(x)], dim=1)


class ScriptInception(nn.Module):
    """Inception's outside and inner names; the resize is written as TensorFlow's kernel is, pixel
    by pixel.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential()
        self.layers.add_module("conv", ScriptLayer(3, 8, 17))
        self.layers.add_module("mixed_6", ScriptMixed())
        self.layers.add_module("pool2", nn.AdaptiveAvgPool2d(1))
        self.output = nn.Linear(11, 5)
        self.offset = 128.0

    def places(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        place = torch.arange(299) * (size / 299.0)
        low = place.floor().long()
        return low, (low + 1).clamp(max=size - 1), place - low

    def forward(
        self, img: Tensor, return_features: bool = False, no_output_bias: bool = False
    ) -> Tensor:
        top, bottom, down = self.places(img.shape[2])
        left, right, across = self.places(img.shape[3])
        x = img.float()
        x = x[:, :, top] * (1 - down)[:, None] + x[:, :, bottom] * down[:, None]
        x = x[:, :, :, left] * (1 - across) + x[:, :, :, right] * across
        features = self.layers((x - self.offset) / 128.0).flatten(1)
        if return_features:
            return features
        logits = features @ self.output.weight.t()
        return (logits if no_output_bias else logits + self.output.bias).softmax(dim=1)


def scripted(folder: Path, **changes: float) -> Path:
    torch.manual_seed(0)
    network = ScriptInception()
    for name, value in changes.items():
        setattr(network, name, value)
    path = folder / "inception.pt"
    torch.jit.script(network).save(str(path))
    return path


def random_images(count: int, size: int = 8, seed: int = 0) -> Tensor:
    return torch.from_numpy(
        np.random.default_rng(seed).integers(0, 256, (count, 3, size, size), np.uint8)
    )


def test_torchscript_extractor_gives_all_three(tmp_path: Path) -> None:
    path = scripted(tmp_path)
    extractor, module, images = (
        load_extractor(path),
        torch.jit.load(str(path)),
        random_images(4, 32),
    )
    features = extractor(images)
    np.testing.assert_allclose(
        features.pool, module(images, return_features=True).detach(), rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(
        features.probabilities, module(images, no_output_bias=True).detach(), rtol=1e-4
    )
    assert features.spatial.shape == (4, 17 * 17 * 7)
    # ADM flattens [height, width, channel]; the pool layer is the mean over places.
    np.testing.assert_allclose(
        features.spatial.reshape(4, 289, 7).mean(axis=1), features.pool[:, :7], rtol=1e-4, atol=1e-6
    )
    assert extractor.name == "inception.pt" and len(extractor.sha256) == 64


def test_torchscript_extractor_refusals(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist, and nothing is downloaded .*f58cb9b6ec32"):
        load_extractor(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("no network")
    with pytest.raises(UserError, match="not TorchScript"):
        load_extractor(tmp_path / "text.pt")
    with pytest.raises(UserError, match="layers one by one .* not inception-2015-12-05.pt"):
        load_extractor(scripted(tmp_path, offset=100.0))


def test_plain_torchscript_gives_pool_features_only(tmp_path: Path) -> None:
    class Plain(nn.Module):
        def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
            return img.float().mean(dim=(2, 3))

    torch.jit.script(Plain()).save(str(tmp_path / "plain.pt"))
    features = load_extractor(tmp_path / "plain.pt")(random_images(3))
    assert (
        features.pool.shape == (3, 3)
        and features.spatial is None
        and features.probabilities is None
    )


def test_extractor_checks_images_and_features() -> None:
    bad = Extractor("bad", "", lambda images: Features(np.full((len(images), 2), np.nan)))
    with pytest.raises(
        UserError, match="extractor bad: pool .3, 2. holds 6 values that are not finite"
    ):
        bad(random_images(3))
    short = Extractor("short", "", lambda images: Features(np.zeros((1, 2))))
    with pytest.raises(UserError, match=r"must be \[3, d\]"):
        short(random_images(3))
    with pytest.raises(UserError, match=r"must be uint8 \[B, 3, H, W\]"):
        short(random_images(3).float())


def test_to_uint8() -> None:
    levels = torch.arange(256, dtype=torch.float32).view(1, 1, 16, 16)
    images = to_uint8((levels - 127.5) / 127.5)
    assert images.shape == (1, 3, 16, 16) and torch.equal(images[0, 2].float(), levels[0, 0])
    assert (
        to_uint8(torch.tensor([-3.0, 3.0]).view(2, 1, 1, 1)).flatten().tolist()
        == [0] * 3 + [255] * 3
    )
    with pytest.raises(UserError, match="1 of 2 images"):
        to_uint8(torch.tensor([0.0, float("nan")]).view(2, 1, 1, 1))
    with pytest.raises(UserError, match="latents need a decoder"):
        to_uint8(torch.zeros(1, 4, 2, 2))


def test_digits_extractor_is_deterministic_and_knows_digits() -> None:
    first, second = digits_extractor(), digits_extractor()
    pixels, labels = load_digits(return_X_y=True)
    images = to_uint8(torch.from_numpy(pixels.reshape(-1, 1, 8, 8) / 8 - 1))
    features = first(images)
    assert first.sha256 == second.sha256
    assert all(
        np.array_equal(a, b)
        for a, b in zip(features.parts().values(), second(images).parts().values())
    )
    assert [value.shape[1] for value in features.parts().values()] == [32, 64, 10]
    assert np.mean(features.probabilities.argmax(axis=1) == labels) > 0.93
    np.testing.assert_allclose(features.spatial, pixels, atol=0.05)
    np.testing.assert_allclose(
        np.concatenate([first(images[:5]).pool, first(images[5:9]).pool]),
        features.pool[:9],
        atol=1e-9,
    )
    with pytest.raises(UserError, match="8, 8"):
        first(random_images(2, 16))


# -------------------------------------------------------------------------------------------------
# references


def tiny_extractor(width: int = 4) -> Extractor:
    """Exact and quick: means of rows as pool, pixels of a corner as spatial, two classes."""

    def extract(images: Tensor) -> Features:
        x = images.double().numpy() / 255
        bright = x.mean(axis=(1, 2, 3))
        return Features(
            x[:, 0, :, :width].mean(axis=1),
            x[:, 1, :2, :2].reshape(len(x), 4),
            np.stack([bright, 1 - bright], axis=1),
        )

    return Extractor("tiny", f"tiny-{width}", extract)


def save_folder(images: Tensor, folder: Path) -> None:
    (folder / "sub").mkdir(parents=True)
    for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image).save(folder / ("sub" if i >= 20 else ".") / f"{i:03d}.png")
    (folder / "README.txt").write_text("not an image")


def assert_same(first: Reference, second: Reference) -> None:
    for one, two in ((first.pool, second.pool), (first.spatial, second.spatial)):
        np.testing.assert_allclose(one.mean, two.mean, atol=1e-12)
        np.testing.assert_allclose(one.covariance, two.covariance, atol=1e-12)
    np.testing.assert_array_equal(first.features, second.features)
    assert (first.count, first.extractor) == (second.count, second.extractor)


def test_reference_from_folder_equals_npz_and_saved(tmp_path: Path) -> None:
    images, extractor = random_images(30), tiny_extractor()
    save_folder(images, tmp_path / "images")
    np.savez(tmp_path / "images.npz", arr_0=images.permute(0, 2, 3, 1).numpy())
    np.savez_compressed(tmp_path / "packed.npz", arr_0=images.permute(0, 2, 3, 1).numpy())
    folder, npz, packed = (
        load_reference(tmp_path / name, extractor, ALONE, CPU, batch=batch)
        for name, batch in (("images", 7), ("images.npz", 30), ("packed.npz", 4))
    )
    expected = extractor(images)
    np.testing.assert_allclose(
        folder.pool.covariance, np.cov(expected.pool, rowvar=False), atol=1e-12
    )
    np.testing.assert_allclose(folder.spatial.mean, expected.spatial.mean(axis=0), atol=1e-12)
    assert_same(folder, npz)
    assert_same(folder, packed)
    assert folder.sha256 == npz.sha256 and folder.count == 30
    save_reference(folder, tmp_path / "saved.npz")
    saved = load_reference(tmp_path / "saved.npz", extractor, ALONE, CPU)
    assert_same(folder, saved)
    with pytest.raises(
        UserError, match="measured with extractor tiny-4, this run uses tiny tiny-3"
    ):
        load_reference(tmp_path / "saved.npz", tiny_extractor(3), ALONE, CPU)
    with np.load(tmp_path / "saved.npz") as archive:
        spoiled = {name: archive[name] for name in archive.files}
    spoiled["mu"][0] += 1
    np.savez(tmp_path / "spoiled.npz", **spoiled)
    with pytest.raises(UserError, match="hash of its content"):
        load_reference(tmp_path / "spoiled.npz", extractor, ALONE, CPU)


def test_adm_reference_has_its_statistics_and_features_of_its_images(tmp_path: Path) -> None:
    rng, images, extractor = np.random.default_rng(5), random_images(12), tiny_extractor()
    (mu, sigma), (mu_s, sigma_s) = random_gaussian(rng, 4), random_gaussian(rng, 4)
    np.savez(
        tmp_path / "adm.npz",
        mu=mu,
        sigma=sigma,
        mu_s=mu_s.astype(np.float32),
        sigma_s=sigma_s,
        arr_0=images.permute(0, 2, 3, 1).numpy(),
    )
    reference = load_reference(tmp_path / "adm.npz", extractor, ALONE, CPU)
    np.testing.assert_array_equal(reference.pool.mean, mu)
    assert reference.spatial.mean.dtype == np.float64 and reference.count is None
    np.testing.assert_array_equal(reference.features, extractor(images).pool)
    np.savez(tmp_path / "bare.npz", mu=mu, sigma=sigma)
    bare = load_reference(tmp_path / "bare.npz", extractor, ALONE, CPU)
    assert bare.features is None and bare.spatial is None


def test_reference_from_shards_and_refusals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_digits(tmp_path / "digits")
    extractor = digits_extractor()
    reference = load_reference(tmp_path / "digits", extractor, ALONE, CPU, batch=500)
    pixels = load_digits().data
    np.testing.assert_allclose(reference.spatial.mean, pixels.mean(axis=0), atol=0.02)
    assert reference.count == len(reference.features) == 1797
    monkeypatch.setattr("diffmoe.evaluation.reference_statistics.NEIGHBOUR_FEATURES", 100)
    few = load_reference(tmp_path / "digits", extractor, ALONE, CPU, batch=77)
    np.testing.assert_allclose(few.features, reference.features[::18], atol=1e-9)
    images = random_images(4)
    np.savez(tmp_path / "few.npz", arr_0=images.permute(0, 2, 3, 1).numpy())
    with pytest.raises(
        UserError,
        match=r"few.npz: its images \(4\) must be at least the pool features' width \+ 1 "
        r"\(5\)",
    ):
        load_reference(tmp_path / "few.npz", tiny_extractor(), ALONE, CPU)
    np.savez(tmp_path / "floats.npz", arr_0=np.zeros((4, 8, 8, 3)))
    with pytest.raises(UserError, match=r"float64 \(4, 8, 8, 3\)\) must be uint8"):
        open_images(tmp_path / "floats.npz")
    np.savez(tmp_path / "other.npz", images=np.zeros(3))
    with pytest.raises(UserError, match="not arr_0 and not mu"):
        load_reference(tmp_path / "other.npz", tiny_extractor(), ALONE, CPU)
    with pytest.raises(UserError, match="does not exist"):
        load_reference(tmp_path / "nowhere", tiny_extractor(), ALONE, CPU)
    (tmp_path / "sizes").mkdir()
    for size in (8, 9):
        Image.new("L", (size, 8)).save(tmp_path / "sizes" / f"{size}.png")
    with pytest.raises(UserError, match="9.png is 9 x 8, 8.png is 8 x 8"):
        load_reference(tmp_path / "sizes", tiny_extractor(), ALONE, CPU)
    (tmp_path / "sizes" / "9.png").write_text("broken")
    with pytest.raises(UserError, match="9.png cannot be read"):
        load_reference(tmp_path / "sizes", tiny_extractor(), ALONE, CPU)


# ------------------------------------------------------------------------------------------- whole
# evaluations

COUNT, BATCH = 70, 16


def setting(routing: str = "batch", **sample: object) -> tuple[DiT, Config]:
    overrides = {"steps": 2, "batch": BATCH, "routing": routing, **sample}
    config = load_config(
        None,
        [
            "model.width=16",
            "model.heads=2",
            "model.depth=2",
            "model.input_size=8",
            "model.channels=1",
            "model.classes=10",
            "model.learn_sigma=false",
            "moe.experts=4",
            "moe.pool=rank",
            *(f"sample.{k}={v}" for k, v in overrides.items()),
        ],
    )
    model = DiT(config.model, config.moe, time_scale=config.diffusion.time_scale)
    initialize(model, 0)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval(), config


def run_once(
    out: Path,
    world=ALONE,
    *,
    extractor: Extractor | None = None,
    reference: Reference | None = None,
    count: int = COUNT,
    labels: str = "balanced",
    model: DiT | None = None,
    **changes: object,
) -> Card | None:
    made, config = setting()
    extractor = extractor or tiny_extractor()
    if reference is None:
        images = random_images(50, seed=9)
        source = ImageSource("noise", len(images), (8, 8), lambda start, stop: images[start:stop])
        reference = measure_reference(source, extractor, world, CPU, batch=8)
    images = sampled_images(
        model or made, config, Subject("run/step_00000008", 8, "ema"), count, labels, CPU
    )
    return evaluate(images, reference, extractor, out, world, CPU, **changes)


@functools.lru_cache
def first_ranks(size: int) -> Group | None:
    """The first ranks as a world of their own: starting processes is what takes the time here."""
    handle, rank = dist.new_group(list(range(size))), dist.get_rank()
    return Group(tuple(range(size)), rank, handle) if rank < size else None


def run_on_ranks(size: int, out: str, labels: str, count: int = COUNT) -> dict | str | None:
    world = first_ranks(size)
    if world is None:
        return None
    try:
        card = run_once(Path(out), world, labels=labels, count=count)
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return None if card is None else json.loads(card.to_json())


def merge_on_ranks(counts: list[int]) -> tuple[Moments, tuple[float, float]] | None:
    world = first_ranks(len(counts))
    if world is None:
        return None
    x = np.random.default_rng(6).normal(size=(sum(counts), 5)) + 1e3
    p = np.random.default_rng(7).dirichlet(np.ones(3), size=sum(counts))
    numbers = range(sum(counts[: world.index]), sum(counts[: world.index + 1]))
    rows = slice(numbers.start, numbers.stop)
    totals = split_totals(p[rows], split_numbers(numbers, sum(counts), 4), 4)
    totals = sum_over(torch.from_numpy(totals), world).numpy()
    return merge_over(moments_of(x[rows]), world), inception_score_of(totals)


@pytest.fixture(scope="module")
def ranks():
    with Ranks(4, timeout=120) as four:
        yield four


@pytest.mark.full
@pytest.mark.parametrize("counts", [[30, 3], [0, 33], [11, 0, 20, 2]])
def test_moments_and_totals_over_ranks_are_those_of_all(ranks, counts: list[int]) -> None:
    x = np.random.default_rng(6).normal(size=(33, 5)) + 1e3
    p = np.random.default_rng(7).dirichlet(np.ones(3), size=33)
    for moments, score in ranks.run(merge_on_ranks, counts)[: len(counts)]:
        np.testing.assert_allclose(
            moments.gaussian().covariance, np.cov(x, rowvar=False), rtol=1e-9, atol=1e-12
        )
        assert moments.count == 33 and score == pytest.approx(inception_score(p, 4))


def close(first: Scores, second: Scores) -> None:
    assert dataclasses.asdict(first) == pytest.approx(dataclasses.asdict(second), rel=1e-6)


@pytest.mark.full
def test_one_two_and_four_ranks_have_the_same_scores_and_images(tmp_path: Path, ranks) -> None:
    alone = run_once(tmp_path / "1", labels="random", splits=3)
    with np.load(tmp_path / "1" / SAMPLES_NAME) as samples:
        expected, labels = samples["arr_0"], samples["arr_1"]
    assert expected.dtype == np.uint8 and expected.shape == (COUNT, 8, 8, 3) and expected.std() > 10
    assert (
        labels.tolist() == class_labels("random", range(COUNT), 10, 0)
        and len(set(labels.tolist())) == 10
    )
    assert not (tmp_path / "1" / "chunks").exists()
    plain = run_once(tmp_path / "plain", labels="random")
    for world in (2, 4):
        tree, *others = ranks.run(run_on_ranks, world, str(tmp_path / str(world)), "random")
        assert others == [None] * 3 and tree["ranks"] == world
        close(card_from_json(json.dumps(tree)).scores, plain.scores)
        with np.load(tmp_path / str(world) / SAMPLES_NAME) as samples:
            np.testing.assert_array_equal(samples["arr_0"], expected)
    assert plain.scores.inception_score != alone.scores.inception_score  # 1 split, 3 splits


def test_scores_are_those_of_the_written_images(tmp_path: Path) -> None:
    extractor = tiny_extractor()
    card = run_once(tmp_path)
    with np.load(tmp_path / SAMPLES_NAME) as samples:
        images = torch.from_numpy(samples["arr_0"].transpose(0, 3, 1, 2).copy())
        assert samples["arr_1"].tolist() == [i % 10 for i in range(COUNT)]
    fake, real = extractor(images), extractor(random_images(50, seed=9))

    def distance(a: np.ndarray, b: np.ndarray) -> float:
        return frechet_distance(
            Gaussian(a.mean(axis=0), np.cov(a, rowvar=False)),
            Gaussian(b.mean(axis=0), np.cov(b, rowvar=False)),
        )

    precision, recall = precision_recall(real.pool, fake.pool)
    score, spread = brute_inception_score(fake.probabilities, 1)
    close(
        card.scores,
        Scores(
            distance(fake.pool, real.pool),
            distance(fake.spatial, real.spatial),
            score,
            spread,
            precision,
            recall,
        ),
    )
    # ADM's file of samples is itself a reference: the distance to oneself is 0.
    own = load_reference(tmp_path / SAMPLES_NAME, extractor, ALONE, CPU)
    again = run_once(tmp_path / "again", reference=own)
    assert (
        again.scores.frechet_distance < 1e-9
        and again.scores.precision == again.scores.recall == 1.0
    )


@pytest.mark.full
def test_restart_equals_undisturbed_and_skips_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks
) -> None:
    undisturbed = run_once(tmp_path / "whole")
    calls: list[int] = []
    real = scored_images.generate

    def counted(model, config, labels, numbers, device, others):
        calls.append(numbers[0])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(model, config, labels, numbers, device)

    monkeypatch.setattr(scored_images, "generate", counted)
    with pytest.raises(KeyboardInterrupt):
        run_once(tmp_path / "cut")
    for changes, complaint in (
        ({"count": 60}, "count 70, this run has 60"),
        ({"labels": "random"}, "labels 'balanced'"),
        ({"keep_samples": False}, "extractor None"),
    ):
        with pytest.raises(UserError, match=f"was begun with {complaint}"):
            run_once(tmp_path / "cut", **changes)
    other = setting()[0]
    with torch.no_grad():
        next(other.parameters()).flatten()[0] += 1
    with pytest.raises(UserError, match="was begun with weights_sha256"):
        run_once(tmp_path / "cut", model=other)
    assert [path.name for path in sorted((tmp_path / "cut" / "chunks").iterdir())] == [
        f"00000{i}.npz" for i in range(3)
    ]
    calls[:] = [0] * 10
    resumed = run_once(tmp_path / "cut")
    assert calls[10:] == [48, 64]
    close(resumed.scores, undisturbed.scores)
    assert (tmp_path / "cut" / SAMPLES_NAME).read_bytes() == (
        tmp_path / "whole" / SAMPLES_NAME
    ).read_bytes()
    assert (
        run_once(tmp_path / "cut") == resumed and len(calls) == 12
    )  # finished: nothing is done again
    # Another number of ranks finishes what one rank began.
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        run_once(tmp_path / "grown")
    tree = ranks.run(run_on_ranks, 4, str(tmp_path / "grown"), "balanced")[0]
    close(card_from_json(json.dumps(tree)).scores, undisturbed.scores)


def test_evaluate_refuses(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"count \(4\) must be at least the pool features' width \+ 1 \(5\)"
    ):
        run_once(tmp_path, count=4)
    with pytest.raises(UserError, match=r"splits \(71\) must lie in 1..count \(70\)"):
        run_once(tmp_path, splits=71)
    wide = Reference("x", "", None, Gaussian(np.zeros(6), np.eye(6)))
    with pytest.raises(UserError, match="its pool features have width 6, those of the extractor 4"):
        run_once(tmp_path / "wide", reference=wide)
    nan = Extractor("nan", "", lambda images: Features(np.full((len(images), 4), np.nan)))
    plain = Reference("x", "", None, Gaussian(np.zeros(4), np.eye(4)))
    with pytest.raises(UserError, match="extractor nan: pool .1, 4. holds 4 values"):
        run_once(tmp_path / "nan", extractor=nan, reference=plain)
    broken = setting()[0]
    with torch.no_grad():
        broken.final_layer.linear.bias.fill_(float("nan"))
    with pytest.raises(UserError, match="images 0..15: 16 of 16 samples are not finite"):
        run_once(tmp_path / "broken", model=broken, reference=plain)
    done = run_once(tmp_path / "done", reference=plain)
    path = tmp_path / "done" / "settings.json"
    there = json.loads(path.read_text())
    del there["diffusion"]["time_range"]  # as an older version left it
    path.write_text(json.dumps(there))
    assert run_once(tmp_path / "done", reference=plain) == done
    (tmp_path / "done" / "settings.json").unlink()
    with pytest.raises(UserError, match="card.json but no settings.json"):
        run_once(tmp_path / "done", reference=plain)


def test_a_mistake_is_the_same_error_on_every_rank(tmp_path: Path, ranks) -> None:
    answers = ranks.run(run_on_ranks, 4, str(tmp_path), "balanced", 4)
    assert len(set(answers)) == 1 and answers[0].startswith("AgreedError: count (4) must be")


def test_latents_pass_the_decoder(tmp_path: Path) -> None:
    model, config = setting()
    decoder = Decoder(
        "upsample",
        "abc",
        0.5,
        0.1,
        lambda z: to_uint8((z / 0.5 + 0.1).tanh().repeat_interleave(2, 2).repeat_interleave(2, 3)),
    )
    reference = Reference("x", "", None, Gaussian(np.zeros(4), np.eye(4)))
    subject = Subject("c", 1, "raw")
    images = sampled_images(model, config, subject, 20, "balanced", CPU, decoder)
    card = evaluate(images, reference, tiny_extractor(), tmp_path / "decoded", ALONE, CPU)
    assert (card.vae, card.vae_sha256, card.latent_scale, card.latent_shift) == (
        "upsample",
        "abc",
        0.5,
        0.1,
    )
    assert np.load(tmp_path / "decoded" / SAMPLES_NAME)["arr_0"].shape == (20, 16, 16, 3)
    assert (
        card.scores.spatial_frechet_distance is None
        and card.scores.precision is None
        and card.reference_count is None
    )
    assert "| sFD-tiny ↓ | not measured |" in (tmp_path / "decoded" / "card.md").read_text()
    latents = dataclasses.replace(config, model=dataclasses.replace(config.model, channels=4))
    with pytest.raises(UserError, match=r"model.channels \(4\) are latents"):
        sampled_images(model, latents, subject, 20, "balanced", CPU)


def test_a_decoder_takes_out_what_the_training_data_put_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of shards that encode did not make, whose index alone knows their scale."""
    vae = types.SimpleNamespace(name="vae", sha256="abc", scale=0.18, shift=0.0, latent_channels=4)
    monkeypatch.setattr(decoding, "load_vae", lambda path, device: vae)
    _, config = setting()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, channels=4))
    samples = ((f"{i}", np.zeros((8, 2, 2), np.float16), 0) for i in range(3))
    index = write_shards(
        samples, tmp_path, samples_per_shard=3, meta=ShardMeta("moments", 1, scale=0.2, mean=1.5)
    )
    for arguments, wanted in (
        ((index, None, None), (0.2, 1.5)),
        ((index, 0.3, None), (0.3, 1.5)),
        ((None, None, None), (0.18, 0.0)),
    ):
        decoder = decoding.open_decoder("vae", config, *arguments, CPU)
        assert (decoder.scale, decoder.shift) == wanted
    note = decoding.vae_note(config, decoding.Decoder("vae", "", (0.5, 2.0), 0.0, abs), index)
    assert note and note.endswith("latents have scale 0.5 to 2 by channel, shift 0")


class Grey(torch.nn.Module):
    """Decodes 768 channels: their mean, at twice the size; of small images what is no image."""

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.interpolate(z.view(-1, 768, z.shape[2], z.shape[3]), (8, 8))
        return x.mean(1, keepdim=True).expand(-1, 3 if z.shape[2] > 2 else 2, -1, -1)


def test_any_decoder_as_a_torchscript_file(tmp_path: Path) -> None:
    """Of latents with 768 channels, normalized by channel."""
    path, (_, config) = str(tmp_path / "decoder.pt"), setting()
    torch.jit.script(Grey()).save(path)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, channels=768))
    std, mean = np.linspace(0.1, 4, 768), np.linspace(-1, 1, 768)
    numbers = tuple(1 / std), tuple(mean)
    decoder = decoding.open_decoder(path, config, None, *numbers, CPU)
    z = torch.from_numpy(np.random.default_rng(0).normal(0, 0.1, (2, 768, 4, 4)))
    x = ((z.numpy() - mean.reshape(-1, 1, 1)) / std.reshape(-1, 1, 1)).astype(np.float32)
    expected = to_uint8(Grey()(z.float()))
    assert (decoder.function(torch.from_numpy(x)).int() - expected.int()).abs().max() <= 1
    assert (decoder.sha256, decoder.scale) == (sha256(path), numbers[0])
    for latents, message in (
        (torch.zeros(2, 768, 2, 2), r"must return images \[2, 3, H, W\], not \(2, 2, 8, 8\)"),
        (torch.zeros(1, 4, 4, 4), r"fails on latents \(1, 4, 4, 4\): .*shape"),
    ):
        with pytest.raises(UserError, match=message):
            decoding.open_decoder(path, config, None, 1.0, 0.0, CPU).function(latents)
    with pytest.raises(UserError, match="is a program, which no folder of a model holds"):
        decoding.open_vae(path, config, CPU).model.save_pretrained(tmp_path)
    (tmp_path / "text.pt").write_text("no network")
    with pytest.raises(UserError, match="text.pt. is not a TorchScript file: "):
        decoding.open_vae(tmp_path / "text.pt", config, CPU)


def test_card_names_everything_that_moves_the_score(tmp_path: Path) -> None:
    card = run_once(tmp_path, keep_samples=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "card.json",
        "card.md",
        "settings.json",
    ]
    assert card_from_json((tmp_path / "card.json").read_text()) == card
    model, config = setting()
    assert card.weights_sha256 == weights_digest(model)
    assert (card.step, card.weights, card.count, card.batch, card.routing) == (
        8,
        "ema",
        COUNT,
        BATCH,
        "batch",
    )
    assert (card.cfg, card.sampler, card.steps, card.seed) == (
        config.sample.cfg,
        config.sample.sampler,
        2,
        0,
    )
    assert (
        card.sampling["tolerance"] == config.sample.tolerance
        and "tolerance 0.0001" in (tmp_path / "card.md").read_text()
    )
    assert (card.reference, card.reference_count, card.extractor_sha256) == ("noise", 50, "tiny-4")
    assert (
        set(card.versions) == {"diffmoe", "commit", "python", "torch", "deepspeed", "numpy"}
        and card.versions == versions()
    )
    text = (tmp_path / "card.md").read_text()
    assert f"| FD-tiny ↓ | {card.scores.frechet_distance:.4f} |" in text and "FID" not in text
    assert f"| IS-tiny ↑ | {card.scores.inception_score:.4f} over 1 split |" in text, (
        "one split has no spread"
    )
    assert " over 3 splits |" in dataclasses.replace(card, splits=3).to_markdown()
    for field in dataclasses.fields(card):
        assert field.name == "scores" or f"| {field.name.replace('_', ' ')} |" in text
    with pytest.raises(UserError, match="not a score card"):
        card_from_json('{"scores": {"frechet_distance": 1}}')


def test_the_commit_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert commit(tmp_path).startswith("unknown (fatal: not a git repository")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "one"]):
        subprocess.run([*git, *words], check=True)
    head = subprocess.run(
        [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    (tmp_path / "new.txt").write_text("not tracked")
    assert commit(tmp_path) == head
    subprocess.run([*git, "add", "new.txt"], check=True)
    assert commit(tmp_path) == head + "-dirty"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit(tmp_path).startswith("unknown ("), "no git, no failure"


def test_the_verb_scores_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, config = setting("token")
    pieces = {
        name: piece.clone()
        for tensor in logical_tensors(model)
        for name, piece in tensor.pieces(tensor.parameter.data)
    }
    buffers = {name: value for name, value in model.named_buffers() if ".thresholds." in name}
    save_start(
        tmp_path / "run" / "checkpoints",
        config,
        Layout(1, 1, 16, 16, 1, 16, 1),
        {ema_kind(config.train.ema): pieces.items()},
        buffers,
    )
    write_digits(tmp_path / "digits")
    monkeypatch.setattr(command, "join", lambda environment, asked: CPU)
    monkeypatch.setattr(command, "leave", lambda: None)
    monkeypatch.setattr(
        "diffmoe.parallel.groups.build_groups", lambda ep, pool_ranks: single_process()
    )
    from diffmoe.environment import detect

    arguments = [
        "--checkpoint",
        str(tmp_path / "run"),
        "--reference",
        str(tmp_path / "digits"),
        "--extractor",
        "digits",
        "--count",
        "100",
        "--out",
        str(tmp_path / "out"),
        "--save-reference",
        str(tmp_path / "digits.npz"),
        "--cfg",
        "1",
        "sample.batch=50",
    ]
    assert command.main(arguments, detect()) == 0
    card = card_from_json((tmp_path / "out" / "card.json").read_text())
    assert (card.step, card.cfg, card.batch, card.routing, card.extractor) == (
        0,
        1.0,
        50,
        "token",
        "digits",
    )
    said = capsys.readouterr().out
    assert card.scores.frechet_distance > 10 and "FD-digits ↓" in said and "FID" not in said
    arguments[3], arguments[9] = str(tmp_path / "digits.npz"), str(tmp_path / "again")
    assert command.main(arguments, detect()) == 0
    close(card_from_json((tmp_path / "again" / "card.json").read_text()).scores, card.scores)
    arguments[9] = str(tmp_path / "rounded")
    assert command.main([*arguments, "--dtype", "bf16"], detect()) == 0
    rounded = card_from_json((tmp_path / "rounded" / "card.json").read_text())
    assert rounded.weights_sha256 == card.weights_sha256
    assert rounded.images_sha256 != card.images_sha256
    assert "dtype bf16 (published: fp32)" in rounded.protocol and "dtype" not in card.protocol
    with pytest.raises(UserError, match="extractor file .nowhere.pt. does not exist"):
        command.main([*arguments[:5], "nowhere.pt", *arguments[6:]], detect())
