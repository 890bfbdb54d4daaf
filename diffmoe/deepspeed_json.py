"""The DeepSpeed JSON: read, checked against the YAML, merged, resolved to what runs.

The JSON owns ZeRO, precision, communication and offload; the YAML owns batch, clipping, optimizer
and schedule.
"""

from __future__ import annotations

import difflib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffmoe.config import Config
from diffmoe.errors import UserError
from diffmoe.layout import Layout
from diffmoe.paths import shipped
from diffmoe.strict_yaml import open_text, without_duplicates

# Keys that DeepSpeed would read and that the YAML owns: allowed only with the YAML's own value.
_OWNED = {
    "train_batch_size": "train.batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.accumulation",
    "gradient_clipping": "train.clip",
}
_OWNED_BLOCKS = {
    "optimizer": "train.optimizer, train.lr, …",
    "scheduler": "train.schedule, train.warmup",
}
# How many consecutive ranks share one copy of the optimizer's state.  DeepSpeed 0.19.8 has given
# up MiCS, which it names so, at ZeRO 3; here the key works at ZeRO 1 to 3 and the engine reads it.
MICS = "mics_shard_size"
_CONTIGUOUS = ("reduce_scatter", "contiguous_gradients")
_WORDS = {str: "a text", bool: "true or false", list: "a list"}


@dataclass(frozen=True)
class Number:
    """A key's value: an integer (5e8 is one) or any number, in a range."""

    kind: type = int
    least: float = -math.inf
    most: float = math.inf

    def __str__(self) -> str:
        word = "an integer" if self.kind is int else "a number"
        if math.isfinite(self.most):
            return f"{word} from {self.least:g} to {self.most:g}"
        return word if math.isinf(self.least) else f"{word} of at least {self.least:g}"

    def holds(self, value: Any) -> bool:
        if type(value) is not int and not (type(value) is float and math.isfinite(value)):
            return False
        return (self.kind is float or value == int(value)) and self.least <= value <= self.most


_INTEGER, _COUNT, _SHARE = Number(), Number(least=0), Number(float, 0, 1)
_FP32 = ("fp32", "float32", "float", "torch.float32")
_BF16 = ("bf16", "bfloat16", "torch.bfloat16")
_DTYPES = _FP32 + _BF16


def _keys(kind: Any, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), kind)


# DeepSpeed silently ignores unknown keys at the top, and trips over other ones, over a wrong type,
# and over keys of other versions only on the ranks.  So here is what its 0.19.8 reads: a type, a
# range, words, or an object of such (tests/test_deepspeed_json.py compares them with its own
# models).
_OFFLOAD: dict = {
    "device": ("none", "cpu", "nvme"),
    "nvme_path": str,
    "buffer_count": _COUNT,
    "pin_memory": bool,
}
PASSED: dict = {
    "zero_optimization": {
        "stage": Number(least=0, most=3),
        "reduce_bucket_size": Number(least=1),
        MICS: Number(least=1),
        "stage3_module_granularity_threshold": _INTEGER,
        **_keys(
            bool,
            "contiguous_gradients reduce_scatter use_multi_rank_bucket_allreduce "
            "allgather_partitions overlap_comm compute_grad_norm load_from_fp32_weights "
            "elastic_checkpoint stage3_gather_16bit_weights_on_model_save "
            "stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential "
            "ignore_unused_parameters legacy_stage1 round_robin_gradients parameter_alignment "
            "zero_quantized_weights zero_quantized_nontrainable_weights zero_quantized_gradients "
            "memory_efficient_linear pipeline_loading_checkpoint override_module_apply "
            "log_trace_cache_warnings enable_sanity_checks save_muon_momentum_buffer_in_memory",
        ),
        **_keys(
            _COUNT,
            "allgather_bucket_size sub_group_size stage3_prefetch_bucket_size "
            "stage3_param_persistence_threshold stage3_model_persistence_threshold "
            "stage3_max_live_parameters stage3_max_reuse_distance zero_hpz_partition_size",
        ),
        "offload_param": {**_OFFLOAD, "buffer_size": _COUNT, "max_in_cpu": _COUNT},
        "offload_optimizer": {
            **_OFFLOAD,
            **_keys(bool, "pipeline_read pipeline_write fast_init super_offload"),
            **_keys(_SHARE, "ratio cpuadam_cores_perc"),
        },
        "leaf_module": _keys(list, "classes names name_suffixes"),
    },
    "bf16": _keys(
        bool,
        "enabled immediate_grad_update check_grad_overflow bf16_master_weights_and_grads "
        "bf16_optimizer_states",
    ),
    "fp16": {
        **_keys(bool, "enabled auto_cast consecutive_hysteresis fp16_master_weights_and_grads"),
        **_keys(_INTEGER, "initial_scale_power loss_scale_window hysteresis min_loss_scale"),
        "loss_scale": Number(float, 0),
    },
    "data_types": {
        **_keys(_DTYPES, "grad_accum_dtype param_dtype buffer_dtype"),
        "keep_in_fp32_modules": list,
    },
    "communication_data_type": ("fp32", "bf16", "fp16"),
    "gradient_predivide_factor": Number(float),
    **_keys(
        bool,
        "prescale_gradients zero_allow_untested_optimizer zero_force_ds_cpu_optimizer "
        "wall_clock_breakdown memory_breakdown dump_state disable_allgather",
    ),
    **_keys(_INTEGER, "steps_per_print seed"),
    "comms_logger": {**_keys(bool, "enabled prof_all verbose debug"), "prof_ops": list},
    "flops_profiler": {
        **_keys(bool, "enabled detailed"),
        **_keys(_INTEGER, "profile_step module_depth top_modules"),
        "recompute_fwd_factor": Number(float),
        "output_file": str,
    },
    "aio": {
        **_keys(_COUNT, "block_size queue_depth intra_op_parallelism"),
        **_keys(bool, "single_submit overlap_events use_gds"),
    },
    "timers": {"throughput": _keys(bool, "enabled synchronized")},
}
# Names that DeepSpeed reads as another's.
ALIASES = {
    f"zero_optimization.{name.removeprefix('stage3_')}": f"zero_optimization.{name}"
    for name in PASSED["zero_optimization"]
    if name.startswith("stage3_")
}
# Keys of older versions: what to write, unless they say false, which is no more than to leave them
# out.
_ZERO = "zero_optimization"
_OFFLOAD_PARAM = f'{_ZERO}.offload_param: {{"device": "cpu"}}'
OLD = {
    "bfloat16": "bf16",
    "fp32_allreduce": 'communication_data_type: "fp32"',
    "allgather_size": f"{_ZERO}.allgather_bucket_size",
    f"{_ZERO}.cpu_offload": f'{_ZERO}.offload_optimizer: {{"device": "cpu"}}, '
    "and train.optimizer: deepspeed in the YAML",
    f"{_ZERO}.cpu_offload_params": _OFFLOAD_PARAM,
    f"{_ZERO}.cpu_offload_param": _OFFLOAD_PARAM,
    f"{_ZERO}.cpu_offload_use_pin_memory": f"{_ZERO}.offload_optimizer.pin_memory",
    f"{_ZERO}.stage3_gather_fp16_weights_on_model_save": (
        f"{_ZERO}.stage3_gather_16bit_weights_on_model_save"
    ),
    "activation_checkpointing": "parallel.recompute in the YAML",
    "compile": "train.compile in the YAML",
    "torch_autocast": "bf16.enabled",
    "aio.thread_count": "aio.intra_op_parallelism",
}
# What DeepSpeed has and a run here cannot use, unless it says off.
_SHUFFLES = (
    "DeepSpeed 0.19.8 shuffles the fp32 state by it and takes one tensor's part for another's; "
    "leave it out"
)
_NORM = "clipping, the records and the check for steps that are not finite need the norm"
_ALL = "it must be 1: checkpoints and averages need all of the fp32 state in one place"
_ELSEWHERE = "its fp32 state lives in another process; leave it out"
_MASTERS = "checkpoints and averages are of fp32 masters; leave it out"
UNSUPPORTED = {
    "fp16.enabled": (False, "use bf16.enabled"),
    f"{_ZERO}.zenflow": (None, "its updates come later than the step; leave it out"),
    f"{_ZERO}.legacy_stage1": (False, "DeepSpeed has given it up; leave it out"),
    f"{_ZERO}.round_robin_gradients": (False, _SHUFFLES),
    f"{_ZERO}.compute_grad_norm": (True, _NORM),
    f"{_ZERO}.offload_optimizer.ratio": (1, _ALL),
    f"{_ZERO}.offload_optimizer.super_offload": (False, _ELSEWHERE),
    "bf16.bf16_master_weights_and_grads": (False, _MASTERS),
    "bf16.bf16_optimizer_states": (False, "checkpoints hold fp32 moments; leave it out"),
}


def read_deepspeed(path: str | Path | None) -> dict:
    """The DeepSpeed JSON as a dict (ZeRO 1 in fp32 when no file is given).  Raises UserError."""
    if path is None:
        return {"zero_optimization": {"stage": 1}}
    with open_text(shipped(path), "--deepspeed_config") as stream:
        try:
            tree = json.load(stream, object_pairs_hook=without_duplicates)
        except (ValueError, RecursionError) as error:
            raise UserError(f"--deepspeed_config {path} is not valid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"--deepspeed_config {path} must hold an object, not {type(tree).__name__}")
    return tree


def merge_deepspeed(tree: dict, config: Config, layout: Layout) -> dict:
    """The dict that ``deepspeed.initialize`` gets, to the last key: the JSON plus the numbers that
    the YAML owns, and what DeepSpeed 0.19.8 must be told to train right.  Merging the result again
    changes nothing.

    Raises UserError for what :func:`check_deepspeed` refuses, and for a number named twice with
    different values.
    """
    check_deepspeed(tree, config)
    check_shards(tree, config, layout.ranks)
    owned = {
        "train_batch_size": layout.batch,
        "train_micro_batch_size_per_gpu": layout.micro_batch,
        "gradient_accumulation_steps": layout.accumulation,
        "gradient_clipping": config.train.clip,
    }
    for key, mine in owned.items():
        value = tree.get(key, mine)
        # At ZeRO 0 a merged JSON says 0, see _resolve.
        resolved = key == "gradient_clipping" and value == 0.0 and zero_stage(tree) == 0
        if value not in ("auto", mine) and not resolved:
            raise UserError(
                f"DeepSpeed's {key} ({value}) contradicts the YAML's {_OWNED[key]} ({mine}); "
                "the YAML owns it"
            )
    passed = {
        key: _plain(value, f"{key}.")
        for key, value in tree.items()
        if key in PASSED and key != "fp16" and value is not None
    }
    # DeepSpeed's throughput timer, on by default, has the host wait for the device twice in every
    # micro-batch.
    quiet = {"steps_per_print": 10**9, "timers": {"throughput": {"enabled": False}}}
    return _resolve({**quiet, **passed, **owned})


def check_deepspeed(tree: dict, config: Config) -> None:
    """Raises UserError for all that can be wrong with a DeepSpeed JSON whatever the number of
    ranks: unknown keys and values of another type, at any depth, keys of other versions, and what
    this trainer or DeepSpeed cannot do together.
    """
    for key in tree:
        if key in _OWNED_BLOCKS:
            raise UserError(
                f"DeepSpeed's {key!r} block is not read: the YAML owns it as {_OWNED_BLOCKS[key]}"
            )
    rest = {key: value for key, value in tree.items() if key not in _OWNED}
    _check_keys(rest, PASSED, "", extra=tuple(_OWNED))
    for name, (off, reason) in UNSUPPORTED.items():
        value = _found(tree, name)
        if value is not None and value != off:
            raise UserError(f"DeepSpeed's {name} ({json.dumps(value)}) is not supported: {reason}")
    _check_together(tree, config)


def _check_keys(tree: dict, known: dict, path: str, extra: tuple[str, ...] = ()) -> None:
    for key, value in tree.items():
        name = path + key
        if name in OLD:
            if value is False:
                continue
            raise UserError(
                f"DeepSpeed's {name} ({json.dumps(value)}) is an old form: write {OLD[name]}"
            )
        known_as = ALIASES.get(name, name)
        if known_as != name and known_as in (path + other for other in tree):
            raise UserError(
                f"DeepSpeed's {name} ({json.dumps(value)}) stands beside {known_as}, "
                "which is the same key"
            )
        kind = known.get(known_as.removeprefix(path))
        if kind is None and name not in UNSUPPORTED:
            hint = f"; known: {', '.join(known)}" if path else ""
            if close := difflib.get_close_matches(key, [*known, *extra], n=1):
                hint = f"; did you mean {path}{close[0]}?"
            raise UserError(f"unknown key {name} (value {value!r}) in the DeepSpeed JSON{hint}")
        if kind is not None and value is not None:
            _check_value(name, value, kind)


def _check_value(name: str, value: Any, kind: Any) -> None:
    words = _words(kind)
    if name == "data_types.keep_in_fp32_modules" and value == "auto":
        return  # here it is DeepSpeed's own
    if value == "auto":
        raise UserError(
            f"DeepSpeed's {name} ('auto') is left to Hugging Face's trainer, which is not here: "
            f"write {words}, or leave it out for DeepSpeed's default"
        )
    if name == "zero_optimization" and isinstance(value, bool):
        raise UserError(
            f"DeepSpeed's zero_optimization ({json.dumps(value)}) is an old form: write "
            f'zero_optimization: {{"stage": {int(value)}}}'
        )
    if isinstance(kind, dict):
        good = isinstance(value, dict)
    elif isinstance(kind, tuple):
        good = value in kind
    elif isinstance(kind, Number):
        good = kind.holds(value)
        if name == "zero_optimization.stage":
            good, words = type(value) is int and good, "0, 1, 2 or 3"
    else:
        good = type(value) is kind
    if not good:
        raise UserError(f"DeepSpeed's {name} ({value!r}) must be {words}")
    if isinstance(kind, dict):
        _check_keys(value, kind, f"{name}.")


def _words(kind: Any) -> str:
    if isinstance(kind, dict):
        return "an object"
    if isinstance(kind, Number):
        return str(kind)
    if isinstance(kind, tuple):  # the first of the names of each data type, say
        shown = [word for word in kind if word not in _DTYPES or word in ("fp32", "bf16")]
        return f"{', '.join(shown[:-1])} or {shown[-1]}"
    return _WORDS[kind]


def _check_together(tree: dict, config: Config) -> None:
    """What single keys cannot show."""
    train, bf16 = config.train, precision(tree) == "bf16"
    stage = max(zero_stage(tree), int(bf16))  # see _resolve
    fitting = {
        "grad_accum_dtype": _DTYPES if bf16 else _FP32,
        "param_dtype": _BF16 if bf16 else _FP32,
        "buffer_dtype": _FP32,
    }
    for name, dtypes in fitting.items():
        value = _found(tree, f"data_types.{name}")
        if value is not None and value not in dtypes:
            why = ", since the thresholds are buffers" if name == "buffer_dtype" else ""
            raise UserError(
                f"DeepSpeed's data_types.{name} ({value}) must be {dtypes[0]} with bf16.enabled "
                f"({json.dumps(bf16)}){why}"
            )
    for name, least, words in (
        ("offload_optimizer", 1, "1 or above"),
        ("offload_param", 3, "3"),
    ):
        device = _found(tree, f"{_ZERO}.{name}.device") or "none"
        if device == "nvme":
            raise UserError(
                f"DeepSpeed's {_ZERO}.{name}.device (nvme) is not supported: checkpoints and "
                "averages read the state from memory; use cpu"
            )
        if device != "none" and stage < least:
            raise UserError(
                f"DeepSpeed's {_ZERO}.{name}.device ({device}) needs {_ZERO}.stage {words}; "
                f"it is {stage}"
            )
    offloads = _found(tree, f"{_ZERO}.offload_optimizer.device") == "cpu"
    _check_shards(tree, config, stage)
    if offloads and train.optimizer != "deepspeed":
        raise UserError(
            f"train.optimizer ({train.optimizer}) must be deepspeed when DeepSpeed's "
            "offload_optimizer.device is cpu"
        )
    if train.optimizer == "apex" and stage == 3:
        # There DeepSpeed steps once a sub-group, and Apex counts updates once a step of the whole
        # group.
        raise UserError(
            "train.optimizer (apex) must be torch or deepspeed with DeepSpeed's "
            "zero_optimization.stage (3)"
        )
    if train.compile is True and stage == 3:  # see TrainConfig.compiles
        raise UserError(
            "train.compile (true) needs a DeepSpeed zero_optimization.stage (3) of at most 2"
        )
    # (key, what it must be, where)
    rules: list[tuple[str, float, str]] = []
    if stage >= 2 and _found(tree, f"{_ZERO}.reduce_scatter") is not False:
        where = f"at ZeRO stage {stage}, unless zero_optimization.reduce_scatter is false"
        rules += [("prescale_gradients", False, where), ("gradient_predivide_factor", 1, where)]
    if config.parallel.ep > 1 and stage == 3:
        where = "with expert parallelism at ZeRO stage 3"
        rules.append((f"{_ZERO}.zero_quantized_gradients", False, where))
        if (_found(tree, f"{_ZERO}.zero_hpz_partition_size") or 0) > 0:
            rules.append((f"{_ZERO}.zero_hpz_partition_size", 1, where))
    if config.parallel.ep > 1 and stage in (1, 2):
        where = f"with expert parallelism at ZeRO stage {stage}"
        rules += [(f"{_ZERO}.{key}", True, where) for key in _CONTIGUOUS]
    if bf16 and stage == 1:
        # With fp32 accumulation DeepSpeed 0.19.8 adds a micro-batch's bf16 gradient to its fp32
        # sum after every micro-batch without clearing it, so that early ones count twice; updating
        # at once is right.
        where = "at ZeRO stage 1, where fp32 accumulation goes wrong without it"
        rules.append(("bf16.immediate_grad_update", True, where))
    if _found(tree, f"{_ZERO}.{MICS}") is not None:
        where = f"with zero_optimization.{MICS}, which shards in another way"
        rules.append((f"{_ZERO}.zero_quantized_gradients", False, where))
        if (_found(tree, f"{_ZERO}.zero_hpz_partition_size") or 0) > 0:
            rules.append((f"{_ZERO}.zero_hpz_partition_size", 1, where))
    for name, must, where in rules:
        value = _found(tree, name)
        if value is not None and value != must:
            raise UserError(
                f"DeepSpeed's {name} ({json.dumps(value)}) must be {json.dumps(must)} {where}"
            )


def _check_shards(tree: dict, config: Config, stage: int) -> None:
    size, name = _found(tree, f"{_ZERO}.{MICS}"), f"DeepSpeed's {_ZERO}.{MICS}"
    if size is None:
        return
    if stage == 0:
        raise UserError(f"{name} ({size:g}) needs {_ZERO}.stage 1 or above; it is 0")
    if size % config.parallel.ep:
        raise UserError(
            f"{name} ({size:g}) must be a multiple of parallel.ep ({config.parallel.ep}), so that "
            "the ranks that share a copy of the state hold all experts"
        )


def check_shards(tree: dict, config: Config, ranks: int) -> None:
    """Raises UserError where ``mics_shard_size`` does not fit stage, EP size or number of ranks."""
    _check_shards(tree, config, max(zero_stage(tree), int(precision(tree) == "bf16")))
    size = _found(tree, f"{_ZERO}.{MICS}")
    if size is not None and ranks % size:
        raise UserError(
            f"DeepSpeed's {_ZERO}.{MICS} ({size:g}) must divide the number of ranks ({ranks})"
        )


def given_to_deepspeed(tree: dict) -> dict:
    """A merged ``tree`` without what the engine reads itself."""
    zero = {key: value for key, value in tree[_ZERO].items() if key != MICS}
    return {**tree, _ZERO: zero}


def _found(tree: dict, name: str) -> Any:
    """The value of ``a.b.c``; None where there is none."""
    found: Any = tree
    for part in name.split("."):
        found = (found or {}).get(part)
    return found


def _plain(value: Any, path: str) -> Any:
    """What a JSON says as DeepSpeed wants it: without keys that are null or of older versions
    (those say false), and integers as such.  ``path``: of the value's keys, with a dot at its end.
    """
    if isinstance(value, dict):
        return {
            key: _plain(entry, f"{path}{key}.")
            for key, entry in value.items()
            if entry is not None and path + key not in OLD
        }
    return int(value) if isinstance(value, float) and value == int(value) else value


def precision(tree: dict) -> str:
    """``bf16`` or ``fp32``, which the passes compute in."""
    return "bf16" if (tree.get("bf16") or {}).get("enabled") else "fp32"


def zero_stage(tree: dict) -> int:
    """The ZeRO stage that a DeepSpeed JSON names; 0 where it names none."""
    return (tree.get("zero_optimization") or {}).get("stage") or 0


@dataclass(frozen=True)
class Reduction:
    """How gradients are added up over ranks: the ``precision`` (fp32, bf16, fp16), elements of a
    ``bucket``, and whether buckets leave while backward runs (``overlap``).
    """

    precision: str
    bucket: int
    overlap: bool


def reduction(tree: dict) -> Reduction:
    """What a DeepSpeed JSON says of it.  Where it says nothing: the precision of accumulation, and
    from ZeRO 1 on buckets that are small enough to leave during backward (DeepSpeed's own default
    is one of 2 GB, after it).
    """
    zero = tree.get("zero_optimization") or {}
    accumulation = _found(tree, "data_types.grad_accum_dtype") or precision(tree)
    sharded = zero_stage(tree) > 0 or precision(tree) == "bf16"  # see _resolve
    bucket, overlap = zero.get("reduce_bucket_size"), zero.get("overlap_comm")
    return Reduction(
        tree.get("communication_data_type") or ("bf16" if accumulation in _BF16 else "fp32"),
        int(bucket or (5e7 if sharded else 5e8)),
        sharded if overlap is None else overlap,
    )


def _resolve(tree: dict) -> dict:
    zero, bf16 = {"stage": 0, **tree.get("zero_optimization", {})}, tree.get("bf16", {})
    how = reduction(tree)
    # DeepSpeed's default is bf16 where weights are.
    tree = {**tree, "communication_data_type": how.precision}
    if bf16.get("enabled"):
        # Fp32 masters need a home that can be checkpointed by name; ZeRO 1 is the least that gives
        # them one.
        zero["stage"] = max(1, zero["stage"])
        if zero["stage"] == 1:
            bf16 = {**bf16, "immediate_grad_update": True}
        # A step that is not finite changes nothing.
        tree["bf16"] = {**bf16, "check_grad_overflow": True}
    if zero["stage"] > 0:
        zero |= {"reduce_bucket_size": how.bucket, "overlap_comm": how.overlap}
    else:
        # DeepSpeed's own clipping at stage 0 forgets experts on other ranks; the engine clips by
        # itself, to train.clip. Said, not left out: DeepSpeed 0.19.8's default is 1.
        tree["gradient_clipping"] = 0.0
    return {**tree, "zero_optimization": zero}
