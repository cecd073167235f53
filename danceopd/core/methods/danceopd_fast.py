"""DanceOPD after a warm start: first the sources on noised data, which needs no rollout, then on the student's own."""

import torch

from danceopd.core.batch import Batch
from danceopd.core.fields import Field
from danceopd.core.methods.danceopd import danceopd
from danceopd.core.methods.off_policy import off_policy
from danceopd.core.questions import Questions
from danceopd.core.randomness import Generator


def danceopd_fast(
    student: Field,
    sources: list[Field],
    batch: Batch,
    *,
    clean: torch.Tensor,
    sigmas: torch.Tensor,
    shift: float,
    generator: Generator,
    solver: str = "euler",
    bias: str = "low_t",
    k: int = 1,
    progress: float = 1.0,
    warm_start: float = 0.5,
) -> Questions:
    """Asks at noised data for the first share `warm_start` of the run, and as `danceopd` from then on.

    Args:
        student, sources, batch, sigmas, generator, solver, bias, k: As in `danceopd`.
        clean: Float tensor [B, ...], the data's own pictures.
        shift: The shift of the rollout's noise levels.
        progress: The share of the run that is done.
        warm_start: The share of the run that rolls nothing out.

    Returns:
        The questions of `off_policy` or of `danceopd`.
    """
    common = {"sigmas": sigmas, "solver": solver, "generator": generator}
    if progress < warm_start:
        return off_policy(student, sources, batch, clean=clean, shift=shift, **common)
    return danceopd(student, sources, batch, bias=bias, k=k, **common)
