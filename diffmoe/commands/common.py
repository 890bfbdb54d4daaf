"""What several subcommands need: the parser, the ranks' coming and going, a checkpoint's model.

torch comes in only where ranks join: mistakes on the command line answer at once, also where there
is no torch.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from diffmoe.config import Config, check_guidance, override
from diffmoe.environment import RankEnvironment, check_master, host_name, missed
from diffmoe.errors import UserError
from diffmoe.layout import Layout, over_hosts, runs_of
from diffmoe.paths import PathParser
from diffmoe.placement import cores_each, place

if TYPE_CHECKING:
    import torch
    from torch.distributed import Store

    from diffmoe.checkpoints.reader import Checkpoint
    from diffmoe.diffusion.guidance import Others
    from diffmoe.evaluation.decoding import Decoder
    from diffmoe.models.dit import DiT

_PATIENCE = datetime.timedelta(minutes=30)
_NOTE_S = 15.0  # by which the others of a start have come


# What the help of a subcommand ends with; a kind of bench needs no more than its name.
_EXAMPLES = {
    "train": "deepspeed --log_level error --num_gpus 2 run.py "
    "--deepspeed_config ds_configs/zero1_fp32.json "
    "--config configs/demo.yaml run.folder=runs/mine",
    "sample": "python run.py sample --checkpoint runs/demo --classes 0-9 --count 100 --cfg 1.5",
    "evaluate": "python run.py evaluate --checkpoint runs/demo --reference data/digits "
    "--extractor digits --count 500 --out runs/demo/scores",
    "sweep": "python run.py sweep --checkpoint runs/demo --guidance null,capacity "
    "--scales 1,1.25,1.5,2,3 --reference data/digits --extractor digits --count 500 "
    "--out runs/demo/sweep\n"
    "python run.py sweep --checkpoint runs/demo --ema-lengths 0.03,0.05,0.1 "
    "--reference data/digits --extractor digits --count 500 --out runs/demo/lengths",
    "compare": "python run.py compare --config configs/compare/smoke.yaml --jobs 2\n"
    "python run.py compare --config configs/compare/fashion14.yaml --only dense-s0\n"
    "python run.py compare --config configs/compare/fashion14.yaml --table",
    "encode": "torchrun --nproc-per-node 8 run.py encode --source imagenet/train "
    "--image-size 256 --out data/imagenet256_latents --vae stabilityai/sd-vae-ft-mse",
    "inspect-data": "python run.py inspect-data data/digits",
    "import": "python run.py import --research weights.pt "
    "--config configs/diffmoe_l_e16_flow.yaml run.folder=runs/l_e16",
    "export": "python run.py export --checkpoint runs/demo --format hf --out demo_hf",
    "check-checkpoint": "python run.py check-checkpoint runs/demo --values",
    "profile": "torchrun --standalone --nproc-per-node 2 run.py profile "
    "--config configs/demo.yaml --synthetic --json steps.jsonl",
    "verify": "python run.py verify --quick",
}


# What ``--checkpoint`` says of itself.
CHECKPOINT_HELP = "checkpoint folder, or run folder (its newest); also at a store: s3://…"


class Parser(PathParser):
    """The parser of a subcommand of run.py."""

    def __init__(self, prog: str, description: str | None = None) -> None:
        example = _EXAMPLES.get(prog, f"python run.py {prog}")
        super().__init__(example, prog=f"run.py {prog}", description=description)


def one_process(name: str, environment: RankEnvironment) -> None:
    """Raises UserError where a subcommand for one process was started as several."""
    if environment.world != 1:
        raise UserError(f"{name} runs in one process; WORLD_SIZE is {environment.world}")


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """What subcommands that sample have in common (`sampling_config`, `sampling_model`)."""
    from diffmoe.data.values import numbers_of

    add = parser.add_argument
    weights = (
        "ema (default; the first of train.ema), ema:0.999 (by its decay), length:0.07 (any that "
        "train.ema_lengths' averages can make) or raw"
    )
    add("--weights", help=weights)
    add("--cfg", type=float, help="guidance (default: sample.cfg of the run)")
    guide = "null (the null class), capacity (itself with fewer experts a token), a checkpoint"
    add("--guide", help=f"what it leads away from: {guide} (default: sample.guide)")
    interval = "guidance only at these times, 0 noise to 1 data (default: sample.cfg_interval)"
    add("--cfg-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help=interval)
    capacity = "experts per token of the guide 'capacity' (default: sample.guide_capacity)"
    add("--guide-capacity", type=float, help=capacity)
    add("--seed", type=int, help="seed of noise and random classes (default: run.seed)")
    add("--vae", help="decoder of latents: an AutoencoderKL (folder, hub id), or TorchScript file")
    for name in ("--latent-scale", "--latent-shift"):
        add(name, type=numbers_of, help="(default: the training data's, else the VAE's own)")
    dtype = "of the weights; bf16 is faster on a GPU (default: sample.dtype)"
    add("--dtype", choices=("fp32", "bf16"), help=dtype)
    fp32 = "of a GPU's fp32 matmuls (default: that of the run)"
    add("--fp32-precision", choices=("ieee", "tf32"), help=fp32)
    compiled = "torch.compile the model; auto: on a GPU (default: train.compile of the run)"
    add("--compile", choices=("auto", "true", "false"), help=compiled)
    add_device(parser)
    add("overrides", nargs="*", metavar="sample.field=value")


def add_device(parser: argparse.ArgumentParser) -> None:
    """``--device``, of subcommands whose device no configuration says."""
    words = "auto (default): a GPU if there is one"
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help=words)


def join(
    environment: RankEnvironment, timeout: datetime.timedelta = _PATIENCE, asked: str = "auto"
) -> torch.device:
    """Joins the other ranks (NCCL on GPUs, gloo on CPUs); returns this rank's device, the ``asked``
    one (see ``device.local_device``).  ``timeout``: of a collective.  UserError on all ranks where
    one has no device.
    """
    check_master(environment)
    import torch
    import torch.distributed as dist

    from diffmoe.device import backend, bound, check_own_gpu, local_device

    device: torch.device | None = None
    problem: UserError | None = None
    try:
        device = local_device(environment.local_rank, environment.local_world, asked)
        place(environment, device)
    except UserError as error:
        if environment.world == 1:
            raise
        problem = error
    if "OMP_NUM_THREADS" not in os.environ:  # torch would give every rank all of the node's
        torch.set_num_threads(cores_each(environment.local_world))
    with _note_where_it_takes_long(environment):
        # The store comes first, by itself: NCCL's own words for two ranks on one GPU are not for
        # users.
        try:
            url = environment.init_method or "env://"
            meeting = dist.rendezvous(url, environment.rank, environment.world, timeout=timeout)
            store, _, _ = next(meeting)
        except RuntimeError as error:
            if "EADDRINUSE" not in str(error):
                raise problem or error
            port = os.environ.get("MASTER_PORT")
            raise UserError(
                f"MASTER_PORT ({port}) is in use on this machine, perhaps by another run: give the "
                "launcher another --master_port"
            ) from None
        store.set_timeout(timeout)
        _check_devices("device", problem, device, store, environment)
        assert device is not None
        if device.type == "cuda":
            try:
                check_own_gpu(device, environment.local_rank, environment.local_world, store)
            except UserError as error:
                problem = error
            _check_devices("own GPU", problem, device, store, environment)
        dist.init_process_group(
            backend(device),
            store=dist.PrefixStore("ranks", store),
            rank=environment.rank,
            world_size=environment.world,
            timeout=timeout,
            device_id=bound(device, environment.world),
        )
    return device


def _check_devices(
    name: str,
    problem: UserError | None,
    device: torch.device | None,
    store: Store,
    environment: RankEnvironment,
) -> None:
    """AgreedError on all ranks where one's device has a problem, or they have different ones."""
    from diffmoe.device import share
    from diffmoe.parallel.collectives import AgreedError

    mine = (socket.gethostname(), str(problem or ""), device.type if device else "")
    hosts, problems, kinds = zip(*share(mine, name, store, environment.rank, environment.world))
    first = next((rank for rank, text in enumerate(problems) if text), None)
    other = next((rank for rank, kind in enumerate(kinds) if kind != kinds[0]), None)
    if first is not None:
        message = problems[first]
        if len(set(problems)) > 1:
            message = f"rank {first} on {hosts[first]}: {message}"
    elif other is not None:
        message = (
            f"all ranks must have one kind of device: rank 0 on {hosts[0]} has {kinds[0]}, "
            f"rank {other} on {hosts[other]} has {kinds[other]}"
        )
    else:
        return
    heard, deadline = store.add(f"{name} heard", 1), time.monotonic() + 10.0
    while environment.rank == 0 and heard < environment.world and time.monotonic() < deadline:
        time.sleep(0.05)  # the store may end with this process: the others read it first
        heard = store.add(f"{name} heard", 0)
    raise AgreedError(message) from problem


@contextlib.contextmanager
def _note_where_it_takes_long(environment: RankEnvironment) -> Iterator[None]:
    """One line a node, once the ranks should have met: their patience is long, since a large job
    starts slowly.
    """
    note = threading.Timer(
        _NOTE_S, lambda: print(f"note: {missed(environment)}", file=sys.stderr, flush=True)
    )
    note.daemon = True
    if environment.world > 1 and environment.local_rank == 0:
        note.start()
    try:
        yield
    finally:
        note.cancel()


def on_our_hosts(config: Config, layout: Layout) -> Layout:
    """The layout with ``parallel.exchange`` as on the joined ranks' hosts, or AgreedError."""
    from diffmoe.parallel.collectives import AgreedError, gather_objects
    from diffmoe.parallel.groups import build_groups

    hosts = gather_objects(host_name(), build_groups(1, 1).world)
    try:
        return over_hosts(layout, config.parallel.exchange, runs_of(hosts))
    except UserError as error:
        raise AgreedError(str(error)) from None


def leave() -> None:
    """Waits for the other ranks and parts from them: a rank that still has its group now and then
    aborts at its exit.  This rank's work is done: one that is lost on its way out is noted, and its
    own exit code tells its launcher.
    """
    import torch.distributed as dist

    from diffmoe.parallel.collectives import is_lost_peer

    try:
        if dist.get_world_size() > 1:
            dist.barrier()  # a rank that leaves early makes the others abort
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        note = "note: another rank was lost on its way out, after the work was done"
        print(note, file=sys.stderr, flush=True)
    dist.destroy_process_group()


def sampling_config(config: Config, options: argparse.Namespace) -> Config:
    """The run's configuration with what the command line says; only the ``sample`` section may be
    overridden. UserError also for guidance that the run's training does not allow.
    """
    for text in options.overrides:
        if not text.startswith("sample."):
            raise UserError(
                f"override {text!r}: sampling takes the rest from the checkpoint, only sample.* "
                "may change"
            )
    said = {
        "sample.cfg": options.cfg,
        "sample.cfg_interval": options.cfg_interval,
        "sample.guide": options.guide,
        "sample.guide_capacity": options.guide_capacity,
        "sample.dtype": options.dtype,
        "run.seed": options.seed,
        "run.fp32_precision": options.fp32_precision,
        "train.compile": options.compile,
        "sample.capacity": getattr(options, "capacity", None),  # only sample has it
    }
    more = [f"{name}={value}" for name, value in said.items() if value is not None]
    config = override(config, options.overrides + more)
    check_guidance(config)
    return config


def sampling_model(
    checkpoint: Checkpoint, config: Config, options: argparse.Namespace, device: torch.device
) -> tuple[DiT, Others, Decoder | None, list[str]]:
    """The model of a checkpoint and the others that sampling needs, fp32 on the CPU and compiled if
    they are to be (see :func:`to_device`), the decoder of ``--vae``, and what to say of them.
    UserError where they do not fit.
    """
    from diffmoe.diffusion.guidance import open_others
    from diffmoe.evaluation.decoding import checkpoint_data, open_decoder, vae_note
    from diffmoe.evaluation.generate import check_dial, threshold_note
    from diffmoe.models.compiled import compile_blocks, compiles

    model, decoder = whole_model(checkpoint, config, options.weights or "ema"), None
    check_dial(model, config.sample)
    others = open_others(config)
    compiled, note = compiles(config.train, device)
    if compiled:
        for each in filter(None, (model, *others)):
            compile_blocks(each)
    notes = [threshold_note(model, config.sample), note]
    if options.vae is not None:
        numbers = (options.latent_scale, options.latent_shift)
        index = checkpoint_data(config, *numbers, "--latent-scale and --latent-shift")
        decoder = open_decoder(options.vae, config, index, *numbers, device)
        notes.append(vae_note(config, decoder, index))
    return model, others, decoder, [note for note in notes if note is not None]


def to_device(models: Iterable[DiT | None], config: Config, device: torch.device) -> None:
    """What samples goes to ``device``, in eval mode, its weights in ``sample.dtype``."""
    from diffmoe.device import DTYPES

    for model in filter(None, models):
        model.to(device).eval().cast(DTYPES[config.sample.dtype])


def whole_model(checkpoint: Checkpoint, config: Config, weights: str) -> DiT:
    """A checkpoint's ``weights`` as a whole model on the CPU.  UserError where they do not fit."""
    from diffmoe.checkpoints.reader import BUFFERS
    from diffmoe.models.dit import DiT
    from diffmoe.models.logical import load_buffers, load_logical

    model = DiT(config.model, config.moe, time_scale=config.diffusion.time_scale)
    load_logical(model, checkpoint.weights(weights))
    load_buffers(model, checkpoint.tensors(BUFFERS))
    return model
