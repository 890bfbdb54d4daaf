"""What training takes its batches from: a stream, and what the ranks agree on when data cannot be
read.

Shards that are left out are a part of the run: `bad_shards.json` in its folder says which, and from
which step. From there on the positions that fall on them get samples of the other shards, drawn by
position. So the order stays a function of position, whatever the layout, and a run that goes on
later reads the same again. All other samples keep their places.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from diffmoe.config import Config, DataConfig
from diffmoe.data.cache import Cache
from diffmoe.data.fit import check_fits, check_fits_training
from diffmoe.data.mixing import SHUFFLED_ORDER, better_order, completed, measure, order_for
from diffmoe.data.reader import ShardReader
from diffmoe.data.rows import BadShard
from diffmoe.data.shards import ShardIndex, load_index
from diffmoe.data.share import Share
from diffmoe.data.stream import Batch, BatchStream
from diffmoe.errors import UserError
from diffmoe.files import write_text
from diffmoe.parallel.collectives import AgreedError, agreed, gather_objects, raise_together
from diffmoe.parallel.groups import Group

RECORD_NAME = "bad_shards.json"
_VALIDATION_WINDOW = 64  # shards that held-out samples are drawn from together


def open_reader(config: Config, before: DataConfig | None = None) -> ShardReader:
    """The reader of a run's data; its streams and window are the configuration's, else those of the
    run `before`, else chosen. UserError when the data are not there, or do not fit the model.
    """
    data = config.data
    if not data.shards:
        raise UserError("data.shards ('') must name a folder of shards with an index.json")
    index = load_index(data.shards, data.index, check_files=data.on_bad_shard == "stop")
    check_fits_training(index, config)
    streams, window = _order_of(data, before, index, config.train.batch)
    return ShardReader(
        index,
        seed=config.run.seed,
        batch=config.train.batch,
        streams=streams,
        window=window,
        flip=data.flip,
        cache=cache_of(data),
        features=config.train.repa_weight > 0,
    )


def open_validation(config: Config) -> ShardReader:
    """The reader of `data.validation`: sample i, below their number, is the i-th of one fixed
    permutation, whatever the run's seed; never flipped. UserError as `open_reader`, and for fewer
    samples than `train.validate_samples`.
    """
    data, samples = config.data, config.train.validate_samples
    index = load_index(data.validation)
    check_fits(index, config, f"data.validation ({data.validation})")
    if samples is not None and samples > index.count:
        raise UserError(
            f"train.validate_samples ({samples}) must be at most the {index.count} samples of "
            f"data.validation ({data.validation})"
        )
    window = min(len(index.shards), _VALIDATION_WINDOW)
    return ShardReader(index, seed=0, window=window, cache=cache_of(data))


def _order_of(
    data: DataConfig, before: DataConfig | None, index: ShardIndex, batch: int
) -> tuple[int, int]:
    """Streams and window: what is said, then what the run had, then what suits the data."""
    if before is not None and before.streams is not None and before.window is not None:
        rest = before.streams, before.window
    elif data.streams is None and data.window is None:
        rest = order_for(is_shuffled(index), len(index.shards), batch)
    else:
        rest = SHUFFLED_ORDER  # who names one of them means what the other always was
    return data.streams or rest[0], data.window or rest[1]


def is_shuffled(index: ShardIndex) -> bool:
    """Whether the index says that its samples were written in a permutation."""
    return index.encoding is not None and index.encoding.shuffled is not None


def order_notice(reader: ShardReader, pool: int) -> tuple[str, bool]:
    """What is to be said about the classes in this reader's order, and whether it is a warning: a
    pool of `pool` samples holds fewer classes than a permutation's, or classes stay away for
    longer. Reads labels of some shards, as far as that is cheap; ("", False) where nothing can be
    known, or the index says that the data are shuffled.
    """
    index = reader.index
    at_hand = [] if is_shuffled(index) else reader.labels_at_hand()
    if all(labels is None for labels in at_hand):
        return "", False
    order = reader.order
    labels = completed(at_hand, order.counts.tolist(), index.meta.classes)
    found, permuted = measure(order, labels, pool)
    text = (
        f"a pool of {pool} samples holds {found.classes:.1f} classes on average, a permutation's "
        f"{permuted.classes:.1f}; a class is away for up to {found.absence:g} steps (median), in a "
        f"permutation {permuted.absence:g} (data.streams {reader.streams}, data.window "
        f"{reader.window})"
    )
    if found.like(permuted):
        return text, False
    streams, window = better_order(order, labels, pool)
    fix = f"data.window={window}"
    if streams != order.streams:
        fix = f"data.streams={streams} {fix}"
    text = f"{index.where} is in class order: {text}; {fix} fixes it, and so does encode, which"
    return f"{text} shuffles", True


def cache_of(data: DataConfig) -> Cache:
    """Where this node holds copies of remote shards."""
    default = Path(tempfile.gettempdir()) / f"diffmoe-cache-{os.getuid()}"
    return Cache(Path(data.cache) if data.cache else default, int(data.cache_gib * 2**30))


@dataclass
class Feed:
    """The batches of a run's steps, in order, for this rank; a context manager that leaves no
    worker behind.

    Args:
        reader: of the data set.
        share: this rank's positions.
        group: the ranks that agree.
        folder: of the run, where shards that are left out are written down.
        steps: the first step to read and the one after the last.
        pin: pin memory, for copies to a CUDA device.
        say: takes a line for the user, on rank 0.
    """

    reader: ShardReader
    share: Share
    group: Group
    folder: Path
    steps: range
    data: DataConfig
    _: KW_ONLY
    pin: bool
    say: Callable[[str], None]

    def __post_init__(self) -> None:
        self._record, self._next = self.folder / RECORD_NAME, self.steps.start
        self._stream: BatchStream | None = None
        self._upcoming: list[Batch] | None = None
        self._problem: Exception | None = None
        self.failure: AgreedError | None = None  # why the run must end, the same on every rank

    def first(self) -> list[Batch] | None:
        """The first step's micro-batches, None where no step is left; collective. AgreedError."""
        self._agree_on_data()
        self.read_ahead()
        self.decide_together(False)
        if self.failure:
            raise self.failure
        return self.take()

    def read_ahead(self) -> bool:
        """Reads the step after the one taken last, if there is one; whether this rank cannot."""
        self._upcoming, self._problem = None, None
        if self._next >= self.steps.stop:
            return False
        try:
            self._stream = self._stream or BatchStream(
                self.reader,
                self.share,
                start_step=self._next,
                pin=self.pin,
                workers=self.data.workers,
                prefetch=self.data.prefetch,
            )
            self._upcoming = next(self._stream)
        except (UserError, OSError) as error:
            self._problem = error
        return self._problem is not None

    def take(self) -> list[Batch] | None:
        """What `read_ahead` read; valid until the second reading after."""
        self._next += 1
        return self._upcoming

    def decide_together(self, stop_requested: bool) -> bool:
        """Collective, where a stop was requested of some rank, or one could not read: whether the
        run stops here. With `data.on_bad_shard: skip` it goes on without the shards that any rank
        found bad, from the step that was read ahead.
        """
        while True:
            states = gather_objects((stop_requested, self._bad_shard()), self.group)
            try:
                raise_together(None if self._bad_shard() else self._problem, self.group)
                if any(requested for requested, _ in states):
                    return True
                found = dict(bad for _, bad in states if bad)
                if not found:
                    return False
                self._leave_out(found)
            except AgreedError as failure:
                self.failure = failure
                return True
            self.read_ahead()

    def _bad_shard(self) -> tuple[str, str] | None:
        """Name and problem of the shard that this rank may do without."""
        if self.data.on_bad_shard == "skip" and isinstance(self._problem, BadShard):
            return self._problem.shard, self._problem.problem
        return None

    def _leave_out(self, found: dict[str, str]) -> None:
        entries = self._entries() + [
            {"shard": name, "step": self._next, "problem": found[name]} for name in sorted(found)
        ]
        excluded = {entry["shard"]: entry["step"] for entry in entries}
        lost = sum(shard.count for shard in self.reader.index.shards if shard.name in excluded)
        total = self.reader.index.count
        if lost > self.data.bad_share * total:
            raise AgreedError(
                f"{len(excluded)} bad shards hold {lost} of {total} samples, more than "
                f"data.bad_share ({self.data.bad_share}) allows; the last: shard "
                f"{max(found)}{found[max(found)]}"
            )
        with agreed(self.group):
            if self.group.index == 0:
                write_text(self._record, json.dumps(entries, indent=1) + "\n")
        for name in sorted(found):
            self.say(
                f"left out from step {self._next} on: shard {name}{found[name]} ({self._record})"
            )
        self._read_without(excluded)

    def _read_without(self, excluded: dict[str, int]) -> None:
        self.close()
        self.reader = self.reader.without(
            {name: step + self.share.shift for name, step in excluded.items()}
        )

    def _agree_on_data(self) -> None:
        """The same data set on every rank, and the same shards left out."""
        with agreed(self.group):
            entries = self._entries()
        seen = gather_objects((entries, self.reader.index.fingerprint), self.group)
        entries, first = seen[0]
        for rank, (_, other) in zip(self.group.ranks, seen):
            if other != first:
                raise AgreedError(
                    f"data.shards ({self.data.shards}): rank {rank} sees another data set "
                    f"({other[:12]}) than rank {self.group.ranks[0]} ({first[:12]})"
                )
        if entries:
            self.say(f"{len(entries)} bad shards are left out, as {self._record} says")
            self._read_without({entry["shard"]: entry["step"] for entry in entries})

    def _entries(self) -> list[dict]:
        """Shards left out so far: name, first step without it, and why."""
        if not self._record.exists():
            return []
        try:
            entries = json.loads(self._record.read_text())
            return [
                {"shard": str(e["shard"]), "step": int(e["step"]), "problem": str(e["problem"])}
                for e in entries
            ]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self._record} is malformed: {type(error).__name__}: {error}"
            ) from error

    def close(self, waits: bool = True) -> None:
        """Ends the workers; harmless when repeated.  ``waits``: see :meth:`BatchStream.close`."""
        if self._stream is not None:
            self._stream.close(waits)
            self._stream = None

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        self.close(waits=error is None)
