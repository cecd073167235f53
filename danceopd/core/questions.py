"""What a method asks in an update, and how the student is matched with the answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from danceopd_kernels.routed_velocity_mse import Matched

from danceopd.core.batch import Batch
from danceopd.core.conditioning import Conditioning
from danceopd.core.copies import to_device
from danceopd.core.fields import Answers, Field, routed, soft
from danceopd.core.objectives import velocity_loss, weighting
from danceopd.core.phase import phase


@dataclass
class Questions:
    """Holds Q queries about S samples, made without gradient.

    An update has two phases. Without gradient, a method turns the whole local batch into questions: states, and what
    the sources answer there. Then the student is asked the same questions with gradient, some at a time, and matched.

    Args:
        states: Float tensor [Q, ...], the states z that are asked.
        sigma: Float tensor [Q], their noise levels.
        conditioning: What the S samples are conditioned on.
        route: int64 tensor [S] on the CPU, the source of each sample.
        sample: int64 tensor [Q] on the CPU, the sample that a query is about.
        answers: What the sources answered.
        weight: float32 tensor [Q], the factor of each query's loss. An update descends the sum of the weighted losses
            over the number of samples of the whole batch, so the weights of one sample's queries usually sum to 1.
        depth: int64 tensor [Q] on the CPU, the trajectory index of each state; None off the rollout's noise levels.
        match: ``match(velocity [Q, ...], questions) -> Matched``: the loss, and what is watched of it.
        rest: More tensors with a row for each query, for a match of one's own.
    """

    states: torch.Tensor
    sigma: torch.Tensor
    conditioning: Conditioning
    route: torch.Tensor
    sample: torch.Tensor
    answers: Answers
    weight: torch.Tensor
    depth: torch.Tensor | None = None
    match: Callable[[torch.Tensor, "Questions"], Matched] = velocity_loss
    rest: dict[str, torch.Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, queries: slice) -> "Questions":
        """Selects queries that follow each other; the samples stay as they are."""
        return replace(
            self,
            states=self.states[queries],
            sigma=self.sigma[queries],
            sample=self.sample[queries],
            answers=self.answers[queries],
            weight=self.weight[queries],
            depth=None if self.depth is None else self.depth[queries],
            rest={name: value[queries] for name, value in self.rest.items()},
        )

    def split(self, parts: int) -> list["Questions"]:
        """Cuts the queries into parts, equal up to one query.

        Args:
            parts: Their number; there are fewer where there are fewer queries.

        Returns:
            The parts, in order.
        """
        n, parts = len(self), min(parts, len(self))
        return [self[n * i // parts : n * (i + 1) // parts] for i in range(parts)]

    def query_route(self) -> torch.Tensor:
        """Returns the source of each query.

        Returns:
            int64 tensor [Q] on the CPU.
        """
        return self.route[self.sample]


def on_rollout(
    sources: Sequence[Field],
    batch: Batch,
    depth: torch.Tensor,
    states: torch.Tensor,
    sigma: torch.Tensor,
    sigmas: torch.Tensor,
    *,
    objective: str = "mse",
    share: float = 1.0,
    routing: str = "hard",
) -> Questions:
    """Asks the sources at states of rollouts.

    Args:
        sources: The field of each route.
        batch: The B samples.
        depth: int64 tensor [B, K] on the CPU, the trajectory indices asked.
        states: Float tensor [B, K, ...], the rollouts' states there.
        sigma: Float tensor [B, K], their noise levels.
        sigmas: float32 tensor [N + 1] on the CPU, the noise levels of the rollout.
        objective: The weight of each squared error, as in `weighting`.
        share: A factor of every weight.
        routing: ``hard``, each sample's own source, or ``soft``, the mean of all.

    Returns:
        The questions, K a sample in a row.
    """
    sample = torch.arange(len(batch)).repeat_interleave(depth.shape[1])
    states, sigma, depth, sigmas = states.flatten(0, 1), sigma.flatten(), depth.flatten(), sigmas.cpu()
    levels = sigmas[depth]
    if routing == "hard":
        answers = routed(sources, batch.route[sample], states, levels, batch.conditioning, sample)
    else:
        answers = routed([soft(sources)], torch.zeros_like(sample), states, levels, batch.conditioning, sample)
    weight = to_device(share * weighting(objective, levels, sigmas[depth + 1]), sigma.device)
    return Questions(states, sigma, batch.conditioning, batch.route, sample, answers, weight, depth)


@phase("match")
def matched(student: Field, questions: Questions) -> Matched:
    """Asks the student the same questions, with gradient, and compares its velocities with the answers.

    Args:
        student: The field that is trained.
        questions: Q of them.

    Returns:
        Each query's weighted loss [Q], with gradient; its squared error and the norms of both velocities without.

    Example:
        >>> def student(latents, sigma, conditioning):
        ...     return 2 * latents
        >>> z, rows, answers = torch.ones(2, 3), torch.tensor([0, 1]), Answers.of(torch.zeros(2, 3))
        >>> questions = Questions(z, torch.ones(2), Conditioning(rows), rows, rows, answers, torch.tensor([1.0, 0.5]))
        >>> matched(student, questions).loss
        tensor([4., 2.])
    """
    sample, q = questions.sample, questions
    in_a_row = len(sample) == 1 or bool((sample.diff() == 1).all())  # a view then, where an index would copy prompts
    rows = slice(int(sample[0]), int(sample[-1]) + 1) if in_a_row else sample
    velocity = student(q.states, q.sigma, replace(q.conditioning, texts=None)[rows])
    return q.match(velocity, q)
