"""What a mixture layer is measured against, each a plain module of its own: the textbook loop and
DeepSpeed's layer.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from diffmoe.config import ModelConfig
from diffmoe.device import backend
from diffmoe.layout import rows_taken
from diffmoe.models.layers import Mlp
from diffmoe.moe.capacity import CapacityPredictor, predictor_loss
from diffmoe.moe.gating import gate_scores
from diffmoe.training.engine import import_deepspeed


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
        """(output [T, D], predictor loss, K-th largest sigmoids [E]) with all tokens as one pool."""
        (T, D), E = x_TD.shape, len(self.experts)
        K = rows_taken(T, E, capacity)
        scores = gate_scores(x_TD, self.router.weight)
        gates, chosen = scores.t().topk(K, dim=1)
        rows = torch.cat(
            [
                gates[i].unsqueeze(1) * expert(x_TD[chosen[i]])
                for i, expert in enumerate(self.experts)
            ]
        )
        place = torch.cat([i * T + chosen[i] for i in range(E)])
        contributions = rows.new_zeros(E * T, D).index_copy(0, place, rows)
        y = contributions.view(E, T, D).sum(dim=0).to(x_TD.dtype)
        logits = self.capacity_predictor(x_TD)
        mask = torch.zeros_like(scores).scatter(0, chosen.t(), 1.0)
        observed = logits.detach().sigmoid().topk(K, dim=0).values[-1]
        return y, predictor_loss(logits, mask), observed


def deepspeed_layer(model: ModelConfig, experts: int, device: torch.device) -> nn.Module:
    """``deepspeed.moe.layer.MoE``: token choice, one expert a token, capacity 1, the same expert
    MLPs.  Joins a world of one if nobody has.
    """
    deepspeed = import_deepspeed()
    if not dist.is_initialized():
        store = Path(tempfile.mkdtemp(prefix="diffmoe-bench-")) / "store"
        dist.init_process_group(
            backend(device), init_method=f"file://{store}", rank=0, world_size=1
        )
    deepspeed.init_distributed(
        dist_backend=backend(device), auto_mpi_discovery=False, verbose=False
    )
    layer = deepspeed.moe.layer.MoE(
        model.width, Mlp(model.width, model.hidden), num_experts=experts, k=1, capacity_factor=1.0
    )
    layer.set_deepspeed_parallelism()
    return layer
