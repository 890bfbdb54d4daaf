"""Writing checkpoints: every rank its own files, then one of them makes the folder complete by
renaming it.

The ranks tell each other what they wrote by small records in the folder itself, so that all of this
can go on in threads while training uses the process groups.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffmoe.checkpoints.manifest import MANIFEST, Manifest, file_name, manifest_text
from diffmoe.checkpoints.reader import BUFFERS, P, complete_folders, step_folder, step_of
from diffmoe.checkpoints.tensor_file import FileRecord, Piece, whole_piece, write_tensors
from diffmoe.config import Config, config_to_tree
from diffmoe.errors import UserError
from diffmoe.files import sync_folder, write_text
from diffmoe.layout import Layout

_PART_BYTES = 2**30
_POLL_S = 0.05


@dataclass(frozen=True)
class Share:
    """What one rank writes of a kind of tensors; flat values may be made one by one, in order."""

    pieces: Sequence[tuple[Piece, torch.dtype]]
    values: Iterable[Tensor]


class Stopped(Exception):
    """The save was given up, here or by another part."""


def partial_folder(folder: Path, step: int) -> Path:
    """Where a checkpoint is written before it is complete."""
    return folder / f".{step_folder(folder, step).name}.partial"


def prepare(folder: Path, step: int) -> Path:
    """Removes what dead runs left, makes an empty folder to write in; one rank.  Raises OSError."""
    for left in folder.glob(".step_*.partial"):
        shutil.rmtree(left, ignore_errors=True)
    partial = partial_folder(folder, step)
    partial.mkdir(parents=True)
    return partial


def write_part(partial: Path, part: int, kinds: Mapping[str, Share]) -> None:
    """Writes one rank's files and, when they are on the disk, a record of them.  Raises OSError and
    whatever ``values`` raises; then its files are gone and the record says why, if even that can be
    written.
    """
    files: dict[str, FileRecord] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    try:
        for kind, content in kinds.items():
            if not content.pieces:
                continue
            name = file_name(kind, part)
            files[name] = write_tensors(partial / name, content.pieces, content.values)
            shapes.update({piece.name: piece.shape for piece, _ in content.pieces})
        record = {"files": {name: asdict(file) for name, file in files.items()}, "shapes": shapes}
        write_text(partial / _record_name(part), json.dumps(record))
    except Exception as error:
        with suppress(OSError):  # make room first: the disk may be full
            for kind in kinds:
                (partial / file_name(kind, part)).unlink(missing_ok=True)
            problem = {"problem": f"{type(error).__name__}: {error}"}
            write_text(partial / _record_name(part), json.dumps(problem))
        raise


def join_parts(
    partial: Path, parts: int, stopped: Callable[[], bool]
) -> tuple[dict[str, FileRecord], dict[str, tuple[int, ...]]]:
    """Waits for all records: (files, shapes).  Raises Stopped, also where another part failed."""
    wanted = {_record_name(part) for part in range(parts)}
    while not wanted <= set(os.listdir(partial)):  # a listing is fresh on network file systems
        if stopped():
            raise Stopped
        time.sleep(_POLL_S)
    files: dict[str, FileRecord] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for part in range(parts):
        path = partial / _record_name(part)
        record = json.loads(path.read_text())
        if "problem" in record:
            raise Stopped(f"part {part}: {record['problem']}")
        for name, shape in record["shapes"].items():
            assert shapes.setdefault(name, tuple(shape)) == tuple(shape), f"{name} has two shapes"
        files.update({name: FileRecord(**file) for name, file in record["files"].items()})
    return files, shapes


def commit(
    partial: Path,
    final: Path,
    written: tuple[Mapping[str, FileRecord], Mapping[str, tuple[int, ...]]],
    config: Config,
    layout: Layout,
    counters: Mapping[str, Any],
    class_names: tuple[str, ...] = (),
) -> None:
    """Makes a folder in which files and shapes were ``written`` (see ``join_parts``) the complete
    checkpoint ``final``; what had that name goes.  ``counters["recipes"]``: see
    ``training/resume.py``.  Raises OSError.
    """
    step = step_of(final)
    shift = counters["recipes"][-1]["shift"] if counters.get("recipes") else 0
    manifest = Manifest(
        step,
        (step + shift) * layout.batch,
        layout.pool,
        layout.ranks,
        config.train.ema_decays,
        counters,
        config_to_tree(config),
        shapes=written[1],
        files=written[0],
        class_names=class_names,
    )
    write_text(partial / MANIFEST, manifest_text(manifest))
    for record in partial.glob("part-*.json"):
        record.unlink()
    _remove(final)
    partial.rename(final)
    sync_folder(final.parent)


def prune(folder: Path, step: int, keep: int, keep_every: int) -> None:
    """Removes :func:`dispensable` checkpoints."""
    for path in dispensable(complete_folders(folder), step, keep, keep_every):
        with suppress(OSError):  # the next prune tries again
            _remove(path)


def dispensable(complete: Sequence[P], step: int, keep: int, keep_every: int) -> list[P]:
    """Of complete checkpoints, oldest first, those up to ``step`` but for the newest ``keep`` and
    those whose step divides by ``keep_every``.

    Later ones stay: they are of a run that went back, and may be corrupt."""
    old = [path for path in complete if step_of(path) <= step][:-keep]
    return [
        path
        for path in old
        if not (keep_every and step_of(path) and step_of(path) % keep_every == 0)
    ]


def whole_tensors(tensors: Mapping[str, Tensor]) -> Share:
    """Tensors that one rank writes as they are."""
    return Share(
        [(whole_piece(name, value), value.dtype) for name, value in tensors.items()],
        (value.reshape(-1) for value in tensors.values()),
    )


def save_start(
    folder: Path,
    config: Config,
    layout: Layout,
    kinds: Mapping[str, Iterable[tuple[str, Tensor]]],
    buffers: Mapping[str, Tensor],
    class_names: tuple[str, ...] = (),
) -> Path:
    """Writes weights from elsewhere as the state before step 0; one process, at most 1 GiB (or one
    tensor) of them in memory.

    ``kinds``: (logical name, fp32 tensor) pairs of ``master`` and the EMAs; other kinds are kept
    with the checkpoint and not restored.  Adam's moments are not stored: before the first step they
    are zero.  Raises UserError when ``folder`` already has a checkpoint.
    """
    there = complete_folders(folder)
    if there:
        raise UserError(f"{folder} already has {there[-1].name}; choose another run.folder")
    final, partial = step_folder(folder, 0), partial_folder(folder, 0)
    try:
        prepare(folder, 0)
        number = 0
        for kind, tensors in {**kinds, BUFFERS: buffers.items()}.items():
            for part in _parts(tensors, _PART_BYTES):
                write_part(partial, number, {kind: whole_tensors(part)})
                number += 1
        written = join_parts(partial, number, lambda: False)
        commit(partial, final, written, config, layout, {}, class_names)
    except OSError as error:
        raise UserError(f"{final} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def _parts(tensors: Iterable[tuple[str, Tensor]], limit: int) -> Iterator[dict[str, Tensor]]:
    part: dict[str, Tensor] = {}
    filled = 0
    for name, value in tensors:
        if part and filled + value.nbytes > limit:
            yield part
            part, filled = {}, 0
        # Never a view of something larger.
        part[name] = value.detach().clone(memory_format=torch.contiguous_format)
        filled += value.nbytes
    if part:
        yield part


def _record_name(part: int) -> str:
    return f"part-{part:05d}.json"


def _remove(folder: Path) -> None:
    """First out of sight in one step, so that a folder under its own name is always whole."""
    if folder.exists():
        hidden = folder.with_name(f".{folder.name}.old.partial")
        shutil.rmtree(hidden, ignore_errors=True)
        folder.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)
