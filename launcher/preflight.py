"""``launcher preflight``: are these nodes fit for this run?  Under srun, torchrun, deepspeed or
alone; seconds, not minutes.

Every rank measures (``launcher/probe.py``), rank 0 judges and prints, and all return the same exit
code.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffmoe import gpus
from diffmoe.deepspeed_json import read_deepspeed
from diffmoe.environment import (
    RankEnvironment,
    check_started,
    detect,
    host_name,
    typed_at_a_terminal,
)
from diffmoe.errors import UserError
from diffmoe.placement import place
from launcher import probe
from launcher.command_line import Parser, check_above_0
from launcher.probe import OVER_HOSTS, Absent, Exchange, Links, Report

if TYPE_CHECKING:
    import torch

    from diffmoe.config import Config

CLOCK_TOLERANCE = 1.0  # seconds
# A link below this share of what is expected is slow: expected is what the command line says, else
# what the better quarter of the links reach (half of all links are slow when a quarter of the nodes
# are).
SLOW = {"told": 0.5, "cuda": 0.4, "cpu": 0.1}
SLOW_GPU = 0.8
_ENOUGH = 3  # links or GPUs that it takes to compare them with each other
# fp32 weights, EMA and both Adam moments of a parameter, in bytes, and a tenth.
_CHECKPOINT_BYTES = 1.1 * 16


@dataclass(frozen=True)
class Problem:
    """Something wrong, and the hosts to leave out for it (none: nobody knows which)."""

    hosts: tuple[str, ...]
    text: str


@dataclass(frozen=True)
class Expected:
    """GB/s to a rank of another node, and of one's own; None: compared with each other."""

    between_nodes: float | None = None
    within_nodes: float | None = None


def judge(reports: list[Report], links: Links, expected: Expected, kind: str) -> list[Problem]:
    """What is wrong with these nodes.  ``kind``: cuda or cpu, by which links are compared."""
    hosts = [report.host for report in reports]
    name = lambda a, b: f"{hosts[a]}: rank {a} - rank {b}"
    between, within = expected.between_nodes, expected.within_nodes
    problems = [
        *_judge_own(reports),
        *_judge_versions(reports),
        *_judge_sharing(reports),
        *_judge_clocks(reports),
        *_judge_speeds(reports),
        *_judge_links(links.between_nodes, between, kind, "node {} - node {}".format, str),
        *_judge_links(links.within_nodes, within, kind, name, hosts.__getitem__),
    ]
    limit = between if len(set(hosts)) > 1 else within
    shared = {f"{name} of all ranks": speed for name, speed in links.whole.items()}
    if OVER_HOSTS in links.experts:
        shared["all-to-all of EP groups"] = links.experts[OVER_HOSTS]
    for title, speed in shared.items():
        if limit is not None and speed < SLOW["told"] * limit:
            problems.append(Problem((), f"{title}: {speed:.3g} GB/s a rank, {limit:.3g} expected"))
    return list(dict.fromkeys(problems))


def _judge_own(reports: list[Report]) -> list[Problem]:
    """What nodes say of themselves.  What all of several say is no fault of a node."""
    nodes, problems = {report.host for report in reports}, []
    for text in dict.fromkeys(text for report in reports for text in report.problems):
        hosts = dict.fromkeys(report.host for report in reports if text in report.problems)
        if len(nodes) > 1 and set(hosts) == nodes:
            problems.append(Problem((), f"all nodes: {text}"))
        else:
            problems += [_of(host, text) for host in hosts]
    return problems


def _of(host: str, text: str) -> Problem:
    return Problem((host,), f"{host}: {text}")


def _judge_versions(reports: list[Report]) -> list[Problem]:
    """The commonest version is right; where two are as common, that of the lower rank."""
    problems = []
    for name in dict.fromkeys(name for report in reports for name in report.versions):
        found = [(report.host, report.versions.get(name, "none")) for report in reports]
        common = Counter(version for _, version in found).most_common(1)[0][0]
        odd = [(host, version) for host, version in found if version != common]
        problems += [_of(host, f"{name} is {own}, elsewhere {common}") for host, own in odd]
    return problems


def _judge_sharing(reports: list[Report]) -> list[Problem]:
    """Rank 0's node is odd when most others do not see its file; of two nobody knows which."""
    nodes, first = {report.host for report in reports}, reports[0].host
    blind = tuple(dict.fromkeys(report.host for report in reports if not report.shares))
    if not blind:
        return []
    odd = blind
    if 2 * len(blind) >= len(nodes):
        odd = () if len(nodes) == 2 else (first,)
    who = f"{', '.join(blind)} see{'s' * (len(blind) == 1)}"
    return [Problem(odd, f"the run folder is not shared: {who} no file that {first} writes there")]


def _judge_clocks(reports: list[Report]) -> list[Problem]:
    middle = statistics.median_low([report.clock for report in reports])
    return [
        _of(report.host, f"its clock is {report.clock - middle:+.0f} s off")
        for report in reports
        if abs(report.clock - middle) > CLOCK_TOLERANCE
    ]


def _judge_speeds(reports: list[Report]) -> list[Problem]:
    on_gpus = [report for report in reports if report.speed > 0]
    if len(on_gpus) < _ENOUGH:
        return []
    middle = statistics.median(report.speed for report in on_gpus)
    text = f"the GPU of rank {{}} computes {{:.0f}} TFLOP/s, others {middle / 1e12:.0f}"
    return [
        _of(report.host, text.format(report.rank, report.speed / 1e12))
        for report in on_gpus
        if report.speed < SLOW_GPU * middle
    ]


def _judge_links(
    speeds: dict[tuple[Any, Any], float],
    expected: float | None,
    kind: str,
    name_of: Callable[[Any, Any], str],
    host_of: Callable[[Any], str],
) -> list[Problem]:
    """Slow links, each with the end to blame: the one that most slow links share."""
    if not speeds or (expected is None and len(speeds) < _ENOUGH):
        return []
    better_quarter = sorted(speeds.values())[math.ceil(0.75 * (len(speeds) - 1))]
    goal, share = (better_quarter, SLOW[kind]) if expected is None else (expected, SLOW["told"])
    slow = {pair: speed for pair, speed in speeds.items() if speed < share * goal}
    guilty, problems = blame(list(slow)), []
    for pair, speed in slow.items():
        hosts = tuple(dict.fromkeys(host_of(end) for end in pair if end in guilty))
        text = f"{name_of(*pair)}: {speed:.3g} GB/s, {goal:.3g} expected"
        problems.append(Problem(hosts, text))
    return problems


def blame(slow: list[tuple[Any, Any]]) -> set[Any]:
    """The fewest ends that explain the slow links, by greed; both of one that stands alone."""
    guilty: set[Any] = set()
    left = list(slow)
    while left:
        worst, count = Counter(end for pair in left for end in pair).most_common(1)[0]
        found = {worst} if count > 1 else set(left[0])
        guilty |= found
        left = [pair for pair in left if not found & set(pair)]
    return guilty


def exclude_line(problems: list[Problem]) -> str | None:
    """Slurm's option that leaves the bad hosts out, or None."""
    hosts = sorted({host for problem in problems for host in problem.hosts})
    return f"--exclude={','.join(hosts)}" if hosts else None


def preflight(
    environment: RankEnvironment,
    config: Config | None,
    base: Path,
    expected: Expected,
    timeout: float,
    megabytes: int,
    deepspeed_tree: dict | None = None,
    record: Path | None = None,
    *,
    host: str | None = None,
    clock: Callable[[], float] = time.time,
    exchange_with: Callable[..., Any] = Exchange,
) -> int:
    """Measures, judges, prints; returns 0 or 1 on every rank.  Relative paths of the configuration
    start from ``base``.  ``deepspeed_tree``: the run's, for the price of EP groups that span nodes.
    ``record``: a file for every rank's figures.

    ``host``, ``clock`` and ``exchange_with`` stand in for this machine's own: one machine can then
    play several, some of them ill.
    """
    import torch
    import torch.distributed as dist

    from diffmoe.device import check_free, local_device, measured_flops
    from diffmoe.models.count import count

    started, host, problems = time.monotonic(), host or host_name(), []
    run, needed, asked, ep = base, 0, "auto", 1
    if config:
        run, asked, ep = base / config.run.folder, config.run.device, config.parallel.ep
        each = _CHECKPOINT_BYTES * count(config.model, config.moe).total
        needed = int(each * (config.train.keep + 1))
    try:
        device = local_device(environment.local_rank, environment.local_world, asked)
        if device.type == "cuda":
            check_free(device)
        place(environment, device)
    except UserError as error:
        if environment.world == 1:
            raise
        problems, device = [str(error)], torch.device("cpu")
    try:
        probe.meet(environment, device, timeout, host)
    except Absent as absent:  # one line from each node that did come, the exclusion from rank 0
        if environment.local_rank == 0:
            print(f"preflight: {absent}", file=sys.stderr, flush=True)
        if environment.rank == 0 and absent.hosts:
            print(exclude_line([Problem(absent.hosts, "")]), flush=True)
        return 1
    if environment.local_rank == 0:
        problems += gpus.problems() if device.type == "cuda" else []
        problems += probe.disk_problems(run, needed)
        if config and config.data.shards:
            problems += probe.shard_problems(config.data, base)
    shares = probe.sees_rank_0(run, environment)
    report = Report(
        environment.rank,
        host,
        probe.versions(Path(__file__).resolve().parent.parent, device),
        tuple(problems),
        shares,
        probe.clock_offset(clock),
        0.0 if device.type == "cpu" else measured_flops(device, torch.bfloat16, 8192, 20),
    )
    reports: list[Any] = [None] * environment.world
    dist.all_gather_object(reports, report)
    # A rank without its GPU would wait for NCCL's others for ever: the links are then left alone.
    links, hosts = Links(), [report.host for report in reports]
    if len({report.versions["device"] == "cpu" for report in reports}) == 1:
        exchange = exchange_with(environment, device, megabytes * 2**20)
        links = probe.measure_links(environment, hosts, exchange, ep)
    found = judge(reports, links, expected, device.type)
    if environment.rank == 0:
        note = None
        if links.experts and config:
            note = _spanning(config, deepspeed_tree or read_deepspeed(None), device, hosts)
        _print(reports, links, note, found, time.monotonic() - started)
        if record is not None:
            try:
                record.write_text(json.dumps(figures(reports, links), indent=1) + "\n")
            except OSError as error:
                print(f"preflight: --record cannot be written: {error}", file=sys.stderr)
    dist.barrier()
    dist.destroy_process_group()
    return 1 if found else 0


def _spanning(config: Config, tree: dict, device: torch.device, hosts: list[str]) -> str | None:
    from diffmoe.cost.extrapolation import spanning
    from diffmoe.layout import resolve_layout
    from diffmoe.training.start import machine_of

    try:
        return spanning(config, resolve_layout(config, len(hosts)), tree, machine_of(device), hosts)
    except UserError:  # a batch that does not divide by these ranks: they are not the run's
        return None


def figures(reports: list[Report], links: Links) -> list[dict[str, Any]]:
    """A row a rank: TFLOP/s, GB/s of its node's and its own slowest link; only what is known."""

    def least(speeds: dict[Any, float], end: Any) -> float:
        return min((speed for pair, speed in speeds.items() if end in pair), default=0.0)

    rows = [
        {
            "rank": report.rank,
            "host": report.host,
            "TFLOP/s": report.speed / 1e12,
            "GB/s to another node": least(links.between_nodes, report.host),
            "GB/s inside the node": least(links.within_nodes, report.rank),
        }
        for report in reports
    ]
    return [{k: v for k, v in row.items() if v or k == "rank"} for row in rows]


def _print(
    reports: list[Report], links: Links, note: str | None, problems: list[Problem], seconds: float
) -> None:
    nodes = len({report.host for report in reports})
    versions = ", ".join(f"{name} {version}" for name, version in reports[0].versions.items())
    clocks = [report.clock for report in reports]
    lines = [
        f"preflight: {nodes} nodes, {len(reports)} ranks, {seconds:.1f} s",
        f"  versions  {versions}",
        f"  clocks    within {max(clocks) - min(clocks):.3f} s",
    ]
    for title, speeds in (("nodes", links.between_nodes), ("ranks", links.within_nodes)):
        if speeds:
            (a, b), least = min(speeds.items(), key=lambda item: item[1])
            lines.append(
                f"  {title:8}  {len(speeds)} pairs swap at {statistics.median(speeds.values()):.3g}"
                f" GB/s each way, least {least:.3g} ({a} - {b})"
            )
    if links.whole:
        parts = (f"{name} {speed:.3g} GB/s a rank" for name, speed in links.whole.items())
        lines.append("  together  " + ", ".join(parts))
    if links.experts:
        parts = (f"{name} {speed:.3g}" for name, speed in links.experts.items())
        lines.append("  experts   all-to-all of EP groups, GB/s a rank: " + ", ".join(parts))
    if note:
        lines.append(f"  experts   {note}")
    lines += [f"  wrong     {problem.text}" for problem in problems] or ["  nothing wrong"]
    print("\n".join(filter(None, [*lines, exclude_line(problems)])), flush=True)


def main(arguments: list[str]) -> int:
    """Returns 0, or 1 when something is wrong.  UserError for bad input."""
    from diffmoe.config import load_config

    parser = Parser(
        "preflight",
        "Checks the nodes of a job: versions and code, GPUs, links, shards, disks, clocks.  Exit "
        "code 1 and Slurm's --exclude=... when something is wrong.",
        """
        srun --ntasks-per-node=8 python -m launcher preflight --config configs/demo.yaml
        torchrun --standalone --nproc-per-node 2 -m launcher preflight --config configs/demo.yaml
        """,
    )
    add = parser.add_argument
    add("--config", help="YAML file: its shards, its run folder, room for its checkpoints")
    add("--deepspeed_config", help="DeepSpeed JSON, for the price of EP groups that span nodes")
    base = "where its relative paths start (default: here)"
    add("--record", type=Path, help="JSON file for every rank's figures (default: none)")
    add("--from", dest="base", type=Path, default=Path.cwd(), help=base)
    rate = "GB/s that a rank should reach to another "
    compared = "node (default: pairs are compared with each other)"
    add("--between-nodes", type=float, metavar="GB/s", help=rate + compared)
    add("--within-nodes", type=float, metavar="GB/s", help=rate + "of its node")
    add("--megabytes", type=int, help="of a swapped buffer (default: 64 on GPUs, 2 on CPUs)")
    add("--timeout", type=float, default=60.0, help="seconds to wait for a rank (default: 60)")
    add("overrides", nargs="*", metavar="section.field=value")
    options = parser.parse_intermixed_args(arguments)
    check_above_0(options, "between_nodes", "within_nodes", "megabytes", "timeout")
    if options.overrides and options.config is None:
        raise UserError(f"override {options.overrides[0]!r} needs --config")
    if not options.base.is_dir():
        raise UserError(f"--from ({options.base}) does not exist")
    deepspeed_tree, config = read_deepspeed(options.deepspeed_config), None
    if options.record is not None:
        options.record = options.record.absolute()
        if not options.record.parent.is_dir():
            raise UserError(f"--record ({options.record}): its folder does not exist")
    if options.config is not None:  # bad input is found before any rank waits
        config = load_config(options.config, options.overrides)
    os.chdir(options.base)  # as the run will: pipe: may name relative paths
    environment = detect()
    check_started(environment, typed_at_a_terminal())
    import torch

    asked = config and config.run.device
    on_gpu = torch.cuda.is_available() and "cpu" not in (asked, os.environ.get("DS_ACCELERATOR"))
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    return preflight(
        environment,
        config,
        Path.cwd(),
        Expected(options.between_nodes, options.within_nodes),
        options.timeout,
        options.megabytes or (64 if on_gpu else 2),
        deepspeed_tree,
        options.record,
    )
