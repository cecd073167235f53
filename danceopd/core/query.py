"""Draws which states of a trajectory are asked."""

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
    """Draws the trajectory indices that are asked, never the finished picture; those of one sample all differ.

    Several indices of a sample are drawn one after another, each with its probability among those that are left.

    Args:
        batch: Number of samples B.
        num_inference_steps: Number N of steps of the rollout.
        generator: Draws the batch's randomness.
        bias: ``low_t``, ``mid_t``, ``high_t`` (the fraction u of the trajectory follows a Beta, index floor(N u)),
            ``uniform``, ``stratified`` (one index in each of k equal parts of the trajectory) or ``gap`` (with
            probability proportional to `gap`, uniform without one).
        k: Number of indices a sample; from N on all of them are asked.
        gap: Float tensor [N], the weight of each index.

    Returns:
        int64 tensor [batch, min(k, N)] on the CPU, with entries in [0, N - 1].

    Raises:
        ValueError: For an unknown bias, k < 1 or num_inference_steps < 1.

    Example:
        >>> query(2, 16, torch.Generator().manual_seed(0), k=16)[0].tolist() == list(range(16))
        True
    """
    if bias not in QUERIES:
        raise ValueError(f"unknown query bias {bias!r}; use one of {', '.join(QUERIES)}")
    if k < 1 or num_inference_steps < 1:
        raise ValueError(f"k and num_inference_steps must be at least 1, got {k} and {num_inference_steps}")
    n = num_inference_steps
    if k >= n:
        return torch.arange(n).repeat(batch, 1)
    if k == 1 and bias in BETA:
        # Beta(a, b) with whole a and b: a Gamma(a) variable against a Gamma(b) one, each a sum of exponentials.
        a, b = BETA[bias]
        exponential = -torch.log1p(-rand(generator, batch, 1, a + b, dtype=torch.float64))
        fraction = exponential[..., :a].sum(-1) / exponential.sum(-1)
        return (fraction * n).long().clamp(max=n - 1)
    if bias == "stratified":
        edges = torch.arange(k + 1) * n // k
        within = rand(generator, batch, k, dtype=torch.float64) * (edges[1:] - edges[:-1])
        return edges[:-1] + within.long().minimum(edges[1:] - edges[:-1] - 1)
    # The k earliest of independent exponential times with the indices' probabilities as rates: drawing without
    # replacement. An index of probability zero comes last.
    times = -torch.log1p(-rand(generator, batch, n, dtype=torch.float64)) / probabilities(n, bias, gap)
    return times.topk(k, largest=False).indices.sort(1).values


def probabilities(num_inference_steps: int, bias: str, gap: torch.Tensor | None = None) -> torch.Tensor:
    """Works out how probable each trajectory index is for the first draw of a sample.

    Args:
        num_inference_steps: Number N of steps of the rollout.
        bias: As in `query`.
        gap: As in `query`.

    Returns:
        float64 tensor [N] that sums to 1.
    """
    n = num_inference_steps
    if bias == "gap" and gap is not None:
        return gap.double().cpu() / gap.double().sum().cpu()
    if bias not in BETA:
        return torch.full((n,), 1 / n, dtype=torch.float64)
    a, b = BETA[bias]
    trials, edges = a + b - 1, [j / n for j in range(n + 1)]
    # Beta's distribution with whole a and b: at least a of a + b - 1 uniforms lie below x.
    below = [sum(math.comb(trials, i) * x**i * (1 - x) ** (trials - i) for i in range(a, trials + 1)) for x in edges]
    return torch.tensor(below, dtype=torch.float64).diff()


def expected_shares(num_inference_steps: int, *, bias: str = "low_t", k: int = 1) -> torch.Tensor:
    """Works out the share of the queries that is expected at each trajectory index.

    Exact for k = 1 and from k = N on, else the mean over 4,096 draws of a fixed seed.

    Args:
        num_inference_steps: Number N of steps of the rollout.
        bias: As in `query`.
        k: Number of indices a sample.

    Returns:
        float64 tensor [N] that sums to 1.

    Raises:
        ValueError: As `query` does.
    """
    drawn = query(4096 if k > 1 else 1, num_inference_steps, torch.Generator().manual_seed(0), bias=bias, k=k)
    if k == 1:
        return probabilities(num_inference_steps, bias)
    return drawn.flatten().bincount(minlength=num_inference_steps).double() / drawn.numel()


def expected_depth(num_inference_steps: int, *, bias: str = "low_t", k: int = 1) -> float:
    """Works out the mean of the deepest index that `query` draws for a sample: its steps of rollout.

    Exact for k = 1 and from k = N on, else the mean over 4,096 draws of a fixed seed (0.5 % off at most). Before
    training has made weights, ``gap`` is uniform.

    Args:
        num_inference_steps: Number N of steps of the rollout.
        bias: As in `query`.
        k: Number of indices a sample.

    Returns:
        The expected number of steps, between 0 and N - 1.

    Raises:
        ValueError: As `query` does.
    """
    drawn = query(4096 if k > 1 else 1, num_inference_steps, torch.Generator().manual_seed(0), bias=bias, k=k)
    if k == 1:
        return float(probabilities(num_inference_steps, bias) @ torch.arange(num_inference_steps, dtype=torch.float64))
    return float(drawn.amax(1).double().mean())
