"""Standard errors."""

import math

import torch


def standard_error(groups: list[torch.Tensor]) -> float:
    """Of the mean of the groups' means, each group's values independent."""
    return math.sqrt(sum(float(g.var()) / len(g) for g in groups if len(g) > 1)) / len(groups)
