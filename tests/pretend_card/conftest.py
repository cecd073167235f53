"""Tells torch of the pretend card before any test has made a backward, in whatever order they run."""

import pretend_card
import pytest
from world_runs import write_networks

from danceopd.world.dit import DiTConfig

pretend_card.register()

TINY = DiTConfig(width=16, depth=1, heads=2, mlp_ratio=1)


@pytest.fixture(scope="session")
def networks(tmp_path_factory):
    """Three networks whose every parameter counts, on disk."""
    folder = tmp_path_factory.mktemp("networks")
    write_networks(folder, sizes=TINY)
    return folder
