"""Works out standard errors."""

import math

import torch


def standard_error(groups: list[torch.Tensor]) -> float:
    """Returns the standard error of the mean of the groups' means; the values [n] of each group are independent."""
    return math.sqrt(sum(float(g.var()) / len(g) for g in groups if len(g) > 1)) / len(groups)
