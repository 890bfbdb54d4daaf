"""What nvidia-smi says of this machine's GPUs, and why a run cannot have them.  No torch here."""

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffmoe.errors import UserError

_FIELDS = (
    "index name driver_version memory.total temperature.gpu ecc.errors.uncorrected.volatile.total "
    "clocks_throttle_reasons.active"
).split()
# Bits of NVML's clock event reasons that mean a problem; idle, application clocks and the power cap
# are daily life.
_FAULTS = {
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
    """One GPU.  ``memory`` in MiB; ``problems``: why it is slowed down or broken."""

    index: int
    name: str
    driver: str
    memory: int
    problems: tuple[str, ...]


def query() -> list[Gpu] | None:
    """This machine's GPUs; None without nvidia-smi.  UserError with its message when it fails."""
    text = _ask(f"--query-gpu={','.join(_FIELDS)}")
    return None if text is None else parse(text)


def problems() -> list[str]:
    """What is wrong with this machine's GPUs, a line each."""
    try:
        return [f"GPU {g.index} ({g.name}): {text}" for g in query() or [] for text in g.problems]
    except UserError as error:
        return [str(error)]


def _ask(question: str) -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, question, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired:
        raise UserError("nvidia-smi hangs: the driver needs a restart") from None
    if done.returncode:
        raise UserError(f"nvidia-smi fails: {' '.join((done.stdout + done.stderr).split())}")
    return done.stdout


def parse(text: str) -> list[Gpu]:
    """GPUs from nvidia-smi's CSV, one a line."""
    gpus = []
    for line in filter(None, map(str.strip, text.splitlines())):
        fields = [field.strip() for field in line.split(",")]
        if len(fields) != len(_FIELDS):
            raise UserError(f"nvidia-smi says {line!r}, which is not {len(_FIELDS)} fields")
        index, name, driver, memory, temperature, ecc, reasons = fields
        active = int(reasons, 16) if reasons.startswith("0x") else 0
        faults = [f"{text} at {temperature} C" for bit, text in _FAULTS.items() if active & bit]
        if ecc.isdigit() and int(ecc):
            faults.append(f"{ecc} uncorrected ECC errors")
        mib = int(memory) if memory.isdigit() else 0
        gpus.append(Gpu(int(index), name, driver, mib, tuple(faults)))
    return gpus


def present() -> str:
    """The GPUs of this process, whatever torch makes of them; empty where there are none."""
    mine = [path.name for path in sorted(Path("/dev").glob("nvidia[0-9]*")) if _opens(path)]
    if mine:
        return f"{_count(mine)} (/dev/{mine[0]}{', ...' * (len(mine) > 1)})"
    try:
        return described(query() or [])
    except UserError as error:
        none = "No devices were found" in str(error)
        return "" if none else f"a GPU, whose driver is broken ({error})"


def _count(gpus: Sequence) -> str:
    return f"{len(gpus)} GPU{'s' * (len(gpus) > 1)}"


def described(gpus: Sequence[Gpu]) -> str:
    """``2 GPUs (NVIDIA H100, driver 550.1)``; empty for none."""
    return f"{_count(gpus)} ({gpus[0].name}, driver {gpus[0].driver})" if gpus else ""


def unusable(
    found: str, version: str, cuda: str | None, shown: str | None, says: str
) -> tuple[str, str]:
    """Why torch has none of the GPUs that are there, and what to do.

    Args:
        found: :func:`present`'s words.
        version: torch's.
        cuda: CUDA's version that torch is built for; None: for none.
        shown: CUDA_VISIBLE_DEVICES.
        says: CUDA's error.
    """
    if cuda is None:
        return (
            f"this machine has {found}, and torch ({version}) is built for CPUs only",
            f"install the build of torch {version.partition('+')[0]} for CUDA",
        )
    # CUDA stops at the first entry that is not a device.
    if shown is not None and not re.match(r"\d|GPU-|MIG-", shown.strip()):
        return (
            f"CUDA_VISIBLE_DEVICES ({shown!r}) hides this machine's {found}",
            "unset CUDA_VISIBLE_DEVICES",
        )
    among = f" with CUDA_VISIBLE_DEVICES ({shown})" * (shown is not None)
    return (
        f"this machine has {found}, and torch ({version}, for CUDA {cuda}) cannot use it{among}: "
        f"{says}",
        "see python -m launcher doctor",
    )


def taken(index: int, seen: tuple[str, str, int, int] | str) -> str:
    """Why GPU ``index`` cannot be used; empty where it can.  ``seen``: its name, UUID, free bytes
    and all of them, before anything of ours is there, or CUDA's error where it could not be opened.

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
        f"GPU {index} ({name}, GPU-{uuid[:8]}) has {(total - free) / 2**30:.1f} of "
        f"{total / 2**30:.1f} GiB in use by {_holders(uuid) or 'another process'}"
    )


def _holders(uuid: str) -> str:
    """Other processes on a GPU as nvidia-smi names them, which in a container may be none."""
    try:
        text = _ask("--query-compute-apps=gpu_uuid,pid,used_memory,process_name") or ""
    except UserError:
        return ""
    found = []
    for row in (line.split(", ", 3) for line in text.splitlines()):
        if len(row) == 4 and uuid and row[0].endswith(uuid) and row[1] != str(os.getpid()):
            size = f"{int(row[2]) / 1024:.1f}" if row[2].isdigit() else "?"
            found.append(f"{Path(row[3]).name} (process {row[1]}, {size} GiB)")
    return ", ".join(found)


def _opens(path: Path) -> bool:
    """Not where a job was given none of this machine's GPUs."""
    try:
        os.close(os.open(path, os.O_RDWR))
    except OSError:
        return False
    return True


def has_driver() -> bool:
    """Whether this machine has NVIDIA's kernel driver, whatever else works."""
    return os.path.exists("/proc/driver/nvidia/version") or os.path.exists("/dev/nvidia0")
