"""The runs that a comparison's YAML asks for.

All start from one recipe.  What decides the samples that a run is fed, and their noise, times and
label drops, is the same in all runs of a seed: a router that would change any of it is refused.
What is varied beside the router, one thing at a time, stands under ``confounds``.  No torch here.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from diffmoe.config import Config, config_to_tree, load_tree
from diffmoe.errors import UserError
from diffmoe.layout import resolve_layout
from diffmoe.models.count import Counts, count
from diffmoe.paths import expand_path
from diffmoe.strict_yaml import build, merge, read_yaml, tree_of_overrides

# What decides what a run is fed, beside its seed; whole sections end with a point.
FED = (
    "data.",
    "diffusion.",
    "model.input_size",
    "model.channels",
    "model.classes",
    "train.batch",
    "train.label_drop",
    # and what it is measured on
    "train.validate_samples",
    "score.",
)
# The comparison's own to say, and with what.
_OWN = {
    "run.folder": "folder",
    "run.seed": "seeds",
    "train.steps": "samples",
    "train.validate_every": "validations",
    "train.score_every": "recipe.score",
}
# What may differ between two starts of a run: where it is, how it is read and how it is scored, not
# what it is.
_FREE = (
    "score.reference score.extractor score.vae score.count run.folder run.timeout_s data.workers "
    "data.prefetch data.cache data.cache_gib".split()
)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.]*")


@dataclass(frozen=True)
class Confounds:
    """What is varied for one router, each by itself.

    Attributes:
        router: By name.
        seeds: Empty: the comparison's.
        axes: Field of the recipe -> list of its values, such as ``train.batch: [32, 128]``.
    """

    router: str = ""
    seeds: tuple[int, ...] = ()
    axes: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """A comparison's YAML.

    Attributes:
        base: The recipe of all runs: a configuration, its path relative to this file.
        recipe: What all runs change of it: a tree, or a list of ``section.field=value``.
        routers: Name -> what it changes of the recipe, in the same way.
        seeds: Each router is trained with each.
        samples: Budget of a run; a multiple of the batch.
        validations: Times that a run measures its validation loss, evenly over the budget.
        folder: Of all runs and the table.
        ranks: Of a run, all on one node.
        deepspeed: DeepSpeed JSON, as ``--deepspeed_config``.
        judge: Module that judges images, with its options: ``python -m MODULE samples.npz OPTIONS
            --json FILE``.
        confounds: The second table (null: none).
    """

    base: str = ""
    recipe: dict | list = field(default_factory=dict)
    routers: dict = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    samples: int = 0
    validations: int = 10
    folder: str = "runs/compare"
    ranks: int = 1
    deepspeed: str = ""
    judge: str = ""
    confounds: Confounds = field(default_factory=Confounds)


@dataclass(frozen=True)
class PlannedRun:
    """One training run.  ``axis``, ``value``: what a confound's run varies, else empty."""

    router: str
    seed: int
    config: Config
    axis: str = ""
    value: Any = None

    @property
    def variant(self) -> str:
        """The name without the seed."""
        if not self.axis:
            return self.router
        return f"{self.router}-{self.axis.rpartition('.')[2]}-{self.value}"

    @property
    def name(self) -> str:
        return f"{self.variant}-s{self.seed}"

    @property
    def folder(self) -> Path:
        return Path(self.config.run.folder)


@dataclass(frozen=True)
class Plan:
    """A comparison, resolved.  ``runs``: of the routers, seed by seed; then those of the confounds
    that are not among them.  ``axes``: axis -> (value, variant) in the YAML's order.
    """

    comparison: Comparison
    runs: list[PlannedRun]
    axes: dict[str, list[tuple[Any, str]]]

    @property
    def folder(self) -> Path:
        return Path(self.comparison.folder)

    def of(self, variant: str) -> list[PlannedRun]:
        """A variant's runs, one a seed."""
        return [run for run in self.runs if run.variant == variant]


@dataclass(frozen=True)
class Parameters:
    """A router's parameters and arithmetic, counted.  ``activated`` with the shared experts,
    ``activated_unshared`` without them; both at the capacity of training.  ``flops``: of a
    sample's forward pass.
    """

    total: int
    activated: int
    activated_unshared: int
    flops: int


def parameters(config: Config, capacity: float | None = None) -> Parameters:
    """``capacity``: experts per token as used, in place of the configuration's."""
    counts: Counts = count(config.model, config.moe, capacity)
    unshared = count(config.model, replace(config.moe, shared_experts=0), capacity)
    return Parameters(counts.total, counts.activated, unshared.activated, 2 * counts.forward_macs)


def read_plan(path: str, overrides: list[str]) -> Plan:
    """Overrides: of own fields (``samples=640``) or the recipe (``train.lr=1e-3``).  UserError."""
    sections = config_to_tree(Config())
    own = [text for text in overrides if text.partition("=")[0].partition(".")[0] not in sections]
    more = [text for text in overrides if text not in own]
    tree = merge(read_yaml(path), tree_of_overrides(own))
    if tree.get("confounds", {}) is None:  # as an override says that there are none
        del tree["confounds"]
    comparison: Comparison = build(Comparison, tree)
    comparison = replace(
        comparison,
        base=expand_path(comparison.base, "base"),
        folder=expand_path(comparison.folder, "folder"),
        deepspeed=expand_path(comparison.deepspeed, "deepspeed"),
    )
    _check(comparison, path)
    base = merge(read_yaml(Path(path).parent / comparison.base), _tree("recipe", comparison.recipe))
    base = merge(base, tree_of_overrides(more))
    _refuse_own("recipe", _tree("recipe", comparison.recipe))
    _refuse_own("the command line", tree_of_overrides(more))
    runs = []
    routers = {name: _tree(f"routers.{name}", said) for name, said in comparison.routers.items()}
    for seed, (name, said) in itertools.product(comparison.seeds, routers.items()):
        runs.append(_run(comparison, base, name, said, seed))
    _check_fed(runs)
    axes = _confounds(comparison, base, routers, runs)
    return Plan(comparison, runs, axes)


def _check(comparison: Comparison, path: str) -> None:
    for name, good in (
        ("base", comparison.base != ""),
        ("routers", len(comparison.routers) > 0),
        ("seeds", len(comparison.seeds) > 0),
        ("folder", comparison.folder != ""),
    ):
        if not good:
            raise UserError(f"{path}: {name} ({getattr(comparison, name)!r}) must be given")
    for name, least in (("samples", 1), ("validations", 1), ("ranks", 1)):
        value = getattr(comparison, name)
        if value < least:
            raise UserError(f"{path}: {name} ({value}) must be at least {least}")
    for name, seeds in (
        ("seeds", comparison.seeds),
        ("confounds.seeds", comparison.confounds.seeds),
    ):
        if len(set(seeds)) != len(seeds):
            raise UserError(f"{path}: {name} ({list(seeds)}) must not name a seed twice")
    for name in comparison.routers:
        if not _NAME.fullmatch(name):
            raise UserError(
                f"{path}: routers: name {name!r} must be of letters, digits, _ and ., as a folder "
                "is called so"
            )
    confounds = comparison.confounds
    if confounds.axes and confounds.router not in comparison.routers:
        raise UserError(
            f"{path}: confounds.router ({confounds.router!r}) must be one of routers "
            f"({', '.join(comparison.routers)})"
        )
    for axis, values in confounds.axes.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"{path}: confounds.axes.{axis} ({values!r}) must be a list of values")


def _tree(name: str, said: Any) -> dict:
    """A tree of changes, however it was said."""
    if said is None:
        return {}
    if isinstance(said, list) and all(isinstance(text, str) for text in said):
        return tree_of_overrides(said)
    if not isinstance(said, dict):
        raise UserError(
            f"{name} ({said!r}) must be a mapping of sections, or a list of section.field=value"
        )
    return said


def _refuse_own(where: str, tree: dict) -> None:
    for name in _leaves(tree):
        if name in _OWN:
            raise UserError(f"{where} says {name}, which is for the comparison's {_OWN[name]}")


def _leaves(tree: dict, path: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{path}{key}"
        if isinstance(value, dict):
            found |= _leaves(value, f"{name}.")
        else:
            found[name] = value
    return found


def _run(
    comparison: Comparison,
    base: dict,
    router: str,
    said: dict,
    seed: int,
    axis: str = "",
    value: Any = None,
) -> PlannedRun:
    """A run of ``router``, whose changes are ``said``; with ``axis`` set to ``value``."""
    _refuse_own(f"routers.{router}", said)
    where = f"{router} with {axis}={value}" if axis else f"router {router}"
    tree = merge(base, said)
    tree = merge(tree, {"run": {"seed": seed}})
    try:
        before = load_tree(tree)  # for the batch that warm-up and averages were chosen at
        if axis:
            tree = merge(tree, _nested(axis, value))
        config = load_tree(tree)
        batch = config.train.batch
        steps, odd = divmod(comparison.samples, batch)
        if odd:
            raise UserError(f"samples ({comparison.samples}) must divide by train.batch ({batch})")
        train = replace(
            config.train,
            steps=steps,
            validate_every=max(1, steps // comparison.validations),
            score_every=0,
        )
        if batch != before.train.batch:
            train = _same_in_samples(train, batch / before.train.batch)
        run = PlannedRun(router, seed, config, axis, value)
        folder = str(Path(comparison.folder) / run.name)
        tree = config_to_tree(
            replace(config, train=train, run=replace(config.run, folder=folder, seed=seed))
        )
        config = load_tree(tree)
        resolve_layout(config, comparison.ranks)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if not _NAME.fullmatch(run.name.replace("-", "_")):
        raise UserError(f"{where}: a run cannot be called {run.name!r}")
    return replace(run, config=config)


def _nested(name: str, value: Any) -> dict:
    tree: Any = value
    for part in reversed(name.split(".")):
        tree = {part: tree}
    return tree


def _same_in_samples(train: Any, growth: float) -> Any:
    """At ``growth`` times the batch; warm-up and averages are as long in samples as they were."""
    if train.recipe_batch is not None:  # then they are, and the rate grows
        return train
    decays = tuple(decay**growth for decay in train.ema_decays)
    return replace(
        train,
        warmup=round(train.warmup / growth),
        ema=decays if isinstance(train.ema, tuple) else decays[0],
    )


def _is_fed(name: str) -> bool:
    return any(name == fed or (fed.endswith(".") and name.startswith(fed)) for fed in FED)


def fed(config: Config) -> dict[str, Any]:
    """The fields that decide what a run is fed, beside its seed."""
    return {name: value for name, value in settings(config).items() if _is_fed(name)}


def _check_fed(runs: list[PlannedRun]) -> None:
    """UserError for a router that would be fed something else than the first."""
    first = runs[0]
    wanted = fed(first.config)
    for run in runs:
        for name, value in fed(run.config).items():
            if value != wanted[name]:
                raise UserError(
                    f"routers.{run.router}: {name} ({value}) differs from {first.router}'s "
                    f"({wanted[name]}), and all routers must see the same; vary it under confounds"
                )


def _confounds(
    comparison: Comparison, base: dict, routers: dict[str, dict], runs: list[PlannedRun]
) -> dict[str, list[tuple[Any, str]]]:
    """The second table's axes; adds their runs, unless a value is the router's anyway."""
    axes: dict[str, list[tuple[Any, str]]] = {}
    router = comparison.confounds.router
    for axis, values in comparison.confounds.axes.items():
        _refuse_own(f"confounds.axes: {axis}", _nested(axis, None))
        axes[axis] = []
        for value in values:
            seeds = comparison.confounds.seeds or comparison.seeds
            made = [
                _run(comparison, base, router, routers[router], seed, axis, value) for seed in seeds
            ]
            plain = {run.seed: run for run in runs if run.variant == router}
            same = [plain.get(r.seed) for r in made]
            if all(
                p is not None and not differences(p.config, r.config) for p, r in zip(same, made)
            ):
                axes[axis].append((value, router))
                continue
            if made[0].variant in {run.variant for run in runs}:
                raise UserError(f"confounds: two runs would be called {made[0].name}")
            runs += made
            axes[axis].append((value, made[0].variant))
    return axes


def settings(config: Config) -> dict[str, Any]:
    """``section.field`` -> value, of all that makes a run what it is."""
    leaves = _leaves(config_to_tree(config))
    return {name: value for name, value in leaves.items() if name not in _FREE}


def differences(before: Config, now: Config) -> list[str]:
    """A text for each of the :func:`settings` that is not what it was."""
    old, new = settings(before), settings(now)
    return [f"{name} ({old[name]}) is now {new[name]}" for name in new if old[name] != new[name]]
