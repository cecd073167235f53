"""The stochastic rollout whose steps are Gaussian (Flow-GRPO, arXiv 2505.05470, eq. 9), and what follows from it."""

import math

import torch

from danceopd.core.conditioning import Conditioning
from danceopd.core.copies import to_device
from danceopd.core.fields import Field
from danceopd.core.objectives import per_sample
from danceopd.core.randomness import Generator, randn


def transition(
    velocity: torch.Tensor, z: torch.Tensor, index: torch.Tensor, sigmas: torch.Tensor, noise_level: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Works out the Gaussian step from one trajectory index to the next.

    With s = noise_level sqrt(sigma / (1 - sigma)) and dt < 0 its mean is z (1 + s^2 / (2 sigma) dt)
    + v (1 + s^2 (1 - sigma) / (2 sigma)) dt and its deviation s sqrt(-dt). At sigma 1, where s has its pole, the next
    noise level stands in the root. The marginals of the ODE are kept in the limit of small steps.

    Args:
        velocity: Float tensor [B, ...], the velocity at z.
        z: Float tensor [B, ...], the states.
        index: int64 tensor [B] on the CPU, their trajectory indices.
        sigmas: float32 tensor [N + 1] on the CPU, the noise levels.
        noise_level: a of the equation.

    Returns:
        The mean [B, ...] and the standard deviation [B].
    """
    sigma, dt = sigmas[index], sigmas[index + 1] - sigmas[index]
    s2 = noise_level**2 * sigma / (1 - torch.where(sigma == 1, sigmas[1], sigma))
    on_z = per_sample(1 + s2 / (2 * sigma) * dt, z)
    on_v = per_sample((1 + s2 * (1 - sigma) / (2 * sigma)) * dt, z)
    return on_z * z + on_v * velocity.to(z.dtype), to_device((s2 * -dt).sqrt(), z.device)


def log_probability(value: torch.Tensor, mean: torch.Tensor, deviation: torch.Tensor) -> torch.Tensor:
    """Works out the log density of a Gaussian step, averaged over the entries of a sample.

    Args:
        value: Float tensor [B, ...], where the step went.
        mean: Float tensor [B, ...].
        deviation: Float tensor [B], the standard deviation.

    Returns:
        Float tensor [B].
    """
    d = per_sample(deviation, value)
    density = -((value - mean) / d).square() / 2 - d.log() - math.log(2 * math.pi) / 2
    return density.flatten(1).mean(1)


def kl(mean: torch.Tensor, other: torch.Tensor, deviation: torch.Tensor) -> torch.Tensor:
    """Works out the KL of two Gaussian steps of one deviation, averaged over the entries of a sample.

        KL = mean((mean - other)^2) / (2 deviation^2)

    Args:
        mean: Float tensor [B, ...].
        other: Float tensor [B, ...], the mean of the other step.
        deviation: Float tensor [B], the standard deviation of both.

    Returns:
        Float tensor [B].
    """
    return ((mean - other).square().flatten(1).mean(1)) / (2 * deviation.square())


@torch.no_grad()
def sde_rollout(
    field: Field,
    noise: torch.Tensor,
    conditioning: Conditioning,
    sigmas: torch.Tensor,
    noise_level: float,
    generator: Generator,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rolls out stochastically from noise, and keeps everything.

    Args:
        field: The field to integrate; one that brings ``fixed`` is asked by the steps that it has for these samples.
        noise: Float tensor [B, ...], the states at sigma 1.
        conditioning: What the B samples are conditioned on.
        sigmas: float32 tensor [N + 1] on the CPU, the noise levels.
        noise_level: a in the transition's deviation; 0 would be the ODE.
        generator: Draws the batch's randomness.

    Returns:
        Every state [B, N + 1, ...], the velocity at the first N of them [B, N, ...], and each step's log density
        [B, N].
    """
    fixed = getattr(field, "fixed", None)
    field = field if fixed is None else fixed(conditioning)
    z, sigmas = noise.to(torch.promote_types(noise.dtype, torch.float32)), sigmas.cpu()
    levels = to_device(sigmas, z.device)
    states, velocities, log_densities = [z], [], []
    for i in range(len(sigmas) - 1):
        velocity = field(z, levels[i].expand(len(z)), conditioning)
        mean, deviation = transition(velocity, z, torch.full((len(z),), i), sigmas, noise_level)
        fresh = to_device(randn(generator, *z.shape).to(z.dtype), z.device)
        z = mean + per_sample(deviation, z) * fresh
        states.append(z)
        velocities.append(velocity)
        log_densities.append(log_probability(z, mean, deviation))
    return torch.stack(states, 1), torch.stack(velocities, 1), torch.stack(log_densities, 1)
