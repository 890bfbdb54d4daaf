"""DeepSpeed's keys: what 0.19.8 reads, the YAML owns, is old, or cannot be used here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

# Keys that DeepSpeed would read and that the YAML owns: allowed only with the YAML's own value.
OWNED = {
    "train_batch_size": "train.batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.accumulation",
    "gradient_clipping": "train.clip",
}
OWNED_BLOCKS = {
    "optimizer": "train.optimizer, train.lr, …",
    "scheduler": "train.schedule, train.warmup",
}
# How many consecutive ranks share one copy of the optimizer's state.  DeepSpeed 0.19.8 has given
# up MiCS, which it names so, at ZeRO 3; here the key works at ZeRO 1 to 3 and the engine reads it.
MICS = "mics_shard_size"


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
FP32_NAMES = ("fp32", "float32", "float", "torch.float32")
BF16_NAMES = ("bf16", "bfloat16", "torch.bfloat16")
DTYPES = FP32_NAMES + BF16_NAMES


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
        **_keys(DTYPES, "grad_accum_dtype param_dtype buffer_dtype"),
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
ZERO = "zero_optimization"
_OFFLOAD_PARAM = f'{ZERO}.offload_param: {{"device": "cpu"}}'
OLD = {
    "bfloat16": "bf16",
    "fp32_allreduce": 'communication_data_type: "fp32"',
    "allgather_size": f"{ZERO}.allgather_bucket_size",
    f"{ZERO}.cpu_offload": f'{ZERO}.offload_optimizer: {{"device": "cpu"}}, '
    "and train.optimizer: deepspeed in the YAML",
    f"{ZERO}.cpu_offload_params": _OFFLOAD_PARAM,
    f"{ZERO}.cpu_offload_param": _OFFLOAD_PARAM,
    f"{ZERO}.cpu_offload_use_pin_memory": f"{ZERO}.offload_optimizer.pin_memory",
    f"{ZERO}.stage3_gather_fp16_weights_on_model_save": (
        f"{ZERO}.stage3_gather_16bit_weights_on_model_save"
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
    f"{ZERO}.zenflow": (None, "its updates come later than the step; leave it out"),
    f"{ZERO}.legacy_stage1": (False, "DeepSpeed has given it up; leave it out"),
    f"{ZERO}.round_robin_gradients": (False, _SHUFFLES),
    f"{ZERO}.compute_grad_norm": (True, _NORM),
    f"{ZERO}.offload_optimizer.ratio": (1, _ALL),
    f"{ZERO}.offload_optimizer.super_offload": (False, _ELSEWHERE),
    "bf16.bf16_master_weights_and_grads": (False, _MASTERS),
    "bf16.bf16_optimizer_states": (False, "checkpoints hold fp32 moments; leave it out"),
}
