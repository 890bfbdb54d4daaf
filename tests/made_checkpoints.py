"""Checkpoints of any shape without a model behind them: values are a function of kind and name,
written as some number of expert-parallel ranks would write them.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from diffmoe.checkpoints import writer
from diffmoe.checkpoints.manifest import MANIFEST, manifest_text, read_manifest
from diffmoe.checkpoints.reader import BUFFERS, Checkpoint, step_folder
from diffmoe.checkpoints.tensor_file import Piece
from diffmoe.config import Config, load_config
from diffmoe.layout import Layout
from diffmoe.models.logical import fresh_buffers
from diffmoe.training.checkpoint_check import expected_shapes

_PATTERN = torch.randn(2**18 + 3, generator=torch.Generator().manual_seed(0)).abs()


def made(kind: str, piece: Piece) -> Tensor:
    """The flat values of a piece: a walk through a fixed table, from a place that kind and name
    decide.
    """
    first = zlib.crc32(f"{kind}/{piece.name}".encode()) + piece.start
    at, left, parts = first % len(_PATTERN), piece.stop - piece.start, []
    while left > 0:
        parts.append(_PATTERN[at : at + left])
        left, at = left - len(parts[-1]), 0
    return torch.cat(parts)


def made_whole(kind: str, name: str, shape: tuple[int, ...]) -> Tensor:
    """The whole tensor that ``made`` gives pieces of."""
    return made(kind, Piece(name, shape, 0, math.prod(shape))).view(shape)


def make_checkpoint(folder: Path, config: Config, step: int, ranks: int = 2) -> Path:
    """A complete checkpoint in ``folder``, written in turn by the ``ranks`` of one expert-parallel
    group.
    """
    partial = writer.prepare(folder, step)
    for rank in range(ranks):
        shares = {
            kind: _share(kind, shapes, config.moe.experts, rank, ranks)
            for kind, shapes in expected_shapes(config, moments=True).items()
            if kind != BUFFERS
        }
        if rank == 0:
            shares[BUFFERS] = writer.whole_tensors(fresh_buffers(config.model, config.moe))
        writer.write_part(partial, rank, shares)
    written = writer.join_parts(partial, ranks, lambda: False)
    layout = Layout(ranks, ranks, 16, 16 // ranks, 1, 16, ranks)
    writer.commit(partial, step_folder(folder, step), written, config, layout, {})
    return step_folder(folder, step)


def _share(
    kind: str, shapes: dict[str, tuple[int, ...]], experts: int, rank: int, ranks: int
) -> writer.Share:
    """An even run of all dense elements, and whole experts."""
    total = sum(math.prod(shape) for name, shape in shapes.items() if ".experts." not in name)
    first, last = total * rank // ranks, total * (rank + 1) // ranks
    pieces, before = [], 0
    for name, shape in shapes.items():
        size = math.prod(shape)
        if ".experts." in name:
            if int(name.split(".experts.")[1].split(".")[0]) * ranks // experts == rank:
                pieces.append(Piece(name, shape, 0, size))
            continue
        start, stop = max(first - before, 0), min(last - before, size)
        if start < stop:
            pieces.append(Piece(name, shape, start, stop))
        before += size

    def values() -> Iterator[Tensor]:
        for piece in pieces:
            yield made(kind, piece)

    return writer.Share([(piece, torch.float32) for piece in pieces], values())


def rewrite_manifest(folder: Path, change) -> None:
    """Changes a manifest's tree as an attacker would, with a checksum that fits; ``change`` works
    in place.
    """
    tree = json.loads((folder / MANIFEST).read_text())
    del tree["crc32"]
    change(tree)
    text = json.dumps({**tree, "crc32": zlib.crc32(json.dumps(tree, sort_keys=True).encode())})
    (folder / MANIFEST).write_text(text)


def assert_rewriting_is_faithful(folder: Path) -> None:
    """The helper above makes what the writer makes."""
    before = read_manifest(folder / MANIFEST)
    rewrite_manifest(folder, lambda tree: None)
    assert read_manifest(folder / MANIFEST) == before and manifest_text(before)


def peak_growth(function, *args) -> int:
    """Bytes of resident memory that a call adds at its highest (Linux)."""

    def status(field: str) -> int:
        return next(
            int(line.split()[1]) * 1024
            for line in open("/proc/self/status")
            if line.startswith(field)
        )

    with open("/proc/self/clear_refs", "w") as handle:
        handle.write("5")  # the high-water mark starts anew
    before = status("VmRSS:")
    function(*args)
    return status("VmHWM:") - before


def measured(
    folder: Path, ranks: int, overrides: list[str], file: str | None = None
) -> tuple[int, int, int]:
    """(bytes of the checkpoint, growth of resident memory while writing, while reading)."""
    config = load_config(file, overrides)
    make_checkpoint(
        folder / "warm", load_config(None, ["model.width=32", "model.depth=2", "model.heads=2"]), 1
    )
    read_all(Checkpoint(folder / "warm"))
    writing = peak_growth(make_checkpoint, folder / "big", config, 1, ranks)
    checkpoint = Checkpoint(folder / "big")
    reading = peak_growth(read_all, checkpoint)
    return sum(record.bytes for record in checkpoint.manifest.files.values()), writing, reading


def read_all(checkpoint: Checkpoint) -> None:
    """Every tensor, compared with what was made."""
    for kind in sorted(set(checkpoint.kinds()) - {"buffers"}):
        tensors = checkpoint.tensors(kind)
        for name in tensors:
            assert torch.equal(tensors[name], made_whole(kind, name, tensors.shape(name))), (
                f"{kind} {name}"
            )
