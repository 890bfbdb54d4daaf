"""What keeps experts in use and apart: losses on routing, and the bias that follows the load.

Losses take sums over whole pools (:func:`diffmoe.moe.pool.sum_by_pool`) and are means over pools.
p pools, E experts, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from diffmoe.moe.running import RunningState


class LoadBias(RunningState):
    """Added to scores where experts are chosen, and nowhere else: up for an expert with fewer
    tokens than the mean, down for one with more, always by ``rate`` (DeepSeek-V3, 2.1.2; Wang et
    al. 2024, algorithm 1).
    """

    value: Tensor

    def __init__(self, experts: int, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.register_buffer("value", torch.zeros(experts))

    @torch.no_grad()
    def commit(self, counts_E: Tensor) -> None:
        """Takes one step's tokens of each expert [E], over all ranks and micro-batches."""
        mean_minus_count = counts_E.sum() - len(counts_E) * counts_E  # times E: whole numbers
        self.value.add_(mean_minus_count.sign().to(self.value.dtype), alpha=self.rate)


def balance_loss(scores_pE: Tensor, counts_pE: Tensor, pool_tokens: int, top_k: int) -> Tensor:
    """Token choice's balance loss, sum_i f_i P_i (Switch, equation 4, with f_i = 1 when balanced),
    from a pool's sums of scores and of tokens taken.
    """
    share = counts_pE.to(scores_pE.dtype) * scores_pE.shape[1] / (pool_tokens * top_k)
    return (scores_pE / pool_tokens * share).sum(dim=1).mean()


def similarity_loss(scores_pEE: Tensor, taken_pEE: Tensor, pool_tokens: int) -> Tensor:
    """Expert Race's router similarity (equations 9-11) from a pool's sums of P^T P, softmax scores,
    and of M^T M, tokens that both experts took.  1 when balanced.

    The diagonal, which is a balance loss, and the rest, which keeps experts from being taken
    together, are weighted by how the tokens are spread over each.
    """
    E = scores_pEE.shape[1]
    diagonal = torch.eye(E, dtype=torch.bool, device=scores_pEE.device)
    taken, weight = taken_pEE.to(scores_pEE.dtype), torch.zeros_like(scores_pEE)
    for part, entries in ((diagonal, E), (~diagonal, E * E - E)):
        here = taken * part
        total = here.sum(dim=(1, 2), keepdim=True)
        weight = weight + entries * here / total.clamp_min(1)  # no token with two experts: 0
    return (weight * scores_pEE).sum(dim=(1, 2)).mean() / pool_tokens


def contrastive_loss(
    sums_pED: Tensor, counts_pE: Tensor, prototypes_ED: Tensor, temperature: float
) -> Tensor:
    """ProMoE's routing contrastive loss: each prototype should point to the mean of its own tokens
    and away from the others' means, from a pool's sums of tokens by expert.

    Experts without a token in the pool are left out; with fewer than two others a pool counts 0.
    """
    present_pE = counts_pE > 0
    towards = F.normalize(prototypes_ED.to(sums_pED.dtype), dim=1)
    means_pED = F.normalize(sums_pED, dim=2)  # of a mean and of a sum alike
    logits_pEE = torch.einsum("ed,pfd->pef", towards, means_pED) / temperature
    logits_pEE = logits_pEE.masked_fill(~present_pE.unsqueeze(1), -torch.inf)
    # In rows of absent experts nothing may be infinite or NaN, also where their gradient is 0.
    logits_pEE = torch.where(present_pE.unsqueeze(2), logits_pEE, 0.0)
    own = torch.diagonal(logits_pEE, dim1=1, dim2=2)
    each_pE = torch.where(present_pE, logits_pEE.logsumexp(dim=2) - own, 0.0)
    number_p = present_pE.sum(dim=1)
    loss_p = each_pE.sum(dim=1) / number_p.clamp_min(1)
    return torch.where(number_p > 1, loss_p, 0.0).mean()
