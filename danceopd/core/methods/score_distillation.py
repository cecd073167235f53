"""DanceOPD's route, rollout and query with score distillation of the clean estimate: SDS-style and DMD-style."""

import copy
from collections import Counter

import torch

from danceopd.core.batch import Batch
from danceopd.core.fields import Field, counted, routed
from danceopd.core.objectives import flow_matching, per_sample, renoised, score_distillation
from danceopd.core.query import query
from danceopd.core.randomness import Generator
from danceopd.core.rollout import rollout
from danceopd.core.watch import Observed


def clean_estimate(student: Field, batch: Batch, sigmas, solver, bias, generator) -> torch.Tensor:
    """What the student takes the picture to be at one queried state of its own rollout: [B, ...] with gradient."""
    depth = query(len(batch), len(sigmas) - 1, generator, bias=bias)
    states, sigma = rollout(student, batch.noise, batch.conditioning, sigmas, depth, solver)
    states, sigma = states[:, 0], sigma[:, 0]
    return states - per_sample(sigma, states) * student(states, sigma, batch.conditioning)


def distil(clean: torch.Tensor, sources: list[Field], batch: Batch, generator, fake: Field | None) -> Observed:
    """Move the estimates as the routed sources say, against the fake field's velocity, or the noise itself without."""
    with torch.no_grad():
        z, sigma, noise = renoised(clean, generator)
        real, data = routed(sources, batch.route, z, sigma, batch.conditioning), noise - clean
        other = data if fake is None else fake(z, sigma, batch.conditioning)
    loss = score_distillation(clean, real, other, data, sigma)
    return Observed(loss, batch.route, None, z, other, real)


def sds_loss(
    student: Field, sources: list[Field], batch: Batch, *, sigmas: torch.Tensor, solver: str, bias: str, generator
) -> Observed:
    """The SDS-style loss of B samples, one query each."""
    return distil(clean_estimate(student, batch, sigmas, solver, bias, generator), sources, batch, generator, None)


class DMD:
    """The DMD-style loss. The fake-score network starts as the student and learns the student's estimates alongside."""

    def __init__(self, student: torch.nn.Module):
        self.fake = copy.deepcopy(student).train()
        self.optimizer = torch.optim.AdamW(self.fake.parameters(), lr=5e-4, weight_decay=0.0)

    def __call__(
        self,
        student: Field,
        sources: list[Field],
        batch: Batch,
        *,
        sigmas: torch.Tensor,
        solver: str,
        bias: str,
        counter: Counter,
        generator: Generator,
    ) -> Observed:
        """The loss of B samples, one query each; the fake network's evaluations are added to the counter."""
        clean = clean_estimate(student, batch, sigmas, solver, bias, generator)
        fake = counted(self.fake, counter, "fake")
        observed = distil(clean, sources, batch, generator, fake)
        _, sigma, noise = renoised(clean.detach(), generator)  # fresh: the rollout's own noise tells its end
        loss, *_ = flow_matching(fake, clean.detach(), noise, sigma, batch.conditioning)
        self.optimizer.zero_grad()
        loss.mean().backward()
        counter["fake"] += 2 * len(clean)
        self.optimizer.step()
        return observed

    def state_dict(self) -> dict:
        return {"fake": self.fake.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.fake.load_state_dict(state["fake"])
        self.optimizer.load_state_dict(state["optimizer"])
