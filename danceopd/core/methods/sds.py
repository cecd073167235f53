"""DanceOPD's rollout and query with an SDS-style objective: score distillation of the clean estimate."""

import torch
from danceopd_kernels.routed_velocity_mse import Matched

from danceopd.core.batch import Batch
from danceopd.core.copies import to_device
from danceopd.core.fields import Answers, Field, routed
from danceopd.core.objectives import distillation_move, per_sample, renoised, velocity_mse
from danceopd.core.query import query
from danceopd.core.questions import Questions
from danceopd.core.randomness import Generator
from danceopd.core.rollout import rollout


def sds(
    student: Field,
    sources: list[Field],
    batch: Batch,
    *,
    sigmas: torch.Tensor,
    generator: Generator,
    solver: str = "euler",
    bias: str = "low_t",
) -> Questions:
    """Asks the sources where the student's clean estimate should move, against the noise itself (arXiv 2209.14988).

    Args:
        student, sources, batch, sigmas, generator, solver, bias: As in `danceopd`.

    Returns:
        B questions, whose moves are in ``rest``.
    """
    return score_questions(student, sources, batch, sigmas, generator, solver, bias)[0]


def score_questions(student, sources, batch, sigmas, generator, solver, bias, fake: Field | None = None):
    """Asks at renoised clean estimates of one queried state of each rollout.

    Args:
        student, sources, batch, sigmas, generator, solver, bias: As in `danceopd`.
        fake: The field whose velocity the source's is compared with; None compares it with the noise itself.

    Returns:
        The questions, and the student's clean estimates [B, ...].
    """
    depth = query(len(batch), len(sigmas) - 1, generator, bias=bias)
    states, sigma = rollout(student, batch.noise, batch.conditioning, sigmas, depth, solver)
    states, sigma = states[:, 0], sigma[:, 0]
    clean = states - per_sample(sigma, states) * student(states, sigma, batch.conditioning).to(states.dtype)
    z, level, noise = renoised(clean, generator)
    answers = routed(sources, batch.route, z, level, batch.conditioning)
    real, data = answers.target(), noise - clean
    other = data if fake is None else fake(z, to_device(level, z.device), batch.conditioning).to(data.dtype)
    rest = {
        "move": distillation_move(real, other, data, level),
        "error": velocity_mse(other, real),
        "other_norm": other.flatten(1).norm(dim=1),
        "real_norm": real.flatten(1).norm(dim=1),
    }
    sample, weight = torch.arange(len(batch)), torch.ones(len(batch), device=states.device)
    questions = Questions(
        states, sigma, batch.conditioning, batch.route, sample, Answers.of(real), weight, match=moved, rest=rest
    )
    return questions, clean


def moved(velocity: torch.Tensor, q: Questions) -> Matched:
    """Takes half the squared distance of the clean estimate to itself moved: its gradient is the move's opposite.

    Args:
        velocity: Float tensor [Q, ...], the student's, with gradient.
        q: The questions, with the moves in ``rest``.

    Returns:
        The loss; what is watched is how far the source is from the velocity that it is compared with.
    """
    clean = q.states - per_sample(q.sigma, q.states) * velocity.to(q.states.dtype)
    loss = velocity_mse(clean, clean.detach() + q.rest["move"]) / 2 * q.weight
    return Matched(loss, q.rest["error"], q.rest["other_norm"], q.rest["real_norm"])
