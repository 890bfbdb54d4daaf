"""Logical names: what a tensor is called in checkpoints and exports, whatever rank holds it.

A parameter has the name that the module tree gives it; stacked experts are taken apart, each under
its global number (`blocks.1.mlp.experts.7.fc1_weight`), so that no layout shows. Thresholds are
buffers, `blocks.1.mlp.thresholds.value` and so on, and so are load biases.
"""

from __future__ import annotations

import hashlib
import re
from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffmoe.config import Config, ModelConfig, MoEConfig
from diffmoe.errors import UserError
from diffmoe.families import is_moe_block, projector_of
from diffmoe.models.dit import DiT, new_projector
from diffmoe.moe.experts import Experts
from diffmoe.moe.layer import running_state
from diffmoe.moe.running import RunningState
from diffmoe.parallel.groups import ParallelGroups

# the first, without a prefix, saw 4,096 entries of a tensor: other weights could have the same
_HASH_VERSION = "v2"
PROJECTOR = "projector"  # the module's name in a model that is trained with one
_HASHED_AT_ONCE = 1 << 22  # entries: 16 MiB as fp32


@dataclass(frozen=True)
class LogicalTensor:
    """A parameter under its logical name.  ``experts``: its owner when dimension 0 counts experts,
    else None.
    """

    name: str
    parameter: nn.Parameter
    experts: Experts | None

    def pieces(self, value: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(logical name, tensor): experts one by one under their global numbers."""
        for i, name in enumerate(self.piece_names()):
            yield name, value if self.experts is None else value[i]

    def piece_names(self) -> list[str]:
        """The logical names of this rank's pieces, in order."""
        if self.experts is None:
            return [self.name]
        stem, leaf = self.name.rsplit(".", 1)
        return [f"{stem}.{self.experts.first + i}.{leaf}" for i in range(self.experts.local)]


def logical_tensors(model: DiT) -> list[LogicalTensor]:
    """Every parameter of the model, in a fixed order."""
    owners = {name: module for name, module in model.named_modules() if isinstance(module, Experts)}
    return [
        LogicalTensor(name, p, owners.get(name.rpartition(".")[0]))
        for name, p in model.named_parameters()
    ]


def logical_pieces(model: DiT) -> Iterator[tuple[str, Tensor]]:
    """(logical name, values) of all that this rank holds of the parameters."""
    for tensor in logical_tensors(model):
        yield from tensor.pieces(tensor.parameter.data)


def running_buffers(model: DiT) -> dict[str, Tensor]:
    """The model's thresholds, histograms and load biases by name, as a checkpoint keeps them."""
    return {
        f"{stem}.{name}": value
        for stem, module in model.named_modules()
        if isinstance(module, RunningState)
        for name, value in module.named_buffers()
    }


def logical_template(model: ModelConfig, moe: MoEConfig) -> dict[str, Tensor]:
    """Every weight of a model, and the values of thresholds and load biases, by logical name:
    shapes only, on torch's meta device.
    """
    with torch.device("meta"):
        whole = DiT(model, moe)
    values = {n: value for n, value in running_buffers(whole).items() if n.endswith(".value")}
    return {**dict(logical_pieces(whole)), **values}


def fresh_buffers(model: ModelConfig, moe: MoEConfig) -> dict[str, Tensor]:
    """A new model's :func:`running_buffers`."""
    return {
        f"blocks.{i}.mlp.{state}.{name}": value
        for i in range(model.depth)
        if is_moe_block(model, moe, i)
        for state, module in running_state(model, moe).items()
        for name, value in module.named_buffers()
    }


def whole_weights(
    weights: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    model: ModelConfig,
    moe: MoEConfig,
    source: str,
) -> Mapping[str, Tensor]:
    """Weights and thresholds in one mapping, unread.  Raises UserError, naming ``source``, where
    the model needs more.
    """
    tensors: Mapping[str, Tensor] = ChainMap(weights, buffers)  # type: ignore[arg-type]  # never written to
    missing = [name for name in logical_template(model, moe) if name not in tensors]
    if missing:
        raise UserError(f"{source} lacks {', '.join(missing[:3])} ({len(missing)} missing)")
    return tensors


def new_model(config: Config, pool: int, groups: ParallelGroups) -> DiT:
    """An untrained model as ``config`` describes it, its weights from ``run.seed``.  ``pool``: in
    samples, see ``layout.resolve_layout``.
    """
    model = DiT(
        config.model,
        config.moe,
        pool=pool,
        groups=groups,
        recompute=config.parallel.recompute,
        overlap=config.parallel.overlap,
        time_scale=config.diffusion.time_scale,
        dispersive=config.train.dispersive_weight > 0,
        projector=projector_of(config),
    )
    initialize(model, config.run.seed)
    return model


def fresh_projector(config: Config) -> dict[str, Tensor]:
    """The weights of a new model's projector by logical name; none where it has none."""
    if (projector := projector_of(config)) is None:
        return {}
    state = new_projector(projector).state_dict()
    found = {f"{PROJECTOR}.{name}": value for name, value in state.items()}
    for name, value in found.items():
        initialize_tensor(name, value, config.run.seed)
    return found


def initialize(model: DiT, seed: int) -> None:
    """DiT's initialisation, each tensor (and each expert) from its own logical name: the same in
    any layout.

    Linears Xavier uniform with zero bias, embeddings N(0, 0.02), gates as ``moe.router_start``
    says, adaLN and output layers zero.
    """
    for name, value in logical_pieces(model):
        initialize_tensor(name, value, seed, _router_start(model.model, model.moe))


def _router_start(model: ModelConfig, moe: MoEConfig) -> str:
    return "prototype" if model.family == "prototype" else moe.router_start


def initialize_tensor(name: str, value: Tensor, seed: int, router_start: str = "normal") -> None:
    """Fills one tensor (of one expert) as a new model has it under this logical name."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    fresh = torch.empty(value.shape)
    leaf = name.rpartition(".")[2]
    if re.search(r"norm\d?\.weight$", name):
        fresh.fill_(1.0)
    elif "bias" in leaf or "adaLN_modulation" in name or name.startswith("final_layer.linear"):
        fresh.zero_()
    elif leaf == "router" and router_start == "uniform":
        bound = value.shape[1] ** -0.5
        fresh.uniform_(-bound, bound, generator=generator)
    elif leaf == "router":
        fresh.normal_(std=0.02 if router_start == "prototype" else 0.006, generator=generator)
    elif name.startswith(("t_embedder", "y_embedder")):
        fresh.normal_(std=0.02, generator=generator)
    else:  # Xavier over the matrix that the tensor is applied as
        fan_out, fan_in = value.shape[0], value[0].numel()
        bound = (6.0 / (fan_in + fan_out)) ** 0.5
        fresh.uniform_(-bound, bound, generator=generator)
    value.copy_(fresh)


@torch.no_grad()
def load_logical(model: DiT, tensors: Mapping[str, Tensor]) -> None:
    """Copies tensors by logical name into the model's own layout.

    Raises UserError naming tensors that are missing or misshaped.  Experts that live on other ranks
    are not missed, and thresholds may be absent (a model without a predictor) but then keep their
    start value.
    """
    missing, misshaped = [], []
    for name, target in logical_pieces(model):
        value = tensors.get(name)
        if value is None:
            missing.append(name)
        elif value.shape != target.shape:
            misshaped.append(f"{name} {tuple(value.shape)} instead of {tuple(target.shape)}")
        else:
            target.copy_(value)
    if missing or misshaped:
        raise UserError(
            f"weights do not fit the model: {some('missing', missing)}, "
            f"{some('misshaped', misshaped)}"
        )
    load_buffers(model, tensors)


@torch.no_grad()
def load_buffers(model: DiT, tensors: Mapping[str, Tensor]) -> None:
    """Copies the :func:`running_buffers` that are among the tensors."""
    for name, module in model.named_modules():
        if isinstance(module, RunningState):
            module.load(tensors, name)


def weights_digest(model: nn.Module) -> str:
    """`v2:` and the SHA-256 over names, shapes and all entries (as fp32) of every tensor, whatever
    its type and device: tells any two checkpoints apart. Reads each tensor in pieces: a second or
    two for a GB.
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if name.startswith(f"{PROJECTOR}."):
            continue  # of training alone: what is sampled from has none
        digest.update(f"{name} {tuple(value.shape)}\n".encode())
        for piece in value.detach().flatten().split(_HASHED_AT_ONCE):
            digest.update(piece.float().cpu().numpy())
    return f"{_HASH_VERSION}:{digest.hexdigest()}"


def digest_note(one: str | None, other: str | None) -> str:
    """What to add where two digests differ: whether one of them was made before they covered all
    weights; else nothing.
    """
    if any(digest and not digest.startswith(f"{_HASH_VERSION}:") for digest in (one, other)):
        return (
            f" (the one without {_HASH_VERSION} is of an earlier version, which hashed only a part "
            "of the weights: score them again)"
        )
    return ""


def some(what: str, names: Iterable[str]) -> str:
    """``5 entries (a, b, c, …)``."""
    names = list(map(str, names))
    shown = f" ({', '.join(names[:3])}{', …' * (len(names) > 3)})" if names else ""
    return f"{len(names)} {what}{shown}"
