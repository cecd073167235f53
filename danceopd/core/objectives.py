"""What is matched at the queried state: losses of one sample each, [B, ...] -> [B] in float32.

Written with latents z, noise level sigma [B], velocity v = noise - data and clean estimate x = z - sigma v.
"""

import math

import torch
from danceopd_kernels import routed_velocity_mse

from danceopd.core.fields import Field
from danceopd.core.phase import phase
from danceopd.core.randomness import Generator, rand, randn

WEIGHTINGS = ("mse", "sigma_sqrt", "logit_normal", "mode", "cosmap", "kl", "clean")


def per_sample(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[B] -> [B, 1, ...] that broadcasts over the latents."""
    return value.to(like).view(-1, *(1,) * (like.dim() - 1))


@phase("loss")
def velocity_mse(velocity: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each sample, in float32: [B, ...] and [B, ...] -> [B].

    No gradient reaches the target. Loss and gradient come from one pass (danceopd_kernels, operation 1); the
    environment's DANCEOPD_KERNELS=torch gives plain PyTorch. Raises ValueError if the shapes differ.
    """
    if velocity.shape != target.shape:
        raise ValueError(f"velocity {tuple(velocity.shape)} and target {tuple(target.shape)} differ in shape")
    dtype = torch.promote_types(velocity.dtype, target.dtype)
    return routed_velocity_mse(velocity.to(dtype), target.to(dtype), reduction="none")


def weighting(name: str, sigma: torch.Tensor, next_sigma: torch.Tensor) -> torch.Tensor:
    """The weight of the squared error at sigma [B], whose trajectory goes on to next_sigma [B]: [B] float32.

    mse: 1. sigma_sqrt and cosmap: as diffusers' compute_loss_weighting_for_sd3 (SD3, arXiv 2403.03206).
    logit_normal and mode: in SD3 and diffusers densities to draw sigma from; here, where the query has drawn it,
    the same densities as weights (logit-normal with mean 0 and deviation 1; mode with scale 1.29).
    clean: sigma^2, which makes it the error of the clean estimate.
    kl: (next_sigma - sigma)^2 / 2, the KL of two Gaussian steps (DiffusionOPD, arXiv 2605.15055).
    Raises ValueError for another name.
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
    """Density of sigma = 1 - u - scale (cos^2(pi u / 2) - 1 + u) for u uniform on [0, 1] (SD3, eq. 20)."""
    low, high = torch.zeros_like(sigma), torch.ones_like(sigma)
    for _ in range(50):  # sigma falls from 1 to 0 in u; bisection finds its u
        u = (low + high) / 2
        above = 1 - u - scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u) > sigma
        low, high = torch.where(above, u, low), torch.where(above, high, u)
    slope = -1 - scale * (1 - math.pi / 2 * torch.sin(math.pi * u))
    return 1 / slope.abs()


def flow_matching(student: Field, clean: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor, conditioning):
    """The ordinary loss on data, sigma^2 ||v_theta - (noise - clean)||^2: ([B] loss, velocity, target, states).

    The factor makes it the error of the clean estimate, as the embedded sources were trained.
    """
    s = per_sample(sigma, clean)
    states, target = (1 - s) * clean + s * noise, noise - clean
    velocity = student(states, sigma, conditioning)
    return velocity_mse(s * velocity, s * target), velocity, target, states


def renoised(clean: torch.Tensor, generator: Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Clean estimates brought back to fresh noise levels, uniform in [0.02, 0.98]: states, sigma [B], noise."""
    sigma = (0.02 + 0.96 * rand(generator, len(clean))).to(clean)
    noise = randn(generator, *clean.shape).to(clean)
    s = per_sample(sigma, clean)
    return (1 - s) * clean + s * noise, sigma, noise


def score_distillation(clean, real, other, data, sigma) -> torch.Tensor:
    """Half the squared distance of the clean estimate to itself moved by sigma (other - real): [B].

    Its gradient is that move's opposite. At the renoised estimate and its sigma [B], real is the teacher's
    velocity, data is noise - clean, and other is data (SDS, arXiv 2209.14988) or the fake-score network's
    velocity (DMD, arXiv 2311.18828). As in DMD the move is divided by the mean distance of the estimate to the
    teacher's, so that noise levels weigh alike.
    """
    s = per_sample(sigma, clean)
    distance = (s * (real - data.detach())).flatten(1).abs().mean(1).clamp(min=1e-3)
    return velocity_mse(clean, clean.detach() - s * (real - other) / per_sample(distance, clean)) / 2


def consistency(velocity, ema: Field, states, sigma, next_sigma, conditioning, target) -> torch.Tensor:
    """The student's clean estimate against its average's one step nearer the data, on the teacher's flow: [B].

    At the last step that state is the data, and so the estimate itself (arXiv 2303.01469).
    """
    clean = states - per_sample(sigma, states) * velocity
    with torch.no_grad():
        goal = states + per_sample(next_sigma - sigma, states) * target
        inside = (next_sigma > 0).nonzero()[:, 0]
        if len(inside):
            nearer, level = goal[inside], next_sigma[inside]
            goal[inside] = nearer - per_sample(level, states) * ema(nearer, level, conditioning[inside])
    return velocity_mse(clean, goal)
