"""The DanceOPD update: route, roll out, query, match."""

from collections.abc import Sequence
from typing import Literal

import torch

from danceopd.core.batch import Batch
from danceopd.core.fields import Field
from danceopd.core.objectives import Weighting
from danceopd.core.query import query
from danceopd.core.questions import Questions, matched, on_rollout
from danceopd.core.randomness import Generator
from danceopd.core.rollout import rollout, rollout_by_route


def danceopd(
    student: Field,
    sources: Sequence[Field],
    batch: Batch,
    *,
    sigmas: torch.Tensor,
    generator: Generator,
    solver: str = "euler",
    bias: str = "low_t",
    k: int = 1,
    gap: torch.Tensor | None = None,
    progress: float = 1.0,
    objective: Weighting = "mse",
    routing: Literal["hard", "soft"] = "hard",
    warm_start: float = 0.0,
) -> Questions:
    """Rolls the student out and asks each sample's own source at k states of its trajectory, without gradient.

    Args:
        student: The field to roll out.
        sources: The field of each route.
        batch: B routed samples.
        sigmas: float32 tensor [N + 1] on the CPU, the noise levels of the rollout.
        generator: Draws the batch's randomness.
        solver: As in `rollout`.
        bias: As in `query`.
        k: Queries a sample.
        gap: As in `query`.
        progress: The share of the run that is done.
        objective: The weight of each squared error, as in `weighting`.
        routing: ``hard``, each sample's own source, or ``soft``, the mean of all.
        warm_start: The share of the run that rolls out the sources instead of the student.

    Returns:
        B k questions; each weighs 1 / k.
    """
    depth = query(len(batch), len(sigmas) - 1, generator, bias=bias, k=k, gap=gap)  # trajectory indices asked
    if progress < warm_start:
        states, sigma = rollout_by_route(sources, batch.route, batch.noise, batch.conditioning, sigmas, depth, solver)
    else:
        states, sigma = rollout(student, batch.noise, batch.conditioning, sigmas, depth, solver)
    share = 1 / depth.shape[1]
    return on_rollout(sources, batch, depth, states, sigma, sigmas, objective=objective, share=share, routing=routing)


def danceopd_loss(
    student: Field,
    sources: Sequence[Field],
    batch: Batch,
    *,
    sigmas: torch.Tensor,
    generator: Generator,
    solver: str = "euler",
    bias: str = "low_t",
    k: int = 1,
) -> torch.Tensor:
    """Works out the DanceOPD loss of a batch, to be descended.

        L = mean over samples of || v_student(z, sigma, c) - v_route(z, sigma, c) ||^2 / d,  z = stop_gradient(rollout)

    Args:
        student: The field to train; it is rolled out without gradient and then asked once with it.
        sources: The frozen field of each route.
        batch: B routed samples.
        sigmas: float32 tensor [N + 1] on the CPU, the noise levels of the rollout, such as `sigma_grid` makes.
        generator: Draws the update's randomness.
        solver: As in `rollout`.
        bias: As in `query`.
        k: Queries a sample.

    Returns:
        A scalar float32 tensor with gradient.

    Raises:
        IndexError: For a route outside the sources.
        ValueError: For an unknown solver or bias, or k < 1.

    Example:
        >>> def to(point):  # the field of data that is one point
        ...     return lambda latents, sigma, conditioning: (latents - point) / sigma[:, None]
        >>> scale = torch.tensor(1.0, requires_grad=True)
        >>> def student(latents, sigma, conditioning):
        ...     return scale * latents
        >>> routes, g = torch.tensor([0, 1]), torch.Generator().manual_seed(0)
        >>> batch = Batch(torch.randn(2, 3), Conditioning(routes), routes)
        >>> loss = danceopd_loss(student, [to(-1.0), to(1.0)], batch, sigmas=sigma_grid(16, shift=3.0), generator=g)
        >>> loss.backward()
        >>> bool(loss > 0), bool(scale.grad.isfinite())
        (True, True)
    """
    with torch.no_grad():
        questions = danceopd(student, sources, batch, sigmas=sigmas, generator=generator, solver=solver, bias=bias, k=k)
    return matched(student, questions).loss.sum() / len(batch)
