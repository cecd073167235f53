"""The DanceOPD update: roll out, query, match."""

import torch

from danceopd.data.sampler import Batch
from danceopd.fields import Field, routed
from danceopd.methods.observed import Observed
from danceopd.objectives import velocity_mse
from danceopd.query import query
from danceopd.rollout import rollout


def danceopd_loss(
    student: Field,
    sources: list[Field],
    batch: Batch,
    *,
    sigmas: torch.Tensor,
    solver: str,
    bias: str,
    k: int,
    generator: torch.Generator,
) -> Observed:
    """The loss of B routed samples (see `Batch`), each the mean over its k queried states.

    sigmas [N + 1]: the rollout's noise levels; solver, bias and k as in `rollout` and `query`.
    """
    depth = query(len(batch), len(sigmas) - 1, generator, bias=bias, k=k)  # trajectory indices asked
    states, sigma = rollout(student, batch.noise, batch.conditioning, sigmas, depth, solver)  # no gradient
    states, sigma = states.flatten(0, 1), sigma.flatten()
    conditioning, route = batch.conditioning.repeat(k), batch.route.repeat_interleave(k)
    target = routed(sources, route, states, sigma, conditioning)  # no gradient; each sample's own field
    velocity = student(states, sigma, conditioning)
    loss = velocity_mse(velocity, target).view(-1, k).mean(1)
    return Observed(loss, depth.flatten(), route, states, velocity.detach(), target)
