"""What the job scripts ask for: a folder for the job before it starts, and after it has stopped
whether to start it again.

    python -m launcher job prepare --config C.yaml --ranks N [--deepspeed_config D.json]
    [section.field=value ...] python -m launcher job after FOLDER STATUS [--out OUT]

A training job's folder is ``<run.folder>/jobs/<job's number>``: the code and the resolved
configuration that it runs from (a requeued job takes the same ones, whatever became of the working
tree), the commit, a log for each node.  No torch here.
"""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

from diffmoe.code_version import commit
from diffmoe.errors import UserError
from diffmoe.files import write_text, writing
from launcher.command_line import Parser

# The exit code that asks the job's script for a requeue (EX_TEMPFAIL of sysexits.h); 2 is bad
# input, as everywhere.
START_AGAIN, BAD_INPUT = 75, 2
# So many starts in a row may end without progress before the job is given up.
FRUITLESS_STARTS = 3
CODE = ("run.py", "diffmoe", "launcher", "configs", "ds_configs", "scripts", "pyproject.toml")
_STEP_FOLDER = re.compile(r"step_(\d{8})")
_STATE = "starts.json"


class Verdict(NamedTuple):
    """What becomes of a job whose ranks have ended: its exit code, and a line for its log."""

    code: int
    text: str


def prepare(
    config_path: str,
    deepspeed_path: str | None,
    ranks: int,
    overrides: list[str],
    job: str,
    root: Path,
) -> Path:
    """Makes (or finds, after a requeue) the folder of training job ``job``.  ``root`` is the
    repository.

    Raises:
        UserError: what ``run.py --dry-run`` would say about this configuration on ``ranks`` ranks.
    """
    import yaml

    from diffmoe.config import check_training, config_to_tree, load_config
    from diffmoe.data.fit import check_local_index
    from diffmoe.deepspeed_json import merge_deepspeed, read_deepspeed
    from diffmoe.layout import resolve_layout

    for text in overrides:
        begun = Path(text.removeprefix("run.folder=")).absolute() / "jobs" / job
        if text.startswith("run.folder=") and begun.is_dir():
            # A requeue: whatever has become of the files that it was made from.
            config = load_config(str(begun / "config.yaml"), [])
            tree = read_deepspeed(str(begun / "deepspeed.json"))
            merge_deepspeed(tree, config, resolve_layout(config, ranks))
            return begun
    config = load_config(config_path, overrides)
    check_training(config)
    tree = read_deepspeed(deepspeed_path)
    merge_deepspeed(tree, config, resolve_layout(config, ranks))
    run = Path(config.run.folder).absolute()
    folder, partial = run / "jobs" / job, run / "jobs" / f".{job}.partial"
    if folder.is_dir():
        return folder
    check_local_index(config)
    with writing(f"run.folder ({config.run.folder})"):
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "logs").mkdir(parents=True)
        for name in CODE:
            _copy(root / name, partial / "code" / name)
        (partial / "commit.txt").write_text(commit(root) + "\n")
        (partial / "config.yaml").write_text(
            yaml.safe_dump(config_to_tree(config), sort_keys=False)
        )
        (partial / "deepspeed.json").write_text(json.dumps(tree, indent=1) + "\n")
        _write_state(partial, newest_step(run), 0)
        partial.rename(folder)
    return folder


def newest_step(run: Path) -> int:
    """The step of the newest complete checkpoint in a run folder; -1 when there is none."""
    steps = [
        int(match[1])
        for path in run.glob("checkpoints/step_*/checkpoint.json")
        if (match := _STEP_FOLDER.fullmatch(path.parent.name))
    ]
    return max(steps, default=-1)


def after_training(folder: Path, status: int) -> Verdict:
    """The verdict on a training job: has the run reached its last step?"""
    import yaml

    last = yaml.safe_load((folder / "config.yaml").read_text())["train"]["steps"]
    step = newest_step(folder.parent.parent)
    where = f"step {max(step, 0)} of {last}"
    return _verdict(folder, status, step, status == 0 and step >= last, where)


def after_writing(folder: Path, status: int, out: Path) -> Verdict:
    """The verdict on a job that fills a folder and resumes by what is there."""
    files = sum(path.is_file() for path in out.rglob("*"))
    progress = files + max(0, newest_step(out))  # a training run's files are soon as many as ever
    where = f"{files} files in {out}"
    return _verdict(folder, status, progress, finished=status == 0, where=where)


def _verdict(folder: Path, status: int, progress: int, finished: bool, where: str) -> Verdict:
    if finished:
        return Verdict(0, f"finished ({where})")
    if status == BAD_INPUT:
        return Verdict(BAD_INPUT, f"refused ({where}): its input is wrong, see the logs")
    try:
        state = json.loads((folder / _STATE).read_text())
    except (OSError, ValueError):  # none yet; or a full disk cut it
        state = {"progress": -1, "fruitless": 0}
    fruitless = 0 if progress > state["progress"] else state["fruitless"] + 1
    _write_state(folder, progress, fruitless)
    if fruitless >= FRUITLESS_STARTS:
        return Verdict(
            status or 1,
            f"given up (status {status}, {where}): {fruitless} starts in a row brought no progress",
        )
    return Verdict(START_AGAIN, f"not finished (status {status}, {where}): to be started again")


def _write_state(folder: Path, progress: int, fruitless: int) -> None:
    state = {"progress": progress, "fruitless": fruitless}
    with contextlib.suppress(OSError):  # a full disk must not end the job for good
        write_text(folder / _STATE, json.dumps(state) + "\n")


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)


def main(arguments: list[str]) -> int:
    """``prepare`` prints the job's folder; ``after`` prints the verdict and returns its code."""
    subcommands = {"prepare": _main_prepare, "after": _main_after}
    if arguments[:1] and arguments[0] in subcommands:
        return subcommands[arguments[0]](arguments[1:])
    print(f"usage: python -m launcher job prepare|after ...\n\n{__doc__}")
    print("example:\n  python -m launcher job after runs/mine/jobs/7 143")
    return 0 if arguments[:1] in (["-h"], ["--help"]) else BAD_INPUT


def _main_prepare(arguments: list[str]) -> int:
    parser = Parser(
        "job prepare",
        "Makes the folder that a training job runs from, and prints it.",
        "SLURM_JOB_ID=7 python -m launcher job prepare --config configs/demo.yaml --ranks 2",
    )
    add = parser.add_argument
    add("--config", required=True, help="YAML file, see configs/")
    add("--deepspeed_config", help="DeepSpeed JSON, see ds_configs/ (default: ZeRO 1, fp32)")
    add("--ranks", type=int, required=True, help="ranks that the job will have")
    add("overrides", nargs="*", metavar="section.field=value")
    options = parser.parse_intermixed_args(arguments)
    if options.ranks < 1:
        raise UserError(f"--ranks ({options.ranks}) must be at least 1")
    job = os.environ.get("SLURM_JOB_ID")
    if not job:
        raise UserError("SLURM_JOB_ID is unset: job prepare is for a job's script")
    configs = (options.config, options.deepspeed_config)
    print(prepare(*configs, options.ranks, options.overrides, job, Path.cwd()))
    return 0


def _main_after(arguments: list[str]) -> int:
    parser = Parser(
        "job after",
        f"What becomes of a job whose ranks have ended; exit code {START_AGAIN}: start it again.",
        "python -m launcher job after runs/mine/jobs/7 143",
    )
    parser.add_argument("folder", type=Path, help="the job's folder")
    parser.add_argument("status", type=int, help="srun's exit code")
    parser.add_argument("--out", type=Path, help="not a training job: the folder that it fills")
    options = parser.parse_args(arguments)
    folder, status, out = options.folder, options.status, options.out
    if not folder.is_dir():
        raise UserError(f"folder ({folder}) does not exist")
    if out is None and not (folder / "config.yaml").is_file():
        raise UserError(
            f"folder ({folder}) has no config.yaml: it is not a training job's (of another: "
            "--out OUT)"
        )
    verdict = after_writing(folder, status, out) if out else after_training(folder, status)
    print(verdict.text)
    return verdict.code
