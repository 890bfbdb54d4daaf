"""``python -m launcher SUBCOMMAND …``: what happens around a run.  plan, submit and doctor need no
torch: a login node has none.

Subcommand ``x`` is ``main(arguments) -> exit code`` in ``launcher/x.py``, imported on demand.
"""

import importlib
import os
import sys

from diffmoe.errors import UserError, run_command

SUBCOMMANDS = {
    "doctor": "what is installed on this machine, what is wrong, and what to type",
    "plan": "whether a configuration fits a cluster, what a step costs, and the best layouts",
    "submit": "render a Slurm job from a configuration, and submit it",
    "preflight": "check the nodes of a job: versions, GPUs, links, shards, disks, clocks",
    "scaling": "measure a step on 1 ... N ranks or nodes: table, plot, where the time goes",
    "job": "for the job scripts: a job's folder, and whether to start the job again",
    "simulate": "extend measured figures to thousands of GPUs",
}


def main(arguments: list[str]) -> int:
    """Returns the exit code: 0, 1 (something found wrong), 2 (bad input, one line on stderr)."""
    try:
        if arguments[:1] in ([], ["-h"], ["--help"]):
            print(_help())
            return 0
        name, *rest = arguments
        if name not in SUBCOMMANDS:
            raise UserError(f"subcommand {name!r} must be one of {', '.join(SUBCOMMANDS)}")
        return importlib.import_module(f"launcher.{name}").main(rest)
    except (UserError, ModuleNotFoundError) as error:
        text = str(error)
        if isinstance(error, ModuleNotFoundError):
            package = (error.name or "launcher").partition(".")[0]
            if package in ("launcher", "diffmoe"):
                raise
            text = (
                f"launcher {arguments[0]} needs the package {package}, which {sys.executable} does "
                "not have: run make setup and use .venv/bin/python"
            )
        if os.environ.get("DIFFMOE_TRACEBACK"):
            raise
        # Of several ranks, one a node.
        if os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0":
            print(f"error: {text}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        return 130


def _help() -> str:
    width = max(map(len, SUBCOMMANDS))
    lines = "\n".join(f"  {name:{width}}  {text}" for name, text in SUBCOMMANDS.items())
    return (
        "usage: python -m launcher SUBCOMMAND ...\n\n"
        "subcommands (python -m launcher SUBCOMMAND --help says more, with an example):\n"
        f"{lines}\n\nexample:\n  python -m launcher doctor"
    )


def command() -> int:
    """The installed command ``diffmoe-launcher``."""
    return run_command(main)


if __name__ == "__main__":
    sys.exit(command())
