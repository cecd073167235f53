"""Curves are smoothed without moving a constant, and a lone point is seen."""

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from danceopd.report.charts import _draw_curve, _draw_health, _draw_losses, smooth


def test_smooth_keeps_a_constant_and_short_curves():
    torch.testing.assert_close(torch.tensor(smooth(np.full(500, 3.0))), torch.full((500,), 3.0, dtype=torch.float64))
    assert smooth(np.array([1.0, 5.0])).tolist() == [1.0, 5.0]


@pytest.mark.parametrize(("count", "marker"), [(1, "o"), (2, "None")])
def test_a_lone_point_is_seen(count, marker):
    x = np.arange(count, dtype=float)
    for draw in (
        lambda ax: _draw_losses(ax, "Loss", {"loss": (x, x + 1)}, ["#000000"]),
        lambda ax: _draw_curve(ax, "Gradient norm", x, x + 1),
        lambda ax: _draw_health(ax, "velocity_norm_ratio", {"0.5": (x, x + 1)}),
    ):
        ax = Figure().subplots()
        draw(ax)
        assert marker in [line.get_marker() for line in ax.lines]
        assert ("o" in [line.get_marker() for line in ax.lines]) == (count == 1)
