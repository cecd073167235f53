"""Writes a trace of a run's first updates by torch's profiler."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import profile, schedule, tensorboard_trace_handler


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
