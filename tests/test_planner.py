"""launcher plan, simulate and scaling as commands: no torch, one line for bad input, exit codes."""

import dataclasses
import json
import re
import shlex
import subprocess
import sys
from argparse import ArgumentTypeError

import pytest

from diffmoe.config import config_to_tree, load_config
from diffmoe.cost.calibration import checked
from diffmoe.cost.extrapolation import extrapolate
from diffmoe.cost.hardware import TABLE, read_table
from diffmoe.cost.layouts import Pins
from diffmoe.cost.memory import engine_facts
from diffmoe.cost.traffic import least_traffic
from diffmoe.errors import UserError
from diffmoe.layout import resolve_layout
from launcher import plan, scaling, simulate
from launcher.scaling import Trial, command_of
from launcher.scaling_report import grouped, write_report
from programs import REPOSITORY, environment

XL = [
    "--config",
    str(REPOSITORY / "configs/diffmoe_xl_e16_flow.yaml"),
    "--deepspeed_config",
    str(REPOSITORY / "ds_configs/zero1_bf16.json"),
]
DEMO = ["--config", str(REPOSITORY / "configs/demo.yaml")]
# Runs a command in an interpreter to which the packages named first do not exist.
_WITHOUT = """
import importlib.abc, runpy, sys
missing = sys.argv[1].split(",")
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
sys.argv = ["launcher", *sys.argv[2:]]
runpy.run_module("launcher", run_name="__main__")
"""


def without(packages, *arguments):
    return subprocess.run(
        [sys.executable, "-c", _WITHOUT, packages, *map(str, arguments)],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("nodes", [1, 2, 8])
def test_a_login_node_plans_xl(nodes, tmp_path):
    ended = without(
        "torch,numpy,deepspeed,matplotlib",
        "plan",
        *XL,
        "--nodes",
        nodes,
        "--json",
        tmp_path / "plan.json",
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert (
        "as configured: EP 8, ZeRO 1, recompute selective" in ended.stdout
        and "GPU-hours" in ended.stdout
    )
    tree = json.loads((tmp_path / "plan.json").read_text())
    assert (
        tree["cluster"]["ranks"] == 8 * nodes
        and tree["configured"]["fits"]
        and tree["nearest"] is None
    )
    assert round((tree["parameters"]["total"] + tree["parameters"]["positions"]) / 1e6, 1) == 2925.0
    best = tree["layouts"][0]
    assert best["fits"] and best["memory"]["peak"] > best["memory"]["static"] > 0
    assert best["least"]["rows"] <= sum(
        m["wire"] for m in best["traffic"] if m["collective"] == "all_to_all"
    )


def test_what_cannot_fit_gets_the_nearest_that_does(capsys):
    ask = [
        *XL,
        "--gpu",
        "a100",
        "--memory",
        "20",
        "--ep",
        "1",
        "--recompute",
        "none",
        "--micro-batch",
        "32",
    ]
    assert plan.main(ask) == 1
    said = capsys.readouterr().out
    assert (
        "nothing fits: the smallest layout asked for needs" in said
        and "what to change: recompute none -> " in said
    )
    assert plan.main([*XL, "--gpu", "a100", "--memory", "9"]) == 1
    assert "what to change: nodes 1 -> " in capsys.readouterr().out
    assert plan.main([*XL, "--gpu", "a100", "--memory", "4.1"]) == 1
    assert "a GPU with more memory is needed" in capsys.readouterr().out
    assert plan.main([*XL, "--nodes", "3"]) == 1  # 24 GPUs for a batch of 256
    assert "what to change: nodes 3 -> 4\n" in capsys.readouterr().out
    assert plan.main([*XL, "moe.pool=7"]) == 1
    assert (
        "fits either: train.batch, moe.pool or moe.experts must change" in capsys.readouterr().out
    )


def test_a_configuration_that_does_not_resolve_is_said_and_others_are_offered(capsys):
    assert plan.main([*XL, "--gpus-per-node", "4", "--memory", "90"]) == 0
    said = capsys.readouterr().out
    assert (
        "configured does not resolve: world size (4) must be divisible by parallel.ep (8)" in said
        and "  1   4 " in said
    )


@pytest.mark.parametrize(
    ("verb", "arguments", "complaint"),
    [
        (plan, [], "the following arguments are required: --config"),
        (
            plan,
            [*DEMO, "--gpu", "h1000"],
            "--gpu (h1000) must be one of h100, h200, a100, cpu; did you mean h100?",
        ),
        (plan, [*DEMO, "--nodes", "0"], "--nodes (0) must be above 0"),
        (
            plan,
            [*DEMO, "--memory", "1"],
            "--memory (1 GiB) must be a number above the reserve of 4 GiB",
        ),
        (
            plan,
            [*DEMO, "--memory", "inf"],
            "--memory (inf GiB) must be a number above the reserve of 4 GiB",
        ),
        (
            plan,
            [*DEMO, "--nodes", "100"],
            "train.batch (128) must be at least one sample for each of 800 GPUs",
        ),
        (plan, [*DEMO, "moe.expert=4"], "unknown key moe.expert"),
        (plan, [*DEMO, "--calibrate", "nowhere.jsonl"], "nowhere.jsonl cannot be read"),
        (plan, [*DEMO, "--hardware", "nowhere.yaml"], "nowhere.yaml does not exist"),
        (
            simulate,
            [*DEMO, "--max-gpus", "4"],
            "--max-gpus (4) must be at least the smallest size (8)",
        ),
        (
            simulate,
            [*DEMO, "--min-gpus", "6", "--max-gpus", "12"],
            "--min-gpus (6), doubled, gives 12 GPUs, which are not whole nodes of 8",
        ),
        (simulate, ["--config", "nowhere.yaml"], "nowhere.yaml does not exist"),
        (scaling, [*DEMO], "the following arguments are required: --out"),
        (scaling, [*DEMO, "--out", "x", "--ranks", "1,b"], "'1,b' must be numbers"),
        (scaling, [*DEMO, "--out", "x", "--ranks", "1", "--nodes", "1"], "say the same thing"),
        (
            scaling,
            [*DEMO, "--out", "x", "--mode", "sideways"],
            "--mode (sideways) must be strong, weak or strong,weak",
        ),
        (scaling, [*DEMO, "--out", "x", "--zero", "4"], "--zero ([4]) must be of 0, 1, 2, 3"),
        (scaling, [*DEMO, "--out", "x", "--warmup", "-1"], "--warmup (-1) must be at least 0"),
        (
            scaling,
            [*DEMO, "--out", f"{__file__}/x", "--ranks", "2", "--ep", "2"],
            "/x) cannot be written: ",
        ),
        (scaling, [*DEMO, "--out", "x", "--start", "srun"], "--start (srun) needs an allocation"),
        (scaling, [*DEMO, "--out", "x", "--nodes", "2"], "--nodes (2) needs srun in an allocation"),
        (scaling, [*DEMO, "--out", "x", "--ranks", "3"], "nothing to measure"),
    ],
)
def test_bad_input_is_one_line(verb, arguments, complaint, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises((UserError, ArgumentTypeError)) as raised:
        verb.main(arguments)
    assert complaint in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("verb", ["plan", "simulate", "scaling"])
def test_help_ends_with_an_example(verb):
    ended = without("torch", verb, "--help")
    assert (
        ended.returncode == 0
        and f"python -m launcher {verb} --config" in ended.stdout.split("example:")[1]
    )


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ("h100: 3", "h100 must be a mapping"),
        ("h100: {name: x}", "h100 is incomplete: missing 12 required"),
        (
            TABLE.read_text().replace("gb_s: 450", "gb_s: -1"),
            "h100.node.gb_s (-1) must be a number above 0",
        ),
        (
            "h100: {nodes: 1, node: {gb_s: 1, latency_us: 1}, network: {gb_s: 1, latency_us: 1}}",
            "unknown key h100.nodes",
        ),
    ],
)
def test_a_bad_hardware_table_is_refused(tmp_path, entry, complaint):
    (tmp_path / "table.yaml").write_text(entry)
    with pytest.raises(UserError, match="hardware table") as raised:
        plan.main([*DEMO, "--hardware", str(tmp_path / "table.yaml")])
    assert complaint in str(raised.value)


def test_simulation_says_where_scaling_stops_and_why(tmp_path, capsys):
    assert (
        simulate.main(
            [
                *XL,
                "--ep",
                "8",
                "--json",
                str(tmp_path / "points.json"),
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert (
        "stops scaling at 16 GPUs" in said and "ZeRO's reduction" in said and "across nodes" in said
    )
    assert "train.batch (256) is less than one sample a rank" in said
    assert "goes on scaling up to 4096 GPUs" in said
    points = json.loads((tmp_path / "points.json").read_text())
    assert [p["ranks"] for p in points["weak"]] == [8 * 2**i for i in range(10)]
    assert points["weak"][-1]["batch"] == 256 * 512 and points["strong"][-1]["candidate"] is None
    assert all(0 < p["efficiency"] <= 1.001 for p in points["weak"])


FAR = {
    "XL-E16, weak to 1,024 GPUs, 16 samples a GPU": (
        ["diffmoe_xl_e16_flow", "train.batch=128"],
        "weak",
        1024,
        16,
    ),
    "XL-E16, weak to 1,024 GPUs, 4 x 16 samples a GPU": (
        ["diffmoe_xl_e16_flow", "train.batch=512"],
        "weak",
        1024,
        16,
    ),
    "L-E16, strong at batch 1,024 on 8 nodes": (["diffmoe_l_e16_flow_b1024"], "strong", 64, None),
}


def how_far(case, reduced, **hardware):
    """The documents' row of a case."""
    (name, *words), mode, ranks, micro_batch = FAR[case]
    tree = json.loads((REPOSITORY / "ds_configs/zero1_bf16.json").read_text())
    config = load_config(REPOSITORY / f"configs/{name}.yaml", words)
    table = dataclasses.replace(read_table(None)["h100"], **hardware)
    pins, tree = Pins(micro_batch=micro_batch), {**tree, "communication_data_type": reduced}
    point = extrapolate(config, tree, table, 8, [8, ranks], mode, pins)[-1]
    best, ms = point.candidate, f"{1e3 * point.candidate.time.total:.1f}"
    return f"| {case} | {reduced} | {100 * point.efficiency:.0f} % | {ms} | {best.label} |"


@pytest.mark.parametrize("reduced", ["fp32", "bf16"])
@pytest.mark.parametrize("case", FAR)
def test_the_documents_say_how_far_it_scales(case, reduced):
    assert how_far(case, reduced) in (REPOSITORY / "docs/planner.md").read_text()


@pytest.mark.full
def test_plan_says_how_far_each_batch_scales(capsys):
    """The published batch, and 4 and 16 times as large ones, under either configuration."""
    assert plan.main([*XL, "--nodes", "2"]) == 0
    said = capsys.readouterr().out
    ends = [
        int(re.search(rf"^batch {b}: up to (\d+) GPUs", said, re.M)[1]) for b in (256, 1024, 4096)
    ]
    assert ends[0] < ends[1] < ends[2]
    larger = str(REPOSITORY / "configs/diffmoe_xl_e16_flow_b1024.yaml")
    assert plan.main(["--config", larger, *XL[2:], "--nodes", "2"]) == 0
    assert said[said.index("batch 256:") :] in capsys.readouterr().out


def test_simulation_stands_beside_what_was_measured(tmp_path, capsys):
    """A point on one rank calibrates the other's prediction; both keep the table's.  Of repeats
    their median stands.
    """
    records = tmp_path / "runs.jsonl"
    runs = [_record(1, 1, 1.0, 1), *(_record(2, 2, seconds, 1) for seconds in (0.5, 0.6, 0.9))]
    records.write_text("".join(json.dumps(record) + "\n" for record in runs))
    assert (
        simulate.main([*DEMO, "--gpu", "cpu", "--max-gpus", "2", "--measured", str(records)]) == 0
    )
    said = capsys.readouterr().out
    assert "assumed: products reach 80 % of 0.1 TFLOP/s" in said
    one, two = checked(records)
    assert (one.measured, one.fitted, two.measured) == (1.0, None, 0.6)
    error = f"({100 * (two.fitted / 0.6 - 1):+.0f} %)"
    assert "| a CPU | 2 | EP 2, ZeRO 1 | 64 | 600.0 |" in said and f"{error} |" in said
    # Half of one rank's compute and launches, and messages.
    assert two.fitted > 0.35
    table, again = two.table, checked(records)[1].table
    assert table == again != two.fitted


def test_simulation_needs_neither_torch_nor_matplotlib():
    ended = without("torch,matplotlib", "simulate", *XL, "--max-gpus", 64)
    assert (ended.returncode, ended.stderr) == (0, "")


# ------------------------------------------------------------------------------------------------
# scaling


def _options(*arguments):
    return scaling._parse([*DEMO, "--out", "x", *arguments])


def test_every_size_trains_the_same_pool_and_repeats_are_interleaved():
    options = _options("--ep", "1,2", "--zero", "1,2", "--repeats", "2")
    config, sizes = scaling.load_config(options.config, []), [(1, 1), (2, 1), (4, 2)]
    pool, trials, left_out = scaling.plan_trials(
        config, {"zero_optimization": {"stage": 1}}, options, sizes
    )
    assert {(t.ranks, t.ep) for t in trials} == {(1, 1), (2, 1), (2, 2), (4, 1), (4, 2)} and len(
        trials
    ) == 2 * 2 * 2 * 5
    assert [t.repeat for t in trials] == [1] * 20 + [2] * 20
    assert (
        len(left_out) == 4 and "world size (1) must be divisible by parallel.ep (2)" in left_out[0]
    )
    assert {(t.ranks, t.batch) for t in trials if t.mode == "weak"} == {
        (1, 128),
        (2, 256),
        (4, 512),
    }
    assert {t.batch for t in trials if t.mode == "strong"} == {128}
    assert pool == 128  # moe.pool: global


def test_one_pool_for_all_runs_and_weak_batches_in_proportion():
    options = _options("--ep", "1", "--repeats", "1")
    config = scaling.load_config(options.config, ["moe.pool=rank", "train.batch=16"])
    pool, trials, left_out = scaling.plan_trials(config, {}, options, [(3, 1), (4, 1)])
    assert pool == 4 and [(t.mode, t.ranks) for t in trials] == [("strong", 4)]
    assert "train.batch (16) must be divisible by ranks (3)" in left_out[0]
    assert "train.batch (16) x ranks (4) must be divisible by those of the smallest" in left_out[2]
    config = scaling.load_config(options.config, ["moe.pool=2", "train.batch=12"])
    _, trials, _ = scaling.plan_trials(config, {}, options, [(2, 1), (3, 1)])
    assert [t.batch for t in trials] == [12, 12, 12, 18]
    config = scaling.load_config(options.config, ["moe.pool=group", "train.batch=16"])
    pool, *_ = scaling.plan_trials(config, {}, _options("--ep", "2"), [(2, 1), (4, 1)])
    assert pool == 16  # as in the runs, of two ranks


@pytest.mark.parametrize(
    "arguments",
    [
        [*XL, "train.optimizer=muon"],
        [*DEMO, "--gpus-per-node", "1"],  # where its parallel.ep cannot be
        [*XL, "--nodes", "2", "train.recipe_batch=4"],
    ],
)
def test_what_runs_is_planned(arguments, capsys):
    assert plan.main([*arguments, "--gpu", "h100", "--top", "1"]) == 0
    assert "  1 " in capsys.readouterr().out


def test_what_is_offloaded_is_said(tmp_path, capsys):
    offload = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    (tmp_path / "offload.json").write_text(json.dumps({"zero_optimization": offload}))
    words = ["--deepspeed_config", str(tmp_path / "offload.json"), "train.optimizer=deepspeed"]
    assert plan.main([*DEMO, *words, "--gpu", "h100"]) == 0
    assert "Adam there are not in the time" in capsys.readouterr().out


def test_shards_and_overlap_are_varied_too(tmp_path):
    options = _options("--ep", "1,2", "--shard", "0,2", "--ranks", "4", "--repeats", "1")
    _, trials, left_out = scaling.plan_trials(
        scaling.load_config(options.config, []), {}, options, [(4, 1)]
    )
    assert left_out and all("zero_optimization.stage 1 or above" in text for text in left_out)
    options.zero = [1]
    _, trials, left_out = scaling.plan_trials(
        scaling.load_config(options.config, []), {}, options, [(4, 1)]
    )
    assert left_out == [] and {(t.ep, t.shard) for t in trials} == {(1, 0), (1, 2), (2, 0), (2, 2)}
    command = command_of(trials[-1], options, "torchrun", 128, tmp_path / "record.json")
    assert command[command.index("--shard") + 1] == "2"


def test_the_helps_example_leaves_nothing_out():
    example = shlex.split(scaling._EXAMPLE.replace("\\\n", " ").strip().splitlines()[0])
    options = scaling._parse(example[example.index("scaling") + 1 :])
    config = scaling.load_config(options.config, options.overrides)
    _, trials, left_out = scaling.plan_trials(
        config, {}, options, scaling._sizes(options, {}, 2, "torchrun")
    )
    assert left_out == [] and {trial.ranks for trial in trials} == {1, 2} and options.synthetic


@pytest.mark.parametrize(
    ("start", "first"),
    [
        ("srun", ["srun", "--nodes=2", "--ntasks=4", "--ntasks-per-node=2"]),
        ("torchrun", ["torchrun", "--standalone", "--nproc-per-node", "4"]),
    ],
)
def test_ranks_are_started_by(start, first, tmp_path):
    options = _options("train.lr=1e-3", "--synthetic")
    command = command_of(
        Trial("weak", 4, 2, 2, 1, 512, 1), options, start, 128, tmp_path / "record.json"
    )
    assert [command[0].rpartition("/")[2], *command[1 : len(first)]] == first
    profile = command[command.index("profile") :]
    assert (
        profile[-4:] == ["train.lr=1e-3", "train.batch=512", "parallel.ep=2", "moe.pool=128"]
        and "--synthetic" in profile
    )


def test_an_allocation_decides_nodes_and_ranks():
    inside = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "4", "SLURM_GPUS_PER_NODE": "h200:8"}
    options = _options()
    assert scaling._start(options, inside) == "srun" and scaling._ranks_per_node(inside) == 8
    assert scaling._sizes(options, inside, 8, "srun") == [(8, 1), (16, 2), (32, 4)]
    assert scaling._ranks_per_node({"SLURM_JOB_ID": "7", "SLURM_NTASKS_PER_NODE": "2"}) == 2
    assert scaling._sizes(_options("--ranks", "4,12"), inside, 8, "srun") == [(4, 1), (12, 2)]
    with pytest.raises(UserError, match="need 8 nodes of 8; the allocation has 4"):
        scaling._sizes(_options("--nodes", "8"), inside, 8, "srun")


def _record(ranks, ep, step_s, repeat, batch=64):
    rows = (
        [
            {"collective": "all_to_all", "purpose": purpose, "phase": "forward", "wire": wire}
            for purpose, wire in (("dispatch", 100), ("combine", 100), ("scores", 6))
        ]
        if ep > 1
        else []
    )
    config = load_config(DEMO[1], [f"train.batch={batch}", f"parallel.ep={ep}"])
    layout, tree = resolve_layout(config, ranks), {"zero_optimization": {"stage": 1}}
    reduction = least_traffic(config, layout, engine_facts(tree)).reduction
    sent = {"collective": "all_reduce", "purpose": "gradients", "phase": "step"}
    rows += [{**sent, "wire": 1.5 * reduction}] if ranks > 1 else []
    return {
        "config": config_to_tree(config),
        "layout": dataclasses.asdict(layout),
        "deepspeed": tree,
        "per_node": ranks,
        "mode": "strong",
        "ranks": ranks,
        "nodes": 1,
        "ep": ep,
        "zero": 1,
        "batch": batch,
        "repeat": repeat,
        "step_s": step_s,
        "split": {"compute": 0.5, "all_to_all": 0.2, "reduction": 0.1, "data": 0.1, "other": 0.1},
        "peak_bytes": 2**30,
        "traffic": [rows] * ranks,
        "device": "a CPU",
        "threads": 1,
        "torch": "2",
        "deepspeed_version": "0",
        "commit": "abc",
        "start": "torchrun",
        "when": "now",
    }


def test_the_report_compares_with_the_fewest_ranks(tmp_path):
    records = [
        _record(1, 1, 1.0, 1),
        _record(1, 1, 1.2, 2),
        _record(2, 2, 0.6, 1),
        _record(2, 2, 0.6, 2),
        {"mode": "strong", "ranks": 4, "error": "exit code 1: error: no"},
    ]
    one, two = grouped(records)
    assert (one.step_s, one.runs, one.efficiency) == (1.1, 2, 1.0)
    assert (one.rows, one.reduced, one.exposed) == (None, None, pytest.approx(0.3))
    assert two.efficiency == pytest.approx(1.1 / 1.2) and two.rows == pytest.approx(1.03)
    assert two.reduced == pytest.approx(1.5)
    said = write_report(records, tmp_path)
    row = "| strong | 2 | 1 | 2 | 1 |  | 64 | 2 | 600.0 | 0 % | 106.7 | 92 % | 180.0 ms | 50 % |"
    assert row in said and said.count("| 1.0300 | 1.5000 |") == 1
    assert {p.name for p in tmp_path.iterdir()} == {"table.md", "efficiency.png", "split.png"}
    assert (
        "a CPU, 1 thread a rank, torch 2, DeepSpeed 0, commit abc, started by torchrun"
        in (tmp_path / "table.md").read_text()
    )


def test_a_run_that_fails_or_hangs_leaves_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr(
        scaling,
        "command_of",
        lambda trial, *_: [
            sys.executable,
            "-c",
            "import sys, time; print('error: nothing works'); sys.stdout.flush(); "
            + ("sys.exit(3)" if trial.mode == "strong" else "time.sleep(60)"),
        ],
    )
    assert (
        scaling.main(
            [
                *DEMO,
                "--out",
                str(tmp_path),
                "--ranks",
                "1",
                "--ep",
                "1",
                "--repeats",
                "1",
                "--timeout",
                "4",
            ]
        )
        == 1
    )
    lines = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [line["error"] for line in lines] == [
        "exit code 3: error: nothing works",
        "no end after 4 s: error: nothing works",
    ]
    assert "no run ended well" in capsys.readouterr().out
    with pytest.raises(
        UserError, match="holds the runs.jsonl of another measurement; choose another folder"
    ):
        scaling.main([*DEMO, "--out", str(tmp_path), "--ranks", "1", "--ep", "1"])
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
def test_real_runs_are_measured_and_calibrate_the_plan(tmp_path):
    """1 and 2 ranks of a small model; their records then make the plan of the same layouts meet
    what was measured.
    """
    small = ["model.width=32", "model.depth=4", "train.batch=16"]
    ended = subprocess.run(
        [
            sys.executable,
            "-m",
            "launcher",
            "scaling",
            *DEMO,
            "--synthetic",
            "--ranks",
            "1,2",
            "--ep",
            "1,2",
            "--mode",
            "strong",
            "--steps",
            "2",
            "--warmup",
            "1",
            "--repeats",
            "1",
            "--out",
            str(tmp_path),
            *small,
        ],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    records = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [(r["ranks"], r["ep"]) for r in records] == [(1, 1), (2, 1), (2, 2)]
    for record in records:
        assert sum(record["split"].values()) == pytest.approx(1) and record["layout"]["pool"] == 16
        assert (
            record["peak_bytes"] > record["static_bytes"] > 0
            and len(record["traffic"]) == record["ranks"]
        )
    assert (tmp_path / "efficiency.png").exists() and (tmp_path / "split.png").exists()
    ended = without(
        "torch",
        "plan",
        *DEMO,
        "--gpu",
        "cpu",
        "--calibrate",
        tmp_path / "runs.jsonl",
        "--write-hardware",
        tmp_path / "table.yaml",
        *small,
    )
    assert (ended.returncode, ended.stderr) == (
        0,
        "",
    ) and "figures    from 3 records of" in ended.stdout
    ended = without(
        "torch", "plan", *DEMO, "--gpu", "cpu", "--hardware", tmp_path / "table.yaml", *small
    )
    assert ended.returncode == 0 and "figures    from 3 records of" in ended.stdout
