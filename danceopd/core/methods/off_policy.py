"""Off-policy distillation: match the routed source on states that the student did not make."""

from typing import Literal

import torch

from danceopd.core.batch import Batch
from danceopd.core.copies import to_device
from danceopd.core.fields import Field, routed
from danceopd.core.objectives import noised
from danceopd.core.questions import Questions
from danceopd.core.randomness import Generator, rand, randn
from danceopd.core.rollout import rollout_by_route
from danceopd.core.schedule import shift_sigma


def off_policy(
    student: Field,
    sources: list[Field],
    batch: Batch,
    *,
    clean: torch.Tensor,
    sigmas: torch.Tensor,
    shift: float,
    generator: Generator,
    solver: str = "euler",
    states_from: Literal["data", "sources"] = "data",
) -> Questions:
    """Asks the sources at noised pictures: the data's, or those that each sample's source draws itself.

    Noise levels are drawn with the rollout's shift, and the weight is sigma^2, as in joint training, so that only the
    answers differ from it.

    Args:
        student: Is not asked.
        sources, batch, sigmas, generator, solver: As in `danceopd`.
        clean: Float tensor [B, ...], the data's own pictures.
        shift: The shift of the noise levels.
        states_from: ``data`` noises the data's pictures, ``sources`` those that the sources draw.

    Returns:
        B questions off the rollout's noise levels.
    """
    levels = shift_sigma(rand(generator, len(batch)), shift).clamp(min=1e-3).to(clean.dtype)
    noise, sigma = batch.noise, to_device(levels, clean.device)
    if states_from == "sources":
        end = torch.full((len(batch), 1), len(sigmas) - 1)
        clean = rollout_by_route(sources, batch.route, noise, batch.conditioning, sigmas, end, solver)[0][:, 0]
        noise = to_device(randn(generator, *noise.shape).to(noise.dtype), noise.device)
    states, sample = noised(clean, noise, sigma), torch.arange(len(batch))
    answers = routed(sources, batch.route, states, levels, batch.conditioning)
    return Questions(states, sigma, batch.conditioning, batch.route, sample, answers, sigma.square())
