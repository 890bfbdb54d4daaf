"""Features of an image's patches, which training may align its tokens with (REPA, Yu et al. 2024):
from a TorchScript file, so that no network of anybody is part of this program.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffmoe.device import fp32_precision
from diffmoe.errors import UserError
from diffmoe.files import sha256


@dataclass(frozen=True)
class PatchNetwork:
    """A loaded network: `sha256` is the file's, `shape` [N, d] that of an image's features."""

    module: Any
    sha256: str
    device: torch.device
    shape: tuple[int, int]

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> np.ndarray:
        """Features, float16 [B, N, d], of uint8 images [B, 1 or 3, S, S]."""
        return _patches(self.module, images.to(self.device)).half().contiguous().cpu().numpy()


def load_patch_network(path: Path, channels: int, size: int, device: torch.device) -> PatchNetwork:
    """The network of a TorchScript file, `module(images)`: uint8 [B, 3, S, S] in 0..255 in (it
    resizes and normalises them itself), patches' features [B, N, d], row after row, or [B, d, h, w]
    out. Grey images come as three equal channels.

    UserError for no such file, no TorchScript, or another output of images of this size.
    """
    if not path.is_file():
        raise UserError(f"features ({path}) does not exist, and nothing is downloaded")
    torch.backends.cudnn.deterministic = True  # the same image gives the same bits every time
    try:
        module = torch.jit.load(str(path), map_location=device).eval()
        with torch.inference_mode():
            blank = torch.zeros(2, channels, size, size, dtype=torch.uint8, device=device)
            shape = _patches(module, blank).shape[1:]
    except RuntimeError as error:
        said = str(error).strip().splitlines()[-1]
        raise UserError(
            f"features ({path}) is no TorchScript for uint8 images [B, 3, {size}, {size}]: {said}"
        ) from None
    return PatchNetwork(module, sha256(path), device, (shape[0], shape[1]))


def _patches(module: Any, images: torch.Tensor) -> torch.Tensor:
    """[B, N, d]; an optimizing executor may change kernels between its first calls."""
    with fp32_precision(), torch.jit.optimized_execution(False):
        found = module(images.expand(-1, 3, -1, -1))
    if isinstance(found, torch.Tensor) and found.dim() == 4:
        found = found.flatten(2).mT
    if not isinstance(found, torch.Tensor) or found.dim() != 3 or len(found) != len(images):
        what = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise UserError(
            f"features of {len(images)} images ({what}) must be [{len(images)}, N, d] or "
            f"[{len(images)}, d, h, w]"
        )
    return found
