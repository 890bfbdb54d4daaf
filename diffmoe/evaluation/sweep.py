"""One score against the scale of guidance, for every guide: JSON, a Markdown table, an image."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from diffmoe.evaluation.card import Card
from diffmoe.evaluation.plots import score_by_scale
from diffmoe.files import replacing
from diffmoe.markdown import table

_SCORE = "frechet_distance"


@dataclass(frozen=True)
class Point:
    """Images of one guide (`null`, `capacity` or other weights) at one scale, scored."""

    guide: str
    card: Card

    @property
    def scale(self) -> float:
        assert self.card.cfg is not None
        return self.card.cfg

    @property
    def score(self) -> float:
        return float(getattr(self.card.scores, _SCORE))


def write_sweep(points: list[Point], folder: Path) -> str:
    """Writes sweep.json, .md and .png; returns the table.  The guides' points at scale 1 may be one
    card.
    """
    by_guide: dict[str, dict[float, Point]] = {}
    for point in points:
        by_guide.setdefault(point.guide, {})[point.scale] = point
    best = {g: min(at.values(), key=lambda p: (p.score, p.scale)) for g, at in by_guide.items()}
    winner = min(best.values(), key=lambda point: (point.score, point.scale))
    name = winner.card.score_names[_SCORE]

    def cell(guide: str, scale: float) -> str | None:
        if (point := by_guide[guide].get(scale)) is None:
            return None
        return f"**{point.score:.4f}**" if point is best[guide] else f"{point.score:.4f}"

    scales = sorted({point.scale for point in points})
    card = winner.card
    where = "" if winner.scale == 1 else f", guide {winner.guide}"
    lines = [
        f"# Best {name}: {winner.score:.4f} at cfg {winner.scale:g}{where}",
        "",
        f"{card.checkpoint}, step {card.step}, {card.weights} weights; {card.count} images, "
        f"{card.sampler}, {card.steps} steps, {card.routing} routing; {card.reference}. Bold: the "
        "best of a guide.",
        "",
        *table(
            ("cfg", *by_guide),
            ((f"{s:g}", *(cell(guide, s) for guide in by_guide)) for s in scales),
        ),
    ]
    tree = {
        "score": name,
        "best": _row(winner),
        "best_by_guide": {guide: _row(point) for guide, point in best.items()},
        "points": [_row(point) for point in points],
    }
    text = "\n".join(lines) + "\n"
    written = {"sweep.json": json.dumps(tree, indent=1, allow_nan=False) + "\n", "sweep.md": text}
    for file, content in written.items():
        with replacing(folder / file) as stream:
            stream.write(content.encode())
    curves = {g: [(p.scale, p.score) for p in at.values()] for g, at in by_guide.items()}
    score_by_scale(curves, name, folder / "sweep.png")
    return text


def _row(point: Point) -> dict:
    card = point.card
    return {
        "guide": point.guide,
        "cfg": point.scale,
        "guidance": card.guidance,
        **dataclasses.asdict(card.scores),
        "images_sha256": card.images_sha256,
    }
