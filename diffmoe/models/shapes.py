"""What the shapes of a research state dict say about the configuration that it needs."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

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
    needed = {**_sizes(shapes, model), **_mixture(shapes)}
    width = needed.get("model.width", model.width)
    needed |= _inner_widths(shapes, width, model, obstacles)
    have = {
        f"{section}.{name}": value
        for section, part in (("model", model), ("moe", moe))
        for name, value in vars(part).items()
    }
    if needed.get("model.family", model.family) == "dense":
        needed = {name: value for name, value in needed.items() if name.startswith("model.")}
    if "model.mlp_ratio" in needed and int(width * needed["model.mlp_ratio"]) == int(
        width * model.mlp_ratio
    ):
        del needed["model.mlp_ratio"]
    return [
        f"{name}={_text(value)}" for name, value in needed.items() if have[name] != value
    ], obstacles


def _sizes(shapes: Shapes, model: ModelConfig) -> dict[str, object]:
    needed: dict[str, object] = {}
    patches, table, last = (
        shapes.get(name, ())
        for name in (
            "x_embedder.proj.weight",
            "y_embedder.embedding_table.weight",
            "final_layer.linear.weight",
        )
    )
    blocks = [int(name.split(".")[1]) for name in shapes if re.match(r"blocks\.\d+\.", name)]
    if len(patches) == 4:
        needed |= {
            "model.width": patches[0],
            "model.channels": patches[1],
            "model.patch": patches[2],
        }
        if len(last) == 2:
            out = last[0] / patches[2] ** 2
            needed |= (
                {"model.learn_sigma": out == 2 * patches[1]}
                if out in (patches[1], 2 * patches[1])
                else {}
            )
    if blocks:
        needed["model.depth"] = max(blocks) + 1
    if len(table) == 2:
        needed["model.classes"] = table[0] - 1
    norm = next(
        (shape for name, shape in shapes.items() if name.endswith(".attn.q_norm.weight")), None
    )
    if shapes:
        needed["model.qk_norm"] = norm is not None
    if norm and "model.width" in needed and needed["model.width"] % norm[0] == 0:
        needed["model.heads"] = needed["model.width"] // norm[0]
    return needed


def _mixture(shapes: Shapes) -> dict[str, object]:
    routers = {
        name: shape
        for name, shape in shapes.items()
        if name.endswith((".mlp.gate_weight", ".mlp.gate.weight"))
    }
    if not routers:
        return (
            {"model.family": "dense"} if any(name.startswith("blocks.") for name in shapes) else {}
        )
    name, shape = next(iter(routers.items()))
    token_choice = name.endswith(".gate.weight")
    predicts = any(".mlp.capacity_predictor." in name for name in shapes)
    return {
        "model.family": "tc" if token_choice else "diffmoe" if predicts else "ec",
        "moe.experts": shape[0],
        "moe.interleave": "blocks.0." not in "".join(name[:9] for name in routers),
        "moe.activation": "swiglu"
        if any(".experts.0.gate_proj." in name for name in shapes)
        else "gelu",
    }


def _inner_widths(
    shapes: Shapes, width: int, model: ModelConfig, obstacles: list[str]
) -> dict[str, object]:
    """Widths of MLPs, experts and shared experts."""

    def rows(pattern: str) -> int | None:
        return next(
            (shape[0] for name, shape in shapes.items() if re.fullmatch(pattern, name)), None
        )

    needed: dict[str, object] = {}
    dense, gelu = (
        rows(r"blocks\.\d+\.mlp\.fc1\.weight"),
        rows(r"blocks\.\d+\.mlp\.experts\.0\.fc1\.weight"),
    )
    swiglu = rows(r"blocks\.\d+\.mlp\.experts\.0\.gate_proj\.weight")
    dense_swiglu = rows(r"blocks\.\d+\.mlp\.gate_proj\.weight")
    hidden = dense or gelu
    if dense_swiglu:
        obstacles.append(
            f"the file's dense MLPs are SwiGLU of inner width {dense_swiglu}, and those here are GELU MLPs"
        )
    if swiglu and dense and swiglu != swiglu_hidden(dense):
        obstacles.append(
            f"the file's SwiGLU experts have inner width {swiglu} beside MLPs of {dense}, and here 2/3 of it "
            f"({swiglu_hidden(dense)}): only files without dense MLPs (moe.interleave=false) may have the full width"
        )
    elif swiglu and not dense:
        hidden = next(
            (h for h in range(swiglu, 2 * swiglu) if swiglu_hidden(h) == swiglu and h % width == 0),
            next((h for h in range(swiglu, 2 * swiglu) if swiglu_hidden(h) == swiglu), None),
        )
        if swiglu_hidden(model.hidden) == swiglu and width == model.width:
            hidden = model.hidden
        if hidden is None:
            obstacles.append(
                f"the file's SwiGLU experts have inner width {swiglu}, which is no multiple of 8"
            )
    if dense and gelu and dense != gelu:
        obstacles.append(
            f"the file's experts have inner width {gelu} and its dense MLPs {dense}, which are one number here"
        )
    if hidden:
        needed["model.mlp_ratio"] = hidden / width
    shared = rows(r"blocks\.\d+\.mlp\.shared_experts\.fc1\.weight")
    if any(".mlp.shared_experts." in name for name in shapes) and shared is None:
        obstacles.append("the file's shared experts are no plain GELU MLP, as they are here")
    elif shared and hidden and shared % hidden:
        obstacles.append(
            f"the file's shared experts have inner width {shared}, which is no multiple of the MLP's ({hidden})"
        )
    elif hidden or shared is None:
        needed["moe.shared_experts"] = shared // hidden if shared else 0
    return needed


def _text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return repr(int(value)) if math.isclose(value, int(value)) else repr(value)
    return str(value)
