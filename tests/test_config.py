"""The configuration: strict reading, batch arithmetic, pools, schedules, and the DeepSpeed JSON
beside it.
"""

import json
import math
import subprocess
import sys

import pytest

from diffmoe.config import Config, config_from_tree, config_to_tree, load_config
from diffmoe.deepspeed_json import merge_deepspeed, read_deepspeed
from diffmoe.errors import UserError
from diffmoe.layout import resolve_layout
from diffmoe.strict_yaml import read_yaml
from programs import REPOSITORY


@pytest.fixture
def write(tmp_path):
    def write_file(name: str, text: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return str(path)

    return write_file


def refused(call, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def overridden(*overrides: str) -> Config:
    return load_config(None, list(overrides))


# --------------------------------------------------------------------------------------------------
# reading


def test_a_tree_survives_yaml_and_back(write):
    config = overridden(
        "train.lr=3e-4", "moe.pool=group", "train.betas=[0.8, 0.95]", "sample.gamma=0.25"
    )
    assert config_from_tree(config_to_tree(config)) == config
    assert config.train.betas == (0.8, 0.95)


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_published_config_is_good(path):
    load_config(path)


def test_config_py_needs_no_torch():
    code = (
        "import sys, diffmoe.commands.train; "
        "sys.exit('torch' in sys.modules or 'deepspeed' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, timeout=60).returncode == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {widht: 3}", "unknown key model.widht (value 3); did you mean model.width?"),
        ("modle: {width: 3}", "unknown key modle (value {'width': 3}); did you mean model?"),
        (
            "zzz: 1",
            "unknown key zzz (value 1); known: run, model, moe, diffusion, data, train, parallel, "
            "sample, score",
        ),
        ("model: 3", "model must be a mapping, not 3"),
        ("model:", "model must be a mapping, not None"),
        ("model: {width: 3.5}", "model.width = 3.5 must be an integer"),
        ("model: {width: '64'}", "model.width = '64' must be an integer"),
        ("model: {width: true}", "model.width = True must be an integer"),
        ("model: {width: }", "model.width = None must be an integer"),
        ("model: {learn_sigma: 1}", "model.learn_sigma = 1 must be true or false"),
        (
            "model: {family: moe}",
            "model.family = 'moe' must be one of dense, tc, ec, diffmoe, race, prototype",
        ),
        ("run: {folder: 2024}", "run.folder = 2024 must be a text"),
        ("train: {lr: fast}", "train.lr = 'fast' must be a finite number"),
        ("train: {lr: .inf}", "train.lr = inf must be a finite number"),
        ("train: {lr: .nan}", "train.lr = nan must be a finite number"),
        ("train: {lr: true}", "train.lr = True must be a finite number"),
        ("train: {lr: [1]}", "train.lr = [1] must be a finite number"),
        ("train: {betas: [0.9]}", "train.betas = [0.9] must be 2 numbers"),
        ("train: {betas: [0.9, x]}", "train.betas[1] = 'x' must be a finite number"),
        ("train: {micro_batch: 1.5}", "train.micro_batch = 1.5 must be an integer or null"),
        ("moe: {pool: all}", "moe.pool = 'all' must be an integer or one of rank, group, global"),
        ("moe: {pool: 2.0}", "moe.pool = 2.0 must be an integer or one of rank, group, global"),
    ],
)
def test_wrong_keys_and_types_are_named(write, text, message):
    assert refused(load_config, write("c.yaml", text)) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b", "must hold a mapping, not list"),
        ("[]", "must hold a mapping, not list"),
        ("just words", "must hold a mapping, not str"),
        ("false", "must hold a mapping, not bool"),
        ("a: [1", "is not valid YAML: "),
        (
            "a: !!python/object/apply:os.getcwd []",
            "is not valid YAML: could not determine a constructor",
        ),
        (
            "model: {width: 32}\nrun: {seed: 1}\nmodel: {width: 64}",
            "key 'model' stands twice, on lines 1 and 3",
        ),
        ("model:\n  width: 32\n  width: 32", "key 'width' stands twice, on lines 2 and 3"),
        ("? [1, 2]\n: 3", "key [1, 2] on line 1 must be a text"),
        ("1: 2", "key 1 on line 1 must be a text"),
        ("include: 3", "include (3) must be a file name or a list of them"),
        (
            "include: [a.yaml, 3]",
            "include (['a.yaml', 3]) must be a file name or a list of them",
        ),
        ("run: {folder: 2026-31-12}", "is not valid YAML: month must be in 1..12"),
        ("a: !!int x", "is not valid YAML: invalid literal"),
        ("a: !!bool maybe", "is not valid YAML: 'maybe'"),
        ("a: !!timestamp x", "is not valid YAML: "),
        ("[" * 3000, "is not valid YAML: maximum recursion depth exceeded"),
        ("include:", "include (None) must be a file name or a list of them"),
    ],
)
def test_a_bad_file_is_named_with_the_place(write, text, message):
    path = write("bad.yaml", text)
    said = refused(load_config, path)
    assert message in said and path in said


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"model: \xff\xfe\x00")
    assert f"{tmp_path}/c.yaml is not valid YAML" in refused(load_config, tmp_path / "c.yaml")


def test_an_empty_file_is_the_defaults(write):
    assert load_config(write("c.yaml", "# nothing\n")) == Config() == load_config(None)


def test_text_that_means_a_number_is_one(write):
    """YAML 1.1 reads 1e-4 (no point) as a text."""
    assert load_config(write("c.yaml", "train: {lr: 1e-4, eps: 1E-6}")).train.lr == 1e-4
    assert overridden("train.lr=1e-4").train.lr == 1e-4
    assert overridden("train.lr=1").train.lr == 1.0 and isinstance(
        overridden("train.lr=1").train.lr, float
    )


def test_includes_are_relative_later_wins_and_the_file_itself_last(write):
    write("base/a.yaml", "model: {width: 4, depth: 2, heads: 1}\nrun: {seed: 1}")
    write("base/b.yaml", "include: a.yaml\nmodel: {depth: 3}")
    write("c.yaml", "model: {heads: 2, depth: 5}\nrun: {seed: 9}")
    tree = read_yaml(write("top.yaml", "include: [base/b.yaml, c.yaml]\nrun: {seed: 7}"))
    assert tree == {"model": {"width": 4, "depth": 5, "heads": 2}, "run": {"seed": 7}}
    other = read_yaml(write("other.yaml", "include: [c.yaml, base/b.yaml]"))
    assert other == {"model": {"width": 4, "depth": 3, "heads": 1}, "run": {"seed": 1}}


def test_a_circle_of_includes_is_shown(write):
    write("a.yaml", "include: b.yaml")
    write("b.yaml", "include: c.yaml")
    assert refused(read_yaml, write("c.yaml", "include: a.yaml")) == (
        "include goes in a circle: c.yaml -> a.yaml -> b.yaml -> c.yaml"
    )


def test_a_missing_include_names_who_wants_it(write, tmp_path):
    path = write("a.yaml", "include: gone.yaml")
    assert (
        refused(read_yaml, path)
        == f"config file {tmp_path}/gone.yaml does not exist (included from {path})"
    )
    assert (
        refused(load_config, tmp_path / "none.yaml")
        == f"config file {tmp_path}/none.yaml does not exist"
    )


def test_overrides_come_last_and_in_order(write):
    path = write("c.yaml", "train: {steps: 5, lr: 1.0e-3}")
    config = load_config(
        path, ["train.steps=6", "train.steps=7", "model={width: 64, heads: 4}", "data.shards=a=b"]
    )
    assert (config.train.steps, config.train.lr, config.model.width, config.data.shards) == (
        7,
        1e-3,
        64,
        "a=b",
    )
    assert overridden("train.micro_batch=").train.micro_batch is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps", "override 'train.steps' must look like section.field=value"),
        ("=3", "override '=3' must look like section.field=value"),
        ("train.=3", "override 'train.=3' must look like section.field=value"),
        (".steps=3", "override '.steps=3' must look like section.field=value"),
        ("train.betas=[1", "override 'train.betas=[1': '[1' is not a YAML value"),
        ("steps=3", "unknown key steps (value 3); known: "),
        ("train.step=3", "unknown key train.step (value 3); did you mean train.steps?"),
        ("train.steps.more=3", "train.steps = {'more': 3} must be an integer"),
        ("train=3", "train must be a mapping, not 3"),
        (
            "train={steps: 1, steps: 2}",
            "override 'train={steps: 1, steps: 2}': key 'steps' stands twice, on lines 1 and 1",
        ),
    ],
)
def test_bad_overrides(override, message):
    assert refused(overridden, override).startswith(message)


# -------------------------------------------------------------------------------------------------
# validation


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["moe.experts=12", "parallel.ep=8"],
            "moe.experts (12) must be divisible by parallel.ep (8)",
        ),
        (
            ["model.input_size=9", "model.patch=2"],
            "model.input_size (9) must be divisible by model.patch (2)",
        ),
        (
            ["model.width=32", "model.heads=5"],
            "model.width (32) must be divisible by model.heads (5)",
        ),
        (
            ["model.width=30", "model.heads=5"],
            "model.width (30) must be divisible by 4 for the 2-d sine position embedding",
        ),
        (
            ["model.width=36", "model.heads=6", "model.positions=rope"],
            "model.positions (rope) needs heads whose width (model.width / model.heads: 6) is "
            "divisible by 4",
        ),
        (["model.position_scale=0"], "model.position_scale (0.0) must be above 0"),
        (
            ["model.mlp_ratio=0.001"],
            "model.mlp_ratio (0.001) x model.width (384) must be at least 1",
        ),
        (["model.mlp_ratio=-1"], "model.mlp_ratio (-1.0) x model.width (384) must be at least 1"),
        (["model.depth=-2"], "model.depth (-2) must be at least 1"),
        (["model.classes=0"], "model.classes (0) must be at least 1"),
        (["model.depth=1"], "model.depth (1) leaves no MoE block with moe.interleave (true)"),
        (
            ["model.family=dense", "parallel.ep=2"],
            "parallel.ep (2) must be 1 for model.family (dense): it has no experts",
        ),
        (
            ["model.family=ec", "moe.pool=4"],
            "moe.pool (4) must be 1 for model.family (ec): its experts choose inside each sample",
        ),
        (["moe.capacity=9"], "moe.capacity (9.0) must be above 0 and at most moe.experts (8)"),
        (["moe.capacity=0"], "moe.capacity (0.0) must be above 0 and at most moe.experts (8)"),
        (["moe.top_k=9"], "moe.top_k (9) must be from 1 to moe.experts (8)"),
        (["moe.pool=0"], "moe.pool (0) must be at least 1 sample"),
        (["moe.capacity_hold=5"], "moe.capacity_hold (5) must be from 0 to moe.capacity_until (0)"),
        (["moe.threshold_decay=1"], "moe.threshold_decay (1.0) must be in [0, 1)"),
        (["moe.predictor_weight=-1"], "moe.predictor_weight (-1.0) must be at least 0"),
        (["moe.balance_weight=-1"], "moe.balance_weight (-1.0) must be at least 0"),
        (["parallel.ep=0"], "parallel.ep (0) must be at least 1"),
        (["run.seed=-1"], "run.seed (-1) must be in [0, 2^64)"),
        (["train.batch=0"], "train.batch (0) must be at least 1"),
        (["train.micro_batch=-4"], "train.micro_batch (-4) must be at least 1"),
        (["train.steps=-1"], "train.steps (-1) must be at least 0"),
        (["train.lr=-1e-4"], "train.lr (-0.0001) must be at least 0"),
        (["train.eps=-1"], "train.eps (-1.0) must be at least 0"),
        (["train.keep=0"], "train.keep (0) must be at least 1"),
        (["train.dispersive_weight=-1"], "train.dispersive_weight (-1.0) must be at least 0"),
        (["train.repa_weight=-1"], "train.repa_weight (-1.0) must be at least 0"),
        (["train.repa_block=0"], "train.repa_block (0) must be at least 1"),
        (["train.repa_block=13"], "train.repa_block (13) must be at most model.depth (12)"),
        (
            ["train.repa_weight=0.5", "data.flip=true"],
            "data.flip (true) must be false with train.repa_weight (0.5): features are of "
            "unflipped images",
        ),
        (
            ["train.direction_weight=1", "model.channels=1"],
            "train.direction_weight (1.0) must be 0 with model.channels (1): one number has a "
            "sign, and no other direction",
        ),
        (
            ["train.direction_weight=1", "diffusion.process=ddpm", "sample.sampler=ddim"],
            "train.direction_weight (1.0) must be 0 for diffusion.process (ddpm), which predicts "
            "no velocity",
        ),
        *(
            (
                [f"diffusion.time_range={list(times)}"],
                f"diffusion.time_range ({times}) must be two times, the lower first, that begin "
                "at 0 or end at 1: two models cover all",
            )
            for times in ((0.5, 0.5), (0.2, 0.8), (-1.0, 1.0), (0.0, 1.5))
        ),
        (["diffusion.time_shift=0"], "diffusion.time_shift (0.0) must be above 0"),
        (
            ["diffusion.time_shift=3", "diffusion.process=ddpm", "sample.sampler=ddim"],
            "diffusion.time_shift (3.0) must be 1 for diffusion.process (ddpm)",
        ),
        (
            ["diffusion.loss_weight=min_snr"],
            "diffusion.loss_weight (min_snr) must be none for diffusion.process (flow): it is "
            "defined for the prediction of noise",
        ),
        (["train.betas=[0.9, 1]"], "train.betas ((0.9, 1.0)) must each be in [0, 1)"),
        (["train.label_drop=1.5"], "train.label_drop (1.5) must be in [0, 1]"),
        (["train.ema=1"], "train.ema (1.0) must be in [0, 1)"),
        (["train.ema=[0.9, 1]"], "train.ema ((0.9, 1.0)) must be in [0, 1)"),
        (["train.ema=[0.9, 0.90]"], "train.ema ((0.9, 0.9)) must not name a decay twice"),
        (["train.ema=[]"], "train.ema ([]) must have at least one decay"),
        (["train.ema=[a]"], "train.ema = ['a'] must be a finite number or a list of numbers"),
        (
            ["train.ema_lengths=[0.05, 0.3]"],
            "train.ema_lengths ((0.05, 0.3)) must be in 0.001..0.28",
        ),
        (
            ["train.ema_lengths=[0.1, 0.10]"],
            "train.ema_lengths ((0.1, 0.1)) must not name a length twice",
        ),
        (
            ["train.ema_snapshot_every=8"],
            "train.ema_snapshot_every (8) must be 0 without train.ema_lengths",
        ),
        (["train.ema_snapshot_every=-1"], "train.ema_snapshot_every (-1) must be at least 0"),
        (["train.keep_every=-1"], "train.keep_every (-1) must be at least 0"),
        (["data.window=0"], "data.window (0) must be at least 1"),
        (["data.prefetch=0"], "data.prefetch (0) must be at least 1"),
        (["sample.steps=0"], "sample.steps (0) must be at least 1"),
        (["sample.gamma=2"], "sample.gamma (2.0) must be in [0, 1]"),
        (
            ["sample.routing=static", "model.family=dense"],
            "sample.routing (static) needs model.family diffmoe or race, not dense",
        ),
        (
            ["sample.routing=static", "model.family=tc"],
            "sample.routing (static) needs model.family diffmoe or race, not tc",
        ),
        (
            ["sample.routing=static", "model.family=ec", "moe.pool=1"],
            "sample.routing (static) needs model.family diffmoe or race, not ec, whose experts "
            "take as many tokens always",
        ),
        (
            ["sample.routing=static", "sample.gamma=0.4"],
            "sample.gamma (0.4) must be null for sample.routing (static), which has no thresholds "
            "and takes moe.capacity (1.0)",
        ),
        (
            ["sample.routing=static", "sample.capacity=0.7"],
            "sample.capacity (0.7) must be null for sample.routing (static), which has no "
            "thresholds and takes moe.capacity (1.0)",
        ),
        (["run.fp32_precision=bf16"], "run.fp32_precision = 'bf16' must be one of ieee, tf32"),
        (["moe.router_start=xavier"], "moe.router_start = 'xavier' must be one of normal, uniform"),
        (["run.timeout_s=1e23"], "run.timeout_s (1e+23) must be from 0 to 1e7 seconds"),
        (["run.folder=''"], "run.folder ('') must name a folder"),
        (["run.straggler_factor=0.9"], "run.straggler_factor (0.9) must be above 1, or 0"),
        (["run.straggler_steps=0"], "run.straggler_steps (0) must be at least 1"),
        (
            ["run.straggler_factor=0", "run.on_straggler=requeue"],
            "run.on_straggler (requeue) needs run.straggler_factor (0.0) above 1",
        ),
    ],
)
def test_values_out_of_range_are_named_with_what_bounds_them(overrides, message):
    assert refused(overridden, *overrides) == message


# ----------------------------------------------------------------------------------------- batch
# and pool


def layout(ranks: int, *overrides: str):
    return resolve_layout(overridden("train.batch=48", "moe.pool=1", *overrides), ranks)


@pytest.mark.parametrize(
    ("given", "micro", "accumulation"),
    [
        ([], 12, 1),
        (["train.micro_batch=12"], 12, 1),
        (["train.micro_batch=3"], 3, 4),
        (["train.accumulation=4"], 3, 4),
        (["train.micro_batch=6", "train.accumulation=2"], 6, 2),
    ],
)
def test_what_is_not_given_follows_from_what_is(given, micro, accumulation):
    found = layout(4, *given)
    assert (found.batch, found.micro_batch, found.accumulation, found.ranks) == (
        48,
        micro,
        accumulation,
        4,
    )


@pytest.mark.parametrize(
    ("ranks", "given", "message"),
    [
        (5, [], "train.batch (48) must be divisible by ranks (5) x train.accumulation (1)"),
        (
            4,
            ["train.accumulation=5"],
            "train.batch (48) must be divisible by ranks (4) x train.accumulation (5)",
        ),
        (
            4,
            ["train.micro_batch=5"],
            "train.batch (48) must be divisible by train.micro_batch (5) x ranks (4)",
        ),
        (
            4,
            ["train.micro_batch=6", "train.accumulation=3"],
            "train.micro_batch (6) x ranks (4) x train.accumulation (3) = 72 must equal "
            "train.batch (48)",
        ),
        (96, [], "train.batch (48) must be divisible by ranks (96) x train.accumulation (1)"),
        (
            3,
            ["parallel.ep=2"],
            "world size (3) must be divisible by parallel.ep (2): start another number of ranks, "
            "or say "
            "parallel.ep=1",
        ),
        (
            1,
            ["parallel.ep=2"],
            "world size (1) must be divisible by parallel.ep (2): start another number of ranks, "
            "or say "
            "parallel.ep=1",
        ),
        (
            4,
            ["train.micro_batch=6", "moe.pool=5"],
            "moe.pool (5 samples) must divide the forward batch train.micro_batch (6) x ranks (4) "
            "= 24",
        ),
        (
            4,
            ["moe.pool=96"],
            "moe.pool (96 samples) must divide the forward batch train.micro_batch (12) x ranks "
            "(4) = 48",
        ),
        (
            1,
            ["moe.pool=1", "moe.capacity=0.001"],
            "moe.pool (1 samples = 256 tokens) gives each of moe.experts (8) less than one token "
            "at moe.capacity (0.001)",
        ),
    ],
)
def test_arithmetic_that_does_not_come_out_names_every_number(ranks, given, message):
    assert refused(layout, ranks, *given) == message


@pytest.mark.parametrize(
    ("micro", "ranks", "ep", "pool", "samples", "pool_ranks"),
    [
        (8, 1, 1, "global", 8, 1),
        (8, 4, 2, "rank", 8, 1),
        (8, 4, 2, "group", 16, 2),
        (8, 4, 2, "global", 32, 4),
        (8, 4, 4, "group", 32, 4),
        (8, 4, 1, "group", 8, 1),
        (8, 4, 1, "global", 32, 4),
        (8, 4, 2, 1, 1, 1),
        (8, 4, 2, 4, 4, 1),
        (8, 4, 2, 16, 16, 2),
        (8, 4, 1, 16, 16, 2),
        (8, 4, 4, 16, 16, 4),  # two pools in one expert-parallel group
        (3, 4, 1, 2, 2, 2),  # pools straddle ranks: 2 ranks hold 3 whole pools
        (3, 4, 2, 2, 2, 2),
        (3, 8, 4, 2, 2, 4),
        (3, 8, 2, 12, 12, 4),
        (2, 6, 2, 6, 6, 6),  # 3 ranks hold a pool, whole expert-parallel groups of 2 hold two
        (4, 6, 3, 8, 8, 6),
        (1, 8, 2, 8, 8, 8),
    ],
)
def test_pools_in_samples_and_the_ranks_that_hold_them(micro, ranks, ep, pool, samples, pool_ranks):
    config = overridden(
        f"train.batch={micro * ranks}", f"parallel.ep={ep}", f"moe.pool={pool}", "moe.experts=12"
    )
    found = resolve_layout(config, ranks)
    assert (found.pool, found.pool_ranks) == (samples, pool_ranks)
    assert found.pools == micro * ranks / samples
    assert (micro * found.pool_ranks) % found.pool == 0, "a pool group must hold whole pools"
    assert found.pool_ranks == 1 or found.pool_ranks % ep == 0, "and whole expert-parallel groups"
    assert ranks % found.pool_ranks == 0


def test_a_dense_model_has_no_pool():
    found = resolve_layout(overridden("model.family=dense", "train.batch=48", "moe.pool=7"), 4)
    assert (found.pool, found.pool_ranks) == (1, 1)


# --------------------------------------------------------------------------------------------------
# schedules


def test_capacity_holds_then_falls_in_a_line():
    moe = overridden(
        "moe.experts=8", "moe.capacity=2", "moe.capacity_hold=10", "moe.capacity_until=20"
    ).moe
    assert [moe.capacity_at(s) for s in (0, 9, 10, 15, 19, 20, 10**6)] == pytest.approx(
        [8, 8, 8, 5, 2.6, 2, 2]
    )
    assert overridden("moe.capacity=1.5").moe.capacity_at(0) == 1.5
    only_hold = overridden("moe.experts=8", "moe.capacity_hold=3", "moe.capacity_until=3").moe
    assert [only_hold.capacity_at(s) for s in (2, 3)] == [8, 1]


def test_learning_rate_warms_up_and_then_follows_the_schedule():
    def rates(schedule: str, *steps: int) -> list[float]:
        train = overridden(
            "train.lr=1", "train.warmup=4", "train.steps=12", f"train.schedule={schedule}"
        ).train
        return [train.lr_at(s) for s in steps]

    for schedule in ("constant", "cosine", "linear"):
        assert rates(schedule, 0, 1, 2, 3, 4) == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates("constant", 8, 12, 99) == [1, 1, 1]
    assert rates("linear", 6, 8, 12, 99) == pytest.approx([0.75, 0.5, 0, 0])
    assert rates("cosine", 6, 8, 12, 99) == pytest.approx(
        [0.5 * (1 + math.cos(math.pi / 4)), 0.5, 0, 0]
    )
    assert overridden("train.lr=1").train.lr_at(0) == 1


# ---------------------------------------------------------------------------------------------
# DeepSpeed JSON


def merged(tree: dict, *overrides: str) -> dict:
    config = overridden("train.batch=48", "train.micro_batch=6", "train.clip=0.5", *overrides)
    return merge_deepspeed(tree, config, resolve_layout(config, 4))


def test_deepspeed_gets_its_own_keys_and_the_yaml_s_numbers():
    zero = {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 1000}
    assert merged({"zero_optimization": zero, "bf16": None, "fp16": {"enabled": False}}) == {
        "zero_optimization": zero,
        "train_batch_size": 48,
        "train_micro_batch_size_per_gpu": 6,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},
        "communication_data_type": "fp32",
    }


BF16_AT_ZERO = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 0}}


def test_what_is_merged_is_what_runs():
    """Nothing is left for the engine to change, so the printed and the written file are the
    truth.
    """
    bf16 = merged(BF16_AT_ZERO)
    assert bf16["zero_optimization"] == {
        "stage": 1,
        "reduce_bucket_size": 5 * 10**7,
        "overlap_comm": True,
    }
    assert bf16["bf16"] == {
        "enabled": True,
        "immediate_grad_update": True,
        "check_grad_overflow": True,
    }
    assert merged({"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}})["bf16"] == {
        "enabled": True,
        "check_grad_overflow": True,
    }
    assert merged({"zero_optimization": None})["zero_optimization"] == {"stage": 0}
    assert merged({})["gradient_clipping"] == 0, (
        "at ZeRO 0 the engine clips, DeepSpeed must not, whose default is 1"
    )
    for tree in (BF16_AT_ZERO, {}, {"zero_optimization": {"stage": 2}, "train_batch_size": 48}):
        assert merged(merged(tree)) == merged(tree)


def test_what_expert_parallelism_and_bf16_need_is_not_turned_off():
    refusal = refused(merged, {"bf16": {"enabled": True, "immediate_grad_update": False}})
    assert refusal.startswith(
        "DeepSpeed's bf16.immediate_grad_update (false) must be true at ZeRO stage 1"
    )
    for key in ("reduce_scatter", "contiguous_gradients"):
        tree = {"zero_optimization": {"stage": 2, key: False}}
        assert merged(tree)["zero_optimization"][key] is False
        assert refused(merged, tree, "parallel.ep=2") == (
            f"DeepSpeed's zero_optimization.{key} (false) must be true with "
            "expert parallelism at ZeRO stage 2"
        )


def test_equal_values_and_auto_pass():
    same = {
        "train_batch_size": 48,
        "train_micro_batch_size_per_gpu": 6,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
    }
    assert merged(same) == merged({}) == merged({key: "auto" for key in same})


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (
            {"train_batch_size": 64},
            "DeepSpeed's train_batch_size (64) contradicts the YAML's train.batch (48); the YAML "
            "owns it",
        ),
        (
            {"train_micro_batch_size_per_gpu": 4},
            "DeepSpeed's train_micro_batch_size_per_gpu (4) contradicts the YAML's "
            "train.micro_batch (6); the YAML owns it",
        ),
        (
            {"gradient_accumulation_steps": 1},
            "DeepSpeed's gradient_accumulation_steps (1) contradicts the YAML's train.accumulation "
            "(2); the YAML owns it",
        ),
        (
            {"gradient_clipping": 1.0},
            "DeepSpeed's gradient_clipping (1.0) contradicts the YAML's train.clip (0.5); the YAML "
            "owns it",
        ),
        (
            {"optimizer": {"type": "Adam"}},
            "DeepSpeed's 'optimizer' block is not read: the YAML owns it as train.optimizer, "
            "train.lr, …",
        ),
        (
            {"scheduler": {}},
            "DeepSpeed's 'scheduler' block is not read: the YAML owns it as train.schedule, "
            "train.warmup",
        ),
        (
            {"fp16": {"enabled": True}},
            "DeepSpeed's fp16.enabled (true) is not supported: use bf16.enabled",
        ),
        ({"fp16": True}, "DeepSpeed's fp16 (True) must be an object"),
        ({"bf16": True}, "DeepSpeed's bf16 (True) must be an object"),
        ({"zero_optimization": 3}, "DeepSpeed's zero_optimization (3) must be an object"),
        (
            {"zero_optimization": {"stage": 4}},
            "DeepSpeed's zero_optimization.stage (4) must be 0, 1, 2 or 3",
        ),
        (
            {"zero_optimization": {"stage": "2"}},
            "DeepSpeed's zero_optimization.stage ('2') must be 0, 1, 2 or 3",
        ),
        (
            {"zero_optimization": {"stage": True}},
            "DeepSpeed's zero_optimization.stage (True) must be 0, 1, 2 or 3",
        ),
        (
            {"zero_optimization": {"offload_optimizer": 3}},
            "DeepSpeed's zero_optimization.offload_optimizer (3) must be an object",
        ),
        ({"bf16": {"enabled": "no"}}, "DeepSpeed's bf16.enabled ('no') must be true or false"),
        ({"steps_per_print": "often"}, "DeepSpeed's steps_per_print ('often') must be an integer"),
        (
            {"gradient_predivide_factor": True},
            "DeepSpeed's gradient_predivide_factor (True) must be a number",
        ),
        ({"comms_logger": 3}, "DeepSpeed's comms_logger (3) must be an object"),
        (
            {"zero_optimisation": {}},
            "unknown key zero_optimisation (value {}) in the DeepSpeed JSON; did you mean "
            "zero_optimization?",
        ),
        ({"xyz": 1}, "unknown key xyz (value 1) in the DeepSpeed JSON"),
    ],
)
def test_what_deepspeed_may_not_say(tree, message):
    assert refused(merged, tree) == message


def test_no_file_is_zero_1_in_fp32():
    assert read_deepspeed(None) == {"zero_optimization": {"stage": 1}}


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "ds_configs").glob("*.json")), ids=lambda p: p.stem
)
def test_every_published_json_is_good(path):
    tree = read_deepspeed(path)
    config = overridden("train.batch=48", "train.micro_batch=6")
    found = merge_deepspeed(tree, config, resolve_layout(config, 8))
    assert found["zero_optimization"]["stage"] == int(path.stem[4])
    assert tree == json.loads(path.read_text())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1,}', "is not valid JSON: "),
        ("", "is not valid JSON: "),
        ("[1]", "must hold an object, not list"),
        ("[" * 100_000, "is not valid JSON: maximum recursion depth exceeded"),
        (
            '{"zero_optimization": {"stage": 1, "stage": 2}}',
            "is not valid JSON: key 'stage' stands twice",
        ),
    ],
)
def test_a_bad_json_is_named(write, text, message):
    path = write("d.json", text)
    assert refused(read_deepspeed, path).startswith(f"--deepspeed_config {path} {message}")


def test_a_missing_json_is_named(tmp_path):
    assert (
        refused(read_deepspeed, tmp_path / "d.json")
        == f"--deepspeed_config {tmp_path}/d.json does not exist"
    )


@pytest.mark.parametrize(
    "words, message",
    [
        ("model.family=ec moe.pool=1 moe.balance=bias", "moe.balance (bias) must be loss"),
        ("moe.expert_groups=2", "moe.expert_groups (2) must be 1 for model.family (diffmoe)"),
        ("model.family=race moe.router_input=time_token", "moe.router_input (time_token) must be"),
        ("model.family=tc moe.target_weight=1", "moe.target_weight (1.0) must be 0.0 for"),
        ("model.family=tc moe.threshold_from=5", "moe.threshold_from (5) must be null for"),
        ("moe.threshold_from=0", "moe.threshold_from (0) must be at least 1"),
        ("moe.score=identity", "moe.score (identity) must be softmax or sigmoid for"),
        ("model.family=prototype moe.score=sigmoid", "moe.score (sigmoid) must be left alone for"),
        ("model.family=prototype moe.gates=normalized", "moe.gates (normalized) must be raw for"),
        (
            "model.family=race moe.score=identity moe.gates=normalized",
            "moe.gates (normalized) must be raw for model.family (race) with moe.score (identity)",
        ),
        ("model.family=tc moe.gates=normalized", "moe.gates (normalized) must be raw with"),
        ("moe.gate_scale=0", "moe.gate_scale (0.0) must be above 0"),
        ("moe.mlp_ratio=0", "moe.mlp_ratio (0.0) x model.width (384) must be at least 1"),
        ("model.family=prototype moe.experts=1", "moe.experts (1) must be at least 2 for"),
        ("model.family=prototype moe.top_k=8", "moe.top_k (8) must be at most moe.experts - 1 (7)"),
        ("model.family=tc moe.expert_groups=3", "moe.expert_groups (3) must be at least 1 and"),
        ("model.family=tc moe.expert_groups=4 moe.top_groups=5", "moe.top_groups (5) must be from"),
        (
            "model.family=tc moe.expert_groups=4 moe.top_k=3",
            "moe.top_k (3) must be at most the experts of moe.top_groups (1) groups: 2",
        ),
        (
            "model.family=race moe.score=identity sample.gamma=0.5",
            "sample.gamma (0.5) must be null for moe.score (identity)",
        ),
        ("model.family=race sample.capacity=1", "sample.capacity (1.0) needs model.family diffmoe"),
        ("model.family=tc moe.bias_rate=0.1", "moe.bias_rate (0.1) must be 0.001 without moe.bal"),
    ],
)
def test_what_a_router_has_not_is_refused(words, message):
    assert refused(load_config, None, words.split()).startswith(message)
