"""The stochastic rollout's Gaussian steps against torch.distributions and closed forms."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from danceopd.core.conditioning import Conditioning
from danceopd.core.rollout import rollout
from danceopd.core.schedule import sigma_grid
from danceopd.core.sde import kl, log_probability, sde_rollout, transition

SIGMAS = sigma_grid(8, 3.0)


def condition(n):
    return Conditioning(torch.zeros(n, 4, dtype=torch.int64), None, torch.zeros(n, dtype=torch.bool))


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 7), st.floats(0.05, 1.5))
def test_the_step_is_that_of_flow_grpo(index, noise_level):
    """Written out in float64 as one published formula, state by state."""
    z, v = normal(3, 2, 4, 4).double(), normal(3, 2, 4, 4, seed=1).double()
    sigmas = SIGMAS.double()
    mean, deviation = transition(v, z, torch.full((3,), index), sigmas, noise_level)
    t, dt = float(sigmas[index]), float(sigmas[index + 1] - sigmas[index])
    std = noise_level * (t / (1 - (float(sigmas[1]) if t == 1 else t))) ** 0.5
    drift = v.float() + std**2 / (2 * t) * (z + (1 - t) * v.float())
    torch.testing.assert_close(mean, z + drift * dt, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(deviation, torch.full((3,), std * (-dt) ** 0.5, dtype=torch.float64))


def test_without_noise_it_is_eulers_step():
    z, v = normal(2, 3, 4, 4), normal(2, 3, 4, 4, seed=1)
    mean, deviation = transition(v, z, torch.tensor([0, 5]), SIGMAS, 0.0)
    dt = (SIGMAS[[1, 6]] - SIGMAS[[0, 5]]).view(-1, 1, 1, 1)
    torch.testing.assert_close(mean, z + dt * v)
    assert not deviation.any()


@settings(max_examples=20, deadline=None)
@given(st.floats(0.01, 3.0), st.integers(0, 1000))
def test_log_probability_and_kl_are_those_of_normal_distributions(scale, seed):
    value, mean, other = (normal(4, 3, 5, 5, seed=seed + i) for i in range(3))
    deviation = scale * torch.tensor([0.5, 1.0, 1.5, 2.0])
    d = deviation.view(-1, 1, 1, 1)
    expected = Normal(mean.double(), d.double()).log_prob(value.double()).flatten(1).mean(1)
    torch.testing.assert_close(log_probability(value, mean, deviation).double(), expected, rtol=1e-4, atol=1e-4)
    expected = kl_divergence(Normal(mean.double(), d.double()), Normal(other.double(), d.double()))
    torch.testing.assert_close(kl(mean, other, deviation).double(), expected.flatten(1).mean(1), rtol=1e-4, atol=1e-4)


def test_many_small_steps_keep_the_marginal_of_the_ode():
    """Data N(2, 0.5^2): the field is known, and the end of either rollout has the data's mean and deviation."""
    mu, s = 2.0, 0.5

    def field(z, sigma, _):
        t = sigma.view(-1, 1)
        variance = ((1 - t) * s) ** 2 + t**2
        score_mean = mu + (1 - t) * s**2 / variance * (z - (1 - t) * mu)  # E[x | z]
        noise_mean = t / variance * (z - (1 - t) * mu)  # E[eps | z]
        return noise_mean - score_mean

    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4000, 1, generator=generator)
    sigmas = torch.cat([torch.linspace(1, 0.02, 200), torch.zeros(1)])
    states, _, _ = sde_rollout(field, noise, condition(4000), sigmas, 0.7, generator)
    assert float(states[:, -1].mean()) == pytest.approx(mu, abs=0.03)
    assert float(states[:, -1].std()) == pytest.approx(s, abs=0.03)
    assert float(states[:, 100].std()) > 0.1  # and it was stochastic on the way
    assert not torch.allclose(states[:, 1] - states[:, 0], states[:, 2] - states[:, 1])


def test_the_rollout_returns_its_own_log_densities():
    def field(z, sigma, _):
        return 0.3 * z

    states, _, densities = sde_rollout(
        field, normal(5, 2, 3), condition(5), SIGMAS, 0.7, torch.Generator().manual_seed(3)
    )
    assert states.shape == (5, 9, 2, 3)
    assert densities.shape == (5, 8)
    for i in range(8):
        z = states[:, i]
        mean, deviation = transition(0.3 * z, z, torch.full((5,), i), SIGMAS, 0.7)
        torch.testing.assert_close(log_probability(states[:, i + 1], mean, deviation), densities[:, i])


def test_steps_are_drawn_from_the_gaussians_they_are_said_to_be_drawn_from():
    """Residuals of every step and entry are standard normal and independent of each other."""
    n, g = 4000, torch.Generator().manual_seed(1)
    states, _, _ = sde_rollout(lambda z, sigma, _: z.sin() + sigma[:, None], normal(n, 2), condition(n), SIGMAS, 0.7, g)
    residuals = []
    for i in range(8):
        z = states[:, i]
        mean, deviation = transition(z.sin() + SIGMAS[i], z, torch.full((n,), i), SIGMAS, 0.7)
        residuals.append((states[:, i + 1] - mean) / deviation[:, None])
    residuals = torch.cat(residuals, 1)
    assert residuals.mean().item() == pytest.approx(0, abs=4 / math.sqrt(16 * n))
    assert residuals.std().item() == pytest.approx(1, abs=4 / math.sqrt(16 * n))
    assert (residuals.T.corrcoef() - torch.eye(16)).abs().max() < 5 / math.sqrt(n)


def test_the_marginals_agree_with_the_odes_all_the_way():
    """Data N(0.7, 0.3^2), known in closed form at every level; yet the end hardly knows where it started."""
    n, steps, mu, s = 10_000, 400, 0.7, 0.3

    def field(z, sigma, _):
        t = sigma[:, None]
        return -mu + (t - (1 - t) * s**2) / ((1 - t) ** 2 * s**2 + t**2) * (z - (1 - t) * mu)

    noise, sigmas, asked = normal(n, 1), sigma_grid(steps, 1.0), torch.tensor([100, 200, 300, 400])
    stochastic, _, _ = sde_rollout(field, noise, condition(n), sigmas, 0.7, torch.Generator().manual_seed(2))
    ode, _ = rollout(field, noise, condition(n), sigmas, asked.expand(n, -1))
    for i, index in enumerate(asked.tolist()):
        t = sigmas[index].item()
        std = math.sqrt((1 - t) ** 2 * s**2 + t**2)
        for z in (stochastic[:, index, 0], ode[:, i, 0]):
            assert z.mean().item() == pytest.approx((1 - t) * mu, abs=4 * std / math.sqrt(n) + 0.003)
            assert z.std().item() == pytest.approx(std, rel=0.03)
    kept = [torch.stack([noise[:, 0], z[:, -1].flatten()]).corrcoef()[0, 1] for z in (stochastic, ode)]
    assert abs(kept[0]) < 0.3
    assert kept[1] > 0.999
