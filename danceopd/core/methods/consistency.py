"""DanceOPD's route, rollout and query with a consistency objective in place of the velocity's error."""

from dataclasses import replace

import torch
from danceopd_kernels.routed_velocity_mse import Matched

from danceopd.core.batch import Batch
from danceopd.core.copies import to_device
from danceopd.core.fields import Answers, Field
from danceopd.core.methods.danceopd import danceopd
from danceopd.core.objectives import per_sample, velocity_loss
from danceopd.core.questions import Questions
from danceopd.core.randomness import Generator


def consistency(
    student: Field,
    sources: list[Field],
    batch: Batch,
    *,
    sigmas: torch.Tensor,
    ema: Field,
    generator: Generator,
    solver: str = "euler",
    bias: str = "low_t",
) -> Questions:
    """Asks for the clean estimate of the student's average, one step nearer the data on the source's flow.

    The goal of z at sigma is the average's estimate at z' = z + (sigma' - sigma) v_source, sigma' the next noise level
    (arXiv 2303.01469). At the last step z' is the data, and so the estimate itself.

    Args:
        student, sources, batch, sigmas, generator, solver, bias: As in `danceopd`.
        ema: The student's average, which is asked without gradient.

    Returns:
        B questions; each weighs sigma^2, and its goal is in ``rest``.
    """
    q = danceopd(student, sources, batch, sigmas=sigmas, generator=generator, solver=solver, bias=bias)
    assert q.depth is not None  # asked on the rollout
    levels = sigmas.cpu()
    after = levels[q.depth + 1]
    goal = q.states + per_sample(after - levels[q.depth], q.states) * q.answers.target()
    inside = (after > 0).nonzero()[:, 0]
    if len(inside):
        there, level = (to_device(value, goal.device) for value in (inside, after[inside]))
        nearer = goal[there]
        goal[there] = nearer - per_sample(level, nearer) * ema(nearer, level, batch.conditioning[inside])
    rest = {"goal": (q.states - goal) / per_sample(q.sigma, goal)}
    return replace(q, weight=q.sigma.square(), match=to_goal, rest=rest)


def to_goal(velocity: torch.Tensor, q: Questions) -> Matched:
    """Takes the squared error of the clean estimate z - sigma v from its goal: sigma^2 times that of velocities.

    Args:
        velocity: Float tensor [Q, ...], the student's, with gradient.
        q: The questions, with the goals' velocities in ``rest``.

    Returns:
        The loss against the goals; what is watched is the velocity against the source's, as everywhere.
    """
    goal = replace(q, answers=Answers.of(q.rest["goal"]))
    return velocity_loss(velocity.detach(), q)._replace(loss=velocity_loss(velocity, goal).loss)
