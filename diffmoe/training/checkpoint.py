"""Checkpoints that know no topology: tensors under logical names, experts by global number.

A checkpoint is a folder ``step_00001000`` of safetensors files (``<kind>-<EP rank>.safetensors`` for the fp32 weights, EMA and
both Adam moments, ``buffers.safetensors`` for thresholds) and ``checkpoint.json``.  It is written under another name and
renamed when complete, so a folder with its final name is whole.  Any EP size, ZeRO stage and number of ranks reads it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffmoe.config import Config, config_from_tree, config_to_tree
from diffmoe.layout import Layout
from diffmoe.models.dit import LogicalTensor
from diffmoe.models.interchange import load_buffers
from diffmoe.parallel.collectives import raise_together
from diffmoe.parallel.groups import ParallelGroups
from diffmoe.training.ema import Ema
from diffmoe.training.engine import FIRST_MOMENT, MASTER, SECOND_MOMENT, Engine

EMA = "ema"
FORMAT = 1
_PART_BYTES = 2**31
_FOLDER = re.compile(r"step_(\d{8})")


def save(folder: Path, step: int, engine: Engine, ema: Ema, config: Config, layout: Layout, groups: ParallelGroups,
         keep: int) -> Path:
    """Writes the state after ``step`` optimizer steps; all ranks together.  Keeps the newest ``keep`` folders.

    A rank that cannot write raises ValueError on every rank and leaves earlier checkpoints alone."""
    final = folder / f"step_{step:08d}"
    partial = folder / f".{final.name}.partial"
    problem: Exception | None = None
    if groups.rank == 0:
        try:
            for left in folder.glob(".step_*.partial"):  # of saves that failed
                shutil.rmtree(left, ignore_errors=True)
            partial.mkdir(parents=True)
        except OSError as error:
            problem = error
    raise_together(problem, groups.world)  # the folder exists before anybody writes
    for kind, shards in _kinds(engine, ema).items():
        _save_kind(partial, kind, shards, engine, groups)
    if groups.rank == 0:
        try:
            buffers = {name: value.cpu() for name, value in engine.model.named_buffers() if ".thresholds." in name}
            _save_rest(partial, step, buffers, config, layout)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            _sync(folder)
            for old in complete_folders(folder)[:-keep]:
                shutil.rmtree(old)
        except (OSError, SafetensorError) as error:
            problem = error
    raise_together(problem, groups.world)
    return final


def save_start(folder: Path, config: Config, layout: Layout, kinds: Mapping[str, Iterable[tuple[str, Tensor]]],
               buffers: Mapping[str, Tensor]) -> Path:
    """Writes weights from elsewhere as the state before step 0; one process, a part of a kind in memory at a time.

    ``kinds``: (logical name, fp32 tensor) pairs of ``master`` and ``ema``; other kinds are kept with the checkpoint and not
    restored.  Adam's moments are not stored: before the first step they are zero.  Raises ValueError when ``folder``
    already has a checkpoint."""
    there = complete_folders(folder)
    if there:
        raise ValueError(f"{folder} already has {there[-1].name}; choose another run.folder")
    final = folder / "step_00000000"
    partial = folder / f".{final.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for kind, tensors in kinds.items():
            save_parts(partial, kind, tensors, _PART_BYTES)
        _save_rest(partial, 0, buffers, config, layout)
        partial.rename(final)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{final} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def save_parts(folder: Path, stem: str, tensors: Iterable[tuple[str, Tensor]], limit: int) -> dict[str, Path]:
    """Writes ``stem-000.safetensors``, …, of at most ``limit`` bytes each unless one tensor alone has more.

    Returns the file of every tensor.  One part is in memory at a time."""
    where: dict[str, Path] = {}
    part: dict[str, Tensor] = {}
    filled = number = 0

    def close() -> None:
        path = folder / f"{stem}-{number:03d}.safetensors"
        save_file(part, path)
        _sync(path)
        where.update(dict.fromkeys(part, path))

    for name, value in tensors:
        if part and filled + value.nbytes > limit:
            close()
            part, filled, number = {}, 0, number + 1
        part[name] = value.detach().clone(memory_format=torch.contiguous_format)  # never a view of something larger
        filled += value.nbytes
    if part:
        close()
    return where


def complete_folders(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if _FOLDER.fullmatch(p.name) and (p / "checkpoint.json").is_file())


def restore(path: Path, engine: Engine, ema: Ema, groups: ParallelGroups) -> int:
    """Loads a checkpoint into a freshly started engine of any layout.  Returns the number of steps done."""
    kinds, problem = _kinds(engine, ema), None
    try:
        checkpoint = Checkpoint(path)
        tensors = {kind: checkpoint.tensors(kind) for kind in (*kinds, "buffers")}
        for kind in (FIRST_MOMENT, SECOND_MOMENT):
            if checkpoint.step == 0 and not tensors[kind]:
                del kinds[kind]  # weights from elsewhere, see save_start: the engine's moments are zero already
        for kind in kinds:
            _check_names(engine.tensors, tensors[kind], kind, path)
    except (ValueError, OSError) as error:
        problem = error
    raise_together(problem, groups.world)
    for kind, shards in kinds.items():
        engine.write(shards, (_assemble(tensor, tensors[kind]) for tensor in engine.tensors))
    engine.publish()
    engine.set_adam_step(checkpoint.step)
    load_buffers(engine.model, tensors["buffers"])
    return checkpoint.step


class Checkpoint:
    """A complete checkpoint, opened: nothing is read before it is asked for, and nothing in it is ever executed."""

    def __init__(self, path: Path) -> None:
        meta = path / "checkpoint.json"
        if not meta.is_file():
            newest = complete_folders(path / "checkpoints") or complete_folders(path)
            if not newest:
                raise ValueError(f"no complete checkpoint in {path}")
            path, meta = newest[-1], newest[-1] / "checkpoint.json"
        self.path = path
        self.meta = _read_meta(meta)
        for name, size in self.meta["files"].items():
            there = path / Path(name).name
            if not there.is_file() or there.stat().st_size != size:
                found = there.stat().st_size if there.is_file() else "no"
                raise ValueError(f"{there} must have {size} bytes and has {found}")

    @property
    def step(self) -> int:
        return self.meta["step"]

    @property
    def pool(self) -> int:
        return self.meta["pool"]

    def config(self) -> Config:
        """The resolved configuration of the run that wrote it."""
        return config_from_tree(self.meta["config"])

    def tensors(self, kind: str) -> Mapping[str, Tensor]:
        """Tensors of ``master``, ``ema``, ``exp_avg``, ``exp_avg_sq`` or ``buffers`` by logical name."""
        names = [n for n in self.meta["files"] if n == f"{kind}.safetensors" or n.startswith(f"{kind}-")]
        return open_tensors([self.path / Path(n).name for n in names])


def open_tensors(paths: list[Path]) -> Mapping[str, Tensor]:
    """The tensors of safetensors files by name, read when asked for.  ValueError for a damaged file or a doubled name."""
    return _Tensors(paths)


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    missing = {"format", "step", "pool", "config", "files"} - set(meta if isinstance(meta, dict) else ())
    if missing:
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}")
    if meta["format"] != FORMAT:
        raise ValueError(f"{path} has format {meta['format']}; this program reads {FORMAT}")
    return meta


class _Tensors(Mapping[str, Tensor]):
    """Lazily read tensors of several safetensors files; a name in two files is an error, never silence."""

    def __init__(self, paths: list[Path]) -> None:
        self._where: dict[str, Any] = {}
        for path in paths:
            try:
                handle = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
            for name in handle.keys():
                if name in self._where:
                    raise ValueError(f"tensor {name} is in two files, {path} the second")
                self._where[name] = handle

    def __getitem__(self, name: str) -> Tensor:
        return self._where[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def _kinds(engine: Engine, ema: Ema) -> dict[str, list[Tensor]]:
    kinds = {kind: engine.shards(kind) for kind in (MASTER, FIRST_MOMENT, SECOND_MOMENT)}
    return {**kinds, EMA: ema.shards}


def _check_names(wanted: list[LogicalTensor], tensors: Mapping[str, Tensor], kind: str, path: Path) -> None:
    missing = [name for tensor in wanted for name in tensor.piece_names() if name not in tensors]
    if missing:
        raise ValueError(f"{path} lacks {kind} of {', '.join(missing[:3])} ({len(missing)} missing)")


def _assemble(tensor: LogicalTensor, tensors: Mapping[str, Tensor]) -> Tensor:
    names = tensor.piece_names()
    if tensor.experts is None:
        return tensors[names[0]]
    return torch.stack([tensors[name] for name in names])


def _save_kind(partial: Path, kind: str, shards: list[Tensor], engine: Engine, groups: ParallelGroups) -> None:
    """One file per EP rank of the first EP group: its experts, and on EP rank 0 everything else."""
    writer = groups.edp.index == 0
    pieces: dict[str, Tensor] = {}
    for tensor, value in engine.read(shards):  # collective: every rank goes through all of it
        if writer and (groups.ep.index == 0 or tensor.experts is not None):
            pieces.update({name: piece.cpu().clone() for name, piece in tensor.pieces(value)})
    problem: Exception | None = None
    if writer:
        try:
            path = partial / f"{kind}-{groups.ep.index:03d}.safetensors"
            save_file(pieces, path)
            _sync(path)
        except (OSError, SafetensorError) as error:
            problem = error
    raise_together(problem, groups.world)


def _save_rest(partial: Path, step: int, buffers: Mapping[str, Tensor], config: Config, layout: Layout) -> None:
    save_file({name: value.clone() for name, value in buffers.items()}, partial / "buffers.safetensors")
    _sync(partial / "buffers.safetensors")
    files = {path.name: path.stat().st_size for path in sorted(partial.glob("*.safetensors"))}
    meta = {"format": FORMAT, "step": step, "samples": step * layout.batch, "pool": layout.pool, "ranks": layout.ranks,
            "config": config_to_tree(config), "files": files}
    (partial / "checkpoint.json").write_text(json.dumps(meta, indent=1))
    _sync(partial / "checkpoint.json")
    _sync(partial)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
