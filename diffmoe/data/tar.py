"""One shard file: a webdataset tar of `<key>.npy`, `<key>.cls` and perhaps `<key>.flip.npy` and
`<key>.features.npy`, written completely or not at all (`rows.py` reads it).
"""

from __future__ import annotations

import io
import tarfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from diffmoe.data.members import FEATURES
from diffmoe.data.rows import BLOCK, ROWS_NAME, RowTable, pack_table, scan_rows
from diffmoe.files import replacing


@dataclass(frozen=True)
class ShardFile:
    """One tar: its name in the folder, samples, bytes and SHA-256."""

    name: str
    count: int
    bytes: int
    sha256: str


def write_tar(path: Path, samples: Mapping[str, Mapping[str, object]]) -> None:
    """Write key → {"npy": array, "cls": label, perhaps "flip.npy" and "features.npy": arrays} to
    `path`, atomically, and the table of its rows first; equal samples give equal bytes.
    """
    # Seconds, since it brings torch: the loader's processes do without.
    from webdataset import TarWriter

    flips = any("flip.npy" in members for members in samples.values())
    features = any(FEATURES in members for members in samples.values())
    nothing = np.zeros((len(samples), 1 + flips + features), np.int64)
    blank = pack_table(RowTable(np.zeros(len(samples), np.int64), nothing, nothing, None))
    with replacing(path) as stream:
        # An integer time: a float one makes tarfile put a 1 KiB extended header before every
        # member.
        with TarWriter(stream, user="", group="", mtime=0, compress=False) as tar:
            header = tarfile.TarInfo(ROWS_NAME)
            header.size, header.mode = len(blank), 0o444
            tar.tarstream.addfile(header, io.BytesIO(blank))
            for key, members in samples.items():
                tar.write({"__key__": key, **members})
        # The table is of what is there, and takes the room that was kept for it.
        table = scan_rows(stream, path.name, flips, len(samples), 2**62, features=features)
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
