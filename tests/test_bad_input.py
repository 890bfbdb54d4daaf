"""Bad input: one clear line, a non-zero exit on every rank, no hang, no traceback."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import diffmoe.__main__ as run
from diffmoe.config import load_config
from diffmoe.data.feed import open_reader
from diffmoe.errors import UserError
from launcher.__main__ import main as launcher_main
from programs import (
    REPOSITORY,
    Result,
    digits,
    environment,
    run_cases,
    run_program,
    start_launcher,
    tiny,
    tiny_config,
    trained,
)


def assert_one_line(results: list[Result], *texts: str) -> None:
    """All ranks end with 2, and together say one line on stderr, which holds all texts."""
    assert [r.returncode for r in results] == [2] * len(results), results
    lines = [line for r in results for line in r.stderr.splitlines()]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    for text in texts:
        assert text in lines[0]


# ------------------------------------------------------------ what the command line and the
# configuration show

BEFORE_JOINING = {
    "verb": (
        ["trian"],
        "subcommand 'trian' must be one of train, sample, evaluate, sweep, compare, encode, "
        "inspect-data, import, export, check-checkpoint, bench, profile, verify",
    ),
    "no config": (["train.steps=3"], "train needs --config"),
    "unknown option": (
        ["--tpyo", "--config", "TINY"],
        "unrecognized arguments: --tpyo (see run.py train --help)",
    ),
    "ranks without dry run": (
        ["--config", "TINY", "--ranks", "3"],
        "--ranks (3) goes with --dry-run",
    ),
    "missing config": (["--config", "gone.yaml"], "gone.yaml does not exist"),
    "config is a folder": (
        ["--config", "configs"],
        "configs must be a file, not a folder or device",
    ),
    "name too long": (["--config", "c" * 300], " cannot be read: File name too long"),
    "name with a line break": (["--config", "a\nb.yaml"], "a b.yaml does not exist"),
    "config is a list": (["--config", "LIST"], "list.yaml must hold a mapping, not list"),
    "unknown key": (
        ["--config", "TINY", "model.widht=3"],
        "unknown key model.widht (value 3); did you mean model.width?",
    ),
    "override": (
        ["--config", "TINY", "train.steps"],
        "override 'train.steps' must look like section.field=value",
    ),
    "negative": (["--config", "TINY", "train.lr=-1"], "train.lr (-1.0) must be at least 0"),
    "experts": (
        ["--config", "TINY", "moe.experts=3"],
        "moe.experts (3) must be divisible by parallel.ep (2)",
    ),
    "pool": (
        ["--config", "TINY", "moe.pool=5"],
        "moe.pool (5 samples) must divide the forward batch train.micro_batch (8) x ranks (2) = 16",
    ),
    "world": (
        ["--config", "TINY", "parallel.ep=4"],
        "world size (2) must be divisible by parallel.ep (4)",
    ),
    "batch": (
        ["--config", "TINY", "train.batch=15"],
        "train.batch (15) must be divisible by ranks (2)",
    ),
    "json gone": (
        ["--config", "TINY", "--deepspeed_config", "gone.json"],
        "--deepspeed_config gone.json does not exist",
    ),
    "json contradicts": (
        ["--config", "TINY", "--deepspeed_config", "JSON"],
        "DeepSpeed's train_batch_size (32) contradicts the YAML's train.batch (16)",
    ),
    "an old JSON": (
        ["profile", "--config", "TINY", "--deepspeed_config", "OLD", "--zero", "2"],
        "DeepSpeed's zero_optimization (true) is an old form",
    ),
    "sampling from nothing": (["sample"], "the following arguments are required: --checkpoint"),
}


@pytest.mark.parametrize("name", BEFORE_JOINING)
def test_mistakes_on_the_command_line(tmp_path, name):
    arguments, text = BEFORE_JOINING[name]
    (tmp_path / "list.yaml").write_text("- model\n- train\n")
    (tmp_path / "ds.json").write_text('{"train_batch_size": 32}')
    (tmp_path / "old.json").write_text('{"zero_optimization": true}')
    files = {
        "TINY": str(tiny_config()),
        "LIST": str(tmp_path / "list.yaml"),
        "JSON": str(tmp_path / "ds.json"),
        "OLD": str(tmp_path / "old.json"),
    }
    assert_one_line(run_program(2, *(files.get(a, a) for a in arguments)), text)


def test_where_nothing_can_be_written_it_is_said_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    there = str(tmp_path / "file" / "x")
    for option, *words in (
        ("--json", "run.py", "verify", "--quick"),
        ("--grid", "run.py", "inspect-data", str(digits())),
        ("--json", "-m", "diffmoe.evaluation.judge", "gone.npz"),
    ):
        result = subprocess.run(
            [sys.executable, *words, option, there],
            cwd=REPOSITORY,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (result.returncode, result.stdout) == (2, "")
        line = f"error: {option} ({there}) cannot be written: {tmp_path / 'file'} is a file\n"
        assert result.stderr.endswith(line)


def test_every_rank_says_what_is_wrong_with_its_own_environment():
    results = run_program(2, *tiny(Path("unused")), env={"LOCAL_WORLD_SIZE": "3"})
    for result in results:
        assert result.returncode == 2
        assert result.stderr == "error: LOCAL_WORLD_SIZE (3) must not exceed WORLD_SIZE (2)\n"


def test_a_dry_run_prints_it_all_and_touches_nothing(tmp_path):
    results = run_program(2, *tiny(tmp_path / "run", "--dry-run", "data.shards=/nowhere"))
    assert [(r.returncode, r.stderr) for r in results] == [(0, ""), (0, "")], results
    for text in (
        "seed: 0",
        "shards: /nowhere",
        "train_batch_size': 16",
        "batch    8 micro x 2 ranks x 1 accumulation = 16",
        "experts  4 over 2 expert-parallel ranks, in 1 copies",
        "pool     16 samples = 256 tokens",
        "engine   ZeRO 1, fp32 (ieee), recompute none, compiled on a GPU",
        "note: resolved for world size 2; --ranks N resolves for N ranks",
        "note: data.shards (/nowhere): nothing is there",
    ):
        assert text in results[0].stdout
    assert results[1].stdout == ""
    assert not (tmp_path / "run").exists()


def test_a_dry_run_of_bf16_at_zero_0_says_what_runs(tmp_path):
    (tmp_path / "d.json").write_text(
        '{"bf16": {"enabled": true}, "zero_optimization": {"stage": 0}}'
    )
    (result,) = run_program(
        1,
        *tiny(
            tmp_path / "run",
            "--deepspeed_config",
            tmp_path / "d.json",
            "--dry-run",
            "parallel.ep=1",
        ),
    )
    assert result.returncode == 0 and "engine   ZeRO 1, bf16, fp32 masters" in result.stdout, result
    assert (
        "'zero_optimization': {'stage': 1," in result.stdout
        and "note: bf16 at ZeRO 0" in result.stdout
    )


def test_a_dry_run_resolves_for_ranks_that_are_not_there():
    (result,) = run_program(1, *tiny(Path("unused"), "--dry-run", "--ranks", "8"))
    assert result.returncode == 0 and "2 micro x 8 ranks x 1 accumulation" in result.stdout
    assert "note:" not in result.stdout
    (result,) = run_program(1, *tiny(Path("unused"), "--dry-run", "--ranks", "3"))
    assert_one_line([result], "world size (3) must be divisible by parallel.ep (2)")
    assert "--ranks" not in result.stderr
    (result,) = run_program(1, *tiny(Path("unused"), "--dry-run"))
    assert_one_line([result], "world size (1) must be divisible by parallel.ep (2)")
    assert "--ranks N" in result.stderr


# ---------------------------------------------------------------------- what data, folders and
# checkpoints show


def damaged_digits(to: Path, **changes) -> Path:
    """The digits with another index.json."""
    shutil.copytree(digits(), to)
    record = json.loads((to / "index.json").read_text())
    (to / "index.json").write_text(json.dumps({**record, **changes}))
    return to


def damaged_run(to: Path, file: str, content: bytes | None = None, cut: int | None = None) -> Path:
    """The trained run with one file of its newest checkpoint replaced, or cut to some bytes."""
    shutil.copytree(trained()[0] / "checkpoints/step_00000008", to / "checkpoints/step_00000008")
    path = to / "checkpoints/step_00000008" / file
    path.write_bytes(path.read_bytes()[:cut] if content is None else content)
    return to


BEFORE_A_JOB = (
    (run.main, ["train", "--dry-run"]),
    (launcher_main, ["submit", "--dry-run", "--gpus-per-node", "1"]),
    (launcher_main, ["job", "prepare", "--ranks", "1"]),
)


def checked(tmp_path, monkeypatch, main, words: list[str], *more: str) -> int:
    """The exit code of a subcommand that starts no training."""
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(run, "export", lambda _environment: None)
    return main([*words, *tiny(tmp_path / "run", "parallel.ep=1", *more)])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("model.channels=3", "of shape (1, 8, 8); model.channels and model.input_size make (3, 8"),
        ("model.input_size=16", "model.channels and model.input_size make (1, 16, 16)"),
        ("model.classes=12", "has 10 classes; model.classes is 12"),
        ("train.repa_weight=0.5", "train.repa_weight (0.5) needs features, of which data.shards"),
        ("data.shards=GARBAGE", "index.json is malformed: "),
    ],
)
def test_a_dry_run_and_a_job_refuse_the_data_that_training_would(
    tmp_path, monkeypatch, capsys, change, text
):
    (tmp_path / "garbage").mkdir()
    (tmp_path / "garbage/index.json").write_text('{"format": 1, "shards": [')
    change = change.replace("GARBAGE", f"{tmp_path}/garbage")
    with pytest.raises(UserError) as caught:
        open_reader(load_config(str(tiny_config()), ["parallel.ep=1", change]))
    assert text in str(caught.value)
    for main, words in BEFORE_A_JOB:
        assert checked(tmp_path, monkeypatch, main, words, change) == 2, words
        assert capsys.readouterr() == ("", f"error: {caught.value}\n"), words
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "data",
    [
        ["data.shards=/nowhere"],
        ["data.shards=s3://nowhere/set"],
        ["data.shards=http://127.0.0.1:9/{0..3}.tar"],
        ["data.index=/nowhere.json"],
        ["data.index=http://127.0.0.1:9/index.json"],
    ],
)
def test_data_that_are_not_at_hand_are_not_compared(tmp_path, monkeypatch, data):
    for main, words in BEFORE_A_JOB:
        assert checked(tmp_path, monkeypatch, main, words, "model.channels=3", *data) == 0, words


def test_a_dry_run_reads_the_index_alone_and_without_torch(tmp_path):
    (tmp_path / "index.json").write_bytes((digits() / "index.json").read_bytes())
    code = "import sys; sys.modules['torch'] = None; import run; sys.exit(run.main(sys.argv[1:]))"
    words = tiny(tmp_path / "run", "--dry-run", "--ranks", "2", f"data.shards={tmp_path}")
    for change, status, text in (("classes=10", 0, ""), ("classes=12", 2, "has 10 classes; ")):
        done = subprocess.run(
            [sys.executable, "-c", code, *words, f"model.{change}"],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == status and text in done.stderr, done
        assert "note:" not in done.stdout


@pytest.fixture(scope="module")
def after_joining(tmp_path_factory):
    """Cases by name: (results, texts). All in one start of two ranks; the ones that reach DeepSpeed
    come last.
    """
    tmp = tmp_path_factory.mktemp("bad")
    run = str(trained()[0])
    (tmp / "file").write_text("in the way")
    (tmp / "empty").mkdir()
    (tmp / "blocked").mkdir()
    (tmp / "blocked/checkpoints").write_text("in the way")
    garbage = damaged_digits(tmp / "garbage")
    (garbage / "index.json").write_text('{"format": 1, "shards": [')
    lost = damaged_digits(tmp / "lost")
    (lost / "shard-000003.tar").unlink()
    short = damaged_digits(tmp / "short")
    (short / "shard-000003.tar").write_bytes((short / "shard-000003.tar").read_bytes()[:-512])
    size = (digits() / "shard-000003.tar").stat().st_size
    (tmp / "typo.json").write_text('{"zero_optimization": {"stage": 1, "overlap_com": true}}')
    (tmp / "scatter.json").write_text(
        '{"zero_optimization": {"stage": 2, "reduce_scatter": false}}'
    )
    (tmp / "stage3.json").write_text('{"zero_optimization": {"stage": 3}}')
    master = "master-00000.safetensors"
    whole = (trained()[0] / "checkpoints/step_00000008" / master).read_bytes()

    other = (trained()[0] / "checkpoints/step_00000008/ema_0.7-00001.safetensors").stat().st_size

    def train(*more) -> list[str]:
        return tiny(tmp / "run", *map(str, more))

    def sample(*more) -> list[str]:
        return ["sample", "--checkpoint", run, "--out", str(tmp / "out"), *map(str, more)]

    cases = {
        "no shards named": (train("data.shards="), "data.shards"),
        "no folder": (train("data.shards=/nowhere"), "data folder (/nowhere) does not exist"),
        "no index": (
            train(f"data.shards={tmp}/empty"),
            f"data folder ({tmp}/empty) has no index.json",
        ),
        "garbage index": (train(f"data.shards={garbage}"), f"{garbage}/index.json is malformed: "),
        "index of another format": (
            train(f"data.shards={damaged_digits(tmp / 'f', format=9)}"),
            "format (9) is not",
        ),
        "index without shards": (
            train(f"data.shards={damaged_digits(tmp / 'n', shards=None)}"),
            "index.json is malformed",
        ),
        "index with another count": (
            train(f"data.shards={damaged_digits(tmp / 'c', count=5)}"),
            "count (5) must be",
        ),
        "lost shard": (
            train(f"data.shards={lost}"),
            f"shard shard-000003.tar is missing from {lost}",
        ),
        "cut shard": (
            train(f"data.shards={short}"),
            f"has {size - 512} bytes, its index says {size}",
        ),
        "other channels": (
            train("model.channels=3"),
            "holds samples of shape (1, 8, 8)",
            "make (3, 8, 8)",
        ),
        "other size": (
            train("model.input_size=16"),
            "holds samples of shape (1, 8, 8)",
            "make (1, 16, 16)",
        ),
        "other classes": (train("model.classes=12"), "has 10 classes; model.classes is 12"),
        "folder is a file": (
            train(f"run.folder={tmp}/file"),
            f"run.folder ({tmp}/file) cannot be written",
        ),
        "folder below a file": (
            train(f"run.folder={tmp}/file/run"),
            f"run.folder ({tmp}/file/run) cannot be written",
        ),
        "checkpoints is a file": (
            train(f"run.folder={tmp}/blocked"),
            f"run.folder ({tmp}/blocked) cannot be written",
        ),
        "cut checkpoint": (
            train(f"run.folder={damaged_run(tmp / 'a', master, cut=100)}"),
            f"{master} must have {len(whole)} bytes and has 100",
        ),
        "garbage checkpoint.json": (
            train(f"run.folder={damaged_run(tmp / 'b', 'checkpoint.json', cut=50)}"),
            "checkpoint.json is not valid JSON",
        ),
        "poor checkpoint.json": (
            train(f"run.folder={damaged_run(tmp / 'd', 'checkpoint.json', b'{}')}"),
            "checkpoint.json lacks config, counters, emas, files, format",
        ),
        "sample: none": (
            ["sample", "--checkpoint", str(tmp / "empty")],
            f"no complete checkpoint in {tmp}/empty",
        ),
        "sample: gone": (
            ["sample", "--checkpoint", "/nowhere"],
            "checkpoint (/nowhere) does not exist",
        ),
        "sample: cut": (
            ["sample", "--checkpoint", str(tmp / "a")],
            "must have",
            "bytes and has 100",
        ),
        "sample: garbage": (
            [
                "sample",
                "--checkpoint",
                str(damaged_run(tmp / "e", "ema_0.7-00001.safetensors", b"\xff" * other)),
            ],
            "ema_0.7-00001.safetensors",
        ),
        "sample: class 10": (
            sample("--classes", "0,8-10"),
            "--classes '0,8-10' must name classes from 0 to 9 (model.classes = 10)",
        ),
        "sample: classes": (
            sample("--classes", "cat"),
            "--classes 'cat' must be 'all' or numbers and ranges such as 0,3,7-9",
        ),
        "sample: backwards": (sample("--classes", "9-3"), "--classes '9-3' must"),
        "sample: negative": (sample("--classes=-1"), "--classes '-1' must"),
        "sample: count": (sample("--count", 0), "--count (0) must be at least 1"),
        "sample: cfg": (
            sample("--cfg", "much"),
            "argument --cfg: invalid float value: 'much' (see run.py sample --help)",
        ),
        "sample: steps": (sample("sample.steps=0"), "sample.steps (0) must be at least 1"),
        "sample: model": (
            sample("model.width=64"),
            "override 'model.width=64': sampling takes the rest from the checkpoint",
        ),
        "sample: key": (
            sample("sample.stesp=3"),
            "unknown key sample.stesp (value 3); did you mean sample.steps?",
        ),
        "sample: seed": (sample("--seed=-1"), "run.seed (-1) must be in [0, 2^64)"),
        "sample: out": (sample("--out", f"{tmp}/file/x"), f"{tmp}/file"),
        "no apex": (train("train.optimizer=apex"), "train.optimizer (apex) needs NVIDIA's apex"),
        "apex at stage 3": (
            train("--deepspeed_config", tmp / "stage3.json", "train.optimizer=apex"),
            "train.optimizer (apex) must be torch or deepspeed with DeepSpeed's "
            "zero_optimization.stage (3)",
        ),
        "reduce_scatter": (
            train("--deepspeed_config", tmp / "scatter.json"),
            "DeepSpeed's zero_optimization.reduce_scatter (false) must be true",
        ),
        "typo in zero_optimization": (
            train("--deepspeed_config", tmp / "typo.json"),
            "unknown key zero_optimization.overlap_com (value True) in the DeepSpeed JSON; did you "
            "mean zero_optimization.overlap_comm?",
        ),
    }
    results = run_cases(2, [arguments for arguments, *_ in cases.values()])
    return {
        name: (found, texts)
        for (name, (_, *texts)), found in zip(cases.items(), results, strict=True)
    }


@pytest.mark.full
def test_mistakes_that_data_folders_and_checkpoints_show(after_joining):
    wrong = {}
    for name, (results, texts) in after_joining.items():
        try:
            assert_one_line(results, *texts)
        except AssertionError as error:
            wrong[name] = str(error)
    assert not wrong, "\n".join(f"{name}: {error}" for name, error in wrong.items())


# ---------------------------------------------------------------------------------------- the real
# launchers


@pytest.mark.full
@pytest.mark.parametrize(
    ("launcher", "change", "text"),
    [
        ("deepspeed", "moe.experts=3", "moe.experts (3) must be divisible by parallel.ep (2)"),
        ("deepspeed", "data.shards=/nowhere", "data folder (/nowhere) does not exist"),
        ("torchrun", "data.shards=/nowhere", "data folder (/nowhere) does not exist"),
    ],
)
def test_launchers_end_with_our_line(tmp_path, launcher, change, text):
    with start_launcher(launcher, *tiny(tmp_path / "run", change)) as program:
        (result,) = program.wait()
    assert result.returncode != 0
    ours = [
        line for line in (result.stdout + result.stderr).splitlines() if line.startswith("error: ")
    ]
    assert ours == [f"error: {text}"], (result.stdout, result.stderr)
