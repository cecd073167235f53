"""Velocity fields: what is asked, and what sources answer."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from danceopd.core.answers import Answers, Field
from danceopd.core.conditioning import Conditioning, Tensors, concatenate
from danceopd.core.copies import to_device
from danceopd.core.expressions import Expression, Term, summed
from danceopd.core.forwards import SharedField, ask_each
from danceopd.core.phase import phase


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
        alpha = to_device(alpha[rows], cond.device)
        there = rows if isinstance(rows, slice) else to_device(rows, cond.device)
        if self.combine:
            mixed = self.combine(cond[there], uncond, alpha)
        else:
            mixed = uncond + alpha.view(-1, *(1,) * (cond.dim() - 1)) * (cond[there] - uncond)
        return mixed if isinstance(there, slice) else cond.to(mixed.dtype).index_copy(0, there, mixed)

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
        row = torch.arange(len(latents))
        uncond_row = row.clone()
        uncond_row[rows] = torch.arange(len(latents), len(both))
        return Answers([both], torch.zeros_like(row), row, uncond_row, alpha.float())

    def _branches(self, latents, sigma, conditioning):
        """Asks both branches: (scale [B], guided rows, conditional velocities [B, ...] and then the unconditional).

        Scale and rows are on the CPU; with `every` the scale is beside the latents, and the rows are a slice.
        """
        alpha = conditioning.guidance_scale if self.guidance_scale is None else self.guidance_scale
        alpha = torch.as_tensor(alpha, dtype=latents.dtype, device=latents.device if self.every else "cpu")
        if alpha.numel() not in (1, len(latents)):  # a rollout reorders its batch: there, use None
            raise ValueError(f"{alpha.numel()} guidance scales for a batch of {len(latents)}")
        alpha = alpha.expand(len(latents))
        # At scale 1 the conditional branch is the field.
        rows = slice(None) if self.every else (alpha != 1).nonzero()[:, 0]
        empty = conditioning[rows].without_prompt(self.empty_prompt)
        there = rows if isinstance(rows, slice) else to_device(rows, latents.device)
        asked = [(latents, sigma, conditioning), (latents[there], sigma[there], empty)]
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
        guidance_scale: alpha, a number or a float tensor [B] on the CPU; None takes each sample's own, of
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

    Fields of one network (`SharedField`) are asked in one forward, with all terms of operators that are of it.

    Args:
        fields: The sources.
        route: int64 tensor [Q] on the CPU, the number of each query's field.
        latents: Float tensor [Q, ...].
        sigma: Float tensor [Q], on the CPU where nobody is to wait for the device: operators decide by it.
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
    return ask_each(fields, route, latents, sigma, conditioning, sample)


@dataclass(frozen=True, eq=False)
class Operator(Expression):
    """Is a source made of other sources; `danceopd.core.operators` makes them.

    `routed` asks all terms of a batch's sources that are of one network in one forward. Two terms are combined in the
    loss; of more, and of combinations that are not linear, the velocity is written. No gradient reaches a source.
    """

    def __call__(self, latents: torch.Tensor, sigma: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        return self.answer(latents, sigma, conditioning).target().to(latents.dtype)

    @torch.no_grad()
    def answer(self, latents: torch.Tensor, sigma: torch.Tensor, conditioning: Conditioning) -> Answers:
        """Asks for Q velocities.

        Args:
            latents: Float tensor [Q, ...].
            sigma: Float tensor [Q].
            conditioning: What the Q queries are conditioned on.

        Returns:
            The answers, in the order of the queries.
        """
        return ask_each([self], torch.zeros(len(latents), dtype=torch.int64), latents, sigma, conditioning)


def as_operator(field: Field) -> Operator:
    """Makes any field an operator of one term.

    Args:
        field: The field.

    Returns:
        The operator; the field itself where it is one.
    """
    if isinstance(field, Operator):
        return field
    return Operator((Term(field),), lambda sigma: torch.ones(len(sigma), 1, dtype=torch.float64))


def soft(fields: Sequence[Field]) -> Field:
    """Makes the mean of the fields a field: what soft routing asks, whatever the sample's route.

    Networks that several of them share are asked in one forward (`routed`).

    Args:
        fields: M of them.

    Returns:
        The field 1 / M sum_m v_m, without gradient.

    Example:
        >>> fields = [lambda latents, sigma, conditioning: latents, lambda latents, sigma, conditioning: -3 * latents]
        >>> soft(fields)(torch.ones(1, 2), torch.ones(1), Conditioning(torch.zeros(1)))
        tensor([[-1., -1.]])
    """

    even = torch.full((1, len(fields)), 1 / len(fields), dtype=torch.float64)
    return Operator(*summed([as_operator(field) for field in fields], lambda sigma: even.expand(len(sigma), -1)))


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
    if isinstance(field, Operator):
        return field.within(lambda one: within(one, wrap))
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
