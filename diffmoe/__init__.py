"""Expert-parallel training of DiffMoE diffusion transformers on DeepSpeed."""

__version__ = "0.1.0"
