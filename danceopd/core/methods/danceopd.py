"""The DanceOPD update: roll out, query, match."""

from typing import Literal

import torch

from danceopd.core.batch import Batch
from danceopd.core.fields import Field, hard, soft
from danceopd.core.methods.options import Share
from danceopd.core.objectives import WEIGHTINGS, velocity_mse, weighting
from danceopd.core.query import query
from danceopd.core.randomness import Generator
from danceopd.core.rollout import rollout, rollout_by_route
from danceopd.core.watch import Observed


def danceopd_loss(
    student: Field,
    sources: list[Field],
    batch: Batch,
    *,
    sigmas: torch.Tensor,
    solver: str,
    bias: str,
    k: int,
    generator: Generator,
    gap: torch.Tensor | None = None,
    progress: float = 1.0,
    objective: Literal[*WEIGHTINGS] = "mse",
    routing: Literal["hard", "soft"] = "hard",
    warm_start: Share = 0.0,
) -> Observed:
    """The loss of B routed samples (see `Batch`), each the mean over its k queried states.

    sigmas [N + 1]: the rollout's noise levels; solver, bias, k and gap as in `rollout` and `query`. objective:
    the weight of the squared error. routing: each sample's own source, or the mean of all. warm_start: the share
    of the run (progress goes from 0 to 1) that rolls out the sources instead of the student.
    """
    depth = query(len(batch), len(sigmas) - 1, generator, bias=bias, k=k, gap=gap)  # trajectory indices asked
    if progress < warm_start:
        states, sigma = rollout_by_route(sources, batch.route, batch.noise, batch.conditioning, sigmas, depth, solver)
    else:
        states, sigma = rollout(student, batch.noise, batch.conditioning, sigmas, depth, solver)  # no gradient
    states, sigma = states.flatten(0, 1), sigma.flatten()
    conditioning, route = batch.conditioning.repeat(k), batch.route.repeat_interleave(k)
    source = hard(sources, route) if routing == "hard" else soft(sources)
    target = source(states, sigma, conditioning)  # no gradient; each sample's own field
    velocity = student(states, sigma, conditioning)
    weight = weighting(objective, sigma, sigmas[depth.flatten() + 1])
    loss = (weight * velocity_mse(velocity, target)).view(-1, k).mean(1)
    return Observed(loss, batch.route, depth.flatten(), states, velocity.detach(), target)
