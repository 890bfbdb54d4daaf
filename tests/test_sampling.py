"""Sampling: image i is image i, guidance, both inference rules, files written, and the ODE
samplers' orders.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffmoe.checkpoints.reader import Checkpoint
from diffmoe.diffusion.sampling import euler, heun
from diffmoe.errors import UserError
from diffmoe.evaluation.class_names import parse_classes
from diffmoe.evaluation.generate import generate
from diffmoe.models.dit import DiT
from diffmoe.models.logical import load_buffers, load_logical
from programs import Result, run_cases, trained

# Matrix products of other batch sizes round differently, by some 1e-7 an evaluation. A token within
# that of its threshold could still change sides, which these seeds do not show.
TOLERANCE = 1e-5
COUNT = 20


class Samples:
    """What ``run.py sample`` made, by the name of the case."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.results: dict[str, list[Result]] = {}

    def make(self, world: int, cases: dict[str, list[str]]) -> None:
        lines = [
            [
                "sample",
                "--checkpoint",
                str(trained()[0]),
                "--count",
                str(COUNT),
                "--seed",
                "3",
                "--out",
                str(self.folder / name),
                "sample.steps=4",
                *more,
            ]
            for name, more in cases.items()
        ]
        self.results |= dict(zip(cases, run_cases(world, lines), strict=True))

    def images(self, name: str) -> np.ndarray:
        assert all(r.returncode == 0 and "Traceback" not in r.stderr for r in self.results[name]), (
            self.results[name]
        )
        with np.load(self.folder / f"{name}.npz") as file:
            return file["images"]

    def labels(self, name: str) -> list[int]:
        with np.load(self.folder / f"{name}.npz") as file:
            return file["labels"].tolist()


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    made = Samples(tmp_path_factory.mktemp("samples"))
    made.make(
        1,
        {
            "token": ["sample.batch=64"],
            "heun": ["sample.sampler=heun"],
            "cfg1": ["--cfg", "1"],
            "raw": ["--weights", "raw"],
            "paper3": ["sample.routing=batch", "sample.batch=3"],
            "paper64": ["sample.routing=batch", "sample.batch=64"],
            "seed": ["--seed", "4"],
            "few": ["--count", "5"],
            "gamma": ["sample.gamma=0.1"],
            "static": ["sample.routing=static", "sample.batch=5", "--report"],
            "static20": ["sample.routing=static", "sample.batch=20"],
            "deep/cfg1.5": ["--classes", "0,3,7-9", "--count", "7"],
            "named.npz": ["--count", "2"],
        },
    )
    made.make(
        2,
        {
            "token3 on 2": ["sample.batch=3"],
            "token7 on 2": ["sample.batch=7"],
            "token64 on 2": ["sample.batch=64"],
            "heun7 on 2": ["sample.sampler=heun", "sample.batch=7"],
            "few on 2": ["--count", "1"],
            "static on 2": ["sample.routing=static", "sample.batch=5"],
        },
    )
    return made


def furthest(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max())


# ------------------------------------------------------------------------------------------ image i
# is image i


@pytest.mark.parametrize("name", ["token3 on 2", "token7 on 2", "token64 on 2"])
def test_per_token_routing_gives_the_same_image_in_any_batch_and_on_any_ranks(samples, name):
    assert samples.images("token").std() > 0.1
    assert furthest(samples.images(name), samples.images("token")) < TOLERANCE


def test_heun_does_too(samples):
    assert furthest(samples.images("heun7 on 2"), samples.images("heun")) < TOLERANCE
    assert furthest(samples.images("heun"), samples.images("token")) > 1e-3


def test_how_many_images_does_not_matter(samples):
    assert samples.images("few").shape == (5, 1, 8, 8)
    assert furthest(samples.images("few"), samples.images("token")[:5]) < TOLERANCE
    assert furthest(samples.images("few on 2"), samples.images("token")[:1]) < TOLERANCE, (
        "one image on two ranks"
    )


def test_the_papers_rule_depends_on_batch_mates(samples):
    """As documented: it takes as many tokens as the predictor marks in this batch."""
    assert furthest(samples.images("paper3"), samples.images("paper64")) > 1e-3
    assert furthest(samples.images("paper64"), samples.images("token")) > 1e-3


def test_static_routing_uses_the_training_capacity_exactly_and_looks_at_the_batch(samples):
    """Ten images a rank in batches of five are the batches of one process."""
    assert furthest(samples.images("static on 2"), samples.images("static")) < TOLERANCE
    assert furthest(samples.images("static20"), samples.images("static")) > 1e-3
    report = json.loads((samples.folder / "static.capacity.json").read_text())
    assert report["capacity"] == pytest.approx(1.0, abs=1e-9) and set(
        report["by_layer"].values()
    ) == {1.0}
    assert (report["routing"], report["thresholds"]) == ("static", None)


@pytest.mark.parametrize("name", ["cfg1", "raw", "seed", "gamma"])
def test_what_is_asked_for_changes_the_images(samples, name):
    assert samples.images(name).shape == samples.images("token").shape
    assert furthest(samples.images(name), samples.images("token")) > 1e-3


# --------------------------------------------------------------------------------------------------
# files


def test_files_and_labels(samples):
    images = samples.images("token")
    assert (
        images.shape == (COUNT, 1, 8, 8)
        and images.dtype == np.float32
        and np.isfinite(images).all()
    )
    assert samples.labels("token") == list(range(10)) * 2
    assert samples.labels("deep/cfg1.5") == [0, 3, 7, 8, 9, 0, 3]
    assert samples.images("deep/cfg1.5").shape[0] == 7
    with Image.open(samples.folder / "deep/cfg1.5.png") as image:
        assert image.format == "PNG"
    assert (samples.folder / "named.npz").is_file() and (samples.folder / "named.png").is_file()


def test_it_says_what_it_did(samples):
    (result,) = samples.results["paper64"]
    assert result.stdout == (
        f"step 8, ema weights, euler 4 steps, cfg 1.5, batch routing: 20 images in "
        f"{samples.folder}/paper64.npz, 20 of them in {samples.folder}/paper64.png\n"
    )
    assert samples.results["token3 on 2"][1].stdout == ""


@pytest.mark.parametrize(
    ("text", "classes"),
    [
        ("all", list(range(10))),
        ("3", [3]),
        ("0,3,7-9", [0, 3, 7, 8, 9]),
        ("9,0", [9, 0]),
        ("2-2", [2]),
        ("1,1", [1, 1]),
    ],
)
def test_classes_on_the_command_line(text, classes):
    assert parse_classes(text, 10) == classes


@pytest.mark.parametrize(
    "text", ["", "10", "3-", "-3", "a", "1,,2", "5-2", "0-10", "1.5", "all,1", "²"]
)
def test_classes_that_are_refused(text):
    with pytest.raises(UserError, match="--classes"):
        parse_classes(text, 10)


# --------------------------------------------------------------------------------------------------
# guidance


def images_in_process(cfg: float, routing: str = "token") -> torch.Tensor:
    checkpoint = Checkpoint(trained()[0])
    config = checkpoint.config()
    model = DiT(config.model, config.moe, time_scale=config.diffusion.time_scale)
    load_logical(model, checkpoint.weights("ema"))
    load_buffers(model, checkpoint.tensors("buffers"))
    changed = type(config.sample)(steps=1, cfg=cfg, routing=routing)
    config = type(config)(**{**vars(config), "sample": changed})
    return generate(model.eval(), config, list(range(10)), range(10), torch.device("cpu"))


def test_one_step_is_affine_in_guidance():
    """z + null + cfg (conditional - null): cfg 0 and 2 lie on both sides of cfg 1, which runs one
    pass only.
    """
    none, one, two = (images_in_process(cfg) for cfg in (0.0, 1.0, 2.0))
    assert (two - none).abs().max() > 1e-3
    torch.testing.assert_close((none + two) / 2, one, rtol=0, atol=TOLERANCE)


# --------------------------------------------------------------------------------------------------
# samplers


@pytest.mark.parametrize(("sampler", "order"), [(euler, 1), (heun, 2)])
def test_order_of_convergence_on_a_field_with_a_known_answer(sampler, order):
    """dz/dt = cos(t) z + 1 - cos(t) t has the solution z(t) = t + z(0) exp(sin t), in fp64 so that
    rounding is far.
    """
    start = torch.linspace(-2, 2, 5, dtype=torch.float64).view(-1, 1)
    exact = 1 + start * math.exp(math.sin(1.0))

    def field(z, t):
        assert z.shape == (5, 1) and t.shape == (5,) and t.dtype == z.dtype
        time = t.view(-1, 1)
        return torch.cos(time) * z + 1 - torch.cos(time) * time

    errors = [
        (sampler(field, start, steps) - exact).abs().max().item() for steps in (16, 32, 64, 128)
    ]
    slopes = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert slopes == pytest.approx([order] * 3, abs=0.1), errors


@pytest.mark.parametrize("sampler", [euler, heun])
def test_straight_lines_are_exact_in_one_step(sampler):
    start = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = torch.full_like(start, 0.5)
    torch.testing.assert_close(sampler(lambda z, t: target - start, start, 1), target)


def test_heun_follows_time_exactly_where_euler_cannot():
    """dz/dt = 2 t: the trapezoid rule is exact, Euler is one step short."""
    start = torch.zeros(3, 1, dtype=torch.float64)
    field = lambda z, t: 2 * t.view(-1, 1)  # noqa: E731
    assert heun(field, start, 7).tolist() == [[pytest.approx(1)]] * 3
    assert euler(field, start, 7).tolist() == [[pytest.approx(1 - 1 / 7)]] * 3
