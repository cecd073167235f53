"""Where an update's time goes: ranges for torch's profiler, nsys and ncu, and a trace of a run. docs/benchmarks.md."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch.autograd import profiler
from torch.profiler import profile, record_function, schedule, tensorboard_trace_handler


@contextmanager
def phase(name: str) -> Iterator[None]:
    """A range around a block, or as a decorator around a function: in NVTX on CUDA, and in torch's profiler."""
    with ExitStack() as ranges:
        if torch.cuda.is_initialized():
            ranges.enter_context(torch.cuda.nvtx.range(name))
        if profiler._is_profiler_enabled:  # a range without one is 20 us for nothing
            ranges.enter_context(record_function(name))
        yield


@contextmanager
def traced(folder: Path, steps: int) -> Iterator[Callable[[], None]]:
    """Torch's trace of a run's second update and those after it, `steps` in all, as a file in the folder; 0: none.

    Gives what is to be called after every update. What ends early leaves the trace of what there was.
    """
    if not steps:
        yield lambda: None
        return
    plan = schedule(wait=0, warmup=1, active=steps, repeat=1)
    with profile(schedule=plan, on_trace_ready=tensorboard_trace_handler(str(folder))) as trace:
        yield trace.step
