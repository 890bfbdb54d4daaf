"""Scores during training: every average swapped in, the verb's numbers, and training none the
wiser.
"""

import json
import re

import numpy as np
import pytest
import torch

from diffmoe.checkpoints.reader import Checkpoint
from diffmoe.commands.common import whole_model
from diffmoe.config import load_config
from diffmoe.errors import UserError
from diffmoe.evaluation import while_training
from diffmoe.evaluation.evaluate import evaluate
from diffmoe.evaluation.features import digits_extractor
from diffmoe.evaluation.reference_statistics import load_reference
from diffmoe.evaluation.scored_images import Subject, sampled_images
from diffmoe.parallel.groups import single_process
from diffmoe.parallel.spawn import Ranks
from programs import digits, losses, tiny, tiny_config, trained, zero
from test_bad_steps import events, heard

pytestmark = pytest.mark.full  # its fixtures take their time

COUNT = 80  # in batches of 16 on two ranks: the last round has more images than are asked for
SCORES = [
    "train.score_every=4",
    f"score.reference={digits()}",
    "score.extractor=digits",
    f"score.count={COUNT}",
    "sample.batch=16",
]


@pytest.fixture(scope="module")
def two_ranks():
    with Ranks(2, timeout=240.0) as ranks:
        yield ranks


def scored(arguments, fails_at):
    """Trains in this rank; rank 1 finds images not finite in round ``fails_at`` of its life."""
    original, rounds = while_training.to_uint8, 0

    def to_uint8(x):
        nonlocal rounds
        rounds += 1
        if rounds == fails_at and torch.distributed.get_rank() == 1:
            raise UserError("3 of 16 images hold values that are not finite")
        return original(x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(while_training, "to_uint8", to_uint8)
        return heard(arguments, 2)


@pytest.mark.parametrize("stage", [1, 3])
def test_every_average_gets_the_scores_of_the_verb_and_training_stays_the_same(
    two_ranks, tmp_path, stage
):
    (tmp_path / "ds.json").write_text(json.dumps(zero(stage)))
    arguments = tiny(
        tmp_path, *SCORES, "train.ema=[0.7, 0.5]", "--deepspeed_config", str(tmp_path / "ds.json")
    )
    (said, complaint), _ = two_ranks.run(scored, arguments, 4)
    assert complaint == "" and said.count("\nscores of step 8, ema:0.") == 2, said
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [(line["step"], line["weights"]) for line in lines] == [
        (4, "ema:0.7"),
        (8, "ema:0.7"),
        (8, "ema:0.5"),
    ]
    assert [(e["step"], e["event"], e["text"]) for e in events(tmp_path)] == [
        (
            4,
            "not scored",
            "no scores of ema:0.5: rank 1: 3 of 16 images hold values that are not finite",
        )
    ]
    checkpoint, extractor, world = Checkpoint(tmp_path), digits_extractor(), single_process().world
    cpu = torch.device("cpu")
    reference = load_reference(digits(), extractor, world, cpu)
    for line in lines[1:]:
        model = whole_model(checkpoint, checkpoint.config(), line["weights"]).eval()
        images = sampled_images(
            model, checkpoint.config(), Subject("", 8, line["weights"]), COUNT, "balanced", cpu
        )
        card = evaluate(images, reference, extractor, tmp_path / line["weights"], world, cpu)
        for name in ("frechet_distance", "spatial_frechet_distance", "inception_score"):
            assert line[name] == pytest.approx(getattr(card.scores, name), rel=1e-5), (
                line,
                card.scores,
            )
    assert lines[1]["frechet_distance"] != lines[2]["frechet_distance"]
    assert {line["extractor"] for line in lines} == {"digits"}
    assert "FD-digits" in said and "FID" not in said and "fid" not in said
    folder, _ = trained()
    assert losses(tmp_path) == pytest.approx(losses(folder), rel=0 if stage == 1 else 1e-5)
    if stage == 1:
        there, here = Checkpoint(folder), checkpoint
        for kind in there.kinds():
            assert all(
                torch.equal(value, here.tensors(kind)[name])
                for name, value in there.tensors(kind).items()
            ), kind


def test_a_sampler_that_does_not_finish_is_an_event_and_training_goes_on(two_ranks, tmp_path):
    words = ["sample.sampler=dopri5", "sample.steps=1", "train.sample_every=4"]
    (_, complaint), _ = two_ranks.run(heard, tiny(tmp_path, *SCORES, *words), 2)
    assert complaint == "" and losses(tmp_path) == losses(trained()[0])
    found = [(e["step"], e["event"]) for e in events(tmp_path)]
    assert sorted(found) == [(s, f"not {word}") for s in (4, 8) for word in ("sampled", "scored")]
    assert all("dopri5 did not finish" in e["text"] for e in events(tmp_path))


def test_what_scores_need_is_asked_for_before_the_first_step(two_ranks, tmp_path):
    with pytest.raises(
        UserError, match=r"score.reference \(''\) must be given for train.score_every \(5\)"
    ):
        load_config(tiny_config(), ["train.score_every=5"])
    for wrong, text in (
        (f"score.reference={tmp_path}/none", f"{tmp_path}/none"),
        ("score.extractor=none.pt", "none.pt"),
        ("score.count=20", r"count (20) must be at least"),
        ("score.vae=none", "pixels"),
    ):
        results = two_ranks.run(scored, tiny(tmp_path, *SCORES, wrong), 0)
        assert results[0][1] == results[1][1] and text in results[0][1], results
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        (
            {"mu": np.full(32, np.nan), "sigma": np.eye(32)},
            "mean holds 32 values that are not finite",
        ),
        ({"mu": np.zeros((1, 32)), "sigma": np.eye(32)}, "must be [d]"),
        ({"mu": np.zeros(2048), "sigma": np.eye(2048)}, "width 2048, those of the extractor 32"),
        (
            {"mu": np.zeros(32), "sigma": np.eye(32), "arr_0": np.zeros((50, 16, 16, 3), np.uint8)},
            "its images are 16 x 16, the samples 8 x 8",
        ),
        ({"arr_0": np.zeros((20, 8, 8, 3), np.uint8)}, "its images (20) must be at least"),
        ({"arr_0": np.zeros((99, 8, 8, 3))}, "must be uint8"),
    ],
)
def test_a_reference_that_is_none_is_refused_before_training(tmp_path, arrays, told):
    np.savez(tmp_path / "r.npz", **arrays)
    config = load_config(tiny_config(), [*SCORES, f"score.reference={tmp_path}/r.npz"])
    with pytest.raises(UserError, match=re.escape(told)) as caught:
        while_training.open_scorer(config, None, single_process().world, torch.device("cpu"))
    assert "r.npz" in str(caught.value) and "\n" not in str(caught.value)
