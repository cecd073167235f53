"""Ranges around the parts of an update, for profilers."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from torch.autograd import profiler
from torch.profiler import record_function

recorders: list[Callable[[str], AbstractContextManager]] = []  # recorder(name) is entered around every phase


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Puts a range around a block, or as a decorator around a function: in NVTX on CUDA, and in torch's profiler.

    Args:
        name: The name of the range.

    Returns:
        The context.
    """
    with ExitStack() as ranges:
        if torch.cuda.is_initialized():
            ranges.enter_context(torch.cuda.nvtx.range(name))
        if profiler._is_profiler_enabled:  # a range without one is 20 us for nothing
            ranges.enter_context(record_function(name))
        for recorder in recorders:
            ranges.enter_context(recorder(name))
        yield
