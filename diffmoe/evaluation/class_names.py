"""Which classes somebody means, by number or by name."""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Iterable
from typing import Any

from diffmoe.errors import UserError


def parse_classes(text: str, classes: int, names: tuple[str, ...] = ()) -> list[int]:
    """Class numbers in a text such as ``all``, ``0,3,7-9`` or ``boot,3,"7-9"``.  ``names``: the
    classes', if known.

    What looks like a number or a range is one, unless it is in double quotes.  Raises UserError,
    also for a number outside 0 … classes - 1 and a name of none or of several.
    """
    if text == "all":
        return list(range(classes))
    said, chosen = f"--classes {text!r}", []
    for part in map(
        str.strip, re.split(r',(?=(?:[^"]*"[^"]*")*[^"]*$)', text)
    ):  # at commas outside of quotes
        first, _, last = part.partition("-")
        if not re.fullmatch("[0-9]+(-[0-9]+)?", part):
            wanted = "'all' or numbers and ranges such as 0,3,7-9"
            chosen.append(_number_of(part.removeprefix('"').removesuffix('"'), said, wanted, names))
            continue
        if not int(first) <= int(last or first) < classes:
            raise UserError(
                f"{said} must name classes from 0 to {classes - 1} (model.classes = {classes})"
            )
        chosen += range(int(first), int(last or first) + 1)
    return chosen


def chosen_classes(chosen: Any, classes: int, names: tuple[str, ...] = ()) -> list[int]:
    """Class numbers of a number, a name, or several (any iterable, arrays and tensors too); None:
    all.  A text that is no name may be a number.  Raises UserError as :func:`parse_classes` does.
    """
    if chosen is None:
        return list(range(classes))
    said, wanted = (
        f"classes ({chosen!r})",
        f"numbers from 0 to {classes - 1}" + " or names" * bool(names),
    )
    if hasattr(chosen, "tolist"):  # an array's or a tensor's
        chosen = chosen.tolist()
    several = (
        [chosen]
        if isinstance(chosen, (int, str)) or not isinstance(chosen, Iterable)
        else list(chosen)
    )
    numbers = []
    for one in several:
        if isinstance(one, str):
            one = (
                int(one)
                if one.isdecimal() and one not in names
                else _number_of(one, said, wanted, names)
            )
        if (
            isinstance(one, bool)
            or not hasattr(one, "__index__")
            or not 0 <= operator.index(one) < classes
        ):
            raise UserError(f"{said} must be {wanted} (model.classes = {classes})")
        numbers.append(operator.index(one))
    if not numbers:
        raise UserError(f"{said} must be {wanted} (model.classes = {classes})")
    return numbers


def _number_of(name: str, said: str, wanted: str, names: tuple[str, ...]) -> int:
    """The class of that name, in any case of letters if only one is meant."""
    if not names or not name:
        raise UserError(
            f"{said} must be {wanted}"
            + ("" if names else ": the checkpoint knows no names of classes")
        )
    folded = [other.casefold() for other in names]
    meant = [number for number, other in enumerate(names) if other == name] or [
        number for number, other in enumerate(folded) if other == name.casefold()
    ]
    if len(meant) == 1:
        return meant[0]
    near = (
        meant
        or [number for number, other in enumerate(folded) if name.casefold() in other]
        or [
            folded.index(other)
            for other in difflib.get_close_matches(name.casefold(), folded, cutoff=0.5)
        ]
    )
    listed = ", ".join(f"{number} ({names[number]})" for number in near[:3])
    raise UserError(
        f"{said}: {name!r} is the name of {'several classes' if meant else 'no class'}"
        f"{f'; {listed}' if meant else f'; did you mean {listed}?' if near else ''}"
    )
