"""Tables for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[object]],
    floats: str = ".4f",
    aligned: bool = False,
) -> list[str]:
    """Its lines; floats as the format says, None a dash; ``aligned`` by spaces, for a terminal."""

    def text(cell: object) -> str:
        return "–" if cell is None else f"{cell:{floats}}" if isinstance(cell, float) else str(cell)

    texts = [[text(cell) for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) if aligned else 0 for column in zip(*texts)]
    rule = [("-" * (width + 2)) if aligned else "---" for width in widths]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in texts]
    return [lines[0], f"|{'|'.join(rule)}|", *lines[1:]]
