"""Lists cards: their memory, speed and links."""

import math
from dataclasses import dataclass

from danceopd.support.memory import GIB

NODE = 8  # cards in a machine


@dataclass(frozen=True)
class Card:
    """A card's figures as published.

    Attributes:
        name: The product's.
        memory: Bytes.
        operations: Dense bf16 operations a second.
        nvlink: Bytes a second in one direction inside a machine.
        network: Bytes a second in one direction between machines, over the card's own adapter.
        host: Bytes a second in one direction to host memory.
        bandwidth: Bytes a second of its memory.
        fp8: Dense FP8 operations a second; None where it does not multiply FP8.
    """

    name: str
    memory: float
    operations: float
    nvlink: float
    network: float
    host: float
    bandwidth: float
    fp8: float | None = None


# NVIDIA's data sheets "H100 Tensor Core GPU" and "A100 Tensor Core GPU". Their figures with sparsity are halved.
CARDS = {
    # NVLink 4, 400 Gb/s, PCIe 5, HBM3
    "h100": Card("H100 SXM 80 GB", 79 * GIB, 989e12, 450e9, 50e9, 64e9, 3.35e12, 1979e12),
    # As a card to plug in, HBM2e; its bridge joins two of them alone, so that a machine of 8 talks over PCIe 5.
    "h100-pcie": Card("H100 PCIe 80 GB", 79 * GIB, 756e12, 64e9, 50e9, 64e9, 2.0e12, 1513e12),
    # NVLink 3, 200 Gb/s, PCIe 4, HBM2e
    "a100": Card("A100 SXM 80 GB", 79 * GIB, 312e12, 300e9, 25e9, 32e9, 2.039e12),
    "a100-40": Card("A100 SXM 40 GB", 39 * GIB, 312e12, 300e9, 25e9, 32e9, 1.555e12),  # HBM2
}


def gather_seconds(size: float, gpus: int, card: Card) -> float:
    """Estimates the seconds of an all-gather with `size` bytes on each card, or of a reduce-scatter of as many.

    Each card takes in what it has not; a machine takes in what its cards lack over all of their adapters together,
    and hands it on over NVLink at the same time.
    """
    machines = math.ceil(gpus / NODE)
    inside = size * (1 - 1 / gpus) / card.nvlink
    return max(inside, size * (1 - 1 / machines) / (min(gpus, NODE) * card.network))
