"""The verb ``bench``: measurements, one module of :mod:`diffmoe.bench` a kind."""

from __future__ import annotations

import importlib

from diffmoe.commands.common import one_process
from diffmoe.environment import RankEnvironment
from diffmoe.errors import UserError

KINDS = {
    "probe": "what this machine can do, and whether it does it right: versions, ceilings, experts without rows, new groups",
    "moe-layer": "a mixture layer's training pass against the dense MLP, the textbook loop and DeepSpeed's layer",
    "step": "a whole training step against the dense model's; recompute; cost per token",
    "roofline": "a training step counted without a GPU and priced for one: kernels, bytes, FLOPs, host reads",
    "sampling": "the mixtures of a sampler at capacity 0.7 against 1.0",
    "communication": "collectives of a training step by ranks: calls, bytes, time",
    "checkpoint": "how long a save stalls training and takes, against torch.save of a full state dict",
    "train": "a short training that is stopped in the middle and resumed: its loss falls, its memory does not grow",
    "data": "the loader against plain tar reading, webdataset and one npz an image; resume; host memory",
    "results": "the table of README.md from the records in docs/results, or the summary of one folder of records",
}


def main(arguments: list[str], environment: RankEnvironment) -> int:
    """The verb ``bench``; returns the exit code.  UserError for bad input."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(
            "run.py bench KIND … (--help after the kind says more):\n"
            + "\n".join(f"  {kind:13} {text}" for kind, text in KINDS.items())
        )
        return 0
    kind, rest = arguments[0], arguments[1:]
    if kind not in KINDS:
        raise UserError(f"bench kind {kind!r} must be one of {', '.join(KINDS)}")
    one_process("bench", environment)  # it starts its own ranks
    return importlib.import_module(f"diffmoe.bench.{kind.replace('-', '_')}").main(rest)
