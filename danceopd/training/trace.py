"""Writes a trace of a run's first updates by torch's profiler."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import profile, schedule, tensorboard_trace_handler


@contextmanager
def traced(folder: Path, steps: int) -> Iterator[Callable[[], None]]:
    """Traces a run's second update and those after it by torch's profiler.

    What ends early leaves the trace of what there was.

    Args:
        folder: Where the trace is written.
        steps: Number of updates in it; 0 traces none.

    Returns:
        The context of a function that is to be called after every update.
    """
    if not steps:
        yield lambda: None
        return
    plan = schedule(wait=0, warmup=1, active=steps, repeat=1)
    with profile(schedule=plan, on_trace_ready=tensorboard_trace_handler(str(folder))) as trace:
        yield trace.step
