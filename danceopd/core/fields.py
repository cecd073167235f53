"""Velocity fields: what is asked. A field is any callable field(latents, sigma, conditioning) -> velocity.

latents [B, ...] in the backbone's own shape, sigma [B] in [0, 1] with 1 = noise, velocity = noise - data
in the shape of the latents.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from danceopd.core.conditioning import Conditioning, Tensors, concatenate
from danceopd.core.phase import phase

Field = Callable[[torch.Tensor, torch.Tensor, Conditioning], torch.Tensor]


def guided(
    field: Field,
    empty_prompt: Tensors,
    guidance_scale: float | torch.Tensor | None = None,
    combine: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    every: bool = False,
) -> Field:
    """Classifier-free guidance as an operator field: v + alpha (v_cond - v), v the field of the empty prompt.

    empty_prompt: one sample's, as Conditioning.prompt without the batch, for samples that have none of their own;
    guidance_scale alpha: a number, [B] (one per sample), or None: each sample's own, from conditioning.guidance_scale.
    Both branches are evaluated in one batch, except of prompts that keep another length (Conditioning.prompt), the
    unconditional one only for samples whose scale is not 1. At the number
    1 the conditional field itself comes back. combine(cond, uncond, alpha [B]): where a family has another combination.
    every: both branches for all samples, whatever their scales, such that nothing has to be read on the device.
    """
    if isinstance(guidance_scale, int | float) and guidance_scale == 1:
        return field

    def velocity(latents, sigma, conditioning):
        alpha = conditioning.guidance_scale if guidance_scale is None else guidance_scale
        alpha = torch.as_tensor(alpha, dtype=latents.dtype, device=latents.device)
        if alpha.numel() not in (1, len(latents)):  # a rollout reorders its batch: there, use None
            raise ValueError(f"{alpha.numel()} guidance scales for a batch of {len(latents)}")
        alpha = alpha.expand(len(latents))
        # At scale 1 the conditional branch is the field.
        rows = slice(None) if every else (alpha != 1).nonzero()[:, 0]
        empty = conditioning[rows].without_prompt(empty_prompt)
        if _kept_length(empty) != _kept_length(conditioning):
            cond, uncond = field(latents, sigma, conditioning), field(latents[rows], sigma[rows], empty)
        else:
            both = concatenate([conditioning, empty])
            velocity = field(torch.cat([latents, latents[rows]]), torch.cat([sigma, sigma[rows]]), both)
            cond, uncond = velocity[: len(latents)], velocity[len(latents) :]
        if combine:
            mixed = combine(cond[rows], uncond, alpha[rows])
        else:
            mixed = uncond + alpha[rows].view(-1, *(1,) * (cond.dim() - 1)) * (cond[rows] - uncond)
        return mixed if every else cond.to(mixed.dtype).index_copy(0, rows, mixed)

    return velocity


def _kept_length(conditioning: Conditioning) -> int | None:
    """Of prompts that are computed at the length that they have."""
    prompt = conditioning.prompt
    return prompt["prompt_keep"].shape[1] if isinstance(prompt, dict) and "prompt_keep" in prompt else None


@dataclass(frozen=True)
class SharedField:
    """One of several sources that one network answers for in one forward, whatever mixture of them a batch asks.

    ask: the network as a field; it reads conditioning.adapter and conditioning.guidance_scale, each sample's own.
    network: the same object for all that share it. embedded_guidance: a distilled model's number, for all of a
    network's sources or for none. Called as a field it is this source alone.
    """

    network: object
    ask: Field
    adapter: int
    guidance_scale: float = 1.0
    embedded_guidance: float | None = None

    def __call__(self, latents, sigma, conditioning):
        return ask_shared([self], torch.zeros(len(latents), dtype=torch.int64), latents, sigma, conditioning)


def ask_shared(fields: Sequence[SharedField], which: torch.Tensor, latents, sigma, conditioning) -> torch.Tensor:
    """Ask a network once for samples of several of its sources; which [B] int64: of `fields`, for each sample."""
    adapter = torch.tensor([field.adapter for field in fields])[which.cpu()]
    scale = torch.tensor([float(field.guidance_scale) for field in fields])[which.cpu()]
    own = replace(conditioning, adapter=adapter.to(latents.device), guidance_scale=scale.to(latents.device))
    if fields[0].embedded_guidance is not None:
        embedded = torch.tensor([float(field.embedded_guidance) for field in fields])[which.cpu()]
        own = replace(own, embedded_guidance=embedded.to(latents.device))
    return fields[0].ask(latents, sigma, own)


@phase("query")
@torch.no_grad()
def routed(
    fields: Sequence[Field],
    route: torch.Tensor,
    latents: torch.Tensor,
    sigma: torch.Tensor,
    conditioning: Conditioning,
) -> torch.Tensor:
    """Ask each sample's own field: route [B] int64 indexes `fields`; no field sees another's samples.

    Returns the velocity [B, ...] without gradient. Raises IndexError for a route outside the fields.
    """
    if route.min() < 0 or route.max() >= len(fields):
        raise IndexError(f"routes must lie in [0, {len(fields) - 1}], got {route.min()} to {route.max()}")
    velocity = torch.empty_like(latents)
    for members in _by_network(fields):
        index = torch.isin(route, torch.tensor(members, device=route.device)).nonzero()[:, 0]
        if not len(index):
            continue
        if len(members) > 1:
            index = index[route[index].argsort(stable=True)]  # equal routes in a row run together on the host
        asked = (latents[index], sigma[index], conditioning[index])
        if isinstance(fields[members[0]], SharedField):
            place = torch.full((len(fields),), -1).scatter_(0, torch.tensor(members), torch.arange(len(members)))
            answer = ask_shared([fields[m] for m in members], place[route[index].cpu()], *asked)
        else:
            answer = fields[members[0]](*asked)
        velocity[index] = answer.to(velocity.dtype)
    return velocity


def _by_network(fields: Sequence[Field]) -> list[list[int]]:
    """The routes that one forward serves: those of a shared network together, every other field alone."""
    groups: dict[object, list[int]] = {}
    for m, field in enumerate(fields):
        key = ("shared", id(field.network)) if isinstance(field, SharedField) else m
        groups.setdefault(key, []).append(m)
    return list(groups.values())


def soft(fields: Sequence[Field]) -> Field:
    """The mean of the fields: what soft routing asks, whatever the sample's route."""

    @phase("query")
    @torch.no_grad()
    def velocity(latents, sigma, conditioning):
        return torch.stack([field(latents, sigma, conditioning) for field in fields]).mean(0)

    return velocity


def hard(fields: Sequence[Field], route: torch.Tensor) -> Field:
    """The field that asks each sample of one batch [B], in its order, from its own source (`routed`)."""

    def velocity(latents, sigma, conditioning):
        return routed(fields, route, latents, sigma, conditioning)

    return velocity


def counted(field: Field, counter: Counter, name: str) -> Field:
    """The same field; counter[name] grows by one for each sample evaluated."""

    def velocity(latents, sigma, conditioning):
        counter[name] += len(latents)
        return field(latents, sigma, conditioning)

    if isinstance(field, SharedField):
        return replace(field, ask=counted(field.ask, counter, name))
    return velocity
