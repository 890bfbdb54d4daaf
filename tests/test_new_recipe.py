"""Resuming under another recipe (``train --new-recipe``): what stays, what goes on, what is
refused.
"""

from __future__ import annotations

import itertools
import json
import shutil

import numpy as np
import pytest
import torch

from diffmoe.checkpoints.reader import (
    BUFFERS,
    FIRST_MOMENT,
    MASTER,
    SECOND_MOMENT,
    Checkpoint,
    ema_kind,
)
from diffmoe.config import load_config
from diffmoe.data.feed import open_reader
from diffmoe.data.share import Share
from diffmoe.data.stream import Batch
from diffmoe.errors import UserError
from diffmoe.layout import resolve_layout
from diffmoe.models.dit import DiT
from diffmoe.models.logical import load_logical, logical_tensors
from diffmoe.moe.routing import RoutingRule
from diffmoe.training.resume import check_resumable
from diffmoe.training.step import micro_loss
from programs import Nursery, losses, tiny, tiny_config

pytestmark = pytest.mark.full  # its fixtures take their time

KINDS = (MASTER, FIRST_MOMENT, SECOND_MOMENT, ema_kind(0.7), BUFFERS)
OLD = (
    "moe.pool=8",
    "train.steps=4",
    "train.save_every=2",
    "train.keep=9",
    "train.schedule=constant",
)
NEW = (
    *OLD,
    "train.batch=24",
    "train.micro_batch=12",
    "train.steps=8",
    "train.lr=0.02",
    "data.window=2",
    "run.seed=3",
)


@pytest.fixture(scope="module")
def switched(tmp_path_factory):
    """A run of 4 steps at batch 16 that went on to step 8 at batch 24 with another seed, window and
    learning rate, and what the second start said; beside it what a start without the option said.
    """
    folder = tmp_path_factory.mktemp("switched")
    nursery = Nursery()
    assert [r.returncode for r in nursery.run(2, *tiny(folder, *OLD))] == [0, 0]
    refused = nursery.run(2, *tiny(folder, *NEW))
    said = nursery.run(2, *tiny(folder, *NEW, "--new-recipe"))
    assert [r.returncode for r in said] == [0, 0], said
    yield folder, refused, said, nursery


def test_without_the_option_it_is_refused_and_named(switched):
    _, refused, _, _ = switched
    assert [r.returncode for r in refused] == [2, 2]
    for text in (
        "train.batch: 16 -> 24",
        "data.window: 4 -> 2",
        "run.seed: 0 -> 3",
        "or say --new-recipe",
    ):
        assert text in refused[0].stderr, refused[0].stderr


def test_what_changed_is_said_and_recorded(switched):
    folder, _, said, _ = switched
    changes = ["run.seed: 0 -> 3", "data.window: 4 -> 2", "train.batch: 16 -> 24"]
    assert (
        all(change in said[0].stderr for change in changes)
        and "train.lr: 0.01 -> 0.02" in said[0].stdout
    )
    (event,) = [
        json.loads(line)
        for line in (folder / "events.jsonl").read_text().splitlines()
        if "new recipe" in line
    ]
    assert (
        event["step"] == 4
        and all(change in event["text"] for change in changes)
        and "from 72" in event["text"]
    )
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["samples"] for record in records] == [16, 32, 48, 64, 96, 120, 144, 168]
    assert "recipes" not in Checkpoint(folder / "checkpoints/step_00000004").counters
    for step in (6, 8):
        checkpoint = Checkpoint(folder / f"checkpoints/step_{step:08d}")
        assert checkpoint.counters["recipes"] == [{"step": 4, "shift": -1, "changes": changes}]
        assert checkpoint.samples == 72 + (step - 4) * 24, (
            "64 were seen; the new recipe's third step begins at 72"
        )


def test_the_first_step_starts_from_these_weights_and_moments(switched):
    """The step after the change again, by one plain process: Adam by torch from the stored weights
    and moments.
    """
    folder, _, _, nursery = switched
    one = folder.with_name("one step")
    shutil.copytree(folder, one)
    for step in (6, 8):
        shutil.rmtree(one / f"checkpoints/step_{step:08d}")
    assert nursery.run(2, *tiny(one, *NEW, "train.steps=5", "--new-recipe"))[0].returncode == 0
    before, after = (Checkpoint(one / f"checkpoints/step_{step:08d}") for step in (4, 5))
    config = after.config()
    model = DiT(config.model, config.moe, pool=8).train()
    load_logical(model, before.weights("raw"))
    tensors = logical_tensors(model)
    adam = torch.optim.AdamW(
        model.parameters(),
        lr=config.train.lr_at(4),
        betas=config.train.betas,
        eps=config.train.eps,
        weight_decay=0,
    )
    for tensor in tensors:
        moments = {
            kind: torch.empty_like(tensor.parameter) for kind in (FIRST_MOMENT, SECOND_MOMENT)
        }
        for kind, value in moments.items():
            for name, piece in tensor.pieces(value):
                piece.copy_(before.tensors(kind)[name])
        adam.state[tensor.parameter] = {"step": torch.tensor(4.0), **moments}
    reader = open_reader(config)
    numbers = range(72, 96)  # of both ranks, in pools that span them
    x, y = reader.read(numbers)
    loss = micro_loss(
        model,
        Batch(torch.from_numpy(x), torch.from_numpy(y), tuple(numbers)),
        config,
        RoutingRule("train", capacity=config.moe.capacity),
        torch.device("cpu"),
    )
    loss.total.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.clip)
    adam.step()
    assert losses(one)[5] == pytest.approx(loss.parts["loss"].item(), rel=1e-4)
    average = before.weights("ema")
    for tensor in tensors:
        for name, value in tensor.pieces(tensor.parameter.detach()):
            torch.testing.assert_close(after.weights("raw")[name], value, rtol=0, atol=2e-4)
            torch.testing.assert_close(
                after.weights("ema")[name], 0.7 * average[name] + 0.3 * value, rtol=0, atol=2e-4
            )


@pytest.mark.parametrize("option", [["--new-recipe"], []])
def test_a_stop_in_the_new_recipe_changes_nothing(switched, option):
    folder, _, _, nursery = switched
    again = folder.with_name(f"again{len(option)}")
    shutil.copytree(folder, again)
    shutil.rmtree(again / "checkpoints/step_00000008")
    result = nursery.run(2, *tiny(again, *NEW, *option))[0]
    assert (
        result.returncode == 0
        and "at step 6" in result.stdout
        and "new recipe" not in result.stderr
    )
    whole, stopped = (Checkpoint(place / "checkpoints/step_00000008") for place in (folder, again))
    assert whole.counters == stopped.counters and whole.samples == stopped.samples
    for kind in KINDS:
        for name, value in whole.tensors(kind).items():
            assert torch.equal(stopped.tensors(kind)[name], value), f"{kind} {name}"


def test_killed_before_its_first_checkpoint_it_changes_again_alike(switched):
    folder, _, _, nursery = switched
    again = folder.with_name("from the start")
    shutil.copytree(folder, again)
    for step in (6, 8):
        shutil.rmtree(again / f"checkpoints/step_{step:08d}")
    assert nursery.run(2, *tiny(again, *NEW, "--new-recipe"))[0].returncode == 0
    whole, repeated = (Checkpoint(place / "checkpoints/step_00000008") for place in (folder, again))
    assert whole.counters == repeated.counters
    assert all(
        torch.equal(repeated.weights("raw")[name], value)
        for name, value in whole.weights("raw").items()
    )


class Stored:
    """As much of a checkpoint as ``check_resumable`` asks for."""

    def __init__(self, config, step, samples, pool, **counters):
        self._config, self.step, self.samples, self.pool, self.ranks = (
            config,
            step,
            samples,
            pool,
            1,
        )
        self.counters, self.path = {"data": "a" * 64, **counters}, "step_00000005"

    def config(self):
        return self._config


def resumable(*overrides, new_recipe=True, data="a" * 64, **counters):
    before = load_config(tiny_config(), ["parallel.ep=1", "moe.pool=global"])
    now = load_config(tiny_config(), ["parallel.ep=1", "moe.pool=global", *overrides])
    return check_resumable(
        Stored(before, 5, 80, 16, **counters), now, resolve_layout(now, 1), data, new_recipe
    )


@pytest.mark.parametrize(
    "override, change",
    [
        ("run.seed=1", "run.seed: 0 -> 1"),
        ("data.flip=true", "data.flip: False -> True"),
        ("data.streams=8", "data.streams: 64 -> 8"),
        ("moe.pool=8", "moe.pool (samples): 16 -> 8"),
        ("model.input_size=16", "model.input_size: 8 -> 16"),
        ("model.position_scale=0.5", "model.position_scale: 1.0 -> 0.5"),
        ("moe.predictor_weight=0.5", "moe.predictor_weight: 1.0 -> 0.5"),
        (
            "diffusion.time_sampling=logit_normal",
            "diffusion.time_sampling: uniform -> logit_normal",
        ),
        ("diffusion.time_shift=2", "diffusion.time_shift: 1.0 -> 2.0"),
    ],
)
def test_parts_of_the_recipe_may_change(override, change):
    assert resumable(override)[1][-1].changes == [change]
    with pytest.raises(UserError, match="or say --new-recipe"):
        resumable(override, new_recipe=False)


def test_other_data_are_a_new_recipe():
    (recipe,) = resumable(data="b" * 64)[1]
    assert recipe.changes == [f"data.shards' contents: {'a' * 12} -> {'b' * 12}"]


@pytest.mark.parametrize(
    "override",
    [
        "model.width=48",
        "model.classes=11",
        "moe.experts=2",
        "moe.activation=swiglu",
        "moe.capacity=2",
        "diffusion.time_scale=1000",
        "diffusion.prediction=x",
        "model.qk_norm=true",
        "model.positions=rope",
        "model.norm=rms",
    ],
)
def test_the_model_may_not(override):
    with pytest.raises(UserError, match="belongs to another run") as caught:
        resumable(override, "run.seed=1")
    assert "--new-recipe" not in str(caught.value) and "run.seed" not in str(caught.value)


def test_muon_and_adamw_do_not_take_each_others_moments():
    change = r"belongs to another run \(train.optimizer: torch -> muon, which keeps other moments\)"
    with pytest.raises(UserError, match=change):
        resumable("train.optimizer=muon")


def test_the_same_recipe_is_none():
    earlier = {"step": 2, "shift": 3, "changes": ["run.seed: 4 -> 0"]}
    assert (
        resumable("train.lr=1", recipes=[earlier])[1][0].shift == 3
        and len(resumable(recipes=[earlier])[1]) == 1
    )


def test_no_sample_number_comes_twice():
    """Whatever the batches, numbers of the recipes follow each other, and less than a batch of them
    is passed over.
    """
    for before, now, steps in itertools.product((5, 8, 16), (4, 8, 24, 7), (1, 3, 10)):
        config = load_config(
            tiny_config(), ["parallel.ep=1", f"train.batch={now}", "moe.pool=global"]
        )
        stored = Stored(
            load_config(
                tiny_config(), ["parallel.ep=1", f"train.batch={before}", "moe.pool=global"]
            ),
            steps,
            steps * before,
            before,
        )
        recipes = check_resumable(stored, config, resolve_layout(config, 1), "a" * 64, True)[1]
        shift = recipes[-1].shift if recipes else 0
        first = Share(now, now, 1, 0, 1, shift).positions(steps)
        assert 0 <= first[0, 0] - steps * before < now and first[0, 0] % now == 0, (
            before,
            now,
            steps,
        )
        assert np.array_equal(Share(now, now, 1, 0, 1, shift).positions(steps + 1), first + now)
