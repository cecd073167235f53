"""DiffusionOPD (arXiv 2605.15055): the per-step KL to the source along the student's whole trajectory."""

import torch

from danceopd.core.batch import Batch
from danceopd.core.fields import Field, routed
from danceopd.core.objectives import velocity_mse, weighting
from danceopd.core.rollout import rollout
from danceopd.core.watch import Observed


def diffusion_opd_loss(
    student: Field, sources: list[Field], batch: Batch, *, sigmas: torch.Tensor, solver: str
) -> Observed:
    """The loss of B samples, each the sum over its N steps of dt^2 / 2 times the squared velocity error.

    sigmas [N + 1]. Every state of the rollout is asked. The KL of two Gaussian steps of one variance; run it
    with `route: round_robin`, so that each update holds all tasks in equal parts.
    """
    steps = len(sigmas) - 1
    depth = torch.arange(steps).expand(len(batch), -1)
    states, sigma = rollout(student, batch.noise, batch.conditioning, sigmas, depth, solver)
    states, sigma, depth = states.flatten(0, 1), sigma.flatten(), depth.flatten()
    conditioning, route = batch.conditioning.repeat(steps), batch.route.repeat_interleave(steps)
    target = routed(sources, route, states, sigma, conditioning)
    velocity = student(states, sigma, conditioning)
    loss = weighting("kl", sigma, sigmas[depth + 1]) * velocity_mse(velocity, target)
    return Observed(loss.view(-1, steps).sum(1), batch.route, depth, states, velocity.detach(), target)
