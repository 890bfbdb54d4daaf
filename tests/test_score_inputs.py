"""What a score is made of, judged before anything is made: references, given samples, output
folders, the protocol; and images that are there are scored again, not made again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffmoe.checkpoints.reader import Checkpoint, ema_kind
from diffmoe.checkpoints.writer import save_start
from diffmoe.commands import evaluate as command
from diffmoe.config import Config, load_config
from diffmoe.data.digits import write_digits
from diffmoe.data.shards import INDEX_NAME, ShardMeta, write_shards
from diffmoe.errors import UserError
from diffmoe.evaluation import scored_images
from diffmoe.evaluation.card import Card, card_from_json, read_card, write_card
from diffmoe.evaluation.decoding import Decoder, checkpoint_data, data_class_names, vae_note
from diffmoe.evaluation.evaluate import SAMPLES_NAME, evaluate
from diffmoe.evaluation.features import Extractor, digits_extractor
from diffmoe.evaluation.image_sources import open_array, open_images
from diffmoe.evaluation.protocol import COUNT, INCEPTION_SHA256, departures, protocol
from diffmoe.evaluation.reference_statistics import Reference, load_reference, save_reference
from diffmoe.evaluation.scored_images import given_images
from diffmoe.huggingface import export_folder
from diffmoe.layout import Layout
from diffmoe.models.logical import logical_tensors, weights_digest
from programs import REPOSITORY, run_cases
from test_evaluation import (
    ALONE,
    CPU,
    close,
    random_gaussian,
    random_images,
    run_once,
    save_folder,
    setting,
    tiny_extractor,
)
from test_evaluation import (
    COUNT as IMAGES,
)

ROWS = random_images(30).permute(0, 2, 3, 1).numpy()
MU, SIGMA = random_gaussian(np.random.default_rng(0), 4)
MU_S, SIGMA_S = random_gaussian(np.random.default_rng(1), 4)


def counted(extractor: Extractor) -> tuple[Extractor, list[int]]:
    """The extractor, and how many images it was given in each call; one image of zeros is a try."""
    calls: list[int] = []

    def extract(images: torch.Tensor):
        if len(images) > 1 or images.any():
            calls.append(len(images))
        return extractor.function(images)

    return dataclasses.replace(extractor, function=extract), calls


def changed(array: np.ndarray, place: object, value: float) -> np.ndarray:
    array = array.copy()
    array[place] = value
    return array


# ------------------------------------------------------------------------------------------
# references


STATISTICS: dict[str, tuple[dict[str, object], str]] = {
    "nan in mu": (
        {"mu": changed(MU, 1, np.nan)},
        "mu and sigma: mean holds 1 values that are not finite",
    ),
    "inf in sigma": (
        {"sigma": changed(SIGMA, (1, 1), np.inf)},
        "mu and sigma: covariance holds 1 values that are not finite",
    ),
    "nan in sigma_s": (
        {"sigma_s": changed(SIGMA_S, (0, 0), np.nan)},
        "mu_s and sigma_s: covariance holds 1 values",
    ),
    "one row of features": ({"mu": MU[None]}, "mean (1, 4) must be [d]"),
    "deviations for a covariance": (
        {"sigma": np.diag(SIGMA)},
        "covariance (4,) does not fit its mean (4,)",
    ),
    "covariance of other features": (
        {"sigma": SIGMA[:3, :3]},
        "covariance (3, 3) does not fit its mean (4,)",
    ),
    "not symmetric": ({"sigma": changed(SIGMA, (0, 1), 9.0)}, "covariance must be symmetric"),
    "not positive": ({"sigma": SIGMA - 9 * np.eye(4)}, "covariance must be positive"),
    "of one image": ({"sigma": np.zeros((4, 4))}, "sigma is all zeros, as of one image"),
    "another width": (
        {"mu": MU[:3], "sigma": SIGMA[:3, :3]},
        "its pool features have width 3, those of the extractor 4",
    ),
    "another spatial width": (
        {"mu_s": MU_S[:3], "sigma_s": SIGMA_S[:3, :3]},
        "its spatial features have width 3, those of the extractor 4",
    ),
    "half of the spatial ones": ({"mu_s": None}, "only one of mu_s and sigma_s"),
    "words": ({"mu": np.array(["a"] * 4)}, "mu (<U1) must be numbers"),
    "objects": ({"mu": np.array([None, {}], object)}, "cannot be read: Object arrays"),
    "images of another size": (
        {"arr_0": np.zeros((30, 9, 7, 3), np.uint8)},
        "its images are 7 x 9, the samples 8 x 8",
    ),
    "three images": (
        {"arr_0": ROWS[:3]},
        "arr_0 holds 3 images; precision and recall need more than 3",
    ),
    "images in [0, 1]": (
        {"arr_0": ROWS / 255},
        "arr_0 (float64 (30, 8, 8, 3)) must be uint8 [N, H, W, 3]",
    ),
}


@pytest.mark.parametrize("case", STATISTICS)
def test_statistics_that_are_none_are_named_before_anything_is_measured(
    tmp_path: Path, case: str
) -> None:
    changes, told = STATISTICS[case]
    arrays = {"mu": MU, "sigma": SIGMA, "mu_s": MU_S, "sigma_s": SIGMA_S, "arr_0": ROWS, **changes}
    np.savez(
        tmp_path / "r.npz", **{name: value for name, value in arrays.items() if value is not None}
    )
    extractor, calls = counted(tiny_extractor())
    with pytest.raises(UserError, match=rf"r\.npz.*{re.escape(told)}") as caught:
        load_reference(tmp_path / "r.npz", extractor, ALONE, CPU, size=(8, 8))
    assert not calls and "\n" not in str(caught.value)


def cut_short(path: Path) -> None:
    np.savez(path, arr_0=ROWS)
    path.write_bytes(path.read_bytes()[:-3000])


def a_member_cut_short(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w") as member:
        np.lib.format.write_array_header_1_0(
            member, {"descr": "|u1", "fortran_order": False, "shape": ROWS.shape}
        )
        member.write(ROWS[:20].tobytes())


def torn_statistics(path: Path) -> None:
    np.savez(path, mu=MU, sigma=SIGMA)
    data = bytearray(path.read_bytes())
    data[data.index(SIGMA.tobytes()) + 3] ^= 1
    path.write_bytes(data)


def saved_with(**changes: object) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        np.savez(path.with_suffix(".images.npz"), arr_0=ROWS)
        measured = load_reference(path.with_suffix(".images.npz"), tiny_extractor(), ALONE, CPU)
        save_reference(dataclasses.replace(measured, **changes), path)

    return write


def folder_with(*names: str) -> Callable[[Path], None]:
    """Twelve images, and `spoiled.png` as one of the names says."""

    def write(path: Path) -> None:
        path.mkdir()
        for i in range(12):
            Image.fromarray(ROWS[i]).save(path / f"{i:02d}.png")
        if "large" in names:
            Image.new("RGB", (9, 8)).save(path / "spoiled.png")
        if "broken" in names:
            (path / "spoiled.png").write_text("no image")

    return write


def moments_for_pixels(path: Path) -> None:
    write_shards(
        ((f"{i}", np.zeros((8, 2, 2), np.float16), 0) for i in range(3)),
        path,
        samples_per_shard=3,
        meta=ShardMeta("moments", 1, scale=0.2),
    )


FILES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "floats": (
        "a.npy",
        lambda path: np.save(path, ROWS / 255),
        "its array (float64 (30, 8, 8, 3)) must be uint8 [N, H, W, 3]",
    ),
    "features": (
        "a.npy",
        lambda path: np.save(path, np.zeros((30, 4))),
        "statistics are an npz with mu and sigma",
    ),
    "channels first": (
        "a.npy",
        lambda path: np.save(path, ROWS.transpose(0, 3, 1, 2).copy()),
        "must be uint8 [N, H, W, 3]",
    ),
    "one image": (
        "a.npy",
        lambda path: np.save(path, ROWS[:1]),
        "its images (1) must be at least the pool features' width + 1 (5)",
    ),
    "four images": (
        "a.npz",
        lambda path: np.savez(path, arr_0=ROWS[:4]),
        "its images (4) must be at least the pool features' width + 1",
    ),
    "no image": (
        "a.npz",
        lambda path: np.savez(path, arr_0=ROWS[:0]),
        "must be uint8 [N, H, W, 3]",
    ),
    "large images": (
        "a.npy",
        lambda path: np.save(path, np.zeros((9, 16, 16, 3), np.uint8)),
        "its images are 16 x 16, the samples 8 x 8",
    ),
    "text": (
        "a.npz",
        lambda path: path.write_text("mu sigma"),
        "is neither a whole .npz nor a .npy",
    ),
    "half a file": ("a.npz", cut_short, "is neither a whole .npz nor a .npy"),
    "half a member": ("a.npz", a_member_cut_short, "the file is cut short"),
    "half an array": (
        "a.npy",
        lambda path: (np.save(path, ROWS), os.truncate(path, 2000)),
        "the file is cut short",
    ),
    "a flipped bit": ("a.npz", torn_statistics, "cannot be read: Bad CRC-32"),
    "saved, of few": (
        "a.npz",
        saved_with(count=4),
        "4 images give no covariance of 4 features; it takes at least 5",
    ),
    "saved, nan": (
        "a.npz",
        saved_with(features=np.full((9, 4), np.nan)),
        "features (9, 4) must be more than 3 rows [n, d] of finite",
    ),
    "saved, wide": (
        "a.npz",
        saved_with(features=np.zeros((9, 5))),
        "features (9, 5) must be [n, 4]",
    ),
    "saved, of large images": (
        "a.npz",
        saved_with(size=(16, 16)),
        "its images are 16 x 16, the samples 8 x 8",
    ),
    "saved by another": (
        "a.npz",
        saved_with(extractor="ab"),
        "was measured with extractor ab, this run uses tiny tiny-4",
    ),
    "two sizes": ("a", folder_with("large"), "spoiled.png is 9 x 8, 00.png is 8 x 8"),
    "a broken image": ("a", folder_with("broken"), "spoiled.png cannot be read"),
    "no images": ("a", lambda path: path.mkdir(), "holds neither index.json nor images"),
    "latents": ("a", moments_for_pixels, "hold moments, not pixels"),
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_are_no_reference_are_named_before_anything_is_measured(
    tmp_path: Path, case: str
) -> None:
    name, write, told = FILES[case]
    write(tmp_path / name)
    extractor, calls = counted(tiny_extractor())
    with pytest.raises(UserError, match=re.escape(told)) as caught:
        load_reference(tmp_path / name, extractor, ALONE, CPU, size=(8, 8))
    assert not calls and "\n" not in str(caught.value) and str(tmp_path / name) in str(caught.value)


def test_a_fault_of_our_own_keeps_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez(tmp_path / "r.npz", mu=MU, sigma=SIGMA)
    for fault in (ValueError("a bug"), KeyError("another")):

        def broken(*_: object) -> None:
            raise fault

        monkeypatch.setattr("diffmoe.evaluation.reference_statistics._gaussian", broken)
        with pytest.raises(type(fault)) as caught:
            load_reference(tmp_path / "r.npz", tiny_extractor(), ALONE, CPU)
        assert not isinstance(caught.value, UserError)


def test_npy_images_and_a_saved_adm_reference_are_references(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", ROWS)
    np.savez(tmp_path / "images.npz", arr_0=ROWS)
    one, two = (
        load_reference(tmp_path / name, tiny_extractor(), ALONE, CPU, size=(8, 8))
        for name in ("images.npy", "images.npz")
    )
    assert one.sha256 == two.sha256 and one.size == (8, 8)
    np.savez(tmp_path / "adm.npz", mu=MU, sigma=SIGMA, arr_0=ROWS)
    adm = load_reference(tmp_path / "adm.npz", tiny_extractor(), ALONE, CPU, size=(8, 8))
    save_reference(adm, tmp_path / "saved.npz")
    saved = load_reference(tmp_path / "saved.npz", tiny_extractor(), ALONE, CPU, size=(8, 8))
    np.testing.assert_array_equal(saved.features, adm.features)
    assert (saved.count, saved.size, saved.extractor) == (None, (8, 8), "tiny-4")


@pytest.mark.parametrize("kind", ["stored", "packed", "npy"])
def test_slices_of_an_array_cost_a_slice(tmp_path: Path, kind: str) -> None:
    rows = np.random.default_rng(0).integers(0, 256, (400, 128, 128, 3), np.uint8)  # 20 MB
    rows[:, ::2] = 0
    path = tmp_path / ("a.npy" if kind == "npy" else "a.npz")
    {
        "stored": lambda: np.savez(path, arr_0=rows),
        "packed": lambda: np.savez_compressed(path, arr_0=rows),
        "npy": lambda: np.save(path, rows),
    }[kind]()
    tracemalloc.start()
    shape, read = open_array(path)
    assert shape == rows.shape
    before = int(Path("/proc/self/io").read_text().split()[1])
    for start in (392, 8, 200, 208):  # also backwards
        np.testing.assert_array_equal(read(start, start + 8), rows[start : start + 8])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 6e6, "of 20 MB"
    assert kind == "packed" or int(Path("/proc/self/io").read_text().split()[1]) - before < 6e6, (
        "bytes read"
    )


# ------------------------------------------------------------------------------------- scored again


def adm_reference(path: Path, seed: int):
    mu, sigma = random_gaussian(np.random.default_rng(seed), 4)
    np.savez(path, mu=mu, sigma=sigma)
    return load_reference(path, tiny_extractor(), ALONE, CPU)


def other_extractor() -> Extractor:
    """Of the same images other features, as another network's."""

    def extract(images: torch.Tensor):
        return dataclasses.replace(
            tiny_extractor()(images), pool=tiny_extractor()(images.flip(1)).pool
        )

    return Extractor("other", "other", extract)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The first number of each batch that is sampled."""
    batches: list[int] = []
    real = scored_images.generate

    def counted_generate(model, config, labels, numbers, device, others):
        batches.append(numbers[0])
        if len(batches) == 4 and "interrupt" in os.environ.get("TEST_OF_SCORES", ""):
            raise KeyboardInterrupt
        return real(model, config, labels, numbers, device)

    monkeypatch.setattr(scored_images, "generate", counted_generate)
    return batches


def test_another_reference_extractor_or_split_scores_the_images_that_are_there(
    tmp_path: Path, made: list[int]
) -> None:
    references = [adm_reference(tmp_path / f"{i}.npz", i) for i in range(2)]
    out = tmp_path / "out"
    first = run_once(out, reference=references[0])
    images, sampled = (out / SAMPLES_NAME).read_bytes(), len(made)
    cards = {
        "reference": run_once(out, reference=references[1]),
        "splits": run_once(out, reference=references[1], splits=7),
        "extractor": run_once(out, reference=references[0], extractor=other_extractor()),
    }
    assert len(made) == sampled and (out / SAMPLES_NAME).read_bytes() == images, (
        "nothing is sampled again"
    )
    assert not (out / "chunks").exists()
    fresh = {
        "reference": run_once(tmp_path / "fresh1", reference=references[1]),
        "splits": run_once(tmp_path / "fresh2", reference=references[1], splits=7),
        "extractor": run_once(
            tmp_path / "fresh3", reference=references[0], extractor=other_extractor()
        ),
    }
    for name, card in cards.items():
        assert card.scores == fresh[name].scores and card.images_sha256 == first.images_sha256, name
    # The last is card.json; each earlier one stays, with its text.
    assert read_card(out / "card.json") == cards["extractor"]
    kept = {read_card(path).scoring: path for path in out.glob("card-*.json")}
    assert set(kept) == {first.scoring, cards["reference"].scoring, cards["splits"].scoring}
    assert all(path.with_suffix(".md").is_file() for path in kept.values())
    made.clear()
    assert run_once(out, reference=references[0]) == first == read_card(out / "card.json"), (
        "it is the card again"
    )
    assert not made


def test_scores_by_another_reference_resume(
    tmp_path: Path, made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    references = [adm_reference(tmp_path / f"{i}.npz", i) for i in range(2)]
    whole = run_once(tmp_path / "whole", reference=references[1])
    # Interrupted while sampling, another reference and extractor go on with the same images.
    made.clear()
    monkeypatch.setenv("TEST_OF_SCORES", "interrupt")
    with pytest.raises(KeyboardInterrupt):
        run_once(tmp_path / "cut", reference=references[0], extractor=other_extractor())
    monkeypatch.delenv("TEST_OF_SCORES")
    made.clear()
    assert run_once(tmp_path / "cut", reference=references[1]).scores == whole.scores
    assert made == [48, 64], "the three batches that were there were not made again"
    # Interrupted while scoring again.
    extractor, calls = counted(other_extractor())
    stopping = dataclasses.replace(
        extractor, function=lambda x: extractor.function(x) if len(calls) < 2 else 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        run_once(tmp_path / "cut", reference=references[1], extractor=stopping)
    made.clear()
    calls.clear()
    run_once(tmp_path / "cut", reference=references[1], extractor=extractor)
    assert len(calls) == 3 and not made


def test_images_that_were_not_kept_are_said_to_be_gone(tmp_path: Path, made: list[int]) -> None:
    references = [adm_reference(tmp_path / f"{i}.npz", i) for i in range(2)]
    card = run_once(tmp_path / "out", reference=references[0], keep_samples=False)
    made.clear()
    assert run_once(tmp_path / "out", reference=references[0], keep_samples=False) == card
    for changes in (
        {"reference": references[1]},
        {"reference": references[0], "splits": 3},
        {"reference": references[0], "extractor": other_extractor()},
    ):
        with pytest.raises(UserError, match=r"of images that were not kept \(--no-samples\)"):
            run_once(tmp_path / "out", keep_samples=False, **changes)
    with pytest.raises(UserError, match=r"of images that were not kept \(--no-samples\)"):
        run_once(tmp_path / "out", reference=references[0])
    assert not made and read_card(tmp_path / "out" / "card.json") == card


def test_a_folder_of_other_images_of_an_earlier_version_or_damaged_is_refused(
    tmp_path: Path, made: list[int]
) -> None:
    run_once(tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    made.clear()

    def refused(told: str) -> None:
        with pytest.raises(UserError, match=told):
            run_once(tmp_path / "out", splits=2)
        assert not made

    images = np.load(tmp_path / "out" / SAMPLES_NAME)["arr_0"]
    np.savez(tmp_path / "out" / SAMPLES_NAME, arr_0=255 - images)
    refused("its images .* are not those of card.json")
    np.savez(tmp_path / "out" / SAMPLES_NAME, arr_0=images[:5])
    refused("holds 5 images")
    older = {
        **settings,
        "weights_sha256": "ab" * 32,
        "splits": 1,
        "reference_sha256": "",
        "extractor": "tiny",
        "extractor_sha256": "x",
    }
    (tmp_path / "out" / "settings.json").write_text(json.dumps(older))
    refused("of an earlier version, which hashed only a part of the weights: score them again")
    for text, told in (("{", "is not valid JSON"), ("[]", "must hold an object, not list")):
        (tmp_path / "out" / "settings.json").write_text(text)
        refused(told)
    (tmp_path / "out" / "settings.json").unlink()
    refused("card.json but no settings.json")


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_folder_that_cannot_be_made_is_refused_first(
    tmp_path: Path, made: list[int], place: str
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=rf"out \(.*{place}\) cannot be written"):
        run_once(tmp_path / place)
    assert not made


# ------------------------------------------------------------------------------------- samples that
# exist


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A run folder with a model of digits."""
    folder = tmp_path_factory.mktemp("run")
    model, config = setting("token")
    pieces = [
        pair for tensor in logical_tensors(model) for pair in tensor.pieces(tensor.parameter.data)
    ]
    buffers = {name: value for name, value in model.named_buffers() if ".thresholds." in name}
    layout = Layout(1, 1, 16, 16, 1, 16, 1)
    save_start(
        folder / "checkpoints", config, layout, {ema_kind(config.train.ema): pieces}, buffers
    )
    write_digits(folder / "digits")
    return folder


def score_given(
    path: Path,
    reference: Reference,
    out: Path,
    count: int | None = None,
    extractor: Extractor | None = None,
) -> Card:
    images = given_images(open_images(path), count)
    return evaluate(images, reference, extractor or tiny_extractor(), out, ALONE, CPU)


def test_given_images_have_the_scores_of_those_that_were_sampled(tmp_path: Path) -> None:
    np.save(tmp_path / "real.npy", ROWS)
    reference = load_reference(tmp_path / "real.npy", tiny_extractor(), ALONE, CPU)
    card = run_once(tmp_path / "out", reference=reference)
    rows = np.load(tmp_path / "out" / SAMPLES_NAME)["arr_0"]
    np.save(tmp_path / "a.npy", rows)
    np.savez_compressed(tmp_path / "packed.npz", arr_0=rows)
    save_folder(torch.from_numpy(rows.transpose(0, 3, 1, 2).copy()), tmp_path / "folder")
    for i, name in enumerate((f"out/{SAMPLES_NAME}", "a.npy", "packed.npz", "folder")):
        path = tmp_path / name
        given = score_given(path, reference, tmp_path / f"given{i}")
        close(given.scores, card.scores)
        assert (given.samples, given.count) == (str(path), IMAGES)
        assert (given.checkpoint, given.cfg, given.batch) == (None, None, None)
        assert given.protocol == "not known: the samples were given"
        assert path.name == "folder" or given.images_sha256 == card.images_sha256
        assert not (tmp_path / f"given{i}" / SAMPLES_NAME).exists()
        text = (tmp_path / f"given{i}" / "card.md").read_text()
        assert text.startswith(f"# {IMAGES} images of {path}") and "| checkpoint | – |" in text
        assert card_from_json((tmp_path / f"given{i}" / "card.json").read_text()) == given
    few = score_given(tmp_path / "a.npy", reference, tmp_path / "few", 40)
    assert few.count == 40 and few.scores != card.scores
    with pytest.raises(
        UserError, match=rf"count \(71\) must lie in 1..{IMAGES}, the images of .*a.npy"
    ):
        given_images(open_images(tmp_path / "a.npy"), 71)
    # Another file under the same name.
    np.save(tmp_path / "a.npy", 255 - rows)
    with pytest.raises(UserError, match="was begun with samples_state"):
        score_given(tmp_path / "a.npy", reference, tmp_path / "given1")
    # Another reference scores them again.
    again = score_given(
        tmp_path / "packed.npz", adm_reference(tmp_path / "s.npz", 1), tmp_path / "given2"
    )
    assert (
        again.scores.frechet_distance != card.scores.frechet_distance
        and len(list((tmp_path / "given2").glob("card-*.json"))) == 1
    )


@pytest.mark.parametrize(
    "names, told",
    [
        (("mu", "sigma"), r"holds statistics \(mu, sigma\) and no images \(arr_0\)$"),
        (
            ("images", "labels"),
            "not arr_0 and not mu and sigma; .* sample again, latents with --vae$",
        ),
        (("samples",), r"holds \['samples'\], not arr_0 and not mu and sigma$"),
    ],
)
def test_files_without_images_are_told_for_what_they_are(
    tmp_path: Path, names: tuple[str, ...], told: str
) -> None:
    np.savez(tmp_path / "x.npz", **dict.fromkeys(names, np.zeros(3)))
    with pytest.raises(UserError, match=told):
        open_images(tmp_path / "x.npz")


@pytest.mark.parametrize(
    "words",
    [
        "--vae x",
        "--latent-scale 0",
        "--classes random",
        "--weights raw",
        "--cfg 1",
        "--seed 0",
        "--no-samples",
        "--published",
        "sample.steps=3",
    ],
)
def test_what_only_a_checkpoint_has_is_refused_beside_samples(words: str) -> None:
    name = words.split()[0]
    with pytest.raises(
        UserError, match=rf"^{re.escape(name)} cannot stand beside --samples \(x.npz\)"
    ):
        command.main(
            ["--samples", "x.npz", "--reference", "r", "--extractor", "digits", *words.split()],
            None,
        )


@pytest.mark.parametrize("options", [[], ["--samples", "x.npz", "--checkpoint", "run"]])
def test_evaluate_takes_a_checkpoint_or_samples(options: list[str]) -> None:
    with pytest.raises(UserError, match=r"takes one of --checkpoint \(.*\) and --samples \(.*\)"):
        command.main([*options, "--reference", "r", "--extractor", "digits"], None)


@pytest.mark.full
@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_verbs_over_ranks(checkpoint: Path, tmp_path: Path, world: int) -> None:
    """`sample` writes what `evaluate --samples` reads; and on every rank a mistake is one line
    before anything is made.
    """
    digits, run = str(checkpoint / "digits"), str(checkpoint)
    np.savez(tmp_path / "nan.npz", mu=np.full(32, np.nan), sigma=np.eye(32))
    np.savez(tmp_path / "narrow.npz", mu=np.zeros(4), sigma=np.eye(4))
    np.save(tmp_path / "floats.npy", np.zeros((99, 8, 8, 3)))
    np.save(tmp_path / "few.npy", np.zeros((20, 8, 8, 3), np.uint8))
    (tmp_path / "file").write_text("")
    score = [
        "evaluate",
        "--checkpoint",
        run,
        "--extractor",
        "digits",
        "--count",
        "100",
        "--out",
        str(tmp_path / "no"),
    ]
    wrong = {
        "nan": (
            [*score, "--reference", f"{tmp_path}/nan.npz"],
            "nan.npz), mu and sigma: mean holds 32 values that are not finite",
        ),
        "narrow": (
            [*score, "--reference", f"{tmp_path}/narrow.npz"],
            "narrow.npz: its pool features have width 4",
        ),
        "floats": (
            [*score, "--reference", f"{tmp_path}/floats.npy"],
            "floats.npy: its array (float64",
        ),
        "few": (
            [*score, "--reference", f"{tmp_path}/few.npy"],
            "few.npy: its images (20) must be at least",
        ),
        "count": ([*score, "--reference", digits, "--count", "30"], "count (30) must be at least"),
        "splits": (
            [*score, "--reference", digits, "--splits", "101"],
            "splits (101) must lie in 1..count (100)",
        ),
        "out": (
            [*score, "--reference", digits, "--out", f"{tmp_path}/file"],
            "file) cannot be written",
        ),
        "save": (
            [*score, "--reference", digits, "--save-reference", f"{tmp_path}/gone/r.npz"],
            "gone/r.npz cannot be written: No such file",
        ),
        "samples": (
            ["evaluate", "--samples", f"{tmp_path}/floats.npy", *score[3:], "--reference", digits],
            "floats.npy: its array",
        ),
        "sample": (
            ["sample", "--checkpoint", run, "--count", "2", "--out", f"{tmp_path}/file/x"],
            "file/x.npz cannot be written",
        ),
    }
    given = [
        "evaluate",
        "--samples",
        f"{tmp_path}/s.npz",
        "--extractor",
        "digits",
        "--reference",
        digits,
        "--out",
        f"{tmp_path}/scores",
    ]
    np.savez(tmp_path / "other.npz", mu=np.zeros(32), sigma=np.eye(32))
    twice = [
        [*score, "--out", f"{tmp_path}/twice", "sample.batch=24", "--reference", reference]
        for reference in (digits, f"{tmp_path}/other.npz")
    ]
    right = [
        [
            "sample",
            "--checkpoint",
            run,
            "--count",
            "150",
            "--out",
            f"{tmp_path}/s.npz",
            "sample.batch=50",
        ],
        given,
        *twice,
    ]
    results = run_cases(world, [line for line, _ in wrong.values()] + right)
    for (name, (_, told)), ended in zip(wrong.items(), results):
        assert [result.returncode for result in ended] == [2] * world, (name, ended)
        said = [
            line
            for result in ended
            for line in result.stderr.splitlines()
            if line.startswith("error: ")
        ]
        assert len(said) == 1 and told in said[0], (name, said)
    assert not (tmp_path / "no").exists() or not list((tmp_path / "no").iterdir()), (
        "nothing was begun"
    )
    for ended in results[len(wrong) :]:
        assert [result.returncode for result in ended] == [0] * world, ended
    with np.load(tmp_path / "s.npz") as file:
        assert file["arr_0"].dtype == np.uint8 and file["arr_0"].shape == (150, 8, 8, 3)
        np.testing.assert_array_equal(file["arr_1"], file["labels"])
        levels = np.clip(np.floor(file["images"] * 127.5 + 128), 0, 255)
        np.testing.assert_array_equal(file["arr_0"].transpose(0, 3, 1, 2), levels.repeat(3, axis=1))
    card = read_card(tmp_path / "scores" / "card.json")
    reference = load_reference(digits, digits_extractor(), ALONE, CPU)
    alone = score_given(
        tmp_path / "s.npz", reference, tmp_path / "alone", extractor=digits_extractor()
    )
    assert dataclasses.asdict(card.scores) == pytest.approx(
        dataclasses.asdict(alone.scores), rel=1e-6
    )
    assert (card.count, card.ranks, card.images_sha256) == (150, world, alone.images_sha256)
    # The same images by another reference.
    (before,), after = (
        (tmp_path / "twice").glob("card-*.json"),
        read_card(tmp_path / "twice" / "card.json"),
    )
    assert (
        read_card(before).images_sha256 == after.images_sha256
        and read_card(before).reference == digits
    )
    other = load_reference(tmp_path / "other.npz", digits_extractor(), ALONE, CPU)
    images = score_given(
        tmp_path / "twice" / SAMPLES_NAME,
        other,
        tmp_path / "by other",
        extractor=digits_extractor(),
    )
    assert after.scores.frechet_distance == pytest.approx(images.scores.frechet_distance)
    assert after.reference == str(tmp_path / "other.npz")


# -------------------------------------------------------------------------------------------
# protocol


def config_of(family: str, process: str) -> Config:
    return load_config(REPOSITORY / f"configs/{family}_{process}.yaml", [])


def asked(line: str) -> argparse.Namespace:
    return command._parser().parse_intermixed_args(line.split())


def card_of(config: Config, options: argparse.Namespace, **changes: object):
    """The card that these options would give with Inception."""
    sampling = dataclasses.asdict(config.sample)
    own = {
        name: sampling[name]
        for name in ("cfg", "sampler", "steps", "routing", "capacity", "gamma", "batch")
    }
    card = card_from_json(
        json.dumps(
            {
                "scores": {"frechet_distance": 1.0},
                "checkpoint": "c",
                "weights": options.weights or "ema",
                "step": 1,
                "weights_sha256": "",
                "family": config.model.family,
                "process": config.diffusion.process,
                "vae": None,
                "vae_sha256": None,
                "latent_scale": None,
                "latent_shift": None,
                **own,
                "sampling": sampling,
                "seed": 0,
                "labels": options.labels or "balanced",
                "count": COUNT if options.count is None else options.count,
                "splits": 10,
                "reference": "",
                "reference_sha256": "",
                "reference_count": None,
                "extractor": "inception",
                "extractor_sha256": INCEPTION_SHA256,
                "ranks": 1,
                "hardware": "",
                "versions": {},
                "time": "",
                "seconds": 1.0,
            }
        )
    )
    return dataclasses.replace(card, **changes)


ANY = "--checkpoint c --reference r --extractor e"


@pytest.mark.parametrize(
    "name", ["diffmoe_l_e16_flow", "diffmoe_l_e16_ddpm", "dense_l_flow", "tc_l_e16_flow"]
)
def test_published_is_the_published_protocol_and_the_default_says_what_differs(name: str) -> None:
    config = config_of(*name.rsplit("_", 1))
    for line in (
        f"{ANY} --published",
        f"{ANY} --published --cfg 1.5",
        f"{ANY} --published --count 50000 --classes random sample.steps=250",
    ):
        options = asked(line)
        card = card_of(command.evaluation_config(config, options), options)
        assert departures(card) == [] and protocol(card) == "published", line
        assert (options.count, options.labels) == (50_000, "random")
    options = asked(ANY)
    card = card_of(command.evaluation_config(config, options), options)
    said = protocol(card)
    assert (
        said.startswith("not the published one: ") and "labels balanced (published: random)" in said
    )
    assert ("routing token (published: batch)" in said) == name.startswith("diffmoe")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--count 10000", "--count 10000 contradicts --published, which has 50000"),
        ("--splits 1", "--splits 1 contradicts --published, which has 10"),
        ("--classes balanced", "--classes balanced contradicts --published, which has random"),
        ("--weights raw", "--weights raw contradicts --published, which has ema"),
        ("--cfg 4", "--cfg 4 contradicts --published"),
        ("--guide capacity", r"sample.guide \(capacity\) contradicts --published, which has None"),
        ("--cfg-interval 0.2 0.8", r"sample.cfg_interval \(\(0.2, 0.8\)\) contradicts --published"),
        ("sample.steps=50", r"sample.steps \(50\) contradicts --published, which has 250"),
        ("sample.routing=token", r"sample.routing \(token\) contradicts"),
        (
            "sample.gamma=0.4",
            r"sample.gamma \(0.4\) "
            r"contradicts",
        ),
        ("sample.cfg=3", "--cfg 3 contradicts --published"),
    ],
)
def test_what_contradicts_published_is_named(words: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        command.evaluation_config(
            config_of("diffmoe_l_e16", "flow"), asked(f"{ANY} --published {words}")
        )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("weights", "raw"),
        ("labels", "balanced"),
        ("count", 10_000),
        ("splits", 1),
        ("cfg", 4.0),
        ("extractor_sha256", "other"),
    ],
)
def test_each_departure_is_on_the_card(field: str, value: object) -> None:
    options = asked(f"{ANY} --published")
    card = card_of(
        command.evaluation_config(config_of("diffmoe_l_e16", "flow"), options),
        options,
        **{field: value},
    )
    (said,) = departures(card)
    assert said.startswith(field.removesuffix("_sha256"))
    shifted = dataclasses.replace(card, sampling={**(card.sampling or {}), "time_shift": 2.0})
    assert set(departures(shifted)) == {said, "time_shift 2.0 (published: none)"}


def test_the_documents_evaluate_lines_of_the_zoo_are_published_protocols() -> None:
    """Every line that scores a model of the zoo, in pages and in the job script itself."""
    pages = [
        REPOSITORY / "README.md",
        *(REPOSITORY / "docs").glob("*.md"),
        REPOSITORY / "scripts/slurm/evaluate.sh",
    ]
    lines = [
        line
        for page in pages
        for line in page.read_text().replace("\\\n", " ").splitlines()
        if re.search(r"(evaluate\.sh|run\.py evaluate) .*--checkpoint runs/(l|xl|s|b)_", line)
    ]
    assert len(lines) >= 3
    for line in lines:
        words = re.sub(r"\s#.*|`.*", "", re.split(r"evaluate\.sh |run\.py evaluate ", line)[1])
        options = asked(words)
        card = card_of(
            command.evaluation_config(config_of("diffmoe_l_e16", "flow"), options), options
        )
        assert protocol(card) == "published", line


def test_a_card_without_a_protocol_is_still_a_card(tmp_path: Path) -> None:
    card = run_once(tmp_path / "out")
    assert card.protocol.startswith("not the published one: ")
    assert f"| protocol | {card.protocol} |" in (tmp_path / "out/card.md").read_text()
    tree = json.loads(card.to_json())
    for name in ("samples", "images_sha256", "protocol"):
        del tree[name]
    older = card_from_json(json.dumps(tree))
    assert (older.protocol, older.samples, older.scores) == ("", None, card.scores)
    write_card(older, tmp_path / "out")


# ------------------------------------------------------------------------- hashes and indices


@pytest.mark.parametrize("place", ["first", "beyond 4,096", "last"])
def test_a_digest_sees_every_entry(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(100, 100)
    before = weights_digest(model)
    assert before.startswith("v2:") and weights_digest(model.double()) == before, (
        "whatever the type"
    )
    model.float()
    monkeypatch.setattr("diffmoe.models.logical._HASHED_AT_ONCE", 999)
    assert weights_digest(model) == before, "and the size of the pieces"
    with torch.no_grad():
        model.weight.flatten()[{"first": 0, "beyond 4,096": 5000, "last": -1}[place]] += 1
    assert weights_digest(model) != before
    assert weights_digest(torch.nn.Linear(200, 50)) != before


def test_a_card_of_an_earlier_version_is_told_to_be_made_again(
    checkpoint: Path, tmp_path: Path
) -> None:
    there = Checkpoint(checkpoint)
    card = dataclasses.replace(
        run_once(tmp_path / "out"), step=there.step, family=there.config().model.family
    )
    for digest, told in (
        (
            "ab" * 32,
            "of an earlier version, which hashed only a part of the weights: score them again",
        ),
        ("v2:" + "ab" * 32, "weights_sha256 v2:abab"),
    ):
        (tmp_path / "card.json").write_text(
            dataclasses.replace(card, weights_sha256=digest).to_json()
        )
        with pytest.raises(UserError, match=f"is of another model.*{told}"):
            export_folder(there, tmp_path / "hf", "ema", 10**9, [tmp_path / "card.json"])
    (tmp_path / "card.json").write_text(card.to_json())
    export_folder(there, tmp_path / "hf", "ema", 10**9, [tmp_path / "card.json"])


def latents(folder: Path, **more: str) -> Config:
    data = {"shards": folder, **more}
    return load_config(
        None, ["model.channels=4", *(f"data.{name}={value}" for name, value in data.items())]
    )


def write_latents(folder: Path) -> None:
    write_shards(
        ((f"{i}", np.zeros((8, 2, 2), np.float16), 0) for i in range(3)),
        folder,
        samples_per_shard=3,
        meta=ShardMeta("moments", 1, scale=0.2, mean=1.5),
    )


DAMAGED = {
    "half an index": lambda folder: os.truncate(folder / INDEX_NAME, 40),
    "no index": lambda folder: (folder / INDEX_NAME).unlink(),
    "another format": lambda folder: (folder / INDEX_NAME).write_text('{"format": 999}'),
    "a folder for an index": lambda folder: (
        (folder / INDEX_NAME).unlink(),
        (folder / INDEX_NAME).mkdir(),
    ),
}


@pytest.mark.parametrize("form", ["folder", "glob", "index"])
@pytest.mark.parametrize("damage", DAMAGED)
def test_an_unreadable_index_never_skips_the_check_of_the_vae(
    tmp_path: Path, damage: str, form: str
) -> None:
    write_latents(tmp_path / "data")
    config = {
        "folder": latents(tmp_path / "data"),
        "glob": latents(tmp_path / "data" / "*.tar"),
        "index": latents(tmp_path / "data", index=str(tmp_path / "data" / INDEX_NAME)),
    }[form]
    assert checkpoint_data(config, None, None).meta.scale == 0.2
    DAMAGED[damage](tmp_path / "data")
    with pytest.raises(UserError, match="cannot be read: .*; restore it; with --scale it is not n"):
        checkpoint_data(config, None, None, "--scale")
    with pytest.raises(UserError, match="cannot be read: .*; restore it$"):
        checkpoint_data(config)
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint_data(config, 0.2, None)
    assert checkpoint_data(config, 0.2, 1.5) is None
    assert data_class_names(config) == ()  # which nothing depends on


def test_a_vae_that_is_not_compared_is_said(tmp_path: Path) -> None:
    decoder = Decoder("vae", "abc", 0.2, 1.5, lambda x: x)
    nowhere = latents(tmp_path / "elsewhere")
    assert checkpoint_data(nowhere, None, None) is None
    assert re.search(
        "elsewhere.* is not here.*vae vae is not compared with it; latents have scale 0.2, shift "
        "1.5",
        vae_note(nowhere, decoder, None),
    )
    write_latents(tmp_path / "data")
    there = latents(tmp_path / "data")
    assert "does not say which VAE encoded it" in vae_note(
        there, decoder, checkpoint_data(there, None, None)
    )
