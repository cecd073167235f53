"""Curves are smoothed without moving a constant."""

import numpy as np
import torch

from danceopd.report.charts import smooth


def test_smooth_keeps_a_constant_and_short_curves():
    torch.testing.assert_close(torch.tensor(smooth(np.full(500, 3.0))), torch.full((500,), 3.0, dtype=torch.float64))
    assert smooth(np.array([1.0, 5.0])).tolist() == [1.0, 5.0]
