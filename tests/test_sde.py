"""The stochastic rollout, against torch.distributions, Flow-GRPO's formulas in float64 and a known flow."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from danceopd.conditioning import Conditioning
from danceopd.rollout import rollout
from danceopd.schedule import sigma_grid
from danceopd.sde import kl, log_probability, sde_rollout, transition

STEPS = st.integers(2, 20)
SHIFT = st.floats(0.5, 6)
LEVEL = st.floats(0.1, 1.5)
SEED = st.integers(0, 2**40)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


def condition(n):
    return Conditioning(torch.zeros(n, 1, dtype=torch.int64), None, torch.zeros(n, dtype=torch.bool))


def flow_grpo(velocity, z, sigma, next_sigma, second, noise_level):
    """Flow-GRPO's step for one sample, as its eq. 9 and its code have it: mean and deviation in float64."""
    velocity, z = velocity.double(), z.double()
    dt = next_sigma - sigma
    std = math.sqrt(sigma / (1 - (second if sigma == 1 else sigma))) * noise_level
    mean = z * (1 + std**2 / (2 * sigma) * dt) + velocity * (1 + std**2 * (1 - sigma) / (2 * sigma)) * dt
    return mean, std * math.sqrt(-dt)


@given(STEPS, SHIFT, LEVEL, SEED)
def test_transition_is_flow_grpos(steps, shift, noise_level, seed):
    """At every index, in any order of the indices."""
    sigmas = sigma_grid(steps, shift)
    index = torch.randperm(steps, generator=generator(seed))
    z, velocity = randn(steps, 2, 3, seed=seed), randn(steps, 2, 3, seed=seed + 1)
    mean, deviation = transition(velocity, z, index, sigmas, noise_level)
    assert deviation.shape == (steps,)
    levels = sigmas.double().tolist()
    for row, i in enumerate(index.tolist()):
        expected = flow_grpo(velocity[row], z[row], levels[i], levels[i + 1], levels[1], noise_level)
        torch.testing.assert_close(mean[row].double(), expected[0], atol=1e-5, rtol=1e-4)
        assert deviation[row].item() == pytest.approx(expected[1], rel=1e-5)


@given(st.integers(1, 20), SHIFT, SEED)
def test_without_noise_the_mean_is_eulers_step(steps, shift, seed):
    sigmas, index = sigma_grid(steps, shift), torch.arange(steps)
    z, velocity = randn(steps, 3, seed=seed), randn(steps, 3, seed=seed + 1)
    euler = z + velocity * sigmas.diff()[:, None]
    far = [(transition(velocity, z, index, sigmas, level)[0] - euler).norm() for level in (1e-1, 1e-2)]
    assert far[1] <= far[0] / 90 + 1e-6  # quadratically
    mean, deviation = transition(velocity, z, index, sigmas, 0.0)
    torch.testing.assert_close(mean, euler)
    assert not deviation.any()


@given(st.integers(1, 5), SEED)
def test_log_probability_is_that_of_a_normal(n, seed):
    mean, value = randn(n, 2, 3, seed=seed), randn(n, 2, 3, seed=seed + 1)
    deviation = 0.05 + torch.rand(n, generator=generator(seed))
    normal = torch.distributions.Normal(mean.double(), deviation.double()[:, None, None])
    expected = normal.log_prob(value.double()).mean((1, 2))
    torch.testing.assert_close(log_probability(value, mean, deviation).double(), expected, atol=1e-4, rtol=1e-5)


@given(st.integers(1, 5), SEED)
def test_kl_is_that_of_two_normals(n, seed):
    mean, other = randn(n, 2, 3, seed=seed), randn(n, 2, 3, seed=seed + 1)
    deviation = 0.05 + torch.rand(n, generator=generator(seed))
    a, b = (torch.distributions.Normal(m.double(), deviation.double()[:, None, None]) for m in (mean, other))
    expected = torch.distributions.kl_divergence(a, b).mean((1, 2))
    torch.testing.assert_close(kl(mean, other, deviation).double(), expected, atol=1e-6, rtol=1e-5)


def curved(z, sigma, c):
    return z.sin() + sigma[:, None] * z


def test_rollout_takes_the_transitions_and_tells_their_densities():
    """Each step's residual is standard normal, and its log density is that of the Gaussian it was drawn from."""
    n, steps, level = 4000, 6, 0.7
    sigmas, noise = sigma_grid(steps, 3.0), randn(n, 2)
    states, log_density = sde_rollout(curved, noise, condition(n), sigmas, level, generator(1))
    assert states.shape == (n, steps + 1, 2)
    assert torch.equal(states[:, 0], noise)
    residuals = []
    for i in range(steps):
        z = states[:, i]
        velocity = curved(z, sigmas[i].expand(n), None)
        mean, deviation = flow_grpo(velocity, z, sigmas[i].item(), sigmas[i + 1].item(), sigmas[1].item(), level)
        density = torch.distributions.Normal(mean, deviation).log_prob(states[:, i + 1].double()).mean(1)
        torch.testing.assert_close(log_density[:, i].double(), density, atol=1e-3, rtol=1e-4)
        residuals.append((states[:, i + 1] - mean) / deviation)
    residuals = torch.stack(residuals, 1).flatten(1)
    error = 4 / math.sqrt(residuals.numel())
    assert residuals.mean().item() == pytest.approx(0, abs=error)
    assert residuals.var().item() == pytest.approx(1, abs=2 * error)
    correlation = residuals.T.corrcoef() - torch.eye(2 * steps)
    assert correlation.abs().max() < 5 / math.sqrt(n)  # steps and entries are independent


def test_rollout_is_reproducible_and_without_gradient():
    gain = torch.nn.Parameter(torch.tensor(0.3))
    runs = [
        sde_rollout(lambda z, s, c: gain * z, randn(3, 2), condition(3), sigma_grid(4), 0.7, generator(seed))
        for seed in (5, 5, 6)
    ]
    assert torch.equal(runs[0][0], runs[1][0])
    assert not torch.equal(runs[0][0][:, 1:], runs[2][0][:, 1:])
    assert not any(x.requires_grad for x in runs[0])


MEAN, STD = 0.7, 0.3


def gaussian_field(z, sigma, c):
    """E[eps - x | z] for data N(MEAN, STD^2), in closed form."""
    sigma = sigma[:, None]
    variance = (1 - sigma) ** 2 * STD**2 + sigma**2
    return -MEAN + (sigma - (1 - sigma) * STD**2) / variance * (z - (1 - sigma) * MEAN)


def test_many_small_steps_keep_the_marginals_of_the_ode():
    """Both flows carry N(0, 1) to the data's distribution, and agree at every noise level on the way."""
    n, steps = 10_000, 400
    sigmas, noise = sigma_grid(steps, 1.0), randn(n, 1)
    stochastic, _ = sde_rollout(gaussian_field, noise, condition(n), sigmas, 0.7, generator(2))
    asked = torch.tensor([steps // 4, steps // 2, 3 * steps // 4, steps])
    ode, _ = rollout(gaussian_field, noise, condition(n), sigmas, asked.expand(n, -1))
    for i, index in enumerate(asked.tolist()):
        sigma, z = sigmas[index].item(), stochastic[:, index, 0]
        mean, std = (1 - sigma) * MEAN, math.sqrt((1 - sigma) ** 2 * STD**2 + sigma**2)
        assert z.mean().item() == pytest.approx(mean, abs=4 * std / math.sqrt(n) + 0.003)
        assert z.std().item() == pytest.approx(std, rel=0.03)
        assert ode[:, i, 0].mean().item() == pytest.approx(mean, abs=4 * std / math.sqrt(n) + 0.003)
        assert ode[:, i, 0].std().item() == pytest.approx(std, rel=0.03)
    # It is another way there: the end hardly knows where it started, where the ODE's is a function of it.
    correlation = torch.stack([noise[:, 0], stochastic[:, -1, 0]]).corrcoef()[0, 1]
    assert abs(correlation) < 0.3
    assert torch.stack([noise[:, 0], ode[:, -1, 0]]).corrcoef()[0, 1] > 0.999
