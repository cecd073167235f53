"""Random numbers that belong to samples: the same for a sample whatever batch, micro-batch or rank it is in."""

import hashlib
from collections.abc import Iterable

import torch


class SampleGenerators:
    """Draws each sample's random numbers by a generator of its own, in place of one torch.Generator for the batch.

    Args:
        seeds: One for each of the B samples, in their order.
    """

    def __init__(self, seeds: Iterable[int]):
        self.each = [torch.Generator().manual_seed(seed) for seed in seeds]


Generator = torch.Generator | SampleGenerators


def rand(generator: Generator, n: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Draws uniform numbers in [0, 1) for the first n samples.

    Args:
        generator: Draws them.
        n: Number of samples.
        shape: The shape of one sample's numbers.
        dtype: The dtype of the numbers.

    Returns:
        Tensor [n, *shape] on the CPU.

    Raises:
        ValueError: If there are generators for fewer samples.
    """
    return _draw("uniform_", generator, n, shape, dtype)


def randn(generator: Generator, n: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Draws normal numbers for the first n samples.

    Args:
        generator: Draws them.
        n: Number of samples.
        shape: The shape of one sample's numbers.
        dtype: The dtype of the numbers.

    Returns:
        Tensor [n, *shape] on the CPU.

    Raises:
        ValueError: If there are generators for fewer samples.
    """
    return _draw("normal_", generator, n, shape, dtype)


def _draw(kind: str, generator: Generator, n: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Fills a new tensor by the named method, a row by each sample's generator."""
    drawn = torch.empty(n, *shape, dtype=dtype)
    if isinstance(generator, torch.Generator):
        return getattr(drawn, kind)(generator=generator)
    if n > len(generator.each):
        raise ValueError(f"numbers for {n} samples of a batch of {len(generator.each)}")
    for own, out in zip(generator.each, drawn, strict=False):
        getattr(out, kind)(generator=own)
    return drawn


def step_generator(seed: int, step: int, stream: int = 0) -> torch.Generator:
    """Makes the generator of one step: a resumed run needs no random state but the step number.

    Args:
        seed: The run's.
        step: The number of the update.
        stream: Tells apart what is drawn for different ends, below 16.

    Returns:
        A generator on the CPU.
    """
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 16 + stream)


def sample_generators(seed: int, stream: int, numbers: list[int]) -> SampleGenerators:
    """Makes the generators of samples, so that a sample draws the same in any batch and on any rank.

    Args:
        seed: The run's.
        stream: Tells apart what is drawn for different ends.
        numbers: The number in the run of each sample.

    Returns:
        A generator for each, in their order.
    """
    first = _number(seed, stream)
    return SampleGenerators(first + number for number in numbers)


def _number(*parts: int) -> int:
    """Makes a seed of 56 bits from whole numbers: a slot may be added to it."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "little")
