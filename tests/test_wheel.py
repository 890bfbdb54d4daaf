"""The project installed as a wheel, away from the repository: its commands, its files and its
Python entry.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile

import pytest

from programs import REPOSITORY
from reference_models import DATA

BUILT_FROM = (
    "pyproject.toml",
    "setup.py",
    "README.md",
    "LICENSE",
    "run.py",
    "diffmoe",
    "launcher",
    "configs",
    "ds_configs",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, since a build leaves its folders behind."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in BUILT_FROM:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            folder / "dist",
            folder,
        ],
        check=True,
        timeout=300,
    )
    (built,) = (folder / "dist").iterdir()
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Runs an installed command in a folder of its own; packages that the wheel needs come from
    this environment.
    """
    place = tmp_path_factory.mktemp("installed")
    venv.create(place / "venv", with_pip=False, symlinks=True)
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "--python",
            place / "venv",
            "install",
            "-q",
            "--no-deps",
            "--no-index",
            wheel,
        ],
        check=True,
        timeout=300,
    )
    (place / "here").mkdir()
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "VIRTUAL_ENV")
    }
    needed = {
        **kept,
        "PYTHONPATH": sysconfig.get_paths()["purelib"],
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }

    def run(command, *arguments):
        return subprocess.run(
            [place / "venv" / "bin" / command, *map(str, arguments)],
            cwd=place / "here",
            env=needed,
            capture_output=True,
            text=True,
            timeout=300,
        )

    run.here = place / "here"
    return run


def test_what_the_wheel_holds(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    for folder in ("configs", "ds_configs"):
        ours = {
            f"diffmoe/{path.relative_to(REPOSITORY)}" for path in (REPOSITORY / folder).rglob("*.*")
        }
        assert ours and ours <= names
    assert {
        "diffmoe/py.typed",
        "diffmoe/cost/counted.json",
        "diffmoe/cost/hardware.yaml",
        "diffmoe/pipeline.py",
    } <= names
    assert not [
        name for name in names if name.startswith(("tests", "configs", "run.py", "setup.py"))
    ]


def test_it_plans_with_its_own_configurations(installed):
    done = installed(
        "diffmoe-launcher",
        "plan",
        "--config",
        "configs/diffmoe_l_e16_flow.yaml",
        "--deepspeed_config",
        "ds_configs/zero1_bf16.json",
        "--nodes",
        "1",
    )
    assert done.returncode == 0, done.stderr
    assert "GiB" in done.stdout
    done = installed("diffmoe", "--config", "configs/demo.yaml", "--dry-run", "--ranks", "2")
    assert done.returncode == 0, done.stderr
    done = installed("diffmoe-launcher", "plan", "--config", "configs/none.yaml", "--nodes", "1")
    assert done.returncode == 2 and "none.yaml does not exist" in done.stderr


def test_a_file_of_ones_own_comes_first(installed):
    (installed.here / "configs").mkdir()
    (installed.here / "configs" / "demo.yaml").write_text("model: {depth: 0}\n")
    done = installed("diffmoe", "--config", "configs/demo.yaml", "--dry-run")
    assert done.returncode == 2 and "model.depth (0)" in done.stderr
    shutil.rmtree(installed.here / "configs")


def test_it_samples_by_command_and_from_python(installed):
    checkpoint = DATA / "checkpoint_2026_11"
    done = installed(
        "diffmoe",
        "sample",
        "--checkpoint",
        checkpoint,
        "--count",
        "4",
        "--out",
        "images",
        "sample.steps=2",
    )
    assert done.returncode == 0, done.stderr
    assert "4 images in images.npz" in done.stdout and (installed.here / "images.png").is_file()
    done = installed(
        "python",
        "-c",
        "import diffmoe\n"
        f"pipe = diffmoe.DiffMoEPipeline.from_pretrained({str(checkpoint)!r})\n"
        "pipe(3, num_inference_steps=2).images[0].save('three.png')\nprint(diffmoe.__file__)",
    )
    assert done.returncode == 0, done.stderr
    assert str(REPOSITORY) not in done.stdout and (installed.here / "three.png").is_file()


@pytest.mark.full
@pytest.mark.parametrize(
    "command",
    [
        ("diffmoe-launcher", "doctor"),
        (
            "diffmoe-launcher",
            "preflight",
            "--config",
            "configs/demo.yaml",
            "data.shards=",
            "run.folder=runs",
        ),
        ("diffmoe", "bench", "roofline", "--help"),
        ("diffmoe", "verify", "--worlds", "x"),
        ("diffmoe-launcher", "submit", "--config", "configs/demo.yaml"),
    ],
)
def test_no_command_needs_the_repository_without_saying_so(installed, command):
    done = installed(*command)
    assert done.returncode in (0, 1, 2) and "Traceback" not in done.stderr + done.stdout, (
        done.stderr
    )
