"""The job scripts under a real Slurm: virtual nodes, the very files that users submit.  `make
test-slurm` runs them.

On a machine without Slurm they skip; where DIFFMOE_REQUIRE_SLURM is set (CI), that is an error.
Nothing here depends on how fast the machine is: runs that are disturbed have no end of their own,
and the undisturbed ones are as long as the disturbed one became.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from diffmoe.checkpoints.reader import complete_folders, step_of
from diffmoe.config import config_from_tree
from diffmoe.cost.memory import engine_facts
from diffmoe.cost.traffic import exchange_traffic
from diffmoe.layout import Layout
from diffmoe.training.metrics import read_metrics
from programs import digits, losses, run_program
from virtual_slurm import Cluster, Job, missing_tools, steps_done

pytestmark = pytest.mark.slurm

# DiffMoE-L-E16's script at less than the demo's size, over 2 nodes x 2 ranks, experts over all
# four.
NODES, PER_NODE = 2, 2
SBATCH = (
    f"--nodes={NODES}",
    f"--gpus-per-node={PER_NODE}",
    "--cpus-per-task=1",
    "--mem=4G",
    "--time=120",
)
ENDLESS = "train.steps=100000"
SMALL = (
    "model.input_size=8",
    "model.channels=1",
    "model.width=32",
    "model.depth=2",
    "model.heads=2",
    "model.classes=10",
    "model.learn_sigma=false",
    "moe.experts=4",
    "moe.pool=16",
    "parallel.ep=4",
    "train.batch=16",
    "train.lr=1e-2",
    "train.ema=0.7",
    "train.save_every=5",
    "train.log_every=1",
    "sample.steps=2",
    "sample.columns=4",
)


@pytest.fixture(scope="module")
def cluster():
    missing = missing_tools()
    if missing:
        text = (
            f"no Slurm here: {', '.join(missing)} missing "
            "(apt-get install slurmctld slurmd slurm-client munge)"
        )
        if os.environ.get("DIFFMOE_REQUIRE_SLURM"):
            pytest.fail(text)
        pytest.skip(text)
    # Unix sockets lie below this folder: pytest's own are too long a path.
    with Cluster(Path(tempfile.mkdtemp(prefix="slurm-")) / "c", nodes=4) as running:
        yield running


@pytest.fixture(autouse=True)
def alone(cluster):
    """A test that failed leaves no job to the others."""
    yield
    cluster.cancel_everything()


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("slurm")


def train(
    cluster: Cluster,
    run: Path,
    *more: str,
    options: tuple[str, ...] = (),
    preflight: str = "no",
    env: dict[str, str] | None = None,
) -> Job:
    return cluster.submit(
        "train_l_e16.sh",
        *SMALL,
        f"data.shards={digits()}",
        f"run.folder={run}",
        *more,
        options=(*SBATCH, *options),
        log=run.with_suffix(".out"),
        env={"DIFFMOE_PREFLIGHT": preflight, **(env or {})},
    )


@pytest.fixture(scope="module")
def disturbed(cluster, work) -> tuple[Path, Job]:
    """One job that suffers a signal, a requeue, a dead rank and a dead node in turn, and is
    cancelled after the last resumption.
    """
    run = work / "disturbed"
    job = train(cluster, run, ENDLESS)

    def goes_on() -> None:
        step = steps_done(run)
        job.wait_until(lambda: steps_done(run) >= step + 6, f"go on from step {step}")

    goes_on()
    cluster.slurm("scancel", "--signal=USR1", job.number)  # to the ranks
    job.wait_for_start_after(0)
    assert "not finished (status 0, step " in job.said()
    goes_on()
    restarts = job.restarts
    cluster.slurm("scontrol", "requeue", job.number)
    job.wait_for_start_after(restarts)
    goes_on()
    restarts = job.restarts
    os.kill(max(rank_processes(cluster, cluster.names[1])), signal.SIGKILL)
    job.wait_for_start_after(restarts)
    assert "status 137" in job.said() or "status 1," in job.said(), job.said()
    goes_on()
    restarts, nodes, lost = job.restarts, job.show()["NodeList"], cluster.names[1]
    cluster.kill_node(lost)
    job.wait_for_start_after(restarts)
    assert job.show()["NodeList"] != nodes
    goes_on()
    cluster.slurm("scancel", job.number)
    assert job.wait() == "CANCELLED"
    cluster.start_node(lost)
    return run, job


@pytest.fixture(scope="module")
def undisturbed(cluster, work, disturbed) -> list[Path]:
    """Two equal jobs that ran at once on the same nodes, the first with its preflight."""
    nodes = f"--nodelist={','.join(cluster.names[:NODES])}"
    steps = f"train.steps={max(losses(disturbed[0]))}"
    jobs = [
        train(
            cluster,
            work / f"undisturbed{i}",
            steps,
            options=(nodes,),
            preflight=("--timeout=300", "no")[i],
        )
        for i in range(2)
    ]
    for job in jobs:
        assert job.wait() == "COMPLETED", job.said()
    windows = [(job.show()["StartTime"], job.show()["EndTime"]) for job in jobs]
    assert max(start for start, _ in windows) < min(end for _, end in windows), windows
    return [work / f"undisturbed{i}" for i in range(2)]


def test_a_job_whose_run_folder_was_deleted_goes_on_from_the_mirror(cluster, work):
    run, mirror = work / "mirrored", f"train.mirror=file://{work}/mirror"
    job = train(cluster, run, ENDLESS, mirror)
    copies = work / "mirror" / "checkpoints"
    job.wait_until(lambda: len(complete_folders(copies)) >= 2, "copy two checkpoints")
    cluster.slurm("scancel", job.number)
    assert job.wait() == "CANCELLED"
    shutil.rmtree(complete_folders(copies)[-1])  # so that steps are left to compare
    first, copied = losses(run), step_of(complete_folders(copies)[-1])
    assert copied < max(first)
    shutil.rmtree(run)
    job = train(cluster, run, f"train.steps={max(first)}", mirror)
    assert job.wait() == "COMPLETED", job.said()
    assert f"step_{copied:08d} at step {copied}" in log_of(run, job.number)
    assert losses(run) == first
    assert step_of(complete_folders(copies)[-1]) == max(first)


def log_of(run: Path, job: str) -> str:
    return "".join(path.read_text() for path in (run / "jobs" / job / "logs").iterdir())


def test_signal_requeue_dead_rank_and_dead_node_each_end_in_a_resumed_run(disturbed, undisturbed):
    run, job = disturbed
    assert losses(run) == losses(undisturbed[0])
    assert log_of(run, job.number).count("resumed from ") >= 4


def test_two_jobs_at_once_on_the_same_nodes_do_not_collide(undisturbed):
    first, second = map(losses, undisturbed)
    assert sorted(first) == list(range(1, len(first) + 1))
    assert first == second


def test_a_run_folder_holds_code_configuration_and_logs_per_node(undisturbed, cluster):
    run = undisturbed[0]
    (job,) = (run / "jobs").iterdir()
    assert {path.name for path in job.iterdir()} == {
        "code",
        "commit.txt",
        "config.yaml",
        "deepspeed.json",
        "logs",
        "preflight.json",
        "starts.json",
    }
    assert (job / "code/run.py").is_file() and not list(
        (job / "code").rglob("__pycache__/*.tests*")
    )
    assert {path.name for path in (job / "logs").iterdir()} == {
        f"{name}.log" for name in cluster.names[:NODES]
    }
    log = (job / f"logs/{cluster.names[0]}.log").read_text()
    assert "4 expert-parallel ranks" in log and re.search(
        r"^plan: \S+ ms a step, measured ", log, re.M
    )
    said = run.with_suffix(".out").read_text()
    assert "preflight: 2 nodes, 4 ranks" in said and "nothing wrong" in said
    for text in (log, said):  # of training and of preflight
        assert text.count("EP groups of 4 ranks span 2 hosts: by the plan (") == 1
    assert re.search(
        r"all-to-all of EP groups, GB/s a rank: over hosts \S+, inside a host \S+$", said, re.M
    )
    (place,) = re.findall(r"^place    CPUs .*$", log, re.M)
    assert " OMP_NUM_THREADS=1" in place and "CUDA" not in place, "the ranks are on CPUs"
    last = max(losses(run))
    assert f"finished (step {last} of {last})" in said


def rank_processes(cluster: Cluster, node: str) -> list[int]:
    """The ranks on a node, without the daemons and shells above them."""
    found = []
    for pid in cluster.processes(node):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if b"python" in words[0] and any(word.endswith(b"code/run.py") for word in words):
            environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            assert b"CUDA_VISIBLE_DEVICES=0,1" in environ, "every task sees its node's GPUs"
            found.append(pid)
    assert len(found) >= PER_NODE
    return found


def test_the_signal_before_the_limit_a_preemption_and_a_cancelled_job(cluster, work):
    """The batch shell gets USR1, hands it on and requeues; scancel is the user's word, and
    stays.
    """
    run = work / "limit"
    job = train(cluster, run, ENDLESS, "train.save_every=0", options=("--signal=B:USR1@600",))

    def saves_and_goes_on(times: int, restarts: int) -> None:
        job.wait_for_start_after(restarts)
        assert job.said().count("asks the ranks to save and end") == times
        saved = re.findall(r"not finished \(status 0, step (\d+) of 100000\)", job.said())
        assert len(saved) == times
        job.wait_until(lambda: steps_done(run) > int(saved[-1]), "go on")
        assert f"resumed from {run}/checkpoints/step_{int(saved[-1]):08d} " in log_of(
            run, job.number
        )

    job.wait_until(lambda: steps_done(run) >= 3, "reach step 3")
    cluster.slurm(
        "scontrol", "update", f"jobid={job.number}", "EndTime=now+300"
    )  # Slurm looks at limits every half minute
    job.wait_until(lambda: job.restarts == 1, "requeue itself")
    cluster.slurm(
        "scontrol", "update", f"jobid={job.number}", "TimeLimit=120"
    )  # which is now far away again
    saves_and_goes_on(1, restarts=0)
    restarts = job.restarts
    (work / "urgent.sh").write_text("#!/bin/sh\n:\n")
    everything = ("--partition=urgent", "--exclusive", f"--nodes={len(cluster.names)}")
    urgent = cluster.submit(work / "urgent.sh", options=everything, log=work / "urgent.out")
    assert urgent.wait() == "COMPLETED"
    saves_and_goes_on(2, restarts)
    restarts = job.restarts
    cluster.slurm("scancel", job.number)
    assert job.wait() == "CANCELLED"
    time.sleep(2)
    assert (job.show()["JobState"], job.restarts) == ("CANCELLED", restarts)


# A rank that gets SIGUSR2 has a CPU limit from then on: after every 4 ms of its CPU time it stands
# still for 60.
CPU_LIMIT = """
import atexit, signal, sys, time

def limit(*_):
    signal.signal(signal.SIGPROF, lambda *_: time.sleep(0.06))
    signal.siginterrupt(signal.SIGPROF, False)
    signal.setitimer(signal.ITIMER_PROF, 0.004, 0.004)
    atexit.register(signal.setitimer, signal.ITIMER_PROF, 0)

if any(word.endswith("code/run.py") for word in sys.orig_argv):
    signal.signal(signal.SIGUSR2, limit)
"""


def test_a_slow_node_is_named_and_left_out(cluster, work):
    """A rank under a CPU limit is named within 30 steps; the rule saves, excludes its node and
    requeues, and losses are those of a job that nothing happened to.
    """
    run, limits = work / "slow", work / "limits"
    limits.mkdir()
    (limits / "sitecustomize.py").write_text(CPU_LIMIT)
    rule = ("run.on_straggler=requeue", "run.straggler_factor=2", "train.save_every=0")
    exclude = f"--exclude={cluster.names[3]}"
    job = train(cluster, run, ENDLESS, *rule, options=(exclude,), env={"PYTHONPATH": str(limits)})
    job.wait_until(lambda: steps_done(run) >= 3, "reach step 3")
    slow = cluster.names[1]
    victim = min(rank_processes(cluster, slow))
    environ = Path(f"/proc/{victim}/environ").read_bytes().split(b"\0")
    (rank,) = (word[13:].decode() for word in environ if word.startswith(b"SLURM_PROCID="))
    began, named = steps_done(run), run / "events.jsonl"
    os.kill(victim, signal.SIGUSR2)
    job.wait_until(lambda: named.exists() or steps_done(run) > began + 30, "name it")
    assert named.exists(), read_metrics(run / "metrics.jsonl")[-1]
    job.wait_for_start_after(0)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["straggler", "requeue"], events
    assert f"rank {rank} on {slow} is " in events[0]["text"]
    assert events[0]["step"] <= began + 30
    assert f"goes on without {slow}" in job.said()

    def nodes(field: str) -> set[str]:
        return set(cluster.slurm("scontrol", "show", "hostnames", job.show()[field]).split())

    assert nodes("ExcNodeList") == {cluster.names[3], slow}
    assert nodes("NodeList") == {cluster.names[0], cluster.names[2]}
    saved = re.findall(r"not finished \(status 0, step (\d+) of 100000\)", job.said())
    assert [int(step) for step in saved] == [events[0]["step"] + 1]
    job.wait_until(lambda: steps_done(run) >= int(saved[0]) + 6, "go on elsewhere")
    cluster.slurm("scancel", job.number)
    assert job.wait() == "CANCELLED"
    other = work / "even"
    steps = f"train.steps={max(losses(run))}"
    assert train(cluster, other, steps).wait() == "COMPLETED"
    assert losses(run) == losses(other)


def test_a_job_whose_starts_bring_nothing_is_given_up(cluster, work):
    """Ranks that die before their first step, for a reason that no restart cures: three starts,
    then the end.
    """
    ill = work / "ill"
    ill.mkdir()
    (ill / "sitecustomize.py").write_text(
        "import os, sys\nif any(w.endswith('code/run.py') for w in sys.orig_argv): os._exit(9)\n"
    )
    job = cluster.submit(
        "train_l_e16.sh",
        *SMALL,
        ENDLESS,
        f"data.shards={digits()}",
        f"run.folder={work / 'fruitless'}",
        options=SBATCH,
        log=work / "fruitless.out",
        env={"DIFFMOE_PREFLIGHT": "no", "PYTHONPATH": str(ill)},
    )
    assert job.wait() == "FAILED" and job.restarts == 2
    assert (
        "given up (status 9, step 0 of 100000): 3 starts in a row brought no progress" in job.said()
    ), job.said()


def test_preflight_stops_a_job_and_says_why(cluster, work, tmp_path):
    job = cluster.submit(
        "train_l_e16.sh",
        *SMALL,
        f"data.shards={tmp_path}",
        f"run.folder={work / 'stopped'}",
        options=SBATCH,
        log=work / "stopped.out",
        env={"DIFFMOE_PREFLIGHT": "--timeout=300"},
    )
    assert job.wait() == "FAILED"
    assert f"all nodes: shards: data folder ({tmp_path}) has no index.json" in job.said()
    assert "--exclude" not in job.said(), "other nodes would not have it either"


def test_bad_input_ends_the_job_with_its_line(cluster, work):
    job = train(cluster, work / "bad", "moe.experts=3")
    assert job.wait() == "FAILED" and job.restarts == 0
    assert "error: moe.experts (3) must be divisible by parallel.ep (4)" in job.said()


def test_sample_evaluate_and_encode(cluster, work, undisturbed):
    from PIL import Image

    for name in ("a", "b"):
        (work / "images" / name).mkdir(parents=True, exist_ok=True)
        for i in range(4):
            Image.fromarray(np.full((10, 10, 3), 20 * i + 100 * (name == "b"), np.uint8)).save(
                work / "images" / name / f"{i}.png"
            )
    one = ("--nodes=1", "--gpus-per-node=2", "--cpus-per-task=1", "--mem=4G")
    run = undisturbed[0]
    jobs = [
        cluster.submit(
            "sample.sh",
            "--checkpoint",
            run,
            "--count",
            20,
            "--out",
            work / "drawn",
            options=one,
            log=work / "sample.out",
        ),
        cluster.submit(
            "evaluate.sh",
            "--checkpoint",
            run,
            "--reference",
            digits(),
            "--extractor",
            "digits",
            "--count",
            200,
            "--no-samples",
            "--out",
            work / "scores",
            options=one,
            log=work / "evaluate.out",
        ),
        cluster.submit(
            "encode.sh",
            "--source",
            work / "images",
            "--image-size",
            8,
            "--out",
            work / "shards",
            options=(*one, "--gpus-per-node=0", "--ntasks-per-node=2"),
            log=work / "encode.out",
        ),
    ]  # bound to cores
    for job in jobs:
        assert job.wait() == "COMPLETED", job.said()
    assert np.load(work / "drawn.npz")["images"].shape == (20, 1, 8, 8)
    assert (work / "scores/card.json").is_file()
    assert (work / "shards/index.json").is_file()


def test_a_scaling_benchmark_over_two_nodes(cluster, work):
    """The demo's width, where scores and masks cost little beside the rows; what the runs counted
    is what the formula says.
    """
    out = work / "scaling"
    job = cluster.submit(
        "scaling.sh",
        "--steps",
        2,
        "--warmup",
        1,
        "--repeats",
        1,
        "--mode",
        "strong",
        "--ep",
        "2,4",
        "--out",
        out,
        "model.depth=2",
        "train.batch=16",
        f"data.shards={digits()}",
        options=SBATCH,
        log=work / "scaling.out",
        env={
            "DIFFMOE_CONFIG": "configs/demo.yaml",
            "DIFFMOE_DEEPSPEED_CONFIG": "ds_configs/zero1_fp32.json",
        },
    )
    assert job.wait() == "COMPLETED", job.said()
    assert {path.name for path in out.iterdir()} >= {
        "runs.jsonl",
        "table.md",
        "efficiency.png",
        "split.png",
    }
    records = [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]
    assert [(record["nodes"], record["ranks"], record["ep"]) for record in records] == [
        (1, 2, 2),
        (2, 4, 2),
        (2, 4, 4),
    ]
    for record in records:
        counted: dict[str, int] = {}
        for row in (
            row for rows in record["traffic"] for row in rows if row["collective"] == "all_to_all"
        ):
            counted[row["purpose"]] = counted.get(row["purpose"], 0) + row["wire"]
        planned: dict[str, int] = {}
        for message in exchange_traffic(
            config_from_tree(record["config"]),
            Layout(**record["layout"]),
            engine_facts(record["deepspeed"]),
        ):
            if message.collective == "all_to_all":
                planned[message.purpose] = (
                    planned.get(message.purpose, 0) + message.wire * record["ranks"]
                )
        rows = counted["dispatch"] + counted["combine"]
        assert {name: counted[name] for name in ("scores", "mask")} == {
            name: planned[name] for name in ("scores", "mask")
        }
        assert counted.keys() == planned.keys() and sum(counted.values()) <= 1.05 * rows


@pytest.mark.parametrize(
    "script", ["train_s_e16.sh", "train_l_e8.sh", "train_xl_e16.sh", "train_dense_xl.sh"]
)
def test_slurm_accepts_the_other_scripts(cluster, script, work):
    """`sbatch --test-only`: header and size; the body is that of train_l_e16.sh but for the
    configuration's name.
    """
    cluster.submit(script, options=("--test-only",), log=work / "x.out")


def test_submit_submits(cluster, work):
    run = work / "submitted"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "launcher",
            "submit",
            "--config",
            "configs/demo.yaml",
            "--deepspeed_config",
            "ds_configs/zero1_fp32.json",
            "--nodes",
            "2",
            "--gpus-per-node",
            "1",
            "--memory",
            "4G",
            "--cpus-per-rank",
            "1",
            "--time",
            "20",
            "--partition",
            "gpu",
            "--account",
            "me",
            f"--sbatch=--output={work}/submitted.out",
            *SMALL,
            "parallel.ep=2",
            "train.steps=3",
            f"data.shards={digits()}",
            f"run.folder={run}",
        ],
        env={**cluster.env, "DIFFMOE_PREFLIGHT": "no"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    job = Job(cluster, done.stdout.split()[1].rstrip(":"), work / "submitted.out")
    assert job.show()["Partition"] == "gpu" and job.show()["Account"] == "me"
    assert job.wait() == "COMPLETED", job.said()
    assert steps_done(run) == 3 and (run / "submit.sh").is_file()


def test_a_comparison_runs_as_an_array_whose_tasks_go_on_after_a_signal(cluster, work):
    folder = work / "compare"
    shards = digits()
    comparison = (
        "--config",
        "configs/compare/smoke.yaml",
        f"folder={folder}",
        "samples=4800",
        "seeds=[0]",
        "confounds=null",
        f"data.shards={shards}/shard-00000[0-6].tar",
        f"data.validation={shards}/shard-00000[78].tar",
    )

    def task(number: int) -> Job:
        options = ("--gpus-per-node=0", "--mem=4G", "--time=120", "--cpus-per-task=1")
        return cluster.submit(
            "compare.sh",
            *comparison,
            options=(*options, f"--array={number}"),
            log=work / f"compare-{number}.out",
        )

    dense, diffmoe = task(0), task(1)
    run = folder / "diffmoe-s0"
    diffmoe.wait_until(lambda: steps_done(run) >= 8, "train")
    cluster.slurm("scancel", "--batch", "--signal=USR1", diffmoe.number)
    diffmoe.wait_for_start_after(0)
    step = steps_done(run)
    assert 8 <= step < 300, "saved and ended where it was"
    for job in (dense, diffmoe):
        assert job.wait() == "COMPLETED", job.said()
    assert steps_done(run) == 300
    (table,) = run_program(1, "compare", *comparison, "--table")
    assert table.returncode == 0 and "| diffmoe | 1 |" in table.stdout, table
    assert "Missing" not in table.stdout and "Other settings" not in table.stdout
