"""Finds the device of a process, and says what machine it runs on."""

import os
import platform
from pathlib import Path

import psutil
import torch

from danceopd.support.errors import UserError


def find_device(name: str) -> torch.device:
    """Finds the device that a run names: "cpu", "cuda", or "auto" for CUDA where it is there.

    Raises:
        UserError: There is no CUDA device, and "cuda" was asked for.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device is available; use cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def find_own_device(name: str) -> torch.device:
    """Finds the device of this process as find_device does: among several on a machine, the card of its number."""
    device = find_device(name)
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if device.type == "cuda" else device


def machine() -> dict:
    """Describes the machine that this process runs on, as plain values for a results file."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return {
        "cpu": next(names, platform.processor() or platform.machine()),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
