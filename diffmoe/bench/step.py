"""``run.py bench step``: a whole optimizer step as training runs it (draws, forward, backward,
DeepSpeed's step, thresholds, EMA).

- ours: the MoE model, by default S-E16
- dense: the dense model of equal activated width
- block, selective: ours with that activation checkpointing (``--recompute``)
- compiled, compiled-dense: ours and dense with ``train.compile`` (``--compile``)

Time is the median of interleaved repeats.  ``peak``: the most bytes of activations alive at once in
forward and backward of a micro-batch, beyond weights and their gradients (not of compiled ones on a
CPU, where nobody can see them).  One process; ZeRO 0 in fp32, ZeRO 1 in bf16.  Variants of the same
model share its weights and optimizer.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch

from diffmoe.bench import measure
from diffmoe.bench.options import bench_parser, common_facts, count, sized_config
from diffmoe.config import Config, override
from diffmoe.deepspeed_json import read_deepspeed
from diffmoe.device import measured_flops
from diffmoe.diffusion.randomness import StepDraws
from diffmoe.layout import resolve_layout
from diffmoe.models.compiled import CompiledRun, check_compiler
from diffmoe.models.count import count as count_model
from diffmoe.models.dit import run_plainly
from diffmoe.moe.routing import RoutingRule
from diffmoe.parallel.groups import build_groups
from diffmoe.parallel.recompute import forms
from diffmoe.parity.synthetic import Training, build_model
from diffmoe.training.step import micro_loss

# Variant -> (family, activation checkpointing, whether it is compiled).
_VARIANTS = {
    "ours": ("diffmoe", "none", False),
    "dense": ("dense", "none", False),
    "block": ("diffmoe", "block", False),
    "selective": ("diffmoe", "selective", False),
    "compiled": ("diffmoe", "none", True),
    "compiled-dense": ("dense", "none", True),
}


class FixedTraining(Training):
    """One rank's training with the same made-up batches and draws in every step.  No weight is
    zero: zeros cost a GPU less power, and so less time.
    """

    def __init__(self, config: Config, tree: dict, device: torch.device) -> None:
        groups = build_groups(1, 1)
        model = build_model(config, resolve_layout(config, 1).pool, groups).to(device)
        super().__init__(model, config, tree, groups, device)
        self.fixed = self.batches(0)
        numbers = np.array([batch.positions for batch in self.fixed])
        shape = tuple(self.fixed[0].x.shape[1:])
        self.draws = StepDraws(config.run.seed, lambda _: numbers, shape)
        self.numbers = itertools.count()


class Variant:
    """One way to run a training: how blocks are recomputed and whether they are compiled."""

    def __init__(self, training: FixedTraining, recompute: str, compiled: bool) -> None:
        self.training, self.compiled = training, compiled
        self._recompute = forms(recompute, training.config.model.depth)
        self._run = CompiledRun(training.config.moe.capacity) if compiled else run_plainly

    def step(self) -> None:
        training = self._selected()
        number = next(training.numbers)
        training.step(number, training.fixed, training.draws.of(number))

    def peak_bytes(self) -> int | None:
        """Of forward and backward of a micro-batch, without the optimizer."""
        training = self._selected()
        model, config, device = training.model, training.config, training.engine.device
        if self.compiled and device.type == "cpu":
            return None
        rule, batch = RoutingRule("train", config.moe.capacity), training.fixed[0]
        peak = measure.peak_bytes(
            lambda: micro_loss(model, batch, config, rule, device).total.backward(), [model], device
        )
        model.zero_grad(set_to_none=True)
        return peak

    def _selected(self) -> FixedTraining:
        self.training.model.recompute, self.training.model.run = self._recompute, self._run
        return self.training


def main(arguments: list[str]) -> int:
    """The kind ``step``; returns the exit code.  UserError for bad input."""
    parser = bench_parser("step", "A whole optimizer step beside the dense model's.", profile=True)
    add = parser.add_argument
    add("--samples", type=count, default=32, help="samples of a micro-batch (default 32)")
    add("--accumulation", type=count, default=1, help="micro-batches of a step (default 1)")
    add("--recompute", action="store_true", help="also with block and selective recompute")
    add("--compile", action="store_true", help="also compiled, and dense compiled")
    options = parser.parse_args(arguments)
    config, device, dtype = sized_config(options)
    if options.compile:
        check_compiler(device)
    names = ["ours", "dense"] + ["block", "selective"] * options.recompute
    names += ["compiled", "compiled-dense"] * options.compile
    measure.world_of_one(device)
    samples, batch = options.samples, options.samples * options.accumulation
    config = override(
        config, ["moe.pool=rank", f"train.batch={batch}", f"train.micro_batch={samples}"]
    )
    tree = read_deepspeed("ds_configs/zero1_bf16.json") if dtype == torch.bfloat16 else {}
    trainings = {
        family: FixedTraining(override(config, [f"model.family={family}"]), tree, device)
        for family in ("diffmoe", "dense")
    }
    variants = {
        name: Variant(trainings[family], recompute, compiled)
        for name, (family, recompute, compiled) in _VARIANTS.items()
        if name in names
    }
    steps = {name: variants[name].step for name in names}
    seconds = measure.interleaved(steps, options.repeats, device)
    peaks = {name: variants[name].peak_bytes() for name in names}
    base = peaks["dense"] or 1
    facts = {
        "samples": samples,
        "accumulation": options.accumulation,
        "time_over_dense": seconds["ours"] / seconds["dense"],
        "activation_memory_over_dense": (peaks["ours"] or 0) / base,
        **_utilization(variants, seconds, device, dtype),
        "seconds": seconds,
        "peak_bytes": peaks,
        **common_facts(options, config, device),
    }
    text = measure.table(
        ["step", "ms", "of dense", "peak MiB", "of dense", "of matmul ceiling", "images/s"],
        [
            [
                name,
                1e3 * seconds[name],
                seconds[name] / seconds["dense"],
                *([None, None] if peak is None else [peak / 2**20, peak / base]),
                facts["mfu"][name],
                facts["images_per_second"][name],
            ]
            for name, peak in peaks.items()
        ],
    )
    if options.profile:
        facts["profile"], tables = measure.profiles(steps, device)
        text += tables
    title = f"step_{options.model}_e{config.moe.experts}_{samples}"
    title += "_recompute" * options.recompute + "_compile" * options.compile
    bars = {n: 1e3 * s for n, s in seconds.items()}
    return measure.report(title, facts, text, bars, "ms, one optimizer step", options)


def _utilization(
    variants: dict[str, Variant],
    seconds: dict[str, float],
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Images/s; a model's arithmetic (6 x MACs, no recompute) over the measured ceiling."""
    ceiling = measured_flops(device, dtype, *((8192, 20) if device.type == "cuda" else (1024, 50)))
    images, shares = {}, {}
    for name, variant in variants.items():
        config = variant.training.config
        images[name] = config.train.batch / seconds[name]
        macs = count_model(config.model, config.moe).forward_macs
        shares[name] = 6 * macs * images[name] / ceiling
    return {"matmul_ceiling_flops": ceiling, "mfu": shares, "images_per_second": images}
