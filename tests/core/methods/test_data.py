"""Joint training and off-policy distillation, by hand; and no method integrates a step that nobody reads."""

from collections import Counter

import pytest
import torch
from by_hand import SIGMAS, SOURCES, STUDENT, Remembering, alone, batch_of, close, constant, generator, to_point, update
from hypothesis import strategies as st

from danceopd.core.fields import counted
from danceopd.core.methods.danceopd import danceopd
from danceopd.core.methods.diffusion_opd import diffusion_opd
from danceopd.core.methods.flow_opd import flow_opd
from danceopd.core.methods.joint import joint
from danceopd.core.methods.off_policy import off_policy
from danceopd.core.schedule import shift_sigma, sigma_grid

SEED = st.integers(0, 2**40)


def test_joint_is_flow_matching_of_the_clean_estimate():
    batch, student, source = batch_of(8), Remembering(STUDENT), Remembering(SOURCES[0])
    seen = update(joint, student, [source], batch, clean=batch.clean, shift=3.0, generator=generator(1))
    [(_, sigma, _, _)] = student.calls
    assert not source.calls
    for i in range(8):
        s = sigma[i]
        z = (1 - s) * batch.clean[i] + s * batch.noise[i]
        velocity = alone(STUDENT, batch, i, z, s)
        close(seen.loss[i], s**2 * (velocity - (batch.noise[i] - batch.clean[i])).square().mean())
        close(seen.states[i], z)
    drawn = update(joint, student, [], batch_of(4000), clean=batch_of(4000).clean, shift=3.0, generator=generator(2))
    assert drawn.depth is None
    # Noise levels: the shift of a uniform draw, so that shifting back gives uniform ones.
    uniform = shift_sigma(student.calls[-1][1].double(), 1 / 3)
    close(uniform.sort().values, (torch.arange(4000) + 0.5) / 4000, atol=1.95 / 4000**0.5)


def test_joint_is_zero_for_the_exact_field_of_one_point():
    batch, point = batch_of(8), torch.tensor([0.3, -0.2, 1.0])
    common = {"clean": point.expand(8, 3), "shift": 3.0, "generator": generator()}
    assert update(joint, to_point(point), [], batch, **common).loss.max() < 1e-9
    close(update(joint, to_point(point + 0.1), [], batch, **common).loss, torch.full((8,), 0.01), rel=1e-3)


def test_off_policy_asks_the_teacher_at_noised_data():
    batch, student = batch_of(8), Remembering(STUDENT)
    common = {"clean": batch.clean, "sigmas": SIGMAS, "shift": 3.0, "solver": "euler"}
    seen = update(off_policy, student, SOURCES, batch, **common, generator=generator(1))
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
    batch, student, counter = batch_of(n, routes=3), Remembering(constant(0.0)), Counter()
    sources = [counted(to_point(p), counter, m) for m, p in enumerate(points)]
    common = {"clean": batch.clean, "sigmas": SIGMAS, "shift": 3.0, "solver": "euler", "states_from": "sources"}
    seen = update(off_policy, student, sources, batch, **common, generator=generator(1))
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
    student, batch, steps = Remembering(STUDENT), batch_of(6), 8
    common = {"sigmas": (sigmas := sigma_grid(steps, 3.0))}
    if method == "danceopd":
        common |= {"solver": "euler", "bias": "low_t", "k": k, "generator": generator(k)}
        seen = update(danceopd, student, SOURCES, batch, **common)
        taken = seen.depth.view(6, -1).amax(1).tolist()
    elif method == "diffusion_opd":
        update(diffusion_opd, student, SOURCES, batch, **common, solver="euler")
        taken = [steps - 1] * 6
    else:  # each group of 3 has one prompt
        update(flow_opd, student, SOURCES, batch, **common, anchor=STUDENT, generator=generator(), group_size=3)
        taken = [steps] * 6
    number = {level: i for i, level in enumerate(sigmas.tolist())}
    asked = Counter(
        (int(name), number[level])
        for _, sigma, names, grad in student.calls
        if not grad
        for name, level in zip(names, sigma.tolist(), strict=True)
    )
    names = [i // 3 * 3 for i in range(6)] if method == "flow_opd" else range(6)
    assert asked == Counter((name, i) for name, last in zip(names, taken, strict=True) for i in range(last))
    queries = sum(len(z) for z, *_, grad in student.calls if grad)
    assert queries == 6 * min(k, steps)
