"""``launcher doctor``: what is installed here, what is wrong, what to type.

Works in a bare interpreter: torch is asked in another process, so that a broken one is a finding.
``gather`` looks, ``judge`` is a pure function of what was seen.
"""

import importlib.metadata
import importlib.util
import json
import operator
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from diffmoe import gpus
from diffmoe.errors import UserError
from launcher.command_line import Parser

ROOT = Path(__file__).resolve().parent.parent
_SHM_LEAST = 2**30  # NCCL and data workers of a whole node
_SETUP = "make setup"
_NEW_VENV = f"rm -r .venv && {_SETUP}"
_NEW_PACKAGES = f"rm -f .venv/.installed && {_SETUP}"
_COMPARE = {">=": "ge", "<=": "le", "==": "eq", "!=": "ne", ">": "gt", "<": "lt"}  # operator's
_ASK_TORCH = """
import json, sys
sys.path.insert(0, sys.argv[1])
from diffmoe.device import torch_facts
print(json.dumps(torch_facts()))
"""


@dataclass(frozen=True)
class Facts:
    """``torch``: ``device.torch_facts()``, its error as text, or None where there is none."""

    python: tuple[int, int]
    executable: str
    packages: dict[str, str]  # of those that we need, the installed versions
    wanted: dict[str, str]  # what pyproject.toml asks for, as ">=2.11,<2.14"
    wanted_python: str
    torch: dict[str, Any] | str | None
    apex: Literal["none", "nvidia", "impostor"]
    gpus: tuple[gpus.Gpu, ...] | str | None  # nvidia-smi's error as text
    driver: bool
    nvcc: str | None  # CUDA's version that the compiler is of
    compiler: str | None
    shm: int | None  # bytes of /dev/shm
    cpus: int
    omp: str | None
    slurm: str | None
    device_asked: str | None  # DS_ACCELERATOR
    shown: str | None = None  # CUDA_VISIBLE_DEVICES


@dataclass(frozen=True)
class Finding:
    """A line of the report; ``fix``: what to type, for what is wrong."""

    level: Literal["good", "note", "wrong"]
    what: str
    text: str
    fix: str = ""


_good, _wrong = partial(Finding, "good"), partial(Finding, "wrong")


def _bad(facts: Facts, what: str, text: str, fix: str) -> Finding:
    """Wrong where there are GPUs, else worth knowing."""
    return _wrong(what, text, fix) if facts.gpus else Finding("note", what, text)


def judge(facts: Facts) -> list[Finding]:
    """The whole report: good, worth knowing, wrong."""
    checks = (_python, _packages, _torch, _gpus, _apex, _compilers, _machine)
    return [finding for check in checks for finding in check(facts)]


def _python(facts: Facts) -> list[Finding]:
    text = f"{'.'.join(map(str, facts.python))} at {facts.executable}"
    if satisfies(text, facts.wanted_python):
        return [_good("python", text)]
    text += f"; {facts.wanted_python} is needed"
    return [_wrong("python", text, f"{_NEW_VENV} PYTHON=python3.12")]


def _packages(facts: Facts) -> list[Finding]:
    others = {name: wanted for name, wanted in facts.wanted.items() if name != "torch"}
    found = []
    missing = [name for name in others if name not in facts.packages]
    if missing:
        found.append(_wrong("packages", f"not installed: {', '.join(missing)}", _SETUP))
    for name, wanted in others.items():
        version = facts.packages.get(name)
        if version is not None and not satisfies(version, wanted):
            found.append(_wrong(name, f"{version}; {wanted} is needed", _NEW_PACKAGES))
    return found or [_good("packages", f"{len(others)} are as pyproject.toml wants them")]


def _torch(facts: Facts) -> list[Finding]:
    torch, wanted = facts.torch, facts.wanted.get("torch", "")
    if torch is None:
        text = "not installed (a login node needs none: plan, submit and doctor work without)"
        return [_wrong("torch", text, _SETUP)]
    if isinstance(torch, str):
        return [_wrong("torch", f"cannot be imported: {torch}", _NEW_VENV)]
    version, cuda = torch["version"], torch["cuda"]
    if satisfies(version, wanted):
        found = [_good("torch", f"{version}, {f'CUDA {cuda}' if cuda else 'CPU build'}")]
    else:
        found = [_wrong("torch", f"{version}; {wanted} is needed", _NEW_PACKAGES)]
    whom = {"gloo": "ranks on CPUs cannot meet"}
    whom |= {"nccl": "GPUs cannot talk to each other"} if cuda else {}
    for name, text in whom.items():
        if not torch[name]:
            found.append(_wrong(name, f"torch was built without it: {text}", _NEW_VENV))
    return found


def _gpus(facts: Facts) -> list[Finding]:
    owner = "ask the machine's owner"
    if isinstance(facts.gpus, str):
        fix = f"{owner}; until then {gpus.CPU}, or DS_ACCELERATOR=cpu"
        return [_wrong("gpu", facts.gpus, fix)]
    if not facts.gpus and facts.driver:
        text = "NVIDIA's driver is loaded, but nvidia-smi shows no GPU"
        return [_wrong("gpu", text, owner)]
    if not facts.gpus:
        return [Finding("note", "gpu", "none: everything runs on the CPU")]
    first = facts.gpus[0]
    text = f"{len(facts.gpus)} x {first.name}, {first.memory / 1024:.0f} GiB, driver {first.driver}"
    found = [_good("gpu", text)] + [
        _wrong(f"gpu {gpu.index}", text, "nvidia-smi -q -d PERFORMANCE,TEMPERATURE,ECC")
        for gpu in facts.gpus
        for text in gpu.problems
    ]
    torch = facts.torch
    if not isinstance(torch, dict):
        return found
    on_cpu = facts.device_asked == "cpu"
    if torch["cuda"] is None or (torch["gpus"] == 0 and not on_cpu):
        reason, _ = gpus.unusable(
            gpus.described(facts.gpus),
            torch["version"],
            torch["cuda"],
            facts.shown,
            torch.get("says", ""),
        )
        fix = f"rm -r .venv && env -u PIP_FIND_LINKS -u PIP_EXTRA_INDEX_URL {_SETUP}"
        if torch["cuda"]:
            fix = "nvidia-smi; echo $CUDA_VISIBLE_DEVICES"
        found.append(_wrong("torch", reason, fix))
    if on_cpu:
        return [*found, Finding("note", "DS_ACCELERATOR", "cpu: the GPUs are left alone")]
    for index, seen in enumerate(torch.get("memory", [])):
        if text := gpus.taken(index, seen):
            found.append(_wrong(f"gpu {index}", text, gpus.FREE_ONE))
    return found


def _apex(facts: Facts) -> list[Finding]:
    if facts.apex == "impostor":
        text = "the package of that name on PyPI, which is not NVIDIA's (no apex.optimizers)"
        fix = f"{facts.executable} -m pip uninstall apex   # optional; build NVIDIA's from source"
        return [_wrong("apex", text, fix)]
    if facts.apex == "nvidia":
        return [_good("apex", "NVIDIA's")]
    return [Finding("note", "apex", "none (optional: train.optimizer=apex)")]


def _compilers(facts: Facts) -> list[Finding]:
    if facts.compiler:
        found = [_good("compiler", facts.compiler)]
    else:
        text = (
            "no C++ compiler: DeepSpeed cannot build its operators (train.optimizer=deepspeed, "
            "offload), nor torch what train.compile needs"
        )
        fix = "apt-get install -y g++   # or: module load gcc"
        found = [_bad(facts, "compiler", text, fix)]
    cuda = facts.torch["cuda"] if isinstance(facts.torch, dict) else None
    if cuda and facts.nvcc is None:
        text = "no nvcc: DeepSpeed's own CUDA operators cannot be built (torch's Adam needs none)"
        found.append(Finding("note", "cuda", text))
    elif cuda and facts.nvcc and cuda.split(".")[0] != facts.nvcc.split(".")[0]:
        text = f"nvcc is of CUDA {facts.nvcc}, torch of {cuda}: what DeepSpeed builds fails to load"
        fix = f"module load cuda/{cuda}   # or: export CUDA_HOME=/usr/local/cuda-{cuda}"
        found.append(_wrong("cuda", text, fix))
    return found


def _machine(facts: Facts) -> list[Finding]:
    found = []
    if facts.shm is not None and facts.shm < _SHM_LEAST:
        text = f"{facts.shm / 2**20:.0f} MiB: too small for NCCL and for data workers"
        fix = "mount -o remount,size=8G /dev/shm   # in a container: --shm-size=8g"
        found.append(_bad(facts, "/dev/shm", text, fix))
    if facts.omp is None:
        text = f"unset: the ranks of a node share its {facts.cpus} CPUs"
        found.append(_good("OMP_NUM_THREADS", text))
    elif not facts.omp.isdigit() or not 1 <= int(facts.omp) <= facts.cpus:
        text = f"{facts.omp!r} on {facts.cpus} CPUs: ranks would fight for them"
        found.append(_wrong("OMP_NUM_THREADS", text, "unset OMP_NUM_THREADS"))
    return [*found, Finding("note", "slurm", facts.slurm or "none: sbatch is not on the PATH")]


def satisfies(version: str, wanted: str) -> bool:
    """Whether ``version`` meets ``>=a,<b,==c``; by the numbers of the release only."""
    return all(
        getattr(operator, _COMPARE[sign])(_release(version), _release(limit))
        for sign, limit in re.findall(r"(>=|<=|==|!=|<|>) *([\w.]+)", wanted)
    )


def _release(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(\.\d+)*", version)
    numbers = map(int, match[0].split(".")) if match else ()
    return (*numbers, 0, 0, 0, 0)[:4]


def gather() -> Facts:
    """Looks at this machine and interpreter; takes seconds, most of them torch's import."""
    wanted_python, wanted = _wanted()
    packages = {}
    for name in wanted:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    cards: tuple[gpus.Gpu, ...] | str | None
    try:
        cards = tuple(gpus.query() or ())
    except UserError as error:
        cards = str(error)
    sbatch = shutil.which("sbatch")
    nvcc = shutil.which("nvcc") or f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin/nvcc"
    release = re.search(r"release (\d+\.\d+)", _output(nvcc))
    compiler = _output(os.environ.get("CXX", "c++")) or _output("g++")
    return Facts(
        python=sys.version_info[:2],
        executable=sys.executable,
        packages=packages,
        wanted=wanted,
        wanted_python=wanted_python,
        torch=_ask_torch(),
        apex=_which_apex(),
        gpus=cards,
        driver=gpus.has_driver(),
        nvcc=release[1] if release else None,
        compiler=compiler.partition("\n")[0] or None,
        shm=shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else None,
        cpus=len(os.sched_getaffinity(0)),
        omp=os.environ.get("OMP_NUM_THREADS"),
        slurm=sbatch and (_output(sbatch).strip() or f"{sbatch}, which fails (SLURM_CONF?)"),
        device_asked=os.environ.get("DS_ACCELERATOR"),
        shown=os.environ.get("CUDA_VISIBLE_DEVICES"),
    )


def _wanted() -> tuple[str, dict[str, str]]:
    """The Python and the packages that the repository's pyproject.toml asks for (Python 3.10 has no
    parser for it), or what an installed package says of itself.
    """
    path = ROOT / "pyproject.toml"
    if path.is_file():
        text = path.read_text()
        python = re.findall(r'^requires-python = "([^"]*)"', text, re.M)[0]
        block = re.findall(r"^dependencies = \[(.*?)^\]", text, re.M | re.S)[0]
        return python, dict(re.findall(r'"([\w-]+)([^"]*)"', block))
    about = importlib.metadata.metadata("diffmoe")
    needed = [text for text in about.get_all("Requires-Dist") or [] if ";" not in text]  # no extras
    return about["Requires-Python"], dict(re.findall(r"^([\w-]+)(.*)$", "\n".join(needed), re.M))


def _ask_torch() -> dict[str, Any] | str | None:
    if importlib.util.find_spec("torch") is None:
        return None
    command = [sys.executable, "-c", _ASK_TORCH, str(ROOT)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, cwd="/")
    except subprocess.TimeoutExpired:
        return "its import takes more than three minutes"
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return json.loads(done.stdout.strip().splitlines()[-1])


def _which_apex() -> Literal["none", "nvidia", "impostor"]:
    spec = importlib.util.find_spec("apex")
    folders = spec.submodule_search_locations or [] if spec else []
    nvidia = any((Path(folder) / "optimizers").is_dir() for folder in folders)
    return "nvidia" if nvidia else "impostor" if spec else "none"


def _output(program: str) -> str:
    """What a program says of its version; empty where it fails or is not there."""
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def main(arguments: list[str]) -> int:
    """Returns 0, or 1 when something is wrong."""
    Parser(
        "doctor",
        "Says what is installed here, what is wrong and what to type.  Exit code 1 when something "
        "is wrong.",
        "python -m launcher doctor",
    ).parse_args(arguments)
    findings = judge(gather())
    width = max(len(finding.what) for finding in findings)
    for finding in findings:
        print(f"{finding.level:5}  {finding.what:{width}}  {finding.text}")
        if finding.fix:
            print(f"{'':5}  {'':{width}}  type: {finding.fix}")
    wrong = sum(finding.level == "wrong" for finding in findings)
    print(f"{wrong} wrong" if wrong else "nothing wrong")
    return 1 if wrong else 0
