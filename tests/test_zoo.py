"""The zoo: every configuration loads and fits its ranks, and counts equal both the published table
and the model.
"""

from __future__ import annotations

import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffmoe.commands.train import main as train
from diffmoe.compare.plan import read_plan
from diffmoe.config import ModelConfig, MoEConfig, ParallelConfig, load_config, swiglu_hidden
from diffmoe.cost.hardware import choose, read_table
from diffmoe.cost.layouts import Cluster, Pins, candidates
from diffmoe.deepspeed_json import merge_deepspeed, read_deepspeed
from diffmoe.environment import RankEnvironment
from diffmoe.layout import resolve_layout
from diffmoe.models.count import Counts, count
from diffmoe.models.dit import DiT
from diffmoe.moe.experts import Experts
from diffmoe.moe.routing import RoutingRule
from diffmoe.strict_yaml import read_yaml

ROOT = Path(__file__).parents[1]
ZOO = sorted((ROOT / "configs").glob("*.yaml"))
EVERY_YAML = sorted((ROOT / "configs").rglob("*.yaml"))
DEEPSPEED = sorted((ROOT / "ds_configs").glob("*.json"))
IMAGENET = sorted(
    path
    for path in ZOO
    if re.fullmatch(r"(dense|diffmoe|tc|ec)_(s|b|l|xl)(_e\d+)?_flow", path.stem)
)

# model, experts (0: dense): parameters in millions, activated at capacity 1, forward GMACs; None:
# not in the table. Decimals as published.
TABLE = [
    ("s", 0, "32.96", None, "6.06"),
    ("s", 8, "83.5", "33.9", None),
    ("s", 16, "140.3", "33.9", "6.30"),
    ("b", 0, "130.5", None, "23.01"),
    ("b", 8, "332.5", "134.1", None),
    ("b", 16, "559.2", "134.2", "23.95"),
    ("l", 0, "458.1", None, "80.70"),
    ("l", 2, "571.5", None, None),
    ("l", 4, "773.0", None, None),
    ("l", 8, "1176.0", "470.9", None),
    ("l", 16, "1982.0", "471.1", "84.02"),
    ("xl", 0, "675.1", None, "118.62"),
    ("xl", 8, "1735.0", "694.0", None),
    ("xl", 16, "2925.0", "694.2", "123.51"),
]


def stem(path: Path) -> str:
    return path.relative_to(path.parents[1]).with_suffix("").as_posix()


def like(printed: str, value: float) -> str:
    return f"{value:.{len(printed.partition('.')[2])}f}"


@pytest.mark.parametrize("size, number, total, activated, gmacs", TABLE)
def test_published_table(
    size: str, number: int, total: str, activated: str | None, gmacs: str | None
) -> None:
    name = f"diffmoe_{size}_e{number}" if number else f"dense_{size}"
    config = load_config(ROOT / "configs" / f"{name}_flow.yaml")
    assert number in (0, config.moe.experts)
    counts = count(config.model, config.moe, capacity=1.0)
    assert like(total, (counts.total + counts.positions) / 1e6) == total
    if activated:
        assert like(activated, (counts.activated + counts.positions) / 1e6) == activated
    if gmacs:
        assert like(gmacs, counts.forward_macs / 1e9) == gmacs


def meta_counts(model: ModelConfig, moe: MoEConfig) -> Counts:
    """Totals of the real model, and activated parameters of one in which every mixture has one
    expert.
    """
    with torch.device("meta"):
        dit = DiT(model, moe)
    total = sum(p.numel() for p in dit.parameters())
    routed = sum(p.numel() for m in dit.modules() if isinstance(m, Experts) for p in m.parameters())
    return Counts(total, routed, total - routed + routed // moe.experts, dit.pos_embed.numel(), 0)


@pytest.mark.parametrize("path", IMAGENET, ids=stem)
def test_zoo_counts_equal_the_model(path: Path) -> None:
    config = load_config(path)
    assert replace(count(config.model, config.moe), forward_macs=0) == meta_counts(
        config.model, config.moe
    )


SMALL = ModelConfig(width=48, depth=5, heads=3, classes=10, input_size=8)


@pytest.mark.parametrize(
    "model, moe",
    [
        ({"family": "dense"}, {}),
        ({"family": "dense", "qk_norm": True, "learn_sigma": False}, {}),
        ({"family": "tc"}, {"experts": 3}),
        ({"family": "ec"}, {"experts": 5, "pool": 1, "interleave": False}),
        ({"family": "diffmoe"}, {"experts": 6}),
        ({"family": "diffmoe", "qk_norm": True}, {"experts": 4, "activation": "swiglu"}),
        ({"family": "diffmoe", "norm": "rms", "qk_norm": True}, {"activation": "swiglu"}),
        ({"family": "tc", "norm": "rms", "activation": "swiglu"}, {"shared_experts": 1}),
        ({"family": "dense", "positions": "rope", "activation": "swiglu"}, {}),
        ({"family": "tc", "activation": "swiglu_bias"}, {"shared_experts": 1}),
        ({"family": "diffmoe", "mlp_ratio": 2.5}, {"shared_experts": 2, "interleave": False}),
        (
            {"family": "tc", "patch": 4, "channels": 3},
            {"activation": "swiglu", "shared_experts": 1},
        ),
    ],
)
def test_counts_equal_the_model(model: dict, moe: dict) -> None:
    model, moe = replace(SMALL, **model), MoEConfig(**moe)
    assert replace(count(model, moe), forward_macs=0) == meta_counts(model, moe)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("family", ["dense", "diffmoe"])
def test_macs_equal_half_of_torchs_flops(family: str, activation: str) -> None:
    """Every expert takes every token; attention spelled out, because torch does not count the CPU's
    fused kernel.
    """
    model, moe = (
        replace(SMALL, family=family, activation=activation, positions="rope"),
        MoEConfig(experts=4, activation="swiglu", shared_experts=1),
    )
    dit = DiT(model, moe, pool=2)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        dit(
            torch.zeros(2, 4, 8, 8),
            torch.zeros(2),
            torch.zeros(2, dtype=torch.long),
            RoutingRule(capacity=4.0),
        )
    assert counter.get_total_flops() == 2 * 2 * count(model, moe, capacity=4.0).forward_macs


def test_capacity_scales_experts_only() -> None:
    moe = MoEConfig(experts=8)
    one, half, all_of_them = (count(SMALL, moe, capacity=c) for c in (1.0, 0.5, 8.0))
    assert all_of_them.activated == all_of_them.total
    assert one.activated - half.activated == one.experts // 8 // 2
    weights = 2 * 2 * SMALL.width * SMALL.hidden  # of one expert in each of 2 mixtures
    assert all_of_them.forward_macs - one.forward_macs == 7 * SMALL.tokens * weights
    assert count(replace(SMALL, family="tc"), MoEConfig(top_k=2, capacity=5.0)) == count(
        replace(SMALL, family="tc"), MoEConfig(), capacity=2
    )


def test_swiglu_experts_have_the_parameters_of_gelu_experts() -> None:
    assert all(2 * h <= 3 * swiglu_hidden(h) < 2 * h + 24 for h in range(1, 600))


def test_counting_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import diffmoe.models.count"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_zoo_is_complete() -> None:
    names = {path.stem for path in ZOO}
    assert {f"dense_{s}_flow" for s in "s b l xl".split()} <= names
    assert {f"diffmoe_{s}_e{e}_flow" for s in "s b l xl".split() for e in (8, 16)} <= names
    assert {"diffmoe_l_e2_flow", "diffmoe_l_e4_flow", "tc_l_e16_flow", "ec_l_e16_flow"} <= names
    assert {path.name for path in DEEPSPEED} >= {
        "zero0_fp32.json",
        "zero1_fp32.json",
        "zero1_bf16.json",
        "zero1_bf16_hybrid.json",
        "zero2_bf16.json",
        "zero3_bf16.json",
    }


LONGER = [
    ("diffmoe_l_e8_flow", 3000),
    ("diffmoe_l_e16_flow", 3000),
    ("diffmoe_xl_e16_flow", 3000),
    ("dense_xl_flow", 3000),
    *(
        (f"{model}_{process}", 7000)
        for model in ("diffmoe_l_e8", "dense_xl")
        for process in ("flow", "ddpm")
    ),
]


@pytest.mark.parametrize("name, thousands", LONGER)
def test_longer_rows_differ_in_length_only(name: str, thousands: int) -> None:
    short, long = (
        load_config(ROOT / "configs" / f"{file}.yaml") for file in (name, f"{name}_{thousands}k")
    )
    assert long.run.folder == f"runs/{name}_{thousands}k"
    assert replace(long, run=short.run, train=replace(long.train, steps=short.train.steps)) == short
    assert (short.train.steps, long.train.steps) == (700_000, 1000 * thousands)


@pytest.mark.parametrize("batch", [1024, 4096])
@pytest.mark.parametrize("name", ["diffmoe_l_e16_flow", "diffmoe_xl_e16_flow"])
def test_larger_batches_are_the_same_recipe_by_rule(name: str, batch: int) -> None:
    """As many samples; the rate by the square root; warm-up and half-life as long in samples."""
    before = load_config(ROOT / "configs" / f"{name}.yaml")
    after = load_config(ROOT / "configs" / f"{name}_b{batch}.yaml")
    assert replace(after, run=before.run, train=before.train) == before
    old, new, k = before.train, after.train, batch / 256
    assert new.batch * new.steps == pytest.approx(old.batch * old.steps) and new.lr == old.lr
    last = new.warmup // k
    assert new.lr_at(new.steps - 1) == pytest.approx(old.lr * k**0.5) == new.lr_at(round(last))
    assert new.lr_at(round(last) // 2 - 1) == pytest.approx(new.lr_at(new.steps - 1) / 2, rel=0.01)
    half = [math.log(0.5, t.ema_decays[0] ** t.growth) * t.batch for t in (old, new)]
    assert half[0] == pytest.approx(half[1]) and after.run.folder == f"runs/{name}_b{batch}"


def test_the_shipped_128_has_the_pool_of_one_of_its_four_gpus() -> None:
    config = load_config(ROOT / "configs" / "diffmoe_s_e16_flow_128.yaml")
    assert (config.train.batch, config.moe.pool, config.model.heads, config.model.tokens) == (
        512,
        512 // 4,
        16,
        64,
    )


@pytest.mark.parametrize("name", ["diffmoe_l_e16_flow", "diffmoe_xl_e16_flow"])
def test_512_is_the_published_recipe_on_four_times_the_tokens_and_fits_a_node(name: str) -> None:
    small, large = (load_config(ROOT / "configs" / f"{name}{end}.yaml") for end in ("", "_512"))
    assert large.model == replace(small.model, input_size=64) and large.model.tokens == 1024
    assert replace(large, model=small.model, run=small.run, data=small.data) == small
    assert large.data == replace(small.data, shards="data/imagenet512_latents")
    assert large.run.folder == f"runs/{name}_512"
    few, many = (count(config.model, config.moe) for config in (small, large))
    assert replace(many, positions=few.positions, forward_macs=few.forward_macs) == few
    attention = 2 * small.model.depth * small.model.width  # MACs of a pair of tokens
    once = 256**2 * attention
    tokens = few.forward_macs - once  # all else is of a token, but for what is of a sample
    assert many.forward_macs == pytest.approx(4 * tokens + 16 * once, rel=1e-2)
    cluster = Cluster(1, 8, choose(read_table(None), "h100"))
    found = candidates(large, read_deepspeed("ds_configs/zero1_bf16.json"), cluster, Pins(ep=8))
    assert found[0].fits and found[0].layout.pool == 64


def test_the_modern_block_differs_in_nothing_else() -> None:
    """As many parameters as the published row to within what RMSNorm's weights add."""
    name = "diffmoe_s_e16_flow"
    before, after = (load_config(ROOT / "configs" / f"{name}{end}.yaml") for end in ("", "_modern"))
    assert after.moe == replace(before.moe, activation="swiglu")
    assert replace(after, model=before.model, moe=before.moe, run=before.run) == before
    changed = {k for k, v in vars(after.model).items() if vars(before.model)[k] != v}
    assert changed == {"positions", "norm", "qk_norm", "activation"}
    old, new = (count(config.model, config.moe) for config in (before, after))
    assert new.total == pytest.approx(old.total, rel=2e-3)
    assert new.forward_macs == pytest.approx(old.forward_macs, rel=2e-3)


def test_lightningdit_has_the_parameters_of_its_published_log() -> None:
    config = load_config(ROOT / "configs" / "lightningdit_xl.yaml")
    counts = count(config.model, config.moe)
    assert like("675.26", (counts.total + counts.positions) / 1e6) == "675.26"


@pytest.mark.parametrize("path", ZOO, ids=stem)
def test_the_published_precision_and_router_start(path: Path) -> None:
    config = load_config(path)
    assert config.run.fp32_precision == (
        "ieee" if path.stem in ("demo", "fashion", "fashion14") else "tf32"
    )
    assert config.moe.router_start == ("uniform" if config.model.family == "tc" else "normal")


@pytest.mark.parametrize("path", EVERY_YAML, ids=stem)
def test_every_yaml_loads(path: Path) -> None:
    if path.parent.name == "compare":
        assert read_plan(str(path), []).runs
    else:
        load_config(path)


@pytest.mark.parametrize("path", ZOO, ids=stem)
def test_every_config_fits_its_ranks(path: Path) -> None:
    config = load_config(path)
    assert resolve_layout(replace(config, parallel=ParallelConfig(ep=1)), 1).pool_ranks == 1
    for ranks in {config.parallel.ep, *((8, 32) if path in IMAGENET else ())}:
        layout = resolve_layout(config, ranks)
        assert layout.micro_batch * ranks * layout.accumulation == config.train.batch


@pytest.mark.parametrize("path", IMAGENET, ids=stem)
def test_imagenet_configs_share_one_recipe(path: Path) -> None:
    config = load_config(path)
    reference = load_config(ROOT / "configs" / "base" / "imagenet256_flow.yaml")
    assert (config.train, config.data, config.diffusion, config.sample) == (
        reference.train,
        reference.data,
        reference.diffusion,
        reference.sample,
    )
    assert config.run.folder == f"runs/{path.stem}"
    assert path.stem.startswith(config.model.family)
    family, pool = config.model.family, resolve_layout(config, 32).pool
    assert pool == {"dense": 1, "ec": 1}.get(family, 64)
    assert config.train.micro_batch is None


@pytest.mark.parametrize("path", IMAGENET, ids=stem)
def test_every_flow_config_has_its_ddpm_twin(path: Path) -> None:
    twin = path.with_stem(path.stem.replace("_flow", "_ddpm"))
    flow, ddpm = load_config(path), load_config(twin)
    assert (ddpm.diffusion.process, ddpm.sample.sampler, ddpm.sample.steps) == (
        "ddpm",
        "ancestral",
        250,
    )
    assert (ddpm.model, ddpm.moe, ddpm.train, ddpm.data, ddpm.parallel) == (
        flow.model,
        flow.moe,
        flow.train,
        flow.data,
        flow.parallel,
    )
    assert ddpm.run.folder == f"runs/{twin.stem}"


@pytest.mark.parametrize("process", ["flow", "ddpm"])
@pytest.mark.parametrize("size, number, total, activated, gmacs", TABLE)
def test_dry_run_prints_the_published_numbers(
    size, number, total, activated, gmacs, process, capsys
) -> None:
    name = f"diffmoe_{size}_e{number}" if number else f"dense_{size}"
    environment = RankEnvironment(0, 1, 0, 1, "single")
    assert (
        train(
            [
                "--config",
                str(ROOT / "configs" / f"{name}_{process}.yaml"),
                "--dry-run",
                "--ranks",
                "8",
            ],
            environment,
        )
        == 0
    )
    printed = re.search(
        r"([\d.]+) M parameters \(([\d.]+) M activated\), ([\d.]+) GMACs", capsys.readouterr().out
    )
    assert like(total, float(printed[1])) == total
    assert activated is None or like(activated, float(printed[2])) == activated
    assert gmacs is None or printed[3] == gmacs


def test_leaves_stay_short() -> None:
    for path in IMAGENET:
        assert set(read_yaml(path)) <= {
            "run",
            "model",
            "moe",
            "diffusion",
            "data",
            "train",
            "sample",
            "parallel",
        }
        assert len(path.read_text().splitlines()) < 16


@pytest.mark.parametrize("path", DEEPSPEED, ids=lambda path: path.name)
def test_deepspeed_files_merge(path: Path) -> None:
    tree = read_deepspeed(path)
    config = load_config(ROOT / "configs" / "diffmoe_l_e16_flow.yaml")
    merged = merge_deepspeed(tree, config, resolve_layout(config, 16))
    assert {key: merged[key] for key in tree} == tree
    assert merged["train_batch_size"] == 256
    stage, dtype, hybrid = re.fullmatch(r"zero(\d)_(fp32|bf16)(_hybrid)?", path.stem).groups()
    zero = tree["zero_optimization"]
    assert zero["stage"] == int(stage)
    assert zero.get("mics_shard_size") == (8 if hybrid else None)
    assert tree.get("bf16", {"enabled": False})["enabled"] == (dtype == "bf16")
    if dtype == "bf16":
        assert tree["data_types"] == {"grad_accum_dtype": "fp32"}
    if zero["stage"] > 0:  # expert parallelism at stages 1 and 2
        assert zero["reduce_scatter"] and zero["contiguous_gradients"]
