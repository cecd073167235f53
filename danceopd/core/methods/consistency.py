"""DanceOPD's route, rollout and query with a consistency objective in place of the velocity's error."""

import torch

from danceopd.core.batch import Batch
from danceopd.core.fields import Field, routed
from danceopd.core.objectives import consistency
from danceopd.core.query import query
from danceopd.core.randomness import Generator
from danceopd.core.rollout import rollout
from danceopd.core.watch import Observed


def consistency_loss(
    student: Field,
    sources: list[Field],
    batch: Batch,
    *,
    sigmas: torch.Tensor,
    solver: str,
    bias: str,
    ema: Field,
    generator: Generator,
) -> Observed:
    """The loss of B samples, one query each; ema: the student's average, asked one step nearer the data."""
    depth = query(len(batch), len(sigmas) - 1, generator, bias=bias)
    states, sigma = rollout(student, batch.noise, batch.conditioning, sigmas, depth, solver)
    states, sigma, depth = states[:, 0], sigma[:, 0], depth[:, 0]
    target = routed(sources, batch.route, states, sigma, batch.conditioning)
    velocity = student(states, sigma, batch.conditioning)
    loss = consistency(velocity, ema, states, sigma, sigmas[depth + 1], batch.conditioning, target)
    return Observed(loss, batch.route, depth, states, velocity.detach(), target)
