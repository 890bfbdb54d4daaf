"""run.py as its users start it: one process a rank, which meet through a file and never through a
port.

``run_program`` starts fresh processes; ``start_program`` lets a test signal them while they run; a
``Nursery`` forks them, for ``run_cases`` and whoever starts many, since importing torch takes
longer than most mistakes take to be found.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import json
import multiprocessing.forkserver
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

REPOSITORY = Path(__file__).resolve().parent.parent
_ABOUT_RANKS = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "DIFFMOE_STORE",
)

# A DiffMoE of 0.1 M parameters on the digits. Its pool covers the batch, so it spans every layout's
# ranks.
TINY = {
    "model": {
        "family": "diffmoe",
        "input_size": 8,
        "channels": 1,
        "width": 32,
        "depth": 4,
        "heads": 2,
        "classes": 10,
        "learn_sigma": False,
    },
    "moe": {"experts": 4, "pool": 16},
    "train": {
        "steps": 8,
        "batch": 16,
        "lr": 1e-2,
        "warmup": 2,
        "schedule": "cosine",
        "clip": 1.0,
        "ema": 0.7,
        "log_every": 1,
        "save_every": 4,
        "keep": 3,
    },
    "parallel": {"ep": 2},
    "sample": {"steps": 2, "columns": 4},
}


def zero(stage: int, bf16: bool = False, **more: object) -> dict:
    """A DeepSpeed JSON of that ZeRO stage.  At stage 3 DeepSpeed keeps parameters below 100,000
    elements whole; here the tests' small ones are gathered and freed as a large model's are.
    """
    whole = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    return {
        "zero_optimization": {"stage": stage, **whole, **more},
        **({"bf16": {"enabled": True}} if bf16 else {}),
    }


@dataclass(frozen=True)
class Result:
    """How one rank ended and what it said."""

    returncode: int
    stdout: str
    stderr: str


def _start_process(
    command: Sequence[str], env: dict[str, str], out: Path, err: Path
) -> subprocess.Popen:
    with out.open("w") as stdout, err.open("w") as stderr:
        return subprocess.Popen(
            command,
            stdout=stdout,
            stderr=stderr,
            stdin=subprocess.DEVNULL,
            cwd=REPOSITORY,
            start_new_session=True,
            env=env,
        )


class Program:
    """A started run.py; a context manager that leaves no process behind."""

    def __init__(
        self,
        command: Sequence[str],
        world: int,
        env: Mapping[str, str] | None = None,
        start: Callable[[Sequence[str], dict[str, str], Path, Path], Any] = _start_process,
    ) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="diffmoe-program-")
        self._folder = Path(self._scratch.name)
        self.processes: list[Any] = []
        for rank in range(world):
            about = {
                "RANK": str(rank),
                "WORLD_SIZE": str(world),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(world),
                "DIFFMOE_STORE": str(self._folder / "store"),
            }
            out, err = (self._folder / f"{name}{rank}" for name in ("out", "err"))
            out.touch(), err.touch()
            self.processes.append(start(command, environment() | about | dict(env or {}), out, err))

    def signal(self, rank: int, number: int) -> None:
        self.processes[rank].send_signal(number)

    def interrupt(self) -> None:
        """Ctrl-C: the terminal sends SIGINT to everything that runs there, a launcher's children
        included.
        """
        for process in self.processes:
            os.killpg(process.pid, signal.SIGINT)

    def wait_for(
        self, text: str, rank: int = 0, timeout: float = 180.0, even_after_the_end: bool = False
    ) -> None:
        """Until the rank has printed ``text``; AssertionError when it ends before (unless its
        children may go on), or takes longer.
        """
        deadline = time.monotonic() + timeout
        while text not in self.result(rank).stdout:
            ended = self.processes[rank].poll() is not None and not even_after_the_end
            if (ended and text not in self.result(rank).stdout) or time.monotonic() > deadline:
                raise AssertionError(f"rank {rank} never said {text!r}: {self.results()}")
            time.sleep(0.02)

    def wait(self, timeout: float = 240.0) -> list[Result]:
        """The ranks' results; those that have not ended after ``timeout`` are killed, which is an
        AssertionError.
        """
        deadline = time.monotonic() + timeout
        try:
            for process in self.processes:
                process.wait(max(0.01, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout:g} s: {self.results()}") from None
        finally:
            self._kill()
        return self.results()

    def result(self, rank: int) -> Result:
        code = self.processes[rank].poll()
        return Result(
            -1 if code is None else code,
            (self._folder / f"out{rank}").read_text(errors="replace"),
            (self._folder / f"err{rank}").read_text(errors="replace"),
        )

    def results(self) -> list[Result]:
        return [self.result(rank) for rank in range(len(self.processes))]

    def _kill(self) -> None:
        for process in self.processes:
            # Each has a session of its own, and a launcher may be gone before its children.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()
        self._scratch.cleanup()


class Nursery:
    """Forks ranks of run.py from a process that has imported torch and DeepSpeed, the same for all
    nurseries: a start takes a second, not ten.

    For tests that kill ranks over and over.  ``main`` is ``module:function`` in tests/, called in
    place of run.py's.
    """

    def __init__(self, main: str = "run:main") -> None:
        self._main = main
        multiprocessing.forkserver.set_forkserver_preload(
            ["diffmoe.training.loop", "diffmoe.training.zero_optimizers", "pytest"]
        )
        with mock.patch.dict(os.environ, environment(), clear=True):
            multiprocessing.forkserver.ensure_running()

    def start(self, world: int, *arguments: str, env: Mapping[str, str] | None = None) -> Program:
        return Program(arguments, world, env, self._fork)

    def run(
        self,
        world: int,
        *arguments: str,
        timeout: float = 240.0,
        env: Mapping[str, str] | None = None,
    ) -> list[Result]:
        with self.start(world, *arguments, env=env) as program:
            return program.wait(timeout)

    def _fork(self, arguments: Sequence[str], env: dict[str, str], out: Path, err: Path) -> _Forked:
        given = (self._main, list(map(str, arguments)), env, out, err)
        process = _Forked(target=_be_rank, args=given)
        process.start()
        return process


class _Forked(multiprocessing.context.ForkServerProcess):
    """With as much of subprocess.Popen as Program needs."""

    def poll(self) -> int | None:
        return self.exitcode

    def wait(self, timeout: float = 60.0) -> int:
        self.join(timeout)
        if (code := self.poll()) is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def _be_rank(main: str, arguments: list[str], env: dict[str, str], out: Path, err: Path) -> None:
    os.setsid()
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY), number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(REPOSITORY)
    sys.path.insert(0, str(REPOSITORY))
    module, function = main.split(":")
    sys.exit(getattr(importlib.import_module(module), function)(arguments))


def start_program(world: int, *arguments: str, env: Mapping[str, str] | None = None) -> Program:
    """``run.py arguments`` on ``world`` ranks, running."""
    return Program([sys.executable, "run.py", *arguments], world, env)


def run_program(
    world: int, *arguments: str, timeout: float = 240.0, env: Mapping[str, str] | None = None
) -> list[Result]:
    """``run.py arguments`` on ``world`` ranks, each one's result."""
    with start_program(world, *arguments, env=env) as program:
        return program.wait(timeout)


LAUNCHERS = {
    "deepspeed": ["--log_level", "error", "--num_gpus", "2"],
    "torchrun": ["--standalone", "--nproc-per-node", "2"],
}


def start_launcher(launcher: str, *arguments: str) -> Program:
    """``deepspeed`` or ``torchrun`` as one process, without any rank's environment, that starts
    run.py on 2 ranks.
    """
    tool = str(Path(sys.executable).parent / launcher)
    clean = ["env", *(f"--unset={name}" for name in _ABOUT_RANKS if name != "DIFFMOE_STORE")]
    return Program([*clean, tool, *LAUNCHERS[launcher], "run.py", *arguments], 1)


def run_cases(
    world: int,
    cases: Sequence[Sequence[str]],
    timeout: float = 240.0,
    env: Mapping[str, str] | None = None,
) -> list[list[Result]]:
    """Each command line in turn on ``world`` ranks of a nursery: results [case][rank]."""
    nursery = Nursery()
    return [nursery.run(world, *case, timeout=timeout, env=env) for case in cases]


def environment() -> dict[str, str]:
    """This process's environment for a rank on the CPU, without anything about ranks."""
    kept = {name: value for name, value in os.environ.items() if name not in _ABOUT_RANKS}
    return {**kept, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


@functools.cache
def scratch() -> Path:
    """A folder for what several test files share; gone when this process ends."""
    folder = tempfile.TemporaryDirectory(prefix="diffmoe-tests-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


@functools.cache
def digits() -> Path:
    """The digits' shards."""
    from diffmoe.data.digits import write_digits

    write_digits(scratch() / "digits")
    return scratch() / "digits"


@functools.cache
def tiny_config() -> Path:
    """TINY as a YAML file."""
    path = scratch() / "tiny.yaml"
    path.write_text(
        yaml.safe_dump({**TINY, "data": {"shards": str(digits()), "streams": 64, "window": 4}})
    )
    return path


def tiny(folder: Path, *more: str) -> list[str]:
    """Arguments that train TINY in ``folder``."""
    return ["--config", str(tiny_config()), f"run.folder={folder}", *more]


@functools.cache
def trained(*overrides: str) -> tuple[Path, list[Result]]:
    """The undisturbed run (2 ranks, EP 2, ZeRO 1, fp32, 8 steps) that others are compared with; do
    not write there.
    """
    folder = Path(tempfile.mkdtemp(prefix="trained-", dir=scratch()))
    return folder, run_program(2, *tiny(folder, *overrides))


def losses(folder: Path) -> dict[int, float]:
    """Loss by step, from metrics.jsonl."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records}
