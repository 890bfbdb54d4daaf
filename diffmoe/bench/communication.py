"""``run.py bench communication``: the collectives of one mixture layer's training pass over local
ranks.

For every (ranks, EP, pool): calls, bytes that a rank hands in, and seconds from the call until the
result is there, in forward and backward, medians over repeats, largest rank.  CPU ranks (gloo)
compute on one thread each; with GPUs, one a rank (NCCL).
"""

from __future__ import annotations

import statistics
import time
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from diffmoe.bench import measure
from diffmoe.bench.moe_layer import RULE, training_pass
from diffmoe.bench.options import bench_parser, sized_config
from diffmoe.config import Config, override
from diffmoe.device import local_device, set_fp32_precision, synchronize
from diffmoe.errors import UserError
from diffmoe.layout import resolve_layout
from diffmoe.moe.layer import MoELayer
from diffmoe.parallel.groups import build_groups
from diffmoe.parallel.spawn import Ranks

POOLS = ("rank", "group", "global")


class _Collectives(TorchDispatchMode):
    """Calls, bytes and seconds of torch's functional collectives, by name."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.found = device, {}
        self._name = ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "_c10d_functional" or "_wrap" in func.name():
            return func(*args, **(kwargs or {}))
        waiting = "wait_tensor" in func.name()
        if not waiting:
            self._name = func.name().rpartition("::")[2]
        synchronize(self.device)
        start = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        synchronize(self.device)
        calls, size, seconds = self.found.get(self._name, (0, 0, 0.0))
        self.found[self._name] = (
            calls + (not waiting),
            size + (0 if waiting else args[0].nbytes),
            seconds + time.perf_counter() - start,
        )
        return out


def one_rank(
    config: Config, ep: int, samples: int, repeats: int, device_type: str
) -> dict[str, Any]:
    """A rank's median seconds of the pass, and calls, bytes and median seconds by collective."""
    layout = resolve_layout(config, dist.get_world_size())
    device = torch.device(device_type)
    set_fp32_precision(config.run.fp32_precision)
    layer = MoELayer(config.model, config.moe, layout.pool, build_groups(ep, layout.pool_ranks)).to(
        device
    )
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.02)
    x, dy = (
        torch.randn(samples, config.model.tokens, config.model.width, device=device)
        for _ in range(2)
    )
    x.requires_grad_()

    def forward() -> tuple[Tensor, list[Tensor]]:
        y, stats = layer(x, RULE)
        return y, [stats.predictor_loss]

    step = partial(training_pass, layer, forward, x, dy)
    plain = measure.interleaved({"pass": step}, repeats, device)["pass"]
    rounds = []
    for _ in range(repeats):
        with _Collectives(device) as seen:
            step()
        rounds.append(seen.found)
    return {
        "seconds": plain,
        "collectives": {
            name: (calls, size, statistics.median(r[name][2] for r in rounds))
            for name, (calls, size, _) in rounds[-1].items()
        },
    }


def main(arguments: list[str]) -> int:
    """The kind ``communication``; returns the exit code."""
    parser = bench_parser(
        "communication", "Collectives of one mixture layer's training pass over local ranks."
    )
    parser.add_argument("--samples", type=int, default=4, help="samples a rank (default 4)")
    parser.add_argument("--worlds", default="2,4", help="numbers of ranks (default 2,4)")
    options = parser.parse_args(arguments)
    config, device, dtype = sized_config(options)
    if dtype != torch.float32:
        raise UserError(f"--dtype ({options.dtype}) must be fp32 here")
    worlds = [int(w) for w in options.worlds.split(",") if w.isdigit()]
    if not worlds or min(worlds) < 1 or options.samples < 1:
        raise UserError(
            f"--worlds ({options.worlds}) must be numbers by commas and --samples ({options.samples}) at least 1"
        )
    for rank in range(max(worlds) if device.type == "cuda" else 0):
        local_device(rank, max(worlds))  # before a rank is started
    rows, cases = [], []
    for world in worlds:
        with Ranks(world, timeout=600, device=device.type) as ranks:
            for ep in sorted({1, 2, world} & {e for e in range(1, world + 1) if world % e == 0}):
                for pool in POOLS:
                    case = override(
                        config,
                        [
                            f"moe.pool={pool}",
                            f"parallel.ep={ep}",
                            f"train.batch={options.samples * world}",
                        ],
                    )
                    found = ranks.run(
                        one_rank, case, ep, options.samples, options.repeats, device.type
                    )
                    cases.append(_case(world, ep, pool, found))
    for case in cases:
        rows += [
            [
                case["ranks"],
                case["ep"],
                case["pool"],
                1e3 * case["seconds"],
                name,
                calls,
                size / 2**20,
                1e3 * seconds,
            ]
            for name, (calls, size, seconds) in case["collectives"].items()
            or {"none": (0, 0, 0.0)}.items()
        ]
    text = measure.table(
        ["ranks", "EP", "pool", "pass ms", "collective", "calls", "MiB", "ms"], rows
    )
    facts = {
        "model": options.model,
        "experts": config.moe.experts,
        "samples": options.samples,
        "repeats": options.repeats,
        "cases": cases,
        **measure.surroundings(device),
    }
    bars = {
        f"{c['ranks']} ranks, EP {c['ep']}, pool {c['pool']}": 1e3
        * sum(s for _, _, s in c["collectives"].values())
        for c in cases
    }
    return measure.report(
        f"communication_{options.model}_e{config.moe.experts}",
        facts,
        text,
        bars,
        "ms in collectives",
        options,
    )


def _case(world: int, ep: int, pool: str, found: list[dict]) -> dict[str, Any]:
    """One row of the record: the slowest rank's times; calls and bytes are those of rank 0, which
    has as many as any.
    """
    collectives = {
        name: (calls, size, max(rank["collectives"][name][2] for rank in found))
        for name, (calls, size, _) in found[0]["collectives"].items()
    }
    return {
        "ranks": world,
        "ep": ep,
        "pool": pool,
        "seconds": max(rank["seconds"] for rank in found),
        "collectives": collectives,
    }
