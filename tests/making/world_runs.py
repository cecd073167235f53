"""Small runs in the picture world: random networks and their configuration."""

from pathlib import Path

import torch

from danceopd.config.reading import parse_config
from danceopd.config.sections import Config
from danceopd.world.dit import DiT, DiTConfig
from danceopd.world.files import save_model

TINY = DiTConfig(width=32, depth=1, heads=2, mlp_ratio=2)


def random_network(seed: int, sizes: DiTConfig = TINY) -> DiT:
    """A network whose every parameter counts: the zero-initialised ones are drawn too."""
    torch.manual_seed(seed)
    network = DiT(sizes)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    return network.eval()


def write_networks(folder: Path, names=("base", "one", "two"), sizes: DiTConfig = TINY) -> None:
    """Writes a random network for each name, the seed its place in the list."""
    for seed, name in enumerate(names):
        save_model(random_network(seed, sizes), folder / f"{name}.safetensors")


def two_sources(folder: Path, size: int) -> dict:
    """The sections of a student and two sources, one of which edits: networks in a folder, and so many samples each."""
    return {
        "student": {"init_from": str(folder / "base.safetensors")},
        "sources": {name: {"weights": str(folder / f"{name}.safetensors")} for name in ("one", "two")},
        "capabilities": {
            "t2i": {"source": "one", "task": "t2i", "data": {"world": "t2i", "size": size}},
            "edit": {"source": "two", "task": "edit", "data": {"world": "edit", "size": size}},
        },
    }


def raw_run(folder: Path) -> dict:
    """A run with two sources, of the networks in a folder, as plain values."""
    return {
        **two_sources(folder, 50),
        "rollout": {"num_inference_steps": 4},
        "training": {
            "output_dir": str(folder / "run"),
            "max_steps": 6,
            "batch_size": 8,
            "save_every": 2,
            "sample_every": 4,
            "log_every": 1,
        },
        "evaluation": {"times": 2, "quick": 1, "num_inference_steps": 4},
    }


def config_of(raw: dict, **training) -> Config:
    """A run's configuration, with changes to its training."""
    return parse_config({**raw, "training": {**raw["training"], **training}})
