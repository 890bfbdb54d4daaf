"""Notices a dead or hung rank, names it and ends the job.

Every rank writes heartbeats into the store through which the ranks met (no shared file system
needed): a tick, and where its main thread is.  Rank 0 judges all of them, the others judge rank 0:

dead: a process whose ticks stop, at any time, is reported within ``limits.DEATH_S``, whatever the
    backend.  A tick needs Python's global lock, which a C call may hold for longer: heartbeats
    also say which of the ranks before and after it, on the same host, have a process that runs
    (``/proc``), and a silent rank of which one says so is alive.
hung: a process that lives, and whose main thread has not moved for ``run.timeout_s`` (three times
    that until the first step is done).

Then rank 0 writes a verdict that names the rank, and every process ends with ``EXIT_LOST``.  The
main threads need no part in that: with NCCL they wait for a kernel that never ends.  A connection
that breaks (gloo's answer to a dead peer) asks for the verdict at once.  Seconds are counted by the
judge's own clock, and those that it or the store slept through are not counted.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from diffmoe.parallel.collectives import EXIT_LOST, AgreedError, is_lost_peer
from diffmoe.parallel.groups import ParallelGroups
from diffmoe.parallel.trace import Trace
from diffmoe.training import limits

_SHOWN = 16  # ranks in a report
_DEAD = "dead: the process is gone or stopped, or its node is out of reach"
_HUNG = "hung: the process lives, its main thread does not move"


@dataclass(frozen=True)
class Heartbeat:
    """What a rank last said of itself.  ``state``: empty, ``lost`` (a connection of its broke), or
    why it ended.  ``running``: neighbours on its host whose processes run.
    """

    rank: int
    host: str
    pid: int
    tick: int
    trace: Trace
    state: str = ""
    place: str = ""
    running: tuple[int, ...] = ()

    def dumps(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def loads(text: str | bytes) -> Heartbeat:
        record = json.loads(text)
        return Heartbeat(**{**record, "trace": Trace(**record["trace"])})

    @property
    def ended(self) -> bool:
        return self.state not in ("", "lost")

    @property
    def who(self) -> str:
        return f"rank {self.rank} on {self.host} (process {self.pid})"

    @property
    def where(self) -> str:
        """``step 7, backward, block 3, in all-to-all of rows of ranks 0, 1``."""
        trace = self.trace
        parts = [f"step {trace.step}", trace.phase, trace.layer]
        if trace.collective:
            parts.append(f"{'in' if trace.waiting else 'last collective'} {trace.collective}")
        return ", ".join(part for part in (*parts, self.place) if part)


@dataclass
class _Seen:
    """Seconds since its thread (``silent``) and its main thread (``still``) moved."""

    beat: Heartbeat
    read: float
    silent: float = 0.0
    still: float = 0.0


class Watchdog:
    """Around a run; ``timeout_s`` 0 leaves only the report of a broken connection.  ``folder``: the
    run's, in which a rank that is ended leaves torch's flight recorder.
    """

    def __init__(
        self, groups: ParallelGroups, timeout_s: float, folder: Path | None = None
    ) -> None:
        self.trace, self.timeout_s = groups.trace, timeout_s
        self.rank, self.world = groups.rank, groups.world.size
        self.interval = limits.interval(timeout_s)
        # The verdict reaches everybody up to four intervals later.
        self.silence = min(limits.DEATH_S - 4 * self.interval, timeout_s)
        self._recordings = folder and folder / "flight_recorder"
        self._tick = 0
        self._state = ""  # of this rank's heartbeats; set by the main thread, once
        self._told, self._hurry, self._stopping = (threading.Event() for _ in range(3))
        self._store = self._open_store()
        self._seen: dict[int, _Seen] = {}
        self._moved = (-1, 0.0)  # the main thread's count when it last moved, and when that was
        self._unanswered = 0.0  # seconds since the store last answered
        self._store_error = ""
        self._broken = False  # the store, for good
        self._verdict: str | None = None
        self._lost_at: float | None = None  # when a connection of this rank broke
        # Two threads: a store whose process is stopped never answers, and somebody must notice.
        self._talker = threading.Thread(target=self._talk, name="watchdog-store", daemon=True)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def _open_store(self) -> Any:
        """A handle of its own: one that the main thread waits on would block this one."""
        if self.world == 1:
            return dist.HashStore()
        store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        store.set_timeout(timedelta(seconds=max(2.0, self.interval)))
        return dist.PrefixStore("watchdog", store)

    def __enter__(self) -> Watchdog:
        self._tell()
        if self.timeout_s:
            self._begin()
        return self

    def _begin(self) -> None:
        self._unanswered = 0.0
        self._talker.start()
        self._thread.start()

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if error is not None and self.world > 1:
            self._check_lost(error)
            if not isinstance(error, AgreedError):
                self._announce(error)
        # On every rank before any leaves: rank 0 may hold the store.
        self._stopping.set()
        self._hurry.set()
        for thread in (self._thread, self._talker):
            if thread.is_alive():
                thread.join(2 * self.interval + 5)

    def _announce(self, error: BaseException) -> None:
        """Tells the others, which may be waiting for this rank, that it ends, and why."""
        self._state = f"{type(error).__name__}: {_short(error)}"
        if self._talker.is_alive():
            self._hurry.set()
            self._told.wait(2 * self.interval + 5)
        elif not self._broken:
            with suppress(RuntimeError):  # the store is gone: the others have noticed
                self._tell()
        if self.rank == 0:  # the store may end with this process: the others read it first
            time.sleep(2 * self.interval)

    @property
    def limit(self) -> float:
        """Seconds after which a main thread that does not move is hung."""
        return self.timeout_s * (1 if self.trace.warm else limits.START_FACTOR)

    # --------------------------------------------------------------------------------- the threads

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._stopping.wait(self.interval / 2):
            now = time.monotonic()
            self._unanswered += min(now - before, self.interval)  # more only where this slept
            before = now
            verdict = self._verdict or self._without_store()
            # A rank that ends by an error of its own keeps its traceback.
            if verdict and not self._stopping.is_set() and self._state in ("", "lost"):
                self._end(verdict)

    def _talk(self) -> None:
        while self._verdict is None:
            self._hurry.wait(self.interval)
            self._hurry.clear()
            if self._stopping.is_set():
                return
            try:
                self._tell()
                if self._told.is_set() and self._state != "lost":
                    return  # this rank ends, and judges no more
                self._verdict = self._look()
                self._unanswered = 0.0
            except RuntimeError as error:  # torch's errors of a store
                self._store_error = f" ({str(error).splitlines()[0][:120]})"
                if "imeout" not in str(error) and "imed out" not in str(error):
                    self._broken = True
                    return

    def _tell(self) -> None:
        """Writes a heartbeat: from the thread that talks, or from the main thread while that one
        does not run; two could overtake each other and lose the state.
        """
        self._tick += 1
        state, host = self._state, socket.gethostname()
        near = {(self.rank - 1) % self.world, (self.rank + 1) % self.world} - {self.rank}
        seen = [self._seen[rank].beat for rank in near if rank in self._seen]
        running = tuple(beat.rank for beat in seen if beat.host == host and _runs(beat.pid))
        beat = Heartbeat(
            self.rank, host, os.getpid(), self._tick, self.trace, state, self._place(), running
        )
        self._store.set(f"beat/{self.rank}", beat.dumps())
        if state:
            self._told.set()

    def _read(self, ranks: Iterable[int]) -> None:
        now = time.monotonic()
        ticked: set[int] = set()
        running: set[int] = set()
        for rank in ranks:
            key = f"beat/{rank}"
            if rank not in self._seen and not self._store.check([key]):
                continue
            beat = Heartbeat.loads(self._store.get(key))
            seen = self._seen.setdefault(rank, _Seen(beat, now))
            passed = min(now - seen.read, 3 * self.interval)  # more only where somebody slept
            seen.silent += passed
            seen.still = 0.0 if beat.trace.count != seen.beat.trace.count else seen.still + passed
            if beat.tick != seen.beat.tick:
                ticked.add(rank)
                running.update(beat.running)
            seen.beat, seen.read = beat, now
        for rank in (ticked | running) & self._seen.keys():
            self._seen[rank].silent = 0.0

    def _look(self) -> str | None:
        """Whether the run goes on (None), or how this rank ends."""
        lost_at = self._lost_at
        if self.rank and lost_at is None and self._store.check(["verdict"]):
            return self._as_well(self._store.get("verdict").decode())
        judges_all = self.rank == 0 or lost_at is not None
        near = {0, 1, self.rank - 1, self.rank, (self.rank + 1) % self.world, self.world - 1}
        self._read(range(self.world) if judges_all else sorted(near))
        judged = [s for rank, s in self._seen.items() if judges_all or rank == 0]
        ended = [s for s in judged if s.beat.ended]
        if lost_at is not None:
            # Ranks that ended said so; those that were killed tick no more.
            if not ended and time.monotonic() - lost_at < 2.5 * self.interval + 1:
                return None
            silence = 2 * self.interval
        else:  # rank 0 judges the others, so it gets a little longer
            silence = self.silence + (0 if self.rank == 0 else 2 * self.interval)
        silent = [s for s in judged if s.silent > silence and s.beat.state != "lost"]
        if ended:
            return self._agreed([f"{s.beat.who} ended by {s.beat.state}" for s in ended], ended)
        if silent:
            lines = [f"{s.beat.who} has not answered for {s.silent:.0f} s" for s in silent]
            return self._agreed(lines, silent, _DEAD)
        if lost_at is not None:
            return self._agreed(["a connection between ranks broke, and all of them are there"], [])
        if self.rank == 0 and any(s.still > self.limit for s in judged):
            return self._hung()
        return None

    def _hung(self) -> str | None:
        """The report of those that do not wait for others; of the last where all do, or none.
        None while one of them is silent: whether it lives, its silence decides.
        """
        stuck = [s for s in self._seen.values() if not s.beat.trace.waiting]
        if len(stuck) in (0, self.world):
            least = min(s.beat.trace.count for s in self._seen.values())
            stuck = [s for s in self._seen.values() if s.beat.trace.count == least]
        if any(s.silent > 3 * self.interval for s in stuck):
            return None
        lines = [f"{s.beat.who} has made no progress for {s.still:.0f} s" for s in stuck]
        return self._report(lines, stuck, _HUNG)

    def _agreed(self, headlines: list[str], gone: list[_Seen], kind: str = "") -> str:
        """The report, which the first rank that is left prints, and the others a line of it."""
        living = set(range(self.world)) - {s.beat.rank for s in gone}
        if self.rank == min(living, default=self.rank):
            self._read(range(self.world))
            return self._report(headlines, gone, kind)
        return self._as_well(self._report(headlines, gone, kind))

    def _as_well(self, report: str) -> str:
        return f"rank {self.rank} ends with exit code {EXIT_LOST} as well: {report.splitlines()[0]}"

    def _without_store(self) -> str | None:
        """The store has been silent for too long: its process is lost or stopped."""
        sure = self._broken or self._lost_at is not None
        if self._unanswered < (3.5 * self.interval if sure else self.silence) + 2 * self.interval:
            return None
        by_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        first = [self._seen[0]] if 0 in self._seen and not by_launcher else []
        holder = "the launcher" if by_launcher else first[0].beat.who if first else "rank 0"
        line = f"{holder}, which holds the store, has not answered for {self._unanswered:.0f} s"
        return self._report([line + self._store_error], first, _DEAD)

    def _report(self, headlines: list[str], first: list[_Seen], kind: str = "") -> str:
        """A line of the culprits and their ``kind`` of end; then where each is, culprits first."""
        others = [s for _, s in sorted(self._seen.items()) if s not in first]
        line = (
            f"watchdog: {'; '.join(headlines[:_SHOWN])} (run.timeout_s {self.timeout_s:g}); the job"
            f" ends with exit code {EXIT_LOST}, the same command resumes from the last checkpoint"
        )
        lines = [f"{line} ({kind})" if kind else line]
        heard = [f"  {s.beat.who}: when last heard, {s.beat.where}" for s in first]
        lines += [*heard, *(f"  {s.beat.who}: {s.beat.where}" for s in others)][:_SHOWN]
        if len(self._seen) > _SHOWN:
            lines.append(f"  … {len(self._seen) - _SHOWN} more ranks")
        if self._recordings and limits.recorder():
            command = f"torchfrtrace {self._recordings} --prefix rank_"
            lines.append(f"  the last collectives of each rank: {command}")
        return "\n".join(lines)

    def _end(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)
        writes = threading.Thread(target=self._write_recording, daemon=True)
        writes.start()
        if self.rank == 0 and self.world > 1 and self._verdict is not None:
            threading.Thread(target=self._store.set, args=("verdict", text), daemon=True).start()
            # The store may die with this process: the others read it first.
            time.sleep(2 * self.interval)
        writes.join(self.interval)  # not longer: it may be the disk that hangs
        sys.stdout.flush()
        os._exit(EXIT_LOST)

    def _write_recording(self) -> None:
        """Leaves torch's flight recorder for its program ``torchfrtrace``."""
        if self._recordings and (recorder := limits.recorder()):
            with suppress(OSError, RuntimeError):
                self._recordings.mkdir(parents=True, exist_ok=True)
                path = self._recordings / f"rank_{self.rank}"
                path.write_bytes(recorder(includeStackTraces=False))

    # --------------------------------------------------------------------------------- main thread

    def _check_lost(self, error: BaseException) -> None:
        """Where ``error`` says that a peer is gone: never returns; the thread finds out who."""
        if self.world == 1 or not is_lost_peer(error):
            return
        self._state = "lost"
        self._lost_at = time.monotonic()
        # Whole: of NCCL's words the last say what it was.
        print(f"rank {self.rank}: {error}", file=sys.stderr, flush=True)
        if not self._thread.is_alive():
            self._begin()
        self._thread.join(8 * self.interval + 10)
        self._end(f"rank {self.rank} ends with exit code {EXIT_LOST}: {_short(error)}")

    def _place(self) -> str:
        """Where the main thread rests, once it has for a while, and in which collective."""
        count, since = self._moved
        now = time.monotonic()
        if count != self.trace.count:
            self._moved = (self.trace.count, now)
        elif now - since > self.limit / 2 and self._lost_at is None:
            found = (limits.pending_collective(), _main_thread_at())
            return ", ".join(part for part in found if part)
        return ""


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _runs(pid: int) -> bool:
    """Whether a process of this host is there, not stopped, and not on its (long) way out."""
    try:
        state, *more = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    exiting = int(more[5]) & 4  # PF_EXITING of Linux's include/linux/sched.h
    return state in "RSDI" and not exiting and not re.search(r"^CoreDumping:\s+1", status, re.M)


def _main_thread_at() -> str:
    """``at collectives.py:27 send_rows``: the main thread's innermost frame, ours if any."""
    innermost = sys._current_frames()[threading.main_thread().ident or 0]
    frames = [(frame.f_code, line) for frame, line in traceback.walk_stack(innermost)]
    ours = str(Path(__file__).parents[1])
    own = (each for each in frames if each[0].co_filename.startswith(ours))
    code, line = next(own, frames[0])
    return f"at {Path(code.co_filename).name}:{line} {code.co_name}"
