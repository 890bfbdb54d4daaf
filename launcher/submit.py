"""``launcher submit``: a training job's script from a configuration, checked, kept in the run
folder, and submitted.

The script is what scripts/slurm/train_*.sh are, with this job's numbers: `sbatch
<run.folder>/submit.sh` submits it again.  No torch here.
"""

import argparse
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from diffmoe.errors import UserError
from diffmoe.files import writing
from launcher.command_line import Parser

# What Slurm reads as a time: minutes, [days-]hours:minutes:seconds and their shorter forms.
_TIME = r"\d+(:\d{1,2}){0,2}|\d+-\d+(:\d{1,2}){0,2}"
_WORD = r"[\w.,@:/+-]+"


def _render(job: argparse.Namespace, run_folder: str) -> str:
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
        *job.sbatch,
    ]
    header = "\n".join(f"#SBATCH {option}" for option in options)
    words = [word for word in job.overrides if not word.startswith("run.folder=")]
    words.append(f"run.folder={run_folder}")
    overrides = "".join(f" \\\n  {shlex.quote(word)}" for word in words)
    return f"""#!/usr/bin/env bash
{header}
# Rendered by `python -m launcher submit`; submit it again from the repository's root, or with
# DIFFMOE_ROOT set to it.
set -euo pipefail
root=${{DIFFMOE_ROOT:-${{SLURM_SUBMIT_DIR:?is unset: start this with sbatch}}}}
source "$root/scripts/slurm/_common.sh"
deepspeed_config={shlex.quote(job.deepspeed_config)}
export DIFFMOE_DEEPSPEED_CONFIG=${{DIFFMOE_DEEPSPEED_CONFIG:-$deepspeed_config}}
train {shlex.quote(job.config)}{overrides} \\
  "$@"
"""


def _check(job: argparse.Namespace) -> None:
    """Raises UserError for an option that Slurm would refuse or read as something else."""
    for name in ("nodes", "gpus_per_node", "ranks_per_node", "cpus_per_rank", "signal"):
        value, least = getattr(job, name), 0 if name == "gpus_per_node" else 1
        if value < least:
            raise UserError(f"--{name.replace('_', '-')} ({value}) must be at least {least}")
    if job.gpus_per_node not in (0, job.ranks_per_node):
        raise UserError(
            f"--ranks-per-node ({job.ranks_per_node}) must equal --gpus-per-node "
            f"({job.gpus_per_node}): one rank a GPU"
        )
    word = "one word of letters, digits and .,@:/+-"
    times = "minutes, hours:minutes:seconds or days-hours[:minutes[:seconds]]"
    for name, pattern, must in (
        ("time", _TIME, times),
        ("memory", r"\d+[KMGT]?", "a number with K, M, G or T (0: the whole node's)"),
        ("name", _WORD, word),
        ("partition", _WORD, word),
        ("account", _WORD, word),
    ):
        value = getattr(job, name)
        if value is not None and not re.fullmatch(pattern, value):
            raise UserError(f"--{name} ({value!r}) must be {must}")
    for option in job.sbatch:
        if not re.fullmatch(r"--[a-z][a-z-]*(=\S+)?", option):
            raise UserError(
                f"--sbatch ({option!r}) must be one long option of sbatch, such as "
                "--sbatch=--qos=high"
            )


def main(arguments: list[str]) -> int:
    """Returns the exit code (1: sbatch refused).  UserError for bad input."""
    job = _parse(arguments)
    root = Path.cwd()
    if not (root / "scripts/slurm/_common.sh").is_file():
        raise UserError(
            f"{root} has no scripts/slurm/_common.sh: submit from the repository's root"
        )
    from diffmoe.config import check_training, load_config
    from diffmoe.cost.extrapolation import fewer_nodes, hosts_of, spanning
    from diffmoe.cost.hardware import choose, read_table
    from diffmoe.cost.layouts import Cluster, evaluate, fixed_pool
    from diffmoe.data.fit import check_local_index
    from diffmoe.deepspeed_json import merge_deepspeed, read_deepspeed
    from diffmoe.layout import resolve_layout

    config = load_config(job.config, job.overrides)
    check_training(config)
    _check(job)
    layout = resolve_layout(config, job.nodes * job.ranks_per_node)
    tree = read_deepspeed(job.deepspeed_config)
    merge_deepspeed(tree, config, layout)
    check_local_index(config)
    hardware = choose(read_table(None), job.gpu if job.gpus_per_node else "cpu")
    cluster = Cluster(job.nodes, job.ranks_per_node, hardware)
    seconds = evaluate(config, tree, cluster).time.total
    notes = (
        spanning(config, layout, tree, hardware, hosts_of(layout.ranks, job.ranks_per_node)),
        fewer_nodes(fixed_pool(config, layout.ranks), tree, cluster, seconds),
    )
    for note in filter(None, notes):
        print(f"note: {note}", file=sys.stderr)
    script = _render(job, config.run.folder)
    if job.dry_run:
        print(script, end="")
        return 0
    if shutil.which("sbatch") is None:
        raise UserError(
            "sbatch is not on this machine's PATH: submit from a login node, or see the script "
            "with --dry-run"
        )
    path = Path(config.run.folder) / "submit.sh"
    with writing(f"run.folder ({config.run.folder})"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(script)
    done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True)
    if done.returncode:
        print(f"error: sbatch refused {path}: {' '.join(done.stderr.split())}", file=sys.stderr)
        return 1
    number = done.stdout.strip().partition(";")[0]
    print(
        f"job {number}: {path}, {layout.ranks} ranks, log {job.name}-{number}.out, run folder "
        f"{config.run.folder}"
    )
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(
        "submit",
        "Renders a training job's Slurm script, checks configuration and layout, and submits it.",
        "python -m launcher submit --config configs/demo.yaml --partition gpu --dry-run "
        "train.lr=2e-4",
    )
    default, add = "(default: %(default)s)", parser.add_argument
    bf16 = "ds_configs/zero1_bf16.json"
    add("--config", required=True, help="YAML file, see configs/")
    add("--deepspeed_config", default=bf16, help=f"DeepSpeed JSON {default}")
    add("--nodes", type=int, default=1, help="nodes of the job")
    add("--gpus-per-node", type=int, default=8, help=f"0: a CPU cluster {default}")
    add("--ranks-per-node", type=int, help="without GPUs; with GPUs it is their number")
    add("--gpu", default="h100", help=f"of the hardware table, for the layout's price {default}")
    add("--cpus-per-rank", type=int, default=8, help=default)
    limit = f"limit of one start; the job requeues itself {default}"
    add("--time", default="24:00:00", help=limit)
    add("--memory", default="0", help="of a node, such as 200G (default: 0, all of it)")
    before = f"seconds before the limit at which to save {default}"
    add("--signal", type=int, default=120, help=before)
    add("--partition")
    add("--account")
    add("--name", help="job name (default: the configuration's)")
    further = "a further option, as --sbatch=--qos=high; repeatable"
    add("--sbatch", action="append", default=[], metavar="OPTION", help=further)
    add("--dry-run", action="store_true", help="print the script and submit nothing")
    add("overrides", nargs="*", metavar="section.field=value")
    job = parser.parse_intermixed_args(arguments)
    job.name = job.name or Path(job.config).stem.replace("_", "-")
    if job.ranks_per_node is None:
        job.ranks_per_node = job.gpus_per_node or 1
    return job
