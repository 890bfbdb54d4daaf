"""Which rank is named as the one that holds the others up: by hand-written times, and in training
in which one rank is slow.
"""

import itertools
import json
import os
import time

import pytest
import torch

from diffmoe.config import RunConfig
from diffmoe.parallel import step_clock
from diffmoe.parallel.groups import single_process
from diffmoe.parallel.step_clock import StepClock
from diffmoe.training import stragglers
from diffmoe.training.metrics import progress_line, read_metrics
from diffmoe.training.stragglers import Stragglers, find_straggler
from programs import Nursery, losses, tiny, trained, zero

SLEEP = 0.4  # seconds a step: many times what a tiny model's step is


def slowed(arguments):
    """run.py, where rank ``arguments[0]`` sleeps in every forward or reading."""
    from diffmoe.data.feed import Feed
    from diffmoe.training.engine import Engine
    from run import main

    victim, where, *arguments = arguments
    owner, name = {"forward": (Engine, "forward"), "data": (Feed, "read_ahead")}[where]
    kept = getattr(owner, name)

    def sleepy(*given):
        time.sleep(SLEEP)
        return kept(*given)

    if os.environ["RANK"] == victim:
        setattr(owner, name, sleepy)
    return main(arguments)


@pytest.fixture(scope="module")
def nursery():
    return Nursery("test_stragglers:slowed")


def ran(nursery, folder, world, victim, where, *more, deepspeed=None):
    """The records of 24 steps, and the events about stragglers."""
    path = folder / "deepspeed.json"
    path.write_text(json.dumps(deepspeed or zero(1)))
    run = folder / "run"
    steps = ("train.steps=24", "train.log_every=3", "train.save_every=0")
    ends = nursery.run(
        world, victim, where, *tiny(run, *steps, *more), f"--deepspeed_config={path}"
    )
    assert [end.returncode for end in ends] == [0] * world, ends
    events = run / "events.jsonl"
    lines = events.read_text().splitlines() if events.exists() else []
    found = [event for event in map(json.loads, lines) if "straggler" in event["event"]]
    return read_metrics(run / "metrics.jsonl"), found, ends[0].stdout


@pytest.mark.full
@pytest.mark.parametrize(
    "world, victim, where, ep, deepspeed",
    [
        (4, 2, "forward", 2, zero(1)),
        (2, 1, "data", 1, zero(1, bf16=True)),
        (4, 3, "data", 1, zero(2, mics_shard_size=2)),
        (2, 0, "forward", 2, zero(3)),
    ],
)
def test_a_slow_rank_is_named_within_30_steps(
    nursery, tmp_path, world, victim, where, ep, deepspeed
):
    records, events, said = ran(
        nursery, tmp_path, world, str(victim), where, f"parallel.ep={ep}", deepspeed=deepspeed
    )
    assert [event["event"] for event in events] == ["straggler"]
    assert f"rank {victim} on {os.uname().nodename} is " in events[0]["text"]
    last = records[-1]
    assert last["straggler"].startswith(f"rank {victim} on {os.uname().nodename}, ")
    assert (last["slowest_rank"], last["slowest_host"]) == (victim, os.uname().nodename)
    assert f"slow: {last['straggler']}" in said
    own = "step_data_s" if where == "data" else "step_compute_s"
    for record in records[1:]:
        assert record[own] >= SLEEP / world
        assert record["step_waiting_s"] >= 0.5 * SLEEP * (world - 1) / world  # the others'
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "run/tensorboard"))
    board.Reload()
    assert "straggler/text_summary" in board.Tags()["tensors"]
    assert "slowest_behind" in board.Tags()["scalars"]


@pytest.mark.full
def test_no_rank_is_named_where_none_is_slow(nursery, tmp_path):
    """By a factor that a busy machine does not reach in most of 20 steps."""
    records, events, said = ran(nursery, tmp_path, 4, "none", "data", "run.straggler_factor=3")
    assert events == [] and "slow:" not in said
    assert all("straggler" not in record and record["step_compute_s"] > 0 for record in records)


@pytest.mark.full
def test_what_is_not_measured_changes_nothing(nursery, tmp_path):
    measured, _ = trained()
    assert "step_compute_s" in read_metrics(measured / "metrics.jsonl")[-1]
    run = tmp_path / "off"
    ends = nursery.run(2, "none", "data", *tiny(run, "run.straggler_factor=0"))
    assert [end.returncode for end in ends] == [0, 0]
    assert losses(run) == losses(measured)
    last = read_metrics(run / "metrics.jsonl")[-1]
    assert not [name for name in last if name.startswith(("step_", "slowest"))]


# --------------------------------------------------------------------------------------------------
# by hand-written times


def noise(steps, ranks, seed=0):
    """Seconds of busy ranks: every step of a rank takes from 1 to 1.5 times the least."""
    return 0.1 * (1 + 0.5 * torch.rand(steps, ranks, generator=torch.manual_seed(seed)))


@pytest.mark.parametrize("ranks", [2, 3, 8, 1000])
def test_noise_is_no_straggler(ranks):
    assert all(find_straggler(noise(20, ranks, seed), 1.1) is None for seed in range(5))


@pytest.mark.parametrize("ranks", [2, 3, 8, 1000])
def test_a_rank_that_is_behind_in_most_steps_is_one(ranks):
    busy = noise(20, ranks)
    busy[:, 1] = 0.2
    busy[3:5, 1] = 0.05  # now and then a step of it is quick
    assert find_straggler(busy, 1.1) == 1
    busy[3:6, 1] = 0.05
    assert find_straggler(busy, 1.1) is None


def test_of_a_slow_node_the_slowest_rank():
    busy = torch.full((20, 4), 0.1)
    busy[:, 2], busy[:, 3] = 0.13, 0.12
    assert find_straggler(busy, 1.1) == 2
    busy[:, 2:] = 0.109
    assert find_straggler(busy, 1.1) is None


def test_one_long_step_is_no_straggler():
    busy = torch.full((20, 4), 0.1)
    busy[7, 3] = 100.0
    assert find_straggler(busy, 1.1) is None


@pytest.fixture
def told(monkeypatch, tmp_path):
    """A Stragglers of four ranks on two hosts, in Slurm's job 7; what ranks say is put into
    ``told.parts_RS3``.
    """
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    groups = single_process()
    found = Stragglers(
        RunConfig(folder=str(tmp_path)), groups, None, torch.device("cpu"), ["a", "a", "b", "b"]
    )
    assert not found.on, "one rank has nobody to wait for"
    monkeypatch.setattr(groups.trace.clock, "read", lambda: [(0.0, 0.0, 0.0)])
    monkeypatch.setattr(stragglers, "gather_stack", lambda mine, group: found.parts_RS3)
    found._recent_SR = torch.zeros(0, 4)
    return found


def parts(steps, own, exchange, data=(0.0,) * 4):
    return torch.tensor([own, exchange, data]).T[:, None].expand(4, steps, 3)


LATE = (0.10, 0.10, 0.10, 0.13), (0.05, 0.05, 0.05, 0.02)  # rank 3 waits for nobody
EVEN = (0.10,) * 4, (0.02,) * 4


def test_a_straggler_is_named_once_and_recovers(told):
    told.parts_RS3 = parts(10, *LATE)
    record, news = told.collect()
    assert news is None and "straggler" not in record, "10 steps are not 20"
    assert record["slowest_rank"] == 3 and record["slowest_host"] == "b"
    assert record["slowest_behind"] == pytest.approx(0.3)
    assert record["step_exchange_s"] == pytest.approx(0.02)
    assert record["step_waiting_s"] == pytest.approx(0.75 * 0.03)
    record, (kind, text) = told.collect()
    assert kind == "straggler" and record["straggler"] == "rank 3 on b, 30 % behind"
    assert text == (
        "rank 3 on b is 30 % behind the median rank for 20 steps: compute 0.1300 s a step "
        "(median 0.1000), data 0.0000 s a step (median 0.0000)"
    )
    record, news = told.collect()
    assert news is None and "straggler" in record
    told.parts_RS3 = parts(10, *EVEN)
    record, news = told.collect()
    assert news == ("straggler over", "rank 3 on b is no longer behind")
    assert "straggler" not in record


def test_waiting_for_data_is_a_ranks_own(told):
    told.parts_RS3 = parts(20, EVEN[0], (0.05, 0.0, 0.05, 0.05), (0.0, 0.05, 0.0, 0.0))
    record, (_, text) = told.collect()
    assert record["straggler"] == "rank 1 on a, 50 % behind"
    assert text.endswith("data 0.0500 s a step (median 0.0000)")


def test_preflights_figures_stand_beside_it(told, tmp_path):
    (tmp_path / "jobs/7").mkdir(parents=True)
    rows = [{"rank": i, "host": told.hosts[i], "TFLOP/s": 600.0 - 100 * (i == 3)} for i in range(4)]
    record = tmp_path / "jobs/7/preflight.json"
    record.write_text(json.dumps(rows))
    told.parts_RS3 = parts(20, *LATE)
    assert told.collect()[1][1].endswith(", preflight 500 TFLOP/s (median 600)")
    record.write_text('[{"rank": 3}]')
    assert told._preflight(3) == []
    rows[3]["host"] = "a"  # the job started again on other nodes
    record.write_text(json.dumps(rows))
    assert told._preflight(3) == []


def test_a_jobs_script_is_told_which_hosts_to_leave_out(told, tmp_path):
    told.named = 3
    assert told.exclude() == "this is no job of scripts/slurm"
    (tmp_path / "jobs/7").mkdir(parents=True)
    assert told.exclude() is None
    assert told.exclude() == "it was to be excluded before"
    told.named = 0
    assert told.exclude() is None
    assert (tmp_path / "jobs/7/exclude.txt").read_text() == "b\na\n"
    (tmp_path / "jobs/7/exclude.txt").write_text("c\nd\ne\n")
    assert told.exclude() == "3 nodes are excluded already: c, d, e"


def test_the_progress_line_names_it():
    record = {"step": 30, "loss": 1.0, "grad_norm": 1.0, "lr": 1e-4, "images_per_s": 1.0}
    record |= {"mfu": 0.5, "memory_gib": 1.0, "straggler": "rank 3 on b, 30 % behind"}
    assert progress_line(record, 60).endswith("  slow: rank 3 on b, 30 % behind")


# --------------------------------------------------------------------------------------------------
# the clock


def test_waits_of_a_step_on_a_cpu(monkeypatch):
    ticks = itertools.count()  # each look at the clock is a second later
    monkeypatch.setattr(step_clock.time, "perf_counter", lambda: float(next(ticks)))
    clock = StepClock(torch.device("cpu"))
    for _ in range(2):
        with clock.waiting("exchange"):  # of no step
            pass
        clock.begin_step()
        with clock.waiting("data"):
            pass
        with clock.waiting("exchange"), clock.waiting("exchange"):  # counted once
            pass
        assert clock.read() == []
        clock.end_step()
    assert clock.read() == [(3.0, 1.0, 1.0)], "the newest comes with the next"
    clock.begin_step()
    clock.begin_step()  # the first one came to nothing
    clock.end_step()
    assert clock.read() == [(3.0, 1.0, 1.0)]
    clock.begin_step()
    clock.end_step()
    assert clock.read() == [(1.0, 0.0, 0.0)]


def test_nothing_is_measured_without_a_device(monkeypatch):
    def looked():
        raise AssertionError("the clock was looked at")

    monkeypatch.setattr(step_clock.time, "perf_counter", looked)
    clock = StepClock()
    clock.begin_step()
    with clock.waiting("exchange"):
        pass
    clock.end_step()
    assert clock.read() == []


def test_on_a_gpu_events_are_read_a_step_later_and_used_again(monkeypatch):
    """Events stand in for CUDA's: one may be asked once the host has read from the device."""

    class Event:
        made = 0
        ticks = itertools.count()

        def __init__(self, enable_timing):
            assert enable_timing
            Event.made += 1

        def record(self, stream):
            assert stream == "compute"
            self.at, self.there = next(Event.ticks), False
            recorded.append(self)

        def elapsed_time(self, other):
            assert self.there and other.there, "the host would have to wait"
            return 1000.0 * (other.at - self.at)

    recorded, current = [], ["compute"]
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: current[0])
    clock = StepClock(torch.device("cuda"))
    for _ in range(5):
        clock.begin_step()
        with clock.waiting("exchange"):
            pass
        current[0] = "reduction"  # runs beside the compute stream, which waits for nothing
        with clock.waiting("exchange"):
            pass
        current[0] = "compute"
        with clock.waiting("exchange"):  # for the reduction
            pass
        for event in recorded:  # the one read of a step
            event.there = True
        clock.end_step()
    assert clock.read() == [(3.0, 2.0, 0.0)] * 4
    assert Event.made == 2 * 6
