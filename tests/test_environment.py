"""Ranks from the environments that torchrun, deepspeed, srun, a batch script and plain python
make.
"""

import contextlib
import os
import pty
import socket
import subprocess
import sys

import pytest

from diffmoe.commands.common import join
from diffmoe.environment import (
    RankEnvironment,
    check_master,
    check_started,
    detect,
    expand_nodelist,
    expand_task_counts,
    export,
    missed,
    rendezvous_port,
)
from diffmoe.errors import UserError
from programs import REPOSITORY, environment

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "host",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
}
DEEPSPEED = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "2",
    "CROSS_RANK": "1",
    "CROSS_SIZE": "2",
    "MASTER_ADDR": "host",
    "MASTER_PORT": "29500",
}
# As seen in a job of 2 nodes x 2 tasks (Slurm 22.05): first the batch script's shell, then the last
# task of a step of 3 tasks in it.
SLURM_BATCH = {
    "SLURM_JOB_ID": "42",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "0",
    "SLURM_TASKS_PER_NODE": "2(x2)",
}
SLURM_STEP = SLURM_BATCH | {
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "3",
    "SLURM_PROCID": "2",
    "SLURM_STEP_ID": "5",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURM_TASKS_PER_NODE": "2,1",
}


def without(environ: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name not in names}


def test_plain_python_is_one_rank():
    assert detect({}) == RankEnvironment(
        rank=0, world=1, local_rank=0, local_world=1, source="single"
    )


def test_torchrun():
    assert detect(TORCHRUN) == RankEnvironment(3, 4, 1, 2, "torchrun", None, "host", 29500)


def test_deepspeed_command():
    assert detect(DEEPSPEED) == RankEnvironment(3, 4, 1, 2, "deepspeed", None, "host", 29500)


def test_variables_by_hand_mean_one_node():
    environ = without(TORCHRUN, "TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE")
    assert detect(environ) == RankEnvironment(3, 4, 1, 4, "environment", None, "host", 29500)


def test_one_rank_by_hand_needs_no_address():
    environ = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    assert detect(environ) == RankEnvironment(0, 1, 0, 1, "environment")


def test_srun_step():
    port = rendezvous_port(job=42, step=5)
    assert detect(SLURM_STEP) == RankEnvironment(2, 3, 0, 1, "srun", None, "node1", port)


def test_srun_prefers_the_job_scripts_address():
    env = detect(SLURM_STEP | {"MASTER_ADDR": "node1-ib", "MASTER_PORT": "1234"})
    assert (env.master_addr, env.master_port) == ("node1-ib", 1234)


def test_srun_takes_the_jobs_nodes_where_the_step_names_none():
    assert (
        detect(without(SLURM_STEP, "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE")).master_addr
        == "node1"
    )


def test_torchrun_inside_a_step_counts_torchruns_ranks():
    assert detect(SLURM_STEP | TORCHRUN) == detect(TORCHRUN)


@pytest.mark.parametrize(
    "shell",
    [SLURM_BATCH, SLURM_BATCH | {"SLURM_STEP_ID": str(0xFFFFFFFA)}],
    ids=["batch script", "salloc's interactive step"],
)
def test_a_jobs_own_shell_is_one_rank(shell):
    assert detect(shell).source == "single"


@pytest.mark.parametrize("environ", [{}, TORCHRUN, SLURM_STEP], ids=["single", "torchrun", "srun"])
def test_file_store(environ, tmp_path):
    env = detect(
        without(environ, "MASTER_ADDR", "MASTER_PORT") | {"DIFFMOE_STORE": str(tmp_path / "store")}
    )
    assert env.init_method == f"file://{tmp_path}/store"


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (without(TORCHRUN, "WORLD_SIZE"), "WORLD_SIZE is unset but RANK is 3"),
        (without(TORCHRUN, "LOCAL_RANK"), "LOCAL_RANK is unset but RANK is 3"),
        (
            without(TORCHRUN, "MASTER_ADDR"),
            "WORLD_SIZE (4) needs MASTER_ADDR and MASTER_PORT (or DIFFMOE_STORE)",
        ),
        (without(TORCHRUN, "MASTER_PORT"), "MASTER_PORT is unset but MASTER_ADDR is host"),
        (TORCHRUN | {"RANK": "4"}, "RANK (4) must be below WORLD_SIZE (4)"),
        (TORCHRUN | {"LOCAL_RANK": "2"}, "LOCAL_RANK (2) must be below LOCAL_WORLD_SIZE (2)"),
        (TORCHRUN | {"LOCAL_RANK": "-1"}, "LOCAL_RANK ('-1') must be an integer >= 0 (RANK=3)"),
        (
            TORCHRUN | {"LOCAL_WORLD_SIZE": "8"},
            "LOCAL_WORLD_SIZE (8) must not exceed WORLD_SIZE (4)",
        ),
        (TORCHRUN | {"WORLD_SIZE": "four"}, "WORLD_SIZE ('four') must be an integer >= 0 (RANK=3)"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE (2) is set but RANK is unset"),
        (
            TORCHRUN | {"MASTER_PORT": "70000"},
            "MASTER_PORT (70000) must be from 1 to 65535: any that is free on MASTER_ADDR (host)",
        ),
        (DEEPSPEED | {"MASTER_PORT": "0"}, "MASTER_PORT (0) must be from 1 to 65535"),
        (SLURM_STEP | {"MASTER_PORT": "65536"}, "MASTER_PORT (65536) must be from 1 to 65535"),
        (TORCHRUN | {"MASTER_PORT": "http"}, "MASTER_PORT ('http') must be an integer >= 0"),
        (
            SLURM_STEP | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
            "WORLD_SIZE (1) must not be below SLURM_NTASKS (3): unset RANK "
            "WORLD_SIZE LOCAL_RANK, which an earlier shell may have set",
        ),
        (
            SLURM_STEP
            | {
                "RANK": "1",
                "WORLD_SIZE": "2",
                "LOCAL_RANK": "1",
                "MASTER_ADDR": "a",
                "MASTER_PORT": "1",
            },
            "WORLD_SIZE (2) must not be below SLURM_NTASKS (3)",
        ),
        (without(SLURM_STEP, "SLURM_NTASKS"), "SLURM_NTASKS is unset but SLURM_STEP_ID is 5"),
        (without(SLURM_STEP, "SLURM_PROCID"), "SLURM_PROCID is unset but SLURM_STEP_ID is 5"),
        (SLURM_STEP | {"SLURM_PROCID": "3"}, "SLURM_PROCID (3) must be below SLURM_NTASKS (3)"),
        (
            SLURM_STEP | {"SLURM_NTASKS": "4"},
            "SLURM_STEP_TASKS_PER_NODE (2,1) must add up to SLURM_NTASKS (4)",
        ),
        (
            SLURM_STEP | {"SLURM_LOCALID": "1"},
            "SLURM_LOCALID (1) must be below tasks on this node (1)",
        ),
        (
            SLURM_STEP | {"SLURM_NODEID": "2"},
            "SLURM_NODEID (2) must be below number of nodes in SLURM_STEP_TASKS",
        ),
        (SLURM_STEP | {"WORLD_SIZE": "8"}, "WORLD_SIZE (8) must equal SLURM_NTASKS (3)"),
        (
            without(SLURM_STEP, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"),
            "SLURM_STEP_NODELIST and SLURM_JOB_NODELIST are unset but SLURM_STEP_ID is 5",
        ),
    ],
)
def test_inconsistent_variables_are_named(environ, message):
    with pytest.raises(UserError) as error:
        detect(environ)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("environ", [{}, TORCHRUN, DEEPSPEED, SLURM_STEP])
def test_what_is_exported_is_detected_again(environ):
    env = detect(environ)
    exported: dict[str, str] = {}
    export(env, exported)
    again = detect(exported)
    assert (again.rank, again.world, again.local_rank, again.local_world) == (
        env.rank,
        env.world,
        env.local_rank,
        env.local_world,
    )
    assert (again.master_addr, again.master_port) == (env.master_addr, env.master_port)


@pytest.mark.parametrize(
    ("nodelist", "hosts"),
    [
        ("node1", ["node1"]),
        ("node[01-03,7],other", ["node01", "node02", "node03", "node7", "other"]),
        ("a,b[9-11]", ["a", "b9", "b10", "b11"]),
        ("rack[1-2]n[3,05]-ib", ["rack1n3-ib", "rack1n05-ib", "rack2n3-ib", "rack2n05-ib"]),
        ("127.0.77.[1-2]", ["127.0.77.1", "127.0.77.2"]),
    ],
)
def test_expand_nodelist(nodelist, hosts):
    assert expand_nodelist(nodelist) == hosts


@pytest.mark.parametrize(
    "nodelist", ["", "a,", ",a", "a[1", "a]", "a[1-]", "a[x]", "a[3-1]", "a[1,,2]", "a b"]
)
def test_a_broken_nodelist_is_refused(nodelist):
    with pytest.raises(UserError, match="node list"):
        expand_nodelist(nodelist)


def test_expand_task_counts():
    assert expand_task_counts("2(x3),1") == [2, 2, 2, 1]
    with pytest.raises(UserError, match="task counts"):
        expand_task_counts("2(x3")


def test_ports_of_jobs_that_share_a_node_differ():
    ports = {
        rendezvous_port(job, step) for job in range(5_000_000, 5_000_688) for step in range(32)
    }
    assert len(ports) == 688 * 32
    assert min(ports) >= 10_000 and max(ports) < 32_768


def test_a_port_that_is_taken_is_said(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for name, value in (
            ("MASTER_ADDR", "127.0.0.1"),
            ("MASTER_PORT", str(port)),
            ("RANK", "0"),
            ("WORLD_SIZE", "2"),
        ):
            monkeypatch.setenv(name, value)
        with pytest.raises(
            UserError,
            match=rf"MASTER_PORT \({port}\) is in use on this machine, .* another --master_port",
        ):
            join(RankEnvironment(0, 2, 0, 2, "torchrun"))


# ------------------------------------------------------------------------ an environment of
# something else than was meant


INTERACTIVE = {
    "SLURM_JOB_ID": "42",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_STEP_NODELIST": "node1",
    "SLURM_STEP_TASKS_PER_NODE": "4",
}


@pytest.mark.parametrize("environ", [INTERACTIVE, SLURM_STEP])
def test_one_process_of_a_step_that_was_typed_is_refused(environ):
    env = detect(environ)
    with pytest.raises(UserError) as error:
        check_started(env, typed=True)
    assert str(error.value) == (
        f"SLURM_NTASKS ({env.world}) is that of this shell's step, and this is one process: type "
        f"srun --overlap "
        f"--ntasks={env.world} python run.py ... for {env.world} ranks, or unset SLURM_STEP_ID for "
        f"one"
    )
    check_started(env, typed=False)
    assert detect(without(environ, "SLURM_STEP_ID")).world == 1, "what the line says"
    assert detect(environ | TORCHRUN).world == 4


@pytest.mark.parametrize(
    "environ",
    [
        {},
        SLURM_BATCH,
        TORCHRUN,
        INTERACTIVE | {"SLURM_NTASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"},
    ],
)
def test_what_may_be_typed(environ):
    check_started(detect(environ), typed=True)


def at_a_terminal(command, environ, shell):
    """What a command says whose session has a terminal, as a shell's job or as the session's own
    process: (exit code, output).
    """
    starter = (
        [
            sys.executable,
            "-c",
            "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:], "
            "process_group=0).returncode)",
        ]
        if shell
        else []
    )
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(REPOSITORY)
        os.execvpe(sys.executable, [*starter, *command], {**environment(), **environ})
    said = b""
    with contextlib.suppress(OSError):  # how a terminal ends
        while part := os.read(terminal, 65536):
            said += part
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said.decode()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="subprocess has no process_group")
def test_a_shells_job_is_known_and_a_task_of_sruns_with_a_terminal_is_none():
    """``srun --pty bash`` and then ``python run.py``; ``srun --pty python run.py``, whose other
    tasks do come.
    """
    command = [sys.executable, "run.py", "train", "--dry-run", "--config", "configs/demo.yaml"]
    code, said = at_a_terminal(command, INTERACTIVE, shell=True)
    assert (
        code == 2
        and said.startswith("error: SLURM_NTASKS (4) is that of this shell's step")
        and said.count("\n") == 1
    ), said
    code, said = at_a_terminal(command, INTERACTIVE, shell=False)
    assert code == 0 and "x 4 ranks x" in said, said


@pytest.mark.skipif(sys.version_info < (3, 11), reason="subprocess has no process_group")
@pytest.mark.parametrize("open_to", [(1,), (1, 2)])
def test_a_task_of_sruns_that_writes_to_a_terminal_was_not_typed(open_to):
    """``srun --unbuffered``: a terminal for output, which no session has, and the step's process
    group in the session of slurmstepd.
    """
    code = (
        "from diffmoe.environment import typed_at_a_terminal; import os; "
        "print(os.isatty(1), typed_at_a_terminal())"
    )
    stepd = (
        "import subprocess, sys; "
        "sys.exit(subprocess.run([sys.executable, '-c', sys.argv[1]], process_group=0).returncode)"
    )
    ours, theirs = pty.openpty()
    try:
        subprocess.run(
            [sys.executable, "-c", stepd, code],
            cwd=REPOSITORY,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=theirs,
            stderr=theirs if 2 in open_to else subprocess.DEVNULL,
            start_new_session=True,
            check=True,
            timeout=120,
        )
        assert os.read(ours, 100).split() == [b"True", b"False"]
    finally:
        os.close(ours)
        os.close(theirs)


@pytest.mark.parametrize("address", ["no-such-host.invalid", "node[1-2]", "a..b", "300.1.2.3", ""])
@pytest.mark.parametrize("source", ["torchrun", "srun"])
def test_a_master_that_cannot_be_resolved_is_named_before_anybody_waits(
    monkeypatch, address, source
):
    def unknown(name, *_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    if address != "a..b":  # Python itself refuses that one
        monkeypatch.setattr(socket, "getaddrinfo", unknown)
    env = RankEnvironment(1, 2, 0, 1, source, None, address, 29500)
    with pytest.raises(UserError) as error:
        join(env)
    assert str(error.value).startswith(
        f"MASTER_ADDR ({address}) cannot be resolved on {socket.gethostname()}: "
    )
    assert str(error.value).endswith(
        "set MASTER_ADDR to the name or address by which all nodes reach rank 0's"
    ) and "\n" not in str(error.value)


def test_nobody_asks_for_a_master_that_is_not_needed(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("asked"))
    check_master(RankEnvironment(0, 1, 0, 1, "single", None, "no-such-host.invalid"))
    check_master(RankEnvironment(0, 2, 0, 2, "srun", "file:///tmp/store", "no-such-host.invalid"))


@pytest.mark.parametrize(
    ("environ", "text"),
    [
        (
            TORCHRUN,
            "rank 3 waits for the others of WORLD_SIZE (4) at MASTER_ADDR (host), MASTER_PORT "
            "(29500): start them, or see that the torchrun "
            "command runs on every node with the same address and port",
        ),
        (DEEPSPEED, "the deepspeed command runs on every node"),
        (
            without(TORCHRUN, "TORCHELASTIC_RUN_ID"),
            "if this was to be one process, unset RANK WORLD_SIZE LOCAL_RANK, which an earlier "
            "command may "
            "have left",
        ),
        (
            SLURM_STEP | {"MASTER_ADDR": "a", "MASTER_PORT": "5"},
            "rank 2 waits for the others of SLURM_NTASKS (3) at MASTER_ADDR (a), MASTER_PORT "
            "(5): start them, or if this was to be one process, unset SLURM_STEP_ID",
        ),
        (TORCHRUN | {"DIFFMOE_STORE": "/tmp/store"}, "at DIFFMOE_STORE (/tmp/store)"),
    ],
)
def test_what_a_rank_says_that_waits_for_the_others(environ, text):
    assert text in missed(detect(environ))


@pytest.mark.full
@pytest.mark.parametrize("meeting", ["store", "port"])
def test_who_waits_says_so_within_seconds_and_goes_on_waiting(monkeypatch, tmp_path, meeting):
    """Of two ranks one comes; it is stopped by the meeting's own patience."""
    script = (
        "import sys, datetime; from diffmoe.commands import common; from diffmoe.environment "
        "import RankEnvironment; "
        "common._NOTE_S = 0.2; store = sys.argv[1] or None; port = int(sys.argv[2])\n"
        "try: common.join(RankEnvironment(1, 2, 0, 1, 'environment', store, '127.0.0.1', port), "
        "datetime.timedelta(seconds=3))\n"
        "except RuntimeError: print('gave up')"
    )
    with (
        socket.socket() as closed
    ):  # bound and not listening: nobody else can take it, and nobody answers
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        store = f"file://{tmp_path}/store" if meeting == "store" else ""
        about = {
            "RANK": "1",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        done = subprocess.run(
            [sys.executable, "-c", script, store, str(port)],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=120,
            env={**environment(), **about, "TORCH_CPP_LOG_LEVEL": "ERROR"},
        )
    assert done.stdout == "gave up\n", done
    where = (
        f"DIFFMOE_STORE ({tmp_path}/store)"
        if meeting == "store"
        else f"MASTER_ADDR (127.0.0.1), MASTER_PORT ({port})"
    )
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("note: ")]
    assert line.startswith(
        f"note: rank 1 waits for the others of WORLD_SIZE (2) at {where}: start them, or if this "
        f"was to be one process, unset RANK"
    )
