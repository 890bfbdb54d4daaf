"""Who am I among the ranks? One answer under torchrun, the deepspeed command, srun and plain
python.

The environment is the authority: torchrun leaves the argument ``--local_rank`` at -1.
"""

import os
import re
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import Literal

from diffmoe.errors import UserError

Source = Literal["torchrun", "deepspeed", "environment", "srun", "single"]

# Slurm numbers its own steps (batch script, salloc's shell, ...) from here on: no step of srun's.
_FIRST_SPECIAL_STEP = 0xFFFF_FFF0

# How torch's allocator is told; all but the first are older names of it (torch 2.11 to 2.13).
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")

# All below 32768, where Linux starts to hand out ports of its own accord.
_FIRST_PORT = 10_000
_STEPS_PER_JOB = 32
_JOBS = 688


@dataclass(frozen=True)
class RankEnvironment:
    """A process's place among all ranks, and how the ranks find each other."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    source: Source
    # None: torch's default env://, over the two fields below once export() has written them.
    init_method: str | None = None
    master_addr: str = "127.0.0.1"
    # 0 lets the one rank of a single process take any free port.
    master_port: int = 0


def detect(environ: Mapping[str, str] = os.environ) -> RankEnvironment:
    """Reads the launcher's variables: RANK and its companions first, then srun's step, else one
    process.

    ``DIFFMOE_STORE`` (a file's path) replaces the rendezvous by address and port. It must be a
    fresh file for each start of the ranks, on a file system that all of them see.
    """
    if "RANK" in environ:
        return _from_rank(environ)
    if _in_srun_step(environ):
        return _from_srun(environ)
    if "WORLD_SIZE" in environ and _integer(environ, "WORLD_SIZE", "RANK") != 1:
        raise UserError(f"WORLD_SIZE ({environ['WORLD_SIZE']}) is set but RANK is unset")
    return RankEnvironment(0, 1, 0, 1, "single", _file_store(environ))


def export(env: RankEnvironment, environ: MutableMapping[str, str] = os.environ) -> None:
    """Writes the variables that torch's ``env://`` and DeepSpeed read.

    And, unless the user has, how torch's allocator keeps a GPU's memory, which it reads when CUDA
    starts: exchanges between experts vary in size, and would leave gaps between segments that
    cannot grow.

    With ``init_method`` set, pass that to the initialisation: the address and port then are
    placeholders.
    """
    environ.update(
        RANK=str(env.rank),
        WORLD_SIZE=str(env.world),
        LOCAL_RANK=str(env.local_rank),
        LOCAL_WORLD_SIZE=str(env.local_world),
        MASTER_ADDR=env.master_addr,
        MASTER_PORT=str(env.master_port),
    )
    if not any(name in environ for name in _ALLOCATOR):
        environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def host_name() -> str:
    """This node as its cluster calls it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def check_started(env: RankEnvironment, typed: bool) -> None:
    """Raises UserError for one of a Slurm step's processes that a person has started in its shell
    (``typed``, see :func:`typed_at_a_terminal`): no other process of the step would come.  ``srun
    --ntasks=4 --pty bash`` makes such a shell.
    """
    if env.source == "srun" and env.world > 1 and typed:
        raise UserError(
            f"SLURM_NTASKS ({env.world}) is that of this shell's step, and this is one process: "
            f"type srun --overlap --ntasks={env.world} python run.py ... for {env.world} ranks, or "
            "unset SLURM_STEP_ID for one"
        )


def typed_at_a_terminal() -> bool:
    """Whether an interactive shell started this process, alone or in a script: such a shell gives
    each command a process group of its own in a session with a terminal.  A task of ``srun --pty``
    begins its session; those of ``srun --unbuffered`` write to a terminal that is not their
    session's.
    """
    return os.getpgrp() != os.getsid(0) and any(map(_is_sessions_terminal, range(3)))


def check_master(env: RankEnvironment) -> None:
    """Raises UserError where the address of rank 0 means nothing on this machine."""
    if env.world == 1 or env.init_method is not None:
        return
    try:
        socket.getaddrinfo(env.master_addr, env.master_port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:  # the latter of a name with an empty part
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(
            f"MASTER_ADDR ({env.master_addr}) cannot be resolved on {socket.gethostname()}: "
            f"{reason}; set MASTER_ADDR to the name or address by which all nodes reach rank 0's"
        ) from None


def missed(env: RankEnvironment) -> str:
    """Where the ranks that do not come are waited for, what says there are any, what to type."""
    where = f"MASTER_ADDR ({env.master_addr}), MASTER_PORT ({env.master_port})"
    if env.init_method:
        where = f"DIFFMOE_STORE ({env.init_method.removeprefix('file://')})"
    said = f"WORLD_SIZE ({env.world})"
    one = "if this was to be one process, unset"
    if env.source == "srun":
        said, instead = f"SLURM_NTASKS ({env.world})", f"{one} SLURM_STEP_ID"
    elif env.source == "environment":
        instead = f"{one} RANK WORLD_SIZE LOCAL_RANK, which an earlier command may have left"
    else:
        instead = (
            f"see that the {env.source} command runs on every node with the same address and port"
        )
    return f"rank {env.rank} waits for the others of {said} at {where}: start them, or {instead}"


def expand_nodelist(nodelist: str) -> list[str]:
    """Host names of a Slurm node list: ``node[01-03,7],a`` is node01 node02 node03 node7 a."""
    numbers = r"\[[0-9]+(?:-[0-9]+)?(?:,[0-9]+(?:-[0-9]+)?)*\]"
    if not re.fullmatch(rf"(?!,)(?:[^\[\],\s]|,(?=[^,\s])|{numbers})+", nodelist):
        raise UserError(f"node list ({nodelist!r}) is not one of Slurm's: name, name[01-03,7], ...")
    patterns = re.split(r",(?![^\[]*\])", nodelist)
    return [host for pattern in patterns if pattern for host in _expand_pattern(pattern)]


def expand_task_counts(counts: str) -> list[int]:
    """Tasks on each node from Slurm's short form: ``2(x3),1`` is 2 2 2 1."""
    expanded: list[int] = []
    for item in counts.split(","):
        match = re.fullmatch(r"([0-9]+)(?:\(x([0-9]+)\))?", item)
        if match is None:
            raise UserError(f"task counts ({counts!r}) are not of Slurm's form 2(x3),1")
        expanded += [int(match[1])] * int(match[2] or 1)
    return expanded


def rendezvous_port(job: int, step: int) -> int:
    """The port on which rank 0 of a job's step listens, known to every rank.

    10000 + (32 * job + step) mod 22016: steps below 32 of any 688 consecutive jobs have ports of
    their own.
    """
    return _FIRST_PORT + (_STEPS_PER_JOB * job + step) % (_STEPS_PER_JOB * _JOBS)


def _is_sessions_terminal(descriptor: int) -> bool:
    try:
        os.tcgetpgrp(descriptor)
    except OSError:
        return False
    return True


def _from_rank(environ: Mapping[str, str]) -> RankEnvironment:
    rank = _integer(environ, "RANK", "WORLD_SIZE")
    world = _integer(environ, "WORLD_SIZE", "RANK")
    local_rank = _integer(environ, "LOCAL_RANK", "RANK")
    # The deepspeed command says LOCAL_SIZE.  Variables set by hand may say neither: one node.
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")
    local_world_name = next((name for name in names if name in environ), "WORLD_SIZE")
    local_world = _integer(environ, local_world_name, "RANK")
    _check_below("RANK", rank, "WORLD_SIZE", world)
    _check_below("LOCAL_RANK", local_rank, local_world_name, local_world)
    if local_world > world:
        raise UserError(f"{local_world_name} ({local_world}) must not exceed WORLD_SIZE ({world})")
    source: Source = "environment"
    if "TORCHELASTIC_RUN_ID" in environ:
        source = "torchrun"
    elif "CROSS_RANK" in environ:
        source = "deepspeed"
    elif _in_srun_step(environ) and world < _integer(environ, "SLURM_NTASKS", "SLURM_STEP_ID"):
        raise UserError(
            f"WORLD_SIZE ({world}) must not be below SLURM_NTASKS ({environ['SLURM_NTASKS']}): "
            "unset RANK WORLD_SIZE LOCAL_RANK, which an earlier shell may have set, and srun's own "
            "variables count"
        )
    env = RankEnvironment(rank, world, local_rank, local_world, source, _file_store(environ))
    if env.init_method is not None or (world == 1 and "MASTER_ADDR" not in environ):
        return env
    if "MASTER_ADDR" not in environ:
        raise UserError(
            f"WORLD_SIZE ({world}) needs MASTER_ADDR and MASTER_PORT (or DIFFMOE_STORE), which are "
            "unset"
        )
    port = _master_port(environ, world)
    return replace(env, master_addr=environ["MASTER_ADDR"], master_port=port)


def _in_srun_step(environ: Mapping[str, str]) -> bool:
    # A batch script and salloc's shell carry SLURM_PROCID=0 and the job's SLURM_NTASKS, yet are one
    # process.
    if "SLURM_STEP_ID" not in environ:
        return False
    return _integer(environ, "SLURM_STEP_ID", "SLURM_JOB_ID") < _FIRST_SPECIAL_STEP


def _from_srun(environ: Mapping[str, str]) -> RankEnvironment:
    rank = _integer(environ, "SLURM_PROCID", "SLURM_STEP_ID")
    world = _integer(environ, "SLURM_NTASKS", "SLURM_STEP_ID")
    local_rank = _integer(environ, "SLURM_LOCALID", "SLURM_STEP_ID")
    _check_below("SLURM_PROCID", rank, "SLURM_NTASKS", world)
    if "WORLD_SIZE" in environ and _integer(environ, "WORLD_SIZE", "SLURM_NTASKS") != world:
        raise UserError(f"WORLD_SIZE ({environ['WORLD_SIZE']}) must equal SLURM_NTASKS ({world})")
    local_world = _srun_local_world(environ, world)
    _check_below("SLURM_LOCALID", local_rank, "tasks on this node", local_world)
    env = RankEnvironment(rank, world, local_rank, local_world, "srun", _file_store(environ))
    if env.init_method is not None:
        return env
    address, port = _srun_master(environ)
    return replace(env, master_addr=address, master_port=port)


def _srun_local_world(environ: Mapping[str, str], world: int) -> int:
    name = _first_set(environ, ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"))
    counts = expand_task_counts(environ[name])
    if sum(counts) != world:
        raise UserError(f"{name} ({environ[name]}) must add up to SLURM_NTASKS ({world})")
    node = _integer(environ, "SLURM_NODEID", "SLURM_STEP_ID")
    _check_below("SLURM_NODEID", node, f"number of nodes in {name}", len(counts))
    return counts[node]


def _srun_master(environ: Mapping[str, str]) -> tuple[str, int]:
    # A job script that sets them knows better (another network, say).
    if "MASTER_ADDR" in environ:
        address = environ["MASTER_ADDR"]
    else:
        name = _first_set(environ, ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"))
        address = expand_nodelist(environ[name])[0]
    if "MASTER_PORT" in environ:
        return address, _master_port(environ, _integer(environ, "SLURM_NTASKS", "SLURM_STEP_ID"))
    job = _integer(environ, "SLURM_JOB_ID", "SLURM_STEP_ID")
    return address, rendezvous_port(job, _integer(environ, "SLURM_STEP_ID", "SLURM_JOB_ID"))


def _master_port(environ: Mapping[str, str], world: int) -> int:
    port = _integer(environ, "MASTER_PORT", "MASTER_ADDR")
    if not int(world > 1) <= port < 2**16:  # one rank takes any free port for 0
        raise UserError(
            f"MASTER_PORT ({port}) must be from 1 to 65535: any that is free on MASTER_ADDR "
            f"({environ.get('MASTER_ADDR', 'unset')})"
        )
    return port


def _file_store(environ: Mapping[str, str]) -> str | None:
    path = environ.get("DIFFMOE_STORE")
    return f"file://{os.path.abspath(path)}" if path else None


def _expand_pattern(pattern: str) -> list[str]:
    head, bracket, rest = pattern.partition("[")
    if not bracket:
        return [pattern]
    ranges, _, tail = rest.partition("]")
    numbers = [number for item in ranges.split(",") for number in _expand_range(item)]
    return [f"{head}{number}{end}" for number in numbers for end in _expand_pattern(tail)]


def _expand_range(item: str) -> list[str]:
    first, _, last = item.partition("-")
    numbers = range(int(first), int(last or first) + 1)
    if not numbers:
        raise UserError(f"node list's range ({item}) starts at {first}, after its end {last}")
    return [str(number).zfill(len(first)) for number in numbers]


def _first_set(environ: Mapping[str, str], names: tuple[str, str]) -> str:
    for name in names:
        if name in environ:
            return name
    step = environ["SLURM_STEP_ID"]
    raise UserError(f"{' and '.join(names)} are unset but SLURM_STEP_ID is {step}")


def _integer(environ: Mapping[str, str], name: str, companion: str) -> int:
    """The variable as an integer >= 0; ``companion`` is the variable that makes us expect it."""
    other = environ.get(companion, "unset")
    if name not in environ:
        raise UserError(f"{name} is unset but {companion} is {other}")
    if not re.fullmatch(r"[0-9]+", environ[name]):
        raise UserError(f"{name} ({environ[name]!r}) must be an integer >= 0 ({companion}={other})")
    return int(environ[name])


def _check_below(name: str, value: int, limit_name: str, limit: int) -> None:
    if value >= limit:
        raise UserError(f"{name} ({value}) must be below {limit_name} ({limit})")
