"""What the shapes of a research state dict say about the configuration that it needs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from diffmoe.config import ModelConfig, MoEConfig, swiglu_hidden

Shapes = Mapping[str, tuple[int, ...]]


def differing_settings(
    state: Mapping[str, Tensor], model: ModelConfig, moe: MoEConfig
) -> tuple[list[str], list[str]]:
    """(settings such as ``model.width=384`` that the file needs and the configuration has not, what
    no setting can fit).
    """
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    obstacles: list[str] = []
    needed = {**_sizes(shapes), **_moe(shapes)}
    width = needed.get("model.width", model.width)
    needed |= _inner_widths(shapes, width, model, obstacles)
    if needed.get("model.family", model.family) == "dense":
        needed = {name: value for name, value in needed.items() if name.startswith("model.")}
    ratio = needed.get("model.mlp_ratio")
    if ratio is not None and int(width * ratio) == int(width * model.mlp_ratio):
        del needed["model.mlp_ratio"]
    have = {f"model.{name}": value for name, value in vars(model).items()}
    have |= {f"moe.{name}": value for name, value in vars(moe).items()}
    settings = [f"{n}={_text(value)}" for n, value in needed.items() if have[n] != value]
    return settings, obstacles


def _first(shapes: Shapes, pattern: str) -> tuple[int, ...]:
    """The shape of the first tensor of such a name; () where there is none."""
    return next((shape for name, shape in shapes.items() if re.fullmatch(pattern, name)), ())


def _sizes(shapes: Shapes) -> dict[str, Any]:
    needed: dict[str, Any] = {}
    patches = shapes.get("x_embedder.proj.weight", ())
    table = shapes.get("y_embedder.embedding_table.weight", ())
    last = shapes.get("final_layer.linear.weight", ())
    blocks = [int(name.split(".")[1]) for name in shapes if re.match(r"blocks\.\d+\.", name)]
    norm = _first(shapes, r".*\.attn\.q_norm\.weight")
    rope = shapes.get("feat_rope.freqs_cos", ())
    if len(patches) == 4:
        width, channels, patch = patches[:3]
        needed |= {"model.width": width, "model.channels": channels, "model.patch": patch}
        if len(last) == 2 and last[0] in (channels * patch**2, 2 * channels * patch**2):
            needed["model.learn_sigma"] = last[0] == 2 * channels * patch**2
    if blocks:
        needed["model.depth"] = max(blocks) + 1
    if len(table) == 2:
        needed["model.classes"] = table[0] - 1
    if shapes:
        needed["model.qk_norm"] = bool(norm)
        needed["model.positions"] = "rope" if rope else "sincos"
        needed["model.norm"] = "rms" if _first(shapes, r".*\.norm1\.weight") else "layer"
        swiglu = _first(shapes, r".*\.mlp\.w12\..*")
        needed["model.activation"] = "swiglu_bias" if swiglu else "gelu"
    head = (norm or rope or (0,))[-1]
    if head and "model.width" in needed and needed["model.width"] % head == 0:
        needed["model.heads"] = needed["model.width"] // head
    return needed


def _moe(shapes: Shapes) -> dict[str, Any]:
    routers = [
        name
        for name in shapes
        if re.search(r"\.mlp\.(gate_weight|gate\.weight|cluster_centers)$", name)
    ]
    if not routers:
        blocks = any(name.startswith("blocks.") for name in shapes)
        return {"model.family": "dense"} if blocks else {}
    family, experts = "ec", shapes[routers[0]][0]
    if routers[0].endswith(".gate.weight"):
        family = "tc"
    elif routers[0].endswith(".cluster_centers"):
        family, experts = "prototype", experts + 1  # the null class's has no prototype
    elif any(".mlp.capacity_predictor." in name for name in shapes):
        family = "diffmoe"
    swiglu = any(".experts.0.gate_proj." in name for name in shapes)
    return {
        "model.family": family,
        "moe.experts": experts,
        "moe.interleave": not any(name.startswith("blocks.0.") for name in routers),
        "moe.activation": "swiglu" if swiglu else "gelu",
    }


def _inner_widths(
    shapes: Shapes, width: int, model: ModelConfig, obstacles: list[str]
) -> dict[str, Any]:
    """Widths of MLPs, experts and shared experts."""

    def rows(name: str) -> int | None:
        shape = _first(shapes, rf"blocks\.\d+\.mlp\.{name}\.weight")
        return shape[0] if shape else None

    needed: dict[str, Any] = {}
    dense, swiglu = rows("fc1"), rows(r"experts\.0\.gate_proj") or (rows("w12") or 0) // 2
    expert = rows(r"experts\.0\.fc1") or rows(r"experts\.0\.up_proj")
    if dense_swiglu := rows("gate_proj"):
        obstacles.append(
            f"the file's dense MLPs are SwiGLU of inner width {dense_swiglu}, and those that are "
            "read are GELU MLPs"
        )
    if swiglu:
        fitting = [h for h in range(swiglu, 2 * swiglu) if swiglu_hidden(h) == swiglu]
        likely = [
            h for h in (dense, model.hidden if width == model.width else None) if h in fitting
        ]
        whole = [h for h in fitting if h % width == 0]
        expert = next(iter([*likely, *whole, *fitting]), None)
        if expert is None:
            obstacles.append(
                f"the file's SwiGLU has inner width {swiglu}, which is not a multiple of 8"
            )
    hidden = dense or expert
    if hidden:
        needed["model.mlp_ratio"] = hidden / width
    if expert and expert != hidden:
        needed["moe.mlp_ratio"] = expert / width
    elif expert:
        needed["moe.mlp_ratio"] = None
    shared = rows(r"shared_experts\.fc1") or rows(r"shared_expert\.up_proj")
    if any(".mlp.shared_expert" in name for name in shapes) and shared is None:
        obstacles.append("the file's shared experts are not a plain GELU MLP, as they are here")
    elif shared and expert and shared % expert:
        obstacles.append(
            f"the file's shared experts have inner width {shared}, which is not a multiple of an "
            f"expert's ({expert})"
        )
    elif shared and expert:
        needed["moe.shared_experts"] = shared // expert
    elif shared is None:
        needed["moe.shared_experts"] = 0
    return needed


def _text(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)
