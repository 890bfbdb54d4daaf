"""Fashion-MNIST as folders of images, which `run.py encode` reads like anybody's.

python -m diffmoe.data.fashion SOURCE FOLDER

Zalando's data set (Xiao, Rasul and Vollgraf 2017, Expat) has 60,000 grey 28 x 28 images of clothing
to train with and 10,000 to test with, in 10 classes. It is in Debian's package
dataset-fashion-mnist as four files in MNIST's idx form, and at
https://github.com/zalandoresearch/fashion-mnist under the same names. `make fashion` does the rest.
"""

from __future__ import annotations

import gzip
import os
import sys
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from diffmoe.errors import UserError
from diffmoe.paths import PathParser

# The data set's own numbers, 0 to 9.
CLASS_NAMES = (
    *("t-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
NAMES_FILE = "class_names.txt"
_PARTS = {"train": "train", "test": "t10k"}
_BYTES = 0x08  # idx's code for unsigned bytes


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The uint8 array of a gzipped idx file: two zeros, the type, the number of dimensions, their
    sizes as big-endian 32-bit numbers, the values.

    Raises:
        UserError: no such file, no gzip, another type or number of dimensions, or other than as
            many values as the sizes say.
    """
    try:
        data = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        said = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read as gzip: {said}") from None
    head = 4 * (1 + dimensions)
    if len(data) < head or data[:4] != bytes([0, 0, _BYTES, dimensions]):
        raise UserError(
            f"{path} must be an idx file of {dimensions}-dimensional bytes: it begins with "
            f"{data[:4].hex(' ') or 'nothing'}, not 00 00 {_BYTES:02x} {dimensions:02x}"
        )
    shape = tuple(map(int, np.frombuffer(data[4:head], ">u4")))
    if len(data) - head != np.prod(shape, dtype=np.int64):
        raise UserError(f"{path} says {shape} and holds {len(data) - head} values")
    return np.frombuffer(data, np.uint8, offset=head).reshape(shape)


def write_images(source: Path, folder: Path) -> dict[str, int]:
    """Write the images of the four idx files in `source` as PNG files `folder`/train/3/00042.png:
    part, class, number in the file; and the classes' names as `folder`/class_names.txt.

    Each file gets its source's time of writing, so that `encode`, interrupted, resumes with images
    that were written again.

    Returns: how many images each part has.

    Raises:
        UserError: as `read_idx`; another number of labels than of images, or labels of other
            classes; a folder that is there already.
    """
    read = {}
    for part, stem in _PARTS.items():
        pictures, names = source / f"{stem}-images-idx3-ubyte.gz", f"{stem}-labels-idx1-ubyte.gz"
        images, labels = read_idx(pictures, 3), read_idx(source / names, 1)
        if len(images) != len(labels):
            raise UserError(
                f"{pictures} holds {len(images)} images and {names} {len(labels)} labels"
            )
        if len(labels) and labels.max() >= len(CLASS_NAMES):
            raise UserError(f"{source / names}: label {labels.max()} must be at most 9")
        read[part] = images, labels, int(pictures.stat().st_mtime)
    for part, (images, labels, written) in read.items():
        try:
            for label in range(len(CLASS_NAMES)):
                (folder / part / str(label)).mkdir(parents=True)
        except FileExistsError as error:
            raise UserError(f"folder ({folder}) must not hold {error.filename} yet") from None
        for number, (image, label) in enumerate(zip(images, labels)):
            path = folder / part / str(label) / f"{number:05d}.png"
            Image.fromarray(image).save(path)
            os.utime(path, (written, written))
    (folder / NAMES_FILE).write_text("".join(f"{name}\n" for name in CLASS_NAMES))
    return {part: len(labels) for part, (_, labels, _) in read.items()}


def main(arguments: list[str] | None = None) -> int:
    """Command line of this module; returns the exit code."""
    parser = PathParser(description="Write Fashion-MNIST's idx files as folders of images.")
    parser.add_argument("source", type=Path, help="folder of the four *-ubyte.gz files")
    parser.add_argument("folder", type=Path, help="where train, test and class_names.txt are put")
    try:
        options = parser.parse_args(arguments)
        counts = write_images(options.source, options.folder)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = " and ".join(f"{count} images in {part}" for part, count in counts.items())
    print(f"fashion: {found} at {options.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
