"""What is matched at the queried state: losses of one sample each, [B, ...] -> [B] in float32."""

import math
from typing import Literal, cast, get_args

import torch
from danceopd_kernels import routed_velocity_mse
from danceopd_kernels.routed_velocity_mse import Matched

from danceopd.core.copies import to_device
from danceopd.core.randomness import Generator, rand, randn

Weighting = Literal["mse", "sigma_sqrt", "logit_normal", "mode", "cosmap", "kl", "clean"]
WEIGHTINGS: tuple[str, ...] = get_args(Weighting)


def per_sample(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Shapes one number for each sample so that it broadcasts over the latents.

    Args:
        value: Tensor [B], on the CPU too.
        like: Float tensor [B, ...], whose dtype and device the result has.

    Returns:
        Float tensor [B, 1, ...].
    """
    return to_device(value.to(like.dtype), like.device).view(-1, *(1,) * (like.dim() - 1))


def velocity_loss(velocity: torch.Tensor, questions) -> Matched:
    """Compares the student's velocities with the sources' by the weighted squared error, in one pass.

    Each query's own answer is gathered by its route, guided, compared, weighted and summed in float32, and the gradient
    is made along the way; the target is never written (danceopd_kernels, operation 1). The environment's
    ``DANCEOPD_KERNELS=torch`` gives plain PyTorch.

        loss = weight * mean((v - (u + guidance_scale (c - u)))^2)

    Args:
        velocity: Float tensor [Q, ...], the student's, with gradient.
        questions: Q `Questions`; read are their answers and weights.

    Returns:
        The weighted loss [Q] with gradient, and without the mean squared error and the norms of both velocities [Q].

    Raises:
        ValueError: If the velocities differ in shape.
    """
    dtype = torch.promote_types(velocity.dtype, questions.answers.velocities[0].dtype)
    answers = questions.answers.to(dtype)
    unconds = answers.velocities if answers.unconds is None else answers.unconds
    guided, own = answers.guidance_scale is not None, (answers.network, answers.row, answers.uncond_row)
    pointers = to_device(torch.stack([pointer for pointer in own if pointer is not None]), velocity.device)
    compared = routed_velocity_mse(
        velocity.to(dtype),
        answers.velocities,
        pointers[0],
        row=pointers[1],
        uncond=unconds if guided else None,
        uncond_row=pointers[2] if guided else None,
        guidance_scale=to_device(answers.guidance_scale, velocity.device) if guided else None,
        weight=questions.weight,
        reduction="none",
        norms=True,
    )
    return cast(Matched, compared)


def velocity_mse(velocity: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Works out the mean squared error of each sample, in float32.

    Args:
        velocity: Float tensor [B, ...].
        target: Float tensor [B, ...]; no gradient reaches it.

    Returns:
        float32 tensor [B].

    Raises:
        ValueError: If the shapes differ.
    """
    if velocity.shape != target.shape:
        raise ValueError(f"velocity {tuple(velocity.shape)} and target {tuple(target.shape)} differ in shape")
    dtype = torch.promote_types(velocity.dtype, target.dtype)
    return cast(torch.Tensor, routed_velocity_mse(velocity.to(dtype), target.to(dtype), reduction="none"))


def weighting(name: str, sigma: torch.Tensor, next_sigma: torch.Tensor) -> torch.Tensor:
    """Works out the weight of a squared error at sigma, whose trajectory goes on to next_sigma.

    ``mse`` is 1. ``sigma_sqrt`` and ``cosmap`` are diffusers' compute_loss_weighting_for_sd3 (SD3, arXiv 2403.03206).
    ``logit_normal`` and ``mode`` are densities to draw sigma from in SD3 and diffusers; here, where the query has drawn
    it, the same densities are weights (logit-normal with mean 0 and deviation 1; mode with scale 1.29). ``clean`` is
    sigma^2, which makes the error that of the clean estimate z - sigma v. ``kl`` is (next_sigma - sigma)^2 / 2, the KL
    of two Gaussian steps (DiffusionOPD, arXiv 2605.15055).

    Args:
        name: One of `WEIGHTINGS`.
        sigma: Float tensor [B].
        next_sigma: Float tensor [B].

    Returns:
        float32 tensor [B].

    Raises:
        ValueError: For another name.
    """
    s = sigma.double().clamp(1e-3, 1 - 1e-3)  # the densities' poles
    if name == "mse":
        weight = torch.ones_like(s)
    elif name == "sigma_sqrt":
        weight = sigma.double() ** -2
    elif name == "logit_normal":
        weight = torch.exp(-torch.logit(s).square() / 2) / (s * (1 - s) * math.sqrt(2 * math.pi))
    elif name == "mode":
        weight = mode_density(s)
    elif name == "cosmap":
        weight = 2 / (math.pi * (1 - 2 * sigma.double() + 2 * sigma.double() ** 2))
    elif name == "clean":
        weight = sigma.double().square()
    elif name == "kl":
        weight = (next_sigma.double() - sigma.double()).square() / 2
    else:
        raise ValueError(f"unknown weighting {name!r}; use one of {', '.join(WEIGHTINGS)}")
    return weight.float()


def mode_density(sigma: torch.Tensor, scale: float = 1.29) -> torch.Tensor:
    """Works out the density of sigma = 1 - u - scale (cos^2(pi u / 2) - 1 + u) for u uniform on [0, 1] (SD3, eq. 20).

    Args:
        sigma: float64 tensor [B] in (0, 1).
        scale: The scale of the equation.

    Returns:
        float64 tensor [B].
    """
    low, high, u = torch.zeros_like(sigma), torch.ones_like(sigma), torch.full_like(sigma, 0.5)
    for _ in range(50):  # sigma falls from 1 to 0 in u; bisection finds its u
        above = 1 - u - scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u) > sigma
        low, high = torch.where(above, u, low), torch.where(above, high, u)
        u = (low + high) / 2
    slope = -1 - scale * (1 - math.pi / 2 * torch.sin(math.pi * u))
    return 1 / slope.abs()


def noised(clean: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Brings pictures to noise levels: z = (1 - sigma) clean + sigma noise.

    Args:
        clean: Float tensor [B, ...].
        noise: Float tensor [B, ...].
        sigma: Float tensor [B].

    Returns:
        Float tensor [B, ...].
    """
    s = per_sample(sigma, clean)
    return (1 - s) * clean + s * noise


def renoised(clean: torch.Tensor, generator: Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Brings clean estimates back to fresh noise levels, uniform in [0.02, 0.98].

    Args:
        clean: Float tensor [B, ...].
        generator: Draws the batch's randomness.

    Returns:
        The states [B, ...], their sigma [B] on the CPU, and the noise [B, ...].
    """
    sigma = (0.02 + 0.96 * rand(generator, len(clean))).to(clean.dtype)
    noise = to_device(randn(generator, *clean.shape).to(clean.dtype), clean.device)
    return noised(clean, noise, sigma), sigma, noise


def distillation_move(real: torch.Tensor, other: torch.Tensor, data: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Works out where score distillation moves a clean estimate: sigma (other - real) / mean |sigma (real - data)|.

    As in DMD it is divided by the mean distance of the estimate to the source's, so that noise levels weigh alike.

    Args:
        real: Float tensor [B, ...], the source's velocity at the renoised estimate.
        other: Float tensor [B, ...]: `data` (SDS, arXiv 2209.14988) or the velocity of the network that follows the
            student (DMD, arXiv 2311.18828).
        data: Float tensor [B, ...], noise - estimate.
        sigma: Float tensor [B], the noise level, on the CPU too.

    Returns:
        Float tensor [B, ...].
    """
    s = per_sample(sigma, real)
    distance = (s * (real - data)).flatten(1).abs().mean(1).clamp(min=1e-3)
    return s * (other - real) / per_sample(distance, real)
