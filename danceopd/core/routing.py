"""Which capability supervises each sample."""

import torch

ROUTES = ("random", "round_robin", "adaptive")


def route(batch: int, weights: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Hard routes: [batch] int64, each capability m drawn with probability weights[m] / sum(weights).

    Raises ValueError if a weight is negative or not finite, or all are zero.
    """
    weights = torch.as_tensor(weights, dtype=torch.float64)
    if not torch.isfinite(weights).all() or (weights < 0).any() or weights.sum() == 0:
        raise ValueError(f"route weights must be finite, not negative and not all zero, got {weights.tolist()}")
    return torch.multinomial(weights, batch, replacement=True, generator=generator)


def round_robin(batch: int, capabilities: int) -> torch.Tensor:
    """The capabilities in turn, [batch] int64: equal parts of every batch and micro-batch."""
    return torch.arange(batch) % capabilities
