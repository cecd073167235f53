"""Copies to a device for which the host does not wait."""

import torch

ON_HOST = ("cpu", "meta")  # devices that the host is never behind of


def to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Copies a tensor to a device, from pinned memory where it lies on the host, so that the host goes on at once.

    A plain copy from the host waits until the device has done all that it was given before.

    Args:
        tensor: The tensor, of any device.
        device: Where the copy lies.

    Returns:
        The copy; the tensor itself where it lies there.
    """
    device = torch.device(device)
    if tensor.device.type != "cpu" or device.type in ON_HOST:
        return tensor.to(device)
    # Expanded tensors cannot be pinned as they are: their rows share memory.
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)
