"""Every kind of ``run.py bench`` at a small size: that it runs, and that its ratios are those of
its own figures.
"""

import json
import math

import pytest
import torch

from diffmoe.bench import measure, probe, step
from diffmoe.bench.train import Program, complaints
from diffmoe.commands import bench
from diffmoe.config import load_config
from diffmoe.deepspeed_json import merge_deepspeed
from diffmoe.environment import detect
from diffmoe.errors import UserError
from diffmoe.layout import resolve_layout
from diffmoe.parallel.groups import single_process
from diffmoe.parity import synthetic
from programs import run_cases

SMALL = [
    "--experts",
    "4",
    "--repeats",
    "1",
    "--json",
    "--set",
    "model.width=32",
    "model.heads=2",
    "model.depth=2",
    "model.input_size=8",
]
KINDS = {
    "moe-layer": ["--tokens", "64"],
    "step": ["--samples", "2", "--accumulation", "2", "--recompute", "--profile"],
    "sampling": ["--samples", "2"],
    "communication": ["--samples", "1", "--worlds", "2,4", "--per-host", "2"],
}


@pytest.fixture(scope="module")
def records():
    """Kind -> what it printed."""
    found = run_cases(1, [["bench", kind, *options, *SMALL] for kind, options in KINDS.items()])
    assert [[result.returncode for result in case] for case in found] == [[0]] * len(KINDS), found
    return {kind: json.loads(case[0].stdout.splitlines()[-1]) for kind, case in zip(KINDS, found)}


@pytest.mark.full
def test_the_layer_beside_its_baselines(records):
    record = records["moe-layer"]
    layers = record["contenders"]  # the records' word
    assert set(layers) == {"ours", "dense", "loop", "deepspeed", "deepspeed+predictor"}
    seconds, peak = (
        {name: c[key] for name, c in layers.items()} for key in ("seconds", "peak_bytes")
    )
    assert math.isclose(record["time_over_dense"], seconds["ours"] / seconds["dense"])
    assert math.isclose(record["loop_time_over_ours"], seconds["loop"] / seconds["ours"])
    assert math.isclose(record["deepspeed_time_over_ours"], seconds["deepspeed"] / seconds["ours"])
    assert math.isclose(
        record["deepspeed_with_predictor_time_over_ours"],
        seconds["deepspeed+predictor"] / seconds["ours"],
    )
    assert math.isclose(record["activation_memory_over_dense"], peak["ours"] / peak["dense"])
    assert math.isclose(record["activation_memory_over_loop"], peak["ours"] / peak["loop"])
    assert min(*seconds.values(), *peak.values()) > 0
    assert {"torch", "deepspeed", "device", "cores", "threads"} <= set(record)


@pytest.mark.full
def test_a_step_with_recompute(records):
    record = records["step"]
    assert set(record["seconds"]) == {"ours", "dense", "block", "selective"}
    assert (
        record["peak_bytes"]["block"]
        < record["peak_bytes"]["selective"]
        < record["peak_bytes"]["ours"]
    )
    assert math.isclose(
        record["time_over_dense"], record["seconds"]["ours"] / record["seconds"]["dense"]
    )
    assert record["images_per_second"]["ours"] == pytest.approx(2 * 2 / record["seconds"]["ours"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["step", "--samples", "0"], "argument --samples: 0 must be at least 1"),
        (["moe-layer", "--tokens", "100"], r"--tokens \(100\) must be whole samples of 256"),
        (["moe-layer", "--only", "ours"], r"--only \(ours\) must hold ours and dense"),
        (["communication", "--worlds", "2,x"], r"--worlds \(2,x\) must be whole numbers above 0"),
        (
            ["communication", "--worlds", "2", "--per-host", "2"],
            r"--per-host \(2\) must be 2 or more and one of --worlds \(2\) a larger multiple",
        ),
        (["train"], "--out .* is missing"),
    ],
)
def test_bad_command_lines(arguments, message):
    with pytest.raises(UserError, match=message):
        bench.main(arguments, detect())


@pytest.mark.full
def test_a_profile_says_where_the_time_goes(records):
    profile = records["step"]["profile"]
    assert set(profile) == set(records["step"]["seconds"])
    assert all(
        ms == sorted(ms, reverse=True)
        for ms in ([row[1] for row in rows] for rows in profile.values())
    )


def test_a_profile_counts_calls():
    """Of all operators: which ones are the dearest of a small model is the machine's affair."""
    linear, x = torch.nn.Linear(8, 8), torch.ones(4, 8)
    found, text = measure.profiles(
        {"one": lambda: linear(x), "two": lambda: linear(linear(x))}, torch.device("cpu"), top=1000
    )
    calls = {name: {operator: calls for operator, _, calls in rows} for name, rows in found.items()}
    assert (calls["one"]["aten::addmm"], calls["two"]["aten::addmm"]) == (
        1,
        2,
    ) and "aten::addmm" in text


@pytest.mark.full
def test_sampling_meets_as_many_experts_as_it_is_asked(records):
    met = records["sampling"]["experts_met"]
    assert met["0.7"] < met["1"]
    assert set(records["sampling"]["mixtures_over_first"]) == {"1", "0.7"}


@pytest.mark.full
def test_communication_counts_what_leaves(records):
    cases = records["communication"]["cases"]
    calls = {
        (case["ep"], case["pool"]): case["collectives"] for case in cases if case["ranks"] == 2
    }
    assert calls[1, "rank"] == {} and calls[2, "rank"].keys() == {"all_to_all_single"}
    assert (
        calls[2, "rank"]["all_to_all_single"][0] == 4
    )  # rows there and back, in forward and in backward
    direct, two = (
        next(
            case["collectives"]["all_to_all_single"]
            for case in cases
            if (case["ep"], case["pool"], case["exchange"]) == (4, "rank", form)
        )
        for form in ("direct", "two_level")
    )
    assert [two[0], two[1]] == [2 * direct[0], 2 * direct[1]]  # all rows, on either level


# ------------------------------------------------------------------------------------- steps taken
# apart, probes, trainings


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        (
            "void "
            "cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_tn_align8>",
            "products",
        ),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT", "products"),
        (
            "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x64x64_warpgroupsize1x1x1_execute_kernel__5x_cudnn",
            "products",
        ),
        ("triton_tem_fused_mm_5", "products"),
        ("aten::baddbmm", "products"),
        ("aten::_grouped_mm", "products"),
        ("aten::convolution_backward", "products"),
        (
            "void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<64, 128>>",
            "attention",
        ),
        (
            "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x64x64_4x1x1_cga1x1x1_kernel0_0",
            "attention",
        ),
        ("fmha_cutlassB_bf16_aligned_64x64_k64_dropout_sm80", "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "messages"),
        ("gloo:all_to_all", "messages"),
        ("triton_poi_fused_add_mul_3", "memory"),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add>",
            "memory",
        ),
        ("Memcpy DtoD (Device -> Device)", "memory"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "memory"),
        ("aten::sum", "memory"),
        ("aten::addcmul_", "memory"),
    ],
)
def test_kernels_by_name(kernel, kind):
    assert measure.kind_of(kernel) == kind


class Made(Exception):
    pass


@pytest.mark.parametrize(
    "config", ["dense_l_flow", "tc_l_e16_flow", "ec_l_e16_flow", "diffmoe_l_e16_flow"]
)
@pytest.mark.parametrize(
    "tree",
    [
        {"zero_optimization": {"stage": 2}},
        {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}},
    ],
)
def test_what_is_timed_is_of_the_family_and_json_that_are_priced(config, tree, monkeypatch):
    """As far as the engine, which is handed both."""
    small = [
        "model.width=32",
        "model.heads=2",
        "model.depth=2",
        "parallel.ep=1",
        "train.batch=4",
        "train.micro_batch=2",
    ]
    config = load_config(
        f"configs/{config}.yaml", small + ["moe.pool=2"] * config.startswith(("diffmoe", "tc"))
    )

    def engine(model, configured, given, *_):
        layers = [layer for _, layer in model.moe_layers()]
        raise Made(configured, given, {layer.pool for layer in layers}, len(layers))

    monkeypatch.setattr(step, "build_groups", lambda *_: single_process())
    monkeypatch.setattr(synthetic, "Engine", engine)
    with pytest.raises(Made) as made:
        step.FixedTraining(config, tree, torch.device("cpu"))
    configured, given, pools, layers = made.value.args
    merged = merge_deepspeed(tree, config, resolve_layout(config, 1))
    assert (configured, given) == (config, merged)
    assert pools == {"dense": set(), "ec": {1}}.get(config.model.family, {2})
    assert (config.model.family == "dense") == (layers == 0)


def test_the_probe_of_experts_finds_what_is_wrong(monkeypatch):
    """42 cases are right; where the definition's weights differ, all that have rows are
    wrong.
    """
    facts, _, wrong = probe.experts(torch.device("cpu"), None)
    assert (
        len(facts["cases"]) == 42
        and wrong == []
        and max(case["difference"] for case in facts["cases"]) > 0
    )
    right = probe._one_by_one

    def spoiled(experts, x, counts):
        experts.fc2_weight.data *= 1.1
        return right(experts, x, counts)

    monkeypatch.setattr(probe, "_one_by_one", spoiled)
    _, _, wrong = probe.experts(torch.device("cpu"), None)
    assert len(wrong) == 2 * 2 * (1 + 2) and all(
        "differs by" in line and "rows for none" not in line for line in wrong
    )


def metrics(steps=range(10, 101, 10), loss=lambda s: 2 - s / 100, memory=lambda s: 10.0):
    return [{"step": s, "loss": loss(s), "memory_gib": memory(s)} for s in steps]


FLAT = [Program(0, [1.0] * 8), Program(5, [1.1] * 8)]


@pytest.mark.full
@pytest.mark.parametrize(
    ("records", "programs", "words"),
    [
        (metrics(), FLAT, []),
        (
            metrics(memory=lambda s: 10.0 if s <= 50 else 12.0),
            FLAT,
            [],
        ),  # a resumed program is compared with itself
        (metrics()[:-1], FLAT, ["the run ended at step 90 of 100"]),
        ([], [], ["the run ended at step 0 of 100"]),
        (
            metrics(steps=[10, 20, 30, 60, 70, 80, 90, 100]),
            [Program(0, [])],
            ["steps are missing or came twice"],
        ),
        (
            metrics(steps=[10, 20, 30, 30, 40, 50, 60, 70, 80, 90, 100]),
            [Program(0, [])],
            ["steps are missing or came twice"],
        ),
        (metrics(loss=lambda s: math.nan if s == 50 else 1.0), FLAT, ["a loss is not finite"]),
        (metrics(loss=lambda s: 1 + s / 1000), FLAT, ["the loss does not fall"]),
        (
            metrics(memory=lambda s: 10 + s / 20),
            FLAT,
            ["the device's memory grows: 11.000 GiB", "the device's memory grows: 13.500 GiB"],
        ),
        (
            metrics(),
            [Program(0, [1.0, 1.0, 1.2, 1.4, 1.6, 1.8])],
            ["the host's memory grows: 1.000 GiB after a quarter of a program, 1.800 at its end"],
        ),
    ],
)
def test_what_is_wrong_with_a_training(records, programs, words):
    found = complaints(records, 100, 10, programs)
    assert len(found) == len(words) and all(
        line.startswith(start) for line, start in zip(found, words)
    ), found
