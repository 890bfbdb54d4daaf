"""Where a rank runs: the cores near its GPU, of a machine whose /sys is a folder here; what the log
says of it.
"""

import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

from diffmoe import placement
from diffmoe.commands.common import join
from diffmoe.environment import RankEnvironment, detect, export
from diffmoe.placement import bind_near, cores_each, cores_of, describe, place, ranges
from launcher.scaling import Trial, command_of
from programs import REPOSITORY

GPU = torch.device("cuda", 0)
# Two sockets of four cores with two threads each, as the kernel counts them.
NEAR = {0: "0-3,8-11", 1: "4-7,12-15"}


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """``machine(socket, cores)``: this process, with a GPU on that socket, may run on these cores
    of 16.
    """

    def made(socket, cores, job=None):
        (tmp_path / "0001:4a:00.0").mkdir(exist_ok=True)
        (tmp_path / "0001:4a:00.0/local_cpulist").write_text(NEAR[socket] + "\n")
        state = SimpleNamespace(cores=cores_of(cores), folder=tmp_path)
        monkeypatch.setattr(
            torch.cuda,
            "get_device_properties",
            lambda device: SimpleNamespace(pci_domain_id=1, pci_bus_id=0x4A, pci_device_id=0),
        )
        monkeypatch.setattr(os, "cpu_count", lambda: 16)
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: state.cores)

        monkeypatch.setattr(
            os, "sched_setaffinity", lambda thread, cores: setattr(state, "cores", cores)
        )
        monkeypatch.delenv("SLURM_CPUS_ON_NODE", raising=False)
        if job:
            monkeypatch.setenv("SLURM_CPUS_ON_NODE", job)
        return state

    return made


@pytest.mark.parametrize(
    ("socket", "allowed", "job", "bound"),
    [
        (0, "0-15", None, "0-3,8-11"),  # nobody has bound it
        (1, "0-15", None, "4-7,12-15"),
        (1, "2-5,10-13", "8", "4-5,12-13"),  # all cores of a Slurm job that has half the node
        (0, "0-15", "8", "0-3,8-11"),  # a job that Slurm does not confine
        (0, "0-1", None, "0-1"),  # bound near by somebody
        (1, "2-5", None, "2-5"),  # bound by somebody, partly near
        (0, "2-5", "8", "2-5"),
    ],
)
def test_a_rank_that_nobody_has_bound_runs_near_its_gpu(machine, socket, allowed, job, bound):
    state = machine(socket, allowed, job)
    assert bind_near(GPU, state.folder) is None
    assert ranges(state.cores) == bound


@pytest.mark.parametrize(("socket", "allowed", "job"), [(1, "0-3", None), (0, "4-7,12-15", "8")])
def test_a_rank_that_cannot_run_near_its_gpu_says_so_and_goes_on(machine, socket, allowed, job):
    state = machine(socket, allowed, job)
    note = bind_near(GPU, state.folder)
    assert (
        f"it may run on CPUs {allowed}, none of which is near GPU 0001:4a:00.0 (CPUs "
        f"{NEAR[socket]} are)" in note
    )
    assert ranges(state.cores) == allowed


def test_nothing_about_cores_ends_a_run(machine, monkeypatch, tmp_path):
    state = machine(0, "0-15")
    assert "nobody says which CPUs are near its GPU" in bind_near(GPU, tmp_path / "nowhere")

    def refuse(thread, cores):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    assert "it may not be kept on the CPUs near its GPU" in bind_near(GPU, state.folder)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="a")
    )
    assert "nobody says which CPUs" in bind_near(GPU, state.folder)
    assert bind_near(torch.device("cpu"), tmp_path / "nowhere") is None


def test_all_threads_and_children_follow(monkeypatch, tmp_path):
    """On this machine's own cores."""
    before = os.sched_getaffinity(0)
    if len(before) < 2 or len(before) < os.cpu_count():
        pytest.skip("needs two cores, all of the machine's")
    near = {max(before)}
    (tmp_path / "0000:01:00.0").mkdir()
    (tmp_path / "0000:01:00.0/local_cpulist").write_text(ranges(near))
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: SimpleNamespace(pci_domain_id=0, pci_bus_id=1, pci_device_id=0),
    )
    monkeypatch.delenv("SLURM_CPUS_ON_NODE", raising=False)
    done, asked, seen = threading.Event(), threading.Event(), []
    thread = threading.Thread(
        target=lambda: (asked.wait(60), seen.append(os.sched_getaffinity(0)), done.set())
    )
    thread.start()
    try:
        assert bind_near(GPU, tmp_path) is None
        asked.set()
        command = [sys.executable, "-c", "import os; print(os.sched_getaffinity(0))"]
        child = subprocess.run(command, capture_output=True, text=True)
        assert done.wait(60) and seen == [near] and child.stdout.strip() == str(near)
        assert cores_each(1) == 1
    finally:
        asked.set()
        thread.join()
        for number in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(number), before)


@pytest.mark.parametrize(
    ("allowed", "job", "ranks", "cores"),
    [
        ("0-15", None, 4, 4),
        ("0-3,8-11", None, 4, 4),
        ("0-15", None, 32, 1),
        ("0-1", None, 4, 2),
        ("0-15", "8", 4, 2),
    ],
)
def test_ranks_of_a_node_share_its_cores(machine, allowed, job, ranks, cores):
    machine(0, allowed, job)
    assert cores_each(ranks) == cores


@pytest.mark.parametrize(("rank", "said"), [(0, 1), (1, 1), (2, 0), (3, 0)])
def test_the_ranks_of_the_first_node_speak_for_all(monkeypatch, capsys, rank, said):
    monkeypatch.setattr(placement, "bind_near", lambda device: "it is far")
    place(RankEnvironment(rank, 4, rank % 2, 2, "srun"), GPU)
    assert capsys.readouterr().err == f"note: rank {rank}: it is far\n" * said


@pytest.mark.parametrize("local_world", [1, 2, 4])
def test_ranks_of_every_launcher_move_before_they_meet(monkeypatch, machine, local_world):
    machine(0, "0-3,8-11")
    done = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(
        "diffmoe.commands.common.place", lambda environment, device: done.append(device)
    )
    monkeypatch.setattr("diffmoe.device.local_device", lambda rank, world, asked: GPU)
    monkeypatch.setattr(torch, "set_num_threads", done.append)
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda *_, **__: iter([]))
    with pytest.raises(StopIteration):
        join(RankEnvironment(0, local_world, 0, local_world, "torchrun", "file:///nowhere"))
    assert done == [GPU, 16 // local_world if local_world > 1 else 8]


@pytest.mark.parametrize("text", ["0", "0-3,8-11", "1,3,5-7"])
def test_lists_of_cores_as_the_kernel_writes_them(text):
    assert ranges(cores_of(text + "\n")) == text


def test_the_log_says_what_the_environment_does(machine):
    machine(0, "0-15")
    shown = (
        "CUDA_VISIBLE_DEVICES=0,1 GLOO_SOCKET_IFNAME=eth0 NCCL_IB_HCA=mlx5 NCCL_SOCKET_IFNAME=ib0 "
        "OMP_NUM_THREADS=2 PYTORCH_ALLOC_CONF=expandable_segments:True TORCH_NCCL_BLOCKING_WAIT=1"
    )
    environ = dict(
        word.split("=") for word in reversed([*shown.split(), "HF_TOKEN=secret", "PATH=/bin"])
    )
    assert describe("cuda", environ) == f"CPUs 0-15 of 16; {shown}"
    on_cpus = "GLOO_SOCKET_IFNAME=eth0 OMP_NUM_THREADS=2"
    assert describe("cpu", environ) == f"CPUs 0-15 of 16; {on_cpus}"
    assert describe("cpu", {}) == "CPUs 0-15 of 16; no variable for gloo or OpenMP"


@pytest.mark.parametrize(
    "name", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"]
)
def test_segments_expand_unless_the_user_has_said_otherwise(name):
    said = {} if name is None else {name: "max_split_size_mb:64"}
    environ = dict(said)
    export(detect(environ), environ)
    allocator = {key: value for key, value in environ.items() if "ALLOC" in key}
    assert allocator == (said or {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})


def test_a_programs_own_allocator_is_set_before_torch_is_there():
    """torch reads it when CUDA starts."""
    program = (
        "import os, sys, diffmoe.__main__ as run; find = run._main_of\n"
        "def seen(verb): print(os.environ['PYTORCH_ALLOC_CONF'], 'torch' in sys.modules); return "
        "find(verb)\n"
        "run._main_of = seen; run.main(['train', '--dry-run', '--config', 'configs/demo.yaml'])"
    )
    environ = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        env=environ,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "expandable_segments:True False" in done.stdout, done


@pytest.mark.parametrize(
    ("job", "bind"),
    [
        ({"SLURM_GPUS_PER_NODE": "8"}, "none"),
        ({"SLURM_GPUS_PER_NODE": "h200:2"}, "none"),
        ({"SLURM_GPUS_PER_NODE": "0", "SLURM_NTASKS_PER_NODE": "2"}, "cores"),
        ({"SLURM_NTASKS_PER_NODE": "2"}, "cores"),
        ({"SLURM_GPUS_PER_NODE": "8", "DIFFMOE_CPU_BIND": "map_ldom:0,1"}, "map_ldom:0,1"),
    ],
)
def test_slurm_places_ranks_in_blocks_and_binds_cores_where_there_is_no_gpu(
    job, bind, monkeypatch, tmp_path
):
    """Steps of the job scripts, and those that ``launcher scaling`` starts in such a job."""
    environ = {
        "PATH": os.environ["PATH"],
        "SLURM_SUBMIT_DIR": str(REPOSITORY),
        "SLURM_JOB_NUM_NODES": "2",
        "DIFFMOE_VENV": sys.prefix,
        **job,
    }
    script = (
        "set -euo pipefail; source scripts/slurm/_common.sh; enter_repository\n"
        'printf "%s\\n" "${step[@]}" "$DIFFMOE_CPU_BIND"'
    )
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=REPOSITORY,
        env=environ,
        check=True,
        capture_output=True,
        text=True,
    )
    *step, said = done.stdout.splitlines()
    monkeypatch.setenv("DIFFMOE_CPU_BIND", said)
    options = SimpleNamespace(
        config="c.yaml",
        deepspeed_config=None,
        steps=1,
        warmup=1,
        synthetic=True,
        overrides=[],
        hostfile=None,
    )
    for words in (
        step,
        command_of(Trial("strong", 4, 2, 1, 1, 16, 1), options, "srun", 1, tmp_path / "r.json"),
    ):
        assert words[0] == "srun" and {"--distribution=block:block", f"--cpu-bind={bind}"} <= set(
            words
        )
        assert not [
            word for word in words if word.startswith("--gpu-bind")
        ]  # every task sees all GPUs of its node
