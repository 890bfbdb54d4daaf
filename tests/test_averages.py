"""Averages by power functions: their arithmetic against what is written out update by update, and
any length made of snapshots (arXiv 2312.02696, section 3).
"""

import json
import math
import shutil

import numpy as np
import pytest
import torch

from diffmoe.checkpoints.power_averages import (
    Profile,
    closest_sum,
    exponent,
    length_kind,
    step_weight,
)
from diffmoe.checkpoints.reader import Checkpoint, complete_folders
from diffmoe.checkpoints.tensor_file import Corrupt
from diffmoe.commands.common import whole_model
from diffmoe.config import load_config
from diffmoe.cost.memory import engine_facts, rank_memory
from diffmoe.errors import UserError
from diffmoe.layout import resolve_layout
from diffmoe.parallel.spawn import Ranks
from diffmoe.remote import remote_path
from diffmoe.training.saver import STREAMING_BYTES
from made_checkpoints import made_whole, make_checkpoint, peak_growth
from programs import digits, run_cases, tiny, tiny_config
from test_run import train_here

TRACKS = (0.05, 0.1)


def length_of(g: float) -> float:
    """The standard deviation of (g + 1) t^g over [0, 1], from its first two moments."""
    mean, square = (g + 1) / (g + 2), (g + 1) / (g + 3)
    return math.sqrt(square - mean**2)


def shares(length: float, updates: int) -> np.ndarray:
    """What each update's weights count: the integral of the profile over its unit of time."""
    ends = (np.arange(updates + 1) / updates) ** (exponent(length) + 1)
    return np.diff(ends)


@pytest.mark.parametrize("length", [0.01, 0.05, 0.1, 0.15, 0.25])
def test_length_and_exponent_are_inverse_and_the_profile_has_that_deviation(length):
    g = exponent(length)
    assert g > 0 and length_of(g) == pytest.approx(length, rel=1e-9)
    assert exponent(length_of(3.5)) == pytest.approx(3.5, rel=1e-9)


def test_the_papers_exponents():
    """Its section 3.1: 0.05 and 0.10 are 16.97 and 6.94."""
    assert [round(exponent(length), 2) for length in TRACKS] == [16.97, 6.94]


@pytest.mark.parametrize("length", [0.05, 0.2])
def test_a_track_is_the_weighted_sum_of_all_updates_and_forgets_its_start(length):
    values, average = np.random.default_rng(0).normal(size=300), 1e6
    for update, value in enumerate(values, 1):
        average += step_weight(exponent(length), update) * (value - average)
    assert average == pytest.approx(shares(length, 300) @ values, rel=1e-12)
    assert shares(length, 300).sum() == pytest.approx(1, rel=1e-12)


def tracks(every: int, updates: int) -> list[Profile]:
    return [Profile(s, t) for t in range(every, updates + 1, every) for s in TRACKS]


def test_a_length_that_is_a_track_is_the_track():
    profiles = tracks(100, 1600)
    factors, missed = closest_sum(profiles, Profile(0.1, 1600))
    wanted = [float(profile == Profile(0.1, 1600)) for profile in profiles]
    assert np.abs(factors - wanted).max() < 1e-10 and missed < 1e-7


@pytest.mark.parametrize(("length", "limit"), [(0.03, 0.04), (0.07, 0.004), (0.15, 0.01)])
def test_a_third_length_is_made_within_what_its_profile_misses(length, limit):
    """On a random walk of 1,600 updates with 16 snapshots, beside the sum written out.  The
    difference of two averages is a sum of weights' distances from any point, each times what the
    profiles differ by: at most the profiles' L2 distance times that of the distances.
    """
    walk = np.random.default_rng(1).normal(size=(1600, 5)).cumsum(axis=0)
    profiles, wanted = tracks(100, 1600), Profile(length, 1600)
    factors, missed = closest_sum(profiles, wanted)
    assert factors.sum() == pytest.approx(1, abs=1e-12) and 0 < missed < limit
    kept = [shares(each.length, each.updates) @ walk[: each.updates] for each in profiles]
    found, aim = factors @ np.array(kept), shares(length, 1600) @ walk
    g = exponent(length)
    norm = math.sqrt((g + 1) ** 2 / ((2 * g + 1) * 1600))
    spread = np.sqrt(((walk - walk.mean(axis=0)) ** 2).sum(axis=0))
    assert (np.abs(found - aim) <= missed * norm * spread).all()
    assert (np.abs(found - aim) < limit * walk.std(axis=0)).all()
    assert closest_sum(profiles[-2:], wanted)[1] > 4 * missed, "snapshots bring it closer"


@pytest.fixture(scope="module")
def made_run(tmp_path_factory):
    """A run of 80 updates with snapshots every tenth, written by two expert-parallel ranks."""
    folder = tmp_path_factory.mktemp("run")
    config = load_config(tiny_config(), ["train.ema_lengths=[0.05,0.1]", "parallel.ep=1"])
    for step in range(10, 91, 10):  # the last is of a run that went on
        make_checkpoint(folder / "averages", config, step)
    make_checkpoint(folder / "checkpoints", config, 80)
    return folder


def test_a_length_is_read_from_the_snapshots_up_to_the_checkpoint(made_run, tmp_path):
    checkpoint = Checkpoint(made_run)
    own = checkpoint.weights("length:0.10")
    assert own.keys() == checkpoint.weights("raw").keys()
    name = "blocks.1.mlp.experts.3.fc1_weight"
    shape = checkpoint.weights("raw")[name].shape
    by_kind = {s: made_whole(length_kind(s), name, shape) for s in TRACKS}
    assert torch.equal(own[name], by_kind[0.1])
    profiles = tracks(10, 80)
    factors, _ = closest_sum(profiles, Profile(0.07, 80))
    wanted = sum(f * by_kind[p.length].double() for f, p in zip(factors, profiles))
    found = checkpoint.weights("length:0.07")
    assert found.keys() == own.keys() and name in found and "none" not in found
    torch.testing.assert_close(found[name], wanted.float(), rtol=0, atol=1e-6)
    alone = tmp_path / "step_00000080"
    shutil.copytree(checkpoint.path, alone)
    assert torch.equal(Checkpoint(alone).weights("length:0.05")[name], by_kind[0.05])
    with pytest.raises(UserError, match=r"length:0.07 cannot be made.* 0 snapshots before it"):
        Checkpoint(alone).weights("length:0.07")


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("length:0.01", "(lengths 0.05, 0.1, 7 snapshots before it) misses its profile by 5"),
        ("length:0.5", "weights length:0.5: a length must be in 0.001..0.28"),
        ("length:0.0.5", "weights 'length:0.0.5' must be one of raw, ema, ema:0.7 for"),
        ("length:x", "weights 'length:x' must be one of raw, ema, ema:0.7 for"),
    ],
)
def test_lengths_that_cannot_be_are_refused(made_run, which, message):
    with pytest.raises(UserError) as error:
        Checkpoint(made_run).weights(which)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_run_without_lengths_and_a_spoiled_snapshot_are_named(made_run, tmp_path):
    make_checkpoint(tmp_path / "other", load_config(tiny_config(), []), 4)
    with pytest.raises(UserError, match=r"has no averages of train\.ema_lengths"):
        Checkpoint(tmp_path / "other").weights("length:0.07")
    run = tmp_path / "run"
    shutil.copytree(made_run, run)
    (run / "averages/step_00000030" / "ema_length_0.1-00001.safetensors").unlink()
    with pytest.raises(Corrupt, match=r"step_00000030.ema_length_0\.1-00001"):
        Checkpoint(run).weights("length:0.07")


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_the_planner_counts_every_average(stage):
    plans = []
    for more in ([], ["train.ema_lengths=[0.05,0.1]"], ["train.ema=[0.7,0.8,0.9]"]):
        config = load_config(tiny_config(), more)
        layout = resolve_layout(config, 2)
        plans.append(
            rank_memory(config, layout, engine_facts({"zero_optimization": {"stage": stage}}))
        )
    assert plans[1] == plans[2] and plans[1].ema == 3 * plans[0].ema
    assert plans[1].masters == plans[0].masters


@pytest.mark.full
def test_a_model_is_filled_with_no_more_than_its_own_copy_in_memory(tmp_path):
    """Of four averages."""
    words = [
        "model.depth=2",
        "moe.experts=8",
        "moe.interleave=false",
        "moe.pool=1",
        "parallel.ep=1",
    ]
    config = load_config(None, [*words, "train.ema_lengths=[0.05,0.1]"])
    for step in range(10, 50, 10):
        make_checkpoint(tmp_path / "averages", config, step)
    make_checkpoint(tmp_path / "checkpoints", config, 50)
    checkpoint, models = Checkpoint(tmp_path), []
    growth = peak_growth(lambda: models.append(whole_model(checkpoint, config, "length:0.06")))
    copy = sum(4 * parameter.numel() for parameter in models[0].parameters())
    assert copy > 5e7 and growth < copy + STREAMING_BYTES, (copy, growth)


# ------------------------------------------------------------------------------------------------
# in training


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """8 steps on 2 ranks, EP 2 and ZeRO 1, every state kept; and the same in two starts."""
    folder = tmp_path_factory.mktemp("lengths")
    words = [
        "train.ema_lengths=[0.1,0.2]",
        "train.ema_snapshot_every=1",
        "train.save_every=1",
        "train.keep=9",
        "train.schedule=constant",
    ]
    with Ranks(2, timeout=240.0) as ranks:
        mirror = f"train.mirror=file://{folder}/mirror"
        ranks.run(train_here, tiny(folder / "whole", *words, mirror), 2)
        ranks.run(train_here, tiny(folder / "halves", *words, "train.steps=6"), 2)
        last = folder / "halves/checkpoints"
        for step in (5, 6):  # as if it had been killed after a snapshot that it saved nothing of
            shutil.rmtree(last / f"step_0000000{step}")
        ranks.run(train_here, tiny(folder / "halves", *words), 2)
    return folder


@pytest.mark.full
def test_tracks_and_snapshots_of_a_run_are_what_its_weights_say(run):
    every = [Checkpoint(path) for path in complete_folders(run / "whole/checkpoints")]
    last = every[-1]
    assert len(every) == 8 and last.updates == 8
    assert [p.name for p in complete_folders(run / "whole/averages")] == [
        each.path.name for each in every
    ]
    profiles = [Profile(s, t) for t in range(1, 9) for s in (0.1, 0.2)]
    _, missed = closest_sum(profiles, Profile(0.15, 8))
    g = exponent(0.15)
    norm = math.sqrt((g + 1) ** 2 / ((2 * g + 1) * 8))
    made, moved = last.weights("length:0.15"), 0.0
    for name in made:
        weights = torch.stack([each.weights("raw")[name] for each in every]).double().flatten(1)
        for length in (0.1, 0.2):
            wanted = torch.from_numpy(shares(length, 8)) @ weights
            found = last.weights(f"length:{length}")[name].flatten().double()
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
        aim = torch.from_numpy(shares(0.15, 8)) @ weights
        spread = (weights - weights.mean(0)).square().sum(0).sqrt()
        off = (made[name].flatten().double() - aim).abs()
        assert (off <= missed * norm * spread + 1e-6).all(), name
        moved = max(moved, spread.max().item())
    assert moved > 1e-2
    away = Checkpoint(remote_path(f"file://{run}/mirror")).weights("length:0.15")
    assert all(torch.equal(away[name], value) for name, value in made.items())


@pytest.mark.full
def test_a_run_in_two_starts_has_the_same_snapshots_bit_for_bit(run):
    whole, halves = (run / name / "averages" for name in ("whole", "halves"))
    folders = complete_folders(whole)
    assert [p.name for p in complete_folders(halves)] == [p.name for p in folders]
    for folder in folders:
        snapshot = Checkpoint(folder)
        assert set(snapshot.kinds()) == {"ema_length_0.1", "ema_length_0.2"}
        there = json.loads((halves / folder.name / "checkpoint.json").read_text())
        here = json.loads((folder / "checkpoint.json").read_text())
        assert here["files"] == there["files"], "names, sizes and checksums"


@pytest.mark.full
def test_commands_take_lengths_and_a_sweep_marks_the_best(run, tmp_path):
    whole, out = str(run / "whole"), tmp_path / "sweep"
    sample = ["sample", "--checkpoint", whole, "--count", "2", "--weights"]
    scored = ["--reference", str(digits()), "--extractor", "digits", "--count", "80"]
    sweep = ["sweep", "--checkpoint", whole, *scored, "--out", str(out), "--ema-lengths"]
    cases = [
        [*sample, "length:0.15", "--out", str(tmp_path / "s")],
        [*sample, "length:0.01", "--out", str(tmp_path / "t")],
        [*sweep, "0.2,0.1,0.15"],
        [*sweep, "0.2,0.01"],
        [*sweep, "0.2,a"],
        [*sweep, "0.2", "--weights", "raw"],
        [*tiny(run / "whole", "train.ema_lengths=[0.1,0.15]", "parallel.ep=1", "train.steps=9")],
    ]
    found = [case[0] for case in run_cases(1, cases)]
    assert [case.returncode for case in found] == [0, 2, 0, 2, 2, 2, 2], found
    assert "step 8, length:0.15 weights" in found[0].stdout
    assert "misses its profile by" in found[1].stderr and "length:0.01" in found[3].stderr
    assert "--ema-lengths: '0.2,a' must be numbers" in found[4].stderr
    assert "--ema-lengths goes without --guidance, --scales and --weights" in found[5].stderr
    assert "train.ema_lengths (0.15) can only begin with the run" in found[6].stderr
    distances = {}
    for length in (0.1, 0.15, 0.2):
        card = json.loads((out / f"length_{length}" / "card.json").read_text())
        assert card["weights"] == f"length:{length}" and card["count"] == 80
        distances[length] = card["scores"]["frechet_distance"]
    best = min(distances, key=distances.__getitem__)
    text = (out / "sweep.md").read_text()
    assert f"\n| {best:g} | **{distances[best]:.4f}** |" in text and text.count("**") == 2
    assert json.loads((out / "sweep.json").read_text())["best"]["length of the average"] == best
    assert (out / "sweep.png").stat().st_size > 5000
