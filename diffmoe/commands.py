"""The verbs train and sample.  torch comes in once the command line and configuration are known to be good: mistakes and
``--dry-run`` answer at once, also where there is no torch."""

from __future__ import annotations

import argparse
import datetime
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from diffmoe.config import Config, config_to_tree, load_config, override
from diffmoe.deepspeed_json import merge_deepspeed, read_deepspeed
from diffmoe.layout import Layout, resolve_layout
from diffmoe.models.count import count
from launcher.environment import RankEnvironment

if TYPE_CHECKING:
    import torch


class Parser(argparse.ArgumentParser):
    """argparse whose complaint is a ValueError: one line, on one rank."""

    def error(self, message: str) -> None:
        raise ValueError(f"{message} (see run.py {self.prog} --help)")


def train(arguments: list[str], environment: RankEnvironment) -> int:
    """The verb ``train``; returns the exit code.  ValueError for bad input."""
    parser = Parser(prog="train", description="Train a model; resumes from the newest checkpoint in run.folder.")
    parser.add_argument("--config", help="YAML file, see configs/")
    parser.add_argument("--deepspeed_config", help="DeepSpeed JSON, see ds_configs/ (default: ZeRO 1, fp32)")
    parser.add_argument("--dry-run", action="store_true", help="print everything that would be run, and exit")
    parser.add_argument("--ranks", type=int, help="with --dry-run: the number of ranks to resolve for")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    options = parser.parse_intermixed_args(arguments)
    if options.config is None and not options.dry_run:
        raise ValueError("train needs --config")
    if options.ranks is not None and (not options.dry_run or options.ranks < 1):
        raise ValueError(f"--ranks ({options.ranks}) goes with --dry-run and must be at least 1")
    config = load_config(options.config, options.overrides)
    layout = resolve_layout(config, options.ranks or environment.world)
    deepspeed_tree = read_deepspeed(options.deepspeed_config)
    merged = merge_deepspeed(deepspeed_tree, config, layout)
    if environment.rank == 0:
        print(describe(config, layout, merged, complete=options.dry_run), flush=True)
    if options.dry_run:
        return 0
    from diffmoe.parallel.groups import build_groups
    from diffmoe.training import loop

    device = join(environment)
    loop.train(config, layout, deepspeed_tree, build_groups(layout.ep, layout.pool_ranks), device)
    leave()
    return 0


def join(environment: RankEnvironment) -> torch.device:
    """Joins the other ranks (NCCL on GPUs, gloo on CPUs); returns this rank's device."""
    import torch
    import torch.distributed as dist

    from diffmoe.device import backend, local_device

    if "OMP_NUM_THREADS" not in os.environ:
        # Ranks of one node share its cores; torch would give every one of them all.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // environment.local_world))
    device = local_device(environment.local_rank, environment.local_world)
    dist.init_process_group(
        backend(device), init_method=environment.init_method, rank=environment.rank, world_size=environment.world,
        timeout=datetime.timedelta(minutes=30), device_id=device if device.type == "cuda" else None)
    return device


def leave() -> None:
    """Waits for the other ranks and parts from them."""
    import torch.distributed as dist

    dist.barrier()  # a rank that leaves early makes the others abort
    dist.destroy_process_group()


def describe(config: Config, layout: Layout, deepspeed_tree: dict, complete: bool) -> str:
    """What is about to run: sizes, batch arithmetic, pool; with ``complete`` the whole resolved configuration."""
    model, moe = config.model, config.moe
    counts = count(model, moe)
    zero = deepspeed_tree.get("zero_optimization", {}).get("stage", 0)
    precision = "bf16, fp32 masters" if deepspeed_tree.get("bf16", {}).get("enabled") else "fp32"
    lines = []
    if complete:
        lines += [yaml.safe_dump(config_to_tree(config), sort_keys=False), f"deepspeed: {deepspeed_tree}", ""]
    published = counts.positions  # the tables count the fixed position table
    lines.append(f"model    {model.family} {model.depth} x {model.width}, {(counts.total + published) / 1e6:.2f} M parameters "
                 f"({(counts.activated + published) / 1e6:.2f} M activated), {counts.forward_macs / 1e9:.2f} GMACs a sample")
    lines.append(f"batch    {layout.micro_batch} micro x {layout.ranks} ranks x {layout.accumulation} accumulation = "
                 f"{layout.batch}")
    if model.family != "dense":
        lines.append(f"experts  {moe.experts} over {layout.ep} expert-parallel ranks, in {layout.ranks // layout.ep} copies")
        lines.append(f"pool     {layout.pool} samples = {layout.pool * model.tokens} tokens (moe.pool: {moe.pool}), "
                     f"held by {layout.pool_ranks} rank{'s' * (layout.pool_ranks > 1)}")
    lines.append(f"engine   ZeRO {zero}, {precision}, recompute {config.parallel.recompute}")
    return "\n".join(lines)


def sample(arguments: list[str], environment: RankEnvironment) -> int:
    """The verb ``sample``; returns the exit code.  ValueError for bad input."""
    parser = Parser(prog="sample", description="Images from a checkpoint: a PNG grid and an npz (images, labels).")
    parser.add_argument("--checkpoint", required=True, help="checkpoint folder, or run folder (its newest)")
    parser.add_argument("--classes", default="all", help="'all', or numbers and ranges: 0,3,7-9")
    parser.add_argument("--count", type=int, help="images in all, classes in turn (default: ten of each class)")
    parser.add_argument("--cfg", type=float, help="guidance (default: sample.cfg of the run)")
    parser.add_argument("--capacity", type=float, help="experts per token on average (default: sample.capacity of the run, or "
                        "else the learned thresholds)")
    parser.add_argument("--seed", type=int, help="seed of the noise (default: run.seed)")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema")
    parser.add_argument("--vae", help="AutoencoderKL that decodes latents: a folder, or the hub's owner/name")
    parser.add_argument("--out", default="samples", help="writes OUT.png and OUT.npz")
    parser.add_argument("--report", action="store_true",
                        help="also write the capacity used, by layer, time and class: OUT.capacity.json, .md and .png")
    parser.add_argument("overrides", nargs="*", metavar="sample.field=value")
    options = parser.parse_intermixed_args(arguments)
    import numpy as np
    import torch

    from diffmoe.evaluation.capacity_report import CapacityMeter, write_report
    from diffmoe.evaluation.decoding import Decoder, open_decoder
    from diffmoe.evaluation.generate import check_dial, generate_everywhere
    from diffmoe.evaluation.plots import image_grid
    from diffmoe.models.dit import DiT
    from diffmoe.models.interchange import load_buffers, load_logical
    from diffmoe.parallel.collectives import raise_together
    from diffmoe.parallel.groups import build_groups
    from diffmoe.training.checkpoint import EMA, MASTER, Checkpoint

    checkpoint = Checkpoint(Path(options.checkpoint))
    config = sampling_config(checkpoint.config(), options)
    classes = _parse_classes(options.classes, config.model.classes)
    total = options.count if options.count is not None else 10 * len(classes)
    if total < 1:
        raise ValueError(f"--count ({total}) must be at least 1")
    labels = [classes[i % len(classes)] for i in range(total)]
    device = join(environment)
    groups = build_groups(1, 1)  # every rank holds the whole model
    model = DiT(config.model, config.moe, time_scale=config.diffusion.time_scale)
    out = Path(options.out.removesuffix(".npz").removesuffix(".png"))
    npz, png = Path(f"{out}.npz"), Path(f"{out}.png")  # with_suffix would cut cfg1.5 to cfg1
    problem: Exception | None = None
    decoder: Decoder | None = None
    meter: CapacityMeter | None = None
    try:
        load_logical(model, checkpoint.tensors(EMA if options.weights == "ema" else MASTER))
        load_buffers(model, checkpoint.tensors("buffers"))
        check_dial(model, config.sample)
        decoder = None if options.vae is None else open_decoder(options.vae, config, None, None, device)
        meter = CapacityMeter(model, config, total, device) if options.report else None
        npz.parent.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        problem = error
    raise_together(problem, groups.world)
    model.to(device).eval()
    images = generate_everywhere(model, config, labels, groups.world, device, progress=environment.rank == 0,
                                 meter=meter)
    used = None if meter is None else meter.merged(groups.world)
    if environment.rank == 0:
        if decoder is not None:
            parts = images.split(config.sample.batch)
            images = torch.cat([decoder.function(part).float() / 127.5 - 1 for part in parts])
        np.savez(npz, images=images.numpy(), labels=np.array(labels))
        shown = images[: 10 * config.sample.columns].numpy()
        image_grid(shown, config.sample.columns, png)
        if config.sample.capacity is not None and options.weights == "raw":
            print("note: the dial was set on the EMA weights; raw weights may use another capacity, see --report")
        print(f"step {checkpoint.step}, {options.weights} weights, {config.sample.sampler} {config.sample.steps} steps, "
              f"cfg {config.sample.cfg}, {config.sample.routing} routing: {total} images in {npz}, "
              f"{len(shown)} of them in {png}", flush=True)
        if used is not None:
            paths = write_report(used, config, str(out))
            print(f"capacity used: {used.mean():.4f} experts per token; {', '.join(map(str, paths))}", flush=True)
    leave()
    return 0


def sampling_config(config: Config, options: argparse.Namespace) -> Config:
    """The run's configuration with what the command line says; only the ``sample`` section may be overridden."""
    strangers = [text for text in options.overrides if not text.startswith("sample.")]
    if strangers:
        raise ValueError(f"override {strangers[0]!r}: sampling takes the rest from the checkpoint, only sample.* may change")
    said = {"sample.cfg": options.cfg, "run.seed": options.seed,
            "sample.capacity": getattr(options, "capacity", None)}  # not every verb that samples has the last
    return override(config, options.overrides + [f"{name}={value}" for name, value in said.items() if value is not None])


def _parse_classes(text: str, classes: int) -> list[int]:
    if text == "all":
        return list(range(classes))
    chosen: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not re.fullmatch("[0-9]+(-[0-9]+)?", part):
            raise ValueError(f"--classes {text!r} must be 'all' or numbers and ranges such as 0,3,7-9")
        chosen += range(int(first), int(last or first) + 1)
    if not chosen or max(chosen) >= classes:
        raise ValueError(f"--classes {text!r} must name classes from 0 to {classes - 1} (model.classes = {classes})")
    return chosen
