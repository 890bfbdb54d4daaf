"""What samples are compared with: Gaussians of the real images' features, and some of the features
themselves.

A reference comes from ADM's npz, from one that was saved here, or is measured from images: a folder
of pictures, pixel shards, or an npz with `arr_0`. ADM's files hold statistics of the whole data set
next to 10,000 images for precision and recall; both are used.
"""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffmoe.data.image_source import EXTENSIONS, LeftOut
from diffmoe.data.images import BadImage, decode_picture, picture_size
from diffmoe.data.listing import list_pictures
from diffmoe.data.reader import ShardReader
from diffmoe.data.shards import INDEX_NAME, load_index
from diffmoe.errors import UserError
from diffmoe.evaluation.features import Extractor, to_uint8
from diffmoe.evaluation.image_arrays import names_in, open_array
from diffmoe.evaluation.scores import (
    NEIGHBOURS,
    Moments,
    covariance_root,
    merge,
    merge_over,
    moments_of,
)
from diffmoe.files import replacing, sha256
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

    `sha256` is of ADM's file, of the numbers in a saved one, or of the images that were measured;
    `count` is the images behind the Gaussians and `size` their (height, width), None where a file
    does not say. `features` [n, d] are for precision and recall (None: not known). `extractor` is
    the SHA-256 of the network that measured (None where a file does not say).
    """

    source: str
    sha256: str
    count: int | None
    pool: Gaussian
    spatial: Gaussian | None = None
    features: np.ndarray | None = None
    extractor: str | None = None
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class ImageSource:
    """`count` images of `size` (height, width); `read(start, stop)` gives some of them, uint8 [n,
    3, H, W]. `files`: where they are; `pictures`: whether that is one each. `left_out`: files of
    the folder that are none.
    """

    name: str
    count: int
    size: tuple[int, int]
    read: Callable[[int, int], Tensor]
    files: tuple[Path, ...] = ()
    pictures: bool = False
    left_out: tuple[LeftOut, ...] = ()

    def check(self, world: Group) -> None:
        """Whether pictures are of one size, by their headers; all ranks together, each an equal
        share of them.

        Raises:
            AgreedError: one is of another size, or cannot be read.
        """
        problem: Exception | None = None
        try:
            for path in self.files[world.index :: world.size] if self.pictures else ():
                _check_size(path, picture_size(path), self.files[0], self.size)
        except BadImage as error:
            problem = UserError(f"picture {path} cannot be read: {error}")
        except UserError as error:
            problem = error
        raise_together(problem, world)


def load_reference(
    path: str | Path,
    extractor: Extractor,
    world: Group,
    device: torch.device,
    *,
    size: tuple[int, int] | None = None,
    batch: int = 64,
    progress: bool = False,
) -> Reference:
    """The reference behind a path, measured by all ranks together where it is images; all that can
    be known of it is judged before.

    Args:
        path: an npz (ADM's or `save_reference`'s), a folder of pictures of one size, a folder of
            pixel shards, or a .npy of images.
        size: (height, width) of the images that will be compared with it, where that is known.
        batch: images that pass the extractor at once.

    Raises:
        UserError: on every rank: nothing that is a reference, statistics that are no Gaussian's or
            another extractor's, images of another size, damaged images, too few.
    """
    stored: Reference | None = None
    source: ImageSource | None = None
    problem: Exception | None = None
    try:
        path = Path(path)
        holds_images = True
        if path.is_file():
            stored, holds_images = _read_statistics(path)
        if stored is None or (stored.features is None and holds_images):
            source = open_images(path)
    except (OSError, UserError) as error:
        problem = error
    raise_together(problem, world)
    if source is not None:
        source.check(world)
    try:
        _judge(path, stored, source, extractor, size)
    except UserError as error:
        problem = error
    raise_together(problem, world)
    for left in source.left_out if source is not None and world.index == 0 else ():
        print(f"reference {path}: left out, {left}", flush=True)
    if stored is None:
        return measure_reference(source, extractor, world, device, batch=batch, progress=progress)
    if source is None:
        return stored
    measured = _measure(source, extractor, world, device, batch, progress)
    return replace(stored, features=measured.features, extractor=extractor.sha256, size=source.size)


def _judge(
    path: Path,
    stored: Reference | None,
    source: ImageSource | None,
    extractor: Extractor,
    size: tuple[int, int] | None,
) -> None:
    """What is known before an image is measured. UserError, naming the file, for what could not be
    compared with the samples.
    """
    own = source.size if source is not None else stored.size
    if None not in (own, size) and own != size:
        raise UserError(
            f"reference {path}: its images are {own[1]} x {own[0]}, the samples {size[1]} x {size[0]}; it "
            "must be of the samples' size"
        )
    if stored is not None and stored.extractor not in (None, extractor.sha256):
        raise UserError(
            f"reference file ({path}) was measured with extractor {stored.extractor}, this run uses "
            f"{extractor.name} {extractor.sha256}"
        )
    if stored is not None and source is not None and source.count <= NEIGHBOURS:
        raise UserError(
            f"reference {path}: arr_0 holds {source.count} images; precision and recall need more than "
            f"{NEIGHBOURS}"
        )
    if own is None and size is None:
        return
    widths = extractor.widths(*(own or size))
    if stored is None:
        for name in ("pool", "spatial"):
            if source.count < widths.get(name, 0) + 1:
                raise UserError(
                    f"reference {path}: its images ({source.count}) must be at least the {name} features' "
                    f"width + 1 ({widths[name] + 1}), or they have no covariance"
                )
        return
    for name, there in (("pool", stored.pool), ("spatial", stored.spatial)):
        if there is not None and len(there.mean) != widths.get(name, len(there.mean)):
            raise UserError(
                f"reference {path}: its {name} features have width {len(there.mean)}, those of extractor "
                f"{extractor.name} {widths[name]}: it was measured with another"
            )
    if stored.features is not None and stored.features.shape[1:] != (widths["pool"],):
        raise UserError(
            f"reference {path}: features {stored.features.shape} must be [n, {widths['pool']}]"
        )


def measure_reference(
    source: ImageSource,
    extractor: Extractor,
    world: Group,
    device: torch.device,
    *,
    batch: int = 64,
    progress: bool = False,
) -> Reference:
    """Features of all of a source's images, an equal run of them on each rank; the same reference
    on every rank.

    Precision and recall get every k-th image, at most `NEIGHBOUR_FEATURES`.

    Raises:
        UserError: on every rank: an image that cannot be read, or fewer images than feature width +
            1.
    """
    measured = _measure(source, extractor, world, device, batch, progress)
    pool, *spatial = (Gaussian(moments.mean, moments.covariance()) for moments in measured.moments)
    return Reference(
        source.name,
        measured.sha256,
        source.count,
        pool,
        spatial[0] if spatial else None,
        measured.features,
        extractor.sha256,
        source.size,
    )


@dataclass(frozen=True)
class _Measured:
    """Moments of pool (and spatial) features, features [n, d] of every k-th image, SHA-256 of all
    images' SHA-256s.
    """

    moments: tuple[Moments, ...]
    features: np.ndarray
    sha256: str


def _measure(
    source: ImageSource,
    extractor: Extractor,
    world: Group,
    device: torch.device,
    batch: int,
    progress: bool,
) -> _Measured:
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
            parts = [
                moments_of(value[rows])
                for value in (features.pool, features.spatial)
                if value is not None
            ]
            moments = (
                [merge(*pair) for pair in zip(moments, parts, strict=True)] if moments else parts
            )
            kept.append(features.pool[rows][-start % stride :: stride])
            hashes += [hashlib.sha256(image.numpy().tobytes()).digest() for image in images[rows]]
    except (OSError, UserError) as error:
        problem = error
    raise_together(problem, world)
    digests = np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 32)
    return _Measured(
        tuple(merge_over(part, world, device) for part in moments),
        _gather_rows(np.concatenate(kept), world, device),
        hashlib.sha256(_gather_rows(digests, world, device).tobytes()).hexdigest(),
    )


def save_reference(reference: Reference, path: str | Path) -> None:
    """Write a reference as npz, under ADM's names (`mu`, `sigma`, `mu_s`, `sigma_s`) and with a
    hash of its content.
    """
    arrays = _arrays(reference)
    with replacing(Path(path)) as stream:
        np.savez(stream, **arrays, sha256=np.array(_digest(arrays)))


def open_images(path: str | Path) -> ImageSource:
    """The images of a folder of pictures (all below it, by name), of pixel shards, of an npz's
    `arr_0` or of a .npy [N, H, W, 3].

    Raises:
        UserError: no images there, some that cannot be taken (see `listing.py`), moments instead of
            pixels, or an array of another kind.
    """
    path = Path(path)
    if path.is_file():
        shape, read_rows = open_array(path)
        return ImageSource(
            str(path),
            shape[0],
            shape[1:3],
            lambda start, stop: channels_first(read_rows(start, stop)),
            (path,),
        )
    if (path / INDEX_NAME).is_file():
        return _open_shards(path)
    if not path.is_dir():
        raise UserError(f"{path} does not exist: no images, no statistics")
    names, left_out = list_pictures(path)
    if not names:
        raise UserError(
            f"folder {path} holds neither {INDEX_NAME} nor pictures (.{', .'.join(EXTENSIONS)})"
        )
    if lost := [str(left) for left in left_out if left.bad]:
        raise UserError(
            f"folder {path} holds more than can be read, and statistics of the rest would be another data "
            f"set's: {'; '.join(lost)}; remove or convert them"
        )
    pictures = [path / name for name in names]
    try:
        size = picture_size(pictures[0])
    except BadImage as error:
        raise UserError(f"picture {pictures[0]} cannot be read: {error}") from None

    def read(start: int, stop: int) -> Tensor:
        images = [_read_picture(p) for p in pictures[start:stop]]
        for picture, image in zip(pictures[start:stop], images):
            _check_size(picture, image.shape[:2], pictures[0], size)
        return channels_first(np.stack(images))

    return ImageSource(str(path), len(pictures), size, read, tuple(pictures), True, left_out)


def _check_size(
    path: Path, size: tuple[int, int], first: Path, first_size: tuple[int, int]
) -> None:
    if size != first_size:
        raise UserError(
            f"picture {path} is {size[1]} x {size[0]}, {first.name} is {first_size[1]} x {first_size[0]}: "
            "crop and resize them beforehand"
        )


def _read_picture(path: Path) -> np.ndarray:
    try:
        return np.asarray(decode_picture(path.read_bytes(), channels=3))
    except (BadImage, OSError) as error:
        raise UserError(f"picture {path} cannot be read: {error}") from None


def _open_shards(path: Path) -> ImageSource:
    index = load_index(path)
    if index.meta.kind != "pixels":
        raise UserError(
            f"shards {path} hold {index.meta.kind}, not pixels: latents have no Inception features"
        )
    if index.shape[0] not in (1, 3):
        raise UserError(f"shards {path} hold arrays {index.shape}; images must be [1 or 3, H, W]")
    reader = ShardReader(index, seed=0)  # one epoch in any order is every image once
    return ImageSource(
        str(path),
        index.count,
        tuple(index.shape[1:]),
        lambda start, stop: to_uint8(torch.from_numpy(reader.read(range(start, stop))[0])),
        (path / INDEX_NAME,),
    )


def channels_first(images: np.ndarray) -> Tensor:
    """[n, H, W, 3] as [n, 3, H, W]."""
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def _read_statistics(path: Path) -> tuple[Reference | None, bool]:
    """What an npz of statistics says, judged (None where there are no statistics); whether the file
    holds images.

    UserError: no array file, or statistics that are no Gaussian's."""
    names = names_in(path)
    if names is None or not {"mu", "sigma"} <= set(names):
        return None, True
    if ("mu_s" in names) != ("sigma_s" in names):
        raise UserError(f"reference file ({path}) holds only one of mu_s and sigma_s: {names}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            read = {name: archive[name] for name in names if not name.startswith("arr_")}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"reference file ({path}) cannot be read: {error}") from None
    ours = "sha256" in read
    if ours:
        stored = str(read.pop("sha256"))
        if _digest(read) != stored:
            raise UserError(
                f"reference file ({path}): the hash of its content ({_digest(read)}) is not the stored one "
                f"({stored})"
            )
    pool = _gaussian(path, read, "mu", "sigma")
    spatial = _gaussian(path, read, "mu_s", "sigma_s") if "mu_s" in read else None
    features = read.get("features") if ours else None
    if features is not None and (
        features.ndim != 2 or len(features) <= NEIGHBOURS or not np.isfinite(features).all()
    ):
        raise UserError(
            f"reference file ({path}): features {features.shape} must be more than {NEIGHBOURS} rows [n, "
            "d] of finite values"
        )
    count = int(read["count"]) if ours and "count" in read else None
    extractor = str(read["extractor"]) or None if ours and "extractor" in read else None
    if count is not None and count <= len(pool.mean):
        raise UserError(
            f"reference file ({path}): {count} images give no covariance of {len(pool.mean)} features; it "
            f"takes at least {len(pool.mean) + 1}"
        )
    size = tuple(map(int, read["size"])) if ours and "size" in read else None
    reference = Reference(
        str(path), stored if ours else sha256(path), count, pool, spatial, features, extractor, size
    )
    return reference, "arr_0" in names


def _gaussian(path: Path, read: dict[str, np.ndarray], mean: str, covariance: str) -> Gaussian:
    """UserError, naming the file, for what is no mean and covariance of finite numbers."""
    for name in (mean, covariance):
        if read[name].dtype.kind not in "fiu":
            raise UserError(f"reference file ({path}): {name} ({read[name].dtype}) must be numbers")
    gaussian = Gaussian(read[mean].astype(np.float64), read[covariance].astype(np.float64))
    covariance_root(
        gaussian.mean, gaussian.covariance, f"reference file ({path}), {mean} and {covariance}:"
    )
    if not gaussian.covariance.any():
        raise UserError(f"reference file ({path}): {covariance} is all zeros, as of one image")
    return gaussian


def _arrays(reference: Reference) -> dict[str, np.ndarray]:
    arrays = {"mu": reference.pool.mean, "sigma": reference.pool.covariance}
    if reference.spatial is not None:
        arrays |= {"mu_s": reference.spatial.mean, "sigma_s": reference.spatial.covariance}
    if reference.features is not None:
        arrays["features"] = reference.features
    if reference.count is not None:
        arrays["count"] = np.array(reference.count)
    if reference.size is not None:
        arrays["size"] = np.array(reference.size)
    return arrays | {
        "extractor": np.array(reference.extractor or ""),
        "source": np.array(reference.source),
    }


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
