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
    # At commas outside of quotes.
    for part in map(str.strip, re.split(r',(?=(?:[^"]*"[^"]*")*[^"]*$)', text)):
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
    all.  A text that is not a name may be a number.  Raises UserError as :func:`parse_classes`.
    """
    if chosen is None:
        return list(range(classes))
    said = f"classes ({chosen!r})"
    wanted = f"numbers from 0 to {classes - 1}" + " or names" * bool(names)
    if hasattr(chosen, "tolist"):  # an array's or a tensor's
        chosen = chosen.tolist()
    several = isinstance(chosen, Iterable) and not isinstance(chosen, str)
    numbers = []
    for one in chosen if several else [chosen]:
        if isinstance(one, str) and one.isdecimal() and one not in names:
            one = int(one)
        elif isinstance(one, str):
            one = _number_of(one, said, wanted, names)
        numbers.append(-1 if isinstance(one, bool) or not hasattr(one, "__index__") else one)
    numbers = list(map(operator.index, numbers))
    if not numbers or not all(0 <= number < classes for number in numbers):
        raise UserError(f"{said} must be {wanted} (model.classes = {classes})")
    return numbers


def _number_of(name: str, said: str, wanted: str, names: tuple[str, ...]) -> int:
    """The class of that name, in any case of letters if only one is meant."""
    if not names:
        raise UserError(f"{said} must be {wanted}: the checkpoint knows no names of classes")
    if not name:
        raise UserError(f"{said} must be {wanted}")
    low, folded = name.casefold(), [other.casefold() for other in names]
    meant = [i for i, other in enumerate(names) if other == name]
    meant = meant or [i for i, other in enumerate(folded) if other == low]
    if len(meant) == 1:
        return meant[0]
    near = meant or [i for i, other in enumerate(folded) if low in other]
    near = near or [folded.index(o) for o in difflib.get_close_matches(low, folded, cutoff=0.5)]
    listed = ", ".join(f"{i} ({names[i]})" for i in near[:3])
    if meant:
        raise UserError(f"{said}: {name!r} is the name of several classes; {listed}")
    if near:
        hint = f"did you mean {listed}?"
    else:
        known = ", ".join(f"{i} ({other})" for i, other in enumerate(names[:3]))
        hint = f"the {len(names)} classes are {known}" + ", ..." * (len(names) > 3)
    raise UserError(f"{said}: no class is named {name!r}; {hint}")
