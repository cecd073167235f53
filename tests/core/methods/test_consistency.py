"""The consistency objective, by hand."""

import torch
from by_hand import (
    ROLLED,
    SIGMAS,
    SOURCES,
    STUDENT,
    Remembering,
    alone,
    batch_of,
    close,
    euler,
    generator,
    linear,
    to_point,
    update,
)
from hypothesis import strategies as st

from danceopd.core.methods.consistency import consistency

SEED = st.integers(0, 2**40)


def test_consistency_of_an_exact_straight_flow_is_zero():
    point, batch = torch.tensor([0.3, -0.2, 1.0]), batch_of(40)
    exact = to_point(point)
    common = {**ROLLED, "bias": "uniform", "generator": generator()}
    assert update(consistency, exact, [exact] * 2, batch, **common, ema=exact).loss.max() < 1e-9


def test_consistency_by_hand():
    """The student's estimate against its average's, a step of the teacher nearer; at the last step its data."""
    batch, ema = batch_of(40), Remembering(linear(torch.tensor([0.6, 0.0])))
    common = {**ROLLED, "bias": "uniform", "generator": generator()}
    seen = update(consistency, STUDENT, SOURCES, batch, **common, ema=ema)
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
