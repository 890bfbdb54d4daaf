"""The parity table: training spread over ranks equals one plain PyTorch process, number by number.

Every row trains a tiny model through the Engine (expert parallelism, ZeRO, recompute, accumulation,
pools across ranks) and compares it with :mod:`diffmoe.parity.plain`, the same steps in one process
without any of that.  Largest relative differences are printed:

- loss: denoising (flow: mean squared error; ddpm: with the bound), predictor and balance loss of
  every step
- gradient: every tensor's (every expert's) clipped averaged gradient of step 0, as the optimizer
  received it
- norm: the gradient's norm before clipping, of every step
- weights: every tensor's change over all steps; ema: the same for the moving averages
- thresholds: of the capacity predictor, or the load's biases, after all steps
- images: of a compiled model after all steps, as the same ranks sample them, beside those of its
  eager form

Rows in bf16 are compared with the same fp32 process, within ``BF16_BOUNDS``: a check of factors,
not of bits.

A tensor's differences are divided by its largest entry (weights, EMA: its largest change), or by
``FLOOR`` times the model's largest where that is more: a bias after k_norm shifts all of a query's
logits alike, so its true gradient is 0 and what arrives is rounding.  Only such tensors, some 1e-9
of the largest, are below the floor.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor

from diffmoe.config import TrainConfig
from diffmoe.device import set_fp32_precision
from diffmoe.evaluation.generate import generate
from diffmoe.models.compiled import compile_blocks, compiles
from diffmoe.models.dit import run_plainly
from diffmoe.models.matrices import MUON, is_matrix
from diffmoe.parallel.groups import build_groups
from diffmoe.parallel.spawn import RankError, Ranks
from diffmoe.parity.cases import STEPS, Case
from diffmoe.parity.plain import RUNNING, Reference, plain_training
from diffmoe.parity.synthetic import Training, build_model
from diffmoe.training.engine import FIRST_MOMENT, Engine
from diffmoe.training.muon import MOMENTUM

BOUND, FLOOR = 1e-5, 1e-3
# bf16 keeps 8 bits: one rounding is up to 2^-9, and a forward and backward of this model chain some
# tens of them.  What is wrong by a factor (a micro-batch counted twice, a group's average missed)
# differs by 0.3 and more.  Weights have no bound: where a gradient is small Adam makes its rounding
# a large part of the step.
BF16_BOUNDS = {"loss": 5e-3, "gradient": 5e-2, "norm": 2e-2, "thresholds": 1e-2}
MARGIN = 1e-5  # scores carry about 1e-7 of rounding; see reference_for
COLUMNS = ("loss", "gradient", "norm", "weights", "ema", "thresholds", "images")


def reference_for(case: Case, device: torch.device, steps: int = STEPS) -> Reference:
    """One plain process's run of the case, for the first seed that clips at every step and has no
    close decision: where two scores agree to the last bits, rounding decides which token an expert
    takes, and another order of summation may rightly take the other.
    """
    for seed in range(100):
        found = plain_training(
            case.config(seed, steps),
            accumulation=case.accumulation,
            pool=case.layout().pool,
            steps=steps,
            device=device,
        )
        if found.clipped and found.margin > MARGIN:
            return found
    raise AssertionError(
        f"no seed below 100 clips and keeps decisions {MARGIN} apart: {case.label}"
    )


# Groups are kept: every new one costs sockets until the process ends.
_groups = lru_cache(maxsize=None)(build_groups)


def start_training(case: Case, seed: int, device: torch.device, steps: int = STEPS) -> Training:
    """Builds this rank's model, engine and EMA; every rank of the world calls it."""
    config, layout = case.config(seed, steps), case.layout()
    groups = _groups(layout.ep, layout.pool_ranks, None, case.per_host)
    model = build_model(config, layout.pool, groups)
    if compiles(config.train, device, case.zero)[0]:
        compile_blocks(model)
    return Training(model, config, case.deepspeed(), groups, device)


def train_and_compare(
    case: Case, reference_path: str, device: str, tamper: Callable[[Training], None] | None = None
) -> tuple[dict[str, float], list[str]]:
    """A rank's work for one row: its largest relative differences by column, and the logical names
    it compared.

    ``tamper`` is for tests that the table can fail: it is called before the first step and may
    spoil anything.
    """
    reference: Reference = torch.load(reference_path, weights_only=False)
    set_fp32_precision("ieee")
    training = start_training(case, reference.seed, torch.device(device))
    if tamper is not None:
        tamper(training)
    engine, found, names = training.engine, dict.fromkeys(COLUMNS, 0.0), []

    def compare(column: str, pairs: Iterable[tuple[float, float]]) -> None:
        for difference, scale in pairs:
            ratio = difference / scale if scale else (0.0 if difference == 0 else math.inf)
            found[column] = math.inf if math.isnan(ratio) else max(found[column], ratio)

    for step, wanted in enumerate(reference.steps):
        report = training.step(step)
        for name, value in wanted.items():
            column = "norm" if name == "grad_norm" else "loss"
            compare(column, [(abs(getattr(report, name) - value), abs(value))])
        if step == 0:
            # The first moment starts at 0, so after one step it is (1 - beta1) times the gradient.
            first = _pieces(engine, engine.shards(FIRST_MOMENT))
            received = [(n, v / (1 - _fading(training.config.train, n))) for n, v in first]
            compare("gradient", _tensor_pairs(received, reference.gradient, reference.gradient))
            names = [name for name, _ in received]
    for column, shards, tensors in (
        ("weights", engine.masters, reference.weights),
        ("ema", training.ema.shards, reference.ema),
        *(("ema", *pair) for pair in zip(training.ema.by_length.values(), reference.powers)),
    ):
        change = {name: tensors[name] - reference.initial[name] for name in tensors}
        compare(column, _tensor_pairs(_pieces(engine, shards), tensors, change))
    for (_, layer), running in zip(engine.model.moe_layers(), reference.running):
        buffer = layer.get_buffer(RUNNING[training.config.model.family]).cpu()
        compare("thresholds", [((buffer - running).abs().max().item(), running.abs().max().item())])
    if case.compiled:
        compiled, eager = _sampled(training)
        compare("images", [((compiled - eager).abs().max().item(), eager.abs().max().item())])
    engine.engine.destroy()
    return found, names


def _fading(train: TrainConfig, name: str) -> float:
    """How much of a tensor's first moment a step keeps."""
    return MOMENTUM if train.optimizer == MUON and is_matrix(name) else train.betas[0]


def _sampled(training: Training) -> tuple[Tensor, Tensor]:
    """Images of a batch and a smaller one from the averaged weights: of the model as it is run, and
    of its eager form.
    """
    with training.engine.weights(training.ema.shards) as model:
        device, world = training.engine.device, training.groups.world
        images = partial(
            generate, model, training.config, range(5), range(5), device, together=world
        )
        compiled, run = images(), model.run
        model.run = run_plainly
        eager, model.run = images(), run
    return compiled, eager


def _pieces(engine: Engine, shards: list[Tensor]) -> list[tuple[str, Tensor]]:
    # Clones: at ZeRO 0 what read() yields is the parameter's own memory, and holds these shards
    # only until it goes on.
    return [
        (name, piece.cpu().clone())
        for tensor, value in engine.read(shards)
        for name, piece in tensor.pieces(value)
    ]


def _tensor_pairs(
    pieces: Iterable[tuple[str, Tensor]], wanted: dict[str, Tensor], scales: dict[str, Tensor]
) -> Iterator[tuple[float, float]]:
    floor = FLOOR * max(value.abs().max().item() for value in scales.values())
    for name, value in pieces:
        yield (value - wanted[name]).abs().max().item(), max(scales[name].abs().max().item(), floor)


@dataclass
class Row:
    """A case and what came out: largest relative differences by column, or the error that stopped
    it.
    """

    case: Case
    differences: dict[str, float]
    error: str | None = None

    @property
    def largest(self) -> float:
        return math.inf if self.error else max(self.differences.values())

    @property
    def ok(self) -> bool:
        """Within the bounds of its precision."""
        if self.case.precision == "bf16":
            return not self.error and all(
                self.differences[column] <= bound for column, bound in BF16_BOUNDS.items()
            )
        return self.largest <= BOUND


def run_cases(
    cases: list[Case],
    *,
    device: str = "cpu",
    timeout: float = 120.0,
    tamper: Callable[[Training], None] | None = None,
) -> Iterator[Row]:
    """The rows of the cases, world by world, each world one set of processes; ``timeout`` is for
    one case.

    A case that fails on any rank is a row with an error, and the rest goes on in fresh processes.
    """
    references: dict[tuple, str] = {}
    with tempfile.TemporaryDirectory(prefix="diffmoe-verify-") as folder:
        for world in sorted({case.world for case in cases}):
            with Ranks(world, timeout=timeout, device=device) as ranks:
                for case in (c for c in cases if c.world == world):
                    yield _run_case(case, ranks, references, Path(folder), tamper)


def _run_case(
    case: Case,
    ranks: Ranks,
    references: dict[tuple, str],
    folder: Path,
    tamper: Callable[[Training], None] | None,
) -> Row:
    what = (case.variant, case.settings, case.experts)
    key = (*what, case.batch, case.accumulation, case.layout().pool)
    if key not in references:
        references[key] = str(folder / f"{len(references)}.pt")
        torch.save(reference_for(case, torch.device(ranks.device)), references[key])
    try:
        results = ranks.run(train_and_compare, case, references[key], ranks.device, tamper)
    except RankError as error:
        return Row(case, {}, f"rank {error.rank}: {error.kind}: {error.reason}")
    compared = {name for _, names in results for name in names}
    missing = sorted(torch.load(references[key], weights_only=False).gradient.keys() ^ compared)
    if missing:
        return Row(case, {}, f"not compared: {', '.join(missing[:3])}")
    return Row(case, {column: max(found[column] for found, _ in results) for column in COLUMNS})
