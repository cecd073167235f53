"""The steps of the solvers of dz = v d sigma, and nothing else."""

import torch

from danceopd.core.conditioning import Conditioning
from danceopd.core.fields import Field

SOLVERS = ("euler", "heun", "ab2")


def half_ratio(before: torch.Tensor, sigma: torch.Tensor, next_sigma: torch.Tensor) -> torch.Tensor:
    """Works out half the ratio of a step of the solver to the one before it.

    Args:
        before: Tensor of noise levels at which the step before began.
        sigma: Tensor of the same shape, at which this step begins.
        next_sigma: Tensor of the same shape, at which it ends.

    Returns:
        (next_sigma - sigma) / (2 (sigma - before)).
    """
    return (next_sigma - sigma) / (sigma - before) / 2


def extrapolate(velocity: torch.Tensor, previous: torch.Tensor, half: torch.Tensor | float) -> torch.Tensor:
    """Takes the velocity of the two-step Adams-Bashforth method, v + half (v - previous).

    Args:
        velocity: Float tensor [B, ...], v.
        previous: Float tensor [B, ...], the velocity of the step before.
        half: What `half_ratio` gives, as it broadcasts over the velocity; 0 makes the step Euler's.

    Returns:
        Float tensor [B, ...].
    """
    return velocity + half * (velocity - previous)


def step(
    field: Field,
    z: torch.Tensor,
    conditioning: Conditioning,
    sigma: torch.Tensor,
    next_sigma: torch.Tensor,
    solver: str = "euler",
) -> torch.Tensor:
    """Makes one step of Euler's or Heun's solver.

    Args:
        field: The field to integrate.
        z: float32 tensor [B, ...], the states at sigma.
        conditioning: What the B samples are conditioned on.
        sigma: float32 scalar tensor, the noise level of all of them.
        next_sigma: float32 scalar tensor, the noise level to go to; Heun's solver asks there, and so not at 0.
        solver: ``euler``, ``heun``; ``ab2`` takes Euler's step, as its first is.

    Returns:
        float32 tensor [B, ...], the states at next_sigma.
    """
    dt = next_sigma - sigma
    velocity = field(z, sigma.expand(len(z)), conditioning).to(z.dtype)
    if solver != "heun":
        return z + dt * velocity
    end = field(z + dt * velocity, next_sigma.expand(len(z)), conditioning).to(z.dtype)
    return z + dt * (velocity + end) / 2
