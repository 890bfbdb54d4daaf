"""The field's routers as whole MoE layers, token by token, from their equations: what the layer's
routers are held to.

Plain tensors in any float dtype, one process, no collective; nothing of ``diffmoe``.  Shapes: B
samples of N tokens, T = B N tokens, D width, F inner width, E experts, k experts a token.  Every
choice is a sort by (score, lower place first).  Losses come without their weights.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Mlp(NamedTuple):
    """fc2(gelu(fc1 x)) with biases, tanh GELU; with ``gate`` fc2(silu(gate x) * fc1 x).

    ``fc1``, ``gate`` [D, F], ``fc2`` [F, D], ``fc1_bias`` [F], ``fc2_bias`` [D]."""

    fc1: Tensor
    fc2: Tensor
    fc1_bias: Tensor | None = None
    fc2_bias: Tensor | None = None
    gate: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        h = x @ self.fc1
        h = h if self.fc1_bias is None else h + self.fc1_bias
        a = F.gelu(h, approximate="tanh") if self.gate is None else F.silu(x @ self.gate) * h
        y = a @ self.fc2
        return y if self.fc2_bias is None else y + self.fc2_bias


class Layer(NamedTuple):
    """What a layer did: ``output`` [B, N, D], ``mask`` and ``gates`` [T, E] (zero where not taken),
    its losses by name, and what thresholds follow [E] or []: the lowest score taken, mean.
    """

    output: Tensor
    mask: Tensor
    gates: Tensor
    losses: dict[str, Tensor]
    observed: Tensor | None = None


def best(scores: list[float], count: int) -> list[int]:
    """Places of the ``count`` highest scores; of equal ones the lower place."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]


def combined(x: Tensor, gates: dict[tuple[int, int], Tensor], experts: list, shared) -> Layer:
    """The sum over each token's experts of gate times output, plus the shared expert's."""
    rows = []
    for t, token in enumerate(x.flatten(0, 1)):
        y = torch.zeros_like(token) if shared is None else shared(token)
        for (taken, e), gate in gates.items():
            if taken == t:
                y = y + gate * experts[e](token)
        rows.append(y)
    table = torch.zeros(len(rows), len(experts), dtype=x.dtype)
    for place, gate in gates.items():
        table[place] = gate.detach()
    mask = torch.zeros(table.shape, dtype=torch.bool)
    for place in gates:
        mask[place] = True
    return Layer(torch.stack(rows).view_as(x), mask, table, {})


def scored(logits: Tensor, score: str) -> Tensor:
    """Logits [T, E] as the router's scores."""
    if score == "softmax":
        return logits.exp() / logits.exp().sum(dim=1, keepdim=True)
    return logits.sigmoid() if score == "sigmoid" else logits


def token_choice(
    x: Tensor,
    router: Tensor,
    experts: list[Mlp],
    *,
    k: int,
    score: str = "softmax",
    normalised: bool = False,
    scale: float = 1.0,
    bias: Tensor | None = None,
    groups: int = 1,
    groups_kept: int = 1,
    shared: Mlp | None = None,
    samples_balanced: int = 1,
    balance_sees_bias: bool = True,
) -> Layer:
    """DeepSeek-V3 (2412.19437, equations 12-20); with softmax, raw gates and no bias DiT-MoE
    (2407.11633).

    A token's experts are the k best by score + bias among the ``groups_kept`` groups whose two best
    sum highest; gates are the scores, without the bias.  Loss ``balance``: mean over runs of
    ``samples_balanced`` samples (1: sequence-wise) of sum_i f_i P_i, f_i = share of picks times E,
    P_i = mean score divided by the token's sum; ``balance_sees_bias``: f counts the real choice,
    otherwise equation 18's, the k best scores alone.
    """
    tokens, E = x.flatten(0, 1), len(experts)
    scores = scored(tokens @ router.T, score)
    gates, picks = {}, []
    for t, s in enumerate(scores):
        wish = (s if bias is None else s + bias).tolist()
        size = E // groups
        runs = [range(g * size, (g + 1) * size) for g in range(groups)]
        worth = [sum(sorted((wish[e] for e in run), reverse=True)[:2]) for run in runs]
        allowed = sorted(e for g in best(worth, groups_kept) for e in runs[g])
        chosen = [allowed[i] for i in best([wish[e] for e in allowed], k)]
        total = sum(s[e] for e in chosen) + 1e-20 if normalised else 1.0
        gates.update({(t, e): scale * s[e] / total for e in chosen})
        picks.append(chosen if balance_sees_bias else best(s.tolist(), k))
    layer = combined(x, gates, experts, shared)
    length, losses = samples_balanced * x.shape[1], []
    for start in range(0, len(tokens), length):
        run = range(start, start + length)
        loss = torch.zeros((), dtype=x.dtype)
        for e in range(E):
            f = E / (k * length) * sum(e in picks[t] for t in run)
            loss = loss + f * sum(scores[t, e] / scores[t].sum() for t in run) / length
        losses.append(loss)
    return layer._replace(losses={"balance": torch.stack(losses).mean()})


def moved_bias(bias: Tensor, counts: Tensor, rate: float) -> Tensor:
    """DeepSeek-V3's step of the bias (section 2.1.2): up by ``rate`` for experts with fewer tokens
    than the mean, down for those with more.
    """
    mean = counts.double().mean()
    return torch.stack([b + rate * torch.sign(mean - n) for b, n in zip(bias, counts)]).to(bias)


def expert_choice(
    x: Tensor,
    router: Tensor,
    experts: list[Mlp],
    *,
    taken: int,
    pool: int = 1,
    seen: Tensor | None = None,
    score: str = "softmax",
    normalised: bool = False,
    scale: float = 1.0,
    shared: Mlp | None = None,
) -> Layer:
    """Every expert takes its ``taken`` best tokens of each ``pool`` samples.

    Nucleus-Image (2604.12163; diffusers, ``NucleusMoELayer``): pool 1, ``seen`` [B, N, 2 D] = time
    embedding, then the normed unmodulated token, ``normalised``: a token's gates are divided by
    their sum, times ``scale``.  Observed: each expert's lowest score taken, mean over pools.
    """
    tokens = x.flatten(0, 1)
    scores = scored((x if seen is None else seen).flatten(0, 1) @ router.T, score)
    length = pool * x.shape[1]
    takers: dict[int, list[int]] = {}
    starts, observed = range(0, len(tokens), length), torch.zeros(len(experts), dtype=x.dtype)
    for start in starts:
        for e in range(len(experts)):
            for place in best(scores[start : start + length, e].tolist(), taken):
                takers.setdefault(start + place, []).append(e)
            observed[e] += scores[start + place, e].item() / len(starts)
    gates = {}
    for t, chosen in takers.items():
        total = sum(scores[t, e] for e in chosen) + 1e-12 if normalised else 1.0
        gates.update({(t, e): scale * scores[t, e] / total for e in chosen})
    return combined(x, gates, experts, shared)._replace(observed=observed)


def time_and_token(time: Tensor, unmodulated: Tensor) -> Tensor:
    """What Nucleus's router sees [B, N, 2 D]: the sample's time embedding [B, D] before each
    token.
    """
    rows = [
        [torch.cat([time[b], token]) for token in sample] for b, sample in enumerate(unmodulated)
    ]
    return torch.stack([torch.stack(row) for row in rows])


def expert_threshold(
    x: Tensor,
    compared: Tensor,
    gate_scores: Tensor,
    experts: list[Mlp],
    thresholds: Tensor,
    *,
    taken: int,
    shared: Mlp | None = None,
) -> Layer:
    """Expert Threshold (2603.11535, equation 6, algorithm 1): expert e takes the tokens whose
    ``compared`` [T, E] is above ``thresholds`` [E], with ``gate_scores`` [T, E] as gates (the
    paper: a sigmoid of the same logit).  Observed: each expert's ``taken``-th largest of all.
    """
    gates = {
        (t, e): gate_scores[t, e]
        for t in range(len(compared))
        for e in range(len(experts))
        if compared[t, e].item() > thresholds[e].item()
    }
    observed = [sorted(column.tolist(), reverse=True)[taken - 1] for column in compared.T]
    return combined(x, gates, experts, shared)._replace(
        observed=torch.tensor(observed, dtype=x.dtype)
    )


def race(
    x: Tensor,
    logits: Tensor,
    experts: list[Mlp],
    *,
    k: float,
    pool: int,
    score: str = "identity",
    shared: Mlp | None = None,
) -> Layer:
    """Expert Race (2503.16057): the k T best of all (token, expert) pairs of each ``pool`` samples;
    of equal scores the lower token, then the lower expert.

    Loss ``similarity`` (equations 9-11), mean over pools; observed: the lowest score taken, mean
    over pools.
    """
    scores = scored(logits, score)
    T, E = scores.shape
    length, gates, last = pool * x.shape[1], {}, []
    for start in range(0, T, length):
        flat = scores[start : start + length].flatten().tolist()
        taken = best(flat, int(k * length))
        last.append(flat[taken[-1]])
        for place in taken:
            t, e = start + place // E, place % E
            gates[t, e] = scores[t, e]
    layer = combined(x, gates, experts, shared)
    starts = range(0, T, length)
    each = [
        similarity(logits[i : i + length], layer.mask[i : i + length].to(x.dtype)) for i in starts
    ]
    return layer._replace(
        losses={"similarity": torch.stack(each).mean()},
        observed=torch.tensor(sum(last) / len(last), dtype=x.dtype),
    )


def similarity(logits: Tensor, mask: Tensor) -> Tensor:
    """Expert Race's router similarity loss of one pool's logits and choice [T, E]."""
    T, E = logits.shape
    P, loss = scored(logits, "softmax"), torch.zeros((), dtype=logits.dtype)
    together = [[float(mask[:, i] @ mask[:, j]) for j in range(E)] for i in range(E)]
    alone = sum(together[i][i] for i in range(E))
    pairs = sum(map(sum, together)) - alone
    for i in range(E):
        for j in range(E):
            of, count = (alone, E) if i == j else (pairs, E * E - E)
            weight = together[i][j] * count / of if of else 0.0
            loss = loss + weight * (P[:, i] @ P[:, j]) / T
    return loss


def race_heads(
    x: Tensor,
    hidden: Tensor,
    hidden_bias: Tensor,
    router: Tensor,
    router_bias: Tensor | None,
    target_head: Tensor,
    target_bias: Tensor,
) -> tuple[Tensor, Tensor]:
    """Expert Race's two-layer router (sections 6, 9): logits [T, E], and the patches [T, P] that
    its other head predicts.  Weights as ``nn.Linear`` has them.
    """
    seen = F.gelu(x.flatten(0, 1) @ hidden.T + hidden_bias)
    logits = seen @ router.T
    return (
        logits if router_bias is None else logits + router_bias,
        seen @ target_head.T + target_bias,
    )


def prototype(
    x: Tensor,
    null: Tensor,
    prototypes: Tensor,
    experts: list[Mlp],
    *,
    k: int = 1,
    pool: int,
    temperature: float = 0.07,
    score: str = "identity",
    shared: Mlp | None = None,
) -> Layer:
    """ProMoE (2510.24711; ali-vilab/ProMoE, MIT): all tokens of samples that are ``null`` [B] go to
    the last expert with gate 1; others to the k whose prototypes [E - 1, D] have the highest cosine
    with them, gate the cosine.

    Loss ``contrastive``, mean over pools of ``pool`` samples (published: a rank's batch): mean over
    experts that took tokens of the cross-entropy of their prototype against the mean tokens of all
    such experts, cosines divided by ``temperature``; 0 where fewer than two took any.
    """
    tokens, cases, length = x.flatten(0, 1), len(prototypes), pool * x.shape[1]
    units = [p / p.norm() for p in prototypes]
    gates: dict[tuple[int, int], Tensor] = {}
    members: dict[tuple[int, int], list[Tensor]] = {}  # of a pool and an expert
    for t, token in enumerate(tokens):
        if null[t // x.shape[1]]:
            gates[t, cases] = torch.ones((), dtype=x.dtype)
            continue
        cosines = torch.stack([(token / token.norm()) @ unit for unit in units])
        s = scored(cosines.unsqueeze(0), score)[0]
        for e in best(s.tolist(), k):
            gates[t, e] = s[e]
            members.setdefault((t // length, e), []).append(token)
    pools, loss = len(tokens) // length, torch.zeros((), dtype=x.dtype)
    for p in range(pools):
        present = [e for e in range(cases) if (p, e) in members]
        means = [torch.stack(members[p, e]).mean(dim=0) for e in present]
        for i, e in enumerate(present if len(present) > 1 else []):
            near = torch.stack([units[e] @ (m / m.norm()) for m in means]) / temperature
            loss = loss + (near.exp().sum().log() - near[i]) / len(present) / pools
    return combined(x, gates, experts, shared)._replace(losses={"contrastive": loss})
