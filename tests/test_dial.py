"""The capacity dial: thresholds for any capacity out of histograms, filled from the EMA weights,
and the report of the capacity that sampling used.
"""

import dataclasses
import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn.datasets import load_digits

from diffmoe.checkpoints.reader import Checkpoint
from diffmoe.config import TrainConfig, load_config
from diffmoe.data.digits import DIGITS_META
from diffmoe.data.shards import write_shards
from diffmoe.data.stream import Batch
from diffmoe.errors import UserError
from diffmoe.evaluation.capacity_report import (
    NULL,
    CapacityMeter,
    CapacityUsed,
    report_tree,
    write_report,
)
from diffmoe.evaluation.generate import generate, generate_everywhere
from diffmoe.models.dit import DiT
from diffmoe.models.logical import initialize, load_buffers, load_logical
from diffmoe.moe.capacity import (
    HISTOGRAM_BINS,
    HISTOGRAM_DECAY,
    Thresholds,
    dialled_thresholds,
    histogram,
)
from diffmoe.moe.routing import RoutingRule
from diffmoe.parallel.groups import build_groups, single_process
from diffmoe.parallel.spawn import Ranks
from diffmoe.parity.cases import Case
from diffmoe.parity.plain import build_model, plain_training, synthetic_batch
from diffmoe.parity.table import start_training
from diffmoe.training.step import counts_for_dial, micro_loss
from programs import TINY, run_cases

CPU = torch.device("cpu")
EXPERTS, HELD = 4, 6  # every sixth digit is held out


# --------------------------------------------------------------------------------------------------
# histograms


def sure_logits(tokens, seed=0):
    """As of a trained predictor: most far below 0, some far above."""
    generator = torch.Generator().manual_seed(seed)
    no = -20 + 8 * torch.randn(tokens, EXPERTS, generator=generator)
    yes = 6 + 2.5 * torch.randn(tokens, EXPERTS, generator=generator)
    return torch.where(torch.rand(tokens, EXPERTS, generator=generator) < 0.25, yes, no)


def unsure_logits(tokens, seed=0):
    """As of a predictor that has learned little more than the mean."""
    return 0.2 * torch.randn(tokens, EXPERTS, generator=torch.Generator().manual_seed(seed)) - 1.1


@pytest.mark.parametrize(
    "logits", [sure_logits(64_000), unsure_logits(64_000), sure_logits(64_000).double()]
)
@pytest.mark.parametrize("capacity", [0.1, 0.4, 0.7, 1.0, 1.5, 2.3, 3.7])
def test_thresholds_agree_with_exact_quantiles(logits, capacity):
    thresholds = dialled_thresholds(histogram(logits, samples=1000), capacity)
    passing = (logits.sigmoid() > thresholds).double().mean(0)
    assert passing.numpy() == pytest.approx(capacity / EXPERTS, rel=0.03)
    assert passing.sum().item() == pytest.approx(capacity, rel=0.01 if capacity > 0.1 else 0.03)
    exact = logits.double().quantile(1 - capacity / EXPERTS, dim=0)
    assert thresholds.double().logit().numpy() == pytest.approx(exact.numpy(), rel=0.05, abs=0.01)


def test_thresholds_fall_as_the_dial_rises():
    counts = histogram(sure_logits(6400), samples=100)
    found = torch.stack([dialled_thresholds(counts, c) for c in np.linspace(0.01, EXPERTS, 200)])
    assert (found.diff(dim=0) <= 0).all() and (found < 1).all()


def test_all_tokens_pass_at_the_ends_of_dial_and_constant():
    thresholds = Thresholds(EXPERTS, 0.95)
    thresholds.commit_histogram(histogram(sure_logits(6400), samples=100), step=1)
    underflow = torch.full((3, EXPERTS), -200.0)  # its sigmoid is 0 in fp32
    for all_pass in (thresholds.chosen(None, float(EXPERTS)), thresholds.chosen(0.0, None)):
        assert (underflow.sigmoid() > all_pass).all()


def test_outputs_beyond_the_bins_and_not_finite_are_counted():
    logits = torch.tensor([[float("nan"), float("inf"), -float("inf"), 1e4]]).repeat(16, 1)
    counts = histogram(logits, samples=1)
    assert (
        (counts.sum(1) == 16).all() and counts[2, 0] == 16 and counts[1, -1] == counts[3, -1] == 16
    )
    assert (dialled_thresholds(counts, 1.0)[[1, 3]] < logits[0, [1, 3]].sigmoid()).all()


def test_the_same_tokens_of_a_sample_count_wherever_it_is():
    logits = sure_logits(12 * 256)
    whole = histogram(logits, samples=12)
    parts = [
        histogram(part, samples=len(part) // 256) for part in logits.split([256, 5 * 256, 6 * 256])
    ]
    assert torch.equal(whole, sum(parts))
    assert (whole.sum(1) == 12 * 52).all()
    marked = torch.full((256, 256), -1.0).fill_diagonal_(1.0)  # expert i tells token i
    counted = (histogram(marked, samples=1)[:, HISTOGRAM_BINS // 2 :].sum(1) > 0).view(16, 16)
    assert set(counted.sum(0).tolist()) == set(counted.sum(1).tolist()) == {3, 4}, (
        "rows or columns of the image are favoured"
    )


def test_counts_fade_by_the_step():
    thresholds = Thresholds(EXPERTS, decay=0.5)
    assert not thresholds.has_histogram
    one = torch.ones(EXPERTS, HISTOGRAM_BINS)
    thresholds.commit_histogram(one, 3)
    thresholds.commit_histogram(one, 4)
    thresholds.commit_histogram(one, 14)
    assert thresholds.has_histogram
    expected = (1 + HISTOGRAM_DECAY) * HISTOGRAM_DECAY**10 + 1
    assert thresholds.histogram.numpy() == pytest.approx(expected, rel=1e-5)


def test_counting_comes_before_what_may_use_it():
    train = dataclasses.replace(TrainConfig(), steps=1230, save_every=500, sample_every=200)
    counted = [step for step in range(1230) if counts_for_dial(train, step)]
    assert {*range(469, 500), *range(969, 1000), *range(188, 200), *range(1198, 1230)} <= set(
        counted
    )
    assert len(counted) <= 0.15 * 1230 and 0 not in counted and 500 not in counted
    assert counts_for_dial(dataclasses.replace(train, save_every=0, sample_every=0, steps=2), 1)


# --------------------------------------------------------------------------------------------------
# training


def counted(case):
    """What the second step alone adds to one rank's histograms [layers, E, bins], and the step of
    the last count.
    """
    training = start_training(case, 0, CPU)
    found = [layer.thresholds for _, layer in training.engine.model.moe_layers()]
    training.step(0)
    for thresholds in found:
        thresholds.histogram.zero_()
    training.step(1)
    training.engine.engine.destroy()
    return torch.stack([t.histogram for t in found]).numpy(), [int(t.counted_at) for t in found]


def counted_plainly(case):
    """The same from :mod:`diffmoe.parity.plain`: its moving average after two steps, on the second
    step's samples.
    """
    config = case.config()
    reference = plain_training(config, accumulation=1, pool=case.layout().pool, steps=2, device=CPU)
    model = build_model(config, case.layout().pool, single_process()).eval()
    load_logical(model, reference.ema)
    with torch.no_grad():
        batch = synthetic_batch(config, range(case.batch, 2 * case.batch))
        reports = micro_loss(model, batch, config, RoutingRule(), CPU).output.moe
    return torch.stack([histogram(stats.logits_TE, case.batch) for stats in reports]).numpy()


def assert_counted_once(ranks, case):
    wanted = counted_plainly(case)
    assert (wanted.sum(2) == 16 * 16).all()  # of 16 samples every token, once
    assert np.count_nonzero(wanted) > 3 * wanted[..., 0].size
    for counts, at in ranks.run(counted, case):
        assert at == [1, 1] and (counts.sum(2) == 16 * 16).all(), case.label
        # Rounding may carry a token over an edge.
        assert np.abs(counts.cumsum(2) - wanted.cumsum(2)).max() <= 2, case.label


@pytest.fixture(scope="module")
def two():
    with Ranks(2, timeout=60) as ranks:
        yield ranks


@pytest.mark.full
@pytest.mark.parametrize(
    "case",
    [Case(2, 2, 3, "selective", 2, "4", 16), Case(2, 1, 1, "block", 1, "4", 16)],
    ids=lambda case: case.label,
)
def test_counted_once_a_step(two, case):
    assert_counted_once(two, case)


@pytest.mark.slow
def test_counted_once_a_step_in_other_layouts():
    cases = [
        Case(1, 1, 0, "none", 1, "4", 16),
        Case(1, 1, 1, "block", 4, "4", 16),
        Case(4, 2, 1, "block", 2, "4", 16),
        Case(4, 4, 2, "selective", 1, "4", 16),
    ]
    for world in (1, 4):
        with Ranks(world, timeout=60) as ranks:
            for case in (c for c in cases if c.world == world):
                assert_counted_once(ranks, case)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(run folder, results): a small model trained for seconds."""
    folder = tmp_path_factory.mktemp("dial")
    images, labels = load_digits(return_X_y=True)
    kept = [i for i in range(len(images)) if i % HELD]
    write_shards(
        ((f"{i:04d}", images[i].reshape(1, 8, 8).astype(np.uint8), int(labels[i])) for i in kept),
        folder / "shards",
        samples_per_shard=200,
        meta=DIGITS_META,
    )
    tree = {
        **TINY,
        "data": {"shards": str(folder / "shards")},
        "parallel": {"ep": 1},
        "moe": {"experts": EXPERTS, "pool": 64},
        "train": {
            "steps": 256,
            "batch": 64,
            "lr": 4e-3,
            "warmup": 10,
            "schedule": "cosine",
            "clip": 1.0,
            "ema": 0.98,
            "log_every": 64,
            "save_every": 256,
        },
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    run = str(folder / "run")
    sample = ["sample", "--checkpoint", run, "sample.steps=5", "--capacity", "0.7"]
    results = run_cases(
        1,
        [
            ["--config", str(folder / "config.yaml"), f"run.folder={run}"],
            [*sample, "--count", "15", "--report", "--out", str(folder / "one")],
            [*sample, "--count", "2", "--out", str(folder / "raw"), "--weights", "raw"],
            [*sample, "sample.gamma=0.4"],
            [*sample[:-1], "4.5"],
        ],
    )
    return folder, results


def sampling_model(folder):
    checkpoint = Checkpoint(folder / "run")
    config = checkpoint.config()
    model = DiT(config.model, config.moe, pool=64).eval()
    load_logical(model, checkpoint.weights("ema"))
    load_buffers(model, checkpoint.tensors("buffers"))
    return model, config


@torch.no_grad()
def capacity_of(model, config, rule, passes=10, samples=250):
    """Experts per token, by layer, on the digits that training never saw."""
    images, labels = load_digits(return_X_y=True)
    held = np.arange(0, len(images), HELD)[:samples]
    x = torch.from_numpy(images[held] / 8 - 1).float().view(-1, 1, 8, 8)
    y, used = torch.from_numpy(labels[held]), 0
    for i in range(passes):
        batch = Batch(x, y, tuple(range(10**9 + i * samples, 10**9 + (i + 1) * samples)))
        reports = micro_loss(model, batch, config, rule, CPU).output.moe
        used = (
            used + torch.tensor([stats.mask_TE.float().sum(1).mean() for stats in reports]) / passes
        )
    return used


@pytest.mark.full
@pytest.mark.parametrize("kind", ["token", "batch"])
def test_the_dial_is_met_on_held_out_data(trained, kind):
    model, config = sampling_model(trained[0])
    found = {
        dial: capacity_of(model, config, RoutingRule(kind, dial=dial)) for dial in (0.7, 1.0, 2.3)
    }
    for dial, used in found.items():
        assert used.mean().item() == pytest.approx(dial, rel=0.03), (dial, used)
    assert (capacity_of(model, config, RoutingRule(kind, dial=EXPERTS), passes=1) == EXPERTS).all()


@pytest.mark.full
def test_sampling_dials_and_reports(trained):
    folder, results = trained
    assert [r[0].returncode for r in results] == [0, 0, 0, 2, 2], results
    assert (
        "note: the dial was set on the EMA weights (the default); these may use"
        in results[2][0].stdout
    )
    assert (
        "sample.capacity (0.7) and sample.gamma (0.4) both set the thresholds"
        in results[3][0].stderr
    )
    assert (
        "sample.capacity (4.5) must be above 0 and at most moe.experts (4)" in results[4][0].stderr
    )
    assert "capacity used: " in results[1][0].stdout
    tree = json.loads((folder / "one.capacity.json").read_text())
    assert tree["passes"] == 15 * 5 * 2  # images x Euler steps x both halves of guidance
    assert tree["thresholds"] == "dial" and tree["dial"] == 0.7 and len(tree["by_time"]) == 5
    assert tree["capacity"] == pytest.approx(np.mean(list(tree["by_layer"].values())), rel=1e-9)
    assert tree["capacity"] == pytest.approx((tree["conditional"] + tree["null"]) / 2, rel=1e-9)
    assert sorted(row["class"] for row in tree["by_class"]) == list(range(10))
    ranked = [row["capacity"] for row in tree["by_class"]]
    assert ranked == sorted(ranked, reverse=True)
    table = (folder / "one.capacity.md").read_text()
    assert "dialled 0.7" in table and "| block 1 |" in table
    with Image.open(folder / "one.capacity.png") as image:
        assert image.size[0] > 1000


def sampled(folder):
    """What one of several ranks reports of the 15 images that the command sampled."""
    model, config = sampling_model(folder)
    config = dataclasses.replace(
        config, sample=dataclasses.replace(config.sample, steps=5, capacity=0.7)
    )
    meter = CapacityMeter(model, config, 15, CPU)
    world = build_groups(1, 1).world
    generate_everywhere(model, config, [i % 10 for i in range(15)], world, CPU, meter=meter)
    return report_tree(meter.merged(world), config)


@pytest.mark.full
def test_ranks_report_together(trained, two):
    one = json.loads((trained[0] / "one.capacity.json").read_text())
    found = two.run(sampled, trained[0])
    assert found[0] == found[1]
    # The sixteenth image, which fills up the second rank, is left out.  Another batch rounds
    # otherwise.
    assert found[0]["passes"] == one["passes"]
    assert found[0]["capacity"] == pytest.approx(one["capacity"], rel=2e-3)
    assert dict(map(dict.values, found[0]["by_class"])) == pytest.approx(
        dict(map(dict.values, one["by_class"])), rel=0.02
    )


@pytest.mark.full
def test_a_checkpoint_keeps_histograms_and_older_ones_still_load(trained):
    folder, _ = trained
    model, config = sampling_model(folder)
    tensors = dict(Checkpoint(folder / "run").tensors("buffers"))
    layers = [layer for _, layer in model.moe_layers()]
    assert all(
        layer.thresholds.has_histogram and layer.thresholds.counted_at == 255 for layer in layers
    )
    older = {
        name: value
        for name, value in tensors.items()
        if "histogram" not in name and "counted_at" not in name
    }
    load_buffers(model, older)
    assert not any(layer.thresholds.has_histogram for layer in layers)
    assert all(layer.thresholds.observations == 256 for layer in layers)
    generate(model, config, [0], [0], CPU)
    dialled = dataclasses.replace(config, sample=dataclasses.replace(config.sample, capacity=0.7))
    with pytest.raises(
        UserError, match=r"sample.capacity \(0.7\) needs histograms .* this one has none"
    ):
        generate(model, dialled, [0], [0], CPU)
    load_buffers(model, tensors)
    generate(model, dialled, [0], [0], CPU)
    name = next(name for name in tensors if name.endswith("histogram"))
    with pytest.raises(UserError, match=rf"{name} has shape \(4, 7\) instead of \(4, 256\)"):
        load_buffers(model, {**tensors, name: torch.zeros(4, 7)})


# --------------------------------------------------------------------------------------------------
# report


def tiny(*overrides):
    return load_config(
        None,
        [
            "model.input_size=8",
            "model.width=16",
            "model.depth=2",
            "model.heads=2",
            "model.classes=5",
            "moe.experts=4",
            "sample.steps=4",
            "sample.batch=3",
            *overrides,
        ],
    )


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("model.family=ec", "moe.pool=1"),
        ("model.family=tc", "moe.top_k=2"),
        ("diffusion.process=ddpm", "sample.sampler=ancestral"),
        ("sample.sampler=heun", "sample.cfg=1"),
    ],
)
def test_the_meter_counts_what_the_layers_report(overrides):
    config = tiny(*overrides)
    model = DiT(config.model, config.moe).eval()
    initialize(model, 0)
    taken = []
    for _, layer in model.moe_layers():
        layer.register_forward_hook(lambda _layer, _args, result: taken.append(result[1].tokens_BE))
    meter = CapacityMeter(model, config, images=5, device=CPU)
    generate(model, config, [0, 1, 2, 3, 4], range(5), CPU, meter=meter)
    used = meter.merged(single_process().world)
    assert used.mean() == pytest.approx(
        sum(t.sum().item() for t in taken) / 16 / sum(len(t) for t in taken)
    )
    evaluations = {"heun": 8}.get(config.sample.sampler, 4)
    halves = 1 if config.sample.cfg == 1 else 2
    assert used.samples_bC.sum() == 5 * evaluations * halves
    assert used.samples_bC[:, NULL].sum() == 5 * evaluations * (halves - 1)
    if halves == 2:
        assert (used.samples_bC.sum(1) == 10).all()  # one bin a step
    if config.model.family == "tc":
        assert used.by_class() == [(c, 2.0) for c in range(5)]
    json.dumps(report_tree(used, config), allow_nan=False)


def test_images_that_fill_up_a_rank_are_left_out():
    config = tiny("sample.cfg=1")
    model = DiT(config.model, config.moe).eval()
    initialize(model, 0)
    meter = CapacityMeter(model, config, images=2, device=CPU)
    generate(model, config, [0, 1, 2], range(3), CPU, meter=meter)
    used = meter.merged(single_process().world)
    assert used.samples_bC.sum(0).tolist() == [4, 4, 0, 0, 0, 0] and [
        c for c, _ in used.by_class()
    ] in ([0, 1], [1, 0])


def test_report_of_a_thousand_classes(tmp_path):
    rng = np.random.default_rng(0)
    samples = np.ones((100, 1001))
    samples[3] = 0
    used = CapacityUsed(
        rng.random((12, 100, 1001)) * samples,
        samples,
        tuple(f"block {2 * i + 1}" for i in range(12)),
    )
    json_path, table, image = write_report(used, load_config(None, []), str(tmp_path / "cfg1.5"))
    assert (
        json_path.name == "cfg1.5.capacity.json"
        and json.loads(json_path.read_text())["by_time"][3]["null"] is None
    )
    assert len(table.read_text().splitlines()) < 110 and image.is_file()


# --------------------------------------------------------------------------------------------------
# errors


@pytest.mark.parametrize(
    "overrides,message",
    [
        (
            ["sample.capacity=0.7", "sample.gamma=0.4"],
            "sample.capacity (0.7) and sample.gamma (0.4) both set the thresholds",
        ),
        (
            ["sample.capacity=0"],
            "sample.capacity (0.0) must be above 0 and at most moe.experts (8)",
        ),
        (
            ["sample.capacity=8.5"],
            "sample.capacity (8.5) must be above 0 and at most moe.experts (8)",
        ),
        (
            ["sample.capacity=1", "model.family=tc"],
            "sample.capacity (1.0) needs model.family diffmoe, not tc: its thresholds are what",
        ),
    ],
)
def test_bad_dials(overrides, message):
    with pytest.raises(UserError) as error:
        load_config(None, overrides)
    assert message in str(error.value)


def test_a_dense_model_has_no_capacity():
    config = tiny("model.family=dense")
    with pytest.raises(UserError, match=r"model.family \(dense\) has no experts"):
        CapacityMeter(DiT(config.model, config.moe), config, 1, CPU)
