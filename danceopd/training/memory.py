"""How much memory is free for each rank."""

import os

import torch


def free_bytes(device: torch.device) -> int:
    """Of the device, or this rank's share of the host's."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    import psutil  # DeepSpeed needs it too

    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def gibibytes(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"
