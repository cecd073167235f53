"""What a velocity field is, and what its forwards answer before anything is combined."""

from dataclasses import dataclass
from typing import Protocol

import torch

from danceopd.core.conditioning import Conditioning
from danceopd.core.copies import to_device


class Field(Protocol):
    """Gives a velocity at every state of one flow-matching state space.

    A field may bring more than its call: ``answer``, what its forwards gave before it is combined (`Answers`);
    ``rollout``, a way of its own through a whole trajectory (`danceopd.core.rollout.rollout`); and ``fixed``, itself
    for samples whose conditioning stays the same.
    """

    def __call__(self, latents: torch.Tensor, sigma: torch.Tensor, conditioning: Conditioning, /) -> torch.Tensor:
        """Asks for the velocity v = dz / d sigma = noise - data.

        Args:
            latents: Float tensor [B, ...], states z = (1 - sigma) data + sigma noise.
            sigma: Float tensor [B] in [0, 1]; 1 is noise.
            conditioning: What the B samples are conditioned on.

        Returns:
            Float tensor [B, ...] in the shape of the latents.
        """
        ...


@dataclass
class Answers:
    """Holds what sources answered to Q queries as their forwards gave it: nothing is combined yet, and nothing copied.

    The target of a query is ``u + guidance_scale (c - u)`` with ``c = velocities[network][row]`` and
    ``u = unconds[network][uncond_row]``. A query without guidance has its own row as uncond_row, and scale 1.

    Args:
        velocities: A float tensor [n, ...] for each forward; at most the `MAX_TEACHERS` that the loss takes.
        network: int64 tensor [Q] on the CPU, as what follows is: the forward that a query was in.
        row: int64 tensor [Q], its row there.
        uncond_row: int64 tensor [Q], the row of its unconditional velocity; None where no query is guided.
        guidance_scale: float32 tensor [Q], float64 with states in it; None where no query is guided.
        unconds: The forward that uncond_row is a row of, beside each of the velocities; None where it is the same.

    Example:
        >>> rows = torch.tensor([[1.0], [2.0]])  # with the prompt and without
        >>> first, second = torch.tensor([0]), torch.tensor([1])
        >>> Answers([rows], torch.tensor([0]), first, second, torch.tensor([3.0])).target()
        tensor([[-1.]])
    """

    velocities: list[torch.Tensor]
    network: torch.Tensor
    row: torch.Tensor
    uncond_row: torch.Tensor | None = None
    guidance_scale: torch.Tensor | None = None
    unconds: list[torch.Tensor] | None = None

    @classmethod
    def of(cls, velocity: torch.Tensor) -> "Answers":
        """Wraps one velocity of each query.

        Args:
            velocity: Float tensor [Q, ...], in the order of the queries.

        Returns:
            Answers without guidance.
        """
        rows = torch.arange(len(velocity))
        return cls([velocity], torch.zeros_like(rows), rows)

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, queries) -> "Answers":
        """Selects queries by slice or index tensor; the velocities stay as they are."""
        chosen = (None if value is None else value[queries] for value in (self.uncond_row, self.guidance_scale))
        uncond_row, scale = chosen
        return Answers(self.velocities, self.network[queries], self.row[queries], uncond_row, scale, self.unconds)

    def target(self) -> torch.Tensor:
        """Writes the target of each query, u + guidance_scale (c - u).

        Returns:
            Tensor [Q, ...] in float32, in float64 where the velocities are in float64.
        """
        one = self.joined()
        wide = torch.promote_types(one.velocities[0].dtype, torch.float32)
        device = one.velocities[0].device
        conditional = one.velocities[0][to_device(one.row, device)].to(wide)
        if self.guidance_scale is None:
            return conditional
        assert one.uncond_row is not None  # as there is a scale
        unconditional = one.velocities[0][to_device(one.uncond_row, device)].to(wide)
        scale = to_device(self.guidance_scale.to(wide), device).view(-1, *(1,) * (conditional.dim() - 1))
        return unconditional + scale * (conditional - unconditional)

    def to(self, dtype: torch.dtype) -> "Answers":
        """Copies the rows of these queries in another dtype.

        Args:
            dtype: The dtype of the velocities.

        Returns:
            The same answers in it; these themselves where they have it.
        """
        if all(velocity.dtype == dtype for velocity in (*self.velocities, *(self.unconds or ()))):
            return self
        one, rows = self.joined(), torch.arange(len(self))
        wanted = one.row if one.uncond_row is None else torch.cat([one.row, one.uncond_row])
        uncond_row = None if one.uncond_row is None else rows + len(self)
        copied = one.velocities[0][to_device(wanted, one.velocities[0].device)].to(dtype)
        return Answers([copied], torch.zeros_like(rows), rows, uncond_row, self.guidance_scale)

    def joined(self) -> "Answers":
        """Copies the velocities of several forwards into one tensor, in their widest dtype.

        Returns:
            The same answers of one tensor; these themselves where there is one.
        """
        if len(self.velocities) == 1 and self.unconds is None:
            return self
        unconds = self.velocities if self.unconds is None else self.unconds
        each = list({id(v): v for v in (*self.velocities, *unconds)}.values())
        ends = torch.tensor([0, *(len(v) for v in each)]).cumsum(0).tolist()
        start = {id(v): first for v, first in zip(each, ends, strict=False)}

        def moved(row: torch.Tensor, forwards: list[torch.Tensor]) -> torch.Tensor:
            return row + torch.tensor([start[id(v)] for v in forwards])[self.network]

        uncond_row = None if self.uncond_row is None else moved(self.uncond_row, unconds)
        row = moved(self.row, self.velocities)
        return Answers([torch.cat(each)], torch.zeros_like(row), row, uncond_row, self.guidance_scale)


def answer(field: Field, latents: torch.Tensor, sigma: torch.Tensor, conditioning: Conditioning) -> Answers:
    """Asks a field for Q velocities as its forwards give them.

    Args:
        field: The field to ask.
        latents: Float tensor [Q, ...].
        sigma: Float tensor [Q].
        conditioning: What the Q queries are conditioned on.

    Returns:
        The answers, in the order of the queries.
    """
    own = getattr(field, "answer", None)
    return Answers.of(field(latents, sigma, conditioning)) if own is None else own(latents, sigma, conditioning)
