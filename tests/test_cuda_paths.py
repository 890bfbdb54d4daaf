"""What only runs on CUDA, seen without a GPU: shapes, dtypes and devices, and that the host reads
nothing from the device.

A GPU's own numbers are another matter: ``run.py verify --device cuda``."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from diffmoe.bench import fake_cuda

pytestmark = pytest.mark.full  # its fixtures take their time

HERE = Path(__file__).resolve().parent
CASES = [
    *(
        f"{family}, {recompute}, {dtype}"
        for dtype in (torch.float32, torch.bfloat16)
        for family in ("dense", "ec", "diffmoe")
        for recompute in ("none", "block", "selective")
    ),
    *(
        f"compiled, {what}, {recompute}"
        for what in ("diffmoe", "tc", "EP 4 of 8 ranks")
        for recompute in ("none", "selective")
    ),
    *(f"time embedding, {dtype}" for dtype in (torch.float32, torch.bfloat16)),
    "grouped, gelu",
    "grouped, swiglu",
    "loop",
    "tc",
    "ddpm",
    "modern",
    "compiled, modern",
    "EP 4 of 8 ranks, none",
    "EP 4 of 8 ranks, selective",
]
PLANNED = [
    f"memory of {config}, {recompute}"
    for config in (
        "diffmoe_s_e16_flow",
        "diffmoe_l_e16_flow",
        "diffmoe_xl_e8_flow",
        "dense_l_flow",
        # RMSNorm is one kernel in a torch for CUDA, several in one for CPUs.
        "diffmoe_s_e16_flow model.positions=rope model.qk_norm=true model.activation=swiglu",
    )
    for recompute in ("none", "block", "selective")
]


@pytest.fixture(scope="module")
def found():
    """Case -> what came of it, of one run in a process of its own."""
    if fake_cuda.has_gpu():
        pytest.skip("here is a GPU, which cannot be replaced")
    if shutil.which("g++") is None:
        pytest.skip("g++ is missing, which builds the device")
    run = fake_cuda.run(
        str(HERE / "fake_cuda_cases.py"), [], capture_output=True, text=True, timeout=900
    )
    assert run.returncode == 0, run.stderr
    return dict(json.loads(line) for line in run.stdout.splitlines())


@pytest.mark.parametrize("case", CASES)
def test_a_training_pass_stays_on_the_device(found, case):
    assert found[case] == "done"


def test_a_read_by_the_host_would_be_seen(found):
    """Of the pool of an EP group only its experts' owners know who sends how many rows: there the
    host must ask.
    """
    assert "reads" in found["EP 4, pool of 4 ranks"] and "host" in found["EP 4, pool of 4 ranks"]
    assert found.keys() == {*CASES, *PLANNED, "EP 4, pool of 4 ranks"}


@pytest.mark.parametrize("case", PLANNED)
def test_published_sizes_take_the_memory_that_the_planner_says(found, case):
    """bf16, 64 samples.  The peak has temporaries of one block, of which the plan is rougher: a
    share of all that a rank holds.
    """
    memory = found[case]
    assert memory["kept"] == pytest.approx(memory["planned"], rel=0.03)
    assert abs(memory["peak"] - memory["planned_peak"]) <= 0.025 * memory["planned_rank"]
