"""The largest rank, micro-batch and picture that fit a card, each with everything else as the configuration has it."""

import math
from dataclasses import dataclass

from danceopd.config.sections import Config
from danceopd.planning.memory import ACTIVATIONS, BASE, BEYOND, LEFT, STEP, Findings, micro_batch
from danceopd.planning.swapping import spared

OF_ADAPTER = ("student", "gradient", "optimizer state", "average (EMA)", "anchor", STEP)  # these grow with its rank
OF_PICTURES = (ACTIVATIONS, BEYOND, "states and answers", "latents, prompts, sources")  # and these with the pixels
SIDE = 32  # a picture's sides are multiples of it


@dataclass(frozen=True)
class Largest:
    """What fits a card by the estimate, each number for itself.

    Attributes:
        rank: The adapter's largest rank, up to the one that changes every layer in full; None for a student of all
            weights, or with ranks by pattern.
        samples: The largest micro-batch; 0 where none fits.
        resolution: The side of the largest square picture.
    """

    rank: int | None
    samples: int
    resolution: int

    def text(self) -> str:
        """Says it in a line."""
        parts = [f"samples in a micro-batch {self.samples}", f"resolution {self.resolution}"]
        if self.rank is not None:
            parts.insert(0, f"rank {self.rank}")
        return f"largest that fits, each alone with the rest as configured: {', '.join(parts)}"


def largest(config: Config, findings: Findings, memory: float) -> Largest | None:
    """Works out what fits a card, from what a dry run found.

    A rank's memory grows with the rank and a picture's with its pixels, of which prompts are no part; where blocks
    wait by ``auto``, more of them may.

    Args:
        config: The run's.
        findings: The dry run's.
        memory: Bytes of the card that a process can have.

    Returns:
        What fits; None without activations, which need prepared rows and the transformer.
    """
    if not findings.activations or not findings.pixels:
        return None
    sizes = {name: size for name, (size, _) in findings.memory.items()}
    free = memory - LEFT - findings.total_memory() + _more(config, findings)
    lora, rank = config.student.lora, None
    if lora and not lora.rank_pattern:
        own = sum(sizes.get(name, 0.0) for name in OF_ADAPTER)
        rank = max(0, math.floor(lora.rank * (1 + free / own)))
        rank = min(rank, findings.full_rank or rank)
    pictures = sum(sizes.get(name, 0.0) for name in OF_PICTURES)
    pixels = findings.pixels * max(0.0, 1 + free / pictures)
    row = sizes[ACTIVATIONS] / micro_batch(config)
    for_rows = free + sizes[ACTIVATIONS] + sizes[BEYOND]
    needed = math.prod(findings.forward) if findings.forward else 0.0  # of forwards without gradient, at other times
    samples = math.floor(for_rows / row) if for_rows >= needed else 0
    return Largest(rank, samples, math.floor(math.sqrt(pixels) / SIDE) * SIDE)


def _more(config: Config, findings: Findings) -> float:
    """Counts the bytes of the base that could wait in host memory besides, where their number is ours to choose."""
    there = len(findings.blocks)
    if config.training.swap_blocks != "auto" or BASE not in findings.memory or not there:
        return 0.0
    now = findings.swap.spared if findings.swap else 0.0
    return spared(findings, there) - now
