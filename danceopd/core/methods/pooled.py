"""DanceOPD with trajectories that outlive an update: one rollout serves several queries, each in another update."""

from dataclasses import fields

import torch

from danceopd.core.batch import Batch
from danceopd.core.conditioning import Conditioning, concatenate
from danceopd.core.fields import Field, routed
from danceopd.core.methods.options import Count
from danceopd.core.objectives import velocity_mse
from danceopd.core.query import query
from danceopd.core.randomness import Generator
from danceopd.core.rollout import rollout
from danceopd.core.watch import Observed


class Pooled:
    """Each trajectory is asked at `visits` indices, from the noisiest on, and goes on with the student of its day.

    An update starts B / visits trajectories, goes on with those of the updates before, and asks each once: in the
    long run every visit is equally frequent, so the indices asked follow the query's own distribution.
    """

    def __init__(self, student: torch.nn.Module):
        # By micro-batch: trajectories at the states they have reached, that index [n], the indices still to ask [n, v].
        self.waiting: dict[int, list[tuple[Batch, torch.Tensor, torch.Tensor]]] = {}

    def __call__(
        self,
        student: Field,
        sources: list[Field],
        batch: Batch,
        *,
        sigmas: torch.Tensor,
        solver: str,
        bias: str,
        generator: Generator,
        gap: torch.Tensor | None = None,
        part: int = 0,
        visits: Count = 2,
    ) -> Observed:
        """The loss of B samples (up to a multiple of visits) once the pool is full, of fewer before.

        part: the number of the micro-batch, so that no trajectory is asked twice in one update.
        """
        fresh = batch[: -(-len(batch) // visits)]
        depth = query(len(fresh), len(sigmas) - 1, generator, bias=bias, k=visits, gap=gap).sort(1).values
        older = [(old.to(batch.noise.device), *rest) for old, *rest in self.waiting.get(part, ())]
        groups = [(fresh, torch.zeros(len(fresh), dtype=torch.int64), depth), *older]
        noise, route = (torch.cat([getattr(g[0], name) for g in groups]) for name in ("noise", "route"))
        conditioning = concatenate([g[0].conditioning for g in groups])
        start, until = torch.cat([g[1] for g in groups]), torch.cat([g[2][:, 0] for g in groups])
        states, sigma = rollout(student, noise, conditioning, sigmas, until[:, None], solver, start)
        states, sigma = states[:, 0], sigma[:, 0]
        target = routed(sources, route, states, sigma, conditioning)
        velocity = student(states, sigma, conditioning)
        first, waiting = 0, []
        for old, _, left in groups:
            own = slice(first, first := first + len(old))
            if left.shape[1] > 1:
                waiting.append((Batch(states[own], conditioning[own], route[own]), until[own], left[:, 1:]))
        self.waiting[part] = waiting
        return Observed(velocity_mse(velocity, target), route, until, states, velocity.detach(), target)

    def state_dict(self) -> dict:
        return {
            part: [
                [batch.noise, batch.route, [getattr(batch.conditioning, f.name) for f in fields(Conditioning)], *rest]
                for batch, *rest in groups
            ]
            for part, groups in self.waiting.items()
        }

    def load_state_dict(self, state: dict) -> None:
        self.waiting = {
            part: [(Batch(noise, Conditioning(*values), route), *rest) for noise, route, values, *rest in groups]
            for part, groups in state.items()
        }
