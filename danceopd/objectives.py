"""What is matched at the queried state."""

import torch


def velocity_mse(velocity: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each sample, in float32: [B, ...] and [B, ...] -> [B].

    No gradient reaches the target. Raises ValueError if the shapes differ.
    """
    if velocity.shape != target.shape:
        raise ValueError(f"velocity {tuple(velocity.shape)} and target {tuple(target.shape)} differ in shape")
    return (velocity.float() - target.detach().float()).square().flatten(1).mean(1)
