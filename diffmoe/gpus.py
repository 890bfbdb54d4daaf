"""What nvidia-smi says about this machine's GPUs, and what a run, preflight and doctor say of those
that it cannot have.  No torch here.
"""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from diffmoe.errors import UserError

_FIELDS = (
    "index",
    "name",
    "driver_version",
    "memory.total",
    "temperature.gpu",
    "ecc.errors.uncorrected.volatile.total",
    "clocks_throttle_reasons.active",
)
# Bits of NVML's clock event reasons that mean trouble; idle, application clocks and the power cap
# are daily life.
_TROUBLE = {
    0x8: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}

# What to say where the CPU is meant, and where others may use the GPU as well.
CPU = "run.device=cpu (--device cpu where there is no run.device)"
SHARED = "DIFFMOE_SHARED_GPU"
FREE_ONE = (
    f"end it, choose another GPU by CUDA_VISIBLE_DEVICES, or set {SHARED}=1 to share this one"
)


@dataclass(frozen=True)
class Gpu:
    """One GPU.  ``memory`` in MiB; ``trouble``: why it is slowed down or broken, empty when it is
    well.
    """

    index: int
    name: str
    driver: str
    memory: int
    trouble: tuple[str, ...]


def query() -> list[Gpu] | None:
    """This machine's GPUs; None where there is no nvidia-smi.  UserError with its complaint when it
    fails.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        done = subprocess.run(
            [program, f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=30,
        )
    except subprocess.TimeoutExpired:
        raise UserError("nvidia-smi hangs: the driver needs a restart") from None
    if done.returncode:
        raise UserError(f"nvidia-smi fails: {' '.join((done.stdout + done.stderr).split())}")
    return parse(done.stdout)


def parse(text: str) -> list[Gpu]:
    """GPUs from nvidia-smi's CSV, one a line."""
    gpus = []
    for line in filter(None, map(str.strip, text.splitlines())):
        fields = [field.strip() for field in line.split(",")]
        if len(fields) != len(_FIELDS):
            raise UserError(f"nvidia-smi says {line!r}, which is not {len(_FIELDS)} fields")
        index, name, driver, memory, temperature, ecc, reasons = fields
        active = int(reasons, 16) if reasons.startswith("0x") else 0
        trouble = [f"{text} at {temperature} C" for bit, text in _TROUBLE.items() if active & bit]
        if ecc.isdigit() and int(ecc):
            trouble.append(f"{ecc} uncorrected ECC errors")
        gpus.append(
            Gpu(int(index), name, driver, int(memory) if memory.isdigit() else 0, tuple(trouble))
        )
    return gpus


def present() -> str:
    """What says that this process has GPUs, whatever torch makes of them; empty where nothing does."""
    devices = sorted(Path("/dev").glob("nvidia[0-9]*"))
    mine = [
        path.name for path in devices if os.access(path, os.R_OK | os.W_OK) and _opens(path)
    ]  # not a job's that was given none
    if mine:
        return f"{len(mine)} GPU{'s' * (len(mine) > 1)} (/dev/{mine[0]}{', ...' * (len(mine) > 1)})"
    try:
        found = query()
    except UserError as error:
        return (
            ""
            if "No devices were found" in str(error)
            else f"a GPU, whose driver is broken ({error})"
        )
    return described(found or [])


def described(gpus: list[Gpu]) -> str:
    """``2 GPUs (NVIDIA H100, driver 550.1)``; empty for none."""
    return (
        f"{len(gpus)} GPU{'s' * (len(gpus) > 1)} ({gpus[0].name}, driver {gpus[0].driver})"
        if gpus
        else ""
    )


def unusable(
    found: str, version: str, cuda: str | None, shown: str | None, says: str
) -> tuple[str, str]:
    """Why torch has none of the GPUs that are there, and what to do.  ``found``: :func:`present`'s
    words; ``version``, ``cuda``: torch's, and of CUDA that it is built for (None: none); ``shown``:
    CUDA_VISIBLE_DEVICES; ``says``: CUDA's words.
    """
    if cuda is None:
        return (
            f"this machine has {found}, and torch ({version}) is built for CPUs only",
            f"install the build of torch {version.partition('+')[0]} for CUDA",
        )
    if shown is not None and not re.match(
        r"\d|GPU-|MIG-", shown.strip()
    ):  # CUDA stops at the first that is no device
        return (
            f"CUDA_VISIBLE_DEVICES ({shown!r}) hides this machine's {found}",
            "unset CUDA_VISIBLE_DEVICES",
        )
    return (
        f"this machine has {found}, and torch ({version}, for CUDA {cuda}) cannot use it"
        + f" with CUDA_VISIBLE_DEVICES ({shown})" * (shown is not None)
        + f": {says}",
        "see python -m launcher doctor",
    )


def taken(index: int, seen: tuple[str, str, int, int] | str) -> str:
    """Why GPU ``index`` is not to be had; empty where it is.  ``seen``: its name, UUID, free bytes
    and all of them, before anything of ours is there, or CUDA's complaint where it could not be
    opened.

    The planner leaves a twentieth of the memory to context and buffers: with more than that gone, a
    run that was planned to fit does not.  Less is nobody's run: this process's own context, or a
    desktop (up to 2 GiB on a small GPU).
    """
    if isinstance(seen, str):
        return f"GPU {index} cannot be opened: {seen}"
    name, uuid, free, total = seen
    if total - free <= max(2 * 2**30, total // 20):
        return ""
    return (
        f"GPU {index} ({name}, GPU-{uuid[:8]}) has {(total - free) / 2**30:.1f} of {total / 2**30:.1f} GiB in use by "
        f"{_holders(uuid) or 'another process'}"
    )


def _holders(uuid: str) -> str:
    """Other processes on a GPU as nvidia-smi names them, which in a container may be none."""
    program = shutil.which("nvidia-smi")
    try:
        done = (
            subprocess.run(
                [
                    program,
                    "--query-compute-apps=gpu_uuid,pid,used_memory,process_name",
                    "--format=csv,noheader,nounits",
                ],
                capture_output=True,
                text=True,
                timeout=30,
            )
            if program
            else None
        )
    except subprocess.TimeoutExpired:
        return ""
    rows = [
        line.split(", ", 3)
        for line in (done.stdout.splitlines() if done and done.returncode == 0 else [])
    ]
    return ", ".join(
        f"{Path(name).name} (process {pid}, {f'{int(mib) / 1024:.1f}' if mib.isdigit() else '?'} GiB)"
        for owner, pid, mib, name in (row for row in rows if len(row) == 4)
        if uuid and owner.endswith(uuid) and pid != str(os.getpid())
    )


def _opens(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_RDWR))
    except OSError:
        return False
    return True


def has_driver() -> bool:
    """Whether this machine has NVIDIA's kernel driver, whatever else works."""
    return Path("/proc/driver/nvidia/version").exists() or os.path.exists("/dev/nvidia0")
