"""The noise levels and the rollout, against diffusers' scheduler and fields with a known flow."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from danceopd.core.conditioning import Conditioning
from danceopd.core.fields import counted, guided
from danceopd.core.rollout import SOLVERS, rollout, rollout_by_route, sample
from danceopd.core.schedule import shift_sigma, sigma_grid
from danceopd.world.dit import DiT, DiTConfig


def condition(n: int, length: int = 4, source: torch.Tensor | None = None) -> Conditioning:
    tokens = torch.arange(n * length).view(n, length) % 7
    return Conditioning(tokens, source, torch.full((n,), source is not None))


def curved(z, sigma, conditioning):
    """A field of nothing but products and sums, different for each sample's prompt and noise level."""
    shape = (-1, *(1,) * (z.dim() - 1))
    prompt = conditioning.prompt.float().mean(1).view(shape)
    return z * (0.5 - 0.2 * z) + 0.3 * prompt * sigma.view(shape)


def noise_of(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def every_index(n, steps):
    return torch.arange(steps + 1).expand(n, -1)


@pytest.fixture(scope="module")
def dit():
    torch.manual_seed(0)
    model = DiT(DiTConfig(image_size=16, width=32, depth=2, heads=2))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model


def dit_condition(n):
    tokens = torch.randint(0, 400, (n, 10), generator=torch.Generator().manual_seed(1))
    return Conditioning(tokens, noise_of(n, 3, 16, 16, seed=2), torch.arange(n) % 2 == 0)


# Noise levels


@pytest.fixture(scope="module")
def scheduler_of():
    import diffusers

    def make(steps, shift):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
        return scheduler

    return make


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 5.0])
@pytest.mark.parametrize("steps", [1, 2, 7, 16, 50])
def test_grid_equals_diffusers(scheduler_of, steps, shift):
    ours = sigma_grid(steps, shift)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, scheduler_of(steps, shift).sigmas, atol=1e-6, rtol=0)


@given(steps=st.integers(1, 200), shift=st.floats(0.1, 20))
def test_grid_descends_from_one_to_zero(steps, shift):
    sigmas = sigma_grid(steps, shift)
    assert sigmas.shape == (steps + 1,)
    assert sigmas[0] == 1
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()


@given(shift=st.floats(0.1, 20), sigma=st.floats(0, 1))
def test_shift_undone_by_its_inverse(shift, sigma):
    there = shift_sigma(torch.tensor(sigma, dtype=torch.float64), shift)
    assert shift_sigma(there, 1 / shift).item() == pytest.approx(sigma, abs=1e-9)
    assert (there >= sigma - 1e-12) == (shift >= 1) or there == pytest.approx(sigma, abs=1e-9)


@pytest.mark.parametrize(("steps", "shift"), [(0, 1.0), (-3, 1.0), (4, 0.0), (4, -1.0), (4, math.nan), (4, math.inf)])
def test_grid_refuses(steps, shift):
    with pytest.raises(ValueError, match="must be"):
        sigma_grid(steps, shift)


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_euler_equals_diffusers_step_by_step(scheduler_of, shift):
    steps, n = 8, 3
    scheduler, c, z = scheduler_of(steps, shift), condition(n), noise_of(n, 3, 4, 4)
    states, sigmas = rollout(curved, z, c, sigma_grid(steps, shift), every_index(n, steps))
    for i, t in enumerate(scheduler.timesteps):
        torch.testing.assert_close(states[:, i], z, atol=1e-6, rtol=1e-6)
        z = scheduler.step(curved(z, sigmas[:, i], c), t, z).prev_sample
    torch.testing.assert_close(states[:, steps], z, atol=1e-6, rtol=1e-6)


# Which states come back


@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 9), st.sampled_from(SOLVERS), st.data())
def test_states_are_those_of_the_full_rollout(n, k, steps, solver, data):
    """Bit for bit for an elementwise field, in the order of the samples, repeated and zero indices too."""
    flat = data.draw(st.lists(st.integers(0, steps), min_size=n * k, max_size=n * k))
    until, z, c, sigmas = (
        torch.tensor(flat).view(n, k),
        noise_of(n, 3, 4, 4),
        condition(n),
        sigma_grid(steps, 3),
    )
    full, _ = rollout(curved, z, c, sigmas, every_index(n, steps), solver)
    states, levels = rollout(curved, z, c, sigmas, until, solver)
    assert states.shape == (n, k, 3, 4, 4)
    assert torch.equal(states, full[torch.arange(n)[:, None], until])
    assert torch.equal(levels, sigmas[until])
    assert torch.equal(full[:, 0], z)


@pytest.mark.parametrize("solver", SOLVERS)
def test_network_states_at_equal_depth_are_bit_identical(dit, solver):
    n, steps = 6, 5
    z, c, sigmas = noise_of(n, 3, 16, 16), dit_condition(n), sigma_grid(steps, 5)
    full, _ = rollout(dit, z, c, sigmas, every_index(n, steps), solver)
    for depth in range(steps + 1):
        states, _ = rollout(dit, z, c, sigmas, torch.full((n, 1), depth), solver)
        assert torch.equal(states[:, 0], full[:, depth])


@pytest.mark.parametrize("solver", SOLVERS)
def test_network_states_at_mixed_depths_agree(dit, solver):
    """A matrix product may take another kernel for a smaller batch, so not bit for bit."""
    n, steps = 6, 5
    z, c, sigmas = noise_of(n, 3, 16, 16), dit_condition(n), sigma_grid(steps, 5)
    full, _ = rollout(dit, z, c, sigmas, every_index(n, steps), solver)
    until = torch.tensor([[0], [5], [2], [2], [4], [1]])
    states, _ = rollout(dit, z, c, sigmas, until, solver)
    torch.testing.assert_close(states[:, 0], full[torch.arange(n), until[:, 0]], atol=1e-5, rtol=1e-5)
    for i in range(n):  # and each sample alone
        alone, _ = rollout(dit, z[i : i + 1], c[i : i + 1], sigmas, until[i : i + 1], solver)
        torch.testing.assert_close(states[i], alone[0], atol=1e-5, rtol=1e-5)


@given(st.lists(st.lists(st.integers(0, 6), min_size=2, max_size=2), min_size=1, max_size=6))
def test_number_of_evaluations(until):
    steps, until = 6, torch.tensor(until)
    depth = until.amax(1)
    heun = (2 * depth - (depth == steps).long()).sum()
    for solver, expected in (("euler", depth.sum()), ("heun", heun), ("ab2", depth.sum())):
        counter = Counter()
        field = counted(curved, counter, "field")
        rollout(field, noise_of(len(until), 3), condition(len(until)), sigma_grid(steps), until, solver)
        assert counter["field"] == expected


def test_sample_is_the_last_state():
    z, c, sigmas = noise_of(4, 3), condition(4), sigma_grid(6, 5)
    for solver in SOLVERS:
        states, _ = rollout(curved, z, c, sigmas, every_index(4, 6), solver)
        assert torch.equal(sample(curved, z, c, sigmas, solver), states[:, -1])


def test_no_gradient_reaches_the_rollout(dit):
    z = noise_of(4, 3, 16, 16).requires_grad_()
    states, sigmas = rollout(dit, z, dit_condition(4), sigma_grid(4), torch.tensor([[1], [0], [4], [2]]))
    assert not states.requires_grad
    assert not sigmas.requires_grad
    assert z.grad is None
    assert all(p.grad is None for p in dit.parameters())
    assert torch.is_grad_enabled()
    velocity = dit(states[:3, 0], sigmas[:3, 0].clamp(min=0.1), dit_condition(3))  # the query itself does learn
    assert velocity.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_is_left_as_it_was(dtype):
    z = noise_of(4, 3).to(dtype)
    before = z.clone()
    until = torch.tensor([[0, 3], [3, 3], [1, 2], [0, 0]])
    states, _ = rollout(curved, z, condition(4), sigma_grid(3), until)
    states.zero_()
    assert torch.equal(z, before)
    assert states.dtype == torch.float32


@pytest.mark.parametrize(
    ("until", "solver", "message"),
    [([[5]], "euler", "indices"), ([[-1]], "euler", "indices"), ([[2]], "midpoint", "unknown solver")],
)
def test_rollout_refuses(until, solver, message):
    with pytest.raises(ValueError, match=message):
        rollout(curved, noise_of(1, 3), condition(1), sigma_grid(4), torch.tensor(until), solver)


@pytest.mark.parametrize("depths", [[4, 4, 4], [1, 2, 3], [3, 3, 2], [0, 1, 1], [1, 0, 4]])
def test_each_sample_keeps_its_own_guidance(depths):
    z, c, sigmas, until = noise_of(3, 3), condition(3), sigma_grid(4), torch.tensor(depths)[:, None]
    empty, c.guidance_scale = torch.zeros(4, dtype=torch.int64), torch.tensor([0.0, 3.0, 7.0])
    together, _ = rollout(guided(curved, empty), z, c, sigmas, until)
    for i, scale in enumerate((0.0, 3.0, 7.0)):
        one = slice(i, i + 1)
        alone, _ = rollout(guided(curved, empty, scale), z[one], c[one], sigmas, until[one])
        torch.testing.assert_close(together[one], alone)


@pytest.mark.parametrize("depths", [[1, 2, 3], [3, 3, 2], [0, 1, 1], [0, 4, 0]])
def test_a_fixed_row_of_scales_cannot_follow_mixed_depths(depths):
    field = guided(curved, torch.zeros(4, dtype=torch.int64), torch.tensor([1.0, 3.0, 7.0]))
    with pytest.raises(ValueError, match="3 guidance scales for a batch of"):
        rollout(field, noise_of(3, 3), condition(3), sigma_grid(4), torch.tensor(depths)[:, None])


# Trajectories that go on where they are


def whole_cells(n, steps):
    """Starts and, for each, an index not before it."""
    start = st.lists(st.integers(0, steps), min_size=n, max_size=n)
    return start.flatmap(lambda s: st.tuples(st.just(s), st.tuples(*(st.integers(i, steps) for i in s))))


@given(st.integers(1, 6), st.integers(1, 8), st.sampled_from(["euler", "heun"]), st.data())
def test_going_on_equals_the_full_rollout(n, steps, solver, data):
    """Bit for bit, and the field is asked for the steps in between alone, never with an empty batch."""
    start, until = (torch.tensor(x) for x in data.draw(whole_cells(n, steps)))
    z, c, sigmas = noise_of(n, 3, 4, 4), condition(n), sigma_grid(steps, 3.0)
    full, _ = rollout(curved, z, c, sigmas, every_index(n, steps), solver)
    sizes = []

    def watched(latents, sigma, conditioning):
        sizes.append(len(latents))
        return curved(latents, sigma, conditioning)

    states, levels = rollout(watched, full[torch.arange(n), start], c, sigmas, until[:, None], solver, start)
    assert torch.equal(states[:, 0], full[torch.arange(n), until])
    assert torch.equal(levels[:, 0], sigmas[until])
    ended = ((until == steps) & (start < steps)).sum()
    assert sum(sizes) == ((until - start).sum() if solver == "euler" else 2 * (until - start).sum() - ended)
    assert 0 not in sizes


def test_a_network_goes_on_past_a_gap_in_which_none_is_under_way(dit):
    n, steps = 2, 6
    z, c, sigmas = noise_of(n, 3, 16, 16), dit_condition(n), sigma_grid(steps, 5)
    start, until = torch.tensor([0, 4]), torch.tensor([2, 6])
    full, _ = rollout(dit, z, c, sigmas, every_index(n, steps))
    states, _ = rollout(dit, full[torch.arange(n), start], c, sigmas, until[:, None], "euler", start)
    torch.testing.assert_close(states[:, 0], full[torch.arange(n), until], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("start", "until"), [([3], [[2]]), ([-1], [[2]]), ([1], [[3, 0]])])
def test_no_index_before_the_start(start, until):
    with pytest.raises(ValueError, match="cannot start after"):
        rollout(curved, noise_of(1, 3), condition(1), sigma_grid(4), torch.tensor(until), start=torch.tensor(start))


@given(st.integers(1, 8), st.sampled_from(SOLVERS), st.data())
def test_each_route_rolls_out_its_own_field(n, solver, data):
    steps, fields = 5, [lambda z, s, c, gain=gain: gain * curved(z, s, c) for gain in (1.0, -1.0, 0.5)]
    route = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=n, max_size=n)))
    until = torch.tensor(data.draw(st.lists(st.integers(0, steps), min_size=2 * n, max_size=2 * n))).view(n, 2)
    z, c, sigmas = noise_of(n, 3), condition(n), sigma_grid(steps, 3.0)
    counter = Counter()
    counting = [counted(field, counter, m) for m, field in enumerate(fields)]
    states, levels = rollout_by_route(counting, route, z, c, sigmas, until, solver)
    assert torch.equal(levels, sigmas[until])
    for i, m in enumerate(route.tolist()):
        own, _ = rollout(fields[m], z[i : i + 1], c[i : i + 1], sigmas, until[i : i + 1], solver)
        torch.testing.assert_close(states[i], own[0])
    if solver != "heun":
        for m in range(3):
            assert counter[m] == until[route == m].amax(1).sum()


# Accuracy of the solvers


@pytest.mark.parametrize(("solver", "ratio", "fewest"), [("euler", 2.0, 16), ("heun", 4.0, 16), ("ab2", 4.0, 64)])
@pytest.mark.parametrize("end", [0.0, 0.1])
def test_order_of_the_solver(solver, ratio, fewest, end):
    """dz = a z d sigma gives z exp(a (sigma - 1)); halving the step divides the error by 2^order."""
    a, z = 1.5, noise_of(5, 3)
    errors = []
    for steps in (fewest, 2 * fewest, 4 * fewest):
        sigmas = torch.linspace(1, end, steps + 1)
        result = sample(lambda z, sigma, c: a * z, z, condition(5), sigmas, solver)
        errors.append((result - z * math.exp(a * (end - 1))).norm().item())
    assert errors[0] / errors[1] == pytest.approx(ratio, rel=0.12)
    assert errors[1] / errors[2] == pytest.approx(ratio, rel=0.08)


@given(st.floats(0.3, 6.0), st.integers(2, 12), st.integers(0, 2**40))
def test_ab2_is_exact_where_the_velocity_is_linear_in_time(shift, steps, seed):
    """On even (shift 1) and uneven grids, from the second step on; the first has nothing to extrapolate from."""
    a, b = noise_of(2, 3, seed=seed), noise_of(2, 3, seed=seed + 1)
    for sigmas in (sigma_grid(steps, 1.0), sigma_grid(steps, shift)):
        states, _ = rollout(
            lambda z, s, c: a + b * s[:, None], noise_of(2, 3), condition(2), sigmas, every_index(2, steps), "ab2"
        )
        expected = a[:, None] * sigmas[:, None] + b[:, None] * sigmas[:, None] ** 2 / 2
        torch.testing.assert_close(states[:, 1:].diff(dim=1), expected[:, 1:].diff(dim=1), atol=2e-6, rtol=1e-4)
        euler = (a + b) * (sigmas[1] - 1)
        torch.testing.assert_close(states[:, 1] - states[:, 0], euler, atol=2e-6, rtol=1e-4)


@given(st.integers(2, 8), st.data())
def test_ab2_starts_anew_where_it_goes_on(steps, data):
    """Whatever the other trajectories do: a late one's steps are those of a grid that begins there."""
    n, sigmas = 4, sigma_grid(steps, 3.0)
    start, until = (torch.tensor(x) for x in data.draw(whole_cells(n, steps)))
    z, c = noise_of(n, 3), condition(n)
    states, _ = rollout(curved, z, c, sigmas, until[:, None], "ab2", start)
    for i, (first, last) in enumerate(zip(start.tolist(), until.tolist(), strict=True)):
        previous, now = None, z[i : i + 1]
        for j in range(first, last):  # the two-step formula for uneven steps, one sample at a time
            dt, v = sigmas[j + 1] - sigmas[j], curved(now, sigmas[j : j + 1], c[i : i + 1])
            slope = 0 if previous is None else (v - previous) / (sigmas[j] - sigmas[j - 1])
            previous, now = v, now + dt * v + dt**2 / 2 * slope
        torch.testing.assert_close(states[i], now, atol=1e-5, rtol=1e-4)


MEAN, STD = 0.7, 0.3


def gaussian_field(z, sigma, conditioning):
    """E[eps - x | z] for data N(MEAN, STD^2), in closed form."""
    sigma = sigma[:, None]
    variance = (1 - sigma) ** 2 * STD**2 + sigma**2
    return -MEAN + (sigma - (1 - sigma) * STD**2) / variance * (z - (1 - sigma) * MEAN)


def gaussian_solution(z1, sigma):
    return (1 - sigma) * MEAN + ((1 - sigma) ** 2 * STD**2 + sigma**2) ** 0.5 * z1


def test_gaussian_flow_is_recovered():
    z, steps = noise_of(64, 2), 1000
    errors = {}
    for solver, n in (("euler", 4 * steps), ("heun", steps), ("euler", 20), ("heun", 20)):
        until = torch.tensor([n // 4, n // 2, n]).expand(64, 3)
        states, sigmas = rollout(gaussian_field, z, condition(64), sigma_grid(n, 1.0), until, solver)
        error = (states - gaussian_solution(z[:, None], sigmas[..., None])).abs().max().item()
        errors[solver, n] = error
    assert errors["euler", 4 * steps] < 1e-3
    assert errors["heun", steps] < 1e-4
    assert errors["heun", 20] < errors["euler", 20] / 5
    assert errors["euler", 20] > 1e-3  # coarse steps are seen to be coarse
