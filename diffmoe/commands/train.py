"""The subcommand ``train``.  torch comes in once the command line and configuration are known to be
good: mistakes and ``--dry-run`` answer at once, also where there is no torch.
"""

from __future__ import annotations

import os

import yaml

from diffmoe.commands.common import Parser, join, leave, on_our_hosts
from diffmoe.config import Config, check_training, config_to_tree, load_config
from diffmoe.data.fit import check_local_index
from diffmoe.deepspeed_json import merge_deepspeed, precision, read_deepspeed, zero_stage
from diffmoe.environment import RankEnvironment
from diffmoe.errors import UserError, stop_requests
from diffmoe.layout import Layout, resolve_layout
from diffmoe.models.count import count
from diffmoe.placement import describe as describe_place


def main(arguments: list[str], environment: RankEnvironment) -> int:
    """The exit code, 0 also for a run that was asked to stop.  UserError for bad input."""
    # From the first lines on: importing torch and joining take a while.
    with stop_requests() as stop_requested:
        return _train(arguments, environment, stop_requested)


def _train(arguments: list[str], environment: RankEnvironment, stop_requested: list[int]) -> int:
    description = "Train a model; resumes from the newest checkpoint in run.folder."
    parser = Parser(prog="train", description=description)
    add = parser.add_argument
    add("--config", help="YAML file, see configs/")
    add("--deepspeed_config", help="DeepSpeed JSON, see ds_configs/ (default: ZeRO 1, fp32)")
    recipe = "resume where batch, seed, data, … have changed: weights, moments and averages stay"
    add("--new-recipe", action="store_true", help=recipe)
    add("--dry-run", action="store_true", help="print everything that would be run, and exit")
    add("--ranks", type=int, help="with --dry-run: the number of ranks to resolve for")
    add("overrides", nargs="*", metavar="section.field=value")
    options = parser.parse_intermixed_args(arguments)
    if options.config is None and not options.dry_run:
        raise UserError("train needs --config")
    if options.ranks is not None and (not options.dry_run or options.ranks < 1):
        raise UserError(f"--ranks ({options.ranks}) goes with --dry-run and must be at least 1")
    config = load_config(options.config, options.overrides)
    check_training(config)
    try:
        layout = resolve_layout(config, options.ranks or environment.world)
    except UserError as error:
        if options.dry_run and options.ranks is None:
            raise UserError(f"{error}, or --ranks N to resolve for N ranks") from None
        raise
    deepspeed_tree = read_deepspeed(options.deepspeed_config)
    merged = merge_deepspeed(deepspeed_tree, config, layout)
    not_compared = check_local_index(config) if options.dry_run else None
    if environment.rank == 0:
        print(describe(config, layout, merged, complete=options.dry_run), flush=True)
        before, stage = zero_stage(deepspeed_tree), zero_stage(merged)
        if before != stage:
            print(
                f"note: bf16 at ZeRO {before} has no fp32 masters that could be checkpointed; "
                f"it runs as ZeRO {stage}",
                flush=True,
            )
    if options.dry_run:
        if environment.rank == 0:
            print(describe_engine(config, merged, None))
            if options.ranks is None:
                print(
                    f"note: resolved for world size {layout.ranks}; --ranks N resolves for N ranks"
                )
            if not_compared is not None:
                print(f"note: {not_compared}")
        return 0
    # c10d prints a stack of its own for every broken connection; the watchdog says it in one line.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from diffmoe.parallel.groups import build_groups
    from diffmoe.training import limits, loop

    patience = limits.patience(config.run.timeout_s)
    limits.set_nccl(config.run.timeout_s)
    device = join(environment, patience, config.run.device)
    layout = on_our_hosts(config, layout)
    if environment.rank == 0:
        print(describe_engine(config, merged, device.type), flush=True)
        print(f"place    {describe_place(device.type)}", flush=True)
    loop.train(
        config,
        layout,
        merged,
        build_groups(layout.ep, layout.pool_ranks, patience, layout.per_host),
        device,
        stop_requested,
        environment.local_world,
        options.new_recipe,
    )
    leave()
    return 0


def describe(config: Config, layout: Layout, deepspeed_tree: dict, complete: bool) -> str:
    """Sizes, batch, pool; with ``complete`` the whole configuration and the merged JSON."""
    model, moe = config.model, config.moe
    counts = count(model, moe)
    lines = []
    if complete:
        lines.append(yaml.safe_dump(config_to_tree(config), sort_keys=False))
        lines += [f"deepspeed: {deepspeed_tree}", ""]
    # The tables count the fixed position table.
    total, activated = (n + counts.positions for n in (counts.total, counts.activated))
    lines.append(
        f"model    {model.family} {model.depth} x {model.width}, {total / 1e6:.2f} M parameters "
        f"({activated / 1e6:.2f} M activated), {counts.forward_macs / 1e9:.2f} GMACs a sample"
    )
    lines.append(
        f"batch    {layout.micro_batch} micro x {layout.ranks} ranks x {layout.accumulation} "
        f"accumulation = {layout.batch}"
    )
    if model.family != "dense":
        lines.append(
            f"experts  {moe.experts} over {layout.ep} expert-parallel ranks, "
            f"in {layout.ranks // layout.ep} copies"
        )
        lines.append(
            f"pool     {layout.pool} samples = {layout.pool * model.tokens} tokens (moe.pool: "
            f"{moe.pool}), held by {layout.pool_ranks} rank{'s' * (layout.pool_ranks > 1)}"
        )
    return "\n".join(lines)


def describe_engine(config: Config, deepspeed_tree: dict, device: str | None) -> str:
    """ZeRO stage, precision, recompute, and whether blocks are compiled on ``device`` (cpu, cuda;
    None: not known yet), in one line.  ``deepspeed_tree``: the merged one.
    """
    stage, bf16 = zero_stage(deepspeed_tree), precision(deepspeed_tree) == "bf16"
    how = "bf16, fp32 masters" if bf16 else f"fp32 ({config.run.fp32_precision})"
    line = f"engine   ZeRO {stage}, {how}, recompute {config.parallel.recompute}"
    if config.train.compiles(device or "cpu", stage):
        line += ", compiled"
    elif config.train.compiles("cuda", stage):
        line += ", not compiled (CPU)" if device else ", compiled on a GPU"
    return line
