"""From what a latent model samples to images."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffmoe.config import Config
from diffmoe.data.shards import ShardIndex, load_index
from diffmoe.data.sources import is_remote, runs_a_program
from diffmoe.data.vae import Vae, decode_latents, load_vae
from diffmoe.data.values import Numbers, described
from diffmoe.errors import UserError


@dataclass(frozen=True)
class Decoder:
    """From latents to images: `function` takes what the model samples, fp32 [B, C, h, w], and
    returns uint8 [B, 3, H, W]. `scale` and `shift` are what it takes out of the latents first.
    """

    name: str
    sha256: str
    scale: Numbers
    shift: Numbers
    function: Callable[[Tensor], Tensor]


def checkpoint_data(
    config: Config,
    scale: Numbers | None = None,
    shift: Numbers | None = None,
    options: str = "",
) -> ShardIndex | None:
    """The index of the training data that a checkpoint's configuration names; None where it is not
    here (`vae_note` says so).  `options`: those of the caller that say scale and shift.

    A checkpoint may be anybody's: an address for which a program would be started is not opened.

    Raises:
        UserError: such an address, or an index that is here and cannot be read, unless `scale` and
            `shift` are both known without it.
    """
    name = "index" if config.data.index else "shards"
    address = getattr(config.data, name)
    known = scale is not None and shift is not None
    instead = f"; with {options} it is not needed" if options else ""
    if runs_a_program(address):
        if known:
            return None
        raise UserError(
            f"data.{name} ({address}) would start a program, which no checkpoint may{instead}"
        )
    folder = Path(address)
    if folder.suffix in (".tar", ".json"):
        folder = folder.parent
    if not address or not is_remote(address) and not folder.exists():
        return None  # sampling elsewhere than training
    try:
        return load_index(config.data.shards, config.data.index, check_files=False)
    except (OSError, UserError) as error:
        if known:
            return None
        raise UserError(
            "the training data's index, by which VAE and scale are checked, cannot be read: "
            f"{error}; restore it{instead}"
        ) from error


def data_latents(config: Config, options: str = "") -> tuple[Numbers, Numbers] | None:
    """Scale and shift of the training data, where they are latents and their index is here.
    UserError as `checkpoint_data`.
    """
    if config.model.channels in (1, 3) or runs_a_program(config.data.index or config.data.shards):
        return None
    index = checkpoint_data(config, options=options)
    return None if index is None else (index.meta.scale, index.meta.mean)


def data_class_names(config: Config) -> tuple[str, ...]:
    """The names of the training data's classes, where its index is here and has them."""
    with contextlib.suppress(UserError):  # data that are not whole yet, say
        if not is_remote(config.data.index or config.data.shards):
            index = checkpoint_data(config)
            if index and index.meta.classes == config.model.classes:
                return index.class_names
    return ()


def vae_note(config: Config, decoder: Decoder, index: ShardIndex | None) -> str | None:
    """A note where nothing shows that this VAE encoded the data of `index`; else None."""
    why = "is not here, or was not opened"
    if index is not None:
        if index.encoding is not None and index.encoding.vae_sha256:
            return None
        why = "does not say which VAE encoded it"
    return (
        f"note: the training data ({config.data.shards}) {why}: vae {decoder.name} is not compared "
        f"with it; latents have scale {described(decoder.scale)}, shift "
        f"{described(decoder.shift)}"
    )


def open_decoder(
    path: str,
    config: Config,
    index: ShardIndex | None,
    scale: Numbers | None,
    shift: Numbers | None,
    device: torch.device,
) -> Decoder:
    """The diffusers autoencoder, or TorchScript decoder, at `path` as decoder of the run's latents.

    Where `scale` and `shift` are None they are those of the training data whose `index` this is,
    else the VAE's own.

    Raises:
        UserError: a model of pixels, no such autoencoder, or another one than the training data was
            encoded with.
    """
    vae = open_vae(path, config, device)
    scale, shift = latent_numbers(vae, config, index, scale, shift)

    def decode(latents: Tensor) -> Tensor:
        return decode_latents(vae, latents, scale, shift).expand(-1, 3, -1, -1).contiguous()

    return Decoder(vae.name, vae.sha256, scale, shift, decode)


def open_vae(path: str | Path, config: Config, device: torch.device) -> Vae:
    """The diffusers autoencoder at `path`. UserError for a model of pixels or of other
    channels, or where there is no such autoencoder."""
    channels = config.model.channels
    if channels in (1, 3):
        raise UserError(
            f"model.channels ({channels}) are pixels: there is nothing for vae {path} to decode"
        )
    vae = load_vae(path, device=device)
    if vae.latent_channels not in (0, channels):
        raise UserError(
            f"vae {path} has {vae.latent_channels} latent channels, model.channels is {channels}"
        )
    return vae


def latent_numbers(
    vae: Vae, config: Config, index: ShardIndex | None, scale: Numbers | None, shift: Numbers | None
) -> tuple[Numbers, Numbers]:
    """(scale, shift): as given, else the data's, else the VAE's.  UserError for another VAE."""
    own: tuple[Numbers, Numbers] = (vae.scale, vae.shift)
    if index is not None:
        own = (index.meta.scale, index.meta.mean)
        if index.encoding is not None and index.encoding.vae_sha256 not in ("", vae.sha256):
            raise UserError(
                f"vae {vae.name} has weights {vae.sha256[:12]}; data.shards ({config.data.shards}) "
                f"was encoded with {index.encoding.vae_sha256[:12]}"
            )
    return own[0] if scale is None else scale, own[1] if shift is None else shift
