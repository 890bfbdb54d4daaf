"""Checkpoints on disk, without DeepSpeed: what is written, what is read back, and everything that
is refused.
"""

import errno
import json
import pickle
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffmoe.checkpoints import writer
from diffmoe.checkpoints.manifest import MANIFEST
from diffmoe.checkpoints.reader import Checkpoint, Tensors, complete_folders, open_tensors
from diffmoe.checkpoints.tensor_file import (
    CHUNK,
    Corrupt,
    Piece,
    TensorFile,
    whole_piece,
    write_tensors,
)
from diffmoe.commands import check_checkpoint
from diffmoe.config import load_config
from diffmoe.environment import detect
from diffmoe.errors import UserError
from diffmoe.evaluation.decoding import checkpoint_data
from diffmoe.layout import Layout
from diffmoe.parallel.collectives import AgreedError
from diffmoe.parallel.groups import single_process
from diffmoe.training.checkpoint import newest_usable
from diffmoe.training.checkpoint_check import check_files, check_tensors, check_values
from made_checkpoints import (
    assert_rewriting_is_faithful,
    made_whole,
    make_checkpoint,
    rewrite_manifest,
)
from programs import REPOSITORY

SMALL = [
    "model.input_size=8",
    "model.width=32",
    "model.depth=2",
    "model.heads=2",
    "model.classes=10",
    "moe.experts=4",
    "train.ema=[0.9, 0.5]",
]


@pytest.fixture(scope="module")
def made_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    make_checkpoint(folder, load_config(None, SMALL), step=7)
    return folder / "step_00000007"


@pytest.fixture
def folder(made_once, tmp_path) -> Path:
    """A checkpoint of two ranks at EP 2, to be damaged."""
    shutil.copytree(made_once, tmp_path / "step_00000007")
    return tmp_path / "step_00000007"


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


# --------------------------------------------------------------------------------------------------
# one file


def test_a_file_is_an_ordinary_safetensors_file(tmp_path):
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.arange(7),
        "c": torch.tensor(2.5, dtype=torch.float64),
        "d": torch.randn(3, 2).bfloat16(),
        "e": torch.tensor([True, False]),
        "f": torch.randn(4).half(),
        "g": torch.zeros(0, 3),
    }
    pieces = [(whole_piece(name, value), value.dtype) for name, value in tensors.items()]
    written = write_tensors(
        tmp_path / "x", pieces, (value.reshape(-1) for value in tensors.values())
    )
    assert written.bytes == (tmp_path / "x").stat().st_size
    stock = load_file(tmp_path / "x")
    ours = open_tensors([tmp_path / "x"])
    assert list(ours) == list(tensors) and stock.keys() == tensors.keys()
    for name, value in tensors.items():
        for found in (stock[name], ours[name]):
            assert (
                found.dtype == value.dtype
                and found.shape == value.shape
                and torch.equal(found, value)
            ), name
    save_file(tensors, tmp_path / "theirs")
    assert all(
        torch.equal(value, tensors[name])
        for name, value in open_tensors([tmp_path / "theirs"]).items()
    )


def test_ranges_are_read_across_chunks_and_every_chunk_is_checked(tmp_path):
    value = torch.randn(3 * CHUNK // 4 + 100)
    written = write_tensors(tmp_path / "x", [(whole_piece("a", value), torch.float32)], [value])
    assert len(written.crc32) == 4
    file = TensorFile(tmp_path / "x", written)
    for start, stop in (
        (0, 5),
        (CHUNK // 4 - 20, CHUNK // 4 + 20),
        (7, len(value)),
        (len(value) - 1, len(value)),
    ):
        out = torch.empty(stop - start)
        file.read_into("a", start, out)
        assert torch.equal(out, value[start:stop])
    file.check()
    flip(tmp_path / "x", 2 * CHUNK + 5)
    for start in (0, 3 * CHUNK // 4 + 50):
        file.read_into("a", start, torch.empty(10))  # elsewhere
    for read in (lambda: file.read_into("a", CHUNK // 2, torch.empty(10)), file.check):
        with pytest.raises(Corrupt, match=f"checksum is wrong in bytes {2 * CHUNK} to {3 * CHUNK}"):
            read()


def header(tree, length=None) -> bytes:
    text = tree if isinstance(tree, bytes) else json.dumps(tree).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(16)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        header({}, length=10**6),
        header({}, length=2**63),
        header(b"{"),
        header(b"[]"),
        header(b"\xff\xff"),
        header({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}}),
        header({"a": {"dtype": "F32", "shape": [40], "data_offsets": [0, 160]}}),
        header({"a": {"dtype": "F32", "shape": [-4], "data_offsets": [16, 0]}}),
        header({"a": {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}}),
        header({"a": {"dtype": "F32", "shape": [4.0], "data_offsets": [0, 16]}}),
        header({"a": {"dtype": "F32", "shape": "4", "data_offsets": [0, 16]}}),
        header({"a": {"dtype": "object", "shape": [4], "data_offsets": [0, 16]}}),
        header({"a": {"shape": [4], "data_offsets": [0, 16]}}),
        header({"a": [1]}),
        header(
            b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": {"dtype": "F32", '
            b'"shape": [1], "data_offsets": [0, 4]}}'
        ),
        pickle.dumps({"a": 1}, protocol=4),
    ],
)
def test_what_is_no_safetensors_file_is_refused(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(Corrupt, match="x is not an intact safetensors file"):
        open_tensors([tmp_path / "x"])


def test_a_disk_that_cannot_be_read_is_a_damaged_file(tmp_path, monkeypatch):
    save_file({"a": torch.ones(4)}, tmp_path / "x")
    tensors, code = open_tensors([tmp_path / "x"]), errno.EIO

    def fails(*_):
        raise OSError(code, "Input/output error")

    monkeypatch.setattr("builtins.open", fails)
    with pytest.raises(Corrupt, match="x cannot be read"):
        tensors["a"]
    code = errno.ESTALE  # which may pass
    with pytest.raises(OSError, match="error"):
        tensors["a"]


# ----------------------------------------------------------------------------------------------- a
# whole folder


def test_every_tensor_comes_back_bit_for_bit_and_by_ranges(folder):
    checkpoint = Checkpoint(folder)
    assert sorted(checkpoint.kinds()) == [
        "buffers",
        "ema_0.5",
        "ema_0.9",
        "exp_avg",
        "exp_avg_sq",
        "master",
    ]
    assert (checkpoint.step, checkpoint.samples, checkpoint.ranks, checkpoint.pool) == (
        7,
        7 * 16,
        2,
        16,
    )
    assert checkpoint.config() == load_config(None, SMALL)
    cut = 0
    for kind in set(checkpoint.kinds()) - {"buffers"}:
        tensors = checkpoint.tensors(kind)
        for name, value in tensors.items():
            expected = made_whole(kind, name, tensors.shape(name))
            assert torch.equal(value, expected), f"{kind} {name}"
            middle = torch.empty(value.numel() // 2)
            tensors.read_into(name, value.numel() // 4, middle)
            assert torch.equal(middle, expected.reshape(-1)[value.numel() // 4 :][: len(middle)])
            cut += len(tensors._pieces[name]) > 1
    assert cut >= 5, "the ranks' runs of dense elements end inside tensors"
    for which, kind in (
        ("raw", "master"),
        ("ema", "ema_0.9"),
        ("ema:0.5", "ema_0.5"),
        ("ema:0.90", "ema_0.9"),
    ):
        assert torch.equal(
            checkpoint.weights(which)["t_embedder.mlp.0.weight"],
            checkpoint.tensors(kind)["t_embedder.mlp.0.weight"],
        )
    for which in ("ema:0.8", "ema:", "ema:x", "ema:0..9", "ema:.", "model", "master"):
        with pytest.raises(
            UserError, match=rf"weights '{which}' must be one of raw, ema, ema:0.9, ema:0.5 for "
        ):
            checkpoint.weights(which)
    assert [*check_tensors(checkpoint), *check_files(checkpoint), *check_values(checkpoint)] == []


def test_the_stock_library_reads_every_file(folder):
    names = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as handle:
            names |= set(handle.keys())
    assert "blocks.1.mlp.experts.3.fc1_weight" in names and any("[" in name for name in names)


def damage_cases():
    def cut(folder):
        path = folder / "master-00001.safetensors"
        path.write_bytes(path.read_bytes()[:-8])

    def gone(folder):
        (folder / "exp_avg-00001.safetensors").unlink()

    def swapped(folder):  # a whole file, in another's place
        shutil.copy(folder / "ema_0.5-00000.safetensors", folder / "ema_0.9-00000.safetensors")

    def of(change):
        return lambda folder: rewrite_manifest(folder, change)

    def doubled(tree):
        tree["files"]["master-00001.safetensors"]["tensors"]["x_embedder.proj.bias"] = [0, 32]

    def hole(tree):
        record = tree["files"]["master-00001.safetensors"]["tensors"]
        del record["blocks.1.mlp.experts.3.fc2_bias"]

    def unnamed(tree):
        del tree["files"]["exp_avg-00001.safetensors"]

    def cut_run(tree):
        name, span = next(
            (n, s)
            for n, s in tree["files"]["master-00000.safetensors"]["tensors"].items()
            if s[0] == 0 and s[1] < torch.Size(tree["shapes"][n]).numel()
        )
        tree["files"]["master-00000.safetensors"]["tensors"][name] = [0, span[1] - 1]

    def shape(tree):
        tree["shapes"]["final_layer.linear.bias"] = [1, *tree["shapes"]["final_layer.linear.bias"]]

    return {
        "cut": (cut, "master-00001.safetensors must have"),
        "gone": (gone, "exp_avg-00001.safetensors must have .* and has no"),
        "swapped": (swapped, "ema_0.9-00000.safetensors is not what was written: its checksum"),
        "a byte of the data": (
            lambda f: flip(f / "ema_0.5-00001.safetensors", -1),
            "ema_0.5-00001.safetensors is not what was",
        ),
        "a byte of a header": (
            lambda f: flip(f / "master-00000.safetensors", 30),
            "master-00000.safetensors is not what was",
        ),
        "a byte of the manifest": (lambda f: flip(f / MANIFEST, 40), MANIFEST),
        "half a manifest": (
            lambda f: (f / MANIFEST).write_text((f / MANIFEST).read_text()[:500]),
            "is not valid JSON",
        ),
        "a manifest of nothing": (
            lambda f: (f / MANIFEST).write_text("[1]"),
            "checkpoint.json lacks config, ",
        ),
        "a pickle for a manifest": (
            lambda f: (f / MANIFEST).write_bytes(pickle.dumps([1])),
            "is not valid JSON",
        ),
        "a tensor twice": (
            of(doubled),
            "tensor x_embedder.proj.bias is twice there|does not hold the tensors",
        ),
        "a hole": (of(hole), "lacks blocks.1.mlp.experts.3.fc2_bias"),
        "a file that nobody names": (of(unnamed), r"exp_avg of .* (lacks|has \d+ elements of) "),
        "a run cut short": (of(cut_run), r"lacks elements \d+ to \d+ of"),
        "another shape": (
            of(shape),
            r"final_layer.linear.bias with shape \[1, |does not hold the tensors",
        ),
        "no shape": (
            of(lambda tree: tree["shapes"].pop("final_layer.linear.bias")),
            "final_layer.linear.bias, which has no shape",
        ),
        "more elements than bytes": (
            of(
                lambda tree: tree["files"]["master-00000.safetensors"]["tensors"].update(
                    {"final_layer.linear.bias": [0, 10**15]}
                )
            ),
            "cannot hold as many elements",
        ),
    }


@pytest.mark.parametrize("name", damage_cases())
def test_damage_is_found_before_training_goes_on_and_named(folder, name):
    damage, text = damage_cases()[name]
    damage(folder)
    with pytest.raises(
        AgreedError,
        match=rf"no checkpoint in {folder.parent} is usable: step_00000007 is corrupt \(.*{text}",
    ):
        newest_usable(folder.parent, single_process(), print)


@pytest.mark.parametrize(
    "name",
    [
        "../../secret-00000.safetensors",
        "/etc/passwd",
        "..",
        "master-00000.safetensors/../x",
        "master",
        "a/master-00000.safetensors",
        "master-00000.pt",
        "master-00000.safetensors\n",
        ".x-00000.safetensors",
    ],
)
def test_no_name_in_a_manifest_leaves_its_folder(folder, name):
    assert_rewriting_is_faithful(folder)
    (folder.parent.parent / "secret-00000.safetensors").write_bytes(
        (folder / "master-00000.safetensors").read_bytes()
    )
    rewrite_manifest(
        folder,
        lambda tree: tree["files"].update({name: tree["files"].pop("master-00000.safetensors")}),
    )
    with pytest.raises(Corrupt, match="is not the name of a file of a checkpoint"):
        Checkpoint(folder)


class Poison:
    def __reduce__(self):
        return (Path.touch, (Path("poisoned"),))


def test_a_pickle_is_refused_and_not_run(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = folder / "master-00000.safetensors"
    bomb = pickle.dumps(Poison(), protocol=2)
    path.write_bytes(bomb + bytes(path.stat().st_size - len(bomb)))
    (folder / "latest").write_bytes(bomb)
    (folder.parent / "latest").write_bytes(bomb)
    with pytest.raises(Corrupt, match="is not what was written"):
        Checkpoint(folder).tensors("master")["x_embedder.proj.weight"]
    assert not (tmp_path / "poisoned").exists()


@pytest.mark.parametrize("field", ["shards", "index"])
@pytest.mark.parametrize(
    "address",
    ["pipe:touch poisoned; cat {name}.tar", "gs://x';touch poisoned;'/a.tar", "s3://a/b.tar"],
)
def test_no_address_in_a_configuration_runs_a_program(
    folder, tmp_path, monkeypatch, field, address
):
    """Sampling latents looks for the scale of the training data, where the checkpoint says."""
    monkeypatch.chdir(tmp_path)
    rewrite_manifest(folder, lambda tree: tree["config"]["data"].update({field: address}))
    config = Checkpoint(folder).config()
    with pytest.raises(
        UserError,
        match=rf"data.{field} \({re.escape(address)}\) would start a program, which no checkpoint "
        rf"may",
    ):
        checkpoint_data(config, 0.18, None)
    assert checkpoint_data(config, 0.18, 0.0) is None
    assert not (tmp_path / "poisoned").exists()


def test_another_format_is_refused_and_not_passed_over(folder, tmp_path):
    make_checkpoint(tmp_path, load_config(None, SMALL), step=3)
    tree = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(
        json.dumps(
            {"format": 1, **{key: tree[key] for key in ("step", "pool", "config")}, "files": {}}
        )
    )
    with pytest.raises(UserError, match=r"checkpoint.json has format 1; this program reads 2"):
        Checkpoint(folder)
    with pytest.raises(AgreedError, match="has format 1"):
        newest_usable(tmp_path, single_process(), print)


def test_the_newest_that_is_whole_is_used_and_said(tmp_path):
    config = load_config(None, SMALL)
    assert newest_usable(tmp_path / "nowhere", single_process(), print) is None
    for step in (4, 8, 12):
        make_checkpoint(tmp_path, config, step)
    (tmp_path / "latest").write_text("step_00000004")  # nobody reads it
    (tmp_path / "step_00000099").mkdir()
    (tmp_path / ".step_00000098.partial").mkdir()
    said = []
    assert [path.name for path in complete_folders(tmp_path)] == [
        "step_00000004",
        "step_00000008",
        "step_00000012",
    ]
    assert newest_usable(tmp_path, single_process(), said.append).step == 12 and said == []
    flip(tmp_path / "step_00000012/ema_0.5-00001.safetensors", 5000)
    (tmp_path / "step_00000008/master-00001.safetensors").unlink()
    assert newest_usable(tmp_path, single_process(), said.append).step == 4
    assert (
        "step_00000012 is corrupt (" in said[0]
        and "ema_0.5-00001" in said[0]
        and said[0].endswith("falling back to step_00000008")
    )
    assert (
        "step_00000008 is corrupt (" in said[1]
        and "master-00001" in said[1]
        and said[1].endswith("falling back to step_00000004")
    )


@pytest.mark.parametrize(
    ("keep", "every", "left"),
    [(3, 0, [30, 40, 50]), (1, 0, [50]), (1, 20, [20, 40, 50]), (2, 30, [30, 40, 50])],
)
def test_which_checkpoints_stay(tmp_path, keep, every, left):
    for step in (0, 10, 20, 30, 40, 50, 60):
        (tmp_path / f"step_{step:08d}").mkdir()
        (tmp_path / f"step_{step:08d}" / MANIFEST).touch()
    writer.prune(tmp_path, 50, keep, every)
    assert [int(path.name[5:]) for path in sorted(tmp_path.iterdir())] == [*left, 60], (
        "60 is of a run that went back"
    )


def test_values_that_cannot_be_are_named(tmp_path):
    config = load_config(None, SMALL)
    partial = writer.prepare(tmp_path, 1)
    names = ["x_embedder.proj.bias", "final_layer.linear.bias"]
    bad = {kind: {name: torch.ones(3) for name in names} for kind in ("master", "exp_avg_sq")}
    bad["master"][names[0]][1] = float("nan")
    bad["exp_avg_sq"][names[1]][2] = -1.0
    writer.write_part(
        partial, 0, {kind: writer.whole_tensors(tensors) for kind, tensors in bad.items()}
    )
    written = writer.join_parts(partial, 1, lambda: False)
    layout = Layout(1, 1, 1, 1, 1, 1, 1)
    writer.commit(partial, tmp_path / "step_00000001", written, config, layout, {})
    first, second = check_values(Checkpoint(tmp_path / "step_00000001"))
    assert "has 1 values in x_embedder.proj.bias that are not finite" in first and first.startswith(
        "master of "
    )
    assert "has 1 negative values in final_layer.linear.bias" in second


def test_a_tensors_pieces_may_not_overlap():
    file = TensorFile(Path("x"))
    for spans in ([(0, 4), (3, 6)], [(0, 6), (0, 6)], [(0, 6), (2, 3)]):
        with pytest.raises(Corrupt, match="tensor a is twice there"):
            Tensors([(Piece("a", (6,), *span), file) for span in spans], "here")


# --------------------------------------------------------------------------------------------------
# memory


@pytest.mark.full
def test_memory_does_not_grow_with_the_checkpoint(tmp_path):
    """134 MB written at simulated EP 8 and read at EP 1, tensor by tensor; a process of its own,
    for a clean mark.
    """
    program = f"""
import sys
sys.path.insert(0, {str(REPOSITORY / "tests")!r})
from pathlib import Path
from made_checkpoints import measured
sizes = ["model.width=192", "model.depth=4", "model.heads=4", "moe.experts=16"]
print(*measured(Path({str(tmp_path)!r}), 8, sizes))
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, cwd=REPOSITORY
    )
    assert result.returncode == 0, result.stderr
    size, writing, reading = map(int, result.stdout.split())
    assert size > 130e6
    assert writing < 40e6 and reading < 40e6, (size, writing, reading)


# --------------------------------------------------------------------------------------------------
# the verb


def check(capsys, *arguments) -> tuple[int, str]:
    code = check_checkpoint.main([str(argument) for argument in arguments], detect())
    return code, capsys.readouterr().out


def test_the_verb_names_file_and_tensor(made_once, tmp_path, capsys):
    for step in (3, 5, 7):
        shutil.copytree(made_once, tmp_path / f"checkpoints/step_{step:08d}")
    newest = tmp_path / "checkpoints/step_00000007"
    code, text = check(capsys, tmp_path, "--values")
    assert code == 0 and [line[:6] for line in text.splitlines()] == ["intact"] * 3
    assert re.search(
        r"step_00000007: step 7, 11 files, 0.00 GB, master, ema_0.9, ema_0.5, exp_avg, exp_avg_sq, "
        r"buffers$",
        text,
    )
    flip(newest / "ema_0.5-00001.safetensors", 4000)
    rewrite_manifest(
        tmp_path / "checkpoints/step_00000005",
        lambda tree: tree["files"].pop("exp_avg-00001.safetensors"),
    )
    code, text = check(capsys, tmp_path)
    assert code == 1 and [line[:8] for line in text.splitlines()].count("intact  ") == 1
    assert (
        "step_00000007/ema_0.5-00001.safetensors is not what was written: its checksum is wrong"
        in text
    )
    assert "corrupt  exp_avg of" in text and "step_00000005" in text
    assert check(capsys, newest.parent / "step_00000003")[0] == 0
    with pytest.raises(UserError, match=r"checkpoint \(.*nowhere\) does not exist"):
        check(capsys, tmp_path / "nowhere")
    with pytest.raises(UserError, match="checkpoint .* is a file, not a folder"):
        check(capsys, newest / "checkpoint.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no complete checkpoint in "):
        check(capsys, tmp_path / "empty")
