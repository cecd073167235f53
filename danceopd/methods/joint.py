"""Joint training: ordinary flow matching on the union of the capabilities' data, no source asked."""

import torch

from danceopd.data.sampler import Batch
from danceopd.draws import Generator, rand
from danceopd.fields import Field
from danceopd.methods.observed import Observed
from danceopd.objectives import flow_matching
from danceopd.schedule import shift_sigma


def joint_loss(
    student: Field, sources: list[Field], batch: Batch, *, clean: torch.Tensor, shift: float, generator: Generator
) -> Observed:
    """The loss of B samples on their own clean pictures [B, ...], at noise levels with the rollout's shift."""
    sigma = shift_sigma(rand(generator, len(batch)), shift).clamp(min=1e-3).to(clean)
    loss, velocity, target, states = flow_matching(student, clean, batch.noise, sigma, batch.conditioning)
    return Observed(loss, batch.route, None, states, velocity.detach(), target)
