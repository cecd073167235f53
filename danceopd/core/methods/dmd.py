"""DanceOPD's rollout and query with a DMD-style objective, whose second network follows the student."""

import copy

import torch

from danceopd.core.batch import Batch
from danceopd.core.fields import Answers, Field
from danceopd.core.methods.sds import score_questions
from danceopd.core.objectives import renoised
from danceopd.core.questions import Questions
from danceopd.core.randomness import Generator


class Fake:
    """The network that learns the student's own estimates: a learner with an optimizer of its own.

    Args:
        student: The network that it begins as.
    """

    def __init__(self, student: torch.nn.Module):
        self.student = copy.deepcopy(student).train()
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=5e-4, weight_decay=0.0)

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of one part of an update's questions."""
        loss.backward()

    def step(self, _rate: float) -> None:
        """Makes one step of its own rate, and forgets the gradient."""
        self.optimizer.step()
        self.optimizer.zero_grad()


class DMD:
    """The DMD-style update (arXiv 2311.18828): questions for two learners, one step each.

    Args:
        student: The network that is trained, which the second one begins as.
    """

    def __init__(self, student: torch.nn.Module):
        self.learners = {"fake": Fake(student)}

    def __call__(
        self,
        student: Field,
        sources: list[Field],
        batch: Batch,
        *,
        sigmas: torch.Tensor,
        fake: Field,
        generator: Generator,
        solver: str = "euler",
        bias: str = "low_t",
    ) -> dict[str, Questions]:
        """Asks where the student's clean estimate should move, and what the second network should say of it."""
        questions, clean = score_questions(student, sources, batch, sigmas, generator, solver, bias, fake)
        z, sigma, noise = renoised(clean, generator)  # fresh: the rollout's own noise tells its end
        own = Questions(
            z,
            sigma,
            batch.conditioning,
            batch.route,
            torch.arange(len(batch)),
            Answers.of(noise - clean),
            sigma.square(),
        )
        return {"student": questions, "fake": own}

    def state_dict(self) -> dict:
        fake = self.learners["fake"]
        return {"fake": fake.student.state_dict(), "optimizer": fake.optimizer.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        fake = self.learners["fake"]
        fake.student.load_state_dict(state["fake"])
        fake.optimizer.load_state_dict(state["optimizer"])
