"""What a velocity field is conditioned on."""

from dataclasses import dataclass, fields, replace

import torch


@dataclass
class Conditioning:
    """Prompts and source pictures of B samples.

    tokens: [B, L] int64 prompt tokens. source: [B, 3, H, W] in [-1, 1], or None if no sample has one.
    has_source: [B] bool; `source` is ignored where it is False. guidance_scale: [B] float32 or None; read by
    a field that is guided per sample (danceopd.fields.guided), and by nothing else.
    """

    tokens: torch.Tensor
    source: torch.Tensor | None
    has_source: torch.Tensor
    guidance_scale: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def _map(self, function) -> "Conditioning":
        values = (getattr(self, f.name) for f in fields(self))
        return Conditioning(*(None if value is None else function(value) for value in values))

    def __getitem__(self, index) -> "Conditioning":
        """Select samples by slice, mask or index tensor."""
        return self._map(lambda value: value[index])

    def to(self, device: torch.device | str) -> "Conditioning":
        return self._map(lambda value: value.to(device))

    def repeat(self, k: int) -> "Conditioning":
        """Each sample k times in a row: [B] -> [B * k]."""
        return self._map(lambda value: value.repeat_interleave(k, dim=0))

    def without_prompt(self, empty_tokens: torch.Tensor) -> "Conditioning":
        """The same samples with the empty prompt [L]; source pictures stay, as is usual for edit guidance."""
        return replace(self, tokens=empty_tokens.expand_as(self.tokens))


def concatenate(parts: list[Conditioning]) -> Conditioning:
    """Join samples of one picture size, in order; those without a source get a blank one, marked as absent."""
    shape = next((p.source.shape[1:] for p in parts if p.source is not None), None)
    sources = None
    if shape is not None:
        sources = torch.cat(
            [p.has_source.new_zeros(len(p), *shape).float() if p.source is None else p.source for p in parts]
        )
    scales = [p.guidance_scale for p in parts]
    return Conditioning(
        torch.cat([p.tokens for p in parts]),
        sources,
        torch.cat([p.has_source for p in parts]),
        None if any(s is None for s in scales) else torch.cat(scales),
    )
