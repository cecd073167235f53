"""The account of bytes moved."""

import os

import pytest
import torch
from danceopd_kernels.traffic import EagerTraffic, account, size, triton_traffic

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="counts in Triton's interpreter")


def test_streaming_kernels_move_little_more_than_they_must():
    rows = {name: (moved / least, eager / least) for name, moved, least, eager in account(samples=2, shape=(4, 64, 64))}
    for name in ("routed_velocity_mse", "euler_step_"):
        assert 1 <= rows[name][0] <= 1.05
    for ours, eager in rows.values():
        assert eager > 3 * ours


def test_what_eager_moves():
    x = torch.zeros(1000)
    with EagerTraffic() as moved:
        y = x + 1  # reads and writes 4,000 bytes
        y.view(10, 100).mul_(2)  # again; the view is free
        y.copy_(x)  # again; what is overwritten is not read
        x[:1].expand(1000) + y  # 4 bytes and 4,000 read, 4,000 written
    assert (moved.read, moved.written) == (16_004, 16_000)
    assert size(x[:1].expand(500)) == 4


def test_a_masked_lane_is_not_counted():
    from danceopd_kernels import euler_step_

    z, velocity = torch.zeros(2, 300), torch.zeros(2, 300)
    sigma, next_sigma = torch.ones(2), torch.zeros(2)
    with triton_traffic() as moved:
        euler_step_(z, velocity, sigma, next_sigma, active=torch.tensor([True, False]), backend="triton")
    # One sample's two tensors, and for each block of each sample a mask, for the active one's two noise levels.
    assert moved["read"] - 2 * 300 * 4 <= 64
    assert moved["written"] == 300 * 4
