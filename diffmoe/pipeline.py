"""Images from a trained model in Python.  Names are those of diffusers where it has one."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from diffmoe.config import Config, check_guidance, config_from_tree, config_to_tree, validate
from diffmoe.data.vae import Vae, decode_latents
from diffmoe.data.values import Numbers, numbers_of
from diffmoe.device import DTYPES, fp32_precision
from diffmoe.diffusion.guidance import open_others
from diffmoe.errors import UserError
from diffmoe.evaluation.capacity_report import CapacityMeter, CapacityUsed
from diffmoe.evaluation.class_names import chosen_classes
from diffmoe.evaluation.decoding import (
    checkpoint_data,
    data_latents,
    latent_numbers,
    open_vae,
)
from diffmoe.evaluation.features import to_uint8
from diffmoe.evaluation.generate import generate, threshold_note
from diffmoe.huggingface import write_folder
from diffmoe.models.logical import logical_pieces, running_buffers
from diffmoe.models.pretrained import Pretrained, open_pretrained
from diffmoe.parallel.groups import single_process
from diffmoe.strict_yaml import merge

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class DiffMoEPipelineOutput:
    """What a call made: n images.

    ``images``: PIL, RGB.  ``arrays``: the same as uint8 [n, H, W, 3].  Both empty with
    ``output_type="latent"``. ``samples``: what the model sampled, fp32 [n, C, h, w] on the CPU:
    pixels in [-1, 1], or latents.  ``labels``: the class of each.  ``capacity``: experts that a
    token got, mean over images, steps and layers (None for a dense model); ``capacity_used``: the
    same by layer, time and class.
    """

    images: list[Image]
    arrays: np.ndarray
    samples: Tensor
    labels: list[int]
    capacity: float | None
    capacity_used: CapacityUsed | None


class DiffMoEPipeline:
    """A trained model with its configuration, the names of its classes and, for latents, a VAE.

    ``transformer``: the DiT with all its experts.  ``vae``: what decodes latents."""

    def __init__(self, pretrained: Pretrained, vae: Vae | None = None) -> None:
        self.transformer = pretrained.model().requires_grad_(False)
        self._pretrained = replace(pretrained, tensors={})  # the model has them
        self.vae = vae

    def __repr__(self) -> str:
        about, model = self._pretrained, self.config.model
        return (
            f"DiffMoEPipeline({about.source}, {model.family}, {about.weights} weights of step "
            f"{about.step}, {model.classes} classes, {self.dtype} on {self.device}, "
            f"vae {self.vae and self.vae.name})"
        )

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        weights: str | None = None,
        vae: str | Path | None = None,
        latents: tuple[Numbers, Numbers] | None = None,
        revision: str | None = None,
        torch_dtype: torch.dtype | None = None,
    ) -> DiffMoEPipeline:
        """The pipeline of an exported folder, a checkpoint's or run's folder (its newest
        checkpoint), or a repository of the hub (owner/name, at ``revision``); on the CPU, see
        :meth:`to` for ``torch_dtype`` (default: the run's ``sample.dtype``).

        ``weights``: ``raw``, ``ema`` or ``ema:0.999`` of a checkpoint (default: its first EMA).
        ``vae``: a diffusers AutoencoderKL, folder or hub id (default: the folder's own ``vae/``,
        where it has one).  ``latents``: their scale and shift (default: the folder's, the training
        data's where they are here, the VAE's own).  Raises UserError where there is nothing such,
        or the VAE is not the one that encoded the training data.
        """
        opened = open_pretrained(name, weights, revision)
        dtype = torch_dtype or DTYPES[opened.config.sample.dtype]
        if latents is not None:
            opened = replace(opened, latents=_two_numbers(latents))
        latent = opened.config.model.channels not in (1, 3)
        if vae is None and latent and (opened.source / "vae").is_dir():
            vae = str(opened.source / "vae")
        if vae is None:
            if opened.latents is None:  # for whoever gets what is saved
                opened = replace(opened, latents=data_latents(opened.config, "latents"))
            return cls(opened).to(dtype=dtype)
        autoencoder = open_vae(vae, opened.config, torch.device("cpu"))
        scale, shift = opened.latents or (None, None)
        index = checkpoint_data(opened.config, scale, shift, "latents")
        numbers = latent_numbers(autoencoder, opened.config, index, scale, shift)
        return cls(replace(opened, latents=numbers), autoencoder).to(dtype=dtype)

    @property
    def config(self) -> Config:
        """The configuration of the run; its ``sample`` section has the defaults of a call."""
        return self._pretrained.config

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes' names in order; none where the model does not know them."""
        return self._pretrained.class_names

    @property
    def latents(self) -> tuple[Numbers, Numbers] | None:
        """Scale and shift of latents (``x = (z - shift) * scale``), where they are known."""
        return self._pretrained.latents

    @property
    def device(self) -> torch.device:
        return self.transformer.final_layer.linear.bias.device

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.final_layer.linear.bias.dtype

    def to(
        self,
        device: str | torch.device | torch.dtype | None = None,
        dtype: torch.dtype | None = None,
    ) -> DiffMoEPipeline:
        """Moves model and VAE to a device; the model's weights become ``dtype``, fp32 or bf16,
        while thresholds and the VAE stay fp32.  A dtype may stand first, too.  Returns itself.
        UserError for another dtype.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        if dtype not in (None, torch.float32, torch.bfloat16):
            raise UserError(f"dtype ({dtype}) must be torch.float32 or torch.bfloat16")
        if device is not None:
            self.transformer.to(device)
            if self.vae is not None:
                self.vae.model.to(device)  # type: ignore[attr-defined]  # diffusers' stubs
        if dtype is not None:
            self.transformer.cast(dtype)
        return self

    def __call__(
        self,
        classes: None | int | str | Sequence[int | str] = None,
        num_images: int | None = None,
        *,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guide: str | None = None,
        guide_capacity: float | None = None,
        num_inference_steps: int | None = None,
        capacity: float | None = None,
        routing: str | None = None,
        sampler: str | None = None,
        generator_seed: int | None = None,
        batch_size: int | None = None,
        output_type: str = "pil",
    ) -> DiffMoEPipelineOutput:
        """Samples images.  What is left out is the run's own, see :attr:`config`.

        Args:
            classes: numbers, names, or both (default: all classes).
            num_images: in all, the classes in turn (default: one of each).
            guidance_scale: of guidance; 1 is none (``sample.cfg``).
            guidance_interval: the times, 0 noise to 1 data, at which there is any
                (``sample.cfg_interval``).
            guide: what it leads away from: ``null``, ``capacity`` (with ``guide_capacity``), or
                other weights, a folder or hub id (``sample.guide``).
            num_inference_steps: of the sampler (``sample.steps``).
            capacity: experts that a token gets on average, by thresholds from the predictors'
                histograms (``sample.capacity``; the learned thresholds where that is null, too).
            routing: ``token``, ``batch`` or ``static``, see ``moe.routing.RoutingRule``
                (``sample.routing``).
            sampler: ``euler``, ``heun``, ``dopri5`` of a flow, ``ancestral``, ``ddim`` of DDPM
                (``sample.sampler``).
            generator_seed: of the noise (``run.seed``).  Image i is the same in any batch, on any
                machine of a kind.
            batch_size: images at a time (``sample.batch``).
            output_type: ``pil``, or ``latent`` to leave latents undecoded.

        Raises:
            UserError: a value that the model does not allow, or latents without a VAE.
        """
        config = self._configured(
            generator_seed,
            cfg=guidance_scale,
            cfg_interval=guidance_interval,
            guide=guide,
            guide_capacity=guide_capacity,
            steps=num_inference_steps,
            capacity=capacity,
            routing=routing,
            sampler=sampler,
            batch=batch_size,
        )
        if num_images is not None and type(num_images) is not int:
            raise UserError(f"num_images ({num_images!r}) must be an integer")
        chosen = chosen_classes(classes, config.model.classes, self.class_names)
        count = len(chosen) if num_images is None else num_images
        if count < 1:
            raise UserError(f"num_images ({count}) must be at least 1")
        pixels = config.model.channels in (1, 3)
        if output_type not in ("pil", "latent"):
            raise UserError(f"output_type ({output_type}) must be pil or latent")
        if output_type == "pil" and not pixels and self.vae is None:
            raise UserError(
                f"latents of {config.model.channels} channels need a VAE: give vae=… to "
                'from_pretrained, or say output_type="latent"'
            )
        if (note := threshold_note(self.transformer, config.sample)) is not None:
            print(note, flush=True)
        labels = [chosen[i % len(chosen)] for i in range(count)]
        meter = None
        if config.model.family != "dense":
            meter = CapacityMeter(self.transformer, config, count, self.device)
        arrays = np.zeros((0, 0, 0, 3), np.uint8)
        place = lambda other: other.to(self.device).cast(self.dtype)
        with fp32_precision(config.run.fp32_precision):
            samples = generate(
                *(self.transformer, config, labels, range(count), self.device),
                meter=meter,
                others=open_others(config).each(place),
            )
            if output_type == "pil":
                arrays = self._decoded(samples, pixels, config.sample.batch)
        used = None if meter is None else meter.merged(single_process().world)
        from PIL import Image

        images = [Image.fromarray(array) for array in arrays]
        mean = None if used is None else used.mean()
        return DiffMoEPipelineOutput(images, arrays, samples, labels, mean, used)

    def _configured(self, seed: int | None, **sample: Any) -> Config:
        """The run's, with what is said of these fields.  UserError for what cannot be."""
        tree = {"sample": sample, "run": {"seed": seed}}
        for section, fields in tree.items():
            said = {name: value for name, value in fields.items() if value is not None}
            # numpy's and torch's numbers, and arrays of them, become Python's
            tree[section] = {n: v.tolist() if hasattr(v, "tolist") else v for n, v in said.items()}
        if sample["guide"] == "null":
            tree["sample"]["guide"] = None
        config = config_from_tree(merge(config_to_tree(self.config), tree))
        validate(config)
        check_guidance(config)
        return config

    def _decoded(self, samples: Tensor, pixels: bool, batch: int) -> np.ndarray:
        """uint8 [n, H, W, 3]"""
        if pixels:
            return to_uint8(samples).permute(0, 2, 3, 1).numpy()
        assert self.vae is not None and self.latents is not None
        parts = [decode_latents(self.vae, part, *self.latents) for part in samples.split(batch)]
        return torch.cat(parts).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the folder that ``export --format hf`` writes, weights in fp32, and the VAE beside
        them in ``vae/``: ``from_pretrained`` and ``import --hf`` read it.  UserError where
        ``folder`` exists.
        """
        out = Path(folder)
        if out.exists():
            raise UserError(f"{out} already exists")
        tensors = {
            **{name: piece.float().cpu() for name, piece in logical_pieces(self.transformer)},
            **{name: value.cpu() for name, value in running_buffers(self.transformer).items()},
        }
        write_folder(replace(self._pretrained, tensors=tensors), out, vae=self.vae)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        token: str | None = None,
        commit_message: str = "DiffMoE model",
    ) -> str:
        """Uploads what :meth:`save_pretrained` writes; makes the repository (owner/name) where
        there is none.  Returns the commit's address.  Raises what huggingface_hub raises, as
        without a token.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as scratch:
            self.save_pretrained(folder := Path(scratch) / "model")
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=commit_message
            )
        return str(commit)


def _two_numbers(latents: Any) -> tuple[Numbers, Numbers]:
    try:
        scale, shift = latents
        return numbers_of(scale), numbers_of(shift)
    except (TypeError, ValueError):
        raise UserError(f"latents ({latents!r}) must be two numbers, scale and shift") from None
