"""``run.py bench moe-layer``: forward and backward of one mixture layer, beside what it could cost
and what it used to cost.

Every contender gets the same tokens and the same gradient of its output:

ours        :class:`diffmoe.moe.layer.MoELayer`, family diffmoe, training rule, predictor loss
included dense       the MLP of a dense block: what the chosen rows alone would cost, the activated
width being equal floor       dense, and beside it router, softmax, predictor and its loss, which
any DiffMoE layer must compute loop        the textbook loop over experts deepspeed
``deepspeed.moe.layer.MoE``: token choice, the same experts, capacity 1, its balance loss included
deepspeed+predictor   the same with DiffMoE's predictor and its loss beside it, which makes the
arithmetic equal to ours

Time is the median of interleaved repeats.  ``kept``: bytes that autograd holds between forward and
backward, weights left out (the input counts).  ``peak``: the most bytes of activations alive at
once during the whole pass, in the kernels' inputs and outputs, beyond weights, their gradients and
the input: the figure of ``activation_memory``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from diffmoe.bench import measure
from diffmoe.bench.contenders import TextbookLoop, deepspeed_layer
from diffmoe.bench.options import bench_parser, sized_config
from diffmoe.config import Config, override
from diffmoe.errors import UserError
from diffmoe.models.layers import Mlp
from diffmoe.moe.capacity import CapacityPredictor, predictor_loss
from diffmoe.moe.gating import gate_scores
from diffmoe.moe.layer import MoELayer
from diffmoe.moe.routing import RoutingRule
from diffmoe.parallel.groups import single_process

RULE = RoutingRule("train", 1.0)
CONTENDERS = ("ours", "dense", "floor", "loop", "deepspeed", "deepspeed+predictor")
SWEPT_TOKENS, SWEPT_EXPERTS = (2048, 4096, 16384, 65536), (4, 8, 16, 32, 64)


class _WithPredictor(nn.Module):
    """A layer and DiffMoE's predictor beside it, and with ``router`` also its router; the choice is
    made beforehand.
    """

    def __init__(self, layer: nn.Module, config: Config, router: bool) -> None:
        super().__init__()
        self.layer, self.predictor = (
            layer,
            CapacityPredictor(config.model.width, config.moe.experts),
        )
        self.router = (
            nn.Parameter(torch.empty(config.moe.experts, config.model.width)) if router else None
        )

    def forward(self, x_BND: Tensor, mask_TE: Tensor) -> tuple[Any, list[Tensor]]:
        x_TD = x_BND.flatten(0, 1)
        losses = [predictor_loss(self.predictor(x_TD), mask_TE)]
        if self.router is not None:
            losses.append(gate_scores(x_TD, self.router).sum())
        return self.layer(x_BND), losses


def build(
    name: str, config: Config, samples: int, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """A contender with random weights."""
    model, experts = config.model, config.moe.experts
    torch.manual_seed(0)
    if name == "ours":
        module: nn.Module = MoELayer(model, config.moe, samples, single_process())
    elif name == "dense":
        module = Mlp(model.width, model.hidden)
    elif name == "floor":
        module = _WithPredictor(Mlp(model.width, model.hidden), config, router=True)
    elif name == "loop":
        module = TextbookLoop(model, experts)
    elif name == "deepspeed":
        module = deepspeed_layer(model, experts, device)
    else:
        module = _WithPredictor(deepspeed_layer(model, experts, device), config, router=False)
    for p in module.parameters():
        nn.init.normal_(p, std=0.02)
    return module.to(device, dtype)


def forward(
    name: str, module: nn.Module, x_BND: Tensor, mask_TE: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """(output, losses of its own)."""
    if name == "ours":
        y, stats = module(x_BND, RULE)
        return y, [stats.predictor_loss]
    if name == "dense":
        return module(x_BND), []
    if name == "floor":
        return module(x_BND, mask_TE)
    if name == "loop":
        y, loss, _ = module(x_BND.flatten(0, 1), RULE.capacity)
        return y.view_as(x_BND), [loss]
    (y, balance, _), losses = (module(x_BND), []) if name == "deepspeed" else module(x_BND, mask_TE)
    return y, [balance, *losses]


def training_pass(
    module: nn.Module, forward: Callable[[], tuple[Tensor, list[Tensor]]], x: Tensor, dy: Tensor
) -> None:
    """Forward, and backward into weights and input; gradients start anew, as after a step."""
    module.zero_grad(set_to_none=True)
    x.grad = None
    y, losses = forward()
    torch.autograd.backward([y, *losses], [dy] + [None] * len(losses))


def compare(
    config: Config,
    tokens: int,
    names: tuple[str, ...],
    repeats: int,
    device: torch.device,
    dtype: torch.dtype,
    profile: bool = False,
) -> tuple[dict[str, dict[str, float]], dict[str, list], str]:
    """Contender -> seconds, bytes kept, peak bytes; with ``profile`` what ``measure.profiles`` says
    of them, else nothing.
    """
    samples = tokens // config.model.tokens
    shape = (samples, config.model.tokens, config.model.width)
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    x.requires_grad_()
    mask_TE = (
        torch.rand(tokens, config.moe.experts, generator=generator).to(device)
        < 1 / config.moe.experts
    )
    modules = {name: build(name, config, samples, device, dtype) for name in names}
    forwards = {
        name: partial(forward, name, module, x, mask_TE) for name, module in modules.items()
    }
    passes = {
        name: partial(training_pass, module, forwards[name], x, dy)
        for name, module in modules.items()
    }
    result = {
        name: {"seconds": seconds}
        for name, seconds in measure.interleaved(passes, repeats, device).items()
    }
    profiles, tables = measure.profiles(passes, device) if profile else ({}, "")
    for name, module in modules.items():
        module.zero_grad(set_to_none=True)
        x.grad = None
        result[name]["kept_bytes"] = measure.kept_for_backward(forwards[name], [module])
        result[name]["peak_bytes"] = measure.peak_bytes(passes[name], [module], device)
        module.zero_grad(set_to_none=True)
    return result, profiles, tables


def ratios(found: dict[str, dict[str, float]]) -> dict[str, Any]:
    """The figures that the layer is judged by."""
    seconds, peak, kept = (
        {name: values[key] for name, values in found.items()}
        for key in ("seconds", "peak_bytes", "kept_bytes")
    )
    facts: dict[str, Any] = {
        "time_over_dense": seconds["ours"] / seconds["dense"],
        "activation_memory_over_dense": peak["ours"] / peak["dense"],
        "kept_over_dense": kept["ours"] / kept["dense"],
    }
    if "floor" in found:
        facts["floor_over_dense"] = seconds["floor"] / seconds["dense"]
    if "loop" in found:
        facts["loop_time_over_ours"] = seconds["loop"] / seconds["ours"]
        facts["activation_memory_over_loop"] = peak["ours"] / peak["loop"]
        facts["kept_over_loop"] = kept["ours"] / kept["loop"]
    if "deepspeed" in found:
        facts["deepspeed_time_over_ours"] = seconds["deepspeed"] / seconds["ours"]
        facts["activation_memory_over_deepspeed"] = peak["ours"] / peak["deepspeed"]
    if "deepspeed+predictor" in found:
        facts["deepspeed_with_predictor_time_over_ours"] = (
            seconds["deepspeed+predictor"] / seconds["ours"]
        )
    return facts


def products(experts: nn.Module, rows: int) -> Callable[[], None]:
    """The six matmuls of a training pass of every expert over ``rows`` rows, one expert after
    another, and nothing else.
    """
    w1, w2 = experts.fc1_weight.detach(), experts.fc2_weight.detach()
    x, a, u = (w1.new_empty(rows, width).normal_() for width in (*w1.shape[1:], w1.shape[2]))
    d1, d2, y = torch.empty_like(w1), torch.empty_like(w2), torch.empty_like(x)

    def run() -> None:
        for i in range(len(w1)):
            torch.mm(x, w1[i], out=u)
            torch.mm(a, w2[i], out=y)
        for i in range(len(w1)):
            torch.mm(x, w2[i].mT, out=u)
            torch.mm(a.mT, x, out=d2[i])
            torch.mm(x.mT, a, out=d1[i])
            torch.mm(a, w1[i].mT, out=y)

    return run


def sweep(
    config: Config, repeats: int, device: torch.device, dtype: torch.dtype
) -> dict[str, dict[str, float]]:
    """Microseconds a token of our layer (``layer``) and of its experts' matmuls alone
    (``products``), over tokens at the configured experts and over experts at 16,384 tokens.
    """
    cases = [(tokens, config.moe.experts) for tokens in SWEPT_TOKENS] + [
        (16384, experts) for experts in SWEPT_EXPERTS
    ]
    passes = {}
    for tokens, experts in dict.fromkeys(cases):
        samples = tokens // config.model.tokens
        case = override(config, [f"moe.experts={experts}"])
        module = build("ours", case, samples, device, dtype)
        x, dy = (
            torch.randn(samples, case.model.tokens, case.model.width).to(device, dtype)
            for _ in range(2)
        )
        x.requires_grad_()
        step = partial(training_pass, module, partial(forward, "ours", module, x, None), x, dy)
        name = f"{tokens} tokens, {experts} experts"
        passes["layer", name], passes["products", name] = (
            step,
            products(module.experts, tokens // experts),
        )
    seconds = measure.interleaved(passes, repeats, device)
    costs: dict[str, dict[str, float]] = {"layer": {}, "products": {}}
    for (what, name), value in seconds.items():
        costs[what][name] = 1e6 * value / int(name.split()[0])
    return costs


def _main_of_sweep(options: Any, config: Config, device: torch.device, dtype: torch.dtype) -> int:
    costs = sweep(config, options.repeats, device, dtype)
    cost, bare = costs["layer"], costs["products"]
    middle, bare_middle = ((max(c.values()) + min(c.values())) / 2 for c in (cost, bare))
    facts = {
        "model": options.model,
        "dtype": options.dtype,
        "repeats": options.repeats,
        "microseconds_a_token": cost,
        "spread": max(cost.values()) / middle - 1,
        "products_microseconds_a_token": bare,
        "products_spread": max(bare.values()) / bare_middle - 1,
        **measure.surroundings(device),
    }
    text = measure.table(
        ["layer", "µs a token", "of the middle", "its six matmuls alone, µs", "of their middle"],
        [[name, c, c / middle, bare[name], bare[name] / bare_middle] for name, c in cost.items()],
    )
    return measure.report(
        f"moe_layer_{options.model}_sweep",
        facts,
        text,
        cost,
        "µs a token, forward + backward",
        options,
    )


def main(arguments: list[str]) -> int:
    """The kind ``moe-layer``; returns the exit code."""
    parser = bench_parser(
        "moe-layer",
        "Forward and backward of one mixture layer beside dense, loop and DeepSpeed's.",
        profile=True,
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=16384,
        help="tokens, whole samples of the model (default 16384)",
    )
    parser.add_argument("--only", default=",".join(CONTENDERS), help="contenders, by commas")
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="our layer's cost a token over tokens and experts instead",
    )
    options = parser.parse_args(arguments)
    config, device, dtype = sized_config(options)
    if options.sweep:
        return _main_of_sweep(options, config, device, dtype)
    names = tuple(options.only.split(","))
    if not {"ours", "dense"} <= set(names) <= set(CONTENDERS):
        raise UserError(
            f"--only ({options.only}) must hold ours and dense, and beside them some of {', '.join(CONTENDERS)}"
        )
    if options.tokens < 1 or options.tokens % config.model.tokens:
        raise UserError(
            f"--tokens ({options.tokens}) must be whole samples of {config.model.tokens} tokens"
        )
    found, profiles, tables = compare(
        config, options.tokens, names, options.repeats, device, dtype, options.profile
    )
    facts = {
        "model": options.model,
        "experts": config.moe.experts,
        "tokens": options.tokens,
        "dtype": options.dtype,
        "repeats": options.repeats,
        **ratios(found),
        "contenders": found,
        **({"profile": profiles} if profiles else {}),
        **measure.surroundings(device),
    }
    rows = [
        [
            name,
            1e3 * v["seconds"],
            v["seconds"] / found["dense"]["seconds"],
            v["kept_bytes"] / 2**20,
            v["kept_bytes"] / found["dense"]["kept_bytes"],
            v["peak_bytes"] / 2**20,
            v["peak_bytes"] / found["dense"]["peak_bytes"],
        ]
        for name, v in found.items()
    ]
    text = (
        measure.table(
            ["layer", "ms", "of dense", "kept MiB", "of dense", "peak MiB", "of dense"], rows
        )
        + tables
    )
    title = f"moe_layer_{options.model}_e{config.moe.experts}_{options.tokens}"
    return measure.report(
        title,
        facts,
        text,
        {name: 1e3 * v["seconds"] for name, v in found.items()},
        "ms, forward + backward",
        options,
    )
