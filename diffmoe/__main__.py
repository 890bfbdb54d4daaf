"""The one program: ``run.py [SUBCOMMAND] --config C.yaml --deepspeed_config D.json
section.field=value …``, train if no subcommand is named.

The same file under ``deepspeed``, ``torchrun``, ``srun`` or plain ``python`` (one rank).
Installed, it is ``diffmoe [SUBCOMMAND] …``.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import os
import sys
from collections.abc import Callable

from diffmoe.environment import RankEnvironment, check_started, detect, export, typed_at_a_terminal
from diffmoe.errors import UserError, run_command

SUBCOMMANDS = {
    "train": "train a model, or resume (the default)",
    "sample": "images from a checkpoint",
    "evaluate": "FID, sFID, Inception Score, precision and recall of a checkpoint, with a card",
    "sweep": "one score against guidance's scale or the average's length, the best marked",
    "compare": "routers side by side: every run of a YAML, one table",
    "encode": "images -> VAE moments (or pixels) in shards",
    "inspect-data": "a data set against its index: counts, checksums, classes, statistics, images",
    "import": "research weights or a Hugging Face folder -> a checkpoint; dense weights -> MoE",
    "export": "a checkpoint -> research weights or a Hugging Face folder",
    "check-checkpoint": "whether checkpoints are intact, bit for bit and tensor by tensor",
    "bench": "measurements side by side: run.py bench KIND",
    "profile": "real training steps against the plan and the lower bound: time, memory, traffic",
    "verify": "the parity table: EP x ZeRO x recompute x accumulation x pool against one process",
}


def main(arguments: list[str]) -> int:
    """Runs a subcommand.  Returns the exit code: 0, 1 (verify missed, a checkpoint or a data set is
    corrupt), 2 (bad input, or a run that cannot go on: one line on stderr), 75 (another rank was
    lost: the same command resumes), 130 (interrupted).
    """
    environment: RankEnvironment | None = None
    try:
        environment = detect()
        check_started(environment, typed_at_a_terminal() and not {"-h", "--help"} & set(arguments))
        export(environment)
        if arguments[:1] in (["-h"], ["--help"]):
            print(_help())
            return 0
        name, rest = _subcommand(arguments)
        return _main_of(name)(rest, environment)
    except UserError as error:
        if os.environ.get("DIFFMOE_TRACEBACK"):
            raise
        _complain(error, environment)
        if _agreed(error):
            from diffmoe.commands.common import leave

            leave()
        return 2
    except RuntimeError as error:
        # Outside training's watchdog: while the ranks meet, and in the other subcommands.
        if os.environ.get("DIFFMOE_TRACEBACK") or "torch" not in sys.modules or not environment:
            raise
        from diffmoe.parallel.collectives import EXIT_LOST, is_lost_peer

        if not is_lost_peer(error):
            raise
        print(
            f"error: rank {environment.rank}: another rank is lost or does not answer: "
            f"{' '.join(str(error).split())[:2000]}",  # of NCCL's words the last say what it was
            file=sys.stderr,
            flush=True,
        )
        return EXIT_LOST
    except KeyboardInterrupt:
        return 130


def _help() -> str:
    lines = "\n".join(f"  {name:16} {text}" for name, text in SUBCOMMANDS.items())
    return f"{__doc__}\nsubcommands (run.py SUBCOMMAND --help says more):\n{lines}"


def _main_of(name: str) -> Callable[[list[str], RankEnvironment], int]:
    """A subcommand's function; its module is imported only now, since several bring torch."""
    if name in ("import", "export"):
        from diffmoe.commands import exchange

        return {"import": exchange.import_main, "export": exchange.export_main}[name]
    return importlib.import_module(f"diffmoe.commands.{name.replace('-', '_')}").main


def _subcommand(arguments: list[str]) -> tuple[str, list[str]]:
    # --local_rank is the deepspeed launcher's; we read its environment.
    words = [a for a in arguments if not a.startswith("--local_rank")]
    if words and not words[0].startswith("-") and "=" not in words[0]:
        if words[0] not in SUBCOMMANDS:
            raise UserError(f"subcommand {words[0]!r} must be one of {', '.join(SUBCOMMANDS)}")
        return words[0], words[1:]
    return "train", words


def _complain(error: UserError, environment: RankEnvironment | None) -> None:
    """One line for an error that every rank has; one line a rank for an error of its own."""
    text = " ".join(str(error).splitlines())  # a name with a line break in it, say
    if environment is None or environment.rank == 0:
        print(f"error: {text}", file=sys.stderr, flush=True)
    elif (_started() and not _agreed(error)) or environment.local_rank == 0:
        print(f"error: rank {environment.rank}: {text}", file=sys.stderr, flush=True)


def _started() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_initialized()


def _agreed(error: UserError) -> bool:
    """Whether the ranks have joined, and every one of them has this error."""
    return _started() and type(error).__name__ == "AgreedError"


def command() -> int:
    """The installed command, and run.py.  A rank ends before Python takes its interpreter apart:
    with gloo's threads still there that aborts now and then, which hides the exit code.  They
    outlive `leave` where something refers to their group: DeepSpeed's engine, or a module that has
    it as a default argument.
    """
    codes: list[int] = []
    atexit.register(_end_rank, codes)  # the first to be registered runs last
    codes.append(run_command(main))
    if codes[0] and _started():  # without the others: at once
        _end_rank(codes)
    return codes[0]


def _end_rank(codes: list[int]) -> None:
    if codes and "torch" in sys.modules:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # whoever read it has gone
                stream.flush()
        os._exit(codes[0])


if __name__ == "__main__":
    sys.exit(command())
