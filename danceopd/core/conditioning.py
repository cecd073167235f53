"""What a velocity field is conditioned on."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves, tree_map

from danceopd.core.copies import to_device

# The keys of a prompt's dict that say how long prompts are: the host reads them.
READ_ON_HOST = ("prompt_mask", "prompt_parts", "siglip_shapes")

Tensors = torch.Tensor | dict[str, torch.Tensor] | tuple[torch.Tensor, ...]


@dataclass
class Conditioning:
    """Holds the prompts and source pictures of B samples.

    What the host decides by stays on the CPU, so that nobody waits for a device to read it: `has_source`,
    `guidance_scale`, `adapter`, and of a prompt's dict the masks and lengths.

    Args:
        prompt: What the backbone's text encoder gives, a tensor or a dict of them, each [B, ...]; the embedded network
            takes int64 tokens [B, L]. In a dict, ``prompt_mask`` [B, L] bool is False after a prompt's end, and
            ``prompt_keep`` is the same for prompts to be computed at this very L, whose masks nobody reads on the host:
            these lie beside the rest.
        source: The pictures to edit in the space of the latents, a float tensor [B, C, h, w] or a tuple of them where
            there are several references; None if no sample has one.
        has_source: Bool tensor [B] on the CPU: `source` is ignored where it is False. None if all samples have theirs,
            where `source` is given.
        guidance_scale: float32 tensor [B] on the CPU; read by a field that is guided per sample (`guided`), and by
            nothing else.
        adapter: int64 tensor [B] on the CPU: which of several sources a network that answers for all of them is asked
            for.
        embedded_guidance: float32 tensor [B], the number that a guidance-distilled model takes as an input.
        empty_prompt: Like `prompt`, each sample's own empty prompt; None where it is one for all. A text encoder that
            sees the source pictures has another for each.
        texts: Each sample's own encodings of other texts that a source is asked with, by their names; each is like
            `prompt`. Read by sources made of others (`danceopd.core.operators`), and by nothing else.

    Example:
        >>> conditioning = Conditioning(torch.tensor([[3, 1], [5, 2], [7, 0]]), guidance_scale=torch.ones(3))
        >>> len(conditioning), conditioning[1:].prompt.tolist(), conditioning.sourced()
        (3, [[5, 2], [7, 0]], False)
    """

    prompt: Tensors
    source: Tensors | None = None
    has_source: torch.Tensor | None = None
    guidance_scale: torch.Tensor | None = None
    adapter: torch.Tensor | None = None
    embedded_guidance: torch.Tensor | None = None
    empty_prompt: Tensors | None = None
    texts: dict[str, Tensors] | None = None

    def __len__(self) -> int:
        return len(self._first())

    @property
    def device(self) -> torch.device:
        """Returns the device of the prompts."""
        return device_of(self.prompt)

    def _first(self) -> torch.Tensor:
        """Returns one tensor that has a row for each sample."""
        return tree_leaves(self.prompt)[0] if self.has_source is None else self.has_source

    def sourced(self) -> bool | None:
        """Tells whether the samples have source pictures.

        Returns:
            True where all have them, False where none has, None where some have.
        """
        if self.source is None:
            return False
        if self.has_source is None:
            return True
        return bool(self.has_source.all()) or (None if self.has_source.any() else False)

    def _map(self, function) -> "Conditioning":
        """Applies a function to every tensor."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        mapped = {name: tree_map(function, value) for name, value in values.items() if value is not None}
        return replace(self, **mapped)

    def __getitem__(self, index) -> "Conditioning":
        """Selects samples by slice, or by mask or index tensor on the CPU."""
        if not isinstance(index, torch.Tensor):
            return self._map(lambda value: value[index])
        index = index.nonzero()[:, 0] if index.dtype == torch.bool else index
        there = {index.device: index}

        def select(value):
            if value.device not in there:
                there[value.device] = to_device(index, value.device)
            return value[there[value.device]]

        return self._map(select)

    def to(self, device: torch.device | str) -> "Conditioning":
        """Copies everything that the host does not read to a device.

        Args:
            device: Where the copies lie.

        Returns:
            The same samples there.
        """
        names = ("prompt", "source", "embedded_guidance", "empty_prompt", "texts")
        values = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return replace(self, **{name: placed(value, device) for name, value in values.items()})

    def repeat(self, k: int) -> "Conditioning":
        """Repeats each sample k times in a row.

        Args:
            k: How often a sample stands in the result.

        Returns:
            B k samples.
        """
        return self._map(lambda value: value.repeat_interleave(k, dim=0))

    def embedding(self, guidance: float | None) -> "Conditioning":
        """Gives all samples one embedded guidance.

        Args:
            guidance: The number that a guidance-distilled model takes as an input; None leaves the input out.

        Returns:
            The same samples with it.
        """
        if guidance is None:
            return replace(self, embedded_guidance=None)
        return replace(self, embedded_guidance=torch.full((len(self),), guidance, device=self.device))

    def without_prompt(self, empty: Tensors) -> "Conditioning":
        """Gives the samples empty prompts, their own where they have some; their source pictures stay.

        Args:
            empty: One sample's empty prompt, as `prompt` without the batch, for samples that have none of their own.

        Returns:
            The same samples with empty prompts.
        """
        if self.empty_prompt is not None:
            return replace(self, prompt=self.empty_prompt, empty_prompt=None)
        return replace(self, prompt=_expanded(empty, len(self)))

    def with_text(self, name: str, encoded: Tensors | None, index: torch.Tensor) -> "Conditioning":
        """Selects samples with another text in the place of their prompts, their own where they have it.

        Args:
            name: The text's key in `texts`; "" is the empty prompt.
            encoded: One sample's encoding, as `prompt` without the batch, for samples that have none of their own.
            index: int64 tensor [n] on the CPU, the samples.

        Returns:
            The n samples, without `texts`.

        Raises:
            ValueError: There is no such text.
        """
        own = self.empty_prompt if name == "" else (self.texts or {}).get(name)
        if own is not None:
            prompt = Conditioning(own)[index].prompt
        elif encoded is not None:
            prompt = _expanded(encoded, len(index))
        else:
            raise ValueError(f"the samples have no encoding of the text {name!r} in Conditioning.texts")
        return replace(replace(self, texts=None)[index], prompt=prompt)


def placed(tensors, device: torch.device | str):
    """Copies tensors to a device, but for what says how long prompts are.

    Args:
        tensors: A tensor, or dicts and tuples of them, such as prompts.
        device: Where the copies lie.

    Returns:
        The same structure of tensors.
    """
    if isinstance(tensors, dict):
        return {name: v if name in READ_ON_HOST else placed(v, device) for name, v in tensors.items()}
    return tree_map(lambda value: to_device(value, device), tensors)


def device_of(prompt: Tensors) -> torch.device:
    """Finds the device that a prompt lies on.

    Args:
        prompt: As `Conditioning.prompt`.

    Returns:
        The device of what the host does not read of it.
    """
    if isinstance(prompt, dict):
        prompt = next((value for name, value in prompt.items() if name not in READ_ON_HOST), prompt)
    return tree_leaves(prompt)[0].device


def _expanded(one: Tensors, samples: int) -> Tensors:
    """Gives all samples one prompt."""
    return tree_map(lambda value: value.expand(samples, *value.shape), one)


def concatenate(parts: list[Conditioning]) -> Conditioning:
    """Joins samples of one picture size, in order; those without a source picture get a blank one, marked as absent.

    Prompts of different length are filled up with zeros at the end, masks with False, and so are tensors of a prompt's
    dict that only some parts have, or texts. What only some parts have of the optional rest is dropped.

    Args:
        parts: The samples to be joined.

    Returns:
        All of them, in order.
    """
    some = next((p.source for p in parts if p.source is not None), None)
    sources = None
    if some is not None:

        def blank(part):
            return tree_map(lambda value: value.new_zeros(len(part), *value.shape[1:]), some)

        pictures = [blank(p) if p.source is None else p.source for p in parts]
        sources = tree_map(lambda *values: torch.cat(values), *pictures)
    joined = Conditioning(_join_prompts([p.prompt for p in parts]), sources, _join_marks(parts))
    optional = [field.name for field in fields(Conditioning)[3:] if field.name != "texts"]
    rest = {name: [getattr(p, name) for p in parts] for name in optional}
    kept = {name: values for name, values in rest.items() if all(v is not None for v in values)}
    return replace(joined, **{name: _join_prompts(values) for name, values in kept.items()}, texts=_join_texts(parts))


def with_length(prompt: dict[str, torch.Tensor], length: int) -> dict[str, torch.Tensor]:
    """Cuts a prompt to another length, or fills it up with zeros.

    Args:
        prompt: Tensors [B, L, ...], among them a ``prompt_mask``; others stay as they are.
        length: The new L.

    Returns:
        A new dict.
    """
    old = prompt["prompt_mask"].shape[1]

    def change(value: torch.Tensor) -> torch.Tensor:
        if value.dim() < 2 or value.shape[1] != old:
            return value
        return F.pad(value[:, :length], (0, 0) * (value.dim() - 2) + (0, max(0, length - old)))

    return {name: change(value) for name, value in prompt.items()}


def _join_marks(parts: list[Conditioning]) -> torch.Tensor | None:
    """Joins `has_source` of the parts; None where all have source pictures or none has."""
    if all(p.has_source is None for p in parts) and len({p.source is None for p in parts}) == 1:
        return None
    marks = [torch.full((len(p),), p.source is not None) if p.has_source is None else p.has_source for p in parts]
    return torch.cat(marks)


def _join_texts(parts: list[Conditioning]) -> dict[str, Tensors] | None:
    """Joins the texts of the parts by name; who lacks one is not asked with it, and gets zeros."""
    some = {name: value for p in parts for name, value in (p.texts or {}).items()}

    def of(part: Conditioning, name: str) -> Tensors:
        if part.texts and name in part.texts:
            return part.texts[name]
        zeros = tree_map(lambda value: value.new_zeros(len(part), *value.shape[1:]), some[name])
        return cast(Tensors, zeros)

    return {name: _join_prompts([of(part, name) for part in parts]) for name in some} or None


def _join_prompts(prompts: Sequence[Tensors]) -> Tensors:
    """Joins prompts by name, with blanks for tensors that a part lacks."""
    named = [prompt for prompt in prompts if isinstance(prompt, dict)]
    if len(named) == len(prompts):
        some = {name: value for prompt in named for name, value in prompt.items()}
        prompts = [
            {name: prompt[name] if name in prompt else _blank(value, prompt) for name, value in some.items()}
            for prompt in named
        ]
    return tree_map(_join, *prompts)


def _blank(like: torch.Tensor, prompt: dict[str, torch.Tensor]) -> torch.Tensor:
    """Makes zeros like a tensor of another prompt, with the batch of this one."""
    return like.new_zeros(len(next(iter(prompt.values()))), *like.shape[1:])


def _join(*values: torch.Tensor) -> torch.Tensor:
    """Joins tensors [B_i, L_i, ...], each filled up to the longest L, or [B_i] as they are."""
    longest = max((value.shape[1] for value in values if value.dim() > 1), default=0)
    filled = [
        F.pad(value, (0, 0) * (value.dim() - 2) + (0, longest - value.shape[1])) if value.dim() > 1 else value
        for value in values
    ]
    return torch.cat(filled)
