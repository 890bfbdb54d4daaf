"""The MoE layer: route, dispatch, experts, combine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor, nn

from diffmoe.config import ModelConfig, MoEConfig
from diffmoe.layout import rows_taken
from diffmoe.moe.capacity import CapacityPredictor, Thresholds, predictor_loss
from diffmoe.moe.dispatch import by_expert, combine, dispatch, make_plan
from diffmoe.moe.experts import Experts
from diffmoe.moe.gating import gate_scores
from diffmoe.moe.pool import choose
from diffmoe.moe.routing import (
    Routing, RoutingRule, balance_loss, choose_experts, choose_tokens, equal_routing, predicted_counts, predicted_tokens,
)
from diffmoe.parallel.collectives import sum_over
from diffmoe.parallel.groups import ParallelGroups


@dataclass(frozen=True)
class MoEStats:
    """What one layer reports about one forward pass; nothing is kept in the layer.

    ``predictor_loss`` and ``balance_loss`` carry gradients (None where the family has none, or at inference).
    ``threshold_sum_E`` is this rank's share of the sum over all pools.  ``tokens_BE``: tokens of each sample that each
    expert took.  ``mask_TE``, ``logits_TE``: the choice and the predictor's view of it."""

    tokens_BE: Tensor
    mask_TE: Tensor
    logits_TE: Optional[Tensor] = None
    predictor_loss: Optional[Tensor] = None
    balance_loss: Optional[Tensor] = None
    threshold_sum_E: Optional[Tensor] = None


@dataclass(frozen=True)
class _Route:
    routing: Routing
    scores_TE: Tensor
    stats: MoEStats


class MoELayer(nn.Module):
    """Mixture of experts for the families tc, ec and diffmoe.

    ``pool`` counts samples (resolved, see ``layout.resolve_layout``); this rank holds experts
    ``[ep.index * E / ep.size, …)``.  ``shared``: an MLP [T, D] -> [T, D] that every token goes through as well."""

    def __init__(self, model: ModelConfig, moe: MoEConfig, pool: int, groups: ParallelGroups,
                 shared: Optional[nn.Module] = None) -> None:
        super().__init__()
        local = moe.experts // groups.ep.size
        self.family, self.moe, self.pool, self.groups = model.family, moe, pool, groups
        self.router = nn.Parameter(torch.empty(moe.experts, model.width))
        self.experts = Experts(model.width, model.hidden, moe.experts, local, groups.ep.index * local, moe.activation)
        self.shared = shared
        if model.family == "diffmoe":
            self.capacity_predictor = CapacityPredictor(model.width, moe.experts)
            self.thresholds = Thresholds(moe.experts, moe.threshold_decay)

    @property
    def has_static_shapes(self) -> bool:
        """Whether every expert takes equally many rows in training, without asking the device or another rank."""
        return self.family != "tc" and self.groups.pool.size == 1 and self.groups.ep.size == 1

    def forward(self, x_BND: Tensor, rule: RoutingRule) -> tuple[Tensor, MoEStats]:
        """[B, N, D] -> [B, N, D] and the layer's report.  A token that no expert takes gets zero."""
        x_TD, ep, local = x_BND.flatten(0, 1), self.groups.ep, self.experts.local
        route = self._route(x_TD, x_BND.shape[0], rule)
        plan = make_plan(route.routing, ep)
        coming_SD = dispatch(x_TD, plan, ep)
        shared_TD = None if self.shared is None else self.shared(x_TD)  # while rows travel
        rows_SD = self.experts(by_expert(coming_SD, plan, ep, local), plan.counts)
        y_TD = combine(rows_SD, route.scores_TE, plan, ep, local)
        if shared_TD is not None:
            y_TD = y_TD + shared_TD
        return y_TD.view_as(x_BND), route.stats

    def _route(self, x_TD: Tensor, samples: int, rule: RoutingRule) -> _Route:
        scores = gate_scores(x_TD, self.router)
        logits = self.capacity_predictor(x_TD) if self.family == "diffmoe" else None
        tokens = len(x_TD) // samples
        pool_tokens = self.pool * tokens
        observed = predicted = balance = None
        if self.family == "tc":
            mask = choose_experts(scores, self.moe.top_k)
            routing = Routing(mask, rows=len(x_TD) * self.moe.top_k)
            balance = self._balance(scores, mask, tokens, samples)
        elif self.family == "ec" or rule.kind == "train":
            choice = choose(scores, logits, pool_tokens, rule.capacity, self.groups)
            routing, observed = choice.routing, choice.threshold_sum_E
            predicted = None if logits is None else predictor_loss(logits, routing.mask_TE)
        elif rule.kind == "static":
            K = rows_taken(len(x_TD), self.moe.experts, rule.capacity)
            routing = equal_routing(choose_tokens(scores, len(x_TD), K), len(x_TD))
        else:
            threshold = self.thresholds.chosen(rule.gamma, rule.dial)
            routing = Routing(predicted_counts(scores, logits, threshold) if rule.kind == "batch"
                              else predicted_tokens(logits, threshold))
        mask = routing.mask_TE
        tokens_BE = mask.view(samples, tokens, -1).sum(dim=1)
        return _Route(routing, scores, MoEStats(tokens_BE, mask, logits, predicted, balance, observed))

    def _balance(self, scores_TE: Tensor, mask_TE: Tensor, tokens: int, samples: int) -> Optional[Tensor]:
        """Balance loss over pools: counts are summed over the ranks of a pool, each rank keeps its tokens' share.

        Samples are taken in runs that divide both the pool and this rank's batch, each of which is in one pool."""
        if not torch.is_grad_enabled():
            return None
        run = math.gcd(self.pool, samples)
        counts = mask_TE.view(samples // run, run * tokens, -1).sum(dim=1)
        first = self.groups.pool.index * samples
        pool_of_run = (first + torch.arange(0, samples, run, device=counts.device)) // self.pool
        pools = max(1, samples * self.groups.pool.size // self.pool)
        per_pool = counts.new_zeros(pools, counts.shape[1]).index_add(0, pool_of_run, counts)
        return balance_loss(scores_TE, sum_over(per_pool, self.groups.pool)[pool_of_run], self.pool * tokens,
                            self.moe.top_k)
