"""The static step of one shape of samples, and its graphs."""

import torch
from danceopd_kernels import euler_step_

from danceopd.core.conditioning import Conditioning
from danceopd.core.fields import Field
from danceopd.core.solver import extrapolate
from danceopd.training.rollouts.capture import GraphSafe, Pool, no_kept_casts
from danceopd.training.rollouts.layouts import _flat

# Sizes of a batch, in equal steps. Under low_t with 16 or 8 indices the padding is none of the evaluations up to 16
# samples, 1.5 % at 32, 2.3 % at 64; eight sizes would be 2.8, 4.3 and 5.2 %, powers of two 11, 12 and 13 %.
BUCKETS = 16


class Program:
    """Steps the samples of one layout and shape in buffers that stay where they are, and keeps the step's graphs.

    The buffers are the latents z [capacity, ...] float32; numbers [3, capacity] float32, whose rows are sigma, the next
    sigma and half the ratio of the step to the one before (ab2; 0 in a trajectory's first); active [capacity] bool; the
    conditioning; and previous, the velocity before (ab2).

    Args:
        field: The field of the step.
        z: Float tensor [n, ...], real samples of the shape.
        conditioning: What they are conditioned on.
        capacity: Number of samples that there is room for.
        solver: ``euler`` or ``ab2``; None leaves the field's velocity in `velocity`, and z as it is.
    """

    def __init__(self, field: Field, z: torch.Tensor, conditioning: Conditioning, capacity: int, solver: str | None):
        def room(value: torch.Tensor) -> torch.Tensor:  # filled with real samples, so padding computes nothing strange
            return value[:1].repeat(capacity, *(1,) * (value.dim() - 1))

        self.field, self.capacity, self.solver = field, capacity, solver
        self.z, self.conditioning = room(z.float()), conditioning._map(room)
        self.numbers = torch.ones(3, capacity, device=z.device)
        self.active = torch.zeros(capacity, dtype=torch.bool, device=z.device)
        self.previous = torch.zeros_like(self.z) if solver == "ab2" else None
        self.velocity = torch.zeros_like(self.z) if solver is None else None
        self.sizes = sorted({-(-capacity * i // BUCKETS) for i in range(1, BUCKETS + 1)})
        self._first: dict[int, tuple] = {}  # views of the first n samples
        self.graphs: dict[int, tuple] = {}  # by number of samples; with the tensors that the graph reads

    def fill(self, z: torch.Tensor, conditioning: Conditioning) -> None:
        """Takes samples, at the beginning of their trajectories.

        Args:
            z: Float tensor [n, ...], their latents.
            conditioning: What they are conditioned on.
        """
        n = len(z)
        self.z[:n].copy_(z)
        for own, value in zip(_flat(self.conditioning)[0], _flat(conditioning)[0], strict=True):
            own[:n].copy_(value)
        self.active.zero_()
        if self.previous is not None:
            self.previous.zero_()

    def size(self, n: int) -> int:
        """Finds the number of samples that a step takes.

        Args:
            n: Number of samples that are under way.

        Returns:
            The smallest size that holds them.
        """
        return next(size for size in self.sizes if size >= n)

    def step(self, n: int) -> None:
        """Makes one step of the first samples; this is what a graph captures.

        Args:
            n: Their number, one of `sizes`.
        """
        if n not in self._first:
            conditioning, shape = self.conditioning[:n], (-1, *(1,) * (self.z.dim() - 1))
            rest = [None if t is None else t[:n] for t in (self.active, self.previous, self.velocity)]
            self._first[n] = self.z[:n], conditioning, *self.numbers[:, :n], self.numbers[2, :n].view(shape), *rest
        z, conditioning, sigma, next_sigma, _, half, active, previous, out = self._first[n]
        with no_kept_casts():
            velocity = self.field(z, sigma, conditioning).float()
        if self.solver is None:
            out.copy_(velocity)
            return
        if self.solver == "ab2":
            extrapolated = extrapolate(velocity, previous, half)
            previous.copy_(velocity)
            velocity = extrapolated
        euler_step_(z, velocity.contiguous(), sigma, next_sigma, active=active)

    def capture(self, n: int, pool: Pool) -> None:
        """Captures the graph of one size; the buffers stay as they were.

        Args:
            n: The size, a number of samples.
            pool: What all graphs share.

        Raises:
            NotCapturable: With the reason.
        """
        kept = [t[:n].clone() for t in (self.z, self.previous) if t is not None]
        before, graph = GraphSafe(), pool.graph()
        try:
            with pool.capturing():
                self.step(n)  # fills caches, compiles kernels
                with before:
                    self.step(n)
                with pool.into(graph):
                    self.step(n)
        finally:
            for tensor, value in zip([t for t in (self.z, self.previous) if t is not None], kept, strict=True):
                tensor[:n].copy_(value)
        self.graphs[n] = (graph, before.before)
