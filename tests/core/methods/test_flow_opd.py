"""Flow-OPD against its surrogate in float64."""

import pytest
import torch
from by_hand import SIGMAS, SOURCES, STUDENT, Remembering, batch_of, close, constant, generator, linear, update
from hypothesis import assume, given
from hypothesis import strategies as st

from danceopd.core.conditioning import Conditioning
from danceopd.core.methods.flow_opd import flow_opd
from danceopd.core.schedule import sigma_grid
from danceopd.core.sde import sde_rollout

SEED = st.integers(0, 2**40)


LEVEL = 0.7


def run(student, batch, sigmas=SIGMAS, seed=5, **options):
    anchor = options.pop("anchor", STUDENT)
    common = {"sigmas": sigmas, "anchor": anchor, "generator": generator(seed)}
    return update(flow_opd, student, SOURCES, batch, **common, **options)


class ByHand:
    """Flow-OPD's surrogate of `linear` in float64 on the rollout that `run` makes: samples x steps."""

    def __init__(self, student, batch, group, sigmas=SIGMAS, seed=5, max_advantage=5.0):
        n, self.steps = len(batch), len(sigmas) - 1
        self.prompt = torch.arange(n) // group * group
        self.route, conditioning = batch.route[self.prompt], batch.conditioning[self.prompt]
        states, _, _ = sde_rollout(student, batch.noise, conditioning, sigmas, LEVEL, generator(seed))
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
    close(gradient_of(run, batch=batch, group_size=4), expected, rel=1e-2, atol=1e-4)
    assert expected.abs().min() > 0.01


@given(SEED, st.sampled_from([2, 4, 8]), st.sampled_from([0.3, 1.0, 5.0]))
def test_flow_opd_advantage_is_normalised_over_each_group(seed, group, limit):
    """With one step, on policy, a sample's loss is minus its advantage."""
    batch, one = batch_of(16, seed=seed), sigma_grid(1)
    reference = ByHand(STUDENT, batch, group, one, seed, limit)
    kl = reference.kl(linear(THETA.double()), SOURCES).view(-1, group)
    assume((kl.std(1) > 1e-2 * kl.mean(1)).all())  # rewards of a group that are told apart in float32
    loss = run(STUDENT, batch, one, seed, group_size=group, max_advantage=limit).loss.detach()
    close(loss, -reference.advantage(linear(THETA.double()))[:, 0], rel=5e-3, atol=5e-3)
    assert loss.abs().max() <= limit * (1 + 1e-4)
    if limit == 5.0:
        close(loss.view(-1, group).mean(1), torch.zeros(16 // group), atol=1e-3)
        close(loss.view(-1, group).std(1), torch.ones(16 // group), rel=1e-2)


@pytest.mark.parametrize("detach", [True, False])
def test_flow_opd_groups_share_a_prompt_and_a_route(detach):
    batch, source = batch_of(12, routes=3), Remembering(constant(0.0))
    batch.route = torch.tensor([1, 0, 1] * 4)
    common = {"sigmas": SIGMAS, "anchor": STUDENT, "generator": generator(), "detach_advantage": detach}
    seen = update(flow_opd, STUDENT, [constant(0.0), source], batch, **common, group_size=4)
    assert torch.equal(seen.route, torch.tensor([1] * 4 + [0] * 4 + [1] * 4))
    assert source.calls[0][2].tolist() == [0] * 24 + [8] * 24  # prompts of the groups on route 1, every step


@pytest.mark.parametrize("limit", [5.0, 0.02])
def test_flow_opd_takes_the_reward_itself_as_the_advantage(limit):
    """With no normalising: minus the KL times the step's length, clipped, as DanceOPD's authors run this baseline."""
    batch, reference = batch_of(8), ByHand(STUDENT, batch_of(8), 4)
    field = linear(THETA.double())
    length = reference.sigmas[:-1] - reference.sigmas[1:]
    advantage = (-reference.kl(field, SOURCES) * length).clamp(-limit, limit)
    options = {"group_size": 4, "max_advantage": limit, "normalize_advantage": False}
    seen = run(STUDENT, batch, **options)
    close(seen.loss, -advantage.mean(1), rel=1e-3, atol=1e-6)
    old = reference.log_probability(field)
    expected = difference(lambda t: reference.surrogate(linear(t), old, advantage).mean())
    close(gradient_of(run, batch=batch, **options), expected, rel=1e-2, atol=1e-5)


def test_flow_opd_is_zero_in_value_on_policy():
    batch = batch_of(16)
    seen = run(STUDENT, batch, group_size=4)
    close(seen.loss.view(4, 4).mean(1), torch.zeros(4), atol=1e-4)
    assert seen.loss.abs().max() > 0.05


@pytest.mark.parametrize("clip", [1e-4, 0.05])
def test_flow_opd_ratio_is_clipped_off_policy(clip):
    """A student that has moved since its rollout."""
    batch, moved = batch_of(8), THETA + torch.tensor([0.05, -0.05])

    seen = run(STUDENT, batch, group_size=4, clip_range=clip, trained=linear(moved))
    reference = ByHand(STUDENT, batch, 4)
    old, advantage = reference.log_probability(linear(THETA.double())), reference.advantage(linear(THETA.double()))
    close(seen.loss, reference.surrogate(linear(moved.double()), old, advantage, clip), rel=5e-3, atol=5e-4)


def test_flow_opd_with_the_advantage_attached_descends_the_kl():
    """The trap of the released code: what is learnt then is the distillation loss; detached, it is not."""
    batch = batch_of(512)
    reference = ByHand(STUDENT, batch, 16)
    distillation = difference(lambda t: reference.kl(linear(t), SOURCES).mean())
    detached, attached = (
        gradient_of(run, batch=batch, group_size=16, detach_advantage=detach) for detach in (True, False)
    )
    assert (attached - detached).norm() > 0.1 * distillation.norm()
    cosine = torch.nn.functional.cosine_similarity(attached, distillation, dim=0)
    assert cosine > 0.9


@pytest.mark.parametrize("weight", [0.04, 2.0])
def test_flow_opd_anchor_adds_its_kl(weight):
    batch, anchor = batch_of(8), Remembering(linear(torch.tensor([0.5, 0.2])))
    with_anchor = run(STUDENT, batch, group_size=4, anchor=anchor, anchor_weight=weight)
    without = run(STUDENT, batch, group_size=4)
    kept = ByHand(STUDENT, batch, 4).kl(linear(THETA.double()), [anchor.field] * 2).mean(1)
    close(with_anchor.loss - without.loss, weight * kept, rel=1e-3, atol=1e-5)
    theta = [gradient_of(run, batch=batch, group_size=4, anchor=anchor, anchor_weight=w) for w in (weight, 0.0)]
    reference = ByHand(STUDENT, batch, 4)
    pull = difference(lambda t: reference.kl(linear(t), [anchor.field] * 2).mean())
    close(theta[0] - theta[1], weight * pull, rel=1e-2, atol=1e-4)
    assert not any(grad for *_, grad in anchor.calls)


def test_flow_opd_without_weight_leaves_the_anchor_alone():
    anchor = Remembering(STUDENT)
    run(STUDENT, batch_of(8), group_size=4, anchor=anchor)
    assert not anchor.calls


def test_flow_opd_refuses_a_broken_group():
    with pytest.raises(ValueError, match="group_size 16 does not divide 8 samples"):
        run(STUDENT, batch_of(8))
