"""The embedded data set: scikit-learn's 1,797 handwritten digits (8 x 8, values 0..16) as pixel
shards.

python -m diffmoe.data.digits FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from diffmoe.data.shards import INDEX_NAME, ShardIndex, ShardMeta, load_index, write_shards
from diffmoe.errors import UserError
from diffmoe.paths import PathParser

DIGITS_META = ShardMeta(kind="pixels", classes=10, scale=1 / 8, mean=8.0)  # 0..16 becomes [-1, 1]
SAMPLES_PER_SHARD = 200


def write_digits(folder: str | Path) -> ShardIndex:
    """Write the digits to `folder`, uint8 [1, 8, 8] each, or return the index of those already
    there. UserError where the folder holds another data set, or a corrupt copy of this one.
    """
    images, labels = load_digits(return_X_y=True)
    arrays = images.reshape(-1, 1, 8, 8).astype(np.uint8)
    if (Path(folder) / INDEX_NAME).exists():
        index = load_index(folder)
        if (index.meta, index.shape, index.count) != (DIGITS_META, arrays.shape[1:], len(arrays)):
            raise UserError(
                f"folder ({folder}) holds another data set: {index.count} samples of "
                f"{index.shape}, digits are {len(arrays)} of {arrays.shape[1:]}"
            )
        return index
    pairs = enumerate(zip(arrays, labels))
    samples = ((f"{i:04d}", array, int(label)) for i, (array, label) in pairs)
    return write_shards(samples, folder, samples_per_shard=SAMPLES_PER_SHARD, meta=DIGITS_META)


def main(arguments: list[str] | None = None) -> int:
    """Command line of this module; returns the exit code."""
    parser = PathParser(description="Write scikit-learn's handwritten digits as shards.")
    parser.add_argument("folder", type=Path)
    try:
        folder = parser.parse_args(arguments).folder
        index = write_digits(folder)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"digits: {index.count} samples in {len(index.shards)} shards at {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
