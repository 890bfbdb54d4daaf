"""The launcher's verbs as login nodes run them: help, one line for bad input, no torch; doctor's
and the job scripts' judgement.
"""

import dataclasses
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from diffmoe.errors import UserError
from diffmoe.gpus import Gpu
from launcher import job
from launcher.__main__ import SUBCOMMANDS, main
from launcher.doctor import Facts, gather, judge, satisfies
from programs import REPOSITORY, Program, losses, tiny, trained

DEMO = ["--config", "configs/demo.yaml"]


def launcher(*arguments, **kept):
    """``python -m launcher`` in a bare interpreter without site packages, as on a login node."""
    return subprocess.run(
        [sys.executable, "-S", "-m", "launcher", *map(str, arguments)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": os.environ["PATH"], **kept},
    )


# ------------------------------------------------------------------------------------------------
# the command line


def test_every_verb_has_help_with_an_example(capsys):
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert "example:" in listed and all(f"  {verb} " in listed for verb in SUBCOMMANDS)
    for words in (
        *([verb] for verb in SUBCOMMANDS if verb != "job"),
        ["job", "prepare"],
        ["job", "after"],
    ):
        with pytest.raises(SystemExit) as end:
            main([*words, "--help"])
        said = capsys.readouterr().out
        assert (
            end.value.code == 0
            and f"python -m launcher {' '.join(words)}" in said.partition("example:")[2]
        ), words
    assert (
        main(["job", "--help"]) == 0
        and "python -m launcher job" in capsys.readouterr().out.partition("example:")[2]
    )


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["plane"], "subcommand 'plane' must be one of doctor, plan, submit"),
        (
            ["doctor", "--now"],
            "unrecognized arguments: --now (see python -m launcher doctor --help)",
        ),
        (["submit"], "the following arguments are required: --config"),
        (["submit", "--config", "/nowhere.yaml"], "/nowhere.yaml does not exist"),
        (["submit", *DEMO, "--nodes", "0"], "--nodes (0) must be at least 1"),
        (["submit", *DEMO, "--nodes", "3"], "train.batch (128) must be divisible by ranks (24)"),
        (
            ["submit", *DEMO, "--time", "soon"],
            "--time ('soon') must be minutes, hours:minutes:seconds",
        ),
        (["submit", *DEMO, "--memory", "lots"], "--memory ('lots') must be"),
        (["submit", *DEMO, "--partition", "a b"], "--partition ('a b') must be one word"),
        (["submit", *DEMO, "--account", "x;rm"], "--account ('x;rm') must be one word"),
        (["submit", *DEMO, "--sbatch=-p"], "--sbatch ('-p') must be one long option"),
        (
            ["submit", *DEMO, "--gpus-per-node", "4", "--ranks-per-node", "2"],
            "--ranks-per-node (2) must equal --gpus-per-node (4)",
        ),
        (["submit", *DEMO, "train.stesp=3"], "unknown key train.stesp"),
        (["submit", *DEMO, "--deepspeed_config", "/nowhere.json"], "/nowhere.json does not exist"),
        (["preflight", "--timeout", "0"], "--timeout (0.0) must be above 0"),
        (["preflight", "train.steps=3"], "override 'train.steps=3' needs --config"),
        (["preflight", "--config", "/nowhere.yaml"], "/nowhere.yaml does not exist"),
        (["job", "after", "/nowhere", "0"], "folder (/nowhere) does not exist"),
        (["preflight", "--from", "/nowhere"], "--from (/nowhere) does not exist"),
        (
            ["job", "after", "tests", "0"],
            "folder (tests) has no config.yaml: it is not a training job's",
        ),
        (["job", "prepare", *DEMO, "--ranks", "2"], "SLURM_JOB_ID is unset"),
        (["job", "prepare", *DEMO, "--ranks", "0"], "--ranks (0) must be at least 1"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, text, capsys, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.chdir(REPOSITORY)
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and text in said, said


def test_without_torch_and_yaml_doctor_works_and_others_say_what_to_do():
    done = launcher("doctor")
    assert done.returncode == 1 and done.stderr == ""
    assert (
        "not installed (a login node needs none" in done.stdout
        and "not installed: deepspeed, numpy" in done.stdout
    )
    assert "type: make setup" in done.stdout
    done = launcher("submit", *DEMO, "--dry-run")
    assert (
        done.returncode == 2
        and done.stderr.startswith("error: launcher submit needs the package yaml")
        and done.stderr.count("\n") == 1
    )


def test_submit_needs_no_torch(tmp_path):
    """A site with PyYAML only, which cannot compare data with the model."""
    import yaml

    shutil.copytree(Path(yaml.__file__).parent, tmp_path / "yaml")
    (tmp_path / "index.json").write_text("{}")
    done = launcher(
        "submit",
        *DEMO,
        "--gpus-per-node",
        "2",
        "--dry-run",
        "train.lr=1e-3",
        f"data.shards={tmp_path}",
        PYTHONPATH=str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    assert (
        "#SBATCH --gpus-per-node=2\n" in done.stdout
        and "train configs/demo.yaml \\\n  train.lr=1e-3 \\\n" in done.stdout
        and f"data.shards={tmp_path} \\\n  run.folder=runs/demo" in done.stdout
    )


def test_submit_quotes_and_renders_everything(capsys, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    assert (
        main(
            [
                "submit",
                *DEMO,
                "--nodes",
                "2",
                "--gpus-per-node",
                "2",
                "--time",
                "1-12",
                "--partition",
                "gpu",
                "--account",
                "us",
                "--sbatch=--qos=high",
                "--signal",
                "300",
                "--dry-run",
                "data.shards=/a b/c",
            ]
        )
        == 0
    )
    script = capsys.readouterr().out
    for line in (
        "--nodes=2",
        "--ntasks-per-node=2",
        "--time=1-12",
        "--partition=gpu",
        "--account=us",
        "--qos=high",
        "--signal=B:USR1@300",
        "--requeue",
    ):
        assert f"#SBATCH {line}\n" in script
    assert "'data.shards=/a b/c'" in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_without_slurm_submit_says_so(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["submit", *DEMO, "--gpus-per-node", "2", f"run.folder={tmp_path}/run"]) == 2
    assert "sbatch is not on this machine's PATH" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------
# the job scripts


def test_a_jobs_folder_is_a_snapshot_that_a_requeue_finds_again(tmp_path):
    root = tmp_path / "tree"
    root.mkdir()
    for name in job.CODE:
        (shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy)(
            REPOSITORY / name, root / name
        )
    arguments = (
        str(REPOSITORY / "configs/demo.yaml"),
        str(REPOSITORY / "ds_configs/zero1_bf16.json"),
        4,
        [f"run.folder={tmp_path}/run", "train.lr=0.5"],
        "7",
        root,
    )
    folder = job.prepare(*arguments)
    assert folder == tmp_path / "run/jobs/7"
    assert (
        "lr: 0.5" in (folder / "config.yaml").read_text()
        and json.loads((folder / "deepspeed.json").read_text())["bf16"]["enabled"]
    )
    (root / "run.py").write_text("broken")
    assert job.prepare(*arguments) == folder
    assert (folder / "code/run.py").read_bytes() == (REPOSITORY / "run.py").read_bytes()
    assert (folder / "commit.txt").read_text().startswith("unknown (")  # not a repository
    assert not (tmp_path / "run/jobs/.7.partial").exists()
    with pytest.raises(UserError, match=r"world size \(3\) must be divisible by parallel.ep \(2\)"):
        job.prepare(*arguments[:2], 3, *arguments[3:])
    # A requeue asks for none of the files that it was made from.
    assert job.prepare("renamed.yaml", "gone.json", *arguments[2:]) == folder
    (folder / "starts.json").write_text("")  # cut by a full disk
    assert job.after_training(folder, 1).code == job.START_AGAIN
    done = subprocess.run(
        [
            sys.executable,
            folder / "code/run.py",
            "--config",
            folder / "config.yaml",
            "--dry-run",
            "--ranks",
            "4",
        ],
        cwd="/",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and "lr: 0.5" in done.stdout


@pytest.mark.parametrize(
    ("before", "step", "said"),
    [
        ("", "exit 3", "status 3"),  # a step that cannot start leaves no log to show
        (
            "kill -USR1 $$;",
            "sleep 60",
            "is asked to end before its ranks have started",
        ),  # it comes while the job is being prepared
        (
            "",
            "kill -USR1 $PPID; trap 'exit 5' USR1; while :; do sleep 0.1; done",
            "asks the ranks to save and end",
        ),
        ("", "exit 0", "status 0"),
    ],
)
def test_a_job_comes_to_its_conclusion(tmp_path, before, step, said):
    """Whenever the signal before the limit comes: that is where it is requeued."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "step.sh").write_text(step)
    script = (
        "set -euo pipefail; source scripts/slurm/_common.sh; trap stop_requested USR1; "
        f"job={tmp_path}; SLURM_JOB_ID=1; {before}"
    )
    script += f'step=(bash {tmp_path}/step.sh); on_ranks rank; kill -USR1 $$; echo "status $status"'
    done = subprocess.run(
        ["bash", "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=30
    )
    assert (
        done.returncode == 0 and "status" in done.stdout.splitlines()[-1] and said in done.stdout
    ), done
    assert ("status 0" in done.stdout) == (step == "exit 0" or bool(before)), done


@pytest.mark.parametrize(
    ("words", "folder"),
    [
        ("evaluate --checkpoint c", "evaluation"),
        ("sample --checkpoint c", "samples"),
        ("sample --out=a/b", "a/b"),
        ("encode --out d --source s", "d"),
    ],
)
def test_the_folder_whose_files_are_progress_is_the_one_that_is_filled(tmp_path, words, folder):
    script = (
        "set -euo pipefail; source scripts/slurm/_common.sh; SLURM_JOB_ID=1 SLURM_JOB_NAME=j; "
        f"enter_repository() {{ cd {tmp_path}; }}; on_ranks() {{ :; }}; "
        f'conclude() {{ printf "<%s>" "$@"; }}; run_verb {words}'
    )
    done = subprocess.run(
        ["bash", "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0 and done.stdout.endswith(f"<--out><{folder}>"), done


@pytest.mark.parametrize(
    "script", sorted((REPOSITORY / "scripts/slurm").glob("*.sh")), ids=lambda path: path.stem
)
def test_job_scripts_parse_and_ask_for_ranks_that_their_configuration_divides(script, tmp_path):
    text = script.read_text()
    subprocess.run(["bash", "-n", script], check=True)
    trained = re.search(r'^train (\S+) "\$@"$', text, re.M)
    assert (trained is not None) == script.stem.startswith("train_")
    if trained is None:
        return
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", text, re.M))
    assert (
        asked["ntasks-per-node"] == asked["gpus-per-node"]
        and asked["signal"] == "B:USR1@120"
        and "#SBATCH --requeue" in text
    )
    job.prepare(
        str(REPOSITORY / trained[1]),
        str(REPOSITORY / "ds_configs/zero1_bf16.json"),
        int(asked["nodes"]) * int(asked["gpus-per-node"]),
        [f"run.folder={tmp_path}"],
        "1",
        REPOSITORY,
    )


def test_a_comparisons_run_gets_on_by_its_steps(tmp_path):
    (tmp_path / "job").mkdir()
    for step in (10, 20, 30, 40, 50):
        reach(tmp_path / "run", step)
        shutil.rmtree(tmp_path / f"run/checkpoints/step_{step - 10:08d}", ignore_errors=True)
        verdict = job.after_writing(tmp_path / "job", 1, tmp_path / "run")
        assert verdict.code == job.START_AGAIN and "1 files" in verdict.text, verdict
    assert job.after_writing(tmp_path / "job", 0, tmp_path / "run").code == 0


def reach(run: Path, step: int) -> None:
    folder = run / f"checkpoints/step_{step:08d}"
    folder.mkdir(parents=True)
    (folder / "checkpoint.json").write_text("{}")


def test_a_job_starts_again_while_it_gets_on(tmp_path):
    run = tmp_path / "run"
    reach(run, 10)  # of an earlier job
    (run / "checkpoints/.step_00000099.partial").mkdir()
    (run / "checkpoints/step_00000098").mkdir()  # not complete
    folder = job.prepare(
        str(REPOSITORY / "configs/demo.yaml"),
        None,
        2,
        [f"run.folder={run}", "train.steps=40"],
        "7",
        REPOSITORY,
    )

    def after(status: int) -> int:
        return job.after_training(folder, status).code

    assert after(1) == job.START_AGAIN  # 10: the first start without progress
    reach(run, 20)
    assert after(0) == job.START_AGAIN  # stopped cleanly
    assert after(137) == job.START_AGAIN and after(0) == job.START_AGAIN  # two fruitless ones
    reach(run, 30)
    assert after(143) == job.START_AGAIN
    assert [after(9) for _ in range(3)] == [job.START_AGAIN, job.START_AGAIN, 9]
    reach(run, 35)
    assert after(2) == job.BAD_INPUT
    reach(run, 40)
    assert (
        after(138) == job.START_AGAIN
    )  # somebody died on the way out: the next start has nothing to do
    assert job.after_training(folder, 0) == job.Verdict(0, "finished (step 40 of 40)")


def test_a_job_that_fills_a_folder_starts_again_while_the_folder_grows(tmp_path):
    folder, out = tmp_path / "job", tmp_path / "out"
    folder.mkdir()
    out.mkdir()
    codes = []
    for files in (1, 2, 2, 2, 2):
        for i in range(files):
            (out / f"{i}.tar").write_text("")
        codes.append(job.after_writing(folder, 138, out).code)
    assert codes == [75, 75, 75, 75, 138]
    assert job.after_writing(folder, 0, out).code == 0


# ------------------------------------------------------------------------------------------------
# the other launchers

# Two nodes of one rank each, both on this machine.  DeepSpeed's multi-node start proper goes
# through ssh or pdsh, which a test machine lacks; --no_ssh is its form for clusters without either,
# with the same hostfile: the command is given on every node.
TWO_NODES = {
    "torchrun": "torchrun --nnodes 2 --node-rank $node --nproc-per-node 1 --master-addr 127.0.0.1 "
    "--master-port {port}",
    "deepspeed": "deepspeed --log_level error --hostfile {hostfile} --no_ssh --node_rank $node "
    "--master_addr 127.0.0.1 --master_port {port}",
}


@pytest.mark.full
@pytest.mark.parametrize("tool", TWO_NODES)
def test_two_nodes_of_torchrun_and_of_deepspeeds_hostfile(tool, tmp_path):
    (tmp_path / "hostfile").write_text("node-a slots=1\nnode-b slots=1\n")
    with (
        socket.socket() as probe
    ):  # launchers meet at a port and not through a file; nobody else takes it within seconds
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start = TWO_NODES[tool].format(port=port, hostfile=tmp_path / "hostfile")
    words = shlex.join(["run.py", *tiny(tmp_path / "run", "train.steps=3")])
    forget = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE DIFFMOE_STORE"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    script = f"node=$RANK; export SLURMD_NODENAME=node$node; unset {forget}; exec {start} {words}"
    with Program(["sh", "-c", script], 2, {"PATH": path}) as program:
        ends = program.wait(400)
    assert [end.returncode for end in ends] == [0, 0], ends
    assert "1 ranks" not in ends[0].stdout and "2 expert-parallel ranks" in ends[0].stdout
    said = re.findall(
        r"^EP groups of 2 ranks span 2 hosts: by the plan \(one CPU core.*$", ends[0].stdout, re.M
    )
    assert len(said) == 1 and said[0].endswith("ms") and "span" not in ends[1].stdout
    assert re.findall(r"^place    CPUs .* OMP_NUM_THREADS=1$", ends[0].stdout, re.M)
    undisturbed = losses(trained()[0])
    assert losses(tmp_path / "run")[1] == undisturbed[1]


# ------------------------------------------------------------------------------------------------
# doctor

H200 = Gpu(0, "NVIDIA H200", "570.1", 143771, ())
TORCH = {
    "version": "2.13.0+cu130",
    "cuda": "13.0",
    "gpus": 1,
    "nccl": True,
    "gloo": True,
}
WELL = Facts(
    python=(3, 11),
    executable="/v/bin/python",
    packages={"torch": "2.13.0", "deepspeed": "0.19.8"},
    wanted={"torch": ">=2.13,<2.14", "deepspeed": "==0.19.8"},
    wanted_python=">=3.10,<3.14",
    torch=TORCH,
    apex="none",
    gpus=(H200,),
    driver=True,
    nvcc="13.0",
    compiler="c++ 12",
    shm=2**33,
    cpus=64,
    omp=None,
    slurm="slurm 22.05",
    device_asked=None,
)


def wrong(**changes):
    return {
        finding.what: finding
        for finding in judge(dataclasses.replace(WELL, **changes))
        if finding.level == "wrong"
    }


def test_a_machine_that_is_well():
    assert wrong() == {}
    held = {**TORCH, "memory": [["NVIDIA H200", "12345678-9", 40 * 2**30, 140 * 2**30]]}
    assert (
        wrong(torch=held, device_asked="cpu")
        == {}
        == wrong(torch={**TORCH, "gpus": 0}, device_asked="cpu")
    )
    assert (
        wrong(
            gpus=None,
            driver=False,
            torch={
                **TORCH,
                "version": "2.13.0+cpu",
                "cuda": None,
                "gpus": 0,
                "nccl": False,
            },
            nvcc=None,
            compiler=None,
        )
        == {}
    )


@pytest.mark.parametrize(
    ("changes", "what", "text", "fix"),
    [
        ({"apex": "impostor"}, "apex", "not NVIDIA's (no apex.optimizers)", "pip uninstall apex"),
        (
            {"torch": {**TORCH, "version": "2.13.0+cpu", "cuda": None, "gpus": 0}},
            "torch",
            "this machine has 1 GPU (NVIDIA H200, driver 570.1), "
            "and torch (2.13.0+cpu) is built for CPUs only",
            "make setup",
        ),
        (
            {"torch": {**TORCH, "gpus": 0, "says": "driver too old"}},
            "torch",
            "this machine has 1 GPU (NVIDIA H200, driver 570.1), and torch "
            "(2.13.0+cu130, for CUDA 13.0) cannot use it: driver too old",
            "nvidia-smi",
        ),
        (
            {"torch": {**TORCH, "gpus": 0}, "shown": ""},
            "torch",
            "CUDA_VISIBLE_DEVICES ('') hides this machine's 1 GPU",
            "nvidia-smi",
        ),
        (
            {
                "torch": {
                    **TORCH,
                    "memory": [["NVIDIA H200", "12345678-9", 40 * 2**30, 140 * 2**30]],
                }
            },
            "gpu 0",
            "GPU 0 (NVIDIA H200, GPU-12345678) has 100.0 of 140.0 GiB in use by another process",
            "DIFFMOE_SHARED_GPU=1",
        ),
        (
            {"torch": {**TORCH, "memory": ["CUDA error: busy"]}},
            "gpu 0",
            "GPU 0 cannot be opened: CUDA error: busy",
            "CUDA_VISIBLE_DEVICES",
        ),
        (
            {"torch": {**TORCH, "version": "2.12.1"}},
            "torch",
            "2.12.1; >=2.13,<2.14 is needed",
            "make setup",
        ),
        ({"torch": None}, "torch", "not installed (a login node needs none", "make setup"),
        (
            {"torch": "libcudart.so: cannot open"},
            "torch",
            "cannot be imported: libcudart.so: cannot open",
            "rm -r .venv",
        ),
        (
            {"torch": {**TORCH, "nccl": False}},
            "nccl",
            "GPUs cannot talk to each other",
            "make setup",
        ),
        ({"nvcc": "12.4"}, "cuda", "nvcc is of CUDA 12.4, torch of 13.0", "module load cuda/13.0"),
        ({"compiler": None}, "compiler", "no C++ compiler", "g++"),
        (
            {"packages": {"torch": "2.13.0", "deepspeed": "0.18.0"}},
            "deepspeed",
            "0.18.0; ==0.19.8 is needed",
            "make setup",
        ),
        ({"packages": {}}, "packages", "not installed: deepspeed", "make setup"),
        (
            {"python": (3, 9)},
            "python",
            "3.9 at /v/bin/python; >=3.10,<3.14 is needed",
            "PYTHON=python3.12",
        ),
        ({"shm": 2**26}, "/dev/shm", "64 MiB: too small", "--shm-size"),
        ({"omp": "128"}, "OMP_NUM_THREADS", "'128' on 64 CPUs", "unset OMP_NUM_THREADS"),
        ({"gpus": "nvidia-smi fails: no devices"}, "gpu", "nvidia-smi fails", "DS_ACCELERATOR=cpu"),
        (
            {"gpus": (dataclasses.replace(H200, problems=("hardware slowdown at 91 C",)),)},
            "gpu 0",
            "hardware slowdown at 91 C",
            "nvidia-smi -q",
        ),
        ({"gpus": None}, "gpu", "driver is loaded, but nvidia-smi shows no GPU", "owner"),
    ],
)
def test_doctor_names_what_is_wrong_and_what_to_type(changes, what, text, fix):
    found = wrong(**changes)
    assert list(found) == [what], found
    assert text in found[what].text and fix in found[what].fix


def test_the_impostor_apex_is_told_from_nvidias(tmp_path, monkeypatch):
    """PyPI's apex is a web toolkit: a package without apex.optimizers."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("launcher.doctor._ask_torch", lambda: None)
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex/__init__.py").write_text("")
    assert gather().apex == "impostor"
    (tmp_path / "apex/optimizers").mkdir()
    assert gather().apex == "nvidia"


def test_doctor_reads_this_machine():
    facts = gather()
    assert (
        facts.wanted["deepspeed"] == "==0.19.8"
        and facts.wanted_python == ">=3.10,<3.14"
        and len(facts.wanted) == 17
    )
    assert facts.torch["version"].startswith("2.13")
    assert {finding.what for finding in judge(facts)} >= {
        "python",
        "packages",
        "torch",
        "apex",
        "compiler",
    }


@pytest.mark.parametrize(
    ("version", "wanted", "good"),
    [
        ("2.13.0+cpu", ">=2.13,<2.14", True),
        ("2.14.0", ">=2.13,<2.14", False),
        ("0.19.8", "==0.19.8", True),
        ("0.19.10", "==0.19.8", False),
        ("2.11.0+cu130", ">=2.11,<2.14", True),
        ("2.10.1", ">=2.11,<2.14", False),
        ("3.9", ">=3.10", False),
        ("1", ">=1.0", True),
        ("12.3", "!=12.3", False),
        ("5", "", True),
    ],
)
def test_versions_compare_as_numbers(version, wanted, good):
    assert satisfies(version, wanted) == good
