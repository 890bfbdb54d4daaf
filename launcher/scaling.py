"""``launcher scaling``: measures real training steps on 1 ... N ranks or nodes, strong and weak,
with several layouts and repeats.

Every run is ``run.py profile`` under srun (inside an allocation) or torchrun; repeats are
interleaved, so that a slow minute of the machine hits all layouts alike.  This process needs no
torch.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from diffmoe import gpus
from diffmoe.code_version import commit
from diffmoe.config import Config, load_config, override
from diffmoe.deepspeed_json import check_deepspeed, merge_deepspeed, read_deepspeed
from diffmoe.deepspeed_keys import MICS
from diffmoe.errors import UserError
from diffmoe.layout import resolve_layout
from launcher.command_line import Parser, check_above_0
from launcher.scaling_report import write_report

_EXAMPLE = """
python -m launcher scaling --config configs/demo.yaml --ranks 1,2 --synthetic parallel.ep=1 \\
    --out runs/scaling
sbatch scripts/slurm/scaling.sh        # the same inside an allocation, by nodes
"""
_ROOT = Path(__file__).resolve().parent.parent
STARTS = ("srun", "torchrun")


@dataclass(frozen=True)
class Trial:
    """One run to measure: ``ranks`` on ``nodes``, ``batch`` samples a step.  ``shard``: ranks that
    share a copy of the optimizer's state (0: as the JSON says); ``overlap``: parallel.overlap
    (empty: the configuration's).
    """

    mode: str
    ranks: int
    nodes: int
    ep: int
    zero: int
    batch: int
    repeat: int
    shard: int = 0
    overlap: str = ""

    @property
    def label(self) -> str:
        shard = f" in groups of {self.shard}" if self.shard else ""
        overlap = f", overlap {self.overlap}" if self.overlap else ""
        return (
            f"{self.mode}, {self.ranks} ranks on {self.nodes} nodes, EP {self.ep}, ZeRO "
            f"{self.zero}{shard}{overlap}, repeat {self.repeat}"
        )


def main(arguments: list[str], environ: Mapping[str, str] = os.environ) -> int:
    """Returns 1 when a run failed (its line says why).  UserError for bad input."""
    options = _parse(arguments)
    config = load_config(options.config, options.overrides)
    tree = read_deepspeed(options.deepspeed_config)
    check_deepspeed(tree, config)
    start = _start(options, environ)
    per_node = options.per_node or _ranks_per_node(environ)
    sizes = _sizes(options, environ, per_node, start)
    pool, trials, left_out = plan_trials(config, tree, options, sizes)
    for text in left_out:
        print(f"left out: {text}", flush=True)
    if not trials:
        raise UserError("no layout of --ranks, --ep and --zero divides evenly; nothing to measure")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        lines = (options.out / "runs.jsonl").open("x")
    except OSError as error:
        reason = f"cannot be written: {error}"
        if (options.out / "runs.jsonl").exists():
            reason = "holds the runs.jsonl of another measurement; choose another folder"
        raise UserError(f"--out ({options.out}) {reason}") from None
    records = []
    with lines:
        for number, trial in enumerate(trials, 1):
            origin = {"start": start, "commit": commit(_ROOT)}
            record = {**asdict(trial), **origin, **_run(trial, options, start, pool)}
            records.append(record)
            lines.write(json.dumps(record) + "\n")
            lines.flush()
            print(f"{number}/{len(trials)} {trial.label}: {_outcome(record)}", flush=True)
    print("\n" + write_report(records, options.out), flush=True)
    return 1 if any("error" in record for record in records) else 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(
        "scaling",
        "Measures a training step on 1 ... N ranks or nodes: runs.jsonl, table.md, efficiency.png, "
        "split.png.",
        _EXAMPLE,
    )
    add = parser.add_argument
    add("--config", required=True, help="YAML file, see configs/")
    add("--deepspeed_config", help="DeepSpeed JSON, see ds_configs/ (default: ZeRO 1, fp32)")
    add("--out", required=True, type=Path, help="folder for what is written")
    ranks = "ranks of each run: 1,2,4 (default: 1, 2, 4 ... GPUs or cores)"
    add("--ranks", type=_numbers, help=ranks)
    nodes = "instead of --ranks: nodes of each run (default in an allocation: 1, 2, 4 ... all)"
    add("--nodes", type=_numbers, help=nodes)
    per_node = "ranks on a node (default: the allocation's GPUs or tasks a node)"
    add("--per-node", type=int, help=per_node)
    mode = (
        "strong: train.batch stays; weak: it is that of the smallest run, and grows with the ranks "
        "(default: both)"
    )
    add("--mode", default="strong,weak", help=mode)
    add("--ep", type=_numbers, help="expert-parallel sizes (default: the configuration's)")
    add("--zero", type=_numbers, help="ZeRO stages (default: the JSON's)")
    shard = "ranks that share a copy of the optimizer's state, 0 for the JSON's (default: 0)"
    add("--shard", type=_numbers, default=[0], help=shard)
    add("--overlap", default="", help="none,halves (default: the configuration's parallel.overlap)")
    add("--steps", type=int, default=10, help="timed steps of a run (default 10)")
    add("--warmup", type=int, default=3, help="steps before them (default 3)")
    add("--repeats", type=int, default=3, help="runs of each kind, interleaved (default 3)")
    add("--synthetic", action="store_true", help="made-up samples in place of data.shards")
    started = "auto: srun in an allocation, else torchrun"
    add("--start", choices=("auto", *STARTS), default="auto", help=started)
    limit = "seconds that one run may take (default 600)"
    add("--timeout", type=float, default=600.0, help=limit)
    add("overrides", nargs="*", metavar="section.field=value")
    options = parser.parse_intermixed_args(arguments)
    check_above_0(options, "per_node", "steps", "repeats", "timeout")
    if options.warmup < 0:
        raise UserError(f"--warmup ({options.warmup}) must be at least 0")
    options.mode = options.mode.split(",")
    if not set(options.mode) <= {"strong", "weak"}:
        raise UserError(f"--mode ({','.join(options.mode)}) must be strong, weak or strong,weak")
    if options.ranks and options.nodes:
        raise UserError(
            f"--ranks ({options.ranks}) and --nodes ({options.nodes}) say the same thing; give one"
        )
    if options.zero and not set(options.zero) <= {0, 1, 2, 3}:
        raise UserError(f"--zero ({options.zero}) must be of 0, 1, 2, 3")
    return options


def _numbers(text: str) -> list[int]:
    if not all(part.isdigit() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} must be numbers such as 1,2,4")
    return sorted({int(part) for part in text.split(",")})


# ------------------------------------------------------------------------------------------------
# what to run


def _start(options: argparse.Namespace, environ: Mapping[str, str]) -> str:
    inside = "SLURM_JOB_ID" in environ
    start = options.start if options.start != "auto" else ("srun" if inside else "torchrun")
    if start == "srun" and not inside:
        raise UserError("--start (srun) needs an allocation: SLURM_JOB_ID is unset")
    return start


def _ranks_per_node(environ: Mapping[str, str]) -> int:
    if "SLURM_JOB_ID" not in environ:
        try:
            return len(gpus.query() or ()) or os.cpu_count() or 1
        except UserError:  # nvidia-smi without a GPU
            return os.cpu_count() or 1
    for name in ("SLURM_GPUS_PER_NODE", "SLURM_NTASKS_PER_NODE"):
        number = environ.get(name, "").rpartition(":")[2]  # h200:8
        if number.isdigit() and int(number) > 0:
            return int(number)
    return 1


def _sizes(
    options: argparse.Namespace, environ: Mapping[str, str], per_node: int, start: str
) -> list[tuple[int, int]]:
    """(ranks, nodes) of the runs."""
    available = int(environ.get("SLURM_JOB_NUM_NODES", "1")) if start == "srun" else None
    if options.ranks:
        sizes = [(n, -(-n // per_node) if start == "srun" else 1) for n in options.ranks]
    elif options.nodes or start == "srun":
        sizes = [(nodes * per_node, nodes) for nodes in options.nodes or _doubling(available or 1)]
    else:
        sizes = [(ranks, 1) for ranks in _doubling(per_node)]
    for ranks, nodes in sizes:
        if ranks < 1:
            raise UserError(f"--ranks ({ranks}) must be at least 1")
        if available is not None and nodes > available:
            raise UserError(
                f"{ranks} ranks need {nodes} nodes of {per_node}; the allocation has {available}"
            )
        if nodes > 1 and available is None:
            raise UserError(f"--nodes ({nodes}) needs srun in an allocation")
        if ranks % nodes:
            raise UserError(f"--ranks ({ranks}) must be divisible by the {nodes} nodes they need")
    return sizes


def _doubling(most: int) -> list[int]:
    return [n for n in (2**i for i in range(20)) if n < most] + [most]


def plan_trials(
    config: Config, tree: dict, options: argparse.Namespace, sizes: list[tuple[int, int]]
) -> tuple[int | None, list[Trial], list[str]]:
    """(the pool in samples, trials in the order to run them, what does not divide and is left out).

    The pool is that of the first trial: a word would mean another model in each.  None: dense.
    """
    zero_block, smallest = tree.get("zero_optimization") or {}, sizes[0][0]
    kinds = itertools.product(
        options.mode,
        sizes,
        options.ep or [config.parallel.ep],
        options.zero or [zero_block.get("stage", 0)],
        options.shard,
        options.overlap.split(","),
    )
    pool, trials, left_out = None, [], []
    for mode, (ranks, nodes), ep, zero, shard, overlap in kinds:
        batch = config.train.batch * (ranks if mode == "weak" else smallest)
        trial = Trial(mode, ranks, nodes, ep, zero, batch // smallest, 1, shard, overlap)
        block = {**zero_block, "stage": zero, **({MICS: shard} if shard else {})}
        try:
            if batch % smallest:
                raise UserError(
                    f"train.batch ({config.train.batch}) x ranks ({ranks}) must be divisible by "
                    f"those of the smallest run ({smallest})"
                )
            sized = override(config, _overrides(trial, pool))
            layout = resolve_layout(sized, ranks)
            merge_deepspeed({**tree, "zero_optimization": block}, sized, layout)
        except UserError as error:
            left_out.append(f"{trial.label.rpartition(',')[0]}: {error}")
            continue
        trials.append(trial)
        pool = None if config.model.family == "dense" else layout.pool
    repeats = range(1, options.repeats + 1)
    return pool, [replace(trial, repeat=repeat) for repeat in repeats for trial in trials], left_out


def _overrides(trial: Trial, pool: int | None) -> list[str]:
    words = [f"train.batch={trial.batch}", f"parallel.ep={trial.ep}"]
    words += [f"parallel.overlap={trial.overlap}"] if trial.overlap else []
    return words if pool is None else [*words, f"moe.pool={pool}"]


# -------------------------------------------------------------------------------------------------
# running


def command_of(
    trial: Trial, options: argparse.Namespace, start: str, pool: int | None, record: Path
) -> list[str]:
    """The command line of one run."""
    if start == "srun":
        command = [
            "srun",
            f"--nodes={trial.nodes}",
            f"--ntasks={trial.ranks}",
            f"--ntasks-per-node={trial.ranks // trial.nodes}",
            f"--cpus-per-task={os.environ.get('SLURM_CPUS_PER_TASK', '1')}",
            "--distribution=block:block",
            f"--cpu-bind={os.environ.get('DIFFMOE_CPU_BIND', 'none')}",
            "--kill-on-bad-exit=1",
            sys.executable,
        ]
    else:
        torchrun = str(Path(sys.executable).parent / "torchrun")
        command = [torchrun, "--standalone", "--nproc-per-node", str(trial.ranks)]
    command += [f"{_ROOT}/run.py", "profile", "--config", options.config]
    command += ["--zero", str(trial.zero), "--steps", str(options.steps)]
    command += ["--shard", str(trial.shard)] if trial.shard else []
    command += ["--warmup", str(options.warmup), "--json", str(record)]
    if options.deepspeed_config:
        command += ["--deepspeed_config", options.deepspeed_config]
    command += ["--synthetic"] if options.synthetic else []
    return [*command, *options.overrides, *_overrides(trial, pool)]


def _run(trial: Trial, options: argparse.Namespace, start: str, pool: int | None) -> dict:
    """The run's own record, or ``error`` and how it ended."""
    with tempfile.TemporaryDirectory(prefix=".run-", dir=options.out) as folder:
        record = Path(folder).absolute() / "record.json"
        command = command_of(trial, options, start, pool, record)
        began = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        try:
            code, said = _execute(command, options.timeout)
        except OSError as error:
            return {"error": f"{command[0]} cannot be started: {error}", "when": began}
        if code == 0 and record.exists():
            return json.loads(record.read_text())
        lines = said.strip().splitlines() or ["no output"]
        reason = next((line for line in lines if line.startswith("error:")), lines[-1])
        ending = f"no end after {options.timeout:g} s" if code is None else f"exit code {code}"
        return {"error": f"{ending}: {reason}", "when": began}


def _execute(command: list[str], timeout: float) -> tuple[int | None, str]:
    """(exit code, or None when it had to be killed; its output)."""
    # torchrun gives several ranks a thread each, and a single one all cores.
    same_threads = {"OMP_NUM_THREADS": "1", **os.environ}
    process = subprocess.Popen(
        command,
        env=same_threads,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=_ROOT,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=timeout)
        return process.returncode, said
    except BaseException as error:  # a Ctrl-C too must leave no rank behind
        os.killpg(process.pid, signal.SIGTERM)
        try:
            said, _ = process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            said, _ = process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            return None, said
        raise


def _outcome(record: dict) -> str:
    if "error" in record:
        return record["error"]
    speed = record["batch"] / record["step_s"]
    return f"{1e3 * record['step_s']:.1f} ms a step, {speed:.1f} images/s"
