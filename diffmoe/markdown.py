"""Tables for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """A Markdown table's lines.  A float gets four decimals, None a dash."""

    def line(cells: Iterable[object]) -> str:
        return (
            "| "
            + " | ".join(
                "–" if c is None else f"{c:.4f}" if isinstance(c, float) else str(c) for c in cells
            )
            + " |"
        )

    return [line(head), f"|{'---|' * len(head)}", *map(line, rows)]
