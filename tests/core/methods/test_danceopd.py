"""DanceOPD, its weights and its fast variant, by hand."""

import math

import pytest
import torch
from by_hand import ROLLED, SIGMAS, SOURCES, STUDENT, alone, batch_of, close, constant, euler, generator, linear, update
from hypothesis import strategies as st

from danceopd.core.methods.danceopd import danceopd
from danceopd.core.methods.danceopd_fast import danceopd_fast
from danceopd.core.methods.off_policy import off_policy
from danceopd.core.methods.pooled import Pooled
from danceopd.core.query import query
from danceopd.core.schedule import sigma_grid

SEED = st.integers(0, 2**40)


@pytest.mark.parametrize("routing", ["hard", "soft"])
@pytest.mark.parametrize("k", [1, 3])
def test_danceopd_by_hand(routing, k):
    """Each sample alone: its own trajectory, its source (or the mean of all), the mean error of its k queries."""
    batch = batch_of(7)
    seen = update(danceopd, STUDENT, SOURCES, batch, **ROLLED, k=k, generator=generator(3), routing=routing)
    depth = query(7, 6, generator(3), bias="mid_t", k=k)
    assert torch.equal(seen.depth, depth.flatten())
    for i in range(7):
        path, losses = euler(STUDENT, batch, i, SIGMAS), []
        for j, d in enumerate(depth[i].tolist()):
            velocity, *asked = (alone(f, batch, i, path[d], SIGMAS[d]) for f in (STUDENT, *SOURCES))
            target = asked[i % 2] if routing == "hard" else (asked[0] + asked[1]) / 2
            close(seen.states[i * k + j], path[d])
            close(seen.target[i * k + j], target)
            close(seen.velocity[i * k + j], velocity)
            losses.append((velocity - target).square().mean())
        close(seen.loss[i], sum(losses) / k)


def test_danceopd_learns_at_the_query_alone():
    """The gradient is that of the squared error at states taken as given."""
    theta, batch = torch.tensor([0.8, -0.3], requires_grad=True), batch_of(6)
    seen = update(danceopd, linear(theta), SOURCES, batch, **ROLLED, k=2, generator=generator(1))
    seen.loss.mean().backward()
    error = 2 * (seen.velocity - seen.target).double() / seen.states.numel()
    close(theta.grad, [(error * seen.states).sum(), (error * SIGMAS[seen.depth][:, None]).sum()])


@pytest.mark.parametrize(("progress", "warm"), [(0.0, True), (0.49, True), (0.5, False), (1.0, False)])
def test_danceopd_starts_on_the_sources_trajectories(progress, warm):
    batch, sources = batch_of(9, routes=3), [constant(v) for v in (1.0, 2.0, 3.0)]
    seen = update(
        danceopd,
        constant(-1.0),
        sources,
        batch,
        **ROLLED,
        k=1,
        generator=generator(),
        progress=progress,
        warm_start=0.5,
    )
    speed = (1.0 + batch.route) if warm else torch.full((9,), -1.0)
    close(seen.states, batch.noise + ((SIGMAS[seen.depth] - 1) * speed)[:, None])
    assert (seen.velocity == -1).all()
    assert torch.equal(seen.target[:, 0], 1.0 + batch.route)


def density_by_difference(sigma):
    """|du / d sigma| of SD3's mode sampling with scale 1.29, from a table of its u."""
    u = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    at = 1 - u - 1.29 * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
    i = len(u) - torch.searchsorted(at.flip(0), sigma)
    return (u[i] - u[i - 2]) / (at[i] - at[i - 2]).abs()


def logit_normal(sigma):
    normal = torch.distributions.Normal(torch.tensor(0.0).double(), 1.0)
    transform = torch.distributions.SigmoidTransform()
    return torch.distributions.TransformedDistribution(normal, [transform]).log_prob(sigma).exp()


BY_HAND = {
    "mse": lambda sigma, following: torch.ones_like(sigma),
    "sigma_sqrt": lambda sigma, following: 1 / sigma**2,
    "cosmap": lambda sigma, following: 2 / (math.pi * ((1 - sigma) ** 2 + sigma**2)),
    "clean": lambda sigma, following: sigma**2,
    "kl": lambda sigma, following: (following - sigma) ** 2 / 2,
    "logit_normal": lambda sigma, following: logit_normal(sigma),
    "mode": lambda sigma, following: density_by_difference(sigma),
}


@pytest.mark.parametrize("objective", BY_HAND)
def test_objectives_weigh_each_query(objective):
    batch, sigmas = batch_of(40), sigma_grid(8, 3.0)
    common = {"sigmas": sigmas, "solver": "euler", "bias": "uniform", "k": 1}
    seen = update(danceopd, STUDENT, SOURCES, batch, **common, generator=generator(2), objective=objective)
    inside = seen.depth > 0  # at sigma 1 a density may have no value
    error = (seen.velocity - seen.target).double().square().mean(1)
    weight = BY_HAND[objective](sigmas[seen.depth].double()[inside], sigmas[seen.depth + 1].double()[inside])
    close(seen.loss[inside], weight * error[inside], rel=2e-3)
    assert seen.loss.isfinite().all()


def test_danceopd_and_pooled_ask_where_the_gap_is():
    gap, batch = torch.tensor([0.0, 0, 0, 1, 0, 0]), batch_of(20)
    common = {"sigmas": SIGMAS, "solver": "euler", "bias": "gap", "generator": generator(), "gap": gap}
    assert (update(danceopd, STUDENT, SOURCES, batch, k=1, **common).depth == 3).all()
    assert (update(Pooled(None), STUDENT, SOURCES, batch, visits=1, **common).depth == 3).all()


def test_danceopd_fast_is_off_policy_and_then_danceopd():
    batch, sigmas = batch_of(6), {"sigmas": SIGMAS, "solver": "euler"}
    common = {**ROLLED, "clean": batch.clean, "shift": 3.0, "k": 2, "warm_start": 0.3}
    before, after = (
        update(danceopd_fast, STUDENT, SOURCES, batch, **common, generator=generator(4), progress=p)
        for p in (0.29, 0.3)
    )
    off = update(off_policy, STUDENT, SOURCES, batch, **sigmas, clean=batch.clean, shift=3.0, generator=generator(4))
    on = update(danceopd, STUDENT, SOURCES, batch, **ROLLED, k=2, generator=generator(4))
    assert torch.equal(before.loss, off.loss)
    assert torch.equal(after.loss, on.loss)
