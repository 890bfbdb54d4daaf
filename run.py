#!/usr/bin/env python
"""The one program: ``run.py [train | sample | verify] --config C.yaml --deepspeed_config D.json section.field=value …``

The same file under ``deepspeed``, ``torchrun``, ``srun`` or plain ``python`` (one rank).
"""

from __future__ import annotations

import sys

from launcher.environment import RankEnvironment, detect, export

VERBS = ("train", "sample", "verify")


def main(arguments: list[str]) -> int:
    """Runs a verb.  Returns the exit code: 0, 1 (verify missed), 2 (bad input, one line on stderr), 130 (interrupted)."""
    environment = None
    try:
        environment = detect()
        export(environment)
        verb, rest = _verb(arguments)
        if verb == "verify":
            from diffmoe import verify

            return verify.main(rest)
        from diffmoe import commands

        return commands.run(verb, rest, environment)
    except ValueError as error:
        _complain(error, environment)
        return 2
    except KeyboardInterrupt:
        return 130


def _verb(arguments: list[str]) -> tuple[str, list[str]]:
    words = [a for a in arguments if not a.startswith("--local_rank")]  # the deepspeed launcher's; we read its environment
    if words and not words[0].startswith("-") and "=" not in words[0]:
        if words[0] not in VERBS:
            raise ValueError(f"verb {words[0]!r} must be one of {', '.join(VERBS)}")
        return words[0], words[1:]
    return "train", words


def _complain(error: ValueError, environment: RankEnvironment | None) -> None:
    """One line for an error that every rank has; one line a rank for an error of its own."""
    agreed = type(error).__name__ == "AgreedError" or not _started()
    rank = environment.rank if environment else 0
    if rank == 0:
        print(f"error: {error}", file=sys.stderr, flush=True)
    elif not agreed or environment.local_rank == 0:
        print(f"error: rank {rank}: {error}", file=sys.stderr, flush=True)


def _started() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_initialized()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
