"""What clusters do to a run: ranks killed, stopped and hung, full disks, damaged checkpoints; and
that resuming is exact.

pytest -m slow tests/test_faults.py -k table      the table of layouts: 2k steps against k, a
resume, and k more pytest -s -m slow tests/test_faults.py -k killed  thirty kills
"""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time

import pytest

from diffmoe.parallel.collectives import EXIT_LOST
from diffmoe.parallel.spawn import Ranks
from programs import Nursery, losses, tiny
from test_bad_steps import events, hear, heard
from test_run import assert_same_tensors, steps, train_here


@pytest.fixture(scope="module")
def nursery():
    return Nursery()


@pytest.fixture(scope="module")
def two_ranks():
    with Ranks(2, timeout=400.0) as ranks:
        yield ranks


# ------------------------------------------------------------------------------------------- killed
# with -9


STEPS = 24
KILLED = (f"train.steps={STEPS}", "train.save_every=2", "train.keep=3", "run.timeout_s=20")


def kill_until_finished(nursery, folder, kills, seed):
    """Starts the run, kills ranks at random moments, and starts it again, until it has been killed
    ``kills`` times; the last start is left alone.  Returns what each kill hit.
    """
    chance, hits = random.Random(seed), []
    while len(hits) < kills:
        for left in folder.glob("checkpoints"):
            if steps(folder) and steps(folder)[-1] == STEPS:
                shutil.rmtree(left)  # it finished between two kills: begin again
        with nursery.start(2, *tiny(folder, *KILLED)) as program:
            program.wait_for("MFU")
            saving = chance.random() < 0.5
            deadline = time.monotonic() + 60
            while (
                saving
                and not list(folder.glob("checkpoints/.step_*.partial"))
                and time.monotonic() < deadline
            ):
                if program.processes[0].poll() is not None:
                    break
            time.sleep(chance.random() * (0.02 if saving else 1.0))
            victims = chance.choice([[0], [1], [0, 1]])
            alive = [program.processes[rank].poll() is None for rank in victims]
            for rank in victims:
                program.signal(rank, signal.SIGKILL)
            results = program.wait()
        if not all(alive):
            continue  # it ended in order just before
        for rank in victims:
            assert results[rank].returncode in (-signal.SIGKILL, 0), results
        if len(victims) == 1:
            other = results[1 - victims[0]]
            assert other.returncode in (EXIT_LOST, 0), results
            assert "Traceback" not in other.stderr, other.stderr
        hits.append((saving, tuple(victims), steps(folder)))
    results = nursery.run(2, *tiny(folder, *KILLED))
    assert [r.returncode for r in results] == [0, 0], results
    return hits


@pytest.fixture(scope="module")
def undisturbed(nursery, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    results = nursery.run(2, *tiny(folder, *KILLED))
    assert [r.returncode for r in results] == [0, 0], results
    return folder


@pytest.mark.full
@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_at_any_point_it_goes_on_from_a_complete_checkpoint_to_the_same_weights(
    nursery, undisturbed, tmp_path, kills
):
    hits = kill_until_finished(nursery, tmp_path, kills, seed=kills)
    assert len(hits) == kills
    print(
        f"\n{kills} kills, {sum(saving for saving, _, _ in hits)} of them aimed at a save: {hits}"
    )
    last = f"checkpoints/step_{STEPS:08d}"
    assert_same_tensors(undisturbed / last, tmp_path / last)
    for path in (tmp_path / "checkpoints").iterdir():
        assert re.fullmatch(r"step_\d{8}", path.name), "the last start has swept up"
    expected, found = losses(undisturbed), losses(tmp_path)
    assert found == expected, (
        "lines that a kill cut short are passed over, of doubled steps the last counts"
    )


# ------------------------------------------------------------------------------------------ a dead
# or hung rank


LIMIT = 12  # seconds; on a busy machine one step takes a part of one


@pytest.mark.full
@pytest.mark.parametrize(
    ("world", "rank"),
    [
        (4, 2),
        *(
            pytest.param(world, rank, marks=pytest.mark.slow)
            for world, rank in ((2, 0), (2, 1), (4, 0))
        ),
    ],
)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_or_hung_rank_ends_the_job_with_a_report(nursery, tmp_path, world, rank, number):
    arguments = tiny(
        tmp_path,
        "train.steps=100000",
        "train.save_every=0",
        "train.log_every=1",
        f"run.timeout_s={LIMIT}",
    )
    with nursery.start(world, *arguments) as program:
        program.wait_for("step 2/")
        program.signal(rank, number)
        began = time.monotonic()
        others = [r for r in range(world) if r != rank]
        for other in others:
            program.processes[other].wait(100.0)
        took = time.monotonic() - began
        if number == signal.SIGSTOP:
            assert program.processes[rank].poll() is None, "still stopped"
            program.signal(rank, signal.SIGKILL)
        results = program.wait()
    print(
        f"\n{number.name} to rank {rank} of {world}: the others ended after {took:.1f} s\n"
        + results[others[0]].stderr
    )
    assert [results[r].returncode for r in others] == [EXIT_LOST] * len(others), results
    assert took < LIMIT + 20, "the stated time, and what a busy machine adds"
    text = "".join(results[r].stderr for r in others)
    assert "Traceback" not in text, text
    found = re.search(
        rf"watchdog: rank {rank} on (\S+) \(process {program.processes[rank].pid}\) "
        rf"(is gone|has not answered for \d+ s) \(run\.timeout_s {LIMIT}\); "
        rf"the job ends with exit code {EXIT_LOST}",
        text,
    )
    assert found and found[1] == os.uname().nodename, text
    assert re.search(
        rf"  rank {rank} on \S+ \(process \d+\): when last heard, step \d+, \w", text
    ), text
    assert re.search(r"(in|last collective) all-\w+[\w -]* of ranks \d", text), (
        "our own note of the collective"
    )
    for other in others:
        assert len(results[other].stderr.splitlines()) <= world + 3, "a report, not a wall"


def misbehave(arguments):
    """run.py's main, but in step 2 rank 1 hangs in its second block, or fails, as the first
    argument says; or its disk answers no more.
    """
    import diffmoe.training.loop as loop
    import run
    from diffmoe.checkpoints import writer

    how, *arguments = arguments
    if how == "disk" and os.environ["RANK"] == "1":
        writer.write_tensors = lambda *_: time.sleep(1000)
    original = loop.train_step

    def train_step(engine, ema, batches, config, layout, groups, step, *flags):
        if step == 2 and groups.rank == 1 and how != "disk":
            if how == "fail":
                raise KeyError("a mistake of ours")
            engine.model.blocks[1].register_forward_hook(lambda *_: time.sleep(1000))
        return original(engine, ema, batches, config, layout, groups, step, *flags)

    loop.train_step = train_step
    return run.main(arguments)


@pytest.mark.full
def test_a_rank_that_hangs_or_fails_alone_is_named_with_what_it_did(tmp_path):
    nursery = Nursery("test_faults:misbehave")
    hung, failed = (
        nursery.run(2, how, *tiny(tmp_path / how, "run.timeout_s=10", "train.save_every=0"))
        for how in ("hang", "fail")
    )
    assert [r.returncode for r in hung] == [EXIT_LOST] * 2, hung
    assert re.search(
        r"watchdog: rank 1 on \S+ \(process \d+\) has made no progress for \d+ s", hung[0].stderr
    ), hung
    assert re.search(
        r"  rank 1 on .*: when last heard, step 2, forward, block 1, last collective .*, at "
        r"\w+\.py:\d+ ",
        hung[0].stderr,
    ), hung
    assert re.search(
        r"  rank 0 on .*: step 2, forward, .*, in all-\S+ .*of ranks 0, 1, unfinished gloo:\w+ ",
        hung[0].stderr,
    ), hung
    assert re.search(r"rank 1 ends with exit code 75 as well: watchdog: rank 1", hung[1].stderr), (
        hung
    )
    assert failed[1].returncode == 1 and "a mistake of ours" in failed[1].stderr, failed
    assert failed[0].returncode == EXIT_LOST and "Traceback" not in failed[0].stderr, failed
    assert re.search(
        r"watchdog: rank 1 on \S+ \(process \d+\) ended by KeyError: 'a mistake of ours'",
        failed[0].stderr,
    ), failed


@pytest.mark.slow
def test_a_disk_that_answers_no_more_is_a_hang_too(tmp_path):
    """The thread that saves hangs; training goes on until it needs the save to be over."""
    nursery = Nursery("test_faults:misbehave")
    results = nursery.run(2, "disk", *tiny(tmp_path, "run.timeout_s=10", "train.save_every=2"))
    assert [r.returncode for r in results] == [EXIT_LOST] * 2, results
    assert "step 4/" in results[0].stdout and "step 5/" not in results[0].stdout, results
    assert re.search(
        r"watchdog: rank 1 on \S+ \(process \d+\) has made no progress for 1\d s", results[0].stderr
    ), results
    assert re.search(
        r"  rank 1 on .*, step 3, saving, files, last collective save, in which this rank still "
        r"writes",
        results[0].stderr,
    ), results
    assert re.search(
        r"  rank 0 on .*, saving, files, in save, in which other ranks still write",
        results[0].stderr,
    ), results


def lose_a_rank(arguments):
    """run.py's main, but rank 1 never comes ("start"), or is killed on its way out, when all work
    is done ("end").
    """
    import run

    when, *arguments = arguments
    if os.environ["RANK"] == "1":
        if when == "start":
            return 3
        import torch.distributed as dist

        dist.barrier = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
    return run.main(arguments)


@pytest.mark.full
def test_a_rank_that_is_lost_before_or_after_the_work_is_one_line(tmp_path):
    nursery = Nursery("test_faults:lose_a_rank")
    start, end = (
        nursery.run(
            2,
            when,
            *tiny(tmp_path / when, "run.timeout_s=1" if when == "start" else "run.timeout_s=20"),
        )
        for when in ("start", "end")
    )
    assert start[0].returncode == EXIT_LOST, start
    assert re.fullmatch(
        r"error: rank 0: another rank is lost or does not answer: .*\n", start[0].stderr
    ), start
    assert (end[0].returncode, end[1].returncode) == (0, -signal.SIGKILL), end
    assert (
        end[0].stderr == "note: another rank was lost on its way out, after the work was done\n"
    ), end
    assert steps(tmp_path / "end")[-1] == 8


# ------------------------------------------------------------------------------------------------
# stop requests


@pytest.mark.full
def test_a_stop_request_while_starting_ends_in_order_and_more_of_them_change_nothing(
    nursery, tmp_path
):
    for moment in ("model ", "engine "):
        with nursery.start(2, *tiny(tmp_path, "train.steps=100000")) as program:
            program.wait_for(
                moment
            )  # rank 0 listens from before its first line on; rank 1 may not listen yet
            for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
                program.signal(0, number)
            results = program.wait()
        assert [r.returncode for r in results] == [0, 0], results
        assert (
            "stopped cleanly" in results[0].stdout
            and "Traceback" not in results[0].stderr + results[1].stderr
        ), results
    with nursery.start(2, *tiny(tmp_path, "train.steps=100000", "train.save_every=0")) as program:
        program.wait_for("step 3/")
        for _ in range(3):
            program.signal(0, signal.SIGTERM)
            program.signal(1, signal.SIGUSR1)
        results = program.wait()
    assert [r.returncode for r in results] == [0, 0], results
    assert steps(tmp_path)[-1] == int(
        re.search(r"stopped cleanly at step (\d+);", results[0].stdout)[1]
    )


# --------------------------------------------------------------------------------------------------
# disks


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB of its own; needs the right to mount."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(
            f"mount -t tmpfs: {done.stderr.strip()} (the other tests of full disks need no mount)"
        )
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def train_while_the_disk_fills(arguments, ballast, world):
    """The disk is full from step 3 to step 6."""
    import diffmoe.training.loop as loop

    original = loop.train_step

    def train_step(engine, ema, batches, config, layout, groups, step, *flags):
        if groups.rank == 0 and step == 3:
            free = os.statvfs(ballast.parent)
            ballast.write_bytes(b"\0" * (free.f_bavail * free.f_frsize - 4096))
        if groups.rank == 0 and step == 6:
            ballast.unlink()
        return original(engine, ema, batches, config, layout, groups, step, *flags)

    loop.train_step = train_step
    try:
        return heard(arguments, world)
    finally:
        loop.train_step = original


@pytest.mark.full
def test_training_goes_on_over_a_full_disk_and_saves_when_it_can(two_ranks, small_disk, tmp_path):
    arguments = tiny(
        small_disk / "run",
        "train.steps=12",
        "train.save_every=2",
        "train.keep=2",
        "train.log_every=1",
    )
    results = two_ranks.run(train_while_the_disk_fills, arguments, small_disk / "ballast", 2)
    said, complaint = results[0]
    assert complaint == results[1][1] == "", results
    assert "step 4 was NOT saved" in said and "No space left" in said, said
    assert steps(small_disk / "run")[-1] == 12
    records = [
        json.loads(line)
        for line in (small_disk / "run/metrics.jsonl").read_text().splitlines()
        if line
    ]
    assert [r["step"] for r in records] == list(range(1, 13)), "lines waited for the disk"
    assert records[-1]["failed_saves"] >= 1
    two_ranks.run(
        train_here, tiny(tmp_path / "b", "train.steps=12", "train.save_every=2", "train.keep=2"), 2
    )
    assert_same_tensors(
        tmp_path / "b/checkpoints/step_00000012", small_disk / "run/checkpoints/step_00000012"
    )


def train_with_small_files(arguments, world):
    """No file may grow beyond 100 kB in this process; a write beyond says so."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        return heard(arguments, world)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.full
def test_a_state_that_cannot_be_saved_at_the_end_is_an_error_on_every_rank(two_ranks, tmp_path):
    shutil.copytree(
        first_half(two_ranks, tmp_path / "whole"), tmp_path / "run/checkpoints/step_00000004"
    )
    results = two_ranks.run(train_with_small_files, tiny(tmp_path / "run"), 2)
    said, complaint = results[0]
    assert (
        complaint
        == results[1][1]
        == "the state of step 8 could not be saved; what the run has is the checkpoint before"
    )
    assert "step 8 was NOT saved" in said and "File too large" in said
    assert steps(tmp_path / "run") == [4]


def test_what_rank_0_alone_writes_may_fail_without_ending_or_hanging_the_run(two_ranks, tmp_path):
    for name in ("metrics.jsonl", "expert_load.png", "samples_00000004.png", "loss.png"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "tensorboard").write_text("in the way")
    said, complaint = hear(two_ranks, tiny(tmp_path, "train.sample_every=4"))
    assert complaint == "" and steps(tmp_path) == [4, 8]
    for name in ("metrics.jsonl", "expert_load.png", "samples", "tensorboard"):
        assert said.count(f"{name} cannot be written: ") == 1, (name, said)
    assert "samples can be written again" in said and (tmp_path / "samples_00000008.png").is_file()


# ------------------------------------------------------------------------------------------ damaged
# checkpoints


def first_half(ranks, folder):
    """The checkpoint of step 4 of the undisturbed run in ``folder``, which also has step 8's."""
    if not (folder / "checkpoints").exists():
        ranks.run(train_here, tiny(folder), 2)
    return folder / "checkpoints/step_00000004"


@pytest.fixture(scope="module")
def whole(two_ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    first_half(two_ranks, folder)
    return folder


def truncate(folder):
    path = max(folder.glob("*.safetensors"), key=lambda p: p.stat().st_size)
    os.truncate(path, path.stat().st_size - 1000)
    return path.name


def flip(folder):
    path = max(folder.glob("*.safetensors"), key=lambda p: p.stat().st_size)
    with path.open("r+b") as file:
        file.seek(-500, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 16]))
    return path.name


def remove(folder):
    path = max(folder.glob("master*.safetensors"), key=lambda p: p.name)
    path.unlink()
    return path.name


def spoil_manifest(folder):
    (folder / "checkpoint.json").write_text('{"format": ')
    return "checkpoint.json"


@pytest.mark.parametrize("damage", [truncate, flip, remove, spoil_manifest])
def test_a_damaged_newest_checkpoint_is_skipped_and_logged(two_ranks, whole, tmp_path, damage):
    """Truncated shard, flipped byte, missing expert file, half a manifest: the run goes on from the
    one before.
    """
    shutil.copytree(whole / "checkpoints", tmp_path / "checkpoints")
    name = damage(tmp_path / "checkpoints/step_00000008")
    (tmp_path / "checkpoints/latest").write_text(
        "step_00000002"
    )  # of another program: the step number is what counts
    said, complaint = hear(two_ranks, tiny(tmp_path))
    assert complaint == ""
    assert re.search(
        rf"step_00000008 is corrupt \(.*{re.escape(name)}.*\); falling back to step_00000004", said
    ), said
    assert "resumed from" in said and "at step 4" in said
    (event,) = events(tmp_path)
    assert (event["step"], event["event"]) == (4, "passed over") and name in event["text"]
    assert_same_tensors(whole / "checkpoints/step_00000008", tmp_path / "checkpoints/step_00000008")


def test_a_changed_configuration_is_shown(two_ranks, whole, tmp_path):
    shutil.copytree(whole / "checkpoints/step_00000004", tmp_path / "checkpoints/step_00000004")
    said, complaint = hear(
        two_ranks, tiny(tmp_path, "train.steps=9", "train.log_every=3", "parallel.ep=1")
    )
    assert complaint == ""
    for change in ("train.steps: 8 -> 9", "train.log_every: 1 -> 3", "parallel.ep: 2 -> 1"):
        assert f"changed since step_00000004: {change}\n" in said, said
    assert said.count("changed since") == 3
    for change, text in (
        ("data.flip=true", "data.flip: False -> True"),
        ("model.depth=2", "model.depth: 4 -> 2"),
    ):
        _, complaint = hear(two_ranks, tiny(tmp_path, change))
        assert f"belongs to another run ({text}); choose another run.folder" in complaint
    shards = tmp_path / "other"
    from diffmoe.data.digits import write_digits
    from programs import digits

    write_digits(shards)
    index = json.loads((shards / "index.json").read_text())
    index["shards"].reverse()
    (shards / "index.json").write_text(json.dumps(index))
    _, complaint = hear(two_ranks, tiny(tmp_path, f"data.shards={shards}"))
    assert re.search(
        r"belongs to another run \(data.shards' contents: [0-9a-f]{12} -> [0-9a-f]{12}\)", complaint
    ), complaint
    shutil.rmtree(shards)
    shutil.copytree(digits(), shards)
    said, complaint = hear(two_ranks, tiny(tmp_path, f"data.shards={shards}"))
    assert complaint == "" and "changed since" in said, "the same data at another place"


# ---------------------------------------------------------------------------------- 2k steps = k,
# resume, k more


RECIPE = (
    "train.steps=24",
    "train.save_every=4",
    "train.keep=9",
    "train.eps=1e-3",
    "train.lr=1e-3",
    "train.sample_every=0",
)
# Ranks, EP, ZeRO, and ranks that share a copy of the state where not all do: (who saved, who goes
# on).  Every pair of EP sizes, of ZeRO stages and of numbers of ranks, both ways.
LAYOUTS = {
    (2, 2, 1): [
        (2, 2, 1),
        (1, 1, 0),
        (1, 1, 3),
        (2, 1, 1),
        (2, 2, 0),
        (2, 2, 2),
        (2, 2, 3),
        (4, 1, 2),
        (4, 2, 1),
        (4, 2, 3),
        (4, 4, 0),
        (4, 4, 2),
        (4, 2, 1, 2),
        (4, 1, 3, 2),
    ],
    (4, 2, 2, 2): [(4, 2, 2, 2), (1, 1, 0), (2, 2, 1), (4, 4, 3), (4, 2, 3, 2)],
    (1, 1, 0): [(1, 1, 0), (2, 2, 3), (4, 2, 1), (4, 4, 2)],
    (4, 4, 3): [(4, 4, 3), (1, 1, 1), (2, 1, 0), (2, 2, 1), (4, 2, 2)],
    (2, 1, 2): [(2, 1, 2), (1, 1, 0), (4, 4, 1), (2, 2, 3)],
}


def train_layout(folder, more, world, ep, stage, shard=None):
    """The losses of 24 steps, or of what is left of them."""
    import torch

    from diffmoe.config import load_config
    from diffmoe.deepspeed_json import merge_deepspeed
    from diffmoe.layout import resolve_layout
    from diffmoe.parallel.groups import build_groups
    from diffmoe.training import loop
    from programs import tiny_config, zero

    config = load_config(
        tiny_config(), [f"run.folder={folder}", f"parallel.ep={ep}", *RECIPE, *more]
    )
    layout = resolve_layout(config, world)
    merged = merge_deepspeed(zero(stage, mics_shard_size=shard), config, layout)
    groups = build_groups(layout.ep, layout.pool_ranks)
    loop.train(config, layout, merged, groups, torch.device("cpu"))


def test_the_table_leaves_out_no_change():
    moves = [(saved, to) for saved, targets in LAYOUTS.items() for to in targets]
    for what, values in enumerate(((1, 2, 4), (1, 2, 4), range(4))):
        assert {(saved[what], to[what]) for saved, to in moves} == {
            (a, b) for a in values for b in values
        }


@pytest.mark.slow
def test_table_of_layouts_in_which_the_next_20_losses_are_the_same(tmp_path, capsys):
    """From a checkpoint of step 4 in one layout to others; at the same layout bit for bit."""
    rows = []
    with (
        Ranks(1, timeout=400.0) as one,
        Ranks(2, timeout=400.0) as two,
        Ranks(4, timeout=400.0) as four,
    ):
        ranks = {1: one, 2: two, 4: four}
        for saved, targets in LAYOUTS.items():
            origin = tmp_path / "".join(map(str, saved))
            ranks[saved[0]].run(train_layout, origin, (), *saved)
            expected = losses(origin)
            for to in targets:
                folder = tmp_path / f"{origin.name}-{''.join(map(str, to))}"
                shutil.copytree(
                    origin / "checkpoints/step_00000004", folder / "checkpoints/step_00000004"
                )
                ranks[to[0]].run(train_layout, folder, (), *to)
                found = losses(folder)
                assert found.keys() == set(range(5, 25))
                rows.append(
                    (
                        saved,
                        to,
                        max(abs(found[s] - expected[s]) / abs(expected[s]) for s in found),
                    )
                )
                if to == saved:
                    assert rows[-1][2] == 0
                    assert_same_tensors(
                        origin / "checkpoints/step_00000024", folder / "checkpoints/step_00000024"
                    )
    with capsys.disabled():
        print(
            "\n\nlosses of steps 5 to 24 after a resume at step 4, against the run that went on\n"
            "(fp32, largest relative difference)\n" + f"{'saved by':24}{'resumed by':24}difference"
        )
        for saved, resumed, worst in rows:
            names = [
                f"{n} rank{'s' * (n > 1)}, EP {ep}, ZeRO {stage}" + f", {shard}" * bool(shard)
                for n, ep, stage, shard in ((*each, None)[:4] for each in (saved, resumed))
            ]
            off = "0, weights bit for bit" if saved == resumed else f"{worst:.1e}"
            print(f"{names[0]:24}{names[1]:24}{off}")
    assert max(worst for _, _, worst in rows) < 1e-6
