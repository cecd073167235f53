"""Off-policy distillation: match the routed source on states that the student did not make."""

from typing import Literal

import torch

from danceopd.core.batch import Batch
from danceopd.core.fields import Field, routed
from danceopd.core.objectives import per_sample, velocity_mse
from danceopd.core.randomness import Generator, rand, randn
from danceopd.core.rollout import rollout_by_route
from danceopd.core.schedule import shift_sigma
from danceopd.core.watch import Observed


def off_policy_loss(
    student: Field,
    sources: list[Field],
    batch: Batch,
    *,
    clean: torch.Tensor,
    sigmas: torch.Tensor,
    shift: float,
    solver: str,
    generator: Generator,
    states_from: Literal["data", "sources"] = "data",
) -> Observed:
    """The loss of B samples at noised pictures: the data's, or those that each sample's source draws itself.

    Noise levels are drawn with the rollout's shift; the error is the clean estimate's, sigma^2 times the
    velocity's, as in joint training, so that only the target differs from it.
    """
    sigma = shift_sigma(rand(generator, len(batch)), shift).clamp(min=1e-3).to(clean)
    noise = batch.noise
    if states_from == "sources":
        end = torch.full((len(batch), 1), len(sigmas) - 1)
        clean = rollout_by_route(sources, batch.route, noise, batch.conditioning, sigmas, end, solver)[0][:, 0]
        noise = randn(generator, *noise.shape).to(noise)
    s = per_sample(sigma, clean)
    states = (1 - s) * clean + s * noise
    target = routed(sources, batch.route, states, sigma, batch.conditioning)
    velocity = student(states, sigma, batch.conditioning)
    return Observed(velocity_mse(s * velocity, s * target), batch.route, None, states, velocity.detach(), target)
