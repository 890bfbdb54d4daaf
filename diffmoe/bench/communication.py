"""``run.py bench communication``: the collectives of one MoE layer's training pass over local
ranks.

For every (ranks, EP, pool), with ``--per-host`` also over two levels: calls, bytes that a rank
hands in, and seconds from the call until the result is there, in forward and backward, medians over
repeats, largest rank.  CPU ranks (gloo) compute on one thread each; with GPUs, one a rank (NCCL).
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
from diffmoe.bench.options import bench_parser, common_facts, count, sized_config
from diffmoe.config import Config, override
from diffmoe.device import local_device, set_fp32_precision, synchronize
from diffmoe.errors import UserError
from diffmoe.layout import resolve_layout
from diffmoe.moe.layer import MoELayer
from diffmoe.parallel.groups import build_groups
from diffmoe.parallel.spawn import Ranks


class _Collectives(TorchDispatchMode):
    """Calls, bytes and seconds of torch's functional collectives, by name."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self._name = device, ""
        self.found: dict[str, tuple[int, int, float]] = {}

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
        seconds += time.perf_counter() - start
        new = (0, 0) if waiting else (1, args[0].nbytes)
        self.found[self._name] = (calls + new[0], size + new[1], seconds)
        return out


def one_rank(
    config: Config, ep: int, per_host: int, samples: int, repeats: int, device_type: str
) -> dict[str, Any]:
    """A rank's median seconds of the pass, and calls, bytes and median seconds by collective."""
    layout = resolve_layout(config, dist.get_world_size())
    device = torch.device(device_type)
    groups = build_groups(ep, layout.pool_ranks, per_host=per_host)
    set_fp32_precision(config.run.fp32_precision)
    layer = MoELayer(config.model, config.moe, layout.pool, groups).to(device)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.02)
    shape = samples, config.model.tokens, config.model.width
    x, dy = (torch.randn(shape, device=device) for _ in range(2))
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
    collectives = {
        name: (calls, size, statistics.median(each[name][2] for each in rounds))
        for name, (calls, size, _) in rounds[-1].items()
    }
    return {"seconds": plain, "collectives": collectives}


def _spans(ep: int, per_host: int) -> bool:
    """Whether EP groups have two levels on such hosts."""
    return 2 <= per_host < ep and ep % per_host == 0


def main(arguments: list[str]) -> int:
    """The kind ``communication``; returns the exit code.  UserError for bad input."""
    parser = bench_parser(
        "communication", "Collectives of one MoE layer's training pass over local ranks."
    )
    parser.add_argument("--samples", type=count, default=4, help="samples a rank (default 4)")
    parser.add_argument("--worlds", default="2,4", help="numbers of ranks (default 2,4)")
    help = "also exchange over two levels, as if so many ranks were a host (default 0: no)"
    parser.add_argument("--per-host", type=int, default=0, help=help)
    options = parser.parse_args(arguments)
    config, device, dtype = sized_config(options)
    if dtype != torch.float32:
        raise UserError(f"--dtype ({options.dtype}) must be fp32 here")
    worlds = [int(w) if w.isdigit() else 0 for w in options.worlds.split(",")]
    if min(worlds) < 1:
        raise UserError(f"--worlds ({options.worlds}) must be whole numbers above 0, by commas")
    if options.per_host and not any(_spans(world, options.per_host) for world in worlds):
        raise UserError(
            f"--per-host ({options.per_host}) must be 2 or more and one of --worlds "
            f"({options.worlds}) a larger multiple of it"
        )
    for rank in range(max(worlds) if device.type == "cuda" else 0):
        local_device(rank, max(worlds))  # before a rank is started
    rows, cases, bars = [], [], {}
    for world in worlds:
        layouts = [
            (ep, pool, per_host)
            for ep in sorted({1, 2, world})
            if world % ep == 0
            for pool in ("rank", "group", "global")
            for per_host in (0, options.per_host)[: 1 + _spans(ep, options.per_host)]
        ]
        with Ranks(world, timeout=600, device=device.type) as ranks:
            for ep, pool, per_host in layouts:
                batch = options.samples * world
                case = override(
                    config, [f"moe.pool={pool}", f"parallel.ep={ep}", f"train.batch={batch}"]
                )
                how = options.samples, options.repeats, device.type
                found = ranks.run(one_rank, case, ep, per_host, *how)
                seconds = max(rank["seconds"] for rank in found)
                # Calls and bytes of rank 0, which has as many as any.
                collectives = {
                    name: (calls, size, max(rank["collectives"][name][2] for rank in found))
                    for name, (calls, size, _) in found[0]["collectives"].items()
                }
                form = "two_level" if per_host else "direct"
                place: dict[str, Any] = {"ranks": world, "ep": ep, "pool": pool, "exchange": form}
                cases.append({**place, "seconds": seconds, "collectives": collectives})
                total = sum(s for _, _, s in collectives.values())
                two = " over two levels" if per_host else ""
                bars[f"{world} ranks, EP {ep}{two}, pool {pool}"] = 1e3 * total
                for name, (calls, size, s) in (collectives or {"none": (0, 0, 0.0)}).items():
                    took = [name, calls, size / 2**20, 1e3 * s]
                    rows.append([*place.values(), 1e3 * seconds, *took])
    head = ["ranks", "EP", "pool", "exchange", "pass ms", "collective", "calls", "MiB", "ms"]
    facts = {"samples": options.samples, "cases": cases, **common_facts(options, config, device)}
    title = f"communication_{options.model}_e{config.moe.experts}"
    text = measure.table(head, rows)
    return measure.report(title, facts, text, bars, "ms in collectives", options)
