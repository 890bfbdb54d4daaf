"""Where images to be scored come from: a folder of images, pixel shards, or uint8 images [N, H,
W, 3] in a `.npy` or as `arr_0` in an `.npz` (ADM's form).

50,000 images of 256 x 256 are 10 GB: nothing here holds more than the slice that is read.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from diffmoe.data.images import BadImage, decode_image, image_size
from diffmoe.data.listing import EXTENSIONS, LeftOut, list_images
from diffmoe.data.reader import ShardReader
from diffmoe.data.shards import INDEX_NAME, load_index
from diffmoe.errors import UserError
from diffmoe.evaluation.features import to_uint8
from diffmoe.parallel.collectives import agreed
from diffmoe.parallel.groups import Group

# What zipfile and numpy raise for files that are not intact.
UNREADABLE = (
    *(OSError, ValueError, EOFError, KeyError, NotImplementedError),
    *(zipfile.BadZipFile, zlib.error, struct.error),
)


@dataclass(frozen=True)
class ImageSource:
    """`count` images of `size` (height, width); `read(start, stop)` gives some of them, uint8 [n,
    3, H, W]. `files`: where they are; `one_each`: whether that is one image each. `left_out`: files
    of the folder that are not images.
    """

    name: str
    count: int
    size: tuple[int, int]
    read: Callable[[int, int], Tensor]
    files: tuple[Path, ...] = ()
    one_each: bool = False
    left_out: tuple[LeftOut, ...] = ()

    def check(self, world: Group) -> None:
        """Compares sizes by headers, each rank a share.  AgreedError: another, or a bad image."""
        with agreed(world):
            for path in self.files[world.index :: world.size] if self.one_each else ():
                _check_size(path, _size_of(path), self.files[0], self.size)


def open_images(path: str | Path) -> ImageSource:
    """The images of a folder of images (all below it, by name), of pixel shards, of an npz's
    `arr_0` or of a .npy [N, H, W, 3].

    Raises:
        UserError: no images there, some that cannot be taken (see `listing.py`), moments instead of
            pixels, or an array of another kind.
    """
    path = Path(path)
    if path.is_file():
        shape, rows = open_array(path)
        read_rows = lambda start, stop: channels_first(rows(start, stop))
        return ImageSource(str(path), shape[0], (shape[1], shape[2]), read_rows, (path,))
    if (path / INDEX_NAME).is_file():
        return _open_shards(path)
    if not path.is_dir():
        raise UserError(f"{path} does not exist: no images, no statistics")
    names, left_out = list_images(path)
    if not names:
        raise UserError(
            f"folder {path} holds neither {INDEX_NAME} nor images (.{', .'.join(EXTENSIONS)})"
        )
    if lost := [str(left) for left in left_out if left.bad]:
        raise UserError(
            f"folder {path} holds more than can be read, and statistics of the rest would be "
            f"another data set's: {'; '.join(lost)}; remove or convert them"
        )
    files = tuple(path / name for name in names)
    size = _size_of(files[0])

    def read(start: int, stop: int) -> Tensor:
        images = []
        for file in files[start:stop]:
            try:
                image = np.asarray(decode_image(file.read_bytes(), channels=3))
            except (BadImage, OSError) as error:
                raise UserError(f"image {file} cannot be read: {error}") from None
            _check_size(file, image.shape[:2], files[0], size)
            images.append(image)
        return channels_first(np.stack(images))

    return ImageSource(str(path), len(files), size, read, files, True, left_out)


def _size_of(path: Path) -> tuple[int, int]:
    try:
        return image_size(path)
    except BadImage as error:
        raise UserError(f"image {path} cannot be read: {error}") from None


def _check_size(
    path: Path, size: tuple[int, ...], first: Path, first_size: tuple[int, int]
) -> None:
    if size != first_size:
        raise UserError(
            f"image {path} is {size[1]} x {size[0]}, {first.name} is "
            f"{first_size[1]} x {first_size[0]}: crop and resize them beforehand"
        )


def _open_shards(path: Path) -> ImageSource:
    index = load_index(path)
    if index.meta.kind != "pixels":
        raise UserError(
            f"shards {path} hold {index.meta.kind}, not pixels: latents have no Inception features"
        )
    channels, height, width = index.shape
    if channels not in (1, 3):
        raise UserError(f"shards {path} hold arrays {index.shape}; images must be [1 or 3, H, W]")
    reader = ShardReader(index, seed=0)  # one epoch in any order is every image once

    def read(start: int, stop: int) -> Tensor:
        return to_uint8(torch.from_numpy(reader.read(range(start, stop))[0]))

    return ImageSource(str(path), index.count, (height, width), read, (path / INDEX_NAME,))


def channels_first(images: np.ndarray) -> Tensor:
    """[n, H, W, 3] as [n, 3, H, W]."""
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def names_in(path: Path) -> list[str] | None:
    """The arrays of an npz by name; None for a `.npy`. UserError for any other file."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                return [name.removesuffix(".npy") for name in archive.namelist()]
        with open(path, "rb") as stream:
            np.lib.format.read_magic(stream)
        return None
    except UNREADABLE as error:
        raise UserError(f"{path} is neither a whole .npz nor a .npy: {error}") from None


def open_array(path: Path) -> tuple[tuple[int, ...], Callable[[int, int], np.ndarray]]:
    """The shape [N, H, W, 3] of a file's images, and `read(start, stop)` for some of them.

    A compressed member is unpacked as it is read: forward reads cost what they give, a step back
    starts again. UserError for no such array, one of another type or shape, or a file that is cut
    short; from `read` for damage inside.
    """
    names = names_in(path)
    if names is not None and "arr_0" not in names:
        raise UserError(f"{path} {_no_images(names)}")
    what, mapped, offset = "its array", True, 0
    try:
        stream: IO[bytes] = open(path, "rb")
        size = path.stat().st_size
        if names is not None:
            archive = zipfile.ZipFile(stream)
            info = archive.getinfo("arr_0.npy")
            what, stream, size = "arr_0", archive.open(info), info.file_size
            mapped = info.compress_type == zipfile.ZIP_STORED
            offset = _start_of_member(path, info.header_offset)
        version = np.lib.format.read_magic(stream)
        shape, column_major, dtype = (
            np.lib.format.read_array_header_1_0(stream)
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0(stream)
        )
        header = stream.tell()
    except UNREADABLE as error:
        raise UserError(f"{path}: its array's header cannot be read: {error}") from None
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or min(shape) < 1 or column_major:
        raise UserError(
            f"{path}: {what} ({dtype} {shape}) must be uint8 [N, H, W, 3] in C order to be images; "
            "statistics are an npz with mu and sigma"
        )
    each = int(np.prod(shape[1:]))
    needed = header + shape[0] * each
    if size != needed or mapped and offset + size > path.stat().st_size:
        raise UserError(
            f"{path}: {what} of {shape} needs {needed} bytes and has {size}: the file is cut short"
        )

    def read(start: int, stop: int) -> np.ndarray:
        if mapped:
            return np.array(np.memmap(path, np.uint8, "r", offset + header, shape)[start:stop])
        try:
            place = header + start * each
            if place < stream.tell():
                stream.seek(0)
            # Its own seek forward unpacks 16 MiB at a time.
            while stream.tell() < place and stream.read(min(1 << 20, place - stream.tell())):
                pass
            rows = np.frombuffer(stream.read((stop - start) * each), np.uint8)
            return rows.reshape(stop - start, *shape[1:])
        except UNREADABLE as error:
            raise UserError(f"{path}: images {start}..{stop - 1} cannot be read: {error}") from None

    return shape, read


def _start_of_member(path: Path, header: int) -> int:
    """Where a zip member's bytes begin: after local `header`, name and extra field."""
    with open(path, "rb") as file:
        file.seek(header + 26)
        return header + 30 + sum(struct.unpack("<2H", file.read(4)))


def _no_images(names: list[str]) -> str:
    """What a file is that has no arr_0."""
    if {"mu", "sigma"} <= set(names):
        return "holds statistics (mu, sigma) and no images (arr_0)"
    of_sample = ""
    if {"images", "labels"} <= set(names):
        of_sample = (
            "; those of `run.py sample` have it where they are images: sample again, latents "
            "with --vae"
        )
    return f"holds {names}, not arr_0 and not mu and sigma{of_sample}"
