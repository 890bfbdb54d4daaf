"""Weights in and out: research checkpoints of the four families, upcycling, Hugging Face folders,
refusals.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import pickle

import numpy as np
import pytest
import torch
import yaml

from diffmoe.checkpoints.reader import Checkpoint, ema_kind
from diffmoe.commands import exchange
from diffmoe.config import SampleConfig, config_to_tree, load_config
from diffmoe.diffusion.rectified_flow import guided_velocity
from diffmoe.diffusion.sampling import euler
from diffmoe.environment import detect
from diffmoe.errors import UserError
from diffmoe.evaluation.card import Card
from diffmoe.evaluation.generate import generate, threshold_note
from diffmoe.evaluation.scores import Scores
from diffmoe.models.dit import DiT
from diffmoe.models.interchange import same_bits, to_research
from diffmoe.models.logical import (
    fresh_buffers,
    initialize,
    load_buffers,
    load_logical,
    logical_tensors,
    weights_digest,
)
from diffmoe.models.pretrained import open_pretrained
from diffmoe.models.upcycling import load_dense, measure, upcycle
from diffmoe.moe.routing import RoutingRule
from programs import TINY, digits, losses, run_cases, start_program
from reference_models import DATA, FAMILIES, POOL, close, reference


def call(main, *arguments, **environment):
    """A verb's standard output; ValueError passes through."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert (
            main([str(a) for a in arguments], dataclasses.replace(detect({}), **environment)) == 0
        )
    return out.getvalue()


def refusal(main, *arguments, **environment) -> str:
    with pytest.raises(UserError) as caught:
        call(main, *arguments, **environment)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def state_of(family):
    with np.load(DATA / f"{family}.npz") as file:
        return {
            k.removeprefix("param/"): torch.from_numpy(file[k])
            for k in file
            if k.startswith("param/")
        }


def other_state(family):
    """As an EMA is: near the weights, its thresholds averaged again; constants constant."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: value
        if name == "pos_embed" or name.endswith("ema_decay")
        else value + 0.01 * torch.randn(value.shape, generator=generator)
        for name, value in state_of(family).items()
    }


def config_of(family, folder, **moe):
    sizes = {"family": family, "input_size": 8, "width": 16, "depth": 4, "heads": 2, "classes": 10}
    path = folder / f"{family}.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "run": {"folder": str(folder / f"run_{family}")},
                "model": sizes,
                "train": {"batch": 6},
                "moe": {"experts": 4, "pool": POOL[family], **moe},
                "sample": {"routing": "batch", "steps": 2},
            }
        )
    )
    return path


@pytest.fixture(scope="module", params=FAMILIES)
def imported(request, tmp_path_factory):
    """(family, folder with its YAML, the file's two states): both states in a file as the research
    code writes it.
    """
    family, folder = request.param, tmp_path_factory.mktemp(request.param)
    states = {"model": state_of(family), "ema": other_state(family)}
    torch.save(
        {**states, "opt": {"state": {0: torch.zeros(3)}}, "args": argparse.Namespace(lr=1e-4)},
        folder / "in.pt",
    )
    said = call(
        exchange.import_main, "--research", folder / "in.pt", "--config", config_of(family, folder)
    )
    assert f"model and ema, {len(states['ema'])} tensors each" in said and "step_00000000" in said
    assert (
        "the configuration's, which no tensor of the file can confirm: model.heads (2), "
        "diffusion.process (flow)\n" in said
    )
    return family, folder, states


def sampling_model(checkpoint, weights):
    """As ``run.py sample`` builds it."""
    config = checkpoint.config()
    model = DiT(config.model, config.moe, time_scale=config.diffusion.time_scale)
    load_logical(model, checkpoint.weights(weights))
    load_buffers(model, checkpoint.tensors("buffers"))
    return model.eval(), config


# ----------------------------------------------------------------------------------------------
# research format


def assert_same_states(path, states):
    written = torch.load(path, weights_only=True)
    assert set(written) == {"model", "ema"}
    for which, state in states.items():
        assert set(written[which]) == set(state)
        for name, value in state.items():
            assert (
                same_bits(written[which][name], value) and written[which][name].is_contiguous()
            ), f"{which}/{name}"


def test_import_then_export_gives_the_same_bytes(imported):
    family, folder, states = imported
    call(
        exchange.export_main,
        "--checkpoint",
        folder / f"run_{family}",
        "--format",
        "research",
        "--out",
        folder / "out.pt",
    )
    assert_same_states(folder / "out.pt", states)
    assert (folder / "out.pt").stat().st_size < 3 * sum(
        v.nbytes for v in states["model"].values()
    ), "stores views whole"
    assert "already exists" in refusal(
        exchange.export_main,
        "--checkpoint",
        folder / f"run_{family}",
        "--format",
        "research",
        "--out",
        folder / "out.pt",
    )


def test_other_bits_come_back_too(tmp_path):
    """Half precision, -0, NaN, and a position table of another machine."""
    state = state_of("diffmoe")
    state["blocks.0.mlp.fc1.bias"] = torch.tensor([-0.0, float("nan")] * 32)
    state["pos_embed"] = torch.nextafter(state["pos_embed"], torch.tensor(2.0))
    half = {name: value.bfloat16() for name, value in state.items()}
    torch.save({"model": state, "ema": half}, tmp_path / "in.pt")
    call(
        exchange.import_main,
        "--research",
        tmp_path / "in.pt",
        "--config",
        config_of("diffmoe", tmp_path),
    )
    call(
        exchange.export_main,
        "--checkpoint",
        tmp_path / "run_diffmoe",
        "--format",
        "research",
        "--out",
        tmp_path / "out.pt",
    )
    assert_same_states(tmp_path / "out.pt", {"model": state, "ema": half})


@pytest.mark.parametrize(
    "wrap, said",
    [
        (lambda s: s, "only model"),
        (lambda s: {"model": s}, "only model"),
        (lambda s: {"ema": s, "opt": {}}, "only ema"),
    ],
)
def test_one_of_two_states_serves_as_both(tmp_path, wrap, said):
    state = state_of("diffmoe")
    torch.save(
        wrap(state), tmp_path / "in.pt", _use_new_zipfile_serialization=said == "only ema"
    )  # and the old format
    text = call(
        exchange.import_main,
        "--research",
        tmp_path / "in.pt",
        "--config",
        config_of("diffmoe", tmp_path),
    )
    assert said in text and "weights and EMA both start from it" in text
    call(
        exchange.export_main,
        "--checkpoint",
        tmp_path / "run_diffmoe",
        "--format",
        "research",
        "--out",
        tmp_path / "out.pt",
    )
    assert_same_states(tmp_path / "out.pt", {"model": state, "ema": state})


def test_an_imported_checkpoint_samples_what_the_research_code_samples(imported):
    family, folder, states = imported
    _, numbers = reference(family)
    model, _ = sampling_model(Checkpoint(folder / f"run_{family}"), "raw")
    for index, layer in model.moe_layers():
        if family == "diffmoe":  # of a checkpoint's two, the EMA's are kept
            layer.thresholds.value.copy_(states["model"][f"blocks.{index}.mlp.expert_threshold"])
    with torch.no_grad():
        velocity = guided_velocity(model, numbers["in/y"], 1.5, RoutingRule("batch"))
        close(
            euler(velocity, numbers["in/noise"], 8),
            numbers["flow/euler_8_cfg1.5"],
            "flow/euler_8_cfg1.5",
        )
    ema, _ = sampling_model(Checkpoint(folder / f"run_{family}"), "ema")
    assert torch.equal(ema.x_embedder.proj.weight, states["ema"]["x_embedder.proj.weight"])


def test_times_must_be_those_of_the_research_code(tmp_path):
    torch.save(state_of("diffmoe"), tmp_path / "in.pt")
    config, message = (
        config_of("diffmoe", tmp_path),
        "diffusion.time_scale (1000) must be 1 for a research checkpoint",
    )
    arguments = ("--research", tmp_path / "in.pt", "--config", config)
    assert message in refusal(exchange.import_main, *arguments, "diffusion.time_scale=1000")
    velocity = "diffusion.prediction (x) must be velocity for a research checkpoint"
    assert velocity in refusal(exchange.import_main, *arguments, "diffusion.prediction=x")
    call(
        exchange.import_main,
        "--dense",
        dense_file(tmp_path),
        "--config",
        config,
        "diffusion.time_scale=1000",
    )
    assert message in refusal(
        exchange.export_main,
        "--checkpoint",
        tmp_path / "run_diffmoe",
        "--format",
        "research",
        "--out",
        tmp_path / "out.pt",
    )
    assert not (tmp_path / "out.pt").exists()


def test_thresholds_arrive_as_observed(imported):
    family, folder, states = imported
    buffers = Checkpoint(folder / f"run_{family}").tensors("buffers")
    if family != "diffmoe":
        assert len(buffers) == 0
        return
    for block in (1, 3):
        assert torch.equal(
            buffers[f"blocks.{block}.mlp.thresholds.value"],
            states["ema"][f"blocks.{block}.mlp.expert_threshold"],
        ), "those that samples are drawn with"
        assert buffers[f"blocks.{block}.mlp.thresholds.observations"] == 1


@pytest.mark.parametrize(
    "moe", [{"activation": "swiglu"}, {"shared_experts": 2}, {"interleave": False}]
)
def test_names_of_the_codes_options_go_both_ways(tmp_path, moe):
    config = load_config(config_of("diffmoe", tmp_path, **moe))
    model = DiT(config.model, config.moe)
    initialize(model, 0)
    logical = {
        name: piece.detach()
        for tensor in logical_tensors(model)
        for name, piece in tensor.pieces(tensor.parameter)
    }
    state = dict(
        to_research(
            {**logical, **fresh_buffers(config.model, config.moe)}, config.model, config.moe
        )
    )
    torch.save({"model": state}, tmp_path / "in.pt")
    call(
        exchange.import_main,
        "--research",
        tmp_path / "in.pt",
        "--config",
        tmp_path / "diffmoe.yaml",
    )
    tensors = Checkpoint(tmp_path / "run_diffmoe").weights("raw")
    assert set(tensors) == set(logical) and all(
        torch.equal(tensors[name], value) for name, value in logical.items()
    )


@pytest.mark.full
def test_training_starts_from_an_import_as_from_its_own_weights(tmp_path):
    """Weights of run.seed, out in research names and in again: two runs with one loss curve,
    moments and EMA included; and ``run.py sample`` reads what was imported.
    """
    tree = {
        **TINY,
        "data": {"shards": str(digits())},
        "parallel": {"ep": 1},
        "run": {"folder": str(tmp_path / "imported")},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tree))
    config = load_config(tmp_path / "tiny.yaml")
    model = DiT(config.model, config.moe)
    initialize(model, config.run.seed)
    logical = {
        name: piece.detach()
        for tensor in logical_tensors(model)
        for name, piece in tensor.pieces(tensor.parameter)
    }
    logical |= fresh_buffers(config.model, config.moe)
    torch.save({"model": dict(to_research(logical, config.model, config.moe))}, tmp_path / "in.pt")
    call(exchange.import_main, "--research", tmp_path / "in.pt", "--config", tmp_path / "tiny.yaml")
    train = ["--config", str(tmp_path / "tiny.yaml"), "train.steps=3"]
    sample = [
        "sample",
        "--checkpoint",
        str(tmp_path / "imported"),
        "--count",
        "2",
        "--out",
        str(tmp_path / "s"),
    ]
    with start_program(1, *train, f"run.folder={tmp_path / 'fresh'}") as fresh:
        (sampled,), (resumed,) = run_cases(1, [sample, train])
        results = [sampled, resumed, *fresh.wait()]
    assert [result.returncode for result in results] == [0, 0, 0], results
    assert "step 0, ema weights" in sampled.stdout and "at step 0" in resumed.stdout
    assert len(losses(tmp_path / "fresh")) == 3 and losses(tmp_path / "imported") == losses(
        tmp_path / "fresh"
    )
    ours, theirs = (Checkpoint(tmp_path / name) for name in ("imported", "fresh"))
    assert ours.step == 3 and "research" not in ours.kinds()
    for kind in ("master", ema_kind(0.7), "exp_avg_sq"):
        for name, value in theirs.tensors(kind).items():
            assert torch.equal(ours.tensors(kind)[name], value), f"{kind} {name}"


# --------------------------------------------------------------------------------------------------
# refusals


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("how", ["zip", "old", "pickle"])
def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path, how):
    trap, path = tmp_path / "executed", tmp_path / "evil.pt"
    tree = {"model": state_of("dense"), "args": Evil(str(trap))}
    if how == "pickle":
        path.write_bytes(pickle.dumps({"model": {}, "args": tree["args"]}, protocol=2))
    else:
        torch.save(tree, path, _use_new_zipfile_serialization=how == "zip")
    said = refusal(
        exchange.import_main, "--research", path, "--config", config_of("dense", tmp_path)
    )
    assert "is refused" in said and "posix.mkdir" in said, said
    assert not trap.exists() and not (tmp_path / "run_dense").exists()
    torch.load(path, weights_only=False) if how == "zip" else None
    assert trap.exists() == (how == "zip"), "the trap itself works"


def changed(**changes):
    """A DiffMoE state with tensors taken out (None) or replaced."""
    state = {
        **state_of("diffmoe"),
        **{name.replace("__", "."): value for name, value in changes.items()},
    }
    return {"model": {name: value for name, value in state.items() if value is not None}}


REFUSED = {
    "missing": (
        lambda: changed(pos_embed=None, blocks__1__mlp__gate_weight=None),
        "1 missing (blocks.1.mlp.gate_weight), 0 extra, 0 misshaped",
    ),
    "extra": (
        lambda: changed(head__weight=torch.zeros(1)),
        "0 missing, 1 extra (head.weight), 0 misshaped",
    ),
    "misshaped": (
        lambda: changed(x_embedder__proj__bias=torch.zeros(17)),
        "1 misshaped (x_embedder.proj.bias (17,) instead of (16,))",
    ),
    "many": (lambda: {"model": state_of("dense")}, "missing (blocks.1.mlp.gate_weight, "),
    "ema misfits": (lambda: {**changed(), "ema": state_of("ec")}, "(ema) does not fit"),
    "positions": (
        lambda: changed(pos_embed=torch.zeros(1, 16, 16)),
        "pos_embed differs from the sine-cosine table by up to 1",
    ),
    "NaN positions": (
        lambda: changed(pos_embed=torch.full((1, 16, 16), torch.nan)),
        "pos_embed differs",
    ),
    "decay": (
        lambda: changed(blocks__3__mlp__ema_decay=torch.tensor([0.9])),
        "blocks.3.mlp.ema_decay differs from moe.threshold_decay (0.95) by up to 0.05",
    ),
    "no state": (
        lambda: {"state_dict": {}, "epoch": 3},
        "has neither model nor ema and is not a bare state dict; it has 2 entries",
    ),
    "not a dict": (lambda: torch.zeros(3), "must hold a dict, not Tensor"),
    "not a model's tensors": (
        lambda: {"model": {"a": 1, "b": torch.zeros(2)}},
        "has neither model nor ema",
    ),
    "model is a list": (lambda: {"model": [1]}, "has neither model nor ema"),
    "whole numbers": (
        lambda: changed(blocks__0__mlp__fc1__bias=torch.zeros(64, dtype=torch.int64)),
        "1 others (blocks.0.mlp.fc1.bias (torch.int64))",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_with_names(tmp_path, name):
    make, text = REFUSED[name]
    torch.save(make(), tmp_path / "in.pt")
    said = refusal(
        exchange.import_main,
        "--research",
        tmp_path / "in.pt",
        "--config",
        config_of("diffmoe", tmp_path),
    )
    assert text in said, said
    assert not (tmp_path / "run_diffmoe" / "checkpoints").exists()


def test_damaged_files_are_refused(tmp_path):
    torch.save({"model": state_of("dense")}, tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    config = config_of("dense", tmp_path)
    for i, content in enumerate((b"", b"hello", whole[: len(whole) // 2], whole[:-1000])):
        (tmp_path / f"{i}.pt").write_bytes(content)
        said = refusal(exchange.import_main, "--research", tmp_path / f"{i}.pt", "--config", config)
        assert (
            "is refused: it is not an intact file of tensors (" in said
            and "weights_only" not in said
        )


def test_bad_options(imported, tmp_path):
    family, folder, _ = imported
    config, file, run = folder / f"{family}.yaml", folder / "in.pt", folder / f"run_{family}"
    bring, send = exchange.import_main, exchange.export_main
    assert "already has step_00000000" in refusal(bring, "--research", file, "--config", config)
    assert "WORLD_SIZE is 2" in refusal(bring, "--research", file, "--config", config, world=2)
    assert "go with --dense" in refusal(
        bring, "--research", file, "--config", config, "--scale-experts"
    )
    assert "one of the arguments --research --dense --hf is required" in refusal(
        bring, "--config", config
    )
    assert "not allowed with argument" in refusal(
        bring, "--config", config, "--research", file, "--dense", file
    )
    assert "gone.pt does not exist" in refusal(bring, "--config", config, "--research", "gone.pt")
    assert "--ranks (0)" in refusal(bring, "--config", config, "--research", file, "--ranks", "0")
    assert "--shard-size" in refusal(
        send, "--checkpoint", run, "--format", "hf", "--out", tmp_path / "o", "--shard-size", "big"
    )
    assert "go with --format hf" in refusal(
        send,
        "--checkpoint",
        run,
        "--format",
        "research",
        "--out",
        tmp_path / "o",
        "--weights",
        "raw",
    )
    assert "no complete checkpoint" in refusal(
        send, "--checkpoint", tmp_path, "--format", "hf", "--out", tmp_path / "o"
    )


# --------------------------------------------------------------------------------------------------
# upcycling


def dense_file(folder):
    path = folder / "dense.pt"
    if not path.exists():
        torch.save({"model": other_state("dense"), "ema": state_of("dense")}, path)
    return path


def upcycled_pair(folder, family, **moe):
    config = load_config(config_of(family, folder, **moe))
    dense = load_dense(state_of("dense"), config, "dense")
    pool = POOL[family]
    return dense, upcycle(dense, config, pool), config


def test_every_expert_is_a_copy_and_the_rest_is_the_dense_model(tmp_path):
    config = config_of("diffmoe", tmp_path)
    said = call(exchange.import_main, "--dense", dense_file(tmp_path), "--config", config)
    assert "ema of model, ema" in said and "2 blocks x 4 experts" in said
    model, _ = sampling_model(Checkpoint(tmp_path / "run_diffmoe"), "raw")
    state, fresh = state_of("dense"), DiT(model.model, model.moe)
    initialize(fresh, 0)
    for index, layer in model.moe_layers():
        for expert in range(4):
            assert torch.equal(
                layer.experts.fc1_weight[expert].t(), state[f"blocks.{index}.mlp.fc1.weight"]
            )
            assert torch.equal(
                layer.experts.fc2_weight[expert].t(), state[f"blocks.{index}.mlp.fc2.weight"]
            )
            assert torch.equal(
                layer.experts.fc2_bias[expert], state[f"blocks.{index}.mlp.fc2.bias"]
            )
        assert torch.equal(layer.router, fresh.blocks[index].mlp.router)
        assert torch.equal(
            layer.capacity_predictor[0].weight, fresh.blocks[index].mlp.capacity_predictor[0].weight
        )
        assert layer.thresholds.observations == 0
    sample = SampleConfig()
    assert "note: training has not observed the thresholds of 2 layers yet" in threshold_note(
        model, sample
    )
    assert threshold_note(model, dataclasses.replace(sample, gamma=0.4)) is None
    for _, layer in model.moe_layers():
        layer.thresholds.commit(torch.full((4,), 0.3))
    assert threshold_note(model, sample) is None
    assert torch.equal(model.blocks[2].mlp.fc1.weight, state["blocks.2.mlp.fc1.weight"])
    ema = Checkpoint(tmp_path / "run_diffmoe").weights("ema")
    assert all(
        torch.equal(value, ema[name])
        for name, value in Checkpoint(tmp_path / "run_diffmoe").weights("raw").items()
    )


@pytest.mark.parametrize("family", ["tc", "ec", "diffmoe"])
def test_the_receipt_is_the_distance_of_the_outputs(tmp_path, family):
    """Computed here another way: the dense model, its mixtures' MLPs multiplied by each token's sum
    of gates.
    """
    dense, model, config = upcycled_pair(tmp_path, family)
    receipt = measure(model, dense, config)
    assert receipt.samples == 4 and receipt.pool == min(POOL[family], 4) and receipt.factor == 4
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(4, 4, 8, 8, generator=generator), torch.rand(4, generator=generator)
    y, rule = torch.randint(10, (4,), generator=generator), RoutingRule()
    for _, layer in model.moe_layers():
        layer.pool = receipt.pool

    def moved(weigh):
        def replace(i):
            def hook(mlp, inputs, output):
                scores = (inputs[0].flatten(0, 1) @ model.blocks[i].mlp.router.t()).softmax(dim=1)
                mask = model.blocks[i].mlp(inputs[0], rule)[1].mask_TE
                return output * weigh(scores * mask).view(4, 16, 1)

            return hook

        hooks = [
            dense.blocks[i].mlp.register_forward_hook(replace(i)) for i, _ in model.moe_layers()
        ]
        out = dense(x, t, y, rule).prediction
        for hook in hooks:
            hook.remove()
        return ((out - wanted).norm() / wanted.norm()).item()

    with torch.no_grad():
        wanted = dense(x, t, y, rule).prediction
        assert receipt.copied == pytest.approx(moved(lambda gates: gates.sum(1)), rel=1e-3)
        assert receipt.renormalised == pytest.approx(
            moved(lambda gates: (gates > 0).any(1).float()), rel=1e-3, abs=1e-6
        )
        assert receipt.scaled == pytest.approx(moved(lambda gates: 4 * gates.sum(1)), rel=1e-3)
    assert receipt.copied > 0.05, "a plain copy moves the function"
    if family == "tc":  # every token has its expert
        assert receipt.untaken == 0 and receipt.renormalised < 1e-6 and receipt.everywhere is None
        assert receipt.scaled < receipt.copied / 5
    else:
        assert 0.1 < receipt.untaken < 0.9 and receipt.everywhere < 1e-6


def test_with_a_capacity_hold_the_function_does_not_move(tmp_path):
    dense, model, config = upcycled_pair(tmp_path, "diffmoe", capacity_hold=10, capacity_until=20)
    receipt = measure(model, dense, config)
    assert receipt.capacity == 4 and receipt.factor == 1
    assert max(receipt.copied, receipt.renormalised, receipt.scaled) < 1e-6 and receipt.untaken == 0


def test_scaled_experts_are_written_and_said(tmp_path):
    said = call(
        exchange.import_main,
        "--dense",
        dense_file(tmp_path),
        "--config",
        config_of("tc", tmp_path),
        "--scale-experts",
        "--weights",
        "model",
    )
    rows = {
        line[:48].strip(): line[48:].split() for line in said.splitlines() if line.startswith("  ")
    }
    assert (
        rows["fc2 x 4 (--scale-experts)"][1:] == ["<-", "written"]
        and len(rows["plain copies"]) == 1
    )
    model, config = sampling_model(Checkpoint(tmp_path / "run_tc"), "raw")
    dense = load_dense(other_state("dense"), config, "dense")
    assert torch.equal(model.blocks[1].mlp.experts.fc2_bias[3], 4 * dense.blocks[1].mlp.fc2.bias)
    assert measure(upcycle(dense, config, 6), dense, config).scaled == pytest.approx(
        float(rows["fc2 x 4 (--scale-experts)"][0]), abs=1e-6
    )


@pytest.mark.parametrize(
    "family, moe, text",
    [
        ("dense", {}, "model.family (dense) must be one of tc, ec, diffmoe"),
        ("diffmoe", {"mlp_ratio": 2}, "moe.mlp_ratio (2.0) must be model.mlp_ratio (4.0)"),
        ("diffmoe", {"activation": "swiglu"}, "moe.activation (swiglu) must be gelu"),
        ("diffmoe", {"shared_experts": 1}, "moe.shared_experts (1) must be 0"),
    ],
)
def test_what_cannot_be_upcycled(tmp_path, family, moe, text):
    assert text in refusal(
        exchange.import_main,
        "--dense",
        dense_file(tmp_path),
        "--config",
        config_of(family, tmp_path, **moe),
    )


def test_upcycling_refuses_other_files(tmp_path):
    torch.save(state_of("tc"), tmp_path / "tc.pt")
    config = config_of("diffmoe", tmp_path)
    assert "(model.family dense)" in refusal(
        exchange.import_main, "--dense", tmp_path / "tc.pt", "--config", config
    )
    assert "--weights (ema) is not in" in refusal(
        exchange.import_main, "--dense", tmp_path / "tc.pt", "--config", config, "--weights", "ema"
    )
    untrained = {
        **state_of("dense"),
        "final_layer.linear.weight": torch.zeros(32, 16),
        "final_layer.linear.bias": torch.zeros(32),
    }
    torch.save(untrained, tmp_path / "zero.pt")
    assert "output is zero" in refusal(
        exchange.import_main, "--dense", tmp_path / "zero.pt", "--config", config
    )


# ------------------------------------------------------------------------------------------------
# Hugging Face


@pytest.mark.parametrize("size, files", [("5GB", 1), ("40KB", 3)])
def test_a_hugging_face_folder_loads_back_and_samples_the_same(imported, tmp_path, size, files):
    family, folder, _ = imported
    run, out = folder / f"run_{family}", tmp_path / "hf"
    call(
        exchange.export_main,
        "--checkpoint",
        run,
        "--format",
        "hf",
        "--out",
        out,
        "--shard-size",
        size,
    )
    weights = sorted(path.name for path in out.glob("*.safetensors"))
    if files == 1:
        assert (
            weights == ["model.safetensors"] and not (out / "model.safetensors.index.json").exists()
        )
    else:
        assert (
            len(weights) >= files and weights[0] == f"model-00001-of-{len(weights):05d}.safetensors"
        )
        assert all((out / name).stat().st_size < 50_000 for name in weights)
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == set(weights)
    opened = open_pretrained(out)
    model, config = opened.model(), opened.config
    ours, our_config = sampling_model(Checkpoint(run), "ema")
    labels, numbers = [1, 2, 3], range(3)
    assert torch.equal(
        generate(model, config, labels, numbers, torch.device("cpu")),
        generate(ours, our_config, labels, numbers, torch.device("cpu")),
    )
    written = json.loads((out / "config.json").read_text())
    assert (
        written["model_type"] == "diffmoe" and written["weights"] == "ema" and written["step"] == 0
    )
    assert (
        "folder" not in written["config"]["run"]
        and written["config"]["model"] == config_to_tree(our_config)["model"]
    )
    assert str(folder) not in (out / "config.json").read_text()
    text = (out / "README.md").read_text()
    assert (
        "AdamW, lr 0.0001 constant" in text
        and "| batch | 6 |" in text
        and "None were given" in text
    )
    assert ("experts per token" in text) == (family != "dense")
    if files > 1:
        (out / weights[0]).unlink()
        with pytest.raises(UserError, match="1 missing"):
            open_pretrained(out)


def card(checkpoint, **changes):
    model, config = sampling_model(checkpoint, "ema")
    fields = dict(
        scores=Scores(frechet_distance=12.345678, inception_score=80.0, inception_score_std=1.0),
        checkpoint="x",
        weights="ema",
        step=0,
        weights_sha256=weights_digest(model),
        family=config.model.family,
        process="flow",
        vae=None,
        vae_sha256=None,
        latent_scale=None,
        latent_shift=None,
        cfg=1.5,
        sampler="euler",
        steps=250,
        sampling={},
        routing="token",
        capacity=None,
        gamma=0.4,
        batch=64,
        seed=0,
        labels="balanced",
        count=50000,
        splits=10,
        reference="ref.npz",
        reference_sha256="ab" * 32,
        reference_count=None,
        extractor="inception",
        extractor_sha256="cd" * 32,
        ranks=1,
        hardware="CPU",
        versions={},
        time="now",
        seconds=1.0,
    )
    return Card(**{**fields, **changes})


def test_scores_are_in_the_model_card_and_only_of_these_weights(imported, tmp_path):
    family, folder, _ = imported
    checkpoint = Checkpoint(folder / f"run_{family}")
    (tmp_path / "card.json").write_text(card(checkpoint).to_json())
    export = [
        "--checkpoint",
        folder / f"run_{family}",
        "--format",
        "hf",
        "--out",
        tmp_path / "hf",
        "--scores",
    ]
    call(exchange.export_main, *export, tmp_path / "card.json")
    text = (tmp_path / "hf" / "README.md").read_text()
    assert (
        "| 12.3457 | – | 80.0000 | – | – | 50000 | 1.5 | euler, 250 | token, gamma 0.4 | ref.npz "
        "(abababababab) |" in text
    )
    export[5] = tmp_path / "other"
    for changes, told in (
        ({"step": 7}, "step 7 there, 0 in"),
        ({"weights_sha256": "00"}, "weights_sha256 00 there"),
    ):
        (tmp_path / "wrong.json").write_text(card(checkpoint, **changes).to_json())
        assert told in refusal(exchange.export_main, *export, tmp_path / "wrong.json")
    (tmp_path / "wrong.json").write_text("{}")
    assert "not a score card" in refusal(exchange.export_main, *export, tmp_path / "wrong.json")
    assert "gone.json" in refusal(exchange.export_main, *export, tmp_path / "gone.json")
    assert not (tmp_path / "other").exists()
