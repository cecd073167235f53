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


# NVIDIA's data sheets "H100 Tensor Core GPU", "H200 Tensor Core GPU", "A100 Tensor Core GPU", "L40S" and "HGX B200",
# and, in appendix A of each, "NVIDIA Ampere GA102 GPU Architecture" (RTX 3090), "NVIDIA Ada GPU Architecture" (RTX
# 4080, 4090) and "NVIDIA RTX Blackwell GPU Architecture" (RTX 5090). Figures with sparsity are halved, and those of
# GeForce cards are with sums in float32, as products have them here. Memory is what a process can have of what is
# published.
CARDS = {
    # NVLink 4, 400 Gb/s, PCIe 5, HBM3
    "h100": Card("H100 SXM 80 GB", 79 * GIB, 989e12, 450e9, 50e9, 64e9, 3.35e12, 1979e12),
    # As a card to plug in, HBM2e; its bridge joins two of them alone, so that a machine of 8 talks over PCIe 5.
    "h100-pcie": Card("H100 PCIe 80 GB", 79 * GIB, 756e12, 64e9, 50e9, 64e9, 2.0e12, 1513e12),
    # The H100's chip with HBM3e
    "h200": Card("H200 SXM 141 GB", 139 * GIB, 989e12, 450e9, 50e9, 64e9, 4.8e12, 1979e12),
    # NVLink 5, 400 Gb/s, PCIe 5, HBM3e
    "b200": Card("B200 SXM 180 GB", 178 * GIB, 2250e12, 900e9, 50e9, 64e9, 7.7e12, 4500e12),
    # NVLink 3, 200 Gb/s, PCIe 4, HBM2e
    "a100": Card("A100 SXM 80 GB", 79 * GIB, 312e12, 300e9, 25e9, 32e9, 2.039e12),
    "a100-40": Card("A100 SXM 40 GB", 39 * GIB, 312e12, 300e9, 25e9, 32e9, 1.555e12),  # HBM2
    # No NVLink: the cards of a machine talk over PCIe, 4 and, of the 5090, 5. GDDR6, GDDR6X, GDDR7
    "l40s": Card("L40S 48 GB", 44 * GIB, 362e12, 32e9, 25e9, 32e9, 0.864e12, 733e12),
    "rtx-3090": Card("GeForce RTX 3090 24 GB", 23.5 * GIB, 71e12, 32e9, 25e9, 32e9, 0.936e12),
    "rtx-4080": Card("GeForce RTX 4080 16 GB", 15.5 * GIB, 97.5e12, 32e9, 25e9, 32e9, 0.7168e12, 194.9e12),
    "rtx-4090": Card("GeForce RTX 4090 24 GB", 23.5 * GIB, 165.2e12, 32e9, 25e9, 32e9, 1.008e12, 330.3e12),
    "rtx-5090": Card("GeForce RTX 5090 32 GB", 31 * GIB, 209.5e12, 64e9, 25e9, 64e9, 1.792e12, 419e12),
}

# What torch calls a card, and its key in CARDS; the first that is in the name counts, None is a card not listed.
NAMES = {
    "H100 NVL": None, "H200 NVL": None, "H100 PCIe": "h100-pcie", "H100": "h100", "GH200": None, "H200": "h200",
    "GB200": None, "B200": "b200", "A100-SXM4-40GB": "a100-40", "A100-PCIE-40GB": "a100-40", "A100": "a100",
    "L40S": "l40s", "RTX 3090 Ti": None, "RTX 3090": "rtx-3090", "RTX 4080 SUPER": None, "RTX 4080 Laptop": None,
    "RTX 4080": "rtx-4080", "RTX 4090 D": None, "RTX 4090 Laptop": None, "RTX 4090": "rtx-4090", "RTX 5090 D": None,
    "RTX 5090 Laptop": None, "RTX 5090": "rtx-5090",
}  # fmt: skip


def card_of(device: str) -> str | None:
    """Finds the key in CARDS of a GPU by the name that torch gives it; None for another."""
    return next((key for name, key in NAMES.items() if name in device), None)


def gather_seconds(size: float, gpus: int, card: Card) -> float:
    """Estimates the seconds of an all-gather with `size` bytes on each card, or of a reduce-scatter of as many.

    Each card takes in what it has not; a machine takes in what its cards lack over all of their adapters together,
    and hands it on over NVLink at the same time.
    """
    machines = math.ceil(gpus / NODE)
    inside = size * (1 - 1 / gpus) / card.nvlink
    return max(inside, size * (1 - 1 / machines) / (min(gpus, NODE) * card.network))
