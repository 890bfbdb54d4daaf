"""``model.positions``, ``norm``, ``activation`` and ``position_scale``: each beside its equation
written out, and a model with all of them in training, files and other layouts.
"""

from __future__ import annotations

import cmath
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from sklearn.datasets import load_digits

from diffmoe.checkpoints.reader import FIRST_MOMENT, MASTER, SECOND_MOMENT, Checkpoint, ema_kind
from diffmoe.commands import exchange
from diffmoe.config import ModelConfig, MoEConfig, load_config, swiglu_hidden
from diffmoe.data.digits import DIGITS_META
from diffmoe.data.shards import write_shards
from diffmoe.models.dit import DiT
from diffmoe.models.layers import Attention, Mlp, norm, rotary_turns, rotated, sine_positions
from diffmoe.models.logical import initialize
from diffmoe.moe.experts import Experts
from diffmoe.moe.routing import RoutingRule
from programs import TINY, digits, losses, run_program
from test_interchange import call, refusal

MODERN = {
    "positions": "rope",
    "norm": "rms",
    "qk_norm": True,
    "activation": "swiglu",
}
SMALL = ModelConfig(width=32, depth=4, heads=2, classes=10, input_size=8)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# ------------------------------------------------------------------------------------------------
# rotary positions


def test_turns_are_rotations_of_complex_numbers():
    """RoFormer, equation 34: a pair at place m is multiplied by exp(i m rate)."""
    head, side = 16, 3
    x = torch.randn(side * side, head, dtype=torch.float64)
    found = rotated(x, rotary_turns(head, side).double())
    for token in range(side * side):
        for pair in range(head // 2):
            place = token // side if pair < head // 4 else token % side
            rate = 10000 ** (-(pair % (head // 4)) / (head // 4))
            a, b = x[token, 2 * pair : 2 * pair + 2].tolist()
            turned = complex(a, b) * cmath.exp(1j * place * rate)
            wanted = torch.tensor([turned.real, turned.imag], dtype=torch.float64)
            torch.testing.assert_close(
                found[token, 2 * pair : 2 * pair + 2], wanted, rtol=0, atol=1e-6
            )


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_scores_depend_on_differences_of_rows_and_columns_alone(scale):
    head, side = 24, 6
    turns = rotary_turns(head, side, scale).double()
    q, k = torch.randn(2, head, dtype=torch.float64)
    turned_q, turned_k = (rotated(x.expand(side * side, head), turns) for x in (q, k))
    torch.testing.assert_close(
        turned_q.norm(dim=1), q.norm().expand(side * side), rtol=1e-6, atol=0
    )
    scores = turned_q @ turned_k.T
    by_difference = {}
    for i in range(side * side):
        for j in range(side * side):
            difference = i // side - j // side, i % side - j % side
            by_difference.setdefault(difference, []).append(scores[i, j])
    for alike in map(torch.stack, by_difference.values()):
        torch.testing.assert_close(alike, alike[:1].expand_as(alike), rtol=0, atol=1e-5)
    firsts = sorted(alike[0].item() for alike in by_difference.values())
    assert min(b - a for a, b in zip(firsts, firsts[1:])) > 1e-5, "some differences look alike"


def test_a_scale_of_a_half_spans_the_grid_of_half_the_side():
    """Every second token of the larger grid is where a token of the smaller one is."""
    for table in (sine_positions(32, 4)[None], rotary_turns(16, 4)):
        larger = sine_positions(32, 8, 0.5)[None]
        if len(table) == 2:
            larger = rotary_turns(16, 8, 0.5)
        assert torch.equal(larger.unflatten(1, (8, 8))[:, ::2, ::2].flatten(1, 2), table)


# ------------------------------------------------------------------------------------------------
# layers beside their equations


def rms(x, weight):
    """RMSNorm, equation 4, with the codes' 1e-6 under the root."""
    return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + 1e-6) * weight


def test_rmsnorm_is_its_equation():
    layer = norm(replace(SMALL, norm="rms"), 32).double()
    torch.nn.init.normal_(layer.weight)
    x = torch.randn(5, 32, dtype=torch.float64) + 3
    assert [name for name, _ in layer.named_parameters()] == ["weight"]
    torch.testing.assert_close(layer(x), rms(x, layer.weight), rtol=1e-12, atol=0)


def test_attention_is_its_equation():
    layer = Attention(replace(SMALL, **MODERN)).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 16, 32, dtype=torch.float64)
    q, k, v = layer.qkv(x).chunk(3, dim=-1)
    out = []
    for h in range(2):
        head = slice(16 * h, 16 * (h + 1))
        turned_q = rotated(rms(q[..., head], layer.q_norm.weight), layer.turns[:, :, 0])
        turned_k = rotated(rms(k[..., head], layer.k_norm.weight), layer.turns[:, :, 0])
        shares = torch.softmax(turned_q @ turned_k.transpose(1, 2) / math.sqrt(16), dim=-1)
        out.append(shares @ v[..., head])
    torch.testing.assert_close(layer(x), layer.proj(torch.cat(out, dim=-1)), rtol=1e-10, atol=1e-10)


def test_swiglu_is_its_equation_and_an_experts():
    layer = Mlp(32, 128, "swiglu").double()
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    gate, up = x @ layer.gate.weight.T, x @ layer.fc1.weight.T
    wanted = (gate / (1 + torch.exp(-gate)) * up) @ layer.fc2.weight.T
    torch.testing.assert_close(layer(x), wanted, rtol=1e-12, atol=1e-14)
    expert = Experts(32, 128, 1, 1, 0, "swiglu").double()
    for name in ("gate", "fc1", "fc2"):
        getattr(expert, f"{name}_weight").data[0] = getattr(layer, name).weight.T
    torch.testing.assert_close(expert(x.flatten(0, 1), 10).view_as(x), wanted, rtol=1e-12, atol=0)
    assert layer.fc1.out_features == swiglu_hidden(128)


@pytest.mark.parametrize("layer", ["attention", "mlp", "norm"])
def test_gradients(layer):
    model = replace(SMALL, width=8, heads=2, input_size=4, **MODERN)
    module = {
        "attention": lambda: Attention(model),
        "mlp": lambda: Mlp(8, 16, "swiglu"),
        "norm": lambda: norm(model, 8),
    }[layer]().double()
    leaves = [torch.randn(1, 4, 8, dtype=torch.float64, requires_grad=True), *module.parameters()]
    assert torch.autograd.gradcheck(lambda x, *_: module(x), leaves)


def test_bf16_is_rotated_in_fp32_and_rounded_once():
    x, turns = torch.randn(16, 16).bfloat16(), rotary_turns(16, 4)
    assert torch.equal(rotated(x, turns), rotated(x.float(), turns).bfloat16())


# ------------------------------------------------------------------------------------------------
# the model


def test_defaults_add_nothing():
    """Names, and so the tensors that a seed makes, are those of files of before."""
    plain = DiT(SMALL, MoEConfig(experts=4, shared_experts=1))
    names = {name for name, _ in plain.named_parameters()}
    assert not any("norm" in name or "gate." in name for name in names)
    assert [name for name, _ in plain.named_buffers() if "turns" in name] == []
    modern = DiT(replace(SMALL, **MODERN), MoEConfig(experts=4, shared_experts=1))
    added = {name for name, _ in modern.named_parameters()} - names
    stems = {name.partition(".")[2].partition(".")[2] for name in added if "blocks" in name}
    assert {name for name in added if "blocks" not in name} == {"final_layer.norm.weight"}
    assert stems == {
        *(f"norm{i}.weight" for i in (1, 2)),
        *(f"attn.{name}_norm.weight" for name in "qk"),
        *(f"mlp.{name}gate.weight" for name in ("", "shared.")),
    }


def passed(recompute):
    """(prediction, gradients) of a training pass."""
    moe = MoEConfig(experts=4, activation="swiglu", shared_experts=1)
    model = DiT(replace(SMALL, **MODERN), moe, pool=2, recompute=recompute)
    initialize(model, 1)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "adaLN" in name or name.startswith("final_layer"):
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    out = model(torch.randn(4, 4, 8, 8), torch.rand(4), torch.arange(4), RoutingRule("train"))
    out.prediction.square().sum().backward()
    return out.prediction.detach(), {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("recompute", ["block", "selective"])
def test_recompute_changes_no_bit(recompute):
    (wanted, gradients), (found, again) = (
        [torch.manual_seed(0), passed(form)][1] for form in ("none", recompute)
    )
    assert torch.equal(found, wanted)
    for name, gradient in gradients.items():
        assert gradient is None or torch.equal(gradient, again[name]), name
    moved = [n for n, g in gradients.items() if "norm" in n and g is not None and g.abs().max() > 0]
    assert len(moved) == 4 * 4 + 1


# ------------------------------------------------------------------------------------------------
# files


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(run folder, its YAML) of a run of 4 steps with everything, which stopped after 2."""
    folder = tmp_path_factory.mktemp("modern")
    tree = {**TINY, "run": {"folder": str(folder / "run")}, "parallel": {"ep": 1}}
    tree["data"] = {"shards": str(digits())}
    tree["model"] = {**TINY["model"], **MODERN}
    tree["moe"] = {**TINY["moe"], "activation": "swiglu", "shared_experts": 1}
    tree["train"] = {**TINY["train"], "steps": 4, "schedule": "constant"}
    (folder / "modern.yaml").write_text(yaml.safe_dump(tree))
    for steps in (2, 4):
        (result,) = run_program(1, "--config", str(folder / "modern.yaml"), f"train.steps={steps}")
        assert result.returncode == 0, result
    return folder / "run", folder / "modern.yaml"


@pytest.mark.full
def test_a_run_resumes_bit_for_bit(written, tmp_path):
    folder, config = written
    (result,) = run_program(1, "--config", str(config), f"run.folder={tmp_path / 'whole'}")
    assert result.returncode == 0, result
    ours, whole = Checkpoint(folder), Checkpoint(tmp_path / "whole")
    assert losses(folder) == losses(tmp_path / "whole") and ours.step == whole.step == 4
    for kind in (MASTER, FIRST_MOMENT, SECOND_MOMENT, ema_kind(0.7)):
        for name, value in whole.tensors(kind).items():
            assert torch.equal(ours.tensors(kind)[name], value), f"{kind} {name}"


@pytest.mark.full
def test_foreign_forms(written, tmp_path):
    """A Hugging Face folder carries all of it, also to a grid of another side; the research code's
    form carries none of it, and says so.
    """
    folder, config = written
    send = ["--checkpoint", folder, "--format"]
    assert "model.positions (rope) must be sincos for a research checkpoint" in refusal(
        exchange.export_main, *send, "research", "--out", tmp_path / "x.pt"
    )
    call(exchange.export_main, *send, "hf", "--out", tmp_path / "hf")
    larger = ("model.input_size=16", "model.position_scale=0.5", "moe.pool=1")
    run = f"run.folder={tmp_path / 'run'}"
    call(exchange.import_main, "--hf", tmp_path / "hf", run, *larger)
    there = Checkpoint(tmp_path / "run")
    for name, value in Checkpoint(folder).weights("ema").items():
        assert torch.equal(there.weights("raw")[name], value), name
    assert there.config().model == replace(
        load_config(config).model, input_size=16, position_scale=0.5
    )


@pytest.mark.full
def test_a_run_goes_on_at_twice_the_side(written, tmp_path):
    """The published 256x256 and 512x512 in small: other data, four times the tokens."""
    folder, config = written
    images, labels = load_digits(return_X_y=True)
    large = images.reshape(-1, 1, 8, 8).repeat(2, 2).repeat(2, 3).astype(np.uint8)
    samples = ((f"{i:04d}", *pair) for i, pair in enumerate(zip(large, labels.tolist())))
    write_shards(samples, tmp_path / "large", samples_per_shard=200, meta=DIGITS_META)
    shutil.copytree(folder, tmp_path / "run")
    words = [f"run.folder={tmp_path / 'run'}", f"data.shards={tmp_path / 'large'}"]
    words += ["train.steps=6", "model.input_size=16", "model.position_scale=0.5", "--new-recipe"]
    (result,) = run_program(1, "--config", str(config), *words)
    assert result.returncode == 0, result
    assert "model.input_size: 8 -> 16" in result.stderr + result.stdout
    found = losses(tmp_path / "run")
    assert sorted(found) == list(range(1, 7)) and all(map(math.isfinite, found.values()))
    (sampled,) = run_program(
        1, "sample", "--checkpoint", str(tmp_path / "run"), "--count", "2", "--out", str(tmp_path)
    )
    assert sampled.returncode == 0, sampled


@pytest.mark.parametrize(
    "setting, told",
    [
        ("positions=rope", "model.positions (rope) must be sincos"),
        ("norm=rms", "model.norm (rms) must be layer"),
        ("activation=swiglu", "model.activation (swiglu) must be gelu for"),
        ("activation=swiglu_bias", "model.activation (swiglu_bias) must be gelu for"),
    ],
)
@pytest.mark.parametrize("verb", ["--research", "--dense"])
def test_research_files_are_of_the_published_block(tmp_path, verb, setting, told):
    torch.save({"model": {"blocks.0.attn.proj.bias": torch.zeros(2)}}, tmp_path / "in.pt")
    config = "configs/diffmoe_s_e16_flow.yaml"
    words = [verb, tmp_path / "in.pt", "--config", config, f"model.{setting}"]
    assert told in refusal(exchange.import_main, *words)
