"""Guidance: in an interval of times, by a guide of lower capacity or of other weights, and the
sweep over its scale.
"""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from diffmoe import DiffMoEPipeline
from diffmoe.checkpoints.reader import Checkpoint
from diffmoe.config import SampleConfig, check_guidance, check_training, load_config, override
from diffmoe.data.digits import write_digits
from diffmoe.diffusion.ddpm import ancestral
from diffmoe.diffusion.guidance import Others, open_others
from diffmoe.diffusion.sampling import euler, heun
from diffmoe.errors import UserError
from diffmoe.evaluation.capacity_report import CONDITIONAL, NULL, CapacityMeter, write_report
from diffmoe.evaluation.generate import _field, generate, generate_everywhere
from diffmoe.evaluation.protocol import departures
from diffmoe.evaluation.scored_images import Subject, sampled_images
from diffmoe.models.dit import DiT
from diffmoe.models.logical import initialize, load_buffers, load_logical
from diffmoe.moe.capacity import histogram
from diffmoe.moe.routing import RoutingRule
from diffmoe.parallel.groups import build_groups, single_process
from diffmoe.parallel.spawn import Ranks
from diffmoe.parity.plain import build_model
from programs import run_cases
from reference_models import DATA

CPU = torch.device("cpu")
KEPT = DATA / "checkpoint_2026_11"  # two experts, EMA 0.7
SIZES = (
    *("model.input_size=8", "model.channels=1", "model.width=16", "model.depth=2"),
    *("model.heads=2", "model.classes=3", "moe.experts=4", "moe.pool=1", "moe.interleave=false"),
    *("sample.steps=4", "sample.batch=6", "run.seed=2"),
)
DDPM = ("diffusion.process=ddpm", "sample.sampler=ancestral", "sample.cfg_channels=1")
BY_CAPACITY = ("sample.guide=capacity", "sample.guide_capacity=0.25")


def tiny(*overrides):
    return load_config(None, [*SIZES, *overrides])


class Known:
    """A model whose field is known: 100 x its factor, 10 x its class, and its dial; the same at all
    places and channels.  ``log``: factor and labels of each pass.
    """

    def __init__(self, config, log, factor=1.0):
        self.model, self.moe, self.log, self.factor = config.model, config.moe, log, factor

    def __call__(self, x, t, y, rule):
        self.log.append((self.factor, y.tolist()))
        value = 100 * self.factor + 10 * y + (rule.dial or 0.0)
        shape = (len(x), 2 * x.shape[1], *x.shape[2:])
        return SimpleNamespace(prediction=value.view(-1, 1, 1, 1).expand(shape).float())


def others_of(config, log):
    pair = Known(config, log, factor=3.0) if config.sample.pair else None
    return Others(Known(config, log, factor=2.0), pair)


def known_field(*overrides):
    """The field of class 1 out of three, a function of time alone, and the log of its passes."""
    config, log = tiny(*overrides), []
    field = _field(Known(config, log), config, torch.tensor([1]), others_of(config, log))
    return lambda t: field(torch.zeros(1, 1, 8, 8), torch.tensor([t])), log


OWN = (1.0, [1])  # the conditional pass, which says 110
GUIDES = {
    "null": ((), 130.0, (1.0, [3])),
    "capacity": (BY_CAPACITY, 110.25, (1.0, [1])),
    "other": (("sample.guide=other",), 210.0, (2.0, [1])),
}


@pytest.mark.parametrize(("guide", "weaker", "its"), GUIDES.values(), ids=GUIDES)
def test_the_guided_field_is_the_equation_inside_the_interval_alone(guide, weaker, its):
    asked = ("sample.cfg=3", "sample.cfg_interval=[0.25, 0.7]", *guide)
    flow, log = known_field(*asked)
    for t in (0.25, 0.5, 0.7):
        assert flow(t).unique().tolist() == [weaker + 3 * (110 - weaker)]
    assert log == 3 * [OWN, its]
    log.clear()
    for t in (0.0, 0.24, 0.71, 1.0):
        assert flow(t).unique().tolist() == [110.0]
    assert log == 4 * [OWN]

    ddpm, log = known_field(*asked, *DDPM)
    for step in (749, 500, 300):  # 1 - (step + 0.5) / 1000 is in the interval
        epsilon, v = ddpm(step).chunk(2, dim=1)
        assert epsilon.unique().tolist() == [weaker + 3 * (110 - weaker)]
        assert v.unique().tolist() == [110.0], "the conditional pass's"
    assert log == 3 * ([OWN, its] if guide else [(1.0, [1, 3])]), "the null class shares a pass"
    log.clear()
    for step in (999, 750, 299, 0):
        assert ddpm(step).unique().tolist() == [110.0]
    assert log == 4 * [OWN]


@pytest.mark.parametrize(
    ("sampler", "overrides", "passes"),
    [
        (euler, (), 10 + 4),  # at 0.3, 0.4, 0.5, 0.6
        (heun, (), 20 + 8),
        (ancestral, DDPM, 10 + 4),  # at steps 666, 555, 444, 333 of the 1000
    ],
)
def test_times_outside_the_interval_cost_one_pass(sampler, overrides, passes):
    interval = "sample.cfg_interval=[0.25, 0.69]"
    field, log = known_field("sample.cfg=2", interval, *BY_CAPACITY, *overrides)
    zeros = torch.zeros(1, 1, 8, 8)
    sampler(lambda z, t: field(t.item()), zeros, 10, lambda i: zeros)
    assert len(log) == passes


@pytest.mark.parametrize("learned", [(0.25, 1.0), (0.0, 0.25)])
def test_each_of_a_pair_samples_at_the_times_that_it_has_learned(learned):
    pair = (f"diffusion.time_range={list(learned)}", "sample.pair=other", "sample.cfg=3")
    field, log = known_field(*pair, *BY_CAPACITY)
    times = (0.0, 0.24, 0.25, 1.0)
    mine = [(t >= 0.25) == (learned[1] == 1) for t in times]
    for t, own in zip(times, mine):
        weaker, full = (110.25, 110.0) if own else (310.25, 310.0)
        assert field(t).unique().tolist() == [weaker + 3 * (full - weaker)]
    assert [factor for factor, _ in log[::2]] == [1.0 if own else 3.0 for own in mine]
    assert log[::2] == log[1::2], "each is its own guide"


def test_a_pair_by_its_place_has_learned_the_other_times(tmp_path):
    """Here twice the same weights, so that images are those of one model."""
    pipe, part = (DiffMoEPipeline.from_pretrained(KEPT) for _ in range(2))
    for name, learned in (("late", (0.4, 1.0)), ("early", (0.0, 0.5)), ("first", (0.0, 0.3))):
        diffusion = dataclasses.replace(pipe.config.diffusion, time_range=learned)
        config = dataclasses.replace(pipe.config, diffusion=diffusion)
        part._pretrained = dataclasses.replace(part._pretrained, config=config)
        part.save_pretrained(tmp_path / name)
    how = {"num_images": 3, "guidance_scale": 1.0, "num_inference_steps": 4}
    late = DiffMoEPipeline.from_pretrained(tmp_path / "late")
    with pytest.raises(UserError, match=r"sample.pair \(null\) must be the model of the times"):
        late(**how)
    config = override(late.config, [f"sample.pair={tmp_path / 'early'}"])
    late._pretrained = dataclasses.replace(late._pretrained, config=config)
    torch.testing.assert_close(late(**how).samples, pipe(**how).samples, atol=1e-6, rtol=0)
    for pair, words in (
        ("first", "its diffusion.time_range [0.0, 0.3] leaves times out that it is asked for, "),
        ("late", "beside the model's [0.4, 1.0]"),
    ):
        with pytest.raises(UserError) as caught:
            open_others(override(config, [f"sample.pair={tmp_path / pair}"]))
        assert words in str(caught.value)
    with pytest.raises(UserError, match=r"its diffusion.time_range \[0.4, 1.0\] leaves times out"):
        pipe(guide=str(tmp_path / "late"), **{**how, "guidance_scale": 2.0})


@pytest.mark.parametrize(("guide", "weaker", "its"), GUIDES.values(), ids=GUIDES)
@pytest.mark.parametrize("process", [(), DDPM])
def test_scale_1_is_the_model_alone(guide, weaker, its, process):
    field, log = known_field("sample.cfg=1", *guide, *process)
    assert field(0.5).unique().tolist() == [110.0] and log == [OWN]
    assert open_others(tiny("sample.cfg=1", *guide)) == Others()


# --------------------------------------------------------------------------------------------------
# capacity


def lively(config, groups=None):
    """A model whose output is not 0, with histograms of its own predictors' outputs."""
    model = build_model(config, 1, groups or single_process())
    whole = DiT(config.model, config.moe)
    initialize(whole, 0)
    with torch.no_grad():
        for i, parameter in enumerate(whole.parameters()):
            generator = torch.Generator().manual_seed(i)
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        seen = torch.Generator().manual_seed(7)
        x = torch.randn(60, 1, 8, 8, generator=seen)
        y = torch.arange(60) % config.model.classes
        output = whole(x, torch.linspace(0, 1, 60), y, RoutingRule("token"))
        for (_, layer), stats in zip(whole.moe_layers(), output.moe):
            if config.model.family == "diffmoe":
                layer.thresholds.commit_histogram(histogram(stats.logits_TE, 60), 1)
    from diffmoe.models.logical import logical_pieces, running_buffers

    load_logical(model, dict(logical_pieces(whole)))
    load_buffers(model, running_buffers(whole))
    return model.eval()


@pytest.mark.parametrize(
    ("overrides", "own", "guides", "within"),
    [
        (("sample.capacity=1",), 1.0, 0.25, 0.35),
        # Far from what the histograms have seen.
        (("sample.capacity=1", "sample.routing=batch", *DDPM), 1.2, 0.7, 0.35),
        (("sample.routing=static",), 1.0, 0.25, 0.0),
        (("model.family=ec",), 1.0, 0.25, 0.0),
    ],
    ids=["dial", "ddpm", "static", "ec"],
)
def test_the_guide_gives_a_token_fewer_experts(overrides, own, guides, within, tmp_path):
    config = tiny("sample.cfg=1.5", *BY_CAPACITY, *overrides)
    model = lively(config)
    meter = CapacityMeter(model, config, images=6, device=CPU)
    images = generate(model, config, [0, 1, 2] * 2, range(6), CPU, meter=meter)
    used = meter.merged(single_process().world)
    assert used.samples_bC[:, NULL].sum() == used.samples_bC[:, CONDITIONAL].sum() == 6 * 4
    assert used.mean(CONDITIONAL) == pytest.approx(own, rel=within)
    assert used.mean(NULL) == pytest.approx(guides, rel=within)
    if overrides == ("sample.capacity=1",):
        text = write_report(used, config, str(tmp_path / "it"))[1].read_text()
        assert "cfg 1.5, guide at capacity 0.25, " in text and "| t | conditional | guide |" in text
    by_null = dataclasses.replace(config, sample=dataclasses.replace(config.sample, guide=None))
    alone = override(config, ["sample.cfg=1"])
    others = [generate(model, c, [0, 1, 2] * 2, range(6), CPU) for c in (by_null, alone)]
    assert all((images - other).abs().max() > 1e-4 for other in others)


def over_ranks(*overrides):
    """All images, with the experts spread over all ranks."""
    config = tiny("sample.cfg=2", "sample.batch=2", *overrides)
    groups = build_groups(2, 1)
    model, labels = lively(config, groups), [0, 1, 2, 0]
    return generate_everywhere(model, config, labels, groups.world, CPU, others=another(config))


def another(config):
    """The model of other weights, where guidance needs it."""
    if config.sample.guide_checkpoint is None:
        return Others()
    model = DiT(config.model, config.moe).eval()
    initialize(model, 1)
    return Others(model)


@pytest.mark.full
@pytest.mark.parametrize("guide", [BY_CAPACITY, ("sample.guide=other",)], ids=["capacity", "other"])
def test_ranks_that_share_experts_make_the_images_of_one(guide):
    guide = (*guide, "sample.cfg_interval=[0.2, 0.6]")
    config = tiny("sample.cfg=2", *guide)
    alone = generate(lively(config), config, [0, 1, 2, 0], range(4), CPU, others=another(config))
    with Ranks(2) as ranks:
        images, none = ranks.run(over_ranks, *guide)
    torch.testing.assert_close(images, alone, atol=1e-5, rtol=0)
    assert not len(none)


# --------------------------------------------------------------------------------------------------
# other weights, and what is refused


def test_other_weights_by_their_place(tmp_path):
    pipe = DiffMoEPipeline.from_pretrained(KEPT)
    how = {"num_images": 3, "guidance_scale": 2.0, "num_inference_steps": 2}
    by_null = pipe(**how).samples
    alone = pipe(**{**how, "guidance_scale": 1.0}).samples
    # v + cfg (v - v): a guide that is the model itself moves nothing.
    for itself in (f"{KEPT}@ema:0.7", str(KEPT)):
        torch.testing.assert_close(pipe(guide=itself, **how).samples, alone, atol=1e-5, rtol=1e-5)
    raw = pipe(guide=f"{KEPT}@raw", **how).samples
    pipe.save_pretrained(tmp_path / "exported")
    exported = pipe(guide=str(tmp_path / "exported"), **how).samples
    torch.testing.assert_close(exported, alone, atol=1e-5, rtol=1e-5)
    assert (raw - alone).abs().max() > 1e-5 and (raw - by_null).abs().max() > 1e-5
    assert torch.equal(pipe(guide="null", **how).samples, by_null)
    assert pipe(guide="capacity", guide_capacity=0.3, **how).capacity < pipe(**how).capacity
    config = Checkpoint(KEPT).config()
    for guide, asked, complaint in (
        ("./nowhere", (), "model (./nowhere) does not exist"),
        (f"{KEPT}@ema:0.5", (), "ema:0.5"),
        (f"{KEPT}@length:0.1", (), "has no averages of train.ema_lengths"),
        (str(KEPT), ("model.classes=7",), "its model.classes (10) is not the model's (7)"),
        (str(KEPT), ("diffusion.prediction=x",), "its diffusion.prediction (velocity) is not the"),
        (str(KEPT), ("model.learn_sigma=true", *DDPM), "for diffusion.process (flow)"),
    ):
        with pytest.raises(UserError) as caught:
            open_others(override(config, [f"sample.guide={guide}", *asked]))
        assert str(caught.value).startswith(f"sample.guide ({guide}): ")
        assert complaint in str(caught.value)


def test_label_drop_0_needs_another_guide_and_training_has_no_other_weights():
    undropped = tiny("train.label_drop=0", "sample.cfg=2", *BY_CAPACITY)
    check_guidance(undropped, training=True)
    early = ("diffusion.time_range=[0,0.4]", "train.sample_every=0")
    check_training(tiny(*early))
    with pytest.raises(UserError, match=r"diffusion.time_range \(\[0.0, 0.4\]\) leaves times out"):
        check_training(tiny(*early, "train.sample_every=5"))
    elsewhere = tiny("train.label_drop=0", "sample.cfg=2", "sample.guide=runs/other")
    check_guidance(elsewhere)
    with pytest.raises(UserError, match=r"sample.guide \(runs/other\) must be null or capacity"):
        check_guidance(elsewhere, training=True)
    with pytest.raises(UserError, match="train.label_drop"):
        check_guidance(tiny("train.label_drop=0", "sample.cfg=2"))
    fresh = tiny("sample.cfg=2", *BY_CAPACITY)
    with pytest.raises(UserError, match=r"sample.guide \(capacity 0.25\) needs histograms"):
        generate(DiT(fresh.model, fresh.moe).eval(), fresh, [0], [0], CPU)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["sample.cfg_interval=[0.6, 0.2]"], "sample.cfg_interval ((0.6, 0.2)) must be two times"),
        (["sample.cfg_interval=[0, 2]"], "sample.cfg_interval ((0.0, 2.0)) must be two times"),
        (
            ["sample.cfg_interval=[0, 0.5]", "sample.sampler=dopri5"],
            "sample.cfg_interval ((0.0, 0.5)) must be null for sample.sampler (dopri5)",
        ),
        (["sample.guide="], "sample.guide (null"),
        (["sample.guide=capacity", "model.family=dense"], "not model.family dense"),
        (["sample.guide=capacity", "model.family=tc"], "not model.family tc"),
        (["sample.guide=capacity", "model.family=prototype"], "not model.family prototype"),
        (
            ["sample.guide=capacity", "model.family=race"],
            "not model.family race under sample.routing (token)",
        ),
        (
            ["sample.guide=capacity", "sample.guide_capacity=1"],
            "sample.guide_capacity (1.0) must be above 0 and below moe.capacity (1.0)",
        ),
        (
            ["sample.guide=capacity", "sample.capacity=0.4"],
            "sample.guide_capacity (0.5) must be above 0 and below sample.capacity (0.4)",
        ),
    ],
)
def test_guidance_that_cannot_be_is_one_line(overrides, words):
    if overrides == ["sample.guide="]:  # YAML's null: the default
        assert tiny(*overrides).sample.guide is None
        return
    with pytest.raises(UserError) as caught:
        tiny(*overrides)
    assert words in str(caught.value) and "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------------------
# cards and the sweep


def images_of(*overrides, others=Others()):
    config = tiny(*overrides)
    subject, model = Subject("run/step_00000008", 8, "ema"), DiT(config.model, config.moe)
    initialize(model, 0)
    return sampled_images(model, config, subject, 70, "balanced", CPU, None, others)


def test_other_guidance_is_another_card_and_no_published_one():
    plain = images_of("sample.cfg=1.5")
    known = {field.name for field in dataclasses.fields(SampleConfig)}
    new = {"cfg_interval", "guide", "guide_capacity", "pair", "dtype"}
    assert set(plain.settings["sample"]) == known - new - {"columns"}, (
        "as before there was a choice"
    )
    other = DiT(tiny().model, tiny().moe)
    for overrides, guide in (
        (["sample.cfg_interval=[0.2, 0.8]"], None),
        (BY_CAPACITY, None),
        (["sample.guide=runs/other"], other),
    ):
        made = images_of("sample.cfg=1.5", *overrides, others=Others(guide))
        assert made.settings != plain.settings
        card = SimpleNamespace(**made.card, count=70, splits=1, extractor="x", extractor_sha256="")
        asked = "cfg_interval" if "interval" in overrides[0] else "guide"
        assert any(text.startswith(f"{asked} ") for text in departures(card))
        assert made.card["guidance"] and (made.card["guide_sha256"] is None) == (guide is None)
        # At scale 1 nothing is asked of it, and the images are the same.
        alone = images_of("sample.cfg=1", *overrides)
        assert alone.settings == images_of("sample.cfg=1").settings


@pytest.mark.full
def test_the_sweep_marks_the_best_scale_of_each_guide(tmp_path):
    write_digits(tmp_path / "digits")
    sweep = [
        *("sweep", "--checkpoint", KEPT, "--guidance", f"null,capacity,{KEPT}@raw"),
        *("--scales", "2,1,4", "--guide-capacity", "0.3", "--count", "70"),
        *("--reference", tmp_path / "digits", "--extractor", "digits", "sample.batch=35"),
    ]
    one, bad, nowhere, again = (
        [*sweep, "--out", tmp_path / "one"],
        [*sweep, "--out", tmp_path / "bad", "sample.sampler=dopri5", "--cfg-interval", "0", "0.5"],
        [*sweep, "--out", tmp_path / "bad", "--guidance", "null,./nowhere"],
        [*sweep, "--out", tmp_path / "one"],
    )
    [[result], [refused], [absent], [repeated]] = run_cases(1, [one, bad, nowhere, again])
    assert absent.returncode == 2 and "sample.guide (./nowhere): " in absent.stderr
    assert not (tmp_path / "bad").exists(), "said before an image is made"
    assert result.returncode == repeated.returncode == 0, (result, repeated)
    assert refused.returncode == 2 and "sample.sampler (dopri5)" in refused.stderr
    tree = json.loads((tmp_path / "one" / "sweep.json").read_text())
    scores = {(p["curve"], p["cfg"]): p["frechet_distance"] for p in tree["points"]}
    guides = ["null", "capacity", f"{KEPT}@raw"]
    assert set(scores) == {(guide, scale) for guide in guides for scale in (1.0, 2.0, 4.0)}
    assert len({scores[guide, 1.0] for guide in guides}) == 1, "the model alone, once"
    assert len(set(scores.values())) == 7
    best = min(scores, key=scores.get)
    assert scores[best] == scores[tree["best"]["curve"], tree["best"]["cfg"]]
    text = (tmp_path / "one" / "sweep.md").read_text()
    for guide in guides:
        least = min(scores[guide, scale] for scale in (1.0, 2.0, 4.0))
        [marked] = [p for p in tree["points"] if p["curve"] == guide and p["best"]]
        assert marked["frechet_distance"] == least and f"**{least:.4f}**" in text
    assert (tmp_path / "one" / "sweep.png").stat().st_size > 5000
    assert "sampling, batches" not in repeated.stdout + repeated.stderr
    # Two ranks make the same points.
    ended = run_cases(2, [[*sweep, "--out", tmp_path / "two"]])
    assert [rank.returncode for rank in ended[0]] == [0, 0], ended
    tree = json.loads((tmp_path / "two" / "sweep.json").read_text())
    for point in tree["points"]:
        np.testing.assert_allclose(
            point["frechet_distance"], scores[point["curve"], point["cfg"]], rtol=1e-4
        )
