"""Trajectories that outlive an update."""

from collections import Counter, defaultdict

import pytest
import torch
from by_hand import (
    SIGMAS,
    SOURCES,
    STUDENT,
    Remembering,
    batch_of,
    close,
    euler,
    generator,
    linear,
    through_disk,
    update,
)
from hypothesis import given
from hypothesis import strategies as st

from danceopd.core.fields import counted
from danceopd.core.methods.pooled import Pooled
from danceopd.core.query import query
from danceopd.core.schedule import sigma_grid

SEED = st.integers(0, 2**40)


def pool_run(pool, updates, n, visits, steps=6, student=STUDENT, bias="low_t", seed=0, first=0):
    """Updates of a pool: {number: (update, the trajectories asked)}; the counter; the batches."""
    counter, seen, batches = Counter(), {}, {}
    field, sources = Remembering(counted(student, counter, "student")), [counted(s, counter, "source") for s in SOURCES]
    for number in range(first, first + updates):
        batch = batches[number] = batch_of(n, seed=97 * number, first=1000 * number)
        g = generator(seed + 31 * number)
        common = {"sigmas": sigma_grid(steps, 3.0), "solver": "euler", "bias": bias, "generator": g}
        seen[number] = update(pool, field, sources, batch, **common, visits=visits), field.calls[-1][2].tolist()
    return seen, counter, batches


@given(st.integers(1, 7), st.integers(1, 4), st.integers(4, 8), SEED)
def test_pooled_asks_each_trajectory_its_visits_in_different_updates(n, visits, steps, seed):
    """At indices that rise, with the student's own states and each trajectory's own source."""
    seen, _, batches = pool_run(Pooled(None), visits + 3, n, visits, steps, seed=seed)
    asked = defaultdict(list)
    for number, (observed, names) in seen.items():
        assert len(set(names)) == len(names) == len(observed.questions)
        for row, name in enumerate(names):
            asked[name].append((number, int(observed.depth[row])))
            batch, i = batches[name // 1000], name % 1000
            assert observed.questions.query_route()[row] == batch.route[i]
            path = euler(STUDENT, batch, i, sigma_grid(steps, 3.0))
            close(observed.states[row], path[observed.depth[row]], rel=1e-4, atol=1e-5)
            assert observed.velocity.shape == observed.target.shape == observed.states.shape
    for name, times in asked.items():
        started = name // 1000
        assert [number for number, _ in times] == list(range(started, min(started + visits, visits + 3)))
        depths = [depth for _, depth in times]
        assert depths == sorted(set(depths))
    fresh = -(-n // visits)
    assert sorted(asked) == [1000 * b + i for b in range(visits + 3) for i in range(fresh)]
    if n % visits == 0:
        assert len(seen[visits + 2][1]) == n


def test_pooled_loss_is_the_squared_error_with_its_gradient():
    theta = torch.tensor([0.8, -0.3], requires_grad=True)
    seen, _, _ = pool_run(Pooled(None), 3, 6, 2, student=linear(theta))
    observed, names = seen[2]
    close(observed.loss.detach(), (observed.velocity - observed.target).square().mean(1))
    observed.loss.mean().backward()
    error = 2 * (observed.velocity - observed.target).double() / observed.states.numel()
    sigma = sigma_grid(6, 3.0)[observed.depth][:, None]
    close(theta.grad, [(error * observed.states).sum(), (error * sigma).sum()])
    assert len(names) == 6


@pytest.mark.parametrize(("visits", "bias"), [(1, "low_t"), (2, "low_t"), (3, "high_t")])
def test_pooled_indices_follow_the_query(visits, bias):
    """Once the pool is full: Kolmogorov's bound at the 0.1 % level against what `query` draws, at every index."""
    steps, updates = 8, 24
    seen, _, _ = pool_run(Pooled(None), updates, 600, visits, steps=steps, bias=bias)
    index = torch.cat([seen[u][0].depth for u in range(visits - 1, updates)])
    drawn = query(200_000, steps, generator(9), bias=bias, k=visits)
    for i in range(steps):
        close((index <= i).double().mean(), (drawn <= i).double().mean(), atol=1.95 / len(index) ** 0.5)


@pytest.mark.parametrize("visits", [1, 2, 3])
def test_pooled_evaluations_are_the_steps_between_its_visits(visits):
    """Over a trajectory's life: its deepest index in steps and one evaluation a visit, one of its source a visit."""
    n, updates, steps = 6, 8, 6
    seen, counter, _ = pool_run(Pooled(None), updates, n, visits, steps=steps)
    deepest, queries = Counter(), 0
    for observed, names in seen.values():
        queries += len(names)
        for name, depth in zip(names, observed.depth.tolist(), strict=True):
            deepest[name] = max(deepest[name], depth)
    assert counter == {"student": deepest.total() + queries, "source": queries}


def test_pooled_visits_save_rollout_steps():
    steps = {}
    for visits in (1, 2, 4):
        seen, counter, _ = pool_run(Pooled(None), 12, 32, visits, steps=16)
        queries = sum(len(names) for _, names in seen.values())
        steps[visits] = (counter["student"] - queries) / queries
    assert steps[4] < steps[2] < steps[1]
    assert steps[2] < 0.65 * steps[1]


def test_pooled_goes_on_from_its_state():
    pool, again = Pooled(None), Pooled(None)
    pool_run(pool, 3, 6, 3)
    again.load_state_dict(through_disk(pool.state_dict()))
    runs = [pool_run(p, 3, 6, 3, first=3)[0] for p in (pool, again)]
    for number in (3, 4, 5):
        (a, names), (b, others) = (run[number] for run in runs)
        assert names == others
        for key in ("loss", "route", "depth", "states", "velocity", "target"):
            assert torch.equal(getattr(a, key), getattr(b, key))


def test_pooled_mixes_samples_with_and_without_source_pictures():
    """What waits keeps its picture: a field that shows the source is asked with each trajectory's own."""
    pool, asked = Pooled(None), {}

    def field(z, sigma, c):
        return c.source.view(len(z), 3) if c.source is not None else torch.zeros_like(z)

    def source(z, sigma, c):
        asked.update(
            {
                int(t): (bool(h), None if c.source is None else s)
                for t, h, s in zip(c.prompt[:, 0], c.has_source, c.source if c.source is not None else z, strict=True)
            }
        )
        return field(z, sigma, c)

    for number in range(4):
        batch = batch_of(4, routes=1, first=10 * number)
        if number % 2:
            batch.conditioning.source = torch.full((4, 3, 1, 1), float(number))
            batch.conditioning.has_source[:] = True
        asked.clear()
        common = {"sigmas": SIGMAS, "solver": "euler", "bias": "low_t", "generator": generator(number)}
        update(pool, field, [source], batch, **common, visits=2)
        for name, (has, picture) in asked.items():
            assert has == bool(name // 10 % 2)
            assert not has or (picture == name // 10).all()
        assert set(asked) == {10 * u + i for u in (number - 1, number) if u >= 0 for i in range(2)}
