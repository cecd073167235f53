"""Streams and graphs of the pretend card.

A graph holds what it read before its capture by address alone, as CUDA's does: a replay that reads memory which is gone
raises `GraphFault`. What it made itself lies in its pool for as long as the graph is there. A card gives memory that
nobody holds to the next graph of the same pool; here each keeps its own, which holds no numbers any more once the other
graph has run.
"""

import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from pretend_trees import tree_leaves, tree_map
from torch.multiprocessing.reductions import StorageWeakRef


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
        self._reused: weakref.WeakKeyDictionary[Graph, list[torch.Tensor]] = weakref.WeakKeyDictionary()
        self._spoilt_by: weakref.WeakSet[Graph] = weakref.WeakSet()  # since its last replay

    def begin(self, pool: weakref.WeakSet) -> None:
        """Begins a capture, which may take the memory of the pool's other graphs that nobody holds now."""
        self.records = []
        (in_a_list,) = _references([object()])
        for other in pool:
            held = [references > in_a_list for references in _references(other._memories)]
            self._reused[other] = [x for x, kept in zip(other._made.values(), held, strict=True) if not kept]
        pool.add(self)

    def _spoil(self, other: "Graph", tensors: list[torch.Tensor]) -> None:
        """Leaves no numbers where a replay of this graph may have written over another's."""
        if tensors and self not in other._spoilt_by:
            other._spoilt_by.add(self)
            for tensor in tensors:
                if tensor.is_floating_point():
                    tensor.untyped_storage().fill_(0xFF)  # NaN, of floats of each size

    def _write_over(self, pool: weakref.WeakSet) -> None:
        for other in pool:
            if other is not self:
                later = bool(other._reused.get(self))  # it took what this graph writes again
                self._spoil(other, list(other._made.values()) if later else self._reused.get(other, []))
        self._spoilt_by.clear()

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
        self._write_over(self.pool)
        for func, noted, outputs in self.records:
            args, kwargs = tree_map(lambda x: x.tensor() if isinstance(x, _Outside) else x, noted)
            result = tree_leaves(func(*args, **kwargs))
            for old, new in zip(outputs, result, strict=True):
                if old is not None:
                    old.copy_(new)


def _references(objects: list) -> list[int]:
    return [sys.getrefcount(x) for x in objects]


@contextmanager
def capture(module, graph: Graph, stream: Stream | None, pool: weakref.WeakSet) -> Iterator[None]:
    """Captures what is done inside into a graph of a pool."""
    if module.capturing is not None:
        raise GraphFault("a capture inside of a capture")
    module.card.wait("the beginning of a capture")
    graph.pool = pool
    graph.begin(pool)
    with module.stream(stream or Stream(module)):
        module.capturing = graph
        try:
            yield
        finally:
            module.capturing = None
            graph.end()
