"""Samples by training position. No torch here: the loader's processes start without it.

Position p (samples seen so far, over the whole run) decides everything about a sample: which one it
is, its flip, its VAE noise. So the same run reads the same samples on any number of ranks, and
resumes anywhere without replay.
"""

from __future__ import annotations

import os
import resource
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from diffmoe.data.cache import Cache
from diffmoe.data.order import SampleOrder
from diffmoe.data.rows import BadShard, OpenShard, has_table
from diffmoe.data.shards import ShardIndex
from diffmoe.data.tar import ShardFile
from diffmoe.data.values import by_channel, normals, std_of, to_float
from diffmoe.errors import UserError
from diffmoe.files import retried, sha256
from diffmoe.random_streams import Use, Words, philox

T = TypeVar("T")
_FETCHES = 8  # at the same time
_OTHER_FILES = 256  # what else a training process has open
# Shards whose labels are looked at: by their tables, by their headers, by fetching them.
_TABLES, _SCANS, _FEW_REMOTE = 256, 16, 8


class ShardReader:
    """Reads samples by training position. Not for use by several threads at once; picklable.

    Args:
        index: the data set.
        seed: fixes order, flips and VAE noise.
        batch, streams, window: see `SampleOrder`.
        flip: mirror about half of the samples, each by its position's own coin.
        cache: where copies of remote shards are held; not needed for local ones.
        features: read these as well, which the data set has.
        excluded: shards by name, each with the step from which its samples are replaced by others,
            drawn by position.

    Raises:
        UserError: `flip` asked of latents or moments that were written without flipped ones; no
            cache for remote shards; nothing left that is not excluded.
    """

    def __init__(
        self,
        index: ShardIndex,
        *,
        seed: int,
        batch: int = 1,
        streams: int = 1,
        window: int = 1,
        flip: bool = False,
        cache: Cache | None = None,
        features: bool = False,
        excluded: Mapping[str, int] | None = None,
    ) -> None:
        if flip and index.meta.kind != "pixels" and not index.flips:
            raise UserError(
                f"flip (True) needs flipped {index.meta.kind}; the data set {index.where} has none "
                "(flips False)"
            )
        if index.place and cache is None:
            raise UserError(f"the data set {index.where} is remote and needs a cache")
        self.index, self.seed, self.flip, self.cache = index, seed, flip, cache
        self._mean, self._scale = (
            by_channel(numbers, index.x_shape[0]) for numbers in (index.meta.mean, index.meta.scale)
        )
        self.batch, self.streams, self.window = batch, streams, window
        self.features = index.features if features else ()  # shape of a sample's
        self.excluded = dict(excluded or {})
        numbers = {shard.name: number for number, shard in enumerate(index.shards)}
        self._excluded = {
            numbers[name]: step for name, step in self.excluded.items() if name in numbers
        }
        if len(self._excluded) == len(index.shards):
            raise UserError(
                f"every shard of {index.where} is bad: {', '.join(sorted(self.excluded)[:3])}, …"
            )
        counts = [shard.count for shard in index.shards]
        self.order = SampleOrder(counts, seed=seed, batch=batch, streams=streams, window=window)
        self._capacity = 0  # of open shards
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._failed: dict[int, BaseException] = {}  # opening them; raised at their row's turn
        self._verified: set[int] = set()
        self._coins, self._noise = Words(Use.FLIP, seed), Words(Use.MOMENTS, seed)
        self._ahead: ThreadPoolExecutor | None = None

    def __reduce__(self) -> tuple:
        names = ("seed", "batch", "streams", "window", "flip", "cache", "excluded")
        settings = {name: getattr(self, name) for name in names}
        return partial(ShardReader, features=bool(self.features), **settings), (self.index,)

    def without(self, excluded: Mapping[str, int]) -> ShardReader:
        """A reader of the same data that leaves out these shards, each from its step on."""
        make, (index,) = self.__reduce__()
        return make(index, excluded=excluded)

    def places(self, positions: Sequence[int]) -> list[tuple[int, int]]:
        """Shard number and row in it of each position, after exclusions."""
        found = self.order.places(np.asarray(positions, np.int64))
        return [
            self._substitute(position)
            if self._excluded and self._excluded.get(number, 2**63) <= position // self.batch
            else (number, row)
            for position, (number, row) in zip(positions, found.tolist())
        ]

    def _substitute(self, position: int) -> tuple[int, int]:
        """Some sample of a shard that is good at this position."""
        step, counts = position // self.batch, self.order.counts.copy()
        counts[[number for number, since in self._excluded.items() if since <= step]] = 0
        ends = np.cumsum(counts)
        draw = int(philox(Use.SUBSTITUTE, self.seed, position).random_raw()) % int(ends[-1])
        number = int(np.searchsorted(ends, draw, side="right"))
        return number, draw - int(ends[number] - counts[number])

    def read(self, positions: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Samples at `positions` (>= 0, over any epochs): x float32 [n, C, H, W], y int64 [n]."""
        x = np.empty((len(positions), *self.index.x_shape), np.float32)
        y = np.empty(len(positions), np.int64)
        self.fill(positions, x, y)
        return x, y

    def fill(
        self,
        positions: Sequence[int],
        x: np.ndarray,
        y: np.ndarray,
        features: np.ndarray | None = None,
    ) -> None:
        """`read` into given arrays, and the samples' features, float16 [n, N, d], with `features`.

        Raises:
            BadShard: a shard or member that is missing, corrupt or unsafe, by name.
        """
        meta, flips = self.index.meta, self.index.flips
        places = self.places(positions)
        if (capacity := self._files_of(positions)) > self._capacity:
            self.allow_open_files(positions)
            self._capacity = capacity
        self._failed.clear()
        if self.index.place:
            self._fetch({number for number, _ in places})
        mirrored = [self.flip and int(self._coins.at(p, 1)[0]) >> 63 == 1 for p in positions]
        for (number, row), mirror in zip(places, mirrored):
            self._shard(number).advise(row, int(mirror and flips))
            if features is not None:
                self._shard(number).advise(row, -1)
        for i, (number, row) in enumerate(places):
            shard = self._shard(number)
            kind = int(mirrored[i] and flips)
            try:
                stored = retried(lambda: shard.array(row, kind), f"shard {shard.name}")
                if features is not None:
                    features[i] = retried(lambda: shard.features(row), f"shard {shard.name}")
            except OSError as error:
                raise BadShard(shard.name, f", row {row}: {error}") from error
            y[i] = shard.table.labels[row]
            if meta.kind == "moments":
                self._draw(stored, positions[i], x[i])
            else:
                if meta.kind == "latents":
                    stored = to_float(stored, self.index.dtype)
                elif mirrored[i]:
                    stored = stored[..., ::-1]
                np.subtract(stored, self._mean, out=x[i], dtype=np.float32)
            np.multiply(x[i], self._scale, out=x[i])

    def _draw(self, stored: np.ndarray, position: int, x: np.ndarray) -> None:
        """A latent from its moments, with the position's own noise, minus the data set's mean."""
        meta, values = self.index.meta, to_float(stored, self.index.dtype)
        mean, std = values[: len(x)], std_of(values[len(x) :], meta.spread)
        np.multiply(std, normals(self._noise.at(position, -(-x.size // 4)), x.shape), out=x)
        np.add(mean, x, out=x)
        if meta.mean:
            np.subtract(x, self._mean, out=x)

    def _files_of(self, positions: Sequence[int]) -> int:
        """What the windows of these positions' streams hold, and one each where a window ends and
        the next begins.
        """
        return min(self.order.streams_of(positions) * (self.window + 1), len(self.index.shards))

    def allow_open_files(self, positions: Sequence[int]) -> None:
        """Raises this process's soft limit of open files where it is in the way of reading such
        positions of every step.

        Raises:
            UserError: the hard limit is.
        """
        count, streams = self._files_of(positions), max(1, self.order.streams_of(positions))
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        needed = count + _OTHER_FILES
        if soft == resource.RLIM_INFINITY or soft >= needed:
            return
        if hard != resource.RLIM_INFINITY and hard < needed:
            room = max(0, hard - _OTHER_FILES)
            window, fewer = room // streams - 1, room // (self.window + 1)
            instead = ""
            if window >= 1:
                instead = f", or set data.window to at most {window}"
            elif fewer >= 1:
                at_most = self.order.streams * fewer // streams
                instead = f", or set data.streams to at most {at_most}"
            raise UserError(
                f"data.streams ({self.streams}, {streams} of them read by one process) x "
                f"data.window ({self.window}) need {count} open files and {_OTHER_FILES} for the "
                f"rest; this system allows {hard} (ulimit -Hn): raise that limit{instead}"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))

    def check_cache(self, positions: Sequence[int]) -> None:
        """UserError where the windows of these positions' streams, even of the smallest shards, are
        larger than the cache of remote shards: reading would end there, once the cache is full.
        """
        if not self.cache or not self.index.place:
            return
        streams = self.order.streams_of(positions)
        held = sorted(shard.bytes for shard in self.index.shards)[: streams * self.window]
        if sum(held) > self.cache.limit:
            raise UserError(
                f"data.cache_gib ({self.cache.limit / 2**30:.3g}) is too small: data.streams "
                f"({self.streams}, {streams} of them read by one process) x data.window "
                f"({self.window}) keep {len(held)} shards of {self.index.where} in use, "
                f"{sum(held) / 2**30:.3g} GiB; raise it, or name smaller data.streams and "
                "data.window"
            )

    def fetch_ahead(self, positions: Sequence[int]) -> None:
        """Begins to fetch what is remote of these; failures show when the positions are read."""
        if not self.index.place:
            return
        self._ahead = self._ahead or ThreadPoolExecutor(2, thread_name_prefix="fetch-ahead")
        for number in {number for number, _ in self.places(positions)} - self._open.keys():
            self._ahead.submit(self._touch, self.index.shards[number])

    def _touch(self, file: ShardFile) -> None:
        os.close(self.descriptor(file))

    def _fetch(self, numbers: set[int]) -> None:
        """Opens the missing ones of these shards, several at a time."""
        missing = [number for number in numbers if number not in self._open][: self._capacity]
        self._make_way(len(missing))
        with ThreadPoolExecutor(_FETCHES, thread_name_prefix="fetch") as pool:
            opening = {number: pool.submit(self._open_shard, number) for number in missing}
        for number, future in opening.items():
            if error := future.exception():
                self._failed[number] = error
            else:
                self._open[number] = future.result()

    def _shard(self, number: int) -> OpenShard:
        if number in self._failed:
            raise self._failed[number]
        if number not in self._open:
            self._make_way(1)
            self._open[number] = self._open_shard(number)
        self._open.move_to_end(number)
        return self._open[number]

    def _make_way(self, count: int) -> None:
        """Closes what was used longest ago, so that there is room for so many more open shards."""
        while self._open and len(self._open) + count > self._capacity:
            self._open.popitem(last=False)[1].close()

    def _open_shard(self, number: int) -> OpenShard:
        file = self.index.shards[number]
        descriptor = self.descriptor(file)
        try:
            flipped, features = self.flip and self.index.flips, bool(self.features)
            shard = OpenShard(descriptor, file, self.index, flipped=flipped, features=features)
            # Without the rows' own checksums, the whole file's: once a run, since it costs a pass
            # over the file.
            if shard.scanned and number not in self._verified:
                if sha256(Path(f"/proc/self/fd/{descriptor}")) != file.sha256:
                    for row, kind in np.ndindex(shard.table.offsets.shape):
                        shard.array(row, kind)  # names the member, if one cannot be decoded
                    raise BadShard(
                        file.name,
                        f" in {self.index.where}: SHA-256 is not the index's ({file.sha256})",
                    )
                self._verified.add(number)
            return shard
        except BaseException:
            os.close(descriptor)
            raise

    def labels_at_hand(self) -> list[np.ndarray | None]:
        """Every shard's labels, as far as they are cheap to have: of at most 256 shards, all over
        the data set; of 16 where they have no tables of rows; of a remote data set only those that
        are in the cache, or all where they are few. None: unknown.
        """
        shards = self.index.shards
        numbers = list(range(len(shards)))
        if self.cache and self.index.place and len(numbers) > _FEW_REMOTE:
            numbers = [n for n in numbers if self.cache.has(shards[n])]
        found: list[np.ndarray | None] = [None] * len(shards)
        if not numbers:
            return found
        tables = self.index.meta.members.ours and self._look(shards[numbers[0]], has_table)
        some = min(len(numbers), _TABLES if tables else _SCANS)
        some_numbers = [numbers[i * len(numbers) // some] for i in range(some)]

        def labels(number: int) -> np.ndarray | None:
            file = shards[number]
            return self._look(
                file, lambda opened: OpenShard(opened, file, self.index, flipped=False).table.labels
            )

        # Scans may parse headers of arrays, which is for one thread (see `rows.unpack_table`).
        with ThreadPoolExecutor(_FETCHES if tables else 1, thread_name_prefix="labels") as pool:
            for number, known in zip(some_numbers, pool.map(labels, some_numbers)):
                found[number] = known
        return found

    def _look(self, file: ShardFile, look: Callable[[int], T]) -> T | None:
        """What `look` finds in the shard; None where it is bad, which reading its rows will say."""
        try:
            with self.opened(file) as descriptor:
                return look(descriptor)
        except BadShard:
            return None

    @contextmanager
    def opened(self, file: ShardFile) -> Iterator[int]:
        """`descriptor`, closed at the end."""
        with open(self.descriptor(file), "rb") as stream:
            yield stream.fileno()

    def descriptor(self, file: ShardFile) -> int:
        """A descriptor of a shard's tar, which the caller closes. BadShard where there is none."""
        address = self.index.address(file)
        if self.cache and self.index.place:
            return self.cache.open(file, address)
        try:
            return retried(lambda: os.open(address, os.O_RDONLY), address)
        except FileNotFoundError as error:
            raise BadShard(file.name, f" is missing from {self.index.where}") from error
        except OSError as error:
            raise BadShard(file.name, f" cannot be opened: {error}") from error

    def close(self) -> None:
        """Closes all files; harmless when repeated."""
        if self._ahead:
            self._ahead.shutdown(cancel_futures=True)
            self._ahead = None
        while self._open:
            self._open.popitem()[1].close()
