"""A small run of the picture world, for all tests of training."""

import pytest
from world_runs import raw_run, write_networks


@pytest.fixture
def raw(tmp_path):
    """A small run with two sources, as plain values."""
    write_networks(tmp_path)
    return raw_run(tmp_path)
