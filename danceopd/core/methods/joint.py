"""Joint training: ordinary flow matching on the union of the capabilities' data, no source asked."""

import torch

from danceopd.core.batch import Batch
from danceopd.core.fields import Field
from danceopd.core.objectives import flow_matching
from danceopd.core.randomness import Generator, rand
from danceopd.core.schedule import shift_sigma
from danceopd.core.watch import Observed


def joint_loss(
    student: Field, sources: list[Field], batch: Batch, *, clean: torch.Tensor, shift: float, generator: Generator
) -> Observed:
    """The loss of B samples on their own clean pictures [B, ...], at noise levels with the rollout's shift."""
    sigma = shift_sigma(rand(generator, len(batch)), shift).clamp(min=1e-3).to(clean)
    loss, velocity, target, states = flow_matching(student, clean, batch.noise, sigma, batch.conditioning)
    return Observed(loss, batch.route, None, states, velocity.detach(), target)
