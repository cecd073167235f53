"""What a method hands back to the loop."""

from dataclasses import dataclass

import torch


@dataclass
class Observed:
    """loss [B] with gradient; the rest is without, one entry a query (Q = B * k), for the logs and the watch.

    depth [Q] int64 trajectory index, route [Q] int64, states, velocity and target [Q, ...].
    """

    loss: torch.Tensor
    depth: torch.Tensor
    route: torch.Tensor
    states: torch.Tensor
    velocity: torch.Tensor
    target: torch.Tensor
