"""What nvidia-smi says about this machine's GPUs.  No torch here."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from diffmoe.errors import UserError

_FIELDS = ("index", "name", "driver_version", "memory.total", "temperature.gpu", "ecc.errors.uncorrected.volatile.total",
           "clocks_throttle_reasons.active")
# Bits of NVML's clock event reasons that mean trouble; idle, application clocks and the power cap are daily life.
_TROUBLE = {0x8: "hardware slowdown", 0x20: "software thermal slowdown", 0x40: "hardware thermal slowdown",
            0x80: "power brake"}


@dataclass(frozen=True)
class Gpu:
    """One GPU.  ``memory`` in MiB; ``trouble``: why it is slowed down or broken, empty when it is well."""

    index: int
    name: str
    driver: str
    memory: int
    trouble: tuple[str, ...]


def query() -> list[Gpu] | None:
    """This machine's GPUs; None where there is no nvidia-smi.  UserError with its complaint when it fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        done = subprocess.run([program, f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"],
                              capture_output=True, text=True, timeout=30)
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
        gpus.append(Gpu(int(index), name, driver, int(memory) if memory.isdigit() else 0, tuple(trouble)))
    return gpus


def present() -> str:
    """What says that this process has GPUs, whatever torch makes of them; empty where nothing does."""
    devices = sorted(Path("/dev").glob("nvidia[0-9]*"))
    mine = [path.name for path in devices if os.access(path, os.R_OK | os.W_OK) and _opens(path)]  # not a job's that was given none
    if mine:
        return f"{len(mine)} GPU{'s' * (len(mine) > 1)} (/dev/{mine[0]}{', ...' * (len(mine) > 1)})"
    try:
        found = query()
    except UserError as error:
        return "" if "No devices were found" in str(error) else f"a GPU, whose driver is broken ({error})"
    return f"{len(found)} GPU{'s' * (len(found) > 1)} ({found[0].name}, driver {found[0].driver})" if found else ""


def _opens(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_RDWR))
    except OSError:
        return False
    return True


def has_driver() -> bool:
    """Whether this machine has NVIDIA's kernel driver, whatever else works."""
    return Path("/proc/driver/nvidia/version").exists() or os.path.exists("/dev/nvidia0")
