"""The subcommand ``bench``: measurements, one module of :mod:`diffmoe.bench` a kind."""

from __future__ import annotations

import importlib

from diffmoe.commands.common import one_process
from diffmoe.environment import RankEnvironment
from diffmoe.errors import UserError

KINDS = {
    "probe": "what this machine can do and whether it is right: ceilings, experts, new groups",
    "moe-layer": "an MoE layer against the dense MLP, the textbook loop and DeepSpeed's layer",
    "step": "a whole training step against the dense model's; recompute, compilation",
    "roofline": "a training step counted without a GPU and priced for one",
    "sampling": "the MoE layers of a sampler at capacity 0.7 against 1.0",
    "communication": "collectives of a training step by ranks: calls, bytes, time",
    "checkpoint": "what a save costs, against torch.save of a full state dict",
    "train": "a training that is stopped and resumed: its loss falls, its memory does not grow",
    "data": "the loader against tar reading, webdataset and one npz an image; resume; memory",
    "results": "README.md's table from the records in docs/results, or one folder's summary",
}


def main(arguments: list[str], environment: RankEnvironment) -> int:
    """Returns the exit code.  UserError for bad input."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("run.py bench KIND … (--help after the kind says more):")
        print("\n".join(f"  {kind:13} {text}" for kind, text in KINDS.items()))
        return 0
    kind, rest = arguments[0], arguments[1:]
    if kind not in KINDS:
        raise UserError(f"bench kind {kind!r} must be one of {', '.join(KINDS)}")
    one_process("bench", environment)  # it starts its own ranks
    return importlib.import_module(f"diffmoe.bench.{kind.replace('-', '_')}").main(rest)
