"""Products that add up weights' gradients give what autograd does, added up in fp32."""

import copy

import pytest
import torch
from torch import nn

from diffmoe.gradient_sums import GradientSum, Linear, give_sum, ordinary_gradients
from diffmoe.moe.experts import Experts

MICRO_BATCHES = 3


def experts(rows):
    return Experts(16, 24, 4, 4, 0, "gelu"), lambda model, x: model(x, rows)


MODELS = {
    "linear": lambda: (Linear(16, 24), lambda model, x: model(x)),
    "two dimensions more": lambda: (Linear(16, 24), lambda model, x: model(x.view(2, 4, 5, 16))),
    "experts": lambda: experts(10),
    "experts with unequal numbers of rows": lambda: experts(torch.tensor([3, 0, 30, 7])),
}


def with_sums(model):
    """Every parameter's, as the optimizer holds them: views of one buffer, of which nothing is
    known."""
    parameters = list(model.parameters())
    flat = torch.full((sum(p.numel() for p in parameters),), torch.nan)
    parts = flat.split([p.numel() for p in parameters])
    return [give_sum(p, part) for p, part in zip(parameters, parts, strict=True)]


def error(found, wanted):
    """The largest, beside the largest value."""
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_autograds_in_fp32(case, dtype):
    torch.manual_seed(0)
    model, run = MODELS[case]()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    model.to(dtype)
    exact = copy.deepcopy(model).double()  # the same numbers, and nothing is rounded
    held = with_sums(model)
    rounded = 1e-6 if dtype == torch.float32 else 1e-2
    reported = 0
    for _ in range(MICRO_BATCHES):
        x = torch.randn(40, 16, dtype=dtype, requires_grad=True)
        z = x.detach().double().requires_grad_()
        y = run(model, x)
        d = torch.randn_like(y)
        y.backward(d)
        run(exact, z).backward(d.double())
        assert error(x.grad, z.grad) < rounded
        for parameter, each in zip(model.parameters(), held, strict=True):
            reported += each.products == 0  # for the optimizer's hook
            parameter.grad = None
    weights = [each for p, each in zip(model.parameters(), held) if p.dim() > 1 and each.products]
    unequal = "unequal" in case  # a loop on this device, and grouped products have no sums
    assert reported == MICRO_BATCHES * (len(held) - len(weights)) and bool(weights) != unequal
    for each, wanted in zip(held, exact.parameters(), strict=True):
        if each.products:
            assert each.products == MICRO_BATCHES
            # Of a linear layer nothing is rounded to bf16 on the way, of experts what lies between
            # their layers.
            assert error(each.total, wanted.grad) < (rounded if case == "experts" else 1e-6)


def test_no_sum_no_gradient_no_difference():
    """What has no sum is an ordinary layer, and what needs no gradient adds none."""
    torch.manual_seed(0)
    model, x = Linear(16, 24), torch.randn(5, 16)
    plain = copy.deepcopy(model)
    plain.__class__ = nn.Linear
    model(x).sum().backward()
    plain(x).sum().backward()
    assert torch.equal(model.weight.grad, plain.weight.grad)
    (held, _) = with_sums(model)
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
    with ordinary_gradients():
        found = torch.autograd.grad(model(x).sum(), [model.weight])
    assert torch.equal(found[0], plain.weight.grad)
    assert held.products == 0 and held.total.isnan().all()


@pytest.mark.full
def test_a_compiled_graph_adds_too_and_copies_nothing():
    """As often as it runs, to the buffer itself."""
    torch.manual_seed(0)
    model = Linear(16, 24)
    plain, (held, _) = copy.deepcopy(model), with_sums(model)
    address = held.total.data_ptr()
    run = torch.compile(lambda model, x: model(x.sin()).tanh(), fullgraph=True)
    for _ in range(MICRO_BATCHES):
        x = torch.randn(4, 5, 16)
        run(model, x).sum().backward()
        plain(x.sin()).tanh().sum().backward()
    assert held.products == MICRO_BATCHES and held.total.data_ptr() == address
    assert torch.allclose(held.total, plain.weight.grad, rtol=1e-5, atol=1e-5)


def test_a_sum_is_forgotten_with_its_weight():
    from diffmoe import gradient_sums

    before = len(gradient_sums._SUMS)
    model = Linear(4, 4)
    assert isinstance(give_sum(model.weight, torch.zeros(16)), GradientSum)
    assert len(gradient_sums._SUMS) == before + 1
    del model
    assert len(gradient_sums._SUMS) == before
