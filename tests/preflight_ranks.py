"""A rank of preflight's tests: four processes play four nodes of one rank, healthy first and then
each with an illness.

RANK=r WORLD_SIZE=4 python tests/preflight_ranks.py FOLDER      one output file a case and rank in
FOLDER
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from diffmoe.config import load_config  # noqa: E402
from diffmoe.environment import RankEnvironment  # noqa: E402
from launcher import probe  # noqa: E402
from launcher.preflight import Expected, preflight  # noqa: E402

RANK, FOLDER = int(os.environ["RANK"]), Path(sys.argv[1])
WORLD = 4


class SlowLink(probe.Exchange):
    """Every swap with rank 2 takes a while."""

    def __call__(self, partner: int | None) -> None:
        super().__call__(partner)
        if partner is not None and 2 in (RANK, partner):
            time.sleep(0.2)


def other_versions(root: Path, device: Any) -> dict[str, str]:
    """The versions of a node that has another torch and other code."""
    return {**VERSIONS(root, device), "torch": "2.12.0", "code": "0123456789ab"}


VERSIONS = probe.versions


def run(
    case: str,
    base: Path,
    *,
    timeout: float = 60.0,
    here: bool = True,
    per_node: int = 1,
    ep: int = 2,
    told: float | None = None,
    **stand_ins: Any,
) -> None:
    """One case's preflight on this rank (not where it is not ``here``); what it said and its code
    go into a file.
    """
    out = io.StringIO()
    code = 0
    if here:
        environment = RankEnvironment(
            RANK, WORLD, RANK % per_node, per_node, "srun", f"file://{FOLDER}/store-{case}"
        )
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            code = preflight(
                environment,
                load_config("configs/demo.yaml", ["run.folder=run", f"parallel.ep={ep}"]),
                base,
                Expected(told),
                timeout,
                2,
                host=f"node{RANK // per_node}",
                **stand_ins,
            )
    (FOLDER / f"{case}.{RANK}.json").write_text(json.dumps({"code": code, "said": out.getvalue()}))


def main() -> None:
    """All cases in turn, as one rank of a job."""
    good = FOLDER / "good"
    run("healthy", good, record=FOLDER / "record")
    probe.versions = other_versions if RANK == 1 else VERSIONS
    run("versions", good)
    probe.versions = VERSIONS
    run("link", good, exchange_with=SlowLink)
    run("shards", FOLDER / "bad" if RANK == 3 else good)
    clock: Callable[[], float] = (lambda: time.time() + 90) if RANK == 2 else time.time
    run("clock", good, clock=clock)
    run("inside", good, per_node=2)
    run("spanning", good, per_node=2, ep=4)
    run("slow_experts", good, per_node=2, ep=4, told=1e6)
    run("own_disk", FOLDER / "own" if RANK == 0 else good)
    os.environ["SLURM_JOB_NODELIST"] = "node[0-3]"
    run("absent", good, timeout=3.0, here=RANK != 3)


if __name__ == "__main__":
    main()
    os._exit(0)
