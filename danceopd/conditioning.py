"""What a velocity field is conditioned on."""

from dataclasses import dataclass, replace

import torch


@dataclass
class Conditioning:
    """Prompts and source pictures of B samples.

    tokens: [B, L] int64 prompt tokens. source: [B, 3, H, W] in [-1, 1], or None if no sample has one.
    has_source: [B] bool; `source` is ignored where it is False.
    """

    tokens: torch.Tensor
    source: torch.Tensor | None
    has_source: torch.Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index) -> "Conditioning":
        """Select samples by slice, mask or index tensor."""
        source = None if self.source is None else self.source[index]
        return Conditioning(self.tokens[index], source, self.has_source[index])

    def concatenate(self, other: "Conditioning") -> "Conditioning":
        """These samples followed by the others, which have the same picture size."""
        source = None if self.source is None else torch.cat([self.source, other.source])
        return Conditioning(
            torch.cat([self.tokens, other.tokens]), source, torch.cat([self.has_source, other.has_source])
        )

    def without_prompt(self, empty_tokens: torch.Tensor) -> "Conditioning":
        """The same samples with the empty prompt [L]; source pictures stay, as is usual for edit guidance."""
        return replace(self, tokens=empty_tokens.expand_as(self.tokens))
