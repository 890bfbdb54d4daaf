"""Checkpoints of running engines: any layout to any layout bit for bit, saving beside training, and
disks that are full.
"""

import errno
import json
import resource
import time
from pathlib import Path

import pytest
import torch

from diffmoe.checkpoints import writer
from diffmoe.checkpoints.reader import Checkpoint, complete_folders
from diffmoe.config import Config, load_config
from diffmoe.deepspeed_json import merge_deepspeed
from diffmoe.layout import resolve_layout
from diffmoe.models.dit import DiT
from diffmoe.models.logical import initialize, running_buffers
from diffmoe.models.matrices import is_matrix
from diffmoe.parallel.collectives import raise_together
from diffmoe.parallel.groups import build_groups
from diffmoe.parallel.spawn import Ranks
from diffmoe.parity.cases import Case
from diffmoe.parity.table import start_training
from diffmoe.training.checkpoint import kinds_of, newest_usable, restore
from diffmoe.training.ema import Ema
from diffmoe.training.engine import FIRST_MOMENT, MASTER, SECOND_MOMENT, Engine
from diffmoe.training.saver import STREAMING_BYTES, Saved, SaveFailed, Saver
from diffmoe.training.state import filled, held, owned
from made_checkpoints import made, made_whole, make_checkpoint, peak_growth
from programs import run_cases, tiny, tiny_config, trained, zero
from test_run import train_here

KINDS = (MASTER, FIRST_MOMENT, SECOND_MOMENT, "ema_0.9", "ema_0.5")
# (expert-parallel ranks, ZeRO stage, bf16, ranks of a copy of the state where not all share it) by
# number of ranks.
LAYOUTS = {
    1: [(1, 0, False), (1, 1, False), (1, 2, True), (1, 3, False)],
    2: [(1, 0, False), (2, 0, False), (2, 1, True), (1, 2, False), (2, 3, False)],
    4: [
        (2, 0, False),
        (2, 1, False),
        (4, 2, False),
        (2, 3, True),
        (1, 3, False),
        (2, 1, False, 2),
        (2, 1, True, 2),
        (1, 2, False, 2),
        (2, 3, False, 2),
        (1, 1, True, 1),
    ],
}


@pytest.fixture(scope="module")
def two_ranks():
    with Ranks(2, timeout=240.0) as ranks:
        yield ranks


def settings(*overrides: str) -> Config:
    return load_config(tiny_config(), ["train.ema=[0.9, 0.5]", "moe.pool=1", *overrides])


def start(config: Config, world: int, stage: int = 1, bf16: bool = False, shard: int | None = None):
    """(engine, averages, layout, groups) of a fresh start."""
    layout = resolve_layout(config, world)
    groups = build_groups(layout.ep, layout.pool_ranks)
    model = DiT(config.model, config.moe, pool=layout.pool, groups=groups)
    initialize(model, 0)
    engine = Engine(
        model,
        config,
        merge_deepspeed(zero(stage, bf16, mics_shard_size=shard), config, layout),
        groups,
        torch.device("cpu"),
    )
    return engine, Ema(engine, config.train), layout, groups


def shards_of(engine: Engine, ema: Ema) -> dict[str, list[torch.Tensor]]:
    return kinds_of(engine, ema)


def fill(engine: Engine, ema: Ema) -> None:
    """Every kind with what :func:`made` says, wherever its elements lie."""
    for kind, shards in shards_of(engine, ema).items():
        for place in held(engine):
            place.of(shards).copy_(made(kind, place.piece))


def everything(
    folder: str,
    reference: str,
    world: int,
    ep: int,
    stage: int,
    bf16: bool,
    shard: int | None = None,
    *words: str,
) -> list[str]:
    """Loads the reference and compares; saves, and leaves it to others to compare.  Returns what is
    wrong.
    """
    config = settings(f"parallel.ep={ep}", *words)
    engine, ema, layout, groups = start(config, world, stage, bf16, shard)
    for _, layer in engine.model.moe_layers():
        layer.thresholds.value.fill_(0.25)
    said: list[str] = []
    found = newest_usable(Path(reference), groups, said.append)
    assert restore(found, engine, ema, groups, said.append) == 7 and said == []
    wrong = [
        f"{kind} {place.piece}"
        for kind, shards in shards_of(engine, ema).items()
        for place in filled(held(engine), shards)
        if not torch.equal(place.of(shards), made(kind, place.piece))
    ]
    for kind, shards in shards_of(
        engine, ema
    ).items():  # DeepSpeed's own way of putting tensors together agrees with ours
        if kind == SECOND_MOMENT and "train.optimizer=muon" in words:
            continue  # which has holes
        for tensor, value in engine.read(shards):
            wrong += [
                f"{kind} {name} whole"
                for name, piece in tensor.pieces(value)
                if not torch.equal(piece, made_whole(kind, name, tuple(piece.shape)))
            ]
    with engine.weights(
        engine.masters
    ) as model:  # the parameters are published: what computes is what was loaded
        assert all(layer.thresholds.value.ne(0.25).all() for _, layer in model.moe_layers())
    saver = Saver(Path(folder), config, layout, groups)
    saver.save(7, engine, ema, {"skipped": [1, 2]})
    saver.wait()
    (outcome,) = saver.outcomes()
    assert isinstance(outcome, Saved) and outcome.stall_s > 0 and outcome.write_s > 0, outcome
    engine.engine.destroy()
    return wrong


@pytest.mark.full
@pytest.mark.parametrize("world", LAYOUTS)
def test_any_layout_reads_and_writes_the_same_bits(tmp_path, world):
    config = settings()
    make_checkpoint(tmp_path / "reference", config, step=7)
    with Ranks(world, timeout=300.0) as ranks:
        for number, (ep, stage, bf16, *shard) in enumerate(LAYOUTS[world]):
            folder = tmp_path / str(number)
            found = ranks.run(
                everything, str(folder), str(tmp_path / "reference"), world, ep, stage, bf16, *shard
            )
            assert found == [[]] * world, (
                f"EP {ep}, ZeRO {stage}, bf16 {bf16}: {[wrong[:3] for wrong in found]}"
            )
            checkpoint = Checkpoint(folder)
            assert checkpoint.counters == {"skipped": [1, 2]} and checkpoint.ranks == world
            reference = Checkpoint(tmp_path / "reference")
            assert set(checkpoint.kinds()) == {*KINDS, "buffers"}
            for kind in KINDS:
                there, here = reference.tensors(kind), checkpoint.tensors(kind)
                assert there.keys() == here.keys()
                wrong = [name for name in there if not torch.equal(here[name], there[name])]
                assert not wrong, f"EP {ep}, ZeRO {stage}, bf16 {bf16}: {kind} of {wrong[:3]}"
            sizes = [
                sum(
                    r.bytes
                    for n, r in checkpoint.manifest.files.items()
                    if n.endswith(f"-{rank:05d}.safetensors") and n.startswith("master")
                )
                for rank in range(world)
            ]
            assert max(sizes) < 1.3 * min(sizes), f"the ranks share the work: {sizes}"


@pytest.mark.full
def test_muons_moments_go_from_any_layout_to_any(two_ranks, tmp_path):
    """Each is read by every other layout bit for bit; matrices have one."""
    words = "train.optimizer=muon"
    source = make_checkpoint(tmp_path / "0", settings(words), step=7).parent
    for number, (ep, stage, bf16) in enumerate([(2, 1, False), (1, 0, False), (1, 2, True)]):
        folder = tmp_path / str(number + 1)
        layout = (str(folder), str(source), 2, ep, stage, bf16, None, words)
        assert two_ranks.run(everything, *layout) == [[], []]
        there, here = Checkpoint(source), Checkpoint(folder)
        for kind in KINDS:
            before, now = there.tensors(kind), here.tensors(kind)
            assert before.keys() == now.keys()
            assert all(torch.equal(now[name], before[name]) for name in before)
        moments = set(here.tensors(FIRST_MOMENT)) - set(here.tensors(SECOND_MOMENT))
        assert moments and moments == set(filter(is_matrix, here.tensors(MASTER)))
        source = folder


def interrupted(folder: str, variant: str) -> bool:
    """Three steps, and two from which a new engine resumes for the third."""
    case = Case(2, 2, 1, "none", 1, "rank", 8, variant)
    whole, first, second = (start_training(case, 0, torch.device("cpu"), 3) for _ in range(3))
    wanted = [whole.step(step).loss for step in range(3)]
    found = [first.step(step).loss for step in range(2)]
    with Saver(Path(folder), first.config, first.layout, first.groups) as saver:
        saver.save(2, first.engine, first.ema)
        saver.wait()
        saver.outcomes()
    said: list[str] = []
    checkpoint = newest_usable(Path(folder), second.groups, said.append)
    assert restore(checkpoint, second.engine, second.ema, second.groups, said.append) == 2
    found.append(second.step(2).loss)
    assert found == wanted, (found, wanted)
    here, there = (running_buffers(each.model) for each in (second, whole))
    assert here and all(torch.equal(here[name], there[name]) for name in there)
    moved = [value for name, value in there.items() if name.endswith(".value")]
    assert all(value.std() > 0 or variant == "race" for value in moved)
    for training in (whole, first, second):
        training.engine.engine.destroy()
    return True


@pytest.mark.full
@pytest.mark.parametrize("variant", ["tc-bias", "threshold", "race", "muon"])
def test_what_routers_learn_beside_weights_goes_on_from_a_checkpoint(two_ranks, tmp_path, variant):
    assert two_ranks.run(interrupted, str(tmp_path), variant) == [True, True]


# ------------------------------------------------------------------------------------------------
# while training


def save_both_ways(folder: str) -> tuple[bool, float]:
    """The same state with and without a thread; with it, the state moves on while the thread
    writes.
    """
    found = []
    for background in ("false", "true"):
        config = settings(f"train.async_save={background}", "parallel.ep=2")
        engine, ema, layout, groups = start(config, 2)
        fill(engine, ema)
        with Saver(Path(folder) / background, config, layout, groups) as saver:
            saver.save(3, engine, ema)
            if background == "true":
                assert saver._job is not None
            else:
                assert saver._job is None, "nothing is left to do"
            for shards in shards_of(engine, ema).values():
                for shard in shards:
                    shard.detach().add_(1)
            saver.wait()
            assert saver._job is None and not saver.failed
            found += saver.outcomes()
        engine.engine.destroy()
    assert [type(outcome) for outcome in found] == [Saved, Saved]
    return True


@pytest.mark.full
def test_a_save_beside_training_writes_what_was_there_when_it_began(two_ranks, tmp_path):
    two_ranks.run(save_both_ways, str(tmp_path))
    waiting, beside = (tmp_path / name / "step_00000003" for name in ("false", "true"))
    names = sorted(path.name for path in waiting.iterdir())
    assert names == sorted(path.name for path in beside.iterdir()) and len(names) == 2 * 5 + 2
    for name in names:
        if name != "checkpoint.json":
            assert (waiting / name).read_bytes() == (beside / name).read_bytes(), name
    both = [json.loads((path / "checkpoint.json").read_text()) for path in (waiting, beside)]
    assert both[0]["files"] == both[1]["files"]


def fail_on(folder: str, which: int, background: str) -> list[str]:
    """Rank ``which`` may write no more than 20 kB a file; the other's part succeeds."""
    config = settings(f"train.async_save={background}", "parallel.ep=2", "train.keep=1")
    engine, ema, layout, groups = start(config, 2)
    fill(engine, ema)
    saver = Saver(Path(folder), config, layout, groups)
    saver.save(1, engine, ema)
    saver.wait()
    assert [type(outcome) for outcome in saver.outcomes()] == [Saved]
    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    if groups.rank == which:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, kept[1]))
    saver.save(2, engine, ema)
    deadline = time.monotonic() + 60
    while (
        background == "true"
        and groups.rank == which
        and not saver.failed
        and time.monotonic() < deadline
    ):
        time.sleep(0.01)  # a rank knows of its own failure without asking anybody
    failed_here = saver.failed
    saver.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, kept)
    (failed,) = saver.outcomes()
    assert isinstance(failed, SaveFailed) and failed.step == 2
    there = sorted(path.name for path in Path(folder).iterdir())
    saver.wait()  # nothing to do
    raise_together(None, groups.world)  # both have looked
    saver.save(3, engine, ema)
    saver.wait()
    assert [type(outcome) for outcome in saver.outcomes()] == [Saved]
    engine.engine.destroy()
    return [failed.message, *there, str(failed_here)]


@pytest.mark.full
@pytest.mark.parametrize(("which", "background"), [(0, "true"), (1, "true"), (1, "false")])
def test_a_full_disk_on_one_rank_fails_the_save_on_all_and_harms_nothing(
    two_ranks, tmp_path, which, background
):
    found = two_ranks.run(fail_on, str(tmp_path), which, background)
    for rank, (message, *there, failed_here) in enumerate(found):
        assert message == f"rank {which}: [Errno {errno.EFBIG}] File too large"
        assert there == ["step_00000001"], "the last good one stands, the partial one is gone"
        assert failed_here == str(rank == which and background == "true")
    assert [path.name for path in complete_folders(tmp_path)] == ["step_00000003"]
    assert list(Checkpoint(tmp_path).tensors("master")) and not list(tmp_path.glob(".*"))


def fail_the_commit(folder: str) -> str:
    config = settings("parallel.ep=2")
    engine, ema, layout, groups = start(config, 2)

    def refuse(*_arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    kept, writer.commit = writer.commit, refuse
    try:
        saver = Saver(Path(folder), config, layout, groups)
        saver.save(1, engine, ema)
        saver.wait()
    finally:
        writer.commit = kept
    engine.engine.destroy()
    (outcome,) = [o for o in saver.outcomes() if isinstance(o, SaveFailed)]
    return outcome.message


def test_a_disk_that_is_full_at_the_very_end(two_ranks, tmp_path):
    assert (
        two_ranks.run(fail_the_commit, str(tmp_path))
        == ["rank 0: [Errno 28] No space left on device"] * 2
    )
    assert list(tmp_path.iterdir()) == []


def measure(folder: str) -> tuple[int, int, int, int]:
    """(bytes of state, growth of memory of a streamed save, of a save with a snapshot, of a
    load).
    """
    grown = []
    for background in ("false", "true"):
        config = settings(
            "model.width=192",
            "model.depth=4",
            "model.heads=4",
            "moe.experts=16",
            "parallel.ep=1",
            f"train.async_save={background}",
        )
        engine, ema, layout, groups = start(config, 1)
        saver = Saver(Path(folder) / background, config, layout, groups)
        grown.append(peak_growth(lambda: (saver.save(1, engine, ema), saver.wait())))
        assert [type(outcome) for outcome in saver.outcomes()] == [Saved]
    found = newest_usable(Path(folder), groups, print) or Checkpoint(Path(folder) / "true")
    reading = peak_growth(restore, found, engine, ema, groups, print)
    size = sum(shard.nbytes for shards in shards_of(engine, ema).values() for shard in shards)
    assert (
        sum(place.piece.stop - place.piece.start for place in owned(engine)) * 4 * len(KINDS)
        <= size
    )
    engine.engine.destroy()
    return size, *grown, reading


@pytest.mark.full
def test_memory_of_saving_and_loading_is_bounded(tmp_path):
    with Ranks(1, timeout=300.0) as rank:
        ((size, streamed, snapshot, reading),) = rank.run(measure, str(tmp_path))
    assert size > 2 * STREAMING_BYTES, "or the test would show nothing"
    assert streamed < STREAMING_BYTES and reading < STREAMING_BYTES, (size, streamed, reading)
    assert snapshot < size + STREAMING_BYTES, (size, snapshot)


# ------------------------------------------------------------------------------------------------
# several averages


@pytest.mark.full
def test_several_averages_are_each_what_it_would_be_alone(two_ranks, tmp_path):
    both = [
        "train.ema=[0.7, 0.5]",
        "train.steps=3",
        "train.save_every=2",
        "train.schedule=constant",
    ]
    two_ranks.run(train_here, tiny(tmp_path / "both", *both), 2)
    two_ranks.run(train_here, tiny(tmp_path / "alone", *both, "train.ema=0.5"), 2)
    first, second = (Checkpoint(tmp_path / name) for name in ("both", "alone"))
    assert first.manifest.emas == (0.7, 0.5) and second.manifest.emas == (0.5,)
    for name, value in second.weights("ema").items():
        assert torch.equal(first.weights("ema:0.5")[name], value)
    assert any(
        not torch.equal(first.weights("ema")[name], value)
        for name, value in first.weights("ema:0.5").items()
    )
    sample = ["sample", "--checkpoint", str(tmp_path / "both"), "--count", "2", "--out"]
    for result, text in zip(
        run_cases(
            1,
            [
                [*sample, str(tmp_path / "s"), "--weights", "ema:0.5"],
                [*sample, str(tmp_path / "t")],
                [*sample, str(tmp_path / "u"), "--weights", "ema:0.6"],
            ],
        ),
        (
            "step 3, ema:0.5 weights",
            "step 3, ema weights",
            "weights 'ema:0.6' must be one of raw, ema, ema:0.7, ema:0.5 for",
        ),
        strict=True,
    ):
        assert text in result[0].stdout + result[0].stderr, result
    assert (tmp_path / "s.npz").read_bytes() != (tmp_path / "t.npz").read_bytes()


def resumed(arguments: list[str]) -> list[str]:
    """What is said when a run goes on with another list of averages."""
    config = load_config(tiny_config(), [a for a in arguments if "=" in a])
    engine, ema, layout, groups = start(config, 2)
    said: list[str] = []
    found = newest_usable(Path(config.run.folder) / "checkpoints", groups, said.append)
    restore(found, engine, ema, groups, said.append)
    same = all(torch.equal(a, b) for a, b in zip(ema.by_decay[0.2], engine.masters))
    engine.engine.destroy()
    return [*said, str(same), str(len(ema.by_decay))]


@pytest.mark.full
def test_an_average_that_the_checkpoint_has_not_starts_from_the_weights(two_ranks):
    folder, _ = trained()
    said, same, count = two_ranks.run(resumed, [f"run.folder={folder}", "train.ema=[0.7, 0.2]"])[0]
    assert said.endswith("step_00000008 has no ema_0.2; it starts from the weights") and (
        same,
        count,
    ) == ("True", "2")
