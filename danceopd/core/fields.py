"""Velocity fields: what is asked, and what sources answer."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from danceopd_kernels.routed_velocity_mse import MAX_TEACHERS

from danceopd.core.conditioning import Conditioning, Tensors, concatenate
from danceopd.core.phase import phase


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
    ``u = velocities[network][uncond_row]``. A query without guidance has its own row as uncond_row, and scale 1.

    Args:
        velocities: A float tensor [n, ...] for each forward; at most `MAX_TEACHERS` of them.
        network: int64 tensor [Q], the forward that a query was in.
        row: int64 tensor [Q], its row there.
        uncond_row: int64 tensor [Q], the row of its unconditional velocity; None where no query is guided.
        guidance_scale: float32 tensor [Q]; None where no query is guided.

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

    @classmethod
    def of(cls, velocity: torch.Tensor) -> "Answers":
        """Wraps one velocity of each query.

        Args:
            velocity: Float tensor [Q, ...], in the order of the queries.

        Returns:
            Answers without guidance.
        """
        rows = torch.arange(len(velocity), device=velocity.device)
        return cls([velocity], torch.zeros_like(rows), rows)

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, queries) -> "Answers":
        """Selects queries by slice or index tensor; the velocities stay as they are."""
        chosen = (None if value is None else value[queries] for value in (self.uncond_row, self.guidance_scale))
        return Answers(self.velocities, self.network[queries], self.row[queries], *chosen)

    def target(self) -> torch.Tensor:
        """Writes the target of each query, u + guidance_scale (c - u).

        Returns:
            Tensor [Q, ...] in float32, in float64 where the velocities are in float64.
        """
        one = self.joined()
        wide = torch.promote_types(one.velocities[0].dtype, torch.float32)
        conditional = one.velocities[0][one.row].to(wide)
        if self.guidance_scale is None:
            return conditional
        unconditional = one.velocities[0][one.uncond_row].to(wide)
        scale = self.guidance_scale.to(wide).view(-1, *(1,) * (conditional.dim() - 1))
        return unconditional + scale * (conditional - unconditional)

    def to(self, dtype: torch.dtype) -> "Answers":
        """Copies the rows of these queries in another dtype.

        Args:
            dtype: The dtype of the velocities.

        Returns:
            The same answers in it; these themselves where they have it.
        """
        if all(velocity.dtype == dtype for velocity in self.velocities):
            return self
        one, rows = self.joined(), torch.arange(len(self), device=self.row.device)
        wanted = one.row if one.uncond_row is None else torch.cat([one.row, one.uncond_row])
        uncond_row = None if one.uncond_row is None else rows + len(self)
        copied = one.velocities[0][wanted].to(dtype)
        return Answers([copied], torch.zeros_like(rows), rows, uncond_row, self.guidance_scale)

    def joined(self) -> "Answers":
        """Copies the velocities of several forwards into one tensor, in their widest dtype.

        Returns:
            The same answers of one tensor; these themselves where there is one.
        """
        if len(self.velocities) == 1:
            return self
        first = torch.tensor([0, *(len(v) for v in self.velocities[:-1])], device=self.row.device).cumsum(0)
        start = first[self.network]
        uncond_row = None if self.uncond_row is None else self.uncond_row + start
        return Answers(
            [torch.cat(self.velocities)], torch.zeros_like(self.row), self.row + start, uncond_row, self.guidance_scale
        )


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


@dataclass(frozen=True)
class Guided:
    """Guides a field by classifier-free guidance; `guided` makes one and describes it.

    Args:
        field: The field to guide.
        empty_prompt: As in `guided`, and so are the others.
        guidance_scale: The number alpha, or float tensor [B]; None takes each sample's own.
        combine: A model family's own combination.
        every: Evaluates both branches for all samples.
    """

    field: Field
    empty_prompt: Tensors
    guidance_scale: float | torch.Tensor | None = None
    combine: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    every: bool = False

    def __call__(self, latents: torch.Tensor, sigma: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        alpha, rows, both = self._branches(latents, sigma, conditioning)
        cond, uncond = both[: len(latents)], both[len(latents) :]
        if self.combine:
            mixed = self.combine(cond[rows], uncond, alpha[rows])
        else:
            mixed = uncond + alpha[rows].view(-1, *(1,) * (cond.dim() - 1)) * (cond[rows] - uncond)
        return mixed if isinstance(rows, slice) else cond.to(mixed.dtype).index_copy(0, rows, mixed)

    def answer(self, latents: torch.Tensor, sigma: torch.Tensor, conditioning: Conditioning) -> Answers:
        """Asks for both branches and leaves them as they are; a family's own combination is written.

        Args:
            latents: Float tensor [Q, ...].
            sigma: Float tensor [Q].
            conditioning: What the Q queries are conditioned on.

        Returns:
            The answers, in the order of the queries.

        Raises:
            ValueError: If there are neither one guidance scale nor Q of them.
        """
        if self.combine:
            return Answers.of(self(latents, sigma, conditioning))
        alpha, rows, both = self._branches(latents, sigma, conditioning)
        row = torch.arange(len(latents), device=latents.device)
        uncond_row = row.clone()
        uncond_row[rows] = torch.arange(len(latents), len(both), device=latents.device)
        return Answers([both], torch.zeros_like(row), row, uncond_row, alpha.float())

    def _branches(self, latents, sigma, conditioning):
        """Asks both branches: (scale [B], guided rows, conditional velocities [B, ...] and then the unconditional)."""
        alpha = conditioning.guidance_scale if self.guidance_scale is None else self.guidance_scale
        alpha = torch.as_tensor(alpha, dtype=latents.dtype, device=latents.device)
        if alpha.numel() not in (1, len(latents)):  # a rollout reorders its batch: there, use None
            raise ValueError(f"{alpha.numel()} guidance scales for a batch of {len(latents)}")
        alpha = alpha.expand(len(latents))
        # At scale 1 the conditional branch is the field.
        rows = slice(None) if self.every else (alpha != 1).nonzero()[:, 0]
        empty = conditioning[rows].without_prompt(self.empty_prompt)
        asked = [(latents, sigma, conditioning), (latents[rows], sigma[rows], empty)]
        if _kept_length(empty) != _kept_length(conditioning):
            return alpha, rows, torch.cat([self.field(*branch) for branch in asked])
        z, s = (torch.cat(values) for values in list(zip(*asked, strict=True))[:2])
        return alpha, rows, self.field(z, s, concatenate([conditioning, empty]))


def guided(
    field: Field,
    empty_prompt: Tensors,
    guidance_scale: float | torch.Tensor | None = None,
    combine: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    every: bool = False,
) -> Field:
    """Guides a field: v_alpha = v + alpha (v_cond - v), v the field's velocity for the empty prompt.

    Both branches are evaluated in one batch, except of prompts that keep another length (`Conditioning.prompt`), the
    unconditional one only for samples whose scale is not 1.

    Args:
        field: The field to guide.
        empty_prompt: One sample's, as `Conditioning.prompt` without the batch, for samples that have none of their own.
        guidance_scale: alpha, a number or a float tensor [B]; None takes each sample's own, of
            ``conditioning.guidance_scale``.
        combine: ``combine(cond, uncond, alpha [B]) -> velocity``, where a model family has another combination.
        every: Evaluates both branches for all samples, whatever their scales, so that nothing is read on the device.

    Returns:
        The guided field; `field` itself at the number 1.

    Raises:
        ValueError: When it is asked, if there are neither one scale nor B of them.

    Example:
        >>> def field(latents, sigma, conditioning):  # its velocity is its prompt
        ...     return conditioning.prompt[:, None].expand_as(latents)
        >>> strong = guided(field, empty_prompt=torch.tensor(1.0), guidance_scale=3.0)
        >>> strong(torch.zeros(2, 1), torch.ones(2), Conditioning(torch.tensor([1.0, 2.0])))
        tensor([[1.],
                [4.]])
    """
    if isinstance(guidance_scale, int | float) and guidance_scale == 1:
        return field
    return Guided(field, empty_prompt, guidance_scale, combine, every)


def _kept_length(conditioning: Conditioning) -> int | None:
    """Returns the length of prompts that are computed at the length that they have; None for others."""
    prompt = conditioning.prompt
    return prompt["prompt_keep"].shape[1] if isinstance(prompt, dict) and "prompt_keep" in prompt else None


@dataclass(frozen=True)
class SharedField:
    """Is one of several sources that one network answers for in one forward, whatever mixture of them a batch asks.

    Called as a field it is this source alone.

    Args:
        network: The same object for all sources that share it.
        ask: The network as a field; it reads ``conditioning.adapter`` and ``conditioning.guidance_scale``.
        adapter: The number of this source's adapter; -1 is the network without one.
        guidance_scale: The scale that this source is asked with.
        embedded_guidance: A guidance-distilled model's input, for all of a network's sources or for none.
    """

    network: object
    ask: Field
    adapter: int
    guidance_scale: float = 1.0
    embedded_guidance: float | None = None

    def __call__(self, latents: torch.Tensor, sigma: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        alone = torch.zeros(len(latents), dtype=torch.int64)
        return self.ask(latents, sigma, ask_for([self], alone, conditioning))


def ask_for(fields: Sequence[SharedField], which: torch.Tensor, conditioning: Conditioning) -> Conditioning:
    """Marks each sample with the source of a shared network that it asks.

    Args:
        fields: The sources of one network.
        which: int64 tensor [B] on the CPU, the place in `fields` of each sample's source.
        conditioning: What the B samples are conditioned on.

    Returns:
        The same samples with their source's adapter, guidance scale and embedded guidance.
    """
    device = conditioning.device

    def each(values: list, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype)[which].to(device)

    own = replace(
        conditioning,
        adapter=each([field.adapter for field in fields], torch.int64),
        guidance_scale=each([field.guidance_scale for field in fields], torch.float32),
    )
    if fields[0].embedded_guidance is None:
        return own
    return replace(own, embedded_guidance=each([field.embedded_guidance for field in fields], torch.float32))


@phase("query")
@torch.no_grad()
def routed(
    fields: Sequence[Field],
    route: torch.Tensor,
    latents: torch.Tensor,
    sigma: torch.Tensor,
    conditioning: Conditioning,
    sample: torch.Tensor | None = None,
) -> Answers:
    """Asks each query's own field, without gradient; no field sees another's queries.

    Fields of one network (`SharedField`) are asked in one forward.

    Args:
        fields: The sources.
        route: int64 tensor [Q] on the CPU, the number of each query's field.
        latents: Float tensor [Q, ...].
        sigma: Float tensor [Q].
        conditioning: What the Q queries are conditioned on; where `sample` is given, what the samples that they are
            about are conditioned on.
        sample: int64 tensor [Q] on the CPU, which sample of the conditioning each query is about.

    Returns:
        The answers of all queries, in their order.

    Raises:
        IndexError: For a route outside the fields.

    Example:
        >>> fields = [lambda latents, sigma, conditioning: latents, lambda latents, sigma, conditioning: -latents]
        >>> z, prompts = torch.tensor([[1.0], [2.0], [3.0]]), Conditioning(torch.zeros(3))
        >>> routed(fields, torch.tensor([1, 0, 1]), z, torch.ones(3), prompts).target()
        tensor([[-1.],
                [ 2.],
                [-3.]])
    """
    if route.min() < 0 or route.max() >= len(fields):
        raise IndexError(f"routes must lie in [0, {len(fields) - 1}], got {route.min()} to {route.max()}")
    parts = []
    for members in _by_network(fields):
        index = torch.isin(route, torch.tensor(members)).nonzero()[:, 0]
        if not len(index):
            continue
        index = index[route[index].argsort(stable=True)]  # packed: equal routes in a row run together
        there = index.to(latents.device)
        about = conditioning[(index if sample is None else sample[index]).to(latents.device)]
        field, shared = fields[members[0]], [f for m in members if isinstance(f := fields[m], SharedField)]
        if shared:
            number = torch.full((len(fields),), -1).scatter_(0, torch.tensor(members), torch.arange(len(members)))
            field, about = shared[0].ask, ask_for(shared, number[route[index]], about)
        parts.append((there, answer(field, latents[there], sigma[there], about)))
    return _joined(parts, len(latents))


def _joined(parts: list[tuple[torch.Tensor, Answers]], queries: int) -> Answers:
    """Puts the answers of some queries each into one, in the order of all."""
    device, velocities = parts[0][0].device, [v for _, part in parts for v in part.velocities]
    network, row = (torch.zeros(queries, dtype=torch.int64, device=device) for _ in range(2))
    guided = any(part.guidance_scale is not None for _, part in parts)
    uncond_row = torch.zeros_like(row) if guided else None
    scale = torch.ones(queries, device=device) if guided else None
    first = 0
    for there, part in parts:
        network[there], row[there] = part.network + first, part.row
        if uncond_row is not None:
            uncond_row[there] = part.row if part.uncond_row is None else part.uncond_row
        if scale is not None and part.guidance_scale is not None:
            scale[there] = part.guidance_scale
        first += len(part.velocities)
    answers = Answers(velocities, network, row, uncond_row, scale)
    return answers if len(velocities) <= MAX_TEACHERS else answers.joined()


def _by_network(fields: Sequence[Field]) -> list[list[int]]:
    """Groups the routes that one forward serves: those of a shared network together, every other field alone."""
    groups: dict[object, list[int]] = {}
    for m, field in enumerate(fields):
        key = ("shared", id(field.network)) if isinstance(field, SharedField) else m
        groups.setdefault(key, []).append(m)
    return list(groups.values())


def soft(fields: Sequence[Field]) -> Field:
    """Makes the mean of the fields a field: what soft routing asks, whatever the sample's route.

    Args:
        fields: M of them.

    Returns:
        The field 1 / M sum_m v_m, without gradient.

    Example:
        >>> fields = [lambda latents, sigma, conditioning: latents, lambda latents, sigma, conditioning: -3 * latents]
        >>> soft(fields)(torch.ones(1, 2), torch.ones(1), Conditioning(torch.zeros(1)))
        tensor([[-1., -1.]])
    """

    @phase("query")
    @torch.no_grad()
    def velocity(latents, sigma, conditioning):
        return torch.stack([field(latents, sigma, conditioning) for field in fields]).mean(0)

    return velocity


def hard(fields: Sequence[Field], route: torch.Tensor) -> Field:
    """Makes the field that asks each sample of one batch, in its order, from its own source.

    Args:
        fields: The sources.
        route: int64 tensor [B] on the CPU, the number of each sample's field.

    Returns:
        The field, without gradient, of batches of these B samples alone.

    Raises:
        IndexError: When it is asked, for a route outside the fields.

    Example:
        >>> fields = [lambda latents, sigma, conditioning: latents, lambda latents, sigma, conditioning: -latents]
        >>> hard(fields, torch.tensor([0, 1]))(torch.ones(2, 1), torch.ones(2), Conditioning(torch.zeros(2)))
        tensor([[ 1.],
                [-1.]])
    """

    def velocity(latents, sigma, conditioning):
        return routed(fields, route, latents, sigma, conditioning).target()

    return velocity


def within(field: Field, wrap: Callable[[Field], Field]) -> Field:
    """Puts `wrap` around the network that a field asks, inside of guidance and of sharing.

    Args:
        field: A network as a field, guided, shared or as it is.
        wrap: Makes another field of the network.

    Returns:
        The field that asks the wrapped network.
    """
    if isinstance(field, SharedField):
        return replace(field, ask=within(field.ask, wrap))
    if isinstance(field, Guided):
        return replace(field, field=within(field.field, wrap))
    return wrap(field)


def counted(field: Field, counter: Counter, name: str) -> Field:
    """Makes a field count its evaluations: counter[name] grows by one for each sample that its network evaluates.

    Args:
        field: The field to be counted.
        counter: Is counted up.
        name: The key of the field's evaluations.

    Returns:
        The same field, counting.
    """

    def counting(network: Field) -> Field:
        def velocity(latents, sigma, conditioning):
            counter[name] += len(latents)
            return network(latents, sigma, conditioning)

        return velocity

    return within(field, counting)
