"""``run.py bench roofline --planner``: the coefficients of ``diffmoe/cost/counted.json``, in which
``launcher plan``'s times are linear (``cost.step_time``).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from diffmoe.bench.fake_cuda import counted
from diffmoe.config import Config, load_config, override
from diffmoe.cost.step_time import terms

_SHARDED = ("Adam", "weights in bf16")  # sources that touch what ZeRO leaves a rank
_SMALL = (
    "parallel.ep=1 moe.pool=rank train.batch=32 train.micro_batch=32 model.width=512 model.heads=8 "
    "model.depth=2"
)
_BF16 = "ds_configs/zero1_bf16.json"
_WEIGHTS = {
    "bf16": _BF16,
    "bf16_zero2": "ds_configs/zero2_bf16.json",
    "fp32": "ds_configs/zero0_fp32.json",
}


def planner_counts() -> dict[str, Any]:
    """What small models' counts say, in bf16: elements moved and kernels of a micro-batch, eager
    and compiled, by recompute; bytes a parameter and kernels a tensor of the weights' traffic.
    """
    small = load_config("configs/diffmoe_l_e16_flow.yaml", _SMALL.split())
    dense = "model.family=dense"
    changes = [[dense], [dense, "model.depth=4"], [dense, "model.mlp_ratio=2"]]
    changes += [["moe.experts=8"], ["moe.experts=32"]]
    cases = [override(small, change) for change in changes]
    elements_each = 2 * 32 * small.model.tokens  # bytes of a token's elements, of 32 samples
    found: dict[str, Any] = {}
    for way in ("eager", "compiled"):
        found[way] = {}
        for recompute in ("none", "block", "selective"):
            form = [f"parallel.recompute={recompute}"]
            micros = counted([(override(case, form), _BF16, way) for case in cases], 1)
            bytes_ = [sum(k[2] * k[5] for k in m["kernels"] if k[0] == "memory") for m in micros]
            kernels = [sum(k[5] for k in m["kernels"]) for m in micros]
            elements = [size / elements_each for size in bytes_]
            found[way][recompute] = _solved(cases, elements, kernels)
    found["weights"] = {name: _weights_of(small, json) for name, json in _WEIGHTS.items()}
    return found


def _solved(
    cases: list[Config], elements: list[float], kernels: list[int]
) -> dict[str, dict[str, float]]:
    by_term = [terms(case) for case in cases]
    solved = np.linalg.solve([list(each.values()) for each in by_term], elements)
    (one, two, _, mixed, _), depth = kernels, cases[0].model.depth
    block = (two - one) / depth
    return {
        "elements": {name: round(float(value), 3) for name, value in zip(by_term[0], solved)},
        "kernels": {"outside": one - depth * block, "block": block, "mixture": mixed - one},
    }


def _weights_of(config: Config, deepspeed: str) -> dict[str, float]:
    """From steps of one and of three micro-batches."""
    batches = [32, 96]
    steps = [(override(config, [f"train.batch={n}"]), deepspeed, "engine") for n in batches]
    found = []
    for engine in counted(steps, 1):
        sizes: Counter[str] = Counter()
        for _, _, size, _, source, times in engine["kernels"]:
            name = source if source in ("EMA", *_SHARDED) else "parameter"
            sizes[name] += size * times / engine["parameters"]
        found.append((sizes, sum(k[5] for k in engine["kernels"]) / engine["tensors"]))
    (one, kernels_of_one), (three, kernels_of_three) = found
    each = (three["parameter"] - one["parameter"]) / 2
    kernels = (kernels_of_three - kernels_of_one) / 2
    values = {
        "micro_batch": each,
        "step": one["parameter"] - each,
        "shard": sum(one[source] for source in _SHARDED),
        "ema": one["EMA"],
        "kernels_micro_batch": kernels,
        "kernels_step": kernels_of_one - kernels,
    }
    return {name: round(value, 3) for name, value in values.items()}
