"""The DeepSpeed JSON: read, checked against the YAML, merged.

The JSON owns ZeRO, precision, communication and offload; the YAML owns batch, clipping, optimizer and schedule.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from diffmoe.config import Config
from diffmoe.layout import Layout

# Keys that DeepSpeed would read and that the YAML owns: allowed only with the YAML's own value.
_OWNED = {
    "train_batch_size": "train.batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.accumulation",
    "gradient_clipping": "train.clip",
}
_OWNED_BLOCKS = {"optimizer": "train.optimizer, train.lr, …", "scheduler": "train.schedule, train.warmup"}
# DeepSpeed ignores unknown keys without a word, so the ones that we pass on are listed.
_PASSED = {
    "zero_optimization", "bf16", "data_types", "communication_data_type", "prescale_gradients",
    "gradient_predivide_factor", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "steps_per_print",
    "wall_clock_breakdown", "memory_breakdown", "dump_state", "comms_logger", "flops_profiler", "aio",
    "disable_allgather", "seed",
}


def read_deepspeed(path: str | Path | None) -> dict:
    """The DeepSpeed JSON as a dict (ZeRO 1 in fp32 when no file is given).  Raises ValueError."""
    if path is None:
        return {"zero_optimization": {"stage": 1}}
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"--deepspeed_config {path} does not exist")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_object_without_duplicates)
    except ValueError as error:
        raise ValueError(f"--deepspeed_config {path} is not valid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"--deepspeed_config {path} must hold an object, not {type(tree).__name__}")
    return tree


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict:
    for i, (key, _) in enumerate(pairs):
        if key in dict(pairs[:i]):
            raise ValueError(f"key {key!r} stands twice")
    return dict(pairs)


def merge_deepspeed(tree: dict, config: Config, layout: Layout) -> dict:
    """The dict that ``deepspeed.initialize`` gets: the JSON plus the numbers that the YAML owns.

    Raises ValueError for unknown keys, for a number named twice with different values and for what this trainer
    does not support (fp16, ZeRO stages outside 0-3)."""
    owned = {
        "train_batch_size": layout.batch,
        "train_micro_batch_size_per_gpu": layout.micro_batch,
        "gradient_accumulation_steps": layout.accumulation,
        "gradient_clipping": config.train.clip,
    }
    for key, value in tree.items():
        if key in owned:
            if value not in ("auto", owned[key]):
                raise ValueError(
                    f"DeepSpeed's {key} ({value}) contradicts the YAML's {_OWNED[key]} ({owned[key]}); the YAML owns it")
        elif key in _OWNED_BLOCKS:
            raise ValueError(f"DeepSpeed's {key!r} block is not read: the YAML owns it as {_OWNED_BLOCKS[key]}")
        elif key == "fp16":
            if _block(tree, key).get("enabled", False):
                raise ValueError("DeepSpeed's fp16.enabled (true) is not supported: use bf16.enabled")
        elif key not in _PASSED:
            close = difflib.get_close_matches(key, [*_PASSED, *owned], n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"unknown key {key} (value {value!r}) in the DeepSpeed JSON{hint}")
    for key in ("bf16", "data_types"):
        _block(tree, key)
    zero = _block(tree, "zero_optimization")
    if zero.get("stage", 0) not in (0, 1, 2, 3):
        raise ValueError(f"DeepSpeed's zero_optimization.stage ({zero['stage']}) must be 0, 1, 2 or 3")
    passed = {key: value for key, value in tree.items() if key in _PASSED and value is not None}
    return {"steps_per_print": 10**9, **passed, **owned}


def _block(tree: dict, key: str) -> dict:
    block = {} if tree.get(key) is None else tree[key]
    if not isinstance(block, dict):
        raise ValueError(f"DeepSpeed's {key} ({block!r}) must be an object")
    return block
