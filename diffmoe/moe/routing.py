"""Who takes which token: pure functions of scores, without communication.

Shapes: T tokens, E experts, P tokens of a pool, K rows an expert takes per pool, R rows in all.
Scores are fp32 (fp64 in an fp64 model).  Ties go to the lower number, whatever
kernel, layout or recompute asks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class RoutingRule:
    """What the caller asks of every MoE layer in this forward pass.

    ``train``: exact choice over the pool at ``capacity``.  ``threshold``: training by thresholds
    (``moe.threshold_from``).  ``batch``: the paper's inference rule
    (equation 16: as many tokens as the predictor marks, but those with the highest gate in this
    rank's batch).  ``token``: the tokens that the predictor marks, which no batch-mate can change.
    ``static``: the paper's static top-k at inference, exact choice over this rank's batch at
    ``capacity``.  ``gamma`` replaces the learned thresholds by one constant, ``dial`` by those for
    that capacity.
    """

    kind: Literal["train", "threshold", "batch", "token", "static"] = "train"
    capacity: float = 1.0
    gamma: float | None = None
    dial: float | None = None


@dataclass(frozen=True)
class Routing:
    """Which experts take which of this rank's tokens: ``mask_TE``, and what is known of it without
    asking the device.

    ``tokens_EK``: each expert's tokens, ascending, where all experts take equally many here.
    ``rows``: how many it says yes to.  ``coming_rTe``: [EP ranks, their T, local experts] what each
    rank will send here; ``passing_rTe``: what others will send each other through here (see
    ``collectives.send_rows``), where the exchange has two levels; ``each``: rows that each local
    expert will get from all of them together.  None: not known.
    """

    mask_TE: Tensor
    tokens_EK: Tensor | None = None
    rows: int | None = None
    coming_rTe: Tensor | None = None
    passing_rTe: Tensor | None = None
    each: int | None = None


def ranking_keys(scores: Tensor, dim: int) -> Tensor:
    """int64 keys that order scores along ``dim``, ties by lower place: unique, so that top-k has
    one answer.

    A non-negative float's bits grow with its value, a negative one's fall; the place fills the low
    half."""
    bits = (scores.detach().float() + 0.0).contiguous().view(torch.int32)  # of -0.0 as of 0.0
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
    shape = [1] * scores.dim()
    shape[dim] = scores.shape[dim]
    place = torch.arange(scores.shape[dim], device=scores.device).view(shape)
    return (ordered << 32) | (0x7FFFFFFF - place)


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


def pool_thresholds(values_TE: Tensor, pool_tokens: int, K: int) -> Tensor:
    """The K-th largest value of each pool [pools, E]: a threshold that lets about K tokens pass."""
    T, E = values_TE.shape
    pools = values_TE.detach().view(T // pool_tokens, pool_tokens, E).transpose(1, 2)
    # Not kthvalue: twice the time on a CPU, and on CUDA one block of threads for each expert (topk:
    # many).
    return pools.topk(K, dim=2, sorted=False).values.amin(dim=2)


def equal_routing(tokens_EK: Tensor, T: int) -> Routing:
    """[E, K] token numbers, ascending, of ``T`` tokens; shapes are static."""
    return Routing(mask_of(tokens_EK, T), tokens_EK=tokens_EK)


def mask_of(tokens_EK: Tensor, T: int) -> Tensor:
    """[E, K] token numbers -> [T, E] boolean mask."""
    mask_ET = torch.zeros(tokens_EK.shape[0], T, dtype=torch.bool, device=tokens_EK.device)
    return mask_ET.scatter_(1, tokens_EK, True).t()


def choose_experts(
    scores_TE: Tensor,
    top_k: int,
    bias_E: Tensor | None = None,
    groups: int = 1,
    top_groups: int = 1,
) -> Tensor:
    """Token choice: each token takes its ``top_k`` best experts; mask [T, E].

    ``bias_E`` is added to what is compared.  Of ``groups`` of consecutive experts only those in the
    token's ``top_groups`` best can be taken; a group counts as much as its two best experts
    together (DeepSeek-V3, 2.1.2)."""
    ranked_TE = scores_TE.detach() if bias_E is None else scores_TE.detach() + bias_E
    if top_groups < groups:
        grouped = ranked_TE.view(len(ranked_TE), groups, -1)
        worth = grouped.topk(min(2, grouped.shape[2]), dim=2).values.sum(dim=2)
        left_out = ~_best(worth, top_groups).unsqueeze(2)
        ranked_TE = grouped.masked_fill(left_out, -torch.inf).view_as(ranked_TE)
    return _best(ranked_TE, top_k)


def _best(values_TE: Tensor, k: int) -> Tensor:
    """The k largest of every row, as a mask."""
    chosen = ranking_keys(values_TE, dim=1).topk(k, dim=1).indices
    return torch.zeros_like(values_TE, dtype=torch.bool).scatter_(1, chosen, True)


def choose_pairs(scores_TE: Tensor, pool_tokens: int, K: int) -> tuple[Tensor, Tensor]:
    """Expert Race: the K best (token, expert) pairs of each pool of ``pool_tokens`` consecutive
    tokens (equation 4).

    Returns the mask [T, E] and every pool's lowest score among them [pools]."""
    pools = scores_TE.detach().view(len(scores_TE) // pool_tokens, -1)
    chosen = ranking_keys(pools, dim=1).topk(K, dim=1, sorted=False).indices
    mask = torch.zeros_like(pools, dtype=torch.bool).scatter_(1, chosen, True)
    return mask.view_as(scores_TE), pools.gather(1, chosen).amin(dim=1)


def choose_prototypes(scores_TE: Tensor, null_T: Tensor, top_k: int) -> Tensor:
    """ProMoE: a token of the null class takes the last expert, any other its ``top_k`` best of
    those before; mask [T, E].
    """
    others = F.pad(_best(scores_TE[:, :-1], top_k), (0, 1))
    last = torch.arange(scores_TE.shape[1], device=scores_TE.device) == scores_TE.shape[1] - 1
    return torch.where(null_T.unsqueeze(1), last, others)


def gates(scores_TE: Tensor, mask_TE: Tensor, normalized: bool, scale: float) -> Tensor:
    """What scales the experts' outputs [T, E]: the scores, ``normalized`` so that those of a
    token's experts sum to 1, times ``scale``.
    """
    if normalized:
        met = (scores_TE * mask_TE).sum(dim=1, keepdim=True)
        scores_TE = scores_TE / (met + 1e-12)  # a token may meet no expert
    return scores_TE if scale == 1 else scores_TE * scale


def predicted_counts(scores_TE: Tensor, passing_TE: Tensor) -> Tensor:
    """The paper's inference rule (equations 14-16) over these tokens: as many as pass, those with
    the highest scores; mask [T, E].
    """
    count_E = passing_TE.sum(dim=0)
    order = ranking_keys(scores_TE, dim=0).argsort(dim=0, descending=True)
    place = torch.arange(order.shape[0], device=order.device).unsqueeze(1)
    return torch.zeros_like(order, dtype=torch.bool).scatter_(0, order, place < count_E)
