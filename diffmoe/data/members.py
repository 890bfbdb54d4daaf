"""Which members of a tar make a sample, and what their bytes are as arrays and labels."""

from __future__ import annotations

import io
import json
import re
import zipfile
import zlib
from dataclasses import dataclass

import numpy as np

from diffmoe.errors import UserError

LAYOUTS = ("chw", "hwc")
FEATURES = "features.npy"  # of the image as it is; only `encode` writes them
_PLACE = re.compile(r"[^/:.][^/:]*(:[^:]+)?")


@dataclass(frozen=True)
class Members:
    """Which members of a tar make a sample, and how they are read; the defaults are what this
    program writes.

    A place is the ending of a member's name after its first dot (`latent.npy` of `000.latent.npy`).
    For arrays it is an `.npy`, or `npz:NAME` with the name of an array in it; `npz:mean,std` lays
    several end to end along the channels. For labels it is a text, `json` or `json:KEY` (`KEY.KEY`
    for one inside another), or the one number of an array. A leading axis of length 1 (a batch of
    one) is dropped. `layout`: of the arrays, "chw" or "hwc". `first_class`: the label of class 0.
    """

    array: str = "npy"
    flip_array: str = "flip.npy"
    label: str = "cls"
    layout: str = "chw"
    first_class: int = 0

    def __post_init__(self) -> None:
        for name in ("array", "flip_array", "label"):
            place = getattr(self, name)
            kind, named = _format(place), ":" in place
            problem = ""
            if not _PLACE.fullmatch(place):
                problem = "must be the ending of a member's name, or ENDING:NAME"
            elif name != "label" and kind not in ("npy", "npz"):
                problem = "must end in npy or npz; .pt and .pth are pickles, which are not read"
            elif kind == "npz" and not named:
                problem = f"must name an array of the npz: {place}:NAME"
            elif named and kind not in ("npz", "json"):
                problem = ": only an npz or a json has something inside by name"
            if problem:
                raise UserError(f"{name} ({place!r}) {problem}")
        if self.layout not in LAYOUTS:
            raise UserError(f"layout ({self.layout!r}) must be one of {', '.join(LAYOUTS)}")

    @property
    def ours(self) -> bool:
        """Whether a table of rows in a shard speaks of these members."""
        own = Members(layout=self.layout, first_class=self.first_class)
        return self == own

    def arrays(self, flips: bool, features: bool = False) -> tuple[str, ...]:
        """The places of a sample's arrays, in a table's order."""
        images = (self.array, self.flip_array) if flips else (self.array,)
        return (*images, FEATURES) if features else images

    def channels_first(self, array: np.ndarray) -> np.ndarray:
        """A stored array as [C, H, W]; a view."""
        return array.transpose(2, 0, 1) if self.layout == "hwc" else array

    def class_of(self, payload: bytes, classes: int) -> int:
        """The class, from 0, of a label member's bytes. ValueError (of which UserError is one),
        EOFError or TypeError for others.
        """
        kind, path = _format(self.label), self.label.partition(":")[2]
        if kind == "json":
            label = _json_label(payload, path)
        elif kind in ("npy", "npz"):
            array = decode(payload, self.label)
            if array.size != 1 or array.dtype.kind not in "iu":
                raise UserError(f"label ({array.dtype} {array.shape}) must be one whole number")
            label = int(array.reshape(-1)[0])
        else:
            try:
                label = int(payload[:32].decode("ascii"))
            except ValueError:
                raise UserError(f"label ({payload[:32]!r}) must be a whole number") from None
        if not 0 <= label - self.first_class < classes:
            raise UserError(wrong_label(label, classes, self.first_class))
        return label - self.first_class


def wrong_label(label: int, classes: int, first_class: int) -> str:
    """The message for a stored label that is not one of the classes'."""
    hint = ""
    if (first_class, label) == (0, classes):
        hint = "; labels that begin with 1 take --first-class 1 when the index is written"
    span = f"[{first_class}, classes + {first_class})" if first_class else "[0, classes)"
    return f"label ({label}) must lie in {span} with classes {classes}{hint}"


def ending_of(place: str) -> str:
    """The ending of the member's name at this place."""
    return place.partition(":")[0]


def _format(place: str) -> str:
    return ending_of(place).rpartition(".")[2]


def _json_label(text: bytes, path: str) -> int:
    value = json.loads(text)
    for key in path.split(".") if path else ():
        if not isinstance(value, dict) or key not in value:
            there = ", ".join(list(value)[:8]) if isinstance(value, dict) else f"{value!r:.40}"
            raise UserError(f"no key {key!r} of label json:{path} here, but {there}")
        value = value[key]
    if type(value) is not int:
        raise UserError(f"label json{path and ':'}{path} ({value!r:.80}) must be a whole number")
    return value


def decode(payload: bytes, place: str, layout: str = "chw") -> np.ndarray:
    """The array at `place`, of its member's bytes. ValueError, EOFError, TypeError for others."""
    if _format(place) == "npy":
        parts = [_read_npy(payload)]
    else:
        parts = _npz_arrays(payload, place.partition(":")[2].split(","))
    parts = [part[0] if part.ndim == 4 and part.shape[0] == 1 else part for part in parts]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, -1 if layout == "hwc" else 0)


def _read_npy(payload: bytes) -> np.ndarray:
    return np.lib.format.read_array(io.BytesIO(payload), allow_pickle=False)


def _npz_arrays(payload: bytes, names: list[str]) -> list[np.ndarray]:
    try:
        with zipfile.ZipFile(io.BytesIO(payload)) as archive:
            there = [name.removesuffix(".npy") for name in archive.namelist()]
            for name in names:
                if name not in there:
                    held = ", ".join(there[:8])
                    raise UserError(f"no array {name!r} in the npz; it holds {held}")
            return [_read_npy(archive.read(f"{name}.npy")) for name in names]
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, KeyError) as error:
        raise UserError(f"not an npz that can be read: {error}") from error
