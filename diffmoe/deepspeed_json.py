"""The DeepSpeed JSON: read, checked against the YAML, merged, resolved to what runs.

The JSON owns ZeRO, precision, communication and offload; the YAML owns batch, clipping, optimizer and schedule.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from diffmoe.config import Config
from diffmoe.errors import UserError
from diffmoe.layout import Layout
from diffmoe.strict_yaml import open_text

# Keys that DeepSpeed would read and that the YAML owns: allowed only with the YAML's own value.
_OWNED = {
    "train_batch_size": "train.batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.accumulation",
    "gradient_clipping": "train.clip",
}
_OWNED_BLOCKS = {"optimizer": "train.optimizer, train.lr, …", "scheduler": "train.schedule, train.warmup"}
# DeepSpeed ignores unknown keys without a word, so the ones that we pass on are listed; and it trips over many a wrong type
# only later, on some rank, so theirs are too.
_PASSED: dict[str, type] = {
    "zero_optimization": dict, "bf16": dict, "data_types": dict, "communication_data_type": str, "prescale_gradients": bool,
    "gradient_predivide_factor": float, "zero_allow_untested_optimizer": bool, "zero_force_ds_cpu_optimizer": bool,
    "steps_per_print": int, "wall_clock_breakdown": bool, "memory_breakdown": bool, "dump_state": bool, "comms_logger": dict,
    "flops_profiler": dict, "aio": dict, "disable_allgather": bool, "seed": int, "timers": dict,
}
_WORDS = {dict: "an object", str: "a text", bool: "true or false", float: "a number", int: "an integer"}


def read_deepspeed(path: str | Path | None) -> dict:
    """The DeepSpeed JSON as a dict (ZeRO 1 in fp32 when no file is given).  Raises UserError."""
    if path is None:
        return {"zero_optimization": {"stage": 1}}
    with open_text(Path(path), "--deepspeed_config") as stream:
        try:
            tree = json.load(stream, object_pairs_hook=_object_without_duplicates)
        except (ValueError, RecursionError) as error:
            raise UserError(f"--deepspeed_config {path} is not valid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"--deepspeed_config {path} must hold an object, not {type(tree).__name__}")
    return tree


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict:
    for i, (key, _) in enumerate(pairs):
        if key in dict(pairs[:i]):
            raise UserError(f"key {key!r} stands twice")
    return dict(pairs)


def merge_deepspeed(tree: dict, config: Config, layout: Layout) -> dict:
    """The dict that ``deepspeed.initialize`` gets, to the last key: the JSON plus the numbers that the YAML owns, and what
    DeepSpeed 0.19.8 must be told to train right.  Merging the result again changes nothing.

    Raises UserError for unknown keys, for a number named twice with different values and for what this trainer
    does not support (fp16, ZeRO stages outside 0-3)."""
    owned = {
        "train_batch_size": layout.batch,
        "train_micro_batch_size_per_gpu": layout.micro_batch,
        "gradient_accumulation_steps": layout.accumulation,
        "gradient_clipping": config.train.clip,
    }
    for key, value in tree.items():
        if key in owned:
            resolved = key == "gradient_clipping" and value == 0.0 and zero_stage(tree) == 0  # see _resolve
            if value not in ("auto", owned[key]) and not resolved:
                raise UserError(
                    f"DeepSpeed's {key} ({value}) contradicts the YAML's {_OWNED[key]} ({owned[key]}); the YAML owns it")
        elif key in _OWNED_BLOCKS:
            raise UserError(f"DeepSpeed's {key!r} block is not read: the YAML owns it as {_OWNED_BLOCKS[key]}")
        elif key == "fp16":
            if _block(tree, key).get("enabled", False):
                raise UserError("DeepSpeed's fp16.enabled (true) is not supported: use bf16.enabled")
        elif key not in _PASSED:
            close = difflib.get_close_matches(key, [*_PASSED, *owned], n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UserError(f"unknown key {key} (value {value!r}) in the DeepSpeed JSON{hint}")
        else:
            _check_type(key, value, _PASSED[key])
    _check_type("bf16.enabled", _block(tree, "bf16").get("enabled"), bool)
    for key in ("offload_optimizer", "offload_param"):
        _check_type(f"zero_optimization.{key}", _block(tree, "zero_optimization").get(key), dict)
    if type(zero_stage(tree)) is not int or zero_stage(tree) not in (0, 1, 2, 3):
        raise UserError(f"DeepSpeed's zero_optimization.stage ({zero_stage(tree)!r}) must be 0, 1, 2 or 3")
    if config.train.compile and zero_stage(tree) == 3:  # which gathers weights in hooks of modules, where no graph can go
        raise UserError("train.compile (true) needs a DeepSpeed zero_optimization.stage (3) of at most 2")
    passed = {key: value for key, value in tree.items() if key in _PASSED and value is not None}
    # DeepSpeed's throughput timer, on by default, has the host wait for the device twice in every micro-batch.
    quiet = {"steps_per_print": 10**9, "timers": {"throughput": {"enabled": False}}}
    return _resolve({**quiet, **passed, **owned}, expert_parallel=layout.ep > 1)


def precision(tree: dict) -> str:
    """``bf16`` or ``fp32``, which the passes compute in."""
    return "bf16" if (tree.get("bf16") or {}).get("enabled") else "fp32"


def zero_stage(tree: dict) -> int:
    """The ZeRO stage that a DeepSpeed JSON names; 0 where it names none."""
    return _block(tree, "zero_optimization").get("stage", 0)


def _resolve(tree: dict, expert_parallel: bool) -> dict:
    zero, bf16 = {"stage": 0, **_block(tree, "zero_optimization")}, _block(tree, "bf16")
    if bf16.get("enabled"):
        # Fp32 masters need a home that can be checkpointed by name; ZeRO 1 is the least that gives them one.
        zero["stage"] = max(1, zero["stage"])
        if zero["stage"] == 1:
            # With fp32 accumulation DeepSpeed 0.19.8 adds a micro-batch's bf16 gradient to its fp32 sum after every
            # micro-batch without clearing it, so that early ones count twice; updating at once is right.
            if not bf16.get("immediate_grad_update", True):
                raise UserError("DeepSpeed's bf16.immediate_grad_update (false) must be true at ZeRO stage 1, where "
                                "fp32 accumulation goes wrong without it")
            bf16 = {**bf16, "immediate_grad_update": True}
        tree = {**tree, "bf16": {**bf16, "check_grad_overflow": True}}  # a step that is not finite changes nothing
    if expert_parallel and zero["stage"] in (1, 2):
        for key in ("reduce_scatter", "contiguous_gradients"):
            if zero.get(key) is False:
                raise UserError(f"DeepSpeed's zero_optimization.{key} (false) must be true with expert parallelism "
                                f"at ZeRO stage {zero['stage']}")
    if zero["stage"] == 0:
        # DeepSpeed's own clipping at stage 0 forgets experts on other ranks; the engine clips by itself, to train.clip.
        # Said, not left out: DeepSpeed 0.19.8's default is 1.
        tree = {**tree, "gradient_clipping": 0.0}
    return {**tree, "zero_optimization": zero}


def _block(tree: dict, key: str) -> dict:
    _check_type(key, tree.get(key), dict)
    return tree.get(key) or {}


def _check_type(key: str, value: Any, kind: type) -> None:
    if value is not None and type(value) is not kind and not (kind is float and type(value) is int):
        raise UserError(f"DeepSpeed's {key} ({value!r}) must be {_WORDS[kind]}")
