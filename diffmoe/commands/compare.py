"""The subcommand ``compare``."""

from __future__ import annotations

from diffmoe.commands.common import Parser, one_process
from diffmoe.compare.plan import Plan, PlannedRun, parameters, read_plan
from diffmoe.environment import RankEnvironment
from diffmoe.errors import UserError
from diffmoe.markdown import table


def main(arguments: list[str], environment: RankEnvironment) -> int:
    """The exit code: 1 where a run did not end well.  UserError for bad input."""
    options = _parser().parse_intermixed_args(arguments)
    one_process("compare", environment)
    if options.jobs < 1:
        raise UserError(f"--jobs ({options.jobs}) must be at least 1")
    if sum([options.table, options.list]) > 1:
        raise UserError("--table and --list are two answers; give one")
    plan = read_plan(options.config, options.overrides)
    runs = _chosen(plan.runs, options.only, options.task)
    if options.list:
        for line in _listed(plan, runs):
            print(line)
        return 0
    from diffmoe.compare.report import write_report
    from diffmoe.compare.runs import carry_out

    troubles: list[str] = []
    if not options.table:
        say = lambda text: print(text, flush=True)
        for line in table(*_parameters(plan.runs), aligned=True):
            say(line)
        troubles = carry_out(runs, plan.comparison, options.jobs, say)
    if options.only is None and options.task is None:
        print(write_report(plan), flush=True)
    for trouble in troubles:
        print(f"not finished: {trouble}", flush=True)
    return 1 if troubles else 0


def _parser() -> Parser:
    parser = Parser(
        "compare",
        "Trains the routers that a YAML names from one recipe, with the same samples, noise, times "
        "and label drops, and writes a table of them into its folder: compare.md, compare.json, "
        "compare.png, confounds.png.  Interrupted, the same command goes on.",
    )
    add = parser.add_argument
    add("--config", required=True, help="YAML file of a comparison, see configs/compare/")
    add("--only", help="one run by its name (dense-s0), or all seeds of one (dense); no table")
    add("--task", type=int, help="one run by its number, from 0, as --list has them; no table")
    add("--table", action="store_true", help="run nothing; the table of what there is")
    add("--list", action="store_true", help="print the runs, how far they are, and their folders")
    add("--jobs", type=int, default=1, help="runs at the same time")
    add("overrides", nargs="*", metavar="field=value", help="of the YAML, or of all runs' recipe")
    return parser


def _chosen(runs: list[PlannedRun], only: str | None, task: int | None) -> list[PlannedRun]:
    if only is not None and task is not None:
        raise UserError(f"--only ({only}) and --task ({task}) both choose a run; give one")
    if task is not None:
        if not 0 <= task < len(runs):
            raise UserError(f"--task ({task}) must be from 0 to {len(runs) - 1}")
        return [runs[task]]
    if only is None:
        return runs
    found = [run for run in runs if only in (run.name, run.variant)]
    if not found:
        names = ", ".join(run.name for run in runs)
        raise UserError(f"--only ({only}) must be one of {names}")
    return found


def _listed(plan: Plan, runs: list[PlannedRun]) -> list[str]:
    from diffmoe.compare.runs import state

    rows = [
        (number, run.name, state(run, plan.comparison), str(run.folder))
        for number, run in enumerate(plan.runs)
        if run in runs
    ]
    return table(("task", "run", "state", "folder"), rows, aligned=True)


def _parameters(runs: list[PlannedRun]) -> tuple[tuple[str, ...], list[tuple]]:
    """Head and rows: what every router holds and activates."""
    head = ("router", "parameters", "activated", "without shared experts", "MFLOPs a sample")
    variants = {run.variant: parameters(run.config) for run in runs}
    return head, [
        (
            name,
            f"{p.total:,}",
            f"{p.activated:,}",
            f"{p.activated_unshared:,}",
            f"{p.flops / 1e6:.1f}",
        )
        for name, p in variants.items()
    ]
