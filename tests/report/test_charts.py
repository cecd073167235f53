"""Curves are smoothed without moving a constant; long ones have as many points as are seen, a lone point is one."""

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from danceopd.report.charts import PIECES, _draw_curve, _draw_health, _draw_losses, outline, smooth, trend


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


def test_a_long_curve_keeps_its_shape_and_loses_its_points():
    x = np.arange(100_003.0)
    y = np.sin(x / 9_000) + np.random.default_rng(0).normal(size=len(x)) / 50
    y[[0, 70_000, -1]] = 9, -8, 7
    shown, values = outline(x, y)
    assert len(shown) <= 2 * PIECES
    assert (np.diff(shown) > 0).all()
    assert {9.0, -8.0, 7.0} <= set(values)
    assert np.array_equal(y[shown.astype(int)], values)
    middle, level = trend(x, y)
    assert len(middle) == len(level) == PIECES
    inside = slice(40, -40)  # of the window
    assert np.abs(level - np.sin(middle / 9_000))[inside].max() < 0.1


def test_a_short_curve_is_drawn_whole():
    x, y = np.arange(2.0 * PIECES), np.arange(2.0 * PIECES) % 7
    assert all(np.array_equal(a, b) for a, b in zip(outline(x, y), (x, y), strict=True))
    assert np.array_equal(trend(x, y)[1], smooth(y))
