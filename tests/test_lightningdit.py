"""LightningDiT's weights (arXiv 2501.01423): a file in its layout becomes a model that computes
what its equations say, written out here a second time.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml

from diffmoe.checkpoints.reader import Checkpoint
from diffmoe.commands import exchange
from diffmoe.config import ModelConfig
from diffmoe.models.pretrained import open_pretrained
from test_interchange import assert_same_states, call, refusal, sampling_model

SMALL = ModelConfig(
    family="dense",
    input_size=4,
    channels=5,
    patch=1,
    width=48,
    depth=2,
    heads=4,
    classes=7,
    learn_sigma=False,
    positions="rope",
    norm="rms",
    activation="swiglu_bias",
)
NORMED = replace(SMALL, patch=2, input_size=8, qk_norm=True)


def tables(model):
    """Of every token: sines and cosines of its column, then of its row; a head's cosines and sines
    of its row, then of its column, each twice for a pair.
    """
    side = model.input_size // model.patch
    row, column = np.divmod(np.arange(side**2.0)[:, None], side)

    def angles(place, channels):
        return place * 10000.0 ** (-np.arange(channels) / channels)

    of_column, of_row = angles(column, model.width // 4), angles(row, model.width // 4)
    parts = [np.sin(of_column), np.cos(of_column), np.sin(of_row), np.cos(of_row)]
    head = model.width // model.heads // 4
    turns = np.concatenate([angles(row, head), angles(column, head)], axis=1).repeat(2, axis=1)
    found = {
        "pos_embed": np.concatenate(parts, axis=1)[None],
        "feat_rope.freqs_cos": np.cos(turns),
        "feat_rope.freqs_sin": np.sin(turns),
    }
    return {name: torch.from_numpy(value).float() for name, value in found.items()}


def state_of(model, seed=0):
    """Random weights, biases and norms under LightningDiT's names."""
    D, inner = model.width, int(2 / 3 * int(model.width * 4.0))
    linears = {"t_embedder.mlp.0": (D, 256), "t_embedder.mlp.2": (D, D)}
    norms = {"final_layer.norm_final": D}
    for i in range(model.depth):
        block = f"blocks.{i}"
        linears |= {f"{block}.attn.qkv": (3 * D, D), f"{block}.attn.proj": (D, D)}
        linears |= {f"{block}.mlp.w12": (2 * inner, D), f"{block}.mlp.w3": (D, inner)}
        linears[f"{block}.adaLN_modulation.1"] = (6 * D, D)
        norms |= {f"{block}.norm1": D, f"{block}.norm2": D}
        if model.qk_norm:
            norms |= {f"{block}.attn.{n}_norm": D // model.heads for n in "qk"}
    linears["final_layer.linear"] = (model.patch**2 * model.channels, D)
    linears["final_layer.adaLN_modulation.1"] = (2 * D, D)
    shapes = {"x_embedder.proj.weight": (D, model.channels, model.patch, model.patch)}
    shapes |= {"x_embedder.proj.bias": (D,)}
    shapes |= {"y_embedder.embedding_table.weight": (model.classes + 1, D)}
    shapes |= {f"{name}.weight": size for name, size in linears.items()}
    shapes |= {f"{name}.bias": size[:1] for name, size in linears.items()}
    shapes |= {f"{name}.weight": (size,) for name, size in norms.items()}
    generator = torch.Generator().manual_seed(seed)
    drawn = {n: 0.2 * torch.randn(size, generator=generator) for n, size in shapes.items()}
    for name in norms:
        drawn[f"{name}.weight"] += 1
    return {**drawn, **tables(model)}


def lightningdit(state, model, x, t, y):
    """Its velocity, in fp64."""
    s = {name: value.double() for name, value in state.items()}
    B, C, p, side = len(x), model.channels, model.patch, model.input_size // model.patch

    def linear(name, v):
        return v @ s[f"{name}.weight"].flatten(1).T + s[f"{name}.bias"]

    def rms(name, v):
        return v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt() * s[f"{name}.weight"]

    def silu(v):
        return v / (1 + torch.exp(-v))

    def turned(v):  # [B, N, heads, d]
        turns = torch.complex(s["feat_rope.freqs_cos"], s["feat_rope.freqs_sin"])[:, None, ::2]
        pairs = torch.view_as_complex(v.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turns).flatten(-2)

    def attention(name, v):
        q, k, v = linear(f"{name}.qkv", v).view(B, side**2, 3, model.heads, -1).unbind(2)
        if model.qk_norm:
            q, k = rms(f"{name}.q_norm", q), rms(f"{name}.k_norm", k)
        scores = torch.einsum("bnhd,bmhd->bhnm", turned(q), turned(k)) / q.shape[-1] ** 0.5
        mixed = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v)
        return linear(f"{name}.proj", mixed.flatten(2))

    patches = x.view(B, C, side, p, side, p).permute(0, 2, 4, 1, 3, 5).reshape(B, side**2, -1)
    h = linear("x_embedder.proj", patches) + s["pos_embed"]
    angles = t[:, None] * 10000 ** (-torch.arange(128, dtype=torch.float64) / 128)
    waves = torch.cat([angles.cos(), angles.sin()], dim=1)
    c = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", waves)))
    c = silu(c + s["y_embedder.embedding_table.weight"][y])[:, None]
    for i in range(model.depth):
        b = f"blocks.{i}"
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(f"{b}.adaLN_modulation.1", c).chunk(
            6, dim=-1
        )
        h = h + gate1 * attention(f"{b}.attn", rms(f"{b}.norm1", h) * (1 + scale1) + shift1)
        gate, up = linear(f"{b}.mlp.w12", rms(f"{b}.norm2", h) * (1 + scale2) + shift2).chunk(
            2, dim=-1
        )
        h = h + gate2 * linear(f"{b}.mlp.w3", silu(gate) * up)
    shift, scale = linear("final_layer.adaLN_modulation.1", c).chunk(2, dim=-1)
    out = linear("final_layer.linear", rms("final_layer.norm_final", h) * (1 + scale) + shift)
    out = out.view(B, side, side, p, p, C).permute(0, 5, 1, 3, 2, 4)
    return out.reshape(B, C, side * p, side * p)


def asked(folder, model, *words):
    """The command line of an import of ``in.pt``."""
    tree = {"model": vars(model), "run": {"folder": str(folder / "run")}, "train": {"batch": 6}}
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return "--research", folder / "in.pt", "--config", folder / "config.yaml", *words


@pytest.mark.parametrize("model", [SMALL, NORMED], ids=["XL's", "normed, patches"])
def test_an_import_computes_what_lightningdit_computes(tmp_path, model):
    states = {"model": state_of(model), "ema": state_of(model, 1)}
    # As its average leaves the table, and as fp32 angles leave the rotations.
    states["ema"]["pos_embed"] = states["ema"]["pos_embed"] + 1.6e-4
    states["model"]["feat_rope.freqs_cos"] = states["model"]["feat_rope.freqs_cos"] - 1e-6
    file = {"model": {f"module.{n}": v for n, v in states["model"].items()}, "ema": states["ema"]}
    torch.save({**file, "opt": {}, "config": {"train": {"ckpt": None}}}, tmp_path / "in.pt")
    said = call(exchange.import_main, *asked(tmp_path, model))
    assert "(ema) is up to 0.00016 off the table" in said and "not used: opt, config" in said
    assert "no tensor of the file can confirm: diffusion.process (flow)" in said
    checkpoint = Checkpoint(tmp_path / "run")
    x = torch.randn(4, 5, model.input_size, model.input_size, dtype=torch.float64)
    t, y = torch.tensor([0.0, 0.31, 0.31, 0.9], dtype=torch.float64), torch.tensor([0, 3, 7, 7])
    with torch.no_grad():
        for which, weights in (("model", "raw"), ("ema", "ema")):
            wanted = lightningdit({**states[which], **tables(model)}, model, x, t, y)
            ours = sampling_model(checkpoint, weights)[0]
            found = ours(x.float(), t.float(), y).prediction.double()
            assert (found - wanted).norm() < 1e-5 * wanted.norm() and wanted.norm() > 1
            torch.testing.assert_close(
                ours.double()(x, t, y).prediction, wanted, rtol=1e-10, atol=1e-10
            )
    send = ("--checkpoint", tmp_path / "run", "--format")
    call(exchange.export_main, *send, "research", "--out", tmp_path / "out.pt")
    assert_same_states(tmp_path / "out.pt", states)
    call(exchange.export_main, *send, "hf", "--out", tmp_path / "hf")
    again = open_pretrained(tmp_path / "hf").model().double()
    torch.testing.assert_close(again(x, t, y).prediction, wanted, rtol=1e-10, atol=1e-10)


def test_another_grid_has_its_own_tables(tmp_path):
    torch.save(state_of(SMALL), tmp_path / "in.pt")
    said = call(exchange.import_main, *asked(tmp_path, SMALL, "model.input_size=6"))
    assert "pos_embed is of 4 x 4 tokens" in said
    call(
        exchange.export_main,
        *("--checkpoint", tmp_path / "run", "--format", "research", "--out", tmp_path / "out.pt"),
    )
    back = torch.load(tmp_path / "out.pt", weights_only=True)["model"]
    for name, value in tables(replace(SMALL, input_size=6)).items():
        torch.testing.assert_close(back[name], value, rtol=0, atol=1e-6)


W3, MODULATION = "blocks.1.mlp.w3.weight", "blocks.0.adaLN_modulation.1.weight"


@pytest.mark.parametrize(
    "changes, words, told",
    [
        ({W3: None}, (), f"1 missing ({W3}), 0 extra"),
        ({"feat_rope.freqs_sin": None}, (), "1 missing (feat_rope.freqs_sin), 0 extra"),
        ({"blocks.1.ls1": torch.ones(48)}, (), "0 missing, 1 extra (blocks.1.ls1)"),
        ({MODULATION: torch.ones(192, 48)}, (), f"1 misshaped ({MODULATION} (192, 48) instead of"),
        ({"feat_rope.freqs_cos": torch.ones(16, 12)}, (), "feat_rope.freqs_cos differs from"),
        ({}, ("model.classes=8",), "by its shapes it needs model.classes=7"),
        ({}, ("model.heads=12",), "misshaped (feat_rope.freqs_cos (16, 12) instead of (16, 4)"),
        ({}, ("model.heads=12",), "by its shapes it needs model.heads=4"),
        (
            {},
            ("model.positions=sincos", "model.norm=layer", "model.activation=gelu"),
            "needs model.positions=rope model.norm=rms model.activation=swiglu_bias",
        ),
        ({}, ("model.mlp_ratio=2",), "by its shapes it needs model.mlp_ratio=4"),
        (
            {f"blocks.{i}.mlp.w12.weight": torch.ones(2 * 100, 48) for i in range(2)},
            (),
            "no setting fits it: the file's SwiGLU has inner width 100, which is not a multiple",
        ),
        ({}, ("model.activation=swiglu",), "(swiglu) must be gelu or swiglu_bias for a research"),
        ({}, ("model.family=ec", "moe.pool=1"), "model.positions (rope) must be sincos for"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path, changes, words, told):
    state = {**state_of(SMALL), **changes}
    torch.save({n: v for n, v in state.items() if v is not None}, tmp_path / "in.pt")
    assert told in refusal(exchange.import_main, *asked(tmp_path, SMALL, *words))
