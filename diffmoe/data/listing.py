"""What a source holds: a folder of class folders, webdataset tars of pictures, or a plain folder of
pictures.

A listing is one fixed order of all pictures, whether or not they can be decoded: what becomes of
picture i never depends on its neighbours. Hidden files and what operating systems leave behind are
not there for it. Everything else that it does not take is counted by reason and named, and is bad
where it looks like a sample.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from diffmoe.errors import UserError

EXTENSIONS = ("jpeg", "jpg", "png", "webp", "bmp", "tif", "tiff", "gif", "jpe", "jfif")
_UNREAD = (
    "jp2",
    "jxl",
    "avif",
    "heic",
    "heif",
    "pgm",
    "ppm",
    "pnm",
    "svg",
    "psd",
    "exr",
    "dng",
    "tga",
)
_ARCHIVES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_LEFTOVERS = {
    "__macosx",
    "thumbs.db",
    "ehthumbs.db",
    "desktop.ini",
    "@eadir",
    "$recycle.bin",
    "lost+found",
    "system volume information",
}
_SHOWN = 3  # of the names in a message
_RUNS = 4096  # of a source's files, each with a stamp of its own in the index

# Why something is not taken, and whether it looks like a sample and is bad.
_OTHER, _LOOP = "not pictures", "links to a folder that they lie in"
_FURTHER = "further pictures or labels of a sample that is taken"
_OUTSIDE, _KIND = (
    "outside of class folders and tars",
    f"of a kind that is not read (.{', .'.join(EXTENSIONS)} are)",
)
_BROKEN, _SPECIAL, _COMPRESSED = "broken links", "no plain files", "compressed tars"
_NO_LABEL, _NO_PICTURE, _SHARED = (
    "pictures without .cls",
    ".cls without a picture",
    "several pictures with one .cls",
)
_NOT_BAD = {_OTHER, _LOOP, _FURTHER}


class Picture(NamedTuple):
    """One picture of a source: in `file` as a whole, or, in a tar, its `size` bytes from `offset`
    on.
    """

    label: int
    file: str
    member: str = ""
    offset: int = 0
    size: int = -1

    @property
    def address(self) -> str:
        """Where it is, for messages: path below the source's root, with the tar's member; always
        printable.
        """
        return printable(f"{self.file}:{self.member}" if self.member else self.file)


@dataclass(frozen=True)
class LeftOut:
    """What was not taken for one reason: how many, the first few by name, and whether they count as
    bad.
    """

    reason: str
    bad: bool
    count: int
    first: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.count} {self.reason}: {', '.join(self.first)}{', …' * (self.count > len(self.first))}"


@dataclass(frozen=True)
class Source:
    """All pictures, in their order. `class_names` are the class folders', or as given (none for
    tars); `sha256` is the listing's; `left_out` does not count in it.
    """

    root: Path
    pictures: tuple[Picture, ...]
    classes: int
    class_names: tuple[str, ...]
    sha256: str
    left_out: tuple[LeftOut, ...] = ()

    @property
    def lost(self) -> int:
        """How many left-out files or samples count as bad."""
        return sum(left.count for left in self.left_out if left.bad)

    def describe_classes(self) -> str:
        """Number and name of the classes, the first and the last where they are many, and which
        have no picture.
        """
        named = [f"{number} {name}" for number, name in enumerate(_show(self.class_names))]
        text = shorten(named, 20) if named else f"0 to {self.classes - 1}, without names"
        empty = sorted(set(range(self.classes)) - {picture.label for picture in self.pictures})
        if empty:
            text += f"; without any picture: {shorten([str(number) for number in empty], 10)}"
        other = [
            number
            for number, name in enumerate(self.class_names)
            if _is_number(name) and int(name) != number
        ]
        return text + (
            f"; names are not the numbers: {other[0]} is called {self.class_names[other[0]]}"
            if other
            else ""
        )


class _Leaving:
    """Counts what is left out, as it is met."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._first: dict[str, list[str]] = {}

    def add(self, reason: str, address: str) -> None:
        self._counts[reason] += 1
        if self._counts[reason] <= _SHOWN:
            self._first.setdefault(reason, []).append(printable(address))

    def found(self) -> tuple[LeftOut, ...]:
        return tuple(
            LeftOut(reason, reason not in _NOT_BAD, count, tuple(self._first[reason]))
            for reason, count in sorted(self._counts.items())
        )


def is_final(error: OSError) -> bool:
    """Whether trying again will not help: nothing there, no right to it, a link to nothing or to
    itself.
    """
    return isinstance(
        error, (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
    ) or error.errno in (errno.ELOOP, errno.ENAMETOOLONG)


def printable(text: str) -> str:
    """The text, or, where a terminal could not show it, its escaped form."""
    return text if text.isprintable() else ascii(text)[1:-1]


def shorten(names: Sequence[str], most: int) -> str:
    """At most `most` of the names, the last among them."""
    return ", ".join(names if len(names) <= most else [*names[: most - 1], "…", names[-1]])


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
        allow_empty: whether a folder without a picture, or a class above the folders' number, is a
            class.
        first_class: the label of class 0, in tars.

    Raises:
        UserError: nothing there, both kinds in one folder, a tar that is damaged, compressed or
            holds unsafe names, classes without pictures, labels without a 0 where `classes` says
            nothing, or another number of classes than `classes`.
    """
    root, leaving = Path(source), _Leaving()
    folders: dict[str, list[str]] = {}
    if root.is_dir():
        tars, folders = _list_root(root, leaving)
        if tars and folders:
            raise UserError(
                f"source ({source}) holds tars ({tars[0]}) and folders ({next(iter(folders))}); "
                "it must hold one kind"
            )
        pictures = [picture for tar in tars for picture in _list_tar(root, tar, leaving)]
        pictures += [
            Picture(label, file) for label, files in enumerate(folders.values()) for file in files
        ]
    else:
        root = Path()
        pictures = [picture for tar in _expand(source) for picture in _list_tar(root, tar, leaving)]
    left_out = leaving.found()
    if not pictures:
        raise UserError(
            f"source ({source}) holds no pictures: neither class folders with .{', .'.join(EXTENSIONS)} "
            "files, nor tars of such with .cls"
            + "".join(f"; left out, {left}" for left in left_out)
        )
    if not folders:
        pictures = _number_from(
            pictures, first_class, source, sure=bool(classes or class_names or allow_empty)
        )
    elif first_class:
        raise UserError(
            f"first_class ({first_class}) goes with tars: class folders are numbered from 0"
        )
    found = max(len(folders), 1 + max(picture.label for picture in pictures))
    wanted = (len(class_names) or found) if classes is None else classes
    what = (
        f"class_names ({wanted} names)"
        if class_names and classes is None
        else f"classes ({wanted})"
    )
    if class_names and len(class_names) != wanted:
        raise UserError(
            f"class_names ({len(class_names)} names) must have one for each of the classes ({wanted})"
        )
    if wanted < found:
        last = f"the highest label is {found - 1}"
        if folders:
            last = f"the folders' last: {shorten(_show(folders)[wanted:], _SHOWN)}"
        elif all(picture.label for picture in pictures):
            last += ", and none is 0: if they begin with 1, say --first-class 1"
        raise UserError(f"{what} must be at least the {found} of source {source}; {last}")
    if folders and not allow_empty:
        _check_folders(source, what, wanted, folders)
    digest = hashlib.sha256()
    for picture in pictures:
        digest.update(repr(tuple(picture)).encode() + b"\n")
    return Source(
        root,
        tuple(pictures),
        wanted,
        tuple(class_names) or tuple(folders),
        digest.hexdigest(),
        left_out,
    )


def _number_from(pictures: list[Picture], first: int, source: str, sure: bool) -> list[Picture]:
    """Tars' pictures with labels from 0, where `first` is class 0's. UserError for labels below it,
    and, unless the user is `sure` of the classes, for labels that all are above.
    """
    labels = [picture.label for picture in pictures]
    low, high = min(labels), max(labels)
    if low < first or (low > first and not sure):
        raise UserError(
            f"labels of source {source} run from {low} to {high}, and first_class is {first}: "
            f"--first-class {low} if {low} is the first class"
            + (
                f", --classes {high - first + 1} if some are without pictures"
                if low > first
                else ""
            )
        )
    return (
        [picture._replace(label=picture.label - first) for picture in pictures]
        if first
        else pictures
    )


def list_pictures(folder: Path) -> tuple[list[str], tuple[LeftOut, ...]]:
    """The pictures at any depth of a folder, as paths below it, by name; and what is left out.

    Raises:
        OSError: a folder that cannot be read.
    """
    leaving = _Leaving()
    found = _walk(folder, "", frozenset([_identity(folder)]), leaving)
    return sorted(found, key=lambda path: path.split("/")), leaving.found()


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


def _check_folders(source: str, what: str, wanted: int, folders: dict[str, list[str]]) -> None:
    """UserError for classes without a picture."""
    option = "--allow-empty-classes"
    if empty := [name for name, files in folders.items() if not files]:
        raise UserError(
            f"source ({source}) has {len(empty)} class folders without a picture: "
            f"{shorten(_show(empty), _SHOWN)}; remove them, or say {option} to keep them as classes"
        )
    if wanted > len(folders):
        raise UserError(
            f"{what} must not be more than the {len(folders)} class folders of source {source} "
            f"({shorten(_show(folders), _SHOWN)}): which is missing? To have classes without a picture, "
            f"say {option}"
        )


def _show(names: Iterable[str]) -> list[str]:
    return [printable(name) for name in names]


def _expand(pattern: str) -> list[str]:
    from braceexpand import braceexpand

    tars = [name for part in braceexpand(pattern) for name in (sorted(glob.glob(part)) or [part])]
    for name in tars:
        if not Path(name).is_file():
            raise UserError(f"source ({pattern}): {name} does not exist")
        if not name.endswith(".tar"):
            raise UserError(f"source ({pattern}): {name} must be a folder or a .tar")
    return tars


# ---- folders


def _list_root(root: Path, leaving: _Leaving) -> tuple[list[str], dict[str, list[str]]]:
    """Names of the tars in a source's root, and the pictures of each class folder by its name, in
    order.
    """
    tars, folders, broken, rest = [], [], [], []
    above = frozenset([_identity(root)])
    for entry in _entries(root):
        kind, ending = _kind_of(entry), _ending(entry.name)
        if kind == "folder" and _identity(Path(entry.path)) in above:
            leaving.add(_LOOP, entry.name)
        elif kind == "folder":
            folders.append(entry.name)
        elif ending == "tar":
            tars.append(entry.name)
        elif kind == "broken" and ending not in (*EXTENSIONS, *_UNREAD):
            broken.append(entry.name)
            leaving.add(_BROKEN, entry.name)
        else:
            rest.append(entry.name)
    for name in rest:
        if not folders and name.lower().endswith(_ARCHIVES):
            leaving.add(_COMPRESSED, name)
        else:
            leaving.add(_OUTSIDE if _ending(name) in (*EXTENSIONS, *_UNREAD) else _OTHER, name)
    if not tars:
        # may well have been classes: without them all later ones would have another number
        folders += broken
    folders.sort(key=(lambda name: (int(name), name)) if all(map(_is_number, folders)) else None)
    return tars, {
        name: []
        if name in broken
        else sorted(_walk(root, name, above | {_identity(root / name)}, leaving))
        for name in folders
    }


def _walk(
    root: Path, inner: str, above: frozenset[tuple[int, int]], leaving: _Leaving
) -> Iterator[str]:
    """Paths below `root` of the pictures in its folder `inner`, links followed but for those to the
    folders `above`.
    """
    for entry in _entries(root / inner):
        path = os.path.join(inner, entry.name)
        kind, ending = _kind_of(entry), _ending(entry.name)
        if kind == "folder":
            place = _identity(Path(entry.path))
            if place in above:
                leaving.add(_LOOP, path)
            else:
                yield from _walk(root, path, above | {place}, leaving)
        elif ending in EXTENSIONS and kind != "special":
            yield path  # also where a link is broken: reading says so
        elif ending in (*EXTENSIONS, *_UNREAD) or kind == "broken":
            leaving.add(
                _SPECIAL if kind == "special" else _BROKEN if kind == "broken" else _KIND, path
            )
        else:
            leaving.add(_OTHER, path)


def _entries(folder: Path) -> list[os.DirEntry]:
    """What is in a folder, by name, but for what is hidden or left over."""
    with os.scandir(folder) as entries:
        return sorted(
            (entry for entry in entries if not _is_leftover(entry.name)),
            key=lambda entry: entry.name,
        )


def _is_leftover(name: str) -> bool:
    return name.startswith(".") or name.lower() in _LEFTOVERS


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


def _ending(name: str) -> str:
    return name.lower().rpartition(".")[2] if "." in name else ""


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit()


def _identity(folder: Path) -> tuple[int, int]:
    found = os.stat(folder)
    return found.st_dev, found.st_ino


# ---- tars


def _list_tar(root: Path, name: str, leaving: _Leaving) -> list[Picture]:
    pictures: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, bytes] = {}
    unread: list[str] = []
    seen: set[tuple[str, bool]] = set()
    try:
        with tarfile.open(
            root / name, "r:"
        ) as tar:  # "r:" takes no compressed tar: those cannot be read at an offset
            for info in tar:
                _check_member(name, info)
                if info.isdir() or any(map(_is_leftover, PurePosixPath(info.name).parts)):
                    continue
                stem, ending = info.name.rpartition(".")[0], _ending(info.name.rpartition("/")[2])
                if ending in _UNREAD:
                    unread.append(info.name)
                elif ending not in (*EXTENSIONS, "cls"):
                    leaving.add(_OTHER, f"{name}:{info.name}")
                elif (stem, ending == "cls") in seen:
                    raise UserError(
                        f"source tar {name}, member {info.name!r}: second of its kind for this key"
                    )
                else:
                    seen.add((stem, ending == "cls"))
                    if ending == "cls":
                        stream = tar.extractfile(info)
                        labels[stem] = stream.read(32) if stream else b""
                    else:
                        pictures[info.name] = info
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(
            f"source tar {name} is unreadable (damaged, or compressed): {error}"
        ) from error
    pairs = _pair(
        [*pictures, *unread],
        labels.keys(),
        lambda reason, member: leaving.add(reason, f"{name}:{member}"),
    )
    for member in unread:
        if member in pairs:
            leaving.add(_KIND, f"{name}:{member}")
    numbers = {label: _label(name, f"{label}.cls", labels[label]) for label in pairs.values()}
    return [
        Picture(numbers[pairs[member]], name, member, info.offset_data, info.size)
        for member, info in pictures.items()
        if member in pairs
    ]


def _pair(
    pictures: Iterable[str], labels: Iterable[str], leave: Callable[[str, str], None]
) -> dict[str, str]:
    """Each picture's label, both by name, the label's without its ending; `leave` takes what has no
    partner.

    It is the one with the longest key that the picture's name begins with, up to a dot; else the
    only two whose names agree up to their first dot, which is webdataset's key. One label is for
    one picture: the one of exactly its key, if several could have it.
    """
    claims: dict[str, list[str]] = {label: [] for label in labels}
    alone: dict[str, list[str]] = {}
    for picture in pictures:
        parts = _parts(picture)
        keys = (parts[0] + ".".join(parts[1 : n + 1]) for n in range(len(parts) - 1, 0, -1))
        label = next((key for key in keys if key in claims), None)
        (alone.setdefault(parts[0] + parts[1], []) if label is None else claims[label]).append(
            picture
        )
    pairs = {}
    for label, members in claims.items():
        own = [member for member in members if label in (member, member.rpartition(".")[0])]
        chosen = members if len(members) == 1 else own if len(own) == 1 else []
        pairs.update(dict.fromkeys(chosen, label))
        for member in members:
            if member not in chosen:
                leave(_FURTHER if chosen else _SHARED, member)
    unused: dict[str, list[str]] = {}
    taken = {_parts(picture)[0] + _parts(picture)[1] for picture in pairs}
    for label in (label for label, members in claims.items() if not members):
        unused.setdefault(_parts(label)[0] + _parts(label)[1], []).append(label)
    for key, members in alone.items():
        if len(members) == 1 and len(unused.get(key, ())) == 1:
            pairs[members[0]] = unused.pop(key)[0]
        else:
            for member in members:
                leave(_NO_LABEL, member)
    for key, keys in unused.items():
        for label in keys:
            leave(_FURTHER if key in taken else _NO_PICTURE, f"{label}.cls")
    return pairs


def _parts(name: str) -> list[str]:
    """The folder with its slash, then the last part cut at its dots."""
    folder, slash, last = name.rpartition("/")
    return [folder + slash, *last.split(".")]


def _check_member(name: str, info: tarfile.TarInfo) -> None:
    path = PurePosixPath(info.name)
    if path.is_absolute() or ".." in path.parts:
        raise UserError(
            f"source tar {name}, member {info.name!r}: unsafe name, absolute or with '..'"
        )
    if not (info.isdir() or info.isreg()) or info.issparse():
        raise UserError(
            f"source tar {name}, member {info.name!r}: must be a plain file, not a link or the like"
        )


def _label(name: str, member: str, text: bytes) -> int:
    if not re.fullmatch(rb"\s*[0-9]{1,9}\s*", text):
        raise UserError(
            f"source tar {name}, member {member!r}: label {text!r} must be a class number"
        )
    return int(text)


# ---- has it changed?


def file_stamps(source: Source, threads: int) -> tuple[str, ...]:
    """CRC-32 of the sizes and modification times of the source's files (of tars: the tars), in
    hexadecimal: one a file, or one a run of as many files in order that there are at most 4,096.
    """
    # Threads, since a network file system takes a millisecond a file.
    with ThreadPoolExecutor(threads, thread_name_prefix="stamps") as pool:
        return tuple(pool.map(lambda run: _stamp(source.root, run), _runs(source)))


def describe_changes(source: Source, now: Sequence[str], before: Sequence[str]) -> str:
    """Which files have other stamps, as far as these tell."""
    runs = [
        run
        for run, *stamps in zip(_runs(source), now, before, strict=True)
        if stamps[0] != stamps[1]
    ]
    if max(map(len, runs)) == 1:
        return f"{len(runs)} files, first {printable(runs[0][0])}"
    return (
        f"files in {len(runs)} of {len(now)} parts of the listing, the first between {printable(runs[0][0])} and "
        f"{printable(runs[0][-1])}"
    )


def _runs(source: Source) -> list[list[str]]:
    files = list(dict.fromkeys(picture.file for picture in source.pictures))
    length = -(-len(files) // _RUNS)
    return [files[start : start + length] for start in range(0, len(files), length)]


def _stamp(root: Path, files: Iterable[str]) -> str:
    crc = 0
    for file in files:
        try:
            found = os.stat(root / file)
            text = f"{found.st_size} {found.st_mtime_ns}\n"
        except OSError as error:
            if not is_final(error):
                raise
            text = "gone\n"
        crc = zlib.crc32(text.encode(), crc)
    return f"{crc:08x}"
