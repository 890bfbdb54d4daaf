"""What becomes of an exception inside a step: a user's is one line and exit code 2; any other keeps
its traceback, exits with 1, and a job script tries again.
"""

import builtins
import shutil
import subprocess
import sys

import pytest

import diffmoe.__main__ as run
from diffmoe.errors import UserError, run_command
from diffmoe.parallel.collectives import gather_objects
from launcher.job import BAD_INPUT, START_AGAIN, after_training
from programs import REPOSITORY, Nursery, tiny

# names that made a lost peer of any RuntimeError
TEXT = "train.batch (16) is gloo's, NCCL's and nobody's"


def fail_in_a_step(arguments):
    """run.py's main, but step 1 raises what the first argument names, on every rank."""
    import diffmoe.training.loop as loop

    kind, *arguments = arguments
    original = loop.train_step

    def train_step(engine, ema, batches, config, layout, groups, step, *more):
        if step == 1:
            gather_objects(
                None, groups.world
            )  # all at once: a rank that is late would end by what the first one says
            raise (UserError if kind == "UserError" else getattr(builtins, kind))(TEXT)
        return original(engine, ema, batches, config, layout, groups, step, *more)

    loop.train_step = train_step
    return run.main(arguments)


@pytest.fixture(scope="module")
def nursery():
    return Nursery("test_errors:fail_in_a_step")


def verdict(folder, code, starts=1):
    """What the job script does after so many such ends: (exit code, text)."""
    job = folder / "jobs" / str(code)
    job.mkdir(parents=True)
    shutil.copy(folder / "config.yaml", job)
    return [after_training(job, code).code for _ in range(starts)]


@pytest.mark.full
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("kind", ["ValueError", "KeyError", "RuntimeError", "AssertionError"])
def test_a_mistake_of_ours_keeps_its_traceback_and_the_job_tries_again(
    nursery, tmp_path, world, kind
):
    results = nursery.run(
        world,
        kind,
        *tiny(tmp_path, "run.timeout_s=20", "train.save_every=0", f"parallel.ep={world}"),
    )
    assert [result.returncode for result in results] == [1] * world, results
    for result in results:
        assert (
            "Traceback (most recent call last)" in result.stderr
            and "in fail_in_a_step" in result.stderr
        ), result
        assert result.stderr.rstrip().splitlines()[-1].startswith(f"{kind}: "), result
        assert "error: " not in result.stderr.lower().replace(f"{kind.lower()}: ", ""), result
    assert verdict(tmp_path, 1, starts=2) == [START_AGAIN] * 2
    assert not (tmp_path / "running.json").exists()


@pytest.mark.full
@pytest.mark.parametrize("world", [1, 2])
def test_a_users_mistake_is_one_line_and_the_job_does_not_try_again(nursery, tmp_path, world):
    results = nursery.run(
        world,
        "UserError",
        *tiny(tmp_path, "run.timeout_s=20", "train.save_every=0", f"parallel.ep={world}"),
    )
    assert [result.returncode for result in results] == [2] * world, results
    assert [result.stderr for result in results] == [
        f"error: {'rank 1: ' * rank}{TEXT}\n" for rank in range(world)
    ]
    assert verdict(tmp_path, 2) == [BAD_INPUT]


@pytest.mark.parametrize("kind", [ValueError, KeyError, RuntimeError])
def test_a_verb_that_fails_keeps_its_traceback_too(monkeypatch, capsys, kind):
    def main(*_):
        raise kind(TEXT)

    for module in (run, __import__("launcher.__main__", fromlist=["main"])):
        monkeypatch.setattr(
            module.importlib, "import_module", lambda _name: type("Verb", (), {"main": main})
        )
        arguments = (["train"],) if module is run else (["plan"],)
        with pytest.raises(kind):
            module.main(*arguments)
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "words",
    [
        ["-m", "launcher", "plan", "--config", "configs/demo.yaml"],
        ["-m", "launcher", "--help"],
        ["run.py", "--dry-run", "--config", "configs/demo.yaml", "--ranks", "2"],
        ["-m", "diffmoe", "--help"],
    ],
)
def test_a_reader_that_has_gone_ends_a_command_quietly(words):
    """As ``| head -1`` does once it has its line."""
    program = subprocess.Popen(
        [sys.executable, *words], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    program.stdout.close()
    assert (program.stderr.read(), program.wait(60)) == (b"", 141)


def test_another_broken_pipe_keeps_its_traceback():
    def main(_arguments):
        raise BrokenPipeError("of a worker")

    with pytest.raises(BrokenPipeError, match="of a worker"):
        run_command(main)


LAST = """
import atexit, builtins, os, sys
import diffmoe.__main__ as run

class Held:
    def __del__(self):
        os.write(2, b"taken apart")

def main(_arguments):
    if "rank" in sys.argv:
        import torch
    builtins.held = Held()
    atexit.register(print, "cleared up")
    print("done")
    return 3

run.main = main
sys.exit(run.command())
"""


@pytest.mark.parametrize(("words", "left"), [(["rank"], ""), ([], "taken apart")])
def test_a_rank_ends_before_python_takes_its_interpreter_apart(words, left):
    """Where a thread of gloo's might still run; what is to happen at exit has happened."""
    program = subprocess.run(
        [sys.executable, "-c", LAST, *words],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (program.returncode, program.stdout, program.stderr) == (3, "done\ncleared up\n", left)
