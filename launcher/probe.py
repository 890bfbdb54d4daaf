"""What preflight measures, on every rank: who is there, versions, GPU, shards, disk, clock, links.
torch is imported inside.

Every rank takes every collective.  Ranks of one node share a host name; nodes are numbered by the
order of their first rank.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffmoe import gpus
from diffmoe.code_version import commit, digest
from diffmoe.cost.hosts import spanned
from diffmoe.environment import RankEnvironment, expand_nodelist
from diffmoe.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch.distributed import Store

    from diffmoe.config import DataConfig

GIB = 2**30
_PACKAGES = ("torch", "deepspeed", "numpy", "safetensors", "webdataset")
_REPEATS = 5
OVER_HOSTS = "over hosts"
# More rounds than these add time and no knowledge: every node has met so many others.
_MOST_ROUNDS = 15


@dataclass(frozen=True)
class Report:
    """What one rank knows about itself.  ``shares``: it sees rank 0's run folder; ``clock``:
    seconds ahead of rank 0; ``speed``: FLOP/s of its GPU, 0 on CPUs.
    """

    rank: int
    host: str
    versions: dict[str, str]
    problems: tuple[str, ...]
    shares: bool = True
    clock: float = 0.0
    speed: float = 0.0


@dataclass(frozen=True)
class Links:
    """Bandwidths in GB/s (1e9 bytes), each direction at once.  Pairs: the slower of both ends;
    ``whole``: a rank's share; ``experts``: also, of all-to-all in EP groups, where they span hosts,
    and among their ranks of one host.
    """

    between_nodes: dict[tuple[str, str], float] = field(default_factory=dict)
    within_nodes: dict[tuple[int, int], float] = field(default_factory=dict)
    whole: dict[str, float] = field(default_factory=dict)
    experts: dict[str, float] = field(default_factory=dict)


class Absent(Exception):
    """Ranks that did not come: their hosts as far as known, and a line about them."""

    def __init__(self, hosts: tuple[str, ...], text: str) -> None:
        super().__init__(text)
        self.hosts = hosts


def meet(environment: RankEnvironment, device: torch.device, timeout: float, host: str) -> None:
    """Joins the ranks, NCCL on GPUs with gloo beside it.  Raises Absent on those who came when
    somebody did not.
    """
    import torch.distributed as dist

    from diffmoe.device import bound, share

    try:
        store = dist.PrefixStore("preflight", _store(environment, timeout))
        store.set(f"here/{environment.rank}", host)
        _roll_call(store, environment, timeout)
    except (RuntimeError, ConnectionError) as error:
        reason = str(error).splitlines()[0]
        raise Absent(
            (),
            f"rank {environment.rank} cannot meet the others at {environment.init_method or environment.master_addr}: "
            f"{reason}",
        ) from error
    on_gpus = set(share(device.type, "device", store, environment.rank, environment.world)) == {
        "cuda"
    }
    backend = (
        "cpu:gloo,cuda:nccl" if on_gpus else "gloo"
    )  # a rank without its GPU would be waited for
    dist.init_process_group(
        backend,
        store=store,
        rank=environment.rank,
        world_size=environment.world,
        timeout=timedelta(seconds=timeout),
        device_id=bound(device, environment.world) if on_gpus else None,
    )


def _store(environment: RankEnvironment, timeout: float) -> Store:
    import torch.distributed as dist

    if environment.world == 1:
        return dist.HashStore()
    limit = timedelta(seconds=timeout)
    if environment.init_method is not None:
        store = dist.FileStore(environment.init_method.removeprefix("file://"), environment.world)
        store.set_timeout(limit)
        return store
    agents = (
        os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    )  # torchrun's agent serves already
    return dist.TCPStore(
        environment.master_addr,
        environment.master_port,
        environment.world,
        is_master=environment.rank == 0 and not agents,
        timeout=limit,
        wait_for_workers=False,
    )


def _roll_call(store: Store, environment: RankEnvironment, timeout: float) -> None:
    """Rank 0 waits for everybody, and tells everybody what came of it."""
    if environment.rank == 0:
        deadline = time.monotonic() + timeout
        missing = list(range(environment.world))
        while missing and time.monotonic() < deadline:
            missing = [rank for rank in missing if not store.check([f"here/{rank}"])]
            time.sleep(0.05 if missing else 0)
        store.set("missing", ",".join(map(str, missing)))
    store.wait(["missing"], timedelta(seconds=timeout + 15))
    missing = [int(rank) for rank in store.get("missing").decode().split(",") if rank]
    if missing:
        hosts = tuple(
            dict.fromkeys(host for rank in missing if (host := _host_of(rank, environment)))
        )
        raise Absent(
            hosts,
            f"ranks {', '.join(map(str, missing))} of {environment.world} did not come within {timeout:g} s"
            + (f": {', '.join(hosts)}" if hosts else ""),
        )


def _host_of(rank: int, environment: RankEnvironment) -> str | None:
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
    if environment.source != "srun" or not nodes:
        return None
    names, place = expand_nodelist(nodes), rank // environment.local_world
    return names[place] if place < len(names) else None


def versions(root: Path, device: torch.device) -> dict[str, str]:
    """What must be the same everywhere: interpreter, packages, device, driver, the code itself (a
    digest of its files).
    """
    import torch

    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "none"
    found["torch"] = torch.__version__
    found["device"] = "cpu"
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda or "none"
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    found["code"] = digest(root)
    written = root.parent / "commit.txt"  # a job's snapshot has no git
    found["commit"] = written.read_text().strip() if written.is_file() else commit(root)
    return found


def gpu_problems(device: torch.device) -> list[str]:
    """What is wrong with this node's GPUs, asked once a node."""
    wrong: list[str] = []
    try:
        for gpu in (gpus.query() or []) if device.type == "cuda" else []:
            wrong += [f"GPU {gpu.index} ({gpu.name}): {text}" for text in gpu.trouble]
    except UserError as error:
        wrong.append(str(error))
    return wrong


def shard_problems(data: DataConfig, base: Path) -> list[str]:
    """Whether every shard of the index is there in its size (of remote ones nobody says), and one
    can be read; asked once a node. A run that goes on without bad shards (``on_bad_shard: skip``)
    needs no more than the index.
    """
    from diffmoe.data.shards import load_index
    from diffmoe.data.sources import chunks, is_remote
    from diffmoe.files import retried

    def at(address: str) -> str:
        return address if not address or is_remote(address) else str(base / address)

    def first_bytes() -> None:
        address = index.address(index.shards[-1])
        if is_remote(address):
            with contextlib.closing(chunks(address)) as stream:
                next(stream, b"")
        else:
            with open(address, "rb") as file:
                file.read(2**16)

    try:
        index = load_index(at(data.shards), at(data.index), check_files=data.on_bad_shard == "stop")
        if data.on_bad_shard == "stop":
            retried(first_bytes, index.address(index.shards[-1]))
    except (UserError, OSError) as error:
        return [f"shards: {error}"]
    return []


def disk_problems(run: Path, needed: int) -> list[str]:
    """Too little room where checkpoints go (``needed`` bytes), for temporary files, in shared
    memory; asked once a node.
    """
    wrong = []
    for folder, least in (
        (_existing(run), needed),
        (Path("/tmp"), GIB),
        (Path("/dev/shm"), GIB // 16),
    ):
        if not folder.is_dir():
            continue
        free = shutil.disk_usage(folder).free
        if free < least:
            wrong.append(f"{folder} has {free / GIB:.1f} GiB free, {least / GIB:.1f} are needed")
    if not os.access(_existing(run), os.W_OK):
        wrong.append(f"{_existing(run)} cannot be written")
    return wrong


def sees_rank_0(run: Path, environment: RankEnvironment, patience: float = 3.0) -> bool:
    """Whether a file that rank 0 writes into the run folder is seen from here, as checkpoints must
    be.  Collective.
    """
    import torch.distributed as dist

    folder, token = _existing(run), [f".preflight-{os.getpid()}-{time.time_ns()}"]
    dist.broadcast_object_list(token, src=0)
    path = folder / token[0]
    if environment.rank == 0 and os.access(folder, os.W_OK):
        path.touch()
    dist.barrier()
    deadline = time.monotonic() + patience  # a network file system may show it a little later
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    seen = path.exists()
    dist.barrier()
    if environment.rank == 0:
        path.unlink(missing_ok=True)
    return seen


def clock_offset(clock: Callable[[], float]) -> float:
    """Seconds that this rank's clock is ahead of rank 0's, within milliseconds.  Collective."""
    import torch
    import torch.distributed as dist

    offsets = []
    for _ in range(_REPEATS):
        dist.barrier()
        now = torch.tensor([clock()], dtype=torch.float64)
        reference = now.clone()
        dist.broadcast(reference, src=0)
        offsets.append(float(now - reference))
    return sorted(offsets)[_REPEATS // 2]


def matmul_speed(device: torch.device) -> float:
    """FLOP/s of a bf16 matmul on this rank's GPU, the best of several tenths of a second; 0 on a
    CPU.
    """
    import torch

    if device.type != "cuda":
        return 0.0
    size, calls, best = 4096, 20, float("inf")
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    for _ in range(_REPEATS + 1):  # the first warms up
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            a @ a
        torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 * calls / best


def rounds(count: int) -> list[list[tuple[int, int]]]:
    """Every pair of ``count`` players once, in rounds in which nobody plays twice (at most
    _MOST_ROUNDS, evenly chosen).
    """
    seats: list[int | None] = [*range(count), *([None] if count % 2 else [])]
    played = []
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        pairs = zip(seats[:half], reversed(seats[half:]))
        played.append([(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    if len(played) <= _MOST_ROUNDS:
        return played
    return [played[i * len(played) // _MOST_ROUNDS] for i in range(_MOST_ROUNDS)]


class Exchange:
    """The timed part: this rank and ``partner`` swap a buffer by the all-to-all that the model
    uses; None: nothing to send.
    """

    def __init__(self, environment: RankEnvironment, device: torch.device, size: int) -> None:
        import torch

        self.world, self.device = environment.world, device
        self.send = torch.ones(size, dtype=torch.uint8, device=device)
        self.received = torch.empty_like(self.send)

    def __call__(self, partner: int | None) -> None:
        self.all_to_all([len(self.send) if rank == partner else 0 for rank in range(self.world)])

    def all_to_all(self, counts: list[int]) -> None:
        """Sends so many bytes to each rank, and receives as many."""
        import torch
        import torch.distributed as dist

        total = sum(counts)
        dist.all_to_all_single(self.received[:total], self.send[:total], counts, counts)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure_links(
    environment: RankEnvironment,
    hosts: list[str],
    exchange: Any,
    size: int,
    device: torch.device,
    ep: int = 1,
) -> Links:
    """Pairs of nodes (rank i of one with rank i of the other, all at once), pairs within nodes, the
    whole, and EP groups of ``ep`` ranks where they span nodes.  Collective.

    ``hosts``: every rank's; ``exchange``: called with this rank's partner of a round, or None."""
    nodes = {
        host: [rank for rank, name in enumerate(hosts) if name == host]
        for host in dict.fromkeys(hosts)
    }
    names = list(nodes)
    mine: dict[tuple[str, Any, Any], float] = {}
    for playing in rounds(len(names)) if len(names) > 1 else []:
        partner, key = None, None
        for a, b in playing:
            for here, there in zip(nodes[names[a]], nodes[names[b]]):
                if environment.rank in (here, there):
                    partner, key = here + there - environment.rank, ("nodes", names[a], names[b])
        seconds = _best_time(exchange, partner)
        if key:
            mine[key] = size / seconds / 1e9
    for playing in rounds(max(map(len, nodes.values()))):
        partner, key = None, None
        own = nodes[hosts[environment.rank]]
        for a, b in playing:
            if b < len(own) and environment.rank in (own[a], own[b]):
                partner, key = own[a] + own[b] - environment.rank, ("ranks", own[a], own[b])
        seconds = _best_time(exchange, partner)
        if key:
            mine[key] = size / seconds / 1e9
    whole = _whole(environment, size, device)
    spans = environment.world % ep == 0 and spanned(hosts, ep)[0] > 1
    experts = _experts(environment.rank, hosts, ep, exchange) if spans else {}
    return _merge(mine, whole, experts, environment.world)


def _best_time(exchange: Callable[[Any], None], argument: Any) -> float:
    import torch.distributed as dist

    best = float("inf")
    for _ in range(_REPEATS):
        dist.barrier()
        start = time.perf_counter()
        exchange(argument)
        best = min(best, time.perf_counter() - start)
    return best


def _experts(rank: int, hosts: list[str], ep: int, exchange: Any) -> dict[str, float]:
    """GB/s that each rank moves in all-to-all in its EP group, and among the group's ranks of one
    host if these are several everywhere.  By collectives of all ranks: no group has to be made for
    it.
    """
    group = [other for other in range(len(hosts)) if other // ep == rank // ep]
    exchanges = {OVER_HOSTS: group}
    if spanned(hosts, ep)[1] > 1:
        exchanges["inside a host"] = [other for other in group if hosts[other] == hosts[rank]]
    speeds = {}
    for name, peers in exchanges.items():
        counts = [
            len(exchange.send) // len(peers) if other in peers else 0 for other in range(len(hosts))
        ]
        speeds[name] = (sum(counts) - counts[rank]) / _best_time(exchange.all_to_all, counts) / 1e9
    return speeds


def _whole(environment: RankEnvironment, size: int, device: torch.device) -> dict[str, float]:
    """GB/s that each rank moves to others when all take part: the usual bus bandwidth."""
    import torch
    import torch.distributed as dist

    world = environment.world
    if world == 1:
        return {}
    values = torch.ones(size // 4 // world * world, device=device)
    received = torch.empty_like(values)
    speeds = {}
    for name, call, share in (
        ("all-reduce", lambda: dist.all_reduce(values), 2 * (world - 1) / world),
        ("all-to-all", lambda: dist.all_to_all_single(received, values), (world - 1) / world),
    ):

        def timed(_: None, call: Callable[[], object] = call) -> None:
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        speeds[name] = share * values.nbytes / _best_time(timed, None) / 1e9
    return speeds


def _merge(
    mine: dict[tuple[str, Any, Any], float],
    whole: dict[str, float],
    experts: dict[str, float],
    world: int,
) -> Links:
    import torch.distributed as dist

    everybody: list[Any] = [None] * world
    dist.all_gather_object(everybody, (mine, whole, experts))
    pairs, together, exchange = (_least(speeds) for speeds in zip(*everybody))
    return Links(
        {key[1:]: speed for key, speed in pairs.items() if key[0] == "nodes"},
        {key[1:]: speed for key, speed in pairs.items() if key[0] == "ranks"},
        together,
        exchange,
    )


def _least(speeds: Iterable[dict[Any, float]]) -> dict[Any, float]:
    """The lowest of all ranks' figures for each name."""
    least: dict[Any, float] = {}
    for mine in speeds:
        least |= {name: min(speed, least.get(name, speed)) for name, speed in mine.items()}
    return least


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder
