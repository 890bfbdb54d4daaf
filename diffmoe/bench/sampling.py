"""``run.py bench sampling``: one pass of a sampler at capacity 1.0 and at others, per-token
routing.

The weights are random and alive; thresholds come from the capacity dial, whose histograms are
filled by a pass over the same samples, so that ragged counts are what they are called.
``experts``: the experts that a token really met.  ``MoE``: time inside the MoE layers;
``pass``: the whole model.  Interleaved medians.
"""

from __future__ import annotations

import statistics
import time
from functools import partial

import torch

from diffmoe.bench import measure
from diffmoe.bench.options import bench_parser, sized_config
from diffmoe.device import synchronize
from diffmoe.errors import UserError
from diffmoe.models.dit import DiT
from diffmoe.moe.capacity import histogram
from diffmoe.moe.routing import RoutingRule
from diffmoe.parallel.groups import single_process
from diffmoe.parity.plain import build_model

CAPACITIES = (1.0, 0.7)


class _Clock:
    """Seconds inside the MoE layers of one model, while it is entered: the device is waited for
    around each.
    """

    def __init__(self, model: DiT, device: torch.device) -> None:
        self.model, self.device, self.start, self.seconds = model, device, 0.0, 0.0

    def __enter__(self) -> _Clock:
        self._hooks = [
            hook
            for _, layer in self.model.moe_layers()
            for hook in (
                layer.register_forward_pre_hook(lambda *_: self._now("start")),
                layer.register_forward_hook(lambda *_: self._now("stop")),
            )
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _now(self, what: str) -> None:
        synchronize(self.device)
        if what == "start":
            self.start = time.perf_counter()
        else:
            self.seconds += time.perf_counter() - self.start


def main(arguments: list[str]) -> int:
    """The kind ``sampling``; returns the exit code."""
    parser = bench_parser(
        "sampling", "A sampler's pass at capacity 1.0 and lower, per-token routing.", profile=True
    )
    parser.add_argument("--samples", type=int, default=16, help="images a pass (default 16)")
    parser.add_argument(
        "--capacities",
        type=float,
        nargs="+",
        default=CAPACITIES,
        help="default 1.0 0.7; the first is the base",
    )
    options = parser.parse_args(arguments)
    config, device, dtype = sized_config(options)
    if options.samples < 1 or not all(0 < c <= config.moe.experts for c in options.capacities):
        raise UserError(
            f"--samples ({options.samples}) and --capacities ({options.capacities}) must be above "
            f"0, capacities at most the experts ({config.moe.experts})"
        )
    model = build_model(config, options.samples, single_process()).to(device, dtype).eval()
    for _, layer in model.moe_layers():
        layer.thresholds.float()  # as in training
    generator = torch.Generator().manual_seed(0)
    side = config.model.input_size
    shape = (options.samples, config.model.channels, side, side)
    x = torch.randn(shape, generator=generator).to(device)
    t = torch.rand(options.samples, generator=generator).to(device)
    y = torch.arange(options.samples, device=device) % config.model.classes
    with torch.no_grad():
        reports = model(x, t, y, RoutingRule("train", 1.0)).moe
        for (_, layer), stats in zip(model.moe_layers(), reports, strict=True):
            layer.thresholds.commit_histogram(histogram(stats.logits_TE, options.samples), 0)
        rules = {f"{c:g}": RoutingRule("token", dial=c) for c in options.capacities}
        passes = {name: partial(model, x, t, y, rule) for name, rule in rules.items()}
        met = {
            name: statistics.mean(r.mask_TE.sum(1).float().mean().item() for r in pass_().moe)
            for name, pass_ in passes.items()
        }
        whole = measure.interleaved(passes, options.repeats, device)
        inside: dict[str, list[float]] = {name: [] for name in passes}
        with _Clock(model, device) as clock:
            for name in [*passes] * options.repeats:
                clock.seconds = 0.0
                passes[name]()
                inside[name].append(clock.seconds)
        profiles, tables = measure.profiles(passes, device) if options.profile else ({}, "")
    inside_moe = {name: statistics.median(values) for name, values in inside.items()}
    base = f"{options.capacities[0]:g}"
    rows = []
    for name, seconds in whole.items():
        row = [name, met[name], 1e3 * inside_moe[name], inside_moe[name] / inside_moe[base]]
        rows.append([*row, 1e3 * seconds, seconds / whole[base]])
    head = ["capacity", "experts", "MoE ms", f"of {base}", "pass ms", f"of {base}"]
    text = measure.table(head, rows) + tables
    facts = {
        "model": options.model,
        "experts": config.moe.experts,
        "samples": options.samples,
        "dtype": options.dtype,
        "repeats": options.repeats,
        "mixtures_over_first": {n: s / inside_moe[base] for n, s in inside_moe.items()},
        "pass_over_first": {n: s / whole[base] for n, s in whole.items()},
        "experts_met": met,
        "mixtures_seconds": inside_moe,
        "pass_seconds": whole,
        "images_per_second": {n: options.samples / s for n, s in whole.items()},
        **({"profile": profiles} if profiles else {}),
        **measure.surroundings(device),
    }
    bars = {f"capacity {name}": 1e3 * s for name, s in inside_moe.items()}
    return measure.report(
        f"sampling_{options.model}_e{config.moe.experts}_{options.samples}",
        facts,
        text,
        bars,
        "ms in the MoE layers, one pass",
        options,
    )
