"""What only DeepSpeed's code on the ranks would refuse is refused at once, without DeepSpeed, in
one line that says what to write; and our table of keys is DeepSpeed's.
"""

import enum
import json
import typing

import annotated_types
import pydantic
import pytest

import diffmoe.__main__ as run
from diffmoe.config import load_config
from diffmoe.deepspeed_json import check_deepspeed, merge_deepspeed
from diffmoe.deepspeed_keys import ALIASES, MICS, OLD, PASSED, UNSUPPORTED, Number
from diffmoe.errors import UserError
from diffmoe.layout import resolve_layout
from launcher.__main__ import main as launcher_main
from programs import REPOSITORY, tiny_config

ZERO = "zero_optimization"


def stage(number: int, **more: object) -> dict:
    return {ZERO: {"stage": number, **more}}


# JSON, overrides of the YAML, message.
REFUSED = {
    # keys at any depth
    "zero": (
        stage(1, overlap_com=True),
        [],
        "unknown key zero_optimization.overlap_com (value True) in the DeepSpeed JSON; did you "
        "mean zero_optimization.overlap_comm?",
    ),
    "offload": (
        stage(1, offload_optimizer={"devise": "cpu"}),
        [],
        "unknown key zero_optimization.offload_optimizer.devise (value 'cpu') "
        "in the DeepSpeed JSON; did you mean zero_optimization.offload_optimizer.device?",
    ),
    "bf16": (
        {"bf16": {"enable": True}},
        [],
        "unknown key bf16.enable (value True) in the DeepSpeed JSON; did you mean bf16.enabled?",
    ),
    "data types": (
        {"data_types": {"grad_acum_dtype": "fp32"}},
        [],
        "did you mean data_types.grad_accum_dtype?",
    ),
    "aio": ({"aio": {"blocksize": 1}}, [], "did you mean aio.block_size?"),
    "comms logger": (
        {"comms_logger": {"xyz": 1}},
        [],
        "unknown key comms_logger.xyz (value 1) in the DeepSpeed JSON; known: enabled, "
        "prof_all, verbose, debug, prof_ops",
    ),
    "flops profiler": (
        {"flops_profiler": {"profile_steps": 3}},
        [],
        "did you mean flops_profiler.profile_step?",
    ),
    "timers": (
        {"timers": {"throughput": {"enable": False}}},
        [],
        "did you mean timers.throughput.enabled?",
    ),
    "twice": (stage(3, prefetch_bucket_size=1, stage3_prefetch_bucket_size=2), [], "stands beside"),
    # values of nested keys
    "a text for a boolean": (
        stage(1, overlap_comm="yes"),
        [],
        "DeepSpeed's zero_optimization.overlap_comm ('yes') must be true or false",
    ),
    "a number for a boolean": (
        {"bf16": {"check_grad_overflow": 1}},
        [],
        "DeepSpeed's bf16.check_grad_overflow (1) must be true or false",
    ),
    "a text for a number": (
        stage(1, reduce_bucket_size="5e8"),
        [],
        "DeepSpeed's zero_optimization.reduce_bucket_size ('5e8') must be an integer of at least 1",
    ),
    "half a number": (
        stage(1, allgather_bucket_size=1.5),
        [],
        "allgather_bucket_size (1.5) must be an integer of at least 0",
    ),
    "below a range": (
        stage(3, stage3_max_live_parameters=-1),
        [],
        "stage3_max_live_parameters (-1) must be an integer of at least 0",
    ),
    "above a range": (
        stage(3, offload_optimizer={"ratio": 1.5}),
        [],
        "ratio (1.5) must be a number from 0 to 1",
    ),
    "an object": (
        stage(3, offload_param="cpu"),
        [],
        "DeepSpeed's zero_optimization.offload_param ('cpu') must be an object",
    ),
    "a word of none": (
        stage(3, offload_param={"device": "gpu"}),
        [],
        "offload_param.device ('gpu') must be none, cpu or nvme",
    ),
    "a list": (
        {"comms_logger": {"prof_ops": "all_reduce"}},
        [],
        "DeepSpeed's comms_logger.prof_ops ('all_reduce') must be a list",
    ),
    # data types
    "no such type": (
        {"data_types": {"grad_accum_dtype": "fp8"}},
        [],
        "DeepSpeed's data_types.grad_accum_dtype ('fp8') must be fp32 or bf16",
    ),
    "half": (
        {"data_types": {"grad_accum_dtype": "fp16"}},
        [],
        "data_types.grad_accum_dtype ('fp16') must be fp32 or bf16",
    ),
    "bf16 sums of fp32": (
        {"data_types": {"grad_accum_dtype": "bf16"}},
        [],
        "DeepSpeed's data_types.grad_accum_dtype (bf16) must be fp32 with bf16.enabled (false)",
    ),
    "other parameters": (
        {"bf16": {"enabled": True}, "data_types": {"param_dtype": "float32"}},
        [],
        "DeepSpeed's data_types.param_dtype (float32) must be bf16 with bf16.enabled (true)",
    ),
    "communication": (
        {"communication_data_type": "float32"},
        [],
        "communication_data_type ('float32') must be fp32, bf16 or fp16",
    ),
    "bf16 masters": (
        {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
        [],
        "DeepSpeed's bf16.bf16_master_weights_and_grads (true) is not supported: checkpoints and "
        "averages are of fp32 masters",
    ),
    # offload
    "offload, torch": (
        stage(1, offload_optimizer={"device": "cpu"}),
        [],
        "train.optimizer (torch) must be deepspeed when DeepSpeed's "
        "offload_optimizer.device is cpu",
    ),
    "offload, apex": (
        stage(2, offload_optimizer={"device": "cpu"}),
        ["train.optimizer=apex"],
        "train.optimizer (apex) must be deepspeed",
    ),
    "apex at 3": (
        stage(3),
        ["train.optimizer=apex"],
        "train.optimizer (apex) must be torch or deepspeed with DeepSpeed's "
        "zero_optimization.stage (3)",
    ),
    "muon at 3": (
        stage(3),
        ["train.optimizer=muon"],
        "train.optimizer (muon) needs a DeepSpeed zero_optimization.stage (3) of at most 2: it "
        "orthogonalizes whole matrices",
    ),
    "muon on the host": (
        stage(2, offload_optimizer={"device": "cpu"}),
        ["train.optimizer=muon"],
        "train.optimizer (muon) must be deepspeed",
    ),
    "muon between gaps": (
        stage(1, parameter_alignment=True),
        ["train.optimizer=muon"],
        "parameter_alignment (true) must be false with train.optimizer muon",
    ),
    "offload at 0": (
        stage(0, offload_optimizer={"device": "cpu"}),
        ["train.optimizer=deepspeed"],
        "DeepSpeed's "
        "zero_optimization.offload_optimizer.device (cpu) needs zero_optimization.stage 1 or "
        "above; it is 0",
    ),
    "parameters at 2": (
        stage(2, offload_param={"device": "cpu"}),
        [],
        "DeepSpeed's zero_optimization.offload_param.device (cpu) needs "
        "zero_optimization.stage 3; it is 2",
    ),
    "nvme": (
        stage(3, offload_optimizer={"device": "nvme", "nvme_path": "/nvme"}),
        ["train.optimizer=deepspeed"],
        "DeepSpeed's "
        "zero_optimization.offload_optimizer.device (nvme) is not supported: checkpoints and "
        "averages read the state from memory; use cpu",
    ),
    "nvme parameters": (
        stage(3, offload_param={"device": "nvme"}),
        [],
        "offload_param.device (nvme) is not supported",
    ),
    "partial": (
        stage(3, offload_optimizer={"device": "cpu", "ratio": 0.3}),
        ["train.optimizer=deepspeed"],
        "offload_optimizer.ratio (0.3) is not supported: it must be 1",
    ),
    "zenflow": (
        stage(2, zenflow={"topk_ratio": 0.1}),
        [],
        'DeepSpeed\'s zero_optimization.zenflow ({"topk_ratio": 0.1}) is not supported',
    ),
    "no norm": (
        stage(1, compute_grad_norm=False),
        [],
        "zero_optimization.compute_grad_norm (false) is not supported",
    ),
    # old forms
    "cpu_offload": (
        stage(2, cpu_offload=True),
        [],
        "DeepSpeed's zero_optimization.cpu_offload (true) is an old form: write "
        'zero_optimization.offload_optimizer: {"device": "cpu"}, and train.optimizer: deepspeed in '
        "the YAML",
    ),
    "cpu_offload_params": (
        stage(3, cpu_offload_params=True),
        [],
        'is an old form: write zero_optimization.offload_param: {"device": "cpu"}',
    ),
    "pinned": (
        stage(2, cpu_offload_use_pin_memory=True),
        [],
        "write zero_optimization.offload_optimizer.pin_memory",
    ),
    "16 bits": (
        stage(3, stage3_gather_fp16_weights_on_model_save=True),
        [],
        "write zero_optimization.stage3_gather_16bit_weights_on_model_save",
    ),
    "zero: true": (
        {ZERO: True},
        [],
        'DeepSpeed\'s zero_optimization (true) is an old form: write zero_optimization: {"stage": '
        "1}",
    ),
    "threads": (
        {"aio": {"thread_count": 1}},
        [],
        "DeepSpeed's aio.thread_count (1) is an old form: write aio.intra_op_parallelism",
    ),
    "bfloat16": (
        {"bfloat16": {"enabled": True}},
        [],
        'DeepSpeed\'s bfloat16 ({"enabled": true}) is an old form: write bf16',
    ),
    # Hugging Face's word
    "auto: a boolean": (
        {"bf16": {"enabled": "auto"}},
        [],
        "DeepSpeed's bf16.enabled ('auto') is left to Hugging Face's trainer, which is not "
        "here: write true or false, or leave it out",
    ),
    "auto: a number": (
        stage(3, stage3_param_persistence_threshold="auto"),
        [],
        "write an integer of at least 0, or leave it out",
    ),
    "auto: a block": (
        {"aio": "auto"},
        [],
        "DeepSpeed's aio ('auto') is left to Hugging Face's trainer",
    ),
    # together
    "shuffled at 1": (
        stage(1, round_robin_gradients=True),
        [],
        "DeepSpeed's zero_optimization.round_robin_gradients (true) is not supported",
    ),
    "shuffled at 2": (
        stage(2, round_robin_gradients=True),
        [],
        "DeepSpeed's zero_optimization.round_robin_gradients (true) is not supported",
    ),
    "divided before": (
        {**stage(2), "prescale_gradients": True},
        [],
        "DeepSpeed's prescale_gradients (true) must be false at ZeRO stage 2, "
        "unless zero_optimization.reduce_scatter is false",
    ),
    "divided at 3": (
        {**stage(3), "gradient_predivide_factor": 2.0},
        [],
        "gradient_predivide_factor (2.0) must be 1 at ZeRO stage 3",
    ),
    "experts in parts": (
        stage(3, zero_hpz_partition_size=2),
        ["parallel.ep=2"],
        "zero_hpz_partition_size (2) must be 1 with expert parallelism at ZeRO stage 3",
    ),
    "shards of nothing": (
        stage(0, mics_shard_size=8),
        [],
        "DeepSpeed's zero_optimization.mics_shard_size (8) needs zero_optimization.stage 1 or "
        "above; it is 0",
    ),
    "shards without some experts": (
        stage(1, mics_shard_size=6),
        ["parallel.ep=4"],
        "DeepSpeed's zero_optimization.mics_shard_size (6) must be a multiple of parallel.ep (4)",
    ),
    "shards of no rank": (
        stage(2, mics_shard_size=0),
        [],
        "DeepSpeed's zero_optimization.mics_shard_size (0) must be an integer of at least 1",
    ),
    "shards twice": (
        stage(3, mics_shard_size=8, zero_hpz_partition_size=2),
        [],
        "zero_hpz_partition_size (2) must be 1 with zero_optimization.mics_shard_size",
    ),
}


def settings(*overrides: str) -> list[str]:
    return ["parallel.ep=1", *overrides]


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_ranks_would_refuse_is_refused_without_them(name):
    tree, overrides, message = REFUSED[name]
    with pytest.raises(UserError) as error:
        check_deepspeed(tree, load_config(tiny_config(), settings(*overrides)))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("tree", "overrides"),
    [
        (
            stage(
                3,
                stage3_max_live_parameters=1e9,
                offload_param={"device": "cpu", "pin_memory": True},
            ),
            [],
        ),
        (stage(3, max_live_parameters=1e9, offload_optimizer={"device": "none", "ratio": 1.0}), []),
        (stage(2, offload_optimizer={"device": "cpu"}), ["train.optimizer=deepspeed"]),
        (
            {
                "bf16": {"enabled": True},
                "data_types": {"grad_accum_dtype": "bfloat16", "keep_in_fp32_modules": "auto"},
            },
            [],
        ),
        (
            {
                **stage(2, reduce_scatter=False),
                "prescale_gradients": True,
                "communication_data_type": "fp32",
            },
            [],
        ),
        (
            {
                "comms_logger": {"enabled": True, "prof_ops": ["all_reduce"]},
                "flops_profiler": {"enabled": True, "output_file": None},
            },
            [],
        ),
        # DeepSpeed's CIFAR example; an old form that says no, beside the new one
        (
            stage(
                0,
                allgather_partitions=True,
                reduce_scatter=True,
                allgather_bucket_size=50000000,
                reduce_bucket_size=50000000,
                overlap_comm=True,
                contiguous_gradients=True,
                cpu_offload=False,
            ),
            [],
        ),
        (
            stage(
                3,
                cpu_offload=False,
                offload_optimizer={"device": "cpu"},
                stage3_gather_fp16_weights_on_model_save=False,
            ),
            ["train.optimizer=deepspeed"],
        ),
        (
            {
                "train_batch_size": "auto",
                "gradient_clipping": "auto",
                "fp16": {"enabled": False, "loss_scale": 0},
                ZERO: None,
            },
            [],
        ),
    ],
)
def test_what_deepspeed_can_do_passes_its_own_models_too(tree, overrides):
    from diffmoe.training.engine import check_by_deepspeed

    config = load_config(tiny_config(), settings(*overrides))
    merged = merge_deepspeed(tree, config, resolve_layout(config, 1))
    check_by_deepspeed(merged)
    assert merge_deepspeed(merged, config, resolve_layout(config, 1)) == merged
    assert type(
        merged[ZERO].get("stage3_max_live_parameters", 1)
    ) is int and "null" not in json.dumps(merged)


def test_shards_that_do_not_divide_the_ranks_are_refused():
    config = load_config(tiny_config(), settings("moe.pool=1"))
    for ranks, good in ((1, False), (2, True), (4, True)):
        layout, tree = resolve_layout(config, ranks), stage(1, mics_shard_size=2.0)
        if good:
            merged = merge_deepspeed(tree, config, layout)
            assert merged[ZERO][MICS] == 2 and merge_deepspeed(merged, config, layout) == merged
        else:
            with pytest.raises(UserError) as error:
                merge_deepspeed(tree, config, layout)
            assert str(error.value) == (
                "DeepSpeed's zero_optimization.mics_shard_size (2) must divide the number of ranks "
                f"({ranks})"
            )


@pytest.mark.parametrize(
    "name",
    [
        "zero",
        "shards of nothing",
        "a text for a boolean",
        "half",
        "offload, torch",
        "nvme",
        "cpu_offload",
        "auto: a boolean",
    ],
)
def test_a_dry_run_a_plan_and_a_job_say_no_in_one_line(tmp_path, monkeypatch, capsys, name):
    tree, overrides, message = REFUSED[name]
    (tmp_path / "d.json").write_text(json.dumps(tree))
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(run, "export", lambda _environment: None)
    common = [
        "--config",
        str(tiny_config()),
        "--deepspeed_config",
        str(tmp_path / "d.json"),
        f"run.folder={tmp_path}/run",
        *settings(*overrides),
    ]
    for main, arguments in (
        (run.main, ["train", "--dry-run"]),
        (launcher_main, ["submit", "--dry-run"]),
        (launcher_main, ["plan", "--gpu", "h100"]),
        (launcher_main, ["simulate", "--gpu", "h100"]),
        (launcher_main, ["scaling", "--out", str(tmp_path), "--ranks", "1"]),
        (launcher_main, ["job", "prepare", "--ranks", "1"]),
    ):
        assert main([*arguments, *common]) == 2, arguments
        said = capsys.readouterr()
        assert (
            said.out == ""
            and said.err.count("\n") == 1
            and said.err.startswith("error: ")
            and message in said.err
        ), arguments
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------- the table
# and DeepSpeed's


def models() -> dict[str, type[pydantic.BaseModel]]:
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    return {
        ZERO: DeepSpeedZeroConfig,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
        "comms_logger": CommsLoggerConfig,
        "timers.throughput": DeepSpeedThroughputTimerConfig,
    }


def table_of(model: type[pydantic.BaseModel], path: str) -> dict:
    """Our table of a model: types and ranges of its fields, but for old and unsupported ones."""
    table = {}
    for name, field in model.model_fields.items():
        full = f"{path}.{field.alias or name}"
        extra = field.json_schema_extra or {}
        if extra.get("deprecated"):
            assert full in OLD, full
            continue
        if field.alias:
            assert ALIASES[f"{path}.{name}"] == full
        kind = field.annotation
        if typing.get_origin(kind) is typing.Union:
            (kind,) = (each for each in typing.get_args(kind) if each is not type(None))
        if full in UNSUPPORTED and isinstance(kind, type) and issubclass(kind, pydantic.BaseModel):
            continue
        table[field.alias or name] = kind_of(kind, field.metadata, full)
    return table


def kind_of(kind: type, limits: list, path: str):
    if typing.get_origin(kind) is list:
        return list
    if issubclass(kind, pydantic.BaseModel):
        return table_of(kind, path)
    if issubclass(kind, enum.Enum):
        return tuple(each.value for each in kind)
    if kind in (int, float):
        least, most = -float("inf"), float("inf")
        for limit in limits:
            if isinstance(limit, annotated_types.Gt):
                assert kind is int
                least = limit.gt + 1
            elif isinstance(limit, annotated_types.Ge):
                least = limit.ge
            else:
                assert isinstance(limit, annotated_types.Le)
                most = limit.le
        return Number(kind, least, most)
    return kind if kind in (bool, list) else str  # a path is a text


@pytest.mark.parametrize(
    "path", ["zero_optimization", "bf16", "fp16", "comms_logger", "timers.throughput"]
)
def test_the_table_is_deepspeeds(path):
    ours = PASSED
    for part in path.split("."):
        ours = {key: kind for key, kind in ours[part].items() if key != MICS}
    theirs = table_of(models()[path], path)
    if path == ZERO:
        assert theirs.pop("stage") == (0, 1, 2, 3)
        ours = {key: kind for key, kind in ours.items() if key != "stage"}
    if path == "fp16":  # ranges that its validators hold
        ours, theirs = ({**table, "loss_scale": float} for table in (ours, theirs))
    assert ours == theirs


def test_the_table_of_blocks_without_a_model_is_deepspeeds_defaults():
    """Types by their defaults: these blocks are read key by key, and unknown ones ignored."""
    from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
    from deepspeed.runtime import config, constants
    from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT

    def agrees(kind, default):
        return default is None or (
            type(default) in (int, float) if isinstance(kind, Number) else type(default) is kind
        )

    for name, defaults in (
        ("aio", AIO_DEFAULT_DICT),
        ("flops_profiler", vars(DeepSpeedFlopsProfilerConfig({}))),
    ):
        assert PASSED[name].keys() == defaults.keys()
        assert all(agrees(kind, defaults[key]) for key, kind in PASSED[name].items())
    assert set(PASSED["data_types"]) == {
        getattr(constants, name)
        for name in ("GRAD_ACCUM_DTYPE", "PARAM_DTYPE", "BUFFER_DTYPE", "KEEP_IN_FP32_MODULES")
    }
    for word in PASSED["data_types"]["grad_accum_dtype"]:
        config.DtypeEnum(word)
    for word in PASSED["communication_data_type"]:
        config.get_communication_data_type({"communication_data_type": word})
    removed = {*config._REMOVED_TOP_LEVEL_CONFIG_KEYS, *config._REMOVED_ZERO_CONFIG_KEYS}
    assert removed & {*PASSED, *PASSED[ZERO], *OLD} == {MICS}, "which is ours, not DeepSpeed's"


@pytest.mark.parametrize(
    "path",
    [
        "zero_optimization",
        "bf16",
        "comms_logger",
        "timers.throughput",
        "zero_optimization.offload_param",
        "zero_optimization.offload_optimizer",
    ],
)
def test_what_deepspeeds_models_refuse_ours_does(path):
    """Values of every kind for every key."""
    parts, model, ours = path.split("."), models().get(path), PASSED
    for part in parts:
        ours = ours[part]
    if model is None:
        from deepspeed.runtime.zero import offload_config

        model = {
            "offload_param": offload_config.DeepSpeedZeroOffloadParamConfig,
            "offload_optimizer": offload_config.DeepSpeedZeroOffloadOptimizerConfig,
        }[parts[1]]
    config, refused = load_config(tiny_config(), settings("train.optimizer=deepspeed")), 0
    for key in ours.keys() - {MICS}:
        for value in (True, 0, -1, 3, 1.5, 1e400, "x", "auto", [], [1], {}, {"x": 1}):
            try:
                model(strict=True, **{key: value})
            except (pydantic.ValidationError, AssertionError, ValueError, TypeError):
                tree = {key: value}
                for part in reversed(parts):
                    tree = {part: tree}
                with pytest.raises(UserError):
                    check_deepspeed(tree, config)
                refused += 1
    assert refused > 5 * len(ours)
