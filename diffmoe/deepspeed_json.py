"""The DeepSpeed JSON: read, checked against the YAML, merged, resolved to what runs.

The JSON owns ZeRO, precision, communication and offload; the YAML owns batch, clipping, optimizer
and schedule.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffmoe.config import Config
from diffmoe.deepspeed_keys import (
    ALIASES,
    BF16_NAMES,
    DTYPES,
    FP32_NAMES,
    MICS,
    OLD,
    OWNED,
    OWNED_BLOCKS,
    PASSED,
    UNSUPPORTED,
    ZERO,
    Number,
)
from diffmoe.errors import UserError
from diffmoe.layout import Layout
from diffmoe.paths import shipped
from diffmoe.strict_yaml import open_text, without_duplicates

_CONTIGUOUS = ("reduce_scatter", "contiguous_gradients")
_WORDS = {str: "a text", bool: "true or false", list: "a list"}


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
                f"DeepSpeed's {key} ({value}) contradicts the YAML's {OWNED[key]} ({mine}); "
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
        if key in OWNED_BLOCKS:
            raise UserError(
                f"DeepSpeed's {key!r} block is not read: the YAML owns it as {OWNED_BLOCKS[key]}"
            )
    rest = {key: value for key, value in tree.items() if key not in OWNED}
    _check_keys(rest, PASSED, "", extra=tuple(OWNED))
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
        shown = [word for word in kind if word not in DTYPES or word in ("fp32", "bf16")]
        return f"{', '.join(shown[:-1])} or {shown[-1]}"
    return _WORDS[kind]


def _check_together(tree: dict, config: Config) -> None:
    """What single keys cannot show."""
    train, bf16 = config.train, precision(tree) == "bf16"
    stage = max(zero_stage(tree), int(bf16))  # see _resolve
    fitting = {
        "grad_accum_dtype": DTYPES if bf16 else FP32_NAMES,
        "param_dtype": BF16_NAMES if bf16 else FP32_NAMES,
        "buffer_dtype": FP32_NAMES,
    }
    for name, dtypes in fitting.items():
        value = _found(tree, f"data_types.{name}")
        if value is not None and value not in dtypes:
            why = ", since the thresholds are buffers" if name == "buffer_dtype" else ""
            raise UserError(
                f"DeepSpeed's data_types.{name} ({value}) must be {dtypes[0]} with bf16.enabled "
                f"({json.dumps(bf16)}){why}"
            )
    for name, least, words in (("offload_optimizer", 1, "1 or above"), ("offload_param", 3, "3")):
        device = _found(tree, f"{ZERO}.{name}.device") or "none"
        if device == "nvme":
            raise UserError(
                f"DeepSpeed's {ZERO}.{name}.device (nvme) is not supported: checkpoints and "
                "averages read the state from memory; use cpu"
            )
        if device != "none" and stage < least:
            raise UserError(
                f"DeepSpeed's {ZERO}.{name}.device ({device}) needs {ZERO}.stage {words}; "
                f"it is {stage}"
            )
    offloads = _found(tree, f"{ZERO}.offload_optimizer.device") == "cpu"
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
    if train.optimizer == "muon" and stage == 3:  # where every matrix is cut over all ranks
        raise UserError(
            "train.optimizer (muon) needs a DeepSpeed zero_optimization.stage (3) of at most 2: "
            "it orthogonalizes whole matrices"
        )
    if train.compile is True and stage == 3:  # see TrainConfig.compiles
        raise UserError(
            "train.compile (true) needs a DeepSpeed zero_optimization.stage (3) of at most 2"
        )
    # (key, what it must be, where)
    rules: list[tuple[str, float, str]] = []
    if train.optimizer == "muon":
        rules.append((f"{ZERO}.parameter_alignment", False, "with train.optimizer muon"))
    if stage >= 2 and _found(tree, f"{ZERO}.reduce_scatter") is not False:
        where = f"at ZeRO stage {stage}, unless zero_optimization.reduce_scatter is false"
        rules += [("prescale_gradients", False, where), ("gradient_predivide_factor", 1, where)]
    if config.parallel.ep > 1 and stage == 3:
        where = "with expert parallelism at ZeRO stage 3"
        rules.append((f"{ZERO}.zero_quantized_gradients", False, where))
        if (_found(tree, f"{ZERO}.zero_hpz_partition_size") or 0) > 0:
            rules.append((f"{ZERO}.zero_hpz_partition_size", 1, where))
    if config.parallel.ep > 1 and stage in (1, 2):
        where = f"with expert parallelism at ZeRO stage {stage}"
        rules += [(f"{ZERO}.{key}", True, where) for key in _CONTIGUOUS]
    if bf16 and stage == 1:
        # With fp32 accumulation DeepSpeed 0.19.8 adds a micro-batch's bf16 gradient to its fp32
        # sum after every micro-batch without clearing it, so that early ones count twice; updating
        # at once is right.
        where = "at ZeRO stage 1, where fp32 accumulation goes wrong without it"
        rules.append(("bf16.immediate_grad_update", True, where))
    if _found(tree, f"{ZERO}.{MICS}") is not None:
        where = f"with zero_optimization.{MICS}, which shards in another way"
        rules.append((f"{ZERO}.zero_quantized_gradients", False, where))
        if (_found(tree, f"{ZERO}.zero_hpz_partition_size") or 0) > 0:
            rules.append((f"{ZERO}.zero_hpz_partition_size", 1, where))
    for name, must, where in rules:
        value = _found(tree, name)
        if value is not None and value != must:
            raise UserError(
                f"DeepSpeed's {name} ({json.dumps(value)}) must be {json.dumps(must)} {where}"
            )


def _check_shards(tree: dict, config: Config, stage: int) -> None:
    size, name = _found(tree, f"{ZERO}.{MICS}"), f"DeepSpeed's {ZERO}.{MICS}"
    if size is None:
        return
    if stage == 0:
        raise UserError(f"{name} ({size:g}) needs {ZERO}.stage 1 or above; it is 0")
    if size % config.parallel.ep:
        raise UserError(
            f"{name} ({size:g}) must be a multiple of parallel.ep ({config.parallel.ep}), so that "
            "the ranks that share a copy of the state hold all experts"
        )


def check_shards(tree: dict, config: Config, ranks: int) -> None:
    """Raises UserError where ``mics_shard_size`` does not fit stage, EP size or number of ranks."""
    _check_shards(tree, config, max(zero_stage(tree), int(precision(tree) == "bf16")))
    size = _found(tree, f"{ZERO}.{MICS}")
    if size is not None and ranks % size:
        raise UserError(
            f"DeepSpeed's {ZERO}.{MICS} ({size:g}) must divide the number of ranks ({ranks})"
        )


def given_to_deepspeed(tree: dict) -> dict:
    """A merged ``tree`` without what the engine reads itself."""
    zero = {key: value for key, value in tree[ZERO].items() if key != MICS}
    return {**tree, ZERO: zero}


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


def accumulation(tree: dict) -> str:
    """In which precision a DeepSpeed JSON adds up micro-batches: where it says nothing, the
    weights'.
    """
    return _found(tree, "data_types.grad_accum_dtype") or precision(tree)


def reduction(tree: dict) -> Reduction:
    """What a DeepSpeed JSON says of it.  Where it says nothing: the precision of accumulation, and
    from ZeRO 1 on buckets that are small enough to leave during backward (DeepSpeed's own default
    is one of 2 GB, after it).
    """
    zero = tree.get("zero_optimization") or {}
    sharded = zero_stage(tree) > 0 or precision(tree) == "bf16"  # see _resolve
    bucket, overlap = zero.get("reduce_bucket_size"), zero.get("overlap_comm")
    return Reduction(
        tree.get("communication_data_type")
        or ("bf16" if accumulation(tree) in BF16_NAMES else "fp32"),
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
