"""Two runs never share a run folder; and what a dead one leaves there stops nobody."""

import errno
import fcntl
import functools
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time

import pytest
import torch

from diffmoe.config import load_config
from diffmoe.layout import resolve_layout
from diffmoe.parallel.collectives import AgreedError
from diffmoe.parallel.groups import single_process
from diffmoe.training import run_lock
from diffmoe.training.loop import start
from diffmoe.training.run_lock import FILE_NAME, RunLock
from programs import run_program, start_program, tiny, tiny_config, zero

ALONE = single_process().world


def left(folder, **changes):
    """What a run has left in the folder."""
    record = {"host": "elsewhere", "process": 7, "job": "", "start": "0", "count": 3, **changes}
    (folder / FILE_NAME).write_text(json.dumps(record))


def test_a_living_run_keeps_its_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "HEARTBEAT_S", 0.05)
    with RunLock(tmp_path, ALONE) as first:
        first.take()
        first.take()
        first.check()
        with RunLock(tmp_path, ALONE) as second, pytest.raises(AgreedError) as caught:
            second.take()
        assert str(caught.value) == (
            f"run.folder ({tmp_path}) is in use by process {os.getpid()} on "
            f"{socket.gethostname()}: "
            "stop that run first, or choose another run.folder"
        )
        assert (tmp_path / FILE_NAME).exists(), (
            "the one that was refused leaves the other's note alone"
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("there", [False, True])
def test_a_start_that_another_overtook_writes_nothing(tmp_path, monkeypatch, there):
    """The other begins while this one looks at its data; the folder is new to both, or an empty
    one.
    """
    monkeypatch.setattr(run_lock, "HEARTBEAT_S", 0.05)
    folder = tmp_path / "run"
    if there:
        folder.mkdir()
    config = load_config(tiny_config(), [f"run.folder={folder}", "parallel.ep=1"])
    with RunLock(folder, ALONE) as other, RunLock(folder, ALONE) as late:
        other.hold()
        with pytest.raises(AgreedError, match="is in use by process"):
            start(
                config,
                resolve_layout(config, 1),
                zero(1),
                single_process(),
                torch.device("cpu"),
                lock=late,
            )
        assert [path.name for path in folder.iterdir()] == [FILE_NAME]


@pytest.mark.full
def test_what_a_dead_run_left_is_passed_over(tmp_path, monkeypatch):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    at_once = ({"host": socket.gethostname(), "process": ended.pid}, {"job": "12", "start": "0"})
    for patience, record in (
        (1000.0, at_once[0]),
        (1000.0, at_once[1]),
        (0.3, {}),
        (0.3, {"job": "12", "start": "1"}),
        (0.3, {"host": socket.gethostname(), "process": os.getpid()}),
        (0.3, {"process": "seven"}),
    ):
        monkeypatch.setattr(run_lock, "_PATIENCE_S", patience)
        left(tmp_path, **record)
        with RunLock(tmp_path, ALONE) as run:
            run.take()
            assert json.loads((tmp_path / FILE_NAME).read_text())["process"] == os.getpid()
    for text in ("", "[]", "{", '{"host": 1}'):
        (tmp_path / FILE_NAME).write_text(text)
        with RunLock(tmp_path, ALONE) as run:
            run.take()


def test_a_folder_that_another_run_took_meanwhile_is_left_to_it(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "HEARTBEAT_S", 0.05)
    with RunLock(tmp_path, ALONE) as run:
        run.take()
        deadline = time.monotonic() + 60
        while run._thread.is_alive():  # more than once: a beat may be on its way
            assert time.monotonic() < deadline
            left(tmp_path)
            run._thread.join(0.1)
        with pytest.raises(AgreedError, match=r"was taken by process 7 on elsewhere meanwhile"):
            run.check()
    assert json.loads((tmp_path / FILE_NAME).read_text())["host"] == "elsewhere"


def test_no_folder_is_made_before_there_is_a_run(tmp_path):
    with RunLock(tmp_path / "run", ALONE) as run:
        run.take()
        assert not (tmp_path / "run").exists()
        (tmp_path / "run").mkdir()
        run.take()
        assert (tmp_path / "run" / FILE_NAME).exists()


@pytest.mark.full
def test_a_second_start_is_refused_on_every_rank_and_the_first_goes_on(tmp_path):
    arguments = tiny(tmp_path / "run", "train.steps=100000", "train.save_every=0")
    with start_program(2, *arguments) as program:
        program.wait_for("step 1/")
        before = {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*.yaml")}
        results = run_program(2, *arguments, "train.lr=0.5")
        assert [r.returncode for r in results] == [2, 2], results
        pid = program.processes[0].pid
        assert (
            f"run.folder ({tmp_path}/run) is in use by process {pid} on" in results[0].stderr
            and "Traceback" not in results[1].stderr
        )
        assert {
            path.name: path.read_bytes() for path in (tmp_path / "run").glob("*.yaml")
        } == before
        program.signal(0, 15)
        first = program.wait()
    assert [r.returncode for r in first] == [0, 0] and "stopped cleanly" in first[0].stdout, first
    assert not (tmp_path / "run" / FILE_NAME).exists()


# ---------------------------------------------------------------------------------------- starts at
# the same moment


ROUNDS = 200


def nothing(folder, number):
    """A new folder, or one that the run before has left."""


def dead(folder, number):
    """This job's start before its requeue, on another node."""
    left(folder, process=number, job="12")


def dead_here(folder, number):
    left(folder, host=socket.gethostname(), process=dead_process(), start=str(number))


@functools.cache
def dead_process():
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return ended.pid


def start_at(gate, folder, ask, say):
    """A process that starts once a round, at the moment at which the other does, and tells what
    became of it; a run that has the folder keeps it until the other is refused.
    """
    for _ in range(ROUNDS):
        with RunLock(folder, ALONE) as lock:
            gate.wait()
            try:
                lock.take()
                say("has it")
            except AgreedError as error:
                say("refused" if "is in use by process" in str(error) else str(error))
            ask()


@pytest.mark.full
@pytest.mark.parametrize("before", [nothing, dead, dead_here])
def test_of_starts_at_the_same_moment_exactly_one_takes_the_folder(tmp_path, monkeypatch, before):
    """Processes, which share nothing but the folder; 200 times."""
    monkeypatch.setattr(run_lock, "HEARTBEAT_S", 0.01)
    monkeypatch.setattr(run_lock, "_PATIENCE_S", 60.0)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    context = multiprocessing.get_context("fork")
    gate, pipes, processes = context.Barrier(2), [], []
    for _ in range(2):
        ours, theirs = context.Pipe()
        processes.append(
            context.Process(
                target=start_at, args=(gate, tmp_path, theirs.recv, theirs.send), daemon=True
            )
        )
        pipes.append(ours)
    before(tmp_path, 1)
    for process in processes:
        process.start()
    for number in range(ROUNDS):
        ends = [pipe.recv() for pipe in pipes]
        assert sorted(ends) == ["has it", "refused"], (number, ends)
        for path in tmp_path.iterdir():
            path.unlink()
        before(tmp_path, number + 2)
        for pipe in pipes:
            pipe.send("next")
    for process in processes:
        process.join(60)
        assert process.exitcode == 0


def test_a_run_whose_record_moves_at_the_last_moment_keeps_its_folder(tmp_path, monkeypatch):
    """It stood still for as long as one looks, and goes on just before its record is replaced."""
    monkeypatch.setattr(run_lock, "_PATIENCE_S", 0.05)
    left(tmp_path)
    lock = RunLock(tmp_path, ALONE)
    is_dead = lock._is_dead

    def then_moves(found):
        dead = is_dead(found)
        left(tmp_path, count=4)
        return dead

    monkeypatch.setattr(lock, "_is_dead", then_moves)
    assert lock._try() is False
    found = json.loads((tmp_path / FILE_NAME).read_text())
    assert (found["host"], found["count"]) == ("elsewhere", 4)


def test_a_file_system_without_locks_holds_one_run_too(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(run_lock, "HEARTBEAT_S", 0.02)
    with RunLock(tmp_path, ALONE) as first:
        first.take()
        with (
            RunLock(tmp_path, ALONE) as second,
            pytest.raises(AgreedError, match="is in use by process"),
        ):
            second.take()
    assert not list(tmp_path.iterdir())
