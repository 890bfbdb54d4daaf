"""What a routing family has and does, from the configuration alone.  No torch here.

=========== ==================================================================================
family      who chooses
=========== ==================================================================================
dense       nobody: there are no experts
tc          each token takes its ``moe.top_k`` best experts (Shazeer et al. 2017)
ec          each expert takes its best tokens of a sample (Zhou et al. 2022)
diffmoe     each expert takes its best tokens of a pool of samples (Shi et al. 2025); from step
            ``moe.threshold_from`` on those above its threshold (Expert Threshold, 2603.11535)
race        the best (token, expert) pairs of a pool, whoever's they are (Expert Race, 2503.16057)
prototype   tokens of the null class have an expert of their own; the others take the experts
            whose prototypes point their way (ProMoE, 2510.24711)
=========== ==================================================================================
"""

from __future__ import annotations

from typing import NamedTuple

from diffmoe.schema import Config, ModelConfig, MoEConfig

TOKENS_CHOOSE = ("tc", "prototype")


def is_moe_block(model: ModelConfig, moe: MoEConfig, index: int) -> bool:
    """Whether block ``index`` has an MoE layer: every one, or every second (1, 3, …)."""
    return model.family != "dense" and (not moe.interleave or index % 2 == 1)


def has_predictor(model: ModelConfig, moe: MoEConfig) -> bool:
    """Whether a capacity predictor learns the pool's choice, for sampling."""
    return model.family == "diffmoe" and moe.threshold_from is None


def has_thresholds(model: ModelConfig) -> bool:
    """Whether thresholds, learned as running means, decide in sampling."""
    return model.family in ("diffmoe", "race")


def has_load_bias(model: ModelConfig, moe: MoEConfig) -> bool:
    """Whether a bias that follows the load is added to scores when experts are chosen."""
    return model.family == "tc" and moe.balance == "bias"


def has_router_loss(model: ModelConfig, moe: MoEConfig) -> bool:
    """Whether an MoE layer has a loss that shapes its routing, weighted by ``moe.balance_weight``:
    tc's balance, race's similarity, prototype's contrast.
    """
    if model.family == "tc":
        return moe.balance == "loss"
    return model.family in ("race", "prototype")


def has_target_head(model: ModelConfig, moe: MoEConfig) -> bool:
    """Whether the router has a hidden layer, out of which it also predicts the target (Expert
    Race's per-layer regularization).
    """
    return model.family == "race" and moe.target_weight > 0


def router_shape(model: ModelConfig, moe: MoEConfig) -> tuple[int, int]:
    """Rows and columns of a layer's router.  The null class's expert has no row in it."""
    rows = moe.experts - (model.family == "prototype")
    return rows, model.width * (2 if moe.router_input == "time_token" else 1)


def experts_per_token(model: ModelConfig, moe: MoEConfig) -> float:
    """How many routed experts a token meets on average in an MoE layer, as trained."""
    return moe.top_k if model.family in TOKENS_CHOOSE else moe.capacity


def expert_hidden(model: ModelConfig, moe: MoEConfig) -> int:
    """Inner width of an expert before SwiGLU's two thirds, and of one shared expert."""
    return model.hidden if moe.mlp_ratio is None else int(model.width * moe.mlp_ratio)


def inner_width(hidden: int, activation: str) -> int:
    """Inner width of an MLP or expert whose GELU's would be ``hidden``."""
    return hidden if activation == "gelu" else swiglu_hidden(hidden)


def swiglu_hidden(hidden: int) -> int:
    """Inner width that gives three matrices the parameters of two: 2/3, rounded up to a multiple of
    8.
    """
    return -(-2 * hidden // 3 // 8) * 8


class Projector(NamedTuple):
    """Three linear layers behind ``block`` blocks; ``sizes``: of tokens, inside twice, features."""

    block: int
    sizes: tuple[int, int, int, int]


def projector_of(config: Config) -> Projector | None:
    """What `train.repa_weight` trains beside a model of any family; None where it is 0."""
    train, model = config.train, config.model
    if train.repa_weight == 0:
        return None
    block = train.repa_block or max(1, min(8, model.depth // 3))
    return Projector(block, (model.width, train.repa_hidden, train.repa_hidden, train.repa_width))
