"""Reading checkpoints: only what is asked for, checked as it is read, never executed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from diffmoe.checkpoints.manifest import MANIFEST, kind_of, read_manifest
from diffmoe.checkpoints.power_averages import (
    WORST_MISS,
    Profile,
    closest_sum,
    length_kind,
    lengths_of,
)
from diffmoe.checkpoints.tensor_file import Corrupt, FileRecord, Piece, TensorFile
from diffmoe.config import Config, config_from_tree
from diffmoe.config_rules import EMA_LENGTHS
from diffmoe.errors import UserError
from diffmoe.paths import check_folder
from diffmoe.remote import AnyPath, RemotePath

MASTER, FIRST_MOMENT, SECOND_MOMENT, BUFFERS = "master", "exp_avg", "exp_avg_sq", "buffers"
# A run's two folders of what it saves: whole states, and averages alone (`train.ema_lengths`).
CHECKPOINTS, SNAPSHOTS = "checkpoints", "averages"
_NUMBER = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)(e-?[0-9]+)?")
_FOLDER = re.compile(r"step_(\d{8})")
P = TypeVar("P", Path, RemotePath, AnyPath)


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return folder / f"step_{step:08d}"


def step_of(path: AnyPath) -> int:
    """The inverse."""
    return int(path.name.removeprefix("step_"))


def ema_kind(decay: float) -> str:
    """The kind of the tensors that one EMA keeps."""
    return f"ema_{decay!r}"


def complete_folders(folder: P) -> list[P]:
    """Complete checkpoints, oldest first, by their steps: a pointer to one could be old."""
    if not folder.is_dir():
        return []
    there = [path for path in folder.iterdir() if _FOLDER.fullmatch(path.name)]
    return sorted((path for path in there if (path / MANIFEST).is_file()), key=lambda p: p.name)


def checkpoints_at(path: AnyPath) -> list[AnyPath]:
    """The checkpoint that ``path`` is, or the complete ones of a run's folder or of its
    ``checkpoints``, oldest first.  UserError where there is none.
    """
    if (path / MANIFEST).is_file():
        return [path]
    if found := complete_folders(path / CHECKPOINTS) or complete_folders(path):
        return found
    if isinstance(path, Path):
        check_folder(path, "checkpoint")
    message = f"no complete checkpoint in {path}"
    if (path / "config.json").is_file():
        message += (
            ", but an exported model: run.py import --hf makes a checkpoint of it,"
            " DiffMoEPipeline reads it as it is"
        )
    raise UserError(message)


def misfits(folder: AnyPath, files: Mapping[str, FileRecord]) -> dict[str, int | str]:
    """Those of ``files`` that a folder has not in their size: its bytes, or "no".  One listing."""
    there = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    wrong = (name for name, record in files.items() if there.get(name) != record.bytes)
    return {name: there.get(name, "no") for name in wrong}


class Tensors(Mapping[str, Tensor]):
    """Tensors by name, put together from the files that hold their pieces.

    Raises Corrupt when the pieces of a tensor leave a gap or overlap.  One chunk is in memory at a
    time.
    """

    def __init__(self, pieces: list[tuple[Piece, TensorFile]], source: str) -> None:
        self._pieces: dict[str, list[tuple[Piece, TensorFile]]] = {}
        self._last: TensorFile | None = None
        for piece, file in pieces:
            self._pieces.setdefault(piece.name, []).append((piece, file))
        for name, found in self._pieces.items():
            found.sort(key=lambda pair: (pair[0].start, pair[0].stop))
            at, shape = 0, found[0][0].shape
            for piece, file in found:
                if piece.start < at:
                    raise Corrupt(
                        f"{source}: tensor {name} is twice there from element {piece.start} on,"
                        f" {file.path.name} the second"
                    )
                if piece.start > at or piece.stop < piece.start:
                    raise Corrupt(f"{source} lacks elements {at} to {piece.start} of {name}")
                at = piece.stop
            if at != prod(shape):
                raise Corrupt(f"{source} has {at} elements of {name}, whose shape is {list(shape)}")

    def shape(self, name: str) -> tuple[int, ...]:
        return self._pieces[name][0][0].shape

    def dtype(self, name: str) -> torch.dtype:
        """Opens one file."""
        piece, file = self._pieces[name][0]
        return self._use(file).entry(piece.key).dtype

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Copies the elements from ``start`` on into the flat tensor ``out``, on any device."""
        stop = start + out.numel()
        for piece, file in self._pieces[name]:
            first, last = max(start, piece.start), min(stop, piece.stop)
            if first < last:
                part = out[first - start : last - start]
                self._use(file).read_into(piece.key, first - piece.start, part)

    def _use(self, file: TensorFile) -> TensorFile:
        if self._last is not file:
            self.release()
            self._last = file
        return file

    def __getitem__(self, name: str) -> Tensor:
        value = torch.empty(self.shape(name), dtype=self.dtype(name))
        self.read_into(name, 0, value.view(-1))
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)

    def release(self) -> None:
        """Lets the chunk in memory go."""
        if self._last is not None:
            self._last.release()
        self._last = None


class SumOfTensors(Mapping[str, Tensor]):
    """Tensors by name, each the sum of those of several with their factors: added up in fp64, as
    it is asked for, so that nothing but that tensor is in memory.
    """

    def __init__(self, parts: list[tuple[float, Tensors]]) -> None:
        self._parts = parts

    def __getitem__(self, name: str) -> Tensor:
        total = torch.zeros(self._parts[0][1].shape(name), dtype=torch.float64)
        for factor, tensors in self._parts:
            total.add_(tensors[name], alpha=factor)
            tensors.release()
        return total.float()

    def __contains__(self, name: object) -> bool:
        return name in tuple(self)  # without adding it up

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts[0][1])

    def __len__(self) -> int:
        return len(self._parts[0][1])


def open_tensors(paths: list[Path]) -> Tensors:
    """Of files that are no checkpoint's.  Raises Corrupt for a bad file or a doubled name."""
    pieces = []
    for file in map(TensorFile, paths):
        for key, entry in file.entries.items():
            pieces.append((Piece(key, entry.shape, 0, prod(entry.shape)), file))
        file.release()
    return Tensors(pieces, "together the files")


class Checkpoint:
    """A complete checkpoint, opened: ``path`` is its folder, or a run's folder whose newest one is
    meant; also at a store.

    Opening compares names and sizes.  Raises Corrupt (a UserError) for damage, UserError when there
    is none or its format is another.
    """

    def __init__(self, path: AnyPath) -> None:
        path = checkpoints_at(path)[-1]
        self.path = path
        self.manifest = manifest = read_manifest(path / MANIFEST)
        self.step, self.samples, self.pool = manifest.step, manifest.samples, manifest.pool
        self.ranks, self.counters, files = manifest.ranks, manifest.counters, manifest.files
        for name, found in misfits(path, files).items():
            raise Corrupt(f"{path / name} must have {files[name].bytes} bytes and has {found}")
        self._files = {name: TensorFile(path / name, record) for name, record in files.items()}

    @property
    def updates(self) -> int:
        """The steps that changed the weights."""
        return self.counters.get("updates", self.step)

    def config(self) -> Config:
        """The resolved configuration of the run that wrote it."""
        return config_from_tree(dict(self.manifest.config))

    def kinds(self) -> list[str]:
        """The kinds of tensors that are there."""
        return list(dict.fromkeys(map(kind_of, self.manifest.files)))

    def tensors(self, kind: str) -> Tensors:
        """Tensors of ``master``, ``exp_avg``, ``buffers``, an :func:`ema_kind`, …; maybe none."""
        files = [(name, file) for name, file in self._files.items() if kind_of(name) == kind]
        pieces = [(piece, file) for name, file in files for piece in self.manifest.pieces(name)]
        return Tensors(pieces, f"{kind} of {self.path}")

    def weights(self, which: str) -> Mapping[str, Tensor]:
        """Weights of ``raw`` (what is trained), ``ema`` (the default EMA), ``ema:0.999`` or
        ``length:0.07`` (see :meth:`_of_length`).  Raises UserError for others.
        """
        kind, _, number = which.partition(":")
        if kind == "length" and _NUMBER.fullmatch(number):
            return self._of_length(float(number))
        names = {"raw": MASTER, "ema": ema_kind(self.manifest.emas[0])}
        names |= {f"ema:{decay!r}": ema_kind(decay) for decay in self.manifest.emas}
        if kind == "ema" and _NUMBER.fullmatch(number):
            which = f"ema:{float(number)!r}"  # 0.9990 is 0.999
        if which not in names:
            raise UserError(f"weights {which!r} must be one of {', '.join(names)} for {self.path}")
        return self.tensors(names[which])

    def _of_length(self, length: float) -> Mapping[str, Tensor]:
        """The average that training would have kept for this length: the checkpoint's own, or made
        of its own and the snapshots of its run before it (``power_averages``).  UserError where
        their sum misses its profile by too much.
        """
        own, asked = lengths_of(self.kinds()), f"weights length:{length:g}"
        if length in own:
            return self.tensors(length_kind(length))
        if not own or not self.updates:
            raise UserError(f"{asked}: {self.path} has no averages of train.ema_lengths")
        low, high = EMA_LENGTHS
        if not low <= length <= high:
            raise UserError(f"{asked}: a length must be in {low}..{high}")
        found = [*self._snapshots(), self]
        averages = [
            (Profile(each, checkpoint.updates), checkpoint.tensors(length_kind(each)))
            for checkpoint in found
            for each in lengths_of(checkpoint.kinds())
        ]
        profiles = [profile for profile, _ in averages]
        factors, missed = closest_sum(profiles, Profile(length, self.updates))
        if missed > WORST_MISS:
            raise UserError(
                f"{asked} cannot be made for {self.path}: the best sum of {len(averages)} averages "
                f"(lengths {', '.join(f'{each:g}' for each in own)}, {len(found) - 1} snapshots "
                f"before it) misses its profile by {missed:.1%}, at most {WORST_MISS:.0%} may be"
            )
        return SumOfTensors(list(zip(map(float, factors), (each for _, each in averages))))

    def _snapshots(self) -> list[Checkpoint]:
        """Those of its run before it; none for a checkpoint that lies by itself."""
        path = self.path.absolute() if isinstance(self.path, Path) else self.path
        if path.parent.name != CHECKPOINTS:
            return []
        there = map(Checkpoint, complete_folders(path.parent.parent / SNAPSHOTS))
        return [each for each in there if each.step < self.step and each.updates]

    def chunks(self, name: str) -> Iterator[memoryview]:
        """The bytes of a file, checked."""
        return self._files[name].chunks()

    def check_file(self, name: str) -> None:
        """Reads all of it.  Raises Corrupt unless bytes and header are as the manifest says."""
        file = self._files[name]
        file.check()
        shapes = {piece.key: piece.stored_shape for piece in self.manifest.pieces(name)}
        if {key: entry.shape for key, entry in file.entries.items()} != shapes:
            raise Corrupt(f"{file.path} does not hold the tensors that {MANIFEST} says")
