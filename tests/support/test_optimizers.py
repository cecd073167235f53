"""Muon: what orthogonalising does to singular values, and that it optimises."""

import pytest
import torch

from danceopd.support.optimizers import Muon, orthogonalize


def matrices(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("rows", "columns"), [(16, 48), (48, 16), (128, 384), (7, 20), (1, 9), (9, 1)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_singular_values_come_near_one(rows, columns, scale):
    x = scale * matrices(5, rows, columns)
    y = orthogonalize(x)
    assert y.shape == x.shape
    values = torch.linalg.svdvals(y)
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_singular_vectors_stay():
    """Newton-Schulz is a polynomial of the singular values: y v_i stays along u_i."""
    x = matrices(1, 12, 30)[0]
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    middle = u.T @ orthogonalize(x[None])[0] @ vh.T
    torch.testing.assert_close(middle, middle.diag().diag(), atol=1e-4, rtol=0)
    assert (middle.diag() > 0).all()


def test_matrices_of_a_batch_do_not_mix():
    x = matrices(4, 8, 20)
    x[1] *= 1000
    together = orthogonalize(x)
    for i in range(4):
        torch.testing.assert_close(together[i], orthogonalize(x[i : i + 1])[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(orthogonalize(x.mT), together.mT, atol=1e-5, rtol=1e-5)


def test_zero_matrix_stays_zero():
    assert torch.equal(orthogonalize(torch.zeros(2, 3, 5)), torch.zeros(2, 3, 5))


def test_a_convolutions_kernel_is_a_matrix_of_its_output_channels():
    kernel = torch.nn.Parameter(matrices(6, 2 * 9).reshape(6, 2, 3, 3))
    flat = torch.nn.Parameter(kernel.detach().flatten(1).clone())
    kernel.grad = matrices(6, 2 * 9, seed=1).reshape(6, 2, 3, 3).contiguous(memory_format=torch.channels_last)
    flat.grad = kernel.grad.flatten(1)
    for p in (kernel, flat):
        Muon([p], lr=0.1, weight_decay=0.1).step()
    torch.testing.assert_close(kernel.detach().flatten(1), flat.detach())


@pytest.mark.parametrize("shape", [(4,), ()], ids=str)
def test_refuses_what_is_no_matrix(shape):
    with pytest.raises(ValueError, match="matrices"):
        Muon([torch.nn.Parameter(torch.zeros(3, 3)), torch.nn.Parameter(torch.zeros(shape))])


@pytest.mark.parametrize(("rows", "columns"), [(20, 60), (60, 20)])
def test_first_step_has_adamw_size(rows, columns):
    """The update is 0.2 sqrt(max side) times an orthogonal matrix: root mean square near 0.2 lr."""
    p = torch.nn.Parameter(matrices(rows, columns))
    before, p.grad = p.detach().clone(), 50 * matrices(rows, columns, seed=1)
    Muon([p], lr=0.01, weight_decay=0.0).step()
    update = p.detach() - before
    assert update.square().mean().sqrt().item() == pytest.approx(0.2 * 0.01, rel=0.2)
    assert (update * p.grad).sum() < 0


def test_weight_decay_and_missing_gradients():
    decayed, idle = (torch.nn.Parameter(torch.ones(3, 5)) for _ in range(2))
    decayed.grad = torch.zeros(3, 5)
    Muon([decayed, idle], lr=0.5, weight_decay=0.1).step()
    torch.testing.assert_close(decayed.detach(), torch.full((3, 5), 0.95))
    assert torch.equal(idle.detach(), torch.ones(3, 5))


def test_least_squares_is_solved():
    inputs, truth = matrices(64, 6), matrices(6, 10, seed=1)
    weights = [torch.nn.Parameter(torch.zeros(6, 10)) for _ in range(2)]  # one shape, two problems
    targets = [inputs @ truth, inputs @ -truth]
    optimizer = Muon(weights, lr=0.1, weight_decay=0.0)
    losses = []
    for step in range(150):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 150)
        loss = sum((inputs @ w - t).square().mean() for w, t in zip(weights, targets, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 1000
    torch.testing.assert_close(weights[1].detach(), -weights[0].detach(), atol=1e-3, rtol=0)
