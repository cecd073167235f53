"""What a method hands back to the loop."""

from dataclasses import dataclass

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
