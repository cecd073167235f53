"""Tells torch of the pretend card before any test has made a backward, in whatever order they run."""

import pretend_card
import pytest
import torch

from danceopd.world.dit import DiT, DiTConfig
from danceopd.world.files import save_model

pretend_card.register()

TINY = DiTConfig(width=16, depth=1, heads=2, mlp_ratio=1)


@pytest.fixture(scope="session")
def networks(tmp_path_factory):
    """Three networks whose every parameter counts, on disk."""
    folder = tmp_path_factory.mktemp("networks")
    for seed, name in enumerate(("base", "one", "two")):
        torch.manual_seed(seed)
        network = DiT(TINY)
        with torch.no_grad():
            for parameter in network.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.05)
        save_model(network, folder / f"{name}.safetensors")
    return folder
