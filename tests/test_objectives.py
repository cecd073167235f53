"""The losses and their weights, against closed forms and diffusers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from danceopd.conditioning import Conditioning
from danceopd.objectives import (
    WEIGHTINGS,
    consistency,
    flow_matching,
    mode_density,
    renoised,
    score_distillation,
    velocity_mse,
    weighting,
)

SEED = st.integers(0, 2**40)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


def condition(n):
    """Each sample's only token is its number."""
    return Conditioning(torch.arange(n)[:, None], None, torch.zeros(n, dtype=torch.bool))


def levels(n, seed=0):
    """Noise levels and lower ones."""
    sigma = 0.05 + 0.95 * torch.rand(n, generator=generator(seed))
    return sigma, sigma * torch.rand(n, generator=generator(seed + 1))


# Squared error


@given(st.integers(1, 5), SEED)
def test_mse_is_each_samples_own(n, seed):
    velocity, target = randn(n, 2, 3, seed=seed).requires_grad_(), randn(n, 2, 3, seed=seed + 1).requires_grad_()
    loss = velocity_mse(velocity, target)
    for i in range(n):
        expected = torch.nn.functional.mse_loss(velocity[i].double(), target[i].double())
        assert loss[i].item() == pytest.approx(expected.item(), rel=1e-5)
    loss.sum().backward()
    torch.testing.assert_close(velocity.grad, (velocity - target).detach() / 3)
    assert target.grad is None


def test_mse_is_taken_in_float32():
    velocity = torch.full((1, 64), 1.0, dtype=torch.bfloat16)
    loss = velocity_mse(velocity, torch.full((1, 64), 1.0 + 2**-12))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(2**-24, rel=1e-6)


def test_mse_refuses_shapes_that_would_broadcast():
    with pytest.raises(ValueError, match="differ in shape"):
        velocity_mse(randn(4, 2, 3), randn(4, 1, 3))


# Weights


@pytest.fixture(scope="module")
def diffusers_training():
    from diffusers import training_utils

    return training_utils


@pytest.mark.parametrize("name", ["sigma_sqrt", "cosmap"])
def test_weights_of_sd3_equal_diffusers(diffusers_training, name):
    sigma = torch.linspace(0.01, 1, 50)
    ours = weighting(name, sigma, sigma / 2)
    expected = diffusers_training.compute_loss_weighting_for_sd3(name, sigma)
    torch.testing.assert_close(ours, expected, atol=0, rtol=1e-5)


@given(st.integers(1, 20), SEED)
def test_weights_with_a_closed_form(n, seed):
    sigma, following = levels(n, seed)
    assert torch.equal(weighting("mse", sigma, following), torch.ones(n))
    torch.testing.assert_close(weighting("clean", sigma, following), sigma**2)
    torch.testing.assert_close(weighting("kl", sigma, following), (sigma - following) ** 2 / 2)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_weights_are_positive_and_finite_on_a_whole_rollout(name):
    sigma = torch.linspace(1, 0, 17)
    weight = weighting(name, sigma[:-1], sigma[1:])
    assert weight.dtype == torch.float32
    assert (weight > 0).all()
    assert weight.isfinite().all()


def test_unknown_weighting():
    with pytest.raises(ValueError, match="unknown weighting 'msd'; use one of mse"):
        weighting("msd", torch.ones(1), torch.zeros(1))


@pytest.mark.parametrize("name", ["logit_normal", "mode"])
def test_densities_integrate_to_one_and_are_diffusers(diffusers_training, name):
    """Each bin of diffusers' draws holds what the density says, within five standard errors."""
    inner, draws, bins = 4000, 200_000, 20
    middle = (torch.arange(inner, dtype=torch.float64) + 0.5) / inner
    density = weighting(name, middle, middle).double()
    assert density.mean().item() == pytest.approx(1, abs=3e-3)
    torch.manual_seed(0)
    drawn = diffusers_training.compute_density_for_timestep_sampling(name, draws, 0.0, 1.0, 1.29)
    expected = density.view(bins, -1).mean(1) / bins
    share = torch.histc(drawn.float(), bins, 0, 1).double() / draws
    error = (expected * (1 - expected) / draws).sqrt()
    assert ((share - expected).abs() < 5 * error + 2e-4).all()
    assert ((share - 1 / bins).abs() > 10 * error).any()  # a flat density would not do


@given(st.floats(-0.9, 1.7), st.floats(0.02, 0.98))
def test_mode_density_is_the_inverses_slope(scale, u):
    """At sigma = f(u) the density is |du / d sigma|, here by a difference in float64."""

    def f(u):
        return 1 - u - scale * (math.cos(math.pi * u / 2) ** 2 - 1 + u)

    slope = (f(u + 1e-6) - f(u - 1e-6)) / 2e-6
    density = mode_density(torch.tensor([f(u)], dtype=torch.float64), scale).item()
    assert density == pytest.approx(1 / abs(slope), rel=1e-4)


# Flow matching and renoising


def curved(z, sigma, c):
    return z.sin() + sigma[:, None] + c.tokens


def test_flow_matching_by_hand():
    n = 5
    clean, noise, (sigma, _), c = randn(n, 3), randn(n, 3, seed=1), levels(n), condition(n)
    loss, velocity, target, states = flow_matching(curved, clean, noise, sigma, c)
    for i in range(n):
        s = sigma[i].item()
        z = (1 - s) * clean[i] + s * noise[i]
        estimate = z - s * curved(z[None], sigma[i : i + 1], c[i : i + 1])[0]
        assert loss[i].item() == pytest.approx((estimate - clean[i]).square().mean().item(), rel=1e-4)
        torch.testing.assert_close(states[i], z)
    assert torch.equal(target, noise - clean)
    torch.testing.assert_close(velocity, curved(states, sigma, c))


def test_renoised_estimates_are_mixed_with_fresh_standard_noise():
    clean = 3 + randn(4000, 4)
    states, sigma, noise = renoised(clean, generator(1))
    torch.testing.assert_close(states, (1 - sigma[:, None]) * clean + sigma[:, None] * noise)
    assert 0.02 <= sigma.min() <= 0.03
    assert 0.97 <= sigma.max() <= 0.98
    assert sigma.mean().item() == pytest.approx(0.5, abs=4 * 0.28 / 4000**0.5)
    assert noise.mean().item() == pytest.approx(0, abs=4 / 16_000**0.5)
    assert noise.std().item() == pytest.approx(1, abs=4 / 16_000**0.5)
    assert abs(torch.stack([noise.flatten(), clean.flatten()]).corrcoef()[0, 1]) < 4 / 16_000**0.5


# Score distillation


@given(st.integers(1, 5), SEED)
def test_score_distillation_moves_the_estimate_by_the_normalised_residual(n, seed):
    """The gradient at each estimate, by hand: sigma (real - other) over the mean distance to the teacher's estimate."""
    clean, real, other, noise = (randn(n, 2, 3, seed=seed + i) for i in range(4))
    sigma, _ = levels(n, seed)
    s = sigma[:, None, None]
    z = (1 - s) * clean + s * noise
    free = clean.clone().requires_grad_()
    score_distillation(free, real, other, noise - clean, sigma).sum().backward()
    for i in range(n):
        teacher, fake = (z[i] - sigma[i] * v[i] for v in (real, other))
        distance = (clean[i] - teacher).abs().mean()
        expected = (fake - teacher) / distance / clean[i].numel()
        torch.testing.assert_close(free.grad[i], expected, atol=1e-5, rtol=1e-3)


def test_score_distillation_rests_where_the_fields_agree():
    clean, velocity, (sigma, _) = randn(4, 3).requires_grad_(), randn(4, 3, seed=1), levels(4)
    loss = score_distillation(clean, velocity, velocity, randn(4, 3, seed=2), sigma)
    loss.sum().backward()
    assert loss.abs().max() == 0
    assert clean.grad.abs().max() == 0


def test_score_distillation_descends_to_the_teachers_estimate():
    """With the noise itself as the other field (SDS) the move points from the estimate to the teacher's."""
    clean, noise, (sigma, _) = randn(4, 3).requires_grad_(), randn(4, 3, seed=1), levels(4)
    goal, s = randn(4, 3, seed=2), sigma[:, None]
    z = (1 - s) * clean.detach() + s * noise
    real, data = (z - goal) / s, noise - clean.detach()
    score_distillation(clean, real, data, data, sigma).sum().backward()
    cosine = torch.nn.functional.cosine_similarity(-clean.grad, goal - clean.detach())
    torch.testing.assert_close(cosine, torch.ones(4))


# Consistency


def test_consistency_by_hand():
    """The average is asked one teacher's step nearer the data; at the last step the teacher's end is the goal."""
    n = 6
    z, target, velocity = randn(n, 3), randn(n, 3, seed=1), randn(n, 3, seed=2).requires_grad_()
    (sigma, following), c = levels(n), condition(n)
    following[[0, 3]] = 0.0
    asked = []

    def ema(latents, level, conditioning):
        asked.extend(conditioning.tokens[:, 0].tolist())
        return curved(latents, level, conditioning)

    loss = consistency(velocity, ema, z, sigma, following, c, target)
    for i in range(n):
        nearer = z[i] + (following[i] - sigma[i]) * target[i]
        goal = nearer
        if following[i] > 0:
            goal = nearer - following[i] * curved(nearer[None], following[i : i + 1], c[i : i + 1])[0]
        estimate = z[i] - sigma[i] * velocity[i]
        assert loss[i].item() == pytest.approx((estimate - goal).square().mean().item(), rel=1e-4)
    assert sorted(asked) == [1, 2, 4, 5]  # never at sigma 0
    loss.sum().backward()
    assert velocity.grad.abs().min() > 0


@given(st.integers(1, 6), SEED)
def test_consistency_is_zero_on_a_straight_flow_to_one_point(n, seed):
    (sigma, following), point = levels(n, seed), randn(3, seed=seed)
    following[0] = 0.0
    z = randn(n, 3, seed=seed + 1)

    def exact(latents, level, conditioning):
        return (latents - point) / level[:, None]

    velocity = exact(z, sigma, None)
    loss = consistency(velocity, exact, z, sigma, following, condition(n), velocity)
    assert loss.abs().max() < 1e-9
    moved = consistency(velocity + 0.1, exact, z, sigma, following, condition(n), velocity)
    torch.testing.assert_close(moved, (0.1 * sigma) ** 2, atol=1e-5, rtol=1e-2)
