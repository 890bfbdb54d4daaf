"""``checkpoint.json``: what a checkpoint consists of, and nothing outside of its folder."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from diffmoe.checkpoints.tensor_file import CHUNK, Corrupt, FileRecord, Piece
from diffmoe.errors import UserError
from diffmoe.remote import AnyPath

FORMAT = 2
MANIFEST = "checkpoint.json"
_FILE = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_.-]*)-([0-9]{5})\.safetensors")


@dataclass(frozen=True)
class Manifest:
    """``samples``: the number of the next sample.  ``config``: the resolved configuration.
    ``counters``: what the training loop counts besides steps.  ``emas``: decays, the default first.
    ``shapes``: whole shapes by tensor name.  ``ranks``: how many wrote it, which no reader needs.
    ``class_names``: of the data set, in order; none where it has none, or in older checkpoints.
    """

    step: int
    samples: int
    pool: int
    ranks: int
    emas: tuple[float, ...]
    counters: Mapping[str, Any]
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    files: Mapping[str, FileRecord]
    class_names: tuple[str, ...] = ()

    def pieces(self, file: str) -> list[Piece]:
        """What a file must hold, in its order."""
        spans = self.files[file].tensors.items()
        return [Piece(name, self.shapes[name], *span) for name, span in spans]


def file_name(kind: str, part: int) -> str:
    """The file of a kind of tensors (``master``, ``exp_avg``, …) that a rank or a part writes."""
    name = f"{kind}-{part:05d}.safetensors"
    assert _FILE.fullmatch(name), name
    return name


def kind_of(file: str) -> str:
    """The inverse of :func:`file_name`."""
    return file.rpartition("-")[0]


def manifest_text(manifest: Manifest) -> str:
    """The file's text, which carries its own checksum."""
    tree = {"format": FORMAT, **asdict(manifest)}
    return json.dumps({**tree, "crc32": _checksum(tree)}, separators=(",", ":"))


def read_manifest(path: AnyPath) -> Manifest:
    """Raises Corrupt where it is not what was written, UserError for another format."""
    try:
        tree = json.loads(path.read_text())
    except FileNotFoundError:
        raise Corrupt(f"{path} is missing") from None
    except ValueError as error:
        raise Corrupt(f"{path} is not valid JSON: {error}") from None
    tree = tree if isinstance(tree, dict) else {}
    if "crc32" in tree and tree.pop("crc32") != _checksum(tree):
        raise Corrupt(f"{path} is not what was written: its checksum is wrong")
    if tree.get("format", FORMAT) != FORMAT:
        raise UserError(f"{path} has format {tree['format']}; this program reads {FORMAT}")
    missing = {"format", *Manifest.__dataclass_fields__} - {"class_names"} - set(tree)
    if missing:
        raise Corrupt(f"{path} lacks {', '.join(sorted(missing))}")
    try:
        return _parse(tree)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise Corrupt(f"{path} is not a manifest: {error}") from None


def _checksum(tree: dict) -> int:
    return zlib.crc32(json.dumps(tree, sort_keys=True).encode())


def _parse(tree: dict) -> Manifest:
    shapes = {
        name: tuple(_natural(size) for size in shape) for name, shape in tree["shapes"].items()
    }
    files = {name: _parse_file(name, record, shapes) for name, record in tree["files"].items()}
    if not isinstance(tree["config"], dict) or not isinstance(tree["counters"], dict):
        raise UserError("config and counters must be mappings")
    return Manifest(
        **{key: _natural(tree[key]) for key in ("step", "samples", "pool", "ranks")},
        emas=tuple(map(float, tree["emas"])),
        counters=tree["counters"],
        config=tree["config"],
        shapes=shapes,
        files=files,
        class_names=tuple(map(str, tree.get("class_names", ()))),
    )


def _parse_file(name: str, record: dict, shapes: Mapping[str, tuple[int, ...]]) -> FileRecord:
    if not _FILE.fullmatch(name):
        raise UserError(f"{name!r} is not the name of a file of a checkpoint")
    size, crc32 = _natural(record["bytes"]), tuple(map(_natural, record["crc32"]))
    spans = {}
    for tensor, (start, stop) in record["tensors"].items():
        if tensor not in shapes:
            raise UserError(f"{name} holds {tensor}, which has no shape")
        spans[tensor] = _natural(start), _natural(stop)
    if sum(stop - start for start, stop in spans.values()) > size:
        raise UserError(f"{name} cannot hold as many elements in {size} bytes")
    if len(crc32) != -(-size // CHUNK):
        raise UserError(f"{name} has {len(crc32)} checksums for {size} bytes")
    return FileRecord(size, crc32, spans)


def _natural(value: object) -> int:
    if type(value) is not int or value < 0:
        raise UserError(f"{value!r} must be a whole number")
    return value
