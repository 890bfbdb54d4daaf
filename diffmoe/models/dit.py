"""The one diffusion transformer for all families; a block's MLP is the only difference between
them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffmoe.config import ModelConfig, MoEConfig, expert_hidden
from diffmoe.families import Projector, is_moe_block
from diffmoe.gradient_sums import Linear
from diffmoe.models.layers import (
    Attention,
    FinalLayer,
    LabelEmbedding,
    Mlp,
    PatchEmbedding,
    TimestepEmbedding,
    adaln,
    modulate,
    norm,
    sine_positions,
)
from diffmoe.moe.gating import Beside
from diffmoe.moe.layer import Late, MoELayer, MoEStats
from diffmoe.moe.routing import RoutingRule
from diffmoe.parallel.collectives import gather_stack, sum_over
from diffmoe.parallel.groups import Group, ParallelGroups, single_process
from diffmoe.parallel.recompute import Run, at_once, forms, recomputed

_DISPERSIVE_TAU = 0.5  # the paper's


@dataclass(frozen=True)
class ModelOutput:
    """``prediction`` [B, out_channels, H, W]; ``moe`` holds one report per MoE layer, in order of
    depth; ``dispersive``: the loss of that name, in training with it; ``projected``: what the
    projector makes of every token [B, N, d], in training with one.
    """

    prediction: Tensor
    moe: tuple[MoEStats, ...]
    dispersive: Tensor | None = None
    projected: Tensor | None = None


class Condition(NamedTuple):
    """What a block is told of its samples: ``silu_BD``, SiLU of the sum of the embeddings of time
    and class, from which adaLN's linear layers start; for routers, ``time_BD``, the embedding of
    the time alone, and ``null_B``, which are of the null class.
    """

    silu_BD: Tensor
    time_BD: Tensor
    null_B: Tensor

    def halves(self) -> list[Condition]:
        """Those of each half of the samples."""
        return [Condition(*values) for values in zip(*(value.chunk(2) for value in self))]


# Of the samples, [B/2, N, D] each: what gives it, perhaps of rows that are still on their way.
Halves = tuple[Callable[[], Tensor], Callable[[], Tensor]]
BlockOutput = tuple[Tensor | Halves, MoEStats | None]
BlockRun = Callable[["DiTBlock", str, Tensor | Halves, Condition, RoutingRule], BlockOutput]


class DiTBlock(nn.Module):
    """adaLN-Zero block: attention, then MLP or MoE layer, each scaled, shifted and gated by the
    condition.
    """

    def __init__(self, model: ModelConfig, mlp: nn.Module) -> None:
        super().__init__()
        self.norm1 = norm(model, model.width)
        self.attn = Attention(model)
        self.norm2 = norm(model, model.width)
        self.mlp = mlp
        self.shows_plain = isinstance(mlp, MoELayer) and mlp.moe.router_input == "time_token"
        self.adaLN_modulation = adaln(model.width, 6)

    def forward(
        self, x: Tensor | Halves, c: Condition, rule: RoutingRule, form: str, run: BlockRun
    ) -> BlockOutput:
        """The block as ``run`` computes it, recomputed in backward as ``form`` says."""
        if isinstance(x, Tensor) or isinstance(self.mlp, MoELayer):
            return run(self, form, x, c, rule)
        done = [run(self, form, half(), each, rule)[0] for half, each in zip(x, c.halves())]
        return _here(*done), None

    def compute(
        self, x: Tensor, c: Condition, rule: RoutingRule, run: Run = at_once
    ) -> BlockOutput:
        """x [B, N, D] -> x after attention and MLP, and the layer's report.  ``run`` is given what
        lies between exchanges, a part at a time.
        """
        return self.compute_and_show(x, c, rule, run)[:2]

    def compute_and_show(
        self, x: Tensor, c: Condition, rule: RoutingRule, run: Run = at_once
    ) -> tuple[Tensor, MoEStats | None, Tensor]:
        """As ``compute``, and x between attention and MLP, without a gradient."""
        x, h, gate, plain = run(self.attend, x, c.silu_BD)
        middle, stats = x.detach(), None
        if isinstance(self.mlp, MoELayer):
            y, stats = self.mlp(h, rule, run, Beside(c.time_BD, plain, c.null_B))
        else:
            y = self.mlp(h)
        return run(_gated_sum, x, gate, y), stats, middle

    def compute_halves(
        self, halves: Halves, c: Condition, rule: RoutingRule, run: Run, arrived: bool
    ) -> BlockOutput:
        """Both halves through a block with an MoE layer.  Their last rows come home while the next
        block attends to the first half, unless all must have ``arrived``.
        """
        parts = (run(self.attend, half(), each) for half, each in zip(halves, c.silu_BD.chunk(2)))
        x, h, gate, plain = zip(*parts)
        beside = Beside(c.time_BD, torch.cat(plain) if self.shows_plain else None, c.null_B)
        late, stats = self.mlp(h, rule, run, beside)
        a, b = (partial(_late_sum, *each, run) for each in zip(x, gate, late))
        return _here(a(), b()) if arrived else (a, b), stats

    def attend(self, x: Tensor, silu_BD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Everything before the MLP: (x after attention, the MLP's input, the gate [B, D] of its
        output, the input before shift and scale where a router looks at that).
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(silu_BD).chunk(
            6, dim=1
        )
        x = _gated_sum(x, gate1, self.attn(modulate(self.norm1(x), shift1, scale1)))
        plain = self.norm2(x)
        return x, modulate(plain, shift2, scale2), gate2, plain if self.shows_plain else None


def _gated_sum(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    return x + gate.unsqueeze(1) * y


def _late_sum(x: Tensor, gate: Tensor, late: Late, run: Run) -> Tensor:
    return run(_gated_sum, x, gate, late.output(run).view_as(x))


def _here(a: Any, b: Any) -> Halves:
    return lambda: a, lambda: b


def run_plainly(
    block: DiTBlock, form: str, x: Tensor | Halves, c: Condition, rule: RoutingRule
) -> BlockOutput:
    """A block as Python comes to its operators."""
    return recomputed_block(block, form, x, c, rule, at_once)


def recomputed_block(
    block: DiTBlock, form: str, x: Tensor | Halves, c: Condition, rule: RoutingRule, run: Run
) -> BlockOutput:
    """A block as Python comes to it, recomputed as a whole."""
    if isinstance(x, Tensor):
        return recomputed(block.compute, form, x, c, rule, run)
    # Recomputing a whole block would send rows anew for which nobody waits.
    return recomputed(block.compute_halves, form, x, c, rule, run, form == "block")


def _mlp(
    model: ModelConfig, moe: MoEConfig, pool: int, groups: ParallelGroups, index: int
) -> nn.Module:
    """What stands behind the attention of block ``index``."""
    if not is_moe_block(model, moe, index):
        return Mlp(model.width, model.hidden, model.activation)
    hidden = moe.shared_experts * expert_hidden(model, moe)
    shared = Mlp(model.width, hidden, model.activation) if hidden else None
    return MoELayer(model, moe, pool, groups, shared)


def patchify(x: Tensor, patch: int) -> Tensor:
    """[B, C, H, W] -> every token's patch [B N, patch patch C], in the order of the final layer."""
    B, C, H, W = x.shape
    parts = x.view(B, C, H // patch, patch, W // patch, patch)
    return parts.permute(0, 2, 4, 3, 5, 1).reshape(-1, patch * patch * C)


def dispersive_loss(z_BND: Tensor, world: Group) -> Tensor:
    """Dispersive loss in the form of InfoNCE with squared distances (Wang & He 2025): log
    mean exp(-d_ij / tau) over all pairs of samples of all ranks, i = j included as in their code,
    d_ij the mean squared difference over tokens and channels.  The same on every rank.

    Ranks' gradients are averaged.  Each gives its own samples', which stand in a pair as i and as
    j, so as often as there are ranks and twice, and nothing travels in backward.
    """
    mine = z_BND.flatten(1)
    everyone = gather_stack(mine.detach(), world).flatten(0, 1)
    mine, everyone = (z.to(torch.promote_types(z.dtype, torch.float32)) for z in (mine, everyone))
    squares = mine.square().sum(1, keepdim=True) + everyone.square().sum(1) - 2 * mine @ everyone.T
    part = (squares / (-_DISPERSIVE_TAU * mine.shape[1])).exp().sum()
    total = sum_over(part.detach(), world) + 2 * world.size * (part - part.detach())
    return (total / len(everyone) ** 2).log()


def new_projector(projector: Projector) -> nn.Sequential:
    """Its linear layers, with SiLU between them (REPA)."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(projector.sizes):
        layers += [Linear(fan_in, fan_out), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


class DiT(nn.Module):
    """Diffusion transformer (Peebles & Xie 2023) with DiffMoE's MoE layers.

    ``pool`` is in samples and only matters for the training rule; ``groups`` says which experts
    live here; ``overlap``: ``parallel.overlap``, in training with EP; ``dispersive``: training
    passes report the dispersive loss; ``projector``: and what this makes of tokens, which nothing
    but the loss on it sees.  ``run`` is how its blocks are computed: ``run_plainly``, or
    what ``models.compiled`` puts there.
    """

    def __init__(
        self,
        model: ModelConfig,
        moe: MoEConfig,
        *,
        pool: int = 1,
        groups: ParallelGroups | None = None,
        recompute: str = "none",
        overlap: str = "none",
        time_scale: float = 1.0,
        dispersive: bool = False,
        projector: Projector | None = None,
    ) -> None:
        super().__init__()
        groups = groups or single_process()
        self.model, self.moe, self.time_scale = model, moe, time_scale
        self.recompute = forms(recompute, model.depth)  # of each block
        self.in_halves = overlap == "halves" and groups.ep.size > 1  # while training
        self.world = groups.world
        self.dispersed = -(-model.depth // 4) if dispersive else 0  # blocks before that loss
        self.run: BlockRun = run_plainly
        self.x_embedder = PatchEmbedding(model.channels, model.patch, model.width)
        self.t_embedder = TimestepEmbedding(model.width)
        self.y_embedder = LabelEmbedding(model.classes, model.width)
        self.blocks = nn.ModuleList(
            DiTBlock(model, _mlp(model, moe, pool, groups, i)) for i in range(model.depth)
        )
        self.final_layer = FinalLayer(model)
        self.projected = projector.block if projector else 0  # blocks before it
        if projector:
            self.projector = new_projector(projector)
        side = model.input_size // model.patch
        positions = sine_positions(model.width, side, model.position_scale)
        self.register_buffer("pos_embed", positions.unsqueeze(0), persistent=False)

    @classmethod
    def from_pretrained(
        cls, name: str | Path, weights: str | None = None, revision: str | None = None
    ) -> DiT:
        """The trained model at ``name``, fp32 on the CPU, in eval mode; see
        ``models.pretrained.open_pretrained``.
        """
        from diffmoe.models.pretrained import open_pretrained

        return open_pretrained(name, weights, revision).model()

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, rule: RoutingRule | None = None
    ) -> ModelOutput:
        """x [B, C, H, W] noised latents, t [B] times, y [B] classes (``classes`` = null).  Without
        a ``rule`` experts take tokens as in sampling: those above the learned thresholds, whatever
        else is in the batch.
        """
        rule = rule or RoutingRule("token", self.moe.capacity)
        dtype = self.final_layer.linear.bias.dtype
        h = self.x_embedder(x.to(dtype)) + self.pos_embed.to(dtype)
        time = self.t_embedder(t * self.time_scale)
        silu = F.silu(time + self.y_embedder(y)).to(dtype)  # once for all blocks
        c = Condition(silu, time.to(dtype), y == self.model.classes)
        reports, dispersive, projected = [], None, None
        if self.in_halves and self.training:
            h = _here(*h.chunk(2))
        for number, (block, form) in enumerate(zip(self.blocks, self.recompute), 1):
            h, stats = block(h, c, rule, form if self.training else "none", self.run)
            if stats is not None:
                reports.append(stats)
            if number in (self.dispersed, self.projected) and self.training:
                if not isinstance(h, Tensor):  # rows are waited for here, and once
                    h = _here(*(half() for half in h))
                whole = h if isinstance(h, Tensor) else torch.cat([half() for half in h])
                if number == self.dispersed:
                    dispersive = dispersive_loss(whole, self.world)
                if number == self.projected:
                    projected = self.projector(whole)
        if not isinstance(h, Tensor):
            h = torch.cat([half() for half in h])
        prediction = self._unpatchify(self.final_layer(h, silu))
        return ModelOutput(prediction, tuple(reports), dispersive, projected)

    @contextlib.contextmanager
    def plainly(self) -> Iterator[None]:
        """Blocks are run plainly inside, backward too: nothing that looks at operators or modules
        sees into a graph.
        """
        run, self.run = self.run, run_plainly
        try:
            yield
        finally:
            self.run = run

    def _unpatchify(self, h: Tensor) -> Tensor:
        B, N, _ = h.shape
        p, side = self.model.patch, int(N**0.5)
        h = h.view(B, side, side, p, p, self.model.out_channels)
        return h.permute(0, 5, 1, 3, 2, 4).reshape(B, self.model.out_channels, side * p, side * p)

    def cast(self, dtype: torch.dtype) -> DiT:
        """Weights become ``dtype``; thresholds and other buffers stay.  Returns itself."""
        for parameter in self.parameters():
            parameter.data = parameter.data.to(dtype)
        return self

    def moe_layers(self) -> Iterator[tuple[int, MoELayer]]:
        """(block index, layer) of every MoE layer, in order of depth."""
        for i, block in enumerate(self.blocks):
            if isinstance(block.mlp, MoELayer):
                yield i, block.mlp
