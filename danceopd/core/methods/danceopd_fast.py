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
    """Asks off the policy for the first share `warm_start` of the run, and as `danceopd` from then on."""
    common = {"sigmas": sigmas, "solver": solver, "generator": generator}
    if progress < warm_start:
        return off_policy(student, sources, batch, clean=clean, shift=shift, **common)
    return danceopd(student, sources, batch, bias=bias, k=k, **common)
