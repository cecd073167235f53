"""Finds the device of a process, and says what machine it runs on."""

import os
import platform
import re
import sys
from pathlib import Path

import psutil
import torch

from danceopd.support.errors import UserError

# The least NVIDIA driver that each version of CUDA runs on, by its major number: NVIDIA's CUDA Compatibility, table 1.
DRIVERS = {11: 450, 12: 525, 13: 580}
LOADED = Path("/proc/driver/nvidia/version")  # of the driver that Linux has loaded


def find_device(name: str) -> torch.device:
    """Finds the device that a run names: "cpu", "cuda", or "auto" for CUDA where it is there.

    Where a machine has an NVIDIA driver and torch cannot use it, "auto" says why on the standard error.

    Raises:
        UserError: There is no CUDA device, and "cuda" was asked for.
    """
    if name == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    reason = no_cuda()
    if name == "cuda":
        raise UserError(f"no CUDA device is available{f': {reason}' if reason else ''}; use cpu or auto")
    if reason:
        print(f"running on the CPU: {reason}", file=sys.stderr)
    return torch.device("cpu")


def no_cuda() -> str | None:
    """Tells why torch has no CUDA on a machine with an NVIDIA driver; None without a driver, or where it isn't known.

    The driver's version is read from Linux alone.
    """
    try:
        said = LOADED.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(r"Kernel Module\D*?(?:x86_64|aarch64)?\s+(\d+)(\.[\d.]+)?", said)
    if not found:
        return None
    driver, cuda = found.group(1) + (found.group(2) or ""), torch.version.cuda
    if cuda is None:
        return (
            f"torch {torch.__version__} is built without CUDA; install a torch with it (this machine has NVIDIA's "
            f"driver {driver})"
        )
    least = DRIVERS.get(int(cuda.partition(".")[0]))
    if least and int(found.group(1)) < least:
        return (
            f"torch {torch.__version__} is built for CUDA {cuda}, which needs NVIDIA's driver {least} or later, and "
            f"this machine has {driver}; install a newer driver, or a torch for an older CUDA"
        )
    return None


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
