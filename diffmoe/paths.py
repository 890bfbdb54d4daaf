"""Paths that a person writes: ``~`` and ``$VAR`` mean the same on command lines and in YAML."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any, NoReturn

from diffmoe.errors import UserError

_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")
_SHIPPED = ("configs", "ds_configs")
_EXAMPLE = "example:"
_OVERRIDE = re.compile(r"\w+(\.\w+)*=")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def expand_path(text: str, what: str = "path") -> str:
    """``text`` with a leading ``~`` or ``~name``, and every ``$VAR`` and ``${VAR}``, replaced.

    Commands (``pipe:``), and whatever has ``://`` (URLs), stay as they are: a shell, or a server,
    reads those.  Raises UserError, which calls the path ``what``, for a variable that is not set
    and for an unknown user.
    """
    if text.startswith("pipe:") or "://" in text:
        return text

    def value(match: re.Match) -> str:
        name = match[1] or match[2]
        if not os.environ.get(name):
            raise UserError(
                f"{what} ({text}) names ${name}, which is not set: set it, or write the path itself"
            )
        return os.environ[name]

    user = text.partition("/")[0] if text.startswith("~") else ""
    home = os.path.expanduser(user)
    if home.startswith("~"):
        raise UserError(
            f"{what} ({text}) begins with {user}, which is no user of this machine: write ./{text} "
            f"for a name that begins so"
        )
    return home + _VARIABLE.sub(value, text[len(user) :])


def shipped(path: str | Path) -> Path:
    """A file, or where there is none, the project's own of that name: ``configs/…`` and
    ``ds_configs/…`` mean the same in any folder, also where the project is installed.
    """
    path, package = Path(path), Path(__file__).resolve().parent
    own = [
        folder / path
        for folder in (package, package.parent)
        if path.parts[:1] and path.parts[0] in _SHIPPED
    ]
    return next((place for place in (path, *own) if os.path.exists(place)), path)


def check_folder(path: str | Path, what: str) -> None:
    """Raises UserError, which calls the path ``what``, where no folder lies at ``path``."""
    if not os.path.isdir(path):
        problem = "is a file, not a folder" if os.path.exists(path) else "does not exist"
        raise UserError(f"{what} ({path}) {problem}")


def check_hub_id(name: str, what: str) -> None:
    """UserError where ``name`` was meant as a folder: nobody wants the hub's word on a typo."""
    if os.path.exists(name) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        check_folder(name, what)
    if not _HUB_ID.fullmatch(name):
        raise UserError(f"{what} ({name}) is no folder here, and no id of the hub (owner/name)")
    if os.path.isdir(os.path.dirname(name)):
        check_folder(name, what)


class _Help(argparse.HelpFormatter):
    """Says an option's default where its help does not, and leaves the example's lines alone."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith(_EXAMPLE) else super()._fill_text(text, width, indent)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if "default" in text or action.default in (None, False, argparse.SUPPRESS, []):
            return text
        return f"{text} (default: %(default)s)"


class PathParser(argparse.ArgumentParser):
    """argparse whose complaint is a UserError: one line, on one rank.  Every option that takes a
    text or a path has it expanded; ``section.field=value`` is the configuration's to read.  Its
    help says the defaults, and ends with ``example``: commands, one a line.
    """

    def __init__(self, example: str = "", **settings: Any) -> None:
        if example:
            lines = "\n".join(f"  {line.strip()}" for line in example.strip().splitlines())
            settings["epilog"] = f"{_EXAMPLE}\n{lines}"
        super().__init__(formatter_class=_Help, **settings)
        for kind in (None, str):
            self.register("type", kind, _expanded)
        self.register("type", Path, lambda text: Path(_expanded(text)))

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def _expanded(text: str) -> str:
    if not isinstance(text, str) or _OVERRIDE.match(text):
        return text
    try:
        return expand_path(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
