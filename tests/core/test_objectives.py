"""Losses, weights and where score distillation moves an estimate, against independent derivations."""

import pytest
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from hypothesis import given, settings
from hypothesis import strategies as st

from danceopd.core.fields import Answers
from danceopd.core.objectives import (
    WEIGHTINGS,
    distillation_move,
    mode_density,
    noised,
    renoised,
    velocity_loss,
    velocity_mse,
    weighting,
)
from danceopd.core.questions import Questions


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(0, 2**40))
def test_the_squared_error_is_each_samples_own_and_does_not_reach_the_target(n, seed):
    velocity, target = (normal(n, 2, 3, seed=seed + i).requires_grad_() for i in range(2))
    loss = velocity_mse(velocity, target)
    for i in range(n):
        expected = torch.nn.functional.mse_loss(velocity[i].double(), target[i].double())
        assert loss[i].item() == pytest.approx(expected.item(), rel=1e-5)
    loss.sum().backward()
    torch.testing.assert_close(velocity.grad, (velocity - target).detach() / 3)
    assert target.grad is None


def test_the_squared_error_is_taken_in_float32():
    velocity = torch.ones(1, 64, dtype=torch.bfloat16)
    loss = velocity_mse(velocity, torch.full((1, 64), 1.0 + 2**-12))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(2**-24, rel=1e-6)
    with pytest.raises(ValueError, match="differ in shape"):
        velocity_mse(normal(4, 2, 3), normal(4, 1, 3))


@pytest.mark.parametrize("name", ["sigma_sqrt", "cosmap"])
def test_weights_that_diffusers_has_too(name):
    sigma = torch.linspace(0.02, 1, 50)
    ours = weighting(name, sigma, sigma / 2)
    torch.testing.assert_close(ours, compute_loss_weighting_for_sd3(name, sigma), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["logit_normal", "mode"])
def test_densities_are_those_that_diffusers_draws_from(name):
    torch.manual_seed(0)
    drawn = compute_density_for_timestep_sampling(name, 200_000, logit_mean=0.0, logit_std=1.0, mode_scale=1.29)
    counts = torch.histc(drawn, 20, 0, 1) / len(drawn) * 20
    fine = weighting(name, (torch.arange(2000) + 0.5) / 2000, torch.zeros(2000)).view(20, 100).mean(1)
    inside = slice(1, 19)
    torch.testing.assert_close(fine[inside], counts[inside], rtol=0.05, atol=0.02)
    assert float(fine.mean()) == pytest.approx(1, abs=0.02)


def test_mode_density_is_the_inverse_slope():
    u = torch.linspace(0.05, 0.95, 19, dtype=torch.float64, requires_grad=True)
    sigma = 1 - u - 1.29 * (torch.cos(torch.pi * u / 2) ** 2 - 1 + u)
    (slope,) = torch.autograd.grad(sigma.sum(), u)
    torch.testing.assert_close(mode_density(sigma.detach()), 1 / slope.abs(), rtol=1e-6, atol=1e-8)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.05, 1.0), st.floats(0.0, 0.9))
def test_kl_weight_is_half_the_squared_step(sigma, share):
    s, following = torch.tensor([sigma]), torch.tensor([sigma * share])
    assert float(weighting("kl", s, following)) == pytest.approx((sigma * share - sigma) ** 2 / 2, rel=1e-4, abs=1e-9)
    assert float(weighting("clean", s, following)) == pytest.approx(sigma**2, rel=1e-5)
    assert float(weighting("mse", s, following)) == 1


def test_every_weight_is_finite_on_a_rollouts_levels_and_others_are_refused():
    sigma = torch.tensor([1.0, 0.9, 0.5, 0.1])
    for name in WEIGHTINGS:
        weight = weighting(name, sigma, torch.tensor([0.9, 0.5, 0.1, 0.0]))
        assert torch.isfinite(weight).all()
        assert (weight >= 0).all()
    with pytest.raises(ValueError, match="sigma_sqrt"):
        weighting("cosine", sigma, sigma)


def test_noised_pictures_lie_between_the_picture_and_its_noise():
    clean, noise, sigma = normal(3, 2, 4, 4), normal(3, 2, 4, 4, seed=1), torch.tensor([0.0, 0.5, 1.0])
    states = noised(clean, noise, sigma)
    torch.testing.assert_close(states, torch.stack([clean[0], (clean[1] + noise[1]) / 2, noise[2]]))


def questions_of(answers: Answers, weight) -> Questions:
    n = len(answers)
    rest = dict.fromkeys(("states", "sigma", "conditioning", "route", "sample"))
    return Questions(**rest, answers=answers, weight=torch.as_tensor(weight).expand(n))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(0, 2**40), st.booleans(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_the_loss_gathers_guides_weighs_and_watches(n, seed, guided, dtype):
    """Answers of two forwards, in any order, some of them guided, against float64 on a target written out."""
    g = torch.Generator().manual_seed(seed)
    forwards = [normal(2 * n, 3, 5, seed=seed + i).to(dtype) for i in range(2)]
    network, row, uncond_row = (torch.randint(high, (n,), generator=g) for high in (2, 2 * n, 2 * n))
    scale = torch.where(torch.rand(n, generator=g) < 0.5, 1.0, 1 + 4 * torch.rand(n, generator=g))
    uncond_row = torch.where(scale == 1, row, uncond_row)
    answers = Answers(forwards, network, row, *((uncond_row, scale) if guided else ()))
    velocity, weight = normal(n, 3, 5, seed=seed + 9).requires_grad_(), torch.rand(n, generator=g) + 0.1
    cond, uncond = (torch.stack([forwards[m][r] for m, r in zip(network, rows, strict=True)]).double()
                    for rows in (row, uncond_row))  # fmt: skip
    target = uncond + scale.double()[:, None, None] * (cond - uncond) if guided else cond
    found = velocity_loss(velocity, questions_of(answers, weight))
    error = (velocity.detach().double() - target).square().flatten(1).mean(1)
    for ours, expected in (
        (found.loss.detach(), weight.double() * error),
        (found.error, error),
        (found.velocity_norm, velocity.detach().double().flatten(1).norm(dim=1)),
        (found.target_norm, target.flatten(1).norm(dim=1)),
        (answers.target(), target),
    ):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)
    found.loss.sum().backward()
    by_hand = 2 * weight.double()[:, None, None] * (velocity.detach().double() - target) / 15
    torch.testing.assert_close(velocity.grad.double(), by_hand, rtol=1e-5, atol=1e-5)


def test_renoised_states_hold_their_estimate_and_noise():
    clean = normal(5, 3, 4, 4)
    states, sigma, noise = renoised(clean, torch.Generator().manual_seed(0))
    s = sigma.view(-1, 1, 1, 1)
    torch.testing.assert_close(states, (1 - s) * clean + s * noise)
    assert ((sigma >= 0.02) & (sigma <= 0.98)).all()


def test_renoised_levels_are_uniform_and_their_noise_is_fresh():
    clean = 3 + normal(4000, 4)
    _, sigma, noise = renoised(clean, torch.Generator().manual_seed(1))
    uniform = (sigma.double().sort().values - 0.02) / 0.96
    assert (uniform - (torch.arange(4000) + 0.5) / 4000).abs().max() < 1.95 / 4000**0.5  # Kolmogorov, 0.1 %
    assert noise.mean().item() == pytest.approx(0, abs=4 / 16_000**0.5)
    assert noise.std().item() == pytest.approx(1, abs=4 / 16_000**0.5)
    assert abs(torch.stack([noise.flatten(), clean.flatten()]).corrcoef()[0, 1]) < 4 / 16_000**0.5


@pytest.mark.parametrize("with_fake", [False, True])
def test_score_distillation_moves_the_estimate_to_the_teachers(with_fake):
    """By hand: the teacher's clean estimate minus the fake's, over the teacher's mean distance."""
    clean = normal(3, 2, 4, 4)
    z, sigma, noise = renoised(clean, torch.Generator().manual_seed(0))
    s = sigma.view(-1, 1, 1, 1)
    real, data = normal(3, 2, 4, 4, seed=5), noise - clean
    other = normal(3, 2, 4, 4, seed=6) if with_fake else data
    of_teacher, of_other = z - s * real, z - s * other
    distance = (clean - of_teacher).abs().flatten(1).mean(1).view(-1, 1, 1, 1)
    move = distillation_move(real, other, data, sigma)
    torch.testing.assert_close(move, (of_teacher - of_other) / distance, rtol=1e-3, atol=1e-4)


def test_score_distillation_is_still_where_both_agree():
    velocity, data = normal(2, 1, 2, 2, seed=1), normal(2, 1, 2, 2, seed=2)
    assert not distillation_move(velocity, velocity, data, torch.tensor([0.3, 0.6])).any()
