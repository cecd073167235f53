"""Samples that share a static step."""

from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from typing import NamedTuple

import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map

from danceopd.core.conditioning import Conditioning, Tensors, device_of, with_length
from danceopd.core.copies import to_device
from danceopd.core.fields import Field, guided
from danceopd.models.packing import picture_tokens

# Prompts that have a mask are cut or filled up to the next multiple, so that not each length is another shape; this
# one, since Z-Image's transformer fills them up to it by itself, with tokens of its own.
TEXT = 32


class Layout(NamedTuple):
    """Tells what samples that share a static step have in common.

    Attributes:
        sourced: Whether they have source pictures.
        guided: Whether they are guided.
        length: Tokens of their prompts, filled up; 0 where prompts have no mask.
    """

    sourced: bool
    guided: bool
    length: int


def _flat(conditioning: Conditioning) -> tuple[list[torch.Tensor], TreeSpec]:
    """Takes the tensors apart from their names."""
    values = {field.name: getattr(conditioning, field.name) for field in fields(Conditioning)}
    return tree_flatten({name: value for name, value in values.items() if value is not None})


def _in_layout(conditioning: Conditioning, layout: Layout) -> Conditioning:
    """Gives the samples, all of one layout, on their device, without anything that the layout does not read."""
    empty, device = conditioning.empty_prompt if layout.guided else None, conditioning.device
    kept = replace(
        conditioning,
        prompt=_kept(conditioning.prompt, layout.length),
        source=conditioning.source if layout.sourced else None,
        has_source=None,
        guidance_scale=conditioning.guidance_scale if layout.guided else None,
        empty_prompt=None if empty is None else _kept(empty),
        texts=None,
    )
    return kept._map(lambda value: to_device(value, device))


def _lengths(conditioning: Conditioning) -> torch.Tensor:
    """Counts the tokens of each prompt that has a mask, else 0: [B] int64 on the CPU."""
    prompt = conditioning.prompt
    if _has_lengths(prompt):
        return prompt["prompt_mask"].sum(1).cpu()
    return torch.zeros(len(conditioning), dtype=torch.int64)


def _has_lengths(prompt: Tensors) -> bool:
    """Tells whether prompts have a mask; not those in parts, which Z-Image's transformer fills up by itself."""
    return isinstance(prompt, dict) and "prompt_mask" in prompt and "prompt_parts" not in prompt


def _filled(length):
    """Rounds a length up to a multiple of TEXT."""
    return -(-length // TEXT) * TEXT


def _kept(prompt: Tensors, length: int = 0) -> Tensors:
    """Cuts or fills up a prompt that has a mask to `length` (0: to a multiple of TEXT), which it is to keep."""
    if not _has_lengths(prompt):
        return prompt
    filled = with_length(prompt, length or _filled(prompt["prompt_mask"].shape[1]))
    filled["prompt_keep"] = filled.pop("prompt_mask")
    return filled


def _tokens(latents, part: Conditioning, layout: Layout, steps: torch.Tensor, lengths: torch.Tensor) -> Counter:
    """Counts the tokens computed for samples in so many steps each, as packing.TOKENS; not of empty prompts."""
    if not layout.length:
        return Counter()
    sources = part.source if isinstance(part.source, tuple) else () if part.source is None else (part.source,)
    computed = int(steps.sum()) * (picture_tokens(latents, sources) + layout.length)
    return Counter(computed=computed, padding=int((steps * (layout.length - lengths)).sum()))


def always_guided(field: Field, empty_prompt: Tensors, combine: Callable | None = None) -> Field:
    """Guides a field as danceopd.core.fields.guided does, for a step of samples that are all guided.

    Args:
        field: The field to guide.
        empty_prompt: One sample's empty prompt.
        combine: A model family's own combination.

    Returns:
        The guided field, which reads nothing on the device.
    """
    kept, device = _kept(tree_map(lambda value: value[None], empty_prompt)), device_of(empty_prompt)
    kept = tree_map(lambda value: to_device(value, device), kept)
    return guided(field, tree_map(lambda value: value[0], kept), combine=combine, every=True)
