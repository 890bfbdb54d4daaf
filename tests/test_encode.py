"""Images to shards: the crop, listings, a real autoencoder, corrupt images, ranks, and kills at
any moment.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tarfile
import threading
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

from diffmoe import files
from diffmoe.commands.encode import main
from diffmoe.commands.inspect_data import main as inspect_main
from diffmoe.data import images
from diffmoe.data.encode_request import Request
from diffmoe.data.encode_shards import encode
from diffmoe.data.images import BadImage, center_crop, read_image
from diffmoe.data.listing import list_source
from diffmoe.data.reader import ShardReader
from diffmoe.data.rows import OpenShard, member_name
from diffmoe.data.shards import ShardIndex, ShardMeta, load_index, write_index, write_shards
from diffmoe.data.vae import decode_latents, encode_moments, load_vae
from diffmoe.data.values import to_float
from diffmoe.environment import detect
from diffmoe.errors import UserError
from diffmoe.files import sha256
from diffmoe.parallel.groups import Group, build_groups, single_process
from programs import scratch

SIZE = 16
PACKAGE = str(Path(images.__file__).parents[1])
CPU = torch.device("cpu")


@functools.cache
def photographs() -> Path:
    """29 real images in 3 class folders: parts of scikit-learn's photographs, and digits blown
    up; every format.
    """
    folder = scratch() / "images"
    for number, (name, photo) in enumerate(zip(("n01 temple", "n02"), load_sample_images().images)):
        (folder / name / "inner").mkdir(parents=True)
        whole = Image.fromarray(photo)
        for i, side in enumerate((90, 40, 33, 32, 31, 20, 16, 9, 200)):
            part = whole.crop((31 * i, 17 * i, 31 * i + side + 7 * number, 17 * i + side))
            part.save(
                folder
                / name
                / ("inner" if i == 3 else "")
                / f"{i}.{('JPEG', 'png', 'webp', 'jpg')[i % 4]}"
            )
    (folder / "n03").mkdir()
    for i, digit in enumerate(load_digits().images[:9]):
        Image.fromarray((digit * 15.9).astype(np.uint8)).resize((50, 40)).save(
            folder / "n03" / f"{i}.png"
        )
    whole.convert("P").save(folder / "n03" / "palette.png")
    whole.convert("CMYK").save(folder / "n03" / "print.jpg")
    (folder / "n03" / "notes.txt").write_text("no image")
    (folder / "n03" / ".hidden.png").write_text("no image")
    return folder


@functools.cache
def vae_folder() -> Path:
    """An AutoencoderKL of random weights, 2 pixels a latent."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        scaling_factor=0.5,
        shift_factor=0.25,
        sample_size=SIZE,
    ).save_pretrained(scratch() / "vae")
    return scratch() / "vae"


def request(out: Path, vae: bool = True, **changes: object) -> Request:
    settings = {
        "source": str(photographs()),
        "image_size": SIZE,
        "batch": 3,
        "samples_per_shard": 4,
        "workers": 2,
    }
    return Request(out=out, vae=str(vae_folder()) if vae else None, **(settings | changes))


def run(wanted: Request, group: Group | None = None) -> ShardIndex:
    lines: list[str] = []
    return encode(wanted, group or single_process().world, CPU, lines.append)


@functools.cache
def encoded() -> ShardIndex:
    """The undisturbed set with the VAE, by one rank; do not write there."""
    return run(request(scratch() / "encoded"))


def checksums(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def stored(index: ShardIndex, flipped: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """All arrays (or the flips') and labels, in the order of the source's listing, whose numbers
    are the keys.
    """
    arrays, labels, keys = [], [], []
    for file in index.shards:
        opened = os.open(index.folder / file.name, os.O_RDONLY)
        shard = OpenShard(opened, file, index, flipped=index.flips)
        arrays += [shard.array(row, int(flipped)) for row in range(file.count)]
        labels.append(shard.table.labels)
        keys += [
            member_name(os.pread(shard._descriptor, 512, int(offset)))
            for offset in shard.table.offsets[:, 0]
        ]
        shard.close()
    listed = np.argsort(keys)
    return np.stack(arrays)[listed], np.concatenate(labels)[listed]


def cropped(channels: int = 3) -> np.ndarray:
    source = list_source(str(photographs()))
    return np.stack([read_image(source, image, SIZE, channels) for image in source.images])


# ---- the crop


def reference_crop(pixels: np.ndarray, size: int) -> np.ndarray:
    """ADM's crop in float arithmetic: box halvings, then Keys's cubic (a = -1/2) stretched where it
    shrinks.
    """

    def box(t: np.ndarray) -> np.ndarray:
        return ((t > -0.5) & (t <= 0.5)).astype(float)

    def cubic(t: np.ndarray) -> np.ndarray:
        t = np.abs(t)
        return np.where(
            t < 1,
            1.5 * t**3 - 2.5 * t**2 + 1,
            np.where(t < 2, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2, 0),
        )

    def resize(
        x: np.ndarray, shape: tuple[int, ...], kernel: Callable[[np.ndarray], np.ndarray]
    ) -> np.ndarray:
        for axis, length in enumerate(shape):
            ratio = x.shape[axis] / length
            centre = (np.arange(length) + 0.5) * ratio
            weights = kernel((np.arange(x.shape[axis]) + 0.5 - centre[:, None]) / max(ratio, 1.0))
            x = np.moveaxis(
                np.tensordot(weights / weights.sum(1, keepdims=True), x, (1, axis)), 0, axis
            )
        return x

    x = pixels.astype(np.float64)
    while min(x.shape[:2]) >= 2 * size:
        x = resize(x, (x.shape[0] // 2, x.shape[1] // 2), box)
    height, width = (round(side * size / min(x.shape[:2])) for side in x.shape[:2])
    x = resize(x, (height, width), cubic)
    top, left = (height - size) // 2, (width - size) // 2
    return x[top : top + size, left : left + size].clip(0, 255)


@pytest.mark.parametrize(
    "shape", [(100, 160), (64, 64), (96, 128), (63, 40), (33, 32), (20, 31), (427, 640)]
)
def test_crop_is_the_formula(shape: tuple[int, int]) -> None:
    photo = load_sample_images().images[0][: shape[0], : shape[1]]
    ours = np.asarray(center_crop(Image.fromarray(photo), 32), np.float64)
    assert ours.shape == (32, 32, 3)
    assert (
        np.abs(ours - reference_crop(photo, 32)).max() <= 3
    )  # Pillow rounds to 8 bits after every pass


def test_crop_of_its_own_size_is_the_middle() -> None:
    photo = load_sample_images().images[1][:32, :101]
    assert np.array_equal(center_crop(Image.fromarray(photo), 32), photo[:, 34:66])


def test_crop_refuses_a_thread(tmp_path: Path) -> None:
    with pytest.raises(BadImage, match="1 x 60000 pixels would become 256 x 15360000"):
        center_crop(Image.new("RGB", (1, 60000)), 256)


# ---- listings


def test_classes_are_folders_by_name() -> None:
    source = list_source(str(photographs()))
    assert (source.classes, source.class_names) == (3, ("n01 temple", "n02", "n03"))
    assert [source.images[i].address for i in (0, 1, 8, 9)] == [
        "n01 temple/0.JPEG",
        "n01 temple/1.png",
        "n01 temple/inner/3.jpg",
        "n02/0.JPEG",
    ]
    assert [p.label for p in source.images] == [0] * 9 + [1] * 9 + [2] * 11
    assert list_source(str(photographs()), 10, allow_empty=True).classes == 10
    assert list_source(str(photographs())).sha256 == source.sha256
    with pytest.raises(UserError, match=r"classes \(2\) must be at least the 3"):
        list_source(str(photographs()), 2)


def test_strange_file_names_are_printable(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "two\nlines.png").write_bytes(b"")
    (tmp_path / "a" / os.fsdecode(b"\xff.png")).write_bytes(b"")
    addresses = [image.address for image in list_source(str(tmp_path)).images]
    assert addresses == ["a/two\\nlines.png", "a/\\udcff.png"]


def make_tar(path: Path, members: list[tuple[str, bytes | None]]) -> None:
    """None makes a symbolic link."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, payload in members:
            info = tarfile.TarInfo(name)
            info.size = len(payload or b"")
            if payload is None:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(info, io.BytesIO(payload or b""))


@pytest.mark.parametrize(
    "members, message",
    [
        ([("../a.png", b""), ("../a.cls", b"0")], r"member '../a.png': unsafe name"),
        ([("/a.png", b""), ("/a.cls", b"0")], r"member '/a.png': unsafe name"),
        ([("a.png", None), ("a.cls", b"0")], r"member 'a.png': must be a plain file"),
        ([("a.png", b"")], r"holds no images.*left out, 1 images without .cls: x.tar:a.png"),
        ([("a.png", b""), ("a.jpg", b""), ("a.cls", b"0")], r"member 'a.jpg': second of its kind"),
        ([("a.png", b""), ("a.cls", b"cat")], r"label b'cat' must be a class number"),
        ([("a.png", b""), ("a.cls", b"-1")], r"label b'-1' must be a class number"),
        ([("a.txt", b"")], r"holds no images"),
    ],
)
def test_bad_tars(tmp_path: Path, members: list[tuple[str, bytes | None]], message: str) -> None:
    make_tar(tmp_path / "x.tar", members)
    with pytest.raises(UserError, match=message):
        list_source(str(tmp_path))


def test_bad_sources(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no images"):
        list_source(str(tmp_path))
    with pytest.raises(UserError, match="x-1.tar does not exist"):
        list_source(str(tmp_path / "x-{1,2}.tar"))
    (tmp_path / "cut.tar").write_bytes(b"x" * 700)
    with pytest.raises(UserError, match="cut.tar is unreadable"):
        list_source(str(tmp_path))
    (tmp_path / "class").mkdir()
    with pytest.raises(UserError, match="must hold one kind"):
        list_source(str(tmp_path))


def test_a_busy_file_system_is_no_bad_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = list_source(str(photographs()))
    tries: list[object] = []

    def stale(*arguments: object) -> None:
        tries.append(arguments)
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(images, "open", stale, raising=False)
    monkeypatch.setattr(files, "FIRST_PAUSE", 0.0)
    with pytest.raises(OSError, match="Stale file handle: .*n01 temple/0.JPEG"):
        read_image(source, source.images[0], SIZE, 3)
    assert len(tries) == files.TRIES


# ---- the autoencoder


def test_decoding_gives_the_autoencoders_own_reconstruction() -> None:
    index, vae = encoded(), load_vae(vae_folder())
    assert (index.shape, index.x_shape, index.dtype, index.flips, index.count) == (
        (8, 8, 8),
        (4, 8, 8),
        "float16",
        True,
        29,
    )
    assert index.meta == ShardMeta("moments", 3, scale=0.5, mean=0.25)
    moments, labels = stored(index)
    assert labels.tolist() == [p.label for p in list_source(str(photographs())).images]
    x = torch.from_numpy(cropped()).float() / 127.5 - 1
    with torch.no_grad():
        latent = vae.model.encode(x).latent_dist
        expected = vae.model.decode(latent.mean).sample
    ours = torch.from_numpy(moments).float()
    torch.testing.assert_close(ours, torch.cat([latent.mean, latent.std], 1), rtol=1e-3, atol=1e-3)
    shown = decode_latents(vae, (ours[:, :4] - 0.25) * 0.5, scale=0.5, shift=0.25)
    assert (shown.dtype, shown.shape) == (torch.uint8, (29, 3, SIZE, SIZE))
    assert (shown.float() - (127.5 * expected + 127.5).clamp(0, 255)).abs().max() < 1.1
    assert shown.float().std() > 1  # something to see


def test_flips_are_those_of_the_mirrored_image() -> None:
    moments, _ = stored(encoded(), flipped=True)
    mirrored = torch.from_numpy(cropped()[..., ::-1].copy())
    torch.testing.assert_close(
        torch.from_numpy(moments).float(),
        encode_moments(load_vae(vae_folder()), mirrored),
        rtol=1e-3,
        atol=1e-3,
    )


def test_the_loader_reads_it() -> None:
    index = load_index(encoded().folder)
    assert index == encoded()
    x, y = ShardReader(index, seed=0, flip=True).read(range(2 * index.count))
    assert x.shape == (58, 4, 8, 8) and np.isfinite(x).all()
    assert sorted(y[:29].tolist()) == [0] * 9 + [1] * 9 + [2] * 11
    with pytest.raises(UserError, match=r"latents \(58, 8, 8, 8\) must be \[B, 4, h, w\]"):
        decode_latents(load_vae(vae_folder()), torch.from_numpy(x).repeat(1, 2, 1, 1), 0.5, 0.25)


def test_a_large_batch_is_decoded_a_few_images_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    vae, z = load_vae(vae_folder()), torch.randn(7, 4, 8, 8)
    whole, sizes, decode = decode_latents(vae, z, 1.0, 0.0), [], vae.model.decode
    monkeypatch.setattr("diffmoe.data.vae._AT_ONCE", 3 * 8 * 8 + 5)
    monkeypatch.setattr(vae.model, "decode", lambda x: sizes.append(len(x)) or decode(x))
    parts = decode_latents(vae, z, 1.0, 0.0)
    assert sizes == [3, 3, 1] and (parts.int() - whole.int()).abs().max() <= 1
    z[4] = torch.nan
    with pytest.raises(UserError, match="1 of 7 decoded images"):
        decode_latents(vae, z, 1.0, 0.0)


def test_inspect_data_shows_decoded_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few at a time, and as the autoencoder decodes them; another autoencoder is refused before
    anything is read.
    """
    grids: list[np.ndarray] = []
    monkeypatch.setattr(
        "diffmoe.evaluation.plots.image_grid", lambda images, columns, path: grids.append(images)
    )
    assert inspect_main([str(encoded().folder), "--vae", str(vae_folder())], detect({})) == 0
    x, _ = ShardReader(encoded(), seed=0).read(range(29))
    expected = decode_latents(load_vae(vae_folder()), torch.from_numpy(x), scale=0.5, shift=0.25)
    assert (
        grids[0].shape == (29, 3, SIZE, SIZE)
        and np.abs(127.5 * (grids[0] + 1) - expected.numpy()).max() <= 1
    )
    vae = load_vae(vae_folder()).model
    next(vae.parameters()).data.add_(1)
    vae.save_pretrained(tmp_path / "other")
    monkeypatch.setattr("diffmoe.data.inspect.inspect", None)
    with pytest.raises(UserError, match="other. has weights .* was encoded with"):
        inspect_main([str(encoded().folder), "--vae", str(tmp_path / "other")], detect({}))


def test_the_index_says_how_it_was_made() -> None:
    index, made = encoded(), encoded().encoding
    assert (made.images, made.image_size, made.image_channels, made.skipped) == (29, SIZE, 3, ())
    assert (made.vae, made.precision, made.class_names) == (
        str(vae_folder()),
        "fp32",
        ("n01 temple", "n02", "n03"),
    )
    assert made.shuffled == 0
    assert made.vae_sha256 == load_vae(vae_folder()).sha256 and len(made.vae_sha256) == 64
    both = np.concatenate([stored(index)[0], stored(index, flipped=True)[0]]).astype(np.float64)
    rng = np.random.default_rng(0)
    latents = np.concatenate(
        [both[:, :4] + both[:, 4:] * rng.standard_normal(both[:, 4:].shape) for _ in range(20)]
    )
    np.testing.assert_allclose(made.channel_mean, latents.mean((0, 2, 3)), atol=0.02)
    np.testing.assert_allclose(made.channel_std, latents.std((0, 2, 3)), rtol=0.01)


def test_a_set_without_encoding_loads_and_keeps_its_bytes(tmp_path: Path) -> None:
    index = write_shards(
        [("0", np.zeros((1, 2, 2), np.uint8), 0)],
        tmp_path,
        samples_per_shard=1,
        meta=ShardMeta("pixels", 1),
    )
    assert "encoding" not in json.loads((tmp_path / "index.json").read_text())
    assert load_index(tmp_path) == index and index.encoding is None


def test_bf16_is_near_fp32(tmp_path: Path) -> None:
    index = run(request(tmp_path, precision="bf16", scale=0.7, shift=-1.0))
    assert (index.meta.scale, index.meta.mean, index.encoding.precision) == (0.7, -1.0, "bf16")
    difference = np.abs(stored(index)[0].astype(float) - stored(encoded())[0])
    assert 0 < difference.mean() < 0.02


def test_a_scale_that_does_not_fit_the_latents_is_refused_early(tmp_path: Path) -> None:
    assert 0.7 < np.mean(encoded().encoding.channel_std) < 1.4
    for scale in (0.1, 5.0, -0.05):
        message = "latents have deviation 1.0.* with about --scale 0.9.*--accept-values"
        with pytest.raises(UserError, match=message) as caught:
            run(request(tmp_path / str(scale), scale=scale, samples_per_shard=2))
        assert "\n" not in str(caught.value) and not (tmp_path / str(scale) / "index.json").exists()
        assert len(list((tmp_path / str(scale)).glob("*.tar"))) == 4, "eight images tell"
    index = run(request(tmp_path / "accepted", scale=0.1, accept_values=True))
    assert index.meta.accept_values and load_index(index.folder) == index
    assert inspect_main([str(index.folder), "--grid", str(tmp_path / "grid.png")], detect({})) == 0
    write_index(
        dataclasses.replace(index, meta=dataclasses.replace(index.meta, accept_values=False))
    )
    assert inspect_main([str(index.folder), "--grid", str(tmp_path / "grid.png")], detect({})) == 1


def by_formula(index: ShardIndex) -> np.ndarray:
    """What training reads, from the latents as they are drawn from the moments."""
    plain = dataclasses.replace(index, meta=dataclasses.replace(index.meta, scale=1.0, mean=0.0))
    z = ShardReader(plain, seed=0).read(range(29))[0].astype(np.float64)
    mean, std = (np.array(n).reshape(4, 1, 1) for n in (index.meta.mean, index.meta.scale))
    return (z - mean) * std


def test_channels_are_normalized_by_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:  # killed where all but the index is written
        patch.setattr("diffmoe.data.encode_shards._finish", None)
        with pytest.raises(TypeError):
            run(request(out, normalize="channels"))
    with pytest.raises(UserError, match="was begun with --normalize channels: so resume it"):
        run(request(out))
    index = run(request(out, normalize="channels"))
    made = index.encoding
    assert made.channel_mean == encoded().encoding.channel_mean and index.meta.by_channel
    assert index.meta.mean == made.channel_mean
    assert index.meta.scale == tuple(1 / std for std in made.channel_std)
    assert load_index(out) == index == run(request(out, normalize="channels"))
    x = ShardReader(index, seed=0).read(range(29))[0]
    np.testing.assert_allclose(x, by_formula(index), atol=1e-5)
    assert np.abs(x.mean((0, 2, 3))).max() < 0.1 and np.abs(x.std((0, 2, 3)) - 1).max() < 0.1
    # Decoding inverts it.
    vae, numbers = load_vae(vae_folder()), (index.meta.scale, index.meta.mean)
    z = torch.tensor(x / np.reshape(numbers[0], (4, 1, 1)) + np.reshape(numbers[1], (4, 1, 1)))
    shown, expected = decode_latents(vae, torch.tensor(x), *numbers), decode_latents(vae, z, 1, 0)
    assert (shown.int() - expected.int()).abs().max() <= 1
    assert inspect_main([str(out), "--grid", str(tmp_path / "grid.png")], detect({})) == 0
    # Held-out images take the training data's numbers.
    other = run(request(tmp_path / "other", normalize=str(out), image_size=8))
    assert (other.meta.scale, other.meta.mean) == numbers != (1, other.encoding.channel_mean)
    few = dataclasses.replace(index.meta, scale=(1.0, 2.0), mean=0.0)
    write_index(dataclasses.replace(other, meta=few))
    with pytest.raises(UserError, match="2 numbers by channel do not fit 4 channels"):
        run(request(tmp_path / "third", normalize=str(other.folder)))
    for changes, message in (
        ({"scale": 0.5}, r"scale \(0.5\) goes without normalize \(channels\)"),
        ({"vae": False}, r"normalize \(channels\) goes with vae"),
    ):
        with pytest.raises(UserError, match=message):
            request(out, normalize="channels", **changes)


def test_tars_of_others_have_numbers_by_channel(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    generator = np.random.default_rng(0)
    samples = [
        (f"{i}", generator.normal((8, -3), (4, 0.5), (5, 5, 2)).transpose(2, 0, 1).copy(), 0)
        for i in range(100)
    ]
    meta = ShardMeta("latents", 1, scale=(0.25, 2.0), mean=(8.0, -3.0))
    index = write_shards(samples, tmp_path, samples_per_shard=50, meta=meta)
    (tmp_path / "index.json").unlink()
    asked = [str(tmp_path), "--write-index", "--kind", "latents", "--classes", "1"]
    asked += ["--grid", str(tmp_path / "grid.png")]
    for scale, mean, message in (
        ("1,1,1", "0", "3 numbers by channel do not fit 2 channels"),
        ("0.25,2", "0,300", "latents have deviation 3.*by channel.* where models take about 1"),
        ("0.25,0", "0", "must be finite, scale not 0"),
    ):
        with pytest.raises(UserError, match=message):
            inspect_main([*asked, "--scale", scale, "--mean", mean], detect({}))
    assert inspect_main([*asked, "--scale", "0.25,2", "--mean=8,-3"], detect({})) == 0
    assert load_index(tmp_path) == index
    # What it prints are the options.
    said = capsys.readouterr().out.split("by channel --scale ")[1].split("\n")[0]
    scale, mean = said.split(" --mean=")
    assert np.fromstring(scale, sep=",") == pytest.approx([0.25, 2], rel=0.05)
    assert np.fromstring(mean, sep=",") == pytest.approx([8, -3], rel=0.05)
    with pytest.raises(UserError, match="by channel go with latents and moments, not pixels"):
        ShardMeta("pixels", 1, scale=(1.0, 2.0))


def test_bf16_storage_is_the_rounded_moments(tmp_path: Path) -> None:
    index = run(request(tmp_path, storage="bfloat16"))
    assert (
        load_index(tmp_path) == index
        and index.dtype == "bfloat16"
        and index.encoding.storage == "bfloat16"
    )
    arrays, _ = stored(index)
    assert arrays.dtype == np.uint16
    difference = np.abs(to_float(arrays, "bfloat16") - stored(encoded())[0].astype(np.float32))
    assert 0 < difference.max() < 0.02  # 8 bits of mantissa, moments of the order of 1
    np.testing.assert_allclose(
        index.encoding.channel_mean, encoded().encoding.channel_mean, atol=2e-3
    )
    x, _ = ShardReader(index, seed=0).read(range(29))
    np.testing.assert_allclose(x, ShardReader(encoded(), seed=0).read(range(29))[0], atol=0.02)
    with pytest.raises(UserError, match=r"storage \(float16\) is not that of"):
        run(request(tmp_path))


def test_bad_autoencoders(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path / "none", "does not exist"),
        ("none", "is no folder here, and no id of the hub"),
        (tmp_path, "has no config.json"),
    ):
        with pytest.raises(UserError, match=message):
            load_vae(path)
    copy = tmp_path / "copy"
    shutil.copytree(vae_folder(), copy / "vae")
    assert load_vae(copy).sha256 == load_vae(vae_folder()).sha256  # a pipeline's folder
    config = json.loads((copy / "vae/config.json").read_text())
    for change, message in (
        ({"layers_per_block": 2}, "does not fit AutoencoderKL: missing keys|cannot be loaded"),
        ({"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}, "normalises latents by channel"),
    ):
        (copy / "vae/config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=message):
            load_vae(copy)
    torch.jit.script(torch.nn.Identity()).save(copy / "decoder.pt")
    with pytest.raises(UserError, match="is a decoder alone; for latents made elsewhere"):
        run(Request(str(photographs()), tmp_path / "out", SIZE, vae=str(copy / "decoder.pt")))
    weights = next((copy / "vae").glob("*.safetensors"))
    torch.save({}, weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        load_vae(copy / "vae")  # a pickle is all there is


# ---- pixels, tars, corrupt images


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_take_the_same_path(tmp_path: Path, channels: int) -> None:
    index = run(request(tmp_path, vae=False, channels=channels))
    arrays, _ = stored(index)
    assert (index.dtype, index.shape, index.flips) == ("uint8", (channels, SIZE, SIZE), False)
    assert np.array_equal(arrays, cropped(channels))
    np.testing.assert_allclose(index.encoding.channel_mean, arrays.mean((0, 2, 3)), rtol=1e-9)
    np.testing.assert_allclose(index.encoding.channel_std, arrays.std((0, 2, 3)), rtol=1e-9)
    x, _ = ShardReader(index, seed=0, flip=True).read(range(index.count))
    assert (x.min().item(), x.max().item()) == pytest.approx((-1, 1), abs=1e-6) and x.shape[
        1
    ] == channels


def test_tars_of_images_give_what_the_folder_gives(tmp_path: Path) -> None:
    source = list_source(str(photographs()))
    members = [
        (f"dir.d/{i:03d}.{ext}", data)
        for i, p in enumerate(source.images)
        for ext, data in (
            ("cls", str(p.label).encode()),
            (p.file.rpartition(".")[2], (source.root / p.file).read_bytes()),
        )
    ]
    make_tar(tmp_path / "in-0.tar", members[:22])
    make_tar(tmp_path / "in-1.tar", members[22:])
    index = run(request(tmp_path / "out", vae=False, source=str(tmp_path / "in-{0,1}.tar")))
    expected = run(request(tmp_path / "folder", vae=False))
    assert index.shards == expected.shards and index.encoding.class_names == ()
    again = run(
        request(tmp_path / "again", vae=False, source=str(tmp_path / "in-*.tar"), classes=7)
    )
    assert again.shards == expected.shards and again.meta.classes == 7


def spoil(folder: Path) -> list[str]:
    """Damages five images of a copy in as many ways; their addresses."""
    (folder / "n02/0.JPEG").write_bytes((folder / "n02/0.JPEG").read_bytes()[:300])
    (folder / "n02/1.png").write_bytes(b"<html>404</html>")
    (folder / "n03/0.png").write_bytes(b"")
    (folder / "n03/1.png").unlink()
    (folder / "n03/1.png").symlink_to("nowhere")
    Image.fromarray(np.full((20, 20), 40000, np.uint16)).save(folder / "n03/2.png")
    return ["n02/0.JPEG", "n02/1.png", "n03/0.png", "n03/1.png", "n03/2.png"]


def test_corrupt_images_are_left_out_and_nothing_else_changes(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(photographs(), tmp_path / "in")
    bad = spoil(tmp_path / "in")
    index = run(request(tmp_path / "out", source=str(tmp_path / "in"), bad_share=0.2))
    errors = capsys.readouterr().err.splitlines()
    assert sorted(index.encoding.skipped) == bad and index.count == 24
    assert [line.split(": ")[1] for line in errors] == list(index.encoding.skipped)
    assert any("more than 8 bits" in line for line in errors)
    kept = [
        i for i, p in enumerate(list_source(str(tmp_path / "in")).images) if p.address not in bad
    ]
    assert np.array_equal(
        stored(index)[0], stored(encoded())[0][kept]
    )  # bit for bit: neighbours do not matter
    changed = [a.count < b.count for a, b in zip(index.shards, encoded().shards, strict=True)]
    assert [a != b for a, b in zip(index.shards, encoded().shards)] == changed and 1 <= sum(
        changed
    ) <= 5
    assert load_index(index.folder).encoding == index.encoding


def test_too_many_bad_images_stop_it(tmp_path: Path) -> None:
    shutil.copytree(photographs(), tmp_path / "in")
    spoil(tmp_path / "in")
    strict = request(tmp_path / "out", vae=False, source=str(tmp_path / "in"), bad_share=0.1)
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"of 29 images are bad, more than bad_share \(0.1\) allows: n0"
        ):
            run(strict)
        assert not (tmp_path / "out/index.json").exists()
    assert (
        run(request(tmp_path / "out", vae=False, source=str(tmp_path / "in"), bad_share=0.2)).count
        == 24
    )


def test_a_shard_without_a_good_image_is_left_out(tmp_path: Path) -> None:
    shutil.copytree(photographs(), tmp_path / "in")
    for number in (4, 5, 6, 7):
        next((tmp_path / "in/n01 temple").glob(f"{number}.*")).write_bytes(b"")
    out = tmp_path / "out"
    index = run(
        request(
            out,
            source=str(tmp_path / "in"),
            vae=False,
            bad_share=0.5,
            samples_per_shard=2,
            shuffle_seed=None,
        )
    )
    assert (
        "shard-000002.tar" not in [shard.name for shard in index.shards]
        and not (out / "shard-000002.tar").exists()
    )
    assert ShardReader(load_index(out), seed=0).read(range(50))[0].shape[0] == 50


# ---- going on, ranks, kills


def test_a_folder_is_finished_only_by_the_same_command(tmp_path: Path) -> None:
    out = tmp_path / "out"
    index = run(request(out, vae=False))
    before = checksums(out)
    assert (
        run(request(out, vae=False, bad_share=0.5, workers=1)) == index and checksums(out) == before
    )
    for change, message in (
        ({"image_size": 8}, r"image_size \(8\) is not that of .* \(16\)"),
        ({"samples_per_shard": 5}, r"samples_per_shard \(5\)"),
        ({"channels": 1}, "image_channels"),
        ({"classes": 9}, r"classes \(9\)"),
    ):
        with pytest.raises(UserError, match=message):
            run(request(out, vae=False, **change))
    (out / "index.json").unlink()
    with pytest.raises(UserError, match="must be empty, or begun by encode; it holds shard-0"):
        run(request(out, vae=False))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image_size": 0}, r"image_size \(0\)"),
        ({"channels": 2}, r"channels \(2\) must be 1 or 3"),
        ({"precision": "fp16"}, "precision"),
        ({"bad_share": 1.0}, "bad_share"),
        ({"scale": float("nan")}, "scale"),
        ({"vae": None, "accept_values": True}, r"accept_values \(True\) goes with vae"),
        ({"vae": None, "scale": 1.0}, r"scale \(1.0\) goes with vae"),
        ({"image_size": 15}, "must be divisible by 2"),
        ({"channels": 1}, r"channels \(1\) must be those of"),
        ({"source": "/nowhere"}, "/nowhere does not exist"),
    ],
)
def test_bad_requests(tmp_path: Path, change: dict, message: str) -> None:
    settings = {"vae": str(vae_folder()), "source": str(photographs()), "image_size": SIZE} | change
    with pytest.raises(UserError, match=message):
        run(Request(out=tmp_path / "out", **settings))
    assert not (tmp_path / "out").exists()


def test_the_folder_must_not_lie_in_the_source() -> None:
    with pytest.raises(UserError, match="must not lie in source"):
        request(photographs() / "out")


class Fuse:
    """Counts the calls that the package's code makes in any thread of this process, and kills it
    with -9 at one of them: a moment of the work, however fast the machine is.
    """

    def __init__(self, count: ctypes.c_long, last: int) -> None:
        self._count, self._last, self._numbers = (
            count,
            last,
            itertools.count(1),
        )  # next() is one step to other threads

    def __call__(self, frame: types.FrameType, event: str, _: object) -> None:
        if event in ("call", "c_call") and frame.f_code.co_filename.startswith(PACKAGE):
            self._count.value = number = next(self._numbers)
            if number == self._last:
                os.kill(os.getpid(), signal.SIGKILL)

    def light(self) -> None:
        threading.setprofile(self)
        sys.setprofile(self)


def serve(
    rank: int, world: int, store: str, requests: tuple[Request, ...], fuse: Fuse | None
) -> None:
    torch.set_num_threads(1)
    group = single_process().world
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
        group = build_groups(1, 1).world
    if fuse:
        fuse.light()
    for wanted in requests:
        run(wanted, group)
    sys.setprofile(None)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def start(
    world: int, store: Path, *requests: Request, fuses: Sequence[Fuse] = ()
) -> list[multiprocessing.process.BaseProcess]:
    """Ranks forked from a server that has everything imported, which the imports' seconds are too
    long to do each time.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["diffusers.models.autoencoders.autoencoder_kl", __name__])
    processes = [
        context.Process(
            target=serve, args=(rank, world, str(store), requests, fuses[rank] if fuses else None)
        )
        for rank in range(world)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(
            "PYTHONPATH", os.pathsep.join(sys.path)
        )  # the server takes no path from us before Python 3.12
        for process in processes:
            process.start()
    return processes


def join(processes: list[multiprocessing.process.BaseProcess], limit: float = 60.0) -> None:
    deadline = time.monotonic() + limit
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        process.kill()
    assert [process.exitcode for process in processes] == [0] * len(processes)


@pytest.mark.full
def test_ranks_write_what_one_rank_writes(tmp_path: Path) -> None:
    run(request(tmp_path / "one", vae=False))
    join(start(3, tmp_path / "store", request(tmp_path / "a"), request(tmp_path / "b", vae=False)))
    assert checksums(tmp_path / "a") == checksums(encoded().folder)
    assert checksums(tmp_path / "b") == checksums(tmp_path / "one")


def kill_and_finish(
    tmp_path: Path, trials: int, world: int, expected: dict[str, str], **changes: object
) -> None:
    """Each trial: start, kill -9 at a random moment of the work, look, run to the end, compare with
    the undisturbed set.
    """
    moments = random.Random(world)
    calls = [
        multiprocessing.get_context("forkserver").RawValue(ctypes.c_long) for _ in range(world)
    ]
    join(
        start(
            world,
            tmp_path / "store",
            request(tmp_path / "whole", **changes),
            fuses=[Fuse(count, last=0) for count in calls],
        )
    )
    whole, halfway = [count.value for count in calls], 0
    for trial in range(trials):
        out = tmp_path / f"out{trial}"
        victim = trial % world
        fuses = [
            Fuse(
                calls[rank],
                round(whole[rank] * (trial + moments.random()) / trials) if rank == victim else 0,
            )
            for rank in range(world)
        ]
        processes = start(world, tmp_path / f"store{trial}", request(out, **changes), fuses=fuses)
        processes[victim].join(60)
        assert processes[victim].exitcode == -signal.SIGKILL
        for process in processes:
            process.kill()
            process.join()
        finished = (out / "index.json").exists()
        halfway += not finished and any(out.glob("*.tar"))
        if finished:
            load_index(out)
        run(request(out, **changes))
        assert checksums(out) == expected, trial
    assert halfway >= trials // 4, "kills between the first shard and the last"


@pytest.mark.full
def test_killed_at_random_moments_it_ends_the_same(tmp_path: Path) -> None:
    kill_and_finish(tmp_path, 5, 1, checksums(encoded().folder))


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_killed_at_many_moments_it_ends_the_same(tmp_path: Path, world: int) -> None:
    kill_and_finish(tmp_path, 20, world, checksums(encoded().folder))


# ---- the order


@functools.cache
def forty_classes() -> Path:
    """40 class folders of 64 images."""
    folder = scratch() / "forty"
    for label in range(40):
        (folder / f"c{label:02d}").mkdir(parents=True)
        for i in range(64):
            Image.fromarray(np.full((8, 8), (7 * label + i) % 256, np.uint8)).save(
                folder / f"c{label:02d}/{i:02d}.png"
            )
    return folder


@functools.cache
def forty_tars() -> str:
    """The same images as four tars, in order of class."""
    source = list_source(str(forty_classes()))
    for part in range(4):
        make_tar(
            scratch() / f"forty-{part}.tar",
            [
                (f"{i:05d}.{kind}", data)
                for i in range(part * 640, (part + 1) * 640)
                for kind, data in (
                    ("cls", str(source.images[i].label).encode()),
                    ("png", (source.root / source.images[i].file).read_bytes()),
                )
            ],
        )
    return str(scratch() / "forty-{0..3}.tar")


FORTY = {"vae": None, "channels": 1, "image_size": 8, "samples_per_shard": 256, "batch": 32}


def forty(out: Path, **changes: object) -> Request:
    return Request(out=out, **{"source": str(forty_classes()), **FORTY, **changes})


def classes_of_shards(index: ShardIndex) -> list[int]:
    labels = ShardReader(index, seed=0).labels_at_hand()
    return [len(np.unique(found)) for found in labels]


@pytest.mark.full
@pytest.mark.parametrize("source", ["folder", "tars"])
def test_every_shard_of_a_source_in_class_order_holds_nearly_all_classes(
    tmp_path: Path, source: str
) -> None:
    source = str(forty_classes()) if source == "folder" else forty_tars()
    index = run(forty(tmp_path / "a", source=source))
    assert index == load_index(index.folder) and index.encoding.shuffled == 0
    assert len(index.shards) == 10 and min(classes_of_shards(index)) >= 39
    arrays, labels = stored(index)
    assert np.array_equal(labels, np.repeat(np.arange(40), 64))
    assert np.array_equal(arrays[:, 0, 0, 0], (7 * labels + np.tile(np.arange(64), 40)) % 256)
    other = run(forty(tmp_path / "b", source=source, shuffle_seed=1))
    assert other.encoding.shuffled == 1 and not {s.sha256 for s in other.shards} & {
        s.sha256 for s in index.shards
    }
    plain = run(forty(tmp_path / "c", source=source, shuffle_seed=None))
    assert plain.encoding.shuffled is None and max(classes_of_shards(plain)) == 4


@pytest.mark.full
@pytest.mark.parametrize("trials", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_shuffled_folder_of_many_classes_ends_the_same_after_kills(
    tmp_path: Path, trials: int
) -> None:
    index = run(forty(tmp_path / "undisturbed"))
    changes = {"source": str(forty_classes()), **FORTY} | {"vae": False}
    kill_and_finish(tmp_path, trials, 1, checksums(index.folder), **changes)


def make_older(folder: Path) -> None:
    """Takes the word about the order out, as versions wrote it that did not shuffle."""
    for path in (folder / "index.json", folder / ".encode/plan.json"):
        if path.exists():
            record = json.loads(path.read_text())
            del record["encoding"]["shuffled"]
            path.write_text(json.dumps(record))


@pytest.mark.parametrize("finished", [False, True])
def test_an_older_folder_is_gone_on_with_by_the_option_that_the_message_names(
    tmp_path: Path, finished: bool
) -> None:
    out = tmp_path / "out"
    whole = run(request(tmp_path / "whole", vae=False, shuffle_seed=None))
    with pytest.MonkeyPatch.context() as patch:
        if not finished:
            patch.setattr(
                "diffmoe.data.encode_shards.write_index",
                lambda index: (_ for _ in ()).throw(OSError("killed")),
            )
        with contextlib.nullcontext() if finished else pytest.raises(UserError, match="killed"):
            run(request(out, vae=False, shuffle_seed=None))
    make_older(out)
    before = checksums(out)
    with pytest.raises(
        UserError, match=r"shuffled \(0\) is not that of .*out \(None.*: --no-shuffle resumes there"
    ):
        run(request(out, vae=False))
    assert checksums(out) == before
    assert run(request(out, vae=False, shuffle_seed=None)).shards == whole.shards
    other = run(request(tmp_path / "other", vae=False, shuffle_seed=5))
    with pytest.raises(UserError, match=r"shuffled \(0\) .*: --shuffle-seed 5 resumes there"):
        run(request(other.folder, vae=False))


@pytest.mark.parametrize(
    "moment",
    ["temporary tar", "tar without record", "short tar", "index", "index, state half gone"],
)
def test_every_moment_of_a_kill(tmp_path: Path, moment: str) -> None:
    """The states between two file operations, which random kills seldom meet."""
    out = tmp_path / "out"
    run(request(out, vae=False))
    expected = checksums(out)
    (tmp_path / "index.json").write_bytes((out / "index.json").read_bytes())
    shutil.rmtree(out)
    state = out / ".encode"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "diffmoe.data.encode_shards.write_index",
            lambda index: (_ for _ in ()).throw(OSError("killed")),
        )
        with pytest.raises(UserError, match="killed"):
            run(request(out, vae=False))
    if moment == "temporary tar":
        (out / ".shard-000001.tar.123").write_bytes(b"half")
        (state / ".shard-000001.json.123").write_bytes(b"half")
        (state / "shard-000001.json").unlink()
        (out / "shard-000001.tar").unlink()
    elif moment == "tar without record":
        (state / "shard-000001.json").unlink()
        (out / "shard-000001.tar").write_bytes(b"of a stranger")
    elif moment == "short tar":
        (out / "shard-000001.tar").write_bytes(b"half")
    else:
        shutil.copy(tmp_path / "index.json", out)
        if "half" in moment:
            (state / "plan.json").unlink()
    run(request(out, vae=False))
    assert checksums(out) == expected


# ---- the command line


def test_main(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = [
        "--source",
        str(photographs()),
        "--out",
        str(tmp_path / "out"),
        "--vae",
        str(vae_folder()),
        "--image-size",
        str(SIZE),
        "--batch",
        "3",
        "--samples-per-shard",
        "4",
    ]
    assert main(arguments, detect({"DIFFMOE_STORE": str(tmp_path / "store")})) == 0
    assert checksums(tmp_path / "out") == checksums(encoded().folder)
    said = capsys.readouterr().out
    assert re.search(r"encode: 29 of 29 images \(100.0%\), \d+\.\d images/s, 0 s left, 0 bad", said)
    assert "29 samples of 3 classes, 0 bad, in 8 shards" in said


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "required: --source, --out, --image-size"),
        (["--image-size", "big"], "invalid int value: 'big'"),
        (["--shuffle-seed", "1", "--no-shuffle"], "not allowed with argument --shuffle-seed"),
        (
            ["--source", "a", "--out", "b", "--image-size", "8", "--shuffle-seed", "-1"],
            r"shuffle_seed \(-1\) must lie in",
        ),
        (
            ["--source", "a", "--out", "b", "--image-size", "8", "--channels", "2"],
            r"channels \(2\) must be 1 or 3",
        ),
    ],
)
def test_main_complains_at_once(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(arguments, detect({}))


def test_weights_hash_does_not_depend_on_the_file() -> None:
    vae = load_vae(vae_folder(), dtype=torch.bfloat16)
    assert vae.sha256 == load_vae(vae_folder()).sha256
    assert vae.sha256 != hashlib.sha256().hexdigest() and (vae.factor, vae.scale, vae.shift) == (
        2,
        0.5,
        0.25,
    )
