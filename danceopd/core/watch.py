"""What is watched of an update's queries."""

from dataclasses import dataclass, fields

import torch


@dataclass
class Observed:
    """loss [B] with gradient and its samples' route [B] int64; the rest is for the watch, without gradient.

    One entry a query, those of a sample in a row: states, velocity and target [Q, ...], and depth [Q] int64, the
    trajectory index, or None where states lie off the rollout's noise levels.
    """

    loss: torch.Tensor
    route: torch.Tensor
    depth: torch.Tensor | None
    states: torch.Tensor
    velocity: torch.Tensor
    target: torch.Tensor

    def summary(self) -> "Summary":
        """What is watched, without the tensors themselves."""
        norms = [x.detach().float().flatten(1).norm(dim=1).cpu() for x in (self.velocity, self.target, self.states)]
        error = (self.velocity - self.target).detach().double().square().flatten(1).mean(1).cpu()
        depth = None if self.depth is None else self.depth.cpu()
        return Summary(self.loss.detach().cpu(), self.route.cpu(), depth, *norms, error)


@dataclass
class Summary:
    """Of B samples on the CPU: loss [B], route [B] and, one entry a query, depth [Q] or None, norms, squared error."""

    loss: torch.Tensor
    route: torch.Tensor
    depth: torch.Tensor | None
    velocity_norm: torch.Tensor
    target_norm: torch.Tensor
    state_norm: torch.Tensor
    error: torch.Tensor

    def query_route(self) -> torch.Tensor:
        """The route of each query [Q]."""
        return self.route.repeat_interleave(len(self.error) // len(self.route))


def join(parts: list[Summary]) -> Summary:
    """Micro-batches of one update, of all ranks, in the order of their samples."""
    values = ([getattr(part, f.name) for part in parts] for f in fields(Summary))
    return Summary(*(None if any(v is None for v in column) else torch.cat(column) for column in values))
