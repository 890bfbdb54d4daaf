"""The matrices that Muon orthogonalizes, by name.  No torch here: the planner counts them too."""

from __future__ import annotations

import re

MUON = "muon"  # train.optimizer
_MATRICES = re.compile(
    r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(shared\.)?(fc[12]|gate)|mlp\.experts\.(fc[12]|gate))"
    r"[._]weight"
)


def is_matrix(name: str) -> bool:
    """Whether a parameter is Muon's: weights of attention and MLPs.  Embeddings, modulation
    (adaLN), routers, predictors, the final layer, biases and norms are AdamW's.
    """
    return _MATRICES.fullmatch(re.sub(r"experts\.\d+", "experts", name)) is not None


def matrices_in(name: str, experts: int = 1) -> int:
    """How many matrices lie in such a parameter, each orthogonalized by itself: ``experts``, or
    q's, k's and v's, which share one for speed only.
    """
    return 3 if ".qkv." in name else experts
