"""Which states are asked, with which prompts, and who supervises them, against the distributions they claim."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from danceopd.core.query import BETA, QUERIES, expected_depth, probabilities, query
from danceopd.core.routing import round_robin, route
from danceopd.core.watch import Watched
from danceopd.data.sampler import draw_batch
from danceopd.training.running_errors import LIMIT, RunningErrors
from danceopd.world.data import WorldData
from danceopd.world.sampling import embedded_samples
from danceopd.world.tokenizer import tokenize


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

    def test_empirical_distribution(self, bias, a, b):
        """Kolmogorov's bound at the 0.1 % level, at every index."""
        index = query(self.DRAWS, self.N, generator(1), bias=bias).flatten()
        for i in range(self.N):
            expected = beta_cdf((i + 1) / self.N, a, b)
            assert (index <= i).double().mean().item() == pytest.approx(expected, abs=1.95 / self.DRAWS**0.5)


@pytest.mark.parametrize(("bias", "a", "b"), [("low_t", 5, 2), ("mid_t", 5, 5), ("high_t", 2, 5), ("uniform", 1, 1)])
def test_two_queries_are_drawn_one_after_the_other_without_repeat(bias, a, b):
    """How often each index is among them: p + sum over the other's p_j p / (1 - p_j)."""
    n, draws = 8, 40_000
    p = [beta_cdf((i + 1) / n, a, b) - beta_cdf(i / n, a, b) for i in range(n)]
    torch.testing.assert_close(probabilities(n, bias), torch.tensor(p, dtype=torch.float64))
    counts = query(draws, n, generator(2), bias=bias, k=2).flatten().bincount(minlength=n) / draws
    for i in range(n):
        expected = p[i] + sum(p[j] * p[i] / (1 - p[j]) for j in range(n) if j != i)
        assert counts[i].item() == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / draws) + 1e-9)


@given(st.sampled_from(QUERIES), st.integers(1, 20), st.integers(1, 24), st.integers(0, 2**40))
def test_no_index_of_a_sample_repeats(bias, steps, k, seed):
    index = query(30, steps, generator(seed), bias=bias, k=k)
    assert index.shape == (30, min(k, steps))
    assert (index.diff(dim=1) > 0).all()  # in order, and so all different
    if k >= steps:
        assert torch.equal(index, torch.arange(steps).expand(30, -1))


@pytest.mark.parametrize("bias", QUERIES)
@pytest.mark.parametrize("k", [1, 3, 16])
def test_the_expected_depth_is_that_of_the_draws(bias, k):
    drawn = query(20_000, 16, generator(5), bias=bias, k=k).amax(1).double()
    assert expected_depth(16, bias=bias, k=k) == pytest.approx(drawn.mean().item(), abs=0.1)


def test_published_shapes():
    assert BETA == {"low_t": (5, 2), "mid_t": (5, 5), "high_t": (2, 5)}


@given(st.integers(1, 64), st.integers(1, 16), st.integers(0, 2**40))
def test_stratified_asks_each_part_once(steps, k, seed):
    index = query(50, steps, generator(seed), bias="stratified", k=k)
    for j in range(k if k < steps else 0):
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
    assert index.shape == (batch, min(k, steps))
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


# Routes in turn, routes and queries by the gap to the sources

CHI = {1: 10.8, 2: 13.8, 3: 16.3, 4: 18.5, 5: 20.5, 6: 22.5, 7: 24.3, 15: 37.7}  # at the 0.1 % level


@pytest.mark.parametrize("weights", [[1.0] * 8, [1, 2, 3, 4], [0, 5, 0, 1, 0.5], [1e-6, 0, 3e-6], [0, 0, 1]], ids=str)
def test_gap_queries_follow_the_weights(weights):
    n, total = 20_000, sum(weights)
    gap = torch.tensor(weights)
    counts = query(n, len(weights), generator(), bias="gap", gap=gap).flatten().bincount(minlength=len(gap))
    expected = [n * w / total for w in weights]
    assert all(c == 0 for c, e in zip(counts.tolist(), expected, strict=True) if e == 0)
    chi = sum((c - e) ** 2 / e for c, e in zip(counts.tolist(), expected, strict=True) if e > 0)
    assert chi < CHI.get(sum(w > 0 for w in weights) - 1, 0.1)


def test_gap_queries_are_uniform_before_a_gap_is_known():
    counts = query(20_000, 8, generator(), bias="gap").flatten().bincount(minlength=8)
    assert ((counts - 2500) ** 2 / 2500).sum() < CHI[7]


@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 4))
def test_round_robin_makes_equal_parts(m, rounds, parts):
    """Of the batch and of every micro-batch that the capabilities divide, whatever the weights."""
    routes = round_robin(m * rounds * parts, m)
    for part in routes.view(parts, -1):
        assert (part.bincount(minlength=m) == rounds).all()
    odd = round_robin(m * rounds + 1, m).bincount(minlength=m)
    assert odd.max() - odd.min() <= 1


def t2i_batch(size, weights=(1.0, 1.0), **options):
    data = [WorldData("t2i", 40, 0), WorldData("style", 40, 0)]
    return data, draw_batch(embedded_samples(data, 10, 1), list(weights), size, 5, 0, **options)


def test_batches_in_turn_ignore_the_weights_and_keep_the_noise():
    data, batch = t2i_batch(12, (100.0, 1.0), in_turn=True)
    assert torch.equal(batch.route, torch.arange(12) % 2)
    for m, rows in enumerate(data):
        own = tokenize(rows.prompts(list(range(40))), 10)
        for tokens in batch.conditioning.prompt[batch.route == m]:
            assert (own == tokens).all(1).any()
    assert torch.equal(batch.noise, t2i_batch(12, (100.0, 1.0))[1].noise)


def test_prompt_dropout_leaves_its_share_empty_and_the_rest_alone():
    n, empty = 4000, tokenize([""], 10)[0]
    _, dropped = t2i_batch(n, prompt_dropout=[0.3, 0.0])
    _, whole = t2i_batch(n)
    assert torch.equal(dropped.noise, whole.noise)
    assert torch.equal(dropped.route, whole.route)
    blank = (dropped.conditioning.prompt == empty).all(1)
    assert not (whole.conditioning.prompt == empty).all(1).any()
    assert torch.equal(dropped.conditioning.prompt[~blank], whole.conditioning.prompt[~blank])
    first = dropped.route == 0
    assert blank[first].double().mean().item() == pytest.approx(0.3, abs=4 * (0.21 / first.sum().item()) ** 0.5)
    assert not blank[~first].any()


def observed(route, depth, error, k=1) -> Watched:
    """Queries whose mean squared error is `error`, k in a row for each sample."""
    n, error = len(error), torch.tensor(error)
    depth = torch.full((n,), -1) if depth is None else torch.tensor(depth)
    return Watched(n // k, error, torch.tensor(route).repeat_interleave(k), depth, error, error, error, error)


def test_errors_are_running_means():
    running = RunningErrors(2, 3)
    assert running.query_weights() is None
    running.update(observed([0, 0], [2, 2, 0, 2], [1.0, 2.0, 6.0, 3.0], k=2))
    assert running.route_weights([2.0, 3.0]) == [2.0, 3.0]  # nothing is known of the other
    # Index 2 saw 1, 2 and 3, index 0 saw 6, and index 1 is taken as the mean of the others.
    torch.testing.assert_close(running.query_weights(), torch.tensor([6.0, 4.0, 2.0]).double().sqrt())
    running.update(observed([1, 0], [2, 2, 0, 0], [4.0, 6.0, 1.0, 3.0], k=2))
    expected = torch.tensor([0.95 * 6 + 0.05 * 2, 0, 0.95 * 2 + 0.05 * 5]).double()
    expected[1] = (expected[0] + expected[2]) / 2
    torch.testing.assert_close(running.query_weights(), expected.sqrt())
    mine = 0.95 * 3 + 0.05 * 2  # capability 0 saw a mean of 3, then 2; capability 1 saw 5
    mean = (mine + 5) / 2
    assert running.route_weights([2.0, 3.0]) == pytest.approx([2 * mine / mean, 3 * 5 / mean])


def test_errors_off_the_rollouts_levels_are_of_capabilities_alone():
    running = RunningErrors(2, 3)
    running.update(observed([0, 1], None, [1.0, 3.0]))
    assert running.query_weights() is None
    assert running.route_weights([1.0, 1.0]) == pytest.approx([0.5, 1.5])


@given(st.lists(st.tuples(st.floats(0.01, 10), st.floats(1e-4, 1e4)), min_size=1, max_size=5))
def test_adaptive_weights_follow_the_errors_within_the_limit(rows):
    weights, errors = zip(*rows, strict=True)
    running = RunningErrors(len(rows), 1)
    for _ in range(3):
        running.update(observed(list(range(len(rows))), None, list(errors)))
    mean = sum(errors) / len(errors)
    adapted = running.route_weights(list(weights))
    for w, e, a in zip(weights, errors, adapted, strict=True):
        assert a / w == pytest.approx(min(max(e / mean, 1 / LIMIT), LIMIT), rel=1e-4)
    factors = [a / w for a, w in zip(adapted, weights, strict=True)]
    order = sorted(range(len(rows)), key=lambda i: errors[i])
    assert all(factors[i] <= factors[j] * (1 + 1e-6) for i, j in itertools.pairwise(order))


def test_running_errors_go_on_from_their_state():
    a, b = RunningErrors(2, 3), RunningErrors(2, 3)
    a.update(observed([0, 1], [0, 2], [1.0, 3.0]))
    b.load_state_dict(a.state_dict())
    for running in (a, b):
        running.update(observed([0, 1], [1, 2], [2.0, 5.0]))
    assert torch.equal(a.query_weights(), b.query_weights())
    assert a.route_weights([1.0, 1.0]) == b.route_weights([1.0, 1.0])


def test_groups_in_turn_have_a_capability_each():
    routes = t2i_batch(12, in_turn=True, group=3)[1].route
    assert routes.tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1]


def test_an_update_of_one_capability_draws_it_by_weight():
    samples = embedded_samples([WorldData("t2i", 40, 0), WorldData("style", 40, 0)], 10, 1)
    batches = [draw_batch(samples, [3.0, 1.0], 4, 5, step, alike=True) for step in range(300)]
    assert all(len(batch.route.unique()) == 1 for batch in batches)
    share = sum(int(batch.route[0]) for batch in batches) / 300
    assert abs(share - 0.25) < 3 * (0.25 * 0.75 / 300) ** 0.5
    assert torch.equal(batches[0].noise, draw_batch(samples, [3.0, 1.0], 4, 5, 0).noise)
    parts = [draw_batch(samples, [3.0, 1.0], 4, 5, 7, alike=True, rank=rank, world_size=2) for rank in range(2)]
    assert torch.equal(torch.cat([part.route for part in parts]), batches[7].route)
