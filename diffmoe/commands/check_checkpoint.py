"""The subcommand ``check-checkpoint``."""

from __future__ import annotations

from diffmoe.commands.common import Parser, one_process
from diffmoe.environment import RankEnvironment
from diffmoe.errors import UserError
from diffmoe.remote import AnyPath, any_path


def main(arguments: list[str], environment: RankEnvironment) -> int:
    """Returns 0 when everything is intact, else 1.  UserError where there is no checkpoint."""
    parser = Parser(
        prog="check-checkpoint",
        description="Whether checkpoints are intact: the manifest, every file's size and "
        "checksums, every tensor that the configuration needs. Exit code 0, "
        "1 where one is not, 2 for bad input.",
    )
    words = "checkpoint folder, or run folder (all of its checkpoints); also at a store: s3://…"
    parser.add_argument("folder", nargs="+", help=words)
    words = "also look for values that are not finite"
    parser.add_argument("--values", action="store_true", help=words)
    options = parser.parse_args(arguments)
    one_process("check-checkpoint", environment)
    from diffmoe.checkpoints.reader import checkpoints_at

    problems = 0
    for folder in map(any_path, options.folder):
        for path in checkpoints_at(folder):
            problems += _check(path, options.values)
    return 1 if problems else 0


def _check(path: AnyPath, values: bool) -> int:
    """Prints what is wrong with one checkpoint, or what it is.  Returns the number of problems."""
    from diffmoe.checkpoints.reader import Checkpoint
    from diffmoe.training.checkpoint_check import check_files, check_tensors, check_values

    try:
        checkpoint = Checkpoint(path)
        problems = [*check_files(checkpoint), *check_tensors(checkpoint)]
        if values and not problems:  # what is corrupt cannot be read
            problems += check_values(checkpoint)
    except (UserError, OSError) as error:
        problems = [str(error)]
    for problem in problems:
        print(f"corrupt  {problem}", flush=True)
    if not problems:
        sizes = [file.bytes for file in checkpoint.manifest.files.values()]
        text = f"step {checkpoint.step}, {len(sizes)} files, {sum(sizes) / 1e9:.2f} GB"
        print(f"intact   {path}: {text}, {', '.join(checkpoint.kinds())}", flush=True)
    return len(problems)
