"""Streams and graphs of the pretend card.

A graph holds what it read before its capture by address alone, as CUDA's does: a replay that reads memory which is gone
raises `GraphFault`. What it made itself lies in its pool for as long as the graph is there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves, tree_map


class GraphFault(RuntimeError):
    """Says what of a graph's use would be wrong on a card."""


class Race(RuntimeError):
    """Says that a stream read what another has not been waited for."""


class Stream:
    """An order of operations; what another stream wrote is there once it was waited for."""

    def __init__(self, module=None, **_):
        self.module, self.tick, self.seen = module, 0, {}

    def wait_stream(self, other: "Stream") -> None:
        """Makes what follows here come after what is in the other stream now."""
        self.seen |= {s: max(t, self.seen.get(s, 0)) for s, t in (*other.seen.items(), (other, other.tick))}

    def synchronize(self) -> None:
        self.module.card.wait("a stream's synchronize")


class _Outside(NamedTuple):
    """A tensor that was there before the capture, by its address."""

    storage: StorageWeakRef
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    def tensor(self) -> torch.Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        if storage is None:
            raise GraphFault(f"a graph reads memory that is gone: {self.dtype} {list(self.shape)}")
        return torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.shape, self.stride)


class Graph:
    """A captured sequence of operations."""

    def __init__(self):
        self.records: list[tuple] | None = None
        self._made: dict[int, torch.Tensor] = {}  # storages of the pool
        self._kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # what a capture must leave as it was
        self._memories: list = []

    def before(self, func, args, kwargs) -> None:
        """Keeps what an operation is about to write outside of the pool: a capture computes nothing."""
        for value, argument in zip(args, func._schema.arguments, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in (x for x in tree_leaves(value) if isinstance(x, torch.Tensor)):
                    key = tensor.untyped_storage()._cdata
                    if key not in self._made and (key, tensor.storage_offset()) not in self._kept:
                        self._kept[key, tensor.storage_offset()] = (tensor, tensor.clone())

    def record(self, module, func, args, kwargs, result) -> None:
        """Notes an operation that has run."""

        def outside(x):
            if not isinstance(x, torch.Tensor) or x.untyped_storage()._cdata in self._made:
                return x
            storage = x.untyped_storage()
            return _Outside(StorageWeakRef(storage), x.dtype, x.shape, x.stride(), x.storage_offset())

        noted = tree_map(outside, (args, kwargs))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        outputs = []
        for x in tree_leaves(result):
            fresh = isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in given
            outputs.append(x if fresh else None)
            if fresh:
                self._made[x.untyped_storage()._cdata] = x
                self._memories.append(module.memory_of(x))
            elif isinstance(x, torch.Tensor) and x.untyped_storage()._cdata in self._made:
                pass  # a view of what the graph made
        self.records.append((func, noted, outputs))

    def end(self) -> None:
        """Leaves what was written as it was."""
        for tensor, value in self._kept.values():
            tensor.copy_(value)
        self._kept.clear()

    @torch.no_grad()
    def replay(self) -> None:
        """Does the operations again, at the same addresses."""
        if self.records is None:
            raise GraphFault("a graph is replayed that was not captured")
        for func, noted, outputs in self.records:
            args, kwargs = tree_map(
                lambda x: x.tensor() if isinstance(x, _Outside) else x, noted, is_leaf=lambda x: isinstance(x, _Outside)
            )
            result = tree_leaves(func(*args, **kwargs))
            for old, new in zip(outputs, result, strict=True):
                if old is not None:
                    old.copy_(new)


@contextmanager
def capture(module, graph: Graph, stream: Stream | None) -> Iterator[None]:
    """Captures what is done inside into a graph."""
    if module.capturing is not None:
        raise GraphFault("a capture inside of a capture")
    module.card.wait("the beginning of a capture")
    graph.records = []
    with module.stream(stream or Stream(module)):
        module.capturing = graph
        try:
            yield
        finally:
            module.capturing = None
            graph.end()
