"""A real Slurm of virtual nodes on this machine for tests, and the jobs that they submit."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from programs import REPOSITORY, environment

_SCRIPTS = REPOSITORY / "scripts/slurm"
_TOOLS = ("slurmctld", "slurmd", "sbatch", "munged")
_ENDED = {"COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY"}


def missing_tools() -> list[str]:
    """What a virtual cluster needs and this machine lacks."""
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    return [tool for tool in _TOOLS if shutil.which(tool, path=path) is None]


class Cluster:
    """``nodes`` virtual nodes in ``folder``; a context manager that leaves nothing behind."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder, self.nodes = folder, nodes
        self.env = {
            name: value
            for name, value in environment().items()
            if not name.startswith(("SLURM_", "SBATCH_"))
        }

    def __enter__(self) -> Cluster:
        # Of a node that dies Slurm is told (kill_node): one that only answers late, on a busy
        # machine, is not to be given up.
        self._run(
            [_SCRIPTS / "virtual/up.sh", self.folder],
            NODES=str(self.nodes),
            PREFIX=f"n{os.getpid()}-",
            KILL_WAIT="30",
            SLURMD_TIMEOUT="600",
        )
        for name, value in re.findall(
            r'^export (\w+)="?([^"\n]*)"?$', (self.folder / "env.sh").read_text(), re.M
        ):
            self.env[name] = value
        self.names = self.env["VIRTUAL_SLURM_NODES"].split()
        # Where the machine's own environment is not .venv (a test run from elsewhere), the scripts
        # are told.
        self.env["DIFFMOE_VENV"] = sys.prefix
        return self

    def __exit__(self, *_: object) -> None:
        self._run([_SCRIPTS / "virtual/down.sh", self.folder])
        shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self, command: list[object], timeout: float = 300.0, **more: str) -> str:
        done = subprocess.run(
            [str(word) for word in command],
            env={**self.env, **more},
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )
        if done.returncode:
            raise RuntimeError(
                f"{command[0]} ended with {done.returncode}: {done.stdout}{done.stderr}"
            )
        return done.stdout

    def submit(
        self,
        script: str | Path,
        *arguments: object,
        options: tuple[str, ...] = (),
        log: Path,
        env: Mapping[str, str] | None = None,
    ) -> Job:
        """``sbatch`` of the script that users submit, with ``options`` of sbatch before it."""
        path = script if isinstance(script, Path) else _SCRIPTS / script
        number = self._run(
            ["sbatch", "--parsable", *options, f"--output={log}", path, *arguments], **(env or {})
        ).strip()
        return Job(self, number, log)

    def slurm(self, *command: object) -> str:
        return self._run(list(command))

    def kill_node(self, name: str) -> None:
        """The node loses power, and Slurm is told so (it would notice after SlurmdTimeout)."""
        self._run([_SCRIPTS / "virtual/node.sh", "kill", name, self.folder])
        self.slurm("scontrol", "update", f"nodename={name}", "state=down", "reason=killed")

    def cancel_everything(self) -> None:
        self.slurm("scancel", f"--user={os.getuid()}")

    def start_node(self, name: str) -> None:
        self._run([_SCRIPTS / "virtual/node.sh", "start", name, self.folder])

    def processes(self, name: str) -> list[int]:
        return [
            int(word)
            for word in self._run([_SCRIPTS / "virtual/node.sh", "pids", name, self.folder]).split()
        ]


class Job:
    """A submitted job.  Limits of time are for jobs that hang: no test depends on how fast this
    machine is.
    """

    def __init__(self, cluster: Cluster, number: str, log: Path) -> None:
        self.cluster, self.number, self.log = cluster, number, log
        self._pending = 0

    def show(self) -> dict[str, str]:
        """Slurm's fields about it."""
        text = self.cluster.slurm("scontrol", "-o", "show", "job", self.number)
        return dict(re.findall(r"(\w+)=(\S*)", text))

    @property
    def restarts(self) -> int:
        return int(self.show()["Restarts"])

    def wait(self, timeout: float = 900.0) -> str:
        """Its final state."""
        seen = 0

        def ended() -> bool:
            nonlocal seen
            seen = seen + 1 if self._hurry()["JobState"] in _ENDED else 0
            return seen >= 3  # an ended job may still become pending again

        self.wait_until(ended, "to end", timeout)
        return self.show()["JobState"]

    def wait_until(self, condition: Callable[[], bool], what: str, timeout: float = 900.0) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(
                    f"job {self.number} was to {what} within {timeout:g} s: "
                    f"{self.show()}\n{self.said()}"
                )
            time.sleep(0.1)

    def wait_for_start_after(self, restarts: int) -> None:
        """Until it runs again, having been started again more often than ``restarts`` times."""

        def started() -> bool:
            fields = self._hurry()
            return fields["JobState"] == "RUNNING" and int(fields["Restarts"]) > restarts

        self.wait_until(started, f"start again after {restarts} times")

    def _hurry(self) -> dict[str, str]:
        """:meth:`show`; a requeued job, which would wait out its credential's age, is told to
        start.
        """
        fields = self.show()
        self._pending = (
            self._pending + 1
            if fields["JobState"] == "PENDING" and fields["Restarts"] != "0"
            else 0
        )
        if self._pending >= 15:  # a second and a half: credentials are told apart by the second
            with contextlib.suppress(RuntimeError):  # it may have started by itself meanwhile
                self.cluster.slurm("scontrol", "update", f"jobid={self.number}", "StartTime=now")
        return fields

    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.is_file() else ""


def steps_done(run: Path) -> int:
    """The last step in metrics.jsonl; 0 before the first."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    try:
        return json.loads(lines[-1])["step"] if lines else 0
    except ValueError:  # being written
        return 0
