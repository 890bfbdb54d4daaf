"""The published protocol (arXiv 2503.14487; ADM's evaluation), and what differs from it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffmoe.evaluation.card import Card

INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
COUNT, SPLITS, LABELS, WEIGHTS = 50_000, 10, "random", "ema"
CFG = (1.0, 1.5)  # rows are published at both


def published_sampling(family: str | None, process: str | None) -> dict[str, object]:
    """The published values of the configuration's section `sample`, cfg excepted, by name.

    The paper's rule looks at the whole batch, which the research code has of 125 images; other
    families' images do not depend on their batch.
    """
    published: dict[str, object] = {"sampler": "ancestral", "cfg_channels": 3}
    if process == "flow":
        published = {"sampler": "euler"}
    published |= {"steps": 250, "guide": None, "cfg_interval": None, "pair": None}
    published |= {"dtype": "fp32"}
    if family == "diffmoe":
        published |= {"routing": "batch", "batch": 125, "gamma": None, "capacity": None}
    return published


def departures(card: Card) -> list[str]:
    """In what a checkpoint's score differs from the published protocol, with its values."""
    published = {"weights": WEIGHTS, "labels": LABELS, "count": COUNT, "splits": SPLITS}
    published |= published_sampling(card.family, card.process)
    there = {"dtype": "fp32", **vars(card), **(card.sampling or {})}  # a card names another
    differ = [
        f"{name} {there.get(name)} (published: {value})"
        for name, value in published.items()
        if there.get(name) != value
    ]
    shift = there.get("time_shift", 1)  # cards name it where it is not
    if shift != 1:
        differ.append(f"time_shift {shift} (published: none)")
    if card.cfg not in CFG:
        differ.append(f"cfg {card.cfg:g} (published: {' and '.join(f'{cfg:g}' for cfg in CFG)})")
    if card.extractor_sha256 != INCEPTION_SHA256:
        differ.append(f"extractor {card.extractor} (published: inception-2015-12-05.pt)")
    return differ


def protocol(card: Card) -> str:
    """`published`, or what differs from it; of given samples only the scoring is known."""
    if card.samples is not None:
        return "not known: the samples were given"
    differ = departures(card)
    return f"not the published one: {', '.join(differ)}" if differ else "published"
