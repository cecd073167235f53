"""Joint training: ordinary flow matching on the union of the capabilities' data, no source asked."""

import torch

from danceopd.core.batch import Batch
from danceopd.core.copies import to_device
from danceopd.core.fields import Answers, Field
from danceopd.core.objectives import noised
from danceopd.core.questions import Questions
from danceopd.core.randomness import Generator, rand
from danceopd.core.schedule import shift_sigma


def joint(
    student: Field, sources: list[Field], batch: Batch, *, clean: torch.Tensor, shift: float, generator: Generator
) -> Questions:
    """Asks at noised pictures of the data, whose own velocity noise - clean is the answer.

    Noise levels have the rollout's shift. The weight sigma^2 makes it the error of the clean estimate, as the embedded
    sources were trained.

    Args:
        student: Is not asked.
        sources: Are not asked.
        batch: B samples.
        clean: Float tensor [B, ...], the data's own pictures.
        shift: The shift of the noise levels.
        generator: Draws the batch's randomness.

    Returns:
        B questions off the rollout's noise levels.
    """
    sigma = to_device(shift_sigma(rand(generator, len(batch)), shift).clamp(min=1e-3).to(clean.dtype), clean.device)
    states, sample = noised(clean, batch.noise, sigma), torch.arange(len(batch))
    answers = Answers.of(batch.noise - clean)
    return Questions(states, sigma, batch.conditioning, batch.route, sample, answers, sigma.square())
