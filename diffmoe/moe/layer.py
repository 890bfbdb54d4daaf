"""The MoE layer: route, dispatch, experts, combine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffmoe.config import ModelConfig, MoEConfig, expert_hidden
from diffmoe.families import (
    TOKENS_CHOOSE,
    has_load_bias,
    has_predictor,
    has_router_loss,
    has_target_head,
    has_thresholds,
    router_shape,
)
from diffmoe.gradient_sums import Linear
from diffmoe.layout import pairs_taken, rows_taken
from diffmoe.moe.balance import LoadBias, balance_loss, contrastive_loss, similarity_loss
from diffmoe.moe.capacity import CapacityPredictor, Thresholds, predictor_loss
from diffmoe.moe.dispatch import (
    Plan,
    by_expert,
    by_source,
    combine,
    dispatch,
    half_plans,
    make_plan,
    send_home,
)
from diffmoe.moe.experts import Experts, has_grouped_matmul
from diffmoe.moe.gating import Beside, cosines, logits, scored, time_token_logits
from diffmoe.moe.pool import choose, race, sum_by_pool
from diffmoe.moe.routing import (
    Routing,
    RoutingRule,
    choose_experts,
    choose_pairs,
    choose_prototypes,
    choose_tokens,
    equal_routing,
    gates,
    pool_thresholds,
    predicted_counts,
)
from diffmoe.moe.running import RunningState
from diffmoe.parallel.collectives import Travelling, arrived
from diffmoe.parallel.groups import ParallelGroups
from diffmoe.parallel.recompute import Run, at_once


@dataclass(frozen=True)
class MoEStats:
    """What one layer reports about one forward pass; nothing is kept in the layer.

    ``predictor_loss``, ``balance_loss`` (or whichever loss the family has on routing) and
    ``target_TP``, what the router predicts of the target's patches (Expert Race), carry gradients
    (None where the family has none, or at inference).  ``observed_E`` is this rank's share of what
    :meth:`MoELayer.commit` takes.  ``tokens_BE``: tokens of each sample that each expert took.
    ``mask_TE``, ``logits_TE``: the choice and what thresholds look at, as logits.
    """

    tokens_BE: Tensor
    mask_TE: Tensor
    logits_TE: Tensor | None = None
    predictor_loss: Tensor | None = None
    balance_loss: Tensor | None = None
    observed_E: Tensor | None = None
    target_TP: Tensor | None = None


class Late(NamedTuple):
    """The layer's output of tokens whose rows are on their way home.  A tuple, since that is how
    ZeRO 3 finds the tensors before whose backward the layer's weights must be there.
    """

    coming_RD: Travelling
    gates_TE: Tensor
    plan: Plan
    shared_TD: Tensor | None

    def output(self, run: Run) -> Tensor:
        """[T, D], once the rows are here."""
        coming, gates, plan, shared = self
        return run(combine, arrived(coming), gates, plan, shared, ragged=plan.ragged)


def running_state(model: ModelConfig, moe: MoEConfig) -> dict[str, RunningState]:
    """A new layer's buffers that training moves, by attribute."""
    if has_thresholds(model):
        return {"thresholds": Thresholds(moe.experts, moe.threshold_decay)}
    if has_load_bias(model, moe):
        return {"load_bias": LoadBias(moe.experts, moe.bias_rate)}
    return {}


class MoELayer(nn.Module):
    """An MoE layer of any family; see ``families`` for who chooses.

    ``pool`` counts samples (resolved, see ``layout.resolve_layout``); this rank holds experts
    ``[ep.index * E / ep.size, …)``.  ``shared``: an MLP [T, D] -> [T, D] that every token goes
    through as well.
    """

    thresholds: Thresholds
    load_bias: LoadBias

    def __init__(
        self,
        model: ModelConfig,
        moe: MoEConfig,
        pool: int,
        groups: ParallelGroups,
        shared: nn.Module | None = None,
    ) -> None:
        super().__init__()
        local, width = moe.experts // groups.ep.size, model.width
        self.model, self.moe, self.pool, self.groups = model, moe, pool, groups
        self.router = nn.Parameter(torch.empty(*router_shape(model, moe)))
        self.experts = Experts(
            width,
            expert_hidden(model, moe),
            moe.experts,
            local,
            groups.ep.index * local,
            moe.activation,
        )
        self.shared = shared
        self.capacity_predictor = (
            CapacityPredictor(width, moe.experts) if has_predictor(model, moe) else None
        )
        self.router_hidden = self.target_head = None
        if has_target_head(model, moe):
            self.router_hidden = Linear(width, width)
            self.target_head = Linear(width, model.patch**2 * model.channels)
        for name, state in running_state(model, moe).items():
            self.add_module(name, state)

    @property
    def family(self) -> str:
        return self.model.family

    def has_static_shapes(self, rule: RoutingRule) -> bool:
        """Whether no shape here depends on what the device or another rank would have to be asked
        for under ``rule``.
        """
        if self.groups.ep.size > 1 or self.groups.pool.size > 1 and rule.kind != "static":
            return False
        exact = rule.kind in ("train", "static")
        known = {"diffmoe": exact, "race": exact, "prototype": self.moe.top_k == 1}
        if not known.get(self.family, True):  # how many rows there are
            return False
        equal = self.family in ("ec", "diffmoe")  # of every expert as many
        return equal or has_grouped_matmul(self.router.device, self.router.dtype)

    def forward(
        self,
        x_BND: Tensor | Sequence[Tensor],
        rule: RoutingRule,
        run: Run = at_once,
        beside: Beside = Beside(),
    ) -> tuple[Any, MoEStats]:
        """[B, N, D] -> [B, N, D] and the report.  A token that no expert takes gets zero, or what
        the shared experts say.

        Of two halves of the samples, which are routed together, [Late, Late]: of one half rows
        travel while experts compute the other's.
        """
        halves = [] if isinstance(x_BND, Tensor) else [half.flatten(0, 1) for half in x_BND]
        x_TD = x_BND.flatten(0, 1) if isinstance(x_BND, Tensor) else torch.cat(halves)
        ep = self.groups.ep
        samples = len(x_BND) if isinstance(x_BND, Tensor) else sum(map(len, x_BND))
        scores_TE, logits_TE, target_TP = run(self.look, x_TD, beside)
        routing, stats = self._route(x_TD, scores_TE, logits_TE, samples, rule, beside)
        stats = replace(stats, target_TP=target_TP)
        gates_TE = gates(
            scores_TE, routing.mask_TE, self.moe.gates == "normalized", self.moe.gate_scale
        )
        if isinstance(x_BND, Tensor):
            plan = make_plan(routing, ep)
            coming_SD = dispatch(x_TD, plan, ep)
            shared_TD = None if self.shared is None else run(self.shared, x_TD)  # while rows travel
            late = Late(self._experts(coming_SD, plan, run), gates_TE, plan, shared_TD)
            return late.output(run).view_as(x_BND), stats
        plans = half_plans(routing, ep, whole_pools=samples // 2 % self.pool == 0)
        coming = [dispatch(half, plan, ep) for half, plan in zip(halves, plans)]
        shared = [None if self.shared is None else run(self.shared, half) for half in halves]
        coming = [self._experts(rows, plan, run) for rows, plan in zip(coming, plans)]
        each = zip(coming, gates_TE.chunk(2), plans, shared)
        return [Late(*parts) for parts in each], stats

    def commit(self, observed_E: Tensor, pools: int) -> None:
        """Takes what a step's passes observed [E], summed over them and over ranks: thresholds of
        ``pools`` pools, or tokens.
        """
        if has_thresholds(self.model):
            self.thresholds.commit(observed_E / pools)
        else:
            self.load_bias.commit(observed_E)

    def look(self, x_TD: Tensor, beside: Beside) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Scores, what thresholds look at as logits (both [T, E]), and the router's prediction of
        the target; None where the family has none.
        """
        if self.family == "prototype":
            return self._likeness(x_TD, beside), None, None
        target = None
        if self.moe.router_input == "time_token":
            assert beside.time_BD is not None and beside.plain_BND is not None
            raw = time_token_logits(beside.time_BD, beside.plain_BND, self.router)
        elif self.router_hidden is not None and self.target_head is not None:
            hidden = F.gelu(self.router_hidden(x_TD))
            raw = logits(hidden, self.router)
            target = self.target_head(hidden) if self.training else None
        else:
            raw = logits(x_TD, self.router)
        scores, seen = scored(raw, self.moe.score), None
        if self.capacity_predictor is not None:
            seen = self.capacity_predictor(x_TD)
        elif self.family == "diffmoe":
            seen = raw.detach() if self.moe.score == "sigmoid" else scores.detach().logit()
        elif self.family == "race":
            seen = raw  # the similarity loss has its own gate function
        return scores, seen, target

    def _likeness(self, x_TD: Tensor, beside: Beside) -> Tensor:
        """Cosines to the prototypes [T, E].  The last column is the null class's expert, which is
        not chosen by its score: 1 for its tokens, whose gate that is.
        """
        assert beside.null_B is not None
        scores = F.pad(cosines(x_TD, self.router), (0, 1))
        own = F.pad(torch.zeros_like(scores[:1, :-1]), (0, 1), value=1.0)
        return torch.where(_each_token(beside.null_B, x_TD).unsqueeze(1), own, scores)

    def _compute(self, rows_SD: Tensor, plan: Plan) -> Tensor:
        """Rows grouped by source rank through their experts, and grouped so again."""
        ranks, local = self.groups.ep.size, self.experts.local
        outputs = self.experts(by_expert(rows_SD, plan, ranks, local), plan.counts)
        return by_source(outputs, plan, ranks, local)

    def _experts(self, coming_SD: Travelling, plan: Plan, run: Run) -> Travelling:
        """Rows through their experts as soon as they are here, and off home."""
        eager, rows_SD = self._loops(plan), arrived(coming_SD)
        rows_SD = run(self._compute, rows_SD, plan, ragged=plan.ragged, traceable=not eager)
        return send_home(rows_SD, plan, self.groups.ep)

    def _loops(self, plan: Plan) -> bool:
        """Whether experts are a loop of the host's."""
        if isinstance(plan.counts, int):  # no graph asks what device there is
            return False
        return not has_grouped_matmul(self.router.device, self.router.dtype)

    def _route(
        self,
        x_TD: Tensor,
        scores: Tensor,
        logits: Tensor | None,
        samples: int,
        rule: RoutingRule,
        beside: Beside,
    ) -> tuple[Routing, MoEStats]:
        tokens = len(scores) // samples
        pool_tokens, training = self.pool * tokens, rule.kind in ("train", "threshold")
        # What thresholds are compared with.
        predicting = logits if self.capacity_predictor is not None else None
        watched = scores if predicting is None else predicting.sigmoid()
        observed = predicted = None
        if self.family in TOKENS_CHOOSE:
            routing = self._tokens_choose(scores, beside)
        elif self.family == "ec":
            routing, _ = choose(scores, None, pool_tokens, rule.capacity, self.groups)
        elif rule.kind == "train" and self.family == "race":
            routing, observed = race(scores, pool_tokens, rule.capacity, self.groups)
        elif rule.kind == "train":
            routing, observed = choose(scores, watched, pool_tokens, rule.capacity, self.groups)
        elif rule.kind == "static" and self.family == "race":
            K = pairs_taken(len(scores), rule.capacity)
            routing = Routing(choose_pairs(scores, len(scores), K)[0], rows=K)
        elif rule.kind == "static":
            K = rows_taken(len(scores), self.moe.experts, rule.capacity)
            routing = equal_routing(choose_tokens(scores, len(scores), K), len(scores))
        else:
            passing = watched > self.thresholds.chosen(rule.gamma, rule.dial)
            if rule.kind == "batch":
                passing = predicted_counts(scores, passing)
            routing = Routing(passing)
        mask = routing.mask_TE
        if rule.kind == "train" and predicting is not None:
            predicted = predictor_loss(predicting, mask)
        if rule.kind == "threshold":
            K = rows_taken(pool_tokens, self.moe.experts, rule.capacity)
            observed = pool_thresholds(watched, pool_tokens, K).sum(dim=0)
        balance = None
        if training and torch.is_grad_enabled() and has_router_loss(self.model, self.moe):
            balance = self._balance(x_TD, scores, logits, mask, tokens, samples)
        tokens_BE = mask.view(samples, tokens, -1).sum(dim=1)
        if has_load_bias(self.model, self.moe):
            observed = tokens_BE.sum(dim=0)
        return routing, MoEStats(tokens_BE, mask, logits, predicted, balance, observed)

    def _tokens_choose(self, scores: Tensor, beside: Beside) -> Routing:
        moe = self.moe
        if self.family == "prototype":
            assert beside.null_B is not None
            mask = choose_prototypes(scores, _each_token(beside.null_B, scores), moe.top_k)
            return Routing(mask, rows=len(scores) if moe.top_k == 1 else None)
        bias = self.load_bias.value if has_load_bias(self.model, moe) else None
        mask = choose_experts(scores, moe.top_k, bias, moe.expert_groups, moe.top_groups)
        return Routing(mask, rows=len(scores) * moe.top_k)

    def _balance(
        self,
        x_TD: Tensor,
        scores: Tensor,
        logits: Tensor | None,
        mask: Tensor,
        tokens: int,
        samples: int,
    ) -> Tensor:
        """The family's loss on routing, mean over pools, the same on every rank of a pool.

        Samples are summed over runs that divide both the pool and this rank's batch, each of which
        is in one pool; one reduction makes the pools' sums.
        """
        run = math.gcd(self.pool, samples)

        def by_run(values_TX: Tensor) -> Tensor:
            return values_TX.view(samples // run, run * tokens, -1)

        def by_pool(per_run: Tensor) -> Tensor:
            return sum_by_pool(per_run, run, self.pool, samples, self.groups.pool)

        taken, pool_tokens = by_run(mask.to(scores.dtype)), self.pool * tokens
        if self.family == "race":
            assert logits is not None
            p = by_run(logits.softmax(dim=1))
            both = by_pool(torch.stack([p.mT @ p, taken.mT @ taken], dim=1))
            return similarity_loss(both[:, 0], both[:, 1], pool_tokens)
        if self.family == "prototype":
            with_count = F.pad(by_run(x_TD.to(scores.dtype)), (0, 1), value=1.0)
            both = by_pool(taken[..., :-1].mT @ with_count)
            return contrastive_loss(
                both[..., :-1], both[..., -1].detach(), self.router, self.moe.contrast_temperature
            )
        if self.moe.score == "sigmoid":
            scores = scores / scores.sum(dim=1, keepdim=True)
        both = by_pool(torch.stack([by_run(scores).sum(dim=1), taken.sum(dim=1)], dim=1))
        return balance_loss(both[:, 0], both[:, 1], pool_tokens, self.moe.top_k)


def _each_token(of_sample_B: Tensor, tokens_TX: Tensor) -> Tensor:
    """What holds for a sample, for each of its tokens [T]."""
    return of_sample_B.repeat_interleave(len(tokens_TX) // len(of_sample_B))
