"""``launcher plan``: does a run fit, what does a step cost, which layouts are best?  No torch."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
from pathlib import Path

from diffmoe.config import Config
from diffmoe.cost.extrapolation import (
    MOST_NODES,
    Nearest,
    fewer_nodes,
    hosts_of,
    larger_batches,
    nearest_fit,
    node_counts,
    spanned,
    spanning,
)
from diffmoe.cost.hardware import write_entry
from diffmoe.cost.layouts import (
    GIB,
    Candidate,
    Cluster,
    candidates,
    evaluate,
    fixed_pool,
    largest_parts,
    reasons,
)
from diffmoe.cost.traffic import least_traffic, step_traffic
from diffmoe.deepspeed_json import merge_deepspeed, precision
from diffmoe.errors import UserError
from diffmoe.models.count import count
from launcher.command_line import (
    Parser,
    add_planner_options,
    check_above_0,
    read_planner_options,
    write_text,
)

_OFFLOADS = "  offload  the optimizer is on the host: its copies and Adam there are not in the time"
_EXAMPLE = """
python -m launcher plan --config configs/diffmoe_xl_e16_flow.yaml --gpu h100 --nodes 2
python -m launcher plan --config configs/demo.yaml --gpu a100 --memory 40 --ep 1 --recompute none
"""


def main(arguments: list[str]) -> int:
    """Returns 1 when nothing fits as asked (the nearest is printed).  UserError: bad input."""
    options = _parse(arguments)
    config, tree, hardware, per_node, pins = read_planner_options(options)
    cluster = Cluster(options.nodes, per_node, hardware)
    if config.train.batch < cluster.ranks:
        raise UserError(
            f"train.batch ({config.train.batch}) must be at least one sample for each of "
            f"{cluster.ranks} GPUs"
        )
    steps, configured = options.steps or config.train.steps, None
    lines = _head(config, tree, cluster)
    try:
        configured = evaluate(config, tree, cluster)
        merge_deepspeed(tree, config, configured.layout)
        lines += _configured(configured, tree, cluster, steps)
    except UserError as error:
        configured = None
        lines.append(f"configured does not resolve: {error}")
    with contextlib.suppress(UserError):  # then no layout is found either
        config = fixed_pool(config, cluster.ranks)
    found = candidates(config, tree, cluster, pins)
    fitting = [c for c in found if c.fits]
    kept = f"{len(found)} keep batch {config.train.batch} and pool {config.moe.pool}"
    lines += ["", f"layouts    {kept}; {len(fitting)} fit"]
    if found:
        lines += ["", *_table(found[: options.top], steps, per_node)]
    nearest = None
    if fitting:
        note = fewer_nodes(config, tree, cluster, fitting[0].time.total, pins)
        lines += ["", f"note: {note}"] if note else []
        # As far as they go with the best layout's way to save memory, which takes seconds less.
        alike = dataclasses.replace(
            pins, zero=fitting[0].engine.stage, recompute=fitting[0].recompute
        )
        batches = larger_batches(config, tree, hardware, per_node, alike)
        lines += ["", "scaling while twice the GPUs bring 1.3 times the images/s:", *batches]
    else:
        nearest = nearest_fit(config, tree, cluster, pins)
        lines += ["", *_nothing_fits(config, tree, cluster, found, nearest)]
    print("\n".join(lines))
    if options.json:
        changed = nearest and {"nodes": nearest.cluster.nodes, "changes": nearest.changes}
        answer = {
            "cluster": {**dataclasses.asdict(cluster), "ranks": cluster.ranks},
            "parameters": dataclasses.asdict(count(config.model, config.moe)),
            "configured": configured and configured.table(),
            "layouts": [c.table() for c in found],
            "nearest": nearest and {**nearest.candidate.table(), **(changed or {})},
        }
        write_text("--json", options.json, json.dumps(answer, indent=1) + "\n")
    if options.write_hardware:
        write_entry(options.write_hardware, options.gpu, hardware)
    return 0 if fitting else 1


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(
        "plan",
        "Whether a configuration fits a cluster: memory, traffic and time of every layout, best "
        "first.",
        _EXAMPLE,
    )
    add = parser.add_argument
    add("--nodes", type=int, default=1, help="of the machine that --gpu names")
    add_planner_options(parser)
    add("--steps", type=int, help="optimizer steps to price (default: train.steps)")
    add("--top", type=int, default=8, help="layouts to print")
    add("--write-hardware", type=Path, help="put the (calibrated) entry of --gpu into this table")
    options = parser.parse_intermixed_args(arguments)
    check_above_0(options, "nodes", "steps", "top", "memory")
    return options


def _head(config: Config, tree: dict, cluster: Cluster) -> list[str]:
    hardware, counts = cluster.hardware, count(config.model, config.moe)
    figures = "assumed shares of data-sheet peaks"
    if hardware.calibrated:
        figures = f"from {hardware.calibrated}"
    return [
        f"model      {config.model.family} {config.model.depth} x {config.model.width}, "
        f"{counts.total / 1e6:.1f} M parameters, {counts.activated / 1e6:.1f} M activated, "
        f"{precision(tree)}",
        f"cluster    {cluster.nodes} x {cluster.per_node} {hardware.name}; "
        f"{hardware.usable_bytes / GIB:.1f} of {hardware.memory_gib:g} GiB for tensors",
        f"figures    {figures}",
    ]


def _configured(candidate: Candidate, tree: dict, cluster: Cluster, steps: int) -> list[str]:
    """Memory, traffic and time of the configured layout, a line or a few each."""
    config, layout = candidate.config, candidate.layout
    memory, time = candidate.memory, candidate.time
    traffic = step_traffic(config, layout, candidate.engine)
    least = least_traffic(config, layout, candidate.engine)
    parts = [f"{name} {value / GIB:.2f}" for name, value in memory.parts().items() if value]
    levels = {name: 0 for name in ("ep", "ep across", "ep inside")}
    for m in traffic:
        if m.collective == "all_to_all" and m.group in levels:  # not Muon's momenta
            levels[m.group] += m.wire
    reduced = sum(m.wire for m in traffic if m.purpose in ("gradients", "parameters"))
    shared = sum(m.wire for m in traffic if m.purpose == "owners")
    exchanged = f"all-to-all {_mib(levels['ep'])} (none needed)"
    if layout.per_host:
        exchanged = (
            f"all-to-all {_mib(levels['ep across'])} across hosts "
            f"({levels['ep across'] / least.network:.3f} of the lower bound), "
            f"{_mib(levels['ep inside'])} inside"
        )
    elif least.rows:
        over = levels["ep"] / least.rows
        exchanged = f"all-to-all {_mib(levels['ep'])} ({over:.3f} of the lower bound)"
    phases = [f"{name} {1e3 * seconds:.1f}" for name, seconds in time.phases().items()]
    days = steps * time.total / 86400
    hosts = hosts_of(cluster.ranks, cluster.per_node)
    across = spanning(config, layout, tree, cluster.hardware, hosts)
    return [
        "",
        f"as configured: {candidate.label}: {'fits' if candidate.fits else 'does NOT fit'}",
        f"  memory   {memory.peak / GIB:.2f} GiB a rank at most, {memory.static / GIB:.2f} between "
        f"steps: {', '.join(parts)}",
        f"  traffic  {sum(m.messages for m in traffic)} messages a rank and step; {exchanged}, "
        f"pool owners {_mib(shared)}, gradients and weights {_mib(reduced)} (lower bound "
        f"{_mib(least.reduction)})",
        f"  time     {1e3 * time.total:.1f} ms a step: {', '.join(phases)} (of the last two "
        f"{1e3 * time.hidden:.1f} more are hidden, {1e3 * time.latency:.1f} are latency)",
        f"  run      {candidate.images_per_s:.0f} images/s; {steps} steps: {days:.2f} days, "
        f"{24 * days * layout.ranks:.0f} GPU-hours",
        *([f"  hosts    {across}"] if across else []),
        *([_OFFLOADS] if candidate.engine.state_on_host else []),
    ]


def _mib(value: float) -> str:
    return f"{value / 2**20:.1f} MiB"


def _table(shown: list[Candidate], steps: int, per_node: int) -> list[str]:
    lines = [
        f"{'':>3} {'EP':>3} {'hosts':>5} {'ZeRO':>4} {'recompute':9} {'exchange':9} {'micro':>5} "
        f"{'acc':>4} "
        f"{'GiB':>7} {'ms/step':>8} {'images/s':>8} {'GPU-hours':>9}  why (from 2 on: beside 1)"
    ]
    for place, c in enumerate(shown, 1):
        hours = steps * c.time.total / 3600 * c.layout.ranks
        hosts, _ = spanned(hosts_of(c.layout.ranks, per_node), c.layout.ep)
        lines.append(
            f"{place if c.fits else '-':>3} {c.layout.ep:>3} {hosts:>5} {c.engine.stage:>4} "
            f"{c.recompute:9} {'two_level' if c.layout.per_host else 'direct':9} "
            f"{c.layout.micro_batch:>5} {c.layout.accumulation:>4} "
            f"{c.memory.peak / GIB:>7.2f} {1e3 * c.time.total:>8.1f} "
            f"{c.images_per_s:>8.0f} {hours:>9.0f}  "
            f"{c.forms}{'; ' if c.forms else ''}{reasons(c, shown[0])}"
        )
    return lines


def _nothing_fits(
    config: Config, tree: dict, cluster: Cluster, found: list[Candidate], nearest: Nearest | None
) -> list[str]:
    if found:
        memory, usable = found[0].memory, cluster.hardware.usable_bytes
        first = (
            f"the smallest layout asked for needs {memory.peak / GIB:.2f} of {usable / GIB:.2f} "
            f"GiB ({largest_parts(memory)})"
        )
    else:
        first = "no layout as asked divides experts, batch and pool evenly"
    if nearest:
        c, nodes = nearest.candidate, f"{nearest.cluster.nodes} x {nearest.cluster.per_node}"
        changes = ", ".join(nearest.changes) or "nothing but the configuration, to this layout"
        then = [
            f"nearest that fits: {c.label} on {nodes} GPUs, {c.memory.peak / GIB:.2f} GiB, "
            f"{1e3 * c.time.total:.1f} ms a step",
            f"what to change: {changes}",
        ]
    else:
        larger = (dataclasses.replace(cluster, nodes=n) for n in node_counts(config, cluster))
        needed = "train.batch, moe.pool or moe.experts must change"
        if found or any(candidates(config, tree, each) for each in larger):
            needed = "a GPU with more memory is needed"
        then = [f"no layout on up to {MOST_NODES} nodes fits either: {needed}"]
    return [f"nothing fits: {first}", *then]
