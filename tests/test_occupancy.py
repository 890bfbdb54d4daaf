"""Two runs never share a run folder; and what a dead one leaves there stops nobody."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest

from diffmoe.parallel.collectives import AgreedError
from diffmoe.parallel.groups import single_process
from diffmoe.training import occupancy
from diffmoe.training.occupancy import FILE_NAME, Occupancy
from programs import run_program, start_program, tiny

ALONE = single_process().world


def left(folder, **changes):
    """What a run has left in the folder."""
    record = {"host": "elsewhere", "process": 7, "job": "", "start": "0", "count": 3, **changes}
    (folder / FILE_NAME).write_text(json.dumps(record))


def test_a_living_run_keeps_its_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(occupancy, "BEAT_S", 0.05)
    with Occupancy(tmp_path, ALONE) as first:
        first.take()
        first.take()
        with Occupancy(tmp_path, ALONE) as second, pytest.raises(AgreedError) as caught:
            second.take()
        assert str(caught.value) == (f"run.folder ({tmp_path}) is in use by process {os.getpid()} on {socket.gethostname()}: "
                                     "stop that run first, or choose another run.folder")
        assert (tmp_path / FILE_NAME).exists(), "the one that was refused leaves the other's note alone"
    assert not list(tmp_path.iterdir())


def test_what_a_dead_run_left_is_passed_over(tmp_path, monkeypatch):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    at_once = ({"host": socket.gethostname(), "process": ended.pid}, {"job": "12", "start": "0"})
    for patience, record in ((1000.0, at_once[0]), (1000.0, at_once[1]), (0.3, {}), (0.3, {"job": "12", "start": "1"}),
                             (0.3, {"host": socket.gethostname(), "process": os.getpid()}), (0.3, {"process": "seven"})):
        monkeypatch.setattr(occupancy, "_PATIENCE_S", patience)
        left(tmp_path, **record)
        with Occupancy(tmp_path, ALONE) as run:
            run.take()
            assert json.loads((tmp_path / FILE_NAME).read_text())["process"] == os.getpid()
    for text in ("", "[]", "{", '{"host": 1}'):
        (tmp_path / FILE_NAME).write_text(text)
        with Occupancy(tmp_path, ALONE) as run:
            run.take()


def test_a_folder_that_another_run_took_meanwhile_is_left_to_it(tmp_path, monkeypatch):
    monkeypatch.setattr(occupancy, "BEAT_S", 0.05)
    with Occupancy(tmp_path, ALONE) as run:
        run.take()
        deadline = time.monotonic() + 60
        while run._thread.is_alive():  # more than once: a beat may be on its way
            assert time.monotonic() < deadline
            left(tmp_path)
            run._thread.join(0.1)
    assert json.loads((tmp_path / FILE_NAME).read_text())["host"] == "elsewhere"


def test_no_folder_is_made_before_there_is_a_run(tmp_path):
    with Occupancy(tmp_path / "run", ALONE) as run:
        run.take()
        assert not (tmp_path / "run").exists()
        (tmp_path / "run").mkdir()
        run.take()
        assert (tmp_path / "run" / FILE_NAME).exists()


def test_a_second_start_is_refused_on_every_rank_and_the_first_goes_on(tmp_path):
    arguments = tiny(tmp_path / "run", "train.steps=100000", "train.save_every=0")
    with start_program(2, *arguments) as program:
        program.wait_for("step 1/")
        before = {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*.yaml")}
        results = run_program(2, *arguments, "train.lr=0.5")
        assert [r.returncode for r in results] == [2, 2], results
        pid = program.processes[0].pid
        assert f"run.folder ({tmp_path}/run) is in use by process {pid} on" in results[0].stderr and "Traceback" not in results[1].stderr
        assert {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*.yaml")} == before
        program.signal(0, 15)
        first = program.wait()
    assert [r.returncode for r in first] == [0, 0] and "stopped in order" in first[0].stdout, first
    assert not (tmp_path / "run" / FILE_NAME).exists()
