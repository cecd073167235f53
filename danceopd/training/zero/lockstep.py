"""Networks whose weights lie on all ranks: a forward of one is a forward of it on every rank, whatever each asks."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from danceopd.core.conditioning import Conditioning
from danceopd.core.copies import to_device
from danceopd.models.packing import whole_batches
from danceopd.support.ranks import Ranks, device_of_collectives

Inputs = tuple[torch.Tensor, torch.Tensor, Conditioning]  # latents, sigma, conditioning, as a field takes them

Network = Callable[[Sequence[Inputs]], Sequence[torch.Tensor]]  # each velocity, in one forward of the whole

# The lowest goes first: who has ended its rollout helps the others with theirs before anybody asks a source. The query
# with gradient comes when nobody asks anything else, so that all make it, and its backward, at once.
ROLLOUT, SOURCES, QUERY, DONE = 0, range(1, 30), 30, 31


class Lockstep:
    """Lets the ranks agree before each forward of a sharded network, so that none waits for another for ever.

    The one of the lowest number that a rank asks is asked on all: who asks another, or nothing, asks a sample of its
    own or another rank's in vain. So the numbers of forwards may differ, by the depth of rollouts and by routes. A
    forward of samples with source pictures and one of samples without gather different weights: both are made where
    any rank has both kinds, or two ranks one each.

    Args:
        ranks: The processes of the run.
    """

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self.networks: dict[int, Network] = {}
        self._examples: dict[tuple[int, bool], Inputs] = {}  # one sample by network and whether it has sources

    def add(self, network: Network, number: int | None = None) -> int:
        """Adds a network; all ranks add the same ones, in the same order.

        Args:
            network: Asks it for several batches in one forward.
            number: ROLLOUT or QUERY; the next source's if not given.

        Returns:
            The network's number.
        """
        number = next(n for n in SOURCES if n not in self.networks) if number is None else number

        def whole(asked: Sequence[Inputs]) -> Sequence[torch.Tensor]:
            with whole_batches():  # lengths are each rank's own
                return network(asked)

        self.networks[number] = network if self.ranks.size == 1 else whole
        return number

    def ask(self, number: int, latents: torch.Tensor, sigma: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """Asks a network when its turn has come; the query with gradient.

        Args:
            number: The network's.
            latents: Float tensor [B, ...].
            sigma: Float tensor [B].
            conditioning: What the B samples are conditioned on.

        Returns:
            The velocity [B, ...].
        """
        network = self.networks[number]
        if self.ranks.size == 1:
            return network([(latents, sigma, conditioning)])[0]
        parts = _by_kind(latents, sigma, conditioning)
        for kind, (_, asked) in parts.items():
            if (_weights(number), kind) not in self._examples:
                first = torch.zeros(1, dtype=torch.int64, device=latents.device)
                self._examples[_weights(number), kind] = (asked[0].detach()[first], asked[1][first], asked[2][first])
        kinds = self._turn(number, set(parts))
        asked = [parts[kind][1] if kind in parts else self._examples[_weights(number), kind] for kind in kinds]
        result = torch.empty_like(latents) if len(parts) > 1 else None
        in_vain = []
        for kind, velocity in zip(kinds, network(asked), strict=True):
            if kind not in parts:
                in_vain.append(velocity)
            elif result is None:
                result = velocity
            else:
                result = result.index_copy(0, parts[kind][0], velocity)
        for velocity in in_vain if torch.is_grad_enabled() else ():
            result = result + 0 * velocity.sum()  # its backward is made too
        return result

    def finish(self) -> None:
        """Helps the others until all have come here; this rank asks nothing more in this update."""
        if self.ranks.size > 1 and self.networks.keys() - {QUERY}:  # all make the query, and nothing else is asked
            self._turn(DONE, set())

    def _turn(self, number: int, kinds: set[bool]) -> list[bool]:
        """Takes part in what the others ask until it is `number`, and returns the kinds that it is asked with."""
        while True:
            lowest, asked = self._agree(number, kinds)
            if lowest == number:
                return asked
            with torch.no_grad():
                self.networks[lowest]([self._examples[_weights(lowest), kind] for kind in asked])

    def _agree(self, number: int, kinds: set[bool]) -> tuple[int, list[bool]]:
        """Finds the lowest number of all ranks and the kinds it is asked with, and shares examples of them."""
        known = sum(1 << _bit(*key) for key in self._examples)
        mine = torch.tensor([number, sum(1 << kind for kind in kinds), known], device=device_of_collectives())
        everyone = torch.empty(self.ranks.size * 3, dtype=torch.int64, device=mine.device)
        dist.all_gather_into_tensor(everyone, mine)
        told = everyone.view(-1, 3).tolist()
        lowest = min(n for n, _, _ in told)
        asked = [kind for kind in (True, False) if any(n == lowest and k >> kind & 1 for n, k, _ in told)]
        for kind in asked:
            if not all(known >> _bit(_weights(lowest), kind) & 1 for _, _, known in told):
                asking = next(rank for rank, (n, k, _) in enumerate(told) if n == lowest and k >> kind & 1)
                self._share(_weights(lowest), kind, asking)
        return lowest, asked

    def _share(self, network: int, kind: bool, rank: int) -> None:
        """Sends a rank's example to all that have none."""
        device, values = device_of_collectives(), [None]
        if self.ranks.rank == rank:
            latents, sigma, conditioning = self._examples[network, kind]
            values = [(latents.cpu(), sigma.cpu(), conditioning.to("cpu"))]
        dist.broadcast_object_list(values, src=rank)
        if (network, kind) not in self._examples:
            latents, sigma, conditioning = values[0]
            self._examples[network, kind] = (latents.to(device), sigma.to(device), conditioning.to(device))


def _weights(number: int) -> int:
    """Returns the number whose weights a number asks: rollout and query ask the same network."""
    return ROLLOUT if number == QUERY else number


def _bit(network: int, kind: bool) -> int:
    """Returns the bit that stands for an example."""
    return 2 * network + kind


def _by_kind(latents, sigma, conditioning: Conditioning) -> dict[bool, tuple[torch.Tensor | None, Inputs]]:
    """Parts samples by whether they have source pictures: {whether: (their rows, None for all; the samples)}."""
    sourced, has = conditioning.sourced(), conditioning.has_source
    if sourced is not None:
        return {sourced: (None, (latents, sigma, conditioning))}
    found = {}
    for kind, mark in ((True, has), (False, ~has)):
        own = mark.nonzero()[:, 0]
        there = to_device(own, latents.device)
        found[kind] = there, (latents[there], sigma[there], conditioning[own])
    return found
