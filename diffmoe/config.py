"""The configuration: a tree of frozen dataclasses <- YAML files with ``include`` <- ``a.b=c`` overrides.

The YAML owns model, data, batch, learning rate, clipping and schedule.  The DeepSpeed JSON owns ZeRO, precision,
communication and offload.  A number named in both places with two values is an error that prints both.
No torch here: a login node without it can read, check and print a configuration.
"""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional, Union

from diffmoe.errors import UserError
from diffmoe.paths import expand_path
from diffmoe.strict_yaml import build, merge, read_yaml, tree_of_overrides


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives and what all its randomness comes from.  ``timeout_s``: a rank that lives and makes no progress for so
    long ends the job, with a report (three times as long until the first step is done; 0: nobody looks); a dead one does
    within a minute.
    ``device``: ``cpu``, ``cuda`` (a GPU, or an error), or ``auto``: a GPU if there is one, and an error if it cannot be used.
    ``fp32_precision``: what a GPU may do with fp32 matmuls and convolutions, in training and in all that is made of the run:
    ``ieee`` or ``tf32``."""

    folder: str = "runs/default"
    seed: int = 0
    timeout_s: float = 600.0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    fp32_precision: Literal["ieee", "tf32"] = "ieee"


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
    """Mixture layers.  ``pool`` counts samples, or says ``rank``, ``group`` (expert-parallel) or ``global``.
    ``router_start``: fresh routers are N(0, 0.006), or uniform up to 1 / sqrt(width), as the research code's of token choice."""

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
    router_start: Literal["normal", "uniform"] = "normal"

    def capacity_at(self, step: int) -> float:
        """Training capacity at optimizer step ``step``: every expert takes every token (capacity = ``experts``)
        for ``capacity_hold`` steps, then falls linearly to ``capacity`` at step ``capacity_until``."""
        if step >= self.capacity_until:
            return self.capacity
        if step < self.capacity_hold:
            return float(self.experts)
        share = (step - self.capacity_hold) / (self.capacity_until - self.capacity_hold)
        return self.experts + share * (self.capacity - self.experts)


def swiglu_hidden(hidden: int) -> int:
    """Inner width that gives three matrices the parameters of two: 2/3, rounded up to a multiple of 8."""
    return -(-2 * hidden // 3 // 8) * 8


@dataclass(frozen=True)
class DiffusionConfig:
    """``flow``: rectified flow; ``ddpm``: ADM's 1000 linear steps with learned range.

    For the flow ``time_scale`` multiplies t in [0, 1] before the embedding (published: 1), and ``time_sampling`` says how
    training draws t; ``time_mean`` and ``time_std`` belong to the logit-normal."""

    process: Literal["flow", "ddpm"] = "flow"
    time_scale: float = 1.0
    time_sampling: Literal["uniform", "logit_normal"] = "uniform"
    time_mean: float = 0.0
    time_std: float = 1.0


@dataclass(frozen=True)
class DataConfig:
    """Webdataset shards with an ``index.json`` (``index`` where it does not lie beside them).

    ``streams`` runs of samples feed a batch, and each shuffles ``window`` shards together: both decide the order (null:
    by whether the shards are shuffled, see ``data.mixing.order_for``), while ``workers`` (processes a rank; 0: a
    thread) and ``prefetch`` (steps) do not.  ``cache``: folder for copies of remote shards, at
    most ``cache_gib`` a node.  ``on_bad_shard: skip`` goes on without a shard that cannot be read, as long as bad ones hold no
    more than ``bad_share`` of the samples."""

    shards: str = ""
    index: str = ""
    flip: bool = False
    streams: Optional[int] = None
    window: Optional[int] = None
    workers: int = 0
    prefetch: int = 2
    cache: str = ""
    cache_gib: float = 64.0
    on_bad_shard: Literal["stop", "skip"] = "stop"
    bad_share: float = 0.01


@dataclass(frozen=True)
class TrainConfig:
    """The recipe.  ``batch`` is the global batch of one optimizer step; micro_batch x ranks x accumulation = batch.

    ``ema``: one decay or several, of which the first is the one that samples and every one is scored (``score_every`` steps; 0:
    never).  The newest ``keep`` checkpoints stay, and besides
    them every one whose step divides by ``keep_every`` (0: none); ``async_save`` writes them while training goes on.

    ``on_nonfinite``: a step whose loss or gradient is not finite changes nothing and is passed over (``skip``, at most
    ``nonfinite_limit`` in a row), or ends the run (``stop``).  ``spike_factor`` above 0: a step whose loss is above so many
    times the median of the last ``spike_window`` steps sends the run back to its last checkpoint, and is left out from then
    on; more than ``spike_limit`` times back to one checkpoint ends the run.

    ``compile``: whether training, sampling and scoring run through torch.compile; ``auto``: see :meth:`compiles`."""

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
    on_nonfinite: Literal["skip", "stop"] = "stop"
    nonfinite_limit: int = 10
    spike_factor: float = 0.0
    spike_window: int = 64
    spike_limit: int = 3
    ema: Union[float, tuple[float, ...]] = 0.9999
    log_every: int = 50
    sample_every: int = 0
    score_every: int = 0
    save_every: int = 10_000
    keep: int = 3
    keep_every: int = 0
    async_save: bool = True
    compile: Union[Literal["auto"], bool] = "auto"

    @property
    def ema_decays(self) -> tuple[float, ...]:
        """The decays of ``ema``, also where it is one number."""
        return self.ema if isinstance(self.ema, tuple) else (self.ema,)

    def compiles(self, device: str, stage: int = 0) -> bool:
        """Whether ``compile`` means yes on ``device`` (cpu, cuda) at ZeRO ``stage``.  ``auto``: on a GPU, below ZeRO 3,
        which gathers weights in hooks of modules, where no graph can go."""
        return self.compile if isinstance(self.compile, bool) else device == "cuda" and stage < 3

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


def attention_kept(depth: int) -> int:
    """In how many of ``depth`` blocks ``selective`` recompute keeps the attention's output as well: a tenth of a block's time
    for one width a token.  As many as leave the whole within 1.5 times what ``block`` keeps, which is one width for every
    block and 22 for the one that is being computed again (measured: docs/results)."""
    return max(0, min(depth, 12 - depth // 2))


@dataclass(frozen=True)
class SampleConfig:
    """Sampling.  ``sampler``: euler, heun, dopri5 for the flow; ancestral, ddim for DDPM.  ``cfg_channels``: channels that
    DDPM's guidance moves (published: the first 3; the flow guides all).  ``eta`` is DDIM's noise,
    ``tolerance`` dopri5's error per step (``steps`` is then the most that it may take).  ``routing``: ``batch`` is the
    paper's rule, ``token`` the batch-invariant one, ``static`` the paper's static top-k: every expert takes
    as many tokens of a rank's batch as ``moe.capacity`` says.  ``gamma``: one constant threshold for every expert in place of
    the learned ones; ``capacity``: the experts that a token gets on average, by thresholds from the predictor's histograms."""

    sampler: Literal["euler", "heun", "dopri5", "ancestral", "ddim"] = "euler"
    steps: int = 50
    cfg: float = 1.5
    cfg_channels: int = 3
    eta: float = 0.0
    tolerance: float = 1e-4
    routing: Literal["batch", "token", "static"] = "token"
    gamma: Optional[float] = None
    capacity: Optional[float] = None
    batch: int = 64
    columns: int = 10


@dataclass(frozen=True)
class ScoreConfig:
    """Scores while training (``train.score_every``): of ``count`` images, as the ``sample`` section makes them, against ``reference``
    by ``extractor``, both as the verb ``evaluate`` takes them; ``vae`` decodes latents."""

    reference: str = ""
    extractor: str = ""
    vae: str = ""
    count: int = 10_000


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
    score: ScoreConfig = field(default_factory=ScoreConfig)


def load_config(path: str | Path | None, overrides: list[str] | None = None) -> Config:
    """Defaults <- YAML file <- overrides, typed and validated.  Raises UserError naming the field."""
    tree = read_yaml(path) if path is not None else {}
    config = _expand_paths(config_from_tree(merge(tree, tree_of_overrides(overrides or []))))
    validate(config)
    return config


def override(config: Config, overrides: list[str]) -> Config:
    """``config`` with ``a.b=c`` overrides, typed and validated.  Raises UserError naming the field."""
    changed = _expand_paths(config_from_tree(merge(config_to_tree(config), tree_of_overrides(overrides))), known=config)
    validate(changed)
    return changed


def _expand_paths(config: Config, known: Config = Config()) -> Config:
    """With ``~`` and ``$VAR`` replaced in what is a text: all such fields are paths, since words are Literals.  Those that ``known``
    has were read before, perhaps on another machine."""
    sections = {}
    for name, section in vars(config).items():
        kinds, before = typing.get_type_hints(type(section)), vars(getattr(known, name))
        sections[name] = dataclasses.replace(section, **{key: expand_path(value, f"{name}.{key}") for key, value in vars(section).items()
                                                         if kinds[key] is str and value != before[key]})
    return Config(**sections)


def config_from_tree(tree: dict) -> Config:
    """Builds the typed tree from nested dicts; unknown keys and wrong types are errors."""
    return build(Config, tree)


def config_to_tree(config: Any) -> dict:
    """Nested dicts and lists, ready for YAML or JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def validate(config: Config) -> None:
    """Everything that can be checked without knowing the number of ranks.  Raises UserError."""
    _validate_model(config.model)
    _validate_moe(config)
    _validate_diffusion(config)
    _validate_train(config.train)
    _need(0 <= config.run.seed < 2**64, f"run.seed ({config.run.seed}) must be in [0, 2^64)")
    _need(0 <= config.run.timeout_s <= 1e7, f"run.timeout_s ({config.run.timeout_s}) must be from 0 to 1e7 seconds")
    _need(config.run.folder != "", "run.folder ('') must name a folder")
    _validate_data(config.data)
    _validate_score(config)


def check_guidance(config: Config) -> None:
    """Raises UserError for guidance by a null class that this configuration never trains."""
    _need(config.train.label_drop > 0 or config.sample.cfg == 1,
          f"sample.cfg ({config.sample.cfg}) must be 1 where train.label_drop (0) never trains the null class that "
          "guidance needs: say sample.cfg=1 (--cfg 1)")


def _need(good: bool, message: str) -> None:
    if not good:
        raise UserError(message)


def _validate_model(model: ModelConfig) -> None:
    for name in ("input_size", "channels", "patch", "width", "depth", "heads", "classes"):
        _need(getattr(model, name) >= 1, f"model.{name} ({getattr(model, name)}) must be at least 1")
    _need(model.input_size % model.patch == 0,
          f"model.input_size ({model.input_size}) must divide by model.patch ({model.patch})")
    _need(model.width % model.heads == 0, f"model.width ({model.width}) must divide by model.heads ({model.heads})")
    _need(model.width % 4 == 0, f"model.width ({model.width}) must divide by 4 for the 2-d sine position embedding")
    _need(model.hidden >= 1, f"model.mlp_ratio ({model.mlp_ratio}) x model.width ({model.width}) must be at least 1")


def _validate_moe(config: Config) -> None:
    model, moe, ep = config.model, config.moe, config.parallel.ep
    _need(ep >= 1, f"parallel.ep ({ep}) must be at least 1")
    if model.family == "dense":
        _need(ep == 1, f"parallel.ep ({ep}) must be 1 for model.family (dense): it has no experts")
        return
    _need(model.depth >= 2 or not moe.interleave,
          f"model.depth ({model.depth}) leaves no MoE block with moe.interleave (true)")
    _need(moe.experts >= 1, f"moe.experts ({moe.experts}) must be at least 1")
    _need(moe.experts % ep == 0, f"moe.experts ({moe.experts}) must divide by parallel.ep ({ep})")
    for name in ("shared_experts", "balance_weight", "predictor_weight"):
        _need(getattr(moe, name) >= 0, f"moe.{name} ({getattr(moe, name)}) must be at least 0")
    _need(0 < moe.capacity <= moe.experts,
          f"moe.capacity ({moe.capacity}) must be above 0 and at most moe.experts ({moe.experts})")
    _need(1 <= moe.top_k <= moe.experts, f"moe.top_k ({moe.top_k}) must be from 1 to moe.experts ({moe.experts})")
    _need(0 <= moe.capacity_hold <= moe.capacity_until,
          f"moe.capacity_hold ({moe.capacity_hold}) must be from 0 to moe.capacity_until ({moe.capacity_until})")
    _need(0 <= moe.threshold_decay < 1, f"moe.threshold_decay ({moe.threshold_decay}) must be in [0, 1)")
    _need(not isinstance(moe.pool, int) or moe.pool >= 1, f"moe.pool ({moe.pool}) must be at least 1 sample")
    _need(model.family != "ec" or moe.pool == 1,
          f"moe.pool ({moe.pool}) must be 1 for model.family (ec): its experts choose inside each sample")


def _validate_diffusion(config: Config) -> None:
    diffusion, sample = config.diffusion, config.sample
    _need(diffusion.time_std > 0, f"diffusion.time_std ({diffusion.time_std}) must be above 0")
    fitting = {"flow": ("euler", "heun", "dopri5"), "ddpm": ("ancestral", "ddim")}[diffusion.process]
    _need(sample.sampler in fitting,
          f"sample.sampler ({sample.sampler}) must be one of {', '.join(fitting)} for diffusion.process "
          f"({diffusion.process})")
    if diffusion.process == "ddpm":
        _need(config.model.learn_sigma, "model.learn_sigma (false) must be true for diffusion.process (ddpm)")
        _need(diffusion.time_scale == 1.0,
              f"diffusion.time_scale ({diffusion.time_scale}) must be 1 for diffusion.process (ddpm)")
        _need(diffusion.time_sampling == "uniform",
              f"diffusion.time_sampling ({diffusion.time_sampling}) must be uniform for diffusion.process (ddpm)")
        _need(2 <= sample.steps <= 1000, f"sample.steps ({sample.steps}) must be from 2 to DDPM's 1000 steps")
    for name in ("steps", "batch", "columns", "cfg_channels"):
        _need(getattr(sample, name) >= 1, f"sample.{name} ({getattr(sample, name)}) must be at least 1")
    _need(0 <= sample.eta <= 1, f"sample.eta ({sample.eta}) must be in [0, 1]")
    _need(sample.tolerance > 0, f"sample.tolerance ({sample.tolerance}) must be above 0")
    _need(sample.gamma is None or 0 <= sample.gamma <= 1, f"sample.gamma ({sample.gamma}) must be in [0, 1]")
    if sample.routing == "static":
        _need(config.model.family == "diffmoe",
              f"sample.routing (static) needs model.family (diffmoe), not {config.model.family}"
              + ", whose experts take as many tokens always" * (config.model.family == "ec"))
        for name in ("gamma", "capacity"):
            _need(getattr(sample, name) is None,
                  f"sample.{name} ({getattr(sample, name)}) must be null for sample.routing (static), which has no "
                  f"thresholds and takes moe.capacity ({config.moe.capacity})")
    if sample.capacity is not None:
        _need(config.model.family == "diffmoe",
              f"sample.capacity ({sample.capacity}) needs a capacity predictor, which model.family ({config.model.family}) "
              "has not")
        _need(sample.gamma is None,
              f"sample.capacity ({sample.capacity}) and sample.gamma ({sample.gamma}) both set the thresholds; one must be "
              "null")
        _need(0 < sample.capacity <= config.moe.experts,
              f"sample.capacity ({sample.capacity}) must be above 0 and at most moe.experts ({config.moe.experts})")


def _validate_score(config: Config) -> None:
    score, every = config.score, config.train.score_every
    _need(score.count >= 1, f"score.count ({score.count}) must be at least 1")
    for name in ("reference", "extractor"):
        _need(every == 0 or getattr(score, name) != "", f"score.{name} ('') must be given for train.score_every ({every})")


def _validate_data(data: DataConfig) -> None:
    for name, unit in (("streams", "stream"), ("window", "shard"), ("prefetch", "step")):
        value = getattr(data, name)
        _need(value is None or value >= 1, f"data.{name} ({value}) must be at least 1 {unit}")
    _need(data.workers >= 0, f"data.workers ({data.workers}) must be at least 0")
    _need(data.cache_gib > 0, f"data.cache_gib ({data.cache_gib}) must be above 0")
    _need(0 <= data.bad_share < 1, f"data.bad_share ({data.bad_share}) must be in [0, 1)")


def _validate_train(train: TrainConfig) -> None:
    for name in ("batch", "micro_batch", "accumulation", "log_every", "keep", "nonfinite_limit", "spike_window", "spike_limit"):
        value = getattr(train, name)
        _need(value is None or value >= 1, f"train.{name} ({value}) must be at least 1")
    for name in ("steps", "lr", "warmup", "eps", "clip", "weight_decay", "sample_every", "score_every", "save_every",
                 "keep_every"):
        _need(getattr(train, name) >= 0, f"train.{name} ({getattr(train, name)}) must be at least 0")
    _need(train.spike_factor == 0 or train.spike_factor > 1,
          f"train.spike_factor ({train.spike_factor}) must be above 1, or 0 for no guard")
    _need(all(0 <= b < 1 for b in train.betas), f"train.betas ({train.betas}) must each be in [0, 1)")
    _need(0 <= train.label_drop <= 1, f"train.label_drop ({train.label_drop}) must be in [0, 1]")
    _need(len(train.ema_decays) > 0, "train.ema ([]) must have at least one decay")
    _need(all(0 <= decay < 1 for decay in train.ema_decays), f"train.ema ({train.ema}) must be in [0, 1)")
    _need(len(set(train.ema_decays)) == len(train.ema_decays), f"train.ema ({train.ema}) must not name a decay twice")
