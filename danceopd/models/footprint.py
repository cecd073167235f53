"""What a forward, or anything else, takes: the most that is alive in it at once."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_counted: ContextVar[bool] = ContextVar("counted", default=True)


@contextmanager
def uncounted() -> Iterator[None]:
    """Leaves out of `forward_bytes` what is made inside: copies of weights, which are no part of a forward's rows."""
    token = _counted.set(False)
    try:
        yield
    finally:
        _counted.reset(token)


class _Alive(TorchDispatchMode):
    """Adds up the bytes of the storages that operations make, and keeps the largest sum."""

    def __init__(self):
        super().__init__()
        self.alive: dict[int, weakref.ref] = {}
        self.now = self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not _counted.get():
            return func(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        made = {storage_number(tensor): tensor for tensor in tensors_in(out)}
        if made := {key: tensor for key, tensor in made.items() if key not in self.alive}:
            before = {storage_number(tensor) for tensor in tensors_in((args, kwargs))}
            for key, tensor in made.items():
                if key not in before:
                    self._add(key, tensor)
        return out

    def _add(self, key: int, tensor: torch.Tensor) -> None:
        """Counts a tensor's storage until it goes."""
        storage = tensor.untyped_storage()
        size = storage.nbytes()

        def gone(_):
            del self.alive[key]
            self.now -= size

        self.alive[key] = weakref.ref(storage, gone)  # torch keeps this object as long as the memory
        self.now += size
        self.most = max(self.most, self.now)


def tensors_in(value) -> Iterator[torch.Tensor]:
    """Lists the tensors of an operation's arguments or result, which pytree takes ten times as long for."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors_in(part)
    elif isinstance(value, dict):
        yield from tensors_in(tuple(value.values()))


def storage_number(tensor: torch.Tensor) -> int:
    """Returns a number of the storage that a tensor lies in."""
    try:
        return tensor.untyped_storage()._cdata
    except NotImplementedError:  # a tensor of several
        return id(tensor)


def most_alive(function: Callable[[], object]) -> int:
    """Measures the most bytes of tensors made in a function that are alive at once.

    It looks at the operations, so that it is the same on the meta device, the CPU and a card; what a library takes
    inside one operation is not seen.

    Args:
        function: Computes; on any device, also the meta device.

    Returns:
        Bytes, beside what was there before.
    """
    with _Alive() as alive:
        function()
    return alive.most


@torch.no_grad()
def forward_bytes(forward: Callable[[], object]) -> int:
    """Measures the most bytes that a forward without gradient holds at once, as `most_alive` does.

    Args:
        forward: Asks a network.

    Returns:
        Bytes, beside the network's own weights and the inputs.
    """
    return most_alive(forward)
