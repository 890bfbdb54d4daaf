"""scripts/bench_gpu.sh: order, limits, resuming, archive, with a program in python's place that
does nothing; once, slowly, with python.
"""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

from programs import REPOSITORY

SCRIPT = REPOSITORY / "scripts/bench_gpu.sh"
ITEMS = [
    "probe_machine",
    "probe_experts",
    "probe_nccl",
    "parity_quick",
    "parity",
    "profile_l_e16",
    "profile_xl_e8",
    "profile_s_e16",
    "moe_layer_l",
    "moe_layer_xl",
    "step_l",
    "step_xl",
    "step_recompute",
    "sampling_l",
    "sampling_xl",
    "train",
    "parity_compiled",
]
ORDER = "probe parity profile layer step sampling train compiled"
# Stands in python's place: says what it is asked, hangs with a child of its own or fails where it
# shall, and leaves summaries and installations to the real one.
_STUB = """#!/usr/bin/env bash
case "$*" in "-m pip"* | "run.py bench results"*) exec "$REAL" "$@" ;; esac
echo "$*" >> "$ASKED"
[ -z "${IMPORTED:-}" ] || "$REAL" -c "import $IMPORTED; print($IMPORTED.__file__)" >> "$ASKED"
if [ -n "${HANGS:-}" ] && [[ "$*" = *"$HANGS"* ]]; then
  sleep 600 & echo $! > "$ASKED.child"; wait
fi
for i in 1 2 3; do echo "line $i of $*"; done
if [ -n "${FAILS:-}" ] && [[ "$*" = *"$FAILS"* ]]; then exit 3; fi
exit 0
"""


@pytest.fixture
def bench(tmp_path):
    """Starts the script with arguments after the folder and variables; ``.asked``: the stub's
    command lines.
    """
    stub, asked = tmp_path / "stub", tmp_path / "asked"
    stub.write_text(_STUB)
    stub.chmod(0o755)
    left = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("BENCH_") and name != "WHEELS"
    }

    def start(*parts, script=SCRIPT, **variables):
        env = {
            **left,
            "PYTHON": str(stub),
            "REAL": sys.executable,
            "ASKED": str(asked),
            **variables,
        }
        return subprocess.Popen(
            ["bash", str(script), str(tmp_path / "out"), *parts],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    start.folder, start.stub = tmp_path / "out", stub
    start.asked = lambda: asked.read_text().splitlines() if asked.exists() else []
    start.child = Path(f"{asked}.child")
    yield start
    if start.child.exists():  # a script that was killed itself leaves it
        try:
            os.kill(int(start.child.read_text()), signal.SIGKILL)
        except ProcessLookupError:
            pass


def ended(folder):
    return {
        path.stem: json.loads(path.read_text())["rc"] for path in (folder / "status").glob("*.json")
    }


def finished(process):
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (
            ["paritty"],
            {},
            f"error: part (paritty) must be one of {ORDER}\n",
        ),
        (
            ["probe", "speed"],
            {},
            f"error: part (speed) must be one of {ORDER}\n",
        ),
        (
            [],
            {"BENCH_MINUTES": "9.5"},
            "error: BENCH_MINUTES (9.5) must be a whole number above 0\n",
        ),
        ([], {"BENCH_LIMIT": "0"}, "error: BENCH_LIMIT (0) must be a whole number above 0\n"),
    ],
)
def test_what_the_script_does_not_know_is_refused(bench, arguments, variables, message):
    assert finished(bench(*arguments, **variables)) == (2, "", message)
    assert not bench.folder.exists()


def test_every_part_runs_in_order_and_is_not_done_again(bench):
    code, out, err = finished(bench())
    assert (code, err) == (0, "") and [line.split(": ")[1] for line in out.splitlines()] == ITEMS
    asked = bench.asked()
    assert len(asked) == len(ITEMS) and ended(bench.folder) == dict.fromkeys(ITEMS, 0)
    with tarfile.open(f"{bench.folder}.tar.gz") as archive:
        assert {"out/summary.md", "out/probe_machine.log", "out/status/train.json"} <= set(
            archive.getnames()
        )
    assert finished(bench()) == (0, "", "") and bench.asked() == asked
    assert finished(bench("sampling", "probe"))[0] == 0  # named: anew, in the script's order
    assert [line.split()[2] for line in bench.asked()[len(asked) :]] == ["probe"] * 3 + [
        "sampling"
    ] * 2


@pytest.mark.full
@pytest.mark.parametrize(
    ("hangs", "item", "left_out"),
    [
        ("probe experts", "probe_experts", ["probe_nccl"]),
        ("parity_quick.json", "parity_quick", ["parity"]),
    ],
)
def test_a_part_over_its_limit_is_ended_and_the_next_goes_on(bench, hangs, item, left_out):
    code, _, err = finished(bench(HANGS=hangs, BENCH_LIMIT="4"))
    assert code == 1 and f"error: {item}: exit code 124" in err
    assert ended(bench.folder) == {**dict.fromkeys(ITEMS, 0), item: 124, **dict.fromkeys(left_out)}
    wait_for(lambda: gone(int(bench.child.read_text())))  # nobody of it is left
    told = (bench.folder / "summary.md").read_text()
    assert f"| {item} | over its limit, ended |" in told and all(
        f"| {each} | left out: no time |" in told for each in left_out
    )
    before = len(bench.asked())
    assert finished(bench())[0] == 0 and len(bench.asked()) == before + 1 + len(
        left_out
    )  # only what is not done
    assert "over its limit" not in (bench.folder / "summary.md").read_text()


@pytest.mark.parametrize("fails", ["probe machine", "bench step --model xl", "bench train"])
def test_a_failing_part_is_told_and_the_others_run(bench, fails):
    code, _, err = finished(bench(FAILS=fails))
    assert code == 1 and err.count("error: ") == 1 and "exit code 3" in err
    assert sorted(filter(None, ended(bench.folder).values())) == [3] and len(bench.asked()) == len(
        ITEMS
    )
    told = (bench.folder / "summary.md").read_text()
    assert "exit code 3" in told and "line 3 of run.py " in told


@pytest.mark.parametrize(("how", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_script_that_is_killed_in_the_middle_goes_on_where_it_was(bench, how, code):
    with bench(HANGS="bench step") as process:
        wait_for(bench.child.exists)
        process.send_signal(how)
        if how == signal.SIGKILL:  # the hanging command holds the script's pipes
            os.kill(int(bench.child.read_text()), signal.SIGKILL)
        assert finished(process)[0] == code
    done = ITEMS[: ITEMS.index("step_l")]
    assert ended(bench.folder) == dict.fromkeys(done, 0) or how == signal.SIGKILL
    assert (
        how == signal.SIGKILL
        or Path(f"{bench.folder}.tar.gz").exists()
        and gone(int(bench.child.read_text()))
    )
    before = len(bench.asked())
    assert finished(bench())[0] == 0 and ended(bench.folder) == dict.fromkeys(ITEMS, 0)
    again = [line for line in bench.asked()[before:] if "--compile" not in line]  # the last part
    assert not any(" probe " in line or " verify " in line for line in again)


def wheel(folder, name):
    """A wheel of one module."""
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}.py", "")
        archive.writestr(
            f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{name}-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr(f"{name}-1.0.dist-info/RECORD", "")


def test_wheels_are_installed_into_a_folder_of_their_own(bench, tmp_path):
    (tmp_path / "wheels").mkdir()
    wheel(tmp_path / "wheels", "brought_along")
    assert (
        finished(bench("probe", WHEELS=str(tmp_path / "wheels"), IMPORTED="brought_along"))[0] == 0
    )
    found = [line for line in bench.asked() if line.endswith("brought_along.py")]
    assert len(found) == 3 and not Path(found[0]).exists()  # gone with the script
    code, _, err = finished(bench("probe", WHEELS=str(tmp_path / "nothing")))
    assert code == 2 and f"error: WHEELS ({tmp_path / 'nothing'}) cannot be installed" in err


@pytest.mark.parametrize("place", ["path/python3", "path/python", "tree/.venv/bin/python"])
def test_python_is_found(bench, tmp_path, place):
    """In a tree of its own, with little more on the way than what the script needs."""
    (tmp_path / "tree/scripts").mkdir(parents=True)
    script = tmp_path / "tree/scripts/bench_gpu.sh"
    script.write_text(SCRIPT.read_text())
    (tmp_path / "path").mkdir()
    for tool in (
        "bash",
        "dirname",
        "basename",
        "mkdir",
        "timeout",
        "tail",
        "mv",
        "grep",
        "tar",
        "gzip",
        "head",
        "sleep",
    ):
        (tmp_path / "path" / tool).symlink_to(
            subprocess.run(
                ["which", tool], capture_output=True, text=True, check=True
            ).stdout.strip()
        )
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).write_text(_STUB)
    (tmp_path / place).chmod(0o755)
    variables = {
        "PYTHON": "",
        "PATH": str(tmp_path / "path"),
        "REAL": str(tmp_path / "path/sleep"),
    }  # which makes no summary
    assert finished(bench("probe", script=script, **variables))[0] == 1
    assert len(bench.asked()) == 3 and ended(bench.folder) == dict.fromkeys(ITEMS[:3], 0)


@pytest.mark.slow
def test_the_script_runs_dry(tmp_path):
    """Minutes: every part on the CPU, at sizes that say nothing; then the planner takes its figures
    from the archive.
    """
    env = {
        **os.environ,
        "BENCH_TINY": "1",
        "PYTHON": sys.executable,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    folder = tmp_path / "dry"
    run = subprocess.run(
        ["bash", str(SCRIPT), str(folder)], env=env, timeout=1800, capture_output=True, text=True
    )
    told = (folder / "summary.md").read_text()
    assert (run.returncode, run.stderr) == (0, ""), told
    assert ended(folder) == dict.fromkeys(
        [
            item
            for item in ITEMS
            if item != "parity" and not item.endswith(("_l_e16", "_xl_e8", "_xl"))
        ],
        0,
    )
    archive = Path(f"{folder}.tar.gz")
    assert archive.stat().st_size < 4e6
    with tarfile.open(archive) as members:
        names = {Path(name).name for name in members.getnames()}
    assert {
        "summary.md",
        "probe_machine.json",
        "probe_experts.json",
        "probe_nccl.json",
        "parity_quick.json",
        "parity_compiled.json",
        "roofline_diffmoe_s_e16_flow.json",
        "moe_layer_l_e16_256.json",
        "step_l_e16_1.json",
        "step_l_e16_1_recompute.json",
        "sampling_l_e16_1.json",
        "train_diffmoe_s_e16_flow.json",
        "train.log",
    } <= names
    for words in (
        "experts without rows, every arrangement | 42 cases right",
        "new groups of gloo",
        "40 steps, stopped and resumed at 2",
        "attention, head dimension 72",
        "cases within bounds",
        "step of S-E16, eager",
        "x dense's time",
        "x the MoE layers' time",
    ):
        assert words in told
    plan = subprocess.run(
        [
            sys.executable,
            "-m",
            "launcher",
            "plan",
            "--config",
            "configs/diffmoe_l_e16_flow.yaml",
            "--gpu",
            "cpu",
            "--calibrate",
            str(archive),
        ],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert "figures    from the kernels of 2 steps on " in plan.stdout, plan.stderr


@pytest.mark.slow
def test_what_finds_no_time_is_left_out(bench):
    """A minute."""
    code, _, err = finished(bench(HANGS="probe experts", BENCH_MINUTES="1"))
    assert code == 1 and "error: train: no time left" in err
    assert ended(bench.folder) == {**dict.fromkeys(ITEMS), "probe_machine": 0, "probe_experts": 124}
