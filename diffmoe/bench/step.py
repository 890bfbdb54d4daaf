"""``run.py bench step``: a whole optimizer step as training runs it (draws, forward, backward,
DeepSpeed's step, thresholds, EMA).

ours       the mixture model, by default S-E16
dense      the dense model of equal activated width
block, selective   ours with that activation checkpointing (``--recompute``)
compiled, compiled-dense   ours and dense with ``train.compile`` (``--compile``)
loop       ours with every mixture replaced by the textbook loop (``--loop``)

Time is the median of interleaved repeats.  ``peak``: the most bytes of activations alive at once in
forward and backward of a micro-batch, beyond weights and their gradients (not of compiled ones on a
CPU, where nobody can see them).  One process; ZeRO 0 in fp32, ZeRO 1 in bf16.  Contenders of the
same model share its weights and optimizer.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from diffmoe.bench import measure
from diffmoe.bench.contenders import TextbookLoop
from diffmoe.bench.options import bench_parser, sized_config
from diffmoe.config import Config, override
from diffmoe.deepspeed_json import read_deepspeed
from diffmoe.device import backend, measured_flops
from diffmoe.diffusion.randomness import StepDraws
from diffmoe.errors import UserError
from diffmoe.layout import resolve_layout
from diffmoe.models.compiled import CompiledRun, check_compiler
from diffmoe.models.count import count
from diffmoe.models.dit import run_plainly
from diffmoe.moe.layer import MoELayer, MoEStats
from diffmoe.moe.routing import RoutingRule
from diffmoe.parallel.groups import build_groups
from diffmoe.parallel.recompute import Run, at_once, forms
from diffmoe.parity.plain import build_model, synthetic_batch
from diffmoe.training.ema import Ema
from diffmoe.training.engine import Engine
from diffmoe.training.step import micro_loss, train_step

_BF16 = Path(__file__).resolve().parents[2] / "ds_configs" / "zero1_bf16.json"
# Contender -> (whose weights it trains, activation checkpointing, whether it is compiled).
CONTENDERS = {
    "ours": ("mixture", "none", False),
    "dense": ("dense", "none", False),
    "block": ("mixture", "block", False),
    "selective": ("mixture", "selective", False),
    "compiled": ("mixture", "none", True),
    "compiled-dense": ("dense", "none", True),
    "loop": ("loop", "none", False),
}
# Of a GPU's memory, what micro-batches of ``--samples fit`` may fill: the rest is for the
# allocator's fragments.
_FILLED = 0.85


class _LoopLayer(MoELayer):
    """A mixture layer whose training pass is the textbook loop."""

    def __init__(self, layer: MoELayer, config: Config) -> None:
        nn.Module.__init__(self)
        self.loop, self.thresholds, self.capacity, self.experts_ = (
            TextbookLoop(config.model, config.moe.experts),
            layer.thresholds,
            config.moe.capacity,
            config.moe.experts,
        )

    def forward(
        self, x_BND: Tensor, rule: RoutingRule, run: Run = at_once
    ) -> tuple[Tensor, MoEStats]:
        y, loss, observed = self.loop(x_BND.flatten(0, 1), self.capacity)
        nobody = torch.zeros(x_BND.shape[0], self.experts_, dtype=torch.long, device=y.device)
        return y.view_as(x_BND), MoEStats(nobody, None, None, loss, None, observed)


class Training:
    """A model with engine, EMA and made-up batches, on one rank: ``config`` as it is, under the
    DeepSpeed JSON ``tree``; ``loop`` puts the textbook loop in its mixtures' place.  No weight is
    zero: zeros cost a GPU less power, and so less time.
    """

    def __init__(
        self, config: Config, tree: dict, device: torch.device, loop: bool = False
    ) -> None:
        self.config, self.device, self.groups, self.steps = config, device, build_groups(1, 1), 0
        self.model = build_model(self.config, resolve_layout(self.config, 1).pool, self.groups)
        if loop:
            for _, layer in list(self.model.moe_layers()):
                block = next(b for b in self.model.blocks if b.mlp is layer)
                block.mlp = _LoopLayer(layer, self.config)
        self.model.to(device)
        self.engine = Engine(
            self.model, self.config, resolve_layout(self.config, 1), tree, self.groups, device
        )
        self.ema = Ema(self.engine, self.config.train.ema_decays)
        self.take(self.config)

    def take(self, config: Config) -> None:
        """From now on the batch and micro-batch of ``config``."""
        self.config = dataclasses.replace(self.config, train=config.train)
        self.layout = resolve_layout(self.config, 1)
        for _, layer in self.model.moe_layers():
            layer.pool = self.layout.pool
        numbers = np.arange(self.layout.batch).reshape(
            self.layout.accumulation, self.layout.micro_batch
        )
        self.batches = [synthetic_batch(self.config, row.tolist()) for row in numbers]
        self.draws = StepDraws(
            self.config.run.seed, lambda _: numbers, tuple(self.batches[0].x.shape[1:])
        )

    def step(self) -> None:
        train_step(
            self.engine,
            self.ema,
            self.batches,
            self.config,
            self.layout,
            self.groups,
            self.steps,
            draws=self.draws.of(self.steps),
        )
        self.steps += 1

    def backward_only(self) -> None:
        """Forward and backward of a micro-batch, without the optimizer."""
        rule = RoutingRule("train", self.config.moe.capacity)
        micro_loss(self.model, self.batches[0], self.config, rule, self.device).total.backward()


class Contender:
    """One way to run a training: how blocks are recomputed and whether they are compiled."""

    def __init__(self, training: Training, form: str, compiled: bool) -> None:
        self.training, self.compiled = training, compiled
        self._recompute = forms(form, training.config.model.depth)
        self._run = CompiledRun(training.config.moe.capacity) if compiled else run_plainly

    def _put(self) -> None:
        self.training.model.recompute, self.training.model.run = self._recompute, self._run

    def step(self) -> None:
        self._put()
        self.training.step()

    def peak_bytes(self) -> int | None:
        if self.compiled and self.training.device.type == "cpu":
            return None
        self._put()
        peak = measure.peak_bytes(
            self.training.backward_only, [self.training.model], self.training.device
        )
        self.training.model.zero_grad(set_to_none=True)
        return peak


def main(arguments: list[str]) -> int:
    """The kind ``step``; returns the exit code."""
    parser = bench_parser("step", "A whole optimizer step beside the dense model's.", profile=True)
    parser.add_argument(
        "--samples",
        type=_samples,
        default=32,
        help="samples of a micro-batch (default 32); fit: as many as a GPU's memory allows",
    )
    parser.add_argument(
        "--accumulation", type=int, default=1, help="micro-batches of a step (default 1)"
    )
    parser.add_argument(
        "--recompute", action="store_true", help="also with block and selective recompute"
    )
    parser.add_argument("--compile", action="store_true", help="also compiled, and dense compiled")
    parser.add_argument("--loop", action="store_true", help="also with the textbook loop")
    options = parser.parse_args(arguments)
    config, device, dtype = sized_config(options)
    fit = options.samples == "fit"
    if fit and device.type == "cpu":
        raise UserError("--samples (fit) needs a GPU; on a CPU give a number")
    if not fit and options.samples < 1:
        raise UserError(f"--samples ({options.samples}) must be at least 1")
    if options.accumulation < 1:
        raise UserError(f"--accumulation ({options.accumulation}) must be at least 1")
    if options.compile:
        check_compiler(device)
    names = (
        ["ours", "dense"]
        + ["block", "selective"] * options.recompute
        + ["compiled", "compiled-dense"] * options.compile
        + ["loop"] * options.loop
    )
    if not dist.is_initialized():
        store = Path(tempfile.mkdtemp(prefix="diffmoe-bench-")) / "store"
        dist.init_process_group(
            backend(device), init_method=f"file://{store}", rank=0, world_size=1
        )
    config = _with_batch(
        override(config, ["moe.pool=rank"]), 1 if fit else options.samples, options.accumulation
    )
    tree = read_deepspeed(_BF16) if dtype == torch.bfloat16 else {}
    trainings = {
        name: Training(
            override(config, [f"model.family={'dense' if name == 'dense' else 'diffmoe'}"]),
            tree,
            device,
            name == "loop",
        )
        for name in dict.fromkeys(CONTENDERS[name][0] for name in names)
    }
    contenders = {
        name: Contender(trainings[CONTENDERS[name][0]], *CONTENDERS[name][1:]) for name in names
    }
    if fit:
        eager = [contender for contender in contenders.values() if not contender.compiled]
        config = _with_batch(
            config, _that_fit(eager, config, options.accumulation, device), options.accumulation
        )
        for training in trainings.values():
            training.take(config)
    samples = config.train.micro_batch
    seconds = measure.interleaved(
        {name: c.step for name, c in contenders.items()}, options.repeats, device
    )
    peaks = {name: c.peak_bytes() for name, c in contenders.items()}
    facts = {
        "model": options.model,
        "experts": config.moe.experts,
        "samples": samples,
        "accumulation": options.accumulation,
        "dtype": options.dtype,
        "repeats": options.repeats,
        **_ratios(seconds, peaks),
        **_utilization(contenders, seconds, device, dtype),
        "seconds": seconds,
        "peak_bytes": peaks,
        **measure.surroundings(device),
    }
    rows = [
        [
            name,
            1e3 * seconds[name],
            seconds[name] / seconds["dense"],
            *(
                ["-", "-"]
                if peaks[name] is None
                else [peaks[name] / 2**20, peaks[name] / peaks["dense"]]
            ),
            facts["mfu"][name],
            facts["images_per_second"][name],
        ]
        for name in names
    ]
    text = measure.table(
        ["step", "ms", "of dense", "peak MiB", "of dense", "of matmul ceiling", "images/s"], rows
    )
    if options.profile:
        facts["profile"], tables = measure.profiles(
            {name: c.step for name, c in contenders.items()}, device
        )
        text += tables
    title = (
        f"step_{options.model}_e{config.moe.experts}_{samples}"
        + "_recompute" * options.recompute
        + "_compile" * options.compile
    )
    return measure.report(
        title,
        facts,
        text,
        {n: 1e3 * s for n, s in seconds.items()},
        "ms, one optimizer step",
        options,
    )


def _samples(text: str) -> int | str:
    return text if text == "fit" else int(text)


def _with_batch(config: Config, samples: int, accumulation: int) -> Config:
    return dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, batch=samples * accumulation, micro_batch=samples),
    )


def _that_fit(
    contenders: list[Contender], config: Config, accumulation: int, device: torch.device
) -> int:
    """The most samples, a power of two, with which every contender's micro-batch fits beside all
    weights and states.
    """

    def needs(samples: int) -> int:
        highest = 0
        for contender in contenders:
            contender.training.take(_with_batch(config, samples, accumulation))
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            contender.step()
            highest = max(highest, torch.cuda.max_memory_allocated(device))
        return highest

    needs(1)  # the first step leaves states behind
    return most_samples(
        needs(4), needs(8), 4, _FILLED * torch.cuda.get_device_properties(device).total_memory
    )


def most_samples(at_few: int, at_twice: int, few: int, room: float) -> int:
    """The most samples, a power of two, whose memory is at most ``room`` bytes where ``few`` take
    ``at_few`` and twice as many ``at_twice``, growing linearly.  UserError where not even one fits.
    """
    each = max(1.0, (at_twice - at_few) / few)
    samples = int((room - at_few) / each + few)
    if samples < 1:
        raise UserError(
            f"--samples (fit): one sample needs {at_few + (1 - few) * each:.3g} bytes, there is room for {room:.3g}"
        )
    return 1 << (samples.bit_length() - 1)


def _ratios(seconds: dict[str, float], peaks: dict[str, int | None]) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "time_over_dense": seconds["ours"] / seconds["dense"],
        "activation_memory_over_dense": peaks["ours"] / peaks["dense"],
    }
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


def _utilization(
    contenders: dict[str, Contender],
    seconds: dict[str, float],
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Images a second, and each model's own arithmetic (6 x MACs, recompute not counted) as a share
    of the measured ceiling.
    """
    ceiling = measured_flops(device, dtype, *((8192, 20) if device.type == "cuda" else (1024, 50)))
    images = {name: c.training.layout.batch / seconds[name] for name, c in contenders.items()}
    share = {
        name: 6
        * count(c.training.config.model, c.training.config.moe).forward_macs
        * images[name]
        / ceiling
        for name, c in contenders.items()
    }
    return {"matmul_ceiling_flops": ceiling, "mfu": share, "images_per_second": images}
