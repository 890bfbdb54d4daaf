"""What fp32 matmuls may do, by one setting that every verb obeys and every record keeps; and the
embedding of time, which is fp32 under every precision.
"""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffmoe.bench.options import bench_parser, sized_config
from diffmoe.checkpoints.reader import Checkpoint
from diffmoe.commands import encode as encode_command
from diffmoe.commands import evaluate as evaluate_command
from diffmoe.commands import profile as profile_command
from diffmoe.commands import sample as sample_command
from diffmoe.commands import train as train_command
from diffmoe.commands.common import whole_model
from diffmoe.config import load_config, override
from diffmoe.cost.hardware import choose, read_table
from diffmoe.cost.memory import engine_facts
from diffmoe.cost.step_time import step_time
from diffmoe.data.shards import load_index
from diffmoe.device import fp32_precision, set_fp32_precision
from diffmoe.environment import detect
from diffmoe.errors import UserError
from diffmoe.evaluation import features
from diffmoe.evaluation.card import Card, card_from_json
from diffmoe.evaluation.evaluate import evaluate
from diffmoe.evaluation.image_sources import ImageSource
from diffmoe.evaluation.reference_statistics import measure_reference
from diffmoe.evaluation.scored_images import Subject, sampled_images
from diffmoe.evaluation.scores import Scores
from diffmoe.layout import resolve_layout
from diffmoe.models.dit import DiT
from diffmoe.models.layers import TimestepEmbedding
from diffmoe.models.logical import initialize
from diffmoe.moe.routing import RoutingRule
from diffmoe.parallel.groups import single_process
from diffmoe.training import start as training_start
from diffmoe.training.resume import changes
from programs import digits, run_cases, tiny, tiny_config, trained
from test_encode import request
from test_encode import run as encode_here
from test_evaluation import random_images, setting, tiny_extractor

CPU = torch.device("cpu")

PRECISIONS = ("ieee", "tf32")


def allowed() -> tuple[str, str]:
    """What CUDA's matmuls and convolutions may do, by torch's newer names."""
    conv = torch.backends.cudnn.conv.fp32_precision
    return torch.backends.cuda.matmul.fp32_precision, "ieee" if conv == "none" else conv


def other(precision: str) -> str:
    return {"ieee": "tf32", "tf32": "ieee"}[precision]


@pytest.fixture(autouse=True)
def torchs_own():
    """Tests leave torch as they find it, and tests that are given a ``precision`` begin with the
    other one (below).
    """
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, True
    torch.backends.cudnn.deterministic = False


@pytest.fixture(params=PRECISIONS)
def precision(request):
    set_fp32_precision(other(request.param))
    return request.param


# --------------------------------------------------------------------------------------------------
# the setting


def test_both_of_torchs_views_agree_and_none_of_them_raises(precision):
    before = torch.backends.mkldnn.matmul.fp32_precision, torch.backends.mkldnn.conv.fp32_precision
    set_fp32_precision(precision)
    assert allowed() == (precision, precision)
    assert (
        torch.backends.cuda.matmul.allow_tf32
        == torch.backends.cudnn.allow_tf32
        == (precision == "tf32")
    )
    assert torch.get_float32_matmul_precision() == {"ieee": "highest", "tf32": "high"}[precision]
    with torch.backends.cudnn.flags(enabled=True):
        pass
    with fp32_precision():
        assert allowed() == ("ieee", "ieee")
    assert allowed() == (precision, precision)
    assert (
        torch.backends.mkldnn.matmul.fp32_precision,
        torch.backends.mkldnn.conv.fp32_precision,
    ) == before


def test_a_cpu_computes_the_same_bits():
    model, x = (
        setting("token")[0],
        torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)),
    )
    found = []
    for precision in PRECISIONS:
        set_fp32_precision(precision)
        with torch.no_grad():
            found.append(
                (
                    model(
                        x, torch.tensor([0.1, 0.5, 0.9]), torch.arange(3), RoutingRule()
                    ).prediction,
                    F.conv2d(x, torch.ones(4, 1, 3, 3) / 3),
                    x[0, 0] @ x[1, 0],
                )
            )
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


class Started(Exception):
    """As far as a test wants to go."""


def stop(*_, **__):
    raise Started


@pytest.fixture
def alone(monkeypatch):
    """Verbs without process groups."""
    for command in (
        sample_command,
        evaluate_command,
        profile_command,
        encode_command,
        train_command,
    ):
        monkeypatch.setattr(command, "join", lambda *_, **__: CPU)
        monkeypatch.setattr(command, "leave", lambda: None)
    monkeypatch.setattr("diffmoe.parallel.groups.build_groups", lambda *_: single_process())


def run_config(monkeypatch, precision):
    """Checkpoints say that their run had this precision."""
    stored = Checkpoint.config
    monkeypatch.setattr(
        Checkpoint,
        "config",
        lambda self: override(stored(self), [f"run.fp32_precision={precision}"]),
    )


def test_training_and_its_own_sampling_and_scores(monkeypatch, precision):
    monkeypatch.setattr(training_start, "newest_usable", stop)
    config = load_config(tiny_config(), [f"run.fp32_precision={precision}", "parallel.ep=1"])
    with pytest.raises(Started):
        training_start.start(config, resolve_layout(config, 1), {}, single_process(), CPU)
    assert allowed() == (precision, precision)


@pytest.mark.full
@pytest.mark.parametrize("said", [True, False], ids=["said", "the run's"])
def test_sample_takes_the_runs_or_what_is_said(alone, monkeypatch, tmp_path, precision, said):
    run_config(monkeypatch, other(precision) if said else precision)
    more = ["--fp32-precision", precision] if said else []
    arguments = [
        "--checkpoint",
        str(trained()[0]),
        "--count",
        "1",
        "--out",
        str(tmp_path / "s"),
        *more,
    ]
    assert sample_command.main(arguments, detect()) == 0
    assert allowed() == (precision, precision)


@pytest.mark.full
@pytest.mark.parametrize("said", [True, False], ids=["said", "the run's"])
def test_evaluate_takes_the_runs_or_what_is_said_and_the_card_has_it(
    alone, monkeypatch, tmp_path, precision, said
):
    run_config(monkeypatch, other(precision) if said else precision)
    more = ["--fp32-precision", precision] if said else []
    arguments = [
        "--checkpoint",
        str(trained()[0]),
        "--reference",
        str(digits()),
        "--extractor",
        "digits",
        "--count",
        "70",
        "--no-samples",
        "--out",
        str(tmp_path),
        "sample.steps=1",
        *more,
    ]
    assert evaluate_command.main(arguments, detect()) == 0
    assert allowed() == (precision, precision)
    card = card_from_json((tmp_path / "card.json").read_text())
    assert (
        card.fp32_precision == precision
        and f"| fp32 precision | {precision} |" in card.to_markdown()
    )


def test_profile_and_bench(alone, monkeypatch, precision):
    monkeypatch.setattr("diffmoe.commands.profile.on_our_hosts", lambda config, layout: layout)
    monkeypatch.setattr("diffmoe.parallel.groups.build_groups", stop)
    with pytest.raises(Started):
        profile_command.main(
            [
                "--config",
                str(tiny_config()),
                "--synthetic",
                "parallel.ep=1",
                f"run.fp32_precision={precision}",
            ],
            detect(),
        )
    assert allowed() == (precision, precision)
    set_fp32_precision(other(precision))
    sized_config(bench_parser("step", "").parse_args(["--set", f"run.fp32_precision={precision}"]))
    assert allowed() == (precision, precision)


def test_encode_and_its_index(tmp_path, precision):
    index = encode_here(request(tmp_path, fp32_precision=precision))
    assert allowed() == (precision, precision)
    assert (
        index.encoding.fp32_precision == load_index(tmp_path).encoding.fp32_precision == precision
    )
    with pytest.raises(
        UserError, match=rf"fp32_precision \({other(precision)}\) is not that of .*{precision}"
    ):
        encode_here(request(tmp_path, fp32_precision=other(precision)))


def test_an_index_that_does_not_say_was_ieee(tmp_path):
    index = encode_here(request(tmp_path))
    tree = json.loads((tmp_path / "index.json").read_text())
    del tree["encoding"]["fp32_precision"]
    (tmp_path / "index.json").write_text(json.dumps(tree))
    assert load_index(tmp_path).fingerprint == index.fingerprint
    assert encode_here(request(tmp_path)).encoding.fp32_precision == "ieee"
    with pytest.raises(UserError, match="fp32_precision"):
        encode_here(request(tmp_path, fp32_precision="tf32"))


@pytest.mark.parametrize(
    ("vae", "precision", "complaint"),
    [
        (True, "bf16", "fp32_precision (bf16) must be ieee or tf32"),
        (False, "tf32", "fp32_precision (tf32) goes with vae (None): pixels are copied"),
    ],
)
def test_encode_refuses(tmp_path, vae, precision, complaint):
    with pytest.raises(UserError) as raised:
        request(tmp_path, vae=vae, fp32_precision=precision)
    assert str(raised.value) == complaint


def test_features_are_ieee_whatever_the_run_is(tmp_path):
    """A scripted extractor cannot look at torch's settings, so they are looked at where its
    features are taken.
    """

    class Pool(torch.nn.Module):
        def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
            return images.flatten(1).float()

    torch.jit.script(Pool()).save(str(tmp_path / "pool.pt"))
    extract, seen = features.load_extractor(tmp_path / "pool.pt"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "_array", lambda value: seen.append(allowed()) or value.numpy())
        set_fp32_precision("tf32")
        extract(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))
    assert seen == [("ieee", "ieee")] and allowed() == ("tf32", "tf32")


# --------------------------------------------------------------------------------------------------
# records


def with_precision(out, precision):
    model, config = setting()
    noise, extractor, world = random_images(50, seed=9), tiny_extractor(), single_process().world
    source = ImageSource("noise", len(noise), (8, 8), lambda start, stop: noise[start:stop])
    images = sampled_images(
        model,
        override(config, [f"run.fp32_precision={precision}"]),
        Subject("run/step_00000008", 8, "ema"),
        70,
        "balanced",
        CPU,
    )
    return evaluate(
        images,
        measure_reference(source, extractor, world, CPU, batch=8),
        extractor,
        out,
        world,
        CPU,
    )


def test_a_folder_of_scores_is_of_one_precision(tmp_path):
    assert with_precision(tmp_path, "tf32").fp32_precision == "tf32"
    with pytest.raises(UserError, match="fp32_precision 'tf32', this .* 'ieee'"):
        with_precision(tmp_path, "ieee")


def test_older_cards_are_read():
    card = Card(
        **{
            **{f.name: None for f in dataclasses.fields(Card)},
            "scores": Scores(1.0),
            "fp32_precision": "tf32",
        }
    )
    tree = json.loads(card.to_json())
    assert card_from_json(json.dumps(tree)) == card
    tree["scores"] = {"fid": 1.0, "sfid": 2.0}
    assert card_from_json(json.dumps(tree)).scores == Scores(1.0, 2.0)
    tree["scores"] = {"fid": 1.0}
    del tree["fp32_precision"]
    assert card_from_json(json.dumps(tree)) == dataclasses.replace(card, fp32_precision="")


@pytest.mark.parametrize("change", ["run.fp32_precision=tf32", "moe.router_start=uniform"])
def test_what_a_resume_may_change_is_shown(change):
    before = load_config(None, [])
    name, value = change.split("=")
    broken, accepted = changes(before, override(before, [change]))
    assert (
        broken == []
        and len(accepted) == 1
        and accepted[0].startswith(f"{name}: ")
        and accepted[0].endswith(f" -> {value}")
    )


def test_a_dry_run_says_it(capsys):
    for precision in PRECISIONS:
        arguments = tiny("unused", "--dry-run", "parallel.ep=1", f"run.fp32_precision={precision}")
        assert train_command.main(arguments, detect()) == 0
        assert f"engine   ZeRO 1, fp32 ({precision}), recompute none" in capsys.readouterr().out


@pytest.mark.parametrize(("kind", "faster"), [("h100", True), ("a100", True), ("cpu", False)])
def test_the_planner_prices_tf32_otherwise_than_ieee(kind, faster):
    hardware, found = choose(read_table(None), kind), []
    for precision in PRECISIONS:
        config = load_config("configs/diffmoe_l_e16_flow.yaml", [f"run.fp32_precision={precision}"])
        found += [
            [
                step_time(
                    config, resolve_layout(config, 8), engine_facts(tree), hardware, 8
                ).compute
                for tree in ({}, {"bf16": {"enabled": True}})
            ]
        ]
    (ieee, bf16), (tf32, same) = found
    assert (tf32 < 0.5 * ieee) if faster else (tf32 == ieee)
    assert bf16 == same
    old = dataclasses.replace(
        hardware, tflops_tf32=None, tflops_fp32=hardware.tflops_tf32 or hardware.tflops_fp32
    )
    assert step_time(config, resolve_layout(config, 8), engine_facts({}), old, 8).compute == tf32, (
        "a table from before"
    )


# ------------------------------------------------------------------------------------------- the
# embedding of time


def embedding(width: int, seed: int = 0) -> TimestepEmbedding:
    """As DiT initialises it, in fp64."""
    made, generator = TimestepEmbedding(width).double(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in made.parameters():
            p.normal_(std=0.02, generator=generator) if p.dim() > 1 else p.zero_()
    return made


def as_dtype(made: TimestepEmbedding, dtype: torch.dtype) -> TimestepEmbedding:
    other = TimestepEmbedding(made.mlp[2].out_features).to(dtype)
    other.load_state_dict(made.state_dict())
    return other


# The flow's own unscaled times a sampler's step of 250, of 1,000 and of 10,000 apart; scaled ones;
# DDPM's.
NEIGHBOURS = [
    (1.0, 1 / 250),
    (1.0, 1e-3),
    (1.0, 1e-4),
    (1000.0, 1e-3),
    (1000.0, 1e-4),
    (999.0, 1 / 999),
]


@pytest.mark.parametrize("width", [64, 1024])
@pytest.mark.parametrize(("scale", "step"), NEIGHBOURS)
@torch.no_grad()
def test_bf16_tells_neighbouring_times_apart_as_fp32_does(width, scale, step):
    exact = embedding(width)
    t = torch.linspace(0.01, 0.98, 50)
    wanted, narrow, fp32 = (
        (made((t + step) * scale) - made(t * scale)).double()
        for made in (
            as_dtype(exact, torch.float32).double(),
            as_dtype(exact, torch.bfloat16),
            as_dtype(exact, torch.float32),
        )
    )
    for found in (narrow, fp32):
        assert ((found - wanted).norm(dim=1) / wanted.norm(dim=1)).max() < 0.05
    assert (
        narrow.dtype == torch.float64 and as_dtype(exact, torch.bfloat16)(t).dtype == torch.float32
    )


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_the_condition_is_rounded_once(dtype, wide):
    """The sum with the label's embedding is wide too; blocks get it in the model's precision."""
    config = load_config(tiny_config(), ["parallel.ep=1"])
    model = DiT(config.model, config.moe, pool=2)
    initialize(model, 0)
    model.to(dtype)
    seen = []
    model.blocks[0].adaLN_modulation.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0])
    )
    t, y = torch.tensor([0.2, 0.204]), torch.tensor([3, 3])
    with torch.no_grad():
        model.eval()(torch.zeros(2, 1, 8, 8), t, y, RoutingRule())
        time = model.t_embedder(t)
        assert time.dtype == wide
        silu = torch.nn.functional.silu(time + model.y_embedder(y).to(wide))
        assert torch.equal(seen[0], silu.to(dtype)) and seen[0].dtype == dtype


def test_names_of_parameters_stay():
    assert [name for name, _ in TimestepEmbedding(8).named_parameters()] == [
        "mlp.0.weight",
        "mlp.0.bias",
        "mlp.2.weight",
        "mlp.2.bias",
    ]


# --------------------------------------------------------------------------------------- routers,
# guidance


@pytest.mark.parametrize(
    ("family", "start"),
    [("tc", "uniform"), ("diffmoe", "uniform"), ("tc", "normal"), ("diffmoe", "normal")],
)
def test_router_start(family, start):
    config = load_config(
        tiny_config(),
        [
            f"model.family={family}",
            f"moe.router_start={start}",
            "model.width=256",
            "moe.experts=32",
        ],
    )
    model = DiT(config.model, config.moe, pool=1)
    initialize(model, 0)
    default = DiT(config.model, dataclasses.replace(config.moe, router_start="normal"), pool=1)
    initialize(default, 0)
    ours, theirs = model.state_dict(), default.state_dict()
    for name, value in ours.items():
        if not name.endswith(".router"):
            assert torch.equal(value, theirs[name]), "nothing else is another"
        elif start == "uniform":
            bound = 256**-0.5
            assert 0.98 * bound < value.abs().max() <= bound and value.std() == pytest.approx(
                bound / 3**0.5, rel=0.03
            )
        else:
            assert value.std() == pytest.approx(0.006, rel=0.03)


GUIDED = (
    r"sample.cfg \(1.5\) must be 1 where train.label_drop \(0\) never trains the null class .* "
    r"sample.cfg=1 \(--cfg 1\)"
)


@pytest.mark.parametrize("command", [sample_command, evaluate_command], ids=["sample", "evaluate"])
def test_guidance_by_a_null_class_without_training_is_refused(command, monkeypatch):
    stored = Checkpoint.config
    monkeypatch.setattr(
        Checkpoint, "config", lambda self: override(stored(self), ["train.label_drop=0"])
    )
    monkeypatch.setattr(command, "join", stop)
    arguments = ["--checkpoint", str(trained()[0])]
    if command is evaluate_command:
        arguments += ["--reference", "r", "--extractor", "digits"]
    with pytest.raises(UserError, match=GUIDED):
        command.main(arguments, detect())
    with pytest.raises(UserError, match=r"sample.cfg \(4.0\) must be 1"):
        command.main([*arguments, "--cfg", "4"], detect())
    for allowed_ in (["--cfg", "1"], ["sample.cfg=1"]):
        with pytest.raises(Started):
            command.main([*arguments, *allowed_], detect())
    whole_model(Checkpoint(trained()[0]), Checkpoint(trained()[0]).config(), "ema")  # it loads


@pytest.mark.parametrize(
    "asked",
    [
        ["train.sample_every=4"],
        ["train.score_every=4", "score.reference=r", "score.extractor=digits"],
    ],
    ids=["images", "scores"],
)
def test_training_refuses_before_its_first_step(asked):
    arguments = tiny("unused", "--dry-run", "parallel.ep=1", "train.label_drop=0", *asked)
    with pytest.raises(UserError, match=GUIDED):
        train_command.main(arguments, detect())
    assert train_command.main([*arguments, "sample.cfg=1"], detect()) == 0


@pytest.mark.full
def test_training_without_label_drop_ends_well_without_images(tmp_path):
    run, asked = tmp_path / "run", ["--count", "2", "--out", tmp_path / "s"]
    (trained_,), (refused,), (sampled,) = run_cases(
        1,
        [
            tiny(run, "train.steps=1", "parallel.ep=1", "train.label_drop=0"),
            ["sample", "--checkpoint", run, *asked],
            ["sample", "--checkpoint", run, *asked, "--cfg", "1"],
        ],
    )
    assert [result.returncode for result in (trained_, refused, sampled)] == [0, 2, 0], (
        trained_,
        refused,
        sampled,
    )
    assert "no images: sample.cfg (1.5) must be 1" in trained_.stdout + trained_.stderr
    assert not list(run.glob("samples_*.png")) and (tmp_path / "s.png").is_file()
