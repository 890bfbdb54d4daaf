"""The diffusion transformer and its parts."""
