"""A micro-batch in halves: what passes under what, in forward and in backward, and where it cannot
be.  That it is the same model is in the parity table, its bytes in test_cost.py.
"""

import re

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from diffmoe.config import load_config
from diffmoe.cost.hardware import choose, read_table
from diffmoe.cost.memory import engine_facts
from diffmoe.cost.step_time import step_time
from diffmoe.errors import UserError
from diffmoe.layout import resolve_layout
from diffmoe.moe.routing import RoutingRule
from diffmoe.parallel.groups import build_groups
from diffmoe.parallel.spawn import Ranks
from diffmoe.parity.synthetic import build_model, synthetic_batch

MODEL = (
    "model.family=ec moe.pool=1 model.input_size=8 model.width=32 model.depth=2 model.heads=2 "
    "model.classes=10 moe.experts=4 moe.interleave=false parallel.ep=2 train.batch=8"
).split()
HALVES = "parallel.overlap=halves"
# What an operator is: attention, experts' products, rows sent, rows waited for.
LETTERS = {
    r"aten\._scaled_dot_product\w+(?<!backward)\.": "A",
    r"aten\._scaled_dot_product\w+_backward\.": "A",
    r"aten\.(bmm|baddbmm)\.": "E",
    r"_c10d_functional\.all_to_all_single\.": "S",
    r"_c10d_functional\.wait_tensor\.": "W",
}
FORWARD = "AASSWESWES" + "WAWA" + "SSWESWES" + "WW"
MIRROR = str.maketrans("SW", "WS")


class _Events(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = ""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for pattern, letter in LETTERS.items():
            if re.match(pattern, str(function)) and not (letter == self.seen[-1:] == "E"):
                self.seen += letter
        return function(*args, **(kwargs or {}))


def events(overrides, training=True):
    """What one rank does, as letters, in forward and in backward."""
    config = load_config(None, [*MODEL, *overrides])
    layout = resolve_layout(config, 2)
    model = build_model(config, layout.pool, build_groups(layout.ep, layout.pool_ranks))
    model.train(training)
    batch = synthetic_batch(config, range(4 * dist.get_rank(), 4 * dist.get_rank() + 4))
    with _Events() as forward:
        prediction = model(batch.x, torch.rand(4), batch.y, RoutingRule("train")).prediction
    with _Events() as backward:
        prediction.sum().backward()
    return forward.seen, backward.seen


@pytest.fixture(scope="module")
def two():
    with Ranks(2) as ranks:
        yield ranks


def test_each_half_computes_while_the_others_rows_travel(two):
    """In forward the second half's rows come under the first half's experts (SS W E), its rows go
    home under the second half's (S W E), and the second half's under the next block's attention to
    the first (S W A).  Backward is the mirror, in which a wait is a sending.
    """
    for forward, backward in two.run(events, [HALVES]):
        assert forward == FORWARD
        assert backward == FORWARD[::-1].translate(MIRROR)


def test_recompute_of_whole_blocks_waits_for_all_rows_in_the_block(two):
    block = "AASSWESWESWW"
    for forward, backward in two.run(events, [HALVES, "parallel.recompute=block"]):
        assert forward == 2 * block
        assert backward.count("S") == backward.count("W") == 16  # again, and of gradients


def test_selective_recompute_sends_nothing_again(two):
    for forward, backward in two.run(events, [HALVES, "parallel.recompute=selective"]):
        assert forward == FORWARD
        assert backward.count("S") == 8


@pytest.mark.parametrize(("overrides", "training"), [([], True), ([HALVES], False)])
def test_without_halves_and_in_inference_samples_stay_together(two, overrides, training):
    for forward, _ in two.run(events, overrides, training):
        assert forward == 2 * "ASWESW"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["parallel.ep=1"], r"parallel.overlap \(halves\) must be none with parallel.ep \(1\)"),
        (
            ["parallel.ep=1", "model.family=dense"],
            r"parallel.overlap \(halves\) must be none for model.family \(dense\)",
        ),
        (["train.batch=6"], r"train.micro_batch \(3\) must be even with parallel.overlap"),
    ],
)
def test_where_there_is_nothing_to_overlap(overrides, message):
    with pytest.raises(UserError, match=message):
        resolve_layout(load_config(None, [*MODEL, HALVES, *overrides]), 2)


@pytest.mark.parametrize(("ep", "share"), [(8, 0.7), (16, 0.9)])
def test_a_step_of_halves_is_predicted_to_expose_less(ep, share):
    """On one node and on two."""
    machine = choose(read_table(None), "h100")
    words = [f"parallel.ep={ep}", f"train.batch={32 * ep}", "train.micro_batch=32", "moe.pool=64"]
    tree = {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}
    plain, halves = (
        step_time(config, resolve_layout(config, ep), engine_facts(tree), machine, 8)
        for config in (
            load_config("configs/diffmoe_xl_e16_flow.yaml", [*words, f"parallel.overlap={form}"])
            for form in ("none", "halves")
        )
    )
    assert halves.all_to_all < share * plain.all_to_all
    assert halves.hidden > plain.hidden
    assert halves.whole_all_to_all > plain.whole_all_to_all  # as many bytes, more messages
