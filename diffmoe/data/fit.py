"""Does a data set fit the model?  Its index says so: no torch here, and numpy only to read one."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from diffmoe.config import Config
from diffmoe.data.image_source import printable, shorten
from diffmoe.data.sources import is_remote, resolve
from diffmoe.errors import UserError

if TYPE_CHECKING:
    from diffmoe.data.shards import ShardIndex


def check_local_index(config: Config) -> str | None:
    """Compares `data.shards` with the model, as training does at its start, where the index is on
    this machine; no shard is looked at.  UserError where they do not fit; returns why they were
    not compared, None also where that needs no word.
    """
    address, index = config.data.shards, config.data.index
    if not address:
        return "data.shards is not set"
    try:
        place, _ = resolve(address)
    except (UserError, ModuleNotFoundError) as error:
        return str(error)
    local = not is_remote(address)
    if local and not os.path.isdir(os.path.dirname(place)):
        return f"data.shards ({address}): nothing is there"
    if os.path.isfile(index or place.replace("{name}", "index.json")):
        try:
            from diffmoe.data.shards import load_index

            check_fits_training(load_index(address, index, check_files=False), config)
        except ModuleNotFoundError as error:  # a login node's Python
            return f"data.shards ({address}): not compared with the model: {error}"
    elif local and not index:
        return f"data.shards ({address}): no index.json is there"
    return None


def check_fits(index: ShardIndex, config: Config, name: str) -> None:
    """UserError where the data set `name` does not have the model's shape and classes."""
    model = config.model
    wanted = (model.channels, model.input_size, model.input_size)
    if tuple(index.x_shape) != wanted:
        raise UserError(
            f"{name} holds samples of shape {tuple(index.x_shape)}; "
            f"model.channels and model.input_size make {wanted}"
        )
    if index.meta.classes != model.classes:
        names = [f"{number} ({name})" for number, name in enumerate(index.class_names)]
        difference, surplus = "", names[model.classes :]
        if surplus:
            difference = f": surplus {'is' if len(surplus) == 1 else 'are'} {shorten(surplus, 4)}"
        elif names:
            difference = f": it has {printable(names[0])} to {printable(names[-1])}"
        raise UserError(
            f"{name} has {index.meta.classes} classes; model.classes is {model.classes}{difference}"
        )


def check_fits_training(index: ShardIndex, config: Config) -> None:
    """`check_fits` of `data.shards`, also of features, one a token, where training takes them."""
    train, where = config.train, f"data.shards ({config.data.shards})"
    check_fits(index, config, where)
    if not train.repa_weight:
        return
    if not index.features:
        raise UserError(
            f"train.repa_weight ({train.repa_weight}) needs features, of which {where} has none: "
            "encode --features writes them"
        )
    patches, width = index.features
    if patches != config.model.tokens:
        raise UserError(
            f"{where} has features of {patches} patches; a sample of the model has "
            f"{config.model.tokens} tokens, which must be as many"
        )
    if width != train.repa_width:
        raise UserError(
            f"{where} has features {width} wide; train.repa_width is {train.repa_width}"
        )
