"""The parity table: every number within 1e-5 of one plain process, and the table fails when
training is spoiled.
"""

import json
from dataclasses import replace

import pytest
import torch

from diffmoe.commands import verify
from diffmoe.environment import detect
from diffmoe.errors import UserError
from diffmoe.parallel.spawn import Ranks
from diffmoe.parity import table
from diffmoe.parity.cases import (
    Case,
    compiled_table,
    eight_ranks,
    full_table,
    quick_compiled_table,
    quick_table,
    two_level_table,
)
from diffmoe.parity.table import BOUND, COLUMNS

CPU = torch.device("cpu")
SPOILED = Case(2, 2, 1, "none", 1, "group", 16)


def assert_within_bound(rows):
    assert [row.case.label + ": " + row.error for row in rows if row.error] == []
    for row in rows:
        assert row.differences.keys() == set(COLUMNS)
        assert row.ok, (row.case.label, row.differences)
        assert row.case.precision == "bf16" or max(row.differences.values()) <= BOUND


def test_quick_table():
    rows = list(table.run_cases(quick_table((2, 4))))
    assert {(row.case.ep, row.case.zero) for row in rows if row.case.world == 4} >= {
        (2, zero) for zero in range(4)
    }
    assert {row.case.zero for row in rows if row.case.precision == "bf16"} == {1, 3}
    assert {row.case.world for row in rows if row.case.config().diffusion.process == "ddpm"} == {
        2,
        4,
    }
    assert_within_bound(rows)


@pytest.mark.slow
def test_full_table():
    assert_within_bound(list(table.run_cases(full_table())))


@pytest.mark.slow
def test_eight_ranks():
    assert_within_bound(list(table.run_cases(eight_ranks(), timeout=300)))


@pytest.mark.slow
def test_exchange_over_two_levels_on_8_ranks():
    cases = two_level_table()
    assert {(case.ep, case.per_host) for case in cases} == {(4, 2), (8, 4), (8, 2)}
    assert_within_bound(list(table.run_cases(cases, timeout=300)))


def test_cases_are_legal_and_no_case_stands_twice():
    cases = full_table() + eight_ranks()
    assert len(set(cases)) == len(cases)
    wanted = {
        (world, ep, zero, recompute, accumulation)
        for world in (1, 2, 4)
        for ep in (1, 2, 4)
        if world % ep == 0
        for zero in range(4)
        for recompute in ("none", "block", "selective")
        for accumulation in (1, 2)
    }
    assert wanted <= {
        (c.world, c.ep, c.zero, c.recompute, c.accumulation)
        for c in cases
        if c.variant == "diffmoe"
    }
    layouts = [case.layout() for case in cases]
    for case, layout in zip(cases, layouts):
        for word in filter(None, case.words.split("=")):
            same = Case(
                case.world, case.ep, case.zero, case.recompute, case.accumulation, word, case.batch
            )
            assert same.layout().pool == layout.pool
    assert any(layout.pool % layout.micro_batch for layout in layouts), (
        "no pool straddles ranks unevenly"
    )


@pytest.mark.parametrize(
    ("worlds", "variant"),
    [((1, 2, 4), "dense"), ((1,), "dense"), ((2,), "diffmoe"), ((4,), "diffmoe")],
)
def test_the_quick_compiled_table_is_one_case(worlds, variant):
    (case,) = quick_compiled_table(worlds)
    assert case.compiled and case.variant == variant and case in compiled_table(worlds)


@pytest.mark.full
def test_command_line(tmp_path, capsys):
    path = tmp_path / "table.json"
    assert verify.main(["--quick", "--worlds", "1", "--json", str(path)], detect()) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("verify: 2 cases, largest relative difference ") and last.endswith(
        "bound 1e-05: ok"
    )
    written = json.loads(path.read_text())
    assert written["ok"] and len(written["rows"]) == 2 and written["rows"][0]["case"]["world"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--worlds", "3"], r"--worlds \(3\) must be of 1, 2, 4"),
        (
            ["--device", "cuda", "--worlds", "1,4"],
            r"--worlds \(1,4\) needs a GPU a rank; torch sees 2",
        ),
    ],
)
def test_bad_command_lines(arguments, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=message):
        verify.main(arguments, detect())


# ------------------------------------------------------------------------------------- the table
# can fail


def expert_gradients_times_ep(training):
    for tensor in training.engine.tensors:
        if tensor.experts is not None:
            tensor.parameter.register_hook(lambda gradient: gradient * training.layout.ep)


def one_expert_gradient_lost(training):
    for tensor in training.engine.tensors:
        if tensor.experts is not None and training.groups.rank == 1:
            tensor.parameter.register_hook(
                lambda gradient: (
                    gradient * torch.tensor([1.0, 0.0]).view(-1, *[1] * (gradient.dim() - 1))
                )
            )


def thresholds_twice_as_high(training):
    for _, layer in training.engine.model.moe_layers():
        commit = layer.thresholds.commit
        layer.thresholds.commit = lambda observed, commit=commit: commit(2 * observed)


def moving_average_twice_a_step(training):
    update = training.ema.update
    training.ema.update = lambda: (update(), update())


def replicas_each_for_themselves(training):
    training.engine._average_over_replicas = lambda: None


def norm_of_one_rank(training):
    squared_norm, step = training.engine.squared_norm, training.engine.step
    training.engine.squared_norm = lambda: squared_norm() / 2
    training.engine.step = lambda lr, norm: step(lr, norm * 2**0.5)


def learning_rate_off(training):
    step = training.engine.step
    training.engine.step = lambda lr, norm: step(lr * 1.0001, norm)


@pytest.fixture(scope="module")
def compare(tmp_path_factory):
    path = tmp_path_factory.mktemp("reference") / "reference.pt"
    torch.save(table.reference_for(SPOILED, CPU), path)
    with Ranks(SPOILED.world, timeout=60) as ranks:

        def differences(tamper):
            results = ranks.run(table.train_and_compare, SPOILED, str(path), "cpu", tamper)
            return {column: max(found[column] for found, _ in results) for column in COLUMNS}

        yield differences


@pytest.mark.full
@pytest.mark.parametrize(
    "tamper,columns",
    [
        (expert_gradients_times_ep, {"gradient", "norm", "weights", "ema", "loss", "thresholds"}),
        (one_expert_gradient_lost, {"gradient", "norm", "weights", "ema", "loss", "thresholds"}),
        (thresholds_twice_as_high, {"thresholds"}),
        (moving_average_twice_a_step, {"ema"}),
        (norm_of_one_rank, {"norm"}),
        (learning_rate_off, {"weights", "ema", "loss", "norm", "thresholds"}),
    ],
)
def test_spoiled_training_is_a_miss(compare, tamper, columns):
    found = compare(tamper)
    assert {column for column in COLUMNS if found[column] > BOUND} == columns, found


@pytest.mark.full
def test_what_was_spoiled_does_not_stay(compare):
    assert max(compare(None).values()) <= BOUND


@pytest.mark.full
def test_replicas_that_do_not_add_up_are_a_miss():
    cases = [Case(2, 1, zero, "none", 1, "rank", 16, shard=1) for zero in (1, 2, 3)]
    rows = list(table.run_cases(cases, tamper=replicas_each_for_themselves, timeout=60))
    assert [row.error for row in rows] == [None] * 3
    assert min(row.differences["gradient"] for row in rows) > 0.1


@pytest.mark.full
def test_bf16_rows_miss_a_factor_too():
    (row,) = table.run_cases(
        [Case(2, 2, 2, "none", 2, "1", 16, precision="bf16")],
        tamper=expert_gradients_times_ep,
        timeout=60,
    )
    assert not row.error and not row.ok and row.differences["gradient"] > 0.3, row.differences


def one_rank_raises_at_zero_1(training):
    if training.engine.stage == 1 and training.groups.rank == 1:
        raise ValueError("spoiled (1) must be 0")


@pytest.mark.full
def test_a_case_that_raises_is_a_row_and_the_table_goes_on():
    cases = [SPOILED, replace(SPOILED, zero=2)]
    bad, good = table.run_cases(cases, tamper=one_rank_raises_at_zero_1, timeout=60)
    assert bad.error == "rank 1: ValueError: spoiled (1) must be 0" and not bad.ok
    assert good.ok
