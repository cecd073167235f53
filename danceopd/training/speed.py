"""How fast a run is: samples, tokens and operations a second, memory, and the share of each phase of an update.

The host waits for nothing here: on a card the ends of phases are events of its stream, read once they are past.
"""

import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch
from torch import nn

from danceopd.core.copies import ON_HOST
from danceopd.core.phase import recorders
from danceopd.models.forward_cost import Cost
from danceopd.support.cards import CARDS, card_of
from danceopd.support.memory import GIB

REST = "rest"  # of an update, what no phase names


class Phases:
    """Splits updates by the phases of danceopd.core.phase, each without those inside it, by the device's own clock.

    Args:
        device: Where the run computes.
    """

    def __init__(self, device: torch.device):
        self.device, self.on_host, self._names = device, device.type in ON_HOST, [REST]
        # Moments, and the phase that each begins: None ends an update. The last may still be ahead of the device.
        self._moments: deque[tuple] = deque()

    @contextmanager
    def update(self) -> Iterator[None]:
        """Is entered around one update."""
        self._mark(REST)
        recorders.append(self._phase)
        try:
            yield
        finally:
            recorders.remove(self._phase)
            self._mark(None)

    def shares(self) -> dict[str, float]:
        """Returns the share of each phase in what is past since the last call; nothing where that is no time."""
        seconds: Counter = Counter()
        while len(self._moments) > 1 and (self.on_host or self._moments[1][0].query()):
            begin, name = self._moments.popleft()
            if name is not None:
                seconds[name] += self._between(begin, self._moments[0][0])
        whole = seconds.total()
        return {name: taken / whole for name, taken in seconds.items()} if whole else {}

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self._names.append(name)
        self._mark(name)
        try:
            yield
        finally:
            self._names.pop()
            self._mark(self._names[-1])

    def _mark(self, name: str | None) -> None:
        if self.on_host:
            self._moments.append((time.perf_counter(), name))
            return
        event = torch.get_device_module(self.device).Event(enable_timing=True)
        event.record()
        self._moments.append((event, name))

    def _between(self, begin, end) -> float:
        return end - begin if self.on_host else begin.elapsed_time(end) / 1000


class Speed:
    """Says how fast a run's updates are.

    Args:
        device: Where the run computes.
        student: Whose backward is counted: one forward's operations where the network under it is frozen, else two.
        costs: Of one sample's forward, by the number of entries of its latents and source pictures.
        ranks: Number of processes, each with a card of its own.
    """

    def __init__(self, device: torch.device, student: nn.Module, costs: dict[int, Cost], ranks: int = 1):
        self.phases, self.device, self.costs = Phases(device), device, costs
        # An adapter's own gradients are next to nothing: the backward is that to the inputs.
        self._backward = 1 if hasattr(student, "layer") else 2
        on_card = device.type == "cuda"
        card = card_of(torch.cuda.get_device_name(device)) if on_card else None
        self._peak = CARDS[card].operations * ranks if card else None

    def record(self, seconds: float, samples: int, entries: int, spent: Counter, tokens: Counter) -> dict:
        """Describes one update.

        Args:
            seconds: What it took.
            samples: The samples of all ranks.
            entries: Number of entries of one sample's latents and source pictures.
            spent: All ranks' network evaluations in it, as the trainer counts them.
            tokens: The tokens that forwards computed, where prompts have a mask; else nothing.

        Returns:
            The entries of its record: samples_per_second; tokens_per_second and mfu, where they are known;
            peak_memory_gib; and phases.
        """
        found: dict = {"samples_per_second": samples / seconds}
        forwards = sum(n for name, n in spent.items() if name not in ("backward", "padding"))
        cost = self._cost(entries)
        if cost.tokens and forwards:
            each = (tokens["computed"] - tokens["padding"]) / forwards if tokens["computed"] else cost.tokens
            found["tokens_per_second"] = forwards * each / seconds
            if self._peak:
                backwards = self._backward * spent["backward"] / 2  # it is counted as two forwards
                operations = (forwards + backwards) * cost.operations / cost.tokens * each
                found["mfu"] = operations / seconds / self._peak
        found["peak_memory_gib"] = self.peak_bytes() / GIB
        return found | {"phases": shares} if (shares := self.phases.shares()) else found

    def peak_bytes(self) -> int:
        """Returns the most memory that this process has taken: of a card all that torch holds, graphs' too."""
        if self.device.type not in ON_HOST:
            return torch.get_device_module(self.device).max_memory_reserved(self.device)
        return _most_of_host()

    def _cost(self, entries: int) -> Cost:
        """Finds the cost of a sample so large, between those that were counted."""
        if not self.costs:
            return Cost(0, 0)
        (small, low), (large, high) = min(self.costs.items()), max(self.costs.items())
        share = (entries - small) / (large - small) if large > small else 0
        between = (a + share * (b - a) for a, b in zip(vars(low).values(), vars(high).values(), strict=True))
        return Cost(*between)


def _most_of_host() -> int:
    try:
        import resource  # not on Windows
    except ImportError:
        return psutil.Process().memory_info().peak_wset
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if psutil.MACOS else 1024 * most


def told(record: dict) -> str:
    """Writes an update's speed for the terminal.

    Args:
        record: Of the update, with what `Speed.record` returns.

    Returns:
        One line.
    """
    parts = [f"{record['samples_per_second']:.3g} samples/s"]
    if "tokens_per_second" in record:
        parts.append(f"{_short(record['tokens_per_second'])} tokens/s")
    if "mfu" in record:
        parts.append(f"MFU {record['mfu']:.0%}")
    parts.append(f"{record['peak_memory_gib']:.1f} GiB")
    large = [(name, share) for name, share in record.get("phases", {}).items() if share >= 0.01]
    if large:
        parts.append(" ".join(f"{name} {share:.0%}" for name, share in sorted(large, key=lambda x: -x[1])))
    return ", ".join(parts)


def _short(number: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"
