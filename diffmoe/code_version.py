"""Which code is this?  Its commit, and a digest of its files."""

import hashlib
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # run.py's folder; of an installed package its parent


def commit(root: Path) -> str:
    """The commit of the tree and whether it was changed since, or ``unknown (why)``."""
    try:
        done = subprocess.run(
            [
                "git",
                "-C",
                str(root),
                "describe",
                "--always",
                "--dirty",
                "--abbrev=40",
                "--exclude=*",
            ],
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown ({error})"
    return (
        done.stdout.strip()
        if done.returncode == 0
        else f"unknown ({done.stderr.strip().splitlines()[0]})"
    )


def digest(root: Path) -> str:
    """Twelve hexadecimal digits over run.py and every module of the tree in ``root``: two nodes
    that agree run the same code.
    """
    found = hashlib.sha256()
    modules = (
        path for package in ("diffmoe", "launcher") for path in (root / package).rglob("*.py")
    )
    for path in sorted([*root.glob("run.py"), *modules]):  # an installed package has no run.py
        found.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:12]
