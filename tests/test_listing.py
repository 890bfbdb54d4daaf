"""What a source holds: names, links and leftovers in folders and tars; classes and their names;
sources that change.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffmoe.checkpoints.manifest import read_manifest
from diffmoe.checkpoints.reader import Checkpoint
from diffmoe.config import Config, DataConfig, ModelConfig
from diffmoe.data.encode_request import Request
from diffmoe.data.encode_shards import encode
from diffmoe.data.feed import open_reader
from diffmoe.data.image_source import Source
from diffmoe.data.images import read_image
from diffmoe.data.listing import list_source
from diffmoe.data.shards import ShardIndex, load_index
from diffmoe.errors import UserError
from diffmoe.evaluation.class_names import parse_classes
from diffmoe.evaluation.image_sources import open_images
from diffmoe.parallel.groups import single_process
from programs import run_cases, tiny

SIDE = 8


def image(kind: str = "PNG", shade: int = 100, mode: str = "RGB", **more: object) -> bytes:
    stream = io.BytesIO()
    colour = (shade,) * 3 if mode == "RGB" else shade
    Image.new(mode, (SIDE, SIDE), colour).save(stream, kind, **more)
    return stream.getvalue()


PNG = image()


def tree(root: Path, *files: str) -> Path:
    """A folder with these files; images by their endings, else text."""
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if not file.endswith("/"):
            path.write_bytes(PNG)
        else:
            path.mkdir(exist_ok=True)
    return root


def tar(path: Path, *members: str, **labels: int) -> Path:
    """Labels are the members that end in .cls: 0, unless said for the member's first letters."""
    with tarfile.open(path, "w") as stream:
        for name in members:
            label = next((value for start, value in labels.items() if name.startswith(start)), 0)
            data = str(label).encode() if name.lower().endswith(".cls") else PNG
            info = tarfile.TarInfo(name)
            info.size = len(data)
            stream.addfile(info, io.BytesIO(data))
    return path


def taken(source: Source) -> list[tuple[str, int]]:
    return [(p.member or p.file, p.label) for p in source.images]


def left(source: Source) -> list[str]:
    return [str(left) for left in source.left_out]


def run(source: Path, out: Path, **changes: object) -> tuple[ShardIndex, list[str]]:
    lines: list[str] = []
    settings = {"image_size": SIDE, "samples_per_shard": 4, "workers": 2, **changes}
    request = Request(source=str(source), out=out, **settings)
    return encode(request, single_process().world, torch.device("cpu"), lines.append), lines


# ---- folders


LEFTOVERS = [
    "{}/.ipynb_checkpoints/x.png",
    "{}/__MACOSX/x.png",
    "{}/._x.png",
    "{}/.DS_Store",
    "{}/Thumbs.db",
    "{}/@eaDir/x.jpg",
    "{}/.hidden/deep/x.png",
    "{}/desktop.ini",
]


@pytest.mark.parametrize("where", ["a", "a/deeper", "."])
@pytest.mark.parametrize("leftover", LEFTOVERS)
def test_hidden_files_and_leftovers_are_not_there(
    tmp_path: Path, leftover: str, where: str
) -> None:
    tree(tmp_path, "a/1.png", "b/2.png", leftover.format(where))
    source = list_source(str(tmp_path))
    assert (taken(source), source.class_names, left(source)) == (
        [("a/1.png", 0), ("b/2.png", 1)],
        ("a", "b"),
        [],
    )
    images = open_images(tmp_path)
    assert (images.count, images.left_out) == (2, ())


def test_other_files_are_counted_and_named_and_not_bad(tmp_path: Path) -> None:
    tree(
        tmp_path, "a/1.png", "b/2.png", "README.txt", "a/noending", "b/labels.csv", "b/c/list.json"
    )
    source = list_source(str(tmp_path))
    assert (
        left(source) == ["4 not images: README.txt, a/noending, b/c/list.json, …"]
        and source.lost == 0
    )
    assert open_images(tmp_path).count == 2


@pytest.mark.parametrize(
    "stray, reason",
    [
        ("root.png", "1 outside of class folders and tars"),
        ("ROOT.JPEG", "1 outside of class folders and tars"),
        ("a/x.heic", "1 of a kind that is not read"),
        ("b/deep/y.AVIF", "1 of a kind that is not read"),
    ],
)
def test_what_looks_like_a_sample_is_bad(tmp_path: Path, stray: str, reason: str) -> None:
    tree(tmp_path / "in", "a/1.png", "b/2.png", stray)
    source = list_source(str(tmp_path / "in"))
    assert len(source.images) == 2 and source.lost == 1
    assert left(source)[0].startswith(reason) and left(source)[0].endswith(f": {stray}")
    with pytest.raises(
        UserError,
        match=rf"1 of 3 images are bad, more than bad_share \(0.01\) .*: left out, {reason}",
    ):
        run(tmp_path / "in", tmp_path / "out")
    index, lines = run(tmp_path / "in", tmp_path / "out", bad_share=0.4)
    assert index.count == 2 and f"encode: left out, {left(source)[0]}" in lines
    assert load_index(tmp_path / "out").encoding.left_out == tuple(left(source))


def test_links_are_followed_once_and_broken_ones_are_named(tmp_path: Path) -> None:
    tree(tmp_path / "elsewhere", "x/1.png", "x/2.png")
    root = tree(tmp_path / "in", "a/1.png")
    (root / "b").symlink_to(tmp_path / "elsewhere/x")
    (root / "a/file.png").symlink_to(tmp_path / "elsewhere/x/2.png")
    (root / "a/again").symlink_to(root / "a")
    (root / "a/up").symlink_to("..")
    (root / "whole").symlink_to(".")
    (root / "a/itself").symlink_to("itself")
    (root / "a/gone").symlink_to("nowhere")
    (root / "a/through").symlink_to("1.png/x")
    source = list_source(str(root))
    assert [file for file, _ in taken(source)] == ["a/1.png", "a/file.png", "b/1.png", "b/2.png"]
    assert left(source) == [
        "3 broken links: a/gone, a/itself, a/through",
        "3 links to a folder that they lie in: whole, a/again, a/up",
    ]
    assert source.lost == 3


@pytest.mark.parametrize("target", ["nowhere", "itself.png"])
def test_a_broken_link_to_a_image_is_a_bad_image(tmp_path: Path, target: str) -> None:
    tree(tmp_path, "a/1.png")
    (tmp_path / "a/itself.png").symlink_to(target)
    source = list_source(str(tmp_path))
    assert len(source.images) == 2
    with pytest.raises(UserError, match=f"broken link to '{target}'"):
        read_image(source, source.images[1], SIDE, 3)
    index, _ = run(tmp_path, tmp_path.with_name(f"{tmp_path.name}-out"), bad_share=0.5)
    assert index.encoding.skipped == ("a/itself.png",)


def test_a_pipe_is_no_image(tmp_path: Path) -> None:
    tree(tmp_path, "a/1.png")
    os.mkfifo(tmp_path / "a/2.png")
    assert left(list_source(str(tmp_path))) == ["1 no plain files: a/2.png"]
    with pytest.raises(UserError, match="no plain files: a/2.png"):
        open_images(tmp_path)


@pytest.mark.parametrize(
    "kind, name, more",
    [
        ("BMP", "x.bmp", {}),
        ("TIFF", "x.tif", {}),
        ("TIFF", "x.TIFF", {"compression": "tiff_lzw"}),
        ("GIF", "x.gif", {}),
        ("PNG", "x.bmp", {}),
        ("JPEG", "x.jfif", {"quality": 95}),
    ],
)
def test_every_kind_is_decoded(tmp_path: Path, kind: str, name: str, more: dict) -> None:
    tree(tmp_path / "in", "a/0.png")
    (tmp_path / "in/a" / name).write_bytes(image(kind, 100, **more))
    index, _ = run(tmp_path / "in", tmp_path / "out")
    assert index.count == 2 and index.encoding.channel_mean == pytest.approx((100,) * 3, abs=1)
    assert open_images(tmp_path / "in").read(0, 2).float().mean() == pytest.approx(100, abs=1)


@pytest.mark.parametrize("kind, name", [("GIF", "x.gif"), ("TIFF", "x.tif"), ("WEBP", "x.webp")])
def test_of_several_frames_the_first_is_taken(tmp_path: Path, kind: str, name: str) -> None:
    tree(tmp_path, "a/")
    first, second = (Image.new("RGB", (SIDE, SIDE), (shade,) * 3) for shade in (40, 200))
    first.save(tmp_path / "a" / name, kind, save_all=True, append_images=[second])
    source = list_source(str(tmp_path))
    assert read_image(source, source.images[0], SIDE, 3).mean() == pytest.approx(40, abs=2)


@pytest.mark.parametrize("mode", ["I;16", "F"])
def test_more_than_8_bits_stay_bad(tmp_path: Path, mode: str) -> None:
    tree(tmp_path, "a/")
    (tmp_path / "a/x.tif").write_bytes(image("TIFF", 100, mode))
    source = list_source(str(tmp_path))
    with pytest.raises(UserError, match="more than 8 bits"):
        read_image(source, source.images[0], SIDE, 3)


def test_a_reference_is_flat_or_of_class_folders_and_complete(tmp_path: Path) -> None:
    flat = tree(tmp_path / "flat", "1.png", "2.PNG", "n.txt")
    nested = tree(tmp_path / "nested", "a/1.png", "b/c/2.png", "3.png")
    assert open_images(flat).count == 2 and [str(x) for x in open_images(flat).left_out] == [
        "1 not images: n.txt"
    ]
    assert open_images(nested).count == 3
    tree(nested, "b/4.heic")
    with pytest.raises(UserError, match=r"nested\)? holds more than can be read.*b/4.heic"):
        open_images(nested)


# ---- tars


@pytest.mark.parametrize(
    "members, expected",
    [
        (["n01_1.v2.JPEG", "n01_1.v2.cls"], ["n01_1.v2.JPEG"]),
        (["n01_1.v2.JPEG", "n01_1.cls"], ["n01_1.v2.JPEG"]),
        (["n01_1.JPEG.cls", "n01_1.JPEG"], ["n01_1.JPEG"]),
        (
            ["d.x/a.1.png", "d.x/a.1.cls", "d.x/a.2.png", "d.x/a.2.cls"],
            ["d.x/a.1.png", "d.x/a.2.png"],
        ),
        (["a.image.jpg", "a.label.cls"], ["a.image.jpg"]),
        (["A.PNG", "A.CLS", "b.v1.tiff", "b.v1.cls"], ["A.PNG", "b.v1.tiff"]),
    ],
)
def test_keys_may_have_dots(tmp_path: Path, members: list[str], expected: list[str]) -> None:
    source = list_source(str(tar(tmp_path / "x.tar", *members)))
    assert [name for name, _ in taken(source)] == expected and left(source) == []


def test_images_get_their_own_labels(tmp_path: Path) -> None:
    tar(
        tmp_path / "x.tar",
        "a.v1.png",
        "b.png",
        "a.v2.png",
        "a.v1.cls",
        "a.v2.cls",
        "b.cls",
        **{"a.v2": 2, "a.v1": 1},
    )
    assert taken(list_source(str(tmp_path))) == [("a.v1.png", 1), ("b.png", 0), ("a.v2.png", 2)]


@pytest.mark.parametrize(
    "members, lost, reason",
    [
        (["a.png", "a.cls", "b.png"], 1, "1 images without .cls: x.tar:b.png"),
        (
            ["a.png", "a.cls", "b.v2.png", "b.v3.cls", "b.v4.cls"],
            3,
            "2 .cls without an image: x.tar:b.v3.cls, ",
        ),
        (["a.png", "a.cls", "b.cls"], 1, "1 .cls without an image: x.tar:b.cls"),
        (["a.png", "a.cls", "b.heic", "b.cls"], 1, "1 of a kind that is not read"),
        (
            ["a.png", "a.cls", "b.v1.png", "b.v2.png", "b.cls"],
            2,
            "2 several images with one .cls: x.tar:b.v1.png",
        ),
        (
            ["a.png", "a.cls", "a.seg.png"],
            0,
            "1 further images or labels of a sample that is taken: x.tar:a.seg",
        ),
        (
            ["a.png", "a.cls", "a.coarse.cls"],
            0,
            "1 further images or labels of a sample that is taken: x.tar:a.c",
        ),
        (["a.png", "a.cls", "a.json", "list"], 0, "2 not images: x.tar:a.json, x.tar:list"),
        (
            [
                "a.png",
                "a.cls",
                "._b.png",
                "__MACOSX/c.png",
                ".ipynb_checkpoints/d.png",
                ".DS_Store",
            ],
            0,
            "",
        ),
    ],
)
def test_no_sample_of_a_tar_is_lost_silently(
    tmp_path: Path, members: list[str], lost: int, reason: str
) -> None:
    tar(tmp_path / "x.tar", *members)
    source = list_source(str(tmp_path))
    assert taken(source) == [("a.png", 0)] and source.lost == lost
    assert any(line.startswith(reason) for line in left(source)) if reason else left(source) == []


def test_what_lies_beside_tars(tmp_path: Path) -> None:
    tar(tmp_path / "1.tar", "a.png", "a.cls")
    tree(tmp_path, "x.png", "README.md", "2.tar.gz", "._1.tar", "__MACOSX/1.tar")
    (tmp_path / "note").symlink_to("nowhere")
    source = list_source(str(tmp_path))
    assert len(source.images) == 1 and source.lost == 3
    assert left(source) == [
        "1 broken links: note",
        "1 compressed tars: 2.tar.gz",
        "1 not images: README.md",
        "1 outside of class folders and tars: x.png",
    ]


@pytest.mark.parametrize("names", [["a.tar.gz"], ["train.tar.zst", "val.TGZ"]])
def test_compressed_tars_alone_are_named_as_such(tmp_path: Path, names: list[str]) -> None:
    tree(tmp_path, *names)
    with pytest.raises(
        UserError,
        match=rf"holds no images: .*; left out, {len(names)} compressed tars: {names[0]}",
    ):
        list_source(str(tmp_path))


# ---- classes


@pytest.mark.parametrize(
    "names, expected",
    [
        (range(12), [str(i) for i in range(12)]),
        (["10", "9", "007", "8"], ["007", "8", "9", "10"]),
        (["10", "9", "cat"], ["10", "9", "cat"]),
        (["n02", "n01440764", "n10"], ["n01440764", "n02", "n10"]),
        (["c10", "c9"], ["c10", "c9"]),
    ],
)
def test_order_of_classes(tmp_path: Path, names: object, expected: list[str]) -> None:
    tree(tmp_path, *(f"{name}/1.png" for name in names))
    source = list_source(str(tmp_path))
    assert list(source.class_names) == expected
    assert taken(source) == [(f"{name}/1.png", label) for label, name in enumerate(expected)]
    confusing = any(name.isdigit() and int(name) != label for label, name in enumerate(expected))
    assert ("names are not the numbers" in source.describe_classes()) == confusing


@pytest.mark.parametrize(
    "spoil",
    [
        lambda root: (root / "empty").mkdir(),
        lambda root: tree(root, "empty/notes.txt"),
        lambda root: tree(root, "empty/.hid/x.png"),
        lambda root: tree(root, "empty/x.heic"),
        lambda root: (root / "empty").symlink_to("nowhere"),
    ],
)
def test_empty_classes_are_refused_unless_asked_for(
    tmp_path: Path, spoil: Callable[[Path], object]
) -> None:
    tree(tmp_path, "cat/1.png", "zebra/2.png")
    spoil(tmp_path)
    with pytest.raises(
        UserError, match="1 class folders without an image: empty; .*--allow-empty-classes"
    ):
        list_source(str(tmp_path))
    source = list_source(str(tmp_path), allow_empty=True)
    assert source.class_names == ("cat", "empty", "zebra") and [
        label for _, label in taken(source)
    ] == [0, 2]
    assert source.describe_classes() == "0 cat, 1 empty, 2 zebra; without any image: 1"


@pytest.mark.parametrize(
    "classes, message",
    [
        (2, r"classes \(2\) must be at least the 3 of source .*last: c"),
        (4, r"classes \(4\) must not be more than the 3 class folders .*a, b, c"),
    ],
)
def test_one_class_more_or_less_than_said(tmp_path: Path, classes: int, message: str) -> None:
    tree(tmp_path, "a/1.png", "b/1.png", "c/1.png")
    assert list_source(str(tmp_path), 3).classes == 3
    with pytest.raises(UserError, match=message):
        list_source(str(tmp_path), classes)


@pytest.mark.parametrize(("first", "labels"), [(1, (1, 2)), (1, (2, 1)), (5, (5, 6))])
def test_labels_that_begin_with_another_number_than_0(
    tmp_path: Path, first: int, labels: tuple[int, int]
) -> None:
    """Refused with the option that is right, and not a class too many without any image."""
    source = str(
        tar(tmp_path / "x.tar", "a.png", "a.cls", "b.png", "b.cls", a=labels[0], b=labels[1])
    )
    with pytest.raises(
        UserError, match=r"classes \(2\) must be at least the .* and none is 0: .*--first-class 1"
    ):
        list_source(source, 2)
    with pytest.raises(
        UserError,
        match=f"from {first} to {first + 1}, .* --first-class {first} if .*, "
        f"--classes {first + 2} ",
    ):
        list_source(source)
    listed = list_source(source, first_class=first)
    assert (
        taken(listed) == [("a.png", labels[0] - first), ("b.png", labels[1] - first)]
        and listed.classes == 2
    )
    assert (
        list_source(source, first + 2)
        .describe_classes()
        .endswith("without any image: " + ", ".join(map(str, range(first))))
    )
    with pytest.raises(
        UserError, match=rf"and first_class is {first + 1}: --first-class {first} if"
    ):
        list_source(source, first_class=first + 1)


def test_class_folders_have_no_first_label(tmp_path: Path) -> None:
    tree(tmp_path, "1/1.png", "2/1.png")
    with pytest.raises(UserError, match=r"first_class \(1\) goes with tars"):
        list_source(str(tmp_path), first_class=1)


def configured(shards: Path, classes: int) -> Config:
    model = ModelConfig(family="dense", input_size=SIDE, channels=3, classes=classes)
    return replace(Config(), model=model, data=replace(DataConfig(), shards=str(shards)))


@pytest.mark.parametrize(
    "classes, message",
    [
        (2, r"has 3 classes; model.classes is 2: surplus is 2 \(cow\)"),
        (1, r"surplus are 1 \(cat\), 2 \(cow\)"),
        (4, r"model.classes is 4: it has 0 \(ant\) to 2 \(cow\)"),
    ],
)
def test_a_run_says_which_class_is_surplus(tmp_path: Path, classes: int, message: str) -> None:
    run(tree(tmp_path / "in", "ant/1.png", "cat/1.png", "cow/1.png"), tmp_path / "out")
    with pytest.raises(UserError, match=message):
        open_reader(configured(tmp_path / "out", classes))


@pytest.mark.parametrize("folders", [True, False])
def test_names_from_a_file(tmp_path: Path, folders: bool) -> None:
    members = [f"{label}.{ending}" for label in range(3) for ending in ("png", "cls")]
    source = tmp_path / "x.tar"
    if folders:
        source = tree(tmp_path / "in", "0/1.png", "1/1.png", "2/1.png")
    else:
        tar(source, *members, **{"1": 1, "2": 2})
    names = tmp_path / "classes.txt"
    names.write_text("ant, small\ncat\ncow\n")
    index, lines = run(source, tmp_path / "out", class_names=names)
    assert (
        index.class_names
        == load_index(tmp_path / "out").class_names
        == ("ant, small", "cat", "cow")
    )
    assert lines[0] == "encode: classes 0 ant, small, 1 cat, 2 cow"
    for text, message in (
        ("ant\ncat\n", r"class_names \(2 names\) must be at least the 3"),
        ("ant\n\ncow\n", "line 2 must not be empty"),
        ("", "line 1 must not be empty"),
    ):
        names.write_text(text)
        with pytest.raises(UserError, match=message):
            run(source, tmp_path / "other", class_names=names)
    names.write_text("a\nb\nc\n")
    with pytest.raises(
        UserError, match=r"class_names \(3 names\) must have one for each of the classes \(5\)"
    ):
        run(source, tmp_path / "other", class_names=names, classes=5)


def test_many_classes_are_printed_in_short(tmp_path: Path) -> None:
    tree(tmp_path, *(f"n{number:03d}/1.png" for number in range(30)))
    text = list_source(str(tmp_path)).describe_classes()
    assert text.startswith("0 n000, 1 n001, ") and text.endswith("18 n018, …, 29 n029")


NAMES = ("tench, Tinca tinca", "Boot", "7", "boot tree", "crane", "crane", "CAT", "cat")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("boot", [1]),
        ("Boot,3,5-7", [1, 3, 5, 6, 7]),
        ("7", [7]),
        ('"7"', [2]),
        ('"tench, tinca TINCA",0', [0, 0]),
        ("CAT,cat", [6, 7]),
        ("boot tree, 2", [3, 2]),
        ("all", list(range(8))),
    ],
)
def test_classes_by_name(text: str, expected: list[int]) -> None:
    assert parse_classes(text, 8, NAMES) == expected


@pytest.mark.parametrize(
    "text, message",
    [
        ("bot", r"no class is named 'bot'; did you mean 1 \(Boot\), 3 "),
        ("tench", r"did you mean 0 \(tench, Tinca tinca\)"),
        ("Cat", r"several classes; 6 \(CAT\), 7 \(cat\)"),
        ("crane", r"several classes; 4 \(crane\), 5 \(crane\)"),
        (
            "qqqq",
            r"no class is named 'qqqq'; the 8 classes are 0 \(tench, .*\), 1 \(Boot\), 2 \(.*\), "
            r"\.\.\.$",
        ),
        ("8", "from 0 to 7"),
        ("1,,2", "must be 'all'"),
    ],
)
def test_names_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_classes(text, 8, NAMES)


def test_names_of_a_checkpoint_that_has_none() -> None:
    with pytest.raises(UserError, match="the checkpoint knows no names of classes"):
        parse_classes("boot", 8)


# ---- names in checkpoints


def without_names(checkpoint: Path) -> None:
    """As an older version wrote it: no names, and a checksum that does not know of them."""
    tree = json.loads((checkpoint / "checkpoint.json").read_text())
    del tree["class_names"], tree["crc32"]
    checksum = zlib.crc32(json.dumps(tree, sort_keys=True).encode())
    (checkpoint / "checkpoint.json").write_text(json.dumps({**tree, "crc32": checksum}))


@pytest.mark.full
def test_names_reach_checkpoints_samples_and_the_hub(tmp_path: Path) -> None:
    """Encoded with names, trained, made older, resumed, sampled by name, exported; imported beside
    the data set.
    """
    files = [f"{name}/{number}.png" for name in ("10", "9") for number in range(4)]
    source = tree(tmp_path / "in", *files, "boot/1.png")
    overrides = [
        "model.channels=1",
        "model.classes=3",
        "train.batch=4",
        "moe.pool=4",
        "parallel.ep=1",
        "train.save_every=1",
        f"data.shards={tmp_path / 'data'}",
    ]
    train = tiny(tmp_path / "run", *overrides)
    sample = [
        "sample",
        "--checkpoint",
        str(tmp_path / "run"),
        "--out",
        str(tmp_path / "s"),
        "--count=3",
        "--classes",
    ]
    export = ["export", "--checkpoint", str(tmp_path / "run"), "--format"]
    encoded, first = run_cases(
        1,
        [
            [
                "encode",
                "--source",
                str(source),
                "--out",
                str(tmp_path / "data"),
                "--image-size",
                "8",
                "--channels",
                "1",
            ],
            [*train, "train.steps=1"],
        ],
    )
    assert encoded[0].returncode == first[0].returncode == 0, (encoded, first)
    assert (
        "encode: classes 0 10, 1 9, 2 boot; names are not the numbers: 0 is called 10\n"
        in encoded[0].stdout
    )
    checkpoint = tmp_path / "run/checkpoints/step_00000001"
    assert read_manifest(checkpoint / "checkpoint.json").class_names == ("10", "9", "boot")
    without_names(checkpoint)
    assert read_manifest(checkpoint / "checkpoint.json").class_names == ()
    nameless, resumed, named, wrong, research, hub, imported = (
        result
        for (result,) in run_cases(
            1,
            [
                [*sample, "boot"],
                [*train, "train.steps=2"],
                [*sample, 'BOOT,"10",1'],
                [*sample, "boots"],
                [*export, "research", "--out", str(tmp_path / "x.pt")],
                [*export, "hf", "--out", str(tmp_path / "hub")],
                [
                    "import",
                    "--research",
                    str(tmp_path / "x.pt"),
                    *tiny(tmp_path / "imported", *overrides),
                ],
            ],
        )
    )
    assert (
        nameless.returncode == 2 and "the checkpoint knows no names of classes" in nameless.stderr
    )
    assert resumed.returncode == 0 and "at step 1" in resumed.stdout
    assert named.returncode == 0 and np.load(tmp_path / "s.npz")["labels"].tolist() == [2, 0, 1]
    assert (
        wrong.returncode == 2
        and "no class is named 'boots'; did you mean 2 (boot)?" in wrong.stderr
    )
    assert research.returncode == hub.returncode == imported.returncode == 0, (
        research,
        hub,
        imported,
    )
    assert json.loads((tmp_path / "hub/config.json").read_text())["id2label"] == {
        "0": "10",
        "1": "9",
        "2": "boot",
    }
    assert Checkpoint(tmp_path / "imported").manifest.class_names == ("10", "9", "boot")


# ---- sources that change


def changes() -> dict[str, Callable[[Path], object]]:
    def rewrite(path: Path, data: bytes) -> None:
        path.write_bytes(data)
        os.utime(path, ns=(1, 10**18))  # however coarse the file system's clock is

    return {
        "size": lambda root: rewrite(root / "a/1.png", image(shade=7, kind="BMP")),
        "time": lambda root: rewrite(root / "a/1.png", (root / "a/1.png").read_bytes()),
        "link's target": lambda root: rewrite(root.parent / "elsewhere.png", PNG),
        "tar": lambda root: None,
    }


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("change", list(changes()))
def test_a_source_that_changed_is_refused(
    tmp_path: Path, change: str, finished: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tree(tmp_path / "in", "a/0.png", "a/1.png", "b/2.png", "b/3.png", "b/4.png")
    (tmp_path / "elsewhere.png").write_bytes(PNG)
    (source / "a/z.png").symlink_to(tmp_path / "elsewhere.png")
    first = {"link's target": "a/z.png", "tar": "2.tar"}.get(change, "a/1.png")
    if change == "tar":
        shutil.rmtree(source)
        source.mkdir()
        for number in range(3):
            tar(source / f"{number}.tar", "a.png", "a.cls")
    with monkeypatch.context() as patch:
        if not finished:
            patch.setattr(
                "diffmoe.data.encode_shards.write_index",
                lambda index: (_ for _ in ()).throw(OSError("killed")),
            )
            with pytest.raises(UserError, match="killed"):
                run(source, tmp_path / "out")
        else:
            run(source, tmp_path / "out")
    before = [(path.name, path.read_bytes()) for path in sorted((tmp_path / "out").glob("*.tar"))]
    if change == "tar":
        os.utime(source / "2.tar", ns=(1, 10**18))
    changes()[change](source)
    with pytest.raises(
        UserError,
        match=f"source changed since .* by size or time of writing: 1 files, first {first};",
    ):
        run(source, tmp_path / "out")
    assert [
        (path.name, path.read_bytes()) for path in sorted((tmp_path / "out").glob("*.tar"))
    ] == before


@pytest.mark.parametrize("change", ["added", "removed", "renamed"])
def test_a_source_of_other_files_is_refused(tmp_path: Path, change: str) -> None:
    source = tree(tmp_path / "in", "a/0.png", "a/1.png")
    run(source, tmp_path / "out")
    if change != "removed":
        tree(source, "a/2.png")
    if change != "added":
        (source / "a/1.png").unlink()
    with pytest.raises(
        UserError,
        match=r"source holds other images \(\d\) than .* \(2\): files were added, removed or",
    ):
        run(source, tmp_path / "out")


def test_what_is_no_image_may_come_and_go(tmp_path: Path) -> None:
    source = tree(tmp_path / "in", "a/0.png", "a/1.png", "a/notes.txt")
    index, _ = run(source, tmp_path / "out")
    (source / "a/notes.txt").unlink()
    tree(source, "README.md", ".DS_Store")
    again, lines = run(source, tmp_path / "out")
    assert again == index and lines[-1].endswith("is finished already")


def test_many_files_share_a_stamp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffmoe.data.image_source._RUNS", 3)
    source = tree(tmp_path / "in", *(f"a/{number}.png" for number in range(8)))
    index, _ = run(source, tmp_path / "out")
    assert len(index.encoding.source_stamps) == 3
    os.utime(source / "a/4.png", ns=(1, 10**18))
    with pytest.raises(
        UserError,
        match="files in 1 of 3 parts of the listing, the first between a/3.png and a/5.png",
    ):
        run(source, tmp_path / "out")


def test_a_data_set_of_before_is_still_finished(tmp_path: Path) -> None:
    """Its index has neither stamps nor what was left out."""
    source = tree(tmp_path / "in", "a/0.png", "a/1.png", "notes.txt")
    run(source, tmp_path / "out")
    path = tmp_path / "out/index.json"
    record = json.loads(path.read_text())
    del record["encoding"]["source_stamps"], record["encoding"]["left_out"]
    path.write_text(json.dumps(record))
    os.utime(source / "a/1.png", ns=(1, 10**18))
    index, lines = run(source, tmp_path / "out")
    assert lines[-1].endswith("is finished already") and index.encoding.source_stamps == ()
