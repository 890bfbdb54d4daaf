"""One shard file: a webdataset tar of `<key>.npy`, `<key>.cls` and perhaps `<key>.flip.npy`, written and read back.

Writing is deterministic and atomic. Reading trusts nothing: no pickles, no unsafe names, every sample accounted for.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
from webdataset import TarWriter
from webdataset.tariterators import base_plus_ext, tar_file_iterator


@dataclass(frozen=True)
class ShardFile:
    """One tar: its name in the folder, samples, bytes and SHA-256."""

    name: str
    count: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardArrays:
    """One shard in memory: arrays [count, *shape], the flipped images' arrays (or None), labels int64 [count]."""

    arrays: np.ndarray
    flipped: np.ndarray | None
    labels: np.ndarray


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A temporary file that becomes `path`, synced, if the block succeeds and vanishes if it fails."""
    # The process id keeps two writers of the same bytes (two ranks of a demo) out of each other's file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # a rename is durable only with its folder
    finally:
        os.close(directory)


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write_tar(path: Path, samples: Mapping[str, Mapping[str, object]]) -> None:
    """Write key → {extension: value} to `path`, atomically; equal samples give equal bytes."""
    with replacing(path) as stream:
        # An integer time: a float one makes tarfile put a 1 KiB extended header before every member.
        with TarWriter(stream, user="", group="", mtime=0, compress=False) as tar:
            for key, members in samples.items():
                tar.write({"__key__": key, **members})


def read_tar(
    path: Path,
    *,
    count: int,
    shape: tuple[int, ...],
    dtype: str,
    classes: int,
    flipped: bool,
) -> ShardArrays:
    """Read a shard that must hold exactly `count` samples of this shape and dtype, labels in [0, classes).

    Raises:
        ValueError: anything else, naming the shard and, where one is at fault, the member.
    """
    wanted = ("cls", "flip.npy", "npy") if flipped else ("cls", "npy")
    arrays = {kind: np.empty((count, *shape), dtype) for kind in wanted if kind != "cls"}
    labels = np.empty(count, np.int64)
    rows: dict[str, int] = {}
    seen: set[str] = set()
    for name, payload in _members(path):
        key, kind = base_plus_ext(name)
        if kind not in wanted:
            continue
        row = rows.setdefault(key, len(rows))
        try:
            if row >= count or name in seen:
                raise ValueError(f"second member of this name, or one sample more than the index's {count}")
            if kind == "cls":
                labels[row] = _decode_label(payload, classes)
            else:
                arrays[kind][row] = _decode_array(payload, shape, dtype)
        except (ValueError, EOFError, TypeError) as error:
            raise ValueError(f"shard {path.name}, member {name}: {error}") from error
        seen.add(name)
    missing = [f"{key}.{kind}" for key in rows for kind in wanted if f"{key}.{kind}" not in seen]
    if missing:
        raise ValueError(f"shard {path.name}: missing member {missing[0]} ({len(missing)} missing)")
    if len(rows) != count:
        raise ValueError(f"shard {path.name}: ends after {len(rows)} samples (last member {name if rows else 'none'}), "
                         f"its index says {count}")
    return ShardArrays(arrays["npy"], arrays.get("flip.npy"), labels)


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    current = "(none yet)"

    def note(member: str) -> bool:
        nonlocal current
        current = member
        return True

    with open(path, "rb") as stream:
        try:
            for item in tar_file_iterator(stream, skip_meta=None, select_files=note):
                member = PurePosixPath(item["fname"])
                if member.is_absolute() or ".." in member.parts:
                    raise ValueError(f"shard {path.name}, member {member}: unsafe name, absolute or with '..'")
                yield item["fname"], item["data"]
        except (tarfile.TarError, OSError, EOFError) as error:
            # A damaged header has no name: then the last member that was readable is the best address.
            reason = str(error).split(" @ ")[0]  # webdataset appends the stream's repr
            raise ValueError(f"shard {path.name}: unreadable at or after member {current}: {reason}") from error


def _decode_array(payload: bytes, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    array = np.lib.format.read_array(io.BytesIO(payload), allow_pickle=False)
    if array.shape != shape or array.dtype != np.dtype(dtype):
        raise ValueError(f"array is {array.dtype} {array.shape}, the index says {dtype} {shape}")
    return array


def _decode_label(payload: bytes, classes: int) -> int:
    label = int(payload.decode("ascii"))
    if not 0 <= label < classes:
        raise ValueError(f"label ({label}) must lie in [0, classes) with classes {classes}")
    return label
