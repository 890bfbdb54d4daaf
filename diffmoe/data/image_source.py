"""The images of a source, what is left out of it, and whether it changed."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from diffmoe.files import is_final

EXTENSIONS = ("jpeg", "jpg", "png", "webp", "bmp", "tif", "tiff", "gif", "jpe", "jfif")
UNREAD = "jp2 jxl avif heic heif pgm ppm pnm svg psd exr dng tga".split()
_LEFTOVERS = {
    *("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "$recycle.bin"),
    *("lost+found", "system volume information"),
}
SHOWN = 3  # of the names in a message
_RUNS = 4096  # of a source's files, each with a stamp of its own in the index


# Why something is not taken; what looks like a sample is bad.
OTHER, LOOP = "not images", "links to a folder that they lie in"
FURTHER = "further images or labels of a sample that is taken"
_NOT_BAD = {OTHER, LOOP, FURTHER}
KIND = f"of a kind that is not read (.{', .'.join(EXTENSIONS)} are)"

Leaving = dict[str, list[str]]  # reason → addresses of what is left out for it


class SourceImage(NamedTuple):
    """An image of a source: all of `file`, or, in a tar, its `size` bytes from `offset` on."""

    label: int
    file: str
    member: str = ""
    offset: int = 0
    size: int = -1

    @property
    def address(self) -> str:
        """For messages: path below the source's root, with the tar's member; always printable."""
        return printable(f"{self.file}:{self.member}" if self.member else self.file)


@dataclass(frozen=True)
class LeftOut:
    """What was not taken for one reason: how many, the first few, whether they count as bad."""

    reason: str
    bad: bool
    count: int
    first: tuple[str, ...]

    def __str__(self) -> str:
        more = ", …" if self.count > len(self.first) else ""
        return f"{self.count} {self.reason}: {', '.join(self.first)}{more}"


@dataclass(frozen=True)
class Source:
    """All images, in their order. `class_names` are the class folders', or as given (none for
    tars); `sha256` is the listing's; `left_out` does not count in it.
    """

    root: Path
    images: tuple[SourceImage, ...]
    classes: int
    class_names: tuple[str, ...]
    sha256: str
    left_out: tuple[LeftOut, ...] = ()

    @property
    def lost(self) -> int:
        """How many left-out files or samples count as bad."""
        return sum(left.count for left in self.left_out if left.bad)

    def describe_classes(self) -> str:
        """Number and name of the classes (of many, the first and last), and which have no image."""
        named = [f"{number} {printable(name)}" for number, name in enumerate(self.class_names)]
        text = shorten(named, 20) if named else f"0 to {self.classes - 1}, without names"
        empty = sorted(set(range(self.classes)) - {image.label for image in self.images})
        if empty:
            text += f"; without any image: {shorten([str(number) for number in empty], 10)}"
        for number, name in enumerate(self.class_names):
            if is_number(name) and int(name) != number:
                return f"{text}; names are not the numbers: {number} is called {name}"
        return text


def printable(text: str) -> str:
    """The text, or, where a terminal could not show it, its escaped form."""
    return text if text.isprintable() else ascii(text)[1:-1]


def shorten(names: Iterable[str], most: int) -> str:
    """At most `most` of the names, the last among them."""
    names = [printable(name) for name in names]
    return ", ".join(names if len(names) <= most else [*names[: most - 1], "…", names[-1]])


def count_left_out(leaving: Leaving) -> tuple[LeftOut, ...]:
    """What is left out, by reason."""
    return tuple(
        LeftOut(reason, reason not in _NOT_BAD, len(names), tuple(map(printable, names[:SHOWN])))
        for reason, names in sorted(leaving.items())
    )


def is_leftover(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or an operating system's."""
    return name.startswith(".") or name.lower() in _LEFTOVERS


def looks_like_image(ending: str) -> bool:
    """Whether it is an image format's, read here or not."""
    return ending in EXTENSIONS or ending in UNREAD


def ending_of(name: str) -> str:
    """What follows the last dot of a file's name, in small letters."""
    return name.lower().rpartition(".")[2] if "." in name else ""


def is_number(name: str) -> bool:
    """Whether the name consists of digits."""
    return name.isascii() and name.isdigit()


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
    stamps = zip(_runs(source), now, before, strict=True)
    runs = [run for run, stamp, old in stamps if stamp != old]
    first = printable(runs[0][0])
    if max(map(len, runs)) == 1:
        return f"{len(runs)} files, first {first}"
    return (
        f"files in {len(runs)} of {len(now)} parts of the listing, the first between {first} and "
        f"{printable(runs[0][-1])}"
    )


def _runs(source: Source) -> list[list[str]]:
    files = list(dict.fromkeys(image.file for image in source.images))
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
