"""Keeps blocks of a frozen transformer in host memory, and brings each to the device ahead of its use.

A block that waits is copied from pinned memory while the one before it computes, and let go once the next begins, in a
forward as in a backward that computes blocks again, where it is the one before that comes next. So two of the blocks
that wait are on the device at a time, whatever their number, and the numbers that come out are those without.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import nn

from danceopd.core.copies import ON_HOST
from danceopd.models.blocks import blocks
from danceopd.models.eight_bit import pinned, room_for, stored
from danceopd.models.footprint import uncounted
from danceopd.support.errors import UserError
from danceopd.support.texts import many

ALIVE = 2  # blocks of those that wait that are on the device at once: one computes, the next arrives


def swapped_of(there: int, count: int, whose: str) -> list[int]:
    """Chooses which of a network's blocks wait in host memory: evenly spread, so that a copy has time to arrive.

    Args:
        there: How many blocks it has.
        count: How many wait.
        whose: What the network is called.

    Returns:
        Their numbers in the order of a forward.

    Raises:
        UserError: It has fewer blocks, or so few would wait that none is spared.
    """
    if not ALIVE < count <= there:
        least = f"give {ALIVE + 1} to {there}, or auto" if there > ALIVE else "leave it out"
        raise UserError(
            f"{many(count, 'block')} cannot wait in host memory: {whose} has {there}, and {ALIVE} of those that wait "
            f"are on the device at any time; {least}"
        )
    return [(2 * i + 1) * there // (2 * count) for i in range(count)]


class Slot:
    """A tensor of a block that waits: a module's parameter or buffer, and its numbers in host memory.

    Args:
        module: Whose it is.
        name: The tensor's in the module.
        tensor: The tensor.
    """

    def __init__(self, module: nn.Module, name: str, tensor: torch.Tensor):
        self.kept: dict = module._parameters if name in module._parameters else module._buffers
        self.name, self.host, self.parameter = name, tensor, name in module._parameters
        self.kept[name] = None  # so that what is left can be moved

    def set(self, tensor: torch.Tensor) -> None:
        """Puts a tensor into the module's place."""
        self.kept[self.name] = nn.Parameter(tensor, requires_grad=False) if self.parameter else tensor


class Swap:
    """Moves a transformer to a device but for blocks that wait in host memory, and brings these when they are asked.

    Args:
        network: The frozen transformer, in host memory; changed in place.
        count: How many blocks wait.
        device: Where it computes.
        backwards: Tells whether a backward is now computing blocks again.
    """

    def __init__(self, network: nn.Module, count: int, device: torch.device, backwards: Callable[[], bool]):
        if hasattr(network, "down_blocks"):
            raise UserError(
                f"the blocks of {type(network).__name__} are computed again part by part, for which they would not "
                "come; leave it out"
            )
        every = blocks(network)
        chosen = swapped_of(len(every), count, type(network).__name__)
        self.device, self._backwards = device, backwards
        self._slots = [_slots(every[i]) for i in chosen]
        self._there: set[int] = set()
        network.to(device)
        on_card = device.type not in ON_HOST
        self._cards = torch.get_device_module(device) if on_card else None
        self._stream = None if self._cards is None else self._cards.Stream()
        for slot in (slot for slots in self._slots for slot in slots):
            if on_card:
                slot.host = pinned(slot.host)
            slot.set(slot.host)
        for number, i in enumerate(chosen):
            every[i].register_forward_pre_hook(lambda *_, number=number: self._enter(number))

    def alive(self) -> int:
        """Returns how many of the blocks that wait are on the device now."""
        return len(self._there)

    def _enter(self, number: int) -> None:
        """Brings the block that now computes, lets the others go, and begins to bring the next."""
        back = self._backwards()
        following = number + (-1 if back else 1)
        if not 0 <= following < len(self._slots):
            # A backward begins at the last block, and the next forward at the first.
            following = number if back or torch.is_grad_enabled() else 0
        with uncounted():
            self._wait()
            for other in self._there - {number, following}:
                for slot in self._slots[other]:
                    slot.set(slot.host)
                self._there.remove(other)
            if number not in self._there:
                self._bring(number)
                self._wait()
            if following not in self._there:
                self._bring(following)

    def _wait(self) -> None:
        """Makes what is asked from now on come after the copies."""
        if self._cards is not None:
            self._cards.current_stream().wait_stream(self._stream)

    def _bring(self, number: int) -> None:
        """Begins to copy a block to the device.

        Its memory is of the stream that computes, which has waited for all copies before: so what it let go is free
        for this one, and the copy begins when what was asked before is done.
        """
        self._there.add(number)
        places = [room_for(slot.host, self.device) for slot in self._slots[number]]
        for slot, place in zip(self._slots[number], places, strict=True):
            slot.set(place)
        if self._cards is not None:
            self._stream.wait_stream(self._cards.current_stream())
        with nullcontext() if self._cards is None else self._cards.stream(self._stream):
            for slot, place in zip(self._slots[number], places, strict=True):
                for part, host in zip(stored(place), stored(slot.host), strict=True):
                    part.copy_(host, non_blocking=True)


def _slots(block: nn.Module) -> list[Slot]:
    """Takes the parameters and persistent buffers out of a block: adapters of sources are neither, and stay."""
    found = []
    for module in block.modules():
        named = {**module._parameters, **module._buffers}
        for name, tensor in named.items():
            if tensor is not None and name not in module._non_persistent_buffers_set:
                found.append(Slot(module, name, tensor.detach()))
    return found
