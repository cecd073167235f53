"""What a forward, or anything else, takes: the most that is alive in it at once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PURGE = 64  # storages made between two looks at which of them are gone

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
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.now = self.most = self.made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not _counted.get():
            return func(*args, **(kwargs or {}))
        before = {storage_number(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, torch.Tensor) or (key := storage_number(tensor)) in before:
                continue
            known = self.alive.get(key)
            if known is not None:
                if not known[0].expired():
                    continue
                self.now -= known[1]  # another storage at the same place
            storage = tensor.untyped_storage()
            self.alive[key] = StorageWeakRef(storage), storage.nbytes()
            self.now += storage.nbytes()
            self.made += 1
            if self.now > self.most or self.made % PURGE == 0:
                self._purge()
            self.most = max(self.most, self.now)
        return out

    def _purge(self) -> None:
        """Forgets the storages that are gone."""
        for key in [key for key, (storage, _) in self.alive.items() if storage.expired()]:
            self.now -= self.alive.pop(key)[1]


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
