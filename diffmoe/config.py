"""The configuration: the tree of ``schema.py`` <- YAML files with ``include`` <- ``a.b=c``
overrides, held to ``config_rules.py``.

No torch here: a login node without it can read, check and print a configuration.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any

from diffmoe.config_rules import check_guidance, check_training, validate
from diffmoe.families import expert_hidden, inner_width, swiglu_hidden
from diffmoe.paths import expand_path
from diffmoe.sample_schema import SampleConfig
from diffmoe.schema import (
    Config,
    DataConfig,
    DiffusionConfig,
    ModelConfig,
    MoEConfig,
    ParallelConfig,
    RunConfig,
    ScoreConfig,
    attention_kept,
)
from diffmoe.strict_yaml import build, merge, read_yaml, tree_of_overrides
from diffmoe.train_schema import TrainConfig

__all__ = [
    "Config",
    "DataConfig",
    "DiffusionConfig",
    "MoEConfig",
    "ModelConfig",
    "ParallelConfig",
    "RunConfig",
    "SampleConfig",
    "ScoreConfig",
    "TrainConfig",
    "attention_kept",
    "check_guidance",
    "check_training",
    "config_from_tree",
    "config_to_tree",
    "expert_hidden",
    "inner_width",
    "load_config",
    "load_tree",
    "override",
    "swiglu_hidden",
    "validate",
]


def load_config(path: str | Path | None, overrides: list[str] | None = None) -> Config:
    """Defaults <- YAML file <- overrides, typed and validated.  UserError names the field."""
    tree = read_yaml(path) if path is not None else {}
    return load_tree(merge(tree, tree_of_overrides(overrides or [])))


def load_tree(tree: dict) -> Config:
    """The configuration that a tree of YAML means, typed and validated.  UserError names the
    field.
    """
    config = _expand_paths(config_from_tree(tree))
    validate(config)
    return config


def override(config: Config, overrides: list[str]) -> Config:
    """``config`` with ``a.b=c`` overrides, typed and validated.  UserError names the field."""
    changed = _expand_paths(
        config_from_tree(merge(config_to_tree(config), tree_of_overrides(overrides))), known=config
    )
    validate(changed)
    return changed


def _expand_paths(config: Config, known: Config = Config()) -> Config:
    """With ``~`` and ``$VAR`` replaced in what is a text: all such fields are paths, since words
    are Literals.  Those that ``known`` has were read before, perhaps on another machine.
    """
    sections = {}
    for name, section in vars(config).items():
        kinds, before = typing.get_type_hints(type(section)), vars(getattr(known, name))
        sections[name] = dataclasses.replace(
            section,
            **{
                key: expand_path(value, f"{name}.{key}")
                for key, value in vars(section).items()
                if kinds[key] is str and value != before[key]
            },
        )
    return Config(**sections)


def config_from_tree(tree: dict) -> Config:
    """Builds the typed tree from nested dicts; unknown keys and wrong types are errors."""
    return build(Config, tree)


def config_to_tree(config: Any) -> dict:
    """Nested dicts and lists, ready for YAML or JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))
