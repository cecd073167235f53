"""What a captured graph cannot do, and how it is found before the capture."""

import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from danceopd.models.footprint import storage_number


class NotCapturable(Exception):
    """Says why a step cannot be a graph."""


class GraphSafe(TorchDispatchMode):
    """Raises NotCapturable at the first operation that a captured graph could not repeat, before any is captured.

    That is a value read on the host, a shape that depends on values, host data made into a tensor, and a copy between
    devices. `before` holds each tensor that was there before and was read: a graph has its address alone, so whoever
    replays it keeps the tensors, even where the cache that they came from has dropped them.
    """

    def __init__(self):
        super().__init__()
        self.before: dict[int, torch.Tensor] = {}
        self._made: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        if reason := _refusal(func, args, kwargs, tensors):
            raise NotCapturable(f"{func} {reason}")
        out = func(*args, **kwargs)
        for tensor in tensors:
            if (key := storage_number(tensor)) not in self._made:
                self.before.setdefault(key, tensor)
        # An output in the storage of what was there before is a view of it.
        self._made |= {storage_number(value) for value in tree_leaves(out) if isinstance(value, torch.Tensor)} - set(
            self.before
        )
        return out


def _refusal(func, args, kwargs, tensors: list[torch.Tensor]) -> str | None:
    """Says why a graph could not repeat an operation; None where it could."""
    name, tags = str(func).split(".")[1] if "." in str(func) else str(func), getattr(func, "tags", ())
    if torch.Tag.data_dependent_output in tags:
        return "reads a value on the host"
    if name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"):
        if any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]):
            return "selects by a mask, so that a shape depends on values"
    elif torch.Tag.dynamic_output_shape in tags:
        return "has a shape that depends on values"
    if name == "lift_fresh":
        return "makes host data a tensor"
    devices = {tensor.device.type for tensor in tensors}
    if name == "_to_copy" and kwargs.get("device") is not None:
        devices.add(torch.device(kwargs["device"]).type)
    if len(devices) > 1:
        return f"copies between {' and '.join(sorted(devices))}"
    return None


@contextmanager
def constants(made: dict) -> Iterator[None]:
    """Makes numbers and lists that this thread makes tensors of the same tensor each time.

    Models make some at every step; a graph could not repeat the copy to the device. The two functions are replaced,
    since a mode of torch's would have compiled blocks compiled once more.

    Args:
        made: Keeps the tensors.

    Returns:
        The context.
    """
    thread = threading.get_ident()

    def once(make):
        def tensor(*args, **kwargs):
            leaves = tree_leaves((args, kwargs))
            if threading.get_ident() != thread or any(isinstance(leaf, torch.Tensor) for leaf in leaves):
                return make(*args, **kwargs)
            key = f"{make.__name__} {args} {kwargs}"
            if key not in made:
                made[key] = make(*args, **kwargs)
            return made[key]

        return tensor

    before = torch.tensor, torch.as_tensor
    torch.tensor, torch.as_tensor = map(once, before)
    try:
        yield
    finally:
        torch.tensor, torch.as_tensor = before


@contextmanager
def no_kept_casts() -> Iterator[None]:
    """Keeps autocast from caching the weights that it casts: one that outlives a step would be old in later steps."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


class Pool:
    """Holds what the graphs of a run share: the stream that they are captured on, their memory, and constants.

    What one graph computes lies where another computed before, so that graphs take turns: what is read of one is read
    before the next is replayed.

    Args:
        device: The card.

    Attributes:
        holders: Whoever keeps graphs of it; `forget(reason)` drops theirs for good.
    """

    def __init__(self, device: torch.device):
        self.cards = torch.get_device_module(device)
        self.stream, self.memory, self.constants = self.cards.Stream(), self.cards.graph_pool_handle(), {}
        self.holders: weakref.WeakSet = weakref.WeakSet()
        self._given_up = False

    def give_up(self) -> bool:
        """Drops all graphs of the run where memory has run out: they pay least where samples are large.

        Returns:
            Whether that is new, so that what did not fit may be tried again as it was.
        """
        if self._given_up:
            return False
        self._given_up = True
        for holder in self.holders:
            holder.forget("memory ran out")
        self.cards.empty_cache()
        self.say("the run goes on", "memory ran out")
        return True

    def graph(self):
        """Makes a graph to be captured."""
        return self.cards.CUDAGraph()

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Goes over to the stream of captures, and back even where the end of a capture fails.

        Returns:
            The context.

        Raises:
            NotCapturable: For what CUDA cannot capture.
        """
        self.stream.wait_stream(self.cards.current_stream())
        try:
            with self.cards.stream(self.stream), constants(self.constants):
                yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # CUDA's
            raise NotCapturable(str(error).strip().splitlines()[0]) from error
        finally:
            self.cards.current_stream().wait_stream(self.stream)

    def into(self, graph):
        """Captures what is done inside into a graph; threads of NCCL and of data loaders may go on meanwhile."""
        return self.cards.graph(graph, pool=self.memory, stream=self.stream, capture_error_mode="thread_local")

    @staticmethod
    def say(what: str, reason: str) -> None:
        """Says once that something runs without graphs.

        Args:
            what: Subject and verb.
            reason: Why.
        """
        print(f"{what} without CUDA graphs: {reason} (training.cuda_graphs: false leaves them out)", file=sys.stderr)
