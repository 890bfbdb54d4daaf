"""What a configuration holds: a tree of frozen dataclasses.

The YAML owns model, data, batch, learning rate, clipping and schedule.  The DeepSpeed JSON owns
ZeRO, precision, communication and offload.  A number named in both places with two values is an
error that prints both.  No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from diffmoe.sample_schema import SampleConfig
from diffmoe.train_schema import TrainConfig


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives, and what all its randomness comes from.

    Attributes:
        folder: The run folder; a run resumes from what lies there.
        seed: Of weights, order, noise, times and label drops.
        timeout_s: Seconds after which a rank that lives and makes no progress ends the job, with a
            report (three times as long until the first step is done; 0: nobody looks); a dead one
            does within a minute.
        device: `auto`: a GPU if there is one, and an error if it cannot be used; `cuda`: a GPU, or
            an error.
        fp32_precision: What a GPU may do with fp32 matmuls and convolutions, in training and in all
            that is made of the run; the published rows are `tf32`.
        straggler_factor: A rank is a straggler when its own work takes more than this many times
            the median rank's; 0: nobody looks, and ranks' times are not measured.
        straggler_steps: So many steps long, in nine of ten of them at least.
        on_straggler: What becomes of a straggler: the log, metrics and events name it and its host,
            or besides that a job of scripts/slurm saves, excludes the host and requeues itself.
    """

    folder: str = "runs/default"
    seed: int = 0
    timeout_s: float = 600.0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    fp32_precision: Literal["ieee", "tf32"] = "ieee"
    straggler_factor: float = 1.1
    straggler_steps: int = 20
    on_straggler: Literal["name", "requeue"] = "name"


@dataclass(frozen=True)
class ModelConfig:
    """The diffusion transformer.

    Attributes:
        family: Dense DiT, token choice, expert choice inside a sample, DiffMoE, Expert Race, or
            ProMoE's prototypes; see diffmoe/families.py.
        input_size: Height and width of the input, in latent pixels.
        channels: Of the input: 1 or 3 are pixels, others latents.
        patch: Side of the square of latent pixels that becomes a token.
        width: Of a token.
        depth: Blocks.
        heads: Of attention.
        mlp_ratio: Inner width of an MLP and an expert, as a multiple of the width.
        classes: Without the null class.
        learn_sigma: Whether the output has channels for the variance; DDPM needs them.
        qk_norm: Norm of queries and keys, per head, before they are rotated.
        positions: Sines and cosines of a token's row and column are added to it; `rope`: queries
            and keys are rotated as well, half of a head's channels by the row, half by the column
            (RoFormer, 2104.09864, equation 34; as in LightningDiT, 2501.01423, with the sum kept).
        position_scale: Multiplies rows and columns: at 0.5 a grid of twice the side spans what
            another run's has, whose weights this one starts from (2306.15595; PixArt, 2310.00426).
        norm: LayerNorm without parameters, as DiT's; `rms`: RMSNorm with a weight (1910.07467;
            LightningDiT), also of queries and keys.
        activation: Of the MLP of dense blocks, and of shared experts: GELU, or SwiGLU at two thirds
            of its inner width, without biases (2002.05202) or, as LightningDiT has it, with them.
    """

    family: Literal["dense", "tc", "ec", "diffmoe", "race", "prototype"] = "diffmoe"
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
    positions: Literal["sincos", "rope"] = "sincos"
    position_scale: float = 1.0
    norm: Literal["layer", "rms"] = "layer"
    activation: Literal["gelu", "swiglu", "swiglu_bias"] = "gelu"

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
    """MoE layers.

    Attributes:
        experts: In a layer (`prototype`: the last is the null class's).
        activation: GELU with biases (DiT's MLP), or SwiGLU without at two thirds of the inner
            width.
        shared_experts: Experts that every token goes through, as one MLP so many times as wide.
        mlp_ratio: Inner width of an expert, as a multiple of the width (null: model.mlp_ratio).
        interleave: Every second block has an MoE layer, not every block.
        pool: Samples out of which an expert chooses; or all of one pass (a micro-batch) of a rank,
            of an expert-parallel group, of all ranks.
        capacity: Tokens that an expert takes, as a multiple of pool tokens / experts.
        capacity_hold: Steps for which every expert first takes every token.
        capacity_until: Step at which the capacity, falling linearly since then, has arrived.
        top_k: Experts of a token, for token choice and prototypes.
        router_input: What the router sees: the token as experts do, or the time's embedding beside
            the token before adaLN's shift and scale (Nucleus-Image).
        score: Gate function of the router's logits: softmax over experts, sigmoid of each, or
            neither (Expert Race, 3.2; prototypes are always compared by cosine).
        gates: What scales an expert's output: its score (DiffMoE, equation 6), or its share of the
            scores of all experts that the token meets.
        gate_scale: Multiplies gates (Nucleus-Image: 2.5 with normalized ones).
        balance: For token choice: a balance loss, or a bias on the scores that the choice alone
            sees and that moves against the load after every step (DeepSeek-V3, 2.1.2).
        bias_rate: How far it moves.
        expert_groups: For token choice: groups of experts, of which a token first takes the best
            by the sum of each one's two highest scores (DeepSeek-V3, 2.1.2).
        top_groups: How many of them.
        balance_weight: Of the loss on routing: token choice's balance (Switch, equation 4), Expert
            Race's router similarity (equations 9-11), prototypes' contrastive loss.
        target_weight: For Expert Race: of its per-layer regularization, for which a hidden layer of
            the router predicts the target as well (0: a router of one layer).
        contrast_temperature: For prototypes: of the contrastive loss.
        threshold_from: For DiffMoE: step from which experts take the tokens above their thresholds
            in training, too (Expert Threshold); such a model has no capacity predictor (null:
            never).
        predictor_weight: Of the capacity predictor's loss.
        threshold_decay: Of the thresholds' moving average.
        router_start: New routers are N(0, 0.006), or uniform up to 1 / sqrt(width), as the research
            code's of token choice.
    """

    experts: int = 8
    activation: Literal["gelu", "swiglu"] = "gelu"
    shared_experts: int = 0
    mlp_ratio: float | None = None
    interleave: bool = True
    pool: int | Literal["rank", "group", "global"] = "global"
    capacity: float = 1.0
    capacity_hold: int = 0
    capacity_until: int = 0
    top_k: int = 1
    router_input: Literal["token", "time_token"] = "token"
    score: Literal["softmax", "sigmoid", "identity"] = "softmax"
    gates: Literal["raw", "normalized"] = "raw"
    gate_scale: float = 1.0
    balance: Literal["loss", "bias"] = "loss"
    bias_rate: float = 0.001
    expert_groups: int = 1
    top_groups: int = 1
    balance_weight: float = 0.01
    target_weight: float = 0.0
    contrast_temperature: float = 0.07
    threshold_from: int | None = None
    predictor_weight: float = 1.0
    threshold_decay: float = 0.95
    router_start: Literal["normal", "uniform"] = "normal"

    def capacity_at(self, step: int) -> float:
        """Training capacity at optimizer step ``step``: every expert takes every token (capacity =
        ``experts``) for ``capacity_hold`` steps, then falls linearly to ``capacity`` at step
        ``capacity_until``.
        """
        if step >= self.capacity_until:
            return self.capacity
        if step < self.capacity_hold:
            return float(self.experts)
        share = (step - self.capacity_hold) / (self.capacity_until - self.capacity_hold)
        return self.experts + share * (self.capacity - self.experts)


@dataclass(frozen=True)
class DiffusionConfig:
    """The process that is learned.

    Attributes:
        process: Rectified flow, or ADM's 1000 linear steps with learned range.
        prediction: For the flow: what the network predicts, the velocity or `x`, the clean sample;
            loss and samplers then take its velocity, with 1 - t at least 0.05 (JiT, Li & He 2025,
            arXiv 2511.13720: for large patches of pixels; FID 1.82).
        time_scale: For the flow: multiplies t in [0, 1] before the embedding (published: 1).
        time_sampling: For the flow: how training draws t.
        time_mean: Of the logit-normal.
        time_std: Of the logit-normal.
        time_shift: For the flow: s of t' = t / (s - (s - 1) t), which moves times towards noise, in
            training and on the grid of euler and heun (SD3, Esser et al. 2024, equation 23, whose t
            is our 1 - t; there sqrt(tokens / tokens that times are tuned for)). 1: none.
        time_range: For the flow: the times that are trained, for a model of its own at high noise
            and at low (Wan 2.2, Wan et al. 2025). Sampling needs the other: `sample.pair`.
        loss_weight: For DDPM: of epsilon's squared error; `min_snr`: min(SNR, 5) / SNR (Hang et al.
            2023: 3.4 times as fast to the same FID as earlier weights).
    """

    process: Literal["flow", "ddpm"] = "flow"
    prediction: Literal["velocity", "x"] = "velocity"
    time_scale: float = 1.0
    time_sampling: Literal["uniform", "logit_normal"] = "uniform"
    time_mean: float = 0.0
    time_std: float = 1.0
    time_shift: float = 1.0
    time_range: tuple[float, float] = (0.0, 1.0)
    loss_weight: Literal["none", "min_snr"] = "none"


@dataclass(frozen=True)
class DataConfig:
    """Webdataset shards with an index.json.

    Attributes:
        shards: Folder, or tars by glob or braces, also as a pipe:, http(s), s3, gs or hf address.
        index: The index, where it does not lie beside the shards.
        flip: Mirror half of the samples.
        streams: Runs of samples that feed a batch; decides the order (null: by whether the shards
            are shuffled).
        window: Shards that a stream shuffles together; decides the order (null: as above).
        workers: Loader processes of a rank (0: a thread).
        prefetch: Steps read ahead.
        cache: Folder for copies of remote shards.
        cache_gib: The most that it holds on a node, GiB.
        on_bad_shard: A shard that cannot be read stops the run, or is left out on all ranks.
        bad_share: The most samples that may be left out so, as a share.
        validation: Held-out samples for `train.validate_every`: a folder of shards, or tars as
            above.
    """

    shards: str = ""
    index: str = ""
    flip: bool = False
    streams: int | None = None
    window: int | None = None
    workers: int = 0
    prefetch: int = 2
    cache: str = ""
    cache_gib: float = 64.0
    on_bad_shard: Literal["stop", "skip"] = "stop"
    bad_share: float = 0.01
    validation: str = ""


@dataclass(frozen=True)
class ParallelConfig:
    """How ranks share the work.

    Attributes:
        ep: Consecutive ranks that share one set of experts.
        recompute: Activations that backward computes again: none, all of a block, or all but what
            is dear or came over the network.
        exchange: Of rows in an expert-parallel group: `direct`, every rank with every other, or
            `two_level`, across hosts with the rank of the same place and inside the host with its
            others; `auto`: the latter where groups are spread over hosts with equally many (two or
            more) consecutive ranks of each on each.
        overlap: `halves`: in training each half of a micro-batch's samples computes while the other
            half's rows are on their way to experts or back. The same model.
    """

    ep: int = 1
    recompute: Literal["none", "block", "selective"] = "none"
    exchange: Literal["auto", "direct", "two_level"] = "auto"
    overlap: Literal["none", "halves"] = "none"


def attention_kept(depth: int) -> int:
    """In how many of ``depth`` blocks ``selective`` recompute keeps the attention's output as well:
    a tenth of a block's time for one width a token.  As many as leave the whole within 1.5 times
    what ``block`` keeps, which is one width for every block and 22 for the one that is being
    computed again (measured: docs/results).
    """
    return max(0, min(depth, 12 - depth // 2))


@dataclass(frozen=True)
class ScoreConfig:
    """Scores while training (`train.score_every`), of images as the sample section makes them.

    Attributes:
        reference: What they are compared with, as the subcommand evaluate takes it.
        extractor: The feature network, as the subcommand evaluate takes it.
        vae: Decodes latents.
        count: Images.
    """

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
