"""Makes batches of the embedded network."""

import torch

from danceopd.core.conditioning import Conditioning
from danceopd.data.sampler import Group, Samples
from danceopd.world.tokenizer import tokenize


def make_conditioning(prompts: list[str], source: torch.Tensor | None, text_length: int) -> Conditioning:
    """Tokenizes prompts and attaches their source pictures [B, 3, H, W] (or None)."""
    return Conditioning(tokenize(prompts, text_length), source, torch.full((len(prompts),), source is not None))


def embedded_samples(data: list, text_length: int, image_size: int) -> Samples:
    """Makes samples of one picture size, whose prompts are tokenized as they are drawn."""

    def condition(rows, indices, without_prompt):
        prompts = ["" if empty else p for p, empty in zip(rows.prompts(indices), without_prompt, strict=True)]
        return make_conditioning(prompts, rows.sources(indices), text_length)

    return Samples([Group(data, (3, image_size, image_size), sum(map(len, data)))], condition)
