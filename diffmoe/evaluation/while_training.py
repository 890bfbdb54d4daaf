"""Scores of a model that is being trained: the images that the subcommand `evaluate` would make,
measured at once and kept nowhere.

Experts may be spread over ranks and weights sharded, so every rank makes as many passes over as
many images as the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffmoe.config import Config
from diffmoe.data.shards import ShardIndex
from diffmoe.errors import UserError
from diffmoe.evaluation.decoding import Decoder, open_decoder
from diffmoe.evaluation.evaluate import check_plan
from diffmoe.evaluation.features import Extractor, open_extractor, to_uint8
from diffmoe.evaluation.generate import generate
from diffmoe.evaluation.reference_statistics import Reference, load_reference
from diffmoe.evaluation.scored_images import class_labels, image_size
from diffmoe.evaluation.scores import Scores, Tally, default_splits
from diffmoe.models.dit import DiT
from diffmoe.parallel.collectives import agreed, raise_together
from diffmoe.parallel.groups import Group


@dataclass(frozen=True)
class Scorer:
    """What the section `score` of a configuration means, opened."""

    count: int
    reference: Reference
    extractor: Extractor
    decoder: Decoder | None


def open_scorer(config: Config, index: ShardIndex, world: Group, device: torch.device) -> Scorer:
    """All ranks together; `index` is the training data's.  Raises AgreedError."""
    score = config.score
    with agreed(world):
        extractor = open_extractor(score.extractor, device)
        decoder = open_decoder(score.vae, config, index, None, None, device) if score.vae else None
        size = image_size(config, decoder)
        check_plan(score.count, default_splits(score.count), size, extractor)
    reference = load_reference(score.reference, extractor, world, device, size=size)
    return Scorer(score.count, reference, extractor, decoder)


def score(model: DiT, config: Config, scorer: Scorer, world: Group, device: torch.device) -> Scores:
    """Scores of images 0 … count - 1, classes in turn, the same on every rank: those of the
    subcommand `evaluate` (whose last batch is smaller, which the batch routing rule sees; and which
    loads fp32 weights, where these are in the training's precision), but for precision and recall,
    which need all features in one place.

    Raises:
        AgreedError: images or features that are not finite, on any rank, or a sampler that does not
            finish, which ends on all alike; all have made their passes.
    """
    batch, tally = config.sample.batch, Tally(scorer.count, default_splits(scorer.count))
    rounds = -(-scorer.count // (batch * world.size))
    problem: Exception | None = None
    for index in range(world.index, rounds * world.size, world.size):
        numbers = range(index * batch, (index + 1) * batch)
        labels = class_labels("balanced", numbers, config.model.classes, config.run.seed)
        try:
            x = generate(model, config, labels, numbers, device, together=world)
            images = to_uint8(x) if scorer.decoder is None else scorer.decoder.function(x)
            asked = range(scorer.count)[numbers.start : numbers.stop]  # the last rounds have more
            tally.add(scorer.extractor(images), asked)
        except UserError as error:
            problem = problem or error
    raise_together(problem, world)
    tally.add_ranks(world, device)
    with agreed(world):
        scores = tally.scores(scorer.reference)
    return scores
