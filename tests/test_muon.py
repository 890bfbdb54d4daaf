"""Muon's arithmetic beside singular vectors and torch's own, matrices that shards cut, and what the
planner says of it.
"""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.optim._muon import _zeropower_via_newtonschulz
from torch.utils.flop_counter import FlopCounterMode

from diffmoe.checkpoints.reader import FIRST_MOMENT, MASTER, SECOND_MOMENT
from diffmoe.config import load_config
from diffmoe.cost.hardware import choose, read_table
from diffmoe.cost.memory import engine_facts, rank_memory
from diffmoe.cost.muon import newton_schulz_flops
from diffmoe.cost.step_time import kernel_seconds, step_time
from diffmoe.cost.traffic import step_traffic
from diffmoe.layout import resolve_layout
from diffmoe.models.dit import DiT
from diffmoe.models.logical import logical_pieces
from diffmoe.models.matrices import is_matrix
from diffmoe.parallel.groups import Group
from diffmoe.parallel.spawn import Ranks
from diffmoe.parallel.traffic import CommunicationCount
from diffmoe.parity.cases import Case
from diffmoe.parity.table import start_training
from diffmoe.training import muon
from diffmoe.training.muon import Matrices, Muon, newton_schulz

ROOT = Path(__file__).resolve().parent.parent


def randoms(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("shape", [(3, 16, 40), (3, 40, 16), (1, 24, 24)])
def test_newton_schulz_keeps_singular_vectors_and_evens_singular_values(shape):
    """Values from 1 to 1/400 of the norm come to [0.68, 1.21]; each matrix by itself, whatever its
    size.
    """
    left, _, right = torch.linalg.svd(randoms(*shape), full_matrices=False)
    sigma = torch.logspace(0, -2.6, min(shape[1:]), dtype=torch.float64)
    sigma = sigma / sigma.norm() * torch.tensor([1.0, 1e-3, 1e4])[: shape[0], None]
    stack = (left * sigma.unsqueeze(1)) @ right
    found = left.mT @ newton_schulz(stack) @ right.mT
    values = found.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(found, torch.diag_embed(values), rtol=0, atol=1e-10)
    assert 0.68 < values.min() and values.max() < 1.21, values
    apart = torch.cat([newton_schulz(one.unsqueeze(0)) for one in stack])
    torch.testing.assert_close(newton_schulz(stack), apart, rtol=0, atol=1e-12)
    assert not newton_schulz(torch.zeros(2, 4, 6)).any()


def test_newton_schulz_is_torchs():
    matrix = randoms(24, 56, dtype=torch.float32)
    torchs = _zeropower_via_newtonschulz(matrix, (3.4445, -4.7750, 2.0315), 5, 1e-7)
    ours = newton_schulz(matrix.bfloat16().unsqueeze(0))[0]
    assert (ours - torchs).norm() < 0.02 * torchs.norm()


def optimizer_of(weights, stacks, **more):
    found = Muon([{"params": weights, "muon": stacks}], betas=(0.9, 0.99), eps=1e-8, **more)
    for weight in weights:
        found.state[weight][FIRST_MOMENT] = torch.zeros_like(weight)
    return found


def test_steps_are_the_papers():
    """M <- 0.95 M + G, O = NewtonSchulz(G + 0.95 M), W <- W - lr (0.2 sqrt(max) O + decay W), with
    O from singular vectors; a norm and a bias beside it take AdamW's steps.
    """
    start, lr, decay = randoms(2, 12, 30), 0.03, 0.4
    weight, bias = (torch.nn.Parameter(v) for v in (start.clone(), randoms(5)))
    twin = torch.nn.Parameter(bias.detach().clone())
    common = dict(lr=lr, weight_decay=decay)
    ours = optimizer_of([weight], [(2, 12, 30)], **common)
    ours.add_param_group({"params": [bias], "muon": []})
    ours.share(None)
    adam = torch.optim.AdamW([twin], betas=(0.9, 0.99), eps=1e-8, **common)
    wanted, momentum = start.clone(), torch.zeros_like(start)
    for step in range(3):
        weight.grad, bias.grad = randoms(2, 12, 30, seed=step), randoms(5, seed=step)
        twin.grad = bias.grad.clone()
        momentum = 0.95 * momentum + weight.grad
        left, sigma, right = torch.linalg.svd(weight.grad + 0.95 * momentum, full_matrices=False)
        sigma = sigma / sigma.norm(dim=1, keepdim=True)
        for _ in range(5):
            sigma = 3.4445 * sigma - 4.7750 * sigma**3 + 2.0315 * sigma**5
        update = (left * sigma.unsqueeze(1)) @ right
        wanted = wanted - lr * (0.2 * math.sqrt(30) * update + decay * wanted)
        ours.step()
        adam.step()
        torch.testing.assert_close(weight.detach(), wanted, rtol=0, atol=1e-12)
        assert torch.equal(bias, twin)


STACKS = [(3, 4, 4), (1, 4, 4), (2, 4, 12), (1, 12, 4), (5, 4, 2)]
TOTAL = sum(math.prod(stack) for stack in STACKS)


@pytest.mark.parametrize("ranks", [2, 3, 5, 16, 40])
def test_matrices_that_shards_cut_are_updated_as_whole_ones(monkeypatch, ranks):
    """Of every size of shard, down to those of which a matrix has several and the last are only
    padding.
    """
    size = -(-TOTAL // ranks) + 3
    weights, slopes = (torch.zeros(ranks * size, dtype=torch.float64) for _ in range(2))
    weights[:TOTAL], slopes[:TOTAL] = randoms(TOTAL), randoms(TOTAL, seed=1)
    whole = torch.nn.Parameter(weights[:TOTAL].clone())
    whole.grad = slopes[:TOTAL].clone()
    Matrices(STACKS, whole, Group((0,), 0)).update(0.1)
    each, sent = [], {}
    for rank in range(ranks):
        cut = slice(rank * size, (rank + 1) * size)
        shard = torch.nn.Parameter(weights[cut].clone())
        shard.grad = slopes[cut].clone()
        each.append(Matrices(STACKS, shard, Group(tuple(range(ranks)), rank)))

    def post(parts, receive, group):
        sent[group.index] = parts
        return [torch.zeros(n, dtype=torch.float64) for n in receive]

    def fetch(_parts, receive, group):
        found = [sent[rank][group.index] for rank in range(ranks)]
        assert [len(part) for part in found] == receive
        return found

    monkeypatch.setattr(muon, "exchange_parts", post)
    for matrices in each:
        matrices._whole(matrices.shard.grad)
    monkeypatch.setattr(muon, "exchange_parts", fetch)
    for matrices in each:
        matrices.update(0.1)
    found = torch.cat([matrices.shard.detach() for matrices in each])
    torch.testing.assert_close(found[:TOTAL], whole.detach(), rtol=0, atol=1e-12)
    assert not found[TOTAL:].any()
    ends = torch.tensor([r * c for n, r, c in STACKS for _ in range(n)]).cumsum(0).tolist()
    bytes_ = 8 * sum(len(part) for parts in sent.values() for part in parts)
    cuts = [b for b in range(size, TOTAL, size) if b not in ends]
    sizes = [next(e - s for s, e in pairwise([0, *ends]) if e > b) for b in cuts]
    assert bytes_ == 8 * sum(sizes)  # what diffmoe/cost/muon.py counts


@pytest.mark.parametrize(
    "words", ["", "moe.activation=swiglu model.activation=swiglu", "model.family=race"]
)
def test_which_tensors_are_matrices(words):
    config = load_config(None, ["model.depth=2", "moe.shared_experts=1", *words.split()])
    with torch.device("meta"):
        names = [name for name, _ in logical_pieces(DiT(config.model, config.moe))]
    found = {name for name in names if is_matrix(name)}
    parts = ["fc1", "fc2", "gate"] if "swiglu" in words else ["fc1", "fc2"]
    wanted = {f"blocks.{i}.attn.{part}.weight" for i in range(2) for part in ("qkv", "proj")}
    wanted |= {
        f"blocks.{place}.{part}.weight" for place in ("0.mlp", "1.mlp.shared") for part in parts
    }
    wanted |= {
        f"blocks.1.mlp.experts.{e}.{part}_weight"
        for e in range(config.moe.experts)
        for part in parts
    }
    assert found == wanted


# --------------------------------------------------------------------------------------------------
# ranks


def three_steps(case):
    """(bytes of momenta that leave this rank in a step, FLOPs of its optimizer, bytes of moments)
    of a rank.  A step whose norm is not finite changes nothing, and the next one goes on.
    """
    training = start_training(case, 0, torch.device("cpu"))
    engine = training.engine
    state = [t for kind in (MASTER, FIRST_MOMENT, SECOND_MOMENT) for t in engine.shards(kind)]
    training.step(0)
    before, step = [values.clone() for values in state], engine.step
    engine.step = lambda lr, _norm: step(lr, math.nan)
    training.step(1)
    assert all(torch.equal(a, b) for a, b in zip(before, state, strict=True))
    engine.step, update, flops = step, engine._adam.step, []

    def counted(*args):  # DeepSpeed steps a group at a time at ZeRO 1 and 2
        with FlopCounterMode(display=False) as mode:
            update(*args)
        flops.append(mode.get_total_flops())

    engine._adam.step = counted
    layers = [(f"block {i}", layer, layer.experts) for i, layer in engine.model.moe_layers()]
    with CommunicationCount(layers) as count:
        training.step(2)
    assert not any(torch.equal(a, b) for a, b in zip(before, state, strict=True) if len(a))
    wire = sum(row["wire"] for row in count.table() if row["purpose"] == "momenta")
    moments = engine.shards(FIRST_MOMENT) + engine.shards(SECOND_MOMENT)
    engine.engine.destroy()
    return wire, sum(flops), sum(t.nbytes for t in moments)


@pytest.mark.full
def test_a_step_takes_what_the_planner_says_and_a_bad_one_nothing():
    with Ranks(4, timeout=240.0) as ranks:
        for zero, ep, shard in ((0, 2, 0), (1, 2, 0), (2, 1, 0), (1, 2, 2)):
            case = Case(4, ep, zero, "none", 1, "rank", 16, "muon", shard=shard)
            config, layout, engine = case.config(), case.layout(), engine_facts(case.deepspeed())
            wire, flops, moments = zip(*ranks.run(three_steps, case))
            planned = [m for m in step_traffic(config, layout, engine) if m.purpose == "momenta"]
            # The planner has a GPU's bf16, and rounds a rank's mean down.
            assert 0 <= sum(wire) - 2 * 4 * sum(m.wire for m in planned) < 2 * 4 * 2, case
            assert (sum(wire) > 0) == (zero > 0)
            assert sum(flops) == pytest.approx(4 * newton_schulz_flops(config, layout, engine))
            assert set(moments) == {rank_memory(config, layout, engine).moments}


def test_the_planner_knows_muon():
    """L on 8 GPUs: less memory by the matrices' second moment, a few more seconds of products."""
    path = ROOT / "configs/diffmoe_l_e16_flow.yaml"
    configs = [load_config(path, [f"train.optimizer={name}"]) for name in ("torch", "muon")]
    tree = {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}
    layout, engine = resolve_layout(configs[0], 8), engine_facts(tree)
    hardware = choose(read_table(None), "h100")
    adam, muons = (rank_memory(config, layout, engine) for config in configs)
    assert 0.5 < muons.moments / adam.moments < 0.6
    assert (adam.ema, adam.weights) == (muons.ema, muons.weights)
    adam, muons = (kernel_seconds(config, layout, engine, hardware) for config in configs)
    assert adam["products"] < muons["products"] and adam["memory"] == muons["memory"]
    adam, muons = (step_time(config, layout, engine, hardware, 8).total for config in configs)
    assert adam < muons < 1.25 * adam
    assert newton_schulz_flops(configs[0], layout, engine) == 0
