"""DanceOPD after a warm start: first the sources on noised data, which needs no rollout, then on the student's own."""

import torch

from danceopd.core.batch import Batch
from danceopd.core.fields import Field
from danceopd.core.methods.danceopd import danceopd_loss
from danceopd.core.methods.off_policy import off_policy_loss
from danceopd.core.methods.options import Share
from danceopd.core.randomness import Generator
from danceopd.core.watch import Observed


def danceopd_fast_loss(
    student: Field,
    sources: list[Field],
    batch: Batch,
    *,
    clean: torch.Tensor,
    sigmas: torch.Tensor,
    shift: float,
    solver: str,
    bias: str,
    k: int,
    generator: Generator,
    progress: float = 1.0,
    warm_start: Share = 0.5,
) -> Observed:
    """The loss of B routed samples; warm_start: the share of the run that is off-policy."""
    common = {"sigmas": sigmas, "solver": solver, "generator": generator}
    if progress < warm_start:
        return off_policy_loss(student, sources, batch, clean=clean, shift=shift, **common)
    return danceopd_loss(student, sources, batch, bias=bias, k=k, **common)
