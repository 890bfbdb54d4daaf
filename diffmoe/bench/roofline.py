"""``run.py bench roofline``: a training step counted without a GPU and priced for one, beside dense of equal activated width.

Of a micro-batch: every kernel with its bytes and FLOPs (:mod:`diffmoe.bench.kernels`), on CUDA tensors that hold nothing, eager and
compiled.  Of the weights: the engine's and EMA's own code on a CPU, with a narrow model of the same tensors, in bytes a
parameter by source.  Host reads: the layers' from the same layout on a CPU, others from the engine's step.  Messages: the planner's
formulas, which ``bench communication`` checks.  A kernel takes the longer of its bytes and its FLOPs at the rates that the hardware
table says are reached; nothing overlaps.  ``ideal``: see ``kernels.Fusion``.  MFU: 6 x forward MACs of the model a sample, recompute not
counted, over the dense bf16 (or fp32) peak.

Where a GPU is at hand (``--measure``, one rank), the step is also timed.
"""
