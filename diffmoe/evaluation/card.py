"""A score with everything that moves it: the same card means the same number, or a bug."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

import diffmoe
from diffmoe import code_version
from diffmoe.data.values import Numbers
from diffmoe.errors import UserError
from diffmoe.evaluation.scores import Scores, score_names
from diffmoe.files import write_text
from diffmoe.markdown import table

JSON_NAME, MARKDOWN_NAME = "card.json", "card.md"
# In cards of earlier versions, whatever the extractor.
_EARLIER = {"fid": "frechet_distance", "sfid": "spatial_frechet_distance"}


@dataclass(frozen=True, kw_only=True)
class Card:
    """One evaluation, of a checkpoint or of samples that exist.

    `weights_sha256` is `logical.weights_digest` of the model. `sampling` is the whole configuration
    section, for what has no field of its own. `guidance`: what `cfg` leaves unsaid, in words:
    another guide than the null class, of which `guide_sha256` is the weights' digest where they
    are others, and an interval of times. `capacity` is the dial at inference (with static
    routing `moe.capacity`), `gamma` the constant threshold; with neither, the learned thresholds
    decided. `batch` images were sampled together, and with the batch and static routing rules they
    shape each other. `splits`: of the Inception Score. `reference_count` None: the file does not
    say. `seconds` is the wall time of this evaluation's last start. `fp32_precision`: of a GPU's
    fp32 matmuls; "" in older cards, when matmuls were ieee and convolutions TF32. `samples`: where
    the images were that were given and not sampled here; then all that makes images is None.
    `images_sha256` is over the images' own SHA-256s, as a measured reference's. `protocol`:
    `published`, or in what this differs from the published protocol ("": made before cards said
    so).
    """

    scores: Scores
    checkpoint: str | None = None
    weights: str | None = None
    step: int | None = None
    weights_sha256: str | None = None
    family: str | None = None
    process: str | None = None
    vae: str | None = None
    vae_sha256: str | None = None
    latent_scale: Numbers | None = None
    latent_shift: Numbers | None = None
    cfg: float | None = None
    guidance: str = ""
    guide_sha256: str | None = None
    sampler: str | None = None
    steps: int | None = None
    sampling: dict[str, object] | None = None
    routing: str | None = None
    capacity: float | None = None
    gamma: float | None = None
    batch: int | None = None
    seed: int | None = None
    labels: str | None = None
    count: int
    splits: int
    reference: str
    reference_sha256: str
    reference_count: int | None
    extractor: str
    extractor_sha256: str
    ranks: int
    hardware: str
    versions: dict[str, str]
    time: str
    seconds: float
    fp32_precision: str = ""
    samples: str | None = None
    images_sha256: str | None = None
    protocol: str = ""

    @property
    def score_names(self) -> dict[str, str]:
        """What its scores are called, with an arrow to the better side, by field of `Scores`."""
        names = score_names(self.extractor, self.extractor_sha256)
        return {
            field: f"{name} {'↓' if field.endswith('distance') else '↑'}"
            for field, name in names.items()
        }

    @property
    def scoring(self) -> tuple[str, str, int]:
        """What the images were scored by: reference, extractor, splits."""
        return self.reference_sha256, self.extractor_sha256, self.splits

    def to_json(self) -> str:
        """The card as JSON; `card_from_json` reads it back."""
        return json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False) + "\n"

    def to_markdown(self) -> str:
        """The card for people: the scores, then every setting."""
        scores = []
        for field, name in self.score_names.items():
            value = getattr(self.scores, field)
            shown = "not measured" if value is None else f"{value:.4f}"
            if field == "inception_score" and value is not None and self.splits > 1:
                shown += f" ± {self.scores.inception_score_std:.4f} over {self.splits} splits"
            elif field == "inception_score" and value is not None:
                shown += " over 1 split"
            scores.append((name, shown))
        settings = []
        for field in [f.name for f in dataclasses.fields(self) if f.name != "scores"]:
            value = getattr(self, field)
            if isinstance(value, dict):
                value = ", ".join(f"{name} {entry}" for name, entry in value.items())
            settings.append((field.replace("_", " "), None if value is None else str(value)))
        what = f"{self.family} at step {self.step}, {self.weights} weights, "
        what += f"cfg {self.cfg}{self.guidance}"
        lines = [
            f"# {self.count} images of {self.samples or what}",
            "",
            *table(("score", "value"), scores),
            "",
            *table(("setting", "value"), settings),
        ]
        return "\n".join(lines) + "\n"


def card_from_json(text: str) -> Card:
    """A card back from its JSON. UserError: not a card, or a card with other fields."""
    try:
        tree = json.loads(text)
        scores = {_EARLIER.get(name, name): value for name, value in tree["scores"].items()}
        return Card(**{**tree, "scores": Scores(**scores)})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"not a score card: {error}") from None


def read_card(path: Path) -> Card:
    """UserError, naming the file, for one that is not a card."""
    try:
        return card_from_json(path.read_text())
    except (OSError, UserError) as error:
        raise UserError(f"{path}: {error}") from None


def write_card(card: Card, folder: Path) -> None:
    """Write card.md, then card.json: a folder with the JSON has both. A card that is there of
    another scoring of the same images stays, as `card-<reference>-<extractor>-<splits>` (the first
    digits of their hashes).
    """
    before = read_card(folder / JSON_NAME) if (folder / JSON_NAME).is_file() else card
    if before.scoring != card.scoring:
        own = f"{before.reference_sha256[:8]}-{before.extractor_sha256[:8]}-{before.splits}"
        for path in (folder / MARKDOWN_NAME, folder / JSON_NAME):
            if path.is_file():
                os.replace(path, folder / f"card-{own}{path.suffix}")
    write_text(folder / MARKDOWN_NAME, card.to_markdown())
    write_text(folder / JSON_NAME, card.to_json())


def find_card(folder: Path, scoring: tuple[str, str, int]) -> Card | None:
    """The card of this scoring among a folder's cards, if it is there."""
    paths = [folder / JSON_NAME, *sorted(folder.glob("card-*.json"))]
    cards = (read_card(path) for path in paths if path.is_file())
    return next((card for card in cards if card.scoring == scoring), None)


def versions() -> dict[str, str]:
    """Of all that can move a score, and the commit of a git checkout that this runs from."""
    found = {
        "diffmoe": diffmoe.__version__,
        "commit": code_version.commit(Path(diffmoe.__file__).parent.parent),
        "python": platform.python_version(),
    }
    packages = ("torch", "deepspeed", "numpy")
    return found | {package: importlib.metadata.version(package) for package in packages}


def hardware(device: torch.device) -> str:
    """The device of a rank, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {platform.machine()}"
