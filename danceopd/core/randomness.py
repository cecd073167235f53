"""Random numbers that belong to samples: the same for a sample whatever batch, micro-batch or rank it is in."""

import hashlib
from collections.abc import Iterable

import torch


class SampleGenerators:
    """A generator for each sample of a batch [B], in its order; takes the place of one torch.Generator for them all."""

    def __init__(self, seeds: Iterable[int]):
        self.each = [torch.Generator().manual_seed(seed) for seed in seeds]


Generator = torch.Generator | SampleGenerators


def rand(generator: Generator, n: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Uniform numbers in [0, 1) for the first n samples: [n, *shape] on the CPU."""
    return _draw("uniform_", generator, n, shape, dtype)


def randn(generator: Generator, n: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal numbers for the first n samples: [n, *shape] on the CPU."""
    return _draw("normal_", generator, n, shape, dtype)


def _draw(kind: str, generator: Generator, n: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    drawn = torch.empty(n, *shape, dtype=dtype)
    if isinstance(generator, torch.Generator):
        return getattr(drawn, kind)(generator=generator)
    if n > len(generator.each):
        raise ValueError(f"numbers for {n} samples of a batch of {len(generator.each)}")
    for own, out in zip(generator.each, drawn, strict=False):
        getattr(out, kind)(generator=own)
    return drawn


def step_generator(seed: int, step: int, stream: int = 0) -> torch.Generator:
    """The generator of one step: a resumed run needs no random state but the step number."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 16 + stream)


def sample_generators(seed: int, stream: int, numbers: list[int]) -> SampleGenerators:
    """Of samples by their number in the run."""
    first = _number(seed, stream)
    return SampleGenerators(first + number for number in numbers)


def _number(*parts: int) -> int:
    """A seed of 56 bits from whole numbers: a slot may be added to it."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "little")
