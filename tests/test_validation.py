"""The validation loss: what it is measured on, the same in every run and at any number of ranks."""

import json
import shutil

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffmoe.config import load_config
from diffmoe.data.feed import open_validation
from diffmoe.diffusion.randomness import validation_draws
from diffmoe.errors import UserError
from diffmoe.evaluation.generate import inference_rule
from diffmoe.models.dit import DiT
from diffmoe.models.logical import initialize
from diffmoe.parallel.collectives import AgreedError
from diffmoe.parallel.groups import single_process
from diffmoe.parallel.spawn import Ranks
from diffmoe.training.metrics import progress_line
from diffmoe.training.validation import open_validator, read_validations
from programs import digits, losses, tiny, tiny_config, trained
from test_run import copy_run, train_here

WORLD, CPU = single_process().world, torch.device("cpu")
SAMPLES = 75  # of 397; in batches of 16 on two or four ranks the last are filled up


def held_out(*more):
    """Overrides: the digits' last two shards are held out."""
    return [
        f"data.shards={digits()}/shard-00000[0-6].tar",
        f"data.validation={digits()}/shard-00000[78].tar",
        "train.validate_every=4",
        f"train.validate_samples={SAMPLES}",
        "sample.batch=16",
        "parallel.ep=1",
        *more,
    ]


def configured(*more):
    return load_config(tiny_config(), held_out(*more))


def model_of(config, seed=0):
    """A model that has learned nothing, with weights everywhere: the last layer's zeros would hide
    all others.
    """
    model = DiT(config.model, config.moe).eval()
    initialize(model, 0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.05 * torch.randn(value.shape, generator=generator))
    return model


def measured(*more, seed=0):
    config = configured(*more)
    return open_validator(config, WORLD, CPU).measure(model_of(config, seed))


def test_a_samples_noise_and_time_are_its_numbers_alone_and_times_lie_evenly():
    whole = validation_draws(range(400), (1, 8, 8))
    part = validation_draws([7, 300], (1, 8, 8))
    assert torch.equal(part.noise, whole.noise[[7, 300]])
    assert torch.equal(part.t, whole.t[[7, 300]]) and part.t[0] != part.t[1]
    for count in (100, 400):
        tenths = np.bincount((whole.t[:count] * 10).long(), minlength=10)
        assert tenths.min() >= count / 10 - 2 and tenths.max() <= count / 10 + 2, tenths
    assert abs(whole.noise.mean()) < 0.02 and abs(whole.noise.std() - 1) < 0.02
    assert (whole.drop == 1).all(), "no label is dropped, whatever train.label_drop"


@pytest.mark.parametrize("process", ["flow", "ddpm"])
def test_the_loss_is_that_of_every_sample_by_itself(process):
    more = ["diffusion.process=ddpm", "model.learn_sigma=true", "sample.sampler=ddim"]
    config = configured(*(more if process == "ddpm" else []))
    model, reader = model_of(config), open_validation(config)
    rule = inference_rule(config.moe, config.sample)
    found = open_validator(config, WORLD, CPU).measure(model)
    alone, taken, bins = [], 0, []
    for number in range(SAMPLES):
        x, y = (torch.from_numpy(v) for v in reader.read([number]))
        draws = validation_draws([number], (1, 8, 8))
        with torch.no_grad():
            if process == "flow":
                t = draws.t.view(-1, 1, 1, 1)
                output = model(t * x + (1 - t) * draws.noise, draws.t, y, rule)
                error = output.prediction - (x - draws.noise)
                alone.append(float(error.square().mean()))
                bins.append(int(draws.t * 10))
            else:
                from diffmoe.diffusion.ddpm import ddpm_loss, linear_schedule

                step = (draws.t.double() * 1000).long()
                loss, output = ddpm_loss(model, x, draws.noise, step, y, rule, linear_schedule())
                alone.append(float(loss))
                bins.append(int((1 - (step + 0.5) / 1000) * 10))
        taken += sum(stats.mask_TE.sum().item() for stats in output.moe)
    assert found.loss == pytest.approx(np.mean(alone), rel=1e-5)
    by_time = [np.mean([a for a, b in zip(alone, bins) if b == tenth]) for tenth in range(10)]
    assert found.loss_by_time == pytest.approx(by_time, rel=1e-5)
    assert found.experts_per_token == pytest.approx(taken / (SAMPLES * 16 * 2), rel=1e-9)
    assert found.load.shape == (2, 10, 4)
    share = np.bincount(bins, minlength=10) / SAMPLES
    assert (found.load.sum(axis=2).mean(axis=0) * share).sum() == pytest.approx(
        found.experts_per_token
    )


def test_no_setting_of_the_run_moves_what_is_measured():
    before = measured()
    for other in (
        ["run.seed=5"],
        ["train.label_drop=1"],
        ["train.batch=8", "moe.pool=8"],
        ["sample.batch=7"],
        ["diffusion.time_sampling=logit_normal"],
        ["data.flip=true"],
    ):
        assert measured(*other).loss == pytest.approx(before.loss, rel=1e-6), other
    assert measured(seed=1).loss != pytest.approx(before.loss, rel=1e-3), "another model"
    assert measured("train.validate_samples=null").loss != pytest.approx(before.loss, rel=1e-4)


@pytest.mark.parametrize(
    ("family", "used"),
    [("dense", None), ("ec", 1.0), ("tc", 1.0), ("diffmoe", None)],
)
def test_every_family_has_one(family, used):
    pool = ["moe.pool=1"] if family == "ec" else []
    found = measured(f"model.family={family}", *pool)
    assert np.isfinite(found.loss) and len(found.loss_by_time) == 10
    if family == "dense":
        assert found.experts_per_token is None and found.load.shape == (0, 10, 4)
    elif used is not None:
        assert found.experts_per_token == pytest.approx(used)
        assert found.load.sum(axis=2) == pytest.approx(used)
    record = json.loads(json.dumps(found.as_record()))
    assert record["loss"] == found.loss


def test_the_routing_rule_is_the_one_of_sampling():
    token, static, gamma = (
        measured(f"sample.{said}", "train.validate_samples=80")  # no batch is filled up
        for said in ("routing=token", "routing=static", "gamma=0")
    )
    assert static.experts_per_token == pytest.approx(1.0)
    assert gamma.experts_per_token == pytest.approx(4.0), "all experts take all tokens"
    assert token.loss != static.loss != gamma.loss


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["data.validation=''"], "data.validation ('') must be given for train.validate_every (4)"),
        (["train.validate_samples=0"], "train.validate_samples (0) must be at least 1"),
        (["train.validate_every=-1"], "train.validate_every (-1) must be at least 0"),
        (["train.validate_samples=398"], "train.validate_samples (398) must be at most the 397"),
        (["data.validation=none"], "none"),
        (["model.input_size=16"], "holds samples of shape (1, 8, 8)"),
        (["model.classes=9"], "has 10 classes; model.classes is 9"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_training(more, told):
    with pytest.raises(UserError) as caught:
        open_validator(configured(*more), WORLD, CPU)
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_a_sample_that_cannot_be_read_ends_the_measurement_and_not_the_run(tmp_path):
    shutil.copytree(digits(), tmp_path / "digits")
    config = configured(f"data.validation={tmp_path}/digits")
    validator = open_validator(config, WORLD, CPU)
    for shard in (tmp_path / "digits").glob("*.tar"):
        shard.unlink()
    with pytest.raises(AgreedError, match=r"shard-\d+.tar"):
        validator.measure(model_of(config))


def test_the_progress_line_has_it():
    record = {"step": 4, "loss": 1.0, "grad_norm": 1.0, "lr": 1e-3, "images_per_s": 9.0}
    record |= {"mfu": 0.1, "memory_gib": 0.1, "validation_loss": 0.25}
    assert "  validation 0.2500  " in progress_line(record, 8)


# ------------------------------------------------------------------------------------------- ranks


@pytest.mark.full
@pytest.mark.parametrize("routing", ["token", "batch", "static"])
def test_equal_on_one_two_and_four_ranks_whatever_the_micro_batch(
    tmp_path, worlds, small_pools, routing
):
    """A finished run measures what it has missed: the same weights everywhere."""
    found = {}
    for name, world, more in (
        ("one", 1, ["parallel.ep=1"]),
        ("micro", 1, ["parallel.ep=1", "train.micro_batch=4"]),
        ("two", 2, ["parallel.ep=2"]),
        ("four", 4, ["parallel.ep=2", "train.micro_batch=2"]),
    ):
        folder = tmp_path / name
        shutil.copytree(small_pools / "checkpoints", folder / "checkpoints")
        own = [a for a in held_out("moe.pool=4", *more) if not a.startswith("data.shards")]
        worlds(world).run(train_here, tiny(folder, *own, f"sample.routing={routing}"), world)
        (found[name],) = read_validations(folder)
        assert (found[name]["step"], found[name]["count"]) == (8, SAMPLES)
    one = found["one"]
    for name, other in found.items():
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-6), name
        assert other["loss_by_time"] == pytest.approx(one["loss_by_time"], rel=1e-5), name
        np.testing.assert_allclose(other["load"], one["load"], atol=2e-6, err_msg=name)


@pytest.fixture(scope="module")
def small_pools(tmp_path_factory, worlds):
    """A finished run of pools of 4 samples, which many a micro-batch holds whole."""
    folder = tmp_path_factory.mktemp("small_pools")
    worlds(1).run(train_here, tiny(folder, "moe.pool=4", "parallel.ep=1", "train.keep=1"), 1)
    return folder


@pytest.fixture(scope="module")
def worlds():
    made = {}

    def of(world):
        made[world] = made.get(world) or Ranks(world, timeout=240.0)
        return made[world]

    yield of
    for ranks in made.values():
        ranks.close()


@pytest.mark.full
def test_training_stays_the_same_and_a_resumed_run_measures_the_same(tmp_path, worlds):
    arguments = [a for a in held_out("parallel.ep=2") if not a.startswith("data.shards")]
    worlds(2).run(train_here, tiny(tmp_path / "whole", *arguments), 2)
    folder, _ = trained()
    assert losses(tmp_path / "whole") == losses(folder)
    first, last = read_validations(tmp_path / "whole")
    assert (first["step"], first["samples"], last["step"]) == (4, 64, 8)
    board = EventAccumulator(str(tmp_path / "whole/tensorboard")).Reload()
    assert [e.value for e in board.Scalars("validation/loss")] == pytest.approx(
        [first["loss"], last["loss"]]
    )
    lines = (tmp_path / "whole/metrics.jsonl").read_text().splitlines()
    records = {record["step"]: record for record in map(json.loads, lines)}
    assert records[5]["validation_loss"] == first["loss"]
    # Stopped at step 4 before it was measured, and killed in the middle of a line.
    again = copy_run(tmp_path / "again", 4)
    (again / "validation.jsonl").write_text('{"step": 4, "lo')
    worlds(2).run(train_here, tiny(again, *arguments), 2)
    assert read_validations(again) == [first, last]
