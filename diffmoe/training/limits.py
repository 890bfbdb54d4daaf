"""How long ranks wait for each other, and torch's own watch over collectives, which has to be the
more patient one.

The watchdog ends a run in order, with a report.  torch's threads beside NCCL would end it with a
stack (``SIGABRT``): they stay for what the watchdog cannot end, and their limits lie behind its
own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

START_FACTOR = 3  # of run.timeout_s, until the first step is done
DEATH_S = 60.0  # by when a dead process is reported


def interval(timeout_s: float) -> float:
    """Seconds between heartbeats."""
    return max(1.0, min(timeout_s or DEATH_S, DEATH_S) / 12)


def patience(timeout_s: float) -> timedelta:
    """How long a collective may take: longer than the watchdog waits; without it (0) this is what
    ends a hang.
    """
    seconds = START_FACTOR * timeout_s + 6 * interval(timeout_s) if timeout_s else 1800
    return timedelta(seconds=seconds)


def set_nccl(timeout_s: float) -> None:
    """Before ``init_process_group``: torch's flight recorder, and its watch over NCCL.  What the
    environment says already is left alone.
    """
    if "TORCH_NCCL_TRACE_BUFFER_SIZE" not in os.environ:  # its older name
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "1000")  # collectives
    if not timeout_s:
        return
    # After an error of NCCL's, as of a connection that breaks with a dead peer, the process is
    # ended; four times this later.
    os.environ.setdefault("TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC", f"{round(500 * DEATH_S)}")
    if "NCCL_ASYNC_ERROR_HANDLING" not in os.environ:  # its older name
        # Without aborting the communicator, which would let the rest of a step compute on what
        # never arrived.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3")
    seconds = round(patience(timeout_s).total_seconds() + DEATH_S)
    os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", str(seconds))


def lengthen_timeouts(timeout_s: float) -> None:
    """Gives the groups that DeepSpeed has made the patience of ours: torch's own for NCCL, 10
    minutes, would be over first.
    """
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(patience(timeout_s), group)


def recorder(form: str = "") -> Callable[..., Any] | None:
    """The function of this build that reads torch's flight recorder, pickled or in another ``form``
    ("_json").
    """
    library = torch._C._distributed_c10d
    nccl = getattr(library, f"_dump_nccl_trace{form}", None)
    return nccl or getattr(library, f"_dump_fr_trace{form}", None)


def pending_collective() -> str:
    """The oldest collective that torch's flight recorder calls unfinished, where this build has
    one.
    """
    dump = recorder("_json")
    if dump is None:
        return ""
    try:
        entries = json.loads(dump(includeCollectives=True, onlyActive=True)).get("entries") or []
        for entry in entries:
            if not entry.get("retired"):
                name, sizes = entry["profiling_name"], entry["input_sizes"]
                number, group = entry["collective_seq_id"], entry["process_group"][0]
                return f"unfinished {name} {sizes}, number {number} of group {group}"
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        # It is private: another form of it must not end a run.
        return f"torch's flight recorder is not readable ({type(error).__name__})"
    return ""
