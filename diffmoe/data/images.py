"""Images as they come: read, decoded, cropped (`listing.py` says which there are)."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from diffmoe.data.image_source import Source, SourceImage
from diffmoe.errors import UserError
from diffmoe.files import is_final, retried

# By content, since ImageNet has a PNG named .JPEG; no other decoder is ever reached.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
_MODES = {1: "L", 3: "RGB"}


class BadImage(UserError):
    """This one image cannot be used, today or tomorrow; the message says why."""


def read_image(source: Source, image: SourceImage, size: int, channels: int) -> np.ndarray:
    """The image, cropped (see `center_crop`), as uint8 [channels, size, size]; `channels` is 1
    (grey) or 3.

    Colours as published pipelines take them: alpha dropped, EXIF orientation not applied. Of
    several frames the first.

    Raises:
        BadImage: it is missing, corrupt, or of a kind that has no 8-bit form.
        OSError: the file system fails, also when asked again; says nothing about the image.
    """
    cropped = center_crop(
        decode_image(_read_bytes(source.root / image.file, image), channels), size
    )
    return np.asarray(cropped).reshape(size, size, channels).transpose(2, 0, 1).copy()


def decode_image(data: bytes, channels: int) -> Image.Image:
    """An image file's bytes as an 8-bit image of 1 (grey) or 3 channels.

    Raises:
        BadImage: corrupt, or of a kind that has no 8-bit form.
    """
    with _opened(io.BytesIO(data)) as image:
        if image.mode[0] in "IF":
            raise BadImage(f"mode {image.mode}: more than 8 bits a channel")
        return image.convert(_MODES[channels])


def image_size(path: Path) -> tuple[int, int]:
    """Height and width of an image file, from its header.

    Raises:
        BadImage: no file, or none of a known kind.
    """
    with _opened(path) as image:
        return image.height, image.width


@contextmanager
def _opened(file: Path | io.BytesIO) -> Iterator[Image.Image]:
    # Pillow's decoders raise nearly anything over corrupt bytes (SyntaxError, struct.error, …): all
    # mean the same.
    try:
        with Image.open(file, formats=_FORMATS) as image:
            yield image
    except (BadImage, MemoryError):
        raise
    except UnidentifiedImageError:
        raise BadImage(f"not an image of a known kind ({', '.join(_FORMATS)})") from None
    except Exception as error:
        raise BadImage(f"{type(error).__name__}: {error}") from error


def _read_bytes(path: Path, image: SourceImage) -> bytes:
    def once() -> bytes:
        with open(path, "rb") as stream:
            stream.seek(image.offset)
            return stream.read(image.size)

    # A busy file server is not a corrupt image: leaving it out would give another data set every
    # time.
    try:
        return retried(once, str(path))
    except OSError as error:
        if is_final(error):
            link = f"broken link to {os.readlink(path)!r}" if os.path.islink(path) else ""
            raise BadImage(link or str(error.strerror)) from error
        raise OSError(error.errno, error.strerror, str(path)) from error


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The central size × size square, after scaling the shorter side to `size`, as ADM trains on
    ImageNet.

    While the shorter side is at least 2 · size, both sides are halved (rounded down) with a box
    filter; bicubic does the rest (Dhariwal and Nichol 2021).

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
