"""EP groups over hosts and the nodes of a job: what the planner finds, and who says it."""

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys

import pytest

from diffmoe.config import load_config, override
from diffmoe.cost.extrapolation import (
    extrapolate,
    fewer_nodes,
    hosts_of,
    larger_batches,
    spanned,
    spanning,
    stops,
)
from diffmoe.cost.hardware import read_table
from diffmoe.cost.layouts import Cluster, Pins, candidates, evaluate
from diffmoe.cost.traffic import least_traffic, step_traffic
from diffmoe.deepspeed_json import read_deepspeed
from diffmoe.errors import UserError
from diffmoe.layout import over_hosts, resolve_layout, runs_of
from launcher import plan
from launcher.__main__ import main
from programs import REPOSITORY, Program, losses, tiny

H100 = read_table(None)["h100"]
BF16 = REPOSITORY / "ds_configs/zero1_bf16.json"
# The scripts leave halves, whose gain is an assumption, to whoever asks for them.
WHOLE = Pins(overlap="none")
SCRIPTS = sorted((REPOSITORY / "scripts/slurm").glob("train_*.sh"))


def configuration(name, *overrides):
    return load_config(REPOSITORY / f"configs/{name}.yaml", list(overrides))


def asked_by(script):
    """A job script's (configuration's name, nodes, GPUs a node, overrides)."""
    text = script.read_text()
    nodes, gpus = (
        int(re.search(rf"^#SBATCH --{name}=(\d+)$", text, re.M)[1])
        for name in ("nodes", "gpus-per-node")
    )
    layout = re.search(r"^layout=.*$", text, re.M)
    words = layout_of(script, nodes, str(gpus)) if layout else []
    return re.search(r"^train configs/(\w+)\.yaml ", text, re.M)[1], nodes, gpus, words


def layout_of(script, nodes, gpus):
    line = re.search(r"^layout=.*$", script.read_text(), re.M)[0]
    job = {"SLURM_JOB_NUM_NODES": str(nodes), "SLURM_GPUS_PER_NODE": gpus}
    script = f'set -eu; source scripts/slurm/_common.sh; {line}; echo "$layout"'
    done = subprocess.run(
        ["bash", "-c", script], cwd=REPOSITORY, env=job, check=True, capture_output=True, text=True
    )
    return done.stdout.split()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_scripts_defaults_are_what_the_planner_finds(script):
    """As many nodes as pay: twice as many bring less than 1.3 times the images/s, as launcher
    simulate has it.  On these, the fastest layout; and no fewer nodes are faster.
    """
    name, nodes, gpus, words = asked_by(script)
    config, tree = configuration(name), read_deepspeed(BF16)
    assert config.train.batch == 256  # as published
    points = extrapolate(config, tree, H100, gpus, [gpus * 2**i for i in range(6)], "strong", WHOLE)
    last = stops(points)[0] // 2
    assert nodes * gpus == last, f"#SBATCH --nodes={last // gpus}"
    cluster = Cluster(nodes, gpus, H100)
    best = candidates(config, tree, cluster, WHOLE)[0]
    mine = evaluate(configuration(name, *words), tree, cluster)
    assert mine.fits and mine.label == best.label
    assert fewer_nodes(config, tree, cluster, mine.time.total, WHOLE) is None


@pytest.mark.parametrize(
    ("nodes", "gpus", "ep"),
    [(1, "8", 8), (2, "h200:8", 16), (4, "8", 16), (2, "4", 8), (1, "1", 1)],
)
def test_other_nodes_than_a_scripts_own_take_one_option(nodes, gpus, ep):
    words = layout_of(REPOSITORY / "scripts/slurm/train_xl_e16.sh", nodes, gpus)
    assert words == [f"parallel.ep={ep}", "parallel.recompute=none"]
    config = configuration("diffmoe_xl_e16_flow", *words, "train.accumulation=4")
    resolve_layout(config, nodes * int(gpus.rpartition(":")[2]))


@pytest.mark.parametrize(
    ("script", "environ", "words"),
    [
        ("train_xl_e16.sh", {}, ["parallel.ep=16", "parallel.recompute=none", "parallel.ep=8"]),
        ("train_l_e8.sh", {"layout": "nonsense"}, ["parallel.ep=8"]),
        ("train_xl_e16.sh", {"DIFFMOE_CONFIG": "mine.yaml"}, ["parallel.ep=8"]),
    ],
)
def test_the_command_line_comes_after_a_scripts_layout_which_is_its_configurations(
    script, environ, words
):
    layout = re.search(r"^layout=.*$", (REPOSITORY / "scripts/slurm" / script).read_text(), re.M)
    bash = (
        "set -euo pipefail; source scripts/slurm/_common.sh; "
        + (f"{layout[0]}; " if layout else "")
        + "enter_repository() { count_ranks; }; python() { echo $*; }; preflight() { :; }; say() { "
        ":; }\n"
        'on_ranks() { echo "$job"; }; conclude() { :; }; train configs/theirs.yaml parallel.ep=8'
    )
    job = {
        "PATH": os.environ["PATH"],
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_PER_NODE": "8",
        "SLURM_JOB_NAME": "a",
        "SLURM_JOB_ID": "7",
    }
    done = subprocess.run(
        ["bash", "-c", bash],
        cwd=REPOSITORY,
        env={**job, **environ},
        check=True,
        capture_output=True,
        text=True,
    )
    assert f"--config {environ.get('DIFFMOE_CONFIG', 'configs/theirs.yaml')} " in done.stdout
    assert done.stdout.split()[-len(words) - 1 :] == ["run.folder=runs/a-7", *words]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_documents_say_the_planners_times(script):
    """docs/cluster.md: ``| `script` | nodes | ms on 1, 2, 4 nodes |``."""
    name, nodes, gpus, _ = asked_by(script)
    row = re.search(
        rf"^\| `{script.name}` \|.*\|$", (REPOSITORY / "docs/cluster.md").read_text(), re.M
    )[0]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2] == f"{nodes} x {gpus}"
    points = extrapolate(
        configuration(name),
        read_deepspeed(BF16),
        H100,
        gpus,
        [gpus, 2 * gpus, 4 * gpus],
        "strong",
        WHOLE,
    )
    found = [(f"{1e3 * p.candidate.time.total:.0f}", p.candidate.layout.ep) for p in points]
    assert cells[3:] == [f"{ms} (EP {ep})" if ep > 1 else ms for ms, ep in found]


def test_the_documents_say_what_spanning_hosts_costs():
    config, tree = configuration("diffmoe_xl_e16_flow", "parallel.ep=8"), read_deepspeed(BF16)
    line = spanning(config, resolve_layout(config, 8), tree, H100, hosts_of(8, 4))
    text = (REPOSITORY / "docs/cluster.md").read_text()
    assert f"`{line.replace(H100.name, 'H100 ...')}`" in text, line


def test_the_documents_say_what_shards_of_a_node_cost():
    """docs/cluster.md, "Many nodes": XL-E16 at EP 8 and a batch of 4,096."""
    config = override(configuration("diffmoe_xl_e16_flow"), ["train.batch=4096", "parallel.ep=8"])
    page = (REPOSITORY / "docs/cluster.md").read_text()
    said = re.search(r"takes (\d+) ms on 2 nodes without and (\d+) with it, (.*) on 128\.", page)
    pairs = re.findall(
        r"(\d+) and (\d+) on (\d+)", f"{said[1]} and {said[2]} on 2, {said[3]} on 128"
    )
    assert [int(nodes) for *_, nodes in pairs] == [2, 8, 32, 128]
    for whole, hybrid, nodes in pairs:
        for ms, name in ((whole, "zero1_bf16"), (hybrid, "zero1_bf16_hybrid")):
            tree = read_deepspeed(REPOSITORY / f"ds_configs/{name}.json")
            found = evaluate(config, tree, Cluster(int(nodes), 8, H100))
            assert ms == f"{1e3 * found.time.total:.0f}", (name, nodes)


@pytest.mark.parametrize(
    ("hosts", "ep", "found"),
    [
        ("aaaabbbb", 4, (1, 4)),
        ("aaaabbbb", 8, (2, 4)),
        ("abababab", 4, (2, 2)),
        ("aaabbbcc", 4, (2, 1)),
        ("abcd", 2, (2, 1)),
        ("abcd", 1, (1, 1)),
        ("aabbccdd", 8, (4, 2)),
        ("a", 1, (1, 1)),
    ],
)
def test_which_groups_span_hosts(hosts, ep, found):
    assert spanned(hosts, ep) == found


@pytest.mark.parametrize(
    ("name", "hosts", "ep", "says"),
    [
        ("diffmoe_l_e16_flow", hosts_of(8, 8), 8, None),
        ("diffmoe_l_e16_flow", hosts_of(16, 8), 8, None),
        ("dense_xl_flow", hosts_of(16, 4), 1, None),
        (
            "diffmoe_l_e16_flow",
            hosts_of(8, 4),
            8,
            "EP groups of 8 ranks span 2 hosts; parallel.ep=4",
        ),
        (
            "diffmoe_xl_e16_flow",
            hosts_of(16, 8),
            16,
            "EP groups of 16 ranks span 2 hosts; parallel.ep=8",
        ),
        (
            "diffmoe_xl_e16_flow",
            hosts_of(16, 4),
            16,
            "EP groups of 16 ranks span 4 hosts; parallel.ep=4",
        ),
        (
            "diffmoe_l_e16_flow",
            [rank % 2 for rank in range(16)],
            8,
            "EP groups of 8 ranks span 2 hosts; not consecutive",
        ),
    ],
)
def test_the_price_of_spanning_hosts_is_the_planners(name, hosts, ep, says):
    config = configuration(name, f"parallel.ep={ep}")
    layout, tree = resolve_layout(config, len(hosts)), read_deepspeed(BF16)
    line = spanning(config, layout, tree, H100, hosts)
    if says is None:
        assert line is None
        return
    assert ("; it goes over two levels, directly it would take " in line) == (hosts[0] == hosts[1])
    begins, then = says.split("; ")
    assert line.startswith(begins) and "\n" not in line
    numbers = re.search(r"takes ([\d.]+) of ([\d.]+) ms a step, ([\d.]+) inside a host", line)
    exchange, step, inside = map(float, numbers.groups())
    assert inside < exchange < step
    one_host = evaluate(config, tree, Cluster(1, len(hosts), H100))
    assert inside == pytest.approx(1e3 * one_host.time.all_to_all, abs=0.06)
    if then == "not consecutive":
        assert "ranks of a host are not consecutive (srun --distribution=block)" in line
        return
    per_node = hosts.count(hosts[0])
    cluster = Cluster(len(hosts) // per_node, per_node, H100)
    real = evaluate(config, tree, cluster)
    assert (exchange, step) == pytest.approx(
        (1e3 * real.time.all_to_all, 1e3 * real.time.total), abs=0.06
    )
    other = evaluate(configuration(name, then), tree, cluster)
    assert line.endswith(f"with {then}, inside hosts, a step takes {1e3 * other.time.total:.1f} ms")


@pytest.mark.parametrize(
    ("hosts", "ep", "per_host"),
    [
        ("aabb", 4, 2),
        ("aabbccdd", 4, 2),
        ("aaaabbbb", 8, 4),
        ("aabbccdd", 8, 2),
        ("aaaabbbb", 4, "hosts hold 4"),
        ("aaaa", 4, "hosts hold 4"),
        ("ab", 2, "hosts hold 1"),
        ("abab", 4, "hosts hold 1"),
        ("aaab", 4, "hosts hold 1 or 3"),
        ("aabbbbcc", 8, "hosts hold 2 or 4"),
        ("aaabbb", 2, "hosts hold 3"),
    ],
)
def test_where_an_exchange_has_two_levels(hosts, ep, per_host):
    config = configuration(
        "diffmoe_l_e16_flow", f"parallel.ep={ep}", f"train.batch={8 * len(hosts)}", "moe.pool=1"
    )
    layout, runs = resolve_layout(config, len(hosts)), runs_of(hosts)
    assert layout.per_host == 0 and over_hosts(layout, "direct", runs) == layout
    if isinstance(per_host, int):
        for form in ("auto", "two_level"):
            assert over_hosts(layout, form, runs) == dataclasses.replace(layout, per_host=per_host)
        return
    assert over_hosts(layout, "auto", runs) == layout
    with pytest.raises(UserError) as raised:
        over_hosts(layout, "two_level", runs)
    assert "\n" not in str(raised.value)
    assert f"parallel.ep is {ep}, and {per_host} consecutive ranks" in str(raised.value)


def test_groups_that_nodes_cut_in_unequal_parts_are_priced_as_they_lie():
    config = configuration("diffmoe_l_e16_flow", "train.batch=192", "moe.pool=16")
    config = override(config, ["parallel.ep=4"])
    tree = read_deepspeed(BF16)
    found = evaluate(config, tree, Cluster(2, 6, H100))  # ranks 4, 5 and 6, 7 are one group
    inside = evaluate(config, tree, Cluster(3, 4, H100))
    assert found.time.all_to_all > 2 * inside.time.all_to_all
    line = spanning(config, found.layout, tree, H100, hosts_of(12, 6))
    assert f"all-to-all takes {1e3 * found.time.all_to_all:.1f} of" in line


def test_unequal_hosts_are_not_taken_for_another_order_of_ranks():
    config = configuration("diffmoe_l_e16_flow", "train.batch=192", "moe.pool=8")
    hosts = [0] * 8 + [1] * 8 + [2] * 4 + [3] * 4
    layout = resolve_layout(config, len(hosts))
    line = spanning(config, layout, read_deepspeed(BF16), H100, hosts)
    assert "with parallel.ep=4, inside hosts" in line and "consecutive" not in line


@pytest.mark.parametrize(
    "words,stage",
    [("train.optimizer=muon", 3), ("train.optimizer=apex", 3), ("train.compile=true", 3)],
)
def test_no_layout_is_offered_that_no_run_takes(words, stage):
    tree, cluster = read_deepspeed(BF16), Cluster(1, 8, H100)
    for more, refused in (((), False), ((words,), True)):
        config = configuration("diffmoe_s_e16_flow", *more)
        stages = {c.engine.stage for c in candidates(config, tree, cluster, WHOLE)}
        assert (stage not in stages) == refused and {1, 2} <= stages


def test_the_efficiency_is_that_of_the_first_size_with_a_layout():
    config = configuration("diffmoe_l_e16_flow", "train.batch=192", "moe.pool=16")
    lines = larger_batches(config, read_deepspeed(BF16), H100, 6, Pins(ep=4, overlap="none"))
    assert "of 12 GPUs' efficiency (EP 4" in lines[0] and "of 6 GPUs'" not in "".join(lines)
    small = override(config, ["train.recipe_batch=4", "train.batch=192"])
    assert "does not start" in larger_batches(small, read_deepspeed(BF16), H100, 6, WHOLE)[0]


def test_the_planner_takes_the_form_of_exchange_that_is_faster():
    config = configuration("diffmoe_xl_e16_flow", "parallel.ep=16")
    tree, pins = read_deepspeed(BF16), Pins(ep=16)

    def best(hardware, *overrides):
        given = override(config, list(overrides))
        return candidates(given, tree, Cluster(2, 8, hardware), pins)[0]

    slow = dataclasses.replace(H100.network, latency_us=1000)
    far = dataclasses.replace(H100, network=slow)
    narrow = dataclasses.replace(H100, node=dataclasses.replace(H100.node, gb_s=5))
    assert best(far).layout.per_host == 8 and "EP 16 over two levels, " in best(far).label
    assert best(narrow).layout.per_host == 0 and "levels" not in best(narrow).label
    # What is said is kept.
    assert best(far, "parallel.exchange=direct").layout.per_host == 0
    assert best(narrow, "parallel.exchange=two_level").layout.per_host == 8
    assert best(far).time.latency < best(far, "parallel.exchange=direct").time.latency
    # Across hosts 8 messages become 1; rows cross once in either form.
    two, one = (best(H100, f"parallel.exchange={form}") for form in ("two_level", "direct"))
    across = sum(
        m.wire for m in step_traffic(two.config, two.layout, two.engine) if m.group == "ep across"
    )
    assert across <= 1.05 * least_traffic(two.config, two.layout, two.engine).network
    assert two.time.all_to_all != one.time.all_to_all


@pytest.mark.parametrize(
    ("name", "nodes", "fewer"),
    [
        ("diffmoe_s_e16_flow", 2, 1),
        pytest.param("diffmoe_l_e8_flow", 8, 4, marks=pytest.mark.full),
        pytest.param("diffmoe_xl_e16_flow", 8, 4, marks=pytest.mark.full),
        ("diffmoe_s_e16_flow", 1, None),
        ("diffmoe_l_e16_flow", 2, None),
        ("dense_xl_flow", 4, None),
    ],
)
def test_plan_and_submit_say_when_fewer_nodes_are_faster(name, nodes, fewer, monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    words = [
        "--config",
        f"configs/{name}.yaml",
        "--deepspeed_config",
        str(BF16),
        "--nodes",
        str(nodes),
    ]
    quick, slow = (
        min(
            c.time.total
            for c in candidates(configuration(name), read_deepspeed(BF16), Cluster(n, 8, H100))
        )
        for n in (fewer or nodes, nodes)
    )
    assert plan.main(words) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "fewer nodes" in line]
    assert main(["submit", *words, "--dry-run"]) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if "fewer nodes" in line]
    if fewer is None:
        assert said == notes == []
        return
    begins = (
        f"note: fewer nodes would be faster with train.batch 256: {1e3 * quick:.1f} ms a step on "
        f"{fewer} ("
    )
    assert (
        len(said) == 1
        and said[0].startswith(begins)
        and said[0].endswith(f"), {1e3 * slow:.1f} on {nodes}")
    )
    assert len(notes) == 1 and notes[0].startswith(begins)


@pytest.mark.parametrize(
    ("gpus", "ep", "spans"), [(8, 8, False), (4, 8, True), (4, 4, False), (8, 16, True)]
)
def test_plan_and_submit_say_when_ep_groups_span_hosts(gpus, ep, spans, monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    words = [
        "--config",
        "configs/diffmoe_l_e16_flow.yaml",
        "--deepspeed_config",
        str(BF16),
        "--nodes",
        "2",
        "--gpus-per-node",
        str(gpus),
        f"parallel.ep={ep}",
    ]
    assert plan.main([*words, "--ep", str(ep)]) == 0
    said = capsys.readouterr().out
    assert main(["submit", *words, "--dry-run"]) == 0
    notes = capsys.readouterr().err
    for text in (said, notes):
        assert (f"EP groups of {ep} ranks span 2 hosts: by the plan (H100 SXM" in text) == spans
    table = said.partition("EP hosts ZeRO")[2].splitlines()[1]
    assert table.split()[1:3] == [str(ep), "2" if spans else "1"]


@pytest.mark.full
def test_ranks_exchange_over_the_hosts_that_they_tell_each_other(tmp_path):
    def ends(folder, per_host, form, program=("run.py",)):
        words = [*program, *tiny(folder, "parallel.ep=4", "train.steps=2", form)]
        start = f"export SLURMD_NODENAME=node$((RANK / {per_host})); exec {sys.executable} "
        with Program(["sh", "-c", start + shlex.join(words)], 4) as program:
            return program.wait(400)

    found = {}
    for form in ("auto", "direct"):
        said = ends(tmp_path / form, 2, f"parallel.exchange={form}")
        assert [end.returncode for end in said] == [0] * 4, said
        line = re.search(r"^EP groups of 4 ranks span 2 hosts: .*$", said[0].stdout, re.M)[0]
        assert ("over two levels" in line) == (form == "auto")
        per_host = json.loads((tmp_path / form / "layout.json").read_text())["per_host"]
        found[form] = losses(tmp_path / form)
        assert per_host == (2 if form == "auto" else 0) and len(found[form]) == 2
    assert found["auto"] == found["direct"]
    # Ranks that all refuse part in order: with the group still there one in a few aborts at exit.
    parted = (
        "import sys, torch.distributed as dist; from diffmoe.__main__ import main; "
        "code = main(sys.argv[1:]); sys.exit(9 if dist.is_initialized() else code)"
    )
    refused = ends(tmp_path / "refused", 1, "parallel.exchange=two_level", ("-c", parted))
    assert [end.returncode for end in refused] == [2] * 4
    said = "".join(end.stderr for end in refused)
    assert said.count("\n") == 1 and "parallel.ep is 4, and hosts hold 1 consecutive ranks" in said
