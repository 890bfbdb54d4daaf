"""A dead or hung rank is noticed, named and ends the job, in place of silence.

Every rank has a thread that leaves a heartbeat in the store through which the ranks met (no shared
file system needed): a tick of its own, and where its main thread is.  Rank 0 looks at all of them,
the others at rank 0, with two limits:

dead: a process whose ticks stop, at any time, is reported within ``limits.DEATH_S``, whatever the
    backend.  A tick needs Python's global lock, which a C call may hold for longer: of a silent
    rank the ranks before and after it say whether its process runs, where they share a host
    (``/proc``: it is there and not stopped), and while it does it is alive. What the judge itself
    sleeps through, or the store does not answer in, is nobody's silence.
hung: a process that lives, and whose main thread has not moved for ``run.timeout_s`` (three times
    that until the first step is done).

Then rank 0 writes a verdict that names the rank, and every process ends with ``EXIT_LOST``.  The
main threads need no part in that: with NCCL they wait for a kernel that never ends.  A connection
that breaks (gloo's answer to a dead peer) asks for the verdict at once.  Times are read on the
judge's own clock: nodes' clocks may differ.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from diffmoe.parallel.collectives import EXIT_LOST, AgreedError, is_lost_peer
from diffmoe.parallel.groups import ParallelGroups
from diffmoe.parallel.trace import Trace
from diffmoe.training import limits

_SHOWN = 16  # ranks in a report
_DEAD = "dead: the process is gone or stopped, or its node is out of reach"
_HUNG = "hung: the process lives, its main thread does not move"


@dataclass(frozen=True)
class Beat:
    """What a rank last said of itself.  ``state``: empty, ``lost`` (a connection of its broke), or
    why it ended.
    """

    rank: int
    host: str
    pid: int
    tick: int
    trace: Trace
    state: str = ""
    place: str = ""

    def dumps(self) -> str:
        return json.dumps({**vars(self), "trace": self.trace.as_dict()})

    @staticmethod
    def loads(text: str | bytes) -> Beat:
        record = json.loads(text)
        return Beat(**{**record, "trace": Trace(**record["trace"])})

    def where(self) -> str:
        """``step 7, backward, block 3, in all-to-all of rows of ranks 0, 1``."""
        trace = self.trace
        parts = [f"step {trace.step}", trace.phase, trace.layer]
        if trace.collective:
            parts.append(f"{'in' if trace.waiting else 'last collective'} {trace.collective}")
        parts.append(self.place)
        return ", ".join(part for part in parts if part)

    def who(self) -> str:
        return f"rank {self.rank} on {self.host} (process {self.pid})"


@dataclass
class _Seen:
    """The heartbeat read last, when that was, and the seconds since thread (``silent``) and main
    thread (``still``) moved.
    """

    beat: Beat
    read: float
    silent: float = 0.0
    still: float = 0.0
    vouched: int = 0


class Watchdog:
    """Around a run; ``timeout_s`` 0 leaves only the one-line report of a broken connection.
    ``folder``: the run's, in which a rank that is ended leaves torch's flight recorder.
    """

    def __init__(
        self, groups: ParallelGroups, timeout_s: float, folder: Path | None = None
    ) -> None:
        self.groups, self.trace, self.timeout_s = groups, groups.trace, timeout_s
        self.rank, self.world = groups.rank, groups.world.size
        self.interval = limits.interval(timeout_s)
        self.silence = min(
            limits.DEATH_S - 4 * self.interval, timeout_s
        )  # until it is seen by the judge, and then by all
        self._traces = folder and folder / "flight_recorder"
        self._tick = 0
        self._state = ""  # of this rank's beats; only the main thread writes it, and only once
        self._told, self._hurry = threading.Event(), threading.Event()
        self._store = self._open_store()
        self._seen: dict[int, _Seen] = {}
        self._rests = (-1, 0.0)  # the main thread's count when it last moved, and when that was
        self._unanswered = 0.0  # seconds since the store last answered
        self._store_error = ""
        self._broken = False
        self._verdict: str | None = None
        self._lost_at: float | None = None
        self._stopping = threading.Event()
        # Two, since a store whose process is stopped answers never: one talks to it, the other
        # looks at the clock.
        self._talker = threading.Thread(target=self._talk, name="watchdog-store", daemon=True)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def _open_store(self) -> dist.Store:
        """A handle of its own: one that the main thread waits on would block this one."""
        if self.world == 1:
            return dist.HashStore()
        store = dist.distributed_c10d._get_default_store().clone()
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

    @contextmanager
    def hears_first(self) -> Iterator[None]:
        """Inside contexts whose own end may wait for a rank that has gone."""
        try:
            yield
        except RuntimeError as error:
            if self.world > 1 and is_lost_peer(error):
                self._lost(error)
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        if error is not None and self.world > 1 and is_lost_peer(error):
            self._lost(error)
        if error is not None and not isinstance(error, AgreedError) and self.world > 1:
            # The others may be waiting for this rank: they shall not wait long, and know why.
            self._state = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            if self._talker.is_alive():
                self._hurry.set()
                self._told.wait(2 * self.interval + 5)
            elif not self._broken:
                with suppress(RuntimeError):  # the store is gone: the others have noticed
                    self._tell()
            if self.rank == 0:
                time.sleep(
                    2 * self.interval
                )  # the store may end with this process: the others read it first
        self.stop()

    def stop(self) -> None:
        """Ends the watch; every rank calls it before any of them leaves, since rank 0 may hold the
        store.
        """
        self._stopping.set()
        self._hurry.set()
        for thread in (self._thread, self._talker):
            if thread.is_alive():
                thread.join(2 * self.interval + 5)

    @property
    def limit(self) -> float:
        """Seconds after which a main thread that does not move is hung."""
        return self.timeout_s * (1 if self.trace.warm else limits.START_FACTOR)

    # ------------------------------------------------------------------------------------------------
    # the thread

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._stopping.wait(self.interval / 2):
            now = time.monotonic()
            self._unanswered += min(
                now - before, self.interval
            )  # more only where this process slept, and heard nothing
            before = now
            verdict = self._verdict or self._without_store()
            if (
                verdict and not self._stopping.is_set() and self._state in ("", "lost")
            ):  # else it ends by an error of its own
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
                self._vouch()
                self._unanswered = 0.0
            except RuntimeError as error:  # torch's errors of a store
                self._store_error = f" ({str(error).splitlines()[0][:120]})"
                if "imeout" not in str(error) and "imed out" not in str(error):
                    self._broken = True  # and does not mend
                    return

    def _tell(self) -> None:
        """Leaves a beat.  The thread that talks does, and the main thread only while that one does
        not run: beats of two could overtake each other, and one without a state hide one that has
        it.
        """
        self._tick += 1
        state = self._state
        beat = Beat(
            self.rank,
            socket.gethostname(),
            os.getpid(),
            self._tick,
            self.trace,
            state,
            self._place(),
        )
        self._store.set(f"beat/{self.rank}", beat.dumps())
        if state:
            self._told.set()

    def _look(self) -> str | None:
        if self._lost_at is not None:
            self._read(range(self.world))
            return self._after_a_break()
        if self.rank == 0:
            self._read(range(self.world))
            return self._judge()
        if self._store.check(["verdict"]):
            text = self._store.get("verdict").decode()
            return self._as_well(text)
        self._read([0])
        return self._judge_first_rank()

    def _read(self, ranks: range | list[int]) -> None:
        now = time.monotonic()
        keys = [
            f"beat/{rank}"
            for rank in ranks
            if rank in self._seen or self._store.check([f"beat/{rank}"])
        ]
        for text in (
            self._store.multi_get(keys)
            if self._store.has_extended_api()
            else map(self._store.get, keys)
        ):
            beat = Beat.loads(text)
            seen = self._seen.setdefault(beat.rank, _Seen(beat, now))
            passed = min(
                now - seen.read, 3 * self.interval
            )  # more only where this process or the store slept
            seen.vouched = 0 if beat.tick != seen.beat.tick else seen.vouched
            seen.still = 0.0 if beat.trace.count != seen.beat.trace.count else seen.still + passed
            seen.silent = (
                0.0
                if beat.tick != seen.beat.tick or self._has_voucher(seen)
                else seen.silent + passed
            )
            seen.beat, seen.read = beat, now

    def _vouch(self) -> None:
        """Says of the ranks before and after this one that they live, where they are silent and run
        on this host.
        """
        near = sorted({(self.rank - 1) % self.world, (self.rank + 1) % self.world} - {self.rank})
        self._read(near)
        for seen in (self._seen[rank] for rank in near if rank in self._seen):
            if (
                seen.silent > 2 * self.interval
                and seen.beat.host == socket.gethostname()
                and _runs(seen.beat.pid)
            ):
                self._store.add(f"vouched/{seen.beat.rank}/{seen.beat.tick}", 1)

    def _has_voucher(self, seen: _Seen) -> bool:
        """Whether somebody has said anew that a silent rank lives."""
        if seen.silent <= 2 * self.interval:
            return False
        before, seen.vouched = (
            seen.vouched,
            self._store.add(f"vouched/{seen.beat.rank}/{seen.beat.tick}", 0),
        )
        return seen.vouched != before

    def _judge(self) -> str | None:
        """Rank 0's view of all ranks: a report, or None while all is well."""
        ended = [seen for seen in self._seen.values() if seen.beat.state not in ("", "lost")]
        if ended:
            return self._ended(ended)
        silent = [s for s in self._seen.values() if s.silent > self.silence]
        if silent:
            return self._dead(silent)
        if not any(s.still > self.limit for s in self._seen.values()):
            return None
        elsewhere = [s for s in self._seen.values() if not s.beat.trace.waiting]
        least = min(s.beat.trace.count for s in self._seen.values())
        stuck = (
            elsewhere
            if 0 < len(elsewhere) < self.world
            else [s for s in self._seen.values() if s.beat.trace.count == least]
        )
        return self._report(
            [f"{s.beat.who()} has made no progress for {s.still:.0f} s" for s in stuck],
            stuck,
            _HUNG,
        )

    def _as_well(self, report: str) -> str:
        return f"rank {self.rank} ends with exit code {EXIT_LOST} as well: {report.splitlines()[0]}"

    def _ended(self, ended: list[_Seen]) -> str:
        return self._report([f"{s.beat.who()} ended by {s.beat.state}" for s in ended], ended)

    def _dead(self, silent: list[_Seen]) -> str:
        return self._report(
            [f"{s.beat.who()} has not answered for {s.silent:.0f} s" for s in silent], silent, _DEAD
        )

    def _judge_first_rank(self) -> str | None:
        first = self._seen.get(0)
        if first is None:
            return None
        ended = first.beat.state not in ("", "lost")
        if (
            not ended and first.silent <= self.silence + 2 * self.interval
        ):  # it judges the others, so it gets a little longer
            return None
        self._read(range(self.world) if self.rank == 1 else [])
        report = self._ended([first]) if ended else self._dead([first])
        return report if self.rank == 1 else self._as_well(report)

    def _after_a_break(self) -> str | None:
        """A connection of this rank broke: who is gone?  Those who ended said so; those who were
        killed tick no more.
        """
        now = time.monotonic()
        ended = [s for s in self._seen.values() if s.beat.state not in ("", "lost")]
        if not ended and now - self._lost_at < 2.5 * self.interval + 1:
            return None
        silent = [
            s for s in self._seen.values() if not s.beat.state and s.silent > 2 * self.interval
        ]
        gone = ended or silent
        headlines = [f"{s.beat.who()} ended by {s.beat.state}" for s in ended] or [
            f"{s.beat.who()} is gone" for s in silent
        ]
        living = [rank for rank in range(self.world) if rank not in {s.beat.rank for s in gone}]
        if not gone:
            headlines = ["a connection between ranks broke, and all of them are there"]
        if self.rank != living[0]:
            return (
                f"rank {self.rank} ends with exit code {EXIT_LOST}: {'; '.join(headlines[:_SHOWN])}"
            )
        return self._report(headlines, gone, _DEAD if silent and not ended else "")

    def _without_store(self) -> str | None:
        """The store has been silent for too long: its process is lost or stopped."""
        sure = self._broken or self._lost_at is not None
        if self._unanswered < (3.5 * self.interval if sure else self.silence) + 2 * self.interval:
            return None
        by_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        first = self._seen[0].beat.who() if 0 in self._seen else "rank 0"
        holder = "the launcher" if by_launcher else first
        said = f"{holder}, which holds the store, has not answered for {self._unanswered:.0f} s{self._store_error}"
        return self._report(
            [said], [self._seen[0]] if 0 in self._seen and not by_launcher else [], _DEAD
        )

    def _report(self, headlines: list[str], first: list[_Seen], kind: str = "") -> str:
        """One line that names the culprits and the ``kind`` of their end, then where each rank is,
        culprits first.
        """
        others = [s for _, s in sorted(self._seen.items()) if s not in first]
        lines = [
            f"watchdog: {'; '.join(headlines[:_SHOWN])} (run.timeout_s {self.timeout_s:g}); the job ends with exit code "
            f"{EXIT_LOST}, the same command resumes from the last checkpoint"
            + f" ({kind})"
            * bool(kind)
        ]
        heard = [f"  {s.beat.who()}: when last heard, {s.beat.where()}" for s in first]
        lines += [*heard, *(f"  {s.beat.who()}: {s.beat.where()}" for s in others)][:_SHOWN]
        lines += [f"  … {len(self._seen) - _SHOWN} more ranks"] * (len(self._seen) > _SHOWN)
        if self._traces and limits.recorder():
            lines.append(
                f"  the last collectives of each rank: torchfrtrace {self._traces} --prefix rank_"
            )
        return "\n".join(lines)

    def _end(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)
        writes = threading.Thread(target=self._write_trace, daemon=True)
        writes.start()
        if self.rank == 0 and self.world > 1 and self._verdict is not None:
            threading.Thread(target=self._store.set, args=("verdict", text), daemon=True).start()
            time.sleep(
                2 * self.interval
            )  # the store may die with this process: the others read it first
        writes.join(self.interval)  # not longer: it may be the disk that hangs
        sys.stdout.flush()
        os._exit(EXIT_LOST)

    def _write_trace(self) -> None:
        """Leaves torch's flight recorder for its program ``torchfrtrace``."""
        if self._traces and (recorder := limits.recorder()):
            with suppress(OSError, RuntimeError):
                self._traces.mkdir(parents=True, exist_ok=True)
                (self._traces / f"rank_{self.rank}").write_bytes(recorder(includeStackTraces=False))

    # --------------------------------------------------------------------------------------- the
    # main thread's end

    def _lost(self, error: BaseException) -> None:
        """A peer is gone.  The thread finds out who; this returns never."""
        self._state = "lost"
        self._lost_at = time.monotonic()
        if not self._thread.is_alive():
            self._begin()
        self._thread.join(8 * self.interval + 10)
        self._end(
            f"rank {self.rank} ends with exit code {EXIT_LOST}: {' '.join(str(error).split())[:200]}"
        )

    def _place(self) -> str:
        """Once the main thread has rested for a while: where, and in which of torch's collectives."""
        count, since = self._rests
        now = time.monotonic()
        if count != self.trace.count:
            self._rests = (self.trace.count, now)
        elif now - since > self.limit / 2 and self._lost_at is None:
            return ", ".join(
                part for part in (limits.pending_collective(), _main_thread_at()) if part
            )
        return ""


def watch_layers(blocks: nn.ModuleList, trace: Trace) -> None:
    """Notes which block the main thread is in, forward and backward."""
    for number, block in enumerate(blocks):
        name = f"block {number}"

        def entering(_module: nn.Module, _inputs: Any, name: str = name) -> None:
            trace.at(name)

        def leaving(
            _module: nn.Module, _inputs: Any, output: tuple[Tensor, Any], name: str = name
        ) -> None:
            if output[0].requires_grad:
                output[0].register_hook(lambda _gradient: trace.at(name))

        block.register_forward_pre_hook(entering)
        block.register_forward_hook(leaving)


def _runs(pid: int) -> bool:
    """Whether a process of this host is there and neither stopped nor about to end, which may take
    a while.
    """
    try:
        state, *more = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        writes_core = re.search(r"^CoreDumping:\s+1", Path(f"/proc/{pid}/status").read_text(), re.M)
    except OSError:
        return False
    return (
        state in "RSDI" and not int(more[5]) & 4 and not writes_core
    )  # PF_EXITING of Linux's include/linux/sched.h


def _main_thread_at() -> str:
    """``collectives.py:27 send_rows``: this program's innermost frame of the main thread, or else
    the innermost.
    """
    frame = sys._current_frames().get(threading.main_thread().ident)
    here = str(Path(__file__).parents[1])
    found = frame
    while found is not None and not found.f_code.co_filename.startswith(here):
        found = found.f_back
    found = found or frame
    return (
        ""
        if found is None
        else f"at {Path(found.f_code.co_filename).name}:{found.f_lineno} {found.f_code.co_name}"
    )
