"""Bad shards in real runs: the same decision on every rank, in every layout, now and later; and
inspect-data, which finds them.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from diffmoe.commands.inspect_data import main as inspect_main
from diffmoe.config import DataConfig
from diffmoe.data.feed import Feed
from diffmoe.data.reader import ShardReader
from diffmoe.data.shards import ShardMeta, load_index, write_shards
from diffmoe.data.share import Share
from diffmoe.data.tar import write_tar
from diffmoe.environment import detect
from diffmoe.errors import UserError
from diffmoe.parallel.collectives import AgreedError, anyone
from diffmoe.parallel.groups import build_groups, single_process
from diffmoe.parallel.spawn import Ranks
from programs import digits, losses, run_cases, run_program, start_program, tiny

BATCH = 16


def spoiled(folder: Path, name: str, how: str) -> Path:
    """A copy of the digits with one shard removed, truncated, or with a flipped byte in its row
    150.
    """
    shutil.copytree(digits(), folder)
    path = folder / name
    if how == "removed":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:100_000])
    else:
        content = bytearray(path.read_bytes())
        content[byte_of_row(folder, name, 150)] ^= 8
        path.write_bytes(content)
    return folder


def byte_of_row(folder: Path, name: str, row: int) -> int:
    """A byte in the middle of a row's array."""
    reader = ShardReader(load_index(folder), seed=0)
    shard = reader._open_shard([s.name for s in reader.index.shards].index(name))
    return int(shard.table.offsets[row, 0]) + 512 + 128 + 30


def first_steps(shards: Path, name: str, row: int | None) -> tuple[int, int]:
    """The first step that needs this shard (this row of it), and the rank of two that does."""
    reader = ShardReader(load_index(shards), seed=0, batch=BATCH, streams=64, window=4)
    number = [s.name for s in reader.index.shards].index(name)
    for position in range(2000):
        place = reader.places([position])[0]
        if place == (number, row) or (row is None and place[0] == number):
            return position // BATCH, position % BATCH // 8
    raise AssertionError(name)


def errors(results) -> list[str]:
    return [
        line
        for result in results
        for line in result.stderr.splitlines()
        if line.startswith("error: ")
    ]


@pytest.mark.full
def test_a_run_stops_in_order_at_a_bad_byte_that_one_rank_meets(tmp_path: Path) -> None:
    """Found in a step by one rank alone; both save and end, with one line that names shard, member
    and member.
    """
    name = next(
        s.name
        for s in load_index(digits()).shards
        if 2 <= first_steps(digits(), s.name, 150)[0] <= 60
    )
    step, rank = first_steps(digits(), name, 150)
    shards = spoiled(tmp_path / "digits", name, "flipped byte")
    results = run_program(
        2,
        *tiny(
            tmp_path / "run",
            f"data.shards={shards}",
            "train.steps=70",
            "train.log_every=50",
            "train.save_every=0",
        ),
    )
    assert [r.returncode for r in results] == [2, 2]
    (said,) = errors(results)
    assert re.search(
        rf"error: rank {rank}: shard {name}, member \d+.npy: altered, in bytes \d+ to", said
    )
    saved = [path.name for path in (tmp_path / "run/checkpoints").glob("step_*")]
    assert saved == [f"step_{step:08d}"], (saved, step)


@pytest.mark.full
def test_bad_shards_are_left_out_alike_on_every_layout_and_when_going_on(tmp_path: Path) -> None:
    """One rank with a thread; two ranks with processes that stop half-way and go on as one: the
    same record and losses.
    """
    step, name = min(
        (first_steps(digits(), s.name, 150)[0], s.name)
        for s in load_index(digits()).shards
        if first_steps(digits(), s.name, 150)[0] >= 2
    )
    gone = next(s.name for s in load_index(digits()).shards if s.name != name)
    shards = spoiled(tmp_path / "digits", name, "flipped byte")
    (shards / gone).unlink()
    settings = [
        f"data.shards={shards}",
        "data.on_bad_shard=skip",
        "data.bad_share=0.3",
        "train.save_every=0",
        "train.schedule=constant",
        "parallel.ep=1",
    ]
    (one,) = run_program(1, *tiny(tmp_path / "one", *settings, f"train.steps={step + 4}"))
    two = run_program(
        2, *tiny(tmp_path / "two", *settings, f"train.steps={step + 2}", "data.workers=1")
    )
    assert [r.returncode for r in (one, *two)] == [0] * 3, (one, two)
    record = json.loads((tmp_path / "one/bad_shards.json").read_text())
    assert [(entry["shard"], entry["step"]) for entry in record] == [
        (gone, first_steps(digits(), gone, None)[0]),
        (name, step),
    ]
    assert "altered, in bytes" in record[1]["problem"]
    assert json.loads((tmp_path / "two/bad_shards.json").read_text()) == record
    assert f"left out from step {step} on: shard {name}, member" in two[0].stdout
    (on,) = run_program(1, *tiny(tmp_path / "two", *settings, f"train.steps={step + 4}"))
    assert on.returncode == 0 and "2 bad shards are left out" in on.stdout
    # Summed in another order by two ranks; other samples would differ in the second digit.
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)


@pytest.mark.full
@pytest.mark.parametrize(
    "how, text", [("removed", "is missing from"), ("truncated", "has 100000 bytes, its index says")]
)
def test_a_lost_or_cut_shard_stops_the_start_or_is_left_out(
    tmp_path: Path, how: str, text: str
) -> None:
    shards = spoiled(tmp_path / "digits", "shard-000003.tar", how)
    steps = first_steps(digits(), "shard-000003.tar", None)[0] + 1
    common = [f"data.shards={shards}", f"train.steps={steps}", "train.save_every=0"]
    stop, little = run_cases(
        2,
        [
            tiny(tmp_path / "stop", *common),
            tiny(tmp_path / "little", *common, "data.on_bad_shard=skip"),
        ],
    )
    skip = run_program(
        2, *tiny(tmp_path / "skip", *common, "data.on_bad_shard=skip", "data.bad_share=0.2")
    )
    assert [r.returncode for r in stop + little] == [2] * 4
    assert (
        errors(stop)
        == [line for line in errors(stop) if "shard shard-000003.tar" in line and text in line]
        != []
    )
    assert (
        "1 bad shards hold 200 of 1797 samples, more than data.bad_share (0.01)"
        in errors(little)[0]
    )
    assert text in errors(little)[0] and not list((tmp_path / "little/checkpoints").iterdir())
    assert [r.returncode for r in skip] == [0, 0], skip
    assert [
        entry["step"] for entry in json.loads((tmp_path / "skip/bad_shards.json").read_text())
    ] == [steps - 1]


def read_digits(
    shards: Path, folder: Path, policy: str, workers: int
) -> tuple[list[np.ndarray], str]:
    """What this rank reads of 120 steps, as training would, and why it ended before (or
    nothing).
    """
    world = build_groups(1, 1).world
    share = Share(BATCH, BATCH // world.size, 1, world.index, world.size)
    reader = ShardReader(
        load_index(shards, check_files=False), seed=0, batch=BATCH, streams=64, window=4
    )
    read = []
    with (
        Feed(
            reader,
            share,
            world,
            folder,
            range(120),
            DataConfig(on_bad_shard=policy, bad_share=0.2, workers=workers),
            pin=False,
            say=lambda line: None,
        ) as feed,
        contextlib.suppress(AgreedError),
    ):
        batches = feed.first()
        while batches is not None:
            read += [batch.x.numpy().copy() for batch in batches]
            if anyone(feed.read_ahead(), world) and feed.decide_together(False):
                break
            batches = feed.take()
    return read, str(feed.failure or "")


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_layout_meets_every_damage_alike(tmp_path: Path, world: int) -> None:
    """Nine shards; all ranks stop before the step that needs what is not there, or go on with the
    same batches to the end.
    """
    name = "shard-000003.tar"
    met = {
        "removed": (None, "is missing from"),
        "truncated": (None, "has 100000 bytes, .*; member .* is the first that is not"),
        "flipped byte": (150, r", member \d+.npy: altered, in bytes \d+ to"),
    }
    with Ranks(world, timeout=120) as ranks:
        for how, (row, text) in met.items():
            step, _ = first_steps(digits(), name, row)
            shards = spoiled(tmp_path / how, name, how)
            fixed = ShardReader(
                load_index(digits()),
                seed=0,
                batch=BATCH,
                streams=64,
                window=4,
                excluded={name: step},
            )
            whole = [fixed.read(range(i * BATCH, (i + 1) * BATCH))[0] for i in range(120)]
            for workers, policy in itertools.product((0, 1, 3), ("stop", "skip")):
                folder = tmp_path / f"{how} {workers} {policy}"
                folder.mkdir()
                found = ranks.run(read_digits, shards, folder, policy, workers)
                reasons = {reason for _, reason in found}
                steps = step if policy == "stop" else 120
                assert [len(read) for read, _ in found] == [steps] * world
                assert all(
                    np.array_equal(np.concatenate(parts), x)
                    for *parts, x in zip(*(read for read, _ in found), whole)
                )
                if policy == "stop":
                    assert len(reasons) == 1 and re.search(
                        f"shard {name}.*{text}", reasons.pop()
                    ), (how, found[0][1])
                else:
                    record = json.loads((folder / "bad_shards.json").read_text())
                    assert reasons == {""} and [
                        (entry["shard"], entry["step"]) for entry in record
                    ] == [(name, step)]


@pytest.mark.full
def test_a_killed_data_worker_ends_the_run_on_every_rank(tmp_path: Path) -> None:
    with start_program(
        2, *tiny(tmp_path / "run", "data.workers=2", "train.steps=5000", "train.save_every=0")
    ) as program:
        deadline = time.monotonic() + 180
        while (
            not (tmp_path / "run/metrics.jsonl").exists()
            or not (tmp_path / "run/metrics.jsonl").read_text()
        ):
            assert time.monotonic() < deadline, program.results()
            time.sleep(0.1)
        rank = program.processes[1].pid
        children = [
            int(p.name)
            for p in Path("/proc").iterdir()
            if p.name.isdigit()
            and _parent(p) == rank
            and b"diffmoe.data.worker" in (p / "cmdline").read_bytes()
        ]
        assert len(children) == 2
        os.kill(children[0], signal.SIGKILL)
        results = program.wait(180)
    assert [r.returncode for r in results] == [2, 2]
    assert re.fullmatch(
        r"error: rank 1: data worker \d of rank 1 was killed by signal 9", errors(results)[0]
    )
    assert len(list((tmp_path / "run/checkpoints").glob("step_*/checkpoint.json"))) == 1


def _parent(process: Path) -> int:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return -1


def test_ranks_that_see_different_data_do_not_start(tmp_path: Path) -> None:
    """A node with another copy: the same shapes, other bytes."""
    index = load_index(digits())
    feed = Feed(
        ShardReader(index, seed=0, batch=8),
        Share(8, 8, 1, 0, 1),
        single_process().world,
        tmp_path,
        range(3),
        DataConfig(),
        pin=False,
        say=print,
    )
    with feed, pytest.MonkeyPatch.context() as patch:
        assert feed.first() is not None
        patch.setattr(
            "diffmoe.data.feed.gather_objects", lambda value, group: [value, ([], "0" * 64)]
        )
        patch.setattr("diffmoe.data.feed.agreed", contextlib.nullcontext)
        object.__setattr__(feed.group, "ranks", (0, 1))
        with pytest.raises(UserError, match="rank 1 sees another data set .0000"):
            feed._agree_on_data()


# ----------------------------------------------------------------------------------------
# inspect-data


def inspected(capsys, *arguments: object) -> tuple[int, str]:
    code = inspect_main([str(a) for a in arguments], detect({}))
    return code, capsys.readouterr().out


def test_a_good_set_is_good_and_shown(tmp_path: Path, capsys) -> None:
    for quick in ([], ["--quick"]):
        code, said = inspected(capsys, digits(), "--grid", tmp_path / "grid.png", *quick)
        assert code == 0, said
        assert "1797 samples of 10 classes in 9 shards, uint8 [1, 8, 8] (pixels)" in said
        assert (
            "174 to 183 samples, median 181; 0 without any" in said
            and (tmp_path / "grid.png").stat().st_size > 1000
        )


@pytest.mark.parametrize("where", ["array", "label", "table", "end", "removed", "truncated"])
def test_the_first_bad_shard_and_member_are_named(tmp_path: Path, capsys, where: str) -> None:
    name = "shard-000005.tar"
    folder = (
        spoiled(tmp_path / "digits", name, where)
        if where in ("removed", "truncated")
        else tmp_path / "digits"
    )
    expected = {"removed": "shard-000005.tar is missing", "truncated": "has 100000 bytes"}.get(
        where
    )
    if expected is None:
        shutil.copytree(digits(), folder)
        content = bytearray((folder / name).read_bytes())
        at = {
            "array": byte_of_row(folder, name, 70),
            "table": 900,
            "end": len(content) - 1,
            "label": content.index(b".cls\0") + 512,
        }[where]
        at = at - content.index(b".cls\0") % 512 if where == "label" else at
        content[at] ^= 1
        (folder / name).write_bytes(content)
        expected = {
            "array": ", member 1070.npy: altered",
            "table": "member __rows__: its CRC-32 is wrong",
        }.get(where, ": SHA-256 is not the index's")
    code, said = inspected(capsys, folder, "--grid", tmp_path / "grid.png")
    assert code == 1 and f"1 problems; the first: shard {name}" in said and expected in said, said


def test_statistics_are_held_against_the_index(tmp_path: Path, capsys) -> None:
    shutil.copytree(digits(), tmp_path / "set")
    record = json.loads((tmp_path / "set/index.json").read_text())
    made = {
        "source_sha256": "",
        "images": 1797,
        "image_size": 8,
        "image_channels": 1,
        "vae": "",
        "vae_sha256": "",
        "precision": "",
        "batch": 0,
        "samples_per_shard": 200,
        "channel_mean": [4.884],
        "channel_std": [6.0],
    }
    (tmp_path / "set/index.json").write_text(json.dumps(record | {"encoding": made}))
    code, said = inspected(capsys, tmp_path / "set", "--grid", tmp_path / "grid.png")
    assert code == 1 and re.search(
        r"the first: channel 0: mean and deviation 4.884\d* ± 6.01\d*, the index says 4.884 ± 6",
        said,
    )


def test_tars_of_others_get_an_index(tmp_path: Path, capsys) -> None:
    rng = np.random.default_rng(0)
    folder = tmp_path / "tars"
    folder.mkdir()
    for shard in range(2):
        moments = rng.standard_normal((5, 8, 4, 4)).astype(np.float16)
        write_tar(
            folder / f"{shard}.tar", {f"{i}": {"npy": moments[i], "cls": i} for i in range(5)}
        )
    with pytest.raises(UserError, match="has no index.json.*inspect-data --write-index"):
        inspected(capsys, folder)
    with pytest.raises(UserError, match="needs --kind and --classes"):
        inspected(capsys, folder, "--write-index")
    with pytest.raises(UserError, match=r"--scale \(2.0\) goes with --write-index"):
        inspected(capsys, folder, "--scale", 2)
    code, said = inspected(
        capsys,
        folder,
        "--write-index",
        "--kind",
        "moments",
        "--classes",
        10,
        "--scale",
        "0.18215",
        "--spread",
        "logvar",
        "--grid",
        tmp_path / "grid.png",
    )
    assert code == 0 and "wrote" in said and "5 without any" in said, said
    index = load_index(folder)
    assert (index.meta, index.count, index.flips) == (
        ShardMeta("moments", 10, 0.18215, spread="logvar"),
        10,
        False,
    )
    assert ShardReader(index, seed=0).read(range(10))[0].shape == (10, 4, 4, 4)
    with pytest.raises(UserError, match="has an index.json already"):
        inspected(
            capsys,
            folder,
            "--write-index",
            "--kind",
            "moments",
            "--classes",
            10,
            "--spread",
            "logvar",
        )


def test_a_set_with_flips_is_checked_whole(tmp_path: Path, capsys) -> None:
    mean, std = np.full((1, 2, 2), 2, np.float16), np.full((1, 2, 2), 0.5, np.float16)
    samples = (
        (f"{i}", np.concatenate([i * mean, std]), 0, np.concatenate([-i * mean, std]))
        for i in range(5)
    )
    write_shards(samples, tmp_path / "set", samples_per_shard=5, meta=ShardMeta("moments", 1))
    assert inspected(capsys, tmp_path / "set", "--grid", tmp_path / "grid.png")[0] == 0
