"""SDS and DMD, by hand."""

import pytest
import torch
from by_hand import (
    ROLLED,
    SOURCES,
    Remembering,
    alone,
    batch_of,
    close,
    constant,
    generator,
    randn,
    through_disk,
    update,
)
from hypothesis import strategies as st

from danceopd.core.methods.dmd import DMD
from danceopd.core.methods.sds import sds
from danceopd.core.questions import matched

SEED = st.integers(0, 2**40)


def free(theta):
    """Each sample's velocity is a parameter of its own, so that its clean estimate is noise - theta everywhere."""
    return lambda z, sigma, c: theta[c.prompt[:, 0]]


def test_sds_gradient_is_the_normalised_teacher_residual():
    batch, theta = batch_of(6), randn(6, 3, seed=9).requires_grad_()
    student, source = Remembering(free(theta)), Remembering(SOURCES[0])
    batch.route[:] = 0
    seen = update(sds, student, [source], batch, **ROLLED, generator=generator(2))
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

    update(sds, free(theta), [agrees] * 2, batch, **ROLLED, generator=generator()).loss.sum().backward()
    assert theta.grad.abs().max() < 1e-3


class Point(torch.nn.Module):
    """The exact field of one point, which can be learnt."""

    def __init__(self, point):
        super().__init__()
        self.point = torch.nn.Parameter(torch.tensor(point))

    def forward(self, z, sigma, c):
        return (z - self.point) / sigma[:, None]


def dmd_call(dmd, student, sources, seed=0, n=16):
    """One update of both networks, as the loop makes it; the student's part, whose gradient is left to take."""
    fake, batch = dmd.learners["fake"], batch_of(n, seed=seed)
    with torch.no_grad():
        asked = dmd(student, sources, batch, **ROLLED, generator=generator(seed), fake=fake.student)
    fake.backward(matched(fake.student, asked["fake"]).loss.mean())
    fake.step(1.0)
    return matched(student, asked["student"])


def test_dmd_gradient_is_zero_where_the_fake_equals_the_teacher():
    student, other = Point([0.5, 0.0, -0.5]), Point([0.1, 0.2, 0.3])
    dmd = DMD(student)
    dmd_call(dmd, student, [dmd.learners["fake"].student] * 2).loss.sum().backward()
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
        errors.append(float((dmd.learners["fake"].student.point - student.point).norm().detach()))
        dmd_call(dmd, student, [constant(0.0)] * 2, seed, n=4)
    assert errors[0] == pytest.approx(0.05 * 3**0.5)
    assert errors[60] < 0.8 * errors[0]
    assert errors[-1] < 0.4 * errors[0]
    assert student.point.grad is None  # the fake's own backward does not reach the student


def test_dmd_fake_learns_at_fresh_noise():
    """A diffusion of the estimates: their noise must not be what the trajectories came from."""
    dmd, student, seen = DMD(Point([0.0] * 3)), Point([0.5, 0.0, -0.5]), []
    dmd.learners["fake"].student.register_forward_hook(
        lambda m, args, _: seen.append(args) if torch.is_grad_enabled() else None
    )
    dmd_call(dmd, student, [constant(0.0)] * 2, n=2000)
    [(z, sigma, _)] = seen
    noise = (z - (1 - sigma[:, None]) * student.point.detach()) / sigma[:, None]
    close(noise.std(), 1.0, rel=0.05)
    start = batch_of(2000).noise
    assert abs(torch.stack([noise.flatten(), start.flatten()]).corrcoef()[0, 1]) < 4 / start.numel() ** 0.5


def test_dmd_goes_on_from_its_state():
    student = Point([0.05, -0.05, 0.05])
    dmd, again = DMD(Point([0.0] * 3)), DMD(Point([9.0] * 3))
    for seed in range(3):
        dmd_call(dmd, student, SOURCES, seed)
    again.load_state_dict(through_disk(dmd.state_dict()))
    for seed in range(3, 6):
        losses = [dmd_call(d, student, SOURCES, seed).loss for d in (dmd, again)]
        assert torch.equal(*losses)
    assert torch.equal(dmd.learners["fake"].student.point, again.learners["fake"].student.point)
