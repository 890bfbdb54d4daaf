"""One score against the scale of guidance, for every guide: JSON, a Markdown table, an image."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from diffmoe.evaluation.card import Card
from diffmoe.evaluation.plots import score_by_scale
from diffmoe.files import replacing
from diffmoe.markdown import table


def write_sweep(cards: dict[tuple[str, float], Card], folder: Path) -> str:
    """Writes sweep.json, .md and .png of cards by guide and scale; returns the table."""
    curves: dict[str, dict[float, float]] = {}
    for (guide, scale), card in cards.items():
        curves.setdefault(guide, {})[scale] = card.scores.frechet_distance
    best = {guide: min(curve, key=lambda s: (curve[s], s)) for guide, curve in curves.items()}
    winner = min(best, key=lambda guide: curves[guide][best[guide]])
    card = cards[winner, best[winner]]
    name = card.score_names["frechet_distance"]
    rows = [
        (
            f"{s:g}",
            *(f"**{c[s]:.4f}**" if s == best[guide] else c[s] for guide, c in curves.items()),
        )
        for s in sorted(curves[winner])
    ]
    lines = [
        f"# Best {name}: {card.scores.frechet_distance:.4f} at cfg {card.cfg:g}{card.guidance}",
        "",
        f"{card.checkpoint}, step {card.step}, {card.weights} weights; {card.count} images, "
        f"{card.sampler}, {card.steps} steps, {card.routing} routing; {card.reference}. "
        "A guide's best in bold.",
        "",
        *table(("cfg", *curves), rows),
    ]
    points = [
        {"guide": guide, "cfg": scale, "best": scale == best[guide], **dataclasses.asdict(c.scores)}
        for (guide, scale), c in cards.items()
    ]
    tree = {"score": name, "best": {"guide": winner, "cfg": best[winner]}, "points": points}
    text = "\n".join(lines) + "\n"
    for ending, content in (("json", json.dumps(tree, indent=1) + "\n"), ("md", text)):
        with replacing(folder / f"sweep.{ending}") as stream:
            stream.write(content.encode())
    score_by_scale(curves, name, folder / "sweep.png")
    return text
