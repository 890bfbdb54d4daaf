"""The verb ``doctor``: what is installed here, what is wrong, what to type.

Works in a bare interpreter: torch is asked in a process of its own, so that a broken one is a
finding and not the end.  ``gather`` looks, ``judge`` is a pure function of what was seen.
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from diffmoe import gpus
from diffmoe.errors import UserError
from launcher.command_line import Parser

Level = Literal["good", "note", "wrong"]
ROOT = Path(__file__).resolve().parent.parent
_SHM_LEAST = 2**30  # NCCL and data workers of a whole node
_SETUP = "make setup"

# Runs where torch is: one JSON line about it.
_ASK_TORCH = """
import json, torch
cuda = torch.cuda.is_available()
def says():
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return " ".join(str(error).split())[:200]
    return "it finds no device"
def memory(i):
    try:
        return [torch.cuda.get_device_name(i), str(torch.cuda.get_device_properties(i).uuid), *torch.cuda.mem_get_info(i)]
    except RuntimeError as error:
        return " ".join(str(error).split())[:200]
found = {"version": torch.__version__, "cuda": torch.version.cuda, "gpus": torch.cuda.device_count() if cuda else 0,
         "nccl": torch.distributed.is_available() and torch.distributed.is_nccl_available(),
         "gloo": torch.distributed.is_available() and torch.distributed.is_gloo_available(),
         "capabilities": [list(torch.cuda.get_device_capability(i)) for i in range(torch.cuda.device_count())] if cuda else [],
         "arches": torch.cuda.get_arch_list() if cuda else [], "says": "" if cuda else says(),
         "memory": [memory(i) for i in range(torch.cuda.device_count())] if cuda else []}
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Facts:
    """What was seen on this machine.  ``torch``: _ASK_TORCH's answer, its complaint as text, or
    None where there is none.
    """

    python: tuple[int, int]
    executable: str
    packages: dict[str, str]  # of those that we need, the installed versions
    wanted: dict[str, str]  # what pyproject.toml asks for, as ">=2.11,<2.14"
    wanted_python: str
    torch: dict | str | None
    apex: Literal["none", "nvidia", "impostor"]
    gpus: tuple[gpus.Gpu, ...] | str | None  # nvidia-smi's complaint as text
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

    level: Level
    what: str
    text: str
    fix: str = ""


def judge(facts: Facts) -> list[Finding]:
    """The whole report: good, worth knowing, wrong."""
    return [
        _python(facts),
        *_packages(facts),
        *_torch(facts),
        *_gpus(facts),
        _apex(facts),
        *_compilers(facts),
        *_machine(facts),
    ]


def _python(facts: Facts) -> Finding:
    version = ".".join(map(str, facts.python))
    if not satisfies(version, facts.wanted_python):
        return Finding(
            "wrong",
            "python",
            f"{version} at {facts.executable}; {facts.wanted_python} is needed",
            f"rm -r .venv && {_SETUP} PYTHON=python3.12",
        )
    return Finding("good", "python", f"{version} at {facts.executable}")


def _packages(facts: Facts) -> list[Finding]:
    others = [name for name in facts.wanted if name != "torch"]  # which has checks of its own
    missing = [name for name in others if name not in facts.packages]
    found = (
        [Finding("wrong", "packages", f"not installed: {', '.join(missing)}", _SETUP)]
        if missing
        else []
    )
    for name in others:
        version, wanted = facts.packages.get(name), facts.wanted[name]
        if version is not None and not satisfies(version, wanted):
            why = (
                "; the engine uses names that DeepSpeed calls private, so only this version works"
                if name == "deepspeed"
                else ""
            )
            found.append(
                Finding(
                    "wrong",
                    name,
                    f"{version}; {wanted} is needed{why}",
                    f"rm -f .venv/.installed && {_SETUP}",
                )
            )
    if not found:
        found.append(
            Finding(
                "good",
                "packages",
                f"deepspeed {facts.packages['deepspeed']} and the {len(others) - 1} others are as "
                "pyproject.toml wants them",
            )
        )
    return found


def _torch(facts: Facts) -> list[Finding]:
    torch, wanted = facts.torch, facts.wanted.get("torch", "")
    if torch is None:
        return [
            Finding(
                "wrong",
                "torch",
                "not installed (a login node needs none: plan, submit and doctor work without)",
                _SETUP,
            )
        ]
    if isinstance(torch, str):
        return [
            Finding("wrong", "torch", f"cannot be imported: {torch}", f"rm -r .venv && {_SETUP}")
        ]
    found = []
    if not satisfies(torch["version"], wanted):
        found.append(
            Finding(
                "wrong",
                "torch",
                f"{torch['version']}; {wanted} is needed",
                f"rm -f .venv/.installed && {_SETUP}",
            )
        )
    else:
        build = f"CUDA {torch['cuda']}" if torch["cuda"] else "CPU build"
        found.append(Finding("good", "torch", f"{torch['version']}, {build}"))
    if not torch["gloo"]:
        found.append(
            Finding(
                "wrong",
                "gloo",
                "torch was built without it: ranks on CPUs cannot meet",
                f"rm -r .venv && {_SETUP}",
            )
        )
    if torch["cuda"] and not torch["nccl"]:
        found.append(
            Finding(
                "wrong",
                "nccl",
                "torch was built without it: GPUs cannot talk to each other",
                f"rm -r .venv && {_SETUP}",
            )
        )
    return found


def _gpus(facts: Facts) -> list[Finding]:
    torch = facts.torch if isinstance(facts.torch, dict) else None
    if isinstance(facts.gpus, str):
        return [
            Finding(
                "wrong",
                "gpu",
                facts.gpus,
                f"ask the machine's owner; until then {gpus.CPU}, or DS_ACCELERATOR=cpu",
            )
        ]
    if not facts.gpus:
        if facts.driver:
            return [
                Finding(
                    "wrong",
                    "gpu",
                    "NVIDIA's driver is loaded, but nvidia-smi shows no GPU",
                    "ask the machine's owner",
                )
            ]
        return [Finding("note", "gpu", "none: everything runs on the CPU")]
    found = [
        Finding(
            "good",
            "gpu",
            f"{len(facts.gpus)} x {facts.gpus[0].name}, {facts.gpus[0].memory / 1024:.0f} GiB, driver "
            f"{facts.gpus[0].driver}",
        )
    ]
    found += [
        Finding("wrong", f"gpu {gpu.index}", text, "nvidia-smi -q -d PERFORMANCE,TEMPERATURE,ECC")
        for gpu in facts.gpus
        for text in gpu.trouble
    ]
    if torch is None:
        return found
    if torch["cuda"] is None or (torch["gpus"] == 0 and facts.device_asked != "cpu"):
        reason, _ = gpus.unusable(
            gpus.described(facts.gpus),
            torch["version"],
            torch["cuda"],
            facts.shown,
            torch.get("says", ""),
        )
        found.append(
            Finding(
                "wrong",
                "torch",
                reason,
                "nvidia-smi; echo $CUDA_VISIBLE_DEVICES"
                if torch["cuda"]
                else f"rm -r .venv && env -u PIP_FIND_LINKS -u PIP_EXTRA_INDEX_URL {_SETUP}",
            )
        )
    elif unsupported := _unsupported(torch):
        found.append(
            Finding(
                "wrong",
                "torch",
                f"its build has no code for compute capability {unsupported}",
                f"rm -r .venv && {_SETUP}",
            )
        )
    for index, seen in enumerate(torch.get("memory", []) if facts.device_asked != "cpu" else []):
        text = gpus.taken(index, seen)
        if text:
            found.append(Finding("wrong", f"gpu {index}", text, gpus.FREE_ONE))
    if facts.device_asked == "cpu":
        found.append(Finding("note", "DS_ACCELERATOR", "cpu: the GPUs are left alone"))
    return found


def _unsupported(torch: dict) -> str | None:
    """The first GPU's compute capability that torch has no code for: same major number and at most
    its minor one.
    """
    built = [
        (int(match[1]), int(match[2]))
        for arch in torch["arches"]
        if (match := re.fullmatch(r"sm_(\d+)(\d)[af]?", arch))
    ]
    for major, minor in torch["capabilities"]:
        if (
            built
            and not any(a == major and b <= minor for a, b in built)
            and "compute_" not in " ".join(torch["arches"])
        ):
            return f"{major}.{minor}"
    return None


def _apex(facts: Facts) -> Finding:
    if facts.apex == "impostor":
        return Finding(
            "wrong",
            "apex",
            "the package of that name on PyPI, which is a web toolkit and not NVIDIA's (no apex.optimizers)",
            f"{facts.executable} -m pip uninstall apex   # it is optional; NVIDIA's is built from its source",
        )
    return Finding(
        "good" if facts.apex == "nvidia" else "note",
        "apex",
        "NVIDIA's" if facts.apex == "nvidia" else "none (optional: train.optimizer=apex)",
    )


def _compilers(facts: Facts) -> list[Finding]:
    found = []
    if facts.compiler is None:
        fix = "apt-get install -y g++   # or: module load gcc"
        found.append(
            Finding(
                "wrong" if facts.gpus else "note",
                "compiler",
                "no C++ compiler: DeepSpeed cannot build its operators "
                "(train.optimizer=deepspeed, offload), nor torch what train.compile needs",
                fix if facts.gpus else "",
            )
        )
    else:
        found.append(Finding("good", "compiler", facts.compiler))
    cuda = facts.torch["cuda"] if isinstance(facts.torch, dict) else None
    if cuda and facts.nvcc and cuda.split(".")[0] != facts.nvcc.split(".")[0]:
        found.append(
            Finding(
                "wrong",
                "cuda",
                f"nvcc is of CUDA {facts.nvcc}, torch of {cuda}: what DeepSpeed builds would not load",
                f"module load cuda/{cuda}   # or: export CUDA_HOME=/usr/local/cuda-{cuda}",
            )
        )
    elif cuda and facts.nvcc is None:
        found.append(
            Finding(
                "note",
                "cuda",
                "no nvcc: DeepSpeed's own CUDA operators cannot be built (torch's Adam needs none)",
            )
        )
    return found


def _machine(facts: Facts) -> list[Finding]:
    found = []
    if facts.shm is not None and facts.shm < _SHM_LEAST:
        found.append(
            Finding(
                "wrong" if facts.gpus else "note",
                "/dev/shm",
                f"{facts.shm / 2**20:.0f} MiB: too small for NCCL and for data workers",
                "mount -o remount,size=8G /dev/shm   # in a container: --shm-size=8g",
            )
        )
    if facts.omp is not None and (not facts.omp.isdigit() or not 1 <= int(facts.omp) <= facts.cpus):
        found.append(
            Finding(
                "wrong",
                "OMP_NUM_THREADS",
                f"{facts.omp!r} on {facts.cpus} CPUs: ranks would fight for them",
                "unset OMP_NUM_THREADS",
            )
        )
    elif facts.omp is None:
        found.append(
            Finding(
                "good", "OMP_NUM_THREADS", f"unset: the ranks of a node share its {facts.cpus} CPUs"
            )
        )
    found.append(Finding("note", "slurm", facts.slurm or "none: sbatch is not on the PATH"))
    return found


def satisfies(version: str, wanted: str) -> bool:
    """Whether ``version`` meets ``>=a,<b,==c``; numbers only, local parts such as +cpu and
    pre-release tags left out.
    """
    have = _numbers(version)
    for clause in filter(None, wanted.replace(" ", "").split(",")):
        match = re.fullmatch(r"(>=|<=|==|<|>|~=|!=)([\w.*+]+)", clause)
        if match is None:
            raise UserError(f"version clause {clause!r} of pyproject.toml is not understood")
        sign, limit = match[1], _numbers(match[2])
        length = max(len(have), len(limit))
        a, b = (tuple(part + (0,) * (length - len(part))) for part in (have, limit))
        if not {
            ">=": a >= b,
            "<=": a <= b,
            "==": a == b,
            "<": a < b,
            ">": a > b,
            "!=": a != b,
            "~=": a >= b and a[: len(limit) - 1] == b[: len(limit) - 1],
        }[sign]:
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()


def gather() -> Facts:
    """Looks at this machine and interpreter; seconds, most of them torch's import."""
    wanted_python, wanted = _wanted()
    packages = {}
    for name in wanted:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    try:
        found = gpus.query()
        cards = None if found is None else tuple(found)
    except UserError as error:
        cards = str(error)
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
        nvcc=_nvcc(),
        compiler=_compiler(),
        shm=shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else None,
        cpus=len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1,
        omp=os.environ.get("OMP_NUM_THREADS"),
        slurm=_slurm(),
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
        python = re.search(r'^requires-python = "([^"]*)"', text, re.M)
        block = re.search(r"^dependencies = \[(.*?)^\]", text, re.M | re.S)
        assert python and block, "pyproject.toml has requires-python and dependencies"
        return python[1], {
            match[1]: match[2] for match in re.finditer(r'"([\w-]+)([^"]*)"', block[1])
        }
    about = importlib.metadata.metadata("diffmoe")
    needed = [
        text for text in about.get_all("Requires-Dist") or [] if ";" not in text
    ]  # not the extras
    found = [re.fullmatch(r"([\w-]+)(.*)", text) for text in needed]
    return about["Requires-Python"], {match[1]: match[2] for match in found if match}


def _ask_torch() -> dict | str | None:
    if importlib.util.find_spec("torch") is None:
        return None
    try:
        done = subprocess.run(
            [sys.executable, "-c", _ASK_TORCH], capture_output=True, text=True, timeout=180, cwd="/"
        )
    except subprocess.TimeoutExpired:
        return "its import takes more than three minutes"
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return json.loads(done.stdout.strip().splitlines()[-1])


def _which_apex() -> Literal["none", "nvidia", "impostor"]:
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return "none"
    folders = spec.submodule_search_locations or []
    return (
        "nvidia"
        if any((Path(folder) / "optimizers").is_dir() for folder in folders)
        else "impostor"
    )


def _nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    program = shutil.which("nvcc") or shutil.which(f"{home}/bin/nvcc")
    text = _output([program, "--version"]) if program else ""
    match = re.search(r"release (\d+\.\d+)", text)
    return match[1] if match else None


def _compiler() -> str | None:
    return _first_line([os.environ.get("CXX", "c++"), "--version"]) or _first_line(
        ["g++", "--version"]
    )


def _slurm() -> str | None:
    program = shutil.which("sbatch")
    return program and (
        _first_line([program, "--version"])
        or f"{program}, which does not know its cluster (SLURM_CONF)"
    )


def _first_line(command: list[str]) -> str | None:
    return next(iter(_output(command).splitlines()), None)


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def main(arguments: list[str]) -> int:
    """The verb ``doctor``; returns 0, or 1 when something is wrong."""
    parser = Parser(
        "doctor",
        f"Says what is installed on this {platform.system()} machine, what is wrong and what to type.  Exit code 1 when "
        "something is wrong.",
        "python -m launcher doctor",
    )
    parser.parse_args(arguments)
    findings = judge(gather())
    width = max(len(finding.what) for finding in findings)
    for finding in findings:
        print(f"{finding.level:5}  {finding.what:{width}}  {finding.text}")
        if finding.fix:
            print(f"{'':5}  {'':{width}}  type: {finding.fix}")
    wrong = sum(finding.level == "wrong" for finding in findings)
    print(f"{wrong} wrong" if wrong else "nothing wrong")
    return 1 if wrong else 0
