"""Which capability supervises each sample."""

from collections.abc import Sequence

import torch

ROUTES = ("random", "round_robin", "adaptive", "per_update")


def route(batch: int, weights: torch.Tensor | Sequence[float], generator: torch.Generator) -> torch.Tensor:
    """Draws the capability of each sample: m with probability weights[m] / sum(weights).

    Args:
        batch: Number of samples B.
        weights: M numbers, one for each capability.
        generator: Draws the batch's randomness.

    Returns:
        int64 tensor [batch] on the CPU, with entries in [0, M - 1].

    Raises:
        ValueError: If a weight is negative or not finite, or all are zero.

    Example:
        >>> route(4, [0.0, 2.0], torch.Generator().manual_seed(0))
        tensor([1, 1, 1, 1])
    """
    weights = torch.as_tensor(weights, dtype=torch.float64)
    if not torch.isfinite(weights).all() or (weights < 0).any() or weights.sum() == 0:
        raise ValueError(f"route weights must be finite, not negative and not all zero, got {weights.tolist()}")
    return torch.multinomial(weights, batch, replacement=True, generator=generator)


def round_robin(batch: int, capabilities: int) -> torch.Tensor:
    """Takes the capabilities in turn: equal parts of every batch and micro-batch.

    Args:
        batch: Number of samples B.
        capabilities: Their number M.

    Returns:
        int64 tensor [batch] on the CPU, with entries in [0, M - 1].

    Example:
        >>> round_robin(5, 2)
        tensor([0, 1, 0, 1, 0])
    """
    return torch.arange(batch) % capabilities
