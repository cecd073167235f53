"""Every method: its loss and gradient against a derivation by hand, and its run through the real loop."""

import copy
import io
import itertools
import json
import math
from collections import Counter, defaultdict

import pytest
import torch
from danceopd.core.methods.score_distillation import DMD, sds_loss
from hypothesis import assume, given
from hypothesis import strategies as st

from danceopd.config.reading import parse_config
from danceopd.core.batch import Batch
from danceopd.core.conditioning import Conditioning
from danceopd.core.fields import counted
from danceopd.core.methods import METHODS
from danceopd.core.methods.consistency import consistency_loss
from danceopd.core.methods.danceopd import danceopd_loss
from danceopd.core.methods.danceopd_fast import danceopd_fast_loss
from danceopd.core.methods.diffusion_opd import diffusion_opd_loss
from danceopd.core.methods.flow_opd import flow_opd_loss
from danceopd.core.methods.joint import joint_loss
from danceopd.core.methods.off_policy import off_policy_loss
from danceopd.core.methods.pooled import Pooled
from danceopd.core.query import query
from danceopd.core.randomness import sample_generators
from danceopd.core.schedule import shift_sigma, sigma_grid
from danceopd.core.sde import sde_rollout
from danceopd.support.errors import UserError
from danceopd.training.checkpoints import load_newest, save_state
from danceopd.training.loop import Trainer
from danceopd.world.build import build
from danceopd.world.data import write_world
from danceopd.world.dit import DiT, DiTConfig
from danceopd.world.files import save_model

SEED = st.integers(0, 2**40)
SIGMAS = sigma_grid(6, 3.0)
ROLLED = {"sigmas": SIGMAS, "solver": "euler", "bias": "mid_t"}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


def batch_of(n, routes=2, seed=0, size=3, first=0) -> Batch:
    """Samples whose only token is their number, counted from `first`; their routes in turn."""
    tokens = torch.arange(first, first + n)[:, None]
    conditioning = Conditioning(tokens, None, torch.zeros(n, dtype=torch.bool))
    return Batch(randn(n, size, seed=seed), conditioning, torch.arange(n) % routes, 2 + randn(n, size, seed=seed + 1))


def linear(theta):
    """A field of two parameters that differs from sample to sample."""
    return lambda z, sigma, c: theta[0] * z + theta[1] * sigma[:, None] + 0.1 * (c.prompt % 5)


def constant(value):
    return lambda z, sigma, c: torch.full_like(z, value)


def to_point(point):
    """The exact field of data that is this one point."""
    return lambda z, sigma, c: (z - point) / sigma[:, None]


STUDENT = linear(torch.tensor([0.8, -0.3]))
SOURCES = [linear(torch.tensor([0.2, 0.5])), linear(torch.tensor([-0.4, 0.1]))]


class Watched:
    """A field that remembers what it was asked."""

    def __init__(self, field):
        self.field, self.calls = field, []

    def __call__(self, z, sigma, c):
        self.calls.append((z.detach().clone(), sigma.clone(), c.prompt[:, 0].clone(), torch.is_grad_enabled()))
        return self.field(z, sigma, c)


def alone(field, batch, i, z, sigma):
    """The velocity of one sample of a batch at one state."""
    return field(z[None], torch.as_tensor(sigma)[None], batch.conditioning[i : i + 1])[0]


def euler(field, batch, i, sigmas):
    """Every state of one sample's trajectory, step by step."""
    states = [batch.noise[i]]
    for now, following in itertools.pairwise(sigmas):
        states.append(states[-1] + (following - now) * alone(field, batch, i, states[-1], now))
    return states


def close(a, b, rel=1e-4, atol=1e-6):
    torch.testing.assert_close(torch.as_tensor(a).double(), torch.as_tensor(b).double(), atol=atol, rtol=rel)


def through_disk(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


# DanceOPD


@pytest.mark.parametrize("routing", ["hard", "soft"])
@pytest.mark.parametrize("k", [1, 3])
def test_danceopd_by_hand(routing, k):
    """Each sample alone: its own trajectory, its source (or the mean of all), the mean error of its k queries."""
    batch = batch_of(7)
    seen = danceopd_loss(STUDENT, SOURCES, batch, **ROLLED, k=k, generator=generator(3), routing=routing)
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
    seen = danceopd_loss(linear(theta), SOURCES, batch, **ROLLED, k=2, generator=generator(1))
    seen.loss.mean().backward()
    error = 2 * (seen.velocity - seen.target).double() / seen.states.numel()
    close(theta.grad, [(error * seen.states).sum(), (error * SIGMAS[seen.depth][:, None]).sum()])


@pytest.mark.parametrize(("progress", "warm"), [(0.0, True), (0.49, True), (0.5, False), (1.0, False)])
def test_danceopd_starts_on_the_sources_trajectories(progress, warm):
    batch, sources = batch_of(9, routes=3), [constant(v) for v in (1.0, 2.0, 3.0)]
    seen = danceopd_loss(
        constant(-1.0), sources, batch, **ROLLED, k=1, generator=generator(), progress=progress, warm_start=0.5
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
    seen = danceopd_loss(STUDENT, SOURCES, batch, **common, generator=generator(2), objective=objective)
    inside = seen.depth > 0  # at sigma 1 a density may have no value
    error = (seen.velocity - seen.target).double().square().mean(1)
    weight = BY_HAND[objective](sigmas[seen.depth].double()[inside], sigmas[seen.depth + 1].double()[inside])
    close(seen.loss[inside], weight * error[inside], rel=2e-3)
    assert seen.loss.isfinite().all()


def test_danceopd_and_pooled_ask_where_the_gap_is():
    gap, batch = torch.tensor([0.0, 0, 0, 1, 0, 0]), batch_of(20)
    common = {"sigmas": SIGMAS, "solver": "euler", "bias": "gap", "generator": generator(), "gap": gap}
    assert (danceopd_loss(STUDENT, SOURCES, batch, k=2, **common).depth == 3).all()
    assert (Pooled(None)(STUDENT, SOURCES, batch, **common).depth == 3).all()


def test_danceopd_fast_is_off_policy_and_then_danceopd():
    batch, sigmas = batch_of(6), {"sigmas": SIGMAS, "solver": "euler"}
    common = {**ROLLED, "clean": batch.clean, "shift": 3.0, "k": 2, "warm_start": 0.3}
    before, after = (
        danceopd_fast_loss(STUDENT, SOURCES, batch, **common, generator=generator(4), progress=p) for p in (0.29, 0.3)
    )
    off = off_policy_loss(STUDENT, SOURCES, batch, **sigmas, clean=batch.clean, shift=3.0, generator=generator(4))
    on = danceopd_loss(STUDENT, SOURCES, batch, **ROLLED, k=2, generator=generator(4))
    assert torch.equal(before.loss, off.loss)
    assert torch.equal(after.loss, on.loss)


# Joint training and off-policy distillation


def test_joint_is_flow_matching_of_the_clean_estimate():
    batch, student, source = batch_of(8), Watched(STUDENT), Watched(SOURCES[0])
    seen = joint_loss(student, [source], batch, clean=batch.clean, shift=3.0, generator=generator(1))
    [(_, sigma, _, _)] = student.calls
    assert not source.calls
    for i in range(8):
        s = sigma[i]
        z = (1 - s) * batch.clean[i] + s * batch.noise[i]
        velocity = alone(STUDENT, batch, i, z, s)
        close(seen.loss[i], s**2 * (velocity - (batch.noise[i] - batch.clean[i])).square().mean())
        close(seen.states[i], z)
    drawn = joint_loss(student, [], batch_of(4000), clean=batch_of(4000).clean, shift=3.0, generator=generator(2))
    assert drawn.depth is None
    # Noise levels: the shift of a uniform draw, so that shifting back gives uniform ones.
    uniform = shift_sigma(student.calls[-1][1].double(), 1 / 3)
    close(uniform.sort().values, (torch.arange(4000) + 0.5) / 4000, atol=1.95 / 4000**0.5)


def test_joint_is_zero_for_the_exact_field_of_one_point():
    batch, point = batch_of(8), torch.tensor([0.3, -0.2, 1.0])
    common = {"clean": point.expand(8, 3), "shift": 3.0, "generator": generator()}
    assert joint_loss(to_point(point), [], batch, **common).loss.max() < 1e-9
    close(joint_loss(to_point(point + 0.1), [], batch, **common).loss, torch.full((8,), 0.01), rel=1e-3)


def test_off_policy_asks_the_teacher_at_noised_data():
    batch, student = batch_of(8), Watched(STUDENT)
    common = {"clean": batch.clean, "sigmas": SIGMAS, "shift": 3.0, "solver": "euler"}
    seen = off_policy_loss(student, SOURCES, batch, **common, generator=generator(1))
    [(_, sigma, _, _)] = student.calls
    for i in range(8):
        s = sigma[i]
        z = (1 - s) * batch.clean[i] + s * batch.noise[i]
        velocity, target = (alone(f, batch, i, z, s) for f in (STUDENT, SOURCES[i % 2]))
        close(seen.states[i], z)
        close(seen.target[i], target)
        close(seen.loss[i], s**2 * (velocity - target).square().mean())


def test_off_policy_on_what_each_samples_own_source_draws():
    """Sources that end at points of their own: the states are noised points, and the noise is fresh."""
    n, points = 3000, torch.tensor([5.0, -5.0, 20.0])
    batch, student, counter = batch_of(n, routes=3), Watched(constant(0.0)), Counter()
    sources = [counted(to_point(p), counter, m) for m, p in enumerate(points)]
    common = {"clean": batch.clean, "sigmas": SIGMAS, "shift": 3.0, "solver": "euler", "states_from": "sources"}
    seen = off_policy_loss(student, sources, batch, **common, generator=generator(1))
    [(z, sigma, _, _)] = student.calls
    inside = sigma > 0.05
    noise = ((z - (1 - sigma[:, None]) * points[batch.route][:, None]) / sigma[:, None])[inside]
    close(noise.mean(0), torch.zeros(3), atol=4 / n**0.5)
    close(noise.std(0), torch.ones(3), atol=4 / n**0.5)
    old = torch.stack([noise.flatten(), batch.noise[inside].flatten()]).corrcoef()[0, 1]
    assert abs(old) < 4 / noise.numel() ** 0.5
    close(seen.target, (z - points[batch.route][:, None]) / sigma[:, None])
    assert counter == dict.fromkeys(range(3), 1000 * (6 + 1))  # each rolled out whole, and asked once


@pytest.mark.parametrize(
    ("method", "k"), [("danceopd", 1), ("danceopd", 4), ("danceopd", 16), ("diffusion_opd", 8), ("flow_opd", 8)]
)
def test_no_step_is_integrated_whose_result_nobody_reads(method, k):
    """Each sample's steps once each, to the deepest state that is asked; a stochastic one's end is read too."""
    student, batch, steps = Watched(STUDENT), batch_of(6), 8
    common = {"sigmas": (sigmas := sigma_grid(steps, 3.0))}
    if method == "danceopd":
        common |= {"solver": "euler", "bias": "low_t", "k": k, "generator": generator(k)}
        seen = danceopd_loss(student, SOURCES, batch, **common)
        taken = seen.depth.view(6, k).amax(1).tolist()
    elif method == "diffusion_opd":
        diffusion_opd_loss(student, SOURCES, batch, **common, solver="euler")
        taken = [steps - 1] * 6
    else:  # each group of 3 has one prompt
        flow_opd_loss(student, SOURCES, batch, **common, anchor=STUDENT, generator=generator(), group_size=3)
        taken = [steps] * 6
    number = {level: i for i, level in enumerate(sigmas.tolist())}
    asked = Counter(
        (int(name), number[level])
        for _, sigma, names, grad in student.calls
        if not grad
        for name, level in zip(names, sigma.tolist(), strict=True)
    )
    names = [i // 3 for i in range(6)] if method == "flow_opd" else range(6)
    assert asked == Counter((name, i) for name, last in zip(names, taken, strict=True) for i in range(last))
    queries = sum(len(z) for z, *_, grad in student.calls if grad)
    assert queries == 6 * k


# DiffusionOPD


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_diffusion_opd_by_hand(shift):
    """Every step of every trajectory: the KL of two Gaussian steps of variance one, summed."""
    batch, sigmas = batch_of(5), sigma_grid(6, shift)
    seen = diffusion_opd_loss(STUDENT, SOURCES, batch, sigmas=sigmas, solver="euler")
    for i in range(5):
        path, total = euler(STUDENT, batch, i, sigmas), 0.0
        for j in range(6):
            dt = sigmas[j + 1] - sigmas[j]
            means = [path[j] + dt * alone(f, batch, i, path[j], sigmas[j]) for f in (STUDENT, SOURCES[i % 2])]
            normals = [torch.distributions.Normal(m.double(), 1.0) for m in means]
            total += torch.distributions.kl_divergence(*normals).mean()
        close(seen.loss[i], total, rel=1e-3)
    assert torch.equal(seen.depth, torch.arange(6).repeat(5))


def test_diffusion_opd_is_danceopd_with_kl_where_every_index_is_asked():
    theta = torch.tensor([0.8, -0.3], requires_grad=True)
    batch, gradients = batch_of(5), []
    common = {"sigmas": SIGMAS, "solver": "euler"}
    dense = diffusion_opd_loss(linear(theta), SOURCES, batch, **common)
    every = {"bias": "stratified", "k": 6, "objective": "kl", "generator": generator()}
    asked = danceopd_loss(linear(theta), SOURCES, batch, **common, **every)
    close(dense.loss.detach(), 6 * asked.loss.detach())  # a sum against a mean
    for loss in (dense.loss.mean(), 6 * asked.loss.mean()):
        gradients.append(torch.autograd.grad(loss, theta)[0])
    close(*gradients)


# Flow-OPD

LEVEL = 0.7


def flow_opd(student, batch, sigmas=SIGMAS, seed=5, **options):
    anchor = options.pop("anchor", STUDENT)
    common = {"sigmas": sigmas, "anchor": anchor, "generator": generator(seed)}
    return flow_opd_loss(student, SOURCES, batch, **common, **options)


class ByHand:
    """Flow-OPD's surrogate of `linear` in float64 on the rollout that `flow_opd` makes: samples x steps."""

    def __init__(self, student, batch, group, sigmas=SIGMAS, seed=5, max_advantage=5.0):
        n, self.steps = len(batch), len(sigmas) - 1
        self.prompt = torch.arange(n // group).repeat_interleave(group)
        self.route, conditioning = batch.route[self.prompt], batch.conditioning[self.prompt]
        states, _ = sde_rollout(student, batch.noise, conditioning, sigmas, LEVEL, generator(seed))
        self.states, self.sigmas, self.tokens = states.double(), sigmas.double(), conditioning.prompt
        self.group, self.max_advantage = group, max_advantage

    def step(self, field, i):
        """The Gaussian of step i by a field, as Flow-GRPO has it."""
        z, sigma, dt = self.states[:, i], self.sigmas[i], self.sigmas[i + 1] - self.sigmas[i]
        conditioning = Conditioning(self.tokens, None, torch.zeros(len(z), dtype=torch.bool))
        velocity = field(z, sigma.expand(len(z)), conditioning)
        std = (sigma / (1 - (self.sigmas[1] if i == 0 else sigma))).sqrt() * LEVEL
        mean = z * (1 + std**2 / (2 * sigma) * dt) + velocity * (1 + std**2 * (1 - sigma) / (2 * sigma)) * dt
        return torch.distributions.Normal(mean, std * (-dt).sqrt())

    def kl(self, field, others) -> torch.Tensor:
        """Of each sample's steps by a field to those by its route's of the others: [n, steps]."""
        rows = []
        for i in range(self.steps):
            each = [torch.distributions.kl_divergence(self.step(field, i), self.step(o, i)).mean(1) for o in others]
            rows.append(torch.stack(each, 1)[torch.arange(len(self.route)), self.route])
        return torch.stack(rows, 1)

    def log_probability(self, field) -> torch.Tensor:
        rows = [self.step(field, i).log_prob(self.states[:, i + 1]).mean(1) for i in range(self.steps)]
        return torch.stack(rows, 1)

    def advantage(self, field) -> torch.Tensor:
        reward = -self.kl(field, SOURCES)
        result = torch.empty_like(reward)
        for p in self.prompt.unique():
            own = reward[self.prompt == p]
            result[self.prompt == p] = (own - own.mean(0)) / own.std(0)
        return result.clamp(-self.max_advantage, self.max_advantage)

    def surrogate(self, field, old, advantage, clip=1e-4) -> torch.Tensor:
        ratio = torch.exp(self.log_probability(field) - old)
        return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip)).mean(1)


THETA = torch.tensor([0.8, -0.3])


def gradient_of(loss_of, theta=THETA, **options):
    parameter = theta.clone().requires_grad_()
    loss_of(linear(parameter), **options).loss.mean().backward()
    return parameter.grad.double()


def difference(function, theta=THETA, h=1e-6):
    """Central differences in float64."""
    unit = torch.eye(len(theta), dtype=torch.float64) * h
    return torch.stack([(function(theta.double() + u) - function(theta.double() - u)) / (2 * h) for u in unit])


def test_flow_opd_gradient_is_that_of_its_surrogate():
    """Policy gradient of the frozen rollout with its frozen advantage, by finite differences."""
    batch = batch_of(12, routes=3)
    batch.route = batch.route % 2
    reference = ByHand(STUDENT, batch, 4)
    field = linear(THETA.double())
    old, advantage = reference.log_probability(field), reference.advantage(field)
    expected = difference(lambda t: reference.surrogate(linear(t), old, advantage).mean())
    close(gradient_of(flow_opd, batch=batch, group_size=4), expected, rel=1e-2, atol=1e-4)
    assert expected.abs().min() > 0.01


@given(SEED, st.sampled_from([2, 4, 8]), st.sampled_from([0.3, 1.0, 5.0]))
def test_flow_opd_advantage_is_normalised_over_each_group(seed, group, limit):
    """With one step, on policy, a sample's loss is minus its advantage."""
    batch, one = batch_of(16, seed=seed), sigma_grid(1)
    reference = ByHand(STUDENT, batch, group, one, seed, limit)
    kl = reference.kl(linear(THETA.double()), SOURCES).view(-1, group)
    assume((kl.std(1) > 1e-2 * kl.mean(1)).all())  # rewards of a group that are told apart in float32
    loss = flow_opd(STUDENT, batch, one, seed, group_size=group, max_advantage=limit).loss.detach()
    close(loss, -reference.advantage(linear(THETA.double()))[:, 0], rel=5e-3, atol=5e-3)
    assert loss.abs().max() <= limit * (1 + 1e-4)
    if limit == 5.0:
        close(loss.view(-1, group).mean(1), torch.zeros(16 // group), atol=1e-3)
        close(loss.view(-1, group).std(1), torch.ones(16 // group), rel=1e-2)


@pytest.mark.parametrize("detach", [True, False])
def test_flow_opd_groups_share_a_prompt_and_a_route(detach):
    batch, source = batch_of(12, routes=3), Watched(constant(0.0))
    batch.route = torch.tensor([1, 0, 1] * 4)
    common = {"sigmas": SIGMAS, "anchor": STUDENT, "generator": generator(), "detach_advantage": detach}
    seen = flow_opd_loss(STUDENT, [constant(0.0), source], batch, **common, group_size=4)
    assert torch.equal(seen.route, torch.tensor([1] * 4 + [0] * 4 + [1] * 4))
    assert source.calls[0][2].tolist() == [0] * 24 + [2] * 24  # prompts of the groups on route 1, every step


def test_flow_opd_is_zero_in_value_on_policy():
    batch = batch_of(16)
    seen = flow_opd(STUDENT, batch, group_size=4)
    close(seen.loss.view(4, 4).mean(1), torch.zeros(4), atol=1e-4)
    assert seen.loss.abs().max() > 0.05


@pytest.mark.parametrize("clip", [1e-4, 0.05])
def test_flow_opd_ratio_is_clipped_off_policy(clip):
    """A student that has moved since its rollout."""
    batch, moved = batch_of(8), THETA + torch.tensor([0.05, -0.05])

    def drifting(z, sigma, c):
        return linear(moved if torch.is_grad_enabled() else THETA)(z, sigma, c)

    seen = flow_opd(drifting, batch, group_size=4, clip_range=clip)
    reference = ByHand(STUDENT, batch, 4)
    old, advantage = reference.log_probability(linear(THETA.double())), reference.advantage(linear(moved.double()))
    close(seen.loss, reference.surrogate(linear(moved.double()), old, advantage, clip), rel=5e-3, atol=5e-4)


def test_flow_opd_with_the_advantage_attached_descends_the_kl():
    """The trap of the released code: what is learnt then is the distillation loss; detached, it is not."""
    batch = batch_of(512)
    reference = ByHand(STUDENT, batch, 16)
    distillation = difference(lambda t: reference.kl(linear(t), SOURCES).mean())
    detached, attached = (
        gradient_of(flow_opd, batch=batch, group_size=16, detach_advantage=detach) for detach in (True, False)
    )
    assert (attached - detached).norm() > 0.1 * distillation.norm()
    cosine = torch.nn.functional.cosine_similarity(attached, distillation, dim=0)
    assert cosine > 0.9


@pytest.mark.parametrize("weight", [0.04, 2.0])
def test_flow_opd_anchor_adds_its_kl(weight):
    batch, anchor = batch_of(8), Watched(linear(torch.tensor([0.5, 0.2])))
    with_anchor = flow_opd(STUDENT, batch, group_size=4, anchor=anchor, anchor_weight=weight)
    without = flow_opd(STUDENT, batch, group_size=4)
    kept = ByHand(STUDENT, batch, 4).kl(linear(THETA.double()), [anchor.field] * 2).mean(1)
    close(with_anchor.loss - without.loss, weight * kept, rel=1e-3, atol=1e-5)
    theta = [gradient_of(flow_opd, batch=batch, group_size=4, anchor=anchor, anchor_weight=w) for w in (weight, 0.0)]
    reference = ByHand(STUDENT, batch, 4)
    pull = difference(lambda t: reference.kl(linear(t), [anchor.field] * 2).mean())
    close(theta[0] - theta[1], weight * pull, rel=1e-2, atol=1e-4)
    assert not any(grad for *_, grad in anchor.calls)


def test_flow_opd_without_weight_leaves_the_anchor_alone():
    anchor = Watched(STUDENT)
    flow_opd(STUDENT, batch_of(8), group_size=4, anchor=anchor)
    assert not anchor.calls


def test_flow_opd_refuses_a_broken_group():
    with pytest.raises(UserError, match=r"options\.group_size: 16 does not divide the 8 samples"):
        flow_opd(STUDENT, batch_of(8))


# Consistency


def test_consistency_of_an_exact_straight_flow_is_zero():
    point, batch = torch.tensor([0.3, -0.2, 1.0]), batch_of(40)
    exact = to_point(point)
    common = {**ROLLED, "bias": "uniform", "generator": generator()}
    assert consistency_loss(exact, [exact] * 2, batch, **common, ema=exact).loss.max() < 1e-9


def test_consistency_by_hand():
    """The student's estimate against its average's, a step of the teacher nearer; at the last step its data."""
    batch, ema = batch_of(40), Watched(linear(torch.tensor([0.6, 0.0])))
    common = {**ROLLED, "bias": "uniform", "generator": generator()}
    seen = consistency_loss(STUDENT, SOURCES, batch, **common, ema=ema)
    last = seen.depth == 5
    assert 0 < last.sum() < 40
    for i in range(40):
        d = int(seen.depth[i])
        z = euler(STUDENT, batch, i, SIGMAS)[d]
        nearer = z + (SIGMAS[d + 1] - SIGMAS[d]) * alone(SOURCES[i % 2], batch, i, z, SIGMAS[d])
        goal = nearer if d == 5 else nearer - SIGMAS[d + 1] * alone(ema.field, batch, i, nearer, SIGMAS[d + 1])
        estimate = z - SIGMAS[d] * alone(STUDENT, batch, i, z, SIGMAS[d])
        close(seen.loss[i], (estimate - goal).square().mean(), rel=1e-3)
    assert sorted(torch.cat([tokens for _, _, tokens, _ in ema.calls]).tolist()) == (~last).nonzero()[:, 0].tolist()
    assert not any(grad for *_, grad in ema.calls)


# Score distillation


def free(theta):
    """Each sample's velocity is a parameter of its own, so that its clean estimate is noise - theta everywhere."""
    return lambda z, sigma, c: theta[c.prompt[:, 0]]


def test_sds_gradient_is_the_normalised_teacher_residual():
    batch, theta = batch_of(6), randn(6, 3, seed=9).requires_grad_()
    student, source = Watched(free(theta)), Watched(SOURCES[0])
    batch.route[:] = 0
    seen = sds_loss(student, [source], batch, **ROLLED, generator=generator(2))
    seen.loss.sum().backward()
    clean = (batch.noise - theta).detach()
    [(z, sigma, _, _)] = source.calls
    asked_at = student.calls[-1][1]
    for i in range(6):
        teacher = z[i] - sigma[i] * alone(SOURCES[0], batch, i, z[i], sigma[i])
        residual = (clean[i] - teacher) / (clean[i] - teacher).abs().mean()
        close(theta.grad[i], -asked_at[i] * residual / 3, rel=2e-3, atol=1e-4)  # estimate = state - sigma theta
    noise = (z - (1 - sigma[:, None]) * clean) / sigma[:, None]
    assert not torch.allclose(noise, batch.noise, atol=0.1)


def test_sds_rests_where_the_teacher_agrees():
    batch, theta = batch_of(6), randn(6, 3, seed=9).requires_grad_()
    clean = (batch.noise - theta).detach()

    def agrees(z, sigma, c):
        return (z - clean[c.prompt[:, 0]]) / sigma[:, None]

    sds_loss(free(theta), [agrees] * 2, batch, **ROLLED, generator=generator()).loss.sum().backward()
    assert theta.grad.abs().max() < 1e-3


class Point(torch.nn.Module):
    """The exact field of one point, which can be learnt."""

    def __init__(self, point):
        super().__init__()
        self.point = torch.nn.Parameter(torch.tensor(point))

    def forward(self, z, sigma, c):
        return (z - self.point) / sigma[:, None]


def dmd_call(dmd, student, sources, seed=0, n=16, counter=None, **options):
    common = {**ROLLED, "counter": Counter() if counter is None else counter, "generator": generator(seed)}
    return dmd(student, sources, batch_of(n, seed=seed), **common, **options)


def test_dmd_gradient_is_zero_where_the_fake_equals_the_teacher():
    student, other = Point([0.5, 0.0, -0.5]), Point([0.1, 0.2, 0.3])
    dmd = DMD(student)
    dmd_call(dmd, student, [dmd.fake] * 2).loss.sum().backward()
    assert student.point.grad.abs().max() == 0
    dmd_call(dmd, student, [other] * 2).loss.sum().backward()
    assert student.point.grad.abs().max() > 0.01


def test_dmd_gradient_by_hand():
    """The estimate moves by the teacher's estimate less the fake's, over the mean distance to the teacher's."""
    student, teacher, fake = Point([0.5, 0.0, -0.5]), [0.1, 0.3, 0.3], [0.4, 0.2, -0.3]
    dmd = DMD(Point(fake))
    dmd_call(dmd, student, [Point(teacher)] * 2).loss.sum().backward()
    # The student's estimate is its point at every state: d estimate / d point is 1, for each of 16 samples.
    x, t, f = (torch.tensor(p) for p in ([0.5, 0.0, -0.5], teacher, fake))
    close(student.point.grad, 16 * (f - t) / (x - t).abs().mean() / 3, rel=2e-3, atol=1e-4)


def test_dmd_trains_the_fake_on_the_students_estimates():
    """It starts as the student was; the student has moved on, and the fake's error on fixed states falls."""
    dmd, student = DMD(Point([0.0, 0.0, 0.0])), Point([0.05, -0.05, 0.05])
    errors = []
    for seed in range(120):
        errors.append(float((dmd.fake.point - student.point).norm().detach()))
        dmd_call(dmd, student, [constant(0.0)] * 2, seed, n=4)
    assert errors[0] == pytest.approx(0.05 * 3**0.5)
    assert errors[60] < 0.8 * errors[0]
    assert errors[-1] < 0.4 * errors[0]
    assert student.point.grad is None  # the fake's own backward does not reach the student


def test_dmd_fake_learns_at_fresh_noise():
    """A diffusion of the estimates: their noise must not be what the trajectories came from."""
    dmd, student, seen = DMD(Point([0.0] * 3)), Point([0.5, 0.0, -0.5]), []
    dmd.fake.register_forward_hook(lambda m, args, _: seen.append(args) if torch.is_grad_enabled() else None)
    dmd_call(dmd, student, [constant(0.0)] * 2, n=2000)
    [(z, sigma, _)] = seen
    noise = (z - (1 - sigma[:, None]) * student.point.detach()) / sigma[:, None]
    close(noise.std(), 1.0, rel=0.05)
    start = batch_of(2000).noise
    assert abs(torch.stack([noise.flatten(), start.flatten()]).corrcoef()[0, 1]) < 4 / start.numel() ** 0.5


def test_dmd_counts_the_fake():
    counter, student = Counter(), Point([0.5, 0.0, -0.5])
    dmd = DMD(student)
    dmd_call(dmd, student, [constant(0.0)] * 2, n=16, counter=counter)
    assert counter["fake"] == 16 + 16 + 2 * 16  # asked, trained, and a backward as two
    dmd_call(dmd, student, [constant(0.0)] * 2, n=4, counter=counter)
    assert counter["fake"] == 4 * (16 + 4)


def test_dmd_goes_on_from_its_state():
    student = Point([0.05, -0.05, 0.05])
    dmd, again = DMD(Point([0.0] * 3)), DMD(Point([9.0] * 3))
    for seed in range(3):
        dmd_call(dmd, student, SOURCES, seed)
    again.load_state_dict(through_disk(dmd.state_dict()))
    for seed in range(3, 6):
        losses = [dmd_call(d, student, SOURCES, seed).loss for d in (dmd, again)]
        assert torch.equal(*losses)
    assert torch.equal(dmd.fake.point, again.fake.point)


# Pooled


def pool_run(pool, updates, n, visits, parts=1, steps=6, student=STUDENT, bias="low_t", seed=0, first=0):
    """Updates of a pool: {update: [(observed, the trajectories asked)] by part}; the counter; the batches."""
    counter, seen, batches = Counter(), defaultdict(list), {}
    watched, sources = Watched(counted(student, counter, "student")), [counted(s, counter, "source") for s in SOURCES]
    for update in range(first, first + updates):
        for part in range(parts):
            batch = batch_of(n, seed=97 * update + part, first=1000 * (update * parts + part))
            batches[update * parts + part] = batch
            g = generator(seed + 31 * update + part)
            common = {"sigmas": sigma_grid(steps, 3.0), "solver": "euler", "bias": bias, "generator": g}
            observed = pool(watched, sources, batch, **common, part=part, visits=visits)
            seen[update].append((observed, watched.calls[-1][2].tolist()))
    return seen, counter, batches


@given(st.integers(1, 7), st.integers(1, 4), st.integers(1, 2), st.integers(1, 8), SEED)
def test_pooled_asks_each_trajectory_its_visits_in_different_updates(n, visits, parts, steps, seed):
    """At indices that never fall, with the student's own states and each trajectory's own source."""
    seen, _, batches = pool_run(Pooled(None), visits + 3, n, visits, parts, steps, seed=seed)
    asked = defaultdict(list)
    for update, by_part in seen.items():
        together = [name for _, names in by_part for name in names]
        assert len(set(together)) == len(together)  # none twice in one update
        for observed, names in by_part:
            assert len(observed.loss) == len(names)
            for row, name in enumerate(names):
                asked[name].append((update, int(observed.depth[row])))
                batch, i = batches[name // 1000], name % 1000
                assert observed.route[row] == batch.route[i]
                path = euler(STUDENT, batch, i, sigma_grid(steps, 3.0))
                close(observed.states[row], path[observed.depth[row]], rel=1e-4, atol=1e-5)
                assert observed.velocity.shape == observed.target.shape == observed.states.shape
    for name, times in asked.items():
        started = name // 1000 // parts
        assert [update for update, _ in times] == list(range(started, min(started + visits, visits + 3)))
        depths = [depth for _, depth in times]
        assert depths == sorted(depths)
    fresh = -(-n // visits)
    assert sorted(asked) == [1000 * b + i for b in range((visits + 3) * parts) for i in range(fresh)]
    if n % visits == 0:
        assert [len(names) for _, names in seen[visits + 2]] == [n] * parts


def test_pooled_loss_is_the_squared_error_with_its_gradient():
    theta = torch.tensor([0.8, -0.3], requires_grad=True)
    seen, _, _ = pool_run(Pooled(None), 3, 6, 2, student=linear(theta))
    observed, names = seen[2][0]
    close(observed.loss.detach(), (observed.velocity - observed.target).square().mean(1))
    observed.loss.mean().backward()
    error = 2 * (observed.velocity - observed.target).double() / observed.states.numel()
    sigma = sigma_grid(6, 3.0)[observed.depth][:, None]
    close(theta.grad, [(error * observed.states).sum(), (error * sigma).sum()])
    assert len(names) == 6


@pytest.mark.parametrize(("visits", "bias"), [(1, "low_t"), (2, "low_t"), (3, "high_t")])
def test_pooled_indices_follow_the_query(visits, bias):
    """Once the pool is full: Kolmogorov's bound at the 0.1 % level against the query's own law, at every index."""
    steps, updates = 8, 24
    seen, _, _ = pool_run(Pooled(None), updates, 600, visits, steps=steps, bias=bias)
    index = torch.cat([seen[u][0][0].depth for u in range(visits - 1, updates)])
    a, b = {"low_t": (5, 2), "high_t": (2, 5)}[bias]
    u = torch.linspace(0, 1, 20_001, dtype=torch.float64)[1:-1]
    density = torch.distributions.Beta(torch.tensor(a).double(), torch.tensor(b).double()).log_prob(u).exp()
    cdf = density.cumsum(0) / density.sum()
    for i in range(steps):
        expected = cdf[min(int((i + 1) / steps * 20_000) - 1, len(cdf) - 1)]
        close((index <= i).double().mean(), expected, atol=1.95 / len(index) ** 0.5)


@pytest.mark.parametrize("visits", [1, 2, 3])
def test_pooled_evaluations_are_the_steps_between_its_visits(visits):
    """Over a trajectory's life: its deepest index in steps and one evaluation a visit, one of its source a visit."""
    n, updates, steps = 6, 8, 6
    seen, counter, _ = pool_run(Pooled(None), updates, n, visits, steps=steps)
    deepest, queries = Counter(), 0
    for by_part in seen.values():
        for observed, names in by_part:
            queries += len(names)
            for name, depth in zip(names, observed.depth.tolist(), strict=True):
                deepest[name] = max(deepest[name], depth)
    assert counter == {"student": deepest.total() + queries, "source": queries}


def test_pooled_visits_save_rollout_steps():
    steps = {}
    for visits in (1, 2, 4):
        seen, counter, _ = pool_run(Pooled(None), 12, 32, visits, steps=16)
        queries = sum(len(names) for by_part in seen.values() for _, names in by_part)
        steps[visits] = (counter["student"] - queries) / queries
    assert steps[4] < steps[2] < steps[1]
    assert steps[2] < 0.65 * steps[1]


@pytest.mark.parametrize("parts", [1, 2])
def test_pooled_goes_on_from_its_state(parts):
    pool, again = Pooled(None), Pooled(None)
    pool_run(pool, 3, 6, 3, parts)
    again.load_state_dict(through_disk(pool.state_dict()))
    runs = [pool_run(p, 3, 6, 3, parts, first=3)[0] for p in (pool, again)]
    for update in (3, 4, 5):
        for (a, names), (b, others) in zip(*(run[update] for run in runs), strict=True):
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

    for update in range(4):
        batch = batch_of(4, routes=1, first=10 * update)
        if update % 2:
            batch.conditioning.source = torch.full((4, 3, 1, 1), float(update))
            batch.conditioning.has_source[:] = True
        asked.clear()
        common = {"sigmas": SIGMAS, "solver": "euler", "bias": "low_t", "generator": generator(update)}
        pool(field, [source], batch, **common, visits=2)
        for name, (has, picture) in asked.items():
            assert has == bool(name // 10 % 2)
            assert not has or (picture == name // 10).all()
        assert set(asked) == {10 * u + i for u in (update - 1, update) if u >= 0 for i in range(2)}


# Through the loop

TINY = DiTConfig(width=16, depth=1, heads=2, mlp_ratio=1)
N, B = 4, 8


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Three networks whose every parameter counts, on disk."""
    folder = tmp_path_factory.mktemp("networks")
    for seed, name in enumerate(("base", "one", "two")):
        torch.manual_seed(seed)
        network = DiT(TINY)
        with torch.no_grad():
            for parameter in network.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.05)
        save_model(network, folder / f"{name}.safetensors")
    return folder


def config_of(networks, folder, **sections):
    raw = {
        "student": {"init_from": str(networks / "base.safetensors")},
        "sources": {name: {"weights": str(networks / f"{name}.safetensors")} for name in ("one", "two")},
        "capabilities": {
            "t2i": {"source": "one", "task": "t2i", "data": {"world": "t2i", "size": 20}},
            "edit": {"source": "two", "task": "edit", "data": {"world": "edit", "size": 20}},
        },
        "rollout": {"num_inference_steps": N},
        "training": {"output_dir": str(folder), "batch_size": B, "max_steps": 8, "warmup_steps": 0},
    }
    for key, value in sections.items():
        raw[key] = {**raw[key], **value} if key in ("rollout", "training") else value
    return parse_config(raw)


# What differs from the configuration above, and what two updates cost. D: the indices that the query draws.
VARIANTS = {
    "danceopd": ({}, lambda D: {"student": D.sum() + 2 * B, "sources": 2 * B, "backward": 4 * B}),
    "danceopd k=16": (
        {"query": {"k": 16}},
        lambda D: {"student": D.amax(2).sum() + 32 * B, "sources": 32 * B, "backward": 64 * B},
    ),
    "danceopd warm, soft, ab2, in turn": (
        {
            "options": {"warm_start": 0.9, "routing": "soft", "objective": "clean"},
            "rollout": {"solver": "ab2"},
            "route": "round_robin",
        },
        lambda D: {"student": 2 * B, "sources": D.sum() + 2 * 2 * B, "backward": 4 * B},
    ),
    "danceopd adaptive, gap": ({"route": "adaptive", "query": {"bias": "gap"}}, None),
    "danceopd_fast": (
        {"options": {"warm_start": 0.1}},
        lambda D: {"student": D[1].sum() + 2 * B, "sources": 2 * B, "backward": 4 * B},
    ),
    "joint": ({}, lambda D: {"student": 2 * B, "backward": 4 * B}),
    "off_policy": ({}, lambda D: {"student": 2 * B, "sources": 2 * B, "backward": 4 * B}),
    "off_policy sources": (
        {"options": {"states_from": "sources"}},
        lambda D: {"student": 2 * B, "sources": 2 * B * (N + 1), "backward": 4 * B},
    ),
    "diffusion_opd": (
        {"route": "round_robin"},
        lambda D: {"student": 2 * B * (N - 1 + N), "sources": 2 * B * N, "backward": 4 * B * N},
    ),
    "flow_opd": (
        {"options": {"group_size": 4}},
        lambda D: {"student": 4 * B * N, "sources": 2 * B * N, "backward": 4 * B * N},
    ),
    "flow_opd anchor": (
        {"options": {"group_size": 2, "anchor_weight": 0.1, "detach_advantage": False}},
        lambda D: {"student": 4 * B * N, "sources": 2 * B * N, "anchor": 2 * B * N, "backward": 4 * B * N},
    ),
    "consistency": (
        {},
        lambda D: {
            "student": D.sum() + 2 * B,
            "sources": 2 * B,
            "ema": (D < N - 1).sum(),
            "backward": 4 * B,
        },
    ),
    "sds": ({}, lambda D: {"student": D.sum() + 2 * B, "sources": 2 * B, "backward": 4 * B}),
    "dmd": ({}, lambda D: {"student": D.sum() + 2 * B, "sources": 2 * B, "fake": 8 * B, "backward": 4 * B}),
    "pooled": (
        {},
        lambda D: {
            "student": D.sort(2).values[0, : B // 2, 1].sum() + D.sort(2).values[1, : B // 2, 0].sum() + B // 2 + B,
            "sources": B // 2 + B,
            "backward": 2 * (B // 2 + B),
        },
    ),
    "pooled in parts": ({"options": {"visits": 3}, "training": {"gradient_accumulation_steps": 2}}, None),
}


def test_every_method_has_a_variant():
    assert {name.split()[0] for name in VARIANTS} == set(METHODS)


def same(a, b, path=""):
    """Two nested states, bit for bit."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{path}/{i}")
    else:
        assert a == b, path


def saved(trainer, folder):
    """A trainer's checkpoint."""
    save_state(folder, trainer.step, *trainer.engine.tensors(), trainer.rest(), 1)
    return load_newest(folder)[0]


@pytest.mark.parametrize("name", VARIANTS)
def test_method_trains_counts_and_resumes_bit_for_bit(networks, tmp_path, name):
    sections, expected = VARIANTS[name]
    config = config_of(networks, tmp_path, method=name.split()[0], **sections)
    whole = Trainer(config, build(config))
    before = copy.deepcopy(whole.parts.student.state_dict())
    records = [whole.update() for _ in range(2)]
    assert all(math.isfinite(r["loss"]) and r["gradient_norm"] > 0 for r in records)
    assert whole.skipped == 0
    moved = [k for k, v in whole.parts.student.state_dict().items() if not torch.equal(v, before[k])]
    assert "patch_out.weight" in moved
    if expected:
        k = 2 if name == "pooled" else config.query.k
        size = B // 2 if name == "pooled" else B
        numbers = [[step * B + i for i in range(B)] for step in range(2)]
        drawn = [query(size, N, sample_generators(0, 1, own), bias="low_t", k=k) for own in numbers]
        counts = {key: int(value) for key, value in expected(torch.stack(drawn)).items()}
        assert +whole.evaluations == counts
        assert records[-1]["network_evaluations"] == sum(counts.values())
    resumed = Trainer(config, build(config))
    resumed.load(saved(whole, tmp_path))
    for trainer in (whole, resumed):
        trainer.update()
    for a, b in zip(whole.engine.tensors(), resumed.engine.tensors(), strict=True):
        same(a, b)
    same(whole.rest(), resumed.rest())


def test_the_anchor_is_the_untrained_student(networks, tmp_path):
    """Also after a resumed run has loaded the trained one, and no optimizer moves it."""
    config = config_of(networks, tmp_path, method="flow_opd", options={"group_size": 4, "anchor_weight": 1.0})
    trainer = Trainer(config, build(config))
    start = copy.deepcopy(trainer.parts.student.state_dict())
    trainer.update()
    resumed = Trainer(config, build(config))
    resumed.load(saved(trainer, tmp_path))
    for parts in (trainer.parts, resumed.parts):
        same(start, parts.anchor.state_dict())
    assert not torch.equal(resumed.parts.student.state_dict()["patch_out.weight"], start["patch_out.weight"])


def test_only_who_asks_for_pictures_or_an_anchor_gets_them(networks, tmp_path):
    for method, clean, anchor in (("danceopd", False, False), ("joint", True, False), ("flow_opd", False, True)):
        config = config_of(networks, tmp_path, method=method)
        trainer = Trainer(config, build(config))
        assert (trainer.parts.anchor is not None) == anchor
        batch = trainer.draw()
        assert (batch.clean is not None) == clean
        if clean:  # each sample's own picture, in the order of the batch
            same_without = Trainer(config_of(networks, tmp_path), trainer.parts).draw()
            assert torch.equal(batch.noise, same_without.noise)
            for m, data in enumerate(trainer.parts.samples.groups[0].data):
                pictures = data.targets(list(range(20)))
                for picture in batch.clean[batch.route == m]:
                    assert (pictures == picture).flatten(1).all(1).any()


def test_learning_from_pictures_needs_pictures(networks, tmp_path):
    manifest = write_world(tmp_path / "data", ["t2i"], 4, 0)
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    for line in lines:
        del line["target_image"]
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    capabilities = {"t2i": {"source": "one", "task": "t2i", "data": {"manifest": str(manifest)}}}
    build(config_of(networks, tmp_path, capabilities=capabilities))  # DanceOPD needs prompts alone
    for method in ("joint", "off_policy", "danceopd_fast"):
        with pytest.raises(UserError, match=r"capabilities\.t2i\.data: .*no row of 't2i' has a target_image"):
            build(config_of(networks, tmp_path, method=method, capabilities=capabilities))


def test_adaptive_routes_and_gap_queries_follow_the_runs_own_gaps(networks, tmp_path):
    """The gap of a capability moves its share of the batch, and the gap at an index the share of its queries."""
    capabilities = {
        "t2i": {"source": "one", "task": "t2i", "data": {"world": "t2i", "size": 20}},
        "style": {"source": "two", "task": "t2i", "data": {"world": "style", "size": 20}},
    }
    config = config_of(
        networks,
        tmp_path,
        capabilities=capabilities,
        route="adaptive",
        query={"bias": "gap", "k": 2},
        training={"batch_size": 400},
    )
    trainer = Trainer(config, build(config))
    assert (trainer.draw().route == 1).double().mean().item() == pytest.approx(0.5, abs=4 * 0.5 / 20)
    trainer.gaps.capability[:] = torch.tensor([1.0, 4.0])
    trainer.gaps.index[:] = torch.tensor([1.0, 0.0, 9.0, 2.0])
    share = 1.6 / (0.4 + 1.6)
    assert (trainer.draw().route == 1).double().mean().item() == pytest.approx(share, abs=4 * 0.4 / 20)
    weights = torch.tensor([1.0, 4.0, 9.0, 2.0]).sqrt()
    provided = trainer.provided(trainer.draw(), 0, 0.5, generator())
    torch.testing.assert_close(provided["gap"].float(), weights)
    depth = danceopd_loss(constant(0.0), [constant(0.0)] * 2, trainer.draw(), **provided).depth
    close(depth.bincount(minlength=4) / len(depth), weights / weights.sum(), atol=4 * 0.5 / 800**0.5)


def test_a_run_learns_its_gaps(networks, tmp_path):
    config = config_of(networks, tmp_path, route="adaptive", query={"bias": "gap"})
    trainer = Trainer(config, build(config))
    method, errors = trainer.method, []

    def watched(*arguments, **keywords):
        seen = method(*arguments, **keywords)
        errors.append((seen.route, (seen.velocity - seen.target).square().flatten(1).mean(1)))
        return seen

    trainer.method = watched
    trainer.update()
    (route, error), mean = errors[0], {}
    for m in (0, 1):
        mean[m] = float(error[route == m].mean())
    average = (mean[0] + mean[1]) / 2
    assert trainer.gaps.route_weights([1.0, 1.0]) == pytest.approx([mean[0] / average, mean[1] / average], rel=1e-3)


@pytest.mark.parametrize(("times", "at"), [(0, []), (1, [0, 5]), (3, [0, 2, 3, 5]), (5, [0, 1, 2, 3, 4, 5])])
def test_network_evaluations_end_a_run_and_pace_it(networks, tmp_path, times, at):
    """Joint training costs 3 B an update: 100 are spent in the fifth. Scores at the start, and then evenly spread."""
    training = {"max_steps": 1000, "max_network_evaluations": 100, "lr_schedule": "cosine", "log_every": 1}
    config = config_of(
        networks,
        tmp_path,
        method="joint",
        training={**training, "sample_every": 0},
        evaluation={"times": times},
    )
    parts = build(config)
    parts.score = lambda field: {"geneval_overall": 0.5}
    Trainer(config, parts).run()
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [record for record in log if "loss" in record]
    assert [r["network_evaluations"] for r in losses] == [24, 48, 72, 96, 120]
    rates = [r["learning_rate"] for r in losses]
    assert all(a > b for a, b in itertools.pairwise(rates))
    assert rates[0] > 0.8 * config.training.learning_rate > 0.1 * config.training.learning_rate > rates[-1]
    assert [r["step"] for r in log if "evaluation" in r] == at
    assert load_newest(tmp_path / "checkpoints")[0].step == 5


@given(share=st.floats(0, 1.5), step=st.integers(0, 100))
def test_progress_is_the_further_of_steps_and_evaluations(share, step):
    """And the cosine follows it, with no warmup, from the whole rate down to none."""
    training = {"output_dir": "x", "max_steps": 100, "warmup_steps": 0, "lr_schedule": "cosine", "learning_rate": 0.01}
    sections = {
        "sources": {"a": {"weights": "t2i"}},
        "capabilities": {"t2i": {"source": "a", "task": "t2i", "data": {"world": "t2i"}}},
    }
    for limit in (None, 1000):
        trainer = Trainer.__new__(Trainer)
        trainer.config = parse_config({**sections, "training": {**training, "max_network_evaluations": limit}})
        trainer.step, trainer.evaluations = step, Counter(student=int(600 * share), backward=int(400 * share))
        done = step / 100 if limit is None else min(1, max(step / 100, trainer.evaluations.total() / 1000))
        assert trainer.progress() == pytest.approx(done)
        assert trainer.learning_rate() == pytest.approx(0.005 * (1 + math.cos(math.pi * done)), abs=1e-9)


def test_micro_batches_are_numbered(networks, tmp_path):
    """And every one is told the same gap, so that parts of an update ask alike."""
    training = {"gradient_accumulation_steps": 4}
    config = config_of(networks, tmp_path, method="pooled", query={"bias": "gap"}, training=training)
    trainer, told = Trainer(config, build(config)), []
    method = trainer.method

    def watched(*arguments, **keywords):
        told.append((keywords["part"], keywords["gap"]))
        return method(*arguments, **keywords)

    trainer.method = watched
    trainer.update()
    trainer.update()
    assert [part for part, _ in told] == [0, 1, 2, 3] * 2
    assert [gap for _, gap in told[:4]] == [None] * 4
    assert all(torch.equal(gap, told[4][1]) for _, gap in told[4:])
