"""Which states are asked and who supervises them, against the distributions they claim."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from danceopd.query import BETA, QUERIES, query
from danceopd.routing import route


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def beta_cdf(x: float, a: int, b: int) -> float:
    """For whole a and b: the chance that at least a of a + b - 1 trials of chance x succeed."""
    n = a + b - 1
    return sum(math.comb(n, j) * x**j * (1 - x) ** (n - j) for j in range(a, n + 1))


@pytest.mark.parametrize(("bias", "a", "b"), [("low_t", 5, 2), ("mid_t", 5, 5), ("high_t", 2, 5), ("uniform", 1, 1)])
class TestDistribution:
    N, DRAWS = 16, 20_000

    def test_mean(self, bias, a, b):
        n = 1000
        fraction = (query(self.DRAWS, n, generator(), bias=bias).double() + 0.5) / n
        deviation = math.sqrt(a * b / (a + b + 1)) / (a + b)
        assert fraction.mean().item() == pytest.approx(a / (a + b), abs=4 * deviation / math.sqrt(self.DRAWS))
        assert fraction.std().item() == pytest.approx(deviation, rel=0.03)

    @pytest.mark.parametrize("k", [1, 4])
    def test_empirical_distribution(self, bias, a, b, k):
        """Kolmogorov's bound at the 0.1 % level, at every index."""
        index = query(self.DRAWS // k, self.N, generator(1), bias=bias, k=k).flatten()
        for i in range(self.N):
            expected = beta_cdf((i + 1) / self.N, a, b)
            assert (index <= i).double().mean().item() == pytest.approx(expected, abs=1.95 / self.DRAWS**0.5)


def test_published_shapes():
    assert BETA == {"low_t": (5, 2), "mid_t": (5, 5), "high_t": (2, 5)}


@given(st.integers(1, 64), st.integers(1, 16), st.integers(0, 2**40))
def test_stratified_asks_each_part_once(steps, k, seed):
    index = query(50, steps, generator(seed), bias="stratified", k=k)
    for j in range(k):
        low, high = math.floor(j * steps / k), math.ceil((j + 1) * steps / k)
        assert (index[:, j] >= low).all()
        assert (index[:, j] < high).all()
    if steps % k == 0:
        assert torch.equal(index // (steps // k), torch.arange(k).expand(50, k))


def test_stratified_is_uniform_within_its_part():
    index = query(20_000, 16, generator(), bias="stratified", k=4)
    counts = index.flatten().bincount(minlength=16)
    assert (((counts - 5000) ** 2) / 5000).sum() < 37.7  # chi-square, 15 degrees of freedom, 0.1 %


@given(st.sampled_from(QUERIES), st.integers(1, 64), st.integers(1, 64), st.integers(1, 5), st.integers(0, 2**40))
def test_range_and_reproducibility(bias, batch, steps, k, seed):
    g = generator(seed)
    index = query(batch, steps, g, bias=bias, k=k)
    assert index.shape == (batch, k)
    assert index.dtype == torch.int64
    assert index.min() >= 0
    assert index.max() < steps
    assert torch.equal(index, query(batch, steps, generator(seed), bias=bias, k=k))
    g2, g1000 = generator(seed), query(200, 1000, generator(seed), bias=bias)
    assert torch.equal(query(200, 1000, g2, bias=bias), g1000)
    assert not torch.equal(query(200, 1000, g2, bias=bias), g1000)  # the generator moved on


@pytest.mark.parametrize("bias", QUERIES)
def test_drawing_in_parts_gives_the_same_indices(bias):
    whole, g = query(12, 16, generator(3), bias=bias, k=2), generator(3)
    assert torch.equal(whole, torch.cat([query(n, 16, g, bias=bias, k=2) for n in (5, 3, 4)]))


def test_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    query(8, 16, generator())
    route(8, [1.0, 1.0], generator())
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("steps", "options", "message"),
    [
        (16, {"bias": "low"}, "unknown query bias"),
        (16, {"k": 0}, "at least 1"),
        (16, {"k": -2, "bias": "stratified"}, "at least 1"),
        (0, {}, "at least 1"),
    ],
)
def test_query_refuses(steps, options, message):
    with pytest.raises(ValueError, match=message):
        query(4, steps, generator(), **options)


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.1, 0.2, 0.7], [5, 0, 3, 2], [1e-30, 3e-30], [0, 0, 1]], ids=str)
def test_routes_follow_the_weights(weights):
    """Chi-square at the 0.1 % level over the capabilities of positive weight; the others are never drawn."""
    n, total = 20_000, sum(weights)
    counts = route(n, weights, generator()).bincount(minlength=len(weights)).tolist()
    assert sum(counts) == n
    assert len(counts) == len(weights)
    expected = [n * w / total for w in weights]
    assert all(c == 0 for c, e in zip(counts, expected, strict=True) if e == 0)
    chi = sum((c - e) ** 2 / e for c, e in zip(counts, expected, strict=True) if e > 0)
    assert chi < {1: 0.1, 2: 10.8, 3: 13.8}[sum(w > 0 for w in weights)]


@given(st.integers(0, 2**40))
def test_routes_are_reproducible(seed):
    g = generator(seed)
    first, second = (route(100, torch.tensor([1.0, 2.0, 1.0]), g) for _ in range(2))
    assert first.dtype == torch.int64
    assert torch.equal(first, route(100, [1, 2, 1], generator(seed)))  # a list, and unnormalised, will do
    assert not torch.equal(first, second)


@pytest.mark.parametrize("weights", [[1, -1], [1, math.nan], [1, math.inf], [0, 0], []], ids=str)
def test_route_refuses(weights):
    with pytest.raises(ValueError, match="route weights"):
        route(4, weights, generator())
