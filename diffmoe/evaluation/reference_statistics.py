"""What samples are compared with: Gaussians of the real images' features, and some of the features
themselves.

A reference comes from ADM's npz, from one that was saved here, or is measured from images. ADM's
files hold statistics of the whole data set next to 10,000 images for precision and recall; both are
used.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from diffmoe.errors import UserError
from diffmoe.evaluation.features import Extractor, Features
from diffmoe.evaluation.image_sources import UNREADABLE, ImageSource, names_in, open_images
from diffmoe.evaluation.scores import NEIGHBOURS, Gaussian, Tally, covariance_root
from diffmoe.files import replacing, sha256
from diffmoe.parallel.collectives import agreed, gather_stack
from diffmoe.parallel.groups import Group
from diffmoe.progress import shown

NEIGHBOUR_FEATURES = 10_000  # real images in precision and recall, as in ADM's reference batches


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

    def check_widths(self, widths: dict[str, int]) -> None:
        """UserError where another network than one of these widths measured it."""
        for name, there in (("pool", self.pool), ("spatial", self.spatial)):
            if there is not None and len(there.mean) != widths.get(name, len(there.mean)):
                raise UserError(
                    f"reference {self.source}: its {name} features have width {len(there.mean)}, "
                    f"those of the extractor {widths[name]}: it was measured with another"
                )
        if self.features is not None and self.features.shape[1:] != (widths["pool"],):
            raise UserError(
                f"reference {self.source}: features {self.features.shape} must be "
                f"[n, {widths['pool']}]"
            )


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

    `path`: an npz (ADM's or `save_reference`'s), a folder of images of one size, a folder of pixel
    shards, or a .npy of images. `size`: (height, width) of the images that will be compared with
    it, where that is known. `batch` images pass the extractor at once.

    Raises:
        UserError: on every rank: nothing that is a reference, statistics that are not a Gaussian's
            or another extractor's, images of another size, corrupt images, too few.
    """
    path = Path(path)
    source = None
    with agreed(world):
        stored, holds_images = _read_statistics(path) if path.is_file() else (None, True)
        if stored is None or (stored.features is None and holds_images):
            source = open_images(path)
    if source is not None:
        source.check(world)
    with agreed(world):
        _check(path, stored, source, extractor, size)
    for left in source.left_out if source is not None and world.index == 0 else ():
        print(f"reference {path}: left out, {left}", flush=True)
    if source is None:
        assert stored is not None
        return stored
    return measure_reference(
        source, extractor, world, device, stored, batch=batch, progress=progress
    )


def _check(
    path: Path,
    stored: Reference | None,
    source: ImageSource | None,
    extractor: Extractor,
    size: tuple[int, int] | None,
) -> None:
    """Before an image is measured: UserError, naming the file, for what cannot be compared."""
    own = source.size if source is not None else stored.size if stored is not None else None
    if own is not None and size is not None and own != size:
        raise UserError(
            f"reference {path}: its images are {own[1]} x {own[0]}, the samples {size[1]} x "
            f"{size[0]}; it must be of the samples' size"
        )
    if stored is not None and stored.extractor not in (None, extractor.sha256):
        raise UserError(
            f"reference file ({path}) was measured with extractor {stored.extractor}, this run "
            f"uses {extractor.name} {extractor.sha256}"
        )
    if stored is not None and source is not None and source.count <= NEIGHBOURS:
        raise UserError(
            f"reference {path}: arr_0 holds {source.count} images; precision and recall need more "
            f"than {NEIGHBOURS}"
        )
    size = own or size
    if size is None:
        return
    widths = extractor.widths(*size)
    if stored is not None:
        stored.check_widths(widths)
    elif source is not None:
        check_enough(f"reference {path}: its images ({source.count})", source.count, widths)


def check_enough(what: str, count: int, widths: dict[str, int]) -> None:
    """UserError for fewer images than have a covariance of these widths."""
    for name in ("pool", "spatial"):
        if count < widths.get(name, 0) + 1:
            raise UserError(
                f"{what} must be at least the {name} features' width + 1 ({widths[name] + 1}), or "
                "they have no covariance"
            )


def measure_reference(
    source: ImageSource,
    extractor: Extractor,
    world: Group,
    device: torch.device,
    stored: Reference | None = None,
    *,
    batch: int = 64,
    progress: bool = False,
) -> Reference:
    """Features of all of a source's images, an equal run of them on each rank; the same reference
    on every rank. Precision and recall get every k-th image, at most `NEIGHBOUR_FEATURES`; where
    there is a `stored` reference, they are what it lacks. UserError on every rank: an image that
    cannot be read, or fewer images than feature width + 1.
    """
    each = -(-source.count // world.size)
    mine = range(min(source.count, world.index * each), min(source.count, (world.index + 1) * each))
    stride = -(-source.count // NEIGHBOUR_FEATURES)
    tally = Tally(source.count, 1)
    kept: list[np.ndarray] = []
    hashes: list[bytes] = []
    with agreed(world):
        # A rank without a share looks at one image and keeps nothing: it must know the widths.
        for start in shown(mine[::batch] or range(1), f"reference, batches of {batch}", progress):
            images = source.read(start, min(start + batch, mine.stop) if mine else 1)
            rows = range(start, start + len(images)) if mine else range(0)
            found = extractor(images)
            tally.add(Features(found.pool, found.spatial), rows)
            kept.append(found.pool[: len(rows)][-start % stride :: stride])
            hashes += [hashlib.sha256(image.numpy()).digest() for image in images[: len(rows)]]
    tally.add_ranks(world, device)
    digests = np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 32)
    every_digest = _gather_rows(digests, world, device)
    if stored is None:
        assert tally.pool is not None
        spatial = None if tally.spatial is None else tally.spatial.gaussian()
        digest = hashlib.sha256(every_digest.tobytes()).hexdigest()
        stored = Reference(source.name, digest, source.count, tally.pool.gaussian(), spatial)
    features = _gather_rows(np.concatenate(kept), world, device)
    return replace(stored, features=features, extractor=extractor.sha256, size=source.size)


def _gather_rows(rows: np.ndarray, world: Group, device: torch.device) -> np.ndarray:
    """All ranks' rows [n_r, d] in rank order; ranks may hold different numbers of them."""
    counts = gather_stack(torch.tensor([len(rows)], device=device), world).flatten().tolist()
    padded = np.zeros((max(counts), rows.shape[1]), rows.dtype)
    padded[: len(rows)] = rows
    stacked = gather_stack(torch.from_numpy(padded).to(device), world).cpu().numpy()
    return np.concatenate([part[:count] for part, count in zip(stacked, counts)])


def save_reference(reference: Reference, path: str | Path) -> None:
    """As npz, under ADM's names (`mu`, `sigma`, `mu_s`, `sigma_s`), with a hash of its content."""
    named = {
        "mu": reference.pool.mean,
        "sigma": reference.pool.covariance,
        "mu_s": reference.spatial and reference.spatial.mean,
        "sigma_s": reference.spatial and reference.spatial.covariance,
        "features": reference.features,
        "count": reference.count,
        "size": reference.size,
        "extractor": reference.extractor or "",
        "source": reference.source,
    }
    arrays = {name: np.asarray(value) for name, value in named.items() if value is not None}
    with replacing(Path(path)) as stream:
        np.savez(stream, allow_pickle=False, **arrays, sha256=np.array(_digest(arrays)))


def _digest(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}\n".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


def _read_statistics(path: Path) -> tuple[Reference | None, bool]:
    """What an npz of statistics says (None where there are no statistics); whether the file holds
    images. UserError: no array file, or statistics that are not a Gaussian's.
    """
    names = names_in(path)
    if names is None or not {"mu", "sigma"} <= set(names):
        return None, True
    what = f"reference file ({path})"
    if ("mu_s" in names) != ("sigma_s" in names):
        raise UserError(f"{what} holds only one of mu_s and sigma_s: {names}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            read = {name: archive[name] for name in names if not name.startswith("arr_")}
    except UNREADABLE as error:
        raise UserError(f"{what} cannot be read: {error}") from None
    pool = _gaussian(what, read, "mu", "sigma")
    spatial = _gaussian(what, read, "mu_s", "sigma_s") if "mu_s" in names else None
    if "sha256" not in read:
        return Reference(str(path), sha256(path), None, pool, spatial), "arr_0" in names
    stored = str(read.pop("sha256"))
    if _digest(read) != stored:
        raise UserError(
            f"{what}: the hash of its content ({_digest(read)}) is not the stored one ({stored})"
        )
    features = read.get("features")
    if features is not None and (
        features.ndim != 2 or len(features) <= NEIGHBOURS or not np.isfinite(features).all()
    ):
        raise UserError(
            f"{what}: features {features.shape} must be more than {NEIGHBOURS} rows [n, d] of "
            "finite values"
        )
    count = int(read["count"]) if "count" in read else None
    if count is not None and count <= len(pool.mean):
        raise UserError(
            f"{what}: {count} images give no covariance of {len(pool.mean)} features; it takes at "
            f"least {len(pool.mean) + 1}"
        )
    size = None
    if "size" in read:
        size = int(read["size"][0]), int(read["size"][1])
    extractor = str(read["extractor"]) or None
    reference = Reference(
        str(path), stored, count, pool, spatial, features, extractor=extractor, size=size
    )
    return reference, "arr_0" in names


def _gaussian(what: str, read: dict[str, np.ndarray], mean: str, covariance: str) -> Gaussian:
    """UserError, naming the file, for what is not a mean and covariance of finite numbers."""
    for name in (mean, covariance):
        if read[name].dtype.kind not in "fiu":
            raise UserError(f"{what}: {name} ({read[name].dtype}) must be numbers")
    gaussian = Gaussian(read[mean].astype(np.float64), read[covariance].astype(np.float64))
    covariance_root(gaussian, f"{what}, {mean} and {covariance}:")
    if not gaussian.covariance.any():
        raise UserError(f"{what}: {covariance} is all zeros, as of one image")
    return gaussian
