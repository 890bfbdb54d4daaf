"""The Python entry: what is loaded from where, what a call returns, and that it is what the command
line makes.
"""

import copy
import dataclasses
import json
import pickle
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image

import diffmoe
from diffmoe import DiffMoEPipeline, DiT, pipeline
from diffmoe.checkpoints.reader import Checkpoint
from diffmoe.commands.exchange import import_hf
from diffmoe.config import config_from_tree, config_to_tree, load_config, override
from diffmoe.data.shards import ShardMeta, write_shards
from diffmoe.errors import UserError
from diffmoe.evaluation.features import to_uint8
from diffmoe.evaluation.plots import GRID_GAP
from diffmoe.huggingface import export_folder, folder_config, model_card, write_folder
from diffmoe.layout import resolve_layout
from diffmoe.models.logical import initialize, logical_tensors
from diffmoe.models.pretrained import Pretrained
from diffmoe.moe.routing import RoutingRule
from diffmoe.strict_yaml import merge
from programs import run_cases
from reference_models import DATA

KEPT = DATA / "checkpoint_2026_11"
NAMES = ("boot", "bag", "coat")
CALL = {"num_images": 5, "num_inference_steps": 2, "generator_seed": 3}


def made(family="diffmoe", channels=1, names=NAMES, **model) -> Pretrained:
    """A new model, as if it had been opened."""
    config = config_from_tree(
        {
            "model": {
                "family": family,
                "input_size": 8,
                "channels": channels,
                "width": 16,
                "depth": 2,
                "heads": 2,
                "classes": 3,
                "learn_sigma": False,
                **model,
            },
            "moe": {"experts": 4, "pool": 1},
            "sample": {"steps": 2},
        }
    )
    net = DiT(config.model, config.moe)
    initialize(net, 0)
    torch.manual_seed(0)
    for tensor in logical_tensors(net):  # a new model's output is zero
        tensor.parameter.data.add_(0.05 * torch.randn(tensor.parameter.shape))
    pieces = {
        name: piece
        for tensor in logical_tensors(net)
        for name, piece in tensor.pieces(tensor.parameter.data)
    }
    buffers = {name: value for name, value in net.named_buffers() if ".thresholds." in name}
    return Pretrained(config, {**pieces, **buffers}, "ema", 7, 1, names, None, Path("nowhere"))


def test_a_folder_names_no_place_of_the_machine_that_trained(tmp_path):
    (tmp_path / "guide").mkdir()
    private = {
        "run": {"folder": "SECRET"},
        "data": {"shards": "SECRET", "validation": "SECRET", "cache": "SECRET"},
        "train": {
            "mirror": "s3://SECRET",
            "mirror_mb_s": 5.0,
            "validate_every": 1,
            "score_every": 1,
        },
        "score": {"reference": "SECRET", "extractor": "SECRET", "vae": "SECRET"},
        "sample": {"guide": str(tmp_path / "guide"), "pair": "owner/late"},
    }
    model = made()
    config = config_from_tree(merge(config_to_tree(model.config), private))
    write_folder(dataclasses.replace(model, config=config), tmp_path / "out")
    written = (tmp_path / "out" / "config.json").read_text()
    assert "SECRET" not in written and str(tmp_path) not in written and "owner/late" in written
    assert DiffMoEPipeline.from_pretrained(tmp_path / "out").config.sample.guide is None
    config = folder_config(tmp_path / "out", None, ["train.repa_weight=0.5", "data.flip=false"])
    assert config.train.repa_weight == 0.5, "whose projector is new"


def test_the_card_says_optimizer_and_losses():
    config = load_config(None, ["train.optimizer=muon", "train.dispersive_weight=0.5"])
    card = model_card(config, 1, "ema", 1, ())
    assert "Muon and AdamW, lr" in card and "dispersive loss times 0.5" in card
    card = model_card(load_config(None, []), 1, "ema", 1, ())
    assert "| AdamW, lr" in card and "loss times" not in card


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    """An AutoencoderKL of random weights, 2 pixels a latent."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        scaling_factor=0.5,
        shift_factor=0.25,
        sample_size=16,
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_makes_what_the_command_line_makes(tmp_path, dtype):
    rounded = dtype == torch.bfloat16
    [[result]] = run_cases(
        1,
        [
            [
                "sample",
                "--checkpoint",
                KEPT,
                "--classes",
                "3,7",
                "--count",
                "5",
                "--seed",
                "3",
                "--cfg",
                "2",
                "--out",
                tmp_path / "theirs",
                *["--dtype", "bf16"][: 2 * rounded],
                "sample.steps=2",
                "sample.columns=3",
            ]
        ],
    )
    assert result.returncode == 0, result
    with Image.open(tmp_path / "theirs.png") as sheet:  # two classes: two columns
        assert sheet.size == (2 * (8 * 7 + GRID_GAP) + GRID_GAP, 3 * (8 * 7 + GRID_GAP) + GRID_GAP)
    pipe = DiffMoEPipeline.from_pretrained(KEPT, torch_dtype=dtype)
    ours = pipe([3, 7], guidance_scale=2, **CALL)
    with np.load(tmp_path / "theirs.npz") as theirs:
        assert ours.labels == theirs["labels"].tolist() == [3, 7, 3, 7, 3]
        np.testing.assert_allclose(ours.samples.numpy(), theirs["images"], atol=1e-5)
        assert np.abs(ours.arrays.astype(int) - theirs["arr_0"]).max() <= 1
        exact = pipe.to(torch.float32)([3, 7], guidance_scale=2, **CALL).samples
        assert ((exact - ours.samples).abs().max() > 1e-4) == rounded
    assert [image.size for image in ours.images] == [(8, 8)] * 5 and isinstance(
        ours.images[0], Image.Image
    )
    assert np.array_equal(np.stack([np.asarray(image) for image in ours.images]), ours.arrays)


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_a_folder_and_what_it_saves_sample_the_same(tmp_path, weights):
    first = DiffMoEPipeline.from_pretrained(KEPT, weights=weights)
    export_folder(Checkpoint(KEPT), tmp_path / "exported", weights)
    first.save_pretrained(tmp_path / "deep" / "saved")
    samples = [
        pipe(**CALL).samples
        for pipe in (
            first,
            *(
                DiffMoEPipeline.from_pretrained(tmp_path / name)
                for name in ("exported", "deep/saved")
            ),
        )
    ]
    assert torch.equal(samples[0], samples[1]) and torch.equal(samples[0], samples[2])
    for name in ("config.json", "README.md", "model.safetensors"):
        assert (tmp_path / "exported" / name).read_bytes() == (
            tmp_path / "deep" / "saved" / name
        ).read_bytes()
    with pytest.raises(UserError, match="saved already exists"):
        first.save_pretrained(tmp_path / "deep" / "saved")
    with pytest.raises(
        UserError, match=rf"weights \(ema:0.5\) are not in .*, which holds {weights}$"
    ):
        DiffMoEPipeline.from_pretrained(tmp_path / "exported", weights="ema:0.5")


def test_what_was_saved_is_imported(tmp_path):
    DiffMoEPipeline(made()).save_pretrained(tmp_path / "saved")
    [[result]] = run_cases(
        1, [["import", "--hf", tmp_path / "saved", f"run.folder={tmp_path / 'run'}"]]
    )
    assert result.returncode == 0, result
    pipe = DiffMoEPipeline.from_pretrained(tmp_path / "run")
    assert pipe.class_names == NAMES
    assert torch.equal(pipe(**CALL).samples, DiffMoEPipeline(made())(**CALL).samples)


@pytest.mark.parametrize(
    ("classes", "labels"),
    [
        (None, [0, 1, 2]),
        (2, [2]),
        ("Bag", [1]),
        (["coat", 0], [2, 0]),
        ((1, 1), [1, 1]),
        (range(2), [0, 1]),
        ("2", [2]),
        (np.int64(2), [2]),
        (torch.tensor(2), [2]),
        (np.array([0, 2]), [0, 2]),
        (torch.tensor([1]), [1]),
    ],
)
def test_classes_by_number_and_by_name(classes, labels):
    assert DiffMoEPipeline(made())(classes).labels == labels


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (
            {"classes": "shoe"},
            r"classes \('shoe'\): no class is named 'shoe'; the 3 classes are 0 ",
        ),
        (
            {"classes": [3]},
            r"classes \(\[3\]\) must be numbers from 0 to 2 or names \(model.classes = 3\)",
        ),
        ({"classes": []}, r"classes \(\[\]\) must be"),
        ({"num_images": 0}, r"num_images \(0\) must be at least 1"),
        ({"num_inference_steps": 0}, r"sample.steps \(0\)"),
        ({"capacity": 5}, r"sample.capacity \(5.0\) must be above 0 and at most"),
        ({"capacity": 1.0}, r"sample.capacity \(1.0\) needs histograms"),
        ({"sampler": "ddim"}, r"sample.sampler \(ddim\)"),
        ({"routing": "train"}, "sample.routing = 'train' must be one of"),
        ({"output_type": "np"}, r"output_type \(np\)"),
        ({"generator_seed": -1}, r"run.seed \(-1\)"),
        ({"generator_seed": 1.5}, "run.seed = 1.5 must be an integer"),
        ({"generator_seed": "3"}, "run.seed = '3' must be an integer"),
        ({"classes": [1.9]}, r"classes \(\[1.9\]\) must be"),
        ({"classes": True}, "must be numbers"),
        ({"classes": [None]}, "must be numbers"),
        ({"classes": [[0, 1]]}, "must be numbers"),
        ({"classes": float("nan")}, "must be numbers"),
        ({"num_images": 2.0}, r"num_images \(2.0\)"),
        ({"num_inference_steps": "2"}, "sample.steps"),
        ({"guidance_scale": "two"}, "sample.cfg"),
        ({"guidance_scale": float("nan")}, "sample.cfg"),
        ({"batch_size": 2.5}, "sample.batch"),
        ({"capacity": "0.5"}, "sample.capacity"),
    ],
)
def test_a_bad_call_is_one_line(arguments, complaint):
    with pytest.raises(UserError, match=complaint):
        DiffMoEPipeline(made())(**arguments)


def test_a_call_leaves_the_next_one_alone():
    pipe = DiffMoEPipeline(made())
    plain = pipe(**CALL).samples
    guided = pipe(guidance_scale=3, **CALL).samples
    other = pipe(**{**CALL, "generator_seed": np.int64(4)}).samples
    assert (
        torch.equal(pipe(**CALL).samples, plain)
        and not torch.equal(plain, guided)
        and not torch.equal(plain, other)
    )
    assert torch.allclose(pipe(batch_size=2, **CALL).samples, plain, atol=1e-5)


def test_routing_moves_the_capacity_used():
    pipe = DiffMoEPipeline(made())
    static = pipe(routing="static", **CALL)
    assert static.capacity == pytest.approx(
        1.0
    ) and static.capacity_used.by_layer() == pytest.approx([1.0])
    assert pipe(**CALL).capacity != pytest.approx(1.0)
    dense = DiffMoEPipeline(made("dense"))(**CALL)
    assert dense.capacity is None and dense.capacity_used is None and len(dense.images) == 5


def test_latents_are_decoded(tmp_path, vae_folder, monkeypatch, capsys):
    """By the VAE in the folder, with the scale and shift that it says; else by the VAE's own."""
    write_folder(made(channels=4), tmp_path / "latent")
    bare = DiffMoEPipeline.from_pretrained(tmp_path / "latent")
    with pytest.raises(UserError, match="latents of 4 channels need a VAE"):
        bare(**CALL)
    latents = bare(output_type="latent", **CALL)
    assert (
        latents.images == [] and latents.arrays.size == 0 and latents.samples.shape == (5, 4, 8, 8)
    )
    pipe = DiffMoEPipeline.from_pretrained(tmp_path / "latent", vae=vae_folder)
    assert pipe.latents == (0.5, 0.25)
    out = pipe(batch_size=2, **CALL)
    decoded = to_uint8(pipe.vae.model.decode(out.samples / 0.5 + 0.25).sample)
    assert (torch.from_numpy(out.arrays).permute(0, 3, 1, 2).int() - decoded.int()).abs().max() <= 1
    assert out.images[0].size == (16, 16)
    pipe = DiffMoEPipeline.from_pretrained(
        tmp_path / "latent", vae=vae_folder, latents=(2.0, 0.0)
    )  # of other training data
    with pytest.raises(UserError, match=r"latents \(0.5\) must be two numbers"):
        DiffMoEPipeline.from_pretrained(tmp_path / "latent", latents=0.5)
    assert DiffMoEPipeline.from_pretrained(tmp_path / "latent", latents=(2, 1)).latents == (
        2.0,
        1.0,
    )
    pipe.save_pretrained(tmp_path / "whole")
    assert json.loads((tmp_path / "whole/config.json").read_text())["latents"] == {
        "scale": 2.0,
        "shift": 0.0,
    }
    whole = DiffMoEPipeline.from_pretrained(tmp_path / "whole")
    assert whole.latents == (2.0, 0.0) and np.array_equal(whole(**CALL).arrays, pipe(**CALL).arrays)
    numbers = (1.0, 2.0, 3.0, 4.0), (0.0, 0.5, 0.0, 1.0)
    write_folder(dataclasses.replace(made(channels=4), latents=numbers), tmp_path / "channels")
    overrides = [f"run.folder={tmp_path / 'run'}", f"data.shards={tmp_path}"]  # no index there
    config = folder_config(tmp_path / "channels", None, overrides)
    import_hf(tmp_path / "channels", config, resolve_layout(config, 1))
    options = "--latent-scale=1.0,2.0,3.0,4.0 --latent-shift=0.0,0.5,0.0,1.0"
    assert options in capsys.readouterr().out
    each = DiffMoEPipeline.from_pretrained(tmp_path / "channels", vae=vae_folder)
    assert each.latents == numbers
    z = out.samples / torch.tensor(numbers[0]).view(-1, 1, 1)
    z = z + torch.tensor(numbers[1]).view(-1, 1, 1)
    decoded = to_uint8(each.vae.model.decode(z).sample).permute(0, 2, 3, 1)
    assert (torch.from_numpy(each(**CALL).arrays).int() - decoded.int()).abs().max() <= 1
    data = write_shards(
        [("0", np.zeros((8, 8, 8), np.float16), 0)],
        tmp_path / "data",
        samples_per_shard=1,
        meta=ShardMeta("moments", 3, scale=0.2, mean=1.5),
    )
    run = dataclasses.replace(
        made(channels=4), config=override(made(channels=4).config, [f"data.shards={data.folder}"])
    )
    monkeypatch.setattr(pipeline, "open_pretrained", lambda *_: run)
    DiffMoEPipeline.from_pretrained("runs/l").save_pretrained(tmp_path / "shared")
    kept = json.loads((tmp_path / "shared/config.json").read_text())
    assert kept["latents"] == {"scale": 0.2, "shift": 1.5}
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"model.channels \(1\) are pixels"):
        DiffMoEPipeline.from_pretrained(KEPT, vae=vae_folder)
    write_folder(made(channels=16), tmp_path / "wide")
    with pytest.raises(UserError, match="has 4 latent channels, model.channels is 16"):
        DiffMoEPipeline.from_pretrained(tmp_path / "wide", vae=vae_folder)


def test_to_moves_weights_and_leaves_thresholds():
    pipe = DiffMoEPipeline(made())
    exact = pipe(**CALL).samples
    assert (
        pipe.to("cpu", torch.bfloat16) is pipe
        and pipe.dtype == torch.bfloat16
        and pipe.device.type == "cpu"
    )
    assert all(value.dtype != torch.bfloat16 for value in pipe.transformer.buffers())
    rounded = pipe(**CALL).samples
    assert (
        rounded.dtype == torch.float32
        and 0 < (rounded - exact).abs().mean() < 0.1 * exact.abs().mean()
    )
    other = DiffMoEPipeline(made()).to(torch.bfloat16)
    assert torch.equal(other(**CALL).samples, rounded) and all(
        value.dtype != torch.bfloat16 for value in other.transformer.buffers()
    )
    with pytest.raises(UserError, match=r"dtype \(torch.float16\) must be"):
        other.to(torch.float16)


def test_weights_are_loaded_as_the_run_samples(tmp_path):
    opened = made()
    config = override(opened.config, ["sample.dtype=bf16"])
    write_folder(dataclasses.replace(opened, config=config), tmp_path / "rounded")
    load = DiffMoEPipeline.from_pretrained
    assert load(tmp_path / "rounded").dtype == torch.bfloat16
    assert load(tmp_path / "rounded", torch_dtype=torch.float32).dtype == torch.float32


def test_it_is_copied_and_pickled():
    """Also from a checkpoint, whose files do not stay open."""
    pipe = DiffMoEPipeline.from_pretrained(KEPT)
    for other in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        assert torch.equal(other(**CALL).samples, pipe(**CALL).samples)
    assert "diffmoe, ema weights of step 4, 10 classes" in repr(pipe)


def test_a_repository_of_the_hub(tmp_path, monkeypatch):
    asked, sent = [], {}

    def snapshot_download(name, revision, allow_patterns):
        asked.append((name, revision))
        if name == "nobody/nothing":
            raise OSError("404 Client Error\nRepository Not Found")
        return str(sent["folder"])

    class HfApi:
        def __init__(self, token):
            assert token == "t"

        def create_repo(self, repo_id, private, exist_ok):
            assert (repo_id, private, exist_ok) == ("me/model", True, True)

        def upload_folder(self, repo_id, folder_path, commit_message):
            shutil.copytree(folder_path, tmp_path / "hub")
            sent["folder"] = tmp_path / "hub"
            return "address"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "HfApi", HfApi)
    pipe = DiffMoEPipeline(made())
    assert pipe.push_to_hub("me/model", private=True, token="t") == "address"
    again = DiffMoEPipeline.from_pretrained("me/model", revision="main")
    assert torch.equal(again(**CALL).samples, pipe(**CALL).samples) and asked == [
        ("me/model", "main")
    ]
    with pytest.raises(
        UserError,
        match="no folder nobody/nothing here, and no repository of the hub gives it: 404 Client "
        "Error$",
    ):
        DiffMoEPipeline.from_pretrained("nobody/nothing")
    (tmp_path / "runs").mkdir()
    (tmp_path / "model.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    asked.clear()
    for name, complaint in {
        "no such folder": "is no folder here, and no id of the hub",
        "runs/demoo": r"model \(runs/demoo\) does not exist$",  # where runs/ exists
        "./runs/demo": "does not exist$",
        "~/demo": "does not exist$",
        "gone/demo/checkpoints": "does not exist$",
        str(tmp_path / "gone"): "does not exist$",
        "model.safetensors": "is a file, not a folder$",
    }.items():
        with pytest.raises(UserError, match=complaint):
            DiffMoEPipeline.from_pretrained(name)
    assert asked == []
    with pytest.raises(UserError, match=r"revision \(v1\) goes with a repository"):
        DiffMoEPipeline.from_pretrained(sent["folder"], revision="v1")


def test_a_damaged_folder_is_refused(tmp_path):
    write_folder(made(), tmp_path / "model")
    description = json.loads((tmp_path / "model/config.json").read_text())
    description["config"]["model"]["depth"] = 4
    (tmp_path / "model/config.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match=r"model lacks blocks.2"):
        DiffMoEPipeline.from_pretrained(tmp_path / "model")
    description["config"]["model"] |= {"depth": 2, "family": "tc"}
    (tmp_path / "model/config.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match=r"unexpected tensors .* for model.family \(tc\)"):
        DiffMoEPipeline.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "is not a folder of a DiffMoE model"),
        ("[" * 100_000, "is not a folder of a DiffMoE model"),
        ("[]", "no section config"),
        ('{"model_type": "bert"}', "no section config"),
        ({"latents": {"scale": 1}}, "latents .* must hold the numbers"),
        ({"latents": "a"}, "latents .* must hold"),
        ({"latents": 5}, "latents"),
        ({"id2label": 5}, r"id2label \(5\) must name classes 0 to 2"),
        ({"step": "x"}, r"step \('x'\) must be an integer"),
        ({"weights": 3}, r"weights \(3\) must be a text"),
        ({"pool": None}, "pool"),
    ],
)
def test_a_description_from_elsewhere_is_one_line(tmp_path, text, complaint):
    write_folder(made(), tmp_path / "model")
    path = tmp_path / "model/config.json"
    path.write_text(
        text if isinstance(text, str) else json.dumps({**json.loads(path.read_text()), **text})
    )
    with pytest.raises(UserError, match=complaint):
        DiT.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize(
    "index",
    [
        b'{"weight_map": ["a"]}',
        b"\xff\xfe",
        b"{}",
        b"[]",
        json.dumps({"weight_map": {"a": "x" * 5000}}).encode(),
    ],
)
def test_a_broken_index_is_one_line(tmp_path, index):
    write_folder(made(), tmp_path / "model")
    (tmp_path / "model/model.safetensors.index.json").write_bytes(index)
    with pytest.raises(UserError, match="does not say which files hold|lacks"):
        DiT.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("family", ["dense", "tc", "diffmoe"])
def test_the_model_needs_no_routing_rule(tmp_path, family):
    write_folder(made(family), tmp_path / "model")
    model = DiT.from_pretrained(tmp_path / "model")
    x, t, y = torch.randn(3, 1, 8, 8), torch.rand(3), torch.tensor([0, 2, 1])
    together = model(x, t, y).prediction
    alone = torch.cat(
        [model(x[i : i + 1], t[i : i + 1], y[i : i + 1]).prediction for i in range(3)]
    )
    assert together.shape == x.shape and torch.allclose(together, alone, atol=1e-5)
    assert (
        torch.equal(together, model(x, t, y, RoutingRule("token")).prediction)
        and not model.training
    )


def test_the_package_names_what_users_import():
    assert diffmoe.DiffMoEPipeline is DiffMoEPipeline and diffmoe.__all__ == [
        "DiT",
        "DiffMoEPipeline",
    ]
    with pytest.raises(AttributeError, match="no attribute 'Pipeline'"):
        diffmoe.Pipeline
