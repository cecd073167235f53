"""What is watched of an update."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from danceopd_kernels.routed_velocity_mse import Matched

from danceopd.core.questions import Questions


@dataclass
class Watched:
    """Holds what is watched of Q queries about B samples, on the CPU.

    Args:
        samples: The number B of samples.
        loss: float32 tensor [Q], the weighted losses.
        route: int64 tensor [Q], the source of each query.
        depth: int64 tensor [Q], its trajectory index; -1 off the rollout's noise levels.
        error: float32 tensor [Q], mean squared error of the student's velocity.
        velocity_norm: float32 tensor [Q], the norm of the student's velocity.
        target_norm: float32 tensor [Q], the norm of the source's.
        state_norm: float32 tensor [Q], the norm of the state.
    """

    samples: int
    loss: torch.Tensor
    route: torch.Tensor
    depth: torch.Tensor
    error: torch.Tensor
    velocity_norm: torch.Tensor
    target_norm: torch.Tensor
    state_norm: torch.Tensor

    def mean_loss(self, route: int | None = None) -> float | None:
        """Takes the mean loss over samples; every sample has equally many queries.

        Args:
            route: The source whose samples count; None takes all.

        Returns:
            The mean, or None where there is no such sample.
        """
        own = self.loss if route is None else self.loss[self.route == route]
        if not len(own):
            return None
        return float(own.double().mean()) * len(self.loss) / self.samples


def columns(questions: Questions, parts: Sequence[Matched]) -> torch.Tensor:
    """Collects what is watched of questions that were matched in parts, on their device.

    Args:
        questions: Q of them.
        parts: What their matching gave, in their order.

    Returns:
        float32 tensor [5, Q]: the weighted losses, the errors, and the norms of velocities, targets and states.
    """
    norms = questions.states.flatten(1).norm(dim=1).float()
    return torch.stack([*(torch.cat([part[i].detach().float() for part in parts]) for i in range(4)), norms])


def watched(questions: Questions, seen: torch.Tensor, samples: int) -> Watched:
    """Says which queries the columns are of.

    Args:
        questions: Q of them.
        seen: What `columns` gave, on the CPU.
        samples: The number of samples of the batch.

    Returns:
        What is watched of the Q queries, in their order.
    """
    depth = torch.full((len(questions),), -1) if questions.depth is None else questions.depth
    loss, error, velocity, target, state = seen
    return Watched(samples, loss, questions.query_route(), depth, error, velocity, target, state)


def join(parts: Sequence[Watched]) -> Watched:
    """Puts together what the ranks watched.

    Args:
        parts: What each rank watched, in their order.

    Returns:
        What is watched of all their queries.
    """
    columns = {f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Watched)[1:]}
    return Watched(sum(part.samples for part in parts), **columns)
