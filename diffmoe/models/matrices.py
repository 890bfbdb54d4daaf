"""The matrices that Muon orthogonalizes, by name.  No torch here: the planner counts them too."""

from __future__ import annotations

import re

MUON = "muon"  # train.optimizer
_QKV = re.compile(r"blocks\.\d+\.attn\.qkv\.weight")
_OTHERS = re.compile(
    r"blocks\.\d+\.(attn\.proj\.weight|mlp\.(shared\.)?(fc[12]|gate)\.weight"
    r"|mlp\.experts\.(\d+\.)?(fc1|fc2|gate)_weight)"
)


def is_matrix(name: str) -> bool:
    """Whether a tensor, by its name in the model or its logical name, is Muon's: attention's and
    the MLPs' weights.  Embeddings, modulation (adaLN), routers, capacity predictors, the final
    layer, biases and norms are AdamW's, as K. Jordan (2024) has inputs, outputs and vectors.
    """
    return bool(_QKV.fullmatch(name) or _OTHERS.fullmatch(name))


def stacked(name: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(n, rows, columns) of such a tensor as a stack of matrices, each orthogonalized by itself:
    every expert's, and q's, k's and v's, which share a tensor only for speed.
    """
    if len(shape) == 3:
        return shape[0], shape[1], shape[2]
    rows, columns = shape
    parts = 3 if _QKV.fullmatch(name) else 1
    return parts, rows // parts, columns
