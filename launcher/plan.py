"""``launcher plan``: whether a run fits a cluster, what a step costs, and which layouts are best.
No torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from diffmoe.config import Config, load_config
from diffmoe.cost.hardware import write_entry
from diffmoe.cost.hosts import hosts_of, spanned, spanning
from diffmoe.cost.layouts import (
    GIB,
    MOST_NODES,
    RECOMPUTE,
    Candidate,
    Cluster,
    Nearest,
    Pins,
    candidates,
    evaluate,
    fewer_nodes,
    fixed_pool,
    largest_parts,
    nearest_fit,
    node_counts,
    reasons,
)
from diffmoe.cost.traffic import least_traffic, step_traffic
from diffmoe.deepspeed_json import check_deepspeed, merge_deepspeed, precision, read_deepspeed
from diffmoe.errors import UserError
from diffmoe.models.count import count
from launcher.command_line import Parser
from launcher.hardware_options import add_hardware_options, hardware_of

_EXAMPLE = """
python -m launcher plan --config configs/diffmoe_xl_e16_flow.yaml --deepspeed_config ds_configs/zero1_bf16.json --gpu h100 --nodes 2
python -m launcher plan --config configs/diffmoe_xl_e16_flow.yaml --gpu a100 --nodes 1 --memory 40 --ep 1 --recompute none
"""


def main(arguments: list[str]) -> int:
    """Returns 0, or 1 when nothing fits as asked (the nearest layout that would is printed).
    UserError for bad input.
    """
    options = _parse(arguments)
    hardware = hardware_of(options)
    cluster = Cluster(options.nodes, options.gpus_per_node or hardware.gpus_per_node, hardware)
    config, tree = (
        load_config(options.config, options.overrides),
        read_deepspeed(options.deepspeed_config),
    )
    check_deepspeed(tree, config)
    if config.train.batch < cluster.ranks:
        raise UserError(
            f"train.batch ({config.train.batch}) must be at least one sample for each of {cluster.ranks} GPUs"
        )
    configured, problem = _as_configured(config, tree, cluster)
    config = fixed_pool(config, cluster.ranks) if configured else config
    pins = Pins(options.ep, options.zero, options.recompute, options.micro_batch)
    found = candidates(config, tree, cluster, pins)
    fitting = [c for c in found if c.fits]
    nearest = None if fitting else nearest_fit(config, tree, cluster, pins)
    steps = options.steps or config.train.steps
    print(
        _report(
            config,
            tree,
            cluster,
            configured,
            problem,
            found[: options.top],
            len(found),
            len(fitting),
            steps,
        )
    )
    note = fewer_nodes(config, tree, cluster, fitting[0].time.total, pins) if fitting else None
    if note:
        print(f"\nnote: {note}")
    if not fitting:
        divides = found or any(
            candidates(config, tree, dataclasses.replace(cluster, nodes=nodes))
            for nodes in node_counts(config, cluster, MOST_NODES)
        )
        print(_nothing_fits(found, nearest, cluster, bool(divides)))
    if options.json:
        _write_json(options.json, config, cluster, configured, found, nearest)
    if options.write_hardware:
        write_entry(options.write_hardware, options.gpu, hardware)
    return 0 if fitting else 1


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(
        "plan",
        "Whether a configuration fits a cluster: memory, traffic and time of every layout, best first.",
        _EXAMPLE,
    )
    parser.add_argument("--config", required=True, help="YAML file, see configs/")
    parser.add_argument(
        "--deepspeed_config",
        help="DeepSpeed JSON, see ds_configs/ (default: ZeRO 1, fp32); its stage is tried too",
    )
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus-per-node", type=int, help="default: as the hardware table says")
    add_hardware_options(parser)
    parser.add_argument(
        "--ep", type=int, help="only this expert-parallel size (default: every one)"
    )
    parser.add_argument("--zero", type=int, choices=range(4), help="only this ZeRO stage")
    parser.add_argument("--recompute", choices=RECOMPUTE, help="only this recompute mode")
    parser.add_argument("--micro-batch", type=int, help="only this many samples a GPU and pass")
    parser.add_argument("--steps", type=int, help="optimizer steps to price (default: train.steps)")
    parser.add_argument("--top", type=int, default=8, help="layouts to print")
    parser.add_argument(
        "--json", type=Path, help="also write every layout with all its numbers here"
    )
    parser.add_argument(
        "--write-hardware", type=Path, help="put the (calibrated) entry of --gpu into this table"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    options = parser.parse_intermixed_args(arguments)
    for name in ("nodes", "gpus_per_node", "ep", "micro_batch", "steps", "top", "memory"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} ({value}) must be above 0")
    return options


def _as_configured(config: Config, tree: dict, cluster: Cluster) -> tuple[Candidate | None, str]:
    try:
        candidate = evaluate(config, tree, cluster)
        merge_deepspeed(tree, config, candidate.layout)
        return candidate, ""
    except UserError as error:
        return None, str(error)


# -----------------------------------------------------------------------------------------------------
# text


def _report(
    config: Config,
    tree: dict,
    cluster: Cluster,
    configured: Candidate | None,
    problem: str,
    shown: list[Candidate],
    tried: int,
    fitting: int,
    steps: int,
) -> str:
    hardware, counts = cluster.hardware, count(config.model, config.moe)
    lines = [
        f"model      {config.model.family} {config.model.depth} x {config.model.width}, {counts.total / 1e6:.1f} M parameters, "
        f"{counts.activated / 1e6:.1f} M activated, {precision(tree)}",
        f"cluster    {cluster.nodes} x {cluster.per_node} {hardware.name}; {hardware.usable_bytes / GIB:.1f} of "
        f"{hardware.memory_gib:g} GiB for tensors",
        f"figures    {'assumed shares of data-sheet peaks' if hardware.calibrated is None else 'from ' + hardware.calibrated}",
    ]
    if configured is None:
        lines.append(f"configured does not resolve: {problem}")
    else:
        across = spanning(
            config, configured.layout, tree, hardware, hosts_of(cluster.ranks, cluster.per_node)
        )
        lines += [
            "",
            f"as configured: {configured.label}: {'fits' if configured.fits else 'does NOT fit'}",
            *details(configured, steps),
            *([f"  hosts    {across}"] if across else []),
        ]
    lines += [
        "",
        f"layouts    {tried} keep batch {config.train.batch} and pool {config.moe.pool}; {fitting} fit",
    ]
    if shown:
        lines += ["", *_table(shown, steps, cluster.per_node)]
    return "\n".join(lines)


def details(candidate: Candidate, steps: int) -> list[str]:
    """Memory, traffic and time of one layout, a line or a few each."""
    memory, time = candidate.memory.table(), candidate.time
    traffic = step_traffic(candidate.config, candidate.layout, candidate.engine)
    least = least_traffic(candidate.config, candidate.layout, candidate.engine)
    exchanged = sum(m.wire for m in traffic if m.collective == "all_to_all")
    reduced = sum(m.wire for m in traffic if m.purpose in ("gradients", "parameters"))
    shared = sum(m.wire for m in traffic if m.purpose == "owners")
    parts = ", ".join(
        f"{name.replace('_', ' ')} {value / GIB:.2f}"
        for name, value in memory.items()
        if value and name not in ("static", "peak")
    )
    over = f"{exchanged / least.rows:.3f} of the lower bound" if least.rows else "none needed"
    days = steps * time.total / 86400
    return [
        f"  memory   {memory['peak'] / GIB:.2f} GiB a rank at most, {memory['static'] / GIB:.2f} between steps: {parts}",
        f"  traffic  {sum(m.messages for m in traffic)} messages a rank and step; all-to-all {_mib(exchanged)} ({over}), pool owners "
        f"{_mib(shared)}, gradients and weights {_mib(reduced)} (least {_mib(least.reduction)})",
        f"  time     {1e3 * time.total:.1f} ms a step: compute {1e3 * time.compute:.1f}, launching {1e3 * time.host:.1f}, all-to-all "
        f"{1e3 * time.all_to_all:.1f}, reduction {1e3 * time.reduction:.1f} (latency {1e3 * time.latency:.1f} of the last two)",
        f"  run      {candidate.images_per_s:.0f} images/s; {steps} steps: {days:.2f} days, {24 * days * candidate.layout.ranks:.0f} "
        "GPU-hours",
    ]


def _mib(value: float) -> str:
    return f"{value / 2**20:.1f} MiB"


def _table(shown: list[Candidate], steps: int, per_node: int) -> list[str]:
    best = shown[0]
    lines = [
        f"{'':>3} {'EP':>3} {'hosts':>5} {'ZeRO':>4} {'recompute':9} {'micro':>5} {'acc':>4} {'GiB':>7} "
        f"{'ms/step':>8} {'images/s':>8} {'GPU-hours':>9}  why"
    ]
    for place, c in enumerate(shown, 1):
        hours = steps * c.time.total / 3600 * c.layout.ranks
        hosts, _ = spanned(hosts_of(c.layout.ranks, per_node), c.layout.ep)
        lines.append(
            f"{place if c.fits else '-':>3} {c.layout.ep:>3} {hosts:>5} {c.engine.stage:>4} "
            f"{c.config.parallel.recompute:9} {c.layout.micro_batch:>5} {c.layout.accumulation:>4} "
            f"{c.memory.peak / GIB:>7.2f} {1e3 * c.time.total:>8.1f} "
            f"{c.images_per_s:>8.0f} {hours:>9.0f}  {reasons(c, best)}"
        )
    return lines


def _nothing_fits(
    found: list[Candidate], nearest: Nearest | None, cluster: Cluster, divides: bool
) -> str:
    """``divides``: there are layouts, if not as asked or on as few nodes."""
    usable = cluster.hardware.usable_bytes / GIB
    if found:
        smallest = found[0]
        lines = [
            f"\nnothing fits: the smallest layout asked for needs {smallest.memory.peak / GIB:.2f} of {usable:.2f} GiB "
            f"({largest_parts(smallest.memory)})"
        ]
    else:
        lines = ["\nnothing fits: no layout as asked divides experts, batch and pool evenly"]
    if nearest is None:
        needed = (
            "a GPU with more memory is needed"
            if divides
            else "train.batch, moe.pool or moe.experts must change"
        )
        return "\n".join(lines + [f"no layout on up to {MOST_NODES} nodes fits either: {needed}"])
    c = nearest.candidate
    return "\n".join(
        lines
        + [
            f"nearest that fits: {c.label} on {nearest.cluster.nodes} x {nearest.cluster.per_node} GPUs, {c.memory.peak / GIB:.2f} GiB, "
            f"{1e3 * c.time.total:.1f} ms a step",
            f"what to change: {', '.join(nearest.changes) or 'nothing but the configuration, to this layout'}",
        ]
    )


# -----------------------------------------------------------------------------------------------------
# JSON


def _write_json(
    path: Path,
    config: Config,
    cluster: Cluster,
    configured: Candidate | None,
    found: list[Candidate],
    nearest: Nearest | None,
) -> None:
    tree = {
        "cluster": {**dataclasses.asdict(cluster), "ranks": cluster.ranks},
        "parameters": dataclasses.asdict(count(config.model, config.moe)),
        "configured": configured and configured.table(),
        "layouts": [c.table() for c in found],
        "nearest": nearest
        and {
            **nearest.candidate.table(),
            "nodes": nearest.cluster.nodes,
            "changes": nearest.changes,
        },
    }
    try:
        path.write_text(json.dumps(tree, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--json ({path}) cannot be written: {error}") from None
