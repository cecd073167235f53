"""What `torch.card` is: streams, memory and its statistics, the generator, and graphs."""

import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from pretend_graphs import Graph, Race, Stream, capture

CAPACITY = 2**34  # bytes of the card's memory


class _Memory:
    """The bytes of one storage, counted for as long as a tensor of the card lies in it."""

    def __init__(self, module, size: int):
        self.module, self.size = module, size
        self.written: tuple[Stream, int] | None = None
        module.allocated += size
        module.peak = max(module.peak, module.allocated)

    def __del__(self):
        self.module.allocated -= self.size


class Event:
    """A moment of a stream, which is past once the host has waited for the card."""

    def __init__(self, module):
        self.module, self.seconds = module, None

    def record(self, stream=None) -> None:
        if self.module.capturing is not None:
            raise RuntimeError("an event that is timed, in a capture")
        self.seconds, self.waited = time.perf_counter(), self.module.card.waited

    def query(self) -> bool:
        return self.module.card.waited > self.waited

    def synchronize(self) -> None:
        self.module.card.wait("an event's synchronize")

    def elapsed_time(self, end: "Event") -> float:
        if not self.query() or not end.query():
            raise RuntimeError("both events must be past before the time between them is asked for")
        return 1000 * (end.seconds - self.seconds)


class CardModule:
    """Is torch's module of the device, with what the trainer asks of torch.cuda."""

    def __init__(self):
        self.card = None
        self._memories: dict = {}
        self._pools: dict[tuple[int, int], weakref.WeakSet] = {}
        self._handles = 0
        self.allocated = self.peak = 0
        self.generator = torch.Generator()
        self.default = self.now = Stream(self)  # of the process: caches outlive a card

    def begin(self, card) -> None:
        """Begins anew for a card."""
        self.card, self.capturing, self.now = card, None, self.default
        self.peak = self.allocated  # what a test before has left
        self.generator = torch.Generator().manual_seed(0x0CA4D)

    def end(self) -> None:
        """Ends a card: torch still knows the device, and its profiler asks it to wait at the end of a trace."""
        self.card = None

    # --- of torch's registration ----------------------------------------------------------------------

    def is_initialized(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def set_device(self, device) -> None:
        pass

    def _is_in_bad_fork(self) -> bool:
        return False

    def _lazy_init(self) -> None:
        pass

    def manual_seed_all(self, seed: int) -> None:
        self.generator.manual_seed(seed)

    manual_seed = manual_seed_all

    def get_rng_state(self, device=0) -> torch.Tensor:
        return self.generator.get_state()

    def set_rng_state(self, state, device=0) -> None:
        self.generator.set_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    # --- memory ---------------------------------------------------------------------------------------

    def memory_of(self, numbers: torch.Tensor) -> _Memory:
        """Finds or begins the count of a tensor's storage."""
        storage = numbers.untyped_storage()
        known = self._memories.get(storage._cdata)
        memory = None if known is None else known()
        if memory is None:
            memory = _Memory(self, storage.nbytes())
            self._memories[storage._cdata] = weakref.ref(memory)
        return memory

    def memory_allocated(self, device=None) -> int:
        return self.allocated

    def max_memory_allocated(self, device=None) -> int:
        return self.peak

    def reset_peak_memory_stats(self, device=None) -> None:
        self.peak = self.allocated

    def memory_snapshot(self) -> list[dict]:
        return []  # what graphs' pools keep counts as allocated here for as long as a graph is there

    memory_reserved = memory_allocated
    max_memory_reserved = max_memory_allocated

    def mem_get_info(self, device=None) -> tuple[int, int]:
        return CAPACITY - self.allocated, CAPACITY

    def empty_cache(self) -> None:
        pass

    def synchronize(self, device=None) -> None:
        if self.card is not None:
            self.card.wait("synchronize")

    def get_device_capability(self, device=None) -> tuple[int, int]:
        return (9, 0)

    def get_device_name(self, device=None) -> str:
        return "a pretend card"

    # --- streams and graphs ---------------------------------------------------------------------------

    CUDAGraph = Graph

    def Stream(self, *_, **__) -> Stream:
        return Stream(self)

    def current_stream(self, device=None) -> Stream:
        return self.now

    def Event(self, enable_timing=False) -> Event:
        return Event(self)

    def graph_pool_handle(self) -> tuple[int, int]:
        self._handles += 1
        return (0, self._handles)

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        """Puts the operations inside into a stream."""
        before, self.now = self.now, stream
        try:
            yield
        finally:
            self.now = before

    def graph(self, graph: Graph, pool=None, stream=None, capture_error_mode="global"):
        """Captures what is done inside."""
        own = weakref.WeakSet()  # of a graph alone
        return capture(self, graph, stream, own if pool is None else self._pools.setdefault(pool, own))

    def read(self, memories, what: str) -> None:
        """Checks that what an operation reads is there in the stream at hand."""
        for memory in memories:
            if memory is None or memory.written is None or memory.written[0] is self.now:
                continue
            stream, tick = memory.written
            if self.now.seen.get(stream, 0) < tick:
                raise Race(f"{what}: reads what another stream wrote, without having waited for it")

    def wrote(self, memories) -> None:
        """Notes which stream wrote last."""
        self.now.tick += 1
        for memory in memories:
            memory.written = (self.now, self.now.tick)
