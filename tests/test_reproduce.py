"""The README's "Reproduce a published row", command by command, on toy images: encode, train,
score, sample.

The published configuration and the published commands; only sizes, counts and files are smaller.
Once with a process a rank, once with the launcher that the README names.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor, nn

from programs import run_program, start_launcher

pytestmark = pytest.mark.full  # its fixtures take their time

SMALL = (
    "model.input_size=8",
    "model.width=32",
    "model.depth=2",
    "model.heads=2",
    "model.classes=2",
    "moe.experts=4",
    "moe.pool=8",
    "parallel.ep=2",
    "train.batch=16",
    "train.steps=4",
    "train.log_every=2",
    "sample.steps=2",
    "sample.columns=2",
)
IMAGES, COUNT = 24, 32  # a class; images to score


class MeanColours(nn.Module):
    """A feature network in TorchScript, called as Inception is."""

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(images.float() / 255, (1, 2)).flatten(1)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    from diffusers import AutoencoderKL

    folder = tmp_path_factory.mktemp("reproduce")
    for name, rng in (
        ("china.jpg", np.random.default_rng(0)),
        ("flower.jpg", np.random.default_rng(1)),
    ):
        photograph = Image.fromarray(load_sample_image(name))
        (folder / "images" / name[:-4]).mkdir(parents=True)
        for i in range(IMAGES):
            x, y = (int(rng.integers(0, side - 80)) for side in photograph.size)
            photograph.crop((x, y, x + 80, y + 60)).save(folder / "images" / name[:-4] / f"{i}.png")
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        scaling_factor=0.5,
        sample_size=16,
    ).save_pretrained(folder / "vae")
    torch.jit.script(MeanColours()).save(str(folder / "features.pt"))
    return folder


def succeed(world: int, *arguments: object) -> str:
    """``run.py arguments`` on so many processes; what the first said."""
    results = run_program(world, *map(str, arguments), timeout=180)
    assert [r.returncode for r in results] == [0] * world, "\n".join(r.stderr for r in results)
    return results[0].stdout


def succeed_under_torchrun(world: int, *arguments: object) -> str:
    """``torchrun … run.py arguments``; what all ranks said."""
    assert world == 2, "as many as start_launcher starts"
    with start_launcher("torchrun", *map(str, arguments)) as program:
        (result,) = program.wait(300)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(
    "ranks", [succeed, pytest.param(succeed_under_torchrun, marks=pytest.mark.slow)]
)
def test_a_published_row_from_images_to_its_card(work: Path, ranks: Callable[..., str]) -> None:
    out = work / ranks.__name__
    ranks(
        2,
        "encode",
        "--source",
        work / "images",
        "--image-size",
        16,
        "--vae",
        work / "vae",
        "--out",
        out / "latents",
        "--samples-per-shard",
        10,
    )
    index = json.loads((out / "latents" / "index.json").read_text())
    assert index["count"] == 2 * IMAGES

    printed = ranks(
        2,
        "--config",
        "configs/diffmoe_l_e16_flow.yaml",
        "--deepspeed_config",
        "ds_configs/zero1_bf16.json",
        f"data.shards={out / 'latents'}",
        f"run.folder={out / 'run'}",
        *SMALL,
    )
    assert "step 4/4" in printed

    score = (
        "evaluate",
        "--checkpoint",
        out / "run",
        "--vae",
        work / "vae",
        "--cfg",
        1,
        "--count",
        COUNT,
        "--reference",
        work / "images_npz.npz",
        "--extractor",
        work / "features.pt",
        "--out",
        out / "scores",
        "sample.routing=batch",
    )
    pixels = [
        np.asarray(Image.open(p).resize((16, 16))) for p in sorted((work / "images").rglob("*.png"))
    ]
    np.savez(work / "images_npz.npz", arr_0=np.stack(pixels))
    ranks(2, *score)
    card = json.loads((out / "scores" / "card.json").read_text())
    assert (card["step"], card["weights"], card["routing"], card["count"], card["cfg"]) == (
        4,
        "ema",
        "batch",
        COUNT,
        1.0,
    )
    assert (card["latent_scale"], card["vae"]) == (0.5, str(work / "vae"))
    distance = card["scores"]["frechet_distance"]
    assert np.isfinite(distance) and distance > 0
    assert np.load(out / "scores" / "samples.npz")["arr_0"].shape == (COUNT, 16, 16, 3)

    succeed(
        1,
        "sample",
        "--checkpoint",
        out / "run",
        "--vae",
        work / "vae",
        "--classes",
        "0,1",
        "--count",
        4,
        "--cfg",
        4,
        "--out",
        out / "images_of_it",
    )
    images = np.load(out / "images_of_it.npz")["images"]
    assert images.shape == (4, 3, 16, 16) and np.abs(images).max() <= 1
    assert (out / "images_of_it.png").is_file()


def test_another_vae_than_the_training_datas_is_refused(work: Path) -> None:
    from diffusers import AutoencoderKL

    torch.manual_seed(1)
    AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
    ).save_pretrained(work / "other")
    (result,) = run_program(
        1,
        "sample",
        "--checkpoint",
        str(work / "succeed" / "run"),
        "--vae",
        str(work / "other"),
        "--count",
        "2",
        "--out",
        str(work / "no"),
        timeout=120,
    )
    assert (
        result.returncode == 2
        and "was encoded with" in result.stderr
        and "Traceback" not in result.stderr
    )
