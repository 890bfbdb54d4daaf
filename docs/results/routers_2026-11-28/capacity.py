"""Validation loss of trained runs by the capacity and the routing rule of inference:
``python docs/results/routers_2026-11-28/capacity.py RUN... > capacity.md``.
"""

import sys

import torch

from diffmoe import DiT
from diffmoe.config import load_config, override
from diffmoe.markdown import table
from diffmoe.parallel.groups import single_process
from diffmoe.training.validation import open_validator

RULES = ["sample.routing=token", "sample.routing=batch", "sample.routing=static"]
CAPACITIES = [f"sample.capacity={capacity}" for capacity in (0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 4)]

rows = []
for run in sys.argv[1:]:
    model, config = DiT.from_pretrained(run), load_config(f"{run}/compare.yaml")
    for setting in RULES + CAPACITIES:
        changed = override(config, [setting])
        validator = open_validator(changed, single_process().world, torch.device("cpu"))
        found = validator.measure(model)
        rows.append((run, setting, f"{found.experts_per_token:.3f}", f"{found.loss:.5f}"))
print("\n".join(table(("run", "inference", "experts a token", "validation loss"), rows)))
