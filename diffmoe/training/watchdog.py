"""A dead or hung rank is noticed, named and ends the job, in place of silence.

Every rank has a thread that leaves a beat in the store through which the ranks met (no shared file system needed): a tick of its
own, and where its main thread is.  Rank 0 looks at all of them, the others at rank 0.  When a rank has not ticked, or no main
thread has moved, for ``run.timeout_s`` (three times that until the first step is done), rank 0 writes a verdict that names the
rank, and every process ends with ``EXIT_LOST``.  A connection that breaks (gloo's answer to a dead peer) asks for the verdict at
once.  Times are read on the judge's own clock: nodes' clocks may differ.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from diffmoe.parallel.collectives import EXIT_LOST, AgreedError, is_lost_peer
from diffmoe.parallel.groups import ParallelGroups
from diffmoe.parallel.trace import Trace

START_FACTOR = 3
_SHOWN = 16  # ranks in a report


@dataclass(frozen=True)
class Beat:
    """What a rank last said of itself.  ``state``: empty, ``lost`` (a connection of its broke), or why it ended."""

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
    """When, on this process's clock, a rank's thread and its main thread last moved."""

    beat: Beat
    ticked: float
    moved: float


class Watchdog:
    """Around a run; ``timeout_s`` 0 leaves only the one-line report of a broken connection."""

    def __init__(self, groups: ParallelGroups, timeout_s: float) -> None:
        self.groups, self.trace, self.timeout_s = groups, groups.trace, timeout_s
        self.rank, self.world = groups.rank, groups.world.size
        self.interval = min(5.0, max(1.0, timeout_s / 20)) if timeout_s else 5.0
        self._tick = 0
        self._state = ""  # of this rank's beats; only the main thread writes it, and only once
        self._told, self._hurry = threading.Event(), threading.Event()
        self._store = self._open_store()
        self._seen: dict[int, _Seen] = {}
        self._rests = (-1, 0.0)  # the main thread's count when it last moved, and when that was
        self._contact = time.monotonic()  # when the store last answered
        self._store_error = ""
        self._broken = False
        self._verdict: str | None = None
        self._lost_at: float | None = None
        self._stopping = threading.Event()
        # Two, since a store whose process is stopped answers never: one talks to it, the other looks at the clock.
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
        self._contact = time.monotonic()
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

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None) -> None:
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
                time.sleep(2 * self.interval)  # the store may end with this process: the others read it first
        self.stop()

    def stop(self) -> None:
        """Ends the watch; every rank calls it before any of them leaves, since rank 0 may hold the store."""
        self._stopping.set()
        self._hurry.set()
        for thread in (self._thread, self._talker):
            if thread.is_alive():
                thread.join(2 * self.interval + 5)

    @property
    def limit(self) -> float:
        return self.timeout_s * (1 if self.trace.warm else START_FACTOR)

    # ------------------------------------------------------------------------------------------------ the thread

    def _watch(self) -> None:
        while not self._stopping.wait(self.interval / 2):
            verdict = self._verdict or self._without_store()
            if verdict and not self._stopping.is_set() and self._state in ("", "lost"):  # else it ends by an error of its own
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
                self._contact = time.monotonic()
            except RuntimeError as error:  # torch's errors of a store
                self._store_error = f" ({str(error).splitlines()[0][:120]})"
                if "imeout" not in str(error) and "imed out" not in str(error):
                    self._broken = True  # and does not mend
                    return

    def _tell(self) -> None:
        """Leaves a beat.  The thread that talks does, and the main thread only while that one does not run: beats of two could
        overtake each other, and one without a state hide one that has it."""
        self._tick += 1
        state = self._state
        beat = Beat(self.rank, socket.gethostname(), os.getpid(), self._tick, self.trace, state, self._place())
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
            return f"rank {self.rank} ends with exit code {EXIT_LOST} as well: {text.splitlines()[0]}"
        self._read([0])
        return self._judge_first_rank()

    def _read(self, ranks: range | list[int]) -> None:
        now = time.monotonic()
        keys = [f"beat/{rank}" for rank in ranks if rank in self._seen or self._store.check([f"beat/{rank}"])]
        for text in self._store.multi_get(keys) if self._store.has_extended_api() else map(self._store.get, keys):
            beat = Beat.loads(text)
            seen = self._seen.get(beat.rank)
            if seen is None:
                self._seen[beat.rank] = _Seen(beat, now, now)
                continue
            seen.ticked = now if beat.tick != seen.beat.tick else seen.ticked
            seen.moved = now if beat.trace.count != seen.beat.trace.count else seen.moved
            seen.beat = beat

    def _judge(self) -> str | None:
        """Rank 0's view of all ranks: a report, or None while all is well."""
        now = time.monotonic()
        ended = [seen for seen in self._seen.values() if seen.beat.state not in ("", "lost")]
        if ended:
            return self._report([f"{s.beat.who()} ended by {s.beat.state}" for s in ended], ended)
        if not any(max(now - s.ticked, now - s.moved) > self.limit for s in self._seen.values()):
            return None
        silent = [s for s in self._seen.values() if now - s.ticked > 3 * self.interval + 1]
        if silent:
            return self._report([f"{s.beat.who()} has not answered for {now - s.ticked:.0f} s" for s in silent], silent)
        elsewhere = [s for s in self._seen.values() if not s.beat.trace.waiting]
        least = min(s.beat.trace.count for s in self._seen.values())
        stuck = elsewhere if 0 < len(elsewhere) < self.world else [
            s for s in self._seen.values() if s.beat.trace.count == least]
        return self._report([f"{s.beat.who()} has made no progress for {now - s.moved:.0f} s" for s in stuck], stuck)

    def _judge_first_rank(self) -> str | None:
        now, first = time.monotonic(), self._seen.get(0)
        if first is None:
            return None
        if first.beat.state not in ("", "lost"):
            headline = f"{first.beat.who()} ended by {first.beat.state}"
        elif now - first.ticked > self.limit + 2 * self.interval:  # it judges the others, so it gets a little longer
            headline = f"{first.beat.who()} has not answered for {now - first.ticked:.0f} s"
        else:
            return None
        if self.rank > 1:
            return f"rank {self.rank} ends with exit code {EXIT_LOST}: {headline}"
        self._read(range(self.world))
        return self._report([headline], [first])

    def _after_a_break(self) -> str | None:
        """A connection of this rank broke: who is gone?  Those who ended said so; those who were killed tick no more."""
        now = time.monotonic()
        ended = [s for s in self._seen.values() if s.beat.state not in ("", "lost")]
        if not ended and now - self._lost_at < 2.5 * self.interval + 1:
            return None
        silent = [s for s in self._seen.values() if not s.beat.state and now - s.ticked > 2 * self.interval]
        gone = ended or silent
        headlines = [f"{s.beat.who()} ended by {s.beat.state}" for s in ended] or [f"{s.beat.who()} is gone" for s in silent]
        living = [rank for rank in range(self.world) if rank not in {s.beat.rank for s in gone}]
        if not gone:
            headlines = ["a connection between ranks broke, and all of them are there"]
        if self.rank != living[0]:
            return f"rank {self.rank} ends with exit code {EXIT_LOST}: {'; '.join(headlines[:_SHOWN])}"
        return self._report(headlines, gone)

    def _without_store(self) -> str | None:
        """The store has been silent for too long: its process is lost or stopped."""
        silence = time.monotonic() - self._contact
        sure = self._broken or self._lost_at is not None
        if silence < (3.5 * self.interval if sure else self.limit) + 2 * self.interval:
            return None
        by_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        first = self._seen[0].beat.who() if 0 in self._seen else "rank 0"
        holder = "the launcher" if by_launcher else first
        return self._report([f"{holder}, which holds the store, has not answered for {silence:.0f} s{self._store_error}"],
                            [self._seen[0]] if 0 in self._seen and not by_launcher else [])

    def _report(self, headlines: list[str], first: list[_Seen]) -> str:
        """One line that names the culprits, then where each rank is, culprits first."""
        others = [s for _, s in sorted(self._seen.items()) if s not in first]
        lines = [f"watchdog: {'; '.join(headlines[:_SHOWN])} (run.timeout_s {self.timeout_s:g}); the job ends with exit code "
                 f"{EXIT_LOST}, the same command goes on from the last checkpoint"]
        heard = [f"  {s.beat.who()}: when last heard, {s.beat.where()}" for s in first]
        lines += [*heard, *(f"  {s.beat.who()}: {s.beat.where()}" for s in others)][:_SHOWN]
        return "\n".join(lines + [f"  … {len(self._seen) - _SHOWN} more ranks"] * (len(self._seen) > _SHOWN))

    def _end(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)
        if self.rank == 0 and self.world > 1 and self._verdict is not None:
            threading.Thread(target=self._store.set, args=("verdict", text), daemon=True).start()
            time.sleep(2 * self.interval)  # the store may die with this process: the others read it first
        sys.stdout.flush()
        os._exit(EXIT_LOST)

    # --------------------------------------------------------------------------------------- the main thread's end

    def _lost(self, error: BaseException) -> None:
        """A peer is gone.  The thread finds out who; this returns never."""
        self._state = "lost"
        self._lost_at = time.monotonic()
        if not self._thread.is_alive():
            self._begin()
        self._thread.join(8 * self.interval + 10)
        self._end(f"rank {self.rank} ends with exit code {EXIT_LOST}: {' '.join(str(error).split())[:200]}")

    def _place(self) -> str:
        """Once the main thread has rested for a while: where, and in which of torch's collectives."""
        count, since = self._rests
        now = time.monotonic()
        if count != self.trace.count:
            self._rests = (self.trace.count, now)
        elif now - since > self.limit / 2 and self._lost_at is None:
            return ", ".join(part for part in (_pending_collective(), _main_thread_at()) if part)
        return ""


def watch_layers(blocks: nn.ModuleList, trace: Trace) -> None:
    """Notes which block the main thread is in, forward and backward."""
    for number, block in enumerate(blocks):
        name = f"block {number}"

        def entering(_module: nn.Module, _inputs: Any, name: str = name) -> None:
            trace.at(name)

        def leaving(_module: nn.Module, _inputs: Any, output: tuple[Tensor, Any], name: str = name) -> None:
            if output[0].requires_grad:
                output[0].register_hook(lambda _gradient: trace.at(name))

        block.register_forward_pre_hook(entering)
        block.register_forward_hook(leaving)


def record_collectives() -> None:
    """Switches torch's flight recorder on; before ``init_process_group``."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "200")


def _pending_collective() -> str:
    """The oldest collective that torch's flight recorder calls unfinished, where this build has one."""
    library = torch._C._distributed_c10d
    dump = getattr(library, "_dump_nccl_trace_json", None) or getattr(library, "_dump_fr_trace_json", None)
    if dump is None:
        return ""
    try:
        entries = json.loads(dump(includeCollectives=True, onlyActive=True)).get("entries") or []
        entry = next((entry for entry in entries if not entry.get("retired")), None)
        return "" if entry is None else (f"unfinished {entry['profiling_name']} {entry['input_sizes']}, number "
                                         f"{entry['collective_seq_id']} of group {entry['process_group'][0]}")
    except (KeyError, TypeError, ValueError, RuntimeError) as error:  # private, and another form must not end a run
        return f"torch's flight recorder is not readable ({type(error).__name__})"


def _main_thread_at() -> str:
    """``collectives.py:27 send_rows``: this program's innermost frame of the main thread, or else the innermost."""
    frame = sys._current_frames().get(threading.main_thread().ident)
    here = str(Path(__file__).parents[1])
    found = frame
    while found is not None and not found.f_code.co_filename.startswith(here):
        found = found.f_back
    found = found or frame
    return "" if found is None else f"at {Path(found.f_code.co_filename).name}:{found.f_lineno} {found.f_code.co_name}"
