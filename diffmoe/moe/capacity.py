"""The capacity predictor, its thresholds (paper, equations 10-15), and the capacity dial.

The dial: for every expert a histogram of the predictor's outputs on training data, out of which the
threshold for any capacity can be read without data.  ``training/step.py`` fills it, from the EMA
weights.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffmoe.gradient_sums import Linear
from diffmoe.moe.running import RunningState

# A trained predictor is sure: nearly all its outputs lie next to 0 or 1, a third of them below
# logit -16 in the demo.  A fresh one's logits lie close around 0.  So bins are equal in
# asinh(logit): 0.03 wide in the logit at 0, 0.3 at 10, 1.4 at 40.  They end where fp32's sigmoid
# does; what lies beyond counts in the last ones.
HISTOGRAM_BINS = 256
_LOWEST, _HIGHEST = math.asinh(-80.0), math.asinh(16.0)
_BIN_WIDTH = (_HIGHEST - _LOWEST) / HISTOGRAM_BINS
# Counts fade by this every optimizer step: all steps just before a checkpoint count, those before
# the last one do not.
HISTOGRAM_DECAY = 0.99
# A threshold below every sigmoid, also those that fp32 rounds to 0.
_ALL_PASS = -1.0
# Counted of each sample, whose tokens share its time step and agree with each other: more would
# tell little.
_TOKENS_PER_SAMPLE = 64


class CapacityPredictor(nn.Sequential):
    """Linear, SiLU, Linear on the detached token: logits of "expert i takes this token", [T, D] ->
    [T, E].
    """

    def __init__(self, width: int, experts: int) -> None:
        super().__init__(Linear(width, width), nn.SiLU(), Linear(width, experts))

    def forward(self, x_TD: Tensor) -> Tensor:
        logits = super().forward(x_TD.detach())
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def predictor_loss(logits_TE: Tensor, mask_TE: Tensor) -> Tensor:
    """Binary cross-entropy in nats, mean over tokens and experts (paper, equation 11)."""
    return F.binary_cross_entropy_with_logits(logits_TE, mask_TE.to(logits_TE.dtype))


def trivial_predictor_loss(experts: int, capacity: float) -> float:
    """Cross-entropy in nats of the predictor that always says capacity / experts: the figure to
    beat.
    """
    p = torch.tensor(min(1.0, capacity / experts), dtype=torch.float64)
    return float(-(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p)))


@torch.no_grad()
def histogram(logits_TE: Tensor, samples: int) -> Tensor:
    """Counts of predictor outputs by expert and bin [E, HISTOGRAM_BINS], fp32 (whole numbers).

    Of every sample the same tokens are counted, at most ``_TOKENS_PER_SAMPLE`` of them: every s-th,
    with s prime to the number of tokens, so that they lie on a lattice over the whole image and not
    in a few of its columns.  What is counted does therefore not depend on how samples are spread
    over ranks.  Static shapes, no host sync; NaN counts as 0, since other places tell of it better.
    """
    tokens, experts = len(logits_TE) // samples, logits_TE.shape[1]
    step = -(-tokens // _TOKENS_PER_SAMPLE)
    while math.gcd(step, tokens) > 1:
        step += 1
    some = logits_TE.view(samples, tokens, experts)[:, ::step].float().asinh()
    bins = ((some - _LOWEST) / _BIN_WIDTH).nan_to_num(0.0).clamp(0, HISTOGRAM_BINS - 1).long()
    place = (bins + HISTOGRAM_BINS * torch.arange(experts, device=bins.device)).flatten()
    counts = torch.zeros(experts * HISTOGRAM_BINS, device=bins.device)
    counts.index_add_(0, place, torch.ones_like(place, dtype=counts.dtype))
    return counts.view(experts, HISTOGRAM_BINS)


def dialled_thresholds(counts_EH: Tensor, capacity: float) -> Tensor:
    """The thresholds [E] above which every expert finds the share ``capacity / E`` of the tokens in
    its histogram [E, H].

    Linear inside a bin.  At ``capacity = E`` every token passes, also those unlike any that was
    counted.
    """
    share = capacity / counts_EH.shape[0]
    if share >= 1:
        return torch.full_like(counts_EH[:, 0], _ALL_PASS)
    counts = counts_EH.double()
    least = counts.flip(1).cumsum(1).flip(1)  # what lies above each bin's lower edge: falls
    wanted = share * least[:, :1]
    # The highest bin above whose lower edge there is enough.  Empty ones share that edge's count
    # with the bin above them, so this one is not empty.
    bin_ = (least >= wanted).sum(1, keepdim=True) - 1
    inside = (least.gather(1, bin_) - wanted) / counts.gather(1, bin_)
    return (_LOWEST + _BIN_WIDTH * (bin_ + inside)).squeeze(1).sinh().sigmoid().to(counts_EH.dtype)


class Thresholds(RunningState):
    """Per-expert thresholds: a running mean of observations, started by the first one; and the
    predictor's histograms, as running counts that fade.
    """

    # A file without a count comes from elsewhere: its thresholds have been observed.  One without a
    # histogram is older than the dial: the histogram starts empty.
    absent = {"observations": 1, "histogram": 0, "counted_at": 0}
    value: Tensor
    observations: Tensor
    histogram: Tensor
    counted_at: Tensor

    def __init__(self, experts: int, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("value", torch.full((experts,), 0.5))
        self.register_buffer("observations", torch.zeros((), dtype=torch.int64))
        self.register_buffer("histogram", torch.zeros(experts, HISTOGRAM_BINS))
        self.register_buffer("counted_at", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def commit(self, observed_E: Tensor) -> None:
        """Takes one step's observation [E]: the K-th largest value, mean over pools."""
        kept = torch.where(self.observations > 0, self.decay, 0.0)
        self.value.mul_(kept).add_(observed_E.to(self.value.dtype) * (1 - kept))
        self.observations += 1

    @torch.no_grad()
    def commit_histogram(self, counts_EH: Tensor, step: int) -> None:
        """Takes the counts [E, HISTOGRAM_BINS] of optimizer step ``step``, over all ranks and
        micro-batches.
        """
        fade = HISTOGRAM_DECAY ** (step - self.counted_at).to(self.histogram.dtype)
        self.histogram.mul_(fade).add_(counts_EH.to(self.histogram.dtype))
        self.counted_at.fill_(step)

    @property
    def has_histogram(self) -> bool:
        """Whether the dial has something to read; asks the device."""
        return bool(self.histogram.any())

    def chosen(self, gamma: float | None, dial: float | None) -> Tensor:
        """Thresholds [E]: the constant ``gamma``, those for the capacity ``dial``, or with neither
        the learned ones.
        """
        if gamma is not None:
            return torch.full_like(self.value, gamma or _ALL_PASS)
        if dial is not None:
            return dialled_thresholds(self.histogram, dial).to(self.value.dtype)
        return self.value
