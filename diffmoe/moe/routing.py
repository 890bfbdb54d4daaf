"""Who takes which token: pure functions of scores, without communication.

Shapes: T tokens, E experts, P tokens of a pool, K rows an expert takes per pool, R rows in all.
Scores are fp32 softmax values (fp64 in an fp64 model).  Ties go to the lower number, whatever
kernel, layout or recompute asks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class RoutingRule:
    """What the caller asks of every MoE layer in this forward pass.

    ``train``: exact choice over the pool at ``capacity``.  ``batch``: the paper's inference rule
    (equation 16: as many tokens as the predictor marks, but those with the highest gate in this
    rank's batch).  ``token``: the tokens that the predictor marks, which no batch-mate can change.
    ``static``: the paper's static top-k at inference, exact choice over this rank's batch at
    ``capacity``.  ``gamma`` replaces the learned thresholds by one constant, ``dial`` by those for
    that capacity.
    """

    kind: Literal["train", "batch", "token", "static"] = "train"
    capacity: float = 1.0
    gamma: float | None = None
    dial: float | None = None


@dataclass(frozen=True)
class Routing:
    """Which experts take which of this rank's tokens: ``mask_TE``, and what is known of it without
    asking the device.

    ``tokens_EK``: each expert's tokens, ascending, where all experts take equally many here.
    ``rows``: how many it says yes to.  ``received_re``: [EP ranks, local experts] rows that each
    rank will send here; ``each``: rows that each local expert will get from all of them together.
    None: not known.
    """

    mask_TE: Tensor
    tokens_EK: Tensor | None = None
    rows: int | None = None
    received_re: Tensor | None = None
    each: int | None = None


def ranking_keys(scores: Tensor, dim: int) -> Tensor:
    """int64 keys that order scores >= 0 along ``dim``, ties by lower place: unique, so that top-k
    has one answer.

    A non-negative float's bits grow with its value; the place fills the low half."""
    bits = scores.detach().float().contiguous().view(torch.int32).long()
    shape = [1] * scores.dim()
    shape[dim] = scores.shape[dim]
    place = torch.arange(scores.shape[dim], device=scores.device).view(shape)
    return (bits << 32) | (0x7FFFFFFF - place)


def choose_tokens(scores_TE: Tensor, pool_tokens: int, K: int) -> Tensor:
    """Expert choice: each expert takes its K best tokens of each pool of ``pool_tokens``
    consecutive tokens.

    Returns token numbers [E, pools * K], ascending."""
    T, E = scores_TE.shape
    keys = ranking_keys(scores_TE.view(T // pool_tokens, pool_tokens, E), dim=1)
    best = keys.transpose(1, 2).topk(K, dim=2, sorted=False).indices
    chosen = best.sort(dim=2).values  # [pools, E, K]
    starts = torch.arange(0, T, pool_tokens, device=scores_TE.device).view(-1, 1, 1)
    return (chosen + starts).transpose(0, 1).reshape(E, -1)


def pool_thresholds(logits_TE: Tensor, pool_tokens: int, K: int) -> Tensor:
    """The K-th largest sigmoid of each pool [pools, E]: the threshold that lets about K tokens
    pass.
    """
    T, E = logits_TE.shape
    pools = logits_TE.detach().view(T // pool_tokens, pool_tokens, E).transpose(1, 2)
    # Not kthvalue: twice the time on a CPU, and on CUDA one block of threads for each expert (topk:
    # many).
    return pools.topk(K, dim=2, sorted=False).values.amin(dim=2).sigmoid()


def equal_routing(tokens_EK: Tensor, T: int) -> Routing:
    """[E, K] token numbers, ascending, of ``T`` tokens; shapes are static."""
    return Routing(mask_of(tokens_EK, T), tokens_EK=tokens_EK)


def mask_of(tokens_EK: Tensor, T: int) -> Tensor:
    """[E, K] token numbers -> [T, E] boolean mask."""
    mask_ET = torch.zeros(tokens_EK.shape[0], T, dtype=torch.bool, device=tokens_EK.device)
    return mask_ET.scatter_(1, tokens_EK, True).t()


def choose_experts(scores_TE: Tensor, top_k: int) -> Tensor:
    """Token choice: each token takes its ``top_k`` best experts; mask [T, E]."""
    chosen = ranking_keys(scores_TE, dim=1).topk(top_k, dim=1).indices
    return torch.zeros_like(scores_TE, dtype=torch.bool).scatter_(1, chosen, True)


def predicted_counts(scores_TE: Tensor, logits_TE: Tensor, threshold_E: Tensor) -> Tensor:
    """The paper's inference rule (equations 14-16) over these tokens; mask [T, E]."""
    count_E = (logits_TE.sigmoid() > threshold_E).sum(dim=0)
    order = ranking_keys(scores_TE, dim=0).argsort(dim=0, descending=True)
    place = torch.arange(order.shape[0], device=order.device).unsqueeze(1)
    return torch.zeros_like(order, dtype=torch.bool).scatter_(0, order, place < count_E)


def balance_loss(scores_TE: Tensor, counts_pE: Tensor, pool_tokens: int, top_k: int) -> Tensor:
    """Token choice's balance loss, sum_i f_i P_i (Switch, equation 4, with f_i = 1 when balanced),
    this rank's share.

    ``counts_pE``: each expert's tokens in the pool of every token run, [parts of a pool here, E],
    summed over the ranks of the pool; scores are split in the same parts.  The mean over ranks is
    the mean over pools.
    """
    parts, E = counts_pE.shape
    share = counts_pE.to(scores_TE.dtype) * E / (pool_tokens * top_k)
    return (scores_TE.view(parts, -1, E).mean(dim=1) * share).sum(dim=1).mean()
