"""Pictures as they come: a folder of class folders, or webdataset tars of pictures; listed, read, cropped.

A listing is one fixed order of everything that is there, whether or not it can be decoded: what becomes of picture i never
depends on its neighbours.
"""

from __future__ import annotations

import glob
import hashlib
import io
import os
import re
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from diffmoe.errors import UserError

EXTENSIONS = ("jpeg", "jpg", "png", "webp")
_FORMATS = ("JPEG", "PNG", "WEBP")  # by content, since ImageNet has a PNG named .JPEG; no other decoder is ever reached
_MODES = {1: "L", 3: "RGB"}
_KEY_AND_EXTENSION = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")  # webdataset's rule: the first dot of the last part
_GONE = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)  # trying again will not help
_READ_TRIES, _READ_PAUSE = 3, 1.0


class BadImage(UserError):
    """This one picture cannot be used, today or tomorrow; the message says why."""


class Picture(NamedTuple):
    """One picture of a source: in `file` as a whole, or, in a tar, its `size` bytes from `offset` on."""

    label: int
    file: str
    member: str = ""
    offset: int = 0
    size: int = -1

    @property
    def address(self) -> str:
        """Where it is, for messages: path below the source's root, with the tar's member; always printable."""
        text = f"{self.file}:{self.member}" if self.member else self.file
        return text if text.isprintable() else ascii(text)[1:-1]


@dataclass(frozen=True)
class Source:
    """All pictures, in their order. `class_names` are the class folders' (none for tars); `sha256` is the listing's."""

    root: Path
    pictures: tuple[Picture, ...]
    classes: int
    class_names: tuple[str, ...]
    sha256: str


def list_source(source: str, classes: int | None = None) -> Source:
    """List a folder of class folders (sorted by name: class 0, 1, …), a folder of tars, or tars by glob or braces.

    Tars hold `<key>.<jpg|jpeg|png|webp>` with `<key>.cls`; only their headers and labels are read here.

    Args:
        source: the folder, or a pattern such as `train-{000000..000146}.tar`.
        classes: number of classes, if more than what is found.

    Raises:
        UserError: nothing there, both kinds in one folder, a tar that is damaged, compressed, holds unsafe names or
            samples without picture or label, or more classes than `classes`.
    """
    root = Path(source)
    names: tuple[str, ...] = ()
    if root.is_dir():
        tars = sorted(entry.name for entry in os.scandir(root) if entry.name.endswith(".tar"))
        names = tuple(sorted(e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith(".")))
        if tars and names:
            raise UserError(f"source ({source}) holds tars ({tars[0]}) and folders ({names[0]}); it must hold one kind")
        pictures = [p for tar in tars for p in _list_tar(root, tar)]
        pictures += [p for label, name in enumerate(names) for p in _list_class(root, name, label)]
    else:
        root = Path()
        pictures = [picture for tar in _expand(source) for picture in _list_tar(root, tar)]
    if not pictures:
        raise UserError(f"source ({source}) holds no pictures: neither class folders with .{', .'.join(EXTENSIONS)} files, "
                        "nor tars of such with .cls")
    found = max(len(names), 1 + max(picture.label for picture in pictures))
    if classes is not None and classes < found:
        raise UserError(f"classes ({classes}) must be at least the {found} of source {source}")
    digest = hashlib.sha256()
    for picture in pictures:
        digest.update(repr(tuple(picture)).encode() + b"\n")
    return Source(root, tuple(pictures), classes or found, names, digest.hexdigest())


def _expand(pattern: str) -> list[str]:
    from braceexpand import braceexpand

    tars = [name for part in braceexpand(pattern) for name in (sorted(glob.glob(part)) or [part])]
    for name in tars:
        if not Path(name).is_file():
            raise UserError(f"source ({pattern}): {name} does not exist")
        if not name.endswith(".tar"):
            raise UserError(f"source ({pattern}): {name} must be a folder or a .tar")
    return tars


def _list_class(root: Path, name: str, label: int) -> list[Picture]:
    def fail(error: OSError) -> None:
        raise error  # os.walk leaves out what it cannot read, without a word

    found = []
    for folder, _, files in os.walk(root / name, onerror=fail, followlinks=True):
        inner = os.path.relpath(folder, root)
        found += [os.path.join(inner, file) for file in files
                  if not file.startswith(".") and file.lower().rpartition(".")[2] in EXTENSIONS and "." in file]
    return [Picture(label, file) for file in sorted(found)]


def _list_tar(root: Path, name: str) -> list[Picture]:
    pictures: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(root / name, "r:") as tar:  # "r:" takes no compressed tar: those cannot be read at an offset
            for info in tar:
                _check_member(name, info)
                match = _KEY_AND_EXTENSION.fullmatch(info.name)
                if info.isdir() or not match or match[2].lower() not in (*EXTENSIONS, "cls"):
                    continue
                key, is_label = match[1], match[2].lower() == "cls"
                if key in (labels if is_label else pictures):
                    raise UserError(f"source tar {name}, member {info.name!r}: second of its kind for this key")
                if is_label:
                    labels[key] = _read_label(name, tar, info)
                else:
                    pictures[key] = info
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"source tar {name} is unreadable (damaged, or compressed): {error}") from error
    for key in pictures.keys() ^ labels.keys():
        raise UserError(f"source tar {name}: sample {key!r} has no {'.cls' if key in pictures else 'picture'}")
    return [Picture(labels[key], name, info.name, info.offset_data, info.size) for key, info in pictures.items()]


def _check_member(name: str, info: tarfile.TarInfo) -> None:
    path = PurePosixPath(info.name)
    if path.is_absolute() or ".." in path.parts:
        raise UserError(f"source tar {name}, member {info.name!r}: unsafe name, absolute or with '..'")
    if not (info.isdir() or info.isreg()) or info.issparse():
        raise UserError(f"source tar {name}, member {info.name!r}: must be a plain file, not a link or the like")


def _read_label(name: str, tar: tarfile.TarFile, info: tarfile.TarInfo) -> int:
    stream = tar.extractfile(info)
    text = stream.read(32) if stream else b""
    if not re.fullmatch(rb"\s*[0-9]{1,9}\s*", text):
        raise UserError(f"source tar {name}, member {info.name!r}: label {text!r} must be a class number")
    return int(text)


def read_picture(source: Source, picture: Picture, size: int, channels: int) -> np.ndarray:
    """The picture, cropped (see `center_crop`), as uint8 [channels, size, size]; `channels` is 1 (grey) or 3.

    Colours as published pipelines take them: alpha dropped, EXIF orientation not applied.

    Raises:
        BadImage: it is missing, damaged, or of a kind that has no 8-bit form.
        OSError: the file system fails, also when asked again; says nothing about the picture.
    """
    cropped = center_crop(decode_picture(_read_bytes(source.root / picture.file, picture), channels), size)
    return np.asarray(cropped).reshape(size, size, channels).transpose(2, 0, 1).copy()


def decode_picture(data: bytes, channels: int) -> Image.Image:
    """A picture file's bytes as an 8-bit image of 1 (grey) or 3 channels.

    Raises:
        BadImage: damaged, or of a kind that has no 8-bit form.
    """
    try:
        # Pillow's decoders raise nearly anything over damaged bytes (SyntaxError, struct.error, …): all mean the same.
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if image.mode[0] in "IF":
                raise BadImage(f"mode {image.mode}: more than 8 bits a channel")
            return image.convert(_MODES[channels])
    except (BadImage, MemoryError):
        raise
    except UnidentifiedImageError:
        raise BadImage(f"not a picture of a known kind ({', '.join(_FORMATS)})") from None
    except Exception as error:
        raise BadImage(f"{type(error).__name__}: {error}") from error


def picture_size(path: Path) -> tuple[int, int]:
    """Height and width of a picture file, from its header.

    Raises:
        BadImage: no file, or none of a known kind.
    """
    try:
        with Image.open(path, formats=_FORMATS) as image:
            return image.height, image.width
    except UnidentifiedImageError:
        raise BadImage(f"not a picture of a known kind ({', '.join(_FORMATS)})") from None
    except Exception as error:  # as in decode_picture
        raise BadImage(f"{type(error).__name__}: {error}") from error


def _read_bytes(path: Path, picture: Picture) -> bytes:
    for attempt in range(1, _READ_TRIES + 1):
        try:
            with open(path, "rb") as stream:
                stream.seek(picture.offset)
                return stream.read(picture.size)
        except _GONE as error:
            raise BadImage(error.strerror) from error
        except OSError as error:
            # A busy file server is no corrupt picture: leaving it out would give another data set every time.
            if attempt == _READ_TRIES:
                raise OSError(error.errno, error.strerror, str(path)) from error
            time.sleep(_READ_PAUSE)
    raise AssertionError("unreachable")


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The central size × size square, after scaling the shorter side to `size`, as ADM trains on ImageNet.

    While the shorter side is at least 2 · size, both sides are halved (rounded down) with a box filter; bicubic does the
    rest (Dhariwal and Nichol 2021).

    Raises:
        BadImage: so long and narrow that its scaled form would not fit in memory.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > (Image.MAX_IMAGE_PIXELS or 2**27):
        raise BadImage(f"{image.width} x {image.height} pixels would become {width} x {height}")
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))
