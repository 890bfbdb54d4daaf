"""One shard file: a webdataset tar of `<key>.npy`, `<key>.cls` and perhaps `<key>.flip.npy`,
written whole or not at all (`rows.py` reads it).
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from diffmoe.data.rows import BLOCK, ROWS_NAME, RowTable, pack_table, scan_rows


@dataclass(frozen=True)
class ShardFile:
    """One tar: its name in the folder, samples, bytes and SHA-256."""

    name: str
    count: int
    bytes: int
    sha256: str


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A temporary file that becomes `path`, synced, if the block succeeds and vanishes if it fails."""
    # The process id keeps two writers of the same bytes (two ranks of a demo) out of each other's
    # file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "w+b") as stream:
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


def check_writable(path: Path) -> None:
    """OSError, before hours of work, where `replacing` could not write `path` after them."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    with tempfile.TemporaryFile(dir=path.parent):
        pass


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write_tar(path: Path, samples: Mapping[str, Mapping[str, object]]) -> None:
    """Write key → {"npy": array, "cls": label, perhaps "flip.npy": array} to `path`, atomically,
    and the table of its rows first; equal samples give equal bytes.
    """
    with replacing(path) as stream:
        write_tar_to(stream, path.name, samples)


def write_tar_to(stream: BinaryIO, name: str, samples: Mapping[str, Mapping[str, object]]) -> None:
    """`write_tar` into an open file that can be read and sought."""
    from webdataset import (
        TarWriter,
    )  # seconds, since it brings torch: the loader's processes do without

    flips = any("flip.npy" in members for members in samples.values())
    nothing = np.zeros((len(samples), 1 + flips), np.int64)
    blank = pack_table(RowTable(np.zeros(len(samples), np.int64), nothing, nothing, None))
    # An integer time: a float one makes tarfile put a 1 KiB extended header before every member.
    with TarWriter(stream, user="", group="", mtime=0, compress=False) as tar:
        header = tarfile.TarInfo(ROWS_NAME)
        header.size, header.mode = len(blank), 0o444
        tar.tarstream.addfile(header, io.BytesIO(blank))
        for key, members in samples.items():
            tar.write({"__key__": key, **members})
    # The table is of what is there, and takes the room that was kept for it.
    table = scan_rows(stream, name, flips, len(samples), 2**62)
    packed = pack_table(replace(table, crcs=_checksums(stream, table)))
    stream.seek(BLOCK)
    stream.write(packed)


def _checksums(stream: BinaryIO, table: RowTable) -> np.ndarray:
    """CRC-32 of every array's header block and payload [n, kinds]."""
    crcs = np.zeros(table.offsets.shape, np.uint32)
    for place, offset in np.ndenumerate(table.offsets):
        stream.seek(int(offset))
        crcs[place] = zlib.crc32(stream.read(BLOCK + int(table.sizes[place])))
    return crcs
