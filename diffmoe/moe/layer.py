"""The MoE layer: route, dispatch, experts, combine."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffmoe.config import ModelConfig, MoEConfig
from diffmoe.layout import rows_taken
from diffmoe.moe.capacity import CapacityPredictor, Thresholds, predictor_loss
from diffmoe.moe.dispatch import Plan, by_expert, by_source, combine, dispatch, make_plan
from diffmoe.moe.experts import Experts, has_grouped_matmul
from diffmoe.moe.gating import gate_scores
from diffmoe.moe.pool import choose
from diffmoe.moe.routing import (
    Routing,
    RoutingRule,
    balance_loss,
    choose_experts,
    choose_tokens,
    equal_routing,
    predicted_counts,
)
from diffmoe.parallel.collectives import arrived, send_rows, sum_over
from diffmoe.parallel.groups import ParallelGroups
from diffmoe.parallel.recompute import Run, at_once


@dataclass(frozen=True)
class MoEStats:
    """What one layer reports about one forward pass; nothing is kept in the layer.

    ``predictor_loss`` and ``balance_loss`` carry gradients (None where the family has none, or at
    inference). ``threshold_sum_E`` is this rank's share of the sum over all pools.  ``tokens_BE``:
    tokens of each sample that each expert took.  ``mask_TE``, ``logits_TE``: the choice and the
    predictor's view of it.
    """

    tokens_BE: Tensor
    mask_TE: Tensor
    logits_TE: Tensor | None = None
    predictor_loss: Tensor | None = None
    balance_loss: Tensor | None = None
    threshold_sum_E: Tensor | None = None


class MoELayer(nn.Module):
    """An MoE layer of the families tc, ec and diffmoe.

    ``pool`` counts samples (resolved, see ``layout.resolve_layout``); this rank holds experts
    ``[ep.index * E / ep.size, …)``.  ``shared``: an MLP [T, D] -> [T, D] that every token goes
    through as well.
    """

    def __init__(
        self,
        model: ModelConfig,
        moe: MoEConfig,
        pool: int,
        groups: ParallelGroups,
        shared: nn.Module | None = None,
    ) -> None:
        super().__init__()
        local = moe.experts // groups.ep.size
        self.family, self.moe, self.pool, self.groups = model.family, moe, pool, groups
        self.router = nn.Parameter(torch.empty(moe.experts, model.width))
        self.experts = Experts(
            model.width, model.hidden, moe.experts, local, groups.ep.index * local, moe.activation
        )
        self.shared = shared
        if model.family == "diffmoe":
            self.capacity_predictor = CapacityPredictor(model.width, moe.experts)
            self.thresholds = Thresholds(moe.experts, moe.threshold_decay)

    def has_static_shapes(self, rule: RoutingRule) -> bool:
        """Whether no shape here depends on what the device or another rank would have to be asked
        for under ``rule``.
        """
        if self.groups.ep.size > 1 or self.groups.pool.size > 1 and rule.kind != "static":
            return False
        if self.family == "tc":
            return has_grouped_matmul(self.router.device, self.router.dtype)
        return self.family == "ec" or rule.kind in ("train", "static")

    def forward(
        self, x_BND: Tensor, rule: RoutingRule, run: Run = at_once
    ) -> tuple[Tensor, MoEStats]:
        """[B, N, D] -> [B, N, D] and the report.  A token that no expert takes gets zero."""
        x_TD, ep = x_BND.flatten(0, 1), self.groups.ep
        scores_TE, logits_TE = run(self._look, x_TD)
        routing, stats = self._route(scores_TE, logits_TE, len(x_BND), rule)
        plan = make_plan(routing, ep)
        coming_SD = dispatch(x_TD, plan, ep)
        shared_TD = None if self.shared is None else run(self.shared, x_TD)  # while rows travel
        eager = self._loops(plan)
        rows_SD = arrived(coming_SD)
        rows_SD = run(self._compute, rows_SD, plan, ragged=plan.ragged, traceable=not eager)
        coming_RD = send_rows(rows_SD, plan.receive, plan.send, ep)
        y_TD = run(combine, arrived(coming_RD), scores_TE, plan, shared_TD, ragged=plan.ragged)
        return y_TD.view_as(x_BND), stats

    def _look(self, x_TD: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gate scores and the predictor's logits, [T, E] both."""
        logits = self.capacity_predictor(x_TD) if self.family == "diffmoe" else None
        return gate_scores(x_TD, self.router), logits

    def _compute(self, rows_SD: Tensor, plan: Plan) -> Tensor:
        """Rows grouped by source rank through their experts, and grouped so again."""
        ranks, local = self.groups.ep.size, self.experts.local
        outputs = self.experts(by_expert(rows_SD, plan, ranks, local), plan.counts)
        return by_source(outputs, plan, ranks, local)

    def _loops(self, plan: Plan) -> bool:
        """Whether experts are a loop of the host's."""
        if isinstance(plan.counts, int):  # no graph asks what device there is
            return False
        return not has_grouped_matmul(self.router.device, self.router.dtype)

    def _route(
        self, scores: Tensor, logits: Tensor | None, samples: int, rule: RoutingRule
    ) -> tuple[Routing, MoEStats]:
        tokens = len(scores) // samples
        pool_tokens = self.pool * tokens
        observed = predicted = balance = None
        if self.family == "tc":
            mask = choose_experts(scores, self.moe.top_k)
            routing = Routing(mask, rows=len(scores) * self.moe.top_k)
            balance = self._balance(scores, mask, tokens, samples)
        elif self.family == "ec" or rule.kind == "train":
            routing, observed = choose(scores, logits, pool_tokens, rule.capacity, self.groups)
            predicted = None if logits is None else predictor_loss(logits, routing.mask_TE)
        elif rule.kind == "static":
            K = rows_taken(len(scores), self.moe.experts, rule.capacity)
            routing = equal_routing(choose_tokens(scores, len(scores), K), len(scores))
        else:
            assert logits is not None  # the family is diffmoe
            threshold = self.thresholds.chosen(rule.gamma, rule.dial)
            if rule.kind == "batch":
                routing = Routing(predicted_counts(scores, logits, threshold))
            else:
                routing = Routing(logits.sigmoid() > threshold)
        mask = routing.mask_TE
        tokens_BE = mask.view(samples, tokens, -1).sum(dim=1)
        return routing, MoEStats(tokens_BE, mask, logits, predicted, balance, observed)

    def _balance(
        self, scores_TE: Tensor, mask_TE: Tensor, tokens: int, samples: int
    ) -> Tensor | None:
        """Balance loss over pools: counts are summed over the ranks of a pool, each rank keeps its
        tokens' share.

        Samples are taken in runs that divide both the pool and this rank's batch, each of which is
        in one pool.
        """
        if not torch.is_grad_enabled():
            return None
        run = math.gcd(self.pool, samples)
        counts = mask_TE.view(samples // run, run * tokens, -1).sum(dim=1)
        first = self.groups.pool.index * samples
        pool_of_run = (first + torch.arange(0, samples, run, device=counts.device)) // self.pool
        pools = max(1, samples * self.groups.pool.size // self.pool)
        per_pool = counts.new_zeros(pools, counts.shape[1]).index_add(0, pool_of_run, counts)
        counts = sum_over(per_pool, self.groups.pool)[pool_of_run]
        return balance_loss(scores_TE, counts, self.pool * tokens, self.moe.top_k)
