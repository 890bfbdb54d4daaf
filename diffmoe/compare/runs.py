"""The runs of a comparison, started as their users would: a process of ``train`` in a folder of its
own, then of ``evaluate``, and of the judge.

A run that is killed resumes from its newest checkpoint when the same command is given again; one
that is finished is left alone.  What it says goes to ``compare.log`` in its folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import yaml

from diffmoe.checkpoints.manifest import MANIFEST
from diffmoe.checkpoints.reader import complete_folders, step_folder, step_of
from diffmoe.code_version import ROOT, digest
from diffmoe.compare.plan import Comparison, PlannedRun, differences
from diffmoe.config import ScoreConfig, config_from_tree, config_to_tree
from diffmoe.deepspeed_json import merge_deepspeed, read_deepspeed
from diffmoe.errors import UserError, stop_requests
from diffmoe.files import write_text, writing
from diffmoe.layout import resolve_layout
from diffmoe.strict_yaml import read_yaml
from diffmoe.training.resume import engine_changes
from diffmoe.training.validation import read_validations

SETTINGS, LOG = "compare.yaml", "compare.log"
_PR_SET_PDEATHSIG = 1  # of Linux's include/uapi/linux/prctl.h
_LOOK_S = 0.1
_OF_RANKS = (
    "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT DIFFMOE_STORE".split()
)


def check(run: PlannedRun, comparison: Comparison) -> None:
    """UserError for a run that was begun with other settings."""
    path, ranks = run.folder / SETTINGS, comparison.ranks
    if not path.exists():
        return
    changed = differences(config_from_tree(read_yaml(path)), run.config)
    layout = run.folder / "layout.json"
    before = json.loads(layout.read_text())["ranks"] if layout.exists() else ranks
    changed += [f"ranks ({before}) is now {ranks}"] if before != ranks else []
    tree = read_deepspeed(comparison.deepspeed or None)
    merged = merge_deepspeed(tree, run.config, resolve_layout(run.config, ranks))
    changed += [f"deepspeed: {change}" for change in engine_changes(run.folder, merged)]
    if changed:
        raise UserError(
            f"run {run.name} was begun with other settings: {'; '.join(changed)}; choose another "
            f"folder, or remove {run.folder}"
        )


def _begin(run: PlannedRun) -> None:
    """Writes the run's settings into its folder."""
    with writing(f"folder ({run.folder})"):
        run.folder.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(config_to_tree(run.config), sort_keys=False)
        write_text(run.folder / SETTINGS, text)


def is_trained(run: PlannedRun) -> bool:
    """Whether the last step's checkpoint and validation loss are there."""
    steps = run.config.train.steps
    last = step_folder(run.folder / "checkpoints", steps) / MANIFEST
    measured = read_validations(run.folder)
    return last.is_file() and bool(measured) and measured[-1]["step"] == steps


def state(run: PlannedRun, comparison: Comparison) -> str:
    """``finished``, ``trained`` where scores are missing, ``step 40 of 120``, or ``not begun``."""
    if is_trained(run):
        return "trained" if next_command(run, comparison) else "finished"
    checkpoints = complete_folders(run.folder / "checkpoints")
    if not checkpoints and not (run.folder / SETTINGS).exists():
        return "not begun"
    step = step_of(checkpoints[-1]) if checkpoints else 0
    return f"step {step} of {run.config.train.steps}"


def next_command(run: PlannedRun, comparison: Comparison) -> list[str] | None:
    """What has to be started next for this run; None: it is finished."""
    folder, score = run.folder, run.config.score
    if not is_trained(run):
        arguments = ["train", "--config", str(folder / SETTINGS)]
        if comparison.deepspeed:
            arguments += ["--deepspeed_config", comparison.deepspeed]
        return _program(comparison.ranks, arguments)
    if score.reference and not card_of(run).exists():
        arguments = ["evaluate", "--checkpoint", str(folder), *_scoring(score, comparison)]
        arguments += ["--count", str(score.count), "--out", str(card_of(run).parent)]
        return _program(comparison.ranks, [*arguments, "--no-samples"])
    verdict = verdict_of(run, comparison)
    if comparison.judge and not verdict.exists():
        samples = verdict.with_name("samples.npz")
        if not samples.exists():
            arguments = ["sample", "--checkpoint", str(folder), "--count", str(score.count)]
            return _program(comparison.ranks, [*arguments, "--out", str(samples.with_suffix(""))])
        module, *options = shlex.split(comparison.judge)
        return [sys.executable, "-m", module, str(samples), *options, "--json", str(verdict)]
    return None


def card_of(run: PlannedRun) -> Path:
    """The card of the run's scores: other scores, asked for later, have another folder."""
    return run.folder / f"scores_{_digest(asdict(run.config.score))}" / "card.json"


def verdict_of(run: PlannedRun, comparison: Comparison) -> Path:
    """What the judge says; another judge, or of more images, has another folder."""
    return run.folder / f"judged_{_digest([comparison.judge, run.config.score.count])}/judge.json"


def _digest(said: object) -> str:
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:8]


def _scoring(score: ScoreConfig, comparison: Comparison) -> list[str]:
    """The reference is measured by the first run that is scored, and kept for all."""
    said = _digest([score.reference, score.extractor, score.vae])
    kept = Path(comparison.folder) / f"reference_{said}.npz"
    save = [] if kept.exists() else ["--save-reference", str(kept)]
    words = ["--reference", score.reference if save else str(kept), *save]
    return [*words, "--extractor", score.extractor, *(["--vae", score.vae] if score.vae else [])]


def _program(ranks: int, arguments: list[str]) -> list[str]:
    if ranks == 1:
        return [sys.executable, "-m", "diffmoe", *arguments]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*torchrun, "--nproc-per-node", str(ranks), "-m", "diffmoe", *arguments]


def codes(run: PlannedRun) -> set[str]:
    """Digests of the code that the run's processes were."""
    log = run.folder / LOG
    text = log.read_text(errors="replace") if log.exists() else ""
    return set(re.findall(r"^\$ .*  # code (\w+)$", text, re.MULTILINE))


@dataclass
class _Started:
    """A process of a run; ``log_at``: where its words begin in the log."""

    run: PlannedRun
    command: list[str]
    process: subprocess.Popen
    log_at: int


def carry_out(
    runs: Sequence[PlannedRun], comparison: Comparison, jobs: int, say: Callable[[str], None]
) -> list[str]:
    """Brings ``runs`` to their ends, ``jobs`` at a time: what did not end well, a line each.  A
    signal that asks for an end is handed on, and those runs save and end.  UserError, before
    anything is started, for a run that was begun with other settings.
    """
    for run in runs:
        check(run, comparison)
    waiting = deque(run for run in runs if next_command(run, comparison))
    left = len(waiting)
    say(f"{len(runs) - left} of {len(runs)} runs are finished, {left} to go, {jobs} at a time")
    active: list[_Started] = []
    troubles: list[str] = []
    with stop_requests() as stops:
        handed_on = 0
        try:
            while waiting or active:
                while waiting and len(active) < jobs and not stops:
                    run = waiting.popleft()
                    say(f"{run.name}: {state(run, comparison)}, log in {run.folder / LOG}")
                    active.append(_start(run, comparison, jobs))
                if stops and not active:
                    break
                if len(stops) > handed_on:
                    handed_on = len(stops)
                    say("asks the runs to save and end")
                    for started in active:
                        started.process.send_signal(signal.SIGTERM)
                for started in [s for s in active if s.process.poll() is not None]:
                    active.remove(started)
                    if trouble := _trouble(started, comparison, bool(stops)):
                        troubles.append(trouble)
                    elif not stops and next_command(started.run, comparison):
                        active.append(_start(started.run, comparison, jobs))
                    if started.run not in [s.run for s in active]:
                        say(f"{started.run.name}: {state(started.run, comparison)}")
                time.sleep(_LOOK_S)
        finally:
            for started in active:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(started.process.pid, signal.SIGKILL)
                started.process.wait()
    if stops:
        troubles.append("stopped cleanly; the same command goes on")
    return troubles


def _start(run: PlannedRun, comparison: Comparison, jobs: int) -> _Started:
    command = next_command(run, comparison)
    assert command is not None
    _begin(run)
    log = (run.folder / LOG).open("ab")
    with log:
        log.write(f"$ {' '.join(command)}  # code {digest(ROOT)}\n".encode())
        log.flush()
        return _Started(run, command, _spawn(command, log, jobs * comparison.ranks), log.tell())


def _spawn(command: list[str], log: IO[bytes], ranks: int) -> subprocess.Popen:
    """``ranks``: at the same time on this machine, who share its cores."""
    environ = {name: value for name, value in os.environ.items() if name not in _OF_RANKS}
    path = os.pathsep.join(filter(None, [str(ROOT), environ.get("PYTHONPATH")]))
    cores = len(os.sched_getaffinity(0))
    environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // ranks)))
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env={**environ, "PYTHONPATH": path},
        start_new_session=True,  # a Ctrl-C comes once, from here
        preexec_fn=_end_with_parent,
    )


def _end_with_parent() -> None:
    """Killed comparisons leave no run in the next one's way; they save before they go."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _trouble(started: _Started, comparison: Comparison, stopping: bool) -> str | None:
    """What to say of a process that has ended and did not do its work."""
    code, run = started.process.returncode, started.run
    if stopping or (code == 0 and next_command(run, comparison) != started.command):
        return None
    with (run.folder / LOG).open("rb") as log:
        log.seek(started.log_at)
        lines = log.read().decode(errors="replace").strip().splitlines() or ["no output"]
    reason = next((line for line in lines if line.startswith("error:")), lines[-1])
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return f"{run.name} {how}: {reason} ({run.folder / LOG})"
