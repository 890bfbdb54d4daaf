"""The configuration: a tree of frozen dataclasses <- YAML files with ``include`` <- ``a.b=c`` overrides.

The YAML owns model, data, batch, learning rate, clipping and schedule.  The DeepSpeed JSON owns ZeRO, precision,
communication and offload.  A number named in both places with two values is an error that prints both.
No torch here: a login node without it can read, check and print a configuration.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional, Union

import yaml


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives and what all its randomness comes from."""

    folder: str = "runs/default"
    seed: int = 0


@dataclass(frozen=True)
class ModelConfig:
    """The diffusion transformer.  Sizes are in latent pixels and channels; ``classes`` excludes the null class."""

    family: Literal["dense", "tc", "ec", "diffmoe"] = "diffmoe"
    input_size: int = 32
    channels: int = 4
    patch: int = 2
    width: int = 384
    depth: int = 12
    heads: int = 6
    mlp_ratio: float = 4.0
    classes: int = 1000
    learn_sigma: bool = True
    qk_norm: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of one sample."""
        return (self.input_size // self.patch) ** 2

    @property
    def hidden(self) -> int:
        """Width of the MLP's inner layer."""
        return int(self.width * self.mlp_ratio)

    @property
    def out_channels(self) -> int:
        return self.channels * (2 if self.learn_sigma else 1)


@dataclass(frozen=True)
class MoEConfig:
    """Mixture layers.  ``pool`` counts samples, or says ``rank``, ``group`` (expert-parallel) or ``global``."""

    experts: int = 8
    activation: Literal["gelu", "swiglu"] = "gelu"
    shared_experts: int = 0
    interleave: bool = True
    pool: Union[int, Literal["rank", "group", "global"]] = "global"
    capacity: float = 1.0
    capacity_hold: int = 0
    capacity_until: int = 0
    top_k: int = 1
    balance_weight: float = 0.01
    predictor_weight: float = 1.0
    threshold_decay: float = 0.95

    def capacity_at(self, step: int) -> float:
        """Training capacity at optimizer step ``step``: every expert takes every token (capacity = ``experts``)
        for ``capacity_hold`` steps, then falls linearly to ``capacity`` at step ``capacity_until``."""
        if step >= self.capacity_until:
            return self.capacity
        if step < self.capacity_hold:
            return float(self.experts)
        share = (step - self.capacity_hold) / (self.capacity_until - self.capacity_hold)
        return self.experts + share * (self.capacity - self.experts)


@dataclass(frozen=True)
class DiffusionConfig:
    """Rectified flow.  ``time_scale`` multiplies t in [0, 1] before the embedding (published: 1)."""

    process: Literal["flow"] = "flow"
    time_scale: float = 1.0


@dataclass(frozen=True)
class DataConfig:
    """Webdataset shards with an ``index.json``; ``window`` shards are shuffled together."""

    shards: str = ""
    flip: bool = False
    window: int = 8
    prefetch: int = 2


@dataclass(frozen=True)
class TrainConfig:
    """The recipe.  ``batch`` is the global batch of one optimizer step; micro_batch x ranks x accumulation = batch."""

    steps: int = 700_000
    batch: int = 256
    micro_batch: Optional[int] = None
    accumulation: Optional[int] = None
    optimizer: Literal["torch", "deepspeed", "apex"] = "torch"
    lr: float = 1e-4
    warmup: int = 0
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 0.0
    label_drop: float = 0.1
    ema: float = 0.9999
    log_every: int = 50
    sample_every: int = 0
    save_every: int = 10_000
    keep: int = 3

    def lr_at(self, step: int) -> float:
        """Learning rate of optimizer step ``step`` (0-based): linear warm-up, then the schedule down to 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.lr
        left = max(0.0, 1.0 - (step - self.warmup) / max(1, self.steps - self.warmup))
        return self.lr * (left if self.schedule == "linear" else 0.5 * (1.0 - math.cos(math.pi * left)))


@dataclass(frozen=True)
class ParallelConfig:
    """``ep``: ranks that share one set of experts.  ``recompute``: which activations backward computes again."""

    ep: int = 1
    recompute: Literal["none", "block", "selective"] = "none"


@dataclass(frozen=True)
class SampleConfig:
    """Sampling.  ``routing``: ``batch`` is the paper's rule, ``token`` the batch-invariant one.  ``gamma``: one
    constant threshold for every expert in place of the learned ones."""

    sampler: Literal["euler", "heun"] = "euler"
    steps: int = 50
    cfg: float = 1.5
    routing: Literal["batch", "token"] = "token"
    gamma: Optional[float] = None
    batch: int = 64
    columns: int = 10


@dataclass(frozen=True)
class Config:
    """The whole tree."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)


# ---------------------------------------------------------------------------------------------------- reading


class _StrictLoader(yaml.SafeLoader):
    """YAML that refuses a key written twice: PyYAML keeps the last one without a word."""


def _mapping_without_duplicates(loader: _StrictLoader, node: yaml.MappingNode) -> dict:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise ValueError(f"{node.start_mark.name}: key {key!r} on line {key_node.start_mark.line + 1} must be a text")
        if key in seen:
            raise ValueError(
                f"{node.start_mark.name}: key {key!r} stands twice, on lines {seen[key]} and "
                f"{key_node.start_mark.line + 1}"
            )
        seen[key] = key_node.start_mark.line + 1
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_duplicates)


def read_yaml(path: str | Path, _stack: tuple[Path, ...] = ()) -> dict:
    """Reads a YAML file and what it includes (``include: file`` or a list, relative to the file, later ones win,
    the file itself last).  Raises ValueError for a missing file, bad YAML, a doubled key or a circle."""
    path = Path(path).resolve()
    if path in _stack:
        raise ValueError(f"include goes in a circle: {' -> '.join(p.name for p in (*_stack, path))}")
    if not path.is_file():
        origin = f" (included from {_stack[-1]})" if _stack else ""
        raise ValueError(f"config file {path} does not exist{origin}")
    try:
        with path.open(encoding="utf-8") as stream:
            tree = yaml.load(stream, _StrictLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must hold a mapping, not {type(tree).__name__}")
    includes = tree.pop("include", [])
    includes = [includes] if isinstance(includes, str) else includes
    if not isinstance(includes, list) or not all(isinstance(name, str) for name in includes):
        raise ValueError(f"{path}: include ({includes!r}) must be a file name or a list of file names")
    merged: dict = {}
    for name in includes:
        merged = _merge(merged, read_yaml(path.parent / name, (*_stack, path)))
    return _merge(merged, tree)


def _merge(base: dict, over: dict) -> dict:
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _merge(result[key], value) if both else value
    return result


def _override_tree(overrides: list[str]) -> dict:
    tree: dict = {}
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals or not all(name.split(".")):
            raise ValueError(f"override {text!r} must look like section.field=value")
        try:
            leaf: Any = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(f"override {text!r}: {value!r} is not a YAML value") from None
        for part in reversed(name.split(".")):
            leaf = {part: leaf}
        tree = _merge(tree, leaf)
    return tree


def load_config(path: str | Path | None, overrides: list[str] | None = None) -> Config:
    """Defaults <- YAML file <- overrides, typed and validated.  Raises ValueError naming the field."""
    tree = read_yaml(path) if path is not None else {}
    config = config_from_tree(_merge(tree, _override_tree(overrides or [])))
    validate(config)
    return config


def config_from_tree(tree: dict) -> Config:
    """Builds the typed tree from nested dicts; unknown keys and wrong types are errors."""
    return _build(Config, tree, "")


def config_to_tree(config: Any) -> dict:
    """Nested dicts and lists, ready for YAML or JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _build(cls: type, tree: Any, path: str) -> Any:
    if not isinstance(tree, dict):
        raise ValueError(f"{path or 'config'} must be a mapping, not {tree!r}")
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in tree.items():
        name = f"{path}.{key}" if path else str(key)
        if key not in hints:
            close = difflib.get_close_matches(str(key), hints, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; known: {', '.join(hints)}"
            raise ValueError(f"unknown key {name} (value {value!r}){hint}")
        kind = hints[key]
        values[key] = _build(kind, value, name) if dataclasses.is_dataclass(kind) else _typed(kind, value, name)
    return cls(**values)


def _typed(kind: Any, value: Any, name: str) -> Any:
    """``value`` as ``kind``, or ValueError.  Accepts 1 for 1.0 and the text '1e-4', which YAML 1.1 reads as a string."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        for option in args:
            try:
                return _typed(option, value, name)
            except ValueError:
                continue
    elif origin is Literal:
        if value in args and type(value) in {type(a) for a in args}:
            return value
    elif origin is tuple:
        if isinstance(value, (list, tuple)) and len(value) == len(args):
            return tuple(_typed(a, v, f"{name}[{i}]") for i, (a, v) in enumerate(zip(args, value)))
    elif kind is type(None):
        if value is None:
            return None
    elif kind is float:
        try:
            if not isinstance(value, bool) and math.isfinite(number := float(value)):
                return number
        except (ValueError, TypeError, OverflowError):
            pass
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise ValueError(f"{name} = {value!r} must be {_describe(kind)}")


def _describe(kind: Any) -> str:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(a) for a in args)
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin is tuple:
        return f"{len(args)} numbers"
    return {int: "an integer", float: "a finite number", str: "a text", bool: "true or false", type(None): "null"}[kind]


# ------------------------------------------------------------------------------------------------- validation


def validate(config: Config) -> None:
    """Everything that can be checked without knowing the number of ranks.  Raises ValueError."""
    model, moe, train, parallel, sample = config.model, config.moe, config.train, config.parallel, config.sample

    def need(good: bool, message: str) -> None:
        if not good:
            raise ValueError(message)

    for name in ("input_size", "channels", "patch", "width", "depth", "heads", "classes"):
        need(getattr(model, name) >= 1, f"model.{name} ({getattr(model, name)}) must be at least 1")
    need(model.input_size % model.patch == 0,
         f"model.input_size ({model.input_size}) must divide by model.patch ({model.patch})")
    need(model.width % model.heads == 0, f"model.width ({model.width}) must divide by model.heads ({model.heads})")
    need(model.width % 4 == 0, f"model.width ({model.width}) must divide by 4 for the 2-d sine position embedding")
    need(model.hidden >= 1, f"model.mlp_ratio ({model.mlp_ratio}) x model.width ({model.width}) must be at least 1")
    need(parallel.ep >= 1, f"parallel.ep ({parallel.ep}) must be at least 1")
    need(model.family != "dense" or parallel.ep == 1,
         f"parallel.ep ({parallel.ep}) must be 1 for model.family (dense): it has no experts")
    if model.family != "dense":
        need(model.depth >= 2 or not moe.interleave,
             f"model.depth ({model.depth}) leaves no MoE block with moe.interleave (true)")
        need(moe.experts >= 1, f"moe.experts ({moe.experts}) must be at least 1")
        need(moe.experts % parallel.ep == 0,
             f"moe.experts ({moe.experts}) must divide by parallel.ep ({parallel.ep})")
        need(moe.shared_experts >= 0, f"moe.shared_experts ({moe.shared_experts}) must be at least 0")
        need(0 < moe.capacity <= moe.experts,
             f"moe.capacity ({moe.capacity}) must be above 0 and at most moe.experts ({moe.experts})")
        need(1 <= moe.top_k <= moe.experts,
             f"moe.top_k ({moe.top_k}) must be from 1 to moe.experts ({moe.experts})")
        need(0 <= moe.capacity_hold <= moe.capacity_until,
             f"moe.capacity_hold ({moe.capacity_hold}) must be from 0 to moe.capacity_until ({moe.capacity_until})")
        need(0 <= moe.threshold_decay < 1, f"moe.threshold_decay ({moe.threshold_decay}) must be in [0, 1)")
        need(not isinstance(moe.pool, int) or moe.pool >= 1, f"moe.pool ({moe.pool}) must be at least 1 sample")
        need(model.family != "ec" or moe.pool == 1,
             f"moe.pool ({moe.pool}) must be 1 for model.family (ec): its experts choose inside each sample")
    need(train.steps >= 0, f"train.steps ({train.steps}) must be at least 0")
    for name in ("batch", "micro_batch", "accumulation", "log_every", "keep"):
        value = getattr(train, name)
        need(value is None or value >= 1, f"train.{name} ({value}) must be at least 1")
    for name in ("balance_weight", "predictor_weight"):
        need(getattr(moe, name) >= 0, f"moe.{name} ({getattr(moe, name)}) must be at least 0")
    for name in ("lr", "warmup", "eps", "clip", "weight_decay", "sample_every", "save_every"):
        need(getattr(train, name) >= 0, f"train.{name} ({getattr(train, name)}) must be at least 0")
    need(all(0 <= b < 1 for b in train.betas), f"train.betas ({train.betas}) must each be in [0, 1)")
    need(0 <= train.label_drop <= 1, f"train.label_drop ({train.label_drop}) must be in [0, 1]")
    need(0 <= train.ema < 1, f"train.ema ({train.ema}) must be in [0, 1)")
    need(0 <= config.run.seed < 2**64, f"run.seed ({config.run.seed}) must be in [0, 2^64)")
    need(config.data.window >= 1, f"data.window ({config.data.window}) must be at least 1 shard")
    need(config.data.prefetch >= 1, f"data.prefetch ({config.data.prefetch}) must be at least 1 step")
    for name in ("steps", "batch", "columns"):
        need(getattr(sample, name) >= 1, f"sample.{name} ({getattr(sample, name)}) must be at least 1")
    need(sample.gamma is None or 0 <= sample.gamma <= 1, f"sample.gamma ({sample.gamma}) must be in [0, 1]")


@dataclass(frozen=True)
class Layout:
    """Numbers that depend on the number of ranks, resolved once and printed.

    ``pool`` is in samples; ``pool_ranks`` is the number of consecutive ranks that together hold whole pools
    (1: pools inside a rank; otherwise whole expert-parallel groups)."""

    ranks: int
    ep: int
    batch: int
    micro_batch: int
    accumulation: int
    pool: int
    pool_ranks: int

    @property
    def pools(self) -> int:
        """Pools in the forward pass of all ranks together."""
        return self.micro_batch * self.ranks // self.pool


def resolve_layout(config: Config, ranks: int) -> Layout:
    """Batch arithmetic, pool and expert groups for ``ranks`` ranks.  Raises ValueError naming both numbers."""
    train, ep = config.train, config.parallel.ep
    if ranks % ep:
        raise ValueError(f"world size ({ranks}) must divide by parallel.ep ({ep})")
    micro, accumulation = train.micro_batch, train.accumulation
    if accumulation is None:
        per_pass = train.batch if micro is None else micro * ranks
        if train.batch % per_pass:
            raise ValueError(f"train.batch ({train.batch}) must divide by train.micro_batch ({micro}) x ranks ({ranks})")
        accumulation = train.batch // per_pass
    if micro is None:
        if train.batch % (accumulation * ranks):
            raise ValueError(
                f"train.batch ({train.batch}) must divide by ranks ({ranks}) x train.accumulation ({accumulation})")
        micro = train.batch // (accumulation * ranks)
    if micro * ranks * accumulation != train.batch:
        raise ValueError(
            f"train.micro_batch ({micro}) x ranks ({ranks}) x train.accumulation ({accumulation}) = "
            f"{micro * ranks * accumulation} must equal train.batch ({train.batch})")
    words = {"rank": micro, "group": micro * ep, "global": micro * ranks}
    pool = words.get(config.moe.pool, config.moe.pool)
    if config.model.family == "dense":
        pool = 1
    if (micro * ranks) % pool:
        raise ValueError(
            f"moe.pool ({pool} samples) must divide the forward batch train.micro_batch ({micro}) x ranks ({ranks}) = "
            f"{micro * ranks}")
    _check_taken(config, pool)
    return Layout(ranks, ep, train.batch, micro, accumulation, pool, _pool_ranks(pool, micro, ep))


def _pool_ranks(pool: int, micro: int, ep: int) -> int:
    if micro % pool == 0:
        return 1
    if (micro * ep) % pool == 0:
        return ep
    return math.lcm(pool // math.gcd(pool, micro), ep)


def rows_taken(pool_tokens: int, experts: int, capacity: float) -> int:
    """K = floor(pool tokens / experts x capacity), at most every token of the pool (paper, equation 5)."""
    return min(pool_tokens, int(pool_tokens * capacity / experts + 1e-9))


def swiglu_hidden(hidden: int) -> int:
    """Inner width that gives three matrices the parameters of two: 2/3, rounded up to a multiple of 8."""
    return -(-2 * hidden // 3 // 8) * 8


def _check_taken(config: Config, pool: int) -> None:
    if config.model.family in ("ec", "diffmoe"):
        tokens = pool * config.model.tokens
        if rows_taken(tokens, config.moe.experts, config.moe.capacity) < 1:
            raise ValueError(
                f"moe.pool ({pool} samples = {tokens} tokens) gives each of moe.experts ({config.moe.experts}) less "
                f"than one token at moe.capacity ({config.moe.capacity})")


# --------------------------------------------------------------------------------------------- DeepSpeed JSON

# Keys that DeepSpeed would read and that the YAML owns: allowed only with the YAML's own value.
_OWNED = {
    "train_batch_size": "train.batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.accumulation",
    "gradient_clipping": "train.clip",
}
_OWNED_BLOCKS = {"optimizer": "train.optimizer, train.lr, …", "scheduler": "train.schedule, train.warmup"}
# DeepSpeed ignores unknown keys without a word, so the ones that we pass on are listed.
_PASSED = {
    "zero_optimization", "bf16", "data_types", "communication_data_type", "prescale_gradients",
    "gradient_predivide_factor", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "steps_per_print",
    "wall_clock_breakdown", "memory_breakdown", "dump_state", "comms_logger", "flops_profiler", "aio",
    "disable_allgather", "seed",
}


def read_deepspeed(path: str | Path | None) -> dict:
    """The DeepSpeed JSON as a dict (ZeRO 1 in fp32 when no file is given).  Raises ValueError."""
    if path is None:
        return {"zero_optimization": {"stage": 1}}
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"--deepspeed_config {path} does not exist")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_object_without_duplicates)
    except ValueError as error:
        raise ValueError(f"--deepspeed_config {path} is not valid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"--deepspeed_config {path} must hold an object, not {type(tree).__name__}")
    return tree


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict:
    for i, (key, _) in enumerate(pairs):
        if key in dict(pairs[:i]):
            raise ValueError(f"key {key!r} stands twice")
    return dict(pairs)


def merge_deepspeed(tree: dict, config: Config, layout: Layout) -> dict:
    """The dict that ``deepspeed.initialize`` gets: the JSON plus the numbers that the YAML owns.

    Raises ValueError for unknown keys, for a number named twice with different values and for what this trainer
    does not support (fp16, ZeRO stages outside 0-3)."""
    owned = {
        "train_batch_size": layout.batch,
        "train_micro_batch_size_per_gpu": layout.micro_batch,
        "gradient_accumulation_steps": layout.accumulation,
        "gradient_clipping": config.train.clip,
    }
    for key, value in tree.items():
        if key in owned:
            if value not in ("auto", owned[key]):
                raise ValueError(
                    f"DeepSpeed's {key} ({value}) contradicts the YAML's {_OWNED[key]} ({owned[key]}); the YAML owns it")
        elif key in _OWNED_BLOCKS:
            raise ValueError(f"DeepSpeed's {key!r} block is not read: the YAML owns it as {_OWNED_BLOCKS[key]}")
        elif key == "fp16":
            if _block(tree, key).get("enabled", False):
                raise ValueError("DeepSpeed's fp16.enabled (true) is not supported: use bf16.enabled")
        elif key not in _PASSED:
            close = difflib.get_close_matches(key, [*_PASSED, *owned], n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"unknown key {key} (value {value!r}) in the DeepSpeed JSON{hint}")
    for key in ("bf16", "data_types"):
        _block(tree, key)
    zero = _block(tree, "zero_optimization")
    if zero.get("stage", 0) not in (0, 1, 2, 3):
        raise ValueError(f"DeepSpeed's zero_optimization.stage ({zero['stage']}) must be 0, 1, 2 or 3")
    passed = {key: value for key, value in tree.items() if key in _PASSED and value is not None}
    return {"steps_per_print": 10**9, **passed, **owned}


def _block(tree: dict, key: str) -> dict:
    block = {} if tree.get(key) is None else tree[key]
    if not isinstance(block, dict):
        raise ValueError(f"DeepSpeed's {key} ({block!r}) must be an object")
    return block
