"""Which device a rank takes, and what it is said to be able to do."""

import os
import socket
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import HashStore

from diffmoe import device as devices
from diffmoe import gpus
from diffmoe.commands.common import _check_devices, join
from diffmoe.config import Config, config_from_tree, override
from diffmoe.device import check_own_gpu, local_device, measured_flops, peak_flops
from diffmoe.environment import RankEnvironment
from diffmoe.errors import UserError
from diffmoe.parallel.collectives import AgreedError
from diffmoe.training.resume import changes
from programs import Program, run_cases, tiny, tiny_config

GIB = 2**30


def see_gpus(monkeypatch, *uuids):
    """What torch tells of CUDA in a process that sees these GPUs."""
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "to be put back")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: len(uuids))
    monkeypatch.setattr("torch.cuda.set_device", lambda device: None)
    monkeypatch.setattr(
        "torch.cuda.get_device_properties", lambda device: SimpleNamespace(uuid=uuids[device.index])
    )
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (79 * GIB, 80 * GIB))
    monkeypatch.delenv(gpus.SHARED, raising=False)


def test_more_ranks_than_gpus_is_every_ranks_error(monkeypatch):
    """The ranks that have a GPU would otherwise wait for the one that has none."""
    see_gpus(monkeypatch, "a", "b")
    for rank in range(3):
        with pytest.raises(
            UserError, match=r"ranks on this node \(3\) must not exceed its GPUs \(2\)"
        ):
            local_device(rank, 3)


@pytest.mark.parametrize(
    ("shown", "number"), [(["abc", "abc", "abc"], [0, 1, 2]), (["a", "b", "c"], [0, 0, 0])]
)
def test_each_rank_has_its_own_gpu_of_all_or_the_one_it_sees(monkeypatch, shown, number):
    """``srun --gpus-per-task=1`` shows every process one GPU, which it calls 0."""
    store = HashStore()
    for rank, uuids in reversed(list(enumerate(shown))):
        see_gpus(monkeypatch, *uuids)
        device = local_device(rank, 3)
        assert device.index == number[rank] and os.environ["LOCAL_RANK"] == str(number[rank]), (
            "what DeepSpeed reads"
        )
        if rank:
            store.set(f"gpu/{socket.gethostname()}/{rank}", uuids[device.index])
    check_own_gpu(device, 0, 3, store)  # the others are there already


def test_ranks_that_see_the_same_one_gpu_are_refused(monkeypatch):
    see_gpus(monkeypatch, "a")
    store = HashStore()
    for rank in (1, 0):
        device = local_device(rank, 2)
        store.set(f"gpu/{socket.gethostname()}/{rank}", "a")
    with pytest.raises(UserError, match=r"ranks on this node \(2\) must not exceed its GPUs \(1\)"):
        check_own_gpu(device, 0, 2, store)


def test_the_peak_of_an_unknown_gpu_is_measured_in_bf16(monkeypatch):
    asked = []
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA Z1")
    monkeypatch.setattr(devices, "measured_flops", lambda *what: asked.append(what) or 5e12)
    peak = peak_flops.__wrapped__  # what was found is kept for the rest of a process
    assert peak(torch.device("cuda", 0)) == 5e12
    ((_, dtype, size, tries),) = asked
    assert dtype == torch.bfloat16 and size >= 8192 and tries >= 5
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA H200")
    assert peak(torch.device("cuda", 0)) == 989e12 and len(asked) == 1


def test_a_measured_peak_is_a_rate():
    assert 1e6 < measured_flops(torch.device("cpu"), torch.float32, 128, 5) < 1e15


# --------------------------------------------------------------------------------- GPUs that torch
# cannot use


@pytest.fixture
def unusable(monkeypatch):
    """A machine of two GPUs, and a torch for CUDA that finds none."""
    for name in ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(gpus, "present", lambda: "2 GPUs (/dev/nvidia0, ...)")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
    say(
        monkeypatch,
        RuntimeError("The NVIDIA driver on your system is too old\n(found version 11040)."),
    )


def say(monkeypatch, error):
    def init():
        raise error

    monkeypatch.setattr(torch.cuda, "init", init)


ON_THE_CPU = (
    ", or say run.device=cpu (--device cpu where there is no run.device) to compute on the CPU"
)


def refusal(asked="auto"):
    with pytest.raises(UserError) as error:
        join(RankEnvironment(0, 1, 0, 1, "single"), asked=asked)
    text = str(error.value)
    assert text.endswith(ON_THE_CPU) and "\n" not in text
    return text.removesuffix(ON_THE_CPU)


CANNOT = (
    "this machine has 2 GPUs (/dev/nvidia0, ...), and torch (2.13.0+cu130, for CUDA 13.0) cannot "
    "use it"
)


def test_a_driver_that_torch_cannot_use(unusable, monkeypatch):
    assert refusal() == (
        f"{CANNOT}: The NVIDIA driver on your system is too old (found version 11040).: see python "
        f"-m launcher doctor"
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    say(monkeypatch, AssertionError("no driver"))
    assert (
        refusal()
        == f"{CANNOT} with CUDA_VISIBLE_DEVICES (0,1): no driver: see python -m launcher doctor"
    )
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    assert (
        refusal()
        == f"{CANNOT} with CUDA_VISIBLE_DEVICES (0,1): it finds no device: see python -m launcher "
        f"doctor"
    )

    def broken():
        raise RuntimeError("Unexpected error from cudaGetDeviceCount()")

    monkeypatch.setattr(torch.cuda, "is_available", broken)
    assert refusal().startswith(CANNOT)


def test_a_torch_for_cpus_on_a_machine_with_gpus(unusable, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    assert refusal() == (
        "this machine has 2 GPUs (/dev/nvidia0, ...), and torch (2.13.0+cpu) is built for CPUs "
        "only: install the build of "
        "torch 2.13.0 for CUDA"
    )


@pytest.mark.parametrize("shown", ["", " ", "-1", "NoDevFiles"])
def test_gpus_that_are_hidden(unusable, monkeypatch, shown):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    assert (
        refusal()
        == f"CUDA_VISIBLE_DEVICES ({shown!r}) hides this machine's 2 GPUs (/dev/nvidia0, ...): "
        f"unset CUDA_VISIBLE_DEVICES"
    )


def test_a_gpu_that_is_asked_for_and_not_there(unusable, monkeypatch):
    monkeypatch.setattr(gpus, "present", lambda: "")
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    assert (
        refusal()
        == "DS_ACCELERATOR (cuda) asks for a GPU, and this machine shows none: unset DS_ACCELERATOR"
    )
    monkeypatch.delenv("DS_ACCELERATOR")
    assert (
        refusal("cuda")
        == "run.device or --device (cuda) asks for a GPU, and this machine shows none: see "
        "nvidia-smi"
    )


@pytest.mark.parametrize(("asked", "said"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_two_owners_of_the_device_must_agree(unusable, monkeypatch, asked, said):
    monkeypatch.setenv("DS_ACCELERATOR", said)
    with pytest.raises(
        UserError,
        match=rf"run.device or --device \({asked}\) must be auto or DS_ACCELERATOR \({said}\): "
        rf"unset",
    ):
        local_device(0, 1, asked)


@pytest.mark.parametrize(
    ("asked", "said"), [("auto", "cpu"), ("cpu", None), ("cpu", "cpu"), ("auto", None)]
)
def test_the_cpu_is_taken_where_it_is_meant(unusable, monkeypatch, asked, said):
    if said:
        monkeypatch.setenv("DS_ACCELERATOR", said)
    else:
        monkeypatch.setenv("DS_ACCELERATOR", "")  # to be put back
    if asked != "cpu":
        monkeypatch.setattr(gpus, "present", lambda: "")
    assert local_device(0, 4, asked) == torch.device("cpu")
    if asked == "cpu":
        assert os.environ["DS_ACCELERATOR"] == "cpu", "what DeepSpeed and further processes read"


@pytest.mark.parametrize(
    ("says", "code", "found"),
    [
        (None, 0, ""),
        (
            "0, NVIDIA H100, 550.1, 81559, 30, 0, 0x0\n1, NVIDIA H100, 550.1, 81559, 30, 0, 0x0",
            0,
            "2 GPUs (NVIDIA H100, driver 550.1)",
        ),
        (
            "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.",
            9,
            "a GPU, whose driver is broken (nvidia-smi fails: "
            "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.)",
        ),
        ("No devices were found", 6, ""),
    ],
)
def test_what_shows_that_there_are_gpus(monkeypatch, tmp_path, says, code, found):
    monkeypatch.setattr(gpus.Path, "glob", lambda *_: iter([]))
    monkeypatch.setenv("PATH", str(tmp_path))
    if says is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '%s\\n' \"{says}\"\nexit {code}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    assert gpus.present() == found


def test_devices_count_that_this_process_may_open(monkeypatch, tmp_path):
    """Slurm and containers leave names there that a job without GPUs may not open."""
    for number in range(3):
        (tmp_path / f"nvidia{number}").touch()
    monkeypatch.setattr(gpus.Path, "glob", lambda *_: iter(sorted(tmp_path.iterdir())))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus.present() == "3 GPUs (/dev/nvidia0, ...)"

    def denied(path, *_):
        raise PermissionError(path)

    monkeypatch.setattr(os, "open", denied)
    assert gpus.present() == ""


# --------------------------------------------------------------------------------- a GPU that
# another process holds


SMI = """#!/bin/sh
case "$*" in *compute-apps*) printf '%s\\n' \\
  "GPU-{uuid}, 4711, 30720, /opt/miniconda/bin/python" "GPU-{uuid}, {mine}, 400, python" \\
  "GPU-ffff, 9, 70000, other" "GPU-{uuid}, 4712, [N/A], nbody, version 2";; *) exit 9;; esac
"""
UUID = "1a2b3c4d-0000-1111-2222-333344445555"


@pytest.fixture
def nvidia_smi(monkeypatch, tmp_path):
    """One that knows which processes are on the GPU."""
    monkeypatch.setattr(devices, "_LEAVING_S", 0.0)
    path = tmp_path / "bin/nvidia-smi"
    path.parent.mkdir()
    path.write_text(SMI.format(uuid=UUID, mine=os.getpid()))
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
    return path


HELD = "GPU 0 (NVIDIA H100, GPU-1a2b3c4d) has 31.5 of 79.6 GiB in use by "
INSTEAD = (
    ": end it, choose another GPU by CUDA_VISIBLE_DEVICES, or set DIFFMOE_SHARED_GPU=1 to share "
    "this one"
)


def hold(monkeypatch, gib, total=79.6):
    see_gpus(monkeypatch, UUID)
    monkeypatch.setattr(
        "torch.cuda.mem_get_info", lambda device: (int((total - gib) * GIB), int(total * GIB))
    )


def test_a_gpu_that_another_process_holds(nvidia_smi, monkeypatch):
    hold(monkeypatch, 31.5)
    for asked in ("auto", "cuda"):
        with pytest.raises(UserError) as error:
            local_device(0, 1, asked)
        assert str(error.value) == (
            f"{HELD}python (process 4711, 30.0 GiB), nbody, version 2 (process 4712, ? "
            f"GiB){INSTEAD}"
        )
    monkeypatch.setenv("DIFFMOE_SHARED_GPU", "1")
    assert local_device(0, 1) == torch.device("cuda", 0)


@pytest.mark.parametrize("smi", ["none", "fails", "empty"])
def test_a_container_may_not_know_the_processes(nvidia_smi, monkeypatch, smi):
    nvidia_smi.write_text(f"#!/bin/sh\nexit {9 if smi == 'fails' else 0}\n")
    if smi == "none":
        monkeypatch.setattr(gpus.shutil, "which", lambda *_: None)
    hold(monkeypatch, 31.5)
    with pytest.raises(UserError) as error:
        local_device(0, 1)
    assert str(error.value) == f"{HELD}another process{INSTEAD}"


@pytest.mark.parametrize(
    ("gib", "total", "good"),
    [
        (0.6, 79.6, True),
        (3.9, 79.6, True),
        (4.1, 79.6, False),
        (1.9, 12, True),
        (2.1, 12, False),
        (0.5, 9.75, True),
        (9, 9.75, False),
    ],
)
def test_a_context_or_a_desktop_is_nobodys_run(nvidia_smi, monkeypatch, gib, total, good):
    hold(monkeypatch, gib, total)
    if good:
        local_device(0, 1)
    else:
        with pytest.raises(UserError, match="GiB in use by"):
            local_device(0, 1)


def test_a_gpu_that_cannot_be_opened_at_all(nvidia_smi, monkeypatch):
    def busy(device):
        raise RuntimeError(
            "CUDA error: CUDA-capable device(s) is/are busy or unavailable\nCUDA kernel errors "
            "might be reported"
        )

    see_gpus(monkeypatch, UUID)
    monkeypatch.setattr("torch.cuda.mem_get_info", busy)
    with pytest.raises(UserError) as error:
        local_device(0, 1)
    assert str(error.value) == (
        "GPU 0 cannot be opened: CUDA error: CUDA-capable device(s) is/are busy or unavailable "
        "CUDA kernel errors "
        f"might be reported{INSTEAD}"
    )


def test_a_run_that_has_just_ended_is_given_a_moment(nvidia_smi, monkeypatch):
    hold(monkeypatch, 31.5)
    free = iter([10 * GIB, 40 * GIB, 78 * GIB])
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (next(free), 80 * GIB))
    monkeypatch.setattr(devices, "_LEAVING_S", 20.0)
    monkeypatch.setattr(devices.time, "sleep", lambda _: None)
    assert local_device(0, 1) == torch.device("cuda", 0) and next(free, None) is None


def test_the_only_gpu_that_a_process_sees_is_looked_at_once_it_is_nobody_elses(
    nvidia_smi, monkeypatch
):
    """Before, it may be other ranks of the same run that are seen there."""
    hold(monkeypatch, 31.5)
    store = HashStore()
    for rank, other in ((1, "b"), (0, UUID)):
        device = local_device(rank, 2)
        store.set(f"gpu/{socket.gethostname()}/{rank}", other)
    store.set(f"gpu/{socket.gethostname()}/1", UUID)
    with pytest.raises(UserError, match="must not exceed its GPUs"):
        check_own_gpu(device, 0, 2, store)
    store.set(f"gpu/{socket.gethostname()}/1", "b")
    with pytest.raises(UserError, match="31.5 of 79.6 GiB in use by python"):
        check_own_gpu(device, 0, 2, store)


# --------------------------------------------------------------------------------- every rank, and
# every verb that takes a device


def together(problems, kinds):
    """What ranks raise that each have a problem (or none) and a kind of device."""
    store, said = HashStore(), {}

    def rank_of(rank):
        try:
            _check_devices(
                "device",
                problems[rank] and UserError(problems[rank]),
                kinds[rank] and torch.device(kinds[rank]),
                store,
                RankEnvironment(rank, len(kinds), 0, 1, "srun"),
            )
        except AgreedError as error:
            said[rank] = str(error)

    ranks = [threading.Thread(target=rank_of, args=(rank,)) for rank in range(len(kinds))]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join(60)
        assert not thread.is_alive()
    return said


HOST = socket.gethostname()


@pytest.mark.parametrize(
    ("problems", "kinds", "message"),
    [
        ((None, None), ("cpu", "cpu"), None),
        ((None, "no driver"), ("cuda", None), f"rank 1 on {HOST}: no driver"),
        (
            ("no driver", None, None, None),
            (None, "cuda", "cuda", "cuda"),
            f"rank 0 on {HOST}: no driver",
        ),
        (("CPU build", "CPU build"), (None, None), "CPU build"),
        ((None, "a", "b", None), ("cuda",) * 4, f"rank 1 on {HOST}: a"),
        (
            (None, None, None, None),
            ("cuda", "cuda", "cpu", "cuda"),
            f"all ranks must have one kind of device: rank 0 on {HOST} has cuda, rank 2 on "
            f"{HOST} has cpu",
        ),
    ],
)
def test_one_ranks_problem_is_every_ranks_error(problems, kinds, message):
    assert together(problems, kinds) == (
        {} if message is None else dict.fromkeys(range(len(kinds)), message)
    )


@pytest.fixture(scope="module")
def gpu_node(tmp_path_factory):
    """The environment of a machine that has two GPUs, by its nvidia-smi; torch here is one for
    CPUs.
    """
    folder = tmp_path_factory.mktemp("node")
    line = "NVIDIA H100, 550.1, 81559, 30, 0, 0x0"
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '%s\\n' '0, {line}' '1, {line}'\n")
    (folder / "nvidia-smi").chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}", "DS_ACCELERATOR": ""}


LINE = (
    f"this machine has 2 GPUs (NVIDIA H100, driver 550.1), and torch ({torch.__version__}) is "
    f"built for CPUs only: install the build of "
    f"torch {torch.__version__.partition('+')[0]} for CUDA{ON_THE_CPU}"
)
cpu_build = pytest.mark.skipif(torch.version.cuda is not None, reason="torch is built for GPUs")


@pytest.mark.full
@cpu_build
def test_each_verb_of_several_ranks_says_so_on_each_and_computes_on_the_cpu_where_that_is_meant(
    gpu_node, tmp_path
):
    run = tiny(tmp_path / "run", "train.steps=1")
    asks = [
        run,
        ["profile", *run, "--synthetic"],
        ["encode", "--source", "x", "--out", str(tmp_path / "out"), "--image-size", "8"],
        ["evaluate", "--samples", "x.npz", "--reference", "y.npz", "--extractor", "z"],
    ]
    means = [
        [*run, "run.device=cpu"],
        [
            "sample",
            "--checkpoint",
            str(tmp_path / "run"),
            "--device",
            "cpu",
            "--count",
            "4",
            "--out",
            str(tmp_path / "samples"),
        ],
    ]
    *refused, resumed, trained, sampled = run_cases(
        2, [*asks, [*run, "run.device=cuda"], *means], env=gpu_node
    )
    for rank, said in ((0, f"error: {LINE}\n"), (1, "")):
        for case, results in zip(asks, [*refused, resumed]):
            assert (results[rank].returncode, results[rank].stderr) == (2, said), (case, results)
        for results in (trained, sampled):
            assert results[rank].returncode == 0, results
    assert (tmp_path / "samples.npz").is_file()


@cpu_build
def test_each_verb_of_one_process_says_so(gpu_node):
    cases = [
        ["bench", "moe-layer"],
        ["bench", "step"],
        ["bench", "sampling", "--device", "cuda"],
        ["bench", "communication"],
        ["verify", "--device", "cuda"],
        ["sample", "--checkpoint", "nowhere"],
    ]
    *refused, elsewhere = run_cases(1, cases, env=gpu_node)
    assert [(result.returncode, result.stderr) for (result,) in refused] == [
        (2, f"error: {LINE}\n")
    ] * len(refused), refused
    assert elsewhere[0].returncode == 2 and "nowhere" in elsewhere[0].stderr, (
        "what a verb is given comes first"
    )


@pytest.mark.full
@cpu_build
@pytest.mark.parametrize("more", [[], ["run.device=cpu"]])
def test_preflight_says_the_same(gpu_node, tmp_path, more):
    command = [
        sys.executable,
        "-m",
        "launcher",
        "preflight",
        "--config",
        str(tiny_config()),
        f"run.folder={tmp_path}",
        *more,
    ]
    with Program(command, 2, gpu_node) as program:
        results = program.wait()
    assert [r.returncode for r in results] == ([0, 0] if more else [1, 1]), results
    assert (LINE in results[0].stdout) == (not more), results


def test_the_device_is_no_part_of_a_run():
    """A run resumes on another one, and a checkpoint's configuration that has no such field is as
    before.
    """
    assert changes(Config(), override(Config(), ["run.device=cpu"])) == (
        [],
        ["run.device: auto -> cpu"],
    )
    assert config_from_tree({"run": {"folder": "x"}}).run.device == "auto"
    with pytest.raises(UserError, match="run.device"):
        override(Config(), ["run.device=gpu"])
