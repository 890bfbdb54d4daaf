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
    if norm and "model.width" in needed and needed["model.width"] % norm[0] == 0:
        needed["model.heads"] = needed["model.width"] // norm[0]
    return needed


def _moe(shapes: Shapes) -> dict[str, Any]:
    routers = [name for name in shapes if name.endswith((".mlp.gate_weight", ".mlp.gate.weight"))]
    if not routers:
        blocks = any(name.startswith("blocks.") for name in shapes)
        return {"model.family": "dense"} if blocks else {}
    family = "ec"
    if routers[0].endswith(".gate.weight"):
        family = "tc"
    elif any(".mlp.capacity_predictor." in name for name in shapes):
        family = "diffmoe"
    swiglu = any(".experts.0.gate_proj." in name for name in shapes)
    return {
        "model.family": family,
        "moe.experts": shapes[routers[0]][0],
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
    dense, gelu = rows("fc1"), rows(r"experts\.0\.fc1")
    swiglu, dense_swiglu = rows(r"experts\.0\.gate_proj"), rows("gate_proj")
    hidden = dense or gelu
    if dense_swiglu:
        obstacles.append(
            f"the file's dense MLPs are SwiGLU of inner width {dense_swiglu}, and those here are "
            "GELU MLPs"
        )
    if swiglu and dense and swiglu != swiglu_hidden(dense):
        obstacles.append(
            f"the file's SwiGLU experts have inner width {swiglu} beside MLPs of {dense}, "
            f"and here 2/3 of it ({swiglu_hidden(dense)}): only files without dense MLPs "
            "(moe.interleave=false) may have the full width"
        )
    elif swiglu and not dense:
        fitting = [h for h in range(swiglu, 2 * swiglu) if swiglu_hidden(h) == swiglu]
        whole = [h for h in fitting if h % width == 0]
        hidden = next(iter([*whole, *fitting]), None)
        if swiglu_hidden(model.hidden) == swiglu and width == model.width:
            hidden = model.hidden
        if hidden is None:
            obstacles.append(
                f"the file's SwiGLU experts have inner width {swiglu}, which is not a multiple of 8"
            )
    if dense and gelu and dense != gelu:
        obstacles.append(
            f"the file's experts have inner width {gelu} and its dense MLPs {dense}, which are one "
            "number here"
        )
    if hidden:
        needed["model.mlp_ratio"] = hidden / width
    shared = rows(r"shared_experts\.fc1")
    if any(".mlp.shared_experts." in name for name in shapes) and shared is None:
        obstacles.append("the file's shared experts are not a plain GELU MLP, as they are here")
    elif shared and hidden and shared % hidden:
        obstacles.append(
            f"the file's shared experts have inner width {shared}, which is not a multiple of the "
            f"MLP's ({hidden})"
        )
    elif shared and hidden:
        needed["moe.shared_experts"] = shared // hidden
    elif shared is None:
        needed["moe.shared_experts"] = 0
    return needed


def _text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)
