"""What stored values mean: claims that cannot be true are refused with the option that is right,
and tars of others are read by a stated mapping.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from diffmoe.commands.inspect_data import main as inspect_main
from diffmoe.config import Config, DataConfig, ModelConfig
from diffmoe.data.digits import write_digits
from diffmoe.data.feed import open_reader
from diffmoe.data.inspect import index_tars
from diffmoe.data.members import Members
from diffmoe.data.reader import ShardReader
from diffmoe.data.rows import BadShard
from diffmoe.data.shards import ShardIndex, ShardMeta, load_index, write_index, write_shards
from diffmoe.data.share import Share
from diffmoe.data.stream import BatchStream
from diffmoe.environment import detect
from diffmoe.errors import UserError

EARLIER = Path(__file__).parent / "data" / "earlier"
COUNT, TARS = 24, 4  # samples of the tars below
SD = 0.18215


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def npz(**arrays: object) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def write_tars(folder: Path, samples: list[dict[str, bytes]]) -> Path:
    """Four tars of samples, ending → payload, by nobody's program."""
    folder.mkdir(parents=True)
    for number in range(TARS):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for i, members in enumerate(samples[number::TARS]):
                for ending, payload in members.items():
                    info = tarfile.TarInfo(f"part/{i:04d}.{ending}")
                    info.size = len(payload)
                    tar.addfile(info, io.BytesIO(payload))
    return folder


def plain_tars(folder: Path, arrays: np.ndarray, labels: list[int] | None = None) -> Path:
    labels = [i % 10 for i in range(len(arrays))] if labels is None else labels
    return write_tars(
        folder,
        [
            {"npy": npy(array), "cls": str(label).encode()}
            for array, label in zip(arrays, labels, strict=True)
        ],
    )


def inspected(capsys: pytest.CaptureFixture, folder: Path, *options: str) -> tuple[int, str]:
    code = inspect_main(
        [str(folder), "--grid", str(folder.parent / "grid.png"), *options], detect({})
    )
    return code, capsys.readouterr().out


def options_of(**meaning: object) -> list[str]:
    return [
        word
        for name, value in meaning.items()
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]


def everything(index: ShardIndex, flip: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Two epochs as training reads them; the order is that of the counts of a data set's shards."""
    reader = ShardReader(index, seed=3, batch=4, streams=2, flip=flip)
    try:
        return reader.read(range(2 * index.count))
    finally:
        reader.close()


# ------------------------------------------------------------------------------- values of many
# kinds


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((COUNT, *shape)).astype(np.float32)


def unit_pixels(*shape: int) -> np.ndarray:
    """Images of floats that fill [0, 1]."""
    return np.random.default_rng(2).random((COUNT, *shape)).astype(np.float32)


def moments(scale: float = 1.0, logvar: bool = False, side: int = 8) -> np.ndarray:
    """As Stable Diffusion's autoencoder has them, times `scale`."""
    std = np.exp(draw(4, side, side) - 2)
    return np.concatenate(
        [5.5 * scale * draw(4, side, side), 2 * np.log(std * scale) if logvar else std * scale], 1
    )


def hwc(arrays: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(arrays.transpose(0, 2, 3, 1))


# Values, what is claimed, and what the message says is right.
FAULTS: dict[str, tuple[Callable[[], np.ndarray], dict, dict]] = {
    "log-variance as std": (
        lambda: moments(logvar=True),
        {"kind": "moments", "scale": SD, "spread": "std"},
        {"spread": "logvar"},
    ),
    "std as log-variance": (
        moments,
        {"kind": "moments", "scale": SD, "spread": "logvar"},
        {"spread": "std"},
    ),
    "scaled std as log-variance": (
        lambda: moments(SD),
        {"kind": "moments", "spread": "logvar"},
        {"spread": "std"},
    ),
    "latents as moments": (
        lambda: 5.5 * draw(4, 8, 8),
        {"kind": "moments", "scale": SD, "spread": "std"},
        {"kind": "latents"},
    ),
    "latents as log-variance": (
        lambda: 9.5 * draw(4, 8, 8),
        {"kind": "moments", "scale": 0.11, "spread": "logvar"},
        {"kind": "latents"},
    ),
    "scaled latents as moments": (
        lambda: draw(4, 8, 8),
        {"kind": "moments", "spread": "std"},
        {"kind": "latents"},
    ),
    "scaled latents as log-variance": (
        lambda: draw(4, 8, 8),
        {"kind": "moments", "spread": "logvar"},
        {"kind": "latents"},
    ),
    "moments scaled already": (
        lambda: moments(SD),
        {"kind": "moments", "scale": SD, "spread": "std"},
        {"scale": "1"},
    ),
    "moments not scaled": (moments, {"kind": "moments", "spread": "std"}, {"scale": "0.18215"}),
    "log-variances not scaled": (
        lambda: moments(logvar=True),
        {"kind": "moments", "spread": "logvar"},
        {"scale": "0.18215"},
    ),
    "latents scaled already": (
        lambda: draw(4, 8, 8),
        {"kind": "latents", "scale": SD},
        {"scale": "1"},
    ),
    "latents not scaled": (lambda: 5.5 * draw(4, 8, 8), {"kind": "latents"}, {"scale": "0.18215"}),
    "latents of another scale": (
        lambda: 40 * draw(4, 8, 8),
        {"kind": "latents", "scale": SD},
        {"scale": "0.025"},
    ),
    "bytes as they are": (
        lambda: (255 * unit_pixels(3, 8, 8)).astype(np.uint8),
        {"kind": "pixels"},
        {"scale": "0.007843137255", "mean": "127.5"},
    ),
    "floats of bytes": (
        lambda: 255 * unit_pixels(1, 8, 8),
        {"kind": "pixels"},
        {"scale": "0.007843137255", "mean": "127.5"},
    ),
    "bytes without the middle": (
        lambda: (255 * unit_pixels(3, 8, 8)).astype(np.uint8),
        {"kind": "pixels", "scale": 1 / 255},
        {"scale": "0.007843137255", "mean": "127.5"},
    ),
    "floats of 0 to 1": (
        lambda: unit_pixels(3, 8, 8),
        {"kind": "pixels"},
        {"scale": "2", "mean": "0.5"},
    ),
    "floats of 0 to 1 as bytes": (
        lambda: unit_pixels(3, 8, 8),
        {"kind": "pixels", "scale": 1 / 127.5, "mean": 127.5},
        {"scale": "2", "mean": "0.5"},
    ),
    "ready floats as bytes": (
        lambda: 2 * unit_pixels(3, 8, 8) - 1,
        {"kind": "pixels", "scale": 1 / 127.5, "mean": 127.5},
        {"scale": "1", "mean": "0"},
    ),
    "16 levels as 256": (
        lambda: (16 * unit_pixels(3, 8, 8)).round().astype(np.uint8),
        {"kind": "pixels", "scale": 1 / 127.5, "mean": 127.5},
        {"scale": "0.125", "mean": "8"},
    ),
    "pixels as latents": (
        lambda: 255 * unit_pixels(3, 8, 8),
        {"kind": "latents"},
        {"kind": "pixels", "scale": "0.007843137255", "mean": "127.5"},
    ),
    "channels last": (
        lambda: hwc(2 * unit_pixels(3, 8, 8) - 1),
        {"kind": "pixels"},
        {"layout": "hwc"},
    ),
    "moments with channels last": (
        lambda: hwc(moments(side=12)),
        {"kind": "moments", "scale": SD, "spread": "std"},
        {"layout": "hwc"},
    ),
    "latents of more channels than pixels, last": (
        lambda: hwc(draw(16, 8, 8)),
        {"kind": "latents"},
        {"layout": "hwc"},
    ),
    "channels first": (
        lambda: draw(4, 8, 8),
        {"kind": "latents", "layout": "hwc"},
        {"layout": "chw"},
    ),
}


@pytest.fixture
def fault(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict, dict]:
    make, claimed, right = FAULTS[request.param]
    return plain_tars(tmp_path / "tars", make()), {"classes": 10} | claimed, right


@pytest.mark.full
@pytest.mark.parametrize("fault", FAULTS, indirect=True)
def test_an_impossible_claim_is_refused_with_the_options_that_are_right(
    fault: tuple, capsys: pytest.CaptureFixture
) -> None:
    folder, claimed, right = fault
    with pytest.raises(UserError) as caught:
        inspected(capsys, folder, "--write-index", *options_of(**claimed))
    message = str(caught.value)
    assert "\n" not in message and not (folder / "index.json").exists()
    named = dict(
        re.findall(r"--([a-z-]+) (-?[\w.]+)", message.partition(", or --accept-values")[0])
    )
    assert right.items() <= named.items(), message
    fixed = claimed | {name.replace("-", "_"): value for name, value in named.items()}
    fixed.pop("spread") if fixed["kind"] != "moments" and "spread" in fixed else None
    code, said = inspected(capsys, folder, "--write-index", *options_of(**fixed))
    assert code == 0, said


@pytest.mark.full
@pytest.mark.parametrize("fault", FAULTS, indirect=True)
def test_an_index_with_an_impossible_claim_is_a_problem_unless_it_is_accepted(
    fault: tuple, capsys: pytest.CaptureFixture
) -> None:
    folder, claimed, right = fault
    code, said = inspected(
        capsys, folder, "--write-index", "--accept-values", *options_of(**claimed)
    )
    assert code == 0, said
    assert inspected(capsys, folder)[0] == 0, "it is in the index"
    accepted = load_index(folder)
    write_index(replace(accepted, meta=replace(accepted.meta, accept_values=False)))
    assert load_index(folder).fingerprint == accepted.fingerprint
    option = "".join(f"--{name} {value}" for name, value in list(right.items())[:1])
    for quick in ([], ["--quick"]):
        code, said = inspected(capsys, folder, *quick)
        assert code == 1 and "1 problems" in said and option in said, said
        assert inspected(capsys, folder, *quick, "--accept-values")[0] == 0


@pytest.mark.parametrize(
    "meta, array",
    [
        (ShardMeta("moments", 10, SD), moments(logvar=True)),
        (ShardMeta("moments", 10), moments()),
        (ShardMeta("latents", 10), 5.5 * draw(4, 8, 8)),
        (ShardMeta("pixels", 10), (255 * unit_pixels(3, 8, 8)).astype(np.uint8)),
        (ShardMeta("pixels", 10, 2.0, 0.5), 2 * unit_pixels(3, 8, 8) - 1),
        (ShardMeta("pixels", 10), hwc(2 * unit_pixels(3, 8, 8) - 1)),
        (ShardMeta("moments", 10, SD), hwc(moments(side=12))),
    ],
)
def test_nothing_is_written_of_what_cannot_be_meant(
    meta: ShardMeta, array: np.ndarray, tmp_path: Path
) -> None:
    def write(meta: ShardMeta) -> ShardIndex:
        return write_shards(
            ((f"{i}", a, i % 10) for i, a in enumerate(array)),
            tmp_path / "set",
            samples_per_shard=10,
            meta=meta,
        )

    with pytest.raises(
        UserError, match="--(scale|spread).* or --accept-values|--layout hwc.*transpose"
    ):
        write(meta)
    assert not (tmp_path / "set").exists()
    assert load_index(write(replace(meta, accept_values=True)).folder).meta.accept_values


RIGHT = {
    "std": (moments, ["moments", "--scale", SD, "--spread", "std"]),
    "log-variance": (
        lambda: moments(logvar=True),
        ["moments", "--scale", SD, "--spread", "logvar"],
    ),
    "another autoencoder": (
        lambda: 0.14 * moments(),
        ["moments", "--scale", "1.5305", "--mean", "0.0609", "--spread", "std"],
    ),
    "latents": (lambda: draw(16, 8, 8), ["latents"]),
    "half floats": (
        lambda: moments().astype(np.float16),
        ["moments", "--scale", SD, "--spread", "std"],
    ),
    "32 channels": (lambda: draw(32, 4, 4), ["latents"]),
    "pixels": (
        lambda: (255 * unit_pixels(3, 8, 8)).astype(np.uint8),
        ["pixels", "--scale", "0.00784314", "--mean", "127.5"],
    ),
    "dark pixels": (
        lambda: (90 * unit_pixels(3, 8, 8)).astype(np.uint8),
        ["pixels", "--scale", 1 / 127.5, "--mean", "127.5"],
    ),
    "bright pixels": (
        lambda: (150 + 90 * unit_pixels(3, 8, 8)).astype(np.uint8),
        ["pixels", "--scale", 1 / 127.5, "--mean", "127.5"],
    ),
    "ready pixels": (lambda: 2 * unit_pixels(1, 8, 8) - 1, ["pixels"]),
    "black images": (
        lambda: np.zeros((COUNT, 3, 8, 8), np.uint8),
        ["pixels", "--scale", 1 / 127.5, "--mean", "127.5"],
    ),
}


@pytest.mark.full
@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_is_taken(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    make, claim = RIGHT[name]
    code, said = inspected(
        capsys,
        plain_tars(tmp_path / "tars", make()),
        "--write-index",
        "--classes",
        "10",
        "--kind",
        *map(str, claim),
    )
    assert code == 0, said
    assert "accept_values" not in (tmp_path / "tars" / "index.json").read_text()


@pytest.mark.parametrize(
    "kind, spread, message",
    [
        ("moments", [], r"--spread \(not given\) goes with --kind moments"),
        ("latents", ["--spread", "std"], "--spread .std. goes with"),
        ("pixels", ["--spread", "logvar"], "--spread .logvar. goes with"),
        ("moments", ["--spread", "variance"], "must be one of std"),
    ],
)
def test_the_spread_of_moments_has_to_be_said(
    kind: str, spread: list[str], message: str, tmp_path: Path
) -> None:
    folder = plain_tars(tmp_path / "tars", moments())
    with pytest.raises(UserError, match=message):
        inspect_main(
            [str(folder), "--write-index", "--classes", "10", "--kind", kind, *spread], detect({})
        )
    assert not (folder / "index.json").exists()


# ------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    "labels, claimed, right",
    [
        (range(1, 11), {}, {"first-class": "1"}),
        ([10, 1, 1], {}, {"first-class": "1"}),
        (range(13), {}, {"classes": "13"}),
        (range(10), {"first_class": 1}, {"first-class": "0"}),
        (range(5, 15), {}, {"classes": "15"}),
        (range(1, 12), {"first_class": 1}, {"classes": "11"}),
    ],
)
def test_labels_that_do_not_fit_the_classes(
    labels: list[int], claimed: dict, right: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    labels = [labels[i % len(labels)] for i in range(COUNT)]
    folder = plain_tars(tmp_path / "tars", draw(4, 8, 8), labels)
    claimed = {"kind": "latents", "classes": 10} | claimed
    with pytest.raises(UserError) as caught:
        inspected(capsys, folder, "--write-index", *options_of(**claimed))
    named = dict(re.findall(r"--([a-z-]+) (\w+)", str(caught.value)))
    assert named == right and not (folder / "index.json").exists()
    fixed = claimed | {name.replace("-", "_"): value for name, value in named.items()}
    code, said = inspected(capsys, folder, "--write-index", *options_of(**fixed))
    assert code == 0, said
    first = int(fixed.get("first_class", 0))
    assert sorted(everything(load_index(folder))[1].tolist()) == sorted(
        2 * [label - first for label in labels]
    )


def test_labels_from_one_in_an_index_that_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = plain_tars(tmp_path / "tars", draw(4, 8, 8), [i % 10 + 1 for i in range(COUNT)])
    index = index_tars(folder, ShardMeta("latents", 10, members=Members(first_class=1)))
    write_index(replace(index, meta=ShardMeta("latents", 10)))
    for quick in ([], ["--quick"]):
        code, said = inspected(capsys, folder, *quick)
        assert (
            code == 1
            and "label (10) must lie in [0, classes) with classes 10; labels that begin with 1 "
            "take --first-class 1"
            in said
        )


def test_a_table_of_rows_obeys_the_first_class(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Tars of this program whose index was lost, with labels that somebody counted from 1."""
    labels = [i % 10 + 1 for i in range(COUNT)]
    write_shards(
        ((f"{i}", a, label) for i, (a, label) in enumerate(zip(draw(4, 8, 8), labels))),
        tmp_path / "set",
        samples_per_shard=10,
        meta=ShardMeta("latents", 11),
    )
    (tmp_path / "set" / "index.json").unlink()
    code, said = inspected(
        capsys,
        tmp_path / "set",
        "--write-index",
        "--kind",
        "latents",
        "--classes",
        "10",
        "--first-class",
        "1",
    )
    assert code == 0, said
    index = load_index(tmp_path / "set")
    assert sorted(everything(index)[1].tolist()) == sorted(2 * [label - 1 for label in labels])
    path = index.folder / index.shards[1].name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    code, said = inspected(capsys, tmp_path / "set")
    assert code == 1 and f"{path.name}: SHA-256 is not the index's" in said


# ------------------------------------------------------------------------------- members by a
# stated mapping


def sample_forms(array: np.ndarray, flipped: np.ndarray, label: int) -> dict[str, dict[str, bytes]]:
    """One sample in the forms that people write."""
    cls = {"cls": str(label).encode()}
    (mean, std), (flip_mean, flip_std) = np.split(array, 2), np.split(flipped, 2)
    entry = {"class_id": label, "caption": "a cat", "meta": {"class": {"id": label + 1}}}
    return {
        "latent": {"latent.npy": npy(array), **cls},
        "latent, flips": {"latent.npy": npy(array), "latent.flip.npy": npy(flipped), **cls},
        "batch of one": {
            "npy": npy(array[None]),
            "flip.npy": npy(flipped[None]),
            "txt": f"{label}\n".encode(),
        },
        "npz": {"npz": npz(moments=array, other=np.zeros(3)), "json": json.dumps(entry).encode()},
        "npz, all": {
            "npz": npz(moments=array[None], moments_flip=flipped[None], label=np.array([label]))
        },
        "npz, parts": {
            "npz": npz(mean=mean, std=std, mean_flip=flip_mean, std_flip=flip_std),
            "json": json.dumps(entry).encode(),
        },
        "columns first": {
            "vae.npy": npy(np.asfortranarray(array)),
            "jpg": b"not read",
            "json": str(label).encode(),
        },
        "channels last": {
            "npz": npz(
                mean=hwc(mean[None])[0],
                std=hwc(std[None]),
                mf=hwc(flip_mean[None]),
                sf=hwc(flip_std[None]),
            ),
            "label.npy": npy(np.int64(label)),
        },
    }


MAPPINGS = {
    "latent": {"array": "latent.npy"},
    "latent, flips": {"array": "latent.npy", "flip_array": "latent.flip.npy"},
    "batch of one": {"label": "txt"},
    "npz": {"array": "npz:moments", "label": "json:class_id"},
    "npz, all": {"array": "npz:moments", "flip_array": "npz:moments_flip", "label": "npz:label"},
    "npz, parts": {
        "array": "npz:mean,std",
        "flip_array": "npz:mean_flip,std_flip",
        "label": "json:meta.class.id",
        "first_class": 1,
    },
    "columns first": {"array": "vae.npy", "label": "json"},
    "channels last": {
        "array": "npz:mean,std",
        "flip_array": "npz:mf,sf",
        "label": "label.npy",
        "layout": "hwc",
    },
}
MAPPED = ["--kind", "moments", "--classes", "10", "--spread", "std", "--scale", str(SD)]


def mapped_set(folder: Path, form: str, capsys: pytest.CaptureFixture) -> ShardIndex:
    arrays, flipped = moments(side=12), -moments(side=12)
    flipped[:, 4:] *= -1
    write_tars(
        folder, [sample_forms(a, f, i % 10)[form] for i, (a, f) in enumerate(zip(arrays, flipped))]
    )
    code, said = inspected(capsys, folder, "--write-index", *MAPPED, *options_of(**MAPPINGS[form]))
    assert code == 0, said
    return load_index(folder)


@pytest.mark.full
@pytest.mark.parametrize("form", MAPPINGS)
def test_tars_of_others_train_as_our_own(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Bit for bit what `write_shards` and the default mapping give, through the reader and through
    loader processes.
    """
    index = mapped_set(tmp_path / "tars", form, capsys)
    arrays, flipped = moments(side=12), -moments(side=12)
    flipped[:, 4:] *= -1
    order = [i for number in range(TARS) for i in range(number, COUNT, TARS)]
    own = write_shards(
        ((f"{i:02d}", arrays[i], i % 10, flipped[i]) for i in order),
        tmp_path / "own",
        samples_per_shard=COUNT // TARS,
        meta=ShardMeta("moments", 10, SD),
    )
    assert index.x_shape == own.x_shape == (4, 12, 12) and index.flips == (
        form not in ("latent", "npz", "columns first")
    )
    for flip in (False, True) if index.flips else (False,):
        for ours, theirs in zip(everything(own, flip), everything(index, flip), strict=True):
            assert np.array_equal(ours, theirs)
    model = ModelConfig(channels=4, input_size=12, classes=10)
    reader = open_reader(
        Config(model=model, data=DataConfig(shards=str(index.folder), flip=index.flips))
    )
    share = Share(8, 8, 1, 0, 1)
    with BatchStream(reader, share, start_step=2, workers=2) as stream:
        batch = next(stream)[0]
    x, y = reader.read(range(16, 24))
    assert torch.equal(batch.x, torch.from_numpy(x)) and torch.equal(batch.y, torch.from_numpy(y))


@pytest.mark.full
@pytest.mark.parametrize("form", ["latent", "npz, parts"])
def test_mapped_tars_are_held_to_their_checksum(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    index = mapped_set(tmp_path / "tars", form, capsys)
    path = index.folder / index.shards[0].name
    content = bytearray(path.read_bytes())
    content[content.index(b"NUMPY") + 400] ^= 1
    path.write_bytes(content)
    with pytest.raises(BadShard, match="shard 0.tar"):
        everything(index)
    code, said = inspected(capsys, index.folder)
    assert code == 1 and "shard 0.tar" in said


def test_a_mapping_is_part_of_what_is_read(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    index = mapped_set(tmp_path / "tars", "npz, all", capsys)
    record = json.loads((index.folder / "index.json").read_text())
    assert record["meta"]["members"] == {
        "array": "npz:moments",
        "flip_array": "npz:moments_flip",
        "label": "npz:label",
        "layout": "chw",
        "first_class": 0,
    }
    other = replace(index.meta, members=replace(index.meta.members, array="npz:moments_flip"))
    assert (
        replace(index, meta=other).fingerprint
        != index.fingerprint
        == load_index(index.folder).fingerprint
    )


def test_memory_stays_flat_over_mapped_tars(tmp_path: Path) -> None:
    import psutil

    array = np.ones((8, 32, 32), np.float32)
    payload = {"npz": npz(moments=array, label=3)}
    write_tars(tmp_path / "tars", [payload] * 1500)  # 50 MB
    members = Members("npz:moments", label="npz:label")
    index = index_tars(
        tmp_path / "tars", ShardMeta("moments", 10, members=members, accept_values=True)
    )
    reader = ShardReader(index, seed=0, batch=50, streams=2)
    own, used = psutil.Process(), []
    for step in range(30):
        reader.read(range(50 * step, 50 * step + 50))
        used.append(own.memory_info().rss)
    assert max(used[5:]) - used[5] < 4 * 2**20, used


SAMPLE = {"npz": npz(moments=moments()[0]), "cls": b"3"}


@pytest.mark.parametrize(
    "sample, mapping, message",
    [
        (
            {"npz": SAMPLE["npz"], "txt": b"3"},
            {},
            "no member ends in npy, cls; its members also end in npz, txt: --array.*--label of",
        ),
        (
            SAMPLE,
            {},
            "missing member part/0000.npy.*also end in npz.*--array, --flip-array and --label",
        ),
        (SAMPLE, {"array": "npz:moments", "label": "json:id"}, "missing member part/0000.json"),
        (SAMPLE, {"array": "npz"}, "must name an array of the npz: npz:NAME"),
        (SAMPLE, {"array": "npz:latent"}, "no array 'latent' in the npz; it holds moments"),
        (SAMPLE, {"array": "latent.pt"}, "must end in npy or npz.*pickles"),
        (SAMPLE, {"array": "npy:x"}, "only an npz or a json has something inside"),
        (SAMPLE, {"array": "a/b"}, "must be the ending of a member's name"),
        (
            SAMPLE,
            {"array": "npz:moments", "layout": "cwh"},
            "layout .'cwh'. must be one of chw, hwc",
        ),
        (SAMPLE, {"array": "npz:moments", "flip_array": "npz:flip"}, "no array 'flip' in the npz"),
        (
            SAMPLE,
            {"array": "npz:moments", "flip_array": "mirrored.npy"},
            r"missing member part/0000.mirrored.npy",
        ),
        (SAMPLE | {"npz": b"PK no zip"}, {"array": "npz:moments"}, "not an npz that can be read"),
        (
            SAMPLE | {"npz": npz(moments=np.array([{}], object))},
            {"array": "npz:moments"},
            "Object arrays cannot be loaded",
        ),
        (SAMPLE | {"npz": npz(moments=moments()[:2])}, {"array": "npz:moments"}, "three axes"),
        (
            SAMPLE | {"json": b'{"id": "cat"}'},
            {"array": "npz:moments", "label": "json:id"},
            r"label json:id \('cat'\) must be a whole",
        ),
        (
            SAMPLE | {"json": b'{"id": 3.0}'},
            {"array": "npz:moments", "label": "json:id"},
            r"label json:id \(3.0\) must be a whole",
        ),
        (
            SAMPLE | {"json": b'{"id": true}'},
            {"array": "npz:moments", "label": "json:id"},
            r"label json:id \(True\) must be a whole",
        ),
        (
            SAMPLE | {"json": b'{"label": 3}'},
            {"array": "npz:moments", "label": "json:id"},
            "no key 'id' of label json:id here, but label",
        ),
        (
            SAMPLE | {"json": b'{"a": 3}'},
            {"array": "npz:moments", "label": "json:a.id"},
            "no key 'id' of label json:a.id here, but 3",
        ),
        (
            SAMPLE | {"json": b"{"},
            {"array": "npz:moments", "label": "json:id"},
            "member part/0000.json: ",
        ),
        (
            SAMPLE | {"cls": b"n01440764"},
            {"array": "npz:moments"},
            "part/0000.cls: label .b'n01440764'. must be a whole",
        ),
        (
            SAMPLE | {"cls": b"3.0"},
            {"array": "npz:moments"},
            "part/0000.cls: label .b'3.0'. must be a whole",
        ),
        (
            SAMPLE | {"cls": b"\xff"},
            {"array": "npz:moments"},
            "part/0000.cls: label .b'.xff'. must be a whole",
        ),
        (
            {"npz": npz(moments=moments()[0], y=np.float32(3))},
            {"array": "npz:moments", "label": "npz:y"},
            "must be one whole number",
        ),
    ],
)
def test_mappings_that_do_not_fit(
    sample: dict, mapping: dict, message: str, tmp_path: Path
) -> None:
    folder = write_tars(tmp_path / "tars", [sample] * 4)
    with pytest.raises(UserError, match=message) as caught:
        inspect_main([str(folder), "--write-index", *MAPPED, *options_of(**mapping)], detect({}))
    assert "\n" not in str(caught.value) and not (folder / "index.json").exists()


@pytest.mark.parametrize("kind", [["latents"], ["moments", "--spread", "std"]])
def test_arrays_of_zeros_are_drawn(
    kind: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = plain_tars(tmp_path / "tars", np.zeros((COUNT, 4, 8, 8), np.float32))
    code, text = inspected(capsys, folder, "--write-index", "--classes", "10", "--kind", *kind)
    assert code == 0 and "channels 0.0000" in text and (tmp_path / "grid.png").exists()


def test_pixels_take_no_flipped_arrays(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    images = 2 * unit_pixels(1, 8, 8) - 1
    folder = write_tars(
        tmp_path / "tars",
        [{"npy": npy(a), "flip.npy": npy(a[..., ::-1]), "cls": b"3"} for a in images],
    )
    claim = ["--write-index", "--kind", "pixels", "--classes", "10"]
    with pytest.raises(UserError, match="flip_array .x.npy. goes with latents and moments"):
        inspected(capsys, folder, *claim, "--flip-array", "x.npy")
    assert inspected(capsys, folder, *claim)[0] == 0
    index = load_index(folder)
    plain, mirrored = everything(index)[0], everything(index, flip=True)[0]
    changed = (plain != mirrored).any((1, 2, 3))
    assert (
        not index.flips
        and 0 < changed.sum() < len(plain)
        and np.array_equal(mirrored[changed], plain[changed][..., ::-1])
    )


def test_latents_are_mirrored_by_their_own_arrays_only(tmp_path: Path) -> None:
    latents = draw(4, 8, 8)
    with_flips = write_shards(
        ((f"{i}", a, 0, -a) for i, a in enumerate(latents)),
        tmp_path / "with",
        samples_per_shard=10,
        meta=ShardMeta("latents", 1),
    )
    plain, mirrored = everything(with_flips)[0], everything(with_flips, flip=True)[0]
    changed = (plain != mirrored).any((1, 2, 3))
    assert 0 < changed.sum() < len(plain) and np.array_equal(mirrored[changed], -plain[changed])
    without = write_shards(
        ((f"{i}", a, 0) for i, a in enumerate(latents)),
        tmp_path / "without",
        samples_per_shard=10,
        meta=ShardMeta("latents", 1),
    )
    assert np.array_equal(
        np.sort(everything(without)[0].reshape(-1)), np.sort(np.tile(latents.reshape(-1), 2))
    )
    with pytest.raises(UserError, match="flip .True. needs flipped latents"):
        everything(without, flip=True)


# ------------------------------------------------------------------------------- what stands
# already


# Of x and y over three epochs with flips (seed 7, batch 4, 2 streams), and the fingerprint, as
# given by the program that wrote them.
EARLIER_SETS = {
    "pixels": (
        "8150c506a2da9e6f7bd7165077cfda898adf3e627ca602197704ad42b253e770",
        "440d550ba0413cc78860654c89fe57ebd0704b4e1b31679bb23a9948e38abef2",
        "80d29a1a0f114b3908155f421032cc70fb81e4ccdec525aa14e7eabb09d04211",
    ),
    "moments": (
        "f7ca5459286e7eec4f87d8a5791c71dd4081a0cae0266c5a850f25165ba03bcc",
        "2f3f36c475a8e8d958471294307733ed6255cda61e39f43f9de5d503d8d5c540",
        "8051c1b39eb299a8ad7ad0cd74cdee12d5c6269d90101c22ee9c7394e5d286f2",
    ),
}


@pytest.mark.parametrize("name", EARLIER_SETS)
def test_data_sets_that_were_written_earlier_are_read_bit_for_bit(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    index = load_index(EARLIER / name)
    x, y = ShardReader(index, seed=7, batch=4, streams=2, flip=True).read(range(3 * index.count))
    found = (
        hashlib.sha256(x.tobytes()).hexdigest(),
        hashlib.sha256(y.tobytes()).hexdigest(),
        index.fingerprint,
    )
    assert found == EARLIER_SETS[name]
    code, said = inspected(capsys, EARLIER / name, "--grid", str(tmp_path / "grid.png"))
    assert code == 0, said
    write_index(replace(index, folder=tmp_path))
    assert (tmp_path / "index.json").read_bytes() == (EARLIER / name / "index.json").read_bytes()


@pytest.mark.parametrize(
    "meta, fingerprint",
    [
        (
            ShardMeta("pixels", 10, 1 / 8, 8.0),
            "53c50b2d9654b7d3352f23d06dd18e78862b3533532a87cb4e41357dc68d0f6e",
        ),
        (
            ShardMeta("moments", 1000, SD),
            "2cfee238a0a3dfb3ca6a3c1c4657fd3166c9d28a1b1fbd72593da02ccff78a23",
        ),
        (
            ShardMeta("moments", 7, 1.5, -0.25, "logvar"),
            "f327378a4155454607d390d60ba18895f7a6734bde15932f3dfc41efd422b2de",
        ),
    ],
)
def test_fingerprints_stay(meta: ShardMeta, fingerprint: str) -> None:
    """Checkpoints hold them: one that moves keeps a run from resuming."""
    index = load_index(EARLIER / "moments")
    assert replace(index, meta=meta).fingerprint == fingerprint
    assert replace(index, meta=replace(meta, accept_values=True)).fingerprint == fingerprint
    for members in (Members(array="latent.npy"), Members(layout="hwc"), Members(first_class=1)):
        assert replace(index, meta=replace(meta, members=members)).fingerprint != fingerprint


def test_the_demos_digits_mean_what_they_say(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_digits(tmp_path / "digits")
    for quick in ([], ["--quick"]):
        assert inspected(capsys, tmp_path / "digits", *quick)[0] == 0
