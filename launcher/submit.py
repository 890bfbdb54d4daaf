"""The verb ``submit``: a training job's script from a configuration, checked, kept in the run
folder, and submitted.

The script is what scripts/slurm/train_*.sh are, with this job's numbers: `sbatch
<run.folder>/submit.sh` submits it again.  No torch here.
"""

import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from diffmoe.errors import UserError
from launcher.command_line import Parser

# What Slurm reads as a time: minutes, [days-]hours:minutes:seconds and their shorter forms.
_TIME = re.compile(r"\d+(:\d{1,2}){0,2}|\d+-\d+(:\d{1,2}){0,2}")
_WORD = re.compile(r"[\w.,@:/+-]+")


@dataclass(frozen=True)
class Job:
    """A training job.  ``signal`` is in seconds before the time limit; ``extra`` are further
    options of sbatch.
    """

    config: str
    deepspeed_config: str
    name: str
    nodes: int
    gpus_per_node: int
    ranks_per_node: int
    cpus_per_rank: int
    time: str
    memory: str
    signal: int
    partition: str | None
    account: str | None
    extra: tuple[str, ...]
    overrides: tuple[str, ...]


def render(job: Job) -> str:
    """The job's script."""
    options = [
        f"--job-name={job.name}",
        f"--nodes={job.nodes}",
        f"--ntasks-per-node={job.ranks_per_node}",
        f"--gpus-per-node={job.gpus_per_node}",
        f"--cpus-per-task={job.cpus_per_rank}",
        f"--mem={job.memory}",
        f"--time={job.time}",
        f"--signal=B:USR1@{job.signal}",
        "--requeue",
        "--open-mode=append",
        "--output=%x-%j.out",
        *([f"--partition={job.partition}"] if job.partition else []),
        *([f"--account={job.account}"] if job.account else []),
        *job.extra,
    ]
    header = "\n".join(f"#SBATCH {option}" for option in options)
    words = "".join(f" \\\n  {shlex.quote(word)}" for word in job.overrides)
    return f"""#!/usr/bin/env bash
{header}
# Rendered by `python -m launcher submit`; submit it again from the repository's root, or with DIFFMOE_ROOT set to it.
set -euo pipefail
root=${{DIFFMOE_ROOT:-${{SLURM_SUBMIT_DIR:?is unset: start this with sbatch}}}}
source "$root/scripts/slurm/_common.sh"
export DIFFMOE_DEEPSPEED_CONFIG=${{DIFFMOE_DEEPSPEED_CONFIG:-{shlex.quote(job.deepspeed_config)}}}
train {shlex.quote(job.config)}{words} \\
  "$@"
"""


def check(job: Job) -> None:
    """Raises UserError for a field that Slurm would refuse or read as something else."""
    for name, least in (
        ("nodes", 1),
        ("gpus_per_node", 0),
        ("ranks_per_node", 1),
        ("cpus_per_rank", 1),
        ("signal", 1),
    ):
        if getattr(job, name) < least:
            raise UserError(
                f"--{name.replace('_', '-')} ({getattr(job, name)}) must be at least {least}"
            )
    if job.gpus_per_node not in (0, job.ranks_per_node):
        raise UserError(
            f"--ranks-per-node ({job.ranks_per_node}) must equal --gpus-per-node ({job.gpus_per_node}): one rank a GPU"
        )
    if not _TIME.fullmatch(job.time):
        raise UserError(
            f"--time ({job.time!r}) must be minutes, hours:minutes:seconds or days-hours[:minutes[:seconds]]"
        )
    if not re.fullmatch(r"\d+[KMGT]?", job.memory):
        raise UserError(
            f"--memory ({job.memory!r}) must be a number with K, M, G or T (0: the whole node's)"
        )
    for name in ("name", "partition", "account"):
        value = getattr(job, name)
        if value is not None and not _WORD.fullmatch(value):
            raise UserError(f"--{name} ({value!r}) must be one word of letters, digits and .,@:/+-")
    for option in job.extra:
        if not re.fullmatch(r"--[a-z][a-z-]*(=\S+)?", option):
            raise UserError(
                f"--sbatch ({option!r}) must be one long option of sbatch, such as --sbatch=--qos=high"
            )


def main(arguments: list[str]) -> int:
    """The verb ``submit``; returns the exit code (1: sbatch refused).  UserError for bad input."""
    options = _parser().parse_intermixed_args(arguments)
    root = Path.cwd()
    if not (root / "scripts/slurm/_common.sh").is_file():
        raise UserError(
            f"{root} has no scripts/slurm/_common.sh: submit from the repository's root"
        )
    from diffmoe.config import load_config
    from diffmoe.cost.hardware import choose, read_table
    from diffmoe.cost.hosts import hosts_of, spanning
    from diffmoe.cost.layouts import Cluster, evaluate, fewer_nodes, fixed_pool
    from diffmoe.deepspeed_json import merge_deepspeed, read_deepspeed
    from diffmoe.layout import resolve_layout

    config = load_config(options.config, options.overrides)
    ranks_per_node = (
        options.gpus_per_node or 1 if options.ranks_per_node is None else options.ranks_per_node
    )
    job = Job(
        options.config,
        options.deepspeed_config,
        options.name or Path(options.config).stem.replace("_", "-"),
        options.nodes,
        options.gpus_per_node,
        ranks_per_node,
        options.cpus_per_rank,
        options.time,
        options.memory,
        options.signal,
        options.partition,
        options.account,
        tuple(options.sbatch),
        (
            *(word for word in options.overrides if not word.startswith("run.folder=")),
            f"run.folder={config.run.folder}",
        ),
    )
    check(job)
    layout, tree = (
        resolve_layout(config, job.nodes * job.ranks_per_node),
        read_deepspeed(options.deepspeed_config),
    )
    merge_deepspeed(tree, config, layout)
    hardware = choose(read_table(None), options.gpu if job.gpus_per_node else "cpu")
    cluster = Cluster(job.nodes, job.ranks_per_node, hardware)
    notes = (
        spanning(config, layout, tree, hardware, hosts_of(layout.ranks, job.ranks_per_node)),
        fewer_nodes(
            fixed_pool(config, layout.ranks),
            tree,
            cluster,
            evaluate(config, tree, cluster).time.total,
        ),
    )
    for note in filter(None, notes):
        print(f"note: {note}", file=sys.stderr)
    script = render(job)
    if options.dry_run:
        print(script, end="")
        return 0
    if shutil.which("sbatch") is None:
        raise UserError(
            "sbatch is not on this machine's PATH: submit from a login node, or see the script with --dry-run"
        )
    path = Path(config.run.folder) / "submit.sh"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(script)
    except OSError as error:
        raise UserError(f"run.folder ({config.run.folder}) cannot be written: {error}") from error
    done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True)
    if done.returncode:
        print(f"error: sbatch refused {path}: {' '.join(done.stderr.split())}", file=sys.stderr)
        return 1
    number = done.stdout.strip().partition(";")[0]
    print(
        f"job {number}: {path}, {layout.ranks} ranks, log {job.name}-{number}.out, run folder {config.run.folder}"
    )
    return 0


def _parser() -> Parser:
    parser = Parser(
        "submit",
        "Renders a training job's Slurm script, checks configuration and layout, and submits it.",
        "python -m launcher submit --config configs/diffmoe_l_e16_flow.yaml --nodes 2 --partition gpu --time 24:00:00 "
        "--dry-run train.lr=2e-4",
    )
    parser.add_argument("--config", required=True, help="YAML file, see configs/")
    parser.add_argument(
        "--deepspeed_config",
        default="ds_configs/zero1_bf16.json",
        help="DeepSpeed JSON (default: %(default)s)",
    )
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument(
        "--gpus-per-node", type=int, default=8, help="0: a CPU cluster (default: %(default)s)"
    )
    parser.add_argument(
        "--ranks-per-node", type=int, help="without GPUs; with GPUs it is their number"
    )
    parser.add_argument(
        "--gpu",
        default="h100",
        help="of the hardware table, for the layout's price (default: h100)",
    )
    parser.add_argument("--cpus-per-rank", type=int, default=8, help="default: %(default)s")
    parser.add_argument(
        "--time",
        default="24:00:00",
        help="limit of one start; the job requeues itself (default: %(default)s)",
    )
    parser.add_argument(
        "--memory", default="0", help="of a node, such as 200G (default: 0, all of it)"
    )
    parser.add_argument(
        "--signal",
        type=int,
        default=120,
        help="seconds before the limit at which to save (default: %(default)s)",
    )
    parser.add_argument("--partition")
    parser.add_argument("--account")
    parser.add_argument("--name", help="job name (default: the configuration's)")
    parser.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="a further option, as --sbatch=--qos=high; repeatable",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the script and submit nothing"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    return parser
