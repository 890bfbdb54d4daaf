"""Strict YAML: files with ``include``, ``a.b=c`` overrides, and dataclasses filled from trees of
dicts.

Doubled and unknown keys, values of another type and files that cannot be read are UserErrors that
name them.  Nothing here knows what is in a configuration.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import io
import math
import types
import typing
from pathlib import Path
from typing import Any, Literal, TextIO, Union

import yaml

from diffmoe.errors import UserError
from diffmoe.paths import expand_path, shipped

_WORDS = {
    int: "an integer",
    float: "a finite number",
    str: "a text",
    bool: "true or false",
    dict: "a mapping",
    list: "a list",
    type(None): "null",
}


class _StrictLoader(yaml.SafeLoader):
    """YAML that refuses a key written twice: PyYAML keeps the last one silently."""


def _mapping_without_duplicates(loader: _StrictLoader, node: yaml.MappingNode) -> dict:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        where, line = node.start_mark.name, key_node.start_mark.line + 1
        if not isinstance(key, str):
            raise UserError(f"{where}: key {key!r} on line {line} must be a text")
        if key in seen:
            raise UserError(f"{where}: key {key!r} stands twice, on lines {seen[key]} and {line}")
        seen[key] = line
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor(
    yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_duplicates
)


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict:
    """A JSON object (``object_pairs_hook``) in which no key stands twice; UserError for others."""
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise UserError(f"key {next(key for key in keys if keys.count(key) > 1)!r} stands twice")
    return found


def open_text(path: Path, what: str, origin: str = "") -> TextIO:
    """A file that a person names, open to be read.  Raises UserError, which calls it ``what``,
    where that cannot be done.
    """
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{what} {path} must be a file, not a folder or device{origin}")
        return path.open(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{what} {path} does not exist{origin}") from None
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read: {error.strerror}{origin}") from None


# The last four are PyYAML's for a month of 13, an !!int that is none, an !!bool that is none.
_NOT_YAML = (yaml.YAMLError, RecursionError, ValueError, KeyError, AttributeError, TypeError)
_type_hints = functools.cache(typing.get_type_hints)


def read_yaml(path: str | Path, _stack: tuple[Path, ...] = ()) -> dict:
    """Reads a YAML file and what it includes (``include: file`` or a list, relative to the file,
    later ones win, the file itself last).  Raises UserError for a missing file, bad YAML, a doubled
    key or a circle.
    """
    path = shipped(expand_path(str(path), "config file")).resolve()
    if path in _stack:
        raise UserError(f"include goes in a circle: {' -> '.join(p.name for p in (*_stack, path))}")
    origin = f" (included from {_stack[-1]})" if _stack else ""
    with open_text(path, "config file", origin) as stream:
        try:
            tree = yaml.load(stream, _StrictLoader)
        except UserError:
            raise
        except _NOT_YAML as error:
            raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold a mapping, not {type(tree).__name__}")
    includes = tree.pop("include", [])
    includes = [includes] if isinstance(includes, str) else includes
    if not isinstance(includes, list) or not all(isinstance(name, str) for name in includes):
        raise UserError(f"{path}: include ({includes!r}) must be a file name or a list of them")
    merged: dict = {}
    for name in includes:
        included = path.parent / expand_path(name, f"{path}: include")
        merged = merge(merged, read_yaml(included, (*_stack, path)))
    return merge(merged, tree)


def merge(base: dict, over: dict) -> dict:
    """``base`` with what ``over`` says, dict by dict."""
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merge(result[key], value) if both else value
    return result


def tree_of_overrides(overrides: list[str]) -> dict:
    """``section.field=value`` texts as one tree; later ones win."""
    tree: dict = {}
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals or not all(name.split(".")):
            raise UserError(f"override {text!r} must look like section.field=value")
        stream = io.StringIO(value)
        stream.name = f"override {text!r}"  # what the loader calls it
        try:
            leaf: Any = yaml.load(stream, _StrictLoader)
        except UserError:
            raise
        except _NOT_YAML:
            raise UserError(f"override {text!r}: {value!r} is not a YAML value") from None
        for part in reversed(name.split(".")):
            leaf = {part: leaf}
        tree = merge(tree, leaf)
    return tree


def build(cls: type, tree: Any, path: str = "") -> Any:
    """The dataclass ``cls``, and those in it, from nested dicts.  ``path``: its name in error
    messages.
    """
    if not isinstance(tree, dict):
        raise UserError(f"{path or 'config'} must be a mapping, not {tree!r}")
    hints = _type_hints(cls)
    values = {}
    for key, value in tree.items():
        name = f"{path}.{key}" if path else str(key)
        if key not in hints:
            hint = f"known: {', '.join(hints)}"
            if close := difflib.get_close_matches(str(key), hints, n=1):
                hint = f"did you mean {name.removesuffix(str(key))}{close[0]}?"
            raise UserError(f"unknown key {name} (value {value!r}); {hint}")
        kind: Any = hints[key]
        read = build if dataclasses.is_dataclass(kind) else _typed
        values[key] = read(kind, value, name)
    return cls(**values)


def _typed(kind: Any, value: Any, name: str) -> Any:
    """``value`` as ``kind``, or UserError.  Accepts 1 for 1.0 and the text '1e-4', which YAML 1.1
    reads as a string.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        for option in args:
            try:
                return _typed(option, value, name)
            except UserError:
                continue
    elif origin is Literal:
        if value in args and type(value) in {type(a) for a in args}:
            return value
    elif origin is tuple:
        if isinstance(value, (list, tuple)) and args[1:] == (...,):
            args = args[:1] * len(value)
        if isinstance(value, (list, tuple)) and len(value) == len(args):
            return tuple(_typed(a, v, f"{name}[{i}]") for i, (a, v) in enumerate(zip(args, value)))
    elif kind is type(None):
        if value is None:
            return None
    elif kind is float:
        try:
            if not isinstance(value, bool) and math.isfinite(number := float(value)):
                return number
        except (ValueError, TypeError, OverflowError):
            pass
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise UserError(f"{name} = {value!r} must be {_describe(kind)}")


def _describe(kind: Any) -> str:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(a) for a in args)
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin is tuple:
        return "a list of numbers" if args[1:] == (...,) else f"{len(args)} numbers"
    return _WORDS[kind]
