"""Finds the device of a run."""

import torch

from danceopd.support.errors import UserError


def find_device(name: str) -> torch.device:
    """The device of a run. Raises UserError for one that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device is available; use cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
