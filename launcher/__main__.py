"""``python -m launcher VERB …``: what happens around a run.  plan, submit and doctor need no torch:
a login node has none.

Verb ``x`` is ``main(arguments) -> exit code`` in ``launcher/x.py``, imported when it is asked for.
"""

import importlib
import os
import sys

from diffmoe.errors import UserError

VERBS = {
    "doctor": "what is installed on this machine, what is wrong, and what to type",
    "plan": "whether a configuration fits a cluster, what a step costs, and the best layouts",
    "submit": "render a Slurm job from a configuration, and submit it",
    "preflight": "check the nodes of a job before it computes: versions, GPUs, links, shards, disks, clocks",
    "scaling": "measure a step on 1 ... N ranks or nodes: table, plot, where the time goes",
    "job": "for the job scripts: a job's folder, and whether to start the job again",
    "simulate": "extend measured figures to thousands of GPUs",
}


def main(arguments: list[str]) -> int:
    """Runs a verb.  Returns the exit code: 0, 1 (the verb found something wrong), 2 (bad input, one
    line on stderr).
    """
    try:
        if arguments[:1] in ([], ["-h"], ["--help"]):
            print(_help())
            return 0
        verb, *rest = arguments
        if verb not in VERBS:
            raise UserError(f"verb {verb!r} must be one of {', '.join(VERBS)}")
        return importlib.import_module(f"launcher.{verb}").main(rest)
    except UserError as error:
        if os.environ.get("DIFFMOE_TRACEBACK"):
            raise
        _complain(str(error))
        return 2
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "launcher", "diffmoe") or os.environ.get("DIFFMOE_TRACEBACK"):
            raise
        _complain(
            f"launcher {arguments[0]} needs the package {package}, which {sys.executable} does not have: run make setup and "
            "use .venv/bin/python"
        )
        return 2
    except KeyboardInterrupt:
        return 130


def _complain(text: str) -> None:
    """One line on stderr; of several ranks, one a node."""
    if os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0":
        print(f"error: {text}", file=sys.stderr, flush=True)


def _help() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:{width}}  {text}" for verb, text in VERBS.items())
    return (
        f"usage: python -m launcher VERB ...\n\nverbs (python -m launcher VERB --help says more, with an example):\n{verbs}\n\n"
        "example:\n  python -m launcher doctor"
    )


def command() -> int:
    """The installed command ``diffmoe-launcher``."""
    return main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(command())
