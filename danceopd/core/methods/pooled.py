"""DanceOPD with trajectories that outlive an update: one rollout serves several queries, each in another update."""

from dataclasses import fields

import torch

from danceopd.core.batch import Batch
from danceopd.core.conditioning import Conditioning, concatenate
from danceopd.core.fields import Field
from danceopd.core.query import query
from danceopd.core.questions import Questions, on_rollout
from danceopd.core.randomness import Generator
from danceopd.core.rollout import rollout


class Pooled:
    """Asks each trajectory at `visits` indices, from the noisiest on, which goes on with the student of each update.

    An update starts B / visits trajectories, goes on with those of the updates before, and asks each once: in the
    long run every visit is equally frequent, so the indices asked follow the query's own distribution.

    Args:
        student: Is not read.
    """

    def __init__(self, student: torch.nn.Module):
        # Trajectories at the states they have reached, that index [n], and the indices still to ask [n, v].
        self.waiting: list[tuple[Batch, torch.Tensor, torch.Tensor]] = []

    def __call__(
        self,
        student: Field,
        sources: list[Field],
        batch: Batch,
        *,
        sigmas: torch.Tensor,
        generator: Generator,
        solver: str = "euler",
        bias: str = "low_t",
        gap: torch.Tensor | None = None,
        visits: int = 2,
    ) -> Questions:
        """Asks each trajectory under way once.

        Args:
            student, sources, batch, sigmas, generator, solver, bias, gap: As in `danceopd`.
            visits: How often a trajectory is asked, each time in another update.

        Returns:
            B questions (up to a multiple of visits), fewer in the first updates.
        """
        fresh = batch[: -(-len(batch) // visits)]
        depth = query(len(fresh), len(sigmas) - 1, generator, bias=bias, k=visits, gap=gap)
        older = [(old.to(batch.noise.device), *rest) for old, *rest in self.waiting]
        groups = [(fresh, torch.zeros(len(fresh), dtype=torch.int64), depth), *older]
        noise, route = (torch.cat([getattr(g[0], name) for g in groups]) for name in ("noise", "route"))
        asked = Batch(noise, concatenate([g[0].conditioning for g in groups]), route)
        start, until = torch.cat([g[1] for g in groups]), torch.cat([g[2][:, 0] for g in groups])
        states, sigma = rollout(student, noise, asked.conditioning, sigmas, until[:, None], solver, start)
        first, self.waiting = 0, []
        for old, _, left in groups:
            own = slice(first, first := first + len(old))
            if left.shape[1] > 1:
                rest = Batch(states[own, 0], asked.conditioning[own], route[own])
                self.waiting.append((rest, until[own], left[:, 1:]))
        # The mean over the queries there are, as over a full pool's.
        share = len(batch) / len(asked)
        return on_rollout(sources, asked, until[:, None], states, sigma, sigmas, share=share)

    def state_dict(self) -> dict:
        """Collects what a checkpoint keeps.

        Returns:
            The trajectories under way.
        """
        return {
            "waiting": [
                [batch.noise, batch.route, [getattr(batch.conditioning, f.name) for f in fields(Conditioning)], *rest]
                for batch, *rest in self.waiting
            ]
        }

    def load_state_dict(self, state: dict) -> None:
        """Goes on from a checkpoint.

        Args:
            state: What state_dict returned.
        """
        self.waiting = [
            (Batch(noise, Conditioning(*values), route), *rest) for noise, route, values, *rest in state["waiting"]
        ]
