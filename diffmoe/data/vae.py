"""The autoencoder between images and latents: a diffusers `AutoencoderKL`, as encoding and
evaluation use it, or in evaluation any decoder as a TorchScript file.

A latent is model-ready as x = (z - shift) * scale, z drawn from the encoder's normal distribution.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffmoe.data.values import Numbers, by_channel
from diffmoe.errors import UserError
from diffmoe.files import sha256
from diffmoe.paths import check_hub_id

# Latents that are decoded at once: 16 images of 256 x 256.  SD-VAE's last block holds three fp32
# tensors of 128 or 256 channels at the image's size, 3 GB of these.
_AT_ONCE = 16 * 32 * 32


@dataclass(frozen=True)
class Vae:
    """An `AutoencoderKL` with what its configuration says. `name` is what `load_vae` was given;
    `factor` pixels a latent. A decoder alone says nothing: `latent_channels` and `factor` are 0.

    `sha256` is of the weights as fp32 tensors, whatever file they came from.
    """

    model: Any  # diffusers' bases have no types
    name: str
    sha256: str
    channels: int
    latent_channels: int
    factor: int
    scale: float
    shift: float

    @property
    def device(self) -> torch.device:
        return self.model.device


def load_vae(
    path: str | Path,
    *,
    device: torch.device = torch.device("cpu"),
    dtype: torch.dtype = torch.float32,
) -> Vae:
    """Load an `AutoencoderKL` from a folder (its own, or a pipeline's with `vae/`) or from the hub
    by `owner/name`; or a decoder from a TorchScript file, which runs in fp32.

    Only safetensors are read, never pickles. A folder is never looked up on the hub.

    Raises:
        UserError: no such folder or hub id, another kind of model, weights that do not fit or are
            not finite, or latents normalised by channel in its configuration, which is not read.
    """
    name, folder = str(path), Path(path)
    if folder.is_file():
        decoder = _ScriptedDecoder(folder, device)
        return Vae(decoder, name, sha256(folder), 3, 0, 0, scale=1.0, shift=0.0)
    local = folder.is_dir()
    if not local:
        check_hub_id(name, "vae")
    if local and not (folder / "config.json").is_file():
        folder = folder / "vae"
        if not (folder / "config.json").is_file():
            raise UserError(f"vae ({name}) has no config.json, nor vae/config.json")
    from diffusers import AutoencoderKL  # seconds, and needless for pixels

    try:
        model, info = AutoencoderKL.from_pretrained(
            str(folder) if local else name,
            local_files_only=local,
            use_safetensors=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"vae ({name}) cannot be loaded: {reason}") from error
    # diffusers only warns of these, and goes on with random numbers.
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := info.get(what):
            raise UserError(
                f"vae ({name}) does not fit AutoencoderKL: {what.replace('_', ' ')} {keys[0]} "
                f"({len(keys)} in all)"
            )
    if model.config.latents_mean is not None or model.config.latents_std is not None:
        raise UserError(
            f"vae ({name}) normalises latents by channel (latents_mean): take that out of its "
            "config.json, and encode with --normalize channels"
        )
    # torch's own `to`: diffusers' would log a warning about modules to keep in fp32, of which
    # AutoencoderKL has none.
    model = torch.nn.Module.to(model, torch.float32).requires_grad_(False).eval()
    digest = _weights_sha256(model, name)
    config = model.config
    return Vae(
        torch.nn.Module.to(model, device, dtype),
        name,
        digest,
        config.in_channels,
        config.latent_channels,
        2 ** (len(config.block_out_channels) - 1),
        float(config.scaling_factor),
        float(config.shift_factor or 0.0),
    )


class _ScriptedDecoder:
    """A TorchScript file as far as `decode_latents` knows an `AutoencoderKL`."""

    dtype = torch.float32

    def __init__(self, path: Path, device: torch.device) -> None:
        self.path, self.device = path, device
        try:
            self.module = torch.jit.load(str(path), map_location=device).eval()
        except RuntimeError as error:
            said = str(error).splitlines()[0]
            raise UserError(f"vae ({path}) is not a TorchScript file: {said}") from None

    def to(self, device: torch.device) -> None:
        self.device = torch.device(device)
        self.module.to(device)

    def decode(self, z: Tensor) -> SimpleNamespace:
        try:
            x = self.module(z)
        except RuntimeError as error:
            said = str(error).strip().splitlines()[-1]
            raise UserError(
                f"vae ({self.path}) fails on latents {tuple(z.shape)}: {said}"
            ) from None
        if not isinstance(x, Tensor) or x.dim() != 4 or x.shape[:2] != (len(z), 3):
            shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise UserError(
                f"vae ({self.path}) must return images [{len(z)}, 3, H, W], not {shape}"
            )
        return SimpleNamespace(sample=x)

    def save_pretrained(self, folder: Path) -> None:
        raise UserError(
            f"vae ({self.path}) is a program, which no folder of a model holds: leave it"
        )


def _weights_sha256(model: torch.nn.Module, name: str) -> str:
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        if not torch.isfinite(tensor).all():
            raise UserError(f"vae ({name}): weights {key} hold values that are not finite")
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


@torch.inference_mode()
def encode_moments(vae: Vae, images: Tensor) -> Tensor:
    """Mean and standard deviation of each image's latents, fp32 on the VAE's device.

    Args:
        images: uint8 [B, C, H, W] on any device.

    Returns:
        [B, 2L, H / factor, W / factor]: L channels of means, then L of standard deviations.
    """
    x = images.to(vae.device).float() / 127.5 - 1
    latent = vae.model.encode(x.to(vae.model.dtype)).latent_dist
    # From the log-variance, in fp32: the distribution's own `std` has the model's precision.
    return torch.cat([latent.mean.float(), torch.exp(0.5 * latent.logvar.float())], dim=1)


@torch.inference_mode()
def decode_latents(vae: Vae, z: Tensor, scale: Numbers, shift: Numbers) -> Tensor:
    """Images of latents as the model samples them, a few at a time, whatever batch they come in.

    Args:
        z: [B, L, h, w] on any device, (latent - shift) * scale.
        scale, shift: those of the training data (`meta.scale` and `meta.mean` of its index).

    Returns:
        uint8 [B, C, h * factor, w * factor] on the CPU, rounded to the nearest of 256 levels.

    Raises:
        UserError: channels that are not the VAE's, or not as many as scale or shift, which cannot
            be undone, or values that are not finite.
    """
    if z.dim() != 4 or vae.latent_channels not in (0, z.shape[1]):
        raise UserError(
            f"latents {tuple(z.shape)} must be [B, {vae.latent_channels}, h, w] for vae {vae.name}"
        )
    if not (np.isfinite(np.append(scale, shift)).all() and np.all(scale)):
        raise UserError(f"scale ({scale}) and shift ({shift}) must be finite, scale not 0")
    factor, addend = (
        torch.from_numpy(by_channel(n, z.shape[1])).to(vae.device) if isinstance(n, tuple) else n
        for n in (scale, shift)
    )
    images, bad = [], 0
    for part in z.split(max(1, _AT_ONCE // (z.shape[2] * z.shape[3]))):
        latents = part.to(vae.device).float() / factor + addend
        x = vae.model.decode(latents.to(vae.model.dtype)).sample.float()
        bad += int((~torch.isfinite(x)).flatten(1).any(dim=1).sum()) if len(x) else 0
        images.append((127.5 * x + 128.0).clamp(0, 255).to(torch.uint8).cpu())
    if bad:
        raise UserError(f"{bad} of {len(z)} decoded images hold values that are not finite")
    return torch.cat(images)
