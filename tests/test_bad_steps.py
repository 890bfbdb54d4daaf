"""Steps that go wrong: loss or gradient not finite, spikes of the loss; the same on every rank, and
again after a resume.
"""

import contextlib
import io
import json
import math
import re
import shutil
from dataclasses import replace
from unittest import mock

import pytest
import torch

from diffmoe.config import TrainConfig, load_config
from diffmoe.data.reader import ShardReader
from diffmoe.data.stream import Batch
from diffmoe.deepspeed_json import merge_deepspeed
from diffmoe.layout import resolve_layout
from diffmoe.parallel.collectives import AgreedError
from diffmoe.parallel.groups import build_groups
from diffmoe.parallel.spawn import Ranks
from diffmoe.training import guard, loop
from diffmoe.training.guard import Guard, find_nonfinite
from diffmoe.training.start import remembered
from diffmoe.training.step import StepReport, train_step
from programs import losses, tiny, tiny_config, zero
from test_run import assert_same_tensors, steps, train_here

pytestmark = pytest.mark.full  # its fixtures take their time

BATCH = 16


def test_the_second_look_is_by_the_rule_of_the_step(monkeypatch):
    rules = []
    monkeypatch.setattr(guard, "_run_watched", lambda *given: rules.append(given[-1]) or [])
    monkeypatch.setattr(guard, "gather_objects", lambda mine, _group: [mine])
    config = load_config(None, ["moe.threshold_from=3"])
    for step in (2, 3):
        where = find_nonfinite(mock.MagicMock(), [None], config, mock.MagicMock(), step)
        assert where == "a second pass over the same samples is finite"
    assert [rule.kind for rule in rules] == ["train", "threshold"]


@pytest.fixture(scope="module")
def two_ranks():
    with Ranks(2, timeout=400.0) as ranks:
        yield ranks


def batch_at(reader, positions):
    x, y = reader.read(positions)
    return Batch(torch.from_numpy(x), torch.from_numpy(y), tuple(positions))


def heard(arguments, world, *, factor=1.0, at=()):
    """Trains in this rank with sample 9 of the batches ``at`` times ``factor`` (of two ranks it is
    the second's): what rank 0 said, and the error that ended it.
    """
    original = ShardReader.fill

    def fill(self, positions, x, y):
        original(self, positions, x, y)
        for i, position in enumerate(positions):
            if position // BATCH in at and position % BATCH == 9:
                x[i] *= factor

    out, complaint = io.StringIO(), ""
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(out),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(ShardReader, "fill", fill)
        try:
            train_here(arguments, world)
        except AgreedError as error:
            complaint = str(error)
    return out.getvalue(), complaint


def hear(ranks, arguments, factor=1.0, at=()):
    """(what rank 0 said, the error on all ranks)."""
    results = ranks.run(poisoned, arguments, factor, tuple(at), ranks.world)
    assert len({complaint for _, complaint in results}) == 1, results
    return results[0]


def poisoned(arguments, factor, at, world):
    return heard(arguments, world, factor=factor, at=at)


def events(folder):
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


# --------------------------------------------------------------------------------------------------
# not finite


def state(run):
    engine = run.engine
    kinds = {kind: engine.shards(kind) for kind in ("master", "exp_avg", "exp_avg_sq")} | {
        "ema": run.ema.shards
    }
    values = {
        f"{kind} {i}": s.detach().clone()
        for kind, shards in kinds.items()
        for i, s in enumerate(shards)
    }
    values |= {name: value.clone() for name, value in engine.model.named_buffers()}
    values |= {
        f"adam step {i}": engine._adam.state[key]["step"].clone()
        for i, key in enumerate(engine._state_keys)
    }
    return values


def bad_steps(folder, stage, bf16, accumulation):
    """Step 0, three bad ones, step 1; and in a second engine steps 0 and 1 alone.  (what the bad
    ones changed, what they were found to be, whether both end alike).
    """
    config = load_config(
        tiny_config(), [f"run.folder={folder}", "moe.pool=8", f"train.accumulation={accumulation}"]
    )
    layout = resolve_layout(config, 4)
    groups = build_groups(layout.ep, layout.pool_ranks)
    # With fp32 sums bf16 at ZeRO 1 has an optimizer of its own.
    sums = {"data_types": {"grad_accum_dtype": "fp32"}} if bf16 and stage == 1 else {}
    merged = merge_deepspeed(zero(stage, bf16) | sums, config, layout)
    first, second = (
        loop.start(config, layout, merged, groups, torch.device("cpu")) for _ in range(2)
    )

    def batches(run, step):
        each, micro = layout.batch // layout.accumulation, layout.micro_batch
        starts = [
            step * layout.batch + j * each + groups.rank * micro for j in range(layout.accumulation)
        ]
        return [batch_at(run.reader, range(start, start + micro)) for start in starts]

    def train(run, step, given):
        return train_step(run.engine, run.ema, given, config, layout, groups, step)

    changed, found = [], []
    assert (
        train(first, 0, batches(first, 0)).applied and train(second, 0, batches(second, 0)).applied
    )
    before = state(first)
    for kind in ("nan", "inf", "expert"):
        given = batches(first, 1)
        handles = []
        if groups.rank == 1 and kind != "expert":
            given[0] = replace(given[0], x=given[0].x * (math.nan if kind == "nan" else 1e22))
        elif groups.rank == 1:  # a gradient that one rank of one EP group alone has
            tensors = first.engine.tensors
            expert = next(t for t in tensors if t.experts is not None and t.name.endswith("bias"))
            handles = [expert.parameter.register_hook(lambda gradient: gradient * math.nan)]
        report = train(first, 1, given)
        found.append((report.applied, find_nonfinite(first.engine, given, config, groups, 1)))
        for handle in handles:
            handle.remove()
        after = state(first)
        changed += [
            f"{kind}: {name}" for name in before if not torch.equal(before[name], after[name])
        ]
    reports = train(first, 1, batches(first, 1)), train(second, 1, batches(second, 1))
    assert (
        reports[0].applied
        and reports[0].loss == reports[1].loss
        and reports[0].grad_norm == reports[1].grad_norm
    )
    ends = state(first), state(second)
    changed += [
        f"after: {name}" for name in ends[0] if not torch.equal(ends[0][name], ends[1][name])
    ]
    return changed, found


def test_a_step_that_is_not_finite_changes_nothing_at_any_zero_stage(tmp_path):
    """Weights, moments, Adam's count, EMA, thresholds and histograms, on all of 4 ranks; the next
    step is as if it had not been.
    """
    with Ranks(4, timeout=400.0) as ranks:
        for stage, bf16, accumulation in (
            (0, False, 1),
            (1, False, 2),
            (2, False, 1),
            (3, False, 2),
            (1, True, 2),
            (3, True, 1),
        ):
            results = ranks.run(bad_steps, tmp_path / f"{stage}{bf16}", stage, bf16, accumulation)
            for rank, (changed, found) in enumerate(results):
                assert changed == [], (stage, bf16, rank)
                assert [applied for applied, _ in found] == [False] * 3, (stage, bf16, rank)
            assert len({str(found) for _, found in results}) == 1, "all ranks say the same"
            places = [place for _, place in results[0][1]]
            assert re.fullmatch(r"first in the output of x_embedder\S* on rank 1", places[0]), (
                places
            )
            assert places[1].endswith("on rank 1"), places
            if stage < 3:
                assert re.fullmatch(
                    r"first in the gradient of blocks\.1\.mlp\.experts\.\w+ on rank 1", places[2]
                ), places


def test_skipped_steps_are_counted_recorded_and_the_same_after_a_resume(two_ranks, tmp_path):
    more = ("train.on_nonfinite=skip", "train.nonfinite_limit=2", "train.save_every=4")
    said, complaint = hear(two_ranks, tiny(tmp_path / "a", *more), math.nan, {2, 5, 6})
    assert complaint == "" and "skipped steps 3" in said
    assert [(e["step"], e["event"]) for e in events(tmp_path / "a")] == [
        (2, "skipped"),
        (5, "skipped"),
        (6, "skipped"),
    ]
    assert re.search(
        r"loss is nan and gradient norm (inf|nan) at step 5, first in the output of x_embedder\S* "
        r"on rank 1; "
        "skipped, 1 in a row of at most 2",
        events(tmp_path / "a")[1]["text"],
    )
    assert losses(tmp_path / "a")[3] is None and losses(tmp_path / "a")[4] > 0
    shutil.copytree(
        tmp_path / "a/checkpoints/step_00000004", tmp_path / "b/checkpoints/step_00000004"
    )
    said, complaint = hear(two_ranks, tiny(tmp_path / "b", *more), math.nan, {2, 5, 6})
    assert complaint == "" and "skipped steps 3" in said
    assert_same_tensors(
        tmp_path / "a/checkpoints/step_00000008", tmp_path / "b/checkpoints/step_00000008"
    )
    said, complaint = hear(two_ranks, tiny(tmp_path / "c", *more), math.nan, {2, 3, 4})
    assert re.fullmatch(
        r"loss is nan .* at step 4, first in .* on rank 1 \(train\.nonfinite_limit \(2\) steps in "
        r"a row were "
        r"skipped before\); the last checkpoint is untouched",
        complaint,
    )
    assert steps(tmp_path / "c") == [4], "a step that changes nothing can be saved"


# --------------------------------------------------------------------------------------------------
# spikes


SPIKES = ("train.spike_factor=3", "train.spike_window=3", "train.save_every=4", "train.lr=1e-3")


@pytest.mark.parametrize("stage", [1, 3])
def test_a_spike_sends_the_run_back_and_leaves_its_batch_out_for_good(two_ranks, tmp_path, stage):
    (tmp_path / "ds.json").write_text(json.dumps(zero(stage)))
    spikes = (*SPIKES, "--deepspeed_config", str(tmp_path / "ds.json"))
    said, complaint = hear(two_ranks, tiny(tmp_path / "a", *spikes), 60.0, {5})
    assert complaint == "" and "rollbacks 1" in said and "resumed" not in said
    assert [(e["step"], e["event"]) for e in events(tmp_path / "a")] == [
        (5, "spike"),
        (4, "went back"),
        (5, "left out"),
    ]
    assert json.loads((tmp_path / "a/left_out.json").read_text()) == [5]
    # As if the batch had never been there; and the run folder's record leaves it out of a start
    # from scratch too.
    (tmp_path / "b").mkdir()
    shutil.copy(tmp_path / "a/left_out.json", tmp_path / "b")
    said, complaint = hear(two_ranks, tiny(tmp_path / "b", *spikes))
    assert complaint == "" and "rollbacks" not in said
    assert_same_tensors(
        tmp_path / "a/checkpoints/step_00000008", tmp_path / "b/checkpoints/step_00000008"
    )
    # Without that record a resume from before the spike finds it again, and decides alike.
    shutil.copytree(
        tmp_path / "a/checkpoints/step_00000004", tmp_path / "c/checkpoints/step_00000004"
    )
    hear(two_ranks, tiny(tmp_path / "c", *spikes), 60.0, {5})
    assert_same_tensors(
        tmp_path / "a/checkpoints/step_00000008", tmp_path / "c/checkpoints/step_00000008"
    )


def test_a_spike_before_any_checkpoint_goes_back_to_the_start_and_going_back_has_a_limit(
    two_ranks, tmp_path
):
    said, complaint = hear(
        two_ranks, tiny(tmp_path / "a", *SPIKES, "train.spike_limit=2"), 60.0, {3, 4, 5, 6}
    )
    # Without step 3 the run gets to a checkpoint at step 4, to which it then returns for steps 4
    # and 5.
    assert complaint == (
        "the loss spiked at step 6, after train.spike_limit (2) returns to the checkpoint of step "
        "4, each "
        "without the step that had spiked: the batches are not what is wrong"
    )
    assert [e["text"] for e in events(tmp_path / "a") if e["event"] == "went back"] == [
        f"went back to step_0000000{to}; step {step} is left out from now on"
        for to, step in ((0, 3), (4, 4), (4, 5))
    ]


def report(loss, applied=True):
    return StepReport(
        loss,
        *[0.0] * 6,
        1.0,
        1e-3,
        1.0,
        False,
        False,
        applied,
        torch.zeros(0),
        torch.zeros(0),
    )


def test_another_recipes_losses_are_no_measure_of_a_spike():
    config = load_config("configs/demo.yaml", ["train.spike_factor=2", "train.spike_window=3"])
    counters = {"losses": [9.0, 1.0, 1.0], "nonfinite": [1], "recipes": [{"samples": 3}]}
    same, other = (remembered(config, counters, [None] * count) for count in (1, 2))
    assert (same.losses, other.losses) == ([9.0, 1.0, 1.0], [])
    assert same.nonfinite == other.nonfinite == [1]


def test_the_guard_waits_for_its_window_and_forgets_what_it_went_back_over():
    guard = Guard(TrainConfig(spike_factor=2.0, spike_window=3, spike_limit=1))
    assert [guard.judge(report(loss), i) for i, loss in enumerate((9.0, 1.0, 1.0, 1.9, 2.1))] == [
        "good"
    ] * 4 + ["spike"]
    before = Guard.from_counters(guard.train, {"losses": [9.0, 1.0, 1.0], "nonfinite": [1]})
    assert before.losses == [9.0, 1.0, 1.0] and before.skipped(2) == 1
    guard.go_back(4, 3, before)
    assert (guard.left_out, guard.losses, guard.nonfinite, guard.rollbacks) == (
        [4],
        [9.0, 1.0, 1.0],
        [1],
        1,
    )
    with pytest.raises(
        AgreedError,
        match=r"spiked at step 5, after train.spike_limit \(1\) returns to the checkpoint of step "
        r"3",
    ):
        guard.go_back(5, 3, before)
    guard.go_back(7, 6, before)  # a newer checkpoint: the run has got on
    assert guard.left_out == [4, 7]
    assert guard.judge(report(math.nan, applied=False), 8) == "not finite" and guard.in_a_row == 1
