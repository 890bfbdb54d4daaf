"""Representation alignment: features of images in the shards, the loss on them, and what becomes of
the projector; over ranks it is rows of the parity table.
"""

import functools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffmoe.checkpoints.reader import MASTER, Checkpoint
from diffmoe.config import load_config
from diffmoe.cost.parameters import trained_parameters
from diffmoe.data.encode_request import Request
from diffmoe.data.encode_shards import encode
from diffmoe.data.feed import open_reader
from diffmoe.data.reader import ShardReader
from diffmoe.data.shards import load_index
from diffmoe.data.share import Share
from diffmoe.data.stream import BatchStream
from diffmoe.errors import UserError
from diffmoe.families import projector_of
from diffmoe.files import sha256
from diffmoe.models.logical import logical_pieces, new_model, weights_digest
from diffmoe.moe.routing import RoutingRule
from diffmoe.parallel.groups import single_process
from diffmoe.training.step import alignment_loss
from programs import losses, run_program, scratch, tiny

CPU = torch.device("cpu")
SIZE, PATCH = 8, 2  # 16 patches
FIT = ["train.repa_width=3", "train.repa_hidden=8", "model.classes=3"]  # with `network` and TINY


class Means(torch.nn.Module):
    """A patch's mean colour, times ``scale``: [B, 3, S / 2, S / 2]."""

    def __init__(self, scale: float):
        super().__init__()
        self.scale = scale

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(images.float(), 2) * self.scale


class Flat(torch.nn.Module):
    """The images themselves, as no patches."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1).float()


def network(folder: Path, module: torch.nn.Module) -> Path:
    path = folder / "network.pt"
    torch.jit.script(module).save(str(path))
    return path


@functools.cache
def pictures() -> Path:
    """24 images of noise in three classes."""
    folder, rng = scratch() / "pictures", np.random.default_rng(0)
    for number in range(24):
        path = folder / f"class{number % 3}" / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)).save(path)
    return folder


def request(out: Path, features: Path | None, **more) -> Request:
    given = {"batch": 5, "samples_per_shard": 8, "workers": 1, "channels": 1, **more}
    return Request(str(pictures()), out, SIZE, features=features, **given)


def encoded(folder: Path, **more):
    wanted = request(folder / "shards", network(folder, Means(1 / 255)), **more)
    return encode(wanted, single_process().world, CPU, print)


# --------------------------------------------------------------------------------------------------
# features in shards


def test_features_lie_beside_their_images_and_come_with_their_batches(tmp_path):
    index = encoded(tmp_path, channels=3)
    assert index == load_index(tmp_path / "shards") and index.features == (16, 3)
    assert index.encoding.features_sha256 == sha256(tmp_path / "network.pt")
    reader = ShardReader(index, seed=0, batch=6, features=True)
    share = Share(batch=6, micro_batch=3, accumulation=2, rank=0, world=1)
    seen = []
    for workers in (0, 1):
        with BatchStream(reader, share, start_step=0, workers=workers) as stream:
            steps = [next(stream) for _ in range(4)]
            batches = [(b.x.clone(), b.features.clone()) for batch in steps[-2:] for b in batch]
        seen.append(batches)
        for x, features in batches:
            pixels = ((x + 1) * 127.5).round()  # patches row after row, means by hand
            parts = pixels.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).mean(dim=(4, 5))
            expected = parts.permute(0, 2, 3, 1).reshape(3, 16, 3) / 255
            assert features.dtype == torch.float16
            torch.testing.assert_close(features.float(), expected, rtol=1e-3, atol=1e-3)
    assert all(torch.equal(*both) for one, two in zip(*seen) for both in zip(one, two))


def test_without_features_nothing_is_written_of_them(tmp_path):
    index = encoded(tmp_path)
    plain = encode(request(tmp_path / "plain", None), single_process().world, CPU, print)
    text = (plain.folder / "index.json").read_text()
    assert "features" not in text and plain.encoding.batch == 0
    values = [ShardReader(one, seed=0).read(range(24))[0] for one in (index, plain)]
    assert np.array_equal(*values) and index.fingerprint != plain.fingerprint


def test_another_network_does_not_resume_and_what_is_none_is_refused(tmp_path):
    wanted = request(tmp_path / "shards", network(tmp_path, Means(1 / 255)))
    encoded(tmp_path)
    for module, words in (
        (Means(0.5), r"features_sha256 \(\w+\) is not that of .*shards \(\w+\)"),
        (Flat(), r"features of 2 images \(\(2, 192\)\) must be \[2, N, d\] or \[2, d, h, w\]"),
    ):
        network(tmp_path, module)
        with pytest.raises(UserError, match=words):
            encode(wanted, single_process().world, CPU, print)
    with pytest.raises(UserError, match=r"features_sha256 \(\) is not that of"):
        encode(request(tmp_path / "shards", None), single_process().world, CPU, print)
    other = tmp_path / "other"
    network(tmp_path, Means(1e9))
    with pytest.raises(UserError, match="has features not finite in float16"):
        encode(request(other, tmp_path / "network.pt"), single_process().world, CPU, print)
    (tmp_path / "network.pt").write_text("no network")
    with pytest.raises(UserError, match=r"is no TorchScript for uint8 images \[B, 3, 8, 8\]"):
        encode(request(other, tmp_path / "network.pt"), single_process().world, CPU, print)
    with pytest.raises(UserError, match=r"features \(.*none.pt\) does not exist"):
        encode(request(other, tmp_path / "none.pt"), single_process().world, CPU, print)


def test_altered_features_are_noticed(tmp_path):
    index = encoded(tmp_path)
    tar = index.folder / index.shards[0].name
    data = bytearray(tar.read_bytes())
    data[data.index(b".features.npy") + 512 + 128] ^= 1
    tar.write_bytes(data)
    reader = ShardReader(index, seed=0, features=True)
    x, y, z = np.empty((24, 1, 8, 8), np.float32), np.empty(24, np.int64), np.empty((24, 16, 3))
    with pytest.raises(UserError, match=r"member \d{8}\.features\.npy: altered"):
        reader.fill(range(24), x, y, z)


def test_data_that_do_not_fit_are_refused(tmp_path):
    words = ["model.input_size=8", "model.channels=1", *FIT]
    index = encoded(tmp_path)
    plain = encode(request(tmp_path / "plain", None), single_process().world, CPU, print)
    for folder, more, reason in (
        (plain.folder, [], r"train.repa_weight \(0.5\) needs features, of which data.shards"),
        (index.folder, ["model.patch=4"], "features of 16 patches; .* has 4 tokens"),
        (index.folder, ["train.repa_width=5"], "features 3 wide; train.repa_width is 5"),
    ):
        config = [*words, f"data.shards={folder}", "train.repa_weight=0.5", *more]
        with pytest.raises(UserError, match=reason):
            open_reader(load_config(None, config))
    off = load_config(None, [*words, f"data.shards={index.folder}"])
    assert open_reader(off).features == ()


# --------------------------------------------------------------------------------------------------
# the loss and the projector


def test_the_loss_is_minus_the_mean_cosine_of_patches():
    draw = torch.Generator().manual_seed(0)
    z, features = (torch.randn(2, 3, 5, generator=draw, dtype=torch.float64) for _ in range(2))
    cosines = []
    for one, two in zip(z.flatten(0, 1).tolist(), features.flatten(0, 1).tolist()):
        inner = sum(a * b for a, b in zip(one, two))
        cosines.append(inner / math.hypot(*one) / math.hypot(*two))
    assert alignment_loss(z, features).item() == pytest.approx(-sum(cosines) / 6, rel=1e-12)
    assert alignment_loss(3 * features, features.half()).item() == pytest.approx(-1, abs=1e-6)
    assert torch.autograd.gradcheck(lambda z: alignment_loss(z, features), z.requires_grad_())


@pytest.mark.parametrize(("depth", "block"), [(28, 8), (24, 8), (12, 4), (2, 1)])
def test_the_block_is_the_papers(depth, block):
    words = [f"model.depth={depth}", "train.repa_weight=0.5"]
    assert projector_of(load_config(None, words)) == (block, (384, 2048, 2048, 768))


def test_only_training_passes_project_and_nothing_else_of_the_model_changes():
    words = "model.input_size=4 model.width=16 model.heads=2 model.depth=5 moe.experts=2".split()
    config = load_config(None, [*words, "train.repa_weight=0.5", "train.repa_block=2", *FIT])
    model, group = new_model(config, 1, single_process()), single_process()
    plain = new_model(load_config(None, [*words, FIT[2]]), 1, group)
    given = torch.randn(3, 4, 4, 4), torch.rand(3), torch.arange(3), RoutingRule("train")
    seen = []
    model.blocks[1].register_forward_hook(lambda block, args, out: seen.append(out[0]))
    output = model(*given)
    first, _, second, _, third = model.projector
    silu = torch.nn.functional.silu
    assert torch.equal(output.projected, third(silu(second(silu(first(seen[0]))))))
    assert model.eval()(*given).projected is None
    own, others = dict(logical_pieces(model)), dict(logical_pieces(plain))
    assert sorted(own.keys() - others.keys())[0] == "projector.0.bias"
    assert all(torch.equal(own[name], others[name]) for name in others)
    assert weights_digest(model) == weights_digest(plain)
    counted = {p.name: p.numel for p in trained_parameters(config, 1)}
    assert counted == {name: p.numel() for name, p in model.named_parameters()}


# --------------------------------------------------------------------------------------------------
# runs


@pytest.mark.full
def test_a_run_aligns_resumes_and_is_sampled_and_exported_without(tmp_path):
    shards = encoded(tmp_path).folder
    more = [f"data.shards={shards}", *FIT, "train.schedule=constant", "train.save_every=2"]
    more += ["train.steps=4", "train.score_every=0"]
    on = [*more, "train.repa_weight=0.5"]
    a, b, c, d = (tmp_path / name for name in "abcd")
    whole = run_program(2, *tiny(a, *on))
    assert [result.returncode for result in whole] == [0, 0], whole[0].stderr
    assert "  repa -" in whole[0].stdout or "  repa 0" in whole[0].stdout
    lines = (a / "metrics.jsonl").read_text().splitlines()
    assert all(-1 <= json.loads(line)["repa_loss"] <= 1 for line in lines)
    kept = "checkpoints/step_00000002"
    for folder, words in ((b, on), (c, more)):  # resumed; and resumed without
        shutil.copytree(a / kept, folder / kept)
        assert run_program(2, *tiny(folder, *words))[0].returncode == 0
    one, two, off = (Checkpoint(f / "checkpoints/step_00000004").tensors(MASTER) for f in (a, b, c))
    assert losses(b)[4] == losses(a)[4] and set(one) == set(two)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert set(one) - set(off) == {
        f"projector.{i}.{n}" for i in (0, 2, 4) for n in ("weight", "bias")
    }
    again = run_program(2, *tiny(c, *on, "train.steps=6"))
    assert again[0].returncode != 0 and "train.repa_weight: 0.0 -> 0.5" in again[0].stderr
    last = str(a / "checkpoints/step_00000004")
    for words in (
        ["sample", "--checkpoint", last, "--out", str(tmp_path / "sheet.png"), "--classes", "1"],
        ["check-checkpoint", last],
        ["export", "--checkpoint", last, "--format", "hf", "--out", str(tmp_path / "hf")],
        ["import", "--hf", str(tmp_path / "hf"), *tiny(d, *on)],
    ):
        assert (said := run_program(1, *words)[0]).returncode == 0, said.stderr
    assert run_program(2, *tiny(d, *on))[0].returncode == 0
