"""The running mean of a student's weights, against diffusers'."""

import copy

import pytest
import torch
from torch import nn

from danceopd.training.engine import Average

diffusers = pytest.importorskip("diffusers.training_utils")


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
def test_average_is_that_of_diffusers(decay):
    """Which keeps less than its decay at first: a short run is not averaged with where it began."""
    torch.manual_seed(0)
    network = nn.Linear(3, 2)
    average = Average(network, decay)
    reference = diffusers.EMAModel(copy.deepcopy(network).parameters(), decay=decay)
    for n in range(40):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.normal_()
        average.update(network)
        reference.step(network.parameters())
        for mine, theirs in zip(average.module.parameters(), reference.shadow_params, strict=True):
            torch.testing.assert_close(mine, theirs)
        if n == 0:
            assert all(map(torch.equal, average.module.parameters(), network.parameters()))


def test_a_short_run_forgets_where_it_began():
    network = nn.Linear(1, 1, bias=False)
    average = Average(network, 0.99)
    for n in range(43):
        nn.init.constant_(network.weight, float(n > 0))
        average.update(network)
    assert average.module.weight.item() > 0.999
