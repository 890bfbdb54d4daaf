"""run.py compare: the runs that a YAML means, that they are fed the same, go on where they were
killed, and the table of them.
"""

import hashlib
import json
import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from diffmoe.commands.compare import main
from diffmoe.compare.plan import differences, fed, parameters, read_plan
from diffmoe.compare.report import collect, to_markdown, write_report
from diffmoe.compare.runs import SETTINGS, card_of, check, next_command, state, verdict_of
from diffmoe.config import config_from_tree, config_to_tree
from diffmoe.environment import RankEnvironment
from diffmoe.errors import UserError
from diffmoe.evaluation.card import Card
from diffmoe.evaluation.scores import Scores
from diffmoe.models.count import count
from diffmoe.parallel.spawn import Ranks
from diffmoe.training.validation import read_validations
from programs import REPOSITORY, digits, run_program, start_program

ALONE = RankEnvironment(0, 1, 0, 1, "single")
SMOKE = REPOSITORY / "configs/compare/smoke.yaml"


def arguments(folder, *more):
    """Of the smoke comparison, in ``folder``."""
    return [
        "--config",
        str(SMOKE),
        f"folder={folder}",
        f"data.shards={digits()}/shard-00000[0-6].tar",
        f"data.validation={digits()}/shard-00000[78].tar",
        *more,
    ]


def planned(folder, *more):
    path, *overrides = [a for a in arguments(folder, *more) if a != "--config"]
    return read_plan(path, overrides)


# ----------------------------------------------------------------------------------------- the plan


def test_the_runs_of_a_yaml(tmp_path):
    plan = planned(tmp_path)
    assert [run.name for run in plan.runs] == [
        "dense-s0",
        "diffmoe-s0",
        "dense-s1",
        "diffmoe-s1",
        "diffmoe-batch-32-s0",
        "diffmoe-experts-2-s0",
        "diffmoe-time_sampling-logit_normal-s0",
    ]
    for run in plan.runs:
        train = run.config.train
        assert train.steps * train.batch == 384 and train.validate_every * 3 == train.steps
        assert run.config.run.seed == run.seed and run.folder == tmp_path / run.name
    assert [axis for axis in plan.axes] == ["train.batch", "moe.experts", "diffusion.time_sampling"]
    assert plan.axes["moe.experts"] == [(2, "diffmoe-experts-2"), (4, "diffmoe")]


def test_routers_are_fed_the_same_and_a_confound_varies_one_thing(tmp_path):
    plan = planned(tmp_path)
    of = {run.name: run.config for run in plan.runs}
    assert fed(of["dense-s0"]) == fed(of["diffmoe-s0"]) == fed(of["diffmoe-s1"])
    before, larger = of["diffmoe-s0"].train, of["diffmoe-batch-32-s0"].train
    assert (larger.batch, larger.steps, larger.warmup) == (32, 12, before.warmup // 2)
    assert larger.ema == pytest.approx(before.ema**2) and larger.lr == before.lr
    for name, field in (
        ("diffmoe-experts-2-s0", "moe.experts"),
        ("diffmoe-time_sampling-logit_normal-s0", "diffusion.time_sampling"),
    ):
        old, new = (config_to_tree(of[n]) for n in ("diffmoe-s0", name))
        changed = [f"{s}.{f}" for s in old for f in old[s] if old[s][f] != new[s][f]]
        assert changed == ["run.folder", field]


def test_activated_parameters_are_counted_with_and_without_shared_experts(tmp_path):
    plan = planned(tmp_path, "moe.shared_experts=1")
    diffmoe = plan.of("diffmoe")[0].config
    found, dense = parameters(diffmoe), parameters(plan.of("dense")[0].config)
    shared = 32 * 128 * 2 + 128 + 32  # of the one MoE layer: an MLP four times as wide
    assert found.activated - found.activated_unshared == shared
    assert dense.activated == dense.activated_unshared == dense.total
    assert found.flops == 2 * count(diffmoe.model, diffmoe.moe).forward_macs
    expert = shared
    assert parameters(diffmoe, 2.0).activated - found.activated == expert


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"routers": {"a": {}, "b": {"train": {"batch": 32}}}}, "routers.b: train.batch (32)"),
        ({"routers": {"a": {}, "b": ["data.flip=true"]}}, "routers.b: data.flip (True)"),
        (
            {"routers": {"a": {}, "b": ["diffusion.time_sampling=logit_normal"]}},
            "differs from a's (uniform), and all routers must see the same; vary it under",
        ),
        (
            {"routers": {"a": ["train.steps=7"]}},
            "says train.steps, which is for the comparison's s",
        ),
        ({"routers": {"a": {"run": {"seed": 7}}}}, "routers.a says run.seed"),
        ({"recipe": ["run.folder=x"]}, "recipe says run.folder, which is for the comparison's fol"),
        ({"routers": {"a": 7}}, "routers.a (7) must be a mapping of sections, or a list of"),
        ({"routers": {"a": {"moe": {"expert": 7}}}}, "router a: unknown key moe.expert"),
        ({"routers": {"a/b": {}}}, "name 'a/b' must be of letters"),
        ({"routers": {}}, "routers ({}) must be given"),
        ({"routers": 3}, "routers = 3 must be a mapping"),
        ({"router": {}}, "unknown key router (value {}); did you mean routers?"),
        ({"base": ""}, "base ('') must be given"),
        ({"base": "none.yaml"}, "none.yaml does not exist"),
        ({"seeds": []}, "seeds (()) must be given"),
        ({"seeds": [1, 1]}, "seeds ([1, 1]) must not name a seed twice"),
        ({"samples": 0}, "samples (0) must be at least 1"),
        ({"samples": 390}, "samples (390) must divide by train.batch (16)"),
        ({"ranks": 3}, "router dense: train.batch (16)"),
        ({"confounds": {"router": "none"}}, "confounds.router ('none') must be one of routers"),
        ({"confounds": {"axes": {"moe.experts": 4}}}, "axes.moe.experts (4) must be a list"),
        ({"confounds": {"axes": {"moe.expert": [4]}}}, "diffmoe with moe.expert=4: unknown key"),
        ({"confounds": {"axes": {"moe.experts": [0]}}}, "moe.experts (0) must be at least 1"),
    ],
)
def test_bad_input_is_named_in_one_line(tmp_path, said, told):
    tree = yaml.safe_load(SMOKE.read_text()) | {"base": str(REPOSITORY / "configs/demo.yaml")}
    for key, value in said.items():
        merged = isinstance(value, dict) and key == "confounds"
        tree[key] = {**tree[key], **value} if merged else value
    if "routers" in said:
        tree["confounds"] = {}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError) as caught:
        read_plan(str(tmp_path / "c.yaml"), [f"folder={tmp_path}"])
    assert told in str(caught.value) and "\n" not in str(caught.value), str(caught.value)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--only", "none"], "--only (none) must be one of dense-s0, diffmoe-s0"),
        (["--task", "7"], "--task (7) must be from 0 to 6"),
        (["--task", "0", "--only", "dense"], "both choose a run"),
        (["--jobs", "0"], "--jobs (0) must be at least 1"),
        (["--list", "--table"], "--table and --list are two answers"),
        (["sampls=3"], "unknown key sampls"),
        (["train.steps=3"], "the command line says train.steps"),
    ],
)
def test_bad_command_lines(tmp_path, more, told):
    with pytest.raises(UserError) as caught:
        main(arguments(tmp_path, *more), ALONE)
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_the_fashion_comparison_is_one(tmp_path):
    plan = read_plan("configs/compare/fashion14.yaml", [f"folder={tmp_path}"])
    assert [run.name for run in plan.runs][:4] == ["dense-s0", "tc-s0", "ec-s0", "diffmoe-s0"]
    assert {run.seed for run in plan.runs} == {0, 1, 2}
    counted = [parameters(run.config).activated for run in plan.runs[:4]]
    assert max(counted) < 1.1 * min(counted), counted


# ---------------------------------------------------------------------------------------- the table


def pretend(run, losses, *, seconds=0.1, load=None, step=None):
    """A run folder as training leaves it: validation losses at even steps, a last checkpoint."""
    step = step or run.config.train.steps
    (run.folder / f"checkpoints/step_{step:08d}").mkdir(parents=True)
    (run.folder / f"checkpoints/step_{step:08d}/checkpoint.json").touch()
    (run.folder / "compare.yaml").write_text(yaml.safe_dump(config_to_tree(run.config)))
    batch = run.config.train.batch
    with (run.folder / "validation.jsonl").open("w") as file:
        for i, loss in enumerate(losses, 1):
            at = step * i // len(losses)
            used = None if load is None else sum(load)
            line = {"step": at, "samples": at * batch, "count": 200, "loss": loss}
            line |= {"loss_by_time": [loss] * 10, "experts_per_token": used}
            file.write(json.dumps({**line, "load": load and [[load] * 10]}) + "\n")
    with (run.folder / "metrics.jsonl").open("w") as file:
        for at, factor in ((4, 1.0), (8, 50.0), (12, 1.2)):
            record = {"step": at, "images_per_s": batch / (seconds * factor), "memory_gib": factor}
            file.write(json.dumps(record) + "\n")


def test_the_tables_numbers(tmp_path):
    plan = planned(tmp_path, "score.reference=r", "score.extractor=net.pt")
    of = {run.name: run for run in plan.runs}
    pretend(of["dense-s0"], [0.9, 0.5], seconds=0.02)
    pretend(of["dense-s1"], [0.8, 0.3], seconds=0.02)
    pretend(of["diffmoe-s0"], [0.9, 0.4], load=[0.5, 0.3, 0.2, 0.2])
    pretend(of["diffmoe-s1"], [0.9, 0.3], load=[0.5, 0.1, 0.1, 0.1])
    pretend(of["diffmoe-experts-2-s0"], [0.7], load=[0.5, 0.5])
    pretend(of["diffmoe-batch-32-s0"], [0.7], step=8)
    card_of(of["dense-s0"]).parent.mkdir()
    card = Card(
        scores=Scores(frechet_distance=12.5),
        count=500,
        splits=1,
        reference="r",
        reference_sha256="",
        reference_count=None,
        extractor="net.pt",
        extractor_sha256="",
        ranks=1,
        hardware="",
        versions={},
        time="",
        seconds=1.0,
    )
    card_of(of["dense-s0"]).write_text(card.to_json())
    verdict = verdict_of(of["dense-s0"], plan.comparison)
    verdict.parent.mkdir()
    verdict.write_text(json.dumps({"accuracy": 0.75, "count": 9}))
    for name, code in (("dense-s0", "abc"), ("dense-s1", "abd")):
        (of[name].folder / "compare.log").write_text(f"$ python x  # code {code}\nstep 1\n")
    found = collect(plan)
    dense, diffmoe = found["routers"]
    loss = dense["validation_loss"]
    assert (loss["mean"], loss["spread"]) == pytest.approx((0.4, 0.02**0.5))
    assert diffmoe["against"]["loss"]["each"] == pytest.approx([-0.1, 0.0])
    assert dense["experts_per_token"] is None and dense["load"] is None
    assert diffmoe["experts_per_token"]["mean"] == pytest.approx(1.0)
    assert diffmoe["load"]["busiest_by_layer"] == pytest.approx([(0.5 / 0.3 + 0.5 / 0.2) / 2])
    assert diffmoe["load"]["experts_per_token_by_time"] == pytest.approx([1.0] * 10)
    assert diffmoe["machine"] == pytest.approx({"ms_a_step": 120.0, "memory_gib": 50.0})
    assert dense["curve"] == {"samples": [192, 384], "each": [[0.9, 0.5], [0.8, 0.3]]}
    assert dense["scores"]["names"] == {"frechet_distance": "FD-net"}
    assert dense["scores"]["frechet_distance"]["each"] == [12.5]
    assert dense["judge"] == {"accuracy": {"mean": 0.75, "spread": None, "each": [0.75]}}
    assert [row["value"] for row in found["confounds"]["moe.experts"]] == [2, 4]
    assert found["confounds"]["moe.experts"][1]["validation_loss"]["each"] == [0.4], "seed 0 alone"
    assert found["missing"] == {
        "diffmoe-batch-32-s0": "step 8 of 12",
        "diffmoe-time_sampling-logit_normal-s0": "not begun",
    }
    text = write_report(plan)
    for words in (
        "| dense | 2 | 0.40000 ± 0.14142 | – | 12.5000 | 0.7500 | – | – | 20.0 |",
        "| FD-net, 500 images | judge: accuracy |",
        "| router | FD-net |",
        "| diffmoe | 2 | 0.35000 ± 0.07071 | -0.05000 ± 0.07071 |",
        "Missing: diffmoe-batch-32-s0 (step 8 of 12), diffmoe-time_sampling-logit_normal-s0 (not",
        "The runs are not all of one code: abc, abd.",
        "Activated parameters are equal to dense's within 2.6%.",
        "## moe.experts, for diffmoe",
    ):
        assert words in text or words.replace("20.0", "24.0") in text, (words, text)
    assert json.loads((tmp_path / "compare.json").read_text()) == found
    assert (tmp_path / "compare.md").read_text() == text
    for name in ("compare.png", "confounds.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_the_table_tells_of_runs_with_other_settings(tmp_path):
    for run in planned(tmp_path, "train.lr=0.5").runs[:2]:
        pretend(run, [0.5])
    text = write_report(planned(tmp_path))
    told = (
        "Other settings than the YAML's: dense-s0, diffmoe-s0, where train.lr (0.5) is now 0.002."
    )
    assert told in text and "| dense | 1 | 0.50000 |" in text


def test_a_run_begun_with_another_zero_stage_or_precision_is_refused(tmp_path):
    plan = planned(tmp_path)
    run = plan.runs[0]
    pretend(run, [0.5])
    (run.folder / "compare.yaml").write_text(yaml.safe_dump(config_to_tree(run.config)))
    tree = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}
    (run.folder / "deepspeed.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match="deepspeed: ZeRO stage: 2 -> 1; deepspeed: precision: bf1"):
        check(run, plan.comparison)


def test_the_table_tells_of_a_router_with_a_recipe_of_its_own(tmp_path):
    assert "recipe of its own" not in write_report(planned(tmp_path))
    said = "routers={dense: {model: {family: dense}}, diffmoe: {train: {lr: 0.5}}}"
    text = write_report(planned(tmp_path, said, "confounds=null"))
    assert "diffmoe is trained with a recipe of its own: train.lr 0.5, not 0.002." in text


def test_a_table_of_nothing_says_what_is_missing(tmp_path):
    text = write_report(planned(tmp_path))
    assert text.count("(not begun)") == 7 and not (tmp_path / "compare.png").exists()


def test_unequal_activated_parameters_are_told(tmp_path):
    plan = planned(tmp_path, "moe.shared_experts=1", "confounds=null")
    for run in plan.runs:
        pretend(run, [0.5])
    text = to_markdown(plan, collect(plan))
    assert "included, are NOT equal to dense's: diffmoe +1" in text


def test_what_comes_next(tmp_path):
    scored = [f"score.reference={digits()}", "score.extractor=digits", "score.count=80"]
    plan = planned(tmp_path, *scored, "judge=diffmoe.evaluation.judge --train x", "ranks=2")
    run = plan.runs[0]
    command = " ".join(next_command(run, plan.comparison))
    assert "--nproc-per-node 2 -m diffmoe train --config" in command
    pretend(run, [0.5])
    assert state(run, plan.comparison) == "trained"
    evaluate = " ".join(next_command(run, plan.comparison))
    measured = re.search(r"evaluate .* --reference (\S+) --save-reference (\S+\.npz)", evaluate)
    assert measured and measured[1] == str(digits()), "measured once ..."
    Path(measured[2]).touch()
    assert f"--reference {measured[2]} --extractor" in " ".join(next_command(run, plan.comparison))
    card_of(run).parent.mkdir()
    card_of(run).touch()
    assert " sample " in " ".join(next_command(run, plan.comparison))
    verdict = verdict_of(run, plan.comparison)
    verdict.parent.mkdir()
    verdict.with_name("samples.npz").touch()
    judge = next_command(run, plan.comparison)
    assert judge[1:3] == ["-m", "diffmoe.evaluation.judge"] and judge[4:6] == ["--train", "x"]
    verdict.touch()
    assert next_command(run, plan.comparison) is None
    stricter = replace(plan.comparison, judge="diffmoe.evaluation.judge --train y")
    assert " sample " in " ".join(next_command(run, stricter)), "an old verdict is another judge's"
    other = planned(tmp_path, *scored, "score.count=90", "ranks=2")
    assert "--count 90" in " ".join(next_command(other.runs[0], other.comparison))
    assert state(run, plan.comparison) == "finished"


def test_a_changed_setting_is_refused_and_a_new_field_is_none(tmp_path):
    plan = planned(tmp_path)
    run = plan.runs[0]
    tree = config_to_tree(run.config)
    del tree["train"]["validate_samples"], tree["data"]["bad_share"]  # of an older version
    tree["train"]["validate_samples"], tree["run"]["timeout_s"] = 200, 7.0
    assert differences(config_from_tree(tree), run.config) == []
    tree["train"]["lr"] = 0.5
    run.folder.mkdir(parents=True)
    (run.folder / SETTINGS).write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match=r"run dense-s0 .*: train.lr \(0.5\) is now 0.002; choose"):
        check(run, plan.comparison)


# ----------------------------------------------------------------------------------------- the runs


def fed_to(path):
    """Trains a run's settings in this rank: a digest of each step's samples, noise, times and
    labels.
    """
    from diffmoe.training import step
    from test_run import train_here

    original, digests = step.flow_loss, []

    def flow_loss(model, x, noise, t, y, rule, predicts):
        parts = [value.numpy().tobytes() for value in (x, noise, t, y)]
        digests.append([hashlib.sha256(part).hexdigest() for part in parts])
        return original(model, x, noise, t, y, rule, predicts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "flow_loss", flow_loss)
        train_here(["--config", str(path)], 1)
    return digests


@pytest.mark.full
def test_two_routers_are_fed_the_same(tmp_path):
    more = ["samples=64", "validations=1", "moe.capacity_until=0", "train.label_drop=0.5"]
    plan = planned(tmp_path, *more, "routers={tc: {model: {family: tc}}}", "confounds=null")
    seen = {}
    with Ranks(1, timeout=240.0) as ranks:
        for run in plan.runs:
            (tmp_path / f"{run.name}.yaml").write_text(yaml.safe_dump(config_to_tree(run.config)))
            (seen[run.name],) = ranks.run(fed_to, tmp_path / f"{run.name}.yaml")
    # DiffMoE counts for its dial by forward passes besides, of the same samples.
    steps = {
        name: [d for i, d in enumerate(found) if d not in found[:i]] for name, found in seen.items()
    }
    assert len(steps["dense-s0"]) == 4
    assert steps["dense-s0"] == steps["diffmoe-s0"] == steps["tc-s0"]
    assert steps["dense-s1"] == steps["diffmoe-s1"] == steps["tc-s1"]
    for one, other in zip(steps["dense-s0"], steps["dense-s1"]):
        assert all(a != b for a, b in zip(one, other)), "another seed, other samples, noise, times"


def numbers(folder):
    """The table without what the machine says."""
    tree = json.loads((folder / "compare.json").read_text())
    for row in [*tree["routers"], *(r for rows in tree["confounds"].values() for r in rows)]:
        del row["machine"]
    return tree


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The smoke comparison, whole: its folder, and what it said."""
    folder = tmp_path_factory.mktemp("smoke")
    (result,) = run_program(1, "compare", *arguments(folder, "--jobs", "2"), timeout=600)
    return folder, result


@pytest.mark.full
def test_the_smoke_comparison(smoke):
    folder, result = smoke
    assert (result.returncode, result.stderr) == (0, ""), result
    assert "0 of 7 runs are finished, 7 to go, 2 at a time" in result.stdout
    found = numbers(folder)
    assert found["missing"] == {} and [row["router"] for row in found["routers"]] == [
        "dense",
        "diffmoe",
    ]
    for row in found["routers"]:
        assert row["seeds"] == [0, 1] and row["validation_loss"]["spread"] > 0
        assert len(row["curve"]["samples"]) == 3
    assert {axis: len(rows) for axis, rows in found["confounds"].items()} == {
        "train.batch": 2,
        "moe.experts": 2,
        "diffusion.time_sampling": 2,
    }
    assert result.stdout.endswith((folder / "compare.md").read_text() + "\n")


@pytest.mark.full
def test_finished_runs_stay_and_changed_ones_are_refused(smoke):
    folder, _ = smoke
    before = numbers(folder), (folder / "dense-s0/compare.log").read_bytes()
    (again,) = run_program(1, "compare", *arguments(folder))
    assert again.returncode == 0 and "7 of 7 runs are finished, 0 to go" in again.stdout
    assert (numbers(folder), (folder / "dense-s0/compare.log").read_bytes()) == before
    for more, told in (
        (["train.lr=0.5"], "train.lr (0.002) is now 0.5"),
        (["samples=768"], "train.steps (24) is now 48"),
        (["routers={diffmoe: {moe: {capacity: 2}}}"], "run diffmoe-s0 was begun with other"),
    ):
        (refused,) = run_program(1, "compare", *arguments(folder, *more))
        assert refused.returncode == 2 and told in refused.stderr
        assert len(refused.stderr.splitlines()) == 1, refused.stderr


@pytest.mark.full
def test_killed_between_runs_and_within_one_it_ends_the_same(tmp_path):
    """The comparison and its run are killed once the run has a checkpoint of step 8 of 120."""
    more = ["samples=1920", "seeds=[0]", "confounds=null"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    (result,) = run_program(1, "compare", *arguments(whole, *more, "--jobs", "2"), timeout=600)
    assert result.returncode == 0, result
    (first,) = run_program(1, "compare", *arguments(killed, *more, "--only", "dense"))
    assert first.returncode == 0 and not (killed / "compare.json").exists(), first
    run = killed / "diffmoe-s0"
    with start_program(1, "compare", *arguments(killed, *more)) as program:
        wait_for(run / "checkpoints/step_00000008/checkpoint.json")
        child = json.loads((run / "running.json").read_text())["process"]
        program.signal(0, signal.SIGKILL)
        os.kill(child, signal.SIGKILL)
        program.wait()
    assert not (run / "checkpoints/step_00000120").exists(), "it was killed too late to be a test"
    (last,) = run_program(1, "compare", *arguments(killed, *more), timeout=600)
    assert last.returncode == 0 and "1 of 2 runs are finished, 1 to go" in last.stdout, last.stdout
    assert "resumed from" in (run / "compare.log").read_text()
    assert numbers(killed) == numbers(whole)
    assert read_validations(run) == read_validations(whole / "diffmoe-s0")


def wait_for(path: Path, timeout: float = 180.0) -> None:
    deadline = time.monotonic() + timeout
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.005)


@pytest.mark.full
def test_asked_to_stop_it_saves_and_a_failing_run_does_not_keep_the_others(tmp_path):
    more = ["samples=16000", "seeds=[0]", "confounds=null"]
    folder = tmp_path / "stopped"
    with start_program(1, "compare", *arguments(folder, *more)) as program:
        wait_for(folder / "dense-s0/checkpoints/step_00000008/checkpoint.json")
        program.signal(0, signal.SIGTERM)
        (result,) = program.wait()
    assert result.returncode == 1 and "stopped cleanly; the same command goes on" in result.stdout
    assert "stopped cleanly at step" in (folder / "dense-s0/compare.log").read_text()
    assert not (folder / "diffmoe-s0").exists()
    more = ["samples=64", "seeds=[0]", "confounds=null", "routers={dense: {moe: {pool: 1}}}"]
    bad = tmp_path / "bad"
    (bad / "dense-s0").mkdir(parents=True)
    (bad / "dense-s0/left_out.json").write_text("nonsense")
    (result,) = run_program(1, "compare", *arguments(bad, *more), timeout=600)
    assert result.returncode == 1
    assert "not finished: dense-s0 ended with exit code 2: error:" in result.stdout
    assert "left_out.json is not valid JSON" in result.stdout
    assert "diffmoe-s0: finished" in result.stdout
    assert "Missing: dense-s0 (step 0 of 4)" in result.stdout
