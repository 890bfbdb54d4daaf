"""Every kind of ``run.py bench`` at a small size: that it runs, and that its ratios are those of its own figures."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch

from diffmoe.bench import measure
from diffmoe.bench.step import most_samples
from diffmoe.errors import UserError
from programs import REPOSITORY, run_cases

SMALL = ["--experts", "4", "--repeats", "1", "--json", "--set", "model.width=32", "model.heads=2", "model.depth=2",
         "model.input_size=8"]
KINDS = {
    "moe-layer": ["--tokens", "64"],
    "step": ["--samples", "2", "--accumulation", "2", "--recompute", "--loop", "--profile"],
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
    assert set(contenders) == {"ours", "dense", "floor", "loop", "deepspeed", "deepspeed+predictor"}
    seconds, peak = ({name: c[key] for name, c in contenders.items()} for key in ("seconds", "peak_bytes"))
    assert math.isclose(record["time_over_dense"], seconds["ours"] / seconds["dense"])
    assert math.isclose(record["loop_time_over_ours"], seconds["loop"] / seconds["ours"])
    assert math.isclose(record["deepspeed_time_over_ours"], seconds["deepspeed"] / seconds["ours"])
    assert math.isclose(record["deepspeed_with_predictor_time_over_ours"], seconds["deepspeed+predictor"] / seconds["ours"])
    assert math.isclose(record["activation_memory_over_dense"], peak["ours"] / peak["dense"])
    assert math.isclose(record["activation_memory_over_loop"], peak["ours"] / peak["loop"])
    assert min(*seconds.values(), *peak.values()) > 0
    assert {"torch", "deepspeed", "device", "cores", "threads"} <= set(record)


def test_a_step_with_recompute(records):
    record = records["step"]
    assert set(record["seconds"]) == {"ours", "dense", "block", "selective", "loop"}
    assert record["peak_bytes"]["block"] < record["peak_bytes"]["selective"] < record["peak_bytes"]["ours"]
    assert math.isclose(record["time_over_dense"], record["seconds"]["ours"] / record["seconds"]["dense"])
    assert record["images_per_second"]["ours"] == pytest.approx(2 * 2 / record["seconds"]["ours"])


def test_a_profile_says_where_the_time_goes(records):
    profile = records["step"]["profile"]
    assert set(profile) == set(records["step"]["seconds"])
    assert all(ms == sorted(ms, reverse=True) for ms in ([row[1] for row in rows] for rows in profile.values()))


def test_a_profile_counts_calls():
    """Of all operators: which ones are the dearest of a small model is the machine's affair."""
    linear, x = torch.nn.Linear(8, 8), torch.ones(4, 8)
    found, text = measure.profiles({"one": lambda: linear(x), "two": lambda: linear(linear(x))}, torch.device("cpu"), top=1000)
    calls = {name: {operator: calls for operator, _, calls in rows} for name, rows in found.items()}
    assert (calls["one"]["aten::addmm"], calls["two"]["aten::addmm"]) == (1, 2) and "aten::addmm" in text


@pytest.mark.parametrize("room,wanted", [(1000, 64), (660, 64), (650, 32), (60, 4), (39, 1), (30, 1)])
def test_as_many_samples_as_fit(room, wanted):
    """20 bytes, and 10 for each sample."""
    assert most_samples(20 + 40, 20 + 80, 4, room) == wanted


def test_no_room_for_a_sample_is_refused():
    with pytest.raises(UserError, match=r"^--samples \(fit\): one sample needs 30 bytes, there is room for 25$"):
        most_samples(20 + 40, 20 + 80, 4, 25)


def test_the_gpus_script_refuses_what_it_does_not_know(tmp_path):
    run = subprocess.run(["bash", str(REPOSITORY / "scripts/bench_gpu.sh"), str(tmp_path), "paritty"], capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr == "error: part (paritty) must be parity, layer, step, sampling or train\n"


@pytest.mark.slow
def test_the_gpus_script_runs_dry(tmp_path):
    """Minutes: every part on the CPU, at sizes that say nothing."""
    env = {**os.environ, "BENCH_TINY": "1", "PYTHON": sys.executable, "DS_ACCELERATOR": "cpu"}
    subprocess.run(["bash", str(REPOSITORY / "scripts/bench_gpu.sh"), str(tmp_path)], env=env, check=True, timeout=900)
    kept = {path.name for path in tmp_path.iterdir()}
    assert {"parity.json", "parity_compiled.json", "moe_layer_l_e16_256.json", "step_xl_e8_1_compile.json", "step_l_e16_1_recompute.json",
            "sampling_xl_e8_1.json", "train_l_e16.txt"} <= kept
    assert len((tmp_path / "train.jsonl").read_text().splitlines()) == 4


def test_sampling_meets_as_many_experts_as_it_is_asked(records):
    met = records["sampling"]["experts_met"]
    assert met["0.7"] < met["1"]
    assert set(records["sampling"]["mixtures_over_first"]) == {"1", "0.7"}


def test_communication_counts_what_leaves(records):
    calls = {(case["ep"], case["pool"]): case["collectives"] for case in records["communication"]["cases"]}
    assert calls[1, "rank"] == {} and calls[2, "rank"].keys() == {"all_to_all_single"}
    assert calls[2, "rank"]["all_to_all_single"][0] == 4  # rows there and back, in forward and in backward
