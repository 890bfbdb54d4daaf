"""run.py as its users start it: one process a rank, which meet through a file and never through a
port.

``run_program`` starts fresh processes; ``start_program`` lets a test signal them while they run;
``run_cases`` gives many command lines to one set of processes, since importing torch takes longer
than most mistakes take to be found.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import io
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

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


class Program:
    """A started run.py; a context manager that leaves no process behind."""

    def __init__(
        self, command: Sequence[str], world: int, env: Mapping[str, str] | None = None
    ) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="diffmoe-program-")
        self._folder = Path(self._scratch.name)
        self.processes: list[subprocess.Popen] = []
        for rank in range(world):
            with (
                open(self._folder / f"out{rank}", "w") as out,
                open(self._folder / f"err{rank}", "w") as err,
            ):
                self.processes.append(
                    subprocess.Popen(
                        command,
                        stdout=out,
                        stderr=err,
                        stdin=subprocess.DEVNULL,
                        cwd=REPOSITORY,
                        start_new_session=True,
                        env={
                            **environment(),
                            "RANK": str(rank),
                            "WORLD_SIZE": str(world),
                            "LOCAL_RANK": str(rank),
                            "LOCAL_WORLD_SIZE": str(world),
                            "DIFFMOE_STORE": str(self._folder / "store"),
                            **(env or {}),
                        },
                    )
                )

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


class _Forked:
    """As much of subprocess.Popen as Program needs, of a process that the nursery forked."""

    def __init__(self, pid: int, code: Path) -> None:
        self.pid, self._code = pid, code

    def poll(self) -> int | None:
        text = self._code.read_text() if self._code.exists() else ""
        return int(text) if text.endswith("\n") else None

    def wait(self, timeout: float = 60.0) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.01)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


class _ForkedProgram(Program):
    def __init__(self, nursery: Nursery, world: int, arguments: Sequence[str]) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="diffmoe-program-")
        self._folder = Path(self._scratch.name)
        for rank in range(world):
            (self._folder / f"out{rank}").touch()
            (self._folder / f"err{rank}").touch()
        pids = nursery.ask(
            {"folder": str(self._folder), "world": world, "arguments": list(map(str, arguments))}
        )
        self.processes = [
            _Forked(pid, self._folder / f"code{rank}") for rank, pid in enumerate(pids)
        ]


class Nursery:
    """A process that has imported torch and DeepSpeed and forks ranks of run.py: a start takes a
    second, not ten.

    For tests that kill ranks over and over.  ``main`` is ``module:function`` in tests/, called in
    place of run.py's.
    """

    def __init__(self, main: str = "run:main") -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "nursery", main],
            cwd=REPOSITORY,
            env=environment(),
            start_new_session=True,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def start(self, world: int, *arguments: str) -> Program:
        return _ForkedProgram(self, world, arguments)

    def run(self, world: int, *arguments: str, timeout: float = 240.0) -> list[Result]:
        with self.start(world, *arguments) as program:
            return program.wait(timeout)

    def ask(self, request: dict) -> list[int]:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()


def _serve_nursery(main: str) -> None:
    """Forks ranks as asked on stdin; leaves each one's exit code in the program's folder."""
    sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]
    import diffmoe.training.loop  # noqa: F401  the point of all this
    from diffmoe.training.engine import import_deepspeed

    import_deepspeed()
    module, function = main.split(":")
    function = getattr(importlib.import_module(module), function)
    children: dict[int, Path] = {}
    while True:
        ready, _, _ = select.select([sys.stdin], [], [], 0.02)
        while children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            children.pop(pid).write_text(f"{os.waitstatus_to_exitcode(status)}\n")
        if not ready:
            continue
        line = sys.stdin.readline()
        if not line:
            return
        request = json.loads(line)
        pids = []
        for rank in range(request["world"]):
            pid = os.fork()
            if pid == 0:
                _be_rank(rank, request, function)
            pids.append(pid)
            children[pid] = Path(request["folder"]) / f"code{rank}"
        print(json.dumps(pids), flush=True)


def _be_rank(rank: int, request: dict, function: Callable[[list[str]], int]) -> NoReturn:
    os.setsid()
    folder = Path(request["folder"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}{rank}", os.O_WRONLY | os.O_CREAT), number)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(request["world"]),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(request["world"]),
        DIFFMOE_STORE=str(folder / "store"),
    )
    code = 1
    try:
        code = function(request["arguments"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


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
    """Each command line in turn on the same ``world`` processes: results [case][rank].  ``timeout``
    is for all.
    """
    with tempfile.TemporaryDirectory(prefix="diffmoe-cases-") as folder:
        (Path(folder) / "cases.json").write_text(
            json.dumps([list(map(str, case)) for case in cases])
        )
        with Program(
            [sys.executable, str(Path(__file__).resolve()), folder], world, env
        ) as program:
            ends = program.wait(timeout)
            assert all(end.returncode == 0 for end in ends), ends
        return [
            [
                Result(**json.loads((Path(folder) / f"{case}.{rank}.json").read_text()))
                for rank in range(world)
            ]
            for case in range(len(cases))
        ]


def _serve_cases(folder: Path) -> None:
    sys.path.insert(0, str(REPOSITORY))
    import run

    rank = os.environ["RANK"]
    for number, case in enumerate(json.loads((folder / "cases.json").read_text())):
        os.environ["DIFFMOE_STORE"] = str(folder / f"store{number}")
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = run.main(case)
            except BaseException:
                traceback.print_exc()
                code = 1
        torch = sys.modules.get("torch")
        if torch is not None and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        (folder / f"{number}.{rank}.json").write_text(
            json.dumps(asdict(Result(code, out.getvalue(), err.getvalue())))
        )


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


if __name__ == "__main__" and sys.argv[1] == "nursery":
    _serve_nursery(sys.argv[2])
elif __name__ == "__main__":
    _serve_cases(Path(sys.argv[1]))
    # Every case's own exit code is on disk.  Threads of dozens of destroyed process groups may
    # abort an ordinary exit.
    os._exit(0)
