"""A checkpoint of the largest configuration's true shape: written as 8 expert-parallel ranks, read
back as one, in bounded memory.
"""

import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from made_checkpoints import measured
from programs import REPOSITORY

NEEDED = 50e9  # fp32 weights, EMA and two moments of 2.9 B parameters: 46 GB
BOUND = 256e6


@pytest.mark.slow
def test_xl_e16_is_written_at_ep_8_and_read_at_ep_1(tmp_path):
    """Minutes, and 46 GB of disk.  Every value is made on the fly, written, checked and
    compared.
    """
    assert shutil.disk_usage(tmp_path).free > NEEDED, (
        "this needs 50 GB of disk: TMPDIR or --basetemp on a larger one"
    )
    result = subprocess.run(
        [
            sys.executable,
            __file__,
            str(tmp_path),
            str(REPOSITORY / "configs/diffmoe_xl_e16_flow.yaml"),
        ],
        capture_output=True,
        text=True,
        timeout=7200,
        cwd=REPOSITORY,
    )
    assert result.returncode == 0, result.stderr
    print(result.stdout)
    size, writing, reading, _ = map(float, result.stdout.split("\n")[0].split())
    assert size > 45e9
    assert writing < BOUND and reading < BOUND, (size, writing, reading)


if __name__ == "__main__":
    began = time.monotonic()
    size, writing, reading = measured(Path(sys.argv[1]), 8, [], sys.argv[2])
    print(size, writing, reading, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    print(
        f"{size / 1e9:.1f} GB: memory grew by {writing / 1e6:.0f} MB while writing and "
        f"{reading / 1e6:.0f} MB while reading; "
        f"{time.monotonic() - began:.0f} s in all"
    )
    shutil.rmtree(Path(sys.argv[1]) / "big")
