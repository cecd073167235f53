"""Which states of a trajectory are asked."""

import math

import torch

from danceopd.core.randomness import Generator, rand

# Beta(a, b) of the trajectory fraction: 0 is noise, 1 is data. Low-t asks near the data.
BETA = {"low_t": (5, 2), "mid_t": (5, 5), "high_t": (2, 5)}

QUERIES = (*BETA, "uniform", "stratified", "gap")


def query(
    batch: int,
    num_inference_steps: int,
    generator: Generator,
    *,
    bias: str = "low_t",
    k: int = 1,
    gap: torch.Tensor | None = None,
) -> torch.Tensor:
    """Draw trajectory indices: [batch, k] int64 in [0, num_inference_steps - 1], never the finished picture.

    bias: low_t, mid_t, high_t (the fraction follows a Beta, index floor(N * fraction)), uniform,
    stratified (uniform within each of k equal parts of the trajectory), or gap (an index is drawn with
    probability proportional to gap [N], uniform without one).
    Raises ValueError for an unknown bias, k < 1 or num_inference_steps < 1.
    """
    if bias not in QUERIES:
        raise ValueError(f"unknown query bias {bias!r}; use one of {', '.join(QUERIES)}")
    if k < 1 or num_inference_steps < 1:
        raise ValueError(f"k and num_inference_steps must be at least 1, got {k} and {num_inference_steps}")
    if bias == "gap":
        weights = torch.ones(num_inference_steps, dtype=torch.float64) if gap is None else gap.double()
        edges = weights.cumsum(0) / weights.sum()
        uniform = rand(generator, batch, k, dtype=torch.float64)
        return torch.searchsorted(edges, uniform, right=True).clamp(max=num_inference_steps - 1)
    if bias in BETA:
        # Beta(a, b) with whole a and b: a Gamma(a) variable against a Gamma(b) one, each a sum of exponentials.
        # One row of uniforms a draw, so that drawing a batch in parts gives the same indices.
        a, b = BETA[bias]
        uniform = rand(generator, batch, k, a + b, dtype=torch.float64)
        exponential = -torch.log1p(-uniform)
        fraction = exponential[..., :a].sum(-1) / exponential.sum(-1)
    else:
        fraction = rand(generator, batch, k, dtype=torch.float64)
        if bias == "stratified":
            fraction = (torch.arange(k) + fraction) / k
    return (fraction * num_inference_steps).long().clamp(max=num_inference_steps - 1)


def expected_depth(num_inference_steps: int, *, bias: str = "low_t", k: int = 1) -> float:
    """The mean of the deepest of the k indices that `query` draws for a sample: its steps of rollout.

    Of gap, whose weights training makes, before there are any. Raises ValueError as `query` does.
    """
    query(0, num_inference_steps, torch.Generator(), bias=bias, k=k)  # checks its arguments
    edges = [j / num_inference_steps for j in range(1, num_inference_steps)]  # depth >= j: a fraction is past edge j
    if bias == "stratified":
        return sum(min(1.0, k * (1 - x)) for x in edges)
    if bias in BETA:
        a, b = BETA[bias]
        n = a + b - 1  # Beta's distribution with whole a and b: at least a of n uniforms lie below x
        below = [sum(math.comb(n, i) * x**i * (1 - x) ** (n - i) for i in range(a, n + 1)) for x in edges]
    else:
        below = edges
    return sum(1 - f**k for f in below)
