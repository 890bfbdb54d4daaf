"""``run.py bench step``: a whole optimizer step as training runs it (draws, forward, backward, DeepSpeed's step, thresholds, EMA).

ours       the mixture model, by default S-E16
dense      the dense model of equal activated width
block, selective   ours with that activation checkpointing (``--recompute``)
compiled, compiled-dense   ours and dense with ``train.compile`` (``--compile``)
loop       ours with every mixture replaced by the textbook loop (``--loop``)

Time is the median of interleaved repeats.  ``peak``: the most bytes of activations alive at once in forward and backward of the
micro-batch, beyond weights and their gradients (not of compiled ones on a CPU, where nobody can see them).  One process; ZeRO 0 in fp32, ZeRO 1 in bf16.
"""

from __future__ import annotations

import dataclasses
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, Optional

import torch
import torch.distributed as dist
from torch import Tensor, nn

from diffmoe.bench import measure
from diffmoe.bench.contenders import TextbookLoop
from diffmoe.bench.options import bench_parser, sized_config
from diffmoe.config import Config
from diffmoe.layout import resolve_layout
from diffmoe.models.compiled import check_compiler, compile_blocks
from diffmoe.models.count import count
from diffmoe.models.dit import DiT, initialize
from diffmoe.moe.layer import MoELayer, MoEStats
from diffmoe.moe.routing import RoutingRule
from diffmoe.parallel.groups import build_groups
from diffmoe.parity.plain import synthetic_batch
from diffmoe.training.ema import Ema
from diffmoe.training.engine import Engine
from diffmoe.training.step import micro_loss, train_step


class _LoopLayer(MoELayer):
    """A mixture layer whose training pass is the textbook loop."""

    def __init__(self, layer: MoELayer, config: Config) -> None:
        nn.Module.__init__(self)
        self.loop, self.thresholds, self.capacity, self.experts_ = (
            TextbookLoop(config.model, config.moe.experts), layer.thresholds, config.moe.capacity, config.moe.experts)

    def forward(self, x_BND: Tensor, rule: RoutingRule) -> tuple[Tensor, MoEStats]:
        y, loss, observed = self.loop(x_BND.flatten(0, 1), self.capacity)
        nobody = torch.zeros(x_BND.shape[0], self.experts_, dtype=torch.long, device=y.device)
        return y.view_as(x_BND), MoEStats(nobody, None, None, loss, None, observed)


class Training:
    """A model with engine, EMA and one batch: ``step()`` is one optimizer step."""

    def __init__(self, name: str, config: Config, samples: int, dtype: torch.dtype, device: torch.device) -> None:
        family = "dense" if name.endswith("dense") else "diffmoe"
        self.compiled = name.startswith("compiled")
        recompute = name if name in ("block", "selective") else "none"
        self.config = dataclasses.replace(
            config, model=dataclasses.replace(config.model, family=family),
            parallel=dataclasses.replace(config.parallel, recompute=recompute),
            moe=dataclasses.replace(config.moe, pool="rank"),
            train=dataclasses.replace(config.train, batch=samples, micro_batch=samples))
        self.layout, self.device = resolve_layout(self.config, 1), device
        self.groups = build_groups(1, 1)
        self.model = DiT(self.config.model, self.config.moe, pool=self.layout.pool, groups=self.groups, recompute=recompute)
        initialize(self.model, 0)
        if name == "loop":
            for _, layer in list(self.model.moe_layers()):
                block = next(b for b in self.model.blocks if b.mlp is layer)
                block.mlp = _LoopLayer(layer, self.config)
        if self.compiled:
            compile_blocks(self.model)
        self.model.to(device)
        bf16 = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}
        self.engine = Engine(self.model, self.config, self.layout, bf16 if dtype == torch.bfloat16 else {}, self.groups, device)
        self.ema = Ema(self.engine, self.config.train.ema_decays)
        self.batch = synthetic_batch(self.config, range(samples))
        self.steps = 0

    def step(self) -> None:
        train_step(self.engine, self.ema, [self.batch], self.config, self.layout, self.groups, self.steps)
        self.steps += 1

    def backward_only(self) -> None:
        """Forward and backward, without the optimizer."""
        rule = RoutingRule("train", self.config.moe.capacity)
        micro_loss(self.model, self.batch, self.config, rule, self.device).total.backward()

    def peak_bytes(self) -> Optional[int]:
        if self.compiled and self.device.type == "cpu":
            return None
        peak = measure.peak_bytes(self.backward_only, [self.model], self.device)
        self.model.zero_grad(set_to_none=True)
        return peak


def main(arguments: list[str]) -> int:
    """The kind ``step``; returns the exit code."""
    parser = bench_parser("step", "A whole optimizer step beside the dense model's.")
    parser.add_argument("--samples", type=int, default=32, help="samples of a step (default 32)")
    parser.add_argument("--recompute", action="store_true", help="also with block and selective recompute")
    parser.add_argument("--compile", action="store_true", help="also compiled, and dense compiled")
    parser.add_argument("--loop", action="store_true", help="also with the textbook loop")
    options = parser.parse_args(arguments)
    config, device, dtype = sized_config(options)
    if options.samples < 1:
        raise ValueError(f"--samples ({options.samples}) must be at least 1")
    if options.compile:
        check_compiler(device)
    names = (["ours", "dense"] + ["block", "selective"] * options.recompute + ["compiled", "compiled-dense"] * options.compile
             + ["loop"] * options.loop)
    if not dist.is_initialized():
        store = Path(tempfile.mkdtemp(prefix="diffmoe-bench-")) / "store"
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", init_method=f"file://{store}", rank=0, world_size=1)
    trainings = {name: Training(name, config, options.samples, dtype, device) for name in names}
    seconds = measure.interleaved({name: t.step for name, t in trainings.items()}, options.repeats, device)
    peaks = {name: t.peak_bytes() for name, t in trainings.items()}
    facts = {"model": options.model, "experts": config.moe.experts, "samples": options.samples, "dtype": options.dtype,
             "repeats": options.repeats, **_ratios(seconds, peaks), **_utilization(trainings, seconds, device, dtype),
             "seconds": seconds, "peak_bytes": peaks, **measure.surroundings(device)}
    rows = [[name, 1e3 * seconds[name], seconds[name] / seconds["dense"],
             *(["-", "-"] if peaks[name] is None else [peaks[name] / 2**20, peaks[name] / peaks["dense"]]),
             facts["mfu"][name]] for name in names]
    text = measure.table(["step", "ms", "of dense", "peak MiB", "of dense", "of matmul ceiling"], rows)
    title = (f"step_{options.model}_e{config.moe.experts}_{options.samples}" + "_recompute" * options.recompute
             + "_compile" * options.compile)
    return measure.report(title, facts, text, {n: 1e3 * s for n, s in seconds.items()}, "ms, one optimizer step", options)


def _ratios(seconds: dict[str, float], peaks: dict[str, Optional[int]]) -> dict[str, Any]:
    facts: dict[str, Any] = {"time_over_dense": seconds["ours"] / seconds["dense"],
                             "activation_memory_over_dense": peaks["ours"] / peaks["dense"]}
    if "loop" in seconds:
        facts["loop_time_over_ours"] = seconds["loop"] / seconds["ours"]
        facts["activation_memory_over_loop"] = peaks["ours"] / peaks["loop"]
    if "block" in seconds:
        extra = {name: seconds[name] - seconds["ours"] for name in ("block", "selective")}
        facts["selective_over_block_extra_time"] = extra["selective"] / extra["block"]
        facts["selective_over_block_memory"] = peaks["selective"] / peaks["block"]
    if "compiled" in seconds:
        facts["compiled_time_over_ours"] = seconds["compiled"] / seconds["ours"]
        facts["compiled_time_over_compiled_dense"] = seconds["compiled"] / seconds["compiled-dense"]
    return facts


def _utilization(trainings: dict[str, Training], seconds: dict[str, float], device: torch.device,
                 dtype: torch.dtype) -> dict[str, Any]:
    """Images a second, and each model's own arithmetic (6 x MACs, recompute not counted) as a share of the measured ceiling."""
    ceiling = measure.matmul_ceiling(device, dtype)
    share = {name: 6 * count(t.config.model, t.config.moe).forward_macs * len(t.batch.y) / seconds[name] / ceiling
             for name, t in trainings.items()}
    return {"matmul_ceiling_flops": ceiling, "mfu": share,
            "images_per_second": {name: len(t.batch.y) / seconds[name] for name, t in trainings.items()}}
