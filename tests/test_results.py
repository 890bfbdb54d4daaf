"""Records as tables for people, and as the planner's figures."""

import dataclasses
import json
import shutil
import subprocess
import sys
import tarfile

import pytest

from diffmoe.bench import results
from diffmoe.config import config_to_tree, load_config
from diffmoe.cost.calibration import calibrated_by
from diffmoe.cost.hardware import choose, read_table, write_entry
from diffmoe.cost.memory import engine_facts
from diffmoe.cost.step_time import launches, moved, rates, step_flops
from diffmoe.errors import UserError
from diffmoe.layout import resolve_layout
from programs import REPOSITORY

BF16 = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}
LAYER = {
    "bench": "moe_layer_l_e16_65536",
    "model": "l",
    "experts": 16,
    "tokens": 65536,
    "dtype": "bf16",
    "time_over_dense": 1.25,
    "activation_memory_over_dense": 1.1,
    "device": "NVIDIA H100 80GB HBM3",
    "cuda": "13.0",
}
TRUE = dataclasses.replace(
    choose(read_table(None), "h100"), matmul=0.51, attention=0.31, bandwidth=0.71, operator_us=7.5
)
PROBE = {
    "bench": "probe_machine",
    "matmul_flops": {"8192 x 8192": 700e12, "L qkv": 600e12},
    "copy_bytes_s": {"large": 2.9e12},
    "attention": {
        "L": {"head": 64, "flops": 300e12, "kernels": ["flash"]},
        "XL": {"head": 72, "flops": 200e12, "kernels": ["flash"]},
    },
    "launch_us": 4.0,
    "read_us": 11.0,
    "device": "NVIDIA H100 80GB HBM3",
}


def step_record(size, **changes):
    """What ``bench roofline`` would record of a step on a machine that is as TRUE says."""
    config = load_config(
        f"configs/diffmoe_{size}_flow.yaml",
        ["parallel.ep=1", "train.micro_batch=64", "moe.pool=rank"],
    )
    layout, engine, ways = resolve_layout(config, 1), engine_facts(BF16), {}
    for way in ("eager", "compiled"):
        each = dataclasses.replace(
            config, train=dataclasses.replace(config.train, compile=way == "compiled")
        )
        speed, (products, attention) = rates(each, TRUE, engine), step_flops(each, layout)
        ms = {
            "products": 1e3 * products / speed["product"],
            "attention": 1e3 * attention / speed["attention"],
            "memory": 1e3 * moved(each, layout, engine, TRUE) / speed["memory"],
            "messages": 0.0,
        }
        least = 1e-6 * TRUE.operator_us * launches(each, layout, engine, TRUE)
        ways[way] = {
            "predicted_s": 0.4,
            "mfu": 0.3,
            "measured": {
                "seconds": max(least, 1e-3 * sum(ms.values())),
                "kinds": {kind: [value, 1] for kind, value in ms.items()},
                "config": config_to_tree(each),
                "deepspeed": BF16,
                "layout": dataclasses.asdict(layout),
                "device": "NVIDIA H100 80GB HBM3",
            },
        }
    return {
        "bench": f"roofline_diffmoe_{size}_flow",
        "gpu": "h100",
        "cases": {f"diffmoe_{size}_flow": {"model": ways}},
        **changes,
    }


def put(folder, **found):
    folder.mkdir(parents=True, exist_ok=True)
    for name, record in found.items():
        (folder / f"{name}.json").write_text(
            json.dumps(record, indent=1 if name == "parity" else None)
        )
    return folder


# -------------------------------------------------------------------------------------------------
# tables


def test_the_readme_says_what_the_records_give():
    text = (REPOSITORY / "README.md").read_text()
    said = text.partition(results.BEGIN)[2].partition(results.END)[0].strip()
    assert said == results.readme_table(REPOSITORY / "docs/results"), "python run.py bench results"


def test_a_record_of_a_gpu_appears_by_itself(tmp_path):
    shutil.copytree(REPOSITORY / "docs/results", tmp_path / "results")
    put(tmp_path / "results/speed_h100_2027-01-02", layer=LAYER)
    put(
        tmp_path / "results/speed_h100_2027-01-01", layer={**LAYER, "time_over_dense": 9.0}
    )  # older
    readme = tmp_path / "README.md"
    readme.write_text((REPOSITORY / "README.md").read_text())
    results.rewrite(readme, tmp_path / "results")
    before, after = (
        set(path.read_text().splitlines()) for path in (REPOSITORY / "README.md", readme)
    )
    assert before < after and after - before == {
        "| MoE layer of L-E16, 65,536 tokens, bf16, training pass | 1.25 x dense's time, 1.10 x "
        "its activations | NVIDIA H100 80GB HBM3 | "
        "[speed_h100_2027-01-02](docs/results/speed_h100_2027-01-02) |"
    }
    rows = results.readme_table(tmp_path / "results").splitlines()
    assert "H100" in rows[2], "GPUs come first"


def test_a_note_is_a_footnote_to_its_figures_and_an_earlier_state_stays_out(tmp_path):
    put(tmp_path / "speed_h100_2027-01-02", layer=LAYER, before=PROBE)
    put(tmp_path / "speed_h100_2027-01-03", layer={**LAYER, "tokens": 4096})
    for day in ("02", "03"):
        (tmp_path / f"speed_h100_2027-01-{day}/note.txt").write_text("With one fan broken.\n")
    assert results.readme_table(tmp_path).splitlines()[2:] == [
        *(
            f"| MoE layer of L-E16, {tokens} tokens, bf16, training pass | 1.25 x dense's time, "
            "1.10 x its activations | NVIDIA H100 80GB HBM3 | "
            f"[speed_h100_2027-01-{day}](docs/results/speed_h100_2027-01-{day}) [1] |"
            for tokens, day in (("4,096", "03"), ("65,536", "02"))
        ),
        "",
        "[1] With one fan broken.",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "",
        results.BEGIN,
        f"{results.END} {results.BEGIN}",
        f"{results.BEGIN} {results.BEGIN} {results.END}",
    ],
)
def test_a_readme_without_its_markers_is_refused(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(UserError, match="must hold <!-- made by"):
        results.rewrite(tmp_path / "README.md", tmp_path)
    assert (tmp_path / "README.md").read_text() == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "layer.json is not a record"),
        (json.dumps({"bench": "step_l", "mfu": {}, "model": "l"}), None),
        (json.dumps({"bench": "step_l"}), "a record of step_l lacks 'mfu'"),
        (
            json.dumps({"bench": "probe_machine", "matmul_flops": []}),
            "a record of probe_machine lacks",
        ),
    ],
)
def test_a_damaged_record_is_named(tmp_path, text, message):
    put(tmp_path / "speed").joinpath("layer.json").write_text(text)
    if message is None:
        assert results.readme_table(tmp_path).count("\n") == 1
        return
    with pytest.raises(UserError, match=message):
        results.readme_table(tmp_path)


def test_a_summary_says_how_everything_ended_and_what_came_of_it(tmp_path):
    folder = put(
        tmp_path / "h100",
        layer={**LAYER, "code": "abc", "when": "2027-01-02T03:04:05"},
        profile=step_record("l_e16", code="abd"),
        probe=PROBE,
    )
    status = [
        ("probe", "probe_machine", 0),
        ("probe", "probe_experts", 124),
        ("probe", "probe_nccl", None),
        ("layer", "moe_layer_l", 1),
    ]
    put(
        folder / "status",
        **{
            item: {"number": n, "part": part, "item": item, "rc": rc, "seconds": n, "limit": 9}
            for n, (part, item, rc) in enumerate(status)
        },
    )
    (folder / "moe_layer_l.log").write_text("".join(f"line {i}\n" for i in range(40)))
    told = results.summary(folder)
    assert told.startswith("# NVIDIA H100 80GB HBM3, 2027-01-02\n")
    for words in (
        "| probe | probe_experts | over its limit, ended | 1 | 9 |",
        "| probe | probe_nccl | left out: no time |",
        "exit code 1",
        "line 39",
        "These records are of different code (abc, abd).",
        "bf16 matrix products | 8192 x 8192 700, L qkv 600 TFLOP/s",
        "step of L-E16, eager, as counted and priced for h100 | predicted 400 ms, MFU 30.0%; "
        "measured",
        "python -m launcher plan --config configs/diffmoe_l_e16_flow.yaml --gpu h100 --calibrate "
        "h100",
    ):
        assert words in told, told
    assert "line 24\n" not in told
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; sys.modules['torch'] = None; import run; sys.exit(run.main(sys.argv[1:]))",
            "bench",
            "results",
            str(folder),
        ],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "") and (folder / "summary.md").read_text() == told


# ------------------------------------------------------------------------------------------------
# planner


@pytest.mark.parametrize("form", ["folder", "archive"])
def test_the_planner_takes_its_shares_from_the_kernels_of_steps(tmp_path, form):
    folder = put(
        tmp_path / "h100",
        s=step_record("s_e16"),
        l=step_record("l_e16"),
        probe=PROBE,
        parity={"bound": 1e-5, "rows": []},
    )
    if form == "archive":
        with tarfile.open(tmp_path / "h100.tar.gz", "w:gz") as archive:
            archive.add(folder, "h100")
        folder = tmp_path / "h100.tar.gz"
    found = calibrated_by(folder, choose(read_table(None), "h100"))
    assert [found.matmul, found.attention, found.bandwidth] == pytest.approx(
        [TRUE.matmul, TRUE.attention, TRUE.bandwidth]
    )
    assert (
        found.operator_us >= TRUE.operator_us * 0.999
        and found.read_us == 11.0
        and found.link == TRUE.link
    )
    assert (
        found.calibrated
        == f"the kernels of 4 steps on NVIDIA H100 80GB HBM3 in {folder.name} (links assumed)"
    )


def test_without_a_step_the_planner_takes_the_probed_ceilings(tmp_path):
    found = calibrated_by(put(tmp_path / "h100", probe=PROBE), choose(read_table(None), "h100"))
    assert [found.matmul, found.attention, found.bandwidth] == pytest.approx(
        [700 / 989, 200 / 989, 2900 / 3350]
    )
    assert (found.operator_us, found.read_us) == (4.0, 11.0) and "no step" in found.calibrated


@pytest.mark.parametrize("found", [{}, {"layer": LAYER}, {"parity": {"bound": 1e-5, "rows": []}}])
def test_a_folder_without_figures_for_the_planner_is_refused(tmp_path, found):
    with pytest.raises(
        UserError,
        match=r"none holds no measured step|none\) holds no measured step|holds no measured step",
    ):
        calibrated_by(put(tmp_path / "none", **found), TRUE)


@pytest.mark.parametrize(
    ("lacks", "message"),
    [("kinds", "a record of a step's kernels lacks 'kinds'"), ("layout", "kernels lacks 'layout'")],
)
def test_a_step_that_lacks_something_is_named(tmp_path, lacks, message):
    record = step_record("s_e16")
    del record["cases"]["diffmoe_s_e16_flow"]["model"]["eager"]["measured"][lacks]
    with pytest.raises(UserError, match=message):
        calibrated_by(put(tmp_path / "h100", s=record), TRUE)


def test_one_command_calibrates_the_hardware_table(tmp_path):
    """Without torch; the comment that explains the fields stays, and so do other machines."""
    folder, own = put(tmp_path / "h100", l=step_record("l_e16")), tmp_path / "hardware.yaml"
    own.write_text((REPOSITORY / "diffmoe/cost/hardware.yaml").read_text())
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; sys.modules['torch'] = None; from launcher.__main__ import main; "
            "sys.exit(main(sys.argv[1:]))",
            "plan",
            "--config",
            "configs/diffmoe_l_e16_flow.yaml",
            "--gpu",
            "h100",
            "--calibrate",
            str(folder),
            "--write-hardware",
            str(own),
        ],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, ""), done
    before, after = read_table(None), read_table(own)
    assert after["h100"].matmul == pytest.approx(TRUE.matmul) and {**after, "h100": 0} == {
        **before,
        "h100": 0,
    }
    assert own.read_text().startswith(
        (REPOSITORY / "diffmoe/cost/hardware.yaml").read_text().partition("h100:")[0]
    )
    write_entry(own, "mine", TRUE)
    assert read_table(own)["mine"] == TRUE
