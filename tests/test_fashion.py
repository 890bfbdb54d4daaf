"""Fashion-MNIST: idx files to images to shards, and what `make fashion` says where it cannot."""

import gzip
import os
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from diffmoe.data.fashion import CLASS_NAMES, main, read_idx, write_images
from diffmoe.data.reader import ShardReader
from diffmoe.data.shards import load_index
from diffmoe.errors import UserError
from programs import REPOSITORY

COUNTS = {"train": 30, "t10k": 20}


def write_idx(path, values):
    head = struct.pack(">BBBB", 0, 0, 8, values.ndim) + struct.pack(
        f">{values.ndim}I", *values.shape
    )
    path.write_bytes(gzip.compress(head + values.tobytes()))


def made(part):
    """The images [n, 28, 28], each its own grey ramp, and labels [n] of a part."""
    numbers = np.arange(COUNTS[part])
    ramps = (5 * numbers)[:, None, None] + np.arange(28)[:, None] + np.arange(28)
    return ramps.astype(np.uint8), (numbers * 7 % 10).astype(np.uint8)


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "idx"
    folder.mkdir()
    for part in COUNTS:
        images, labels = made(part)
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", labels)
    return folder


def fashion(tmp_path, *, tools="", **variables):
    """scripts/fashion.sh with these variables, and `tools` as its PATH where that is given."""
    environment = {
        **{n: v for n, v in os.environ.items() if not n.startswith("FASHION")},
        "PATH": str(tools) or f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "DS_ACCELERATOR": "cpu",
        **variables,
    }
    command = [shutil.which("bash"), str(REPOSITORY / "scripts/fashion.sh"), str(tmp_path / "out")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_images_and_labels_come_back_in_the_data_sets_own_classes(source, tmp_path):
    assert write_images(source, tmp_path / "images") == {"train": 30, "test": 20}
    for part, stem in (("train", "train"), ("test", "t10k")):
        images, labels = made(stem)
        for number, (image, label) in enumerate(zip(images, labels)):
            path = tmp_path / "images" / part / str(label) / f"{number:05d}.png"
            assert np.array_equal(np.asarray(Image.open(path)), image)
        assert len(list((tmp_path / "images" / part).rglob("*.png"))) == len(images)
    names = (tmp_path / "images/class_names.txt").read_text().splitlines()
    assert names == list(CLASS_NAMES) and names[1] == "trouser" and len(names) == 10


def test_written_again_images_are_the_same_to_encode(source, tmp_path):
    """Which refuses to resume with a source whose files have other sizes or times."""
    for name in ("one", "two"):
        write_images(source, tmp_path / name)
    stamps = [
        {p.relative_to(tmp_path / name): (p.stat().st_mtime, p.read_bytes())
         for p in (tmp_path / name).rglob("*.png")}
        for name in ("one", "two")
    ]  # fmt: skip
    assert stamps[0] == stamps[1] and len(stamps[0]) == 50


def cut(path):
    path.write_bytes(path.read_bytes()[:40])


def fewer_labels(path):
    write_idx(path.parent / "train-labels-idx1-ubyte.gz", made("train")[1][:-1])


def eleventh_class(path):
    write_idx(path.parent / "t10k-labels-idx1-ubyte.gz", np.full(20, 10, np.uint8))


def one_value_more(path):
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + b"\0"))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda path: path.unlink(), r"train-images-idx3-ubyte.gz cannot be read as gzip: No such"),
        (cut, "train-images-idx3-ubyte.gz cannot be read as gzip: "),
        (lambda path: path.write_bytes(b"x" * 99), "cannot be read as gzip: Not a gzipped file"),
        (
            lambda path: path.write_bytes(gzip.compress(b"")),
            "3-dimensional bytes: it begins with nothing, not 00 00 08 03",
        ),
        (
            lambda path: write_idx(path, np.zeros(30, np.uint8)),
            "begins with 00 00 08 01, not 00 00 08 03",
        ),
        (one_value_more, r"says \(30, 28, 28\) and holds 23521 values"),
        (fewer_labels, "train-images-idx3-ubyte.gz holds 30 images and .* 29 labels"),
        (eleventh_class, "t10k-labels-idx1-ubyte.gz: label 10 must be at most 9"),
    ],
)
def test_files_that_are_not_fashion_mnist(source, tmp_path, capsys, damage, told):
    damage(source / "train-images-idx3-ubyte.gz")
    with pytest.raises(UserError, match=told):
        write_images(source, tmp_path / "images")
    assert not (tmp_path / "images").exists(), "nothing is written before all is read"
    assert main([str(source), str(tmp_path / "images")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1


def test_a_folder_that_is_there_is_left_alone(source, tmp_path):
    (tmp_path / "images/train/3").mkdir(parents=True)
    with pytest.raises(UserError, match="must not hold .*train/3 yet"):
        write_images(source, tmp_path / "images")


def test_sizes_are_big_endian(tmp_path):
    write_idx(tmp_path / "a.gz", np.arange(300, dtype=np.uint8).reshape(300, 1, 1))
    assert read_idx(tmp_path / "a.gz", 3).shape == (300, 1, 1)


@pytest.mark.full
def test_make_fashion_from_files_that_are_there(source, tmp_path):
    """At the study's size a value is the mean of four, which Pillow rounds up in each direction."""
    run = fashion(tmp_path, FASHION=str(source), FASHION_SIZE="14")
    assert run.returncode == 0, run.stderr
    assert "0 t-shirt, 1 trouser" in run.stdout and "9 ankle boot" in run.stdout
    index = load_index(tmp_path / "out/test")
    assert (index.shape, index.class_names) == ((1, 14, 14), CLASS_NAMES)
    x, y = ShardReader(index, seed=0).read(range(20))
    images, labels = made("t10k")
    means = images.reshape(20, 14, 2, 14, 2).mean(axis=(2, 4))
    by_level = np.argsort(means[:, 0, 0])
    got = np.argsort(x[:, 0, 0, 0])
    assert np.rint((x[got, 0] + 1) * 127.5 - means[by_level]).max() <= 1
    assert np.rint((x[got, 0] + 1) * 127.5 - means[by_level]).min() >= 0
    assert y[got].tolist() == labels[by_level].tolist()
    again = fashion(tmp_path, FASHION="/nowhere")
    assert again.returncode == 0 and again.stdout.endswith("are there\n"), again.stderr


@pytest.mark.full
def test_make_fashion_fetches_and_unpacks_the_package(source, tmp_path):
    """With an apt-get and a dpkg of the test's own: no network, and any distribution."""
    tools = tmp_path / "tools"
    tools.mkdir()
    script = '[ "$2 $3" = "download dataset-fashion-mnist" ] && touch "$3_1_all.deb"'
    (tools / "apt-get").write_text(f"#!/bin/sh\n{script}\n")
    inner = "$3/usr/share/datasets/fashion-mnist"
    script = f'[ "$1" = -x ] && [ -f "$2" ] && mkdir -p "{inner}" && cp {source}/* "{inner}"'
    (tools / "dpkg").write_text(f"#!/bin/sh\n{script}\n")
    for tool in ("apt-get", "dpkg"):
        (tools / tool).chmod(0o755)
    path = f"{tools}:{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    run = fashion(tmp_path, tools=path)
    assert run.returncode == 0, run.stderr
    assert load_index(tmp_path / "out/train").shape == (1, 28, 28)
    assert load_index(tmp_path / "out/train").count == 30


@pytest.mark.parametrize(
    ("absent", "place", "told"),
    [
        ("apt-get", "", "error: apt-get is not here: set FASHION to Debian's dataset-fashion"),
        ("dpkg", "a.deb", "error: dpkg is not here: unpack "),
        ("", "none", "none) does not exist: set FASHION to Debian's"),
        ("broken", "a.deb", "a.deb) cannot be unpacked: dpkg: it is no archive"),
        ("broken", "", "error: apt-get download dataset-fashion-mnist: E: Unable to locate"),
    ],
)
def test_make_fashion_says_what_is_missing_in_one_line(tmp_path, absent, place, told):
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("bash", "dirname", "mktemp", "rm", "grep", "head"):
        (tools / tool).symlink_to(shutil.which(tool))
    if absent == "broken":
        lines = {"apt-get": "E: Unable to locate package", "dpkg": "dpkg: it is no archive"}
        for tool, line in lines.items():
            (tools / tool).write_text(
                f"#!{tools}/bash\necho 'W: x' >/dev/null; echo '{line}' >&2; exit 2\n"
            )
            (tools / tool).chmod(0o755)
    (tmp_path / "a.deb").write_text("no archive")
    run = fashion(tmp_path, tools=tools, **({"FASHION": str(tmp_path / place)} if place else {}))
    assert run.returncode == 2 and told in run.stderr and run.stderr.count("\n") == 1, run.stderr
    assert not (tmp_path / "out").exists()
