"""``run.py bench moe-layer``: forward and backward of one MoE layer, beside what it could cost.

Every layer gets the same tokens and the same gradient of its output:

- ours: :class:`diffmoe.moe.layer.MoELayer`, family diffmoe, training rule, predictor loss included
- dense: the MLP of a dense block: what the chosen rows alone would cost, the activated width being
  equal
- loop: the textbook loop over experts
- deepspeed: ``deepspeed.moe.layer.MoE``: token choice, the same experts, capacity 1, its balance
  loss included
- deepspeed+predictor: the same with DiffMoE's capacity predictor and its loss beside it, on a mask
  made beforehand: as much arithmetic as ours

Time is the median of interleaved repeats.  ``kept``: bytes that autograd holds between forward and
backward, weights left out (the input counts).  ``peak``: the most bytes of activations alive at
once during the whole pass, in the kernels' inputs and outputs, beyond weights, their gradients and
the input: the figure of ``activation_memory``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from diffmoe.bench import measure
from diffmoe.bench.options import bench_parser, common_facts, count, sized_config
from diffmoe.config import Config, ModelConfig
from diffmoe.device import backend
from diffmoe.errors import UserError
from diffmoe.layout import rows_taken
from diffmoe.models.layers import Mlp
from diffmoe.moe import gating
from diffmoe.moe.capacity import CapacityPredictor, predictor_loss
from diffmoe.moe.layer import MoELayer
from diffmoe.moe.routing import RoutingRule
from diffmoe.parallel.groups import single_process
from diffmoe.training.engine import import_deepspeed

RULE = RoutingRule("train", 1.0)
LAYERS = ("ours", "dense", "loop", "deepspeed", "deepspeed+predictor")


class TextbookLoop(nn.Module):
    """DiffMoE's training pass (paper, algorithm 3) as its definition reads: a loop over experts,
    one row for every (expert, token), a sum over experts.  The rows are scattered once, at the end:
    doing it inside the loop costs several times more.
    """

    def __init__(self, model: ModelConfig, experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(model.width, experts, bias=False)
        self.capacity_predictor = CapacityPredictor(model.width, experts)
        self.experts = nn.ModuleList(Mlp(model.width, model.hidden) for _ in range(experts))

    def forward(self, x_TD: Tensor, capacity: float) -> tuple[Tensor, Tensor, Tensor]:
        """(output [T, D], predictor loss, K-th largest sigmoids [E]); all tokens are one pool."""
        (T, D), E = x_TD.shape, len(self.experts)
        K = rows_taken(T, E, capacity)
        scores = gating.logits(x_TD, self.router.weight).softmax(dim=1)
        gates, chosen = scores.t().topk(K, dim=1)
        each = [gates[i, :, None] * f(x_TD[chosen[i]]) for i, f in enumerate(self.experts)]
        place = torch.cat([i * T + chosen[i] for i in range(E)])
        rows = torch.cat(each)
        contributions = rows.new_zeros(E * T, D).index_copy(0, place, rows)
        y = contributions.view(E, T, D).sum(dim=0).to(x_TD.dtype)
        logits = self.capacity_predictor(x_TD)
        mask = torch.zeros_like(scores).scatter(0, chosen.t(), 1.0)
        observed = logits.detach().sigmoid().topk(K, dim=0).values[-1]
        return y, predictor_loss(logits, mask), observed


def _deepspeed_layer(model: ModelConfig, experts: int, device: torch.device) -> nn.Module:
    deepspeed = import_deepspeed()
    measure.world_of_one(device)
    deepspeed.init_distributed(
        dist_backend=backend(device), auto_mpi_discovery=False, verbose=False
    )
    layer = deepspeed.moe.layer.MoE(
        model.width, Mlp(model.width, model.hidden), num_experts=experts, k=1, capacity_factor=1.0
    )
    layer.set_deepspeed_parallelism()
    return layer


class _WithPredictor(nn.Module):
    """DeepSpeed's layer, and DiffMoE's predictor and its loss beside it."""

    def __init__(self, layer: nn.Module, config: Config, tokens: int, device: torch.device) -> None:
        super().__init__()
        self.layer, experts = layer, config.moe.experts
        self.predictor = CapacityPredictor(config.model.width, experts)
        self.mask_TE = torch.rand(tokens, experts, device=device) < 1 / experts

    def forward(self, x_BND: Tensor) -> tuple[Tensor, list[Tensor]]:
        y, balance, _ = self.layer(x_BND)
        return y, [balance, predictor_loss(self.predictor(x_BND.flatten(0, 1)), self.mask_TE)]


def _build(
    name: str, config: Config, samples: int, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """A layer with random weights."""
    model, experts = config.model, config.moe.experts
    torch.manual_seed(0)
    if name == "ours":
        module: nn.Module = MoELayer(model, config.moe, samples, single_process())
    elif name == "dense":
        module = Mlp(model.width, model.hidden)
    elif name == "loop":
        module = TextbookLoop(model, experts)
    else:
        module = _deepspeed_layer(model, experts, device)
        if name == "deepspeed+predictor":
            module = _WithPredictor(module, config, samples * model.tokens, device)
    for p in module.parameters():
        nn.init.normal_(p, std=0.02)
    return module.to(device, dtype)


def _forward(name: str, module: nn.Module, x_BND: Tensor) -> tuple[Tensor, list[Tensor]]:
    """(output, losses of its own)."""
    if name == "ours":
        y, stats = module(x_BND, RULE)
        return y, [stats.predictor_loss]
    if name == "dense":
        return module(x_BND), []
    if name == "loop":
        y, loss, _ = module(x_BND.flatten(0, 1), RULE.capacity)
        return y.view_as(x_BND), [loss]
    if name == "deepspeed+predictor":
        return module(x_BND)
    y, balance, _ = module(x_BND)
    return y, [balance]


def training_pass(
    module: nn.Module, forward: Callable[[], tuple[Tensor, list[Tensor]]], x: Tensor, dy: Tensor
) -> None:
    """Forward, and backward into weights and input; gradients start anew, as after a step."""
    module.zero_grad(set_to_none=True)
    x.grad = None
    y, losses = forward()
    torch.autograd.backward([y, *losses], [dy] + [None] * len(losses))


def _ratios(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """The figures that the layer is judged by."""
    ours, dense = found["ours"], found["dense"]
    facts = {
        "time_over_dense": ours["seconds"] / dense["seconds"],
        "activation_memory_over_dense": ours["peak_bytes"] / dense["peak_bytes"],
        "kept_over_dense": ours["kept_bytes"] / dense["kept_bytes"],
    }
    for name in ("loop", "deepspeed"):
        if name in found:
            facts[f"{name}_time_over_ours"] = found[name]["seconds"] / ours["seconds"]
            peak = ours["peak_bytes"] / found[name]["peak_bytes"]
            facts[f"activation_memory_over_{name}"] = peak
    if "deepspeed+predictor" in found:
        seconds = found["deepspeed+predictor"]["seconds"]
        facts["deepspeed_with_predictor_time_over_ours"] = seconds / ours["seconds"]
    return facts


def main(arguments: list[str]) -> int:
    """The kind ``moe-layer``; returns the exit code.  UserError for bad input."""
    parser = bench_parser(
        "moe-layer",
        "Forward and backward of one MoE layer beside dense, loop and DeepSpeed's.",
        profile=True,
    )
    add = parser.add_argument
    add("--tokens", type=count, default=16384, help="tokens, whole samples (default 16384)")
    add("--only", default=",".join(LAYERS), help="layers, by commas")
    options = parser.parse_args(arguments)
    config, device, dtype = sized_config(options)
    names, experts = options.only.split(","), config.moe.experts
    if not {"ours", "dense"} <= set(names) <= set(LAYERS):
        raise UserError(
            f"--only ({options.only}) must hold ours and dense, and beside them some of "
            f"{', '.join(LAYERS)}"
        )
    samples, rest = divmod(options.tokens, config.model.tokens)
    if rest:
        raise UserError(
            f"--tokens ({options.tokens}) must be whole samples of {config.model.tokens} tokens"
        )
    generator = torch.Generator().manual_seed(0)
    shape = samples, config.model.tokens, config.model.width
    x, dy = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    x.requires_grad_()
    modules = {name: _build(name, config, samples, device, dtype) for name in names}
    forwards = {name: partial(_forward, name, m, x) for name, m in modules.items()}
    passes = {name: partial(training_pass, modules[name], forwards[name], x, dy) for name in names}
    seconds = measure.interleaved(passes, options.repeats, device)
    profiles, tables = measure.profiles(passes, device) if options.profile else ({}, "")
    found: dict[str, dict[str, float]] = {}
    for name, module in modules.items():
        module.zero_grad(set_to_none=True)
        x.grad = None
        found[name] = {
            "seconds": seconds[name],
            "kept_bytes": measure.kept_for_backward(forwards[name], [module]),
            "peak_bytes": measure.peak_bytes(passes[name], [module], device),
        }
        module.zero_grad(set_to_none=True)
    facts = {
        "tokens": options.tokens,
        **_ratios(found),
        "contenders": found,
        **({"profile": profiles} if profiles else {}),
        **common_facts(options, config, device),
    }
    units = {"seconds": 1e-3, "kept_bytes": 2**20, "peak_bytes": 2**20}
    rows: list[list[object]] = []
    for name, values in found.items():
        rows.append([name])
        for key, unit in units.items():
            rows[-1] += [values[key] / unit, values[key] / found["dense"][key]]
    head = ["layer", "ms", "of dense", "kept MiB", "of dense", "peak MiB", "of dense"]
    title = f"moe_layer_{options.model}_e{experts}_{options.tokens}"
    bars = {name: 1e3 * s for name, s in seconds.items()}
    text = measure.table(head, rows) + tables
    return measure.report(title, facts, text, bars, "ms, forward + backward", options)
