"""Where a test of the kernels runs: on the CPU, and once more on the GPU of a machine that has one."""

import torch

_places = ["cpu"]


def here() -> str:
    """The device of the test that runs now: "cpu" or "cuda"."""
    return _places[-1]


def devices() -> list[str]:
    """The devices of this machine."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def go_to(device: str) -> None:
    """Makes `device` the one of the tests that run from now on."""
    _places[-1] = device
