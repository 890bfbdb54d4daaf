"""Which rank holds the others up, on which host, and whether the job is to go on without it."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffmoe.config import RunConfig
from diffmoe.parallel.collectives import gather_stack
from diffmoe.parallel.groups import ParallelGroups
from diffmoe.parallel.step_clock import StepClock
from diffmoe.training.engine import Engine

# Of the last `run.straggler_steps` steps a straggler is behind in this share at least: a busy
# machine's noise is in some steps of every rank, and now and then a straggler's step is quick.
MOST_STEPS = 0.9
# A job leaves out so many nodes by itself; more are no longer the exception.
MOST_EXCLUDED = 3
# In a job's folder: what preflight measured, and the hosts that the job's script is to exclude.
PREFLIGHT_NAME, EXCLUDED_NAME = "preflight.json", "exclude.txt"
_BACKEND_METHODS = (
    "all_reduce reduce reduce_scatter reduce_scatter_tensor broadcast all_gather "
    "all_gather_into_tensor all_gather_coalesced all_to_all_single".split()
)


def find_straggler(busy_SR: Tensor, factor: float) -> int | None:
    """The rank whose steps took more than ``factor`` times the median rank's, in most of these
    steps and together; the slowest where there are several.  ``busy_SR``: seconds that were not
    spent waiting for others, by step and rank.  Of an even number of ranks the median is the lower
    of the middle two: one of two ranks may be the straggler.
    """
    behind_SR = busy_SR > factor * busy_SR.median(1, keepdim=True).values
    total_R = busy_SR.sum(0)
    found_R = (behind_SR.float().mean(0) >= MOST_STEPS) & (total_R > factor * total_R.median())
    return int(torch.where(found_R, total_R, -1.0).argmax()) if found_R.any() else None


class Stragglers:
    """Names a rank that stays behind; all ranks know the same.  ``hosts``: of all ranks."""

    def __init__(
        self,
        config: RunConfig,
        groups: ParallelGroups,
        engine: Engine,
        device: torch.device,
        hosts: list[str],
    ) -> None:
        self.config, self.groups, self.device, self.hosts = config, groups, device, hosts
        self.on = config.straggler_factor > 0 and groups.world.size > 1
        self.named: int | None = None
        self._recent_SR = torch.zeros(0, groups.world.size)
        if self.on:
            groups.trace.clock = StepClock(device)
            _note_waits(engine, groups.trace.clock)

    def collect(self) -> tuple[dict[str, Any], tuple[str, str] | None]:
        """A record of the steps since the last call, and a straggler's event.  Collective."""
        mine = torch.tensor(self.groups.trace.clock.read(), device=self.device)
        if not len(mine):
            return {}, None
        parts_RS3 = gather_stack(mine, self.groups.world).cpu()
        own_RS, exchange_RS, data_RS = parts_RS3.unbind(-1)
        busy_RS = own_RS + data_RS
        # Whoever comes last waits for nobody: what it spends in collectives is their own time.
        transfer_S = exchange_RS.min(0).values
        total_R = busy_RS.sum(1)
        slowest = int(total_R.argmax())
        record: dict[str, Any] = {
            "step_compute_s": own_RS.mean().item(),
            "step_exchange_s": transfer_S.mean().item(),
            "step_waiting_s": (exchange_RS - transfer_S).mean().item(),
            "step_data_s": data_RS.mean().item(),
            "slowest_rank": slowest,
            "slowest_host": self.hosts[slowest],
            "slowest_behind": (total_R[slowest] / total_R.median() - 1).item(),
        }
        window, before = self.config.straggler_steps, self.named
        self._recent_SR = torch.cat([self._recent_SR, busy_RS.T])[-window:]
        self.named = None
        if len(self._recent_SR) == window:
            self.named = find_straggler(self._recent_SR, self.config.straggler_factor)
        if self.named is not None:
            total_R = self._recent_SR.sum(0)
            behind = f"{100 * (total_R[self.named] / total_R.median() - 1):.0f} % behind"
            record["straggler"] = f"rank {self.named} on {self.hosts[self.named]}, {behind}"
        if self.named == before:
            return record, None
        if self.named is None:
            return record, ("straggler over", f"{self._who(before)} is no longer behind")
        figures = (
            f"{name} {values.mean(1)[self.named]:.4f} s a step (median "
            f"{values.mean(1).median():.4f})"
            for name, values in (("compute", own_RS), ("data", data_RS))
        )
        text = f"{self._who(self.named)} is {behind} the median rank for {window} steps: "
        return record, ("straggler", text + ", ".join((*figures, *self._preflight(self.named))))

    def _who(self, rank: int | None) -> str:
        assert rank is not None
        return f"rank {rank} on {self.hosts[rank]}"

    def _preflight(self, rank: int) -> list[str]:
        """What preflight measured of this rank beside the median, if this job has it."""
        job = self._job_folder()
        try:
            rows = json.loads((job / PREFLIGHT_NAME).read_text()) if job else []
            mine = next(r for r in rows if (r["rank"], r["host"]) == (rank, self.hosts[rank]))
            return [
                f"preflight {value:.3g} {name} (median "
                f"{statistics.median(row[name] for row in rows if name in row):.3g})"
                for name, value in mine.items()
                if name not in ("rank", "host")
            ]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration):
            return []

    def _job_folder(self) -> Path | None:
        """Where the script of this Slurm job looks; None where none does."""
        folder = Path(self.config.folder) / "jobs" / os.environ.get("SLURM_JOB_ID", "none")
        return folder if folder.is_dir() else None

    def exclude(self) -> str | None:
        """Asks the job's script to exclude the straggler's host; why it cannot.  On rank 0."""
        assert self.named is not None
        job, host = self._job_folder(), self.hosts[self.named]
        if job is None:
            return "this is no job of scripts/slurm"
        path = job / EXCLUDED_NAME
        try:
            before = path.read_text().split() if path.exists() else []
            if host in before:
                return "it was to be excluded before"
            if len(before) == MOST_EXCLUDED:
                return f"{MOST_EXCLUDED} nodes are excluded already: {', '.join(before)}"
            path.write_text("\n".join([*before, host]) + "\n")
        except OSError as error:
            return str(error)
        return None


def _note_waits(engine: Engine, clock: StepClock) -> None:
    """Lets the clock see DeepSpeed's collectives: where its backend calls torch, and the whole
    reduction after a backward and ZeRO 3's fetches, which may wait on streams of their own.
    """
    backend, timed = engine.deepspeed.comm.comm.cdb, clock.waiting("exchange")

    def begun(call: Callable) -> Callable:
        def beginning(*args: Any, **kwargs: Any) -> Any:
            work = timed(call)(*args, **kwargs)
            return None if work is None else _Work(work, timed(work.wait))

        return beginning

    for name in _BACKEND_METHODS:  # the class's: the backend outlives an engine
        setattr(backend, name, begun(getattr(type(backend), name).__get__(backend)))
    engine.engine.allreduce_gradients = timed(engine.engine.allreduce_gradients)
    if engine.stage == 3:
        coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
        coordinator.fetch_sub_module = timed(coordinator.fetch_sub_module)


class _Work:
    """torch's handle of a collective with another ``wait``."""

    def __init__(self, work: Any, wait: Callable) -> None:
        self._work, self.wait = work, wait

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)
