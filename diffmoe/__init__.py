"""Expert-parallel training of DiffMoE diffusion transformers on DeepSpeed.

from diffmoe import DiffMoEPipeline

pipe = DiffMoEPipeline.from_pretrained("runs/demo")
pipe(classes=[3, 7], num_images=8, guidance_scale=1.5).images[0].save("three.png")
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffmoe.models.dit import DiT
    from diffmoe.pipeline import DiffMoEPipeline

__version__ = "0.1.0"
__all__ = ["DiT", "DiffMoEPipeline"]


def __getattr__(name: str) -> Any:
    """torch takes seconds to import, and half of the subcommands need none."""
    if name == "DiT":
        from diffmoe.models.dit import DiT

        return DiT
    if name == "DiffMoEPipeline":
        from diffmoe.pipeline import DiffMoEPipeline

        return DiffMoEPipeline
    raise AttributeError(f"module 'diffmoe' has no attribute {name!r}")
