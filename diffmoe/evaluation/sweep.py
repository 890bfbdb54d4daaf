"""One score against a setting, curve by curve: JSON, a Markdown table, an image."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from diffmoe.evaluation.card import Card
from diffmoe.evaluation.plots import score_curves
from diffmoe.files import write_text
from diffmoe.markdown import table


def write_sweep(cards: dict[tuple[str, float], Card], axis: str, folder: Path) -> str:
    """Writes sweep.json, .md, .png of cards by curve and place on ``axis``; returns the table."""
    curves: dict[str, dict[float, float]] = {}
    for (name, place), card in cards.items():
        curves.setdefault(name, {})[place] = card.scores.frechet_distance
    best = {name: min(curve, key=lambda x: (curve[x], x)) for name, curve in curves.items()}
    winner = min(best, key=lambda name: curves[name][best[name]])
    card = cards[winner, best[winner]]
    score = card.score_names["frechet_distance"]
    rows = [
        (f"{x:g}", *(f"**{c[x]:.4f}**" if x == best[name] else c[x] for name, c in curves.items()))
        for x in sorted(curves[winner])
    ]
    lines = [
        f"# Best {score}: {card.scores.frechet_distance:.4f} with {card.weights} weights, cfg "
        f"{card.cfg:g}{card.guidance}",
        "",
        f"{card.checkpoint}, step {card.step}; {card.count} images, "
        f"{card.sampler}, {card.steps} steps, {card.routing} routing; {card.reference}. "
        "A column's best in bold.",
        "",
        *table((axis, *curves), rows),
    ]
    points = [
        {"curve": name, axis: x, "best": x == best[name], **dataclasses.asdict(c.scores)}
        for (name, x), c in cards.items()
    ]
    tree = {"score": score, "best": {"curve": winner, axis: best[winner]}, "points": points}
    text = "\n".join(lines) + "\n"
    write_text(folder / "sweep.json", json.dumps(tree, indent=1) + "\n")
    write_text(folder / "sweep.md", text)
    score_curves(curves, axis, score, folder / "sweep.png")
    return text
