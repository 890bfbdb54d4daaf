"""The published research code's tiny models and what it computed with them (tests/data/*.npz,
float32, CPU).
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffmoe.config import ModelConfig, MoEConfig
from diffmoe.models.dit import DiT
from diffmoe.models.interchange import from_research
from diffmoe.models.logical import load_logical

DATA = Path(__file__).parent / "data"
FAMILIES = ["dense", "tc", "ec", "diffmoe"]
POOL = {"dense": 1, "tc": 6, "ec": 1, "diffmoe": 6}
PREDICTOR_WEIGHT, TOLERANCE = 0.7, 1e-5


def reference(family: str) -> tuple[DiT, dict[str, Tensor]]:
    """Our model with the research model's weights, and all its numbers by key."""
    numbers = {
        k: torch.from_numpy(np.asarray(v)) for k, v in np.load(DATA / f"{family}.npz").items()
    }
    sizes = {k.split("/")[1]: v.item() for k, v in numbers.items() if k.startswith("config/")}
    model = ModelConfig(
        family=family,
        input_size=8,
        channels=4,
        patch=2,
        width=sizes["hidden"],
        depth=sizes["depth"],
        heads=sizes["heads"],
        classes=10,
        learn_sigma=sizes["learn_sigma"],
    )
    moe = MoEConfig(
        experts=sizes["experts"],
        interleave=sizes["interleave"],
        capacity=sizes["capacity"],
        pool=POOL[family],
    )
    dit = DiT(model, moe, pool=POOL[family])
    state = {k.removeprefix("param/"): v for k, v in numbers.items() if k.startswith("param/")}
    load_logical(dit, from_research(state, dit.model, dit.moe))
    return dit, numbers


def close(ours: Tensor, theirs: Tensor, name: str) -> None:
    """Asserts that the largest difference is at most TOLERANCE of the largest value."""
    scale = theirs.abs().max().clamp_min(1e-12)
    error = ((ours.detach() - theirs).abs().max() / scale).item()
    assert error <= TOLERANCE, f"{name}: largest relative difference {error:.2e}"
