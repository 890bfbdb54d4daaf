"""What other programs call a model's tensors and its average: which forms ``import`` knows, what it
lists, what it refuses.
"""

import argparse
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffmoe.checkpoints.reader import BUFFERS, MASTER, Checkpoint, ema_kind
from diffmoe.commands import exchange
from diffmoe.config import ModelConfig, MoEConfig
from diffmoe.models.dit import DiT
from diffmoe.models.interchange import from_research, to_research
from diffmoe.models.layers import sine_positions
from diffmoe.models.logical import fresh_buffers, initialize, logical_tensors
from test_interchange import call, changed, config_of, other_state, refusal, state_of

MODEL, AVERAGE = state_of("diffmoe"), other_state("diffmoe")
ADAM = {"state": {0: {"exp_avg": torch.zeros(3), "step": 4}}, "param_groups": [{"lr": 1e-4}]}


def under(prefix, state):
    return {prefix + name: value for name, value in state.items()}


# name -> (what the file holds, what of it must be listed as not used)
FORMS = {
    "research": (
        {"model": MODEL, "ema": AVERAGE, "opt": ADAM, "args": argparse.Namespace(lr=1e-4)},
        ["opt", "args"],
    ),
    "model_ema": (
        {"state_dict": MODEL, "model_ema": AVERAGE, "optimizer": ADAM, "epoch": 3},
        ["optimizer", "epoch"],
    ),
    "ema_model": (
        {"model_state_dict": MODEL, "ema_model": AVERAGE, "scheduler": {"last_epoch": 2}},
        ["scheduler"],
    ),
    "ema_state_dict": (
        {"net": MODEL, "ema_state_dict": AVERAGE, "step": torch.tensor(7)},
        ["step"],
    ),
    "ema_params": ({"module": MODEL, "ema_params": AVERAGE}, []),
    "shadow": (
        {
            "model": MODEL,
            "ema": {"shadow": AVERAGE, "decay": 0.9999, "num_updates": torch.tensor(5)},
        },
        ["ema.decay", "ema.num_updates"],
    ),
    "DDP": ({"model": under("module.", MODEL), "ema": AVERAGE}, []),
    "compiled": ({"model": under("_orig_mod.", MODEL), "ema": under("_orig_mod.", AVERAGE)}, []),
    "both": ({"model": under("module._orig_mod.", MODEL), "ema": under("module.", AVERAGE)}, []),
    "denoiser": (
        {
            "state_dict": {**under("denoiser.", MODEL), **under("ema_denoiser.", AVERAGE)},
            "global_step": 1,
        },
        ["global_step"],
    ),
    "a state dict inside": (
        {
            "model": {"state_dict": MODEL},
            "model_ema": {"state_dict": under("module.", AVERAGE), "decay": 0.99},
        },
        ["model_ema.decay"],
    ),
    "an EMA module": (
        {
            "model": MODEL,
            "ema": {
                **under("online_model.", MODEL),
                **under("ema_model.", AVERAGE),
                "initted": torch.tensor(True),
                "step": torch.tensor(4),
            },
        },
        ["ema.initted", "ema.step"],
    ),
    "EMA with bookkeeping": (
        {
            "model": MODEL,
            "ema": {**AVERAGE, "num_updates": torch.tensor(3), "decay": torch.tensor(0.9)},
        },
        ["ema.num_updates", "ema.decay"],
    ),
    "REPA": (
        {
            "model": {
                **MODEL,
                "projectors.0.0.weight": torch.zeros(4, 16),
                "projectors.0.0.bias": torch.zeros(4),
            },
            "ema": {
                **under("module.", AVERAGE),
                "module.projectors.0.0.weight": torch.zeros(4, 16),
            },
            "steps": 5,
        },
        ["model.projectors.*", "ema.module.projectors.*", "steps"],
    ),
    "moments by name": (
        {
            "model": MODEL,
            "ema": AVERAGE,
            "optim": {f"{name}": {"exp_avg": value} for name, value in MODEL.items()},
        },
        ["optim"],
    ),
    "Lightning": (
        {
            "state_dict": {
                **under("model.", MODEL),
                **under("model_ema.", AVERAGE),
                "loss.weight": torch.ones(1),
            },
            "optimizer_states": [ADAM],
            "pytorch-lightning_version": "2",
        },
        ["optimizer_states", "pytorch-lightning_version"],
    ),
}


def written(folder):
    return Checkpoint(folder / "run_diffmoe")


def assert_holds(checkpoint, model, average):
    for kind, state in ((MASTER, model), (ema_kind(0.9999), average)):
        tensors = checkpoint.tensors(kind)
        config = checkpoint.config()
        for name, value in from_research(state, config.model, config.moe).items():
            assert name.endswith("thresholds.value") or torch.equal(tensors[name], value), (
                f"{kind} {name}"
            )


@pytest.mark.parametrize("name", FORMS)
def test_known_forms_are_read_and_the_rest_is_listed(tmp_path, name):
    content, unused = FORMS[name]
    torch.save(content, tmp_path / "in.pt")
    said = call(
        exchange.import_main,
        "--research",
        tmp_path / "in.pt",
        "--config",
        config_of("diffmoe", tmp_path),
    )
    assert_holds(written(tmp_path), MODEL, AVERAGE)
    listed = said.partition("not used: ")[2].partition("\n")[0].split(", ")
    assert set(unused) <= set(listed) and ("not used" in said) == bool(unused or listed != [""]), (
        said
    )
    assert said.count("not used") <= 1


@pytest.mark.parametrize(
    "content, model",
    [
        (under("model.", MODEL) | under("ema.", AVERAGE), MODEL),
        (under("module.ema_model.", AVERAGE), AVERAGE),
        (MODEL, MODEL),
    ],
)
def test_safetensors_too(tmp_path, content, model):
    save_file(
        {name: value.contiguous().clone() for name, value in content.items()},
        tmp_path / "in.safetensors",
    )
    said = call(
        exchange.import_main,
        "--research",
        tmp_path / "in.safetensors",
        "--config",
        config_of("diffmoe", tmp_path),
    )
    both = len(content) == 2 * len(MODEL)
    assert_holds(written(tmp_path), model, AVERAGE if both else model)
    assert ("weights and EMA both start from it" in said) != both


def test_a_damaged_safetensors_file(tmp_path):
    (tmp_path / "in.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0notjson!")
    said = refusal(
        exchange.import_main,
        "--research",
        tmp_path / "in.safetensors",
        "--config",
        config_of("diffmoe", tmp_path),
    )
    assert "is refused: not an intact safetensors file" in said


def test_several_averages_are_a_question(tmp_path):
    other = {name: value + 1 if "fc1" in name else value for name, value in AVERAGE.items()}
    torch.save({"model": MODEL, "ema_0.999": AVERAGE, "ema_0.9999": other}, tmp_path / "in.pt")
    ask = ("--research", tmp_path / "in.pt", "--config", config_of("diffmoe", tmp_path))
    said = refusal(exchange.import_main, *ask)
    assert (
        "2 states that may be the ema: ema_0.999, ema_0.9999; say which by --ema-key ema_0.999"
        in said
    )
    assert "--ema-key (emma) is not a state of" in refusal(
        exchange.import_main, *ask, "--ema-key", "emma"
    )
    assert "not used: ema_0.999\n" in call(exchange.import_main, *ask, "--ema-key", "ema_0.9999")
    assert_holds(written(tmp_path), MODEL, other)


def test_several_models_are_a_question_unless_they_are_one(tmp_path):
    other = {name: value + 1 if "fc1" in name else value for name, value in MODEL.items()}
    torch.save({"model": MODEL, "net": other, "ema": AVERAGE}, tmp_path / "in.pt")
    ask = ("--research", tmp_path / "in.pt", "--config", config_of("diffmoe", tmp_path))
    assert "2 states that may be the model: model, net; say which by --model-key model" in refusal(
        exchange.import_main, *ask
    )
    call(exchange.import_main, *ask, "--model-key", "net")
    assert_holds(written(tmp_path), other, AVERAGE)


def test_unknown_tensors_beside_the_models_are_no_silence(tmp_path):
    torch.save(
        {"state_dict": under("module.", {**MODEL, "head.weight": torch.zeros(1)})},
        tmp_path / "in.pt",
    )
    said = refusal(
        exchange.import_main,
        "--research",
        tmp_path / "in.pt",
        "--config",
        config_of("diffmoe", tmp_path),
    )
    assert "1 extra (head.weight)" in said


def test_dense_files_in_other_forms(tmp_path):
    torch.save(
        {
            "state_dict": under("module.", other_state("dense")),
            "ema_model": {
                **under("module.", state_of("dense")),
                "module.projectors.0.weight": torch.zeros(2),
            },
        },
        tmp_path / "in.pt",
    )
    said = call(
        exchange.import_main,
        "--dense",
        tmp_path / "in.pt",
        "--config",
        config_of("diffmoe", tmp_path),
    )
    assert (
        "ema is the file's ema_model.module" in said
        and "not used: ema_model.module.projectors.*" in said
    )
    assert torch.equal(
        written(tmp_path).weights("raw")["blocks.0.mlp.fc1.weight"],
        state_of("dense")["blocks.0.mlp.fc1.weight"],
    )


# ------------------------------------------------------------------------------------- other sizes
# than configured


@pytest.mark.parametrize("family", ["dense", "diffmoe"])
def test_another_resolution_is_accepted(tmp_path, family):
    torch.save({"model": state_of(family)}, tmp_path / "in.pt")
    said = call(
        exchange.import_main,
        "--research",
        tmp_path / "in.pt",
        "--config",
        config_of(family, tmp_path),
        "model.input_size=16",
    )
    assert (
        "pos_embed is of 4 x 4 tokens, model.input_size 8" in said and said.count("pos_embed") == 1
    )
    call(
        exchange.export_main,
        "--checkpoint",
        tmp_path / f"run_{family}",
        "--format",
        "research",
        "--out",
        tmp_path / "out.pt",
    )
    back = torch.load(tmp_path / "out.pt", weights_only=True)["model"]
    assert torch.equal(back["pos_embed"], sine_positions(16, 8).unsqueeze(0))
    assert all(
        torch.equal(back[name], value)
        for name, value in state_of(family).items()
        if name != "pos_embed"
    )


def test_positions_that_were_trained_are_not(tmp_path):
    torch.save(changed(pos_embed=torch.randn(1, 16, 16)), tmp_path / "in.pt")
    said = refusal(
        exchange.import_main,
        "--research",
        tmp_path / "in.pt",
        "--config",
        config_of("diffmoe", tmp_path),
        "model.input_size=16",
    )
    assert "1 misshaped (pos_embed (1, 16, 16) instead of (1, 64, 16))" in said


@pytest.mark.parametrize("verb", ["--research", "--dense"])
def test_other_classes_with_drop_labels(tmp_path, verb):
    family = "dense" if verb == "--dense" else "diffmoe"
    state, average = state_of(family), other_state(family)
    torch.save({"model": state, "ema": average}, tmp_path / "in.pt")
    ask = (
        verb,
        tmp_path / "in.pt",
        "--config",
        config_of("diffmoe", tmp_path),
        "model.classes=7",
        "run.seed=5",
    )
    said = refusal(exchange.import_main, *ask)
    assert "by its shapes it needs model.classes=10 (or, for other classes, --drop-labels)" in said
    assert "the embeddings of 10 classes are dropped" in call(
        exchange.import_main, *ask, "--drop-labels"
    )
    table, name = (
        written(tmp_path).weights("ema")["y_embedder.embedding_table.weight"],
        "y_embedder.embedding_table.weight",
    )
    fresh = DiT(written(tmp_path).config().model, MoEConfig(experts=4))
    initialize(fresh, 5)
    assert table.shape == (8, 16) and torch.equal(table[-1], average[name][-1])
    assert torch.equal(table[:-1], fresh.y_embedder.embedding_table.weight[:-1])


def state_for(**sizes):
    """A research state of a model with other sizes than ``config_of``'s."""
    model = {
        "family": "diffmoe",
        "input_size": 8,
        "width": 16,
        "depth": 4,
        "heads": 2,
        "classes": 10,
    }
    moe = {"experts": 4}
    for name, value in sizes.items():
        own = name == "mlp_ratio" or name not in MoEConfig.__dataclass_fields__
        (model if own else moe)[name] = value
    if "expert_ratio" in model:
        moe["mlp_ratio"] = model.pop("expert_ratio")
    model, moe = ModelConfig(**model), MoEConfig(**moe)
    whole = DiT(model, moe)
    initialize(whole, 0)
    logical = {
        name: piece.detach()
        for tensor in logical_tensors(whole)
        for name, piece in tensor.pieces(tensor.parameter)
    }
    return dict(to_research({**logical, **fresh_buffers(model, moe)}, model, moe))


@pytest.mark.parametrize(
    "sizes, advice",
    [
        ({"width": 32}, ["model.width=32"]),
        ({"depth": 2, "experts": 8}, ["model.depth=2", "moe.experts=8"]),
        ({"patch": 4}, ["model.patch=4"]),
        ({"channels": 3}, ["model.channels=3"]),
        ({"learn_sigma": False}, ["model.learn_sigma=false"]),
        ({"qk_norm": True, "heads": 4}, ["model.qk_norm=true", "model.heads=4"]),
        ({"mlp_ratio": 2.0}, ["model.mlp_ratio=2"]),
        ({"expert_ratio": 2.0}, ["moe.mlp_ratio=2"]),
        ({"family": "prototype"}, ["model.family=prototype"]),
        (
            {"family": "prototype", "expert_ratio": 2.0, "shared_experts": 1},
            ["model.family=prototype", "moe.mlp_ratio=2", "moe.shared_experts=1"],
        ),
        ({"family": "tc"}, ["model.family=tc"]),
        ({"family": "ec"}, ["model.family=ec"]),
        ({"family": "dense"}, ["model.family=dense"]),
        ({"interleave": False}, ["moe.interleave=false"]),
        ({"activation": "swiglu"}, ["moe.activation=swiglu"]),
        ({"shared_experts": 2}, ["moe.shared_experts=2"]),
    ],
)
def test_what_does_not_fit_says_which_settings_would(tmp_path, sizes, advice):
    """And with these settings it fits."""
    torch.save({"model": state_for(**sizes)}, tmp_path / "in.pt")
    ask = ("--research", tmp_path / "in.pt", "--config", config_of("diffmoe", tmp_path))
    said = refusal(exchange.import_main, *ask)
    assert said.partition("by its shapes it needs ")[2].split() == advice, said
    more = ["moe.pool=1"] if advice == ["model.family=ec"] else []
    call(exchange.import_main, *ask, *advice, *more)


def full_width(state, width, dense_too):
    """SwiGLU experts as the research code has them: as wide inside as the GELU ones."""
    wide = {}
    for name, value in state.items():
        if ".experts." in name or (dense_too and ".mlp.fc" in name):
            if name.endswith("fc1.weight"):
                wide |= {
                    name.replace("fc1", part): torch.randn(width, 16)
                    for part in ("gate_proj", "up_proj")
                }
            elif name.endswith("fc2.weight"):
                wide[name.replace("fc2", "down_proj")] = torch.randn(16, width)
        else:
            wide[name] = value
    return wide


def test_full_width_swiglu_fits_where_all_blocks_are_mixtures(tmp_path):
    torch.save({"model": full_width(state_for(interleave=False), 64, False)}, tmp_path / "in.pt")
    ask = (
        "--research",
        tmp_path / "in.pt",
        "--config",
        config_of("diffmoe", tmp_path, interleave=False),
    )
    settings = refusal(exchange.import_main, *ask).partition("by its shapes it needs ")[2].split()
    assert "moe.activation=swiglu" in settings and "model.mlp_ratio=6" in settings
    call(exchange.import_main, *ask, *settings)
    assert written(tmp_path).weights("raw")["blocks.0.mlp.experts.3.fc1_weight"].shape == (16, 64)


def test_full_width_swiglu_fits_beside_dense_blocks_but_not_as_their_mlp(tmp_path):
    ask = ("--research", tmp_path / "in.pt", "--config")
    config = config_of("diffmoe", tmp_path, activation="swiglu")
    torch.save({"model": full_width(state_for(), 64, True)}, tmp_path / "in.pt")
    said = refusal(exchange.import_main, *ask, config)
    assert "no setting fits it: the file's dense MLPs are SwiGLU of inner width 64" in said
    torch.save({"model": full_width(state_for(), 64, False)}, tmp_path / "in.pt")
    said = refusal(exchange.import_main, *ask, config)
    assert said.endswith("by its shapes it needs moe.mlp_ratio=6"), said
    call(exchange.import_main, *ask, config, "moe.mlp_ratio=6")


def test_shared_experts_of_the_research_code_are_advised(tmp_path):
    """``n_shared_experts: 1`` there is one MLP of 8 widths: two of this trainer's."""
    torch.save({"model": state_for(shared_experts=2)}, tmp_path / "in.pt")
    said = refusal(
        exchange.import_main,
        "--research",
        tmp_path / "in.pt",
        "--config",
        config_of("diffmoe", tmp_path, shared_experts=1),
    )
    assert said.endswith("by its shapes it needs moe.shared_experts=2")


# ---------------------------------------------------------------------------------------- Hugging
# Face folders back in


@pytest.fixture(scope="module", params=["dense", "tc", "diffmoe"])
def exported(request, tmp_path_factory):
    """(family, folder): an imported checkpoint and its Hugging Face folder ``hf``, in several
    files.
    """
    family, folder = request.param, tmp_path_factory.mktemp(request.param)
    torch.save({"model": state_of(family), "ema": other_state(family)}, folder / "in.pt")
    call(
        exchange.import_main, "--research", folder / "in.pt", "--config", config_of(family, folder)
    )
    call(
        exchange.export_main,
        "--checkpoint",
        folder / f"run_{family}",
        "--format",
        "hf",
        "--out",
        folder / "hf",
        "--shard-size",
        "40KB",
    )
    return family, folder


@pytest.mark.parametrize("with_config", [False, True])
def test_a_hugging_face_folder_comes_back_bit_for_bit(exported, tmp_path, with_config):
    family, folder = exported
    config = ["--config", folder / f"{family}.yaml"] if with_config else []
    call(
        exchange.import_main,
        "--hf",
        folder / "hf",
        *config,
        f"run.folder={tmp_path / 'run'}",
        "train.ema=0.99",
        "train.batch=12",
    )
    before, after = Checkpoint(folder / f"run_{family}"), Checkpoint(tmp_path / "run")
    assert (
        after.step == 0
        and after.config().model == before.config().model
        and after.config().train.ema_decays == (0.99,)
    )
    for kind in (MASTER, ema_kind(0.99)):
        tensors = after.tensors(kind)
        assert set(tensors) == set(before.weights("ema"))
        assert all(
            torch.equal(tensors[name], value) for name, value in before.weights("ema").items()
        )
    for name, value in before.tensors(BUFFERS).items():
        assert torch.equal(after.tensors(BUFFERS)[name], value), name
    call(
        exchange.export_main,
        "--checkpoint",
        tmp_path / "run",
        "--format",
        "hf",
        "--out",
        tmp_path / "hf",
        "--shard-size",
        "40KB",
    )
    for path in (folder / "hf").glob("*.safetensors"):
        assert (tmp_path / "hf" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "override, told",
    [
        ("model.classes=11", "model.classes: 10 -> 11"),
        ("model.qk_norm=true", "model.qk_norm"),
        ("diffusion.time_scale=1000", "diffusion.time_scale: 1.0 -> 1000.0"),
    ],
)
def test_another_model_is_refused(exported, tmp_path, override, told):
    family, folder = exported
    said = refusal(
        exchange.import_main, "--hf", folder / "hf", f"run.folder={tmp_path / 'run'}", override
    )
    assert "holds another model" in said and told in said
    assert not (tmp_path / "run").exists()


def test_names_of_classes_go_through_hugging_face_folders(exported, tmp_path):
    _, folder = exported
    there = shutil.copytree(folder / "hf", tmp_path / "named")
    config = json.loads((there / "config.json").read_text())
    names = [f"name {number}" for number in range(10)]
    config["id2label"] = dict(enumerate(names))
    (there / "config.json").write_text(json.dumps(config))
    call(exchange.import_main, "--hf", there, f"run.folder={tmp_path / 'run'}")
    assert Checkpoint(tmp_path / "run").manifest.class_names == tuple(names)
    call(
        exchange.export_main,
        "--checkpoint",
        tmp_path / "run",
        "--format",
        "hf",
        "--out",
        tmp_path / "again",
    )
    again = json.loads((tmp_path / "again/config.json").read_text())["id2label"]
    assert again == {str(number): name for number, name in enumerate(names)}
    for wrong in (
        {"0": "only one"},
        names,
        {f"class {number}": name for number, name in enumerate(names)},
    ):
        (there / "config.json").write_text(json.dumps({**config, "id2label": wrong}))
        said = refusal(exchange.import_main, "--hf", there, f"run.folder={tmp_path / 'other'}")
        assert "must name classes 0 to 9" in said and not (tmp_path / "other").exists()


def test_folders_that_are_none(exported, tmp_path):
    family, folder = exported
    run = f"run.folder={tmp_path / 'run'}"
    assert "is not a folder of a DiffMoE model" in refusal(
        exchange.import_main, "--hf", tmp_path, run
    )
    (tmp_path / "config.json").write_text(json.dumps({"config": 3}))
    assert "is not a folder of a DiffMoE model" in refusal(
        exchange.import_main, "--hf", tmp_path, run
    )
    (tmp_path / "config.json").write_text((folder / "hf" / "config.json").read_text())
    assert "lacks model.safetensors" in refusal(exchange.import_main, "--hf", tmp_path, run)
    assert "go with --research" in refusal(
        exchange.import_main, "--hf", folder / "hf", run, "--drop-labels"
    )


def test_import_without_a_configuration(tmp_path):
    torch.save(MODEL, tmp_path / "in.pt")
    assert "import needs --config" in refusal(
        exchange.import_main, "--research", tmp_path / "in.pt"
    )


def hub_folder(tmp_path, **tensors):
    """An exported folder in which some tensors are replaced."""
    torch.save({"model": state_of("diffmoe")}, tmp_path / "in.pt")
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
        "hf",
        "--out",
        tmp_path / "hf",
    )
    path = tmp_path / "hf" / "model.safetensors"
    save_file(
        load_file(path) | {name.replace("__", "."): value for name, value in tensors.items()}, path
    )
    return tmp_path / "hf"


@pytest.mark.parametrize(
    "tensors",
    [
        {"t_embedder__mlp__0__weight": torch.zeros(3, 3)},
        {"blocks__1__mlp__router": torch.zeros(16)},
    ],
)
def test_a_folder_whose_tensors_do_not_fit(tmp_path, tensors):
    told = refusal(
        exchange.import_main,
        "--hf",
        hub_folder(tmp_path, **tensors),
        f"run.folder={tmp_path / 'run'}",
    )
    assert (
        f"does not fit its config.json: 1 misshaped ({next(iter(tensors)).replace('__', '.')} ("
        in told
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "verb, family", [("--research", "diffmoe"), ("--research", "tc"), ("--dense", "dense")]
)
def test_weights_that_are_not_finite_are_said(tmp_path, verb, family):
    state = {name: value.clone() for name, value in state_of(family).items()}
    state["final_layer.linear.weight"][0, 0] = torch.nan
    torch.save({"model": state}, tmp_path / "in.pt")
    config = config_of("diffmoe" if verb == "--dense" else family, tmp_path)
    said = call(exchange.import_main, verb, tmp_path / "in.pt", "--config", config)
    assert "warning: " in said and "not finite: 1 tensors (final_layer.linear.weight)" in said


def test_a_folder_of_weights_that_are_not_finite(tmp_path):
    spoiled = torch.full((48, 16), torch.inf)
    said = call(
        exchange.import_main,
        "--hf",
        hub_folder(tmp_path, blocks__0__attn__qkv__weight=spoiled),
        f"run.folder={tmp_path / 'run'}",
    )
    assert "not finite: 1 tensors (blocks.0.attn.qkv.weight)" in said


@pytest.mark.parametrize("dropped", ["pos_embed", ".ema_decay"])
def test_constants_that_the_file_does_not_store_are_computed(tmp_path, dropped):
    without = [
        {name: value for name, value in state.items() if not name.endswith(dropped)}
        for state in (MODEL, AVERAGE)
    ]
    torch.save(dict(zip(("model", "ema"), without)), tmp_path / "in.pt")
    call(
        exchange.import_main,
        "--research",
        tmp_path / "in.pt",
        "--config",
        config_of("diffmoe", tmp_path),
    )
    assert_holds(written(tmp_path), *without)
