"""Runs a program in whose process torch takes a GPU for granted: CUDA tensors without memory or
kernels (torch's fake tensors).

    python -m diffmoe.bench.fake_cuda SCRIPT.py|MODULE [argument …]

Where there is a GPU that torch was built for, nothing is needed for that; elsewhere
``fake_cuda.cpp`` is built, and loaded before torch looks for its hooks: hence a process of its own,
and no import of torch above.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffmoe import gpus
from diffmoe.config import Config, config_to_tree
from diffmoe.errors import UserError

_SOURCE = Path(__file__).with_suffix(".cpp")


def run(program: str, arguments: Sequence[str], **options: Any) -> subprocess.CompletedProcess:
    """Runs a module, or a script that ends in ``.py``, in such a process; ``options`` as
    ``subprocess.run`` takes them. UserError where the device cannot be built.
    """
    if not has_gpu() and shutil.which("g++") is None:
        raise UserError("counting on CUDA tensors needs g++ or a GPU: install g++")
    this = "diffmoe.bench.fake_cuda"
    return subprocess.run([sys.executable, "-m", this, program, *arguments], **options)


def counted(
    cases: Sequence[tuple[Config, str, str]], ranks: int, per_node: int | None = None
) -> list[dict[str, Any]]:
    """What :mod:`diffmoe.bench.counted` says of (configuration, DeepSpeed JSON, part: eager,
    compiled or engine), of as many ranks, ``per_node`` of them on a node (None: all), one after
    another in one process.
    """
    world = {"ranks": ranks, "per_node": per_node or ranks}
    requests = [
        {"config": config_to_tree(config), "deepspeed": deepspeed, **world, "part": part}
        for config, deepspeed, part in cases
    ]
    done = run("diffmoe.bench.counted", [json.dumps(requests)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"counting failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def has_gpu() -> bool:
    """Whether this machine has a GPU, and its torch is built for one."""
    return _for_cuda() and bool(gpus.present())


def _torch() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def _for_cuda() -> bool:
    return runpy.run_path(str(_torch() / "version.py"))["cuda"] is not None


def _load() -> None:
    with tempfile.TemporaryDirectory(prefix="diffmoe-fake-cuda-") as folder:
        library, torch = Path(folder) / "fake_cuda.so", _torch()
        cuda, without = (["libtorch_cuda.so"], []) if _for_cuda() else ([], ["-DWITHOUT_CUDA"])
        build = ["g++", "-shared", "-fPIC", "-std=c++20", f"-I{torch}/include", f"-L{torch}/lib"]
        build += [*without, str(_SOURCE), "-o", str(library), "-lc10", "-ltorch_cpu"]
        subprocess.run(build, check=True)
        for each in ("libtorch_global_deps.so", "libc10.so", "libtorch_cpu.so", *cuda):
            ctypes.CDLL(str(torch / "lib" / each), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


if __name__ == "__main__":
    if not has_gpu():
        _load()
    sys.argv = sys.argv[1:]
    if sys.argv[0].endswith(".py"):
        sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
