"""What a method hands back to the loop."""

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field

# What an option of a method may be.
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
GroupSize = Annotated[int, Field(ge=2)]  # a group of one has no deviation


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
