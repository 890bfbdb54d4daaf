"""Every kind of ``run.py bench`` at a small size: that it runs, and that its ratios are those of its own figures."""

import json
import math

import pytest

from programs import run_cases

SMALL = ["--experts", "4", "--repeats", "1", "--json", "--set", "model.width=32", "model.heads=2", "model.depth=2",
         "model.input_size=8"]
KINDS = {
    "moe-layer": ["--tokens", "64"],
    "step": ["--samples", "2", "--recompute", "--loop"],
    "sampling": ["--samples", "2"],
    "communication": ["--samples", "1", "--worlds", "2"],
}


@pytest.fixture(scope="module")
def records():
    """Kind -> what it printed."""
    found = run_cases(1, [["bench", kind, *options, *SMALL] for kind, options in KINDS.items()])
    assert [[result.returncode for result in case] for case in found] == [[0]] * len(KINDS), found
    return {kind: json.loads(case[0].stdout.splitlines()[-1]) for kind, case in zip(KINDS, found)}


def test_the_layer_beside_its_contenders(records):
    record = records["moe-layer"]
    contenders = record["contenders"]
    assert set(contenders) == {"ours", "dense", "floor", "loop", "deepspeed"}
    seconds, peak = ({name: c[key] for name, c in contenders.items()} for key in ("seconds", "peak_bytes"))
    assert math.isclose(record["time_over_dense"], seconds["ours"] / seconds["dense"])
    assert math.isclose(record["loop_time_over_ours"], seconds["loop"] / seconds["ours"])
    assert math.isclose(record["deepspeed_time_over_ours"], seconds["deepspeed"] / seconds["ours"])
    assert math.isclose(record["activation_memory_over_dense"], peak["ours"] / peak["dense"])
    assert math.isclose(record["activation_memory_over_loop"], peak["ours"] / peak["loop"])
    assert min(*seconds.values(), *peak.values()) > 0
    assert {"torch", "deepspeed", "device", "cores", "threads"} <= set(record)


def test_a_step_with_recompute(records):
    record = records["step"]
    assert set(record["seconds"]) == {"ours", "dense", "block", "selective", "loop"}
    assert record["peak_bytes"]["block"] < record["peak_bytes"]["selective"] < record["peak_bytes"]["ours"]
    assert math.isclose(record["time_over_dense"], record["seconds"]["ours"] / record["seconds"]["dense"])


def test_sampling_meets_as_many_experts_as_it_is_asked(records):
    met = records["sampling"]["experts_met"]
    assert met["0.7"] < met["1"]
    assert set(records["sampling"]["mixtures_over_first"]) == {"1", "0.7"}


def test_communication_counts_what_leaves(records):
    calls = {(case["ep"], case["pool"]): case["collectives"] for case in records["communication"]["cases"]}
    assert calls[1, "rank"] == {} and calls[2, "rank"].keys() == {"all_to_all_single"}
    assert calls[2, "rank"]["all_to_all_single"][0] == 4  # rows there and back, in forward and in backward
