"""The student's own trajectory: no gradient, and not a step that nobody looks at."""

import torch

from danceopd.conditioning import Conditioning
from danceopd.fields import Field

SOLVERS = ("euler", "heun")


@torch.no_grad()
def rollout(
    field: Field,
    noise: torch.Tensor,
    conditioning: Conditioning,
    sigmas: torch.Tensor,
    until: torch.Tensor,
    solver: str = "euler",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Integrate dz = v d sigma from noise and return the states at the trajectory indices asked.

    noise [B, ...] is the state at index 0; sigmas [N + 1] float32 descend from 1; until [B, K] int64 in [0, N]
    lies on the CPU, so that no step waits for the device.
    Returns states [B, K, ...] in float32 and their sigmas [B, K]. A sample leaves the batch once its
    deepest index is reached, so the field is evaluated exactly sum(until.max(1)) times per sample in all
    (Heun: twice that, less one for each trajectory that ends at sigma 0).
    Raises ValueError for an unknown solver or an index outside the grid.
    """
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}; use one of {', '.join(SOLVERS)}")
    if until.min() < 0 or until.max() >= len(sigmas):
        raise ValueError(f"trajectory indices must lie in [0, {len(sigmas) - 1}]")
    depth, order = until.amax(1).sort(descending=True, stable=True)
    wanted = until[order]
    active = [int((depth > i).sum()) for i in range(int(depth[0]))]  # the n deepest samples go on
    order, sigmas = order.to(noise.device), sigmas.to(noise.device)
    z, conditioning = noise[order].float(), conditioning[order]
    states = z[:, None].repeat(1, until.shape[1], *(1,) * (z.dim() - 1))
    for i, n in enumerate(active):
        z = step(field, z[:n], conditioning[:n], sigmas[i], sigmas[i + 1], solver)
        row, k = (wanted[:n] == i + 1).nonzero(as_tuple=True)
        states[row, k] = z[row]
    result = torch.empty_like(states)
    result[order] = states
    return result, sigmas[until.to(noise.device)]


def step(field, z, conditioning, sigma, next_sigma, solver="euler") -> torch.Tensor:
    """One step of the solver from noise level sigma to next_sigma (scalars): [B, ...] -> [B, ...]."""
    dt = next_sigma - sigma
    velocity = field(z, sigma.expand(len(z)), conditioning).float()
    if solver == "euler" or next_sigma == 0:  # no field is defined at sigma 0
        return z + dt * velocity
    end = field(z + dt * velocity, next_sigma.expand(len(z)), conditioning).float()
    return z + dt * (velocity + end) / 2


def sample(
    field: Field, noise: torch.Tensor, conditioning: Conditioning, sigmas: torch.Tensor, solver: str = "euler"
) -> torch.Tensor:
    """The end of the whole trajectory: noise [B, ...] -> data [B, ...]."""
    until = torch.full((len(noise), 1), len(sigmas) - 1)
    return rollout(field, noise, conditioning, sigmas, until, solver)[0][:, 0]
