"""DiffusionOPD (arXiv 2605.15055): the per-step KL to the source along the student's whole trajectory."""

import torch

from danceopd.core.batch import Batch
from danceopd.core.fields import Field
from danceopd.core.questions import Questions, on_rollout
from danceopd.core.rollout import rollout


def diffusion_opd(
    student: Field, sources: list[Field], batch: Batch, *, sigmas: torch.Tensor, solver: str = "euler"
) -> Questions:
    """Asks at every state of the student's rollout; each of the N steps weighs dt^2 / 2.

    That is the KL of two Gaussian steps of one variance, summed over the trajectory. Run it with
    ``route: round_robin``, so that each update holds all tasks in equal parts.

    Args:
        student, sources, batch, sigmas, solver: As in `danceopd`.

    Returns:
        B N questions.
    """
    depth = torch.arange(len(sigmas) - 1).expand(len(batch), -1)
    states, sigma = rollout(student, batch.noise, batch.conditioning, sigmas, depth, solver)
    return on_rollout(sources, batch, depth, states, sigma, sigmas, objective="kl")
