"""The four families against numbers of the published research code (tests/data/*.npz, float32,
CPU).
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from diffmoe.config import ModelConfig, MoEConfig
from diffmoe.diffusion.rectified_flow import flow_loss, guided_velocity
from diffmoe.diffusion.sampling import euler, heun
from diffmoe.models.dit import DiT
from diffmoe.models.interchange import from_research
from diffmoe.models.layers import sine_positions
from diffmoe.models.logical import load_logical, logical_tensors
from diffmoe.moe.routing import RoutingRule

DATA = Path(__file__).parent / "data"
FAMILIES = ["dense", "tc", "ec", "diffmoe"]
POOL = {"dense": 1, "tc": 6, "ec": 1, "diffmoe": 6}
PREDICTOR_WEIGHT, TOLERANCE = 0.7, 1e-5


@pytest.fixture(params=FAMILIES)
def case(request):
    numbers = {
        k: torch.from_numpy(np.asarray(v))
        for k, v in np.load(DATA / f"{request.param}.npz").items()
    }
    sizes = {k.split("/")[1]: v.item() for k, v in numbers.items() if k.startswith("config/")}
    model = ModelConfig(
        family=request.param,
        input_size=8,
        channels=4,
        patch=2,
        width=sizes["hidden"],
        depth=sizes["depth"],
        heads=sizes["heads"],
        classes=10,
        learn_sigma=sizes["learn_sigma"],
    )
    moe = MoEConfig(
        experts=sizes["experts"],
        interleave=sizes["interleave"],
        capacity=sizes["capacity"],
        pool=POOL[request.param],
    )
    dit = DiT(model, moe, pool=POOL[request.param])
    state = {k.removeprefix("param/"): v for k, v in numbers.items() if k.startswith("param/")}
    load_logical(dit, from_research(state, dit.model, dit.moe))
    return request.param, dit, numbers


def close(ours, theirs, name):
    scale = theirs.abs().max().clamp_min(1e-12)
    error = ((ours.detach() - theirs).abs().max() / scale).item()
    assert error <= TOLERANCE, f"{name}: largest relative difference {error:.2e}"


def test_positions_are_the_published_ones(case):
    _, _, numbers = case
    close(sine_positions(16, 4)[None], numbers["param/pos_embed"], "pos_embed")


def test_inference(case):
    family, dit, numbers = case
    with torch.no_grad():
        out = dit.eval()(
            numbers["in/x"], numbers["in/t_flow"], numbers["in/y"], RoutingRule("batch")
        )
    close(out.prediction, numbers["eval/out"], "eval/out")


def test_training_forward_and_masks(case):
    family, dit, numbers = case
    out = dit.train()(numbers["in/x"], numbers["in/t_flow"], numbers["in/y"], RoutingRule())
    close(out.prediction, numbers["train/out"], "train/out")
    if family == "diffmoe":
        for (index, _), report in zip(dit.moe_layers(), out.moe):
            assert torch.equal(report.mask_TE.float(), numbers[f"train/mask/{index}"].flatten(0, 1))
            close(
                report.logits_TE,
                numbers[f"train/capacity_logits/{index}"].flatten(0, 1),
                f"logits {index}",
            )


def test_flow_loss_gradients_and_thresholds(case):
    family, dit, numbers = case
    mse, out = flow_loss(
        dit.train(),
        numbers["in/x"],
        numbers["in/noise"],
        numbers["in/t_flow"],
        numbers["in/y"],
        RoutingRule(),
    )
    close(mse, numbers["flow/mse"], "flow/mse")
    loss = mse + PREDICTOR_WEIGHT * sum(
        r.predictor_loss for r in out.moe if r.predictor_loss is not None
    )
    close(loss, numbers["flow/loss"], "flow/loss")
    (loss + 0.01 * sum(r.balance_loss for r in out.moe if r.balance_loss is not None)).backward()
    ours = {
        name: piece
        for tensor in logical_tensors(dit)
        for name, piece in tensor.pieces(tensor.parameter.grad)
    }
    named = {k.removeprefix("flow/grad/"): v for k, v in numbers.items() if "flow/grad/" in k}
    theirs = from_research(named, dit.model, dit.moe)
    assert len(theirs) == len(named) > 30
    for name, gradient in theirs.items():
        close(ours.pop(name), gradient, name)
    assert not ours, f"gradients without a reference: {list(ours)}"
    if family == "diffmoe":
        for (index, layer), report in zip(dit.moe_layers(), out.moe):
            layer.thresholds.commit(report.observed_E)
            close(
                layer.thresholds.value,
                numbers[f"flow/buffer_after/blocks.{index}.mlp.expert_threshold"],
                f"threshold {index}",
            )


@pytest.mark.parametrize(
    "key, sampler, cfg",
    [
        ("flow/euler_8_cfg1", euler, 1.0),
        ("flow/euler_8_cfg1.5", euler, 1.5),
        ("flow/heun_8_cfg1.5", heun, 1.5),
    ],
)
def test_samples(case, key, sampler, cfg):
    _, dit, numbers = case
    with torch.no_grad():
        velocity = guided_velocity(dit.eval(), numbers["in/y"], cfg, RoutingRule("batch"))
        close(sampler(velocity, numbers["in/noise"], 8), numbers[key], key)
