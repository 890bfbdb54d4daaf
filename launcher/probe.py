"""What preflight measures, on every rank: who is there, versions, GPU, shards, disk, clock, links.

Every rank takes part in every collective.  Ranks of one node share a host name.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffmoe.code_version import commit, digest
from diffmoe.cost.extrapolation import spanned
from diffmoe.environment import RankEnvironment, expand_nodelist
from diffmoe.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch.distributed import Store

    from diffmoe.config import DataConfig

GIB = 2**30
_PACKAGES = ("deepspeed", "numpy", "safetensors", "webdataset")
_REPEATS = 5
OVER_HOSTS = "over hosts"
# More add time and no knowledge: every node has met so many others.
_MOST_ROUNDS = 15


@dataclass(frozen=True)
class Report:
    """``shares``: it sees rank 0's folder; ``clock``: s ahead of rank 0; ``speed``: FLOP/s of the
    GPU's bf16 matmuls, 0 on a CPU.
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
    ``whole``: a rank's share; ``experts``: also, of all-to-all in EP groups that span hosts, and
    among their ranks of one host.
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
    """Joins the ranks (NCCL and gloo).  Raises Absent on all that came where some did not."""
    import torch.distributed as dist

    from diffmoe.device import bound, share

    rank, world = environment.rank, environment.world
    try:
        store = dist.PrefixStore("preflight", _store(environment, timeout))
        store.set(f"here/{rank}", host)
        _roll_call(store, environment, timeout)
    except (RuntimeError, ConnectionError) as error:
        where = environment.init_method or environment.master_addr
        reason = str(error).splitlines()[0]
        raise Absent((), f"rank {rank} cannot meet the others at {where}: {reason}") from error
    # NCCL would wait for a rank without its GPU.
    on_gpus = set(share(device.type, "device", store, rank, world)) == {"cuda"}
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpus else "gloo",
        store=store,
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=timeout),
        device_id=bound(device, world) if on_gpus else None,
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
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # by torchrun
    return dist.TCPStore(
        environment.master_addr,
        environment.master_port,
        environment.world,
        is_master=environment.rank == 0 and not served,
        timeout=limit,
        wait_for_workers=False,
    )


def _roll_call(store: Store, environment: RankEnvironment, timeout: float) -> None:
    """Rank 0 waits for all ranks, and tells them who is missing."""
    world = environment.world
    if environment.rank == 0:
        deadline = time.monotonic() + timeout
        missing = list(range(world))
        while missing and time.monotonic() < deadline:
            missing = [rank for rank in missing if not store.check([f"here/{rank}"])]
            time.sleep(0.05 if missing else 0)
        store.set("missing", ",".join(map(str, missing)))
    store.wait(["missing"], timedelta(seconds=timeout + 15))
    text = store.get("missing").decode()
    if text:
        nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
        known = expand_nodelist(nodes) if environment.source == "srun" and nodes else []
        numbers = dict.fromkeys(int(rank) // environment.local_world for rank in text.split(","))
        hosts = tuple(known[number] for number in numbers if number < len(known))
        line = f"ranks {text.replace(',', ', ')} of {world} did not come within {timeout:g} s"
        raise Absent(hosts, f"{line}: {', '.join(hosts)}" if hosts else line)


def versions(root: Path, device: torch.device) -> dict[str, str]:
    """What must be the same everywhere; ``code``: a digest of its files."""
    import torch

    found = {"python": platform.python_version(), "torch": torch.__version__, "device": "cpu"}
    found |= {package: importlib.metadata.version(package) for package in _PACKAGES}
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda or "none"
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    found["code"] = digest(root)
    written = root.parent / "commit.txt"  # a job's snapshot has no git
    found["commit"] = written.read_text().strip() if written.is_file() else commit(root)
    return found


def shard_problems(data: DataConfig, base: Path) -> list[str]:
    """Whether every shard of the index is there in its size (remote ones are not asked), and one
    can be read.  With ``on_bad_shard: skip`` a run needs no more than the index.
    """
    from diffmoe.data.shards import load_index
    from diffmoe.data.sources import chunks, is_remote
    from diffmoe.files import retried

    def at(address: str) -> str:
        return address if not address or is_remote(address) else str(base / address)

    def first_bytes() -> None:
        if is_remote(last):
            next(chunks(last), b"")
        else:
            with open(last, "rb") as file:
                file.read(2**16)

    stops = data.on_bad_shard == "stop"
    try:
        index = load_index(at(data.shards), at(data.index), check_files=stops)
        last = index.address(index.shards[-1])
        if stops:
            retried(first_bytes, last)
    except (UserError, OSError) as error:
        return [f"shards: {error}"]
    return []


def disk_problems(run: Path, needed: int) -> list[str]:
    """Too little room for checkpoints (``needed`` bytes), in /tmp or in shared memory."""
    wrong, run = [], _existing(run)
    for folder, least in ((run, needed), (Path("/tmp"), GIB), (Path("/dev/shm"), GIB // 16)):
        free = shutil.disk_usage(folder).free if folder.is_dir() else least
        if free < least:
            wrong.append(f"{folder} has {free / GIB:.1f} GiB free, {least / GIB:.1f} are needed")
    if not os.access(run, os.W_OK):
        wrong.append(f"{run} cannot be written")
    return wrong


def sees_rank_0(run: Path, environment: RankEnvironment, patience: float = 3.0) -> bool:
    """Whether rank 0's file in the run folder is seen from here.  Collective."""
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


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


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
    return statistics.median(offsets)


def rounds(count: int) -> list[list[tuple[int, int]]]:
    """Every pair of players once; nobody plays twice in a round (at most _MOST_ROUNDS)."""
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
    """Swaps a buffer with ``partner`` (None: nobody) by the model's all-to-all."""

    def __init__(self, environment: RankEnvironment, device: torch.device, size: int) -> None:
        import torch

        self.world, self.device = environment.world, device
        self.send = torch.ones(size, dtype=torch.uint8, device=device)
        self.received = torch.empty_like(self.send)

    def __call__(self, partner: int | None) -> None:
        self.all_to_all([len(self.send) if rank == partner else 0 for rank in range(self.world)])

    def all_to_all(self, counts: list[int]) -> None:
        """Sends so many bytes to each rank, and receives as many."""
        import torch.distributed as dist

        total = sum(counts)
        dist.all_to_all_single(self.received[:total], self.send[:total], counts, counts)

    def all_reduce(self) -> None:
        """Adds up all ranks' buffers."""
        import torch
        import torch.distributed as dist

        dist.all_reduce(self.received.view(torch.float32))


def measure_links(
    environment: RankEnvironment, hosts: list[str], exchange: Exchange, ep: int = 1
) -> Links:
    """Pairs of nodes (rank i of one with rank i of the other, all at once), pairs within nodes, all
    ranks together, and EP groups of ``ep`` ranks where they span nodes.  Collective.

    ``hosts``: every rank's.
    """
    import torch.distributed as dist

    rank, world, size = environment.rank, environment.world, len(exchange.send)
    nodes = {host: [r for r in range(world) if hosts[r] == host] for host in dict.fromkeys(hosts)}
    names, own = list(nodes), nodes[hosts[rank]]
    between = [
        [
            ((names[a], names[b]), *ranks)
            for a, b in playing
            for ranks in zip(nodes[names[a]], nodes[names[b]])
        ]
        for playing in rounds(len(names))
    ]
    within = [
        [((own[a], own[b]), own[a], own[b]) for a, b in playing if b < len(own)]
        for playing in rounds(max(map(len, nodes.values())))
    ]
    pairs = _pair_speeds(exchange, rank, between), _pair_speeds(exchange, rank, within)
    together, experts = {}, {}
    if world > 1:  # bus bandwidth: what each rank moves to others
        everyone = list(range(world))
        moved = 2 * size * (world - 1) / world
        together = {
            "all-reduce": moved / _best_time(exchange, exchange.all_reduce) / 1e9,
            "all-to-all": _all_to_all_speed(exchange, rank, everyone),
        }
    if world % ep == 0 and spanned(hosts, ep)[0] > 1:
        # By collectives of all ranks: no group has to be made for it.
        group = [other for other in range(world) if other // ep == rank // ep]
        experts[OVER_HOSTS] = _all_to_all_speed(exchange, rank, group)
        if spanned(hosts, ep)[1] > 1:
            inside = [other for other in group if hosts[other] == hosts[rank]]
            experts["inside a host"] = _all_to_all_speed(exchange, rank, inside)
    everybody: list[Any] = [None] * world
    dist.all_gather_object(everybody, (*pairs, together, experts))
    return Links(*map(_least, zip(*everybody)))


def _pair_speeds(
    exchange: Exchange, rank: int, played: list[list[tuple[Any, int, int]]]
) -> dict[Any, float]:
    """GB/s of this rank's pairs by key; a round's pairs, (key, rank, rank), swap at once."""
    speeds = {}
    for pairs in played:
        mine = next((pair for pair in pairs if rank in pair[1:]), None)
        partner = mine[1] + mine[2] - rank if mine else None
        seconds = _best_time(exchange, exchange, partner)
        if mine:
            speeds[mine[0]] = len(exchange.send) / seconds / 1e9
    return speeds


def _best_time(exchange: Exchange, call: Callable[..., None], *arguments: Any) -> float:
    import torch.distributed as dist

    from diffmoe.device import synchronize

    best = float("inf")
    for _ in range(_REPEATS):
        dist.barrier()
        start = time.perf_counter()
        call(*arguments)
        synchronize(exchange.device)
        best = min(best, time.perf_counter() - start)
    return best


def _all_to_all_speed(exchange: Exchange, rank: int, peers: list[int]) -> float:
    """GB/s that this rank moves to its other peers."""
    share = len(exchange.send) // len(peers)
    counts = [share if other in peers else 0 for other in range(exchange.world)]
    seconds = _best_time(exchange, exchange.all_to_all, counts)
    return (sum(counts) - counts[rank]) / seconds / 1e9


def _least(speeds: tuple[dict[Any, float], ...]) -> dict[Any, float]:
    """The lowest of all ranks' figures for each name."""
    names = dict.fromkeys(name for mine in speeds for name in mine)
    return {name: min(mine[name] for mine in speeds if name in mine) for name in names}
