"""What a source holds: a folder of class folders, webdataset tars of images, or a plain folder of
images.

A listing is one fixed order of all images, whether or not they can be decoded: what becomes of
image i never depends on its neighbours. Hidden files and what operating systems leave behind are
not there for it. Everything else that it does not take is counted by reason and named, and is bad
where it looks like a sample.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from diffmoe.data.image_source import (
    EXTENSIONS,
    KIND,
    LOOP,
    OTHER,
    SHOWN,
    Leaving,
    LeftOut,
    Source,
    SourceImage,
    count_left_out,
    ending_of,
    is_leftover,
    is_number,
    looks_like_image,
    shorten,
)
from diffmoe.data.listing_tars import list_tar
from diffmoe.data.sources import expanded
from diffmoe.errors import UserError
from diffmoe.files import is_final

_ARCHIVES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_OUTSIDE = "outside of class folders and tars"
_BROKEN, _SPECIAL, _COMPRESSED = "broken links", "no plain files", "compressed tars"


def list_source(
    source: str,
    classes: int | None = None,
    *,
    class_names: Sequence[str] = (),
    allow_empty: bool = False,
    first_class: int = 0,
) -> Source:
    """List a folder of class folders, a folder of tars, or tars by glob or braces.

    Classes are the folders 0, 1, … in the order of their names; names that are all numbers are
    sorted as numbers. Tars hold `<key>.<jpg|png|…>` with `<key>.cls`, where keys may have dots;
    only their headers and labels are read here.

    Args:
        source: the folder, or a pattern such as `train-{000000..000146}.tar`.
        classes: number of classes, where it is known: of folders as many, of tars at least the
            labels'.
        class_names: one a class, instead of the folders' names.
        allow_empty: whether a folder without an image, or a class above the folders' number, is a
            class.
        first_class: the label of class 0, in tars.

    Raises:
        UserError: nothing there, both kinds in one folder, a tar that is corrupt, compressed or
            holds unsafe names, classes without images, labels without a 0 where `classes` says
            nothing, or another number of classes than `classes`.
    """
    root: Path = Path(source)
    leaving: Leaving = {}
    folders: dict[str, list[str]] = {}
    if root.is_dir():
        tars, folders = _list_root(root, leaving)
        if tars and folders:
            raise UserError(
                f"source ({source}) holds tars ({tars[0]}) and folders ({next(iter(folders))}); "
                "it must hold one kind"
            )
    else:
        root, tars = Path(), _expand(source)
    images = [image for tar in tars for image in list_tar(root, tar, leaving)]
    for label, files in enumerate(folders.values()):
        images += [SourceImage(label, file) for file in files]
    left_out = count_left_out(leaving)
    if not images:
        raise UserError(
            f"source ({source}) holds no images: neither class folders with "
            f".{', .'.join(EXTENSIONS)} files, nor tars of such with .cls"
            + "".join(f"; left out, {left}" for left in left_out)
        )
    if folders and first_class:
        raise UserError(
            f"first_class ({first_class}) goes with tars: class folders are numbered from 0"
        )
    if not folders:
        sure = bool(classes or class_names or allow_empty)
        _check_first(images, first_class, source, sure)
        images = [image._replace(label=image.label - first_class) for image in images]
    wanted = _count_classes(source, images, folders, classes, class_names, allow_empty)
    digest = hashlib.sha256()
    for image in images:
        digest.update(repr(tuple(image)).encode() + b"\n")
    names = tuple(class_names) or tuple(folders)
    return Source(root, tuple(images), wanted, names, digest.hexdigest(), left_out)


def _count_classes(
    source: str,
    images: list[SourceImage],
    folders: dict[str, list[str]],
    classes: int | None,
    class_names: Sequence[str],
    allow_empty: bool,
) -> int:
    """The number of classes; UserError where what is said and what was found do not agree."""
    found = max(len(folders), 1 + max(image.label for image in images))
    wanted = (len(class_names) or found) if classes is None else classes
    what = f"classes ({wanted})"
    if class_names and classes is None:
        what = f"class_names ({wanted} names)"
    if class_names and len(class_names) != wanted:
        raise UserError(
            f"class_names ({len(class_names)} names) must have one for each of the classes "
            f"({wanted})"
        )
    if wanted < found:
        last = f"the highest label is {found - 1}"
        if folders:
            last = f"the folders' last: {shorten(list(folders)[wanted:], SHOWN)}"
        elif all(image.label for image in images):
            last += ", and none is 0: if they begin with 1, say --first-class 1"
        raise UserError(f"{what} must be at least the {found} of source {source}; {last}")
    option = "--allow-empty-classes"
    empty = [name for name, files in folders.items() if not files]
    if empty and not allow_empty:
        raise UserError(
            f"source ({source}) has {len(empty)} class folders without an image: "
            f"{shorten(empty, SHOWN)}; remove them, or say {option} to keep them as classes"
        )
    if folders and wanted > len(folders) and not allow_empty:
        raise UserError(
            f"{what} must not be more than the {len(folders)} class folders of source {source} "
            f"({shorten(folders, SHOWN)}): which is missing? To have classes without an image, "
            f"say {option}"
        )
    return wanted


def _check_first(images: list[SourceImage], first: int, source: str, sure: bool) -> None:
    """UserError for labels below class 0's, or, unless `sure` of the classes, all above it."""
    labels = [image.label for image in images]
    low, high = min(labels), max(labels)
    if low < first or (low > first and not sure):
        empty = ""
        if low > first:
            empty = f", --classes {high - first + 1} if some are without images"
        raise UserError(
            f"labels of source {source} run from {low} to {high}, and first_class is {first}: "
            f"--first-class {low} if {low} is the first class{empty}"
        )


def list_images(folder: Path) -> tuple[list[str], tuple[LeftOut, ...]]:
    """The images at any depth of a folder, as paths below it, by name; and what is left out.

    Raises:
        OSError: a folder that cannot be read.
    """
    leaving: Leaving = {}
    found = _walk(folder, "", frozenset([_identity(folder)]), leaving)
    return sorted(found, key=lambda path: path.split("/")), count_left_out(leaving)


def read_class_names(path: Path) -> tuple[str, ...]:
    """The names in a text file, one a line. UserError where there is none, or an empty line."""
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"class_names ({path}) cannot be read: {error}") from None
    if not names or "" in names:
        line = 1 + names.index("") if names else 1
        raise UserError(f"class_names ({path}), line {line} must not be empty: one name a line")
    return tuple(names)


def _expand(pattern: str) -> list[str]:
    tars = expanded(pattern, "source")
    for name in tars:
        if not Path(name).is_file():
            raise UserError(f"source ({pattern}): {name} does not exist")
        if not name.endswith(".tar"):
            raise UserError(f"source ({pattern}): {name} must be a folder or a .tar")
    return tars


def _list_root(root: Path, leaving: Leaving) -> tuple[list[str], dict[str, list[str]]]:
    """Names of a source's tars, and the images of each class folder by its name, in order."""
    tars, folders, broken, rest = [], [], [], []
    above = frozenset([_identity(root)])
    for entry in _entries(root):
        kind, ending = _kind_of(entry), ending_of(entry.name)
        if kind == "folder" and _identity(entry.path) in above:
            leaving.setdefault(LOOP, []).append(entry.name)
        elif kind == "folder":
            folders.append(entry.name)
        elif ending == "tar":
            tars.append(entry.name)
        elif kind == "broken" and not looks_like_image(ending):
            broken.append(entry.name)
            leaving.setdefault(_BROKEN, []).append(entry.name)
        else:
            rest.append(entry.name)
    for name in rest:
        reason = _OUTSIDE if looks_like_image(ending_of(name)) else OTHER
        if not folders and name.lower().endswith(_ARCHIVES):
            reason = _COMPRESSED
        leaving.setdefault(reason, []).append(name)
    if not tars:
        # may well have been classes: without them all later ones would have another number
        folders += broken
    folders.sort(key=(lambda name: (int(name), name)) if all(map(is_number, folders)) else None)
    found: dict[str, list[str]] = {name: [] for name in folders}
    for name in folders:
        if name not in broken:
            found[name] = sorted(_walk(root, name, above | {_identity(root / name)}, leaving))
    return tars, found


def _walk(
    root: Path, inner: str, above: frozenset[tuple[int, int]], leaving: Leaving
) -> Iterator[str]:
    """Paths below `root` of `inner`'s images; links are followed, but not to folders `above`."""
    for entry in _entries(root / inner):
        path = os.path.join(inner, entry.name)
        kind, ending = _kind_of(entry), ending_of(entry.name)
        if kind == "folder":
            place = _identity(entry.path)
            if place not in above:
                yield from _walk(root, path, above | {place}, leaving)
                continue
            reason = LOOP
        elif ending in EXTENSIONS and kind != "special":
            yield path  # also where a link is broken: reading says so
            continue
        elif kind == "broken":
            reason = _BROKEN
        elif looks_like_image(ending):
            reason = _SPECIAL if kind == "special" else KIND
        else:
            reason = OTHER
        leaving.setdefault(reason, []).append(path)


def _entries(folder: Path) -> list[os.DirEntry]:
    """What is in a folder, by name, but for what is hidden or left over."""
    with os.scandir(folder) as entries:
        found = [entry for entry in entries if not is_leftover(entry.name)]
    return sorted(found, key=lambda entry: entry.name)


def _kind_of(entry: os.DirEntry) -> str:
    """folder, file, broken (a link to nothing) or special."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
        return "broken" if entry.is_symlink() and not os.path.exists(entry.path) else "special"
    except OSError as error:
        if not is_final(error):
            raise
        return "broken"  # a link to itself, or through a file


def _identity(folder: Path | str) -> tuple[int, int]:
    found = os.stat(folder)
    return found.st_dev, found.st_ino
