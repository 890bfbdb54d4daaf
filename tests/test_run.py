"""Training through run.py: what a run leaves behind, resuming, stopping, precision, and the four
families.
"""

import contextlib
import io
import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffmoe.checkpoints.reader import Checkpoint
from diffmoe.config import TrainConfig, load_config
from diffmoe.deepspeed_json import merge_deepspeed, read_deepspeed
from diffmoe.errors import UserError
from diffmoe.layout import resolve_layout
from diffmoe.parallel.spawn import Ranks
from diffmoe.training.engine import import_deepspeed
from diffmoe.training.metrics import Writer
from programs import (
    REPOSITORY,
    losses,
    run_cases,
    run_program,
    start_launcher,
    start_program,
    tiny,
    tiny_config,
    trained,
    zero,
)

KINDS = {
    "master",
    "ema_0.7",
    "exp_avg",
    "exp_avg_sq",
}  # and buffers, where there are capacity predictors


def tensors(step_folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint as ``kind/logical name``, whatever files they lie in."""
    checkpoint = Checkpoint(step_folder)
    assert set(checkpoint.kinds()) - {"buffers"} == KINDS
    return {
        f"{kind}/{name}": value
        for kind in checkpoint.kinds()
        for name, value in checkpoint.tensors(kind).items()
    }


def assert_same_tensors(here: Path, there: Path) -> None:
    first, second = tensors(here), tensors(there)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def steps(folder: Path) -> list[int]:
    return sorted(
        int(path.name.removeprefix("step_")) for path in (folder / "checkpoints").glob("step_*")
    )


def copy_run(to: Path, step: int) -> Path:
    """A run folder as if the undisturbed run had been killed after ``step``."""
    shutil.copytree(
        trained()[0] / "checkpoints" / f"step_{step:08d}", to / "checkpoints" / f"step_{step:08d}"
    )
    return to


def train_here(arguments: list[str], world: int) -> None:
    """What run.py does between joining and leaving, in a rank that lives on."""
    from diffmoe.parallel.groups import build_groups
    from diffmoe.training.loop import train

    config = load_config(tiny_config_of(arguments), [a for a in arguments if "=" in a])
    layout = resolve_layout(config, world)
    json_of = (
        arguments[arguments.index("--deepspeed_config") + 1]
        if "--deepspeed_config" in arguments
        else None
    )
    train(
        config,
        layout,
        merge_deepspeed(read_deepspeed(json_of), config, layout),
        build_groups(layout.ep, layout.pool_ranks),
        torch.device("cpu"),
    )


def tiny_config_of(arguments: list[str]) -> str:
    return arguments[arguments.index("--config") + 1]


@pytest.fixture(scope="module")
def two_ranks():
    with Ranks(2, timeout=240.0) as ranks:
        yield ranks


# ------------------------------------------------------------------------------------------------ a
# whole run


def test_a_run_leaves_everything_it_promises():
    folder, results = trained()
    assert [r.returncode for r in results] == [0, 0], results
    assert results[1].stdout == "" and "Traceback" not in results[0].stderr + results[1].stderr
    for name in (
        "config.yaml",
        "layout.json",
        "deepspeed.json",
        "metrics.jsonl",
        "expert_load.png",
        "loss.png",
        "samples_00000008.png",
    ):
        assert (folder / name).stat().st_size > 0, name
    for image in folder.glob("*.png"):
        assert image.read_bytes().startswith(b"\x89PNG")
    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("loss")] == list(range(1, 9))
    assert {"predictor_loss", "trivial_predictor_loss", "images_per_s", "mfu", "memory_gib"} <= set(
        board.Tags()["scalars"]
    )
    assert set(board.Tags()["images"]) == {"samples", "expert_load"}
    assert steps(folder) == [4, 8]
    assert not [path for path in (folder / "checkpoints").iterdir() if "partial" in path.name]


def test_the_written_configuration_is_the_resolved_one():
    folder, _ = trained()
    written = load_config(folder / "config.yaml")
    assert written == load_config(tiny_config(), [f"run.folder={folder}"])
    layout = json.loads((folder / "layout.json").read_text())
    assert layout == {
        "ranks": 2,
        "ep": 2,
        "batch": 16,
        "micro_batch": 8,
        "accumulation": 1,
        "pool": 16,
        "pool_ranks": 2,
        "per_host": 0,
    }
    deepspeed = json.loads((folder / "deepspeed.json").read_text())
    assert deepspeed == merge_deepspeed(read_deepspeed(None), written, resolve_layout(written, 2))
    assert deepspeed["train_batch_size"] == 16 and deepspeed["zero_optimization"]["stage"] == 1


def test_metrics_say_what_happened():
    folder, _ = trained()
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    config = load_config(folder / "config.yaml")
    assert [r["step"] for r in records] == list(range(1, 9))
    assert [r["samples"] for r in records] == [16 * s for s in range(1, 9)]
    assert [r["lr"] for r in records] == pytest.approx([config.train.lr_at(s) for s in range(8)])
    for record in records:
        assert all(
            record[key] >= 0
            for key in ("loss", "grad_norm", "images_per_s", "mfu", "predictor_loss")
        )
        assert record["load_min"] == pytest.approx(1) and record["load_max"] == pytest.approx(1), (
            "balance is exact"
        )
    assert records[-1]["loss"] < records[0]["loss"]


def test_a_progress_line_has_the_losses_the_speed_and_the_memory():
    said = [line for line in trained()[1][0].stdout.splitlines() if line.startswith("step ")]
    assert len(said) == 8
    for line in said:  # a predictor that always says 1/4 has 0.562 nats: 1/4 ln 4 + 3/4 ln 4/3
        assert re.fullmatch(
            r"step [1-8]/8  loss \d\.\d{4}  predictor \d\.\d{3} \(trivial 0\.562\)  norm "
            r"\d+\.\d{3}  lr \S+  "
            r"\d+ images/s  MFU \d+\.\d %  \d+\.\d GiB",
            line,
        ), line


def test_a_run_without_a_record_complains_of_nothing(tmp_path, capsys):
    Writer(tmp_path, 0, []).close()
    assert capsys.readouterr() == ("", "") and not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------
# resuming


@pytest.mark.full
def test_stopped_by_a_signal_to_one_rank_the_same_command_goes_on_bit_for_bit(tmp_path):
    """2k steps == k, SIGTERM, resume, k; half-written folders are ignored and only train.keep
    checkpoints stay.
    """
    saving = ("train.save_every=1", "train.keep=2")
    undisturbed, _ = trained(*saving)
    folder = tmp_path / "run"
    command = tiny(folder, *saving)
    with start_program(2, *command) as program:
        program.wait_for("step 2/8")
        program.signal(1, signal.SIGTERM)
        results = program.wait()
    assert [r.returncode for r in results] == [0, 0], results
    stopped = int(re.search(r"stopped cleanly at step (\d+)", results[0].stdout)[1])
    assert 2 <= stopped < 8
    assert steps(folder) == [stopped - 1, stopped]
    assert not list(folder.glob("samples_*")), "a stop's grace is for saving"
    assert losses(folder).keys() == set(range(1, stopped + 1))
    partial = folder / "checkpoints" / ".step_00000007.partial"
    partial.mkdir(exist_ok=True)
    (partial / "checkpoint.json").write_text('{"half": ')
    (folder / "checkpoints" / "step_00000099").mkdir()  # no checkpoint.json: not complete

    results = run_program(2, *command)
    assert [r.returncode for r in results] == [0, 0], results
    assert (
        f"at step {stopped}" in results[0].stdout and f"step {stopped + 1}/8" in results[0].stdout
    )
    (folder / "checkpoints" / "step_00000099").rmdir()
    assert steps(folder) == [7, 8]
    assert not partial.exists(), "the save of step 7 wrote over it"
    assert losses(folder) == losses(undisturbed)
    assert_same_tensors(
        undisturbed / "checkpoints/step_00000008", folder / "checkpoints/step_00000008"
    )


@pytest.mark.full
def test_ctrl_c_under_the_deepspeed_command_leaves_a_checkpoint(tmp_path):
    """The launcher answers Ctrl-C itself: it ends its ranks, which must have saved by then."""
    arguments = tiny(tmp_path, "train.steps=100000", "train.log_every=5", "train.save_every=0")
    with start_launcher("deepspeed", *arguments) as program:
        program.wait_for("step 5/")
        program.interrupt()
        program.wait_for("stopped cleanly at step", even_after_the_end=True)
    assert len(steps(tmp_path)) == 1


@pytest.mark.full
def test_a_finished_run_does_nothing_and_a_folder_of_another_run_is_refused(tmp_path):
    folder = copy_run(tmp_path / "run", 8)
    before = tensors(folder / "checkpoints/step_00000008")
    other = ["model.width=64", "run.seed=5", "train.batch=32", "moe.pool=8"]
    finished, *refused = run_cases(2, [tiny(folder), *(tiny(folder, change) for change in other)])
    assert [r.returncode for r in finished] == [0, 0], finished
    assert "resumed from" in finished[0].stdout and "saved" not in finished[0].stdout
    assert (
        steps(folder) == [8]
        and tensors(folder / "checkpoints/step_00000008").keys() == before.keys()
    )
    for change, results, text in zip(
        other,
        refused,
        (
            "model.width: 32 -> 64",
            "run.seed: 0 -> 5",
            "train.batch: 16 -> 32",
            "moe.pool (samples): 16 -> 8",
        ),
        strict=True,
    ):
        assert [r.returncode for r in results] == [2, 2], results
        assert f"belongs to another run ({text}); choose another run.folder" in results[0].stderr
        assert (results[0].stderr + results[1].stderr).count("\n") == 1
    written = load_config(folder / "config.yaml")
    assert written.model.width == 32 and written.run.seed == 0, (
        "a refused run must not overwrite the folder's config"
    )


@pytest.mark.parametrize(
    ("world", "stage", "overrides"),
    [
        (1, 0, ["parallel.ep=1"]),
        pytest.param(
            *(4, 3, ["parallel.ep=2", "parallel.recompute=selective", "train.sample_every=3"]),
            marks=pytest.mark.full,
        ),
    ],
)
def test_another_layout_goes_on_with_the_same_losses(tmp_path, world, stage, overrides):
    (tmp_path / "ds.json").write_text(json.dumps(zero(stage)))
    folder = copy_run(tmp_path / "run", 4)
    shutil.copy(trained()[0] / "deepspeed.json", folder)
    results = run_program(
        world, *tiny(folder, "--deepspeed_config", str(tmp_path / "ds.json"), *overrides)
    )
    assert [r.returncode for r in results] == [0] * world, results
    assert f"changed since step_00000004: ZeRO stage: 1 -> {stage}\n" in results[0].stdout, results
    expected, found = losses(trained()[0]), losses(folder)
    assert found.keys() == {5, 6, 7, 8}
    assert (folder / "samples_00000006.png").exists() == (world == 4), (
        "EMA weights come and go in the middle of training"
    )
    assert [found[s] for s in found] == pytest.approx([expected[s] for s in found], rel=1e-5)
    there, here = (tensors(path / "checkpoints/step_00000008") for path in (trained()[0], folder))
    assert there.keys() == here.keys()
    for name in (n for n in there if n.startswith(("master/", "ema_0.7/"))):
        # Adam divides by the root of tiny second moments: an element may move by a part of lr for
        # rounding.
        torch.testing.assert_close(
            here[name], there[name], rtol=1e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


# ----------------------------------------------------------------------------------------
# precision, families


@pytest.mark.full
def test_every_micro_batch_counts_once_in_bf16(two_ranks, tmp_path):
    norms = {}
    for name in ("zero1_fp32", "zero1_bf16", "zero2_bf16", "zero3_bf16"):
        arguments = tiny(
            tmp_path / name,
            "--deepspeed_config",
            str(REPOSITORY / f"ds_configs/{name}.json"),
            "train.accumulation=2",
            "train.steps=1",
            "train.clip=0",
            "moe.pool=8",
        )
        two_ranks.run(train_here, arguments, 2)
        norms[name] = json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])[
            "grad_norm"
        ]
    assert norms == pytest.approx(dict.fromkeys(norms, norms["zero1_fp32"]), rel=0.02)


@pytest.mark.full
@pytest.mark.parametrize("name", ["zero1_bf16", "zero2_bf16", "zero3_bf16"])
def test_bf16_trains_near_fp32_and_keeps_fp32_masters(two_ranks, tmp_path, name):
    arguments = tiny(tmp_path, "--deepspeed_config", str(REPOSITORY / f"ds_configs/{name}.json"))
    two_ranks.run(train_here, arguments, 2)
    expected, found = losses(trained()[0]), losses(tmp_path)
    assert [found[s] for s in expected] == pytest.approx([expected[s] for s in expected], rel=0.03)
    assert found != expected, "this did not run in bf16"
    state = tensors(tmp_path / "checkpoints/step_00000008")
    assert {
        t.dtype for n, t in state.items() if not n.endswith(("observations", "counted_at"))
    } == {torch.float32}
    masters = [t for n, t in state.items() if n.startswith("master/")]
    assert any(not torch.equal(t, t.bfloat16().float()) for t in masters), (
        "masters were rounded to bf16"
    )


@pytest.mark.slow  # compiles it, where nobody has
@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_deepspeeds_optimizer_trains_as_torchs_does(two_ranks, tmp_path, offload):
    (tmp_path / "ds.json").write_text(json.dumps(zero(1, offload_optimizer={"device": offload})))
    arguments = tiny(
        tmp_path, "train.optimizer=deepspeed", "--deepspeed_config", str(tmp_path / "ds.json")
    )
    two_ranks.run(train_here, arguments, 2)
    assert losses(tmp_path) == pytest.approx(losses(trained()[0]), rel=1e-5)


def test_an_optimizer_that_does_not_compile_is_one_line(monkeypatch):
    def no_ninja(*_, **__):
        raise RuntimeError("Unable to JIT load the cpu_adam op\ndue to ninja not being installed.")

    import_deepspeed()
    from diffmoe.training.zero_optimizers import build_adam

    monkeypatch.setattr("deepspeed.ops.adam.DeepSpeedCPUAdam", no_ninja)
    with pytest.raises(
        UserError,
        match=r"train.optimizer \(deepspeed\) cannot be compiled here: Unable to .* op due to "
        r"ninja",
    ):
        build_adam([], TrainConfig(optimizer="deepspeed"), torch.device("cpu"), offload=False)


@pytest.mark.full
@pytest.mark.parametrize(
    ("family", "ep", "pool"), [("dense", 1, 16), ("tc", 2, 16), ("ec", 2, 1), ("diffmoe", 2, 8)]
)
def test_every_family_trains_and_resumes(two_ranks, tmp_path, family, ep, pool):
    more = [
        f"model.family={family}",
        f"parallel.ep={ep}",
        f"moe.pool={pool}",
        "train.schedule=constant",
        "train.save_every=2",
    ]
    two_ranks.run(train_here, tiny(tmp_path / "a", *more, "train.steps=3"), 2)
    found = losses(tmp_path / "a")
    assert found.keys() == {1, 2, 3} and all(0 < loss < 10 for loss in found.values())
    assert (tmp_path / "a/expert_load.png").exists() == (family != "dense")
    shutil.copytree(
        tmp_path / "a/checkpoints/step_00000002", tmp_path / "b/checkpoints/step_00000002"
    )
    two_ranks.run(train_here, tiny(tmp_path / "b", *more, "train.steps=3"), 2)
    assert_same_tensors(
        tmp_path / "a/checkpoints/step_00000003", tmp_path / "b/checkpoints/step_00000003"
    )


def said_by(arguments: list[str], world: int) -> str:
    """What this rank prints while it trains."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        train_here(arguments, world)
    return said.getvalue()


@pytest.mark.full
def test_after_twenty_steps_a_run_says_how_wrong_its_plan_was(two_ranks, tmp_path):
    first, second = two_ranks.run(
        said_by,
        tiny(
            tmp_path, "model.depth=2", "train.steps=22", "train.log_every=11", "train.save_every=0"
        ),
        2,
    )
    (line,) = (line for line in first.splitlines() if line.startswith("plan: "))
    planned, measured, error = map(
        float, re.match(r"plan: (\S+) ms a step, measured (\S+) \((\S+) %\); ", line).groups()
    )
    assert error == pytest.approx(100 * (planned / measured - 1), abs=1) and second == ""
    before, after = (
        json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    )
    assert "plan_step_error" not in before and 100 * after["plan_step_error"] == pytest.approx(
        error, abs=0.5
    )


def complaint(arguments: list[str], world: int) -> tuple[str, str]:
    """The error that ends training on this rank, which lives on."""
    try:
        train_here(arguments, world)
    except ValueError as error:
        return type(error).__name__, str(error)
    return "", ""


@pytest.mark.full
def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved(two_ranks, tmp_path):
    arguments = tiny(
        tmp_path, "train.lr=1e30", "train.clip=0", "train.warmup=0", "train.save_every=3"
    )
    first, second = two_ranks.run(complaint, arguments, 2)
    assert first == second and first[0] == "AgreedError"
    assert re.fullmatch(
        r"loss is \S+ and gradient norm \S+ at step \d, first in the .* on ranks 0, 1; the last "
        r"checkpoint is "
        "untouched",
        first[1],
    )
    assert steps(tmp_path) == []


@pytest.mark.full
def test_a_save_that_fails_is_tried_again_and_only_the_last_state_must_be_saved(
    two_ranks, tmp_path
):
    for run, way in (("a", "step_00000002"), ("b", "step_00000008")):
        (tmp_path / run / "checkpoints").mkdir(parents=True)
        (tmp_path / run / f"checkpoints/.{way}.partial").write_text("in the way")
    assert two_ranks.run(complaint, tiny(tmp_path / "a", "train.save_every=1"), 2) == [("", "")] * 2
    assert steps(tmp_path / "a") == [6, 7, 8]
    records = [json.loads(line) for line in (tmp_path / "a/metrics.jsonl").read_text().splitlines()]
    assert records[-1]["failed_saves"] == 1
    event = json.loads((tmp_path / "a/events.jsonl").read_text())
    assert event["event"] == "save failed" and ".step_00000002.partial" in event["text"]
    first, second = two_ranks.run(complaint, tiny(tmp_path / "b", "train.save_every=4"), 2)
    assert (
        first
        == second
        == (
            "AgreedError",
            "the state of step 8 could not be saved; what the run has is the checkpoint before",
        )
    )
    assert steps(tmp_path / "b") == [4]
