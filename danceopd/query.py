"""Which states of a trajectory are asked."""

import torch

# Beta(a, b) of the trajectory fraction: 0 is noise, 1 is data. Low-t asks near the data.
BETA = {"low_t": (5.0, 2.0), "mid_t": (5.0, 5.0), "high_t": (2.0, 5.0)}
QUERIES = (*BETA, "uniform", "stratified")


def query(
    batch: int, num_inference_steps: int, generator: torch.Generator, *, bias: str = "low_t", k: int = 1
) -> torch.Tensor:
    """Draw trajectory indices: [batch, k] int64 in [0, num_inference_steps - 1], never the finished picture.

    bias: low_t, mid_t, high_t (the fraction follows a Beta, index floor(N * fraction)), uniform, or
    stratified (uniform within each of k equal parts of the trajectory).
    Raises ValueError for an unknown bias or k < 1.
    """
    if bias not in QUERIES:
        raise ValueError(f"unknown query bias {bias!r}; use one of {', '.join(QUERIES)}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if bias in BETA:
        a, b = BETA[bias]
        x = _gamma(a, (batch, k), generator)
        fraction = x / (x + _gamma(b, (batch, k), generator))
    else:
        fraction = torch.rand(batch, k, generator=generator, dtype=torch.float64)
        if bias == "stratified":
            fraction = (torch.arange(k) + fraction) / k
    return (fraction * num_inference_steps).long().clamp(max=num_inference_steps - 1)


def _gamma(shape: float, size: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Gamma(shape, 1) draws; for a whole shape the sum of that many exponentials."""
    uniform = torch.rand(int(shape), *size, generator=generator, dtype=torch.float64)
    return -torch.log1p(-uniform).sum(0)
