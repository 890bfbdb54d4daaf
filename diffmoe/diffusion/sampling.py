"""ODE samplers: plain functions ``sampler(velocity, z, steps)`` from noise at t = 0 to data at t = 1."""

from __future__ import annotations

from torch import Tensor

from diffmoe.diffusion.rectified_flow import Velocity


def euler(velocity: Velocity, z: Tensor, steps: int) -> Tensor:
    """Explicit Euler, first order, ``steps`` evaluations.  z [B, …]."""
    for i in range(steps):
        z = z + velocity(z, z.new_full((len(z),), i / steps)) / steps
    return z


def heun(velocity: Velocity, z: Tensor, steps: int) -> Tensor:
    """Heun's trapezoid rule, second order, two evaluations a step."""
    for i in range(steps):
        here = velocity(z, z.new_full((len(z),), i / steps))
        there = velocity(z + here / steps, z.new_full((len(z),), (i + 1) / steps))
        z = z + (here + there) / (2 * steps)
    return z


SAMPLERS = {"euler": euler, "heun": heun}
