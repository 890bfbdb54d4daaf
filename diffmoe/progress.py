"""How far a long loop is: a bar on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

LINE_SECONDS = 30.0


def shown(items: Sequence[T], what: str, show: bool) -> Iterator[T]:
    """The items, one by one, with their progress on stderr unless ``show`` is false (on all ranks
    but one).

    Where stderr is no terminal, a line like ``sampling: 40 of 250 (16 %), 12 min left`` follows an
    item that ends 30 s or more after the last line; what takes less in all says nothing.
    """
    if not show or sys.stderr.isatty():
        yield from tqdm(items, desc=what, disable=not show)
        return
    began = said = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - said >= LINE_SECONDS:
            said = now
            left = (now - began) / done * (len(items) - done) / 60
            print(
                f"{what}: {done} of {len(items)} ({done / len(items):.0%}), {left:.0f} min left",
                file=sys.stderr,
                flush=True,
            )
