"""The rows of the parity table: which layouts, and the recipe that makes the comparison sharp.

Adam's eps is 1e-3: with the usual 1e-8 the first update is lr * sign(g), which turns rounding of a
zero gradient into a whole step.  Learning rate and weight decay are large, so that every tensor
moves by much more than its own rounding. Clipping bites at every step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product

from diffmoe.config import Config, load_config
from diffmoe.layout import Layout, resolve_layout

STEPS = 2
RECOMPUTE = ("none", "block", "selective")
WORLDS = (1, 2, 4)
# World -> pools that begin on one rank and end on another, where a rank has 3 samples.
_STRADDLING: dict[int, list[str]] = {1: [], 2: ["2"], 4: ["2", "4"]}
VARIANTS = {
    "diffmoe": "",
    "rich": "moe.activation=swiglu moe.shared_experts=1 model.qk_norm=true moe.interleave=true "
    "model.depth=4 moe.capacity=1.5 train.recipe_batch=8",
    "modern": "model.positions=rope model.norm=rms model.qk_norm=true model.activation=swiglu "
    "moe.activation=swiglu moe.shared_experts=1 moe.interleave=true",
    "tc": "model.family=tc moe.top_k=2",
    # every expert takes every token: no decision that bf16's rounding could turn
    "tc-all": "model.family=tc moe.top_k=4",
    "ec": "model.family=ec",
    # sigmoid scores, a bias for the load, groups of experts, normalized gates, narrower experts
    "tc-bias": "model.family=tc moe.score=sigmoid moe.gates=normalized moe.gate_scale=2.5 "
    "moe.balance=bias moe.bias_rate=0.05 moe.experts=8 moe.expert_groups=4 moe.top_groups=2 "
    "moe.top_k=2 moe.mlp_ratio=1 moe.shared_experts=1",
    "ec-time": "model.family=ec moe.router_input=time_token moe.gates=normalized "
    "moe.gate_scale=2.5 moe.capacity=2",
    "threshold": "moe.threshold_from=1 moe.score=sigmoid",
    "race": "model.family=race moe.score=identity moe.target_weight=0.1",
    # At the published temperature, 0.07, the contrastive loss makes 1e-7 of rounding 1e-5 of a
    # gradient (tests/test_routers.py compares there, in fp64).
    "prototype": "model.family=prototype moe.contrast_temperature=0.5",
    "dense": "model.family=dense",
    # losses beside the process's own, and times moved towards noise
    "losses": "train.dispersive_weight=0.5 train.direction_weight=0.5 diffusion.time_shift=2 "
    "moe.shared_experts=1",
    "x": "diffusion.prediction=x train.direction_weight=0.5 model.family=race moe.score=identity "
    "moe.target_weight=0.1",
    "min-snr": "diffusion.process=ddpm diffusion.loss_weight=min_snr train.dispersive_weight=0.5 "
    "sample.sampler=ancestral",
    "repa": "train.repa_weight=0.5 train.repa_block=1 train.repa_width=12 train.repa_hidden=24 "
    "moe.shared_experts=1",
    "lengths": "train.ema_lengths=[0.1,0.2]",
    # Sizes of which shards cut some matrices, shared ones and experts'.  Narrow: Newton-Schulz
    # multiplies small singular values, and rounding with them, by up to 485, and wide matrices have
    # smaller ones (at width 32 rows reach 1e-5).
    "muon": "train.optimizer=muon model.width=16 model.depth=3 moe.experts=6 moe.mlp_ratio=1.5 "
    "moe.activation=swiglu moe.shared_experts=1",
    "muon-all": "train.optimizer=muon model.width=16 model.depth=3 moe.mlp_ratio=1.5 "
    "moe.shared_experts=1 model.family=tc moe.top_k=4",
    "ddpm": "diffusion.process=ddpm diffusion.time_sampling=uniform diffusion.time_scale=1 "
    "sample.sampler=ancestral",
}
# train.sample_every: the EMA's weights are in the model's place for a pass after every step.
_COMMON = (
    "model.input_size=8 model.width=32 model.depth=2 model.heads=2 model.mlp_ratio=2 "
    "model.classes=10 moe.interleave=false moe.threshold_decay=0.5 "
    "moe.balance_weight=0.1 train.lr=0.1 train.eps=1e-3 train.weight_decay=0.5 train.clip=0.5 "
    "train.ema=0.25 train.label_drop=0.3 train.sample_every=1 sample.steps=2 sample.batch=3"
)


@dataclass(frozen=True)
class Case:
    """One row.  ``pool`` is what the configuration says, a word or samples; ``words``: other words
    for the same.  ``overlap``: gradients are reduced in many small buckets while backward runs.
    ``shard``: so many ranks share a copy of the optimizer's state (0: all).
    ``per_host``: ranks of an expert-parallel group on what counts as one host, between which the
    exchange has two levels.
    """

    world: int
    ep: int
    zero: int
    recompute: str
    accumulation: int
    pool: str
    batch: int
    variant: str = "diffmoe"
    words: str = ""
    precision: str = "fp32"
    compiled: bool = False
    routing: str = "token"  # of the images that a compiled row samples
    overlap: bool = False
    shard: int = 0
    per_host: int = 0
    halves: bool = False  # parallel.overlap
    settings: str = ""  # beside the variant's

    def config(self, seed: int = 0, steps: int = STEPS) -> Config:
        """The configuration of this row.  Raises UserError where the numbers do not fit."""
        text = (
            f"{_COMMON} run.seed={seed} parallel.ep={self.ep} parallel.recompute={self.recompute} "
            f"parallel.overlap={'halves' if self.halves else 'none'} "
            f"moe.pool={self.pool} train.batch={self.batch} train.accumulation={self.accumulation} "
            f"train.steps={steps} train.compile={str(self.compiled).lower()} "
            f"sample.routing={self.routing} moe.experts={self.experts} {VARIANTS[self.variant]} "
            f"{self.settings}"
        )
        return load_config(None, text.split())

    @property
    def experts(self) -> int:
        """As many as a variant has that does not say."""
        return max(4, self.ep)

    def deepspeed(self) -> dict:
        """The DeepSpeed JSON of this row."""
        stage = {"stage": self.zero}
        if self.zero == 3:  # else tensors as small as these would never be sharded
            stage["stage3_param_persistence_threshold"] = 0
        if self.overlap:
            stage |= {"overlap_comm": True, "reduce_bucket_size": 5000}
        if self.shard:
            stage["mics_shard_size"] = self.shard
        zero = {"zero_optimization": stage}
        if self.precision == "fp32":
            return zero
        return {**zero, "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}

    def layout(self) -> Layout:
        return resolve_layout(self.config(), self.world)

    @property
    def label(self) -> str:
        return (
            f"world {self.world}, ep {self.ep}, zero {self.zero}, {self.recompute}, accumulation "
            f"{self.accumulation}, pool {self.words or self.pool}, {self.kind}"
        )

    @property
    def kind(self) -> str:
        words = [self.variant, "bf16" * (self.precision == "bf16")]
        words += [
            self.settings,
            "compiled" * self.compiled,
            "overlap" * self.overlap,
            "halves" * self.halves,
        ]
        words.append(f"shards of {self.shard}" if self.shard else "")
        words.append(f"hosts of {self.per_host}" if self.per_host else "")
        return " ".join(filter(None, words))


def full_table(worlds: Iterable[int] = WORLDS) -> list[Case]:
    """Every legal combination of the published family, and the other families and options at every
    ZeRO stage.
    """
    cases = []
    grids = [(world, ep) for world in worlds for ep in (1, 2, 4) if world % ep == 0]
    for world, ep in grids:
        for pool, words in _pools(world, ep):
            for zero, recompute, accumulation in product(range(4), RECOMPUTE, (1, 2)):
                cases += [Case(world, ep, zero, recompute, accumulation, pool, 16, words=words)]
        others = (
            "rich global, tc global, tc rank, ec 1, dense 1, ddpm global, tc-bias global, "
            "ec-time 1, threshold rank, race global, race rank, prototype global, prototype rank, "
            "modern global, losses rank, min-snr global, repa rank, x global"
        ).split(", ")
        for (i, (variant, pool)), zero in product(enumerate(map(str.split, others)), range(4)):
            if variant != "dense" or ep == 1:
                recompute = RECOMPUTE[(zero + i + ep) % 3]
                accumulation = 1 + (zero + i + ep // 2) % 2
                cases += [Case(world, ep, zero, recompute, accumulation, pool, 16, variant)]
        for pool, zero in product(_STRADDLING[world], range(4)):
            accumulation, recompute = 1 + zero % 2, RECOMPUTE[(zero + ep) % 3]
            batch = 3 * world * accumulation
            cases += [Case(world, ep, zero, recompute, accumulation, pool, batch)]
        cases += [Case(world, ep, zero, "none", 2, "1", 16, precision="bf16") for zero in (1, 2, 3)]
        for zero in range(3) if ep < 4 else ():  # at ZeRO 3 it is refused
            cases.append(Case(world, ep, zero, RECOMPUTE[zero], 1 + zero % 2, "rank", 16, "muon"))
        cases.append(Case(world, ep, 1, "none", 2, "1", 16, "muon-all", precision="bf16"))
        for zero, accumulation in product((1, 2), (1, 2)) if world > 1 else ():
            case = Case(world, ep, zero, RECOMPUTE[zero - 1], accumulation, "rank", 16)
            case = replace(case, overlap=True)
            cases += [case, replace(case, variant="tc-all", precision="bf16")]
        if world == 4 and ep <= 2:
            cases.append(Case(world, ep, 2, "none", 2, "rank", 16, "muon", shard=2))
        cases += _hybrid(world, ep, 2) if world == 4 and ep <= 2 else []
        cases += _halves(world, ep) if ep > 1 else []
        if ep == 2:
            cases += [Case(world, ep, zero, "none", 1, "rank", 16, "lengths") for zero in range(4)]
        if ep == 1:  # counts that the host must ask for: where a GPU has it, the grouped matmul
            cases.append(Case(world, ep, 1, "none", 1, "rank", 16, "tc-all", precision="bf16"))
    return cases + two_level_table(worlds)


def two_level_table(worlds: Iterable[int] = (8,)) -> list[Case]:
    """EP groups over hosts: every router's kind of exchange (equal counts, counts that owners know,
    that all know, that are exchanged) at ZeRO 1 and 3.
    """
    cases = []
    grids = [(4, 4, 2), (8, 4, 2), (8, 8, 4), (8, 8, 2)]
    routers = "diffmoe rank, diffmoe global, diffmoe group, tc rank, race global, race rank, "
    routers += "prototype global, threshold rank, ec 1"
    for world, ep, per_host in grids:
        for number, words in enumerate(routers.split(", ") if world in set(worlds) else ()):
            variant, pool = words.split()
            for zero in (1, 3):
                accumulation = 1 + (zero + number) % 2
                recompute = "selective" if zero == 1 or number % 2 else RECOMPUTE[number // 2 % 2]
                case = Case(world, ep, zero, recompute, accumulation, pool, 16, variant)
                cases.append(replace(case, per_host=per_host))
    return cases


def _hybrid(world: int, ep: int, shard: int) -> Iterator[Case]:
    """Shards of ``shard`` ranks at every ZeRO stage that shards, and where buckets leave while
    backward runs.
    """
    for zero, overlap in ((1, False), (1, True), (2, False), (3, False)):
        case = Case(world, ep, zero, RECOMPUTE[zero - 1], 2, "rank", 16, shard=shard)
        case = replace(case, overlap=overlap)
        yield from (case, replace(case, variant="tc-all", precision="bf16"))


def eight_ranks() -> list[Case]:
    """Minutes: several groups of several ranks, of which an EP group may be all or a part."""
    groups = (4, 4), (2, 4), (2, 2), (1, 2)
    cases = [case for ep, shard in groups for case in _hybrid(8, ep, shard)]
    return cases + [case for ep in (2, 4, 8) for case in _halves(8, ep)]


def _halves(world: int, ep: int) -> list[Case]:
    """Micro-batches in halves, of two and four samples: pools inside a half, a rank, of all
    ranks, under each form of recompute, at each ZeRO stage, with every family.
    """
    rows = (
        "1 none diffmoe, rank block rich, global selective diffmoe, global block tc, "
        "rank selective tc-bias, 1 none ec, 1 selective ec-time, rank block threshold, "
        "global none race, rank selective race, global block prototype, global none ddpm, "
        "global selective modern, rank selective losses, global block losses"
    )
    cases = []
    for i, (pool, form, variant) in enumerate(map(str.split, rows.split(", "))):
        accumulation = 1 + i // 4 % 2
        batch = world * accumulation * (2 if i % 2 else 4)
        case = Case(world, ep, (i + ep) % 4, form, accumulation, pool, batch, variant)
        cases.append(replace(case, halves=True))
    last = Case(world, ep, 1, "selective", 2, "rank", 8 * world, overlap=True)
    return [*cases, replace(last, halves=True)]


def quick_table(worlds: Iterable[int] = WORLDS) -> list[Case]:
    """A minute's worth: each value of each axis, most pairs, and 4 ranks with EP 2 at every ZeRO
    stage.
    """
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
        Case(4, 2, 3, "selective", 2, "global", 16, "modern"),
        Case(4, 2, 1, "selective", 2, "global", 16, "tc"),
        Case(4, 4, 3, "none", 1, "rank", 16, "tc"),
        Case(4, 2, 0, "block", 1, "1", 16, "ec"),
        Case(4, 1, 2, "block", 2, "1", 16, "dense"),
        Case(4, 2, 1, "block", 2, "global", 16, "tc-bias"),
        Case(4, 2, 3, "selective", 1, "1", 16, "ec-time"),
        Case(4, 2, 2, "selective", 2, "rank", 16, "threshold"),
        Case(4, 2, 0, "selective", 2, "global", 16, "race"),
        Case(4, 2, 3, "block", 1, "global", 16, "prototype"),
        Case(4, 2, 1, "none", 2, "rank", 16, "lengths"),
        Case(4, 2, 0, "block", 2, "rank", 16, "muon"),
        Case(4, 2, 1, "none", 1, "global", 16, "muon"),
        Case(2, 2, 3, "selective", 2, "global", 16, "ddpm"),
        Case(4, 2, 1, "block", 2, "group", 16, "ddpm"),
        Case(4, 2, 1, "selective", 2, "rank", 16, "losses"),
        Case(4, 2, 3, "block", 1, "global", 16, "min-snr"),
        Case(2, 2, 0, "selective", 2, "global", 16, "repa"),
        Case(4, 2, 3, "block", 1, "rank", 16, "repa"),
        Case(4, 2, 2, "selective", 2, "global", 16, "x"),
        Case(2, 2, 1, "none", 2, "1", 16, precision="bf16"),
        Case(4, 2, 3, "none", 2, "1", 16, precision="bf16"),
        Case(4, 2, 1, "selective", 2, "rank", 16, overlap=True),
        Case(4, 2, 2, "none", 2, "rank", 16, overlap=True),
        Case(4, 2, 1, "selective", 2, "rank", 16, "tc-all", precision="bf16", overlap=True),
        Case(4, 2, 1, "none", 2, "rank", 16, shard=2),
        Case(4, 2, 2, "none", 2, "rank", 16, shard=2),
        Case(4, 2, 3, "none", 2, "rank", 16, shard=2),
        Case(4, 2, 1, "none", 2, "rank", 16, "tc-all", precision="bf16", overlap=True, shard=2),
        Case(4, 1, 1, "none", 1, "rank", 16, "tc-all", precision="bf16", overlap=True, shard=1),
        Case(4, 4, 1, "selective", 2, "rank", 16, per_host=2),
        Case(4, 4, 3, "selective", 1, "global", 16, per_host=2),
        Case(4, 4, 1, "selective", 1, "rank", 16, "tc", per_host=2),
        Case(4, 4, 3, "block", 2, "global", 16, "race", per_host=2),
        Case(4, 2, 1, "selective", 2, "global", 16, halves=True),
        Case(4, 2, 0, "block", 1, "rank", 16, "rich", halves=True),
        Case(4, 2, 3, "none", 1, "1", 16, "ec", halves=True),
        Case(4, 4, 2, "selective", 1, "global", 16, "tc", halves=True),
        Case(4, 2, 1, "selective", 1, "global", 16, "losses", halves=True),
        Case(2, 2, 2, "block", 1, "global", 16, "repa", halves=True),
    ]
    return [case for case in cases if case.world in set(worlds)]


def compiled_table(worlds: Iterable[int] = WORLDS) -> list[Case]:
    """Minutes: ``train.compile`` with every family, form of recompute and stage that it takes, as a
    whole and in parts.
    """
    cases = [
        Case(1, 1, 0, "none", 1, "rank", 8, routing="static"),
        Case(1, 1, 1, "block", 2, "2", 8),
        Case(1, 1, 2, "selective", 1, "rank", 8, routing="batch"),
        Case(1, 1, 1, "selective", 2, "1", 16, precision="bf16"),
        Case(1, 1, 1, "none", 1, "rank", 8, "dense"),
        Case(1, 1, 2, "selective", 1, "1", 8, "dense"),
        Case(1, 1, 1, "selective", 1, "1", 8, "ec"),
        Case(1, 1, 0, "block", 1, "rank", 8, "tc"),
        Case(1, 1, 1, "selective", 1, "rank", 8, "tc"),
        Case(1, 1, 1, "selective", 1, "rank", 8, "rich"),
        Case(1, 1, 1, "selective", 1, "rank", 8, "modern"),
        Case(1, 1, 0, "none", 1, "rank", 8, "ddpm"),
        Case(1, 1, 1, "selective", 1, "1", 8, "ec-time"),
        Case(1, 1, 1, "selective", 1, "rank", 8, "race"),
        Case(1, 1, 1, "selective", 1, "rank", 8, "threshold"),
        Case(1, 1, 0, "block", 1, "rank", 8, "prototype"),
        Case(2, 2, 1, "selective", 2, "global", 16),
        Case(2, 1, 2, "none", 1, "global", 16),
        Case(2, 2, 0, "block", 1, "rank", 16, routing="static"),
        Case(4, 2, 1, "none", 1, "rank", 16),
        Case(4, 2, 2, "selective", 2, "global", 16),
        Case(4, 2, 0, "block", 1, "group", 16),
        Case(4, 2, 1, "selective", 1, "global", 16, "tc"),
        Case(4, 2, 2, "block", 2, "1", 16, "ec"),
        Case(4, 2, 1, "selective", 1, "rank", 16, "rich"),
        Case(4, 2, 1, "selective", 1, "global", 16, "race"),
        Case(4, 2, 2, "none", 1, "global", 16, "prototype"),
        Case(4, 2, 1, "none", 1, "global", 16, "tc-bias"),
        Case(4, 1, 2, "block", 1, "global", 16),
        Case(4, 2, 1, "selective", 1, "global", 16, halves=True),
        Case(4, 2, 2, "block", 1, "1", 16, "ec", halves=True),
        Case(4, 2, 1, "none", 1, "rank", 16, "rich", halves=True),
        Case(4, 4, 1, "selective", 1, "global", 16, per_host=2),
        Case(4, 2, 1, "selective", 1, "rank", 16, "losses"),
        Case(2, 2, 1, "selective", 1, "rank", 16, "repa"),
    ]
    return [replace(case, compiled=True) for case in cases if case.world in set(worlds)]


def quick_compiled_table(worlds: Iterable[int] = WORLDS) -> list[Case]:
    """One case of :func:`compiled_table`, of the dense model where there is one: it compiles
    quickest.
    """
    cases = compiled_table(worlds)
    return [next((case for case in cases if case.variant == "dense"), cases[0])]


def _pools(world: int, ep: int) -> Iterator[tuple[str, str]]:
    """The pool's words, once where several mean the same number of samples: (word, all of its
    names).
    """
    names: dict[int, list[str]] = {}
    for word, ranks in (("rank", 1), ("group", ep), ("global", world)):
        names.setdefault(ranks, []).append(word)
    for words in names.values():
        yield words[0], "=".join(words)
