"""Knows the processes of a run: which one this is, and what all of them agree on."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from danceopd.support.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """This process among those of a run; by default one that knows of no others.

    Every method but `slots` is a collective: all ranks call it, in the same order.

    Attributes:
        rank: This process's number.
        size: How many there are.
    """

    rank: int = 0
    size: int = 1

    def slots(self, batch_size: int) -> range:
        """Returns the places of a global batch that are this rank's: in order, without overlap, none left out."""
        return range(batch_size * self.rank // self.size, batch_size * (self.rank + 1) // self.size)

    def gather(self, value) -> list:
        """Returns what each rank gives, in their order: anything that can be pickled among one's own processes."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_first(self, value):
        """Returns rank 0's value, whatever the others give."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def most(self, number: int) -> int:
        """Returns the largest of the ranks' whole numbers."""
        if self.size == 1:
            return int(number)
        largest = torch.tensor(int(number), dtype=torch.int64, device=device_of_collectives())
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest)

    def wait(self) -> None:
        """Waits until all are here."""
        if self.size > 1:
            dist.barrier()


ALONE = Ranks()


def torchruns() -> Ranks:
    """Returns this process among those that torchrun started, without DeepSpeed; a UserError where they don't meet."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    try:
        dist.init_process_group("gloo", timeout=timedelta(days=1))  # ranks wait for the slowest one's pictures
    except (ValueError, dist.DistNetworkError, dist.DistStoreError) as error:
        raise UserError(f"the ranks cannot find each other: {error}; start them by torchrun") from None
    return Ranks(dist.get_rank(), dist.get_world_size())


def agreed(ranks: Ranks, function: Callable, *args):
    """Calls function(*args) on every rank.

    Raises:
        UserError: On all of them, for what a user can mend on one, as a file that it lacks.
    """
    result, problem = None, None
    try:
        result = function(*args)
    except (UserError, OSError) as error:
        problem = str(error)
    problems = ranks.gather(problem)
    for rank, found in enumerate(problems):
        if found:
            raise UserError(found if problems[0] else f"rank {rank}: {found}")
    return result


def device_of_collectives() -> torch.device:
    """Returns where the tensors of a collective lie."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
