"""The parity table: training spread over ranks equals one plain PyTorch process, number by number.

Every row trains a tiny model through the Engine (expert parallelism, ZeRO, recompute, accumulation, pools across ranks)
and compares it with :mod:`diffmoe.reference`, the same steps in one process without any of that.  Largest relative
differences are printed:

loss        mean squared error, predictor and balance loss of every step
gradient    every tensor's (every expert's) clipped averaged gradient of step 0, as the optimizer received it
norm        the gradient's norm before clipping, of every step
weights     every tensor's change over all steps; ema: the same for the moving average
thresholds  of the capacity predictor, after all steps

A tensor's differences are divided by its largest entry (weights, EMA: its largest change), or by ``FLOOR`` times the
model's largest where that is more: a bias after k_norm shifts all of a query's logits alike, so its true gradient is 0
and what arrives is rounding.  Only such tensors, some 1e-9 of the largest, are below the floor.

The recipe makes the comparison sharp.  Adam's eps is 1e-3: with the usual 1e-8 the first update is lr * sign(g), which
turns rounding of a zero gradient into a whole step.  Learning rate and weight decay are large, so that every tensor
moves by much more than its own rounding.  Clipping bites at every step.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Callable, Iterable, Iterator, Optional

import torch
from torch import Tensor

from diffmoe.config import Config, load_config
from diffmoe.layout import Layout, resolve_layout
from diffmoe.parallel.groups import ParallelGroups, build_groups
from diffmoe.parallel.spawn import RankError, Ranks
from diffmoe.reference import Reference, build_model, plain_training, synthetic_batch
from diffmoe.training.ema import Ema
from diffmoe.training.engine import FIRST_MOMENT, Engine
from diffmoe.training.step import StepReport, micro_loss, train_step

BOUND, FLOOR, STEPS = 1e-5, 1e-3, 2
MARGIN = 1e-5  # scores carry about 1e-7 of rounding; see reference_for
COLUMNS = ("loss", "gradient", "norm", "weights", "ema", "thresholds")
RECOMPUTE = ("none", "block", "selective")
WORLDS = (1, 2, 4)
VARIANTS: dict[str, tuple[str, ...]] = {
    "diffmoe": (),
    "rich": ("moe.activation=swiglu", "moe.shared_experts=1", "model.qk_norm=true", "moe.interleave=true",
             "model.depth=4", "moe.capacity=1.5"),
    "tc": ("model.family=tc", "moe.top_k=2"),
    "ec": ("model.family=ec",),
    "dense": ("model.family=dense",),
}
_COMMON = (
    "model.input_size=8", "model.width=32", "model.depth=2", "model.heads=2", "model.mlp_ratio=2", "model.classes=10",
    "moe.experts=4", "moe.interleave=false", "moe.threshold_decay=0.5", "moe.balance_weight=0.1",
    "train.lr=0.1", "train.eps=1e-3", "train.weight_decay=0.5", "train.clip=0.5", "train.ema=0.25",
    "train.label_drop=0.3",
)


@dataclass(frozen=True)
class Case:
    """One row.  ``pool`` is what the configuration says, a word or samples; ``words``: other words for the same."""

    world: int
    ep: int
    zero: int
    recompute: str
    accumulation: int
    pool: str
    batch: int
    variant: str = "diffmoe"
    words: str = ""

    def config(self, seed: int = 0, steps: int = STEPS) -> Config:
        """The configuration of this row.  Raises ValueError where the numbers do not fit."""
        return load_config(None, [
            *_COMMON, f"run.seed={seed}", f"parallel.ep={self.ep}", f"parallel.recompute={self.recompute}",
            f"moe.pool={self.pool}", f"train.batch={self.batch}", f"train.accumulation={self.accumulation}",
            f"train.steps={steps}", *VARIANTS[self.variant]])

    def layout(self) -> Layout:
        return resolve_layout(self.config(), self.world)

    @property
    def label(self) -> str:
        return (f"world {self.world}, ep {self.ep}, zero {self.zero}, {self.recompute}, accumulation "
                f"{self.accumulation}, pool {self.words or self.pool}, {self.variant}")


# ------------------------------------------------------------------------------------------------- the cases


def full_table(worlds: Iterable[int] = WORLDS) -> list[Case]:
    """Every legal combination of the published family, and the other families and options at every ZeRO stage."""
    cases = []
    for world, ep in _grids(worlds):
        for pool, words in _pools(world, ep):
            cases += [Case(world, ep, zero, recompute, accumulation, pool, 16, words=words)
                      for zero in range(4) for recompute in RECOMPUTE for accumulation in (1, 2)]
        for i, (variant, pool) in enumerate([("rich", "global"), ("tc", "global"), ("tc", "rank"), ("ec", "1"),
                                             ("dense", "1")]):
            if variant != "dense" or ep == 1:
                cases += [Case(world, ep, zero, RECOMPUTE[(zero + i + ep) % 3], 1 + (zero + i + ep // 2) % 2, pool, 16,
                               variant) for zero in range(4)]
        cases += [Case(world, ep, zero, RECOMPUTE[(zero + ep) % 3], 1 + zero % 2, pool, 3 * world * (1 + zero % 2))
                  for pool in _uneven_pools(world) for zero in range(4)]
    return cases


def quick_table(worlds: Iterable[int] = WORLDS) -> list[Case]:
    """A minute's worth: each value of each axis, most pairs, and 4 ranks with EP 2 at every ZeRO stage."""
    cases = [
        Case(1, 1, 0, "block", 1, "global", 16),
        Case(1, 1, 3, "selective", 2, "8", 16, "rich"),
        Case(2, 2, 1, "none", 2, "rank", 16),
        Case(2, 1, 2, "selective", 1, "global", 16),
        Case(2, 2, 3, "block", 1, "group", 16, "rich"),
        Case(4, 2, 0, "selective", 2, "global", 16),
        Case(4, 2, 1, "block", 1, "group", 16),
        Case(4, 2, 2, "none", 2, "rank", 16),
        Case(4, 2, 3, "selective", 1, "4", 12),
        Case(4, 4, 0, "none", 2, "group", 16, "rich"),
        Case(4, 4, 2, "selective", 1, "2", 12),
        Case(4, 1, 3, "block", 2, "2", 24),
        Case(4, 2, 1, "selective", 2, "global", 16, "tc"),
        Case(4, 4, 3, "none", 1, "rank", 16, "tc"),
        Case(4, 2, 0, "block", 1, "1", 16, "ec"),
        Case(4, 1, 2, "block", 2, "1", 16, "dense"),
    ]
    return [case for case in cases if case.world in set(worlds)]


def _grids(worlds: Iterable[int]) -> list[tuple[int, int]]:
    return [(world, ep) for world in worlds for ep in (1, 2, 4) if world % ep == 0]


def _pools(world: int, ep: int) -> Iterator[tuple[str, str]]:
    """The pool's words, once where several mean the same number of samples: (word, all of its names)."""
    names: dict[int, list[str]] = {}
    for word, ranks in (("rank", 1), ("group", ep), ("global", world)):
        names.setdefault(ranks, []).append(word)
    for words in names.values():
        yield words[0], "=".join(words)


def _uneven_pools(world: int) -> list[str]:
    """Pools that straddle ranks of 3 samples each."""
    return {1: [], 2: ["2"], 4: ["2", "4"]}[world]


# ------------------------------------------------------------------------------------------------ the ranks


def reference_for(case: Case, device: torch.device, steps: int = STEPS) -> Reference:
    """One plain process's run of the case, for the first seed that clips at every step and has no close decision:
    where two scores agree to the last bits, rounding decides which token an expert takes, and another order of
    summation may rightly take the other."""
    for seed in range(100):
        found = plain_training(case.config(seed, steps), accumulation=case.accumulation, pool=case.layout().pool,
                               steps=steps, device=device)
        if found.clipped and found.margin > MARGIN:
            return found
    raise AssertionError(f"no seed below 100 clips and keeps decisions {MARGIN} apart: {case.label}")


@dataclass
class Training:
    """One rank's share of a case, ready for :meth:`step`."""

    config: Config
    layout: Layout
    groups: ParallelGroups
    engine: Engine
    ema: Ema

    def step(self, step: int) -> StepReport:
        """Optimizer step ``step`` through the ordinary train_step."""
        rows, micro = self.layout.batch // self.layout.accumulation, self.layout.micro_batch
        firsts = [step * self.layout.batch + j * rows + self.groups.rank * micro
                  for j in range(self.layout.accumulation)]
        batches = [synthetic_batch(self.config, range(first, first + micro)) for first in firsts]
        return train_step(self.engine, self.ema, batches, self.config, self.layout, self.groups, step)


# Groups are kept: every new one costs sockets until the process ends.
_groups = functools.lru_cache(maxsize=None)(build_groups)


def start_training(case: Case, seed: int, device: torch.device, steps: int = STEPS) -> Training:
    """Builds this rank's model, engine and EMA; every rank of the world calls it."""
    config, layout = case.config(seed, steps), case.layout()
    groups = _groups(layout.ep, layout.pool_ranks)
    model = build_model(config, layout.pool, groups)
    engine = Engine(model, config, layout, {"zero_optimization": {"stage": case.zero}}, groups, device)
    return Training(config, layout, groups, engine, Ema(engine, config.train.ema))


def train_and_compare(case: Case, reference_path: str, device: str,
                      tamper: Optional[Callable[[Training], None]] = None) -> tuple[dict[str, float], list[str]]:
    """A rank's work for one row: its largest relative differences by column, and the logical names it compared.

    ``tamper`` is for tests that the table can fail: it is called before the first step and may spoil anything."""
    reference: Reference = torch.load(reference_path, weights_only=False)
    if device == "cuda":
        torch.backends.cudnn.allow_tf32 = False
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
        compare("norm", [(abs(report.grad_norm - wanted["grad_norm"]), wanted["grad_norm"])])
        compare("loss", [(abs(getattr(report, name) - wanted[name]), wanted[name])
                         for name in ("loss", "predictor_loss", "balance_loss")])
        if step == 0:
            # The first moment starts at 0, so after one step it is (1 - beta1) times the gradient.
            scale = 1 - training.config.train.betas[0]
            received = [(n, v / scale) for n, v in _pieces(engine, engine.shards(FIRST_MOMENT))]
            compare("gradient", _tensor_pairs(received, reference.gradient, reference.gradient))
            names = [name for name, _ in received]
    for column, shards, wanted in (("weights", engine.masters(), reference.weights),
                                   ("ema", training.ema.shards, reference.ema)):
        change = {name: wanted[name] - reference.initial[name] for name in wanted}
        compare(column, _tensor_pairs(_pieces(engine, shards), wanted, change))
    for (_, layer), wanted in zip(engine.model.moe_layers(), reference.thresholds):
        compare("thresholds", [((layer.thresholds.value.cpu() - wanted).abs().max().item(), wanted.max().item())])
    engine.engine.destroy()
    return found, names


def _pieces(engine: Engine, shards: list[Tensor]) -> list[tuple[str, Tensor]]:
    # Clones: at ZeRO 0 what read() yields is the parameter's own memory, and holds these shards only until it goes on.
    return [(name, piece.cpu().clone())
            for tensor, value in engine.read(shards) for name, piece in tensor.pieces(value)]


def _tensor_pairs(pieces: Iterable[tuple[str, Tensor]], wanted: dict[str, Tensor],
                  scales: dict[str, Tensor]) -> Iterator[tuple[float, float]]:
    floor = FLOOR * max(value.abs().max().item() for value in scales.values())
    for name, value in pieces:
        yield (value - wanted[name]).abs().max().item(), max(scales[name].abs().max().item(), floor)


# ------------------------------------------------------------------------------------------------ the table


@dataclass
class Row:
    """A case and what came out: largest relative differences by column, or the error that stopped it."""

    case: Case
    differences: dict[str, float]
    error: Optional[str] = None

    @property
    def largest(self) -> float:
        return math.inf if self.error else max(self.differences.values())

    @property
    def ok(self) -> bool:
        return self.largest <= BOUND


def run_cases(cases: list[Case], *, device: str = "cpu", timeout: float = 120.0,
              tamper: Optional[Callable[[Training], None]] = None) -> Iterator[Row]:
    """The rows of the cases, world by world, each world one set of processes; ``timeout`` is for one case.

    A case that fails on any rank is a row with an error, and the rest goes on in fresh processes."""
    references: dict[tuple, str] = {}
    with tempfile.TemporaryDirectory(prefix="diffmoe-verify-") as folder:
        for world in sorted({case.world for case in cases}):
            with Ranks(world, timeout=timeout, device=device) as ranks:
                for case in (c for c in cases if c.world == world):
                    yield _run_case(case, ranks, references, Path(folder), tamper)


def _run_case(case: Case, ranks: Ranks, references: dict[tuple, str], folder: Path,
              tamper: Optional[Callable[[Training], None]]) -> Row:
    key = (case.variant, case.batch, case.accumulation, case.layout().pool)
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


_HEAD = (f"{'':>9} {'world':>5} {'ep':>2} {'zero':>4} {'recompute':9} {'acc':>3} {'pool':>20} {'samples':>7} "
         f"{'model':7} " + " ".join(f"{column:>10}" for column in COLUMNS))


def _line(number: int, total: int, row: Row) -> str:
    case = row.case
    start = (f"{number:>4}/{total:<4} {case.world:>5} {case.ep:>2} {case.zero:>4} {case.recompute:9} "
             f"{case.accumulation:>3} {case.words or case.pool:>20} {case.layout().pool:>7} {case.variant:7} ")
    if row.error:
        return start + "error: " + " ".join(row.error.split())
    return start + " ".join(f"{row.differences[c]:>10.1e}" for c in COLUMNS) + ("  ok" if row.ok else "  MISS")


def _json_row(row: Row) -> dict:
    # JSON has no infinity.
    differences = {c: v if math.isfinite(v) else str(v) for c, v in row.differences.items()}
    return {**asdict(row), "differences": differences, "ok": row.ok}


def main(arguments: list[str]) -> int:
    """``run.py verify``: prints the table as it grows; 0 when every number is within the bound."""
    parser = argparse.ArgumentParser(prog="verify", description="training over ranks equals one plain process")
    parser.add_argument("--quick", action="store_true", help="about a minute: a pruned table")
    parser.add_argument("--worlds", default="1,2,4", help="numbers of ranks, of 1, 2 and 4")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: needs a GPU a rank")
    parser.add_argument("--json", type=Path, help="also write the table here")
    options = parser.parse_args(arguments)
    worlds = _parse_worlds(options.worlds, options.device)
    cases = quick_table(worlds) if options.quick else full_table(worlds)
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False
    rows, began = [], time.monotonic()
    print(_HEAD)
    for row in run_cases(cases, device=options.device):
        rows.append(row)
        print(_line(len(rows), len(cases), row), flush=True)
    worst = max(rows, key=lambda row: row.largest)
    good = all(row.ok for row in rows)
    if options.json:
        tree = {"bound": BOUND, "device": options.device, "seconds": round(time.monotonic() - began, 1), "ok": good,
                "torch": torch.__version__, "rows": [_json_row(row) for row in rows]}
        options.json.write_text(json.dumps(tree, indent=1) + "\n")
    print("largest: " + ", ".join(f"{c} {max(r.differences.get(c, 0.0) for r in rows):.1e}" for c in COLUMNS)
          + f"; {time.monotonic() - began:.0f} s")
    print(f"verify: {len(rows)} cases, largest relative difference {worst.largest:.1e} (case {worst.case.label}), "
          f"bound {BOUND:.0e}: {'ok' if good else 'MISS'}")
    return 0 if good else 1


def _parse_worlds(text: str, device: str) -> list[int]:
    worlds = sorted({int(part) if part.strip().isdigit() else 0 for part in text.split(",")})
    if not set(worlds) <= set(WORLDS):
        raise ValueError(f"--worlds ({text}) must be of {', '.join(map(str, WORLDS))}")
    if device == "cuda":
        gpus = torch.cuda.device_count()
        if not gpus:
            raise ValueError(f"--device (cuda) needs a GPU; torch sees {gpus}")
        worlds = [world for world in worlds if world <= gpus]
    return worlds


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
