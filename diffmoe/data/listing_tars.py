"""The images of a source's tar, each with its label."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from diffmoe.data.image_source import (
    EXTENSIONS,
    FURTHER,
    KIND,
    OTHER,
    UNREAD,
    Leaving,
    SourceImage,
    ending_of,
    is_leftover,
)
from diffmoe.data.rows import split_name
from diffmoe.errors import UserError

_NO_LABEL, _NO_IMAGE = "images without .cls", ".cls without an image"
_SHARED = "several images with one .cls"


def list_tar(root: Path, name: str, leaving: Leaving) -> list[SourceImage]:
    """The images of the tar `name`, in its order; what is not taken goes to `leaving`. UserError
    where the tar is corrupt, compressed, holds unsafe names or bad labels.
    """
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, int] = {}
    seen: set[str] = set()
    try:
        # "r:" takes no compressed tar: those cannot be read at an offset.
        with tarfile.open(root / name, "r:") as tar:
            for info in tar:
                where = f"source tar {name}, member {info.name!r}"
                path = PurePosixPath(info.name)
                if path.is_absolute() or ".." in path.parts:
                    raise UserError(f"{where}: unsafe name, absolute or with '..'")
                if not (info.isdir() or info.isreg()) or info.issparse():
                    raise UserError(f"{where}: must be a plain file, not a link or the like")
                if info.isdir() or any(map(is_leftover, path.parts)):
                    continue
                stem, ending = info.name.rpartition(".")[0], ending_of(path.name)
                if ending == "cls":
                    if stem in labels:
                        raise UserError(f"{where}: second of its kind for this key")
                    stream = tar.extractfile(info)
                    text = stream.read(32) if stream else b""
                    if not re.fullmatch(rb"\s*[0-9]{1,9}\s*", text):
                        raise UserError(f"{where}: label {text!r} must be a class number")
                    labels[stem] = int(text)
                elif ending in EXTENSIONS:
                    if stem in seen:
                        raise UserError(f"{where}: second of its kind for this key")
                    seen.add(stem)
                    images[info.name] = info
                elif ending in UNREAD:
                    images[info.name] = info
                else:
                    leaving.setdefault(OTHER, []).append(f"{name}:{info.name}")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(
            f"source tar {name} is unreadable (corrupt, or compressed): {error}"
        ) from error
    pairs, unpaired = _pair(images, labels)
    found = []
    for member, info in images.items():
        if member in pairs and ending_of(member) in UNREAD:
            unpaired.append((KIND, member))
        elif member in pairs:
            place = (name, member, info.offset_data, info.size)
            found.append(SourceImage(labels[pairs[member]], *place))
    for reason, member in unpaired:
        leaving.setdefault(reason, []).append(f"{name}:{member}")
    return found


def _pair(
    images: Iterable[str], labels: Iterable[str]
) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Each image's label, both by name, the label's without its ending; and what has no partner,
    each with the reason.

    It is the one with the longest key that the image's name begins with, up to a dot; else the
    only two whose names agree up to their first dot, which is webdataset's key. One label is for
    one image: the one of exactly its key, if several could have it.
    """
    claims: dict[str, list[str]] = {label: [] for label in labels}
    alone: dict[str, list[str]] = {}
    for image in images:
        key = image
        while key not in claims and "." in key.rpartition("/")[2]:
            key = key.rpartition(".")[0]
        claims.get(key, alone.setdefault(split_name(image)[0], [])).append(image)
    pairs: dict[str, str] = {}
    lost: list[tuple[str, str]] = []
    for label, members in claims.items():
        own = [member for member in members if label in (member, member.rpartition(".")[0])]
        chosen = members if len(members) == 1 else own if len(own) == 1 else []
        pairs.update(dict.fromkeys(chosen, label))
        reason = FURTHER if chosen else _SHARED
        lost += [(reason, member) for member in members if member not in chosen]
    taken = {split_name(image)[0] for image in pairs}
    unused: dict[str, list[str]] = {}
    for label, members in claims.items():
        if not members:
            unused.setdefault(split_name(label)[0], []).append(label)
    for key, members in alone.items():
        if len(members) == 1 and len(unused.get(key, ())) == 1:
            pairs[members[0]] = unused.pop(key)[0]
        else:
            lost += [(_NO_LABEL, member) for member in members]
    for key, keys in unused.items():
        reason = FURTHER if key in taken else _NO_IMAGE
        lost += [(reason, f"{label}.cls") for label in keys]
    return pairs, lost
