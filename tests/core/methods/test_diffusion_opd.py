"""DiffusionOPD, by hand."""

import pytest
import torch
from by_hand import SIGMAS, SOURCES, STUDENT, alone, batch_of, close, euler, generator, linear, update
from hypothesis import strategies as st

from danceopd.core.methods.danceopd import danceopd
from danceopd.core.methods.diffusion_opd import diffusion_opd
from danceopd.core.schedule import sigma_grid

SEED = st.integers(0, 2**40)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_diffusion_opd_by_hand(shift):
    """Every step of every trajectory: the KL of two Gaussian steps of variance one, summed."""
    batch, sigmas = batch_of(5), sigma_grid(6, shift)
    seen = update(diffusion_opd, STUDENT, SOURCES, batch, sigmas=sigmas, solver="euler")
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
    dense = update(diffusion_opd, linear(theta), SOURCES, batch, **common)
    every = {"bias": "stratified", "k": 6, "objective": "kl", "generator": generator()}
    asked = update(danceopd, linear(theta), SOURCES, batch, **common, **every)
    close(dense.loss.detach(), 6 * asked.loss.detach())  # a sum against a mean
    for loss in (dense.loss.mean(), 6 * asked.loss.mean()):
        gradients.append(torch.autograd.grad(loss, theta)[0])
    close(*gradients)
