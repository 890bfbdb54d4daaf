"""``run.py bench sampling``: one pass of a sampler at capacity 1.0 and at others, per-token
routing.

The weights are random and alive; thresholds come from the capacity dial, whose histograms are
filled by a pass over the same samples, so that ragged counts are what they are called.
``experts``: the experts that a token really met.  ``MoE``: time inside the MoE layers;
``pass``: the whole model.  Interleaved medians.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator
from functools import partial

import torch

from diffmoe.bench import measure
from diffmoe.bench.options import bench_parser, common_facts, sized_config
from diffmoe.device import synchronize
from diffmoe.errors import UserError
from diffmoe.models.dit import DiT
from diffmoe.moe.capacity import histogram
from diffmoe.moe.routing import RoutingRule
from diffmoe.parallel.groups import single_process
from diffmoe.parity.plain import build_model

CAPACITIES = (1.0, 0.7)


@contextlib.contextmanager
def _clocked(model: DiT, device: torch.device) -> Iterator[list[float]]:
    """When the MoE layers began and ended, in turn: the device is waited for around each."""
    times: list[float] = []

    def note(*_: object) -> None:
        synchronize(device)
        times.append(time.perf_counter())

    with contextlib.ExitStack() as hooks:
        for _, layer in model.moe_layers():
            hooks.callback(layer.register_forward_pre_hook(note).remove)
            hooks.callback(layer.register_forward_hook(note).remove)
        yield times


def main(arguments: list[str]) -> int:
    """The kind ``sampling``; returns the exit code."""
    parser = bench_parser(
        "sampling", "A sampler's pass at capacity 1.0 and lower, per-token routing.", profile=True
    )
    parser.add_argument("--samples", type=int, default=16, help="images a pass (default 16)")
    capacities = "default 1.0 0.7; the first is the base"
    parser.add_argument("--capacities", type=float, nargs="+", default=CAPACITIES, help=capacities)
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
        with _clocked(model, device) as times:
            for name in [*passes] * options.repeats:
                times.clear()
                passes[name]()
                inside[name].append(sum(times[1::2]) - sum(times[::2]))
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
        "samples": options.samples,
        "mixtures_over_first": {n: s / inside_moe[base] for n, s in inside_moe.items()},
        "pass_over_first": {n: s / whole[base] for n, s in whole.items()},
        "experts_met": met,
        "mixtures_seconds": inside_moe,
        "pass_seconds": whole,
        "images_per_second": {n: options.samples / s for n, s in whole.items()},
        **({"profile": profiles} if profiles else {}),
        **common_facts(options, config, device),
    }
    bars = {f"capacity {name}": 1e3 * s for name, s in inside_moe.items()}
    title = f"sampling_{options.model}_e{config.moe.experts}_{options.samples}"
    return measure.report(title, facts, text, bars, "ms in the MoE layers, one pass", options)
