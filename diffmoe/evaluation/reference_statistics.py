"""What samples are compared with: Gaussians of the real images' features, and some of the features themselves.

A reference comes from ADM's npz, from one that was saved here, or is measured from images: a folder of pictures, pixel
shards, or an npz with `arr_0`. ADM's files hold statistics of the whole data set next to 10,000 images for precision and
recall; both are used.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffmoe.data.images import BadImage, decode_picture
from diffmoe.data.listing import EXTENSIONS, LeftOut, list_pictures
from diffmoe.data.reader import ShardReader
from diffmoe.data.shards import INDEX_NAME, load_index
from diffmoe.data.tar import replacing, sha256
from diffmoe.errors import UserError
from diffmoe.evaluation.features import Extractor, to_uint8
from diffmoe.evaluation.scores import Moments, merge, merge_over, moments_of
from diffmoe.parallel.collectives import gather_stack, raise_together
from diffmoe.parallel.groups import Group
from diffmoe.progress import shown

NEIGHBOUR_FEATURES = 10_000  # real images in precision and recall, as in ADM's reference batches


@dataclass(frozen=True)
class Gaussian:
    """Mean [d] and covariance [d, d] of features, fp64."""

    mean: np.ndarray
    covariance: np.ndarray


@dataclass(frozen=True)
class Reference:
    """Real images, measured.

    `sha256` is of ADM's file, of the numbers in a saved one, or of the images that were measured; `count` is the images
    behind the Gaussians, None where a file does not say. `features` [n, d] are for precision and recall (None: not known).
    `extractor` is the SHA-256 of the network that measured (None where a file does not say).
    """

    source: str
    sha256: str
    count: int | None
    pool: Gaussian
    spatial: Gaussian | None = None
    features: np.ndarray | None = None
    extractor: str | None = None


@dataclass(frozen=True)
class ImageSource:
    """`count` images; `read(start, stop)` gives some of them, uint8 [n, 3, H, W]. `left_out`: files that are none."""

    name: str
    count: int
    read: Callable[[int, int], Tensor]
    left_out: tuple[LeftOut, ...] = ()


def load_reference(path: str | Path, extractor: Extractor, world: Group, device: torch.device, *, batch: int = 64,
                   progress: bool = False) -> Reference:
    """The reference behind a path, measured by all ranks together where it is images.

    Args:
        path: an npz (ADM's or `save_reference`'s), a folder of pictures of one size, or a folder of pixel shards.
        batch: images that pass the extractor at once.

    Raises:
        UserError: on every rank: nothing that is a reference, statistics of another extractor, damaged images, too few.
    """
    stored: Reference | None = None
    source: ImageSource | None = None
    problem: Exception | None = None
    try:
        path = Path(path)
        if path.is_file():
            stored = _read_statistics(path, extractor)
        if stored is None or (stored.features is None and _holds_images(path)):
            source = open_images(path)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        problem = error
    raise_together(problem, world)
    for left in source.left_out if source is not None and world.index == 0 else ():
        print(f"reference {path}: left out, {left}", flush=True)
    if stored is None:
        return measure_reference(source, extractor, world, device, batch=batch, progress=progress)
    if source is None:
        return stored
    return replace(stored, features=_measure(source, extractor, world, device, batch, progress).features)


def measure_reference(source: ImageSource, extractor: Extractor, world: Group, device: torch.device, *, batch: int = 64,
                      progress: bool = False) -> Reference:
    """Features of all of a source's images, an equal run of them on each rank; the same reference on every rank.

    Precision and recall get every k-th image, at most `NEIGHBOUR_FEATURES`.

    Raises:
        UserError: on every rank: an image that cannot be read, or fewer images than feature width + 1.
    """
    measured = _measure(source, extractor, world, device, batch, progress)
    pool, *spatial = (Gaussian(moments.mean, moments.covariance()) for moments in measured.moments)
    return Reference(source.name, measured.sha256, source.count, pool, spatial[0] if spatial else None, measured.features,
                     extractor.sha256)


@dataclass(frozen=True)
class _Measured:
    """Moments of pool (and spatial) features, features [n, d] of every k-th image, SHA-256 of all images' SHA-256s."""

    moments: tuple[Moments, ...]
    features: np.ndarray
    sha256: str


def _measure(source: ImageSource, extractor: Extractor, world: Group, device: torch.device, batch: int,
             progress: bool) -> _Measured:
    each = -(-source.count // world.size)
    mine = range(min(source.count, world.index * each), min(source.count, (world.index + 1) * each))
    stride = -(-source.count // NEIGHBOUR_FEATURES)
    moments: list[Moments] = []
    kept: list[np.ndarray] = []
    hashes: list[bytes] = []
    problem: Exception | None = None
    try:
        # A rank without a share looks at one image and keeps nothing: it must know the widths.
        for start in shown(mine[::batch] or range(1), f"reference, batches of {batch}", progress):
            images = source.read(start, min(start + batch, mine.stop) if mine else 1)
            features = extractor(images)
            rows = slice(None) if mine else slice(0, 0)
            parts = [moments_of(value[rows]) for value in (features.pool, features.spatial) if value is not None]
            moments = [merge(*pair) for pair in zip(moments, parts, strict=True)] if moments else parts
            kept.append(features.pool[rows][-start % stride :: stride])
            hashes += [hashlib.sha256(image.numpy().tobytes()).digest() for image in images[rows]]
    except (OSError, UserError) as error:
        problem = error
    raise_together(problem, world)
    digests = np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 32)
    return _Measured(tuple(merge_over(part, world, device) for part in moments),
                     _gather_rows(np.concatenate(kept), world, device),
                     hashlib.sha256(_gather_rows(digests, world, device).tobytes()).hexdigest())


def save_reference(reference: Reference, path: str | Path) -> None:
    """Write a reference as npz, under ADM's names (`mu`, `sigma`, `mu_s`, `sigma_s`) and with a hash of its content."""
    arrays = _arrays(reference)
    with replacing(Path(path)) as stream:
        np.savez(stream, **arrays, sha256=np.array(_digest(arrays)))


def open_images(path: str | Path) -> ImageSource:
    """The images of a folder of pictures (all below it, by name), of pixel shards, or of an npz's `arr_0` [N, H, W, 3].

    Raises:
        UserError: no images there, some that cannot be taken (see `listing.py`), moments instead of pixels, or an
            array of another kind.
    """
    path = Path(path)
    if path.is_file():
        return _open_npz(path)
    if (path / INDEX_NAME).is_file():
        return _open_shards(path)
    if not path.is_dir():
        raise UserError(f"reference ({path}) does not exist")
    names, left_out = list_pictures(path)
    if not names:
        raise UserError(f"reference folder ({path}) holds neither {INDEX_NAME} nor pictures (.{', .'.join(EXTENSIONS)})")
    if lost := [str(left) for left in left_out if left.bad]:
        raise UserError(f"reference folder ({path}) holds more than can be read, and statistics of the rest would be "
                        f"another data set's: {'; '.join(lost)}; remove or convert them")
    pictures = [path / name for name in names]

    def read(start: int, stop: int) -> Tensor:
        images = [_read_picture(p) for p in [pictures[0], *pictures[start:stop]]]
        for picture, image in zip(pictures[start:stop], images[1:]):
            if image.shape != images[0].shape:
                raise UserError(f"picture {picture} is {image.shape[1]} x {image.shape[0]}, {pictures[0].name} is "
                                f"{images[0].shape[1]} x {images[0].shape[0]}: crop and resize them beforehand")
        return _channels_first(np.stack(images[1:]))

    return ImageSource(str(path), len(pictures), read, left_out)


def _read_picture(path: Path) -> np.ndarray:
    try:
        return np.asarray(decode_picture(path.read_bytes(), channels=3))
    except (BadImage, OSError) as error:
        raise UserError(f"picture {path} cannot be read: {error}") from None


def _open_shards(path: Path) -> ImageSource:
    index = load_index(path)
    if index.meta.kind != "pixels":
        raise UserError(f"reference shards ({path}) hold {index.meta.kind}, not pixels: latents have no Inception features")
    reader = ShardReader(index, seed=0)  # one epoch in any order is every image once
    return ImageSource(str(path), index.count,
                       lambda start, stop: to_uint8(torch.from_numpy(reader.read(range(start, stop))[0])))


def _open_npz(path: Path) -> ImageSource:
    """Rows of `arr_0` straight from the file: ADM's 10,000 images are 2 GB, and eight ranks would hold them eight times."""
    with zipfile.ZipFile(path) as archive:
        if "arr_0.npy" not in archive.namelist():
            raise UserError(f"reference file ({path}) holds {archive.namelist()}, not arr_0 and not mu and sigma")
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as stream:
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, column_major, dtype = read_header[np.lib.format.read_magic(stream)](stream)
        header = stream.tell()
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or shape[0] < 1 or column_major:
        raise UserError(f"{path}: arr_0 ({dtype} {shape}) must be uint8 [N, H, W, 3] in C order")
    size = int(np.prod(shape[1:]))

    def read(start: int, stop: int) -> Tensor:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as stream:
            stream.seek(header + start * size)
            payload = stream.read((stop - start) * size)
        return _channels_first(np.frombuffer(payload, np.uint8).reshape(stop - start, *shape[1:]))

    return ImageSource(str(path), shape[0], read)


def _channels_first(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def _read_statistics(path: Path, extractor: Extractor) -> Reference | None:
    """What an npz of statistics says; None where it holds images only."""
    with np.load(path, allow_pickle=False) as archive:
        if not {"mu", "sigma"} <= set(archive.files):
            return None
        if ("mu_s" in archive.files) != ("sigma_s" in archive.files):
            raise UserError(f"reference file ({path}) holds only one of mu_s and sigma_s: {archive.files}")
        read = {name: archive[name] for name in archive.files if not name.startswith("arr_")}
    ours = "sha256" in read
    if ours:
        stored = str(read.pop("sha256"))
        if _digest(read) != stored:
            raise UserError(f"reference file ({path}): the hash of its content ({_digest(read)}) is not the stored one "
                            f"({stored})")
        if str(read["extractor"]) != extractor.sha256:
            raise UserError(f"reference file ({path}) was measured with extractor {read['extractor']}, this run uses "
                            f"{extractor.name} {extractor.sha256}")
    pool, spatial = (Gaussian(read[mean].astype(np.float64), read[covariance].astype(np.float64)) if mean in read else None
                     for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s")))
    return Reference(str(path), stored if ours else sha256(path), int(read["count"]) if ours else None, pool, spatial,
                     read.get("features") if ours else None, extractor.sha256 if ours else None)


def _holds_images(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return "arr_0.npy" in archive.namelist()


def _arrays(reference: Reference) -> dict[str, np.ndarray]:
    arrays = {"mu": reference.pool.mean, "sigma": reference.pool.covariance}
    if reference.spatial is not None:
        arrays |= {"mu_s": reference.spatial.mean, "sigma_s": reference.spatial.covariance}
    if reference.features is not None:
        arrays["features"] = reference.features
    if reference.count is not None:
        arrays["count"] = np.array(reference.count)
    return arrays | {"extractor": np.array(reference.extractor or ""), "source": np.array(reference.source)}


def _digest(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}\n".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


def _gather_rows(rows: np.ndarray, world: Group, device: torch.device) -> np.ndarray:
    """All ranks' rows [n_r, d] in rank order; ranks may hold different numbers of them."""
    counts = gather_stack(torch.tensor([len(rows)], device=device), world).flatten().tolist()
    padded = np.zeros((max(counts), rows.shape[1]), rows.dtype)
    padded[: len(rows)] = rows
    stacked = gather_stack(torch.from_numpy(padded).to(device), world).cpu().numpy()
    return np.concatenate([part[:count] for part, count in zip(stacked, counts)])
