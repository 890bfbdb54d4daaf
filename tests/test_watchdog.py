"""Which ranks count as dead and which as hung; the record that a rank leaves of itself, in which
what the main thread says is never lost; torch's own watch over NCCL, which is slower; and who
counts as a lost peer.
"""

import contextlib
import ctypes
import datetime
import os
import pickle
import re
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from diffmoe.config import RunConfig
from diffmoe.parallel.collectives import EXIT_LOST, is_lost_peer
from diffmoe.parallel.groups import build_groups, single_process
from diffmoe.parallel.trace import Trace
from diffmoe.training import limits
from diffmoe.training.watchdog import Heartbeat, Watchdog, _runs
from programs import Nursery

# --------------------------------------------------------------------------------------------------
# dead or hung

DEATH_S = 12.0  # in place of 60: a heartbeat a second, silence of 8 s is death
LONG, SHORT = 600.0, 25.0  # run.timeout_s
PAUSE = 18  # seconds, above DEATH_S


def watched(arguments):
    """A rank under the watchdog whose main thread is in no collective, so that no connection tells
    of a dead peer, as with NCCL.

    Until a file says that all is done it sleeps ("wait"), or with Python's lock in its hands, as an
    endless C call ("hold") or one that ends ("pause"); it is that of ``victim`` which does the
    latter, and the other ranks sleep.
    """
    timeout_s, folder, how, victim = (
        float(arguments[0]),
        Path(arguments[1]),
        arguments[2],
        int(arguments[3]),
    )
    limits.DEATH_S = DEATH_S
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        "gloo",
        init_method=f"file://{os.environ['DIFFMOE_STORE']}",
        rank=rank,
        world_size=world,
        timeout=limits.patience(timeout_s),
    )
    groups = build_groups(1, 1)
    groups.trace.warm = True
    with Watchdog(groups, timeout_s, folder) as watchdog:
        while (
            len(watchdog._seen) < world if rank == 0 else 0 not in watchdog._seen
        ):  # all have been heard
            time.sleep(0.05)
        (folder / f"ready{rank}").touch()
        print("ready", flush=True)
        while how != "wait" and not all(
            (folder / f"ready{other}").exists() for other in range(world)
        ):
            time.sleep(0.05)
        if rank == victim and how in ("hold", "pause"):
            ctypes.PyDLL(None).sleep(1000 if how == "hold" else PAUSE)
            (folder / "done").touch()
        waits = (
            groups.trace.inside("all-reduce", groups.world.ranks)
            if how == "hold"
            else contextlib.nullcontext()
        )
        with waits:  # as far as the report can know
            while not (folder / "done").exists():
                ctypes.CDLL(None).usleep(100_000)
        dist.barrier()
    return 0


# (ranks, run.timeout_s, what ranks do, whose main thread it is, the signal that it gets)
CASES = {
    "killed": (2, LONG, "wait", 1, signal.SIGKILL),
    "killed of four": (4, LONG, "wait", 2, signal.SIGKILL),
    "the judge killed": (2, LONG, "wait", 0, signal.SIGKILL),
    "stopped": (2, LONG, "wait", 1, signal.SIGSTOP),
    "the judge stopped": (4, LONG, "wait", 0, signal.SIGSTOP),
    "all sleep": (2, SHORT, "wait", 0, None),
    "a C call": (2, SHORT, "hold", 1, None),
    "a C call that ends": (2, LONG, "pause", 1, None),
    "a C call of the judge's that ends": (4, LONG, "pause", 0, None),
}


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """Each case's folder, victim, and results; all cases at once, since they wait most of the
    time.
    """
    nursery = Nursery("test_watchdog:watched")
    with contextlib.ExitStack() as running:
        programs = {}
        for name, (world, timeout_s, how, victim, number) in CASES.items():
            folder = tmp_path_factory.mktemp("watched")
            program = running.enter_context(
                nursery.start(world, str(timeout_s), str(folder), how, str(victim))
            )
            programs[name] = folder, program
        for name, (world, _, how, victim, number) in CASES.items():
            folder, program = programs[name]
            for rank in range(world if number else 0):
                program.wait_for("ready", rank)
            if number:
                program.signal(victim, number)
        found = {}
        for name, (world, _, how, victim, number) in CASES.items():
            folder, program = programs[name]
            stays = (
                number == signal.SIGSTOP or how == "hold"
            )  # stopped, or without a chance to run Python
            for rank in range(world):
                if not (stays and rank == victim):
                    program.processes[rank].wait(150.0)
            program.signal(victim, signal.SIGKILL)
            found[name] = folder, program.processes, program.wait(60.0)
        yield found


def report_of(ends, name):
    """The folder, and the report's first line, which one of the ranks that were left has printed,
    after all ended with EXIT_LOST.
    """
    folder, processes, results = ends[name]
    world, _, how, victim, number = CASES[name]
    left = [
        result
        for rank, result in enumerate(results)
        if rank != victim or not (number or how == "hold")
    ]
    assert [result.returncode for result in left] == [EXIT_LOST] * len(left), results
    assert "Traceback" not in "".join(result.stderr for result in left), results
    (line,) = [
        line
        for result in left
        for line in result.stderr.splitlines()
        if line.startswith("watchdog: ")
    ]
    assert all(
        "as well: watchdog: " in result.stderr
        for result in left
        if not result.stderr.startswith("watchdog: ")
    ), results
    return folder, processes[victim].pid, line


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[4]])
def test_a_process_that_is_gone_or_stopped_is_dead_long_before_the_timeout(ends, name):
    folder, pid, line = report_of(ends, name)
    found = re.match(
        rf"watchdog: rank {CASES[name][3]} on {os.uname().nodename} \(process {pid}\) has not "
        rf"answered for (\d+) s "
        r"\(run\.timeout_s 600\); .* \(dead: the process is gone or stopped, or its node is out of "
        r"reach\)$",
        line,
    )
    assert found and int(found[1]) <= DEATH_S, line


@pytest.mark.full
@pytest.mark.parametrize("name", ["all sleep", "a C call"])
def test_a_process_that_lives_is_hung_after_the_timeout_and_not_before(ends, name):
    """Also one whose thread has no chance to say so."""
    folder, pid, line = report_of(ends, name)
    found = re.match(
        rf"watchdog: rank {CASES[name][3]} on {os.uname().nodename} \(process {pid}\) has made no "
        rf"progress for (\d+) s.*"
        r" \(run\.timeout_s 25\); .* \(hung: the process lives, its main thread does not move\)$",
        line,
    )
    assert found and int(found[1]) >= SHORT, line


@pytest.mark.full
@pytest.mark.parametrize("name", ["a C call that ends", "a C call of the judge's that ends"])
def test_a_pause_longer_than_a_dead_process_is_waited_for_ends_nothing(ends, name):
    _, _, results = ends[name]
    assert [(result.returncode, result.stderr) for result in results] == [(0, "")] * CASES[name][
        0
    ], results


@pytest.mark.full
def test_each_rank_leaves_the_flight_recorder_where_the_report_says(ends):
    folder, processes, results = ends["all sleep"]
    assert (
        f"  the last collectives of each rank: torchfrtrace {folder}/flight_recorder --prefix "
        f"rank_\n" in results[0].stderr
    )
    for rank in range(2):
        assert pickle.loads((folder / f"flight_recorder/rank_{rank}").read_bytes())["version"]


def test_what_the_judge_sleeps_through_is_nobodys_silence(monkeypatch):
    """All of a node's processes may pause together: the first look after it finds what the last one
    found.
    """
    watchdog = Watchdog(single_process(), 600.0)
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    watchdog._store.set("beat/0", Heartbeat(0, "host", 1, 7, watchdog.trace).dumps())
    for _ in range(3):
        watchdog._read([0])
        clock[0] += watchdog.interval
    for pause in (1000.0, 1000.0):
        clock[0] += pause
        watchdog._read([0])
        assert watchdog._look() is None
    for _ in range(20):
        clock[0] += watchdog.interval
        watchdog._read([0])
    assert "has not answered" in watchdog._look()


def test_a_slow_rank_that_falls_silent_is_dead_and_not_hung(monkeypatch):
    """Its main thread stood still before: by then nobody knows whether the process lives."""
    watchdog = Watchdog(single_process(), 12.0)
    watchdog.world, watchdog.trace.warm = 2, True
    assert watchdog.limit == watchdog.silence == 12.0
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    verdicts = []
    for second in range(18):
        clock[0] = float(second)
        watchdog.trace.count += 1
        watchdog._tell()
        if second <= 4:
            beat = Heartbeat(1, "host", 1, second, Trace(warm=True))
            watchdog._store.set("beat/1", beat.dumps())
        verdicts.append(watchdog._look())
    assert verdicts[:17] == [None] * 17
    assert "rank 1 on host (process 1) has not answered for 13 s" in verdicts[17]


def test_which_processes_run():
    """One that sleeps does; not one that is stopped, a zombie, or gone."""
    child = subprocess.Popen(["sleep", "1000"])
    assert _runs(child.pid) and _runs(os.getpid())
    child.send_signal(signal.SIGSTOP)
    os.waitpid(child.pid, os.WUNTRACED)
    assert not _runs(child.pid)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not _runs(child.pid)
    child.wait()
    assert not _runs(child.pid)


# ----------------------------------------------------------------------------------------- torch's
# own watch over NCCL


@pytest.mark.parametrize("timeout_s", [RunConfig().timeout_s, 5.0, 60.0, 3600.0])
def test_the_limits_lie_behind_each_other(monkeypatch, timeout_s):
    """Death, then a hang, then what torch does by itself."""
    for name in [name for name in os.environ if name.startswith("TORCH_")]:
        monkeypatch.delenv(name)
    watchdog = Watchdog(single_process(), timeout_s)
    reported = (
        watchdog.silence + 4 * watchdog.interval
    )  # beat, look of a rank that is not 0, verdict
    assert watchdog.silence <= timeout_s and reported <= max(limits.DEATH_S, timeout_s + 4)
    hung = limits.START_FACTOR * timeout_s + 4 * watchdog.interval
    assert not watchdog.trace.warm and watchdog.limit == limits.START_FACTOR * timeout_s
    limits.set_nccl(timeout_s)
    patience = limits.patience(timeout_s).total_seconds()
    assert hung < patience < float(os.environ["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"])
    assert 4 * float(os.environ["TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC"]) / 1000 > limits.DEATH_S
    assert (
        os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "3"
        and int(os.environ["TORCH_FR_BUFFER_SIZE"]) > 0
    )


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_ASYNC_ERROR_HANDLING"),
        ("TORCH_FR_BUFFER_SIZE", "TORCH_FR_BUFFER_SIZE"),
        ("TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_FR_BUFFER_SIZE"),
        ("NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_ASYNC_ERROR_HANDLING"),
        ("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"),
    ],
)
def test_what_the_environment_says_of_nccl_is_left_alone(monkeypatch, name, ours):
    for each in {ours, *(name for name in os.environ if name.startswith("TORCH_"))}:
        monkeypatch.setenv(each, "to be put back")
        monkeypatch.delenv(each)
    monkeypatch.setenv(name, "7")
    limits.set_nccl(600.0)
    assert os.environ[name] == "7" and (ours == name or ours not in os.environ)


def test_without_the_watchdog_torchs_watch_is_as_torch_has_it(monkeypatch):
    for name in [name for name in os.environ if name.startswith("TORCH_")]:
        monkeypatch.delenv(name)
    limits.set_nccl(0.0)
    assert [name for name in os.environ if name.startswith("TORCH_NCCL")] == []


def test_groups_that_others_made_wait_as_long_as_ours(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        group = dist.new_group([0])
        limits.lengthen_timeouts(5.0)
        for each in (dist.group.WORLD, group):
            assert (
                each._get_backend(torch.device("cpu")).options._timeout
                == limits.patience(5.0)
                != datetime.timedelta(minutes=30)
            )
    finally:
        dist.destroy_process_group()


# ------------------------------------------------------------------------------------------- the
# record of a rank


def break_off(watchdog):
    """The main thread's connection breaks; the thread that talks finds out who has gone, which
    takes it some beats.
    """
    looks = iter([None, None, None, "the end"])
    watchdog._look = lambda: next(looks) if watchdog._lost_at else None
    watchdog._without_store = lambda: None
    watchdog._end = lambda _text: watchdog._stopping.set()
    watchdog._check_lost(RuntimeError("Wait timeout"))


def fail(watchdog):
    error = KeyError("a mistake of ours")
    watchdog.__exit__(KeyError, error, None)


class Store:
    """A store in which the gate is passed before a beat is written."""

    def __init__(self, store, gate):
        self.store, self.gate = store, gate

    def set(self, key, text):
        self.gate()
        self.store.set(key, text)

    def __getattr__(self, name):
        return getattr(self.store, name)


@pytest.mark.parametrize("where", ["making the beat", "writing it"])
@pytest.mark.parametrize(
    ("end", "state"), [(break_off, "lost"), (fail, "KeyError: 'a mistake of ours'")]
)
def test_what_the_main_thread_says_is_in_the_last_beat(where, end, state):
    """It says so while the other thread is in the middle of a beat that does not know it yet."""
    watchdog = Watchdog(single_process(), 60.0)
    watchdog.world, watchdog.interval = 2, 0.02
    store, place = watchdog._store, watchdog._place
    inside, go_on = threading.Event(), threading.Event()

    def gate():
        if threading.current_thread() is watchdog._talker and not inside.is_set():
            inside.set()
            go_on.wait(60)

    if where == "making the beat":
        watchdog._place = lambda: (gate(), place())[1]
    else:
        watchdog._store = Store(store, gate)
    watchdog.__enter__()
    assert inside.wait(60)
    threading.Timer(0.3, go_on.set).start()  # once the main thread has said it, and waits
    end(watchdog)
    for thread in (watchdog._talker, watchdog._thread):
        thread.join(60)
        assert not thread.is_alive()
    assert Heartbeat.loads(store.get("beat/0")).state == state


def test_a_rank_that_ends_by_its_own_error_is_not_ended_by_anothers(monkeypatch):
    """All ranks met the same mistake: each keeps its own traceback."""
    watchdog = Watchdog(single_process(), 60.0)
    watchdog.world, watchdog.interval = 2, 0.02
    ended = []
    monkeypatch.setattr(watchdog, "_end", ended.append)
    watchdog._look = lambda: "rank 1 ended by KeyError" if watchdog._state else None
    watchdog.__enter__()
    tell = watchdog._tell

    def slow_tell():
        tell()
        time.sleep(0.2)

    watchdog._tell = slow_tell
    fail(watchdog)
    assert not ended


# --------------------------------------------------------------------------------------------------
# a lost peer


GLOO = "[/a/pytorch/third_party/gloo/gloo/transport/tcp/"
NCCL = "NCCL error in: /a/ProcessGroupNCCL.cpp:77, "


class OurError(RuntimeError):
    pass


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            GLOO
            + "pair.cc:553] Connection closed by peer [127.0.0.1]:24971. This is typically caused "
            "by a remote worker"
        ),
        RuntimeError(GLOO + "pair.cc:538] Read error [127.0.0.1]:9: Connection reset by peer"),
        RuntimeError(
            GLOO + "unbound_buffer.cc:78] Timed out waiting 4000ms for recv operation to complete"
        ),
        RuntimeError(
            "[/a/third_party/gloo/gloo/rendezvous/context.cc:143] Gloo connectFullMesh failed with "
            "timed out connecting"
        ),
        RuntimeError("Wait timeout"),
        RuntimeError("NCCL communicator was aborted on rank 1."),
        RuntimeError(
            "[PG ID 0 PG GUID 0 Rank 3] Watchdog caught collective operation timeout: "
            "WorkNCCL(SeqNum=7)"
        ),
        dist.DistBackendError(
            NCCL + "remote process exited or there was a network error, NCCL version "
            "2.27\nncclRemoteError"
        ),
        dist.DistNetworkError(
            "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server "
            "shutdown or crash?"
        ),
        dist.DistStoreError("wait timeout after 5000ms, keys: /default_pg/0"),
    ],
    ids=lambda error: str(error)[:40],
)
def test_what_torch_says_of_a_lost_peer(error):
    assert is_lost_peer(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "The size of tensor a (3) must match the size of tensor b (4): an input of gloo's "
            "all-reduce"
        ),
        RuntimeError(
            "[enforce fail at /a/third_party/gloo/gloo/transport/tcp/pair.cc:446] "
            "op.preamble.length <= op.nbytes. 1200 vs 400"
        ),
        RuntimeError("shape mismatch in the buffer of an NCCL all-to-all"),
        RuntimeError(
            "CUDA error: an illegal memory access was encountered; NCCL may report it later"
        ),
        RuntimeError(
            "mat1 and mat2 shapes cannot be multiplied (connection reset by peer is no reason)"
        ),
        torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2 GiB, of which NCCL holds 1"
        ),
        dist.DistBackendError(
            NCCL
            + "unhandled cuda error\nncclUnhandledCudaError: Call to CUDA failed. Cuda failure 2 "
            "'out of memory'"
        ),
        dist.DistBackendError(
            NCCL + "unhandled cuda error\nncclUnhandledCudaError: Call to CUDA function failed."
        ),
        dist.DistBackendError(NCCL + "internal error\nncclInternalError: Internal check failed."),
        dist.DistBackendError(
            NCCL + "invalid usage\nncclInvalidUsage: Duplicate GPU detected : rank 1 and rank 0"
        ),
        OurError("Wait timeout"),
        ConnectionResetError("[Errno 104] Connection reset by peer"),
        TimeoutError("timed out"),
        ValueError("gloo"),
    ],
    ids=lambda error: str(error)[:40],
)
def test_what_only_mentions_it(error):
    assert not is_lost_peer(error)
