"""DanceOPD's rollout and query with a DMD-style objective, whose second network follows the student."""

import copy

import torch

from danceopd.core.batch import Batch
from danceopd.core.copies import to_device
from danceopd.core.fields import Answers, Field
from danceopd.core.methods.sds import score_questions
from danceopd.core.objectives import renoised
from danceopd.core.questions import Questions
from danceopd.core.randomness import Generator


class Fake:
    """Trains DMD's fake score network, which follows the student: it learns the velocity of the student's own samples.

    DMD calls the score of the student's samples fake and that of the data real; here the source's velocity stands for
    the latter. It is a learner beside the student, with an optimizer of its own.

    Args:
        student: The network that it begins as.
    """

    def __init__(self, student: torch.nn.Module):
        self.student = copy.deepcopy(student).train()
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=5e-4, weight_decay=0.0)

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of one part of an update's questions.

        Args:
            loss: A scalar tensor with gradient, this part's share of the mean over the batch.
        """
        loss.backward()

    def step(self, _rate: float) -> None:
        """Makes one step of its own rate, and forgets the gradient.

        Args:
            _rate: The student's learning rate, which is not read.
        """
        self.optimizer.step()
        self.optimizer.zero_grad()


class DMD:
    """Makes the DMD-style update (arXiv 2311.18828): questions for two learners, one step each.

    Args:
        student: The network that is trained, which the fake score network begins as.
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
        """Asks where the student's clean estimate should move, and what the fake score network should say of it.

        Args:
            student, sources, batch, sigmas, generator, solver, bias: As in `danceopd`.
            fake: The fake score network, which takes the place of the noise that `sds` compares the source with.

        Returns:
            B questions for the student, and B for the fake score network about renoised clean estimates, whose answer
            is noise - estimate and whose weight is sigma^2.
        """
        questions, clean = score_questions(student, sources, batch, sigmas, generator, solver, bias, fake)
        z, level, noise = renoised(clean, generator)  # fresh: the rollout's own noise tells its end
        sigma = to_device(level, z.device)
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
        """Collects what a checkpoint keeps.

        Returns:
            The fake score network's weights and its optimizer's states.
        """
        fake = self.learners["fake"]
        return {"fake": fake.student.state_dict(), "optimizer": fake.optimizer.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Goes on from a checkpoint.

        Args:
            state: What state_dict returned.
        """
        fake = self.learners["fake"]
        fake.student.load_state_dict(state["fake"])
        fake.optimizer.load_state_dict(state["optimizer"])
