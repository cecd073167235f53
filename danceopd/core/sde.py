"""The stochastic rollout whose steps are Gaussian (Flow-GRPO, arXiv 2505.05470, eq. 9), and what follows from it."""

import math

import torch

from danceopd.core.conditioning import Conditioning
from danceopd.core.fields import Field
from danceopd.core.objectives import per_sample
from danceopd.core.randomness import Generator, randn


def transition(
    velocity: torch.Tensor, z: torch.Tensor, index: torch.Tensor, sigmas: torch.Tensor, noise_level: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [B, ...] and standard deviation [B] of the step from trajectory index [B] to the next.

    With s = noise_level sqrt(sigma / (1 - sigma)) and dt < 0: mean z (1 + s^2 / (2 sigma) dt)
    + v (1 + s^2 (1 - sigma) / (2 sigma)) dt, deviation s sqrt(-dt). At sigma 1, where s has its pole, the next
    noise level stands in the root. The marginals of the ODE are kept in the limit of small steps.
    """
    index = index.to(z.device)
    sigma, dt = sigmas[index], sigmas[index + 1] - sigmas[index]
    s2 = noise_level**2 * sigma / (1 - torch.where(sigma == 1, sigmas[1], sigma))
    on_z = per_sample(1 + s2 / (2 * sigma) * dt, z)
    on_v = per_sample((1 + s2 * (1 - sigma) / (2 * sigma)) * dt, z)
    return on_z * z + on_v * velocity.float(), (s2 * -dt).sqrt()


def log_probability(value: torch.Tensor, mean: torch.Tensor, deviation: torch.Tensor) -> torch.Tensor:
    """Log density of the Gaussian step at value, averaged over the entries of a sample: [B]."""
    d = per_sample(deviation, value)
    density = -((value - mean) / d).square() / 2 - d.log() - math.log(2 * math.pi) / 2
    return density.flatten(1).mean(1)


def kl(mean: torch.Tensor, other: torch.Tensor, deviation: torch.Tensor) -> torch.Tensor:
    """KL of two Gaussian steps of one standard deviation [B], averaged over the entries of a sample: [B]."""
    return ((mean - other).square().flatten(1).mean(1)) / (2 * deviation.square())


@torch.no_grad()
def sde_rollout(
    field: Field,
    noise: torch.Tensor,
    conditioning: Conditioning,
    sigmas: torch.Tensor,
    noise_level: float,
    generator: Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every state [B, N + 1, ...] of a stochastic rollout from noise [B, ...], and each step's log density [B, N]."""
    fixed = getattr(field, "fixed", None)  # a field that has steps of its own for samples that stay the same
    field = field if fixed is None else fixed(conditioning)
    states, log_densities, z = [noise.float()], [], noise.float()
    for i in range(len(sigmas) - 1):
        index = torch.full((len(z),), i)
        mean, deviation = transition(field(z, sigmas[i].expand(len(z)), conditioning), z, index, sigmas, noise_level)
        fresh = randn(generator, *z.shape).to(z)
        z = mean + per_sample(deviation, z) * fresh
        states.append(z)
        log_densities.append(log_probability(z, mean, deviation))
    return torch.stack(states, 1), torch.stack(log_densities, 1)
