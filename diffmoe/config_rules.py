"""What must hold in a configuration, without knowing the number of ranks.  No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from diffmoe.errors import UserError
from diffmoe.families import expert_hidden, has_load_bias
from diffmoe.schema import Config, DiffusionConfig, MoEConfig


def validate(config: Config) -> None:
    """Everything that can be checked without knowing the number of ranks.  Raises UserError."""
    checks = (_model, _moe, _diffusion, _sample, _train, _run, _data, _score)
    for name, good, words in (rule for check in checks for rule in check(config)):
        if not good:
            section, field_name = name.split(".")
            raise UserError(
                f"{name} ({_shown(getattr(vars(config)[section], field_name))}) {words}"
            )


def check_training(config: Config) -> None:
    """Raises UserError for images or scores while training that this configuration cannot give."""
    if config.train.sample_every or config.train.score_every:
        check_guidance(config, training=True)


def check_guidance(config: Config, training: bool = False) -> None:
    """Raises UserError for guidance by a null class that this configuration never trains, for times
    that the model has not learned, or, beside ``training``, for weights that it does not load.
    """
    sample, learned = config.sample, config.diffusion.time_range
    if training and learned != DiffusionConfig.time_range:
        raise UserError(
            f"diffusion.time_range ({list(learned)}) leaves times out: images and scores while "
            "training (train.sample_every, train.score_every) need the model of those times, which "
            "training does not hold; both must be 0"
        )
    if (sample.pair is None) != (learned == DiffusionConfig.time_range):
        raise UserError(
            f"sample.pair ({_shown(sample.pair)}) must be the model of the times that "
            f"diffusion.time_range {list(learned)} leaves out, and null where it leaves none out"
        )
    if config.train.label_drop == 0 and sample.cfg != 1 and sample.guide is None:
        raise UserError(
            f"sample.cfg ({sample.cfg}) must be 1 where train.label_drop (0) never trains "
            "the null class that guidance needs: say sample.cfg=1 (--cfg 1), or sample.guide"
        )
    others = {"guide": (sample.guide_checkpoint, "null or capacity"), "pair": (sample.pair, "null")}
    for name, (place, allowed) in others.items():
        if training and place:
            raise UserError(
                f"sample.{name} ({place}) must be {allowed} for images and scores while training "
                "(train.sample_every, train.score_every), which holds no other weights"
            )


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return {"": "''", (): "[]", None: "null"}.get(value, str(value))


# Of averages by power functions; the uniform one's is 12^(-1/2).
EMA_LENGTHS = 0.001, 0.28
# (Field, whether it is good, what it must be).  One that is not good ends them, so that later ones
# may divide by it.
Rules = Iterator[tuple[str, bool, str]]


def _at_least(section: str, values: Any, least: int, *names: str) -> Rules:
    for name in names:
        value = getattr(values, name)
        yield f"{section}.{name}", value is None or value >= least, f"must be at least {least}"


def _model(config: Config) -> Rules:
    model = config.model
    sizes = ("input_size", "channels", "patch", "width", "depth", "heads", "classes")
    yield from _at_least("model", model, 1, *sizes)
    divides = model.input_size % model.patch == 0
    yield "model.input_size", divides, f"must be divisible by model.patch ({model.patch})"
    divides = model.width % model.heads == 0
    yield "model.width", divides, f"must be divisible by model.heads ({model.heads})"
    divides = model.width % 4 == 0
    yield "model.width", divides, "must be divisible by 4 for the 2-d sine position embedding"
    head = model.width // model.heads
    words = f"needs heads whose width (model.width / model.heads: {head}) is divisible by 4"
    yield "model.positions", model.positions == "sincos" or head % 4 == 0, words
    yield "model.position_scale", model.position_scale > 0, "must be above 0"
    words = f"x model.width ({model.width}) must be at least 1"
    yield "model.mlp_ratio", model.hidden >= 1, words


def _moe(config: Config) -> Rules:
    model, moe, ep = config.model, config.moe, config.parallel.ep
    yield from _at_least("parallel", config.parallel, 1, "ep")
    if model.family == "dense":
        words = "must be 1 for model.family (dense): it has no experts"
        yield "parallel.ep", ep == 1, words
        words = "must be none for model.family (dense): it has no experts"
        yield "parallel.overlap", config.parallel.overlap == "none", words
        return
    words = "leaves no MoE block with moe.interleave (true)"
    yield "model.depth", model.depth >= 2 or not moe.interleave, words
    yield from _at_least("moe", moe, 1, "experts")
    yield "moe.experts", moe.experts % ep == 0, f"must be divisible by parallel.ep ({ep})"
    words = "must be none with parallel.ep (1): no rows travel that could be overlapped"
    yield "parallel.overlap", ep > 1 or config.parallel.overlap == "none", words
    yield from _at_least("moe", moe, 0, "shared_experts", "balance_weight", "predictor_weight")
    words = f"must be above 0 and at most moe.experts ({moe.experts})"
    yield "moe.capacity", 0 < moe.capacity <= moe.experts, words
    words = f"must be from 1 to moe.experts ({moe.experts})"
    yield "moe.top_k", 1 <= moe.top_k <= moe.experts, words
    yield from _router(config)
    words = f"must be from 0 to moe.capacity_until ({moe.capacity_until})"
    yield "moe.capacity_hold", 0 <= moe.capacity_hold <= moe.capacity_until, words
    yield "moe.threshold_decay", 0 <= moe.threshold_decay < 1, "must be in [0, 1)"
    good = not isinstance(moe.pool, int) or moe.pool >= 1
    yield "moe.pool", good, "must be at least 1 sample"
    words = "must be 1 for model.family (ec): its experts choose inside each sample"
    yield "moe.pool", model.family != "ec" or moe.pool == 1, words


def _router(config: Config) -> Rules:
    """What only some families have; the rest of them must leave it as it is."""
    model, moe = config.model, config.moe
    family = f"for model.family ({model.family})"
    yield from _at_least("moe", moe, 0, "bias_rate", "target_weight")
    yield from _at_least("moe", moe, 1, "threshold_from")
    scheduled = moe.threshold_from is not None and moe.capacity_until > 0
    words = "must be 0 with moe.threshold_from: thresholds would follow a schedule from afar"
    yield "moe.capacity_until", not scheduled, words
    hidden = moe.mlp_ratio is None or expert_hidden(model, moe) >= 1
    yield "moe.mlp_ratio", hidden, f"x model.width ({model.width}) must be at least 1"
    owners = {
        "balance": ("tc",),
        "expert_groups": ("tc",),
        "router_input": ("tc", "ec", "diffmoe"),
        "target_weight": ("race",),
        "threshold_from": ("diffmoe",),
    }
    for name, families in owners.items():
        default = getattr(MoEConfig, name)
        good = model.family in families or getattr(moe, name) == default
        yield f"moe.{name}", good, f"must be {_shown(default)} {family}"
    good = has_load_bias(model, moe) or moe.bias_rate == MoEConfig.bias_rate
    words = f"must be {MoEConfig.bias_rate} without moe.balance (bias)"
    yield "moe.bias_rate", good, words
    words = f"must be softmax or sigmoid {family}"
    yield "moe.score", moe.score != "identity" or model.family == "race", words
    good = model.family != "prototype" or moe.score == "softmax"
    yield "moe.score", good, f"must be left alone {family}, whose scores are cosines"
    yield "moe.gate_scale", moe.gate_scale > 0, "must be above 0"
    words = f"must be raw {family} with moe.score ({moe.score}): scores may add up to 0"
    signed = moe.score == "identity" or model.family == "prototype"
    yield "moe.gates", moe.gates == "raw" or not signed, words
    constant = model.family == "tc" and moe.top_k == 1
    words = (
        "must be raw with moe.top_k (1): a normalized gate would be 1, and teach a router nothing"
    )
    yield "moe.gates", moe.gates == "raw" or not constant, words
    words = f"must be at least 2 {family}: the last expert is the null class's"
    yield "moe.experts", model.family != "prototype" or moe.experts > 1, words
    words = f"must be at most moe.experts - 1 ({moe.experts - 1}) {family}"
    yield "moe.top_k", model.family != "prototype" or moe.top_k < moe.experts, words
    yield "moe.contrast_temperature", moe.contrast_temperature > 0, "must be above 0"
    groups = moe.expert_groups
    yield (
        "moe.expert_groups",
        groups >= 1 and moe.experts % groups == 0,
        (f"must be at least 1 and divide moe.experts ({moe.experts})"),
    )
    good = 1 <= moe.top_groups <= groups
    yield "moe.top_groups", good, f"must be from 1 to moe.expert_groups ({groups})"
    most = moe.top_groups * moe.experts // groups
    words = f"must be at most the experts of moe.top_groups ({moe.top_groups}) groups: {most}"
    yield "moe.top_k", model.family != "tc" or moe.top_k <= most, words


def _diffusion(config: Config) -> Rules:
    diffusion, steps = config.diffusion, config.sample.steps
    yield "diffusion.time_std", diffusion.time_std > 0, "must be above 0"
    flow, process = diffusion.process == "flow", f"for diffusion.process ({diffusion.process})"
    fitting = ("euler", "heun", "dopri5") if flow else ("ancestral", "ddim")
    words = f"must be one of {', '.join(fitting)} {process}"
    yield "sample.sampler", config.sample.sampler in fitting, words
    yield "diffusion.time_shift", diffusion.time_shift > 0, "must be above 0"
    low, high = diffusion.time_range
    words = "must be two times, the lower first, that begin at 0 or end at 1: two models cover all"
    good = 0 <= low < high <= 1 and (low == 0 or high == 1)
    yield "diffusion.time_range", good, words
    words = f"must be none {process}: it is defined for the prediction of noise"
    yield "diffusion.loss_weight", not flow or diffusion.loss_weight == "none", words
    words = f"must be left alone {process}, which predicts the noise"
    yield "diffusion.prediction", flow or diffusion.prediction == "velocity", words
    if config.train.direction_weight:
        words = f"must be 0 {process}, which predicts no velocity"
        yield "train.direction_weight", flow, words
        words = "must be 0 with model.channels (1): one number has a sign, and no other direction"
        yield "train.direction_weight", config.model.channels > 1, words
    if not flow:
        yield "diffusion.time_shift", diffusion.time_shift == 1.0, f"must be 1 {process}"
        yield "diffusion.time_range", (low, high) == (0, 1), f"must be [0, 1] {process}"
        yield "model.learn_sigma", config.model.learn_sigma, f"must be true {process}"
        yield "diffusion.time_scale", diffusion.time_scale == 1.0, f"must be 1 {process}"
        uniform = diffusion.time_sampling == "uniform"
        yield "diffusion.time_sampling", uniform, f"must be uniform {process}"
        yield "sample.steps", 2 <= steps <= 1000, "must be from 2 to DDPM's 1000 steps"


def _sample(config: Config) -> Rules:
    sample, family = config.sample, config.model.family
    yield from _at_least("sample", sample, 1, "steps", "batch", "columns", "cfg_channels")
    yield "sample.eta", 0 <= sample.eta <= 1, "must be in [0, 1]"
    yield "sample.tolerance", sample.tolerance > 0, "must be above 0"
    yield "sample.gamma", sample.gamma is None or 0 <= sample.gamma <= 1, "must be in [0, 1]"
    good = sample.gamma is None or config.moe.score != "identity" or family != "race"
    yield "sample.gamma", good, "must be null for moe.score (identity), which is not in [0, 1]"
    if sample.routing == "static":
        words = f"needs model.family diffmoe or race, not {family}"
        if family == "ec":
            words += ", whose experts take as many tokens always"
        yield "sample.routing", family in ("diffmoe", "race"), words
        words = (
            "must be null for sample.routing (static), which has no thresholds and takes "
            f"moe.capacity ({config.moe.capacity})"
        )
        yield "sample.gamma", sample.gamma is None, words
        yield "sample.capacity", sample.capacity is None, words
    interval = sample.cfg_interval
    words = "must be two times, the lower first, in [0, 1]"
    yield "sample.cfg_interval", interval is None or 0 <= interval[0] < interval[1] <= 1, words
    words = "must be null for sample.sampler (dopri5), whose samples have each their own time"
    yield "sample.cfg_interval", interval is None or sample.sampler != "dopri5", words
    words = "must be null for sample.sampler (dopri5), whose samples have each their own time"
    yield "sample.pair", sample.pair is None or sample.sampler != "dopri5", words
    yield "sample.pair", sample.pair != "", "must be null or a checkpoint"
    yield "sample.guide", sample.guide != "", "must be null, capacity or a checkpoint"
    if sample.guide == "capacity":
        dialled = family in ("diffmoe", "ec") or sample.routing == "static"
        routing = f"under sample.routing ({sample.routing})"
        words = f"needs experts whose capacity can be lowered: not model.family {family} {routing}"
        yield "sample.guide", dialled, words
        section = "moe" if sample.capacity is None else "sample"
        own = vars(config)[section].capacity
        words = f"must be above 0 and below {section}.capacity ({own})"
        yield "sample.guide_capacity", 0 < sample.guide_capacity < own, words
    if sample.capacity is not None:
        words = f"needs model.family diffmoe, not {family}: its thresholds are what it sets"
        yield "sample.capacity", family == "diffmoe", words
        words = f"and sample.gamma ({sample.gamma}) both set the thresholds; one must be null"
        yield "sample.capacity", sample.gamma is None, words
        words = f"must be above 0 and at most moe.experts ({config.moe.experts})"
        yield "sample.capacity", 0 < sample.capacity <= config.moe.experts, words


def _train(config: Config) -> Rules:
    train = config.train
    yield from _at_least("train", train, 1, "batch", "micro_batch", "accumulation", "log_every")
    limits = ("keep", "nonfinite_limit", "spike_window", "spike_limit")
    yield from _at_least("train", train, 1, *limits)
    numbers = ("steps", "lr", "warmup", "eps", "clip", "weight_decay")
    periods = ("sample_every", "score_every", "validate_every", "save_every", "keep_every")
    yield from _at_least("train", train, 1, "validate_samples", "recipe_batch")
    yield from _at_least("train", train, 0, *numbers, *periods, "mirror_mb_s")
    yield from _at_least("train", train, 0, "dispersive_weight", "direction_weight", "repa_weight")
    yield from _at_least("train", train, 1, "repa_block", "repa_width", "repa_hidden")
    block, depth = train.repa_block, config.model.depth
    words = f"must be at most model.depth ({depth})"
    yield "train.repa_block", block is None or block <= depth, words
    yield from _at_least("train", train, 0, "ema_snapshot_every")
    good = not train.mirror or "://" in train.mirror
    yield "train.mirror", good, "must be an address, such as s3://bucket/runs/mine or file:///…"
    good = train.mirror_mb_s == 0 or train.mirror != ""
    yield "train.mirror_mb_s", good, "must be 0 without train.mirror"
    good = train.spike_factor == 0 or train.spike_factor > 1
    yield "train.spike_factor", good, "must be above 1, or 0 for no guard"
    yield "train.betas", all(0 <= b < 1 for b in train.betas), "must each be in [0, 1)"
    yield "train.label_drop", 0 <= train.label_drop <= 1, "must be in [0, 1]"
    decays = train.ema_decays
    yield "train.ema", len(decays) > 0, "must have at least one decay"
    yield "train.ema", all(0 <= decay < 1 for decay in decays), "must be in [0, 1)"
    yield "train.ema", len(set(decays)) == len(decays), "must not name a decay twice"
    lengths = train.ema_lengths
    low, high = EMA_LENGTHS
    words = f"must be in {low}..{high}"
    yield "train.ema_lengths", all(low <= s <= high for s in lengths), words
    yield "train.ema_lengths", len(set(lengths)) == len(lengths), "must not name a length twice"
    good = train.ema_snapshot_every == 0 or len(lengths) > 0
    yield "train.ema_snapshot_every", good, "must be 0 without train.ema_lengths"


def _run(config: Config) -> Rules:
    run = config.run
    yield "run.seed", 0 <= run.seed < 2**64, "must be in [0, 2^64)"
    yield "run.timeout_s", 0 <= run.timeout_s <= 1e7, "must be from 0 to 1e7 seconds"
    yield "run.folder", run.folder != "", "must name a folder"
    factor = run.straggler_factor
    yield "run.straggler_factor", factor == 0 or factor > 1, "must be above 1, or 0"
    yield from _at_least("run", run, 1, "straggler_steps")
    words = f"needs run.straggler_factor ({factor}) above 1"
    yield "run.on_straggler", run.on_straggler == "name" or factor > 1, words


def _data(config: Config) -> Rules:
    data = config.data
    yield from _at_least("data", data, 1, "streams", "window", "prefetch")
    yield from _at_least("data", data, 0, "workers")
    yield "data.cache_gib", data.cache_gib > 0, "must be above 0"
    yield "data.bad_share", 0 <= data.bad_share < 1, "must be in [0, 1)"
    every = config.train.validate_every
    words = f"must be given for train.validate_every ({every})"
    yield "data.validation", every == 0 or data.validation != "", words
    weight = config.train.repa_weight
    words = f"must be false with train.repa_weight ({weight}): features are of unflipped images"
    yield "data.flip", weight == 0 or not data.flip, words


def _score(config: Config) -> Rules:
    score, every = config.score, config.train.score_every
    yield from _at_least("score", score, 1, "count")
    words = f"must be given for train.score_every ({every})"
    yield "score.reference", every == 0 or score.reference != "", words
    yield "score.extractor", every == 0 or score.extractor != "", words
