"""Which code is this?  Its commit, and a digest of its files."""

import hashlib
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # run.py's folder; of an installed package its parent


def commit(root: Path) -> str:
    """The commit of the tree and whether it was changed since, or ``unknown (why)``."""
    options = "--always --dirty --abbrev=40 --exclude=*".split()
    command = ["git", "-C", str(root), "describe", *options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown ({error})"
    if done.returncode:
        return f"unknown ({done.stderr.strip().splitlines()[0]})"
    return done.stdout.strip()


def digest(root: Path) -> str:
    """Twelve hex digits over run.py and every module: two nodes that agree run the same code."""
    found = hashlib.sha256()
    modules = (
        path for package in ("diffmoe", "launcher") for path in (root / package).rglob("*.py")
    )
    for path in sorted([*root.glob("run.py"), *modules]):  # an installed package has no run.py
        found.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:12]
