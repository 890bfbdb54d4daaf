"""Writes docs/configuration.md from the configuration's dataclasses: ``python docs/reference.py``
(a test compares).
"""

import dataclasses
import inspect
import re
import types
import typing
from pathlib import Path

from diffmoe.config import Config
from diffmoe.markdown import table

HEAD = """# Configuration

Every field of the YAML, written by `python docs/reference.py` from `diffmoe/schema.py`. On the
command line a field is `section.field=value`. What is not named has its default; `null` is "none".

A file may start from others. `include` names one or a list, relative to the file that has it;
sections are merged field by field, a later file wins over an earlier one, the file itself over what
it includes, and the command line over all:
```yaml
include: [base/imagenet256_flow.yaml, base/s.yaml]   # in configs/: the recipe, then the size
run: {folder: runs/mine}
train: {batch: 512}                                  # other fields of train: the included files'
```
`--dry-run` prints what results.
"""


def values(kind: object) -> str:
    """What a field may hold."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " or ".join("`null`" if part is type(None) else values(part) for part in arguments)
    if typing.get_origin(kind) is tuple:
        return "list of " + values(arguments[0])
    return {bool: "`true`, `false`", str: "text", int: "integer", float: "number"}[kind]


def default(value: object) -> str:
    """A default as YAML has it."""
    if value is None or isinstance(value, bool):
        return f"`{str(value).lower()}`".replace("none", "null")
    if isinstance(value, tuple):
        return f"`{list(value)}`"
    return (
        f"`{value:g}`" if isinstance(value, float) else f"`{value}`" if value != "" else "(empty)"
    )


def meanings(kind: type) -> tuple[str, dict[str, str]]:
    """What a section is about, and each field's line under ``Attributes:``."""
    about, _, listed = inspect.getdoc(kind).partition("\n\nAttributes:\n")
    lines = re.sub(r"\n {8,}", " ", listed).splitlines()
    return about, dict(line.strip().split(": ", 1) for line in lines)


def reference() -> str:
    """The page.  KeyError for a field that its docstring does not explain."""
    parts = [HEAD]
    for section, kind in typing.get_type_hints(Config).items():
        kinds, (about, meaning) = typing.get_type_hints(kind), meanings(kind)
        rows = [
            (
                f"`{section}.{field.name}`",
                values(kinds[field.name]),
                default(field.default),
                meaning[field.name],
            )
            for field in dataclasses.fields(kind)
        ]
        parts += [
            f"## {section}",
            about,
            "\n".join(table(("field", "values", "default", "meaning"), rows)),
        ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


if __name__ == "__main__":
    (Path(__file__).parent / "configuration.md").write_text(reference())
